"""Every setting of the trainers, with LoRA and in full; Accelerate; deterministic algorithms."""

from __future__ import annotations

import copy
import os
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from sap_fast import FusedSAP, ProbeSet, SAPTrainer, SAPTrainerMixin, contrastive_loss, task_loss
from sap_fast.data import SafetyCollator, TaskCollator
from sap_fast.metrics import Calibration
from tests.ranks import on_ranks
from tests.test_distributed import distance
from tests.test_resume import assert_equal
from tests.test_trainer import (
    SAFETY_ROWS,
    TASK_ROWS,
    arguments,
    assert_same_bits,
    model,
    weights,
)
from tests.tiny import VOCABULARY, random_batch, tiny_llama, with_lora


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


def small(lora: bool) -> nn.Module:
    tiny = tiny_llama(layers=2)
    return with_lora(tiny) if lora else tiny


LR, RHO, PROBE_LR = 5e-3, 1e-2, 0.1
# In bf16 the h of the first layer has more of the rounding in which TRL's head differs.
LAYERS = [1]


def build(
    kind: type[Trainer],
    folder: Path,
    tuned: nn.Module,
    rows: list[Any] = TASK_ROWS,
    safety_rows: list[Any] = SAFETY_ROWS,
    safety_batch_size: int = 4,
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
        probe_layers=LAYERS,
        sap_options={"rho": RHO, "probe_lr": PROBE_LR},
    )


def by_hand(trainer: Any, windows: list[Any], tuned: nn.Module, probe_lr: float) -> list[Tensor]:
    """The steps that the trainer made of these micro-batches, pass by pass in a plain loop."""
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {"lr": LR, "eps": 1e-2, "weight_decay": 0.0, "rho": RHO}
    optimizer = FusedSAP(trained, ProbeSet(tuned, LAYERS), probe_lr=probe_lr, **settings)
    names = ("input_ids", "attention_mask", "labels")
    for step, (window, items) in enumerate(windows):
        pairs = SafetyCollator(0)(trainer._safety_batches.rows(step))

        def task(window: Any = window, items: Any = items) -> None:
            for rows in window:
                batch = {name: rows[name] for name in names}
                task_loss(tuned, batch, num_items=items).backward()

        with torch.autocast("cpu", torch.bfloat16, enabled=trainer.args.bf16):
            with optimizer.safety_pass():
                contrastive_loss(tuned, pairs["chosen"], pairs["rejected"]).backward()
            for _ in optimizer.probe_passes():
                task()
            with optimizer.task_pass():
                task()
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
    "clipping": {"max_grad_norm": 0.05},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True},
    "compile": {"torch_compile": True, "torch_compile_backend": "eager"} | OF_ONE_LENGTH,
    # Of as many rows, the first 24 drawn are sorted together.
    "by_length": {"train_sampling_strategy": "group_by_length", "rows": TASK_ROWS * 4},
}


def assert_in_force(setting: str, trainer: Any, windows: list[Any], logs: list[Any]) -> None:
    """The trainer did what the setting asks for, and no less."""
    batches = [rows for window, _ in windows for rows in window]
    if setting == "accumulation":
        assert [len(window) for window, _ in windows] == [2, 2]
    elif setting == "clipping":
        assert all(row["grad_norm"] > 2 * trainer.args.max_grad_norm for row in logs)
    elif setting == "bf16":
        assert trainer.probe_set.compute_dtype is torch.bfloat16
    elif setting == "checkpointing":
        assert trainer.model.is_activation_checkpointing
    elif setting == "compile":
        assert counters["stats"]["unique_graphs"] > 0
        assert not counters["recompile_limit"]  # beyond it, nothing more is compiled
    elif setting == "by_length":
        lengths = [rows["attention_mask"].sum(-1) for rows in batches]
        assert lengths[0].min() == max(len(row["input_ids"]) for row in TASK_ROWS)
        assert all(each.max() - each.min() <= 1 for each in lengths)


@pytest.mark.parametrize("setting", list(SETTINGS))
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("kind", [SAPTrainer, SAPSFTTrainer])
def test_the_probe_acts_under_every_setting(
    tmp_path: Path, kind: type[Trainer], lora: bool, setting: str
) -> None:
    torch._dynamo.reset()
    counters.clear()
    trainer = build(kind, tmp_path, small(lora), **SETTINGS[setting])
    windows: list[Any] = []
    fetch = trainer.get_batch_samples

    def remember(*args: Any, **kwargs: Any) -> Any:
        windows.append(fetch(*args, **kwargs))
        return windows[-1]

    trainer.get_batch_samples = remember
    trainer.train()
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert_in_force(setting, trainer, windows, logs)
    assert len(logs) == len(windows) == 2

    found = weights(trainer.model)
    expected, plain = (by_hand(trainer, windows, small(lora), beta) for beta in (PROBE_LR, 0.0))
    moved = distance(expected, weights(small(lora)))
    # Of the way that the parameters went. TRL's head and a compiled one round in another order.
    if kind is SAPTrainer and setting != "compile":
        allowed = 0.0
    else:
        allowed = 0.03 if setting == "bf16" else 1e-5
    assert distance(found, expected) <= allowed * moved
    assert distance(plain, expected) > max(0.06, 2 * allowed) * moved
    for row in logs:
        assert row["sap/skipped_steps"] == 0
        for layer in trainer.probe_set.layers:
            assert row[f"sap/estimate_norms/{layer}"] > 0
            assert row[f"sap/probe_sizes/{layer}"] == pytest.approx(PROBE_LR, rel=1e-2)
    if kind is SAPSFTTrainer:
        batches = [rows for window, _ in windows for rows in window]
        # Two probe passes and the task pass.
        calls = dict.fromkeys(("training_step", "compute_loss"), 3 * len(batches))
        assert trainer.calls == calls
        # The figures of TRL's own compute_loss, of the task pass alone.
        assert logs[-1]["entropy"] > 0 and "mean_token_accuracy" in logs[-1]
        assert logs[-1]["num_tokens"] == sum(int(rows["attention_mask"].sum()) for rows in batches)


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


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_two_ranks_of_trl_equal_one(tmp_path: Path, lora: bool) -> None:
    first, second = on_ranks(tmp_path, run_trl, str(tmp_path), lora)
    assert_same_bits(first, second)
    alone = run_trl(0, str(tmp_path), lora)
    assert distance(first, alone) <= 1e-6
    assert distance(alone, weights(small(lora))) > 1e-4


# ---- Accelerate ----


MICRO_BATCHES = 2
LOADED = [{k: v[0] for k, v in random_batch(rows=1, seed=seed).items()} for seed in range(12)]


def lagged(tuned: nn.Module) -> FusedSAP:
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    return FusedSAP(trained, ProbeSet(tuned, layers=[1]), lr=1e-3, rho=1e-2, schedule="lagged")


def windows_of(loader: Iterable[Any]) -> Iterator[list[Any]]:
    """Micro-batches of a step; what is left over at the end is dropped."""
    return zip(*[iter(loader)] * MICRO_BATCHES, strict=False)


def accelerate_loop(tuned: nn.Module, accelerator: Accelerator | None) -> FusedSAP:
    """Two steps of two micro-batches from a loader; without Accelerate by hand."""
    sap = lagged(tuned)
    called, optimizer = tuned, sap
    loader: Any = DataLoader(LOADED, batch_size=3)
    if accelerator is not None:
        called, optimizer, loader = accelerator.prepare(tuned, sap, loader)
    for step, window in enumerate(windows_of(loader)):
        chosen, rejected = random_batch(seed=100 + step), random_batch(seed=200 + step)

        def backward(loss: Tensor, parts: int) -> None:
            if accelerator is None:
                (loss / parts).backward()
            else:
                # It divides by the number of micro-batches itself.
                accelerator.backward(loss * MICRO_BATCHES / parts)

        with sap.safety_pass():
            backward(contrastive_loss(called, chosen, rejected), 1)
        for _ in sap.probe_passes():
            for batch in window:
                backward(task_loss(called, batch), MICRO_BATCHES)
        for batch in window:
            with accelerator.accumulate(called) if accelerator else nullcontext():
                with sap.task_pass():
                    backward(task_loss(called, batch), MICRO_BATCHES)
                if accelerator is not None or batch is window[-1]:
                    optimizer.step()  # Accelerate's does nothing until the window is complete
                    optimizer.zero_grad()
    return sap


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_an_accelerate_loop_is_the_loop_by_hand(tmp_path: Path, lora: bool) -> None:
    by_hand, tuned = small(lora), small(lora)
    accelerate_loop(by_hand, None)
    # The last window is read before its first micro-batch runs: the loader's end is not the step's.
    plugin = GradientAccumulationPlugin(num_steps=MICRO_BATCHES, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    sap = accelerate_loop(tuned, accelerator)
    assert sap._steps == sap.directions_taken == 2
    assert distance(weights(tuned), weights(by_hand)) <= 1e-7

    state = copy.deepcopy(sap.state_dict())
    accelerator.save_state(str(tmp_path / "state"))
    for tensors in sap.state.values():
        tensors["exp_avg"].zero_()
    assert sap.probes is not None
    sap.probes.replace_offsets({})
    accelerator.load_state(str(tmp_path / "state"))
    assert_equal(sap.state_dict(), state)


def test_the_round_trip_of_prepare_changes_nothing() -> None:
    """`prepare` loads the optimizer's state dict into it, moved to the device."""
    tuned = small(lora=True)
    fresh = lagged(tuned)
    Accelerator(cpu=True).prepare(tuned, fresh)
    assert not fresh.state and fresh.calibration is None and fresh._steps == 0
    assert fresh.needs_direction and fresh.needs_probe and not fresh.probes.offsets

    used = accelerate_loop(tuned, None)
    used.calibration = Calibration(rho=1e-3, agreement=0.9, agreements={1e-3: 0.9}, step=1)
    before = copy.deepcopy(used.state_dict())
    assert before["sap"]["offsets"] and before["state"]
    Accelerator(cpu=True).prepare(tuned, used)
    assert_equal(used.state_dict(), before)


def test_a_prepared_step_takes_one_closure_and_says_so() -> None:
    tuned = small(lora=True)
    sap = lagged(tuned)
    _, optimizer = Accelerator(cpu=True).prepare(tuned, sap)
    with pytest.raises(TypeError, match="needs a safety closure too"):
        optimizer.step(lambda: task_loss(tuned, random_batch()))


# ---- deterministic algorithms ----


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_two_deterministic_runs_give_the_same_bits(
    tmp_path: Path, lora: bool, deterministic: None
) -> None:
    trained, looped = [], []
    for name in ("a", "b"):
        trainer = build(SAPTrainer, tmp_path / name, model(lora), max_steps=3)
        trainer.train()
        offsets = list(trainer.probe_set.offsets.values())
        trained.append(weights(trainer.model) + offsets)
        torch.manual_seed(0)
        tuned = model(lora)
        sap = accelerate_loop(tuned, None)
        assert sap.probes is not None
        looped.append(weights(tuned) + list(sap.probes.offsets.values()))
    assert_same_bits(*trained)
    assert_same_bits(*looped)


# ---- examples ----

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.stem != "common")


@pytest.mark.parametrize(
    ("script", "more"),
    [*((script, []) for script in SCRIPTS), (EXAMPLES / "trainer_lora.py", ["--blend"])],
    ids=lambda value: value.stem if isinstance(value, Path) else " ".join(value),
)
def test_every_example_runs(script: Path, more: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(script)]
    if "torchrun" in script.read_text():
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        command = [sys.executable, *launcher, str(script)]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "ACCELERATE_USE_CPU": "true"}
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--tiny", "--steps", "2", *more], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(found) for found in re.findall(r"(?m)^.*?\bloss\W+(\d+\.\d+)", done.stdout)]
    # Every step says its loss. Random tokens of 256: ln 256 = 5.5 each.
    assert len(losses) >= 2 and losses[:2] == pytest.approx([5.5, 5.5], abs=0.3), done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_every_example_explains_itself(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    # What torchrun sets is not there.
    monkeypatch.setattr(dist, "init_process_group", lambda: pytest.fail("before the arguments"))
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(script), run_name="__main__")
    shown = capsys.readouterr().out
    assert f"examples/{script.name} --tiny" in shown and "--model" in shown
    assert f"`{script.name}`" in (EXAMPLES / "README.md").read_text()
    assert len(script.read_text().splitlines()) < 80
