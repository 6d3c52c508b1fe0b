"""Controls: which part of what a probe does each of them leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast import SAPTrainer
from sap_fast.baselines import ControlTrainer
from sap_fast.baselines.plain import PlainTrainer
from tests.baselines.by_hand import plain_trainer
from tests.tiny import assert_same_bits, weights
from tests.trainers import BeforeEachUpdate, arguments, gradients, model, sap_trainer, trainer_of


class KeepingTrainer(SAPTrainer):
    """Every step keeps its direction to be looked at."""

    def _keeps_direction(self) -> bool:
        return True


@pytest.mark.parametrize("control", ["flipped", "random"])
def test_a_control_has_the_size_of_the_probe_it_replaces(tmp_path: Path, control: str) -> None:
    found: dict[type, list[list[Tensor]]] = {SAPTrainer: [], ControlTrainer: []}
    for kind, options in ((SAPTrainer, {}), (ControlTrainer, {"control": control})):
        # A learning rate of 0: both find their probes at the same weights.
        args = arguments(tmp_path, learning_rate=0.0)
        trainer = sap_trainer(kind, model(), args, **options)
        probes: list[list[Tensor]] = found[kind]
        trainer.add_callback(
            BeforeEachUpdate(
                lambda _, trainer=trainer, probes=probes: probes.append(
                    list(trainer.probe_set.offsets.values())
                )
            )
        )
        trainer.train()
    for ours, replaced in zip(found[SAPTrainer], found[ControlTrainer], strict=True):
        for v, other in zip(ours, replaced, strict=True):
            assert v.norm() > 0
            torch.testing.assert_close(other.norm(), v.norm())
            if control == "flipped":
                assert torch.equal(other, -v)
            else:
                assert torch.cosine_similarity(v, other, dim=-1).abs() < 0.9
    if control == "random":
        first, second = found[ControlTrainer][:2]
        assert torch.cosine_similarity(first[0], second[0], dim=-1).abs() < 0.9


def test_a_flipped_probe_turns_the_gradient_the_other_way(tmp_path: Path) -> None:
    found: dict[str, Tensor] = {}
    runs: dict[str, tuple[type, dict[str, Any]]] = {
        "none": (SAPTrainer, {"probe": {"size": 0.0}}),
        "sap": (SAPTrainer, {}),
        "flipped": (ControlTrainer, {"control": "flipped"}),
    }
    for name, (kind, options) in runs.items():
        trainer = sap_trainer(kind, model(), arguments(tmp_path, max_steps=1), **options)

        def look(_: int, name: str = name, trainer: Any = trainer) -> None:
            found[name] = gradients(trainer.model)

        trainer.add_callback(BeforeEachUpdate(look))
        trainer.train()
    ours, flipped = found["sap"] - found["none"], found["flipped"] - found["none"]
    assert torch.cosine_similarity(ours, flipped, dim=0) < -0.5


@pytest.mark.parametrize("accumulated", [1, 2])
def test_along_and_beside_are_the_parts_of_what_a_probe_does(
    tmp_path: Path, accumulated: int
) -> None:
    """Dropout is on: a part would not fit if g were taken under other masks."""
    found: dict[str, Tensor] = {}
    directions: list[Tensor] = []
    runs: dict[str, tuple[type, dict[str, Any]]] = {
        "none": (SAPTrainer, {"probe": {"size": 0.0}}),
        "sap": (KeepingTrainer, {}),
        "along": (ControlTrainer, {"control": "along"}),
        "beside": (ControlTrainer, {"control": "beside"}),
    }
    for name, (kind, options) in runs.items():
        args = arguments(
            tmp_path, max_steps=1, max_grad_norm=0.0, gradient_accumulation_steps=accumulated
        )
        trainer = sap_trainer(kind, model(), args, **options)

        def look(_: int, name: str = name, trainer: Any = trainer) -> None:
            found[name] = gradients(trainer.model)
            if name == "sap":
                direction = trainer.sap_optimizer.passes.direction
                directions.append(torch.cat([part.flatten() for part in direction.tensors]))

        trainer.add_callback(BeforeEachUpdate(look))
        trainer.train()
    (direction,) = directions
    unit = direction / direction.norm()
    change = found["sap"] - found["none"]
    along, beside = (found[name] - found["none"] for name in ("along", "beside"))
    lean = unit.dot(change)
    assert 0.1 * change.norm() < lean < 0.9 * change.norm()
    tolerance = 1e-5 * found["none"].norm().item()
    torch.testing.assert_close(along, lean * unit, rtol=0, atol=tolerance)
    torch.testing.assert_close(along + beside, change, rtol=0, atol=tolerance)


@pytest.mark.parametrize("control", ["random", "beside"])
def test_a_step_that_is_held_is_that_of_plain_adamw(tmp_path: Path, control: str) -> None:
    held, plain = model(), model()
    options = {"control": control, "sap_options": {"safety_level": 1e3}}
    sap_trainer(ControlTrainer, held, arguments(tmp_path), **options).train()
    trainer_of(PlainTrainer, plain, arguments(tmp_path)).train()
    assert_same_bits(weights(held), weights(plain))


class SafeInOne(ControlTrainer):
    """The safety loss reaches one parameter."""

    def compute_safety_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return self.sap_optimizer.passes.trained.trainable[0].square().sum()


def test_along_leaves_no_change_where_the_safety_loss_does_not_reach(tmp_path: Path) -> None:
    found: dict[str, list[Tensor]] = {}
    runs: dict[str, dict[str, Any]] = {"none": {"size": 0.0}, "along": {}}
    for name, probe in runs.items():
        args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0)
        trainer = sap_trainer(SafeInOne, model(), args, control="along", probe=probe)

        def look(_: int, name: str = name, trainer: Any = trainer) -> None:
            parameters = trainer.sap_optimizer.passes.trained.trainable
            found[name] = [parameter.grad.clone() for parameter in parameters]

        trainer.add_callback(BeforeEachUpdate(look))
        trainer.train()
    assert not torch.equal(found["along"][0], found["none"][0])
    assert_same_bits(found["along"][1:], found["none"][1:])


@pytest.mark.parametrize("options", [{"control": "none"}], ids=str)
def test_wrong_settings_are_named(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        plain_trainer(ControlTrainer, tmp_path, **options)
