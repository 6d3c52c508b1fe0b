"""Launches that fail, one after the other, and what weights and versions are then.

Run by `test_cuda_sources.py` in a process of its own, with the library that it compiles from
csrc/cuda/ops.cpp and emulated_cuda.cpp: there the CUDA operations take the place of the CPU's.
"""

from __future__ import annotations

import ctypes
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sap_fast import ops
from sap_fast.step.guards import Perturbation

#: More than a table of 4 KB holds, so that fp32 takes two launches, and bf16 one more.
TENSORS, NARROW = 150, 3
LAUNCHES = 3
#: Failures: more than there are launches.
ALL = 100
SCALE = torch.tensor(0.1)


def lists() -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and a direction; those in bf16 stand among the others."""
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32] * TENSORS
    dtypes[10:10] = [torch.bfloat16] * NARROW
    made = [[torch.randn(5, generator=generator).to(d) for d in dtypes] for _ in range(2)]
    return made[0], made[1]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether all have the same bits."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@contextmanager
def failing() -> Iterator[None]:
    """Let an operation that is not launched say so."""
    try:
        yield
    except RuntimeError as error:
        assert re.match(r"sap_fast::\w+ could not be launched: .*, out of memory", str(error)), (
            error
        )
    else:
        raise AssertionError("it did not fail")


def perturb(library: ctypes.CDLL) -> None:
    """A failure of any launch of perturb, reflect and restore, or of all from it on, leaves W."""
    for failures in (1, ALL):
        for good in range(3 * LAUNCHES):
            params, buffers = lists()
            before = [parameter.clone() for parameter in params]
            library.sap_fast_fail_after(good, failures)
            with (
                failing(),
                Perturbation(params, buffers, SCALE, backend="native") as perturbation,
            ):
                perturbation.reflect()
            assert same(params, before), (good, failures)
    library.sap_fast_fail_after(-1, 0)
    params, buffers = lists()
    before = [parameter.clone() for parameter in params]
    with Perturbation(params, buffers, SCALE, backend="native") as perturbation:
        assert library.sap_fast_fail_after(-1, 0) == LAUNCHES
        assert not same(params, before)
        perturbation.reflect()
    assert same(params, before)


def versions(library: ctypes.CDLL) -> None:
    """Of what was written before the failure versions are counted, and of nothing else."""
    for good in range(LAUNCHES):
        params, buffers = lists()
        before = [parameter.clone() for parameter in params]
        library.sap_fast_fail_after(good, ALL)
        with failing():
            ops.perturb_swap_(params, buffers, SCALE, backend="native")
        for parameter, buffer, old in zip(params, buffers, before, strict=True):
            written = not torch.equal(parameter, old)
            assert parameter._version == buffer._version == written
        assert sum(parameter._version for parameter in params) == [0, 138, 150][good]
        params, buffers = lists()
        library.sap_fast_fail_after(good, ALL)
        with failing():
            ops.reflect_(params, buffers, backend="native")
        assert sum(parameter._version for parameter in params) == [0, 138, 150][good]
        assert not any(buffer._version for buffer in buffers)


def update(library: ctypes.CDLL) -> None:
    """Step counters go before the parameters, those that have directions after the others."""
    settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0}
    for good, (plain, blended) in enumerate([((0, 0), (0, 0)), ((1, 0), (0, 0)), ((1, 1), (0, 0))]):
        state = [[torch.ones(3) for _ in range(2)] for _ in range(4)]
        steps = [torch.zeros(()) for _ in range(2)]
        library.sap_fast_fail_after(good, ALL)
        with failing():
            ops.adamw_blend_(
                *state,
                steps,
                [torch.ones(3), None],
                lr=0.5,
                blend=torch.tensor(0.1),
                backend="native",
                **settings,
            )
        # The second one has no direction.
        for index, (counted, updated) in enumerate([blended, plain]):
            assert steps[index]._version == steps[index].item() == counted
            assert [tensors[index]._version for tensors in state] == [updated, 0, updated, updated]
            assert state[0][index].tolist() == [0.5 if updated else 1.0] * 3


def project(library: ctypes.CDLL) -> None:
    """A buffer that was not added to has no version."""
    buffer, gradient = torch.zeros(4), torch.ones(2, 4)
    library.sap_fast_fail_after(0, ALL)
    with failing():
        ops.call("probe_project_", "native", buffer, gradient, 1.0)
    assert buffer._version == 0
    library.sap_fast_fail_after(-1, 0)
    ops.call("probe_project_", "native", buffer, gradient, 1.0)
    assert buffer._version == 1


def main(path: str) -> None:
    """Put the library in the place of the CPU kernels, and run all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ops.load_library(path)
    library = ctypes.CDLL(path)
    for check in (perturb, versions, update, project):
        check(library)
    print("no launch fails unnoticed")


if __name__ == "__main__":
    main(sys.argv[1])
