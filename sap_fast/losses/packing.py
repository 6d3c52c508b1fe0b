"""Packs the sequences of a batch into few rows in which a shared prefix appears once.

The sequences (padding dropped) are sorted, so that those with a common prefix are neighbours, and
cut into runs; each run becomes one packed row. In a row a sequence adds only the tokens that it
does not share with the one before it:

    chosen    a b c d e        slot      0 1 2 3 4 5 6
    rejected  a b c f g        token     a b c d e f g
                               position  0 1 2 3 4 3 4
                               end       7 7 7 5 5 7 7

The tokens form a tree in preorder: what descends from slot j lies in j … end[j] − 1, so that slot i
sees slot j where j ≤ i < end[j]. With that mask and these positions a causal LM computes for each
token what it computes for the sequence alone, up to rounding; `packable.usable` tests that it does.

Flash attention takes no mask, but the bounds of sequences that lie in one row one after the other:
for a model that runs on it all sequences become one row, without padding, and nothing is shared.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sap_fast.configuration import text_setting
from sap_fast.losses.host import transferred

# Elements of the mask: 16 MiB as bool, 64 MiB as the fp32 that eager attention adds.
MAX_MASK_ELEMENTS = 2**24

# A packed batch must save this much of the estimated cost: the mask is built and read for it, and
# a batch without padding would lose the kernels for plain causal attention.
MIN_SAVING = 0.05


class Packed(NamedTuple):
    """A (B, L) batch in R packed rows of S slots; on the batch's device."""

    inputs: dict[str, Any]
    """input_ids and position_ids, (R, S); attention_mask, (R, 1, S, S): bool, or added to scores.
    For flash attention R is 1, and in the place of the mask are the bounds of the N sequences that
    are not empty: cu_seq_lens_q and cu_seq_lens_k, (N + 1,) int32, max_length_q and max_length_k"""
    token_index: Tensor
    """(B, L) int64: row·S + slot of each token; −1 at padding"""


# ---- the running forward ----

_index: Tensor | None = None


def current_index() -> Tensor | None:
    """Returns `Packed.token_index` of the running forward, or None if its batch is not packed."""
    return _index


@contextmanager
def running(index: Tensor | None) -> Iterator[None]:
    """Lets `current_index` return `index` meanwhile."""
    global _index
    before, _index = _index, index
    try:
        yield
    finally:
        _index = before


_apart: Callable[[], Sequence[bool] | None] | None = None


def rows_apart() -> tuple[bool, ...] | None:
    """Returns which rows of the coming forward share no prefix with the others, see `apart`."""
    rows = None if _apart is None else _apart()
    return None if rows is None else tuple(rows)


@contextmanager
def apart(rows: Callable[[], Sequence[bool] | None]) -> Iterator[None]:
    """Lets some rows share prefixes only among themselves: what they are given differs.

    Args:
        rows: Says of each row of the coming forward whether it is one of them; None: none is.
    """
    global _apart
    before, _apart = _apart, rows
    try:
        yield
    finally:
        _apart = before


def logits_of(outputs: Any) -> Tensor:
    """Returns the logits among what a causal LM returned.

    A tuple may have losses before them, which have no axes.
    """
    if isinstance(outputs, Tensor):
        return outputs
    if hasattr(outputs, "logits"):
        return outputs.logits
    return next((x for x in outputs if isinstance(x, Tensor) and x.dim()), outputs[0])


def mask_dtype(causal_lm: Any) -> torch.dtype | None:
    """Returns the dtype of the mask: bool for SDPA, the model's dtype for eager attention.

    None for flash attention, which takes none.
    """
    implementation = text_setting(causal_lm, "_attn_implementation")
    if is_flash(implementation):
        return None
    return causal_lm.dtype if implementation == "eager" else torch.bool


def is_flash(implementation: str | None) -> bool:
    """Says whether attention is one that takes the bounds of sequences.

    Those are `flash_attention_2` and later, and the kernels of a hub, as
    `kernels-community/flash-attn2`; not the ones with a cache in pages (`paged|…`).
    """
    return implementation is not None and "flash" in implementation and "|" not in implementation


# ---- the packing ----


def pack(
    tokens: Tensor,
    attended: Tensor,
    hidden_size: int,
    mask: torch.dtype | None,
    device: torch.device,
    apart: Sequence[bool] | None = None,
) -> Packed | None:
    """Packs a batch into the number of rows that costs least; None if padding it costs no more.

    Args:
        tokens: (B, L) int64, on the host.
        attended: (B, L) bool, on the host: False at padding.
        hidden_size: H. Attention over S slots costs about S/(3H) of what the linear layers cost:
            forward 4·H·S against 24·H² for a token and layer, and its backward 2.5 times that,
            against once for layers that are frozen.
        mask: Dtype of the mask, see `mask_dtype`.
        device: Where the packed batch is wanted.
        apart: Says of each row whether it is of those that share nothing with the others.
    """
    if (attended.int().diff(dim=1, prepend=torch.zeros(len(attended), 1)) > 0).sum(1).gt(1).any():
        return None  # gaps inside a sequence: models differ in how they count positions there
    if mask is None:
        saves = attended.sum() <= (1 - MIN_SAVING) * attended.numel()
        return flatten(tokens, attended, device) if saves else None

    def cost(rows: int, length: int) -> float:
        return rows * length * (1 + length / (3 * hidden_size))

    sequences = Sequences(tokens, attended, apart)
    longest, total = max(sequences.lengths), sum(sequences.lengths) - sum(sequences.shared)
    best, best_cost = None, (1 - MIN_SAVING) * cost(*tokens.shape)
    for rows in range(1, len(tokens) + 1):
        # The shortest length at which the sequences fit into so many rows.
        capacities = range(longest, total + 1)
        capacity = capacities[
            bisect_left(capacities, True, key=lambda length: len(sequences.cut(length)) <= rows)
        ]
        starts = sequences.cut(capacity)
        if len(starts) * capacity**2 <= MAX_MASK_ELEMENTS:
            packed_cost = cost(len(starts), capacity)
            if packed_cost < best_cost:
                best, best_cost = starts, packed_cost
        if capacity == longest:
            break
    return None if best is None else sequences.lay_out(best, mask, device)


def flatten(tokens: Tensor, attended: Tensor, device: torch.device) -> Packed:
    """Lays all sequences of a batch one after the other into one row, for flash attention.

    As transformers' models take it: the bounds of the sequences in `cu_seq_lens_q` and
    `cu_seq_lens_k`, and positions that start again in each.
    """
    lengths = attended.sum(dim=1)
    lengths = lengths[lengths > 0]
    bounds = F.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    index = torch.full(attended.shape, -1)
    index[attended] = torch.arange(len(positions))
    longest = int(lengths.max())
    inputs = {
        "input_ids": tokens[attended][None].to(device),
        "position_ids": positions[None].to(device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return Packed(inputs, index.to(device))


class Sequences:
    """The sequences of a batch, sorted; `shared` is the prefix in common with the one before."""

    def __init__(
        self, tokens: Tensor, attended: Tensor, apart: Sequence[bool] | None = None
    ) -> None:
        self.attended = attended
        unsorted = [row[keep].tolist() for row, keep in zip(tokens, attended, strict=True)]
        group = [False] * len(unsorted) if apart is None else apart
        self.order = sorted(range(len(unsorted)), key=lambda row: (group[row], unsorted[row]))
        self.sequences = [unsorted[row] for row in self.order]
        self.lengths = [len(sequence) for sequence in self.sequences]
        self.shared = [0] + [
            _common_prefix(unsorted[a], unsorted[b]) if group[a] == group[b] else 0
            for a, b in pairwise(self.order)
        ]

    def cut(self, capacity: int) -> list[int]:
        """Starts a new row only where the next sequence's tokens would exceed `capacity`."""
        starts = [0]
        used = self.lengths[0]
        for rank in range(1, len(self.lengths)):
            used += self.lengths[rank] - self.shared[rank]
            if used > capacity:
                starts.append(rank)
                used = self.lengths[rank]
        return starts

    def lay_out(self, starts: Sequence[int], mask: torch.dtype, device: torch.device) -> Packed:
        """Builds the packed rows that start at the sequences `starts`."""
        bounds = [*starts, len(self.lengths)]
        added = [
            self.lengths[rank] - (0 if rank in starts else self.shared[rank])
            for rank in range(len(self.lengths))
        ]
        width = max(sum(added[first:last]) for first, last in pairwise(bounds))
        input_ids, position_ids = torch.zeros(2, len(starts), width, dtype=torch.long)
        # A padding slot ends at once: it sees itself, so that its softmax is finite.
        end = torch.arange(1, width + 1).repeat(len(starts), 1)
        index = torch.full(self.attended.shape, -1)
        for row, (first, last) in enumerate(pairwise(bounds)):
            path = torch.empty(0, dtype=torch.long)  # the slots of one sequence's tokens
            used = 0
            for rank in range(first, last):
                shared = self.lengths[rank] - added[rank]
                new = slice(used, used + added[rank])
                input_ids[row, new] = torch.tensor(self.sequences[rank][shared:], dtype=torch.long)
                position_ids[row, new] = torch.arange(shared, self.lengths[rank])
                path = torch.cat([path[:shared], torch.arange(new.start, new.stop)])
                end[row, path] = new.stop
                index[self.order[rank], self.attended[self.order[rank]]] = row * width + path
                used = new.stop
        input_ids, position_ids, end = transferred(
            torch.stack([input_ids, position_ids, end]), device
        )
        slot = torch.arange(width, device=device)
        visible = (slot <= slot[:, None]) & (slot[:, None] < end[:, None, None, :])
        if mask != torch.bool:
            hidden = torch.finfo(mask).min
            visible = torch.zeros_like(visible, dtype=mask).masked_fill_(~visible, hidden)
        inputs = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "attention_mask": visible,
        }
        return Packed(inputs, transferred(index, device))


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return position
    return min(len(left), len(right))
