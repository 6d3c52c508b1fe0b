"""Every baseline does what its source says, held to gradients computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from transformers import TrainerCallback

from sap_fast import SAPTrainer, task_loss
from sap_fast.baselines import (
    AveragingTrainer,
    ControlTrainer,
    LisaTrainer,
    MixedTrainer,
    PanaceaTrainer,
    SAMTrainer,
    merge_with_aligned,
)
from sap_fast.data import SafetyCollator
from tests.test_trainer import (
    arguments,
    assert_same_bits,
    model,
    sap_trainer,
    weights,
)
from tests.tiny import random_batch

ACCUMULATED = 2


class BeforeEachUpdate(TrainerCallback):
    """Calls a function once the gradients of a step are there, with its number."""

    def __init__(self, look: Callable[[int], None]) -> None:
        self.look = look

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.look(state.global_step)


def plain_trainer(kind: type[SAPTrainer], folder: Path, **options: Any) -> Any:
    args = arguments(folder, gradient_accumulation_steps=ACCUMULATED, max_grad_norm=0.0)
    return sap_trainer(kind, model(lora=False), args, safety_batch_size=2, **options)


def window_loss(tuned: nn.Module, window: list[Any]) -> Tensor:
    """The mean over all scored tokens of the micro-batches."""
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)
    return sum(task_loss(tuned, batch, num_items=items) for batch in window)


def gradient(tuned: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(tuned.parameters())))


def refusal_loss(trainer: Any, step: int) -> Tensor:
    """The mean over the micro-batches of a step of the loss of their refusals."""
    numbers = range(ACCUMULATED * step, ACCUMULATED * (step + 1))
    batches = [SafetyCollator(0)(trainer._safety_batches.rows(number)) for number in numbers]
    losses = [task_loss(trainer.model, batch["chosen"]) for batch in batches]
    return torch.stack(losses).mean()


def check_gradients(trainer: Any, expected: Callable[[int], list[Tensor]]) -> None:
    seen = []

    def look(step: int) -> None:
        actual = [parameter.grad.clone() for parameter in trainer.model.parameters()]
        torch.testing.assert_close(actual, expected(step), rtol=1e-4, atol=1e-6)
        seen.append(step)

    trainer.add_callback(BeforeEachUpdate(look))
    trainer.train()
    assert seen == list(range(trainer.args.max_steps))


def test_mixed_adds_the_weighted_loss_of_refusals(tmp_path):
    trainer = plain_trainer(MixedTrainer, tmp_path, refusal_weight=0.3)

    def expected(step: int) -> list[Tensor]:
        loss = window_loss(trainer.model, trainer._window) + 0.3 * refusal_loss(trainer, step)
        return gradient(trainer.model, loss)

    check_gradients(trainer, expected)


def test_sam_takes_the_gradient_at_the_top_of_its_ball(tmp_path):
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


def uphill(tuned: nn.Module, harmful: Any, radius: float) -> list[Tensor]:
    harm = gradient(tuned, task_loss(tuned, harmful))
    norm = torch.cat([g.flatten() for g in harm]).norm()
    return [radius * g / norm for g in harm]


@pytest.mark.parametrize("largest", [100.0, 0.0])
def test_panacea_rewards_harm_that_a_step_uphill_undoes(tmp_path, monkeypatch, largest):
    monkeypatch.setattr("sap_fast.baselines.trainers._LARGEST_HARM", largest)
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


def test_panacea_sees_both_gradients_of_harm_under_the_same_masks(tmp_path, monkeypatch):
    monkeypatch.setattr("sap_fast.baselines.trainers._LARGEST_HARM", 100.0)
    found: list[list[Tensor]] = []
    for kind, options in (
        (SAPTrainer, {"probe_layers": None}),
        # A step of nearly no length: what is left of their difference would be dropout.
        (PanaceaTrainer, {"radius": 1e-6, "harm_weight": 50.0}),
    ):
        trainer = sap_trainer(kind, model(), arguments(tmp_path, max_steps=1), **options)

        def look(_: int, trainer: Any = trainer) -> None:
            trained = [p for p in trainer.model.parameters() if p.requires_grad]
            found.append([parameter.grad.clone() for parameter in trained])

        trainer.add_callback(BeforeEachUpdate(look))
        trainer.train()
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-3)


def test_lisa_alternates_and_holds_each_state_near_the_end_of_the_other(tmp_path):
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


def test_lisa_resumes_in_the_middle_of_a_state_with_the_same_bits(tmp_path):
    def trained(folder: Path, checkpoint: str | None = None) -> list[Tensor]:
        trainer = plain_trainer(LisaTrainer, folder, alignment_steps=1, task_steps=3)
        trainer.args.save_strategy, trainer.args.save_steps = "steps", 3
        trainer.state.save_steps = 3
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights(trainer.model)

    through = trained(tmp_path / "a")
    assert_same_bits(trained(tmp_path / "b", str(tmp_path / "a" / "checkpoint-3")), through)


@pytest.mark.parametrize("control", ["flipped", "random"])
def test_a_control_has_the_size_of_the_probe_it_replaces(tmp_path, control):
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


def test_a_flipped_probe_turns_the_gradient_the_other_way(tmp_path):
    gradients: dict[str, Tensor] = {}
    runs: dict[str, tuple[type, dict[str, Any]]] = {
        "none": (SAPTrainer, {"sap_options": {"probe_lr": 0.0}}),
        "sap": (SAPTrainer, {}),
        "flipped": (ControlTrainer, {"control": "flipped"}),
    }
    for name, (kind, options) in runs.items():
        trainer = sap_trainer(kind, model(), arguments(tmp_path, max_steps=1), **options)

        def look(_: int, name: str = name, trainer: Any = trainer) -> None:
            reached = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
            gradients[name] = torch.cat(reached)

        trainer.add_callback(BeforeEachUpdate(look))
        trainer.train()
    ours, flipped = gradients["sap"] - gradients["none"], gradients["flipped"] - gradients["none"]
    assert torch.cosine_similarity(ours, flipped, dim=0) < -0.5


@pytest.mark.parametrize("accumulated", [1, 2])
def test_along_and_beside_are_the_parts_of_what_a_probe_does(tmp_path, accumulated):
    """Dropout is on: a part would not fit if g were taken under other masks."""
    gradients: dict[str, Tensor] = {}
    directions: list[Tensor] = []
    runs: dict[str, tuple[type, dict[str, Any]]] = {
        "none": (SAPTrainer, {"sap_options": {"probe_lr": 0.0}}),
        "sap": (SAPTrainer, {"sap_options": {"keep_direction": True}}),
        "along": (ControlTrainer, {"control": "along"}),
        "beside": (ControlTrainer, {"control": "beside"}),
    }
    for name, (kind, options) in runs.items():
        args = arguments(
            tmp_path, max_steps=1, max_grad_norm=0.0, gradient_accumulation_steps=accumulated
        )
        trainer = sap_trainer(kind, model(), args, **options)

        def look(_: int, name: str = name, trainer: Any = trainer) -> None:
            reached = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
            gradients[name] = torch.cat(reached)
            if name == "sap":
                direction = trainer.sap_optimizer._passes.direction
                directions.append(torch.cat([part.flatten() for part in direction]))

        trainer.add_callback(BeforeEachUpdate(look))
        trainer.train()
    (direction,) = directions
    unit = direction / direction.norm()
    change = gradients["sap"] - gradients["none"]
    along, beside = (gradients[name] - gradients["none"] for name in ("along", "beside"))
    lean = unit.dot(change)
    assert 0.1 * change.norm() < lean < 0.9 * change.norm()
    tolerance = 1e-5 * gradients["none"].norm().item()
    torch.testing.assert_close(along, lean * unit, rtol=0, atol=tolerance)
    torch.testing.assert_close(along + beside, change, rtol=0, atol=tolerance)


def seen_in_each_step(kind: type, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Train at a learning rate of 0; return V, h, ĝ and L_safe of each step."""
    args = arguments(folder, learning_rate=0.0)
    options["sap_options"] = {"keep_direction": True}
    trainer = sap_trainer(kind, model(), args, **options)
    seen: list[dict[str, Any]] = []

    def look(_: int) -> None:
        passes, probes = trainer.sap_optimizer._passes, trainer.probe_set
        seen.append(
            {
                "offsets": probes.offsets,
                "estimates": {j: h.clone() for j, h in probes.estimates.items()},
                "direction": torch.cat([d.flatten().clone() for d in passes.direction]),
                "safety_loss": passes.record.safety_loss.total,
            }
        )

    trainer.add_callback(BeforeEachUpdate(look))
    trainer.train()
    return seen


def test_an_averaged_probe_is_along_the_h_of_all_steps_at_the_size_of_one(tmp_path):
    plain = seen_in_each_step(SAPTrainer, tmp_path)
    averaged = seen_in_each_step(AveragingTrainer, tmp_path, averaged="probe", decay=0.5)
    totals = {j: torch.zeros_like(h) for j, h in plain[0]["estimates"].items()}
    for before, after in zip(plain, averaged, strict=True):
        for j, total in totals.items():
            total.mul_(0.5).add_(before["estimates"][j])
            size = before["offsets"][j].norm()
            torch.testing.assert_close(after["offsets"][j], total * (size / total.norm()))
    assert not torch.equal(plain[-1]["offsets"][1], averaged[-1]["offsets"][1])


def test_an_averaged_direction_is_the_sum_of_past_ones_and_the_loss_is_its_own(tmp_path):
    plain = seen_in_each_step(SAPTrainer, tmp_path)
    averaged = seen_in_each_step(AveragingTrainer, tmp_path, averaged="direction", decay=0.5)
    total = torch.zeros_like(plain[0]["direction"])
    for before, after in zip(plain, averaged, strict=True):
        total = 0.5 * total + before["direction"]
        torch.testing.assert_close(after["direction"], total, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(after["safety_loss"], before["safety_loss"])
    assert not torch.allclose(total, plain[-1]["direction"])


class SafeInOne(ControlTrainer):
    """The safety loss reaches one parameter."""

    def compute_safety_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return self.sap_optimizer.trained_parameters()[0].square().sum()


def test_along_leaves_no_change_where_the_safety_loss_does_not_reach(tmp_path):
    gradients = {}
    runs = {"none": {"probe_lr": 0.0}, "along": {}}
    for name, options in runs.items():
        args = arguments(tmp_path, max_steps=1, max_grad_norm=0.0)
        trainer = sap_trainer(SafeInOne, model(), args, control="along", sap_options=options)

        def look(_: int, name: str = name, trainer: Any = trainer) -> None:
            parameters = trainer.sap_optimizer.trained_parameters()
            gradients[name] = [parameter.grad.clone() for parameter in parameters]

        trainer.add_callback(BeforeEachUpdate(look))
        trainer.train()
    assert not torch.equal(gradients["along"][0], gradients["none"][0])
    assert_same_bits(gradients["along"][1:], gradients["none"][1:])


# ---- merging ----


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_merging_full_parameters_is_linear(share, dtype, rtol):
    aligned, tuned = model(lora=False).to(dtype), model(lora=False).to(dtype)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    expected = [
        (1 - share) * w.double() + share * a.double()
        for w, a in zip(weights(tuned), weights(aligned), strict=True)
    ]
    merge_with_aligned(tuned, aligned.state_dict(), share)
    for actual, wanted in zip(tuned.parameters(), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=0.1 * rtol)


def test_merging_lora_is_merging_the_weights_it_stands_for():
    tuned = model()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    layer = next(m for m in tuned.modules() if hasattr(m, "get_delta_weight") and m.lora_A)
    before, first = layer.get_delta_weight("default"), layer.lora_A["default"].weight.clone()
    merge_with_aligned(tuned, None, 0.25)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.75 * before)
    assert torch.equal(layer.lora_A["default"].weight, first)
    merge_with_aligned(tuned, None, 1.0)
    state = get_peft_model_state_dict(tuned)
    assert all(not value.any() for name, value in state.items() if "lora_B" in name)


def test_merging_with_other_weights_is_an_error():
    tuned = model(lora=False)
    aligned = tuned.state_dict()
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="aligned_share"):
            merge_with_aligned(tuned, aligned, share)
    with pytest.raises(ValueError, match="aligned is missing"):
        merge_with_aligned(tuned, None, 0.5)
    with pytest.raises(ValueError, match="LoRA"):
        merge_with_aligned(model(), aligned, 0.5)
    name = next(iter(dict(tuned.named_parameters())))
    with pytest.raises(ValueError, match=r"no .*0 others"):
        merge_with_aligned(tuned, {k: v for k, v in aligned.items() if k != name}, 0.5)
    with pytest.raises(ValueError, match="shape"):
        merge_with_aligned(tuned, aligned | {name: torch.zeros(1)}, 0.5)


# ---- wrong settings ----


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (MixedTrainer, {"refusal_weight": -1.0}),
        (LisaTrainer, {"alignment_steps": 0}),
        (LisaTrainer, {"task_steps": 0}),
        (LisaTrainer, {"proximal": float("nan")}),
        (SAMTrainer, {"radius": 0.0}),
        (PanaceaTrainer, {"radius": float("nan")}),
        (PanaceaTrainer, {"harm_weight": -1.0}),
        (ControlTrainer, {"control": "none"}),
        (AveragingTrainer, {"averaged": "none"}),
        (AveragingTrainer, {"averaged": "probe", "sap_options": {"schedule": "lagged"}}),
        (ControlTrainer, {"control": "random", "sap_options": {"schedule": "lagged"}}),
    ],
)
def test_wrong_settings_are_named(tmp_path, kind, options):
    with pytest.raises(ValueError, match=next(iter(options)) if len(options) == 1 else "schedule"):
        plain_trainer(kind, tmp_path, **options)


def test_no_refusals_are_mixed_into_an_evaluation(tmp_path):
    trainer = plain_trainer(MixedTrainer, tmp_path)
    batch = random_batch(rows=2, seed=3)
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(
            trainer.compute_loss(trainer.model, batch), task_loss(trainer.model, batch)
        )
