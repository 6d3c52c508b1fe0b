"""`sap-fast compare`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sap_fast.cli.compare import planned_runs
from sap_fast.cli.settings import FinetuneSettings
from tests.cli.terminal import Terminal


def test_each_method_runs_with_what_is_its_own() -> None:
    settings = FinetuneSettings(
        model="m", task="t", output="o", rule="floor", probe_rows=0.5, direction_every=5
    )
    planned = planned_runs(settings, 0.2)
    for method, run in planned.items():
        assert (run.optimizer, run.output) == (method, str(Path("o") / method))
        assert run.probe()["rows"] == 0.5 and run.direction_every == 5
    weights = {method: run.blending_weight for method, run in planned.items()}
    assert weights == {"adamw": 0, "blend": 0.2, "sap": 0}
    # A rule goes with blending alone, into SAP if it is to blend as well.
    assert {method: run.rule for method, run in planned.items()} == {
        "adamw": "blend",
        "blend": "floor",
        "sap": "blend",
    }
    joined = planned_runs(dataclasses.replace(settings, safety_weight=0.1), 0.2)
    assert joined["sap"].rule == "floor" and joined["sap"].blending_weight == 0.1


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
    facts = results["info"]["settings"]
    assert facts["safety direction"] == "taken at every step, blended in by the rule blend"
    assert facts["probe"].startswith("layers early, size 0.003, rule normalized, rows 1, rho 0.001")
    assert "FusedSAP" in terminal.shown

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to run")

    terminal.monkeypatch.setattr(subprocess, "run", refuse)
    (output / "report.html").unlink()
    assert terminal.run(*arguments) == 0
    assert (output / "report.html").exists()
