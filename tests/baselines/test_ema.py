"""The average of the weights, by hand, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from sap_fast.baselines import EMATrainer
from tests.baselines.by_hand import plain_trainer
from tests.tiny import assert_same_bits, weights


class _After(TrainerCallback):
    def __init__(self, trainer: Any) -> None:
        self._trainer, self.seen = trainer, [weights(trainer.model)]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seen.append(weights(self._trainer.model))


def test_the_model_is_the_average_of_its_weights_over_the_steps(tmp_path: Path) -> None:
    trainer = plain_trainer(EMATrainer, tmp_path, decay=0.75)
    after = _After(trainer)
    trainer.add_callback(after)
    trainer.train()
    assert len(after.seen) == 5
    for place, parameter in enumerate(trainer.model.parameters()):
        average = after.seen[0][place].double()
        for step in after.seen[1:]:
            average = 0.75 * average + 0.25 * step[place].double()
        torch.testing.assert_close(parameter.double(), average, rtol=1e-5, atol=1e-7)
        assert not torch.equal(parameter, after.seen[-1][place]) or not parameter.any()


def test_without_decay_it_is_adamw(tmp_path: Path) -> None:
    trainer = plain_trainer(EMATrainer, tmp_path, decay=0.0)
    after = _After(trainer)
    trainer.add_callback(after)
    trainer.train()
    assert_same_bits(weights(trainer.model), after.seen[-1])


def test_it_resumes_with_the_same_bits(tmp_path: Path) -> None:
    def trained(folder: Path, checkpoint: str | None = None) -> list[Tensor]:
        trainer = plain_trainer(EMATrainer, folder)
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
        trainer.state.save_steps = 2
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(trainer.model)

    through = trained(tmp_path / "a")
    assert_same_bits(trained(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2")), through)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_wrong_decay_is_named(tmp_path: Path, decay: float) -> None:
    with pytest.raises(ValueError, match="decay"):
        plain_trainer(EMATrainer, tmp_path, decay=decay)
