"""The commands on a tiny model in a folder, as a user runs them."""

from __future__ import annotations

import ast
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sap_fast import SAPTrainer, contrastive_loss, joint_loss, refusal_loss
from sap_fast.cli import finetune as finetune_module
from sap_fast.cli import main
from sap_fast.cli.console import console
from sap_fast.cli.models import load_model
from sap_fast.cli.settings import FinetuneSettings
from tests.conftest import TEMPLATE, Terminal


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
    assert record["environment"]["torch"] == torch.__version__
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
    assert trainer.sap_optimizer.safety_weight == weight
    assert trainer.sap_optimizer.safety_level == level


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


# What each file of rows may be, and what the error then says besides its name.
BAD_FILES: dict[str, tuple[bytes | None, list[str]]] = {
    "empty": (b"", ["an empty file"]),
    "broken": (b'{"prompt": "a"\n', ["row 1", "invalid JSON"]),
    "not text": (b'\n{"prompt": "\xff"}\n', ["row 2", "byte 0xff"]),
    "wrong columns": (b'\n\n{"colour": "blue"}\n', ["row 3", "colour"]),
    "not a row": (b"[1, 2]\n", ["row 1", "a list of 2"]),
    "missing": (None, ["no such file"]),
}


@pytest.mark.parametrize("damage", BAD_FILES)
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *(("finetune", "--task"), ("finetune", "--safety"), ("evaluate", "--task")),
        *(("evaluate", "--harmful"), ("evaluate", "--harmless"), ("compare", "--task")),
        *(("compare", "--safety"), ("compare", "--harmless"), ("compare", "--held-out")),
        *(("landscape", "--harmful"), ("landscape", "--task"), ("landscape", "--safety")),
    ],
)
def test_a_bad_file_is_one_line_and_leaves_nothing(
    terminal: Terminal, tmp_path: Path, command: str, option: str, damage: str
) -> None:
    content, words = BAD_FILES[damage]
    path = tmp_path / "bad [red] :x:  rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    if option == "--safety" and damage == "wrong columns":
        words = ["row 3", "'prompt'"]
    line = terminal.refusal(*terminal.command(command, tmp_path / "out", option, str(path)))
    assert str(path) in line and all(word in line for word in words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "{not json}"}, ["task.jsonl", "row 10"]),
        ({"task": '{"instruction": "x"}'}, ["task.jsonl", "row 10", "'output'"]),
        ({"safety": '{"prompt": "x", "chosen": "y"}'}, ["safety.jsonl", "row 4", "'rejected'"]),
    ],
)
@pytest.mark.parametrize("command", ["finetune", "compare"])
def test_a_bad_row_is_one_line_and_leaves_nothing(
    terminal: Terminal,
    tmp_path: Path,
    command: str,
    change: dict[str, str],
    words: list[str],
) -> None:
    for name, row in change.items():
        with open(terminal.files[name], "a") as file:
            file.write(row + "\n")
    line = terminal.refusal(*terminal.command(command, tmp_path / "tuned"))
    assert all(word in line for word in words)


def test_a_bad_parquet_file_is_one_line(terminal: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and nothing else PAR1")
    line = terminal.refusal(*terminal.command("finetune", tmp_path / "out", "--task", str(path)))
    assert f"{path}: got unreadable Parquet" in line


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--optimizer", "sgd"], "--optimizer sgd: expected blend or sap or adamw"),
        (["--rho", "big"], "--rho big: expected auto or a number"),
        (["--safety-level", "low"], "--safety-level low: expected auto, always or a number"),
        (["--rho", "nan"], "--rho nan: expected auto or a number"),
        (["--probe-layers", "high"], "--probe-layers high: expected early, middle, or"),
        (["--probe-layers", "7"], "7 is out of range for a model of 3 layers"),
        (["--lora-target", "w_q"], "--lora-target w_q: does not fit the model"),
        (["--optimizer", "blend", "--safety-weight", "0"], "--safety-weight 0"),
        (["--lr-schedule", "steep"], "--lr-schedule steep: expected linear or cosine"),
        (["--max-length", "1"], "no answer left within max_length=1 tokens"),
        (["--output", ""], "--output .: exists already"),
        (["--colour", "red"], "╭─ Error"),
        (["--batch-size", "many"], "╭─ Error"),
    ],
)
def test_a_bad_setting_is_one_line_and_leaves_nothing(
    terminal: Terminal,
    tmp_path: Path,
    more: list[str],
    message: str,
) -> None:
    output = tmp_path / "new" / "tuned"
    assert message in terminal.refusal(*terminal.finetuning(output, *more))


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("--batch-size", ["0", "-1"], "≥ 1"),
        ("--accumulate", ["0"], "≥ 1"),
        ("--safety-batch-size", ["0"], "≥ 1"),
        ("--max-length", ["0", "-3"], "≥ 1"),
        ("--max-steps", ["0", "-5"], "≥ 1"),
        ("--log-every", ["0", "-1"], "≥ 1"),
        ("--save-every", ["0", "-1"], "≥ 1"),
        ("--direction-every", ["0"], "≥ 1"),
        ("--probe-every", ["0"], "≥ 1"),
        ("--lora-r", ["0"], "≥ 1"),
        ("--lora-alpha", ["0"], "≥ 1"),
        ("--epochs", ["0", "-1", "nan"], "> 0"),
        ("--probe-fraction", ["0", "nan"], "> 0"),
        ("--probe-fraction", ["1.5"], "≤ 1"),
        ("--lora-dropout", ["2"], "≤ 1"),
        ("--learning-rate", ["-1", "nan"], "≥ 0"),
        ("--learning-rate", ["inf"], "≤ 4294967295"),
        ("--weight-decay", ["-1"], "≥ 0"),
        ("--warmup-steps", ["-1"], "≥ 0"),
        ("--max-grad-norm", ["-1"], "≥ 0"),
        ("--probe-lr", ["-1", "nan"], "≥ 0"),
        ("--safety-weight", ["-1"], "≥ 0"),
        ("--seed", ["-1"], "≥ 0"),
        ("--seed", ["99999999999999999999"], "≤ 4294967295"),
    ],
)
def test_a_number_out_of_range_names_the_option_and_the_range(
    terminal: Terminal, tmp_path: Path, option: str, values: list[str], message: str
) -> None:
    for value in values:
        for command in ("finetune", "compare"):
            output = tmp_path / "new" / "out"
            line = terminal.refusal(*terminal.command(command, output, option, value))
            assert line.startswith(f"Error: {option} {value}") and message in line


@pytest.mark.parametrize(
    ("command", "more", "message"),
    [
        ("evaluate", ["--precision", "fp8"], "--precision fp8: expected fp32 or bf16"),
        ("evaluate", ["--batch-size", "0"], "--batch-size 0: expected a number ≥ 1"),
        ("evaluate", ["--max-length", "0"], "--max-length 0: expected a number ≥ 1"),
        ("compare", ["--blend", "0"], "--blend 0.0: expected a number > 0"),
        ("compare", ["--blend", "nan"], "--blend nan: expected a number > 0"),
        ("compare", ["--probe-layers", "7"], "7 is out of range for a model of 3 layers"),
        ("landscape", ["--points", "4"], "--points 4: expected an odd number ≥ 3"),
        ("landscape", ["--directions", "0"], "--directions 0: expected a number ≥ 1"),
        ("landscape", ["--reach", "nan"], "--reach nan: expected a number > 0"),
        (
            "landscape",
            ["--gradient-reach", "0"],
            "--gradient-reach 0.0: expected a number > 0",
        ),
        ("landscape", ["--batch-size", "0"], "--batch-size 0: expected a number ≥ 1"),
        ("landscape", ["--base", "."], "--base .: cannot be loaded"),
        ("doctor", ["--precision", "fp8"], "--precision fp8: expected fp32 or bf16-mixed or bf16"),
        ("doctor", ["--lora-target", "w_q"], "--lora-target w_q: does not fit the model"),
    ],
)
def test_bad_settings_of_the_other_commands(
    terminal: Terminal, tmp_path: Path, command: str, more: list[str], message: str
) -> None:
    assert message in terminal.refusal(*terminal.command(command, tmp_path / "out", *more))


def test_an_output_that_exists_is_left_alone(
    terminal: Terminal,
    tmp_path: Path,
) -> None:
    assert "exists already" in terminal.refusal(*terminal.finetuning(tmp_path))


@pytest.mark.parametrize("command", ["finetune", "evaluate", "compare", "landscape"])
def test_an_output_that_cannot_be_written_is_one_line(
    terminal: Terminal, tmp_path: Path, command: str
) -> None:
    below = Path(terminal.files["task"]) / "out"  # a file is no folder
    line = terminal.refusal(*terminal.command(command, below))
    assert str(below) in line
    long = tmp_path / ("x" * 300)
    assert str(long) in terminal.refusal(*terminal.command(command, long))
    if command != "finetune":
        taken = tmp_path if command == "evaluate" else Path(terminal.files["task"])
        assert str(taken) in terminal.refusal(*terminal.command(command, taken))


def test_a_run_that_fails_before_its_first_checkpoint_leaves_nothing(
    terminal: Terminal, tmp_path: Path
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    before = sorted(tmp_path.rglob("*"))
    terminal.monkeypatch.setattr(finetune_module._Recorder, "on_log", interrupted)
    assert terminal.run(*terminal.finetuning(tmp_path / "new" / "tuned")) == 130
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_record_of_an_unfinished_run_is_one_line(
    terminal: Terminal, tmp_path: Path
) -> None:
    for command, folder in (("finetune", "out.unfinished"), ("compare", "out/adamw")):
        record = tmp_path / folder / "run.json"
        record.parent.mkdir(parents=True)
        for content in ("{", "[]", "{}", '{"settings": 1}'):
            record.write_text(content)
            line = terminal.refusal(*terminal.command(command, tmp_path / "out"))
            assert f"{record} is damaged" in line
        shutil.rmtree(record.parent)


# Models


def change_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def only_pickled(folder: Path) -> None:
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink()


def without_turn_end(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    change_json(folder / "tokenizer_config.json", eos_token=None)


def with_own_code(folder: Path) -> None:
    """A class of its own, whose module leaves a file when it runs."""
    (folder / "own.py").write_text(
        f"open({str(folder / 'it ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    classes = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_json(folder / "config.json", model_type="own", auto_map=classes)


BAD_MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "own code": (with_own_code, "runs only with --trust-remote-code"),
    "pickled weights": (only_pickled, "no file named model.safetensors"),
    "cut weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 5_000),
        "cannot be loaded",
    ),
    "broken config": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "config of another kind": (
        lambda folder: (folder / "config.json").write_text("[]"),
        "cannot be loaded",
    ),
    "other shapes": (
        lambda folder: change_json(folder / "config.json", hidden_size=64),
        "cannot be loaded",
    ),
    "unknown architecture": (
        lambda folder: change_json(folder / "config.json", model_type="unheard"),
        "unheard",
    ),
    "broken tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "cannot be loaded",
    ),
    "no tokenizer": (without_tokenizer, "cannot be loaded"),
    "no end of turns": (without_turn_end, "neither a chat template nor an eos_token"),
    "broken template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{% for %}"),
        "the chat template rejects",
    ),
    "failing template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ 1 + messages[0].role }}"),
        "the chat template rejects",
    ),
    "nothing": (lambda folder: [path.unlink() for path in folder.iterdir()], "cannot be loaded"),
}


@pytest.mark.parametrize("damage", BAD_MODELS)
def test_a_bad_model_is_one_line_and_leaves_nothing(
    terminal: Terminal, tmp_path: Path, damage: str
) -> None:
    model = shutil.copytree(terminal.chat_model, tmp_path / "model")
    change, message = BAD_MODELS[damage]
    change(model)
    for command in ("finetune", "evaluate", "compare", "doctor"):
        line = terminal.refusal(*terminal.command(command, tmp_path / "out", "--model", str(model)))
        assert line.startswith(f"Error: --model {model}: ") and message in line


@pytest.mark.parametrize("command", ["finetune", "evaluate", "compare", "doctor", "landscape"])
def test_a_model_that_is_not_there_is_one_line(
    terminal: Terminal, tmp_path: Path, command: str
) -> None:
    more = ["--model", "no/such/folder"]
    line = terminal.refusal(*terminal.command(command, tmp_path / "out", *more))
    assert "--model no/such/folder: cannot be loaded" in line


def test_code_of_a_model_runs_where_it_is_asked_for(terminal: Terminal, tmp_path: Path) -> None:
    terminal.monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache")
    )
    terminal.monkeypatch.setattr(sys, "path", [*sys.path])
    model = shutil.copytree(terminal.chat_model, tmp_path / "model")
    with_own_code(model)
    arguments = ["doctor", "--model", str(model), "--full"]
    terminal.refusal(*arguments)
    assert not (model / "it ran").exists()
    assert terminal.run(*arguments, "--trust-remote-code") == 0
    assert (model / "it ran").exists()


def test_an_adapter_is_read_from_safetensors_only(terminal: Terminal, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    assert terminal.run(*terminal.finetuning(adapter, "--max-steps", "1")) == 0
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    content = weights.read_bytes()
    weights.unlink()
    arguments = ["evaluate", "--model", str(adapter), "--task", terminal.files["task"]]
    assert "has no adapter_model.safetensors" in terminal.refusal(*arguments)
    weights.write_bytes(content[:-100])
    assert f"--model {adapter}: cannot be loaded" in terminal.refusal(*arguments)
    weights.write_bytes(content)
    assert terminal.run(*arguments) == 0
    for changes in ({"base_model_name_or_path": "no/such/folder"}, {"peft_type": "UNHEARD"}):
        change_json(adapter / "adapter_config.json", **changes)
        assert f"--model {adapter}: cannot be loaded" in terminal.refusal(*arguments)


ROOT = Path(__file__).parent.parent


def calls() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Every call in the package and its benchmarks: place, function and keyword arguments."""
    for path in sorted([*ROOT.glob("sap_fast/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                given = {each.arg or "**": ast.unparse(each.value) for each in node.keywords}
                place = f"{path.relative_to(ROOT)}:{node.lineno}"
                yield place, ast.unparse(node.func), given


def test_nothing_is_unpickled_and_no_remote_code_runs_unasked() -> None:
    models = 0
    for place, function, given in calls():
        name = function.rsplit(".", 1)[-1]
        assert function not in ("pickle.load", "pickle.loads", "pickle.Unpickler"), place
        if function == "torch.load" or name == "load_state_dict_from_url":
            assert given.get("weights_only") == "True", place
        # Nothing but the user's own word: the default of every function that takes it is False.
        assert given.get("trust_remote_code", "False") in (
            *("False", "trust_remote_code"),
            *("settings.trust_remote_code", "self.settings.trust_remote_code"),
        ), place
        if name == "from_pretrained" and place.startswith("sap_fast"):
            if "Tokenizer" not in function and "Config" not in function:
                assert given.get("use_safetensors") == "True", place
                models += 1
    assert models > 0
    assert inspect.signature(load_model).parameters["trust_remote_code"].default is False
    assert FinetuneSettings.trust_remote_code is False


def test_evaluate_prints_and_writes_every_measure(
    terminal: Terminal,
    tmp_path: Path,
) -> None:
    output = tmp_path / "result.json"
    arguments = ["evaluate", "--model", str(terminal.chat_model), "--output", str(output)]
    for name in ("task", "harmful", "harmless"):
        arguments += [f"--{name}", terminal.files[name]]
    assert terminal.run(*arguments) == 0
    result = json.loads(output.read_text())["result"]
    assert result["refused_harmful"]["count"] == 3 and result["refused_harmless"]["count"] == 2
    assert result["task_loss"] > 0 and len(result["harmful_margins"]) == 3
    printed = terminal.shown
    assert f"{result['task_loss']:.4f}" in printed and "95 % interval" in printed
    assert terminal.run("evaluate", "--model", str(terminal.chat_model)) == 2
    assert "nothing to measure" in terminal.shown


def test_compare_runs_all_and_reports_and_goes_on_where_it_stopped(
    terminal: Terminal,
    tmp_path: Path,
) -> None:
    output = tmp_path / "compared"
    arguments = terminal.command("compare", output, "--held-out", terminal.files["task"])
    assert terminal.run(*arguments) == 0
    results = json.loads((output / "results.json").read_text())
    assert [run["name"] for run in results["runs"]] == ["Start", "AdamW", "Blending", "FusedSAP"]
    for run in results["runs"][1:]:
        assert run["step_seconds"] > 0 and run["evaluation"]["task_loss"] > 0
    losses = [run["metrics"][0]["loss"] for run in results["runs"][1:]]
    assert losses == pytest.approx([losses[0]] * 3, rel=0.05)  # the same first batch
    page = (output / "report.html").read_text()
    assert "FusedSAP" in page and "<table" in page
    assert "FusedSAP" in terminal.shown

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to run")

    terminal.monkeypatch.setattr(subprocess, "run", refuse)
    (output / "report.html").unlink()
    assert terminal.run(*arguments) == 0
    assert (output / "report.html").exists()


def test_doctor_names_versions_backends_and_what_survives_rounding(terminal: Terminal) -> None:
    terminal.monkeypatch.setattr(console, "width", 120)
    assert terminal.run("doctor") == 0
    printed = terminal.shown
    assert torch.__version__ in printed
    for operation in ("perturb_swap_", "probe_project_", "adamw_blend_", "reference"):
        assert operation in printed
    arguments = ["doctor", "--model", str(terminal.chat_model), "--full", "--precision", "bf16"]
    assert terminal.run(*arguments) == 0
    printed = terminal.shown
    assert "lost to rounding" in printed and "100" in printed


def test_doctor_says_why_nothing_runs(terminal: Terminal) -> None:
    terminal.monkeypatch.setattr(console, "width", 120)
    for name, value, message in (
        ("SAP_FAST_BACKEND", "cuda", "choose one of"),
        ("SAP_FAST_BACKEND", "reference", "asked for by SAP_FAST_BACKEND"),
    ):
        terminal.monkeypatch.setenv(name, value)
        assert terminal.run("doctor") == 0
        assert message in terminal.shown


@pytest.mark.parametrize(
    ("given", "weight", "level"),
    [
        ({}, 0.3, "auto"),
        ({"safety_level": "always"}, 0.3, None),
        ({"safety_level": "0.7"}, 0.3, 0.7),
        ({"optimizer": "sap"}, 0.0, None),
        ({"optimizer": "sap", "safety_level": "auto"}, 0.0, "auto"),
        ({"optimizer": "adamw", "safety_level": "auto"}, 0.0, None),
        ({"optimizer": "sap", "safety_weight": 0.2}, 0.2, "auto"),
    ],
)
def test_blending_is_the_default_and_the_paper_has_none(
    given: dict[str, Any], weight: float, level: float | str | None
) -> None:
    settings = FinetuneSettings(model="m", task="t", output="o", **given)
    assert settings.optimizer == given.get("optimizer", "blend")
    options = settings.sap_options()
    assert options["safety_weight"] == weight
    assert options.get("safety_level") == level


def test_settings_become_the_arguments_that_make_them(chat_model: Path) -> None:
    settings = FinetuneSettings(
        model="m", task="t", output="o", full=True, lora_target="q,v", max_steps=3, probe_lr=0.1
    )
    assert settings.arguments() == [
        *("--model", "m", "--task", "t", "--output", "o", "--full"),
        *("--lora-target", "q,v", "--max-steps", "3", "--probe-lr", "0.1"),
    ]


def test_help_teaches_every_setting() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "sap_fast.cli", "finetune", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"COLUMNS": "200", "PATH": ""},
    ).stdout
    for name in FinetuneSettings.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in shown


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sap_fast.cli.find_spec", lambda name: None if name == "peft" else True)
    with pytest.raises(SystemExit, match=r"needs peft: pip install 'sap-fast\[train\]'"):
        main()


def test_importing_the_package_imports_neither_transformers_nor_triton() -> None:
    script = (
        "import sap_fast, sys; "
        "print([m for m in ('transformers', 'triton', 'peft', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
