"""The parts of the demo that need no download."""

from __future__ import annotations

import csv
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks import alignment, assets, demo
from benchmarks.provenance import commit
from sap_fast.cli.settings import FinetuneSettings
from sap_fast.evaluation import is_refusal
from sap_fast.reports.report import ReportRun

INTERVAL = {"mean": 0.5, "low": 0.25, "high": 0.75, "count": 8}


def run(name: str, step_seconds: float | None) -> ReportRun:
    measures = ("refused_harmful", "margin", "refused_harmless")
    evaluation = {"task_loss": 1.5} | dict.fromkeys(measures, INTERVAL)
    return ReportRun(name, "", evaluation, [], step_seconds, None)


def test_requests_are_spread_evenly_over_the_list() -> None:
    requests = [str(k) for k in range(10)]
    assert [row["prompt"] for row in demo.as_prompts(requests, 4)] == ["0", "2", "5", "7"]
    assert len(demo.as_prompts(requests, 99)) == 10


def test_results_are_appended_with_one_header(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "demo.csv"
    for seed in (0, 1):
        demo.append_results(path, [run("Aligned", None), run("AdamW", 2.0)], steps=3, seed=seed)
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    assert [(row["model"], row["seed"]) for row in rows] == [
        ("Aligned", "0"),
        ("AdamW", "0"),
        ("Aligned", "1"),
        ("AdamW", "1"),
    ]
    assert rows[1]["refused_harmful_low"] == "0.25" and rows[1]["step_seconds"] == "2.0"
    assert rows[0]["torch"] and rows[0]["device"] and rows[0]["commit"] == commit()


def test_alignment_refuses_the_harmful_and_answers_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(assets, "harmful_requests", lambda: [f"Harm {k}" for k in range(520)])
    answers = [{"instruction": f"Do {k}", "input": "", "output": "Done."} for k in range(999)]
    monkeypatch.setattr(assets, "alpaca_rows", lambda: answers)
    rows = alignment.alignment_rows()
    said = {row["messages"][0]["content"]: row["messages"][1]["content"] for row in rows}
    assert len(said) == len(rows) == 320
    assert all(is_refusal(said[f"Harm {k}"]) for k in range(120))
    assert all(said[f"Do {k}"] == "Done." for k in range(200))
    # Nothing that is tested on, and nothing that the demo trains or measures on, is in it.
    assert demo.TESTED.start >= demo.SAFETY_PAIRS.stop >= alignment.REFUSED.stop
    assert demo.HELD_OUT.start >= demo.TRAINED.stop
    assert demo.TRAINED.start >= alignment.INSTRUCTIONS.stop


def test_two_that_want_the_aligned_model_at_once_align_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(assets, "smollm2_folder", lambda: tmp_path / "shipped")
    monkeypatch.setattr(alignment, "alignment_rows", lambda: [{"messages": []}])
    aligned: list[str] = []

    def finetune(settings: FinetuneSettings) -> None:
        aligned.append(settings.output)
        time.sleep(0.2)  # for another to find no folder
        Path(settings.output).mkdir()

    monkeypatch.setattr(alignment, "finetune", finetune)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(alignment.aligned_smollm2, (0, 0))
    assert first == second and aligned == [str(first)]
    assert alignment.aligned_smollm2(seed=1) != first and len(aligned) == 2
