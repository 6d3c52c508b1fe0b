"""SAP in transformers' Trainer and in TRL's."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from sap_fast import (
    BlendedAdamW,
    FusedSAP,
    ProbeSet,
    SAPTrainer,
    SAPTrainerMixin,
    contrastive_loss,
    joint_loss,
    task_loss,
)
from sap_fast.compatibility import checkpointing_arguments
from sap_fast.data import SafetyCollator, TaskCollator
from sap_fast.integrations.safety_batches import SafetyBatches
from sap_fast.losses import kl_loss, response_log_probs
from tests.tiny import assert_same_bits, encoded, tiny_llama, weights, with_lora
from tests.trainers import (
    PROBE,
    SAFETY_ROWS,
    TASK_ROWS,
    BeforeEachUpdate,
    arguments,
    model,
    sap_trainer,
    trainer_of,
)


class PlainLossTrainer(SAPTrainerMixin, Trainer):
    """The mixin alone: the loss is the Trainer's own."""


OFF: dict[str, dict[str, Any]] = {
    "no size": {"probe": PROBE | {"size": 0.0}},
    "held": {"probe": PROBE, "sap_options": {"safety_level": 1e3}},
    "blend by nothing": {"method": "blend", "sap_options": {"safety_weight": 0.0}},
}


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("off", list(OFF))
def test_without_a_probe_it_is_the_trainer_with_adamw(
    tmp_path: Path, cpu_backend: str, lora: bool, accumulate: int, off: str
) -> None:
    ours, theirs = model(lora), model(lora)
    args = {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.5}
    trainer = trainer_of(PlainLossTrainer, ours, arguments(tmp_path, **args), **OFF[off])
    trainer.train()
    # As in `tests.tiny.plain_adamw`.
    same_bits = "adamw_torch_fused" if cpu_backend == "native" else "adamw_torch"
    plain = Trainer(
        model=theirs,
        args=arguments(tmp_path, optim=same_bits, **args),
        train_dataset=TASK_ROWS,
        data_collator=TaskCollator(0),
    )
    plain.train()
    assert_same_bits(weights(ours), weights(theirs))
    losses = [[r["loss"] for r in t.state.log_history if "loss" in r] for t in (trainer, plain)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("method", ["sap", "blend"])
def test_a_step_of_the_trainer_is_a_step_of_the_optimizer(tmp_path: Path, method: str) -> None:
    """With the safety loss that each method has by default."""
    ours, theirs = model(), model()
    trainer = trainer_of(
        SAPTrainer,
        ours,
        arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2, max_grad_norm=0.0),
        **({"probe": PROBE} if method == "sap" else {"method": method}),
    )
    windows: list[Any] = []
    fetch = trainer.get_batch_samples

    def remember(*args: Any, **kwargs: Any) -> Any:
        windows.append(fetch(*args, **kwargs))
        windows.append(torch.get_rng_state())
        return windows[-2]

    trainer.get_batch_samples = remember
    trainer.train()
    (micro_batches, items), random_state = windows[:2]

    pairs = SafetyCollator(0)(trainer._safety_batches.rows(0))
    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    probes = ProbeSet(theirs, **PROBE)
    optimizer: BlendedAdamW = FusedSAP(trained, probes, lr=5e-3, weight_decay=0.1)
    if method == "blend":
        optimizer = BlendedAdamW(trained, lr=5e-3, weight_decay=0.1)
    torch.set_rng_state(random_state)

    def task() -> Tensor:
        losses = []
        for batch in micro_batches:
            losses.append(task_loss(theirs, batch, num_items=items))
            losses[-1].backward()
        return sum(loss.detach() for loss in losses)

    def safety() -> Tensor:
        safety_loss = {"sap": contrastive_loss, "blend": joint_loss}[method]
        loss = safety_loss(theirs, pairs["chosen"], pairs["rejected"])
        loss.backward()
        return loss

    optimizer.step(task, safety)
    assert_same_bits(weights(ours), weights(theirs))
    if method == "sap":
        for index in trainer.probe_set.layers:
            assert trainer.probe_set.offsets[index].norm() > 0
    else:
        assert trainer.probe_set is None
        assert not any(module._forward_hooks for module in ours.modules())
    assert type(trainer.sap_optimizer) is type(optimizer)
    assert trainer.sap_optimizer.metrics.above_level is (True if method == "blend" else None)


def test_logs_carry_the_figures_of_sap(tmp_path: Path) -> None:
    probe = {"rho": "auto", "size": 1e-3}
    trainer = sap_trainer(SAPTrainer, model(), arguments(tmp_path), probe=probe)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in logs] == [2, 4]
    for row in logs:
        for name in ("safety_loss", "task_loss", "rho", "rho_agreement", "lean", "parameter_norm"):
            assert isinstance(row[f"sap/{name}"], float), name
        assert row["sap/perturbation_applied"] == pytest.approx(row["sap/perturbation_wanted"], 0.1)
        assert row["sap/lean"] > 0
        assert row["sap/probe_sizes/1"] == pytest.approx(1e-3, rel=1e-4)
    json.dumps(trainer.state.log_history)


RESUMED: dict[str, dict[str, Any]] = {
    "sap": {"probe": {"rho": "auto", "size": 0.05}},
    "kept": {
        "probe": {"rho": 1e-3, "size": 0.05, "rows": 0.5},
        "sap_options": {"direction_every": 3},
    },
    "blend": {"method": "blend", "sap_options": {"rule": "floor", "safety_weight": 1.0}},
}


@pytest.mark.parametrize(
    ("name", "lora"), [("sap", True), ("sap", False), ("kept", True), ("blend", True)]
)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(
    tmp_path: Path, name: str, lora: bool
) -> None:
    options = RESUMED[name]
    args = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_steps": 2}
    args |= {"save_strategy": "steps", "per_device_train_batch_size": 2}
    straight = model(lora)
    trainer_of(SAPTrainer, straight, arguments(tmp_path / "a", **args), **options).train()

    resumed = model(lora)
    trainer = trainer_of(SAPTrainer, resumed, arguments(tmp_path / "b", **args), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert trainer.state.global_step == 6
    assert_same_bits(weights(straight), weights(resumed))
    passes = trainer.sap_optimizer.passes
    assert passes.steps == 6 and passes.direction.taken == (2 if name == "kept" else 6)
    assert passes.level.known is not None if name == "blend" else passes.level.known is None
    if name == "sap":
        assert passes.calibration is not None and passes.calibration.step == 0


def test_evaluation_sees_no_probe(tmp_path: Path) -> None:
    tuned = model()
    trainer = sap_trainer(
        SAPTrainer,
        tuned,
        arguments(tmp_path),
        eval_dataset=TASK_ROWS[:4],
        probe={"size": 0.5},
    )
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    trainer.probe_set.detach()
    assert found == trainer.evaluate()["eval_loss"]


def test_bf16_autocast_and_gradient_checkpointing(tmp_path: Path) -> None:
    tuned = model()
    args = arguments(tmp_path, bf16=True, **checkpointing_arguments(True))
    trainer = sap_trainer(SAPTrainer, tuned, args, probe={"rho": "auto"})
    trainer.train()
    assert trainer.probe_set.compute_dtype == torch.bfloat16
    assert trainer.sap_optimizer.metrics.skipped_steps == 0
    assert trainer.sap_optimizer.passes.calibration.agreement > 0.9


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    tuned = model()
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = FusedSAP(trained, ProbeSet(tuned, layers=[0], rho=1e-3), lr=1e-3)
    args = arguments(tmp_path, optim="sgd")  # of no effect on an optimizer that is given
    trainer = trainer_of(SAPTrainer, tuned, args, optimizers=(optimizer, None))
    assert trainer.probe_set is optimizer.probes
    trainer.train()
    assert trainer.sap_optimizer is optimizer and optimizer.passes.steps == 4

    with pytest.raises(ValueError, match=r"sap_options=\{'rule': 'floor'\} have no effect"):
        given: dict[str, Any] = {"sap_options": {"rule": "floor"}, "optimizers": (optimizer, None)}
        trainer_of(SAPTrainer, tuned, arguments(tmp_path), **given)


@pytest.mark.parametrize("method", ["sap", "blend"])
def test_the_adamw_of_pytorch_is_the_update_of_this_package(tmp_path: Path, method: str) -> None:
    default = next(f.default for f in fields(TrainingArguments) if f.name == "optim")
    for optim in (default, "adamw_torch"):
        args = arguments(tmp_path, optim=optim)
        trainer = trainer_of(SAPTrainer, model(), args, method=method)
        name = {"sap": "FusedSAP", "blend": "BlendedAdamW"}[method]
        assert type(trainer.create_optimizer()).__name__ == name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_passes_that_are_not_due_are_left_out(tmp_path: Path, accumulate: int) -> None:
    seen: list[tuple[str, int]] = []

    class Watched(SAPTrainer):
        def compute_safety_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
            seen.append(("safety", len(inputs["chosen"]["input_ids"])))
            return super().compute_safety_loss(model, inputs)

        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kw: Any):
            kind = "probe" if not any(p.requires_grad for p in model.parameters()) else "task"
            seen.append((kind, len(inputs["input_ids"])))
            # The rows seen are divided by their own number of tokens.
            items = sum((m["labels"][:, 1:] != -100).sum() for m in self.expected_window(kind))
            assert int(kw["num_items_in_batch"]) == int(items)
            return super().compute_loss(model, inputs, *args, **kw)

        def expected_window(self, kind: str) -> list[Any]:
            whole = self._window
            return whole if kind == "task" else self.probe_set.part(whole)

    trainer = sap_trainer(
        Watched,
        model(),
        arguments(tmp_path, gradient_accumulation_steps=accumulate, max_steps=3),
        probe={"rows": 0.6},
        sap_options={"direction_every": 2},
    )
    trainer.train()
    probed = [("probe", rows) for rows in ([2] if accumulate == 1 else [3, 1])] * 2
    rest = [*probed, *[("task", 3)] * accumulate]
    assert seen == [("safety", 4), *rest, *rest, ("safety", 4), *rest]


class DividedByMicroBatches(PlainLossTrainer):
    """A loss that counts no tokens: the trainer divides it by the number of micro-batches."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> Tensor:
        return task_loss(model, inputs)


def test_a_part_of_the_micro_batches_counts_as_a_whole_step(tmp_path: Path) -> None:
    """The losses of the probe passes are the mean over the micro-batches that these see."""
    trainer = sap_trainer(
        DividedByMicroBatches,
        model(lora=False),
        arguments(tmp_path, gradient_accumulation_steps=3, max_steps=1),
        probe={"rows": 0.5, "difference": "forward"},
    )
    backward, returned = trainer._backward_of_task, []
    trainer._backward_of_task = lambda *given: returned.append(backward(*given)) or returned[-1]
    found: list[tuple[Tensor, Tensor]] = []

    def look(_: int) -> None:
        part = trainer.probe_set.part(trainer._window)
        assert [len(rows["input_ids"]) for rows in part] == [3, 2]
        losses = torch.stack([task_loss(trainer.model, rows) for rows in part])
        found.append((returned[-1], losses.mean()))
        assert trainer.current_gradient_accumulation_steps == 3

    trainer.add_callback(BeforeEachUpdate(look))
    trainer.train()
    torch.testing.assert_close(*found[0])


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_a_log_costs_no_direction_and_has_what_rounding_left(
    tmp_path: Path, logging_steps: int
) -> None:
    args = arguments(tmp_path, logging_steps=logging_steps)
    trainer = sap_trainer(SAPTrainer, model(), args)
    seen: list[tuple[bool, bool]] = []

    def look(_: int) -> None:
        passes = trainer.sap_optimizer.passes
        seen.append((passes.direction.is_there, passes.record.perturbation_applied is not None))

    trainer.add_callback(BeforeEachUpdate(look))
    trainer.train()
    # The first step measures it for itself.
    measured = [True] * 4 if logging_steps == 1 else [True, True, False, True]
    assert seen == [(False, each) for each in measured]


def test_an_error_in_an_inner_pass_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    tuned = model()
    before, calls = weights(tuned), 0

    class Failing(SAPTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:  # in the second probe pass
                raise RuntimeError("out of memory")
            return super().compute_loss(*args, **kwargs)

    trainer = sap_trainer(Failing, tuned, arguments(tmp_path, gradient_accumulation_steps=2))
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.train()
    assert_same_bits(weights(tuned), before)
    assert all(p.grad is None for p in tuned.parameters())
    assert trainer.current_gradient_accumulation_steps == 2
    assert any(p.requires_grad for p in tuned.parameters())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"safety_dataset": None}, "safety_dataset is missing"),
        ({"safety_collator": None}, "safety_collator is missing"),
        ({"safety_dataset": []}, "safety_dataset is empty"),
        ({"safety_batch_size": 0}, "safety_batch_size=0"),
        ({"safety_loss": "hinge"}, "safety_loss='hinge'"),
        ({"method": "adamw"}, "method='adamw' is not known; choose one of sap, blend"),
        ({"method": "blend", "probe": {"size": 1.0}}, "probe=.*'blend', which has no probe"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    given = {"safety_dataset": SAFETY_ROWS, "safety_collator": SafetyCollator(0)} | overrides
    with pytest.raises(ValueError, match=message):
        SAPTrainer(model=model(), args=arguments(tmp_path), train_dataset=TASK_ROWS, **given)


@pytest.mark.parametrize("name", ["contrastive", "difference", "refusal", "joint"])
def test_the_safety_loss_is_the_one_that_is_named(tmp_path: Path, name: str) -> None:
    tuned = model().eval()
    trainer = trainer_of(SAPTrainer, tuned, arguments(tmp_path), safety_loss=name)
    pairs = SafetyCollator(0)(SAFETY_ROWS[:2])
    chosen, rejected = (response_log_probs(tuned, pairs[k], reduction="mean") for k in pairs)
    expected = {
        "contrastive": -torch.nn.functional.logsigmoid(chosen - rejected),
        "difference": rejected - chosen,
        "refusal": -chosen,
        "joint": -torch.nn.functional.logsigmoid(chosen - rejected),  # its value
    }[name].mean()
    found = trainer.compute_safety_loss(tuned, pairs)
    torch.testing.assert_close(found, expected)


def test_the_divergence_from_the_aligned_model_is_a_safety_loss_too(tmp_path: Path) -> None:
    tuned = with_lora(tiny_llama(layers=2))
    options = {"rule": "project", "safety_level": None}
    trainer = trainer_of(
        SAPTrainer,
        tuned,
        arguments(tmp_path),
        method="blend",
        safety_loss="kl",
        sap_options=options,
    )
    trainer.train()
    assert trainer.passes.metrics.safety_loss > 0
    pairs = SafetyCollator(0)(SAFETY_ROWS[:2])
    found = trainer.compute_safety_loss(tuned, pairs)
    assert torch.equal(found, kl_loss(tuned, pairs["chosen"]))


def test_safety_batches_show_every_row_once_per_round_and_follow_from_the_step() -> None:
    batches = SafetyBatches(SAFETY_ROWS, batch_size=3, seed=1)
    seen = [batches._dataset.index(row) for step in range(7) for row in batches.rows(step)]
    for start in (0, 7, 14):
        assert sorted(seen[start : start + 7]) == list(range(7))
    assert seen[:7] != seen[7:14]
    fresh = SafetyBatches(SAFETY_ROWS, batch_size=3, seed=1)
    assert fresh.rows(5) == batches.rows(5)
    # Two ranks share what one rank of twice the batch would see.
    wide = SafetyBatches(SAFETY_ROWS, batch_size=6, seed=1)
    assert fresh.rows(2, 0, 2) + fresh.rows(2, 1, 2) == wide.rows(2)


def test_safety_rows_of_about_the_same_length_come_together() -> None:
    rows = [{"chosen": encoded(k), "rejected": encoded(k)} for k in range(40)]
    batches = SafetyBatches(rows, batch_size=4, seed=0)
    lengths = [
        [len(row["chosen"]["input_ids"]) for row in batches.rows(step)] for step in range(10)
    ]
    assert all(max(batch) - min(batch) <= 1 for batch in lengths)
    # In no order of length among the batches.
    assert sorted(map(min, lengths)) != [min(batch) for batch in lengths]
    # Rows of another form come in random order.
    other = SafetyBatches(list(range(40)), batch_size=4, seed=0)
    assert sorted(row for step in range(10) for row in other.rows(step)) == list(range(40))
