"""Constrained SFT: the loss and its gradient by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast.baselines import ConstrainedTrainer
from sap_fast.baselines.constrained import places_in_answer
from tests.baselines.by_hand import check_gradients, gradient, plain_trainer


def test_the_first_tokens_of_an_answer_are_held_to_the_aligned_model(tmp_path: Path) -> None:
    strengths = (0.5, 2.0, 3.0)
    trainer = plain_trainer(
        ConstrainedTrainer, tmp_path, strengths=strengths[:2], later_strength=strengths[2]
    )
    aligned = copy.deepcopy(trainer.model)
    trainer._aligned = aligned

    def token_losses(batch: Any) -> tuple[list[Tensor], int]:
        found, expected = (
            m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            .logits.double()
            .log_softmax(-1)
            for m in (trainer.model, aligned)
        )
        losses = []
        for row, labels in enumerate(batch["labels"].tolist()):
            tokens = [place for place, label in enumerate(labels) if label != -100]
            for number, place in enumerate(tokens):
                beta = strengths[min(number, 2)]
                where = row, place - 1, labels[place]
                difference = found[where] - expected[where].detach()
                losses.append(-2 / beta * torch.log(torch.sigmoid(beta * difference)))
        return losses, len(losses)

    def expected(step: int) -> list[Tensor]:
        found = [token_losses(batch) for batch in trainer._window]
        total = torch.stack([loss for losses, _ in found for loss in losses]).sum()
        loss = total / sum(count for _, count in found)
        return [g.float() for g in gradient(trainer.model, loss)]

    check_gradients(trainer, expected)


def test_places_count_anew_in_each_answer() -> None:
    positions = torch.tensor([2, 3, 4, 9, 20, 21])
    assert places_in_answer(positions).tolist() == [0, 1, 2, 0, 0, 1]


@pytest.mark.parametrize("options", [{"strengths": (1.0, 0.0)}, {"later_strength": -1.0}], ids=str)
def test_wrong_settings_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        plain_trainer(ConstrainedTrainer, tmp_path, **options)


def test_a_full_model_needs_the_aligned_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="aligned is missing"):
        plain_trainer(ConstrainedTrainer, tmp_path).train()
