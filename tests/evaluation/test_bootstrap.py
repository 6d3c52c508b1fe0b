"""Intervals of means and of differences, over requests and over seeds."""

from typing import Any

import pytest
import torch

from sap_fast.evaluation import (
    Interval,
    bootstrap_interval,
    crossed_bootstrap_interval,
    paired_difference,
    weighted_bootstrap_interval,
)


def test_the_interval_is_that_of_the_normal_approximation():
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) * 3 + 5
    interval = bootstrap_interval(values)
    half = 1.96 * float(values.std(correction=0)) / 20
    assert interval.mean == pytest.approx(float(values.double().mean()))
    assert interval.count == 400
    # The quantiles of 10,000 resampled means have an error of about 2 % of the half width.
    assert interval.low == pytest.approx(interval.mean - half, abs=0.06 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.06 * half)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert narrow.high - narrow.low == pytest.approx(2 * half * 0.6745 / 1.96, rel=0.06)


def test_the_same_seed_gives_the_same_interval_and_leaves_the_global_generator():
    values = [0.0, 1.0, 4.0, 9.0]
    state = torch.get_rng_state()
    first = bootstrap_interval(values, resamples=100, seed=1)
    assert first == bootstrap_interval(values, resamples=100, seed=1)
    assert first != bootstrap_interval(values, resamples=100, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_many_values_are_drawn_in_chunks(monkeypatch):
    values = torch.randn(50, generator=torch.Generator().manual_seed(1))
    drawn = []
    randint = torch.randint

    def counted(high: int, size: tuple[int, int], **options: object) -> torch.Tensor:
        drawn.append(size)
        return randint(high, size, **options)

    monkeypatch.setattr("sap_fast.evaluation.bootstrap._DRAWS_AT_ONCE", 1000)
    monkeypatch.setattr(torch, "randint", counted)
    interval = bootstrap_interval(values, resamples=90)
    assert drawn == [(20, 50)] * 4 + [(10, 50)]
    assert interval.low < interval.mean < interval.high


def test_tokens_are_drawn_by_whole_rows():
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(1, 40, (300,), generator=generator)
    sums = counts * (2 + torch.randn(300, generator=generator))
    interval = weighted_bootstrap_interval(sums, counts)
    mean = float(sums.double().sum() / counts.sum())
    # Of the delta method for a ratio of two sums.
    half = 1.96 * float((sums - mean * counts).double().std(correction=0)) / 300**0.5
    half /= float(counts.double().mean())
    assert interval.mean == pytest.approx(mean) and interval.count == 300
    assert interval.low == pytest.approx(mean - half, abs=0.1 * half)
    assert interval.high == pytest.approx(mean + half, abs=0.1 * half)
    even = weighted_bootstrap_interval([1.0, 3.0, 5.0], [1, 1, 1], resamples=50)
    assert even == bootstrap_interval([1.0, 3.0, 5.0], resamples=50)
    with pytest.raises(ValueError, match="sums has 1 values and counts 2"):
        weighted_bootstrap_interval([1.0], [1, 2])


def test_booleans_and_constants():
    assert bootstrap_interval([True, True]) == Interval(1.0, 1.0, 1.0, 2)
    shares = bootstrap_interval([True, False, False, False])
    assert shares.mean == 0.25
    assert 0 <= shares.low <= 0.25 <= shares.high <= 1


def test_a_paired_difference_is_narrower_than_the_means_suggest():
    generator = torch.Generator().manual_seed(1)
    difficulty = torch.randn(200, generator=generator) * 10
    first = difficulty + 1 + torch.randn(200, generator=generator) * 0.1
    difference = paired_difference(first, difficulty)
    assert 0.9 < difference.low < 1 < difference.high < 1.1
    assert difference.count == 200
    assert paired_difference([True, False], [False, False]).mean == 0.5


def test_a_crossed_interval_is_wider_where_seeds_or_requests_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 60, generator=generator, dtype=torch.float64)

    def width(values: Any) -> float:
        interval = crossed_bootstrap_interval(values, resamples=4000)
        assert interval.low <= interval.mean <= interval.high
        assert interval.mean == pytest.approx(float(values.mean()))
        assert interval.count == values.numel()
        return interval.high - interval.low

    # Cells that vary alone; requests that every seed answers alike; seeds that differ as a whole.
    alone, requests = width(noise), width(noise[:1].expand(4, 60))
    seeds = width(noise + torch.tensor([[-3.0], [-1.0], [1.0], [3.0]]))
    assert 2 * 1.96 / 240**0.5 < alone < 2.1 * 2 * 1.96 / 240**0.5
    assert requests == pytest.approx(2 * 1.96 / 60**0.5, rel=0.3)
    assert seeds == pytest.approx(2 * 1.96 * 5**0.5 / 2, rel=0.3)


def test_with_one_seed_a_crossed_interval_is_that_over_requests() -> None:
    values = [float(k % 3 == 0) for k in range(50)]
    plain, crossed = bootstrap_interval(values), crossed_bootstrap_interval([values])
    assert (crossed.low, crossed.high) == pytest.approx((plain.low, plain.high), abs=0.03)
    assert crossed == crossed_bootstrap_interval([values])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), r"values has the shape \(0,\); expected at least one"),
        (lambda: bootstrap_interval([1.0, float("nan")]), r"values\[1\] is nan; expected finite"),
        (lambda: bootstrap_interval([1.0], confidence=1.0), "confidence=1.0; expected a number"),
        (lambda: bootstrap_interval([1.0], resamples=0), "resamples=0; expected at least 1"),
        (lambda: crossed_bootstrap_interval([]), r"values has the shape \(0,\); expected seeds"),
        (lambda: crossed_bootstrap_interval([[0.0, float("inf")]]), r"values\[1\] is inf"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "first has 1 values and second 2; expected"),
    ],
)
def test_bad_arguments_of_intervals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
