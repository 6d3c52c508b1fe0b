"""How seconds and bytes are measured and summed up."""

from __future__ import annotations

import pytest
import torch

from benchmarks import measuring


def test_ratios_are_taken_in_the_same_rounds_over_whole_periods() -> None:
    above = {2: 1.0, 3: 3.0, 4: 2.0, 5: 6.0, 6: 100.0}
    below = {2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0, 6: 1.0}
    assert measuring.ratios(above, below, 2) == [2.0, 2.0]  # the last period is not whole
    assert measuring.ratio(above, below, 2) == 2.0
    assert measuring.ratio({2: 4.0, 5: 8.0}, below, 1) == 4.0


def test_a_summary_is_over_whole_periods() -> None:
    found = measuring.summary({0: 1.0, 1: 3.0, 2: 4.0, 3: 6.0, 4: 99.0}, 2)
    assert (found["median_s"], found["periods"]) == (3.5, 2)
    assert measuring.summary({0: 2.0}, 1) == {
        "median_s": 2.0,
        "q25_s": 2.0,
        "q75_s": 2.0,
        "periods": 1,
    }


def test_peak_is_of_what_is_alive_at_once() -> None:
    assert measuring.peak([5, -5, 3, 4, -4]) == 7
    assert measuring.peak([]) == 0


def test_memory_events_see_what_is_allocated_and_released() -> None:
    def work() -> None:
        first = torch.ones(1000)
        del first
        torch.ones(2000)

    assert measuring.memory_events(work) == [4000, -4000, 8000, -8000]


def test_live_bytes_count_a_storage_once_and_no_longer_than_it_lives() -> None:
    before = measuring.live_bytes()
    kept = torch.ones(1000)
    views = [kept[:10], kept.view(10, 100), torch.nn.Parameter(kept)]
    assert measuring.live_bytes() - before == 4000
    del kept, views
    assert measuring.live_bytes() == before


def test_seconds_are_those_of_the_work() -> None:
    assert 0 < measuring.seconds_of(lambda: torch.ones(10).sum(), "cpu") < 1


@pytest.mark.parametrize(
    ("values", "expected"), [([2.0], (2.0, 2.0, 2.0)), ([1.0, 2.0, 3.0], (1.0, 2.0, 3.0))]
)
def test_quartiles(values: list[float], expected: tuple[float, ...]) -> None:
    assert measuring.quartiles(values) == expected
