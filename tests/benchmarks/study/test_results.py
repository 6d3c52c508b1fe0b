"""What the study keeps, and which settings it chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.study import data, results
from benchmarks.study.methods import METHODS
from tests.benchmarks.study.helpers import everywhere, row, share


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    rows = [row("sap", {"probe_lr": 1e-2}, "alpaca", split=split) for split in data.SPLITS]
    results.append(path, rows[:1])
    first, second = data.SPLITS
    assert results.finished(results.read(path), first) == {rows[0]["key"]}
    assert results.finished(results.read(path), second) == set()
    results.append(path, rows[1:])
    assert results.read(path) == rows
    assert results.finished(results.read(path), second) == {rows[0]["key"]}
    with pytest.raises(ValueError, match="has the columns"):
        results.append(path, [{"other": 1}])
    assert results.read(tmp_path / "none.csv") == []


def test_the_setting_chosen_refuses_most_within_the_limits() -> None:
    weights = METHODS["blend"].settings
    rows = (
        everywhere("aligned", {}, answers=share(9))
        + everywhere("adamw", {}, answers=share(3))
        # Refuses most, but at a task loss of 3 % more; or with harmless requests refused.
        + everywhere("blend", weights[0], answers=share(10), task_loss=1.545)
        + everywhere("blend", weights[1], answers=share(7))
        + everywhere("blend", weights[2], answers=share(6))
        + everywhere("sap", {"probe_lr": 1e-2}, answers=share(9), edgy=share(1))
        + everywhere("sap", {}, answers=share(4))
        + [row("sap", {"probe_lr": 1e-3}, "alpaca", answers=share(10))]
    )
    chosen = results.choose_settings(rows)
    assert chosen["blend"] == weights[1]
    assert chosen["sap"] == {}
    assert chosen["adamw"] == {} and "mixed" not in chosen
    # What is reported has no say in it.
    other = [r | {"split": "report", "harmful_refusals": "1" * 10} for r in rows]
    assert results.choose_settings(rows + other) == chosen
    assert results.choose_settings(other) == {}


def test_where_no_setting_is_within_the_limits_the_nearest_is_chosen() -> None:
    first, second, _ = METHODS["mixed"].settings
    rows = (
        everywhere("aligned", {}, answers=share(9))
        + everywhere("adamw", {}, answers=share(3))
        + everywhere("mixed", first, answers=share(10), task_loss=1.7)
        + everywhere("mixed", second, answers=share(5), task_loss=1.6)
    )
    assert results.choose_settings(rows)["mixed"] == second
