"""Every setting of both trainers, with LoRA and in full; ranks; deterministic algorithms."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

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
from sap_fast.ops import choose_backend
from tests.ranks import on_ranks
from tests.tiny import VOCABULARY, assert_same_bits, distance, weights
from tests.trainers import SAFETY_ROWS, TASK_ROWS, arguments, by_length, model, small


class CountedSFTTrainer(SFTTrainer):
    """TRL's trainer with overrides, as users write them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: Counter[str] = Counter()
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.calls["training_step"] += 1
        return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.calls["compute_loss"] += 1
        return super().compute_loss(*args, **kwargs)


class SAPSFTTrainer(SAPTrainerMixin, CountedSFTTrainer):
    """The mixin goes in front, as the README says."""


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{k}": k for k in range(VOCABULARY - 2)} | {"<pad>": 126, "<eos>": 127}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


LR, SIZE = 5e-3, 0.1
# In bf16 the h of the first layer has more of the rounding in which TRL's head differs.
PROBE: dict[str, Any] = {"layers": [1], "rho": 1e-2, "size": SIZE}


def build(
    kind: type[Trainer],
    folder: Path,
    tuned: nn.Module,
    rows: list[Any] = TASK_ROWS,
    safety_rows: list[Any] = SAFETY_ROWS,
    safety_batch_size: int = 4,
    how: dict[str, Any] | None = None,
    **settings: Any,
) -> Any:
    defaults = {"max_steps": 2, "logging_steps": 1, "bf16": False, "learning_rate": LR}
    # ε as large as the gradients, so that AdamW sees their size and rounding has no sign to turn.
    defaults |= {"weight_decay": 0.0, "lr_scheduler_type": "constant", "adam_epsilon": 1e-2}
    common: TrainingArguments = arguments(folder, **(defaults | settings))
    collator: Any = TaskCollator(0)
    processing = None
    if kind is SAPSFTTrainer:
        given = {name: value for name, value in common.to_dict().items() if value is not None}
        names = SFTConfig.__dataclass_fields__
        common = SFTConfig(**{name: value for name, value in given.items() if name in names})
        rows, collator, processing = Dataset.from_list(rows), None, word_tokenizer()
    return kind(
        model=tuned,
        args=common,
        train_dataset=rows,
        data_collator=collator,
        processing_class=processing,
        safety_dataset=safety_rows,
        safety_collator=SafetyCollator(0),
        safety_batch_size=safety_batch_size,
        **({"probe": PROBE} if how is None else how),
    )


def by_hand(trainer: Any, windows: list[Any], tuned: nn.Module, size: float) -> list[Tensor]:
    """The steps that the trainer made of these micro-batches, in a plain loop."""
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {"lr": LR, "eps": 1e-2, "weight_decay": 0.0}
    optimizer: BlendedAdamW = BlendedAdamW(trained, **settings, safety_weight=size)
    safety_loss = joint_loss
    if trainer.probe_set is not None:
        probes = ProbeSet(tuned, **(trainer._probe | {"size": size}))
        optimizer, safety_loss = FusedSAP(trained, probes, **settings), contrastive_loss
    names = ("input_ids", "attention_mask", "labels")
    for step, (window, items) in enumerate(windows):
        pairs = SafetyCollator(0)(trainer._safety_batches.rows(step))

        def task(part: Any, whole: Any = window, items: Any = items) -> Tensor:
            losses = []
            if part is not whole:  # fewer rows, divided by their own number of tokens
                items = sum((rows["labels"][:, 1:] != -100).sum() for rows in part)
            for rows in part:
                batch = {name: rows[name] for name in names}
                losses.append(task_loss(tuned, batch, num_items=items))
                losses[-1].backward()
            return torch.stack(losses).sum()

        def safety(pairs: Any = pairs) -> Tensor:
            loss = safety_loss(tuned, pairs["chosen"], pairs["rejected"])
            loss.backward()
            return loss

        with torch.autocast("cpu", torch.bfloat16, enabled=trainer.args.bf16):
            optimizer.inner_passes(task, safety, window)
            with optimizer.task_pass():
                task(window)
        nn.utils.clip_grad_norm_(trained, trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return weights(tuned)


# Rows of one length: every other shape is compiled anew.
OF_ONE_LENGTH: dict[str, Any] = {
    "rows": TASK_ROWS[2::5] * 4,
    "safety_rows": SAFETY_ROWS[2:3] * 4,
    "per_device_train_batch_size": 8,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "rows": {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "how": {"probe": PROBE | {"rows": 0.6}},
    },
    "clipping": {"max_grad_norm": 0.05},
    "bf16": {"bf16": True},
    # As users turn it on, who say no more.
    "checkpointing": {name: on for name, on in checkpointing_arguments(True).items() if on is True},
    "compile": {"torch_compile": True, "torch_compile_backend": "eager"} | OF_ONE_LENGTH,
    # Of as many rows, the first 24 drawn are sorted together.
    "by_length": by_length() | {"rows": TASK_ROWS * 4},
}


def train_and_remember(trainer: Any) -> list[Any]:
    """Train; returns the micro-batches of each step and their number of tokens."""
    windows: list[Any] = []
    fetch = trainer.get_batch_samples

    def remember(*args: Any, **kwargs: Any) -> Any:
        windows.append(fetch(*args, **kwargs))
        return windows[-1]

    trainer.get_batch_samples = remember
    trainer.train()
    return windows


def assert_in_force(setting: str, trainer: Any, windows: list[Any], logs: list[Any]) -> None:
    """The trainer did what the setting asks for, and no less."""
    batches = [rows for window, _ in windows for rows in window]
    if setting == "accumulation":
        assert [len(window) for window, _ in windows] == [2, 2]
    elif setting == "rows":
        part = trainer.probe_set.part(windows[0][0])
        assert [len(rows["input_ids"]) for rows in part] == [2, 1]
    elif setting == "clipping":
        assert all(row["grad_norm"] > 2 * trainer.args.max_grad_norm for row in logs)
    elif setting == "bf16":
        assert trainer.probe_set.compute_dtype is torch.bfloat16
    elif setting == "checkpointing":
        assert trainer.model.is_gradient_checkpointing
    elif setting == "compile":
        assert counters["stats"]["unique_graphs"] > 0
        assert not counters["recompile_limit"]  # beyond it, nothing more is compiled
    elif setting == "by_length":
        lengths = [rows["attention_mask"].sum(-1) for rows in batches]
        assert lengths[0].min() == max(len(row["input_ids"]) for row in TASK_ROWS)
        assert all(each.max() - each.min() <= 1 for each in lengths)


KINDS = [SAPTrainer, SAPSFTTrainer]
# Compiling takes ten times as long as all the rest: each trainer and each kind of parameters once.
REPEATED = {(SAPTrainer, True, "compile"), (SAPSFTTrainer, False, "compile")}
COMBINATIONS = [
    pytest.param(
        kind,
        lora,
        setting,
        marks=pytest.mark.slow if (kind, lora, setting) in REPEATED else (),
        id=f"{kind.__name__}-{'lora' if lora else 'full'}-{setting}",
    )
    for kind, lora, setting in itertools.product(KINDS, (True, False), SETTINGS)
]


@pytest.mark.parametrize(("kind", "lora", "setting"), COMBINATIONS)
def test_the_probe_acts_under_every_setting(
    tmp_path: Path, kind: type[Trainer], lora: bool, setting: str
) -> None:
    torch._dynamo.reset()
    counters.clear()
    trainer = build(kind, tmp_path, small(lora), **SETTINGS[setting])
    windows = train_and_remember(trainer)
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert_in_force(setting, trainer, windows, logs)
    assert len(logs) == len(windows) == 2

    found = weights(trainer.model)
    expected, plain = (by_hand(trainer, windows, small(lora), size) for size in (SIZE, 0.0))
    moved = distance(expected, weights(small(lora)))
    # Of the way that the parameters went. TRL's head and a compiled one round in another order, and
    # the reference's square root (MKL's) by where a tensor lies.
    if kind is SAPTrainer and setting != "compile":
        allowed = 0.0 if choose_backend("auto", "cpu") == "native" else 1e-5
    else:
        allowed = 0.03 if setting == "bf16" else 1e-5
    assert distance(found, expected) <= allowed * moved
    assert distance(plain, expected) > max(0.06, 2 * allowed) * moved
    for row in logs:
        assert row["sap/skipped_steps"] == 0
        for layer in trainer.probe_set.layers:
            assert row[f"sap/estimate_norms/{layer}"] > 0
            assert row[f"sap/probe_sizes/{layer}"] == pytest.approx(SIZE, rel=1e-2)
    if kind is SAPSFTTrainer:
        batches = [rows for window, _ in windows for rows in window]
        # Two probe passes and the task pass.
        calls = dict.fromkeys(("training_step", "compute_loss"), 3 * len(batches))
        assert trainer.calls == calls
        # The figures of TRL's own compute_loss, of the task pass alone.
        assert logs[-1]["entropy"] > 0 and "mean_token_accuracy" in logs[-1]
        assert logs[-1]["num_tokens"] == sum(int(rows["attention_mask"].sum()) for rows in batches)


@pytest.mark.parametrize("kind", KINDS)
def test_blending_is_that_of_a_plain_loop(tmp_path: Path, kind: type[Trainer]) -> None:
    accumulation = SETTINGS["accumulation"]
    how = {"method": "blend", "sap_options": {"safety_weight": SIZE}}
    trainer = build(kind, tmp_path, small(lora=True), how=how, **accumulation)
    windows = train_and_remember(trainer)
    expected, plain = (by_hand(trainer, windows, small(True), weight) for weight in (SIZE, 0.0))
    moved = distance(expected, weights(small(True)))
    allowed = 0.0 if kind is SAPTrainer else 1e-5
    assert distance(weights(trainer.model), expected) <= allowed * moved
    assert distance(plain, expected) > 0.05 * moved
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["sap/above_level"] for row in logs] == [1.0, 1.0]


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_trl_resumes_with_the_same_bits(tmp_path: Path, lora: bool) -> None:
    settings = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
    straight = build(SAPSFTTrainer, tmp_path / "a", model(lora), **settings)
    straight.train()
    resumed = build(SAPSFTTrainer, tmp_path / "b", model(lora), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert_same_bits(weights(straight.model), weights(resumed.model))


def run_trl(rank: int, folder: str, lora: bool) -> list[Tensor]:
    """Train with TRL's trainer on the rows of a rank; on all if there is no process group."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    shares = dict.fromkeys(("per_device_train_batch_size", "safety_batch_size"), 4 // ranks)
    trainer = build(SAPSFTTrainer, Path(folder) / f"trl-{rank}-of-{ranks}", small(lora), **shares)
    trainer.train()
    assert trainer.accelerator.num_processes == ranks
    return weights(trainer.model)


@pytest.mark.parametrize(
    "lora", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["lora", "full"]
)
def test_two_ranks_of_trl_equal_one(tmp_path: Path, lora: bool) -> None:
    first, second = on_ranks(tmp_path, run_trl, str(tmp_path), lora)
    assert_same_bits(first, second)
    alone = run_trl(0, str(tmp_path), lora)
    assert distance(first, alone) <= 1e-6
    assert distance(alone, weights(small(lora))) > 1e-4


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_two_deterministic_runs_give_the_same_bits(
    tmp_path: Path, lora: bool, deterministic: None
) -> None:
    found = []
    for name in ("a", "b"):
        trainer = build(SAPTrainer, tmp_path / name, model(lora), max_steps=3)
        trainer.train()
        found.append(weights(trainer.model) + list(trainer.probe_set.offsets.values()))
    assert_same_bits(*found)
