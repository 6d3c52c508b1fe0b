"""SAP in transformers' Trainer and in TRL's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from sap_fast import FusedSAP, ProbeSet, SAPTrainer, SAPTrainerMixin, contrastive_loss, task_loss
from sap_fast.data import SafetyCollator, TaskCollator
from sap_fast.integrations.trainer import SafetyBatches
from sap_fast.losses import response_log_probs
from tests.tiny import VOCABULARY, tiny_llama, with_lora


class MixedTrainer(SAPTrainerMixin, Trainer):
    """The mixin alone: the loss is the Trainer's own."""


def encoded(seed: int) -> dict[str, list[int]]:
    generator = torch.Generator().manual_seed(seed)
    length = 6 + seed % 5
    ids = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
    return {"input_ids": ids, "labels": [-100] * 3 + ids[3:]}


TASK_ROWS = [encoded(seed) for seed in range(24)]
SAFETY_ROWS = [{"chosen": encoded(100 + k), "rejected": encoded(200 + k)} for k in range(7)]


def model(lora: bool = True) -> nn.Module:
    tiny = tiny_llama(layers=3)
    return with_lora(tiny, dropout=0.1) if lora else tiny


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        "seed": 5,
    }
    return TrainingArguments(**(settings | overrides))


def sap_trainer(
    kind: type[Trainer], tuned: nn.Module, args: TrainingArguments, **options: Any
) -> Any:
    sap_options = {"rho": 1e-3, "probe_lr": 0.02} | options.pop("sap_options", {})
    return kind(
        model=tuned,
        args=args,
        train_dataset=TASK_ROWS,
        data_collator=TaskCollator(0),
        safety_dataset=SAFETY_ROWS,
        safety_collator=SafetyCollator(0),
        sap_options=sap_options,
        **options,
    )


def weights(tuned: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in tuned.parameters()]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("off", [{"probe_lr": 0.0}, {"safety_level": 1e3}], ids=str)
def test_without_a_probe_it_is_the_trainer_with_adamw(
    tmp_path: Path, cpu_backend: str, lora: bool, accumulate: int, off: dict[str, float]
) -> None:
    ours, theirs = model(lora), model(lora)
    args = {"gradient_accumulation_steps": accumulate, "max_grad_norm": 0.5}
    trainer = sap_trainer(MixedTrainer, ours, arguments(tmp_path, **args), sap_options=off)
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


def test_a_step_of_the_trainer_is_a_step_of_the_optimizer(tmp_path: Path) -> None:
    ours, theirs = model(), model()
    trainer = sap_trainer(
        SAPTrainer,
        ours,
        arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2, max_grad_norm=0.0),
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
    optimizer = FusedSAP(
        trained, ProbeSet(theirs), lr=5e-3, weight_decay=0.1, rho=1e-3, probe_lr=0.02
    )
    torch.set_rng_state(random_state)

    def task() -> Tensor:
        losses = []
        for batch in micro_batches:
            losses.append(task_loss(theirs, batch, num_items=items))
            losses[-1].backward()
        return sum(loss.detach() for loss in losses)

    def safety() -> Tensor:
        loss = contrastive_loss(theirs, pairs["chosen"], pairs["rejected"])
        loss.backward()
        return loss

    optimizer.step(task, safety)
    assert_same_bits(weights(ours), weights(theirs))
    assert trainer.probe_set is not None
    for index in trainer.probe_set.layers:
        assert trainer.probe_set.offsets[index].norm() > 0


def test_logs_carry_the_figures_of_sap(tmp_path: Path) -> None:
    trainer = sap_trainer(
        SAPTrainer, model(), arguments(tmp_path), sap_options={"rho": "auto", "probe_lr": 1e-3}
    )
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in logs] == [2, 4]
    for row in logs:
        for name in ("safety_loss", "task_loss", "rho", "rho_agreement", "lean", "parameter_norm"):
            assert isinstance(row[f"sap/{name}"], float), name
        assert row["sap/probe_sizes/1"] == pytest.approx(1e-3, rel=1e-4)
        assert row["sap/lean"] == pytest.approx(row["sap/lean_predicted"], rel=0.2)
    json.dumps(trainer.state.log_history)


@pytest.mark.parametrize(
    ("schedule", "lora"), [("paper", True), ("lagged", True), ("paper", False)]
)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(
    tmp_path: Path, schedule: str, lora: bool
) -> None:
    options = {"sap_options": {"rho": "auto", "schedule": schedule, "probe_lr": 0.05}}
    args = {"max_steps": 6, "gradient_accumulation_steps": 2, "save_steps": 2}
    args |= {"save_strategy": "steps", "per_device_train_batch_size": 2}
    straight = model(lora)
    sap_trainer(SAPTrainer, straight, arguments(tmp_path / "a", **args), **options).train()

    resumed = model(lora)
    trainer = sap_trainer(SAPTrainer, resumed, arguments(tmp_path / "b", **args), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert trainer.state.global_step == 6
    assert_same_bits(weights(straight), weights(resumed))
    assert trainer.sap_optimizer.calibration is not None
    assert trainer.sap_optimizer.calibration.step == 0


def test_evaluation_sees_no_probe(tmp_path: Path) -> None:
    tuned = model()
    trainer = sap_trainer(
        SAPTrainer,
        tuned,
        arguments(tmp_path),
        eval_dataset=TASK_ROWS[:4],
        sap_options={"probe_lr": 0.5},
    )
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    trainer.probe_set.detach()
    assert found == trainer.evaluate()["eval_loss"]


def test_bf16_autocast_and_gradient_checkpointing(tmp_path: Path) -> None:
    tuned = model()
    args = arguments(tmp_path, bf16=True, activation_checkpointing=True)
    trainer = sap_trainer(SAPTrainer, tuned, args, sap_options={"rho": "auto"})
    trainer.train()
    assert trainer.probe_set.compute_dtype == torch.bfloat16
    assert trainer.sap_optimizer.metrics.skipped_steps == 0
    assert trainer.sap_optimizer.calibration.agreement > 0.9


def test_blending_without_a_probe(tmp_path: Path) -> None:
    tuned = model()
    trainer = sap_trainer(
        SAPTrainer,
        tuned,
        arguments(tmp_path),
        probe_layers=None,
        sap_options={"safety_weight": 0.5},
    )
    trainer.train()
    assert trainer.probe_set is None
    assert trainer.sap_optimizer.metrics.safety_loss is not None
    assert not any(m._forward_hooks for m in tuned.modules())


def test_an_optimizer_of_ones_own(tmp_path: Path) -> None:
    tuned = model()
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = FusedSAP(trained, ProbeSet(tuned, layers=[0]), lr=1e-3, rho=1e-3)
    trainer = sap_trainer(SAPTrainer, tuned, arguments(tmp_path), optimizers=(optimizer, None))
    trainer.train()
    assert trainer.sap_optimizer is optimizer and optimizer._steps == 4

    other = torch.optim.AdamW(trained)
    trainer = sap_trainer(SAPTrainer, tuned, arguments(tmp_path), optimizers=(other, None))
    with pytest.raises(TypeError, match="not FusedSAP"):
        trainer.train()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_presets_leave_out_the_passes_that_are_not_due(tmp_path: Path, accumulate: int) -> None:
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
            return whole if kind == "task" else self.sap_optimizer.probe_part(whole)

    options = {"probe_every": 2, "direction_every": 2, "probe_fraction": 0.6}
    trainer = sap_trainer(
        Watched,
        model(),
        arguments(tmp_path, gradient_accumulation_steps=accumulate, max_steps=3),
        sap_options=options,
    )
    trainer.train()
    probed = [("probe", rows) for rows in ([2] if accumulate == 1 else [3, 1])] * 2
    full = [("safety", 4), *probed, *[("task", 3)] * accumulate]
    assert seen == full + [("task", 3)] * accumulate + full


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"safety_dataset": None}, "safety_dataset is missing"),
        ({"safety_collator": None}, "safety_collator is missing"),
        ({"safety_dataset": []}, "safety_dataset is empty"),
        ({"safety_batch_size": 0}, "safety_batch_size=0"),
        ({"safety_loss": "hinge"}, "safety_loss='hinge'"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, overrides: dict[str, Any], message: str) -> None:
    given = {"safety_dataset": SAFETY_ROWS, "safety_collator": SafetyCollator(0)} | overrides
    with pytest.raises(ValueError, match=message):
        SAPTrainer(model=model(), args=arguments(tmp_path), train_dataset=TASK_ROWS, **given)


@pytest.mark.parametrize("name", ["contrastive", "difference", "refusal", "joint"])
def test_the_safety_loss_is_the_one_that_is_named(tmp_path: Path, name: str) -> None:
    tuned = model().eval()
    trainer = sap_trainer(SAPTrainer, tuned, arguments(tmp_path), safety_loss=name)
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
