"""Panacea: the gradient, by hand, under the same masks, and what is added at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from sap_fast import task_loss
from sap_fast.baselines import PanaceaTrainer
from sap_fast.baselines.plain import PlainTrainer
from sap_fast.data import SafetyCollator
from tests.baselines.by_hand import (
    ACCUMULATED,
    check_gradients,
    gradient,
    plain_trainer,
    window_loss,
)
from tests.tiny import weights
from tests.trainers import BeforeEachUpdate, arguments, model, trainer_of


def uphill(tuned: nn.Module, harmful: Any, radius: float) -> list[Tensor]:
    harm = gradient(tuned, task_loss(tuned, harmful))
    norm = torch.cat([g.flatten() for g in harm]).norm()
    return [radius * g / norm for g in harm]


@pytest.mark.parametrize("largest", [100.0, 0.0])
def test_panacea_rewards_harm_that_a_step_uphill_undoes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: float
) -> None:
    monkeypatch.setattr("sap_fast.baselines.panacea._LARGEST_HARM", largest)
    trainer = plain_trainer(PanaceaTrainer, tmp_path, radius=0.5, harm_weight=0.7)
    last: dict[str, list[Tensor]] = {}

    def expected(step: int) -> list[Tensor]:
        tuned, start = trainer.model, weights(trainer.model)
        harmful = SafetyCollator(0)(trainer._safety_batches.rows(ACCUMULATED * step))["rejected"]
        task = gradient(tuned, window_loss(tuned, trainer._window))
        here = gradient(tuned, task_loss(tuned, harmful))
        last["step"] = uphill(tuned, harmful, 0.5)
        with torch.no_grad():
            for parameter, move in zip(tuned.parameters(), last["step"], strict=True):
                parameter += move
        there = gradient(tuned, task_loss(tuned, harmful).clamp(max=largest))
        with torch.no_grad():
            for parameter, value in zip(tuned.parameters(), start, strict=True):
                parameter.copy_(value)
        assert max((a - b).norm() for a, b in zip(here, there, strict=True)) > 0.01
        return [g - 0.7 * (b - a) for g, a, b in zip(task, here, there, strict=True)]

    at_the_end: list[Tensor] = []

    class AtTheEnd(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            at_the_end.extend(weights(trainer.model))

    trainer.add_callback(AtTheEnd())
    check_gradients(trainer, expected)
    moved = [a - b for a, b in zip(weights(trainer.model), at_the_end, strict=True)]
    torch.testing.assert_close(moved, last["step"], rtol=1e-3, atol=1e-6)


def test_panacea_sees_both_gradients_of_harm_under_the_same_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sap_fast.baselines.panacea._LARGEST_HARM", 100.0)
    found: list[list[Tensor]] = []
    for kind, options in (
        (PlainTrainer, {}),
        # A step of nearly no length: what is left of their difference would be dropout.
        (PanaceaTrainer, {"radius": 1e-6, "harm_weight": 50.0}),
    ):
        trainer = trainer_of(kind, model(), arguments(tmp_path, max_steps=1), **options)

        def look(_: int, trainer: Any = trainer) -> None:
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            found.append([parameter.grad.clone() for parameter in trained])

        trainer.add_callback(BeforeEachUpdate(look))
        trainer.train()
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("options", [{"radius": float("nan")}, {"harm_weight": -1.0}], ids=str)
def test_wrong_settings_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        plain_trainer(PanaceaTrainer, tmp_path, **options)
