"""Times of configurations that run in turn, round after round, and their ratios.

A preset does not do the same in every step, so what counts is the mean over its whole periods.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from sap_fast.optimizer import PRESETS

#: Seconds by the number of the round.
Series = dict[int, float]


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


def preset_period(name: str) -> int:
    """Return after how many steps a configuration does the same passes again."""
    preset = PRESETS.get(name, PRESETS["paper"])
    return math.lcm(preset.direction_every, preset.probe_every)


def _periods(series: Series, period: int) -> list[list[int]]:
    """Return the rounds of `series`, a whole period at a time."""
    rounds = sorted(series)
    return [rounds[k : k + period] for k in range(0, len(rounds) - period + 1, period)]


def summary(series: Series, period: int) -> dict[str, Any]:
    """Return median and quartiles of the mean seconds of a step, over whole periods."""
    means = [statistics.mean(series[k] for k in rounds) for rounds in _periods(series, period)]
    low, middle, high = statistics.quantiles(means, n=4) if len(means) > 1 else 3 * means
    figures = {"median_s": middle, "q25_s": low, "q75_s": high}
    return {name: round(value, 4) for name, value in figures.items()} | {"periods": len(means)}


def ratio(above: Series, below: Series, period: int) -> float:
    """Return the median, over whole periods, of the ratio of the seconds in the same rounds."""
    common = {number: above[number] for number in above if number in below}
    ratios = [
        sum(above[k] for k in rounds) / sum(below[k] for k in rounds)
        for rounds in _periods(common, period)
    ]
    return round(statistics.median(ratios), 3)
