"""The plugin for ms-swift: on a stand-in, and on ms-swift itself where it is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sap_fast import SAPTrainerMixin
from sap_fast.data import SafetyCollator, TaskCollator, load_safety_dataset
from tests.integrations.stand_ins import swift as stand_in
from tests.tiny import assert_same_bits, weights, with_lora
from tests.trainers import TASK_ROWS

ROOT = Path(__file__).parents[2]
PROBE = {"layers": [1], "rho": 1e-2, "size": 0.1}


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, on the stand-in."""
    for name, module in stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "sap_fast.integrations.swift", raising=False)
    module = import_module("sap_fast.integrations.swift")
    # Gone after the test, as what it was made of is.
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def build(
    kind: type, folder: Path, chat_model: Path, system: str | None = None, **more: Any
) -> Any:
    """A trainer as `swift sft` builds it."""
    torch.manual_seed(0)
    settings = {name: more.pop(name) for name in ("optimizer", "tuner_backend") if name in more}
    args = stand_in.Seq2SeqTrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        **settings,
    )
    return kind(
        model=with_lora(AutoModelForCausalLM.from_pretrained(chat_model)),
        args=args,
        template=stand_in.Template(AutoTokenizer.from_pretrained(chat_model), system),
        train_dataset=TASK_ROWS,
        data_collator=TaskCollator(0),
        **more,
    )


def chosen(plugin: Any, task: str = "causal_lm") -> Any:
    """The trainer that ms-swift finds for a task."""
    module, _, name = plugin.TrainerFactory.TRAINER_MAPPING[task].rpartition(".")
    return getattr(import_module(module), name)


def test_every_run_is_with_sap_or_refused(plugin: Any, files: dict[str, str]) -> None:
    for wrong in ({"method": "adamw"}, {"probe": {"shape": 1}}, {"sap_options": {"probes": 1}}):
        with pytest.raises(ValueError, match=r"not known"):
            plugin.register(files["safety"], **({"method": "sap"} | wrong))
    assert chosen(plugin) is stand_in.Seq2SeqTrainer
    plugin.register(files["safety"])
    assert chosen(plugin) is plugin.SAPSeq2SeqTrainer
    for task in ("seq_cls", "dpo"):
        with pytest.raises(ValueError, match=r"trains on the likelihood of answers: swift sft and"):
            chosen(plugin, task)(model=None, args=None)


def test_the_run_is_that_of_the_mixin_with_the_arguments_that_are_registered(
    plugin: Any, files: dict[str, str], chat_model: Path, tmp_path: Path
) -> None:
    plugin.register(files["safety"], method="sap", safety_batch_size=2, probe=PROBE)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "task rows are written with")
        trainer = build(chosen(plugin), tmp_path / "a", chat_model)
    assert trainer.args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    trainer.train()

    class ByHand(SAPTrainerMixin, stand_in.Seq2SeqTrainer):
        """The arguments in Python, and batches that are prepared once."""

        _to_device = plugin.SAPSeq2SeqTrainer._to_device

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    expected = build(
        ByHand,
        tmp_path / "b",
        chat_model,
        safety_dataset=load_safety_dataset(files["safety"], tokenizer, 128),
        safety_collator=SafetyCollator(0),
        safety_batch_size=2,
        probe=PROBE,
    )
    expected.train()
    assert_same_bits(weights(trainer.model), weights(expected.model))
    assert trainer.passes.steps == 2 and trainer.probe_set.layers == (1,)
    # Of three passes over every row, the task pass counts.
    fresh = build(stand_in.Seq2SeqTrainer, tmp_path / "c", chat_model)
    fresh.train()
    assert trainer.custom_metrics == fresh.custom_metrics
    assert trainer.custom_metrics["train"]["tokens"] > 0


def test_an_optimizer_of_ms_swift_runs_beside_the_passes(
    plugin: Any, files: dict[str, str], chat_model: Path, tmp_path: Path
) -> None:
    plugin.register(files["safety"])
    trainer = build(chosen(plugin), tmp_path, chat_model, optimizer="sgd")
    trainer.train()
    assert trainer.passes.steps == 2 and trainer.passes.safety_weight == 0.3
    with pytest.raises(TypeError, match=r"SGD, neither FusedSAP nor BlendedAdamW"):
        _ = trainer.sap_optimizer
    plugin.register(files["safety"], sap_options={"weight_decay": 0.1})
    with pytest.raises(ValueError, match=r"another optimizer makes, --optimizer sgd"):
        build(chosen(plugin), tmp_path, chat_model, optimizer="sgd")


def test_prompts_of_another_template_are_named(
    plugin: Any, files: dict[str, str], chat_model: Path, tmp_path: Path
) -> None:
    plugin.register(files["safety"])
    with pytest.warns(UserWarning, match=r"ms-swift's template, safety rows with the tokenizer's"):
        build(chosen(plugin), tmp_path, chat_model, system="Be brief.")


def test_what_cuts_sequences_or_has_passes_of_its_own_is_refused(
    plugin: Any,
    files: dict[str, str],
    chat_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plugin.register(files["safety"])
    with pytest.raises(ValueError, match=r"--tuner_backend unsloth: expected peft"):
        build(chosen(plugin), tmp_path, chat_model, tuner_backend="unsloth")
    monkeypatch.setattr(stand_in.Template, "sequence_parallel_size", 2)
    with pytest.raises(ValueError, match=r"--sequence_parallel_size 2: expected 1"):
        build(chosen(plugin), tmp_path, chat_model)


@pytest.mark.skipif(
    find_spec("swift") is None, reason="needs ms-swift, which `make test-swift` installs"
)
@pytest.mark.parametrize("method", ["blend", "sap"])
def test_swift_sft_trains_with_a_plugin_file(
    method: str, chat_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    probe = f", probe={PROBE}" if method == "sap" else ""
    (tmp_path / "sap.py").write_text(
        "from sap_fast.integrations.swift import register\n\n"
        f"register({files['safety']!r}, method={method!r}, safety_batch_size=2{probe})\n"
    )
    flags = {
        "model": str(chat_model),
        "model_type": "llama",
        "template": "chatml",
        "external_plugins": "sap.py",
        "dataset": files["task"],
        "tuner_type": "lora",
        "max_steps": "2",
        "per_device_train_batch_size": "2",
        "gradient_accumulation_steps": "2",
        "logging_steps": "1",
        "max_length": "128",
        "torch_dtype": "float32",
        "output_dir": "tuned",
        "add_version": "false",
        "check_model": "false",
        "report_to": "none",
        "dataset_num_proc": "1",
        "dataloader_num_workers": "0",
        "split_dataset_ratio": "0",
        "use_cpu": "true",
    }
    done = subprocess.run(
        [sys.executable, "-m", "swift.cli.sft", *(f"--{k}={v}" for k, v in flags.items())],
        cwd=tmp_path,
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "USE_HF": "1", "ACCELERATE_USE_CPU": "true"}
        | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "are not packed" not in done.stderr
    state = next((tmp_path / "tuned").glob("checkpoint-*/trainer_state.json"))
    assert (state.parent / "adapter_model.safetensors").exists()
    logs = [row for row in json.loads(state.read_text())["log_history"] if "loss" in row]
    figure = "sap/lean" if method == "sap" else "sap/skipped_steps"
    assert len(logs) == 2 and all(figure in row for row in logs)
