"""The safety losses, over pairs of a safe and a harmful response to the same prompt."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from sap_fast.configuration import virtual_tokens
from sap_fast.losses.batches import (
    Batch,
    as_rows,
    check_batch,
    check_every_row_is_scored,
    concatenate,
    find_scored,
)
from sap_fast.losses.scoring import Reduction, check_reduction, checked_log_probs, row_log_probs


def contrastive_loss(
    model: nn.Module,
    chosen: Batch,
    rejected: Batch,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    pack: bool = True,
) -> Tensor:
    """Returns the mean over pairs of −log σ((log p(chosen) − log p(rejected)) / temperature).

    The safety loss of arXiv:2505.16737v2. What all losses share is said at `sap_fast.losses`.

    Args:
        model: A causal language model, possibly wrapped.
        chosen: The safe responses, a batch of B rows.
        rejected: The harmful responses to the same prompts, row for row; S may differ.
        temperature: τ, above 0. The default leaves the loss of arXiv:2505.16737v2 as it is.
        reduction: What stands for log p: the `"mean"` over a response's tokens, or their `"sum"` as
            in the code of its authors, which saturates (a gradient of 1e-28) on pairs that the
            model already tells apart.
        pack: Compute shared prefixes once, and no padding.

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
    """Returns the mean over pairs of nll(chosen) − nll(rejected), in nats.

    The safety loss of arXiv:2505.16737v1. What all losses share is said at `sap_fast.losses`.

    Args:
        model: A causal language model, possibly wrapped.
        chosen: The safe responses, a batch of B rows.
        rejected: The harmful responses to the same prompts, row for row; S may differ.
        reduction: What stands for nll: the `"mean"` over a response's tokens, or their `"sum"`.
        pack: Compute shared prefixes once, and no padding.

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
    """Returns the mean over rows of nll(chosen), in nats, whatever else a model might say.

    The losses of pairs can be lowered by making the given harmful response unlikely, while another
    that is in no pair becomes the likeliest. This loss can't, and it runs half the tokens. But
    nothing in it speaks against harmful responses that the task data hold, and it may refuse what
    is harmless after a narrow task (docs/study.md, row 40). What all losses share is said at
    `sap_fast.losses`.

    Args:
        model: A causal language model, possibly wrapped.
        chosen: The safe responses, a batch of B rows.
        rejected: Not used; here so that this loss can stand where the others do.
        reduction: What stands for nll: the `"mean"` over a response's tokens, or their `"sum"`.
        pack: Compute shared prefixes once, and no padding.

    Returns:
        A scalar, fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: A row has no scored token, or `reduction` is unknown.
    """
    return -checked_log_probs(model, chosen, "chosen", reduction, pack).mean()


def joint_loss(
    model: nn.Module,
    chosen: Batch,
    rejected: Batch,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    pack: bool = True,
) -> Tensor:
    """Returns the value of `contrastive_loss`, with the gradient of it plus `refusal_loss`.

    It is meant for a safety level that is held (`safety_level` of the optimizers). Whether a model
    still tells the pairs apart is the better measure of what tuning does to it, as a narrow task
    moves the likelihood of refusals whatever is refused. That likelihood is the better direction,
    as it also counts where the model would open as no pair does. Both come from one forward. The
    gradient is not that of the value, so a line search has no use for this loss. What all losses
    share is said at `sap_fast.losses`.

    Args:
        model: A causal language model, possibly wrapped.
        chosen: The safe responses, a batch of B rows.
        rejected: The harmful responses to the same prompts, row for row; S may differ.
        temperature: τ of `contrastive_loss`, above 0; the likelihood of refusals has none.
        reduction: As for `contrastive_loss`, for both.
        pack: Compute shared prefixes once, and no padding.

    Returns:
        A scalar, fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: As `contrastive_loss`.
    """
    chosen_log_probs, margins = _margins(model, chosen, rejected, temperature, reduction, pack)
    refusal = -chosen_log_probs.mean()
    return -F.logsigmoid(margins).mean() + (refusal - refusal.detach())


def _margins(
    model: nn.Module,
    chosen: Batch,
    rejected: Batch,
    temperature: float,
    reduction: Reduction,
    pack: bool,
) -> tuple[Tensor, Tensor]:
    """Returns log p(chosen), and (log p(chosen) − log p(rejected)) / temperature."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number above 0")
    chosen_log_probs, rejected_log_probs = _pair_log_probs(model, chosen, rejected, reduction, pack)
    return chosen_log_probs, (chosen_log_probs - rejected_log_probs) / temperature


def _pair_log_probs(
    model: nn.Module, chosen: Batch, rejected: Batch, reduction: Reduction, pack: bool
) -> tuple[Tensor, Tensor]:
    check_reduction(reduction)
    check_batch(chosen, "chosen")
    check_batch(rejected, "rejected")
    chosen, rejected = as_rows(chosen), as_rows(rejected)
    pairs, others = len(chosen["input_ids"]), len(rejected["input_ids"])
    if pairs != others:
        raise ValueError(f"chosen has {pairs} rows and rejected {others}; expected pairs")
    batch = concatenate(chosen, rejected)
    after_virtual = virtual_tokens(model).in_sequence
    scored = find_scored(batch, chosen, rejected, after_virtual=after_virtual)
    check_every_row_is_scored(scored.counts[:pairs], "chosen")
    check_every_row_is_scored(scored.counts[pairs:], "rejected")
    log_probs = row_log_probs(model, batch, scored, reduction, pack)
    return log_probs[:pairs], log_probs[pairs:]
