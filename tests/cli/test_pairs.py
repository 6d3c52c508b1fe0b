"""`sap-fast pairs`, and the requests that come with the package in the other commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sap_fast.cli import pairs as pairs_module
from sap_fast.data import REFUSALS, build_safety_pair, builtin_requests
from tests.cli.terminal import Terminal
from tests.conftest import REQUESTS


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Refusing:
    """In the place of a model that refuses every other request, in order."""

    def __init__(self, terminal: Terminal, stop_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.stop_after = stop_after
        terminal.monkeypatch.setattr(pairs_module, "own_refusals", self)

    def __call__(self, model: Any, tokenizer: Any, prompts: Sequence[str], **_: Any) -> list[Any]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += prompts
        return [f"I can't: {p}" if len(p) % 2 == 0 else None for p in prompts]


def test_pairs_hold_the_models_refusals_and_stock_ones(terminal: Terminal, tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    arguments = terminal.command("pairs", output)
    model = Refusing(terminal)
    assert terminal.run(*arguments) == 0, terminal.shown
    assert model.asked == REQUESTS
    expected = [build_safety_pair(request, index) for index, request in enumerate(REQUESTS)]
    own = [index for index, request in enumerate(REQUESTS) if len(request) % 2 == 0]
    assert 0 < len(own) < len(REQUESTS)
    for index in own:
        expected[index]["chosen"] = f"I can't: {REQUESTS[index]}"
    assert rows_of(output) == expected
    assert f"3 requests: {len(own)} refused in the model's own words" in terminal.shown
    assert not list(tmp_path.glob("*.unfinished*"))

    dropped = tmp_path / "dropped.jsonl"
    assert terminal.run(*terminal.command("pairs", dropped, "--not-refused", "drop")) == 0
    assert rows_of(dropped) == [expected[index] for index in own]
    assert "exists already" in terminal.refusal(*arguments)


def test_what_a_file_brings_of_its_own_is_kept(terminal: Terminal, tmp_path: Path) -> None:
    requests = tmp_path / "own.jsonl"
    rows = [{"prompt": "Lie", "refusal": "No.", "opening": "Yes:"}, {"prompt": "Lies"}]
    requests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    Refusing(terminal)
    output = tmp_path / "pairs.jsonl"
    assert terminal.run(*terminal.command("pairs", output, "--requests", str(requests))) == 0
    lie, lies = rows_of(output)
    assert (lie["chosen"], lie["rejected"]) == ("No.", "Yes:")
    assert lies["chosen"] == "I can't: Lies"


def test_interrupted_asking_goes_on_where_it_stopped(terminal: Terminal, tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    arguments = terminal.command("pairs", output, "--batch-size", "1")
    assert Refusing(terminal, stop_after=2) and terminal.run(*arguments) == 130
    assert "The same command goes on" in terminal.shown and not output.exists()
    # As a killed process leaves it.
    answers = tmp_path / "pairs.jsonl.unfinished" / "answers.jsonl"
    answers.write_text(answers.read_text() + '{"prompt": "Spre')
    line = terminal.refusal(*arguments, "--precision", "bf16")
    assert "begun with other settings (precision: fp32 then, bf16 now)" in line
    model = Refusing(terminal)
    assert terminal.run(*arguments) == 0
    assert "Going on after 2 of 3 requests" in terminal.shown
    assert model.asked == REQUESTS[2:]
    straight = tmp_path / "straight.jsonl"
    assert terminal.run(*terminal.command("pairs", straight, "--batch-size", "1")) == 0
    assert output.read_text() == straight.read_text()
    assert not list(tmp_path.glob("*.unfinished*"))


def test_a_model_that_refuses_nothing_is_told(terminal: Terminal, tmp_path: Path) -> None:
    output = tmp_path / "pairs.jsonl"
    assert terminal.run(*terminal.command("pairs", output)) == 0
    assert {row["chosen"] for row in rows_of(output)} == set(REFUSALS[:3])
    assert "the model refuses only 0 of 3" in terminal.shown
    more = ["--output", str(tmp_path / "none.jsonl"), "--not-refused", "drop"]
    assert terminal.run(*terminal.command("pairs", output, *more)) == 2
    assert "the model refused none of the 3 requests" in terminal.shown
    assert not (tmp_path / "none.jsonl").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--not-refused", "keep"], "--not-refused keep: expected stock or drop"),
        (["--precision", "fp8"], "--precision fp8: expected fp32 or bf16"),
        (["--batch-size", "0"], "--batch-size 0: expected a number ≥ 1"),
        (["--output", "pairs.csv"], "--output pairs.csv: expected the name of a .jsonl file"),
    ],
)
def test_bad_settings_of_pairs(
    terminal: Terminal, tmp_path: Path, more: list[str], message: str
) -> None:
    arguments = terminal.command("pairs", tmp_path / "pairs.jsonl", *more)
    assert message in terminal.refusal(*arguments)


def test_finetune_makes_its_own_pairs_of_the_training_half(
    terminal: Terminal, tmp_path: Path
) -> None:
    output = tmp_path / "tuned"
    model = Refusing(terminal)
    more = ["--optimizer", "blend", "--safety", "builtin", "--max-steps", "1"]
    assert terminal.run(*terminal.finetuning(output, *more)) == 0, terminal.shown
    prompts = [request.prompt for request in builtin_requests("training", "harmful")]
    assert model.asked == prompts
    rows = rows_of(output / "safety-pairs.jsonl")
    assert [row["prompt"] for row in rows] == prompts
    assert rows[1]["chosen"] == (
        f"I can't: {prompts[1]}" if len(prompts[1]) % 2 == 0 else REFUSALS[1]
    )
    assert not list(output.glob("*.unfinished"))


@pytest.mark.parametrize("given", ["nothing", "builtin", "none"])
def test_evaluate_asks_the_evaluation_half_unless_told_otherwise(
    terminal: Terminal, tmp_path: Path, given: str
) -> None:
    asked: list[list[str]] = []

    def openings(model: Any, tokenizer: Any, prompts: list[str], **_: Any) -> list[str]:
        asked.append(prompts)
        return ["Sure"] * len(prompts)

    def margins(model: Any, tokenizer: Any, requests: list[Any], **_: Any) -> torch.Tensor:
        return torch.zeros(len(requests))

    terminal.monkeypatch.setattr("sap_fast.evaluation.evaluate.generate_openings", openings)
    terminal.monkeypatch.setattr("sap_fast.evaluation.evaluate.refusal_margins", margins)
    more = {
        "nothing": [],
        "builtin": ["--harmless", "builtin"],
        "none": ["--harmful", "none", "--task", terminal.files["task"]],
    }[given]
    output = tmp_path / "result.json"
    base = ["evaluate", "--model", str(terminal.chat_model), "--output", str(output)]
    assert terminal.run(*base, *more, "--batch-size", "64") == 0, terminal.shown
    half = {
        kind: [r.prompt for r in builtin_requests("evaluation", kind)]
        for kind in ("harmful", "harmless")
    }
    assert (
        asked
        == {
            "nothing": [half["harmful"], half["harmless"]],
            "builtin": [half["harmless"]],
            "none": [],
        }[given]
    )
    assert json.loads(output.read_text())["result"]["harmful_refused"] == (
        [False] * 132 if given == "nothing" else None
    )


def test_nothing_at_all_to_measure_is_an_error(terminal: Terminal) -> None:
    line = terminal.refusal("evaluate", "--model", str(terminal.chat_model), "--harmful", "none")
    assert "nothing to measure" in line
