"""The task loss."""

from __future__ import annotations

from torch import Tensor, nn

from sap_fast.configuration import text_setting
from sap_fast.losses.scoring import (
    WHY_NOTHING_IS_SCORED,
    Batch,
    check_batch,
    find_scored,
    scored_log_probs,
    unwrap,
)


def task_loss(
    model: nn.Module,
    batch: Batch,
    *,
    num_items: int | Tensor | None = None,
    pack: bool = True,
) -> Tensor:
    """Returns the negative log-likelihood of the response tokens, in nats per token.

    It equals the `loss` that a transformers model returns for `labels=`, with the router loss of a
    mixture of experts where `output_router_logits` asks for it; only padding is never scored. What
    all losses share is said at `sap_fast.losses`.

    Args:
        model: A causal language model, possibly wrapped.
        batch: Prompts with their responses, (B, S).
        num_items: Scored tokens of the whole accumulated batch (`num_items_in_batch` of the
            transformers `Trainer`), by which the sum over this batch is divided. Default: those of
            this batch, which gives the mean.
        pack: Compute shared prefixes once, and no padding.

    Returns:
        A scalar, fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: No token of `batch` is scored, `num_items` is an int below 1, or `batch` is
            malformed.
    """
    if isinstance(num_items, int) and num_items < 1:
        raise ValueError(f"num_items is {num_items}; expected at least 1, or None for the mean")
    check_batch(batch, "batch")
    scored = find_scored(batch)
    if not scored.counts.any():
        raise ValueError(
            f"batch has no scored token in any of its {len(scored.counts)} rows: "
            f"{WHY_NOTHING_IS_SCORED}"
        )
    total, outputs = scored_log_probs(model, batch, scored, pack, total=True)
    count = len(scored.targets) if num_items is None else num_items
    loss = -total / (count.to(total.device) if isinstance(count, Tensor) else count)
    router_loss = getattr(outputs, "aux_loss", None)
    if router_loss is not None:
        coefficient = text_setting(unwrap(model)[0], "router_aux_loss_coef") or 0.0
        loss = loss + coefficient * router_loss.to(loss.device)
    return loss
