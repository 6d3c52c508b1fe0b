"""`sap-fast finetune`: what it writes, that it goes on, and what it leaves when it fails."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sap_fast import SAPTrainer, contrastive_loss, joint_loss, refusal_loss
from sap_fast.cli import finetune as finetune_module
from sap_fast.cli import models
from sap_fast.cli.settings import FinetuneSettings
from tests.cli.terminal import Terminal
from tests.conftest import TEMPLATE


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_finetune_writes_an_adapter_that_loads(terminal: Terminal, tmp_path: Path) -> None:
    output = tmp_path / "tuned"
    assert terminal.run(*terminal.finetuning(output)) == 0
    adapted = AutoPeftModelForCausalLM.from_pretrained(output)
    assert any(p.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
    assert AutoTokenizer.from_pretrained(output).chat_template == TEMPLATE
    rows = metrics(output)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["sap/lean"] is not None and row["step_seconds"] > 0 for row in rows)
    record = json.loads((output / "run.json").read_text())
    assert record["settings"]["max_steps"] == 4
    assert record["figures"]["step_seconds"] > 0 and record["figures"]["peak_bytes"] > 1e6
    assert record["environment"]["torch"] == version("torch")
    assert not list(tmp_path.glob("*.unfinished")) and not (output / "checkpoints").exists()

    # The adapter itself can be trained further, by the same command.
    further = tmp_path / "further"
    assert terminal.run(*terminal.finetuning(further, model=output)) == 0
    again = AutoPeftModelForCausalLM.from_pretrained(further)
    names = [name for name, _ in adapted.named_parameters() if "lora_B" in name]
    assert names and all(
        not torch.equal(again.get_parameter(name), adapted.get_parameter(name)) for name in names
    )
    assert terminal.run(*terminal.finetuning(tmp_path / "all", "--full", model=output)) == 2


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-mixed", torch.float32), ("bf16", torch.bfloat16)]
)
def test_finetune_in_bf16(terminal: Terminal, tmp_path: Path, precision: str, dtype: Any) -> None:
    output = tmp_path / "tuned"
    more = ["--full", "--precision", precision, "--max-steps", "1"]
    assert terminal.run(*terminal.finetuning(output, *more)) == 0, terminal.shown
    saved = load_file(output / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}


@pytest.mark.parametrize("optimizer", ["adamw", "blend"])
def test_finetune_in_full_with_the_rivals(
    terminal: Terminal,
    tmp_path: Path,
    optimizer: str,
) -> None:
    output = tmp_path / "tuned"
    more = ["--full", "--optimizer", optimizer, "--safety-weight", "0.2"]
    assert terminal.run(*terminal.finetuning(output, *more)) == 0
    tuned = AutoModelForCausalLM.from_pretrained(output)
    start = AutoModelForCausalLM.from_pretrained(terminal.chat_model)
    changed = [
        not torch.equal(a, b) for a, b in zip(tuned.parameters(), start.parameters(), strict=True)
    ]
    assert all(changed)
    assert ("sap/safety_loss" in metrics(output)[0]) == (optimizer == "blend")


@pytest.mark.parametrize(
    ("more", "loss", "weight", "level"),
    [
        ({"optimizer": "blend"}, joint_loss, 0.3, "auto"),
        ({"optimizer": "blend", "safety_level": "always"}, contrastive_loss, 0.3, None),
        ({"optimizer": "blend", "safety_loss": "refusal"}, refusal_loss, 0.3, "auto"),
        ({"optimizer": "sap"}, contrastive_loss, 0.0, None),
        ({"optimizer": "sap", "safety_weight": 0.1}, contrastive_loss, 0.1, "auto"),
    ],
)
def test_each_optimizer_has_its_own_loss_weight_and_level(
    terminal: Terminal, tmp_path: Path, more: dict[str, Any], loss: Any, weight: float, level: Any
) -> None:
    settings = FinetuneSettings(
        model=str(terminal.chat_model),
        task=terminal.files["task"],
        safety=terminal.files["safety"],
        output=str(tmp_path / "tuned"),
        max_steps=1,
        **more,
    )
    trainer, _ = finetune_module.prepare(settings, tmp_path)
    assert isinstance(trainer, SAPTrainer)
    assert trainer._safety_loss is loss
    passes = trainer.sap_optimizer.passes
    assert passes.safety_weight == weight
    assert passes.level.setting == level


def test_an_interrupted_run_goes_on_to_the_same_bits(
    terminal: Terminal,
    tmp_path: Path,
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert terminal.run(*terminal.finetuning(straight)) == 0

    command = terminal.finetuning(resumed, "--save-every", "2")
    recorder = finetune_module._Recorder
    on_log = recorder.on_log

    def interrupted(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_log(self, args, state, control, **kwargs)
        if state.global_step == 3:
            raise KeyboardInterrupt

    with terminal.monkeypatch.context() as patched:
        patched.setattr(recorder, "on_log", interrupted)
        assert terminal.run(*command) == 130
    assert "The same command goes on" in terminal.shown
    assert not resumed.exists()

    # Other settings do not mix with what is there.
    assert terminal.run(*command, "--seed", "3") == 2
    assert "seed: 0 then, 3 now" in terminal.shown.replace("\n", " ")

    # Killed while a later checkpoint was written: that one is passed over.
    (newest,) = tmp_path.glob("**/checkpoint-2")
    newest.with_name("checkpoint-3").mkdir()
    assert terminal.run(*command) == 0
    assert "checkpoint-3 is incomplete" in " ".join(terminal.shown.split())
    assert "Going on from checkpoint-2" in terminal.shown
    assert [row["step"] for row in metrics(resumed)] == [1, 2, 3, 4]
    a, b = (AutoPeftModelForCausalLM.from_pretrained(f).state_dict() for f in (straight, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_is_interrupted_after_its_last_step_takes_no_other_one(
    terminal: Terminal, tmp_path: Path
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    more = ["--optimizer", "adamw", "--max-steps", "3", "--save-every", "1"]
    assert terminal.run(*terminal.finetuning(straight, *more)) == 0

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with terminal.monkeypatch.context() as patched:
        patched.setattr(finetune_module._Recorder, "figures", interrupted)
        assert terminal.run(*terminal.finetuning(resumed, *more)) == 130
    assert terminal.run(*terminal.finetuning(resumed, *more)) == 0
    assert [row["step"] for row in metrics(resumed)] == [1, 2, 3]
    first, second = (load_file(f / "adapter_model.safetensors") for f in (straight, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_step_has_about_as_many_tokens_as_are_asked_for(
    terminal: Terminal, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    steps = ["--tokens-per-step", "20", "--batch-size", "1", "--max-steps", "5"]
    assert terminal.run(*terminal.finetuning(output, *steps, "--optimizer", "adamw")) == 0
    # 9 rows of 9 tokens that are scored: an epoch is 4 steps.
    assert [row["epoch"] for row in metrics(output)] == [0.25, 0.5, 0.75, 1, 1.25]
    assert "5/5" in terminal.shown
    line = terminal.refusal(*terminal.finetuning(tmp_path / "no", *steps, "--accumulate", "2"))
    assert "--accumulate 2: how many micro-batches a step has follows from --tok" in line


def test_an_output_that_exists_is_left_alone(
    terminal: Terminal,
    tmp_path: Path,
) -> None:
    assert "exists already" in terminal.refusal(*terminal.finetuning(tmp_path))


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(
    terminal: Terminal, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.rglob("*"))
    terminal.monkeypatch.setattr(finetune_module._Recorder, "on_log", interrupted)
    assert terminal.run(*terminal.finetuning(tmp_path / "new" / "tuned")) == 130
    assert sorted(tmp_path.rglob("*")) == before


def test_what_makes_sap_cheaper_and_joins_it_with_blending(
    terminal: Terminal, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    more = ["--probe-rows", "0.5", "--direction-every", "2", "--probe-layers", "0,1"]
    more += ["--safety-weight", "0.1", "--safety-level", "always", "--rule", "floor"]
    more += ["--checkpointing", "layers"]
    assert terminal.run(*terminal.finetuning(output, *more)) == 0, terminal.shown
    rows = metrics(output)
    # A kept direction is not measured again.
    assert ["sap/safety_loss" in row for row in rows] == [True, False] * 2
    assert all({"sap/probe_sizes/0", "sap/probe_sizes/1"} <= row.keys() for row in rows)


@pytest.mark.parametrize("variant", ["rslora", "dora"])
def test_variants_of_lora_train_and_load(terminal: Terminal, tmp_path: Path, variant: str) -> None:
    output = tmp_path / "tuned"
    more = ["--lora-variant", variant, "--max-steps", "1", "--attention", "eager"]
    more += ["--log-every", "10"]
    more += ["--lora-target", "all-linear"]
    assert terminal.run(*terminal.finetuning(output, *more)) == 0, terminal.shown
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["use_rslora"] == (variant == "rslora")
    assert config["use_dora"] == (variant == "dora")
    adapted = AutoPeftModelForCausalLM.from_pretrained(output)
    assert any(p.abs().sum() > 0 for n, p in adapted.named_parameters() if "lora_B" in n)
    record = json.loads((output / "run.json").read_text())
    assert record["precision"] == models.resolved_precision("auto")
    # Too short a run for a row.
    assert metrics(output) == []
