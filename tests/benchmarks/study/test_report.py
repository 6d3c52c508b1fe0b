"""What the study reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import data, report, results, runs
from benchmarks.study.methods import SELECTION, run_of
from tests.benchmarks.study.helpers import everywhere, reported, row, share


def test_what_was_tried_is_in_the_order_of_its_task_loss() -> None:
    rows = (
        everywhere("adamw", {}, answers=share(3))
        + everywhere("blend", {"safety_weight": 0.3}, answers=share(9), task_loss=1.65)
        + everywhere("blend", {"safety_weight": 0.1}, answers=share(8), task_loss=1.53)
        + [row("blend", {"safety_weight": 0.2}, "alpaca", split="report")]
    )
    for methods in report.tried(rows).values():
        assert set(methods) == {"adamw", "blend"}
        assert methods["adamw"] == [(0.0, 0.3)]
        assert [point[1] for point in methods["blend"]] == [0.8, 0.9]
        assert [point[0] for point in methods["blend"]] == pytest.approx([0.02, 0.1])
    assert len(report.tried(rows)) == len(SELECTION)
    assert report.tried(rows[len(SELECTION) :]) == {}


def test_a_summary_compares_with_adamw_on_the_same_seeds() -> None:
    sap = {"probe_lr": 1e-2}
    rows = [
        reported("aligned", {}, 0, "alpaca", answers=share(10), task_loss=1.6),
        reported("adamw", {}, 0, "alpaca", answers=share(4), step_seconds=1.0),
        reported("adamw", {}, 1, "alpaca", answers=share(2), step_seconds=1.0),
        reported("adamw", {}, 2, "alpaca", answers=share(0), step_seconds=9.0),
        reported("sap", sap, 0, "alpaca", answers=share(10), task_loss=1.53, step_seconds=3.0),
        reported("sap", sap, 1, "alpaca", answers=share(10), task_loss=1.515, step_seconds=2.0),
        reported("lisa", {}, 0, "alpaca", step_seconds=1.5) | {"threads": 2},
        reported("sam", {}, 0, "alpaca", step_seconds=1.5) | {"device": "another CPU"},
        reported("sap", {}, 2, "alpaca", answers=share(0)),
        # Settings were chosen by these: they have no place in what is reported.
        row("sap", sap, "alpaca", 0, answers=share(0)),
    ]
    settings = {"aligned": {}, "adamw": {}, "sap": sap, "lisa": {}, "sam": {}}
    found = {s.method: s for s in report.summarize(rows, settings)}
    assert found["sap"].seeds == (0, 1)
    assert found["sap"].refused_harmful.mean == 1.0
    assert found["sap"].against_adamw is not None
    assert found["sap"].against_adamw.mean == pytest.approx(0.7)
    assert found["sap"].task_loss_ratio == pytest.approx((1.015, 1.01, 1.02))
    assert found["sap"].step_ratio == 2.5
    for elsewhere in ("lisa", "sam"):
        assert found[elsewhere].step_ratio is None and found[elsewhere].step_seconds == 1.5
    # Of the 0.1 that AdamW took off, 0.07 with seed 0; seed 1 has no aligned model here.
    assert found["sap"].gain_kept == pytest.approx(0.7)
    assert found["adamw"].gain_kept == pytest.approx(1.0)
    assert found["adamw"].refused_harmful.mean == pytest.approx(0.2)
    assert found["adamw"].against_adamw is None


def test_methods_are_shown_on_the_seeds_that_most_have() -> None:
    rows = [
        # As many runs with both seeds as with the first alone, which both methods have.
        reported("adamw", {}, 0, "alpaca", answers=share(4)),
        reported("adamw", {}, 1, "alpaca", answers=share(9)),
        reported("sap", {}, 0, "alpaca", answers=share(6)),
        # Two methods have both seeds; Lisa has another one of its own.
        *(reported("adamw", {}, seed, "poisoned", answers=share(2)) for seed in (0, 1)),
        *(reported("sap", {}, seed, "poisoned", answers=share(8)) for seed in (0, 1)),
        *(reported("lisa", {}, seed, "poisoned", answers=share(3)) for seed in (0, 2)),
        # What AdamW has no run of is compared with nothing.
        reported("adamw", {}, 1, "gsm8k", answers=share(9)),
        *(reported("sap", {}, seed, "gsm8k", answers=share(5)) for seed in (0, 1, 2)),
    ]
    settings: dict[str, Any] = {"adamw": {}, "sap": {}, "lisa": {}}
    found = report.on_common_seeds(rows, settings)
    assert [(s.task, s.method, s.seeds, s.refused_harmful.mean) for s in found] == [
        ("alpaca", "adamw", (0,), 0.4),
        ("alpaca", "sap", (0,), 0.6),
        ("poisoned", "adamw", (0, 1), 0.2),
        ("poisoned", "sap", (0, 1), 0.8),
        ("gsm8k", "adamw", (1,), 0.9),
        ("gsm8k", "sap", (1,), 0.5),
    ]
    assert report.left_out(rows, settings, found) == ["Lisa (Alpaca, 10 % poisoned)"]


@pytest.mark.parametrize(
    ("figures", "met"),
    [
        ({"answers": share(10)}, True),
        ({"answers": share(9)}, False),
        ({"answers": share(10), "task_loss": 1.54}, False),
        ({"answers": share(10), "edgy": share(1)}, False),
    ],
)
def test_the_aim_is_met_in_all_three_or_not_at_all(figures: Any, met: bool) -> None:
    rows = [
        reported("aligned", {}, 0, "alpaca", answers=share(10)),
        reported("adamw", {}, 0, "alpaca", answers=share(4)),
        reported("sap", {}, 0, "alpaca", **figures),
    ]
    found = report.summarize(rows, {name: {} for name in ("aligned", "adamw", "sap")})
    assert [report.meets_the_aim(s, found[0]) for s in found if s.method == "sap"] == [met]


def test_the_report_shows_every_method_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(results, "LOOKS", tmp_path / "looks.csv")
    with pytest.raises(ValueError, match="make study"):
        report.write_report(tmp_path)
    ran = [
        ("shipped", {}),
        ("aligned", {}),
        ("adamw", {}),
        ("sap", {}),
        ("sap", {"probe_lr": 0.01}),
    ]
    for method, setting in ran:
        for task, seed in SELECTION:
            trained = method in ("adamw", "sap")
            figures = (
                {"step_seconds": 1.5, "peak_bytes": 2**30, "lean_predicted": 0.1} if trained else {}
            )
            run = run_of(method, setting, seed, task)
            results.append(
                results.RESULTS,
                [row(method, setting, task, seed, split=split, **figures) for split in data.SPLITS],
            )
            if trained:
                look = {"step": 10, "refused_harmful": 0.7, "margin": 1.0}
                results.append(results.LOOKS, [runs.described(run) | look])
    monkeypatch.setattr(results, "LANDSCAPE", tmp_path / "landscape.csv")
    points = [
        {
            "method": method,
            "direction": direction,
            "alpha": alpha,
            "refused_harmful": 0.5,
            "task_loss": 1.5,
        }
        for method in ("aligned", "sap")
        for direction in ("random 0", "random 1", "safety gradient", "fine-tuning")
        for alpha in (-0.1, 0.0, 0.1)
    ]
    results.append(results.LANDSCAPE, points)
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    for name in ("As published", "AdamW", "SAP", "Alpaca, 10 % poisoned", "the aim is met by"):
        assert name in page
    assert page.count("<figure>") == 6 and "{{" not in page
    for name in ("frontier.png", "landscape.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    summary = results.read(tmp_path / "summary.csv")
    settings = [(r["setting"], r["chosen"]) for r in summary if r["method"] == "sap"]
    assert settings == [("{}", "1"), ('{"probe_lr": 0.01}', "0")] * len(SELECTION)
    assert {(r["method"], r["task"]) for r in summary} == {
        (method, task) for method, _ in ran for task, _ in SELECTION
    }
    # Again over what is there.
    assert report.write_report(tmp_path).read_text(encoding="utf-8") == page
