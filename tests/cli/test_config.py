"""`--config` and `--print-config`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings

from sap_fast.cli.config import read_config
from sap_fast.cli.console import UserError
from sap_fast.cli.settings import FinetuneSettings
from tests.cli.terminal import Terminal
from tests.cli.test_app import COMMANDS
from tests.data.test_fuzz import damaged_configs

HINTS = get_type_hints(FinetuneSettings)


def config(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def printed(terminal: Terminal, *arguments: str) -> dict[str, Any]:
    assert terminal.run(*arguments, "--print-config") == 0, terminal.shown
    return yaml.safe_load(terminal.output)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(
    terminal: Terminal, tmp_path: Path
) -> None:
    path = config(
        tmp_path,
        "model: m\ntask: [a.jsonl, b.jsonl]\noutput: o\nbatch-size: 8\nlearning_rate: 1e-3\n"
        "full: true\nrho: 0.01\nsafety: null\nmax_steps: 7.0\nepochs: 2\nlora_r: '4'\n",
    )
    effective = printed(terminal, "finetune", "--config", str(path), "--batch-size", "2")
    plain = FinetuneSettings(
        model="m",
        task="a.jsonl,b.jsonl",
        output="o",
        batch_size=2,
        learning_rate=1e-3,
        full=True,
        rho="0.01",
        max_steps=7,
        epochs=2.0,
        lora_r=4,
    )
    assert effective == vars(plain)
    assert type(effective["max_steps"]) is int and type(effective["epochs"]) is float
    # A switch that the file turns on is turned off again.
    assert printed(terminal, "finetune", "--config", str(path), "--no-full")["full"] is False


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_printed_is_a_config_of_the_same_command(
    terminal: Terminal, tmp_path: Path, command: str
) -> None:
    effective = printed(terminal, *terminal.command(command, tmp_path / "out.jsonl"))
    path = config(tmp_path, terminal.output)
    assert printed(terminal, command, "--config", str(path)) == effective
    assert not (tmp_path / "out.jsonl").exists()


def test_a_run_can_be_repeated_from_its_record(terminal: Terminal, tmp_path: Path) -> None:
    made = FinetuneSettings(model="m", task="t", output="o", safety_level="0.7", seed=3)
    record = config(tmp_path, json.dumps({"settings": vars(made), "figures": {}}), "run.json")
    effective = printed(terminal, "finetune", "--config", str(record), "--output", "again")
    assert effective == vars(made) | {"output": "again"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 3", "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("colour: red", "unknown key 'colour'; expected one of model, task, output, safety"),
        ("7: red", "unknown key 7; expected one of"),
        ("preset: balanced", "the key 'preset' is gone: give --direction-every 5"),
        ("batch_size: many", 'batch_size: got "many"; expected a whole number'),
        ("batch_size: 1.5", "batch_size: got 1.5; expected a whole number"),
        ("batch_size: true", "batch_size: got true; expected a whole number"),
        ("batch_size: [1]", "batch_size: got [1]; expected a whole number"),
        ("batch_size: .inf", "batch_size: got Infinity; expected a whole number"),
        ("epochs: long", 'epochs: got "long"; expected a number'),
        ("full: 1", "full: got 1; expected true or false"),
        ("task: {a: 1}", 'task: got {"a": 1}; expected text'),
        ("task: no", "task: got false; expected text"),
        ("task: []", "task: got []; expected text"),
        ("seed: 1\nseed: 2", "line 1: got invalid YAML (the key 'seed' is there twice)"),
        ("lora_r: 1\nlora-r: 2", "the key 'lora-r' is there twice"),
        ("a: [", "line 2: got invalid YAML"),
        ("a: \x01", "got invalid YAML"),
        ("!!python/object/apply:os.getcwd []", "got invalid YAML"),
        ("- a", 'got ["a"]; expected options by name'),
        ("", "got null; expected options by name"),
    ],
)
def test_a_bad_config_names_the_file_and_the_key(
    terminal: Terminal, tmp_path: Path, text: str, message: str
) -> None:
    path = config(tmp_path, text + "\n")
    arguments = terminal.finetuning(tmp_path / "out")
    line = terminal.refusal(*arguments, "--config", str(path))
    assert line.startswith(f"Error: {path}") and message in line


def test_a_config_that_cannot_be_read_is_one_line(terminal: Terminal, tmp_path: Path) -> None:
    arguments = terminal.finetuning(tmp_path / "out")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff")
    for path, message in (
        (tmp_path / "none.yaml", "No such file"),
        (tmp_path, "expected a .yaml or .json file"),
        (binary, "bytes that are not UTF-8"),
        (config(tmp_path, "{", "broken.json"), "got invalid JSON"),
        (config(tmp_path, "[" * 100_000, "deep.json"), "got invalid JSON"),
    ):
        line = terminal.refusal(*arguments, "--config", str(path))
        assert str(path) in line and message in line


def test_an_option_that_the_file_gives_wrong_is_an_error_of_that_option(
    terminal: Terminal, tmp_path: Path
) -> None:
    path = config(tmp_path, "precision: fp8\n")
    line = terminal.refusal(*terminal.finetuning(tmp_path / "out"), "--config", str(path))
    assert "--precision fp8: expected" in line


def test_a_value_is_left_at_its_default_by_null(tmp_path: Path) -> None:
    assert read_config(config(tmp_path, "model: m\nseed: null\n"), HINTS) == {"model": "m"}
    with pytest.raises(UserError, match="unknown key 'sed'; did you mean 'seed'"):
        read_config(config(tmp_path, "sed: null\n"), HINTS)


@pytest.mark.parametrize(
    "examples", [25, pytest.param(400, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_a_damaged_config_is_one_line_and_leaves_nothing(
    terminal: Terminal, tmp_path: Path, examples: int
) -> None:
    """Whatever a config holds: the run ends before it begins, at the latest for its model."""
    found = []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged_configs())
    def run(file: tuple[str, bytes]) -> None:
        path = tmp_path / file[0]
        path.write_bytes(file[1])
        given = ["--model", "no/such/folder", "--task", "none.jsonl", "--output", "out"]
        line = terminal.refusal("finetune", "--config", str(path), *given)
        by_option = line.startswith(("Error: --", "╭─ Error"))
        assert by_option or line.startswith(f"Error: {path}"), line
        found.append(by_option)
        path.unlink()

    run()
    assert True in found and False in found
