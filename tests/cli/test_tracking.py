"""`--report-to wandb` and `trackio`: the figures of the steps arrive, offline."""

from __future__ import annotations

import json
import sqlite3
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest

from sap_fast.data import Request
from tests.cli.terminal import Terminal


def tracked(terminal: Terminal, output: Path, tracker: str) -> set[str]:
    """Runs two steps under a tracker; returns the names of the figures of its metrics."""
    more = ["--report-to", tracker, "--max-steps", "2", "--eval", terminal.files["task"]]
    few = [Request("Lie")]
    terminal.monkeypatch.setattr("sap_fast.cli.looks.requests_to_look_at", lambda: few)
    assert terminal.run(*terminal.finetuning(output, *more)) == 0, terminal.shown
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row} - {"step", "step_seconds"}
    assert {"loss", "sap/lean", "sap/safety_loss", "held_out/loss"} <= names
    return names


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_tracker_is_given_every_figure_by_its_name(
    terminal: Terminal, tmp_path: Path, tracker: str
) -> None:
    stand_in = MagicMock(run=None, __version__="1.0")
    stand_in.__spec__ = ModuleSpec(tracker, None)
    stand_in.init.side_effect = lambda **_: setattr(stand_in, "run", MagicMock())
    stand_in.context_vars.current_space_id.get.return_value = None
    terminal.monkeypatch.setitem(sys.modules, tracker, stand_in)
    for name in ("wandb.sdk", "wandb.sdk.lib", "wandb.sdk.lib.config_util"):
        terminal.monkeypatch.setitem(sys.modules, name, MagicMock())
    names = tracked(terminal, tmp_path / "tuned", tracker)
    assert stand_in.init.call_args.kwargs["name"] == "tuned"
    logged = [call.args[0] for call in stand_in.log.call_args_list]
    assert {f"train/{name}" for name in names} <= {name for each in logged for name in each}
    leans = [each["train/global_step"] for each in logged if "train/sap/lean" in each]
    assert leans == [1, 2]
    assert all(isinstance(value, int | float) for each in logged for value in each.values())


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_writes_every_figure_to_its_folder_offline(
    terminal: Terminal, tmp_path: Path
) -> None:
    import wandb

    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        terminal.monkeypatch.setenv(f"WANDB_{name}", value)
    try:
        names = tracked(terminal, tmp_path / "tuned", "wandb")
    finally:
        wandb.finish()
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    written = log.read_bytes()
    assert [name for name in names if f"train/{name}".encode() not in written] == []
    assert b"tuned" in written


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio_writes_every_figure_to_its_folder(terminal: Terminal, tmp_path: Path) -> None:
    # It reads where its folder is when it is imported.
    folder = tmp_path / "trackio"
    terminal.monkeypatch.setenv("TRACKIO_DIR", str(folder))
    terminal.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
        terminal.monkeypatch.delitem(sys.modules, name)
    names = tracked(terminal, tmp_path / "tuned", "trackio")
    (database,) = folder.glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select run_name, step, metrics from metrics").fetchall()
    assert {run for run, _, _ in rows} == {"tuned"}
    logged: set[Any] = set()
    for _, _, metrics in rows:
        logged |= set(json.loads(metrics))
    assert {f"train/{name}" for name in names} <= logged
