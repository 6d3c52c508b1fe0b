"""Bootstrap intervals of means over requests."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Values drawn at once: 32 MiB of indices, however many requests there are.
_DRAWS_AT_ONCE = 2**22


@dataclass(frozen=True)
class Interval:
    """A mean with the percentile bootstrap interval around it.

    Attributes:
        mean: The mean of the values, in their unit.
        low: Lower end of the interval.
        high: Upper end of the interval.
        count: Number of values.
    """

    mean: float
    low: float
    high: float
    count: int


def bootstrap_interval(
    values: Sequence[float] | Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of `values` and its percentile bootstrap interval (Efron, 1979).

    Args:
        values: One finite value per request; booleans count as 0 and 1.
        confidence: Share of the resampled means inside the interval, between 0 and 1.
        resamples: Number of times that as many values as there are are drawn with replacement.
        seed: The same seed gives the same interval. The global generator is left alone.

    Raises:
        ValueError: `values` is empty or not finite, `confidence` is not between 0 and 1, or
            `resamples` is below 1.
    """
    sample = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if sample.ndim != 1 or len(sample) == 0:
        raise ValueError(f"values has the shape {tuple(sample.shape)}; expected at least one value")
    _check(sample, confidence, resamples)
    generator = torch.Generator().manual_seed(seed)
    chunk = max(1, _DRAWS_AT_ONCE // len(sample))
    means = torch.cat(
        [
            sample[torch.randint(len(sample), (size, len(sample)), generator=generator)].mean(dim=1)
            for size in _chunk_sizes(resamples, chunk)
        ]
    )
    return _interval(sample, means, confidence)


def weighted_bootstrap_interval(
    sums: Sequence[float] | Tensor,
    counts: Sequence[float] | Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of all tokens of rows, and its bootstrap interval over the rows.

    The tokens of a row depend on each other, so whole rows are drawn.

    Args:
        sums: The sum of a finite figure over the tokens of each row.
        counts: The number of tokens of each row, above 0.
        confidence: As in `bootstrap_interval`.
        resamples: As in `bootstrap_interval`.
        seed: As in `bootstrap_interval`.

    Returns:
        The interval; its `count` is the number of rows.

    Raises:
        ValueError: `sums` and `counts` differ in length, or as `bootstrap_interval`.
    """
    if len(sums) != len(counts):
        raise ValueError(
            f"sums has {len(sums)} values and counts {len(counts)}; expected one of each per row"
        )
    table = torch.stack([torch.as_tensor(each, dtype=torch.float64) for each in (sums, counts)])
    if table.ndim != 2 or table.numel() == 0:
        raise ValueError(f"sums has the shape {tuple(table.shape[1:])}; expected at least one row")
    _check(table.flatten(), confidence, resamples)
    generator = torch.Generator().manual_seed(seed)
    rows = table.shape[1]
    drawn = torch.cat(
        [
            table[:, torch.randint(rows, (size, rows), generator=generator)].sum(dim=2)
            for size in _chunk_sizes(resamples, max(1, _DRAWS_AT_ONCE // rows))
        ],
        dim=1,
    )
    found = _interval(table[0], drawn[0] / drawn[1], confidence)
    mean = float(table[0].sum() / table[1].sum())
    return Interval(mean, found.low, found.high, rows)


def paired_difference(
    first: Sequence[float] | Tensor,
    second: Sequence[float] | Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean of `first - second` over the same requests, with its bootstrap interval.

    Two models that answer the same requests vary together, which makes this interval narrower than
    those of the two means suggest.

    Args:
        first: One value per request.
        second: One value per request, in the same order.
        confidence: As in `bootstrap_interval`.
        resamples: As in `bootstrap_interval`.
        seed: As in `bootstrap_interval`.

    Raises:
        ValueError: `first` and `second` differ in length, or as `bootstrap_interval`.
    """
    if len(first) != len(second):
        raise ValueError(
            f"first has {len(first)} values and second {len(second)}; expected one value of each "
            "per request"
        )
    difference = torch.as_tensor(first, dtype=torch.float64) - torch.as_tensor(
        second, dtype=torch.float64
    )
    return bootstrap_interval(difference, confidence=confidence, resamples=resamples, seed=seed)


def crossed_bootstrap_interval(
    values: Sequence[Sequence[float]] | Tensor,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean over seeds and requests, and its interval where both were drawn at random.

    Rows and columns are resampled independently of each other (the pigeonhole bootstrap; Owen,
    2007, arXiv:0711.1419, "The pigeonhole bootstrap"): the same requests are asked after every
    seed, so their answers are not as many as the cells of the table. It errs on the wide side. With
    one seed it is the interval over requests, which says nothing about other seeds; with few, its
    spread is a rough estimate.

    Args:
        values: (seeds, requests), finite; for a comparison the difference of two such tables.
        confidence: As in `bootstrap_interval`.
        resamples: Number of resampled tables.
        seed: As in `bootstrap_interval`.

    Raises:
        ValueError: As `bootstrap_interval`, or `values` has not two dimensions.
    """
    table = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    if table.ndim != 2 or table.numel() == 0:
        raise ValueError(
            f"values has the shape {tuple(table.shape)}; expected seeds × requests, one at least"
        )
    _check(table.flatten(), confidence, resamples)
    generator = torch.Generator().manual_seed(seed)

    def counts(number: int, size: int) -> Tensor:
        """How often each row, or column, is in each of `size` resampled tables."""
        drawn = torch.randint(number, (size, number), generator=generator)
        zeros = torch.zeros(size, number, dtype=torch.float64)
        return zeros.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))

    chunk = max(1, _DRAWS_AT_ONCE // max(table.shape))
    means = torch.cat(
        [
            ((counts(table.shape[0], size) @ table) * counts(table.shape[1], size)).sum(dim=1)
            for size in _chunk_sizes(resamples, chunk)
        ]
    )
    return _interval(table, means / table.numel(), confidence)


def _check(sample: Tensor, confidence: float, resamples: int) -> None:
    if not sample.isfinite().all():
        position = int((~sample.isfinite()).nonzero()[0])
        raise ValueError(f"values[{position}] is {float(sample[position])}; expected finite values")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}; expected a number between 0 and 1")
    if resamples < 1:
        raise ValueError(f"resamples={resamples}; expected at least 1")


def _interval(sample: Tensor, means: Tensor, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(sample.mean()), low, high, sample.numel())


def _chunk_sizes(total: int, chunk: int) -> list[int]:
    full, rest = divmod(total, chunk)
    return [chunk] * full + [rest] * (rest > 0)
