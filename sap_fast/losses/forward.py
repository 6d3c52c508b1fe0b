"""The forward of the losses: log-probabilities of the scored tokens."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sap_fast.compatibility import one_sequence_per_row, prefix_takes_positions
from sap_fast.configuration import VirtualTokens, text_setting, virtual_tokens
from sap_fast.losses import packable, packing
from sap_fast.losses.batches import Batch, Scored
from sap_fast.losses.head import (
    HeadCall,
    Score,
    UnknownHeadError,
    find_head,
    recomputed,
    token_log_probs,
)
from sap_fast.losses.packing import Packed, logits_of, running
from sap_fast.random_state import RandomState

# Causal LMs whose head passed, or failed, `HeadCall.check`: those in evaluation mode, and those in
# training mode, where a model may treat its logits in another way.
_chunkable: tuple[WeakSet[nn.Module], ...] = (WeakSet(), WeakSet())
_unchunkable: WeakSet[nn.Module] = WeakSet()


class Features(NamedTuple):
    """What a forward leaves at the N scored positions, and how logits come of it."""

    rows: Tensor  # (N, H) what the head was given; (N, V) logits where the head is not known
    vocabulary: int  # V
    head: HeadCall | None  # None: rows are logits
    outputs: Any  # of the model

    def scores(self, targets: Tensor, score: Score, *, total: bool = False) -> Tensor:
        """Returns the scores (N,) of targets (N, …), or their total."""
        if self.head is not None:
            return self.head.scores(self.rows, targets, self.vocabulary, total, score)
        scores = recomputed(score, self.rows, targets, self.vocabulary)
        return scores.sum() if total else scores

    def logits(self, rows: Tensor) -> Tensor:
        """Returns the logits (·, V) of some of the rows."""
        return rows if self.head is None else self.head.logits(rows)


def scored_log_probs(
    model: nn.Module, batch: Batch, scored: Scored, pack: bool, total: bool = False
) -> tuple[Tensor, Any]:
    """Returns the scored tokens' log-probabilities (N,) or their total, and the model's outputs."""
    features = scored_features(model, batch, scored, pack)
    return features.scores(scored.targets, token_log_probs, total=total), features.outputs


def scored_features(model: nn.Module, batch: Batch, scored: Scored, pack: bool) -> Features:
    """Runs the model, and returns what its head is given at the scored positions."""
    causal_lm, compiled = unwrap(model)
    virtual = virtual_tokens(model)
    packed = _pack(model, causal_lm, batch, scored) if pack else None
    if packed is None:
        inputs, token_index = model_inputs(causal_lm, batch, scored, virtual), None
    else:
        inputs, token_index = model_inputs(causal_lm, packed.inputs), packed.token_index
        positions = token_index.flatten()[scored.positions]
        scored = scored._replace(positions=positions, shape=inputs["input_ids"].shape)
    rows, length = inputs["input_ids"].shape
    shape = torch.Size((rows, length + virtual.number if virtual.in_sequence else length))
    chunkable = _chunkable[causal_lm.training]
    if causal_lm not in _unchunkable:
        before = RandomState([inputs["input_ids"].device])
        try:
            head = find_head(causal_lm, compiled)
            test = causal_lm not in chunkable
            with HeadCall(causal_lm, head, shape, test) as call, running(token_index):
                outputs = run_model(model, inputs)
            hidden, vocabulary = call.check(logits_of(outputs))
        except UnknownHeadError as reason:
            use_own_logits(causal_lm, str(reason))
            # The forward is repeated under the dropout masks of this one: later passes of the step
            # replay the random state and must meet the same masks.
            before.restore()
        else:
            chunkable.add(causal_lm)
            return Features(scored_rows(hidden, scored), vocabulary, call, outputs)
    with running(token_index):
        outputs = run_model(model, inputs)
    logits = logits_of(outputs)
    if logits.shape[:-1] != shape:
        raise ValueError(
            f"{type(causal_lm).__name__} returned logits of shape {tuple(logits.shape)} for "
            f"input_ids of shape {(rows, length)}; expected (batch, sequence, vocabulary)"
        )
    return Features(scored_rows(logits, scored), logits.shape[-1], None, outputs)


def use_own_logits(causal_lm: nn.Module, reason: str) -> None:
    """Has a model's losses computed from its own logits from now on, and says so once."""
    if causal_lm not in _unchunkable:
        _unchunkable.add(causal_lm)
        warnings.warn(
            f"{type(causal_lm).__name__}: {reason}. Losses are computed from its own logits, "
            "which take memory for batch × sequence × vocabulary.",
            stacklevel=4,
        )


def unwrap(model: nn.Module) -> tuple[nn.Module, bool]:
    """Returns the causal LM inside DDP, PEFT and compiled wrappers, and whether one is compiled."""
    compiled = False
    while True:
        # Not by getattr, which compiled and PEFT modules answer for what they wrap.
        children = model._modules
        compiled |= "_orig_mod" in children or model._compiled_call_impl is not None
        inner = children.get("_orig_mod", children.get("module"))
        if inner is None:
            get_base_model: Any = getattr(model, "get_base_model", None)
            inner = get_base_model() if get_base_model is not None else None
        if inner is None:
            return model, compiled
        model = inner


def _pack(model: nn.Module, causal_lm: nn.Module, batch: Batch, scored: Scored) -> Packed | None:
    if not packable.usable(model, causal_lm, batch):
        return None
    size, mask = text_setting(causal_lm, "hidden_size"), packing.mask_dtype(causal_lm)
    apart = packing.rows_apart()
    if apart is not None and len(apart) != len(scored.tokens):
        apart = None  # another batch than the one that it was said of
    key = size, mask, apart
    if key not in scored.packings:
        device = batch["input_ids"].device
        with torch.inference_mode(False):  # it may serve a pass with gradients later
            scored.packings[key] = packing.pack(
                scored.tokens, scored.attended, size, mask, device, apart
            )
    return scored.packings[key]


def model_inputs(
    causal_lm: nn.Module,
    batch: Batch,
    scored: Scored | None = None,
    virtual: VirtualTokens | None = None,
) -> dict[str, Any]:
    """Returns what of a batch the model is given, without its labels.

    A mask that hides nothing is left out: transformers' models would look for a zero in it, for
    which the host waits for the device.
    """
    accepted = inspect.signature(causal_lm.forward).parameters
    inputs: dict[str, Any] = {
        key: value for key, value in batch.items() if key != "labels" and isinstance(value, Tensor)
    }
    for key in ("max_length_q", "max_length_k"):  # beside cu_seq_lens_q and cu_seq_lens_k
        if batch.get(key) is not None:
            inputs[key] = batch[key]
    # Most models count positions from the start of the row, left padding included. With virtual
    # tokens before the row PEFT counts them itself.
    counted = virtual is not None and (
        virtual.in_sequence or (virtual.number > 0 and not prefix_takes_positions())
    )
    counts = scored is not None and scored.left_padded and not counted
    if counts and "position_ids" in accepted and "position_ids" not in inputs:
        inputs["position_ids"] = (batch["attention_mask"].long().cumsum(dim=1) - 1).clamp(min=0)
    # Beside positions its absence would mean that rows may hold several sequences; virtual tokens
    # get a mask only beside one.
    optional = "attention_mask" in accepted and accepted["attention_mask"].default is None
    beside = "position_ids" in inputs or (virtual is not None and virtual.number > 0)
    if scored is not None and not scored.padded and optional and not beside:
        inputs.pop("attention_mask", None)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def run_model(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Returns the outputs of a model, whose rows hold one sequence where nothing says otherwise."""
    if inputs.keys() & {"attention_mask", "position_ids"}:
        return model(**inputs)
    with one_sequence_per_row():
        return model(**inputs)


def scored_rows(features: Tensor, scored: Scored) -> Tensor:
    """Returns the features (N, ·) of the scored positions, out of (batch, sequence, ·).

    What comes before the last W positions of a row, `Scored.shape`, are virtual tokens.
    """
    features = features[:, features.shape[1] - scored.shape[1] :]
    return features.flatten(0, 1).index_select(0, scored.positions.to(features.device))
