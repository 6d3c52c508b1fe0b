"""Losses through full logits."""

from __future__ import annotations

import torch

from benchmarks import full_logits
from sap_fast import contrastive_loss
from tests.tiny import problem


def test_rows_are_concatenated_with_padding_that_is_not_scored() -> None:
    short = {"input_ids": [[5, 6]], "attention_mask": [[1, 1]], "labels": [[-100, 6]]}
    long = {"input_ids": [[7, 8, 9]], "attention_mask": [[1, 1, 1]], "labels": [[-100, 8, 9]]}
    batches = ({key: torch.tensor(value) for key, value in b.items()} for b in (short, long))
    both = {key: value.tolist() for key, value in full_logits.concatenate(*batches).items()}
    assert both == {
        "input_ids": [[5, 6, 0], [7, 8, 9]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "labels": [[-100, 6, -100], [-100, 8, 9]],
    }


def test_the_loss_is_ours() -> None:
    case = problem()
    pairs = case.model, case.chosen, case.rejected
    torch.testing.assert_close(full_logits.contrastive_loss(*pairs), contrastive_loss(*pairs))
