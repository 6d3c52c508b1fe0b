"""The task loss."""

from __future__ import annotations

from torch import Tensor, nn

from sap_fast.configuration import virtual_tokens
from sap_fast.losses import own_loss
from sap_fast.losses.batches import WHY_NOTHING_IS_SCORED, Batch, check_batch, find_scored
from sap_fast.losses.forward import scored_log_probs, unwrap


def task_loss(
    model: nn.Module,
    batch: Batch,
    *,
    num_items: int | Tensor | None = None,
    pack: bool = True,
) -> Tensor:
    """Returns the negative log-likelihood of the response tokens, in nats per token.

    It equals the `loss` that a transformers model returns for `labels=`, with the terms that
    routers and adapters add to it; only padding is never scored. A model's first use tests that,
    and a model whose loss holds what is not known here has its own loss computed, from its full
    logits, with a warning (`sap_fast.losses.own_loss`). What all losses share is said at
    `sap_fast.losses`.

    Args:
        model: A causal language model, possibly wrapped.
        batch: Prompts with their responses, (B, S). Several sequences may share a row where
            position_ids tell them apart and there is no attention_mask, as transformers'
            `DataCollatorWithFlattening` makes them.
        num_items: Scored tokens of the whole accumulated batch (`num_items_in_batch` of the
            transformers `Trainer`), by which the sum over this batch is divided. A batch of which
            nothing is scored then adds nothing. Default: those of this batch, which gives the mean.
        pack: Compute shared prefixes once, and no padding.

    Returns:
        A scalar, fp32 (fp64 for an fp64 model).

    Raises:
        ValueError: Neither `batch` nor `num_items` has a scored token, `num_items` is an int below
            1, or `batch` is malformed.
    """
    if isinstance(num_items, int) and num_items < 1:
        raise ValueError(f"num_items is {num_items}; expected at least 1, or None for the mean")
    check_batch(batch, "batch")
    scored = find_scored(batch, after_virtual=virtual_tokens(model).in_sequence)
    # A tensor is looked at only here, as the host may have to wait for it.
    if not any(scored.counts) and (num_items is None or not num_items > 0):
        raise ValueError(
            f"batch has no scored token in any of its {len(scored.counts)} rows"
            f"{'' if num_items is None else ', and num_items is 0'}: {WHY_NOTHING_IS_SCORED}"
        )
    if not own_loss.compare(model, batch, scored):
        return own_loss.own_loss(model, batch, scored, num_items)
    total, outputs = scored_log_probs(model, batch, scored, pack, total=True)
    count = len(scored.targets) if num_items is None else num_items
    loss = -total / (count.to(total.device) if isinstance(count, Tensor) else count)
    terms = own_loss.added_terms(model, unwrap(model)[0], outputs)
    return loss + (terms.to(loss.device) if isinstance(terms, Tensor) else terms)
