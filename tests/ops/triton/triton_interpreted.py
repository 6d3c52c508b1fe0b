"""What only the Triton kernels do, in Triton's interpreter on the CPU.

What every backend has to compute is in `test_ops.py`. Triton reads TRITON_INTERPRET when a kernel
is defined, so both have a process of their own there: `test_triton.py` starts it, and pytest does
not collect this file by itself.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast import ops
from sap_fast.ops import reference
from sap_fast.ops import triton as backend

if not backend.interpreted:
    pytest.skip("needs TRITON_INTERPRET=1: see test_triton.py", allow_module_level=True)

import triton.language as tl

from sap_fast.ops.triton import adamw, perturb, probe, table
from sap_fast.step.guards import Perturbation

ADAMW: dict[str, Any] = {
    "lr": torch.tensor(3e-3, dtype=torch.float64),
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "maximize": False,
    "blend": None,
    "gradient_scale": None,
}


# ---- addresses ----


def test_memory_that_moved_is_seen() -> None:
    parameter = torch.nn.Parameter(torch.randn(40))
    moments, step = [torch.zeros(40), torch.zeros(40)], torch.tensor(0.0)
    # What is kept alive is not allocated again.
    seen = []
    for _ in range(3):
        parameter.data, gradient, buffer = torch.randn(3, 40).unbind()
        seen.append((parameter.data, gradient, buffer))
        state = [[tensor] for tensor in (parameter.detach(), gradient, *moments, step)]
        wanted = [[tensor.clone() for tensor in tensors] for tensors in state]
        ops.adamw_blend_(*state, **ADAMW, backend="triton")
        reference.adamw_blend_(*wanted, [], **ADAMW)
        torch.testing.assert_close(state, wanted, rtol=1e-6, atol=1e-6)
        reflected = 2 * buffer - parameter.detach()
        with torch.no_grad():
            ops.reflect_([parameter], [buffer], backend="triton")
        assert torch.equal(parameter, reflected)


def test_tables_of_the_same_memory_are_made_once() -> None:
    params, buffers = [torch.randn(5), torch.randn(9)], [torch.randn(5), torch.randn(9)]
    caches = (table._addresses, table._chunk_plan)
    ops.reflect_(params, buffers, backend="triton")
    before = [cache.cache_info() for cache in caches]
    ops.reflect_(params, buffers, backend="triton")
    after = [cache.cache_info() for cache in caches]
    for old, new in zip(before, after, strict=True):
        assert (new.hits, new.misses) == (old.hits + 1, old.misses)


@pytest.mark.parametrize("start", [0, 1], ids=["aligned", "not aligned"])
def test_a_tensor_of_several_chunks_and_some_more_is_gone_through_to_its_end(start: int) -> None:
    size = 2 * table.CHUNK + adamw.BLOCK + table.TAIL.value + 7
    params, buffers = (torch.randn(size + start)[start:] for _ in range(2))
    square = ops.sum_squares([params], backend="triton")
    torch.testing.assert_close(square, params.square().sum())
    state = [[x.clone()[start:]] for x in torch.rand(4, size + start)] + [[torch.tensor(3.0)]]
    wanted = [[tensor.clone() for tensor in tensors] for tensors in state]
    ops.adamw_blend_(*state, **ADAMW, backend="triton")
    reference.adamw_blend_(*wanted, [], **ADAMW)
    torch.testing.assert_close(state, wanted, rtol=1e-6, atol=1e-6)
    reflected = 2 * buffers - params
    ops.reflect_([params], [buffers], backend="triton")
    assert torch.equal(params, reflected)


@pytest.mark.parametrize("aligned", [0, 1])
def test_offsets_have_64_bits(aligned: int) -> None:
    # The tensors begin 2³³ elements before what is in memory; 2³³ is zero in 32 bits.
    offset, size = 2**33, perturb.BLOCK if aligned else 9
    params, buffers = torch.randn(perturb.BLOCK), torch.randn(perturb.BLOCK)
    wanted = params.clone()
    wanted[:size] = 2 * buffers[:size] - params[:size]
    addresses = torch.tensor([[x.data_ptr() - 4 * offset for x in (params, buffers)]])
    chunks = torch.tensor([[0, offset, size, aligned]])
    perturb.reflect_kernel[(1,)](addresses, chunks, (tl.float32, tl.float32), perturb.BLOCK)
    assert torch.equal(params, wanted)


# ---- launches ----


def launches(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    count = 0

    run_kernel = table.launcher

    def counted(*arguments: Any) -> None:
        nonlocal count
        count += 1
        run_kernel(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(table, "launcher", counted)
        run()
    return count


@pytest.mark.parametrize("tensors", [2, 40])
def test_launches_do_not_grow_with_the_list(monkeypatch: pytest.MonkeyPatch, tensors: int) -> None:
    def some() -> list[Tensor]:
        return [torch.randn(5) for _ in range(tensors)]

    def count(run: Callable[[], object]) -> int:
        return launches(monkeypatch, run)

    one = torch.tensor(1.0)
    assert count(lambda: ops.sum_squares(some(), backend="triton")) == 2
    assert count(lambda: ops.perturb_swap_(some(), some(), one, backend="triton")) == 1
    steps = [torch.tensor(0.0) for _ in range(tensors)]
    lists = (some(), some(), some(), some(), steps)
    assert count(lambda: ops.adamw_blend_(*lists, **ADAMW, backend="triton")) == 2
    rule = {"perturbation_norm": one, "radii": [one] * tensors, "backend": "triton"}
    assert count(lambda: ops.probe_rule_(some(), "normalized", 0.1, **rule)) == 6
    assert count(lambda: ops.probe_rule_(some(), "gradient", 0.1, **rule)) == 4


def test_an_interrupt_waits_until_the_version_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter, buffer = torch.randn(5), torch.randn(5)
    version, wanted = parameter._version, 2 * buffer - parameter

    def interrupted(tensors: list[Tensor]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        torch.autograd.graph.increment_version(tensors)

    monkeypatch.setattr(table, "increment_version", interrupted)
    # A process in the background may have been started with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            ops.reflect_([parameter], [buffer], backend="triton")
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert torch.equal(parameter, wanted) and parameter._version > version


class FailingLauncher:
    """Runs `good` launches, fails in the next `failures`, and runs the others."""

    def __init__(self, good: int, failures: int) -> None:
        self._failing = range(good, good + failures)
        self._run, self.count = table.launcher, 0

    def __call__(self, *arguments: Any) -> None:
        self.count += 1
        if self.count - 1 in self._failing:
            raise RuntimeError("out of memory")
        self._run(*arguments)


@pytest.mark.parametrize("failures", [1, 9])
@pytest.mark.parametrize("good", range(6))
def test_a_launch_that_fails_after_others_leaves_the_weights(
    good: int, failures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two launches each of perturb, reflect and restore: one for each dtype.
    dtypes = [torch.float32, torch.bfloat16, torch.float32]
    params, buffers = ([torch.randn(5).to(dtype) for dtype in dtypes] for _ in range(2))
    before = [parameter.clone() for parameter in params]
    monkeypatch.setattr(table, "launcher", FailingLauncher(good, failures))
    with pytest.raises(RuntimeError, match="out of memory"):
        with Perturbation(params, buffers, torch.tensor(0.1), backend="triton") as perturbation:
            perturbation.reflect()
    assert table.launcher.count > good
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_versions_are_those_of_the_launches_that_were(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float32]
    params, buffers = ([torch.randn(5).to(dtype) for dtype in dtypes] for _ in range(2))
    monkeypatch.setattr(table, "launcher", FailingLauncher(1, 1))
    with pytest.raises(RuntimeError, match="out of memory"):
        ops.perturb_swap_(params, buffers, torch.tensor(0.1), backend="triton")
    assert [tensor._version for tensor in params + buffers] == [1, 0, 1] * 2
    # The counters of the first dtype, and then its parameters, which fail.
    lists = [params, buffers, *([torch.ones(5) for _ in dtypes] for _ in range(2))]
    steps = [torch.tensor(0.0) for _ in dtypes]
    monkeypatch.setattr(table, "launcher", FailingLauncher(1, 1))
    before = [tensor._version for tensors in lists for tensor in tensors]
    with pytest.raises(RuntimeError, match="out of memory"):
        ops.adamw_blend_(*lists, steps, **ADAMW, backend="triton")
    assert [step._version for step in steps] == [1, 0, 1] == [step.item() for step in steps]
    assert [tensor._version for tensors in lists for tensor in tensors] == before


# ---- second stages that read more than one block ----


def test_more_partial_sums_than_are_read_at_a_time() -> None:
    partials = torch.rand(2 * perturb.FOLD_BLOCK + 9)
    result = torch.empty(())
    perturb.fold_kernel[(1,)](partials, result, len(partials), perturb.FOLD_BLOCK)
    torch.testing.assert_close(result.double(), partials.double().sum(), rtol=1e-6, atol=0.0)


def test_thousands_of_partial_sums_lose_no_precision() -> None:
    # Of 200,000 tokens; without compensation the sum is off by 2e-6.
    parts = 200_000 // probe.ROWS
    partials, buffer = torch.full((parts, 1), 12.8), torch.zeros(1)
    probe.project_kernel[(1,)](partials, buffer, parts, 1, 1.0, probe.COLUMN_BLOCK)
    assert abs(buffer.item() / (parts * partials[0].double().item()) - 1) < 2e-7


def test_more_chunks_than_are_read_at_a_time() -> None:
    block = probe.RULE_BLOCK
    starts = torch.tensor([0, 3, 2 * block + 9])
    counts = starts.diff().tolist()
    values = torch.rand(2 * block + 9)
    values[1], values[-1] = 2.0, 3.0
    norms = torch.empty(2)
    probe.layer_norm_kernel[(2,)](starts, values, norms, block)
    exact = torch.stack([part.double().sum().sqrt() for part in values.split(counts)])
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0.0)
    one = torch.tensor(1.0)
    radii = torch.tensor([one.data_ptr()] * 2)
    for wrong, flags in ((None, [1, 1]), (1, [0, 1]), (4, [1, 0]), (2 * block + 8, [1, 0])):
        finite = torch.ones(2 * block + 9, dtype=torch.int32)
        if wrong is not None:
            finite[wrong] = 0
        largest, every = torch.empty(2), torch.empty(2, dtype=torch.int32)
        probe.layer_extent_kernel[(2,)](starts, radii, values, finite, largest, every, block)
        assert largest.tolist() == [2.0, 3.0] and every.tolist() == flags
        result = torch.empty((), dtype=torch.uint8)
        probe.all_finite_kernel[(1,)](finite, result, len(finite), block)
        assert result == (wrong is None)
