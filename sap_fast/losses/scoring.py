"""What of a batch is scored, and the log-probabilities of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakSet, ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sap_fast.configuration import text_setting
from sap_fast.losses import packing
from sap_fast.losses.head import (
    HeadCall,
    UnknownHeadError,
    find_head,
    recomputed,
    token_log_probs,
)
from sap_fast.losses.packing import Packed, logits_of, running
from sap_fast.random_state import RandomState

IGNORE_INDEX = -100
"""Label of a token that is not scored, as in `torch.nn.functional.cross_entropy`."""

Batch = Mapping[str, Tensor]
"""`input_ids`, `attention_mask`, `labels`, each (B, S), and what else the model's forward takes."""

Reduction = Literal["sum", "mean"]
"""What of the tokens' log-probabilities stands for a response's."""


def response_log_probs(
    model: nn.Module, batch: Batch, *, reduction: Reduction = "sum", pack: bool = True
) -> Tensor:
    """Returns the log-probability of each row's response given its prompt, in nats.

    What it shares with the losses is said at `sap_fast.losses`.

    Args:
        model: A causal language model, possibly wrapped.
        batch: Prompts with their responses, (B, S).
        reduction: `"sum"` over the response tokens, or their `"mean"`.
        pack: Compute shared prefixes once, and no padding.

    Returns:
        (B,), fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: A row has no scored token, `reduction` is unknown, or `batch` is malformed.
    """
    return checked_log_probs(model, batch, "batch", reduction, pack)


WHY_NOTHING_IS_SCORED = (
    f"every label is {IGNORE_INDEX} or at padding. Expected labels equal to input_ids on the "
    "response; a prompt longer than the maximum length leaves none"
)


class Scored(NamedTuple):
    """The N scored positions of a (B, S) batch, and what packing has to know."""

    positions: Tensor  # (N,) row·S + s where the token is predicted; on the batch's device
    targets: Tensor  # (N,) the tokens; on the batch's device
    counts: Tensor  # (B,) scored tokens per row; on the host
    divisors: Tensor  # the same on the batch's device
    left_padded: bool
    tokens: Tensor  # (B, S); on the host
    attended: Tensor  # (B, S) bool; on the host
    packings: dict[tuple[int, torch.dtype], Packed | None]  # by hidden size and dtype of the mask


def check_reduction(reduction: str) -> None:
    """Raises `ValueError` unless `reduction` is known."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; expected 'sum' or 'mean'")


def check_batch(batch: Batch, argument: str) -> None:
    """Raises `ValueError` that names `argument` unless the three tensors are there, all (B, S)."""
    for key in ("input_ids", "attention_mask", "labels"):
        if key not in batch:
            raise ValueError(
                f"{argument} has no {key}, only {sorted(batch)}; "
                "expected input_ids, attention_mask and labels"
            )
        shape, expected = tuple(batch[key].shape), tuple(batch["input_ids"].shape)
        if shape != expected or len(shape) != 2:
            raise ValueError(
                f"{argument}[{key!r}] has shape {shape} beside input_ids {expected}; "
                "expected (batch, sequence) for both"
            )


def check_every_row_is_scored(counts: Tensor, argument: str) -> None:
    """Raises `ValueError` that names `argument` and the rows without a scored token."""
    if not counts.all():
        rows = (counts == 0).nonzero().squeeze(1).tolist()
        raise ValueError(
            f"{argument} has no scored token in rows {rows} of its {len(counts)}: "
            f"{WHY_NOTHING_IS_SCORED}"
        )


class TensorMemo:
    """Results by the tensors that they were computed from, while those live unchanged.

    Args:
        size: Results to keep at most; the oldest is dropped.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._results: dict[tuple[int, ...], tuple[list[ref[Tensor]], list[int], Any]] = {}

    def get(self, tensors: Sequence[Tensor], compute: Callable[[], Any]) -> Any:
        """Returns what `compute` returned for these tensors, or calls it."""
        if any(tensor.is_inference() for tensor in tensors):
            return compute()  # they don't count their versions
        key = tuple(id(tensor) for tensor in tensors)
        versions = [tensor._version for tensor in tensors]
        entry = self._results.get(key)
        if entry is not None and entry[1] == versions:
            return entry[2]
        # Else a result that is first wanted in inference mode could not be used for training.
        with torch.inference_mode(False):
            result = compute()

        def forget(_: ref[Tensor]) -> None:
            self._results.pop(key, None)

        self._results.pop(key, None)
        if len(self._results) >= self._size:
            self._results.pop(next(iter(self._results)))
        self._results[key] = [ref(tensor, forget) for tensor in tensors], versions, result
        return result


# What was found for the last batches: of the passes of a step, only the first has to wait for the
# device. Eight entries serve the micro-batches of an accumulated step beside its safety pairs.
_found = TensorMemo(8)


def find_scored(batch: Batch, *originals: Batch) -> Scored:
    """Finds the scored positions of `batch`, which may be put together from `originals`."""
    keys = ("input_ids", "attention_mask", "labels")
    tensors = [original[key] for original in originals or (batch,) for key in keys]

    def find() -> Scored:
        labels = batch["labels"]
        # All that the host has to know in one copy. It and the copies back wait for the device, so
        # they are made here, before the forward is queued.
        labelled, attended, tokens = torch.stack(
            (labels != IGNORE_INDEX, batch["attention_mask"] != 0, batch["input_ids"])
        ).cpu()
        labelled, attended = labelled.bool(), attended.bool()
        # The first token after left padding would be predicted from a padding position: not scored.
        scored = labelled[:, 1:] & attended[:, 1:] & attended[:, :-1]
        positions = F.pad(scored, (0, 1)).flatten().nonzero().squeeze(1).to(labels.device)
        counts = scored.sum(dim=1)
        return Scored(
            positions=positions,
            targets=labels.flatten()[positions + 1],
            counts=counts,
            divisors=counts.to(labels.device),
            left_padded=not bool(attended[:, 0].all()),
            tokens=tokens,
            attended=attended,
            packings={},
        )

    return _found.get(tensors, find)


def checked_log_probs(
    model: nn.Module, batch: Batch, argument: str, reduction: Reduction, pack: bool
) -> Tensor:
    """Returns what `row_log_probs` gives for the batch given as `argument`, once it is checked."""
    check_reduction(reduction)
    check_batch(batch, argument)
    scored = find_scored(batch)
    check_every_row_is_scored(scored.counts, argument)
    return row_log_probs(model, batch, scored, reduction, pack)


def concatenate(chosen: Batch, rejected: Batch) -> dict[str, Tensor]:
    """Makes one batch of 2B rows, padded on the right to the longer S, also where padding is left.

    Raises:
        ValueError: The two hold different tensors.
    """
    batches = [
        {key: value for key, value in batch.items() if isinstance(value, Tensor)}
        for batch in (chosen, rejected)
    ]
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


def row_log_probs(
    model: nn.Module, batch: Batch, scored: Scored, reduction: Reduction, pack: bool
) -> Tensor:
    """Returns each row's log-probability (B,), the sum or the mean over its scored tokens."""
    log_probs, _ = scored_log_probs(model, batch, scored, pack)
    # Scattered over the positions and summed along the row: index_add would add in an order that
    # differs from run to run on a GPU.
    shape = batch["input_ids"].shape
    by_position = log_probs.new_zeros(shape.numel())
    by_position = by_position.scatter(0, scored.positions.to(log_probs.device), log_probs)
    sums = by_position.view(shape).sum(dim=1)
    return sums / scored.divisors.to(sums.device) if reduction == "mean" else sums


# Causal LMs whose head passed, or failed, `HeadCall.check`.
_chunkable: WeakSet[nn.Module] = WeakSet()
_unchunkable: WeakSet[nn.Module] = WeakSet()


def scored_log_probs(
    model: nn.Module, batch: Batch, scored: Scored, pack: bool, total: bool = False
) -> tuple[Tensor, Any]:
    """Returns the scored tokens' log-probabilities (N,) or their total, and the model's outputs."""
    causal_lm, compiled = unwrap(model)
    packed = _pack(model, causal_lm, batch, scored) if pack else None
    if packed is None:
        inputs, token_index = _model_inputs(causal_lm, batch, scored.left_padded), None
    else:
        inputs, token_index = _model_inputs(causal_lm, packed.inputs, False), packed.token_index
        scored = scored._replace(positions=token_index.flatten()[scored.positions])
    shape = inputs["input_ids"].shape
    if causal_lm not in _unchunkable:
        before = RandomState([inputs["input_ids"].device])
        try:
            head = find_head(causal_lm, compiled)
            test = causal_lm not in _chunkable
            with HeadCall(causal_lm, head, shape, test) as call, running(token_index):
                outputs = model(**inputs)
            hidden, vocabulary = call.check(logits_of(outputs))
        except UnknownHeadError as reason:
            _unchunkable.add(causal_lm)
            warnings.warn(
                f"{type(causal_lm).__name__}: {reason}. Losses are computed from its own logits, "
                "which take memory for batch × sequence × vocabulary.",
                stacklevel=3,
            )
            # The forward is repeated under the dropout masks of this one: later passes of the step
            # replay the random state and must meet the same masks.
            before.restore()
        else:
            _chunkable.add(causal_lm)
            return call.log_probs(
                _scored_rows(hidden, scored), scored.targets, vocabulary, total
            ), outputs
    with running(token_index):
        outputs = model(**inputs)
    logits = logits_of(outputs)
    if logits.shape[:-1] != shape:
        raise ValueError(
            f"{type(causal_lm).__name__} returned logits of shape {tuple(logits.shape)} for "
            f"input_ids of shape {tuple(shape)}; expected (batch, sequence, vocabulary)"
        )
    log_probs = recomputed(
        token_log_probs, _scored_rows(logits, scored), scored.targets, logits.shape[-1]
    )
    return log_probs.sum() if total else log_probs, outputs


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
    if not packing.usable(model, causal_lm, batch):
        return None
    key = text_setting(causal_lm, "hidden_size"), packing.mask_dtype(causal_lm)
    if key not in scored.packings:
        device = batch["input_ids"].device
        with torch.inference_mode(False):  # it may serve a pass with gradients later
            scored.packings[key] = packing.pack(scored.tokens, scored.attended, *key, device)
    return scored.packings[key]


def _model_inputs(causal_lm: nn.Module, batch: Batch, left_padded: bool) -> dict[str, Any]:
    accepted = inspect.signature(causal_lm.forward).parameters
    inputs: dict[str, Any] = {
        key: value for key, value in batch.items() if key != "labels" and isinstance(value, Tensor)
    }
    # Most models count positions from the start of the row, left padding included.
    if left_padded and "position_ids" in accepted and "position_ids" not in inputs:
        inputs["position_ids"] = (batch["attention_mask"].long().cumsum(dim=1) - 1).clamp(min=0)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _scored_rows(features: Tensor, scored: Scored) -> Tensor:
    return features.flatten(0, 1).index_select(0, scored.positions.to(features.device))
