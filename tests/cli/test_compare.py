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
from sap_fast.data import builtin_requests
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
    # A run that was stopped early says so.
    record = output / "adamw" / "run.json"
    saved = json.loads(record.read_text())
    saved["figures"]["why_stopped"] = "Stopped at step 3 of 4: 1 look(s) without a better loss"
    record.write_text(json.dumps(saved))
    assert terminal.run(*arguments) == 0
    page = (output / "report.html").read_text()
    assert page.count("plain fine-tuning. Stopped at step 3 of 4: 1 look(s)") == 1


def test_task_rows_are_all_that_compare_needs(terminal: Terminal, tmp_path: Path) -> None:
    output = tmp_path / "compared"
    half = {kind: builtin_requests("evaluation", kind)[:2] for kind in ("harmful", "harmless")}
    few = builtin_requests("training", "harmful")[:5]

    def some(split: str, kind: str) -> Any:
        return few if split == "training" else half[kind]

    ran: list[list[str]] = []
    for module in ("pairs", "evaluate"):
        terminal.monkeypatch.setattr(f"sap_fast.cli.{module}.builtin_requests", some)

    def run(command: list[str], check: bool) -> Any:
        ran.append(command)
        return subprocess.CompletedProcess(command, 1)

    terminal.monkeypatch.setattr(subprocess, "run", run)
    arguments = ["compare", "--model", str(terminal.chat_model), "--output", str(output)]
    arguments += ["--task", terminal.files["task"], "--max-length", "96", "--rho", "0.001"]
    assert terminal.run(*arguments) == 2, terminal.shown
    assert "5 requests: 0 refused" in terminal.shown
    pairs = output / "safety-pairs.jsonl"
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [request.prompt for request in few]
    assert ran[0][ran[0].index("--safety") + 1] == str(pairs)
    saved = json.loads((output / "evaluations" / "Start.json").read_text())
    assert saved["files"]["harmful"] == saved["files"]["harmless"] == "builtin"
    assert saved["result"]["refused_harmless"]["count"] == 2

    # The pairs are made once.
    terminal.monkeypatch.setattr("sap_fast.cli.pairs.own_refusals", None)
    assert terminal.run(*arguments) == 2 and len(ran) == 2
    assert "requests:" not in terminal.shown
