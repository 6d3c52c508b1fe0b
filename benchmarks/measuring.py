"""Seconds of what runs in turn, round after round, and bytes of what is alive meanwhile.

A step that takes its direction only now and then does not do the same in every step. What counts is
the mean over its whole periods.
"""

from __future__ import annotations

import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

#: Seconds by the number of the round.
Series = dict[int, float]


# ---- time ----


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Return the seconds of some work, from an idle device to an idle device."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def _periods(series: Series, period: int) -> list[list[int]]:
    """Return the rounds of `series`, a whole period at a time."""
    rounds = sorted(series)
    return [rounds[k : k + period] for k in range(0, len(rounds) - period + 1, period)]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile; one value is all three."""
    if len(values) == 1:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def summary(series: Series, period: int) -> dict[str, Any]:
    """Return median and quartiles of the mean seconds of a step, over whole periods."""
    means = [statistics.mean(series[k] for k in rounds) for rounds in _periods(series, period)]
    low, middle, high = quartiles(means)
    figures = {"median_s": middle, "q25_s": low, "q75_s": high}
    return {name: round(value, 4) for name, value in figures.items()} | {"periods": len(means)}


def ratios(above: Series, below: Series, period: int = 1) -> list[float]:
    """Return the ratio of the seconds in the same rounds, for every whole period."""
    common = {number: above[number] for number in above if number in below}
    return [
        sum(above[k] for k in rounds) / sum(below[k] for k in rounds)
        for rounds in _periods(common, period)
    ]


def ratio(above: Series, below: Series, period: int) -> float:
    """Return the median of `ratios`."""
    return round(statistics.median(ratios(above, below, period)), 3)


# ---- memory ----


def resident_bytes(entry: str) -> int:
    """Return an entry of `/proc/self/status` in bytes; elsewhere the peak that `getrusage` has."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(entry))


def reset_peak() -> None:
    """Start the peak of the resident size anew; where that is not allowed, loading counts too."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        print("the peak resident size includes the loading of the model", file=sys.stderr)


def live_bytes() -> int:
    """Return the bytes of all tensors that Python holds."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    storages = (tensor.untyped_storage() for tensor in tensors if tensor.device.type != "meta")
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def memory_events(work: Callable[[], object]) -> list[int]:
    """Return the bytes that PyTorch's allocator gives out (+) and takes back (−), in order."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [size for _, size in sorted(changes, key=lambda change: change[0])]


def peak(events: Sequence[int]) -> int:
    """Return the most bytes that are alive at once, of those allocated in `events`."""
    alive = most = 0
    for size in events:
        alive += size
        most = max(most, alive)
    return most
