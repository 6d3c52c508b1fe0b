"""Runs the commands as a user does, in this process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sap_fast.cli import main


def overridden(arguments: Sequence[str], more: Sequence[str]) -> list[str]:
    """Returns arguments, each option with a value, but for those of the options in `more`."""
    again = {word.partition("=")[0] for word in more if word.startswith("--")}
    places = [k for k, word in enumerate(arguments) if word in again]
    left_out = {*places, *(place + 1 for place in places)}
    return [*(word for k, word in enumerate(arguments) if k not in left_out), *more]


@dataclass
class Terminal:
    """Runs `sap-fast` in this process, on the model and files of the test."""

    chat_model: Path
    files: dict[str, str]
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    shown: str = ""
    output: str = ""

    def run(self, *arguments: str) -> int:
        """Runs a command; returns its exit status, and leaves what it showed in `shown`."""
        self.monkeypatch.setattr(sys, "argv", ["sap-fast", *arguments])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        self.output, self.shown = self.capsys.readouterr()
        assert "Traceback" not in self.output + self.shown
        return int(stopped.value.code or 0)

    def help(self, *command: str) -> str:
        """Returns the help of a command, or of all together."""
        assert self.run(*command, "--help") == 0
        return self.output

    def refusal(self, *arguments: str) -> str:
        """Runs a command that has to fail and to leave nothing; returns its one line of error."""
        folder = Path(self.files["task"]).parent
        before = sorted(folder.rglob("*"))

        def refuse(*_: Any, **__: Any) -> None:
            raise AssertionError("a mistake is found before anything runs")

        with self.monkeypatch.context() as patched:
            patched.setattr(subprocess, "run", refuse)
            assert self.run(*arguments) == 2
        assert sorted(folder.rglob("*")) == before
        (line,) = [line for line in self.shown.splitlines() if "Error" in line]
        assert line.startswith(("Error: ", "╭─ Error"))
        return line

    def command(self, name: str, output: Path, *more: str) -> list[str]:
        """Returns the arguments of a short run of any command; those in `more` take precedence."""
        evaluated = ["--harmful", self.files["harmful"], "--harmless", self.files["harmless"]]
        arguments = {
            "finetune": self.finetuning(output),
            "compare": ["compare", *self._training(output), *evaluated],
            "evaluate": [
                *("evaluate", "--model", str(self.chat_model), "--output", str(output)),
                *("--task", self.files["task"], *evaluated),
            ],
            "pairs": [
                *("pairs", "--model", str(self.chat_model), "--output", str(output)),
                *("--requests", self.files["harmful"]),
            ],
            "inspect": ["inspect", "--model", str(self.chat_model), "--task", self.files["task"]],
            "merge": ["merge", "--model", str(self.chat_model), "--output", str(output)],
            "doctor": ["doctor", "--model", str(self.chat_model)],
            "lm-eval-tasks": ["lm-eval-tasks", "--output", str(output)],
            "landscape": [
                *("landscape", "--model", str(self.chat_model), "--output", str(output)),
                *("--harmful", self.files["harmful"], "--task", self.files["task"]),
                *("--safety", self.files["safety"], "--directions", "2", "--points", "3"),
            ],
        }
        return overridden(arguments[name], more)

    def finetuning(self, output: Path, *more: str, model: Path | None = None) -> list[str]:
        """Returns the arguments of a short fine-tuning, with SAP unless `more` says otherwise."""
        given = ["finetune", "--optimizer", "sap", *self._training(output, model)]
        return overridden(given, more)

    def _training(self, output: Path, model: Path | None = None) -> list[str]:
        return [
            *("--model", str(model or self.chat_model), "--task", self.files["task"]),
            *("--safety", self.files["safety"], "--output", str(output)),
            *("--max-steps", "4", "--batch-size", "2", "--max-length", "96", "--log-every", "1"),
            *("--learning-rate", "0.01", "--rho", "0.001", "--safety-batch-size", "2"),
        ]
