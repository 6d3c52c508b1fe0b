"""The part of a batch that the probe passes see: its first rows that are scored."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sap_fast.losses.host import (
    IGNORE_INDEX,
    HostView,
    is_scored_by_token,
    keep_view,
    transferred,
    view_of,
)

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

#: Of a product such as 0.7·10, which is 7.000000000000001.
_ROUNDING = 1e-9

_said: set[frozenset[str]] = set()


class Part(NamedTuple):
    """Some rows of a batch, or of a list of micro-batches."""

    batch: Any
    """What the probe passes run on."""
    rows: list[list[bool]] | None
    """By micro-batch, which of its rows are taken; None if the part is the whole."""

    @property
    def share(self) -> float:
        """The part of all rows that are taken."""
        flags = [True] if self.rows is None else [flag for one in self.rows for flag in one]
        return sum(flags) / len(flags)


def part_of(batch: Any, fraction: float) -> Part:
    """Take some rows of a batch, or of a list of micro-batches: the first that are scored.

    Rows without a scored token come last, as they say nothing of the loss. Where the fraction is
    less than one row, that row is cut after the same part of its scored tokens: the loss of a
    causal model up to there does not depend on what follows. A batch that holds tensors which are
    not known to have one entry per row is not cut but taken as it is, with a warning once.

    The host reads a batch once, whatever reads it later (`sap_fast.losses.host`); a part is not
    read again.

    Args:
        batch: a mapping of tensors (B, …), or a list of such micro-batches.
        fraction: of the rows of all micro-batches together, in (0, 1]; rounded up to whole rows,
            if it is one at least.

    Returns:
        A batch, or a list of micro-batches; `batch` itself for a fraction of 1.

    Raises:
        TypeError: if `batch` is neither.
        ValueError: if a batch has no tensor to count rows by.
    """
    if fraction == 1:
        return Part(batch, None)
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
        return Part(batch, None)
    counts = [row_count(one) for one in micro_batches]
    views = [view_of(one) if is_scored_by_token(one) else None for one in micro_batches]
    rows = [
        (not scored, index, row)
        for index, view in enumerate(views)
        for row, scored in enumerate(_scored_rows(micro_batches[index], view, counts[index]))
    ]
    wanted = fraction * sum(counts)
    chosen = sorted(rows)[: math.ceil(wanted - _ROUNDING)]
    part, flags = [], []
    for index, one in enumerate(micro_batches):
        kept = sorted(row for _, position, row in chosen if position == index)
        flags.append([row in kept for row in range(counts[index])])
        if kept:
            view = views[index]
            length = None
            if view is not None and wanted < 1 - _ROUNDING:
                length = _first_tokens(view, kept[0], wanted)
            part.append(_take(one, view, kept, counts[index], length))
    return Part(part[0] if isinstance(batch, Mapping) else part, flags)


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


def _scored_rows(batch: Mapping[str, Any], view: HostView | None, rows: int) -> list[bool]:
    if view is not None:
        return view.scored().any(dim=1).tolist()
    labels = batch.get("labels")  # beside embeddings in the place of tokens
    if not isinstance(labels, Tensor) or labels.dim() < 2:
        return [True] * rows
    return (labels[:, 1:] != IGNORE_INDEX).any(dim=1).tolist()


def _first_tokens(view: HostView, row: int, fraction: float) -> int | None:
    """Return how many tokens of a row hold a fraction of its scored ones; None if none is."""
    scored = view.scored()[row].nonzero().squeeze(1)
    if len(scored) == 0:
        return None
    # The token after the last position: that is where it predicts.
    return int(scored[math.ceil(fraction * len(scored) - _ROUNDING) - 1]) + 2


def _take(
    batch: Mapping[str, Any],
    view: HostView | None,
    kept: list[int],
    rows: int,
    length: int | None,
) -> Mapping[str, Any]:
    """Return rows of a batch, and of these the first `length` tokens if it is given."""
    width = None if view is None else view.tokens.shape[1]
    # A mask (B, 1, S, S) has no one axis to cut.
    if length is not None and not all(_has_tokens(value, width) for value in batch.values()):
        length = None
    if len(kept) == rows and length is None:
        return batch
    first = kept == list(range(len(kept)))
    places: dict[torch.device, Tensor] = {}

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if first:
            value = value[: len(kept)]
        else:
            if value.device not in places:
                places[value.device] = transferred(torch.tensor(kept), value.device)
            value = value[places[value.device]]
        return value[:, :length] if length is not None and value.dim() > 1 else value

    part = {key: cut(value) for key, value in batch.items()}
    if view is not None:
        keep_view(part, view.cut(kept, view.tokens.shape[1] if length is None else length))
    return part


def _has_tokens(value: Any, width: int | None) -> bool:
    return not isinstance(value, Tensor) or value.dim() < 2 or value.shape[1] == width


def _say_once(unknown: frozenset[str]) -> None:
    if unknown not in _said:
        _said.add(unknown)
        warnings.warn(
            f"rows below 1 has no effect: the batch holds {', '.join(sorted(unknown))}, and it is "
            f"not known which of it belongs to which row (known by row: "
            f"{', '.join(sorted(ROW_KEYS))}); the probe passes see the whole batch",
            stacklevel=2,
        )
