"""`sap-fast evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.terminal import Terminal


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
