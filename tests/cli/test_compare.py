"""`sap-fast compare`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.terminal import Terminal


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
