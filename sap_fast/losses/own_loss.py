"""The loss that a model's own forward returns for labels, and what it has that ours has not.

`task_loss` is rebuilt from the log-probabilities of the scored tokens, so that full logits never
exist. A model's own loss may hold more: the terms of a router, of an adapter, or another
`loss_function` altogether. `compare` finds out at a model's first use. What is known is added
(`added_terms`); else `task_loss` is the model's own loss (`own_loss`), and a warning says so.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from sap_fast.configuration import (
    outer_modules,
    refuse_encoder_decoder,
    text_setting,
    virtual_tokens,
)
from sap_fast.losses.aside import aside
from sap_fast.losses.batches import Batch, Scored, find_scored_anew
from sap_fast.losses.forward import (
    model_inputs,
    run_model,
    scored_log_probs,
    scored_rows,
    unwrap,
    use_own_logits,
)
from sap_fast.losses.head import token_log_probs
from sap_fast.losses.host import IGNORE_INDEX
from sap_fast.losses.packing import logits_of

# Rows and tokens of what is compared: small enough that its full logits are.
_ROWS, _LENGTH = 2, 8

# Names of the factors of a router's losses, in a model or its configuration, by their output.
_FACTORS = {
    "aux_loss": ("router_aux_loss_coef", "aux_loss_coef"),
    "z_loss": ("router_z_loss_coef", "z_loss_coef"),
}


class _Compared(NamedTuple):
    """What was found for a model as it was then."""

    state: tuple[Any, ...]
    rebuilt: bool
    """Whether the loss is that of the scored tokens with `added_terms`."""


_compared: tuple[WeakKeyDictionary[nn.Module, _Compared], ...] = (
    WeakKeyDictionary(),
    WeakKeyDictionary(),
)
# Models whose forward has a fused loss of Liger's, which was told.
_told: WeakSet[nn.Module] = WeakSet()


def compare(model: nn.Module, batch: Batch, scored: Scored) -> bool:
    """Says whether a model's own loss is that of the scored tokens with the terms that are known.

    The two are compared once for a model in evaluation mode, once in training mode, and again where
    its `loss_function` or the use of its router's loss was changed. It costs two forwards of a few
    tokens of the batch with the random state of each other; of the whole batch, where that has
    tensors that can't be cut.

    It also compares the log-probabilities with those of the model's own logits. Where they differ,
    losses are computed from the latter from then on.

    Args:
        model: The model as it was given, wrappers included.
        batch: The batch that is to be scored; tensors beside the usual ones reach the model.
        scored: What of it is scored.
    """
    causal_lm, _ = unwrap(model)
    if not _may_have_a_loss(causal_lm):
        return True
    state = (
        getattr(causal_lm, "loss_function", None),
        text_setting(causal_lm, "output_router_logits"),
    )
    compared = _compared[causal_lm.training]
    found = compared.get(model)
    if found is None or found.state != state:
        refuse_encoder_decoder(causal_lm)
        _tell_of_a_fused_loss(causal_lm)
        compared[model] = found = _Compared(state, _compare(model, causal_lm, batch, scored))
    return found.rebuilt


def added_terms(model: nn.Module, causal_lm: nn.Module, outputs: Any) -> Tensor | float:
    """Returns what a model adds to the loss of its tokens: terms of a router and of AdaLoRA."""
    terms: Tensor | float = 0.0
    for name, factors in _FACTORS.items():
        term = getattr(outputs, name, None)
        if isinstance(term, Tensor):
            terms = terms + _factor(causal_lm, factors) * term
    orthogonality = _orthogonality(model)
    if isinstance(orthogonality, Tensor) and isinstance(terms, Tensor):
        return terms + orthogonality.to(terms.device)
    return terms if orthogonality is None else terms + orthogonality


def own_loss(
    model: nn.Module, batch: Batch, scored: Scored, num_items: int | Tensor | None
) -> Tensor:
    """Returns the model's own loss of the scored tokens, divided by `num_items` if there are any.

    A model that takes no number of items returns a mean, which is scaled to them.
    """
    causal_lm, _ = unwrap(model)
    inputs = model_inputs(causal_lm, batch, scored, virtual_tokens(model))
    count = len(scored.targets)
    if count == 0:  # whose mean would not be a number
        outputs = run_model(model, inputs)
        return logits_of(outputs)[:, :0].sum() + added_terms(model, causal_lm, outputs)
    inputs["labels"] = _labels(batch, scored)
    scale = 1.0 if num_items is None else count / num_items
    if num_items is not None and _takes_items(causal_lm):
        inputs["num_items_in_batch"], scale = num_items, 1.0
    loss = _loss(run_model(model, inputs))
    assert loss is not None  # as `compare` found
    return loss * (scale.to(loss.device) if isinstance(scale, Tensor) else scale)


# ---- the comparison ----


def _compare(model: nn.Module, causal_lm: nn.Module, batch: Batch, scored: Scored) -> bool:
    virtual = virtual_tokens(model)
    sample = _sample(batch, scored)
    part = find_scored_anew(sample, virtual.in_sequence)
    inputs = model_inputs(causal_lm, sample, part, virtual)
    head = _head(causal_lm)
    with aside(model, sample["input_ids"].device) as random_state, _evaluated(head):
        try:
            outputs = run_model(model, inputs | {"labels": _labels(sample, part)})
        except torch.OutOfMemoryError:
            raise  # says nothing about the model
        except Exception as error:  # whatever a model makes of labels
            random_state.restore()
            # It is not the labels where this fails as well, with the error that matters.
            scored_log_probs(model, sample, part, pack=False)
            _warn(causal_lm, f"its forward fails with labels ({error})", "is not compared with its")
            return True
        loss = _loss(outputs)
        if loss is None:
            return True
        found: Any = logits_of(outputs)
        # A fused loss makes none: Liger's leaves None, Unsloth's an object that only raises.
        logits = found if isinstance(found, Tensor) else None
        random_state.restore()
        ours, others = scored_log_probs(model, sample, part, pack=False)
        expected = ours
        tolerance = _tolerance(head, logits, loss, ours)
        if logits is not None and logits.shape[1] >= part.shape[1]:
            expected = token_log_probs(scored_rows(logits, part), part.targets)
            difference = (ours - expected.to(ours.device)).abs().median().item()
            if not difference <= tolerance:
                use_own_logits(
                    causal_lm,
                    f"log-probabilities differ by {difference:.3g} in the median from those of "
                    "its own logits at all positions",
                )
            tolerance = max(1e-5, 4 * torch.finfo(loss.dtype).eps)
        rebuilt = -expected.mean() + added_terms(model, causal_lm, others)
    difference = (loss.float() - rebuilt.to(loss.device)).abs().item()
    if difference <= tolerance * max(1.0, loss.abs().item()):
        return True
    _warn(
        causal_lm,
        f"its own loss is {loss.item():.6g} where that of the tokens, with the terms of routers "
        f"and adapters known here, is {rebuilt.item():.6g}",
        "is its own one, from logits which take memory for batch × sequence × vocabulary, not",
    )
    return False


def _warn(causal_lm: nn.Module, what: str, is_what: str) -> None:
    warnings.warn(
        f"{type(causal_lm).__name__}: {what}. The task loss {is_what} rebuilt loss.", stacklevel=6
    )


def _tell_of_a_fused_loss(causal_lm: nn.Module) -> None:
    """Says once that Liger's loss, which its forward has for labels, stays unused.

    The losses ask a forward for logits and never for a loss, so that one of the two is in force.
    """
    forward = getattr(causal_lm.forward, "__func__", causal_lm.forward)
    home = getattr(forward, "__globals__", {}).get("__name__", "")
    if home.startswith("liger_kernel.") and causal_lm not in _told:
        _told.add(causal_lm)
        warnings.warn(
            f"{type(causal_lm).__name__}: Liger's fused linear cross entropy is in its forward. "
            "The losses of sap_fast do without it: they apply the head to the scored tokens alone, "
            "in chunks of their own. fused_linear_cross_entropy=False leaves this message out.",
            stacklevel=5,
        )


def _sample(batch: Batch, scored: Scored) -> dict[str, Any]:
    """Returns a few of the batch's tokens, all of them scored but the first ones."""
    input_ids = batch["input_ids"]
    further = {k for k, v in batch.items() if isinstance(v, Tensor)} - {
        "input_ids",
        "attention_mask",
        "labels",
        "position_ids",
        "seq_idx",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
    }
    if further:  # images, or what else belongs to the tokens as they are
        attended = scored.attended.to(input_ids.device)
        labels = torch.where(attended, input_ids, IGNORE_INDEX)
        return {**batch, "labels": labels}
    rows = [
        (tokens[keep].tolist() * 2 or [0, 0])[:_LENGTH]
        for tokens, keep in zip(scored.tokens[:_ROWS], scored.attended[:_ROWS], strict=True)
    ]
    rows = [row[: max(2, len(row) - 3 * index)] for index, row in enumerate(rows)]
    width = max(map(len, rows))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    labels = torch.where(mask.bool(), padded, IGNORE_INDEX)
    labels[:, : min(map(len, rows)) // 4] = IGNORE_INDEX
    sample = {"input_ids": padded, "attention_mask": mask, "labels": labels}
    return {key: value.to(input_ids.device) for key, value in sample.items()}


class _evaluated:
    """Sets a head to evaluation mode: the chunks of ours would draw another dropout mask."""

    def __init__(self, head: nn.Module | None) -> None:
        self._modes = [] if head is None else [(m, m.training) for m in head.modules()]

    def __enter__(self) -> None:
        for module, _ in self._modes:
            module.training = False

    def __exit__(self, *_: object) -> None:
        for module, training in self._modes:
            module.training = training


def _tolerance(head: nn.Module | None, *tensors: Tensor | None) -> float:
    """Returns by how much log-probabilities may differ that were computed in the same way."""
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    dtypes |= {p.dtype for p in (head.parameters() if head is not None else ())}
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(8 * torch.finfo(d).eps for d in dtypes if d.is_floating_point)


# ---- what a model has ----


def _may_have_a_loss(causal_lm: nn.Module) -> bool:
    parameters = inspect.signature(causal_lm.forward).parameters
    if "labels" in parameters:
        return True
    # Not imported here: a model of transformers exists only where that was imported already.
    transformers = sys.modules.get("transformers")
    return (
        transformers is not None
        and isinstance(causal_lm, transformers.PreTrainedModel)
        and any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    )


def _takes_items(causal_lm: Any) -> bool:
    """Says whether a model's loss takes the number of items, as transformers' Trainer tells it."""
    if hasattr(causal_lm, "accepts_loss_kwargs"):
        return bool(causal_lm.accepts_loss_kwargs)
    parameters = inspect.signature(causal_lm.forward).parameters.values()
    return any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters)


def _head(causal_lm: nn.Module) -> nn.Module | None:
    get_head: Any = getattr(causal_lm, "get_output_embeddings", None)
    return get_head() if get_head is not None else None


def _loss(outputs: Any) -> Tensor | None:
    loss = getattr(outputs, "loss", None)
    if loss is None and isinstance(outputs, tuple):
        loss = outputs[0]
    return loss if isinstance(loss, Tensor) and loss.dim() == 0 else None


def _labels(batch: Batch, scored: Scored) -> Tensor:
    """Returns labels (B, S) for the scored tokens alone."""
    labels = torch.full(scored.shape, IGNORE_INDEX, device=scored.targets.device)
    labels.view(-1)[scored.positions + 1] = scored.targets
    return labels[:, scored.shape[1] - batch["input_ids"].shape[1] :]


def _factor(causal_lm: nn.Module, names: tuple[str, ...]) -> float:
    factors = (getattr(causal_lm, n, None) or text_setting(causal_lm, n) for n in names)
    return next((factor for factor in factors if factor), 0.0)


def _orthogonality(model: nn.Module) -> Tensor | None:
    """Returns AdaLoRA's term of a loss: how far its A and B are from orthogonal ones."""
    # Not imported here: a model of PEFT exists only where that was imported already.
    peft = sys.modules.get("peft")
    if peft is None:
        return None
    adapted: Any = next((m for m in outer_modules(model) if isinstance(m, peft.AdaLoraModel)), None)
    if adapted is None:
        return None
    adapter = adapted.trainable_adapter_name
    distances = []
    for name, parameter in adapted.model.named_parameters():
        if adapter in name and ("lora_A" in name or "lora_B" in name):
            product = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            identity = torch.eye(len(product), dtype=product.dtype, device=product.device)
            distances.append(torch.linalg.matrix_norm(product - identity))
    if not distances:
        return None
    weight = adapted.peft_config[adapter].orth_reg_weight
    return weight * torch.stack([d.to(distances[0].device) for d in distances]).mean()
