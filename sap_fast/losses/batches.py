"""Batches: what is in them, what of them is scored, and how two become one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sap_fast.losses.host import (
    IGNORE_INDEX,
    HostView,
    TensorMemo,
    copied,
    joined_view,
    scoring_tensors,
    transferred,
    view_of,
)
from sap_fast.losses.packing import Packed

Batch = Mapping[str, Tensor]
"""`input_ids`, `labels` and, where rows are padded, `attention_mask`, each (B, S); and what else
the model's forward takes."""

WHY_NOTHING_IS_SCORED = (
    f"every label is {IGNORE_INDEX} or at padding. Expected labels equal to input_ids on the "
    "response; a prompt longer than the maximum length leaves none"
)

# What `DataCollatorWithFlattening` says of the sequences that it put into one row.
_OF_FLATTENED = {"position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k"}


class Scored(NamedTuple):
    """The N scored positions of a batch, and what packing has to know.

    The positions are those of (B, W), where W = S, or S + 1 if the model puts virtual tokens before
    the row: the last of these predicts the first token, and has position 0 here.
    """

    positions: Tensor  # (N,) row·W + position where the token is predicted; on the batch's device
    targets: Tensor  # (N,) the tokens; on the batch's device
    counts: list[int]  # scored tokens per row
    divisors: Tensor  # the same, (B,); on the batch's device
    shape: torch.Size  # (B, W)
    left_padded: bool
    padded: bool  # anywhere
    tokens: Tensor  # (B, S); on the host
    attended: Tensor  # (B, S) bool; on the host
    #: By hidden size, dtype of the mask, and rows that share nothing with the others.
    packings: dict[tuple[int, torch.dtype | None, tuple[bool, ...] | None], Packed | None]


def check_batch(batch: Batch, argument: str) -> None:
    """Raises `ValueError` that names `argument` unless what has to be there is, all (B, S)."""
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise ValueError(
                f"{argument} has no {key}, only {sorted(batch)}; "
                "expected input_ids and labels, and attention_mask where rows are padded"
            )
    for key in ("input_ids", "labels", "attention_mask"):
        if batch.get(key) is None:
            continue
        shape, expected = tuple(batch[key].shape), tuple(batch["input_ids"].shape)
        if shape != expected or len(shape) != 2:
            raise ValueError(
                f"{argument}[{key!r}] has shape {shape} beside input_ids {expected}; "
                "expected (batch, sequence) for both"
            )


def check_every_row_is_scored(counts: Sequence[int], argument: str) -> None:
    """Raises `ValueError` that names `argument` and the rows without a scored token."""
    rows = [row for row, count in enumerate(counts) if count == 0]
    if rows:
        raise ValueError(
            f"{argument} has no scored token in rows {rows} of its {len(counts)}: "
            f"{WHY_NOTHING_IS_SCORED}"
        )


# What was found for the last batches: of the passes of a step, only the first has to wait for the
# device. Eight entries serve the micro-batches of an accumulated step beside its safety pairs.
_found = TensorMemo(8)
_rows = TensorMemo(4)


def find_scored(batch: Batch, *originals: Batch, after_virtual: bool = False) -> Scored:
    """Finds the scored positions of `batch`, which may be put together from `originals`.

    Args:
        batch: Prompts with responses.
        originals: What the result is remembered by; default: `batch`.
        after_virtual: Whether a row's first token follows virtual tokens that the model puts before
            the row, and can be scored.
    """
    parts = originals or (batch,)

    def find() -> Scored:
        # The host waits for the device where it does not know the batch. That is here, before the
        # forward is queued.
        view = joined_view(originals) if originals else view_of(batch)
        return _find(batch, copied(batch) if view is None else view, after_virtual)

    tensors = [tensor for part in parts for tensor in scoring_tensors(part)]
    return _found.get(tensors, find, after_virtual)


def find_scored_anew(batch: Batch, after_virtual: bool) -> Scored:
    """Finds the scored positions of a batch without remembering them."""
    return _find(batch, copied(batch), after_virtual)


def _find(batch: Batch, view: HostView, after_virtual: bool) -> Scored:
    labels = batch["labels"]
    tokens, attended = view.tokens, view.attended
    if after_virtual:
        first = HostView(*(F.pad(tensor, (1, 0)) for tensor in view))
        view = first._replace(attended=F.pad(attended, (1, 0), value=True))
        labels = F.pad(labels, (1, 0), value=IGNORE_INDEX)
    scored = view.scored()
    flat = F.pad(scored, (0, 1)).flatten().nonzero().squeeze(1)
    positions = transferred(flat, labels.device)
    counts = scored.sum(dim=1)
    return Scored(
        positions=positions,
        targets=labels.flatten()[positions + 1],
        counts=counts.tolist(),
        divisors=transferred(counts, labels.device),
        shape=labels.shape,
        left_padded=not bool(attended[:, 0].all()),
        padded=not bool(attended.all()),
        tokens=tokens,
        attended=attended,
        packings={},
    )


def as_rows(batch: Batch) -> Batch:
    """Returns a batch with one sequence per row, which it may be already.

    Several sequences of a row are told by position_ids that start again, without attention_mask,
    as transformers' `DataCollatorWithFlattening` makes them and transformers' models read them.
    """
    positions = batch.get("position_ids")
    shape = batch["input_ids"].shape
    if batch.get("attention_mask") is not None or positions is None or positions.shape != shape:
        return batch
    tensors = [batch["input_ids"], batch["labels"], positions]
    rows: dict[str, Tensor] | None = _rows.get(tensors, lambda: _unflatten(*tensors))
    if rows is None:
        return batch
    of_tokens = {key for key, value in batch.items() if getattr(value, "shape", ()) == shape}
    if more := of_tokens - _OF_FLATTENED - {"input_ids", "labels"}:
        raise ValueError(
            f"a flattened batch of pairs has {sorted(more)} beside input_ids, labels and "
            "position_ids; expected these alone, or one sequence per row"
        )
    rest = {k: v for k, v in batch.items() if k not in rows and k not in _OF_FLATTENED}
    return {**rest, **rows}


def _unflatten(input_ids: Tensor, labels: Tensor, positions: Tensor) -> dict[str, Tensor] | None:
    """Returns the sequences as rows padded on the right, or None if each row holds one only."""
    # As transformers tells them apart: positions of one sequence grow by one.
    starts = F.pad(positions.cpu().diff(dim=1) != 1, (1, 0), value=True)
    if starts.sum() == len(starts):
        return None
    bounds = [*starts.flatten().nonzero().squeeze(1).tolist(), starts.numel()]
    parts = [slice(first, last) for first, last in pairwise(bounds)]

    def padded(tensor: Tensor, value: int) -> Tensor:
        flat = tensor.flatten()
        return torch.nn.utils.rnn.pad_sequence([flat[part] for part in parts], True, value)

    return {
        "input_ids": padded(input_ids, 0),
        "labels": padded(labels, IGNORE_INDEX),
        "attention_mask": padded(torch.ones_like(input_ids), 0),
    }


def concatenate(chosen: Batch, rejected: Batch) -> dict[str, Tensor]:
    """Makes one batch of 2B rows, padded on the right to the longer S, also where padding is left.

    Raises:
        ValueError: The two hold different tensors.
    """
    batches = [
        {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        for batch in (chosen, rejected)
    ]
    for batch in batches:
        # What was not padded may be now.
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
    if batches[0].keys() != batches[1].keys():
        raise ValueError(
            f"chosen has the tensors {sorted(batches[0])} and rejected {sorted(batches[1])}; "
            "expected the same in both"
        )
    length = max(batch["input_ids"].shape[1] for batch in batches)

    def padded(batch: Batch, key: str) -> Tensor:
        value, shape = batch[key], batch["input_ids"].shape
        if value.shape[:2] != shape:  # not one entry per token, such as an image
            return value
        later_axes = (0, 0) * (value.ndim - 2)
        return F.pad(value, (*later_axes, 0, length - shape[1]))

    return {key: torch.cat([padded(batch, key) for batch in batches]) for key in batches[0]}
