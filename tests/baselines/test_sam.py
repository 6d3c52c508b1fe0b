"""SAM: the gradient, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast.baselines import SAMTrainer
from tests.baselines.by_hand import (
    check_gradients,
    gradient,
    plain_trainer,
    window_loss,
)
from tests.tiny import weights


def test_sam_takes_the_gradient_at_the_top_of_its_ball(tmp_path: Path) -> None:
    trainer = plain_trainer(SAMTrainer, tmp_path, radius=0.1)

    def expected(step: int) -> list[Tensor]:
        tuned, window = trainer.model, trainer._window
        start = weights(tuned)
        uphill = gradient(tuned, window_loss(tuned, window))
        norm = torch.cat([g.flatten() for g in uphill]).norm()
        with torch.no_grad():
            for parameter, g in zip(tuned.parameters(), uphill, strict=True):
                parameter += 0.1 * g / norm
        found = gradient(tuned, window_loss(tuned, window))
        with torch.no_grad():
            for parameter, value in zip(tuned.parameters(), start, strict=True):
                parameter.copy_(value)
        flat = [torch.cat([g.flatten() for g in each]) for each in (uphill, found)]
        assert (flat[0] - flat[1]).norm() > 0.01 * norm, "the ball is large enough to see"
        return found

    check_gradients(trainer, expected)


@pytest.mark.parametrize("options", [{"radius": 0.0}], ids=str)
def test_wrong_settings_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        plain_trainer(SAMTrainer, tmp_path, **options)
