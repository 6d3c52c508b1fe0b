"""The log-probabilities of responses."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor, nn

from sap_fast.configuration import virtual_tokens
from sap_fast.losses import own_loss
from sap_fast.losses.batches import (
    Batch,
    Scored,
    as_rows,
    check_batch,
    check_every_row_is_scored,
    find_scored,
)
from sap_fast.losses.forward import scored_log_probs

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


def check_reduction(reduction: str) -> None:
    """Raises `ValueError` unless `reduction` is known."""
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction is {reduction!r}; expected 'sum' or 'mean'")


def checked_log_probs(
    model: nn.Module, batch: Batch, argument: str, reduction: Reduction, pack: bool
) -> Tensor:
    """Returns what `row_log_probs` gives for the batch given as `argument`, once it is checked."""
    check_reduction(reduction)
    check_batch(batch, argument)
    batch = as_rows(batch)
    scored = find_scored(batch, after_virtual=virtual_tokens(model).in_sequence)
    check_every_row_is_scored(scored.counts, argument)
    return row_log_probs(model, batch, scored, reduction, pack)


def row_log_probs(
    model: nn.Module, batch: Batch, scored: Scored, reduction: Reduction, pack: bool
) -> Tensor:
    """Returns each row's log-probability (B,), the sum or the mean over its scored tokens."""
    own_loss.compare(model, batch, scored)
    log_probs, _ = scored_log_probs(model, batch, scored, pack)
    return by_row(log_probs, scored, reduction)


def by_row(scores: Tensor, scored: Scored, reduction: Reduction) -> Tensor:
    """Returns of the scored tokens' scores (N,) each row's sum or mean (B,)."""
    # Scattered over the positions and summed along the row: index_add would add in an order that
    # differs from run to run on a GPU.
    by_position = scores.new_zeros(scored.shape.numel())
    by_position = by_position.scatter(0, scored.positions.to(scores.device), scores)
    sums = by_position.view(scored.shape).sum(dim=1)
    return sums / scored.divisors.to(sums.device) if reduction == "mean" else sums
