"""Refusals among the task rows: the gradient, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast import task_loss
from sap_fast.baselines import MixedTrainer
from tests.baselines.by_hand import (
    check_gradients,
    gradient,
    plain_trainer,
    refusal_loss,
    window_loss,
)
from tests.tiny import random_batch


def test_mixed_adds_the_weighted_loss_of_refusals(tmp_path: Path) -> None:
    trainer = plain_trainer(MixedTrainer, tmp_path, refusal_weight=0.3)

    def expected(step: int) -> list[Tensor]:
        loss = window_loss(trainer.model, trainer._window) + 0.3 * refusal_loss(trainer, step)
        return gradient(trainer.model, loss)

    check_gradients(trainer, expected)


def test_no_refusals_are_mixed_into_an_evaluation(tmp_path: Path) -> None:
    trainer = plain_trainer(MixedTrainer, tmp_path)
    batch = random_batch(rows=2, seed=3)
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(
            trainer.compute_loss(trainer.model, batch), task_loss(trainer.model, batch)
        )


@pytest.mark.parametrize("options", [{"refusal_weight": -1.0}], ids=str)
def test_wrong_settings_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        plain_trainer(MixedTrainer, tmp_path, **options)
