"""Runs every operation of the installed sap_fast on its kernels and on the reference; compares.

Needs torch, numpy and sap_fast. Prints a line of JSON: what was built with what, what runs here,
and a digest of all results, which is the same on every machine with the same instruction set.

    python -I benchmarks/wheel_check.py
"""

from __future__ import annotations

import hashlib
import json
import platform

import torch
from torch import Tensor

from sap_fast import ops
from sap_fast.ops import native


def numbers(size: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return values in [−1, 1) that no generator of random numbers has a part in."""
    steps = torch.arange(size, dtype=torch.int64) * 7919 + seed * 104729
    return ((steps % 2003).double() / 1001.5 - 1).to(dtype)


def lists(seed: int) -> list[Tensor]:
    """Return tensors of every dtype and of several sizes."""
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    return [numbers(size, seed + size, kind) for size in (1, 63, 4097, 50000) for kind in kinds]


def run(backend: str) -> list[Tensor]:
    """Return what the operations return and leave behind."""
    params, buffers, scale = lists(1), lists(2), torch.tensor(0.3)
    found = [ops.sum_squares(params, backend=backend), ops.dot(params, buffers, backend=backend)]
    ops.perturb_swap_(params, buffers, scale, backend=backend)
    found += [tensor.clone() for tensor in params + buffers]
    ops.reflect_(params, buffers, backend=backend)
    found += [tensor.clone() for tensor in params + buffers]
    ops.restore_swap_(params, buffers, -1 / scale, backend=backend)
    found += [tensor.clone() for tensor in params + buffers]
    moments = [tensor.float().abs() for tensor in lists(3)]
    squares = [tensor.float().square() for tensor in lists(4)]
    steps = [torch.tensor(3.0) for _ in params]
    ops.adamw_blend_(
        params,
        lists(5),
        moments,
        squares,
        steps,
        buffers,
        lr=1e-3,
        beta1=0.9,
        beta2=0.999,
        eps=1e-8,
        weight_decay=0.01,
        blend=scale,
        gradient_scale=scale,
        backend=backend,
    )
    found += [*params, *moments, *squares, *steps]
    hidden = numbers(6 * 577, 6, torch.bfloat16).view(2, 3, 577)
    found.append(ops.call("probe_add", backend, hidden, numbers(577, 7)))
    buffer = torch.zeros(577)
    ops.call("probe_project_", backend, buffer, hidden, -1.0)
    assert buffer._version == 1, buffer._version
    layers, one = [numbers(577, 8), numbers(577, 9)], torch.tensor(1.0)
    ops.probe_rule_(
        layers, "normalized", 0.5, perturbation_norm=one, radii=[one, one], backend=backend
    )
    return [*found, buffer, *layers]


def main() -> None:
    """Run, compare and print."""
    reason = native.why_not("cpu")
    assert reason is None, reason
    ours, theirs = run("native"), run("reference")
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right)
    digest = hashlib.sha256()
    for tensor in ours:
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy(force=True).tobytes())
    found = {
        "python": platform.python_version(),
        "built_with_torch": native.extension.build_info()["torch"],
        "runs_with_torch": torch.__version__,
        "kernels": native.extension.cpu_capability(),
        "operations": len(ops.OPERATIONS),
        "bits": digest.hexdigest()[:12],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
