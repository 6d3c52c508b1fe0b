"""Lisa: the gradient, by hand, and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from sap_fast.baselines import LisaTrainer
from tests.baselines.by_hand import (
    check_gradients,
    gradient,
    plain_trainer,
    refusal_loss,
    window_loss,
)
from tests.tiny import assert_same_bits, weights


def test_lisa_alternates_and_holds_each_state_near_the_end_of_the_other(tmp_path: Path) -> None:
    trainer = plain_trainer(LisaTrainer, tmp_path, alignment_steps=1, task_steps=2, proximal=0.5)
    # The first tenth, without the term, ends between step 2 and step 3.
    trainer.args.max_steps = 24
    anchors: list[list[Tensor]] = []

    def expected(step: int) -> list[Tensor]:
        tuned, aligning = trainer.model, step % 3 == 0
        if step % 3 != 2:
            anchors.append(weights(tuned))
        loss = refusal_loss(trainer, step) if aligning else window_loss(tuned, trainer._window)
        if step >= 3:
            pairs = zip(tuned.parameters(), anchors[-1], strict=True)
            loss = loss + 0.25 * sum(((p - anchor) ** 2).sum() for p, anchor in pairs)
        return gradient(tuned, loss)

    check_gradients(trainer, expected)


def test_lisa_resumes_in_the_middle_of_a_state_with_the_same_bits(tmp_path: Path) -> None:
    def trained(folder: Path, checkpoint: str | None = None) -> list[Tensor]:
        trainer = plain_trainer(LisaTrainer, folder, alignment_steps=1, task_steps=3)
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 3
        trainer.state.save_steps = 3
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(trainer.model)

    through = trained(tmp_path / "a")
    assert_same_bits(trained(tmp_path / "b", str(tmp_path / "a" / "checkpoint-3")), through)


@pytest.mark.parametrize(
    "options", [{"alignment_steps": 0}, {"task_steps": 0}, {"proximal": float("nan")}], ids=str
)
def test_wrong_settings_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        plain_trainer(LisaTrainer, tmp_path, **options)
