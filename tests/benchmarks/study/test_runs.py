"""One run of the study, on a tiny model."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.study import runs
from benchmarks.study.methods import TRAINING, run_of


def test_a_model_is_tuned_once_and_asked_for_each_split(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "WORK", tmp_path)
    monkeypatch.setattr(runs, "aligned_smollm2", lambda seed: chat_model)
    monkeypatch.setattr(runs, "LOOK_EVERY", 1)
    monkeypatch.setitem(TRAINING, "steps", 2)
    monkeypatch.setitem(TRAINING, "learning_rate", 0.1)
    threads = torch.get_num_threads()
    adamw = run_of("adamw", {}, 0, "alpaca")
    try:
        selection, looks = runs.execute(adamw, "selection", 1)
        monkeypatch.delattr(runs, "tune")
        reported, unseen = runs.execute(adamw, "report", 1)
        found = [
            runs.execute(run_of(*given, 0, "alpaca"), "selection", 1)[0]["task_loss"]
            for given in (
                ("aligned", {}),
                ("merge", {"aligned_share": 0.0}),
                ("merge", {"aligned_share": 1.0}),
                ("adamw", {"aligned_share": 1.0}),
            )
        ]
    finally:
        torch.set_num_threads(threads)
    assert [look["step"] for look in looks] == [1] and unseen == []
    assert list(selection) == list(reported)
    for name in ("key", "steps", "step_seconds", "peak_bytes", "lean_predicted"):
        assert selection[name] == reported[name], name
    assert (selection["split"], reported["split"]) == ("selection", "report")
    assert len(selection["harmful_refusals"]) == 100 and len(reported["harmful_refusals"]) == 220
    aligned, untouched, merged, likewise = found
    assert likewise == merged
    assert untouched == selection["task_loss"] != aligned
    assert merged == pytest.approx(aligned, abs=1e-3)


def test_what_a_merge_starts_from() -> None:
    held = {"safety_level": "auto", "safety_weight": 0.3}
    blend = run_of("blend", held, 1, "gsm8k")
    assert runs.tuning_of(blend) == blend
    assert runs.tuning_of(run_of("blend", held | {"aligned_share": 0.2}, 1, "gsm8k")) == blend
    merged = run_of("merge", {"aligned_share": 0.2}, 1, "gsm8k")
    assert runs.tuning_of(merged) == run_of("adamw", {}, 1, "gsm8k")


def test_two_runs_of_one_tuning_at_once_tune_once(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "WORK", tmp_path)
    monkeypatch.setattr(runs, "aligned_smollm2", lambda seed: chat_model)
    monkeypatch.setitem(TRAINING, "steps", 2)
    tuned: list[Any] = []
    tune = runs.tune

    def counted(*arguments: Any) -> Any:
        tuned.append(arguments[0])
        return tune(*arguments)

    monkeypatch.setattr(runs, "tune", counted)
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(2) as pool:
            shares = (0.3, 0.7)
            merges = [run_of("merge", {"aligned_share": share}, 0, "alpaca") for share in shares]
            rows = list(pool.map(lambda run: runs.execute(run, "report", 1)[0], merges))
    finally:
        torch.set_num_threads(threads)
    assert tuned == [run_of("adamw", {}, 0, "alpaca")]
    assert [row["key"] for row in rows] == [run.key for run in merges]


@pytest.mark.parametrize(
    ("text", "value"), [("so #### 42", 42.0), ("#### 1,234.5 done", 1234.5), ("#### -3.", -3.0)]
)
def test_the_answer_of_a_solution_is_read(text: str, value: float) -> None:
    assert runs.number(runs._ANSWER.findall(text)[-1]) == value
