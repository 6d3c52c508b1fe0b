"""What the device does meanwhile: its kernels, by class, and for how long it is busy."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.workloads import Row

#: Kernels by what stands in their names; the first that fits. A CPU has operations of PyTorch in
#: their place.
CLASSES = {
    "ours": r"sap_fast|perturb|reflect|restore_swap|adamw|count_steps|column_sums|sum_products"
    r"|multi_tensor|fused_adam",
    "attention": r"flash|fmha|attention|sdp",
    "products": r"gemm|nvjet|cutlass|xmma|cublas|aten::(addmm|mm|bmm|matmul|linear)$",
    "copies": r"memcpy|memset|copy|CatArray",
    "reductions": r"reduce|softmax|norm|sort|scan",
    "elementwise": r"elementwise|vectorized|triton_|aten::(mul|add|sub|div|silu|neg)",
}


class Kernel(NamedTuple):
    """One of them, in nanoseconds."""

    name: str
    start: int
    duration: int

    @property
    def kind(self) -> str:
        """Its class; `"others"` if none fits."""
        found = (kind for kind, names in CLASSES.items() if re.search(names, self.name, re.I))
        return next(found, "others")


def kernels_of(work: Callable[[], object], device: str) -> list[Kernel]:
    """Run some work once and return its kernels in the order of their starts."""
    on_device = device != "cpu"
    activity = ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        work()
        if on_device:
            torch.cuda.synchronize()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    wanted = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
    found = [
        Kernel(event.name(), event.start_ns(), event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == wanted and not event.name().startswith("[")
    ]
    return sorted(found, key=lambda kernel: kernel.start)


def busy(kernels: Sequence[Kernel]) -> int:
    """Return the nanoseconds in which at least one kernel runs."""
    total, end = 0, 0
    for kernel in kernels:
        start, stop = max(kernel.start, end), kernel.start + kernel.duration
        if stop > start:
            total += stop - start
            end = stop
    return total


def by_class(kernels: Sequence[Kernel]) -> Row:
    """Return the milliseconds of each class, as columns."""
    total = dict.fromkeys([*CLASSES, "others"], 0)
    for kernel in kernels:
        total[kernel.kind] += kernel.duration
    return {f"{kind}_ms": round(value / 1e6, 3) for kind, value in total.items()}
