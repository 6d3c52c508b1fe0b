"""`--judge` of `sap-fast evaluate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

from tests.cli.terminal import Terminal


def classifier(terminal: Terminal, folder: Path, *labels: str) -> Path:
    config: Any = AutoConfig.from_pretrained(
        terminal.chat_model, id2label=dict(enumerate(labels)), num_labels=len(labels)
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(terminal.chat_model).save_pretrained(folder)
    return folder


def test_a_classifier_judges_beside_the_phrases(terminal: Terminal, tmp_path: Path) -> None:
    judge = classifier(terminal, tmp_path / "rejects", "normal", "rejection")
    output = tmp_path / "result.json"
    arguments = terminal.command("evaluate", output, "--judge", str(judge))
    assert terminal.run(*arguments) == 0, terminal.shown
    result = json.loads(output.read_text())["result"]
    assert len(result["judged_harmful"]["rejects"]) == 3
    assert len(result["judged_harmless"]["rejects"]) == 2
    shown = terminal.shown
    assert "κ with phrases" in shown and "rejects" in shown and "margin" in shown


@pytest.mark.parametrize("command", ["evaluate", "compare"])
def test_a_judge_that_cannot_be_used_is_one_line(
    terminal: Terminal, tmp_path: Path, command: str
) -> None:
    labelled = classifier(terminal, tmp_path / "labelled", "a", "b")
    good = classifier(terminal, tmp_path / "good", "a", "refusal")
    for judge, message in (
        ("no/such/folder", "--judge no/such/folder: cannot be loaded"),
        (str(labelled), "has the labels a, b"),
        (f"{good},{good}", "two judges are called good"),
        ("http://example.org/v1", "expected an address of this machine"),
    ):
        arguments = terminal.command(command, tmp_path / "out", "--judge", judge)
        assert message in terminal.refusal(*arguments)
    # A model that is no guard.
    if command == "evaluate":
        arguments = terminal.command(command, tmp_path / "out", "--judge", str(terminal.chat_model))
        assert "expected safe or unsafe" in terminal.refusal(*arguments)
