"""The part of a batch that the probe passes see: its first rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def part_of(batch: Any, fraction: float) -> Any:
    """Return the first rows of a batch, or of a list of micro-batches.

    Args:
        batch: a mapping of tensors (B, …), or a list of such micro-batches.
        fraction: of the rows of all micro-batches together, in (0, 1]; rounded up to whole rows.

    Returns:
        A batch, or a list of micro-batches; `batch` itself for a fraction of 1.

    Raises:
        TypeError: if `batch` is neither.
        ValueError: if a batch has no tensor to count rows by.
    """
    if fraction == 1:
        return batch
    if isinstance(batch, Mapping):
        return first_rows(batch, math.ceil(fraction * row_count(batch)))
    if not isinstance(batch, Sequence) or isinstance(batch, str):
        raise TypeError(
            f"batch is a {type(batch).__name__}; rows={fraction:g} needs a mapping of tensors, or "
            "a list of such micro-batches, to take the first rows of"
        )
    wanted = math.ceil(fraction * sum(row_count(micro_batch) for micro_batch in batch))
    part = []
    for micro_batch in batch:
        if wanted > 0:
            part.append(first_rows(micro_batch, wanted))
            wanted -= row_count(micro_batch)
    return part


def first_rows(batch: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """Return the first `count` rows of a batch: of each tensor whose first axis counts its rows."""
    rows = row_count(batch)
    if count >= rows:
        return batch
    return {
        key: value[:count]
        if isinstance(value, Tensor) and value.dim() and len(value) == rows
        else value
        for key, value in batch.items()
    }


def row_count(batch: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch: the length of its first tensor.

    Raises:
        ValueError: if it has no tensor with an axis.
    """
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise ValueError(f"a batch with the entries {sorted(batch)} has no tensor to count rows by")
