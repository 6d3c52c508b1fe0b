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
token what it computes for the sequence alone, up to rounding; `usable` tests that it does.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sap_fast.configuration import text_config, text_setting
from sap_fast.random_state import RandomState

# Elements of the mask: 16 MiB as bool, 64 MiB as the fp32 that eager attention adds.
MAX_MASK_ELEMENTS = 2**24

# A packed batch must save this much of the estimated cost: the mask is built and read for it, and
# a batch without padding would lose the kernels for plain causal attention.
MIN_SAVING = 0.05


class Packed(NamedTuple):
    """A (B, L) batch in R packed rows of S slots; on the batch's device."""

    inputs: dict[str, Tensor]
    """input_ids and position_ids, (R, S); attention_mask, (R, 1, S, S): bool, or added to scores"""
    token_index: Tensor
    """(B, L) int64: row·S + slot of each token; −1 at padding"""


# ---- which model ----

# Models for which a packed forward gave, or did not give, the log-probabilities of a plain one.
_packable: WeakSet[nn.Module] = WeakSet()
_unpackable: WeakSet[nn.Module] = WeakSet()

_index: Tensor | None = None
_testing = False


def current_index() -> Tensor | None:
    """Returns `Packed.token_index` of the running forward, or None if its batch is not packed."""
    return _index


def being_tested() -> bool:
    """Says whether the forward that is running is one of `usable`'s, whose result is not used."""
    return _testing


@contextmanager
def running(index: Tensor | None) -> Iterator[None]:
    """Lets `current_index` return `index` meanwhile."""
    global _index
    before, _index = _index, index
    try:
        yield
    finally:
        _index = before


def usable(model: nn.Module, causal_lm: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Says whether packing leaves the result as it is, by the configuration and by a test.

    The test runs at the first call for a model that its configuration allows. It costs three
    forwards of some 50 tokens once. It does not depend on the batch, so that all ranks of a
    sharded model, whose forwards communicate, run it at the same call.

    Args:
        model: The model as it was given, wrappers included.
        causal_lm: The model inside the wrappers.
        batch: The batch that is to be packed.
    """
    if causal_lm in _unpackable or not _is_allowed(model, causal_lm, batch):
        return False
    if causal_lm not in _packable:
        reason = _test(model, causal_lm, batch["input_ids"].device)
        if reason is not None:
            _unpackable.add(causal_lm)
            warnings.warn(
                f"{type(causal_lm).__name__}: {reason}. Batches are not packed: tokens that "
                "sequences share are computed for each of them, and padding too. pack=False "
                "leaves the test out.",
                stacklevel=5,
            )
            return False
        _packable.add(causal_lm)
    return True


def _is_allowed(model: nn.Module, causal_lm: nn.Module, batch: Mapping[str, Any]) -> bool:
    # Not imported here: a model of transformers exists only where that was imported already.
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(causal_lm, transformers.PreTrainedModel):
        return False
    tensors = {key for key, value in batch.items() if isinstance(value, Tensor)}
    if tensors != {"input_ids", "attention_mask", "labels"}:
        return False  # what else there is for each token would have to be packed, too
    accepted = set(inspect.signature(causal_lm.forward).parameters)
    config = text_config(causal_lm)
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        config._attn_implementation in ("sdpa", "eager")  # flash and flex take no 4-D mask
        and not window
        and kinds <= {"full_attention"}  # others count along the row, or mix all that lies in it
        and not getattr(causal_lm, "_is_stateful", False)
        and not getattr(config, "is_encoder_decoder", False)
        and not getattr(config, "output_router_logits", False)  # its loss is a mean over the slots
        and getattr(config, "hidden_size", None) is not None
        and {"position_ids", "attention_mask"} <= accepted
        and not any(_forbids(module) for module in model.modules())
    )


def _forbids(module: nn.Module) -> bool:
    # Compiled code would be compiled again for each new shape; virtual tokens in front of the
    # row (PEFT's prompt and prefix tuning) shift what the mask is for.
    children = module._modules
    return (
        module._compiled_call_impl is not None
        or "_orig_mod" in children
        or "prompt_encoder" in children
    )


def logits_of(outputs: Any) -> Tensor:
    """Returns the logits among what a causal LM returned."""
    if isinstance(outputs, Tensor):
        return outputs
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]


def mask_dtype(causal_lm: Any) -> torch.dtype:
    """Returns the dtype of the mask: bool for SDPA, the model's dtype for eager attention."""
    eager = text_setting(causal_lm, "_attn_implementation") == "eager"
    return causal_lm.dtype if eager else torch.bool


def _test(model: nn.Module, causal_lm: Any, device: torch.device) -> str | None:
    """Says why packing does not give a model's log-probabilities, or None if it does.

    A plain and a packed forward differ by rounding (in bf16 by some 1e-2 of what the context
    changes) where the model obeys the mask, and by all that the context changes where it does not.
    How much that is depends on the model and is measured by a third forward, with the plain causal
    mask over the packed rows. Medians, since one rounding can tip a router's choice.
    """
    vocabulary = text_config(causal_lm).vocab_size
    tokens = torch.randint(vocabulary, (5, 14), generator=torch.Generator().manual_seed(0))
    tokens[1, :6] = tokens[0, :6]  # a prompt with two answers
    tokens[2, :9] = tokens[1, :9]  # and a branch inside the second
    attended = torch.arange(14) < torch.tensor([14, 11, 14, 13, 14])[:, None]
    sequences = _Sequences(tokens, attended)
    packed = sequences.lay_out(sequences.cut(40), mask_dtype(causal_lm), device)
    tokens, attended = tokens.to(device), attended.to(device)
    plain = {"input_ids": tokens, "attention_mask": attended.long()}
    blind = {**packed.inputs, "attention_mask": torch.ones_like(packed.inputs["input_ids"])}
    packed_rows = packed.token_index[attended]
    # Only those with more than their own sequence before them: the others don't need the mask.
    length = packed.inputs["input_ids"].shape[1]
    masked = packed.inputs["position_ids"].flatten()[packed_rows] < packed_rows % length
    packed_rows = packed_rows[masked]
    plain_rows = attended.flatten().nonzero()[masked, 0]

    accepted = inspect.signature(causal_lm.forward).parameters
    without_cache = {"use_cache": False} if "use_cache" in accepted else {}

    def log_probs(inputs: dict[str, Tensor], rows: Tensor) -> Tensor:
        logits = logits_of(model(**inputs, **without_cache))
        return logits.flatten(0, 1)[rows.to(logits.device)].float().log_softmax(-1)

    with _aside(model, device):
        expected = log_probs(plain, plain_rows)
        try:
            with running(packed.token_index):
                right = log_probs(packed.inputs, packed_rows)
            wrong = log_probs(blind, packed_rows)
        except torch.OutOfMemoryError:
            raise  # says nothing about the model
        except Exception as error:  # whatever a model makes of a mask that it does not know
            return f"a forward with position_ids and a 4-D mask fails ({error})"
    difference, effect = ((x - expected).abs().median().item() for x in (right, wrong))
    if not difference <= 0.1 * effect:
        return (
            f"a forward with position_ids and a 4-D mask changes log-probabilities by "
            f"{difference:.2g} in the median (by {effect:.2g} with the wrong mask)"
        )
    return None


@contextmanager
def _aside(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Sets evaluation mode without gradients; puts modes and random state back on any exit."""
    global _testing
    modes = [(module, module.training) for module in model.modules()]
    random_state = RandomState([device])
    _testing = True
    try:
        for module, _ in modes:
            module.training = False  # not by eval(), which some adapters answer by merging
        with torch.no_grad():
            yield
    finally:
        _testing = False
        for module, training in modes:
            module.training = training
        # Before pytorch#165068 autocast kept the casts of weights made without gradients, and the
        # forward that follows in the same context would give those weights none.
        torch.clear_autocast_cache()
        random_state.restore()


# ---- the packing ----


def pack(
    tokens: Tensor, attended: Tensor, hidden_size: int, mask: torch.dtype, device: torch.device
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
    """
    if (attended.int().diff(dim=1, prepend=torch.zeros(len(attended), 1)) > 0).sum(1).gt(1).any():
        return None  # gaps inside a sequence: models differ in how they count positions there

    def cost(rows: int, length: int) -> float:
        return rows * length * (1 + length / (3 * hidden_size))

    sequences = _Sequences(tokens, attended)
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


class _Sequences:
    """The sequences of a batch, sorted; `shared` is the prefix in common with the one before."""

    def __init__(self, tokens: Tensor, attended: Tensor) -> None:
        self.attended = attended
        unsorted = [row[keep].tolist() for row, keep in zip(tokens, attended, strict=True)]
        self.order = sorted(range(len(unsorted)), key=unsorted.__getitem__)
        self.sequences = [unsorted[row] for row in self.order]
        self.lengths = [len(sequence) for sequence in self.sequences]
        self.shared = [0, *(_common_prefix(a, b) for a, b in pairwise(self.sequences))]

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
        input_ids, position_ids, end = torch.stack([input_ids, position_ids, end]).to(device)
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
        return Packed(inputs, index.to(device))


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return position
    return min(len(left), len(right))
