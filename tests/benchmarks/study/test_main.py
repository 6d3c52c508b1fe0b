"""The command of the study: interrupted, it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study import results, runs
from benchmarks.study.methods import SEEDS, run_of
from tests.benchmarks.study.helpers import everywhere, row


def test_an_interrupted_study_goes_on_and_runs_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(results, "LOOKS", tmp_path / "looks.csv")
    plan = [run_of("adamw", {}, seed, "alpaca") for seed in SEEDS]
    executed: list[Any] = []

    class Pool:
        """Executes at once, in this process."""

        def __init__(self, *_: Any, **__: Any) -> None: ...
        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: Any) -> None: ...

        def submit(self, _: Any, run: Any, split: Any, threads: int, looks: bool) -> Any:
            from concurrent.futures import Future

            executed.append((split, run))
            future: Any = Future()
            if failing and run == failing[0]:
                future.set_exception(RuntimeError("out of luck"))
            else:
                look = runs.described(run) | {"step": 10, "refused_harmful": 0.5, "margin": 1.0}
                found = row("adamw", {}, "alpaca", run.seed, split=split)
                future.set_result((found, [look] if looks else []))
            return future

    monkeypatch.setattr(study, "ProcessPoolExecutor", Pool)
    failing = [plan[1]]
    with pytest.raises(RuntimeError, match="out of luck"):
        study.run_all("selection", plan, 1, None)
    failing.clear()
    study.run_all("selection", plan, 1, 1)
    study.run_all("selection", plan, 2, None, looks=True)
    study.run_all("selection", plan, 2, None, looks=True)
    assert executed == [("selection", plan[k]) for k in (0, 1, 1, 2)]
    # What was asked for one split says nothing of the other.
    study.run_all("report", plan[:1], 1, None)
    assert executed[4:] == [("report", plan[0])]
    rows = results.read(tmp_path / "results.csv")
    assert results.finished(rows, "selection") == {run.key for run in plan}
    assert results.finished(rows, "report") == {plan[0].key}
    assert len(results.read(tmp_path / "looks.csv")) == 1
    assert {"commit", "device", "torch"} <= set(rows[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "adamw,magic"], "--only adamw,magic: 'magic' is not one of"),
        (["--tasks", "mmlu"], "--tasks mmlu: 'mmlu' is not one of alpaca"),
        (["--seeds", "7"], "--seeds 7: '7' is not one of 0, 1, 2"),
        (
            ["--model", "smollm2-full", "--only", "adamw,asft"],
            "--only adamw,asft: asft changes an adapter, and --model smollm2-full has none",
        ),
    ],
)
def test_what_is_not_in_the_plan_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        study.main(arguments)
    assert message in capsys.readouterr().err


def test_a_study_that_has_only_selected_has_nothing_to_report_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "FIRST", tmp_path / "first")
    monkeypatch.setattr(results, "RESULTS", tmp_path / "results.csv")
    monkeypatch.setattr(study.tables, "write_tables", lambda: None)
    selected = [*everywhere("aligned", {}), *everywhere("adamw", {})]
    results.append(tmp_path / "results.csv", selected)
    reported = [row(each["method"], {}, "alpaca", split="report") for each in selected[::3]]
    results.append(tmp_path / "first" / "results.csv", [*selected, *reported])
    written: list[Path] = []
    monkeypatch.setattr(study.report, "write_report", written.append)
    study.write_pages()
    assert written == [tmp_path / "first"]
