"""The plugin for Axolotl: on Axolotl itself where it is installed, else on a stand-in for it."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from sap_fast import ProbeSet, SafetyPasses, SAPTrainerMixin
from sap_fast.data import SafetyCollator, TaskCollator, load_safety_dataset
from tests.integrations.stand_ins import axolotl as stand_in
from tests.tiny import assert_same_bits, weights, with_lora
from tests.trainers import TASK_ROWS

pytest.importorskip("pydantic", reason="Axolotl, and so the plugin, has it")

IS_INSTALLED = find_spec("axolotl") is not None
EXAMPLE = Path(__file__).parents[2] / "examples" / "axolotl.yaml"


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the plugin, with Axolotl or the stand-in below it."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    if not IS_INSTALLED:
        for name, module in stand_in.modules().items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "sap_fast.integrations.axolotl", raising=False)
    module = import_module("sap_fast.integrations.axolotl")
    if not IS_INSTALLED:
        # Gone after the test, as what it was made of is.
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def cfg(files: dict[str, str]) -> dict[str, Any]:
    return {
        "sap_safety_dataset": files["safety"],
        "sap_method": "sap",
        "sap_safety_batch_size": 2,
        # As YAML 1.1 reads numbers of this form.
        "sap_probe": {"layers": [1], "rho": "1e-2", "size": "1e-1"},
        "sap_options": {"direction_every": 2},
        "sequence_len": 128,
    }


def test_its_keys_are_the_keywords_of_the_package(plugin: Any) -> None:
    assert set(plugin.SAPProbe.model_fields) == set(inspect.signature(ProbeSet).parameters) - {
        "model"
    }
    accepted = set(inspect.signature(SafetyPasses).parameters)
    assert set(plugin.SAPOptions.model_fields) == accepted - {"params", "probes", "grad_scaler"}
    module, _, name = plugin.SAPPlugin().get_input_args().rpartition(".")
    assert getattr(import_module(module), name) is plugin.SAPArgs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sap_safety_dataset": None}, "sap_safety_dataset"),
        ({"sap_safety_weight": 0.3}, "sap_safety_weight: not known to SAPPlugin, which takes sap_"),
        ({"sap_method": "adamw"}, "'blend' or 'sap'"),
        ({"sap_safety_loss": "hinge"}, "safety_loss='hinge' is not known; choose one of"),
        ({"sap_probe": {"shape": "token"}}, "shape"),
        ({"sap_options": {"lr": 1e-3}}, "lr"),
        ({"sap_method": "blend"}, "with method='blend', which has no probe"),
        ({"sap_safety_dataset": "builtin"}, "sap-fast pairs --model MODEL --output pairs.jsonl"),
        ({"rl": "dpo"}, "rl: dpo beside SAPPlugin, which trains on the likelihood of answers"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_does_not_know_is_refused_before_anything_is_loaded(
    plugin: Any, cfg: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    plugin.SAPPlugin().register(cfg)
    with pytest.raises(ValueError, match=message):
        plugin.SAPPlugin().register(cfg | change)


def test_checkpointing_is_without_reentry_where_it_is_left_open(
    plugin: Any, cfg: dict[str, Any]
) -> None:
    register = plugin.SAPPlugin().register
    register(cfg)
    assert "gradient_checkpointing_kwargs" not in cfg
    cfg["gradient_checkpointing"] = True
    register(cfg)
    assert cfg["gradient_checkpointing_kwargs"] == {"use_reentrant": False}
    cfg["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    register(cfg)
    assert cfg["gradient_checkpointing_kwargs"] == {"use_reentrant": True}


def build(kind: type[Trainer], folder: Path, chat_model: Path, **more: Any) -> Any:
    """A trainer as Axolotl builds it."""
    torch.manual_seed(0)
    args = import_module("axolotl.core.training_args").AxolotlTrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        include_tkps=True,
    )
    return kind(
        model=with_lora(AutoModelForCausalLM.from_pretrained(chat_model)),
        args=args,
        # As Axolotl has them: rows are what its dataloaders ask for their columns.
        train_dataset=import_module("datasets").Dataset.from_list(TASK_ROWS),
        data_collator=TaskCollator(0),
        processing_class=AutoTokenizer.from_pretrained(chat_model),
        bench_data_collator=None,
        eval_data_collator=None,
        dataset_tags=["task.jsonl"],
        **more,
    )


def test_the_run_is_that_of_the_mixin_with_the_arguments_of_the_keys(
    plugin: Any, cfg: dict[str, Any], chat_model: Path, tmp_path: Path
) -> None:
    chosen = plugin.SAPPlugin().get_trainer_cls(cfg)
    theirs = import_module("axolotl.core.trainers").AxolotlTrainer
    assert issubclass(chosen, theirs)
    trainer = build(chosen, tmp_path / "a", chat_model)
    plugin.SAPPlugin().post_trainer_create(cfg, trainer)
    windows: list[Any] = []
    fetch = trainer.get_batch_samples

    def remember(*args: Any) -> Any:
        windows.append(fetch(*args))
        return windows[-1]

    trainer.get_batch_samples = remember
    trainer.train()

    class ByHand(SAPTrainerMixin, theirs):  # type: ignore[misc, valid-type]
        """The arguments in Python."""

    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    expected = build(
        ByHand,
        tmp_path / "b",
        chat_model,
        safety_dataset=load_safety_dataset(cfg["sap_safety_dataset"], tokenizer, 128),
        safety_collator=SafetyCollator(0),
        safety_batch_size=2,
        probe={"layers": [1], "rho": 1e-2, "size": 0.1},
        sap_options={"direction_every": 2},
    )
    expected.train()
    assert_same_bits(weights(trainer.model), weights(expected.model))
    assert trainer.passes.direction_every == 2 and trainer.probe_set.layers == (1,)
    logs = [row for row in trainer.state.log_history if "loss" in row]
    assert len(logs) == 3 and all(row["sap/estimate_norms/1"] > 0 for row in logs)
    # Of three passes over every row, the task pass counts.
    labels = [rows["labels"] for window, _ in windows for rows in window]
    assert len(labels) == 6
    counted = trainer.state.tokens["trainable"]
    assert int(counted) == sum(int((rows != -100).sum()) for rows in labels)


def test_another_plugin_that_chose_the_trainer_is_named(plugin: Any, cfg: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"another plugin chose the trainer, SimpleNamespace"):
        plugin.SAPPlugin().post_trainer_create(cfg, SimpleNamespace())


def test_it_goes_in_front_of_the_trainer_that_is_asked_for(
    plugin: Any, cfg: dict[str, Any]
) -> None:
    chosen = plugin.SAPPlugin().get_trainer_cls(cfg | {"trainer_cls": "transformers.Trainer"})
    assert chosen.__mro__[1:3] == (SAPTrainerMixin, Trainer)
    with pytest.raises(TypeError, match=r"trainer_cls: torch\.nn\.Linear is no subclass of"):
        plugin.SAPPlugin().get_trainer_cls(cfg | {"trainer_cls": "torch.nn.Linear"})


def test_the_example_has_keys_that_the_plugin_takes(plugin: Any) -> None:
    plugin.SAPPlugin().register(yaml.safe_load(EXAMPLE.read_text(encoding="utf-8")))


@pytest.mark.skipif(not IS_INSTALLED, reason="needs axolotl, which `make test-axolotl` installs")
@pytest.mark.parametrize("method", ["blend", "sap"])
def test_axolotl_trains_by_the_example(
    method: str, chat_model: Path, files: dict[str, str], tmp_path: Path
) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Say {k}"},
                {"role": "assistant", "content": f"It is {k}."},
            ]
        }
        for k in range(9)
    ]
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))
    config |= {"base_model": str(chat_model), "sap_safety_dataset": files["safety"]}
    config |= {"sequence_len": 128, "bf16": False, "max_steps": 2}
    # Axolotl chooses them on CPUs too, where they do not run.
    config |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
    config["datasets"][0]["path"] = str(task)
    if method == "blend":
        config |= {"sap_method": "blend", "sap_probe": None}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "axolotl.cli.train", "run.yaml"],
        cwd=tmp_path,
        env=os.environ
        | {"AXOLOTL_DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
        | {"PYTHONPATH": str(EXAMPLE.parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (tmp_path / "tuned" / "adapter_model.safetensors").exists()
    state = next((tmp_path / "tuned").glob("checkpoint-*/trainer_state.json"))
    logs = [row for row in json.loads(state.read_text())["log_history"] if "loss" in row]
    figure = "sap/lean" if method == "sap" else "sap/skipped_steps"
    assert len(logs) == 2 and all(figure in row for row in logs)
