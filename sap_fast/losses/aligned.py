"""The aligned model that tuning starts from, and losses that hold the tuned one to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sap_fast.configuration import virtual_tokens
from sap_fast.losses.aside import evaluation_mode
from sap_fast.losses.batches import (
    Batch,
    Scored,
    as_rows,
    check_batch,
    check_every_row_is_scored,
    find_scored,
)
from sap_fast.losses.forward import scored_features, scored_log_probs
from sap_fast.losses.scoring import by_row


def kl_loss(
    model: nn.Module,
    chosen: Batch,
    rejected: Batch | None = None,
    *,
    aligned: nn.Module | None = None,
    pack: bool = True,
) -> Tensor:
    """Returns the mean over rows of KL(aligned ‖ model) over the next token, in nats per token.

    The distributions are those at the tokens of the safe responses. With `rule="project"` this is
    the safety loss of SafeGrad (arXiv:2508.07172); PACT (arXiv:2603.07445) holds safety tokens to
    the aligned model in the same way. It asks for no more than the aligned model has: where the
    model has not moved, value and gradient are zero, and what is left of them is rounding and, of a
    model in training mode, dropout, which the aligned model runs without. What all losses share is
    said at `sap_fast.losses`.

    Args:
        model: A causal language model, possibly wrapped.
        chosen: The safe responses, a batch of B rows.
        rejected: Not used; here so that this loss can stand where the others do.
        aligned: The model that tuning started from. None: `model` without its PEFT adapter.
        pack: Compute shared prefixes once, and no padding.

    Returns:
        A scalar, fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: A row has no scored token, or there is no aligned model.
    """
    check_batch(chosen, "chosen")
    chosen = as_rows(chosen)
    reference = AlignedModel(model, aligned)
    scored = find_scored(chosen, after_virtual=virtual_tokens(model).in_sequence)
    check_every_row_is_scored(scored.counts, "chosen")
    with reference.running() as causal_lm:
        of_aligned = scored_features(causal_lm, chosen, scored, pack)

    def score(logits: Tensor, rows: Tensor) -> Tensor:
        with reference.running():
            expected = log_softmax(of_aligned.logits(rows)).to(logits.device)
        divergence = F.kl_div(log_softmax(logits), expected, reduction="none", log_target=True)
        return divergence.sum(dim=-1)

    features = scored_features(model, chosen, scored, pack)
    if features.vocabulary != of_aligned.vocabulary:
        raise ValueError(
            f"aligned has a vocabulary of {of_aligned.vocabulary} tokens and model one of "
            f"{features.vocabulary}; expected the model that tuning started from"
        )
    divergences = features.scores(of_aligned.rows, score)
    return by_row(divergences, scored, "mean").mean()


class AlignedModel:
    """The model that tuning started from: another one, or the same without its PEFT adapter.

    Args:
        model: The model that is tuned, possibly wrapped.
        aligned: The other; None with an adapter.

    Raises:
        ValueError: There is neither, or the adapter is one of virtual tokens, whose rows are
            longer than those of the model without it.
    """

    def __init__(self, model: nn.Module, aligned: nn.Module | None) -> None:
        self._model = aligned
        self._adapted: Any = None
        if aligned is not None:
            return
        self._adapted = self._model = _with_adapter(model)
        if self._adapted is None:
            raise ValueError(
                "aligned is missing: the model has no PEFT adapter that could be switched off; "
                "give the model that tuning starts from, as it was"
            )
        if virtual_tokens(model).number:
            raise ValueError(
                "aligned is missing: without its virtual tokens the model is given other rows; "
                "give the model that tuning starts from"
            )

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """Gives the model, in evaluation mode and without gradients; all is as before on exit."""
        assert self._model is not None
        without_adapter = self._adapted.disable_adapter() if self._adapted else nullcontext()
        # PEFT freezes the adapter that it switches off, and thaws all of it afterwards.
        learns = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        try:
            with evaluation_mode(self._model), torch.no_grad(), without_adapter:
                yield self._model
        finally:
            for parameter, required in learns:
                parameter.requires_grad_(required)


def log_probs_beside(
    model: nn.Module, aligned: AlignedModel, batch: Batch, scored: Scored, pack: bool
) -> tuple[Tensor, Tensor]:
    """Returns the scored tokens' log-probabilities (N,) by the model, and by the aligned one."""
    with aligned.running() as reference:
        expected, _ = scored_log_probs(reference, batch, scored, pack)
    found, _ = scored_log_probs(model, batch, scored, pack)
    return found, expected.to(found.device)


def _with_adapter(model: nn.Module) -> nn.Module | None:
    """Returns the PEFT model inside DDP and compiled wrappers."""
    while not hasattr(model, "disable_adapter"):
        # Not by getattr, which compiled modules answer for what they wrap.
        inner = model._modules.get("_orig_mod", model._modules.get("module"))
        if inner is None:
            return None
        model = inner
    return model


def log_softmax(logits: Tensor) -> Tensor:
    """Returns log-probabilities over the last dimension, in fp32 or better."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.log_softmax(logits, dim=-1, dtype=wide)
