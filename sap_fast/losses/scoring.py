"""Task loss and safety losses over response tokens; the full B×S×V logits never exist.

A batch is a mapping with `input_ids`, `attention_mask` and `labels`, each (B, S). `labels` equal
`input_ids` where a token is scored and are `IGNORE_INDEX` elsewhere. Position s predicts token s+1.
A token is scored where its label says so and neither it nor the token before it is padding, so the
padding side does not change a loss.

How the logits are avoided: the model runs as it was given, wrappers included, while hooks on its
output embeddings (the head) keep the hidden states and let only the last position through. The head
is then applied to the scored positions alone, a chunk at a time. The gradient of a chunk is found
with it, where it is known by then what it will be multiplied by (in the task loss) or where the
head is frozen; else the chunk is computed again in the backward pass. A model's first use also
tests that this gives the model's own logits. Where it does not, or can't, losses are computed from
the model's own logits, and a warning says so.

What sequences of a batch share at their start, and padding, is left out of the model's forward
where the model allows (`sap_fast.losses.packing`).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakSet

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
from sap_fast.losses.packing import Packed, TensorMemo, logits_of, running
from sap_fast.random_state import RandomState

IGNORE_INDEX = -100
"""Label of a token that is not scored, as in `torch.nn.functional.cross_entropy`."""

Batch = Mapping[str, Tensor]
Reduction = Literal["sum", "mean"]


def task_loss(
    model: nn.Module,
    batch: Batch,
    *,
    num_items: int | Tensor | None = None,
    pack: bool = True,
) -> Tensor:
    """Negative log-likelihood of the response tokens of `batch`, in nats per token.

    Equals the `loss` that a transformers model returns for `labels=`, with the router loss of a
    mixture of experts where `output_router_logits` asks for it; only padding is never scored.
    Synchronises with the host before the forward, to find the scored positions; not again for the
    same tensors, unchanged.

    Args:
        model: A causal LM, possibly wrapped (PEFT, DDP, `torch.compile`).
        batch: `input_ids`, `attention_mask`, `labels`, each (B, S), and further tensors for the
            model's forward.
        num_items: Scored tokens of the whole accumulated batch (`num_items_in_batch` of the
            transformers `Trainer`), by which the sum over this batch is divided. Default: those of
            this batch, which gives the mean.
        pack: Compute what sequences share at their start once, and no padding, where that pays and
            the model allows (`losses.packing`). Equal up to rounding without dropout; with it, a
            shared prefix draws one mask for all that share it.

    Returns:
        A scalar, fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: No token of `batch` is scored, `num_items` is an int below 1, or `batch` is
            malformed.
    """
    if isinstance(num_items, int) and num_items < 1:
        raise ValueError(f"num_items is {num_items}; expected at least 1, or None for the mean")
    _check_batch(batch, "batch")
    scored = _find_scored(batch)
    if not scored.counts.any():
        raise ValueError(
            f"batch has no scored token in any of its {len(scored.counts)} rows: "
            f"{_WHY_NOTHING_IS_SCORED}"
        )
    total, outputs = _scored_log_probs(model, batch, scored, pack, total=True)
    count = len(scored.targets) if num_items is None else num_items
    loss = -total / (count.to(total.device) if isinstance(count, Tensor) else count)
    router_loss = getattr(outputs, "aux_loss", None)
    if router_loss is not None:
        coefficient = text_setting(_unwrap(model)[0], "router_aux_loss_coef") or 0.0
        loss = loss + coefficient * router_loss.to(loss.device)
    return loss


def response_log_probs(
    model: nn.Module, batch: Batch, *, reduction: Reduction = "sum", pack: bool = True
) -> Tensor:
    """Log-probability of each row's response given its prompt, in nats.

    Synchronises with the host before the forward, to find the scored positions; not again for the
    same tensors, unchanged.

    Args:
        model: A causal LM, possibly wrapped (PEFT, DDP, `torch.compile`).
        batch: `input_ids`, `attention_mask`, `labels`, each (B, S), and further tensors for the
            model's forward.
        reduction: `"sum"` over the response tokens, or their `"mean"`.
        pack: Compute what sequences share at their start once, and no padding, where that pays and
            the model allows (`losses.packing`). Equal up to rounding without dropout; with it, a
            shared prefix draws one mask for all that share it.

    Returns:
        (B,), fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: A row has no scored token, `reduction` is unknown, or `batch` is malformed.
    """
    return _checked_log_probs(model, batch, "batch", reduction, pack)


def contrastive_loss(
    model: nn.Module,
    chosen: Batch,
    rejected: Batch,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    pack: bool = True,
) -> Tensor:
    """Mean over pairs of −log σ((log p(chosen) − log p(rejected)) / temperature).

    The safety loss of arXiv:2505.16737v2. Both batches run as one forward. Synchronises with the
    host before it, to find the scored positions; not again for the same tensors, unchanged.

    Args:
        model: A causal LM, possibly wrapped (PEFT, DDP, `torch.compile`).
        chosen: The safe responses, a batch of B rows.
        rejected: The harmful responses to the same prompts, row for row; S may differ.
        temperature: τ, above 0. The default leaves the paper's loss as it is.
        reduction: What stands for log p: the `"mean"` over a response's tokens, or their `"sum"` as
            in the authors' code, which saturates (a gradient of 1e-28) on pairs that the model
            already tells apart.
        pack: Compute what sequences share at their start once, and no padding, where that pays and
            the model allows (`losses.packing`). Equal up to rounding without dropout; with it, a
            shared prefix draws one mask for all that share it.

    Returns:
        A scalar, fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: A row has no scored token, the batches do not pair, or `temperature` or
            `reduction` is out of range.
    """
    margins = _margins(model, chosen, rejected, temperature, reduction, pack)[1]
    return -F.logsigmoid(margins).mean()


def difference_loss(
    model: nn.Module,
    chosen: Batch,
    rejected: Batch,
    *,
    reduction: Reduction = "mean",
    pack: bool = True,
) -> Tensor:
    """Mean over pairs of nll(chosen) − nll(rejected).

    The safety loss of arXiv:2505.16737v1. Both batches run as one forward. Synchronises with the
    host before it, to find the scored positions; not again for the same tensors, unchanged.

    Args:
        model: A causal LM, possibly wrapped (PEFT, DDP, `torch.compile`).
        chosen: The safe responses, a batch of B rows.
        rejected: The harmful responses to the same prompts, row for row; S may differ.
        reduction: What stands for nll: the `"mean"` over a response's tokens, or their `"sum"`.
        pack: Compute what sequences share at their start once, and no padding, where that pays and
            the model allows (`losses.packing`). Equal up to rounding without dropout; with it, a
            shared prefix draws one mask for all that share it.

    Returns:
        A scalar, fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: A row has no scored token, the batches do not pair, or `reduction` is unknown.
    """
    chosen_log_probs, rejected_log_probs = _pair_log_probs(model, chosen, rejected, reduction, pack)
    return (rejected_log_probs - chosen_log_probs).mean()


def refusal_loss(
    model: nn.Module,
    chosen: Batch,
    rejected: Batch | None = None,
    *,
    reduction: Reduction = "mean",
    pack: bool = True,
) -> Tensor:
    """Mean over rows of nll(chosen), whatever else a model might say.

    The losses of pairs can be lowered by making the given harmful response unlikely, while another
    that is in no pair becomes the likeliest; this one can't, and runs half the tokens. But nothing
    in it speaks against harmful responses that the task data hold, and it may refuse what is
    harmless after a narrow task (docs/study.md, row 40). Synchronises with the host before the
    forward, as `response_log_probs` does.

    Args:
        model: A causal LM, possibly wrapped (PEFT, DDP, `torch.compile`).
        chosen: The safe responses, a batch of B rows.
        rejected: Not used; here so that the loss can stand where the others do.
        reduction: What stands for nll: the `"mean"` over a response's tokens, or their `"sum"`.
        pack: Compute what sequences share at their start once, and no padding, where that pays and
            the model allows (`losses.packing`). Equal up to rounding without dropout; with it, a
            shared prefix draws one mask for all that share it.

    Returns:
        A scalar, fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: A row has no scored token, or `reduction` is unknown.
    """
    return -_checked_log_probs(model, chosen, "chosen", reduction, pack).mean()


def joint_loss(
    model: nn.Module,
    chosen: Batch,
    rejected: Batch,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    pack: bool = True,
) -> Tensor:
    """The value of `contrastive_loss`, with the gradient of it plus `refusal_loss`.

    For a level that is held (`FusedSAP(safety_level=…)`). Whether a model still tells the pairs
    apart is the better measure of what tuning does to it, as a narrow task moves the likelihood of
    refusals whatever is refused; but that likelihood is the better direction, as it also counts
    where the model would open as no pair does. Both come from one forward. As the gradient is not
    that of the value, a line search has no use for this loss.

    Args:
        model: A causal LM, possibly wrapped (PEFT, DDP, `torch.compile`).
        chosen: as for `contrastive_loss`.
        rejected: as for `contrastive_loss`.
        temperature: as for `contrastive_loss`; the refusals' likelihood has none.
        reduction: as for `contrastive_loss`, of both.
        pack: as for `contrastive_loss`.

    Returns:
        A scalar, fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: as `contrastive_loss`.
    """
    chosen_log_probs, margins = _margins(model, chosen, rejected, temperature, reduction, pack)
    refusal = -chosen_log_probs.mean()
    return -F.logsigmoid(margins).mean() + (refusal - refusal.detach())


_WHY_NOTHING_IS_SCORED = (
    f"every label is {IGNORE_INDEX} or at padding. Expected labels equal to input_ids on the "
    "response; a prompt longer than the maximum length leaves none"
)


class _Scored(NamedTuple):
    """The N scored positions of a (B, S) batch, and what packing has to know."""

    positions: Tensor  # (N,) row·S + s where the token is predicted; on the batch's device
    targets: Tensor  # (N,) the tokens; on the batch's device
    counts: Tensor  # (B,) scored tokens per row; on the host
    divisors: Tensor  # the same on the batch's device
    left_padded: bool
    tokens: Tensor  # (B, S); on the host
    attended: Tensor  # (B, S) bool; on the host
    packings: dict[tuple[int, torch.dtype], Packed | None]  # by hidden size and dtype of the mask


def _check_reduction(reduction: str) -> None:
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; expected 'sum' or 'mean'")


def _check_batch(batch: Batch, argument: str) -> None:
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


def _check_every_row_is_scored(counts: Tensor, argument: str) -> None:
    if not counts.all():
        rows = (counts == 0).nonzero().squeeze(1).tolist()
        raise ValueError(
            f"{argument} has no scored token in rows {rows} of its {len(counts)}: "
            f"{_WHY_NOTHING_IS_SCORED}"
        )


# What was found for the last batches: of the passes of a step, only the first has to wait for the
# device. Eight entries serve the micro-batches of an accumulated step beside its safety pairs.
_found = TensorMemo(8)


def _find_scored(batch: Batch, *originals: Batch) -> _Scored:
    """The scored positions of `batch`, which was put together from `originals` if there are any."""
    keys = ("input_ids", "attention_mask", "labels")
    tensors = [original[key] for original in originals or (batch,) for key in keys]

    def find() -> _Scored:
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
        return _Scored(
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


def _checked_log_probs(
    model: nn.Module, batch: Batch, argument: str, reduction: Reduction, pack: bool
) -> Tensor:
    _check_reduction(reduction)
    _check_batch(batch, argument)
    scored = _find_scored(batch)
    _check_every_row_is_scored(scored.counts, argument)
    return _row_log_probs(model, batch, scored, reduction, pack)


def _margins(
    model: nn.Module,
    chosen: Batch,
    rejected: Batch,
    temperature: float,
    reduction: Reduction,
    pack: bool,
) -> tuple[Tensor, Tensor]:
    """Return log p(chosen), and (log p(chosen) − log p(rejected)) / temperature."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number above 0")
    chosen_log_probs, rejected_log_probs = _pair_log_probs(model, chosen, rejected, reduction, pack)
    return chosen_log_probs, (chosen_log_probs - rejected_log_probs) / temperature


def _pair_log_probs(
    model: nn.Module, chosen: Batch, rejected: Batch, reduction: Reduction, pack: bool
) -> tuple[Tensor, Tensor]:
    _check_reduction(reduction)
    _check_batch(chosen, "chosen")
    _check_batch(rejected, "rejected")
    pairs, others = len(chosen["input_ids"]), len(rejected["input_ids"])
    if pairs != others:
        raise ValueError(f"chosen has {pairs} rows and rejected {others}; expected pairs")
    batch = _concatenate(chosen, rejected)
    scored = _find_scored(batch, chosen, rejected)
    _check_every_row_is_scored(scored.counts[:pairs], "chosen")
    _check_every_row_is_scored(scored.counts[pairs:], "rejected")
    log_probs = _row_log_probs(model, batch, scored, reduction, pack)
    return log_probs[:pairs], log_probs[pairs:]


def _concatenate(chosen: Batch, rejected: Batch) -> dict[str, Tensor]:
    """One batch of 2B rows, padded on the right to the longer S, also where padding is left."""
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


def _row_log_probs(
    model: nn.Module, batch: Batch, scored: _Scored, reduction: Reduction, pack: bool
) -> Tensor:
    log_probs, _ = _scored_log_probs(model, batch, scored, pack)
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


def _scored_log_probs(
    model: nn.Module, batch: Batch, scored: _Scored, pack: bool, total: bool = False
) -> tuple[Tensor, Any]:
    """Log-probabilities (N,) of the scored tokens, or their total, and what the model returned."""
    causal_lm, compiled = _unwrap(model)
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


def _unwrap(model: nn.Module) -> tuple[nn.Module, bool]:
    """The causal LM inside DDP, PEFT and compiled wrappers, and whether one of them is compiled."""
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


def _pack(model: nn.Module, causal_lm: nn.Module, batch: Batch, scored: _Scored) -> Packed | None:
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


def _scored_rows(features: Tensor, scored: _Scored) -> Tensor:
    return features.flatten(0, 1).index_select(0, scored.positions.to(features.device))
