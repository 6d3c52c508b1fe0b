"""What every command does alike: a mistake is one line and leaves nothing, and help teaches."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from sap_fast.cli import main
from sap_fast.cli.settings import GONE, FinetuneSettings, flag
from tests.cli.terminal import Terminal

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
        *(("pairs", "--requests"), ("inspect", "--task")),
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
    output = tmp_path / ("out.jsonl" if command == "pairs" else "out")
    line = terminal.refusal(*terminal.command(command, output, option, str(path)))
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
        (
            "doctor",
            ["--precision", "fp8"],
            "--precision fp8: expected auto or fp32 or bf16-mixed or bf16",
        ),
        ("doctor", ["--lora-target", "w_q"], "--lora-target w_q: does not fit the model"),
    ],
)
def test_bad_settings_of_the_other_commands(
    terminal: Terminal, tmp_path: Path, command: str, more: list[str], message: str
) -> None:
    assert message in terminal.refusal(*terminal.command(command, tmp_path / "out", *more))


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


@pytest.mark.parametrize("command", ["finetune", "landscape"])
def test_an_unfinished_run_of_another_version_is_one_line(
    terminal: Terminal, tmp_path: Path, command: str
) -> None:
    work = tmp_path / "out.unfinished"
    work.mkdir()
    (work / "run.json").write_text(json.dumps({"settings": {"model": "m", "probe_lr": 3e-3}}))
    (work / "landscape.csv").touch()
    line = terminal.refusal(*terminal.command(command, tmp_path / "out"))
    assert f"{work} was begun with another version of sap-fast; remove that folder" in line


COMMANDS = (
    *("finetune", "pairs", "inspect", "evaluate", "compare", "merge", "doctor", "landscape"),
    "lm-eval-tasks",
)


@pytest.mark.parametrize("option", GONE)
@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_that_is_gone_says_what_took_its_place(
    terminal: Terminal, tmp_path: Path, command: str, option: str
) -> None:
    for given in ([option, "1"], [f"{option}=1"]):
        line = terminal.refusal(*terminal.command(command, tmp_path / "out", *given))
        assert line == f"Error: {option} is gone: {GONE[option]}"


def test_what_took_the_place_of_an_option_exists() -> None:
    known = {flag(name) for name in FinetuneSettings.__dataclass_fields__}
    for option, cure in GONE.items():
        assert option not in known
        named = set(re.findall(r"--[a-z-]+", cure)) - {option}
        assert named and named <= known


def options_shown(help_: str) -> set[str]:
    return set(re.findall(r"^│ [* ]*(--[a-z-]+)", help_, flags=re.MULTILINE))


def test_help_teaches_every_setting(terminal: Terminal) -> None:
    terminal.monkeypatch.setenv("COLUMNS", "200")
    every = {flag(name) for name in FinetuneSettings.__dataclass_fields__}
    common = {"--config", "--print-config", "--help"}
    assert options_shown(terminal.help("finetune")) == every | common
    assert options_shown(terminal.help("compare")) >= every - {"--optimizer"}
    assert "--optimizer" not in options_shown(terminal.help("compare"))
    for command in COMMANDS:
        assert not [option for option in GONE if option in terminal.help(command)]
    for command in COMMANDS:
        assert command in terminal.help()


def test_without_the_extra_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sap_fast.cli.find_spec", lambda name: None if name == "peft" else True)
    with pytest.raises(SystemExit, match=r"needs peft: pip install 'sap-fast\[train\]'"):
        main()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_given_twice_is_an_error_that_names_it(
    terminal: Terminal, tmp_path: Path, command: str
) -> None:
    arguments = terminal.command(command, tmp_path / "out")
    option = "--model" if "--model" in arguments else "--output"
    error = f"Error: {option} is given twice: expected it once"
    assert terminal.refusal(*arguments, option, "another") == error


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--full", "--full"], "--full is given twice: expected it once"),
        (["--seed=1", "--seed", "1"], "--seed is given twice"),
        (["--task", "b.jsonl"], "--task is given twice: expected it once, several values as in a"),
        (["--lora-target", "q_proj", "--lora-target", "v_proj"], "as in q_proj,v_proj"),
        (["--probe-layers", "1", "--probe-layers", "2"], "as in 4,5,6"),
    ],
)
def test_an_option_given_twice_in_other_words_is_one_too(
    terminal: Terminal, tmp_path: Path, more: list[str], words: str
) -> None:
    command = terminal.finetuning(tmp_path / "out")
    assert words in terminal.refusal(*command, *more)
