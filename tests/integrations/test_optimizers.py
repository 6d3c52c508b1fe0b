"""The trainer with optimizers of others: their update is theirs, and the passes run beside it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from sap_fast import ProbeSet, SafetyPasses, SAPTrainerMixin, joint_loss, task_loss
from sap_fast.compatibility import checkpointing_arguments
from sap_fast.data import SafetyCollator, TaskCollator
from sap_fast.model.layers import find_decoder_layers
from tests.integrations.test_stacks import SAPSFTTrainer, build, train_and_remember
from tests.tiny import assert_same_bits, weights
from tests.trainers import (
    PROBE,
    TASK_ROWS,
    BeforeEachUpdate,
    arguments,
    gradients,
    small,
    trainer_of,
)

#: What transformers takes some of them from.
PACKAGES = {
    "adamw_bnb_8bit": "bitsandbytes",
    "paged_adamw_8bit": "bitsandbytes",
    "adamw_torch_8bit": "torchao",
    "schedule_free_adamw": "schedulefree",
}


def needs_package_of(optim: str) -> None:
    if optim in PACKAGES:
        pytest.importorskip(PACKAGES[optim])


class PlainLossTrainer(SAPTrainerMixin, Trainer):
    """The mixin alone: the loss is the Trainer's own."""


#: `TrainingArguments(optim=…)`, and the class that it builds.
OPTIMS = {
    "adamw_bnb_8bit": "AdamW",
    "paged_adamw_8bit": "AdamW",
    "adamw_torch_8bit": "AdamW8bit",
    "schedule_free_adamw": "AdamWScheduleFree",
    "adafactor": "Adafactor",
    "sgd": "SGD",
}
HOW: dict[str, dict[str, Any]] = {
    "sap": {"probe": PROBE},
    "blend": {"method": "blend", "sap_options": {"safety_level": None}},
}
OFF: dict[str, dict[str, Any]] = {
    "sap": {"probe": PROBE | {"size": 0.0}},
    "blend": {"method": "blend", "sap_options": {"safety_weight": 0.0}},
}


def wide() -> nn.Module:
    """A model with parameters that are large enough for 8-bit states: 4,096 elements."""
    tuned = small(lora=False)
    tuned.resize_token_embeddings(256)
    return tuned


def plain(folder: Path, tuned: nn.Module, **settings: Any) -> list[Tensor]:
    trainer = Trainer(
        model=tuned,
        args=arguments(folder, **settings),
        train_dataset=TASK_ROWS,
        data_collator=TaskCollator(0),
    )
    trainer.train()
    return weights(tuned)


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao compiles its update, which takes a minute and changes nothing that is tested here."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(
    ("optim", "method"),
    [
        ("adamw_bnb_8bit", "sap"),
        ("adamw_torch_8bit", "sap"),
        ("schedule_free_adamw", "sap"),
        ("sgd", "blend"),
        pytest.param("adamw_bnb_8bit", "blend", marks=pytest.mark.slow),
        pytest.param("paged_adamw_8bit", "sap", marks=pytest.mark.slow),
        pytest.param("adafactor", "sap", marks=pytest.mark.slow),
        pytest.param("sgd", "sap", marks=pytest.mark.slow),
    ],
)
def test_the_optimizer_is_the_one_that_is_named(tmp_path: Path, optim: str, method: str) -> None:
    needs_package_of(optim)
    settings = {"optim": optim, "max_steps": 2, "logging_steps": 1}
    expected = plain(tmp_path, wide(), **settings)
    tuned = wide()
    trainer_of(PlainLossTrainer, tuned, arguments(tmp_path, **settings), **OFF[method]).train()
    assert_same_bits(weights(tuned), expected)

    tuned = wide()
    trainer = trainer_of(PlainLossTrainer, tuned, arguments(tmp_path, **settings), **HOW[method])
    trainer.train()
    assert type(trainer.optimizer.optimizer).__name__ == OPTIMS[optim]
    found = weights(tuned)
    assert all(tensor.isfinite().all() for tensor in found)
    assert not any(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["sap/skipped_steps"] for row in logs] == [0, 0]
    assert trainer.passes.steps == trainer.passes.direction.taken == 2
    assert (trainer.probe_set is None) == (method == "blend")
    if method == "sap":
        assert all(row["sap/probe_sizes/1"] > 0 for row in logs)


def test_gradients_are_clipped_and_then_blended(tmp_path: Path) -> None:
    """A step of SGD by hand: the passes, the trainer's clipping, `blend_`, the update."""
    tuned, twin = small(lora=True), small(lora=True)
    settings = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.05, "weight_decay": 0.0}
    settings |= {"gradient_accumulation_steps": 2}
    args = arguments(tmp_path, **settings)
    trainer = trainer_of(PlainLossTrainer, tuned, args, **HOW["blend"])
    seen: list[Tensor] = []
    trainer.add_callback(BeforeEachUpdate(lambda _: seen.append(gradients(trainer.model))))
    ((window, items),) = train_and_remember(trainer)
    assert seen[0].norm() == pytest.approx(0.05, rel=1e-3)  # not blended yet

    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=5e-3)
    passes = SafetyPasses(optimizer.param_groups, safety_weight=0.3)
    pairs = SafetyCollator(0)(trainer._safety_batches.rows(0))

    def task(part: Any) -> Tensor:
        losses = []
        for rows in window:
            losses.append(task_loss(twin, rows, num_items=items))
            losses[-1].backward()
        return torch.stack(losses).sum()

    def safety() -> Tensor:
        loss = joint_loss(twin, pairs["chosen"], pairs["rejected"])
        loss.backward()
        return loss

    passes.inner_passes(task, safety)
    with passes.task_pass() as record:
        record(task(None))
    nn.utils.clip_grad_norm_(trained, 0.05)
    passes.blend_()
    optimizer.step()
    for ours, expected in zip(weights(tuned), weights(twin), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)
    moved = [p for p in small(lora=True).parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(moved, trained, strict=True))


RESUMED: dict[str, dict[str, Any]] = {
    "adamw_bnb_8bit": {"probe": PROBE, "sap_options": {"direction_every": 4}},
    "adamw_torch_8bit": {"probe": PROBE | {"rho": "auto"}},
    "schedule_free_adamw": {"method": "blend"},  # the level is held
}


@pytest.mark.parametrize("optim", RESUMED)
def test_a_resumed_run_with_another_optimizer_ends_with_the_same_bits(
    tmp_path: Path, optim: str
) -> None:
    needs_package_of(optim)
    settings = {"optim": optim, "max_steps": 5, "save_steps": 2, "save_strategy": "steps"}
    how, ends, found = RESUMED[optim], [], []
    for name in ("a", "b"):
        trainer = trainer_of(
            PlainLossTrainer, wide(), arguments(tmp_path / name, **settings), **copy.deepcopy(how)
        )
        checkpoint = None if name == "a" else str(tmp_path / "a" / "checkpoint-2")
        trainer.train(resume_from_checkpoint=checkpoint)
        passes = trainer.passes
        ends.append(weights(trainer.model))
        found.append((passes.steps, passes.direction.taken, passes.level.known, passes.calibration))
    assert_same_bits(*ends)
    assert found[0] == found[1]
    assert found[0][0] == 5


def test_a_schedule_free_optimizer_trains_before_the_first_pass_of_each_step(
    tmp_path: Path,
) -> None:
    """Its `train` moves the weights: inside of a pass it would move perturbed ones."""
    needs_package_of("schedule_free_adamw")
    modes: list[bool] = []

    class Watched(PlainLossTrainer):
        def compute_safety_loss(self, *args: Any) -> Tensor:
            modes.append(self.optimizer.optimizer.param_groups[0]["train_mode"])
            return super().compute_safety_loss(*args)

    settings = {"optim": "schedule_free_adamw", "max_steps": 2}
    settings |= {"eval_strategy": "steps", "eval_steps": 1}
    args = arguments(tmp_path, **settings)
    trainer_of(Watched, small(lora=True), args, eval_dataset=TASK_ROWS[:2], **HOW["sap"]).train()
    assert modes == [True, True]


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_an_optimizer_that_is_given_is_used(tmp_path: Path, way: str) -> None:
    tuned, twin = small(lora=True), small(lora=True)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    given: dict[str, Any] = {"optimizer_cls_and_kwargs": (torch.optim.Muon, {"lr": 1e-2})}
    if way == "optimizers":
        given = {"optimizers": (torch.optim.NAdam(trained, lr=1e-2), None)}
    trainer = trainer_of(PlainLossTrainer, tuned, arguments(tmp_path), **HOW["sap"], **given)
    if way == "optimizers":
        assert trainer.probe_set is trainer.passes.probes is not None
    trainer.train()
    assert trainer.passes.steps == 4
    name = {"optimizers": "NAdam", "optimizer_cls_and_kwargs": "Muon"}[way]
    assert type(trainer.optimizer.optimizer).__name__ == name
    with pytest.raises(TypeError, match=r"neither FusedSAP nor BlendedAdamW; trainer\.passes"):
        _ = trainer.sap_optimizer
    assert any(not torch.equal(a, b) for a, b in zip(weights(tuned), weights(twin), strict=True))


class OwnOptimizerTrainer(Trainer):
    """Makes its optimizer whatever is asked for, as LLaMA-Factory's trainer can."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained = [
                parameter for parameter in self.model.parameters() if parameter.requires_grad
            ]
            self.optimizer = torch.optim.NAdam(trained, lr=1e-2)
        return super().create_optimizer(*args, **kwargs)


class SAPOwnOptimizerTrainer(SAPTrainerMixin, OwnOptimizerTrainer):
    """The mixin goes in front."""


@pytest.mark.parametrize("how", list(HOW))
def test_an_optimizer_that_the_trainer_makes_is_used(tmp_path: Path, how: str) -> None:
    made = trainer_of(
        SAPOwnOptimizerTrainer, small(lora=True), arguments(tmp_path / "a"), **HOW[how]
    )
    made.train()
    assert made.passes.steps == 4
    tuned = small(lora=True)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    options = HOW[how] | {"optimizers": (torch.optim.NAdam(trained, lr=1e-2), None)}
    given = trainer_of(PlainLossTrainer, tuned, arguments(tmp_path / "b"), **options)
    given.train()
    assert_same_bits(weights(made.model), weights(given.model))
    for model in (made.model, given.model):  # no hooks of a probe set that is not used
        hooks = [h for layer in find_decoder_layers(model)[0] for h in layer._forward_hooks]
        assert len(hooks) == (len(made.probe_set.layers) if how == "sap" else 0)
    with pytest.raises(ValueError, match=r"another optimizer makes, NAdam of SAPOwnOptimizer"):
        options = HOW[how] | {"sap_options": {"weight_decay": 0.1}}
        trainer_of(
            SAPOwnOptimizerTrainer, small(lora=True), arguments(tmp_path / "c"), **options
        ).train()


def test_trl_takes_8_bit_adamw(tmp_path: Path) -> None:
    needs_package_of("adamw_bnb_8bit")
    settings = {"optim": "adamw_bnb_8bit", "bf16": True} | checkpointing_arguments(True)
    trainer = build(SAPSFTTrainer, tmp_path, small(lora=True), **settings)
    trainer.train()
    assert trainer.probe_set.compute_dtype == torch.bfloat16
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert all(row["sap/estimate_norms/1"] > 0 for row in logs) and trainer.passes.steps == 2
    assert type(trainer.optimizer.optimizer).__module__.startswith("bitsandbytes")


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_an_update_inside_of_backward_is_refused(tmp_path: Path, optim: str) -> None:
    args = arguments(tmp_path, optim=optim, optim_target_modules=["q_proj"])
    with pytest.raises(ValueError, match=f"optim='{optim}' updates parameters inside of backward"):
        trainer_of(PlainLossTrainer, small(lora=True), args)


def test_options_of_an_update_that_another_makes_are_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, optim="sgd")
    with pytest.raises(ValueError, match=r"betas, weight_decay would be of an update"):
        options = {"weight_decay": 0.1, "betas": (0.9, 0.99), "rule": "floor"}
        trainer_of(PlainLossTrainer, small(lora=True), args, sap_options=options)

    class Other:
        param_groups: tuple[Any, ...] = ()

    with pytest.raises(TypeError, match=r"is a Other; expected a torch.optim.Optimizer"):
        args = arguments(tmp_path)
        trainer_of(PlainLossTrainer, small(lora=True), args, optimizers=(Other(), None))


def test_one_objective_for_all_groups(tmp_path: Path) -> None:
    tuned = small(lora=True)
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    groups = [{"params": trained[:2], "maximize": True}, {"params": trained[2:]}]
    with pytest.raises(ValueError, match="maximize differs"):
        given = (torch.optim.SGD(groups), None)
        trainer_of(PlainLossTrainer, tuned, arguments(tmp_path), optimizers=given)
    given = (torch.optim.SGD(trained, maximize=True), None)
    trainer = trainer_of(PlainLossTrainer, tuned, arguments(tmp_path), optimizers=given)
    assert trainer.passes.maximize is True
    assert isinstance(trainer.probe_set, ProbeSet)
