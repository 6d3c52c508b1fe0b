"""What the host knows of a batch, so that it need not wait for the device to find out.

The host has to read a batch: which positions are scored, how its sequences are packed, which rows a
probe pass takes. A batch that lies on a device is copied back for that, once, and the copy waits
until the device has done all that it was given before. `to_device` reads the batch before it goes
there, and nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a token that is not scored, as in `torch.nn.functional.cross_entropy`."""


def to_device(batch: Mapping[str, Any], device: torch.device | str) -> dict[str, Any]:
    """Returns a batch on a device, of which the host keeps what the losses ask of it.

    Neither the copies nor the losses wait for the device then, and neither do the parts that
    `ProbeSet(rows=…)` takes.

    Args:
        batch: A mapping of tensors on the host, and of anything else, which stays as it is.
        device: Where the tensors are wanted.
    """
    target = torch.device(device)
    moved = {k: transferred(v, target) if isinstance(v, Tensor) else v for k, v in batch.items()}
    if is_scored_by_token(batch) and batch["input_ids"].device.type == "cpu":
        keep_view(moved, view_of(batch))
    return moved


def transferred(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on a device. One of the host goes to CUDA without a wait on either side."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# ---- what is remembered of tensors ----


class TensorMemo:
    """Results by the tensors that they were computed from, while those live unchanged.

    Args:
        size: Results to keep at most; the oldest is dropped.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._results: dict[Any, tuple[list[ref[Tensor]], list[int], Any]] = {}

    def get(self, tensors: Sequence[Tensor], compute: Callable[[], Any], kind: Any = None) -> Any:
        """Returns what `compute` returned for these tensors, or calls it.

        Args:
            tensors: What the result depends on.
            compute: Gives the result.
            kind: What else it depends on, hashable.
        """
        if any(tensor.is_inference() for tensor in tensors):
            return compute()  # they don't count their versions
        entry = self._entry(tensors, kind)
        if entry is not None:
            return entry[2]
        # Else a result that is first wanted in inference mode could not be used for training.
        with torch.inference_mode(False):
            result = compute()
        self.put(tensors, result, kind)
        return result

    def known(self, tensors: Sequence[Tensor], kind: Any = None) -> Any:
        """Returns what is kept for these tensors, or None."""
        if any(tensor.is_inference() for tensor in tensors):
            return None
        entry = self._entry(tensors, kind)
        return None if entry is None else entry[2]

    def put(self, tensors: Sequence[Tensor], result: Any, kind: Any = None) -> None:
        """Keeps a result for these tensors."""
        if any(tensor.is_inference() for tensor in tensors):
            return
        key = _key(tensors, kind)

        def forget(_: ref[Tensor]) -> None:
            self._results.pop(key, None)

        self._results.pop(key, None)
        if len(self._results) >= self._size:
            self._results.pop(next(iter(self._results)))
        references = [ref(tensor, forget) for tensor in tensors]
        self._results[key] = references, [tensor._version for tensor in tensors], result

    def _entry(self, tensors: Sequence[Tensor], kind: Any) -> Any:
        entry = self._results.get(_key(tensors, kind))
        unchanged = entry is not None and entry[1] == [tensor._version for tensor in tensors]
        return entry if unchanged else None


def _key(tensors: Sequence[Tensor], kind: Any) -> tuple[Any, ...]:
    return kind, *(id(tensor) for tensor in tensors)


# ---- the view of a batch ----


class HostView(NamedTuple):
    """What the host has to know of a batch; each (B, S)."""

    tokens: Tensor  # int64
    labelled: Tensor  # bool: the label is not `IGNORE_INDEX`
    attended: Tensor  # bool: no padding

    def scored(self) -> Tensor:
        """Returns (B, S−1) bool: whether the token after each position is scored."""
        # The first token after left padding would be predicted from a padding position.
        return self.labelled[:, 1:] & self.attended[:, 1:] & self.attended[:, :-1]

    def cut(self, rows: Sequence[int], length: int) -> HostView:
        """Returns the first `length` tokens of some rows."""
        return HostView(*(tensor[list(rows), :length] for tensor in self))


# As many micro-batches and parts of them as an accumulated step may have. An entry is a copy of
# tokens and two masks, and goes when its batch does.
_views = TensorMemo(256)


def is_scored_by_token(batch: Mapping[str, Any]) -> bool:
    """Says whether a batch has token ids and labels (B, S), and a mask of that shape or none."""
    ids, labels, mask = (batch.get(key) for key in ("input_ids", "labels", "attention_mask"))
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.dim() != 2:
        return False
    return labels.shape == ids.shape and getattr(mask, "shape", ids.shape) == ids.shape


def scoring_tensors(batch: Mapping[str, Any]) -> list[Tensor]:
    """Returns what the view of a batch depends on."""
    masked = batch.get("attention_mask") is not None
    keys = ["input_ids", "labels", *(["attention_mask"] if masked else [])]
    return [batch[key] for key in keys]


def view_of(batch: Mapping[str, Any]) -> HostView:
    """Returns the view of a batch; copies the batch to the host, unless it was seen before."""
    return _views.get(scoring_tensors(batch), lambda: copied(batch))


def keep_view(batch: Mapping[str, Any], view: HostView) -> None:
    """Keeps what is known of a batch already."""
    _views.put(scoring_tensors(batch), view)


def copied(batch: Mapping[str, Any]) -> HostView:
    """Returns the view of a batch, in one copy of all that the host has to know."""
    labels, mask = batch["labels"], batch.get("attention_mask")
    labelled, attended, tokens = torch.stack(
        (
            labels != IGNORE_INDEX,
            torch.ones_like(labels) if mask is None else mask != 0,
            batch["input_ids"],
        )
    ).cpu()
    return HostView(tokens, labelled.bool(), attended.bool())


def joined_view(batches: Sequence[Mapping[str, Any]]) -> HostView | None:
    """Returns the view of batches below each other, padded on the right; None if one is unknown."""
    views = [_views.known(scoring_tensors(batch)) for batch in batches]
    if any(view is None for view in views):
        return None
    length = max(view.tokens.shape[1] for view in views)
    return HostView(
        *(
            torch.cat([F.pad(tensor, (0, length - tensor.shape[1])) for tensor in tensors])
            for tensors in zip(*views, strict=True)
        )
    )


def carry_views(before: Any, after: Any) -> None:
    """Keeps what the host knows of batches that something else moved to a device.

    Args:
        before: A batch on the host, or a mapping of such.
        after: The same in other tensors.
    """
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return
    if is_scored_by_token(before) and is_scored_by_token(after):
        moved = scoring_tensors(after)
        on_host = all(tensor.device.type == "cpu" for tensor in scoring_tensors(before))
        if on_host and any(x is not y for x, y in zip(scoring_tensors(before), moved, strict=True)):
            keep_view(after, view_of(before))
        return
    for key, value in before.items():
        carry_views(value, after.get(key))
