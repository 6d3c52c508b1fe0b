"""The part of a batch that the probe passes see: its first rows that are scored."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sap_fast.losses import IGNORE_INDEX

#: Tensors of a batch with one entry per row along their first axis. Others, such as the images of
#: transformers' processors (`pixel_values`, `image_grid_thw`), are counted in other ways.
ROW_KEYS = frozenset(
    {
        "attention_mask",
        "input_ids",
        "inputs_embeds",
        "labels",
        "mm_token_type_ids",
        "position_ids",
        "task_ids",
        "token_type_ids",
    }
)

_said: set[frozenset[str]] = set()


def part_of(batch: Any, fraction: float) -> Any:
    """Return some rows of a batch, or of a list of micro-batches: the first that are scored.

    Rows without a scored token come last, as they say nothing of the loss. A batch that holds
    tensors which are not known to have one entry per row is not cut but returned as it is, with a
    warning once.

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
        micro_batches: Sequence[Any] = [batch]
    elif isinstance(batch, Sequence) and all(isinstance(one, Mapping) for one in batch):
        micro_batches = batch
    else:
        raise TypeError(
            f"batch is a {type(batch).__name__}; rows={fraction:g} needs a mapping of tensors, or "
            "a list of such micro-batches, to take rows of"
        )
    unknown = frozenset(key for one in micro_batches for key in one if not _is_by_row(key, one))
    if unknown:
        _say_once(unknown)
        return batch
    counts = [row_count(one) for one in micro_batches]
    rows = [
        (not scored, index, row)
        for index, one in enumerate(micro_batches)
        for row, scored in enumerate(_scored_rows(one, counts[index]))
    ]
    chosen = sorted(rows)[: math.ceil(fraction * sum(counts))]
    part = []
    for index, one in enumerate(micro_batches):
        kept = sorted(row for _, position, row in chosen if position == index)
        if kept:
            part.append(_take(one, kept, counts[index]))
    return part[0] if isinstance(batch, Mapping) else part


def row_count(batch: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch: the length of its first tensor.

    Raises:
        ValueError: if it has no tensor with an axis.
    """
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise ValueError(f"a batch with the entries {sorted(batch)} has no tensor to count rows by")


def _is_by_row(key: str, batch: Mapping[str, Any]) -> bool:
    value = batch[key]
    if not isinstance(value, Tensor) or value.dim() == 0:
        return True
    if key == "position_ids" and value.dim() > 2:
        return False  # (3, B, S), one for each axis of an image, and B may be 3
    return key in ROW_KEYS and len(value) == row_count(batch)


def _scored_rows(batch: Mapping[str, Any], rows: int) -> list[bool]:
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() < 2:
        return [True] * rows
    return (labels[:, 1:] != IGNORE_INDEX).any(dim=1).tolist()


def _take(batch: Mapping[str, Any], kept: list[int], rows: int) -> Mapping[str, Any]:
    if len(kept) == rows:
        return batch
    first = kept == list(range(len(kept)))

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        return value[: len(kept)] if first else value[torch.tensor(kept, device=value.device)]

    return {key: cut(value) for key, value in batch.items()}


def _say_once(unknown: frozenset[str]) -> None:
    if unknown not in _said:
        _said.add(unknown)
        warnings.warn(
            f"rows below 1 has no effect: the batch holds {', '.join(sorted(unknown))}, and it is "
            f"not known which of it belongs to which row (known by row: "
            f"{', '.join(sorted(ROW_KEYS))}); the probe passes see the whole batch",
            stacklevel=2,
        )
