"""Rows as the study writes them."""

from __future__ import annotations

from typing import Any

from benchmarks.study import runs
from benchmarks.study.methods import SELECTION, run_of
from sap_fast.evaluation import EvaluationResult


def row(method: str, setting: Any, task: str, seed: int = 0, **figures: Any) -> dict[str, Any]:
    run = run_of(method, setting, seed, task)
    answers = figures.pop("answers", [True] * 5 + [False] * 5)
    result = EvaluationResult(
        task_loss=figures.pop("task_loss", 1.5),
        harmful_refused=answers,
        harmful_margins=[1.0, 2.0],
        harmless_refused=figures.pop("edgy", [False] * 10),
    )
    found = runs.row_of(run, figures.pop("split", "selection"), result, figures)
    return found | {"run_seconds": 1.0, "threads": 1, "commit": "abc", "device": "CPU"}


def share(of_ten: int) -> list[bool]:
    return [k < of_ten for k in range(10)]


def everywhere(method: str, setting: Any, **figures: Any) -> list[dict[str, Any]]:
    return [row(method, setting, task, seed, **figures) for task, seed in SELECTION]


def reported(method: str, setting: Any, seed: int, task: str, **figures: Any) -> dict[str, Any]:
    return row(method, setting, task, seed, split="report", **figures)
