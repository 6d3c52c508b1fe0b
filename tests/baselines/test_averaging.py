"""SAP with h or the direction averaged over steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sap_fast import SAPTrainer
from sap_fast.baselines import AveragingTrainer
from tests.baselines.by_hand import plain_trainer
from tests.trainers import BeforeEachUpdate, arguments, model, sap_trainer


def seen_in_each_step(kind: type, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Train at a learning rate of 0; return V, h, ĝ and L_safe of each step."""
    args = arguments(folder, learning_rate=0.0)
    trainer = sap_trainer(kind, model(), args, **options)
    trainer._keeps_direction = lambda: True  # the direction is to be looked at
    seen: list[dict[str, Any]] = []

    def look(_: int) -> None:
        passes, probes = trainer.sap_optimizer.passes, trainer.probe_set
        seen.append(
            {
                "offsets": probes.offsets,
                "estimates": {j: h.clone() for j, h in probes.estimates.items()},
                "direction": torch.cat([d.flatten().clone() for d in passes.direction.tensors]),
                "safety_loss": passes.record.safety_loss,
            }
        )

    trainer.add_callback(BeforeEachUpdate(look))
    trainer.train()
    return seen


def test_an_averaged_probe_is_along_the_h_of_all_steps_at_the_size_of_one(tmp_path: Path) -> None:
    plain = seen_in_each_step(SAPTrainer, tmp_path)
    averaged = seen_in_each_step(AveragingTrainer, tmp_path, averaged="probe", decay=0.5)
    totals = {j: torch.zeros_like(h) for j, h in plain[0]["estimates"].items()}
    for before, after in zip(plain, averaged, strict=True):
        for j, total in totals.items():
            total.mul_(0.5).add_(before["estimates"][j])
            size = before["offsets"][j].norm()
            torch.testing.assert_close(after["offsets"][j], total * (size / total.norm()))
    assert not torch.equal(plain[-1]["offsets"][1], averaged[-1]["offsets"][1])


def test_an_averaged_direction_is_the_sum_of_past_ones_and_the_loss_is_its_own(
    tmp_path: Path,
) -> None:
    plain = seen_in_each_step(SAPTrainer, tmp_path)
    averaged = seen_in_each_step(AveragingTrainer, tmp_path, averaged="direction", decay=0.5)
    total = torch.zeros_like(plain[0]["direction"])
    for before, after in zip(plain, averaged, strict=True):
        total = 0.5 * total + before["direction"]
        torch.testing.assert_close(after["direction"], total, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after["safety_loss"], before["safety_loss"])
    assert not torch.allclose(total, plain[-1]["direction"])


def test_a_direction_that_is_used_again_counts_once(tmp_path: Path) -> None:
    every: dict[str, Any] = {"sap_options": {"direction_every": 2}}
    plain = [step["direction"] for step in seen_in_each_step(SAPTrainer, tmp_path, **every)]
    averaging = {"averaged": "direction", "decay": 0.5} | every
    averaged = seen_in_each_step(AveragingTrainer, tmp_path, **averaging)
    sums = [plain[0], plain[0], 0.5 * plain[0] + plain[2], 0.5 * plain[0] + plain[2]]
    found = [step["direction"] for step in averaged]
    torch.testing.assert_close(found, sums, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"averaged": "none"}], ids=str)
def test_wrong_settings_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        plain_trainer(AveragingTrainer, tmp_path, **options)
