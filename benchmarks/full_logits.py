"""Losses through the full logits of all positions, as published code computes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.workloads import Batch, Model
from tests.oracle import naive_token_log_probs

_PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def concatenate(chosen: Batch, rejected: Batch) -> Batch:
    """Return one batch of the rows of two, padded on the right to the longer of them."""
    return {
        key: pad_sequence([*chosen[key], *rejected[key]], batch_first=True, padding_value=value)
        for key, value in _PADDING.items()
    }


def contrastive_loss(model: Model, chosen: Batch, rejected: Batch) -> Tensor:
    """Return the loss of `sap_fast.contrastive_loss`, in one forward pass as well.

    Two would draw other dropout masks.
    """
    both = concatenate(chosen, rejected)
    log_probs = torch.stack([row.mean() for row in naive_token_log_probs(model, both)[0]])
    safe, harmful = log_probs.chunk(2)
    return nn.functional.softplus(harmful - safe).mean()
