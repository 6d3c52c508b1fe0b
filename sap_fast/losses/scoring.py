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

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Self, get_args
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from sap_fast.configuration import text_config, text_setting
from sap_fast.losses import packing
from sap_fast.losses.packing import Packed, TensorMemo, logits_of, running
from sap_fast.random_state import RandomState

IGNORE_INDEX = -100
"""Label of a token that is not scored, as in `torch.nn.functional.cross_entropy`."""

Batch = Mapping[str, Tensor]
Reduction = Literal["sum", "mean"]

# Bytes of one chunk's logits. Backward holds about four such tensors (logits, log-softmax, their
# gradients): 256 MiB, where the logits of 8 rows of 2,048 tokens at V=128,000 take 7.8 GiB alone.
# At that V a chunk still has 131 rows, so the head's weights are read once for many rows. A GPU
# needs more rows to be busy, and a trained head's gradient is read and written once per chunk: on
# an H100 AdamW's step on Llama-3.2-1B (benchmarks/gpu_step.py) took 1.13 times as long as with all
# logits at once in chunks of 64 MiB, and 0.99 times in chunks of 256 MiB.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}


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


# Causal LMs whose head passed, or failed, `_HeadCall.check`.
_chunkable: WeakSet[nn.Module] = WeakSet()
_unchunkable: WeakSet[nn.Module] = WeakSet()


class _UnknownHeadError(Exception):
    """Head and known post-processing do not give the model's logits; the message says why."""


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
            head = _find_head(causal_lm, compiled)
            test = causal_lm not in _chunkable
            with _HeadCall(causal_lm, head, shape, test) as call, running(token_index):
                outputs = model(**inputs)
            hidden, vocabulary = call.check(logits_of(outputs))
        except _UnknownHeadError as reason:
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
            return call.log_probs(hidden, scored, vocabulary, total), outputs
    with running(token_index):
        outputs = model(**inputs)
    logits = logits_of(outputs)
    if logits.shape[:-1] != shape:
        raise ValueError(
            f"{type(causal_lm).__name__} returned logits of shape {tuple(logits.shape)} for "
            f"input_ids of shape {tuple(shape)}; expected (batch, sequence, vocabulary)"
        )
    log_probs = _recomputed(
        _token_log_probs, _scored_rows(logits, scored), scored.targets, logits.shape[-1]
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


def _find_head(causal_lm: nn.Module, compiled: bool) -> nn.Module:
    get_head: Any = getattr(causal_lm, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is None:
        raise _UnknownHeadError("get_output_embeddings gives no head")
    if compiled or head._compiled_call_impl is not None:
        # Compiled code keeps the hooks that it was traced with and is blind to later ones: traced
        # with ours, it would return one position for ever.
        raise _UnknownHeadError("it is compiled, and compiled code can't be hooked")
    return head


def _post_process(config: Any, logits: Tensor) -> Tensor:
    """What known models do to their head's output, in the dtype in which they do it."""
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / divisor
    if factor := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * factor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2 and later
        logits = torch.tanh(logits / cap) * cap
    return logits


class _HeadCall:
    """Context in which a model's head sees the last position only, and the head's input is kept.

    With `test`, the head's output is replaced by numbers from −64 to 64, for `check` to find again
    in the model's logits. The model's own can be too small (in a new model, zero) to show a softcap
    or a scale.
    """

    def __init__(self, causal_lm: nn.Module, head: nn.Module, shape: torch.Size, test: bool):
        self.config = text_config(causal_lm)
        self.head = head
        self.shape = shape
        self.test = test
        self.calls = 0
        self.hidden: Tensor | None = None
        self.test_logits: Tensor | None = None

    def __enter__(self) -> Self:
        # First of the pre-hooks and last of the hooks: others act here as they do on the chunks.
        self._handles = (
            self.head.register_forward_pre_hook(self._before_head, prepend=True, with_kwargs=True),
            self.head.register_forward_hook(self._after_head),
        )
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before_head(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        self.calls += 1
        hidden = args[0] if len(args) == 1 and not kwargs else None
        if self.calls > 1 or not isinstance(hidden, Tensor) or hidden.shape[:-1] != self.shape:
            return None
        self.hidden = hidden
        # Accelerate opens autocast inside the model's forward; it is closed when the chunks run.
        device = hidden.device.type
        enabled = torch.is_autocast_enabled(device)
        self.autocast = device, torch.get_autocast_dtype(device), enabled
        # With the strides of a contiguous tensor, which contiguous() does not give to one row; or
        # matmul makes a bmm of it, with a copy of a frozen head's weights per row: 70 ms per pass
        # of SmolLM2-135M in bf16.
        last = hidden[:, -1:].clone(memory_format=torch.contiguous_format)
        return (last,), {}

    def _after_head(self, _: nn.Module, args: Any, output: Any) -> Any:
        if not self.test or not isinstance(output, Tensor):
            return None
        test_logits = torch.linspace(
            -64, 64, output.shape[-1], dtype=output.dtype, device=output.device
        )
        self.test_logits = test_logits.expand_as(output)
        # All of them, but with the head still in the graph that DDP searches for unused parameters.
        return torch.where(self.test_logits.isfinite(), self.test_logits, output)

    def check(self, logits: Tensor) -> tuple[Tensor, int]:
        """Compares `logits`, the model's, with what the chunks will do; hidden states and V."""
        if self.calls != 1:
            raise _UnknownHeadError(f"its head ran {self.calls} times in one forward")
        if any(isinstance(parameter, DTensor) for parameter in self.head.parameters()):
            raise _UnknownHeadError(
                "its head is sharded by itself and gathered for the model's forward only; leave it "
                "to the fully_shard of the model"
            )
        if self.hidden is None:
            raise _UnknownHeadError("its head does not take (batch, sequence, hidden) alone")
        if self.test:
            self._compare(logits)
        return self.hidden, logits.shape[-1]

    def _compare(self, logits: Tensor) -> None:
        if self.test_logits is None or self.test_logits.shape != logits.shape:
            raise _UnknownHeadError(
                f"its logits {tuple(logits.shape)} are not of the shape of its head's output"
            )
        expected = _post_process(self.config, self.test_logits).to(logits)
        # The same operations give the same bits. Two units in the last place allow for a model that
        # rounds in another order or casts to fp32 earlier.
        tolerance = 2 * max(torch.finfo(x.dtype).eps for x in (self.test_logits, logits))
        if not torch.allclose(logits, expected, rtol=tolerance, atol=0.0):
            difference = (logits - expected).abs().max().item()
            raise _UnknownHeadError(
                f"its logits differ by up to {difference:.3g} from its head's output after the "
                "post-processing known here"
            )

    def log_probs(self, hidden: Tensor, scored: _Scored, vocabulary: int, total: bool) -> Tensor:
        """Log-probabilities (N,) of the scored tokens from the hidden states, or their total."""
        rows = _scored_rows(hidden, scored)
        size = _chunk_size(rows, vocabulary)
        learns = torch.is_grad_enabled() and not _is_hooked(self.head)
        trained = {n: p for n, p in self.head.named_parameters() if p.requires_grad}
        if learns and not trained and rows.requires_grad:
            found = _FrozenHead.apply(rows, scored.targets, size, self._chunk)
        elif learns and trained and total:
            names = tuple(trained)
            return _TotalOfHead.apply(rows, scored.targets, size, self, names, *trained.values())
        else:
            found = _recomputed(self._chunk, rows, scored.targets, vocabulary, self.head)
        return found.sum() if total else found

    def _chunk(
        self, rows: Tensor, targets: Tensor, parameters: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Log-probabilities of rows, with the head's own parameters or with others by name."""
        # Uncached, because chunks that share one bf16 copy of the weights add gradients in bf16.
        with torch.autocast(*self.autocast, cache_enabled=False):
            parameters = self._cast_parameters if parameters is None else parameters
            logits = functional_call(self.head, dict(parameters), (rows,))
            return _token_log_probs(_post_process(self.config, logits), targets)

    def cast(self, parameter: Tensor) -> Tensor:
        """Cast a parameter of a linear head as autocast would; that of another head stays."""
        _, dtype, enabled = self.autocast
        if not enabled or not _is_plain_linear(self.head) or parameter.dtype == torch.float64:
            return parameter
        return parameter.to(dtype)

    @functools.cached_property
    def _cast_parameters(self) -> dict[str, Tensor]:
        """A frozen linear head's parameters as autocast would cast them for every chunk."""
        if not _is_plain_linear(self.head):
            return {}
        return {n: self.cast(p) for n, p in self.head.named_parameters() if not p.requires_grad}


def _is_plain_linear(head: nn.Module) -> bool:
    return type(head) is nn.Linear and "forward" not in vars(head)


def _is_hooked(head: nn.Module) -> bool:
    """Whether there may be more in the head than its parameters: others' hooks hold their own."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in head.modules())


def _scored_rows(features: Tensor, scored: _Scored) -> Tensor:
    return features.flatten(0, 1).index_select(0, scored.positions.to(features.device))


def _chunk_size(rows: Tensor, vocabulary: int) -> int:
    itemsize = torch.promote_types(rows.dtype, torch.float32).itemsize
    chunk_bytes = CHUNK_BYTES.get(rows.device.type, CHUNK_BYTES["cuda"])
    return max(1, chunk_bytes // (vocabulary * itemsize))


def _token_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities (N,) of targets (N,) by logits (N, V), in fp32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -F.cross_entropy(logits, targets.to(logits.device), reduction="none")


class _FrozenHead(torch.autograd.Function):
    """Log-probabilities (N,) of rows (N, ·); their gradient is found with them, chunk by chunk.

    The log-probability of a row depends on that row alone, so the gradient of the chunk's sum has
    in each row what backward has to multiply by the incoming gradient. Against computing the chunk
    again this saves the second run of the head, and keeps (N, H) instead of nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, targets: Tensor, size: int, log_probs: Callable[..., Tensor]
    ) -> Tensor:
        gradients, chunks = [], []
        for chunk in zip(rows.split(size), targets.split(size), strict=True):
            with torch.enable_grad():
                leaf = chunk[0].detach().requires_grad_()
                chunk_log_probs = log_probs(leaf, chunk[1])
                gradients += torch.autograd.grad(chunk_log_probs.sum(), leaf)
            chunks.append(chunk_log_probs.detach())
        ctx.log_probs, ctx.targets = log_probs, targets
        ctx.save_for_backward(rows, torch.cat(gradients))
        return torch.cat(chunks)

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        rows, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: a second derivative needs the graph
            again = ctx.log_probs(rows, ctx.targets)
            (gradient,) = torch.autograd.grad(again, rows, incoming, create_graph=True)
            return gradient, None, None, None
        # `incoming` is fp32 or wider, and so is the product.
        product = gradient * incoming[:, None].to(gradient.device)
        return product.to(gradient.dtype), None, None, None


class _TotalOfHead(torch.autograd.Function):
    """Total log-probability of rows (N, ·); all gradients are found with it, chunk by chunk.

    A total has one incoming gradient, so that those of the rows and of the head's parameters need
    only be multiplied by it: against computing the chunks again, a quarter of the head's work is
    saved. The parameters' gradients are kept from the forward on, added up in fp32 or wider.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        targets: Tensor,
        size: int,
        call: _HeadCall,
        names: tuple[str, ...],
        *parameters: Tensor,
    ) -> Tensor:
        totals, row_gradients = [], []
        sums: list[Tensor] = []
        leaves = [call.cast(p).detach().requires_grad_() for p in parameters]
        for chunk in zip(rows.split(size), targets.split(size), strict=True):
            with torch.enable_grad():
                leaf = chunk[0].detach().requires_grad_()
                total = call._chunk(leaf, chunk[1], dict(zip(names, leaves, strict=True))).sum()
                row_gradient, *gradients = torch.autograd.grad(total, [leaf, *leaves])
            totals.append(total.detach())
            row_gradients.append(row_gradient)
            if not sums:
                sums = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
                continue
            for accumulated, gradient in zip(sums, gradients, strict=True):
                accumulated.add_(gradient)
        ctx.call, ctx.names, ctx.targets = call, names, targets
        ctx.save_for_backward(rows, torch.cat(row_gradients), *parameters, *sums)
        return torch.stack(totals).sum()

    @staticmethod
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        rows, row_gradient, *kept = ctx.saved_tensors
        parameters, sums = kept[: len(ctx.names)], kept[len(ctx.names) :]
        if torch.is_grad_enabled():  # create_graph: a second derivative needs the graph
            named = dict(zip(ctx.names, parameters, strict=True))
            total = ctx.call._chunk(rows, ctx.targets, named).sum()
            wanted = [tensor for tensor in (rows, *parameters) if tensor.requires_grad]
            found = iter(torch.autograd.grad(total, wanted, incoming, create_graph=True))
            gradients = [next(found) if t.requires_grad else None for t in (rows, *parameters)]
            return gradients[0], None, None, None, None, *gradients[1:]
        scaled = [
            (gradient * incoming.to(gradient.device)).to(like.dtype)
            for gradient, like in zip((row_gradient, *sums), (rows, *parameters), strict=True)
        ]
        return scaled[0], None, None, None, None, *scaled[1:]


def _recomputed(
    log_probs: Callable[[Tensor, Tensor], Tensor],
    rows: Tensor,
    targets: Tensor,
    vocabulary: int,
    head: nn.Module | None = None,
) -> Tensor:
    """Log-probabilities (N,) of rows (N, ·), chunk by chunk, each run again in the backward pass.

    Args:
        log_probs: Gives them for a chunk of rows and targets.
        rows: Hidden states, or logits.
        targets: (N,) the tokens.
        vocabulary: V, which sets the rows per chunk.
        head: What `log_probs` runs; None if the rows are logits.
    """
    size = _chunk_size(rows, vocabulary)
    # A plain linear layer draws no random numbers; LoRA's dropout on the head does.
    random = head is not None and type(head) is not nn.Linear
    chunks = zip(rows.split(size), targets.split(size), strict=True)
    return torch.cat(
        [checkpoint(log_probs, *c, use_reentrant=False, preserve_rng_state=random) for c in chunks]
    )
