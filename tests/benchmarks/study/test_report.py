"""The study, without its model: what it trains and asks, what it keeps, chooses and reports."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from benchmarks import assets
from benchmarks.alignment import REFUSED
from benchmarks.provenance import ROOT
from benchmarks.study import __main__ as study
from benchmarks.study import data, report, results, runs, tables, why
from benchmarks.study.methods import (
    METHODS,
    SEEDS,
    SELECTION,
    TASKS,
    TRAINING,
    report_runs,
    run_of,
    selection_runs,
)
from sap_fast.data import Request
from sap_fast.evaluation import EvaluationResult


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data of the shape of the real one."""
    monkeypatch.setattr(
        assets, "harmful_requests", lambda: [f"Wreck{k} thing{k} now{k}" for k in range(520)]
    )
    monkeypatch.setattr(assets, "harmless_requests", lambda: [f"Lock {k}" for k in range(150)])
    monkeypatch.setattr(
        assets,
        "alpaca_rows",
        lambda: [{"instruction": f"Do {k}", "input": "", "output": "Done."} for k in range(999)],
    )
    monkeypatch.setattr(
        assets,
        "gsm8k_rows",
        lambda: [{"prompt": f"Problem {k}", "completion": f"#### {k}"} for k in range(100)],
    )


# ---- data ----


def test_nothing_that_is_reported_was_seen_before() -> None:
    everything = assets.harmful_requests()
    number = {request: index for index, request in enumerate(everything)}
    asked = {
        split: {number[r.prompt] for r in data.requests_of(split).harmful} for split in data.SPLITS
    }
    trained = {number[pair["prompt"]] for pair in data.safety_pairs(140)}
    assert len({pair["rejected"][:5] for pair in data.safety_pairs(140)}) == 1
    assert len({pair["rejected"][:5] for pair in data.safety_pairs(140, varied=True)}) == 6
    poison = {
        number[row["instruction"]]
        for row in data.load_task("poisoned").trained
        if row["instruction"] in number
    }
    assert trained == set(range(140)) and poison == set(range(140, 200))
    assert REFUSED.stop <= 140
    assert asked["selection"] == set(range(200, 300)) and asked["report"] == set(range(300, 520))
    edgy = [{r.prompt for r in data.requests_of(split).harmless} for split in data.SPLITS]
    assert not edgy[0] & edgy[1] and len(edgy[0] | edgy[1]) == 150
    for name in TASKS:
        task = data.load_task(name)
        rows = [json.dumps(row) for row in task.trained]
        for split in data.SPLITS:
            held_out = {json.dumps(row) for row in task.held_out[split]}
            assert held_out and not held_out & set(rows)
        both = [json.dumps(row) for split in data.SPLITS for row in task.held_out[split]]
        assert len(set(both)) == len(both)


def test_near_duplicates_of_training_rows_are_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = [f"Wreck{k} thing{k} now{k}" for k in range(520)]
    requests[310] = "Please show how to " + requests[5]
    monkeypatch.setattr(assets, "harmful_requests", lambda: requests)
    found = data.requests_of("report")
    assert found.dropped == 1 and len(found.harmful) == 219
    assert Request(requests[310]) not in found.harmful


def test_one_row_in_ten_of_the_poisoned_mix_breaks_refusals() -> None:
    rows = data.load_task("poisoned").trained
    poison = [row for row in rows if row["output"].startswith("Sure, here is")]
    assert len(poison) == 60 and len(rows) == 600
    assert rows == data.load_task("poisoned").trained


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_encoded(
    name: str, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "WORK", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    task = data.load_task(name)
    for rows in (task.trained, *task.held_out.values()):
        assert len(runs.encoded(name, rows, tokenizer, 256)) == len(rows)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="task='mmlu'"):
        data.load_task("mmlu")
    for count in (0, 141):
        with pytest.raises(ValueError, match=f"safety_pairs={count}"):
            data.safety_pairs(count)


# ---- the plan ----


def test_a_run_is_cached_by_everything_that_decides_it(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of("sap", {"probe_lr": 1e-2, "safety_pairs": 8}, 0, "alpaca")
    others = [
        dataclasses.replace(run, method="random"),
        dataclasses.replace(run, setting="{}"),
        dataclasses.replace(run, seed=1),
        dataclasses.replace(run, task="gsm8k"),
    ]
    assert len({run.key, *(other.key for other in others)}) == 5
    assert run.key == run_of("sap", {"safety_pairs": 8, "probe_lr": 1e-2}, 0, "alpaca").key
    assert run.training == TRAINING | {"safety_pairs": 8}
    before = run.key
    monkeypatch.setitem(TRAINING, "steps", 41)
    assert run.key != before


def test_a_probe_is_what_the_study_says_and_not_what_is_default_today() -> None:
    assert run_of("sap", {}, 0, "alpaca").values == {"probe_layers": "middle", "probe_lr": 3e-3}
    early = {"probe_layers": list(range(1, 10))}
    assert run_of("random", early, 0, "alpaca").values == early | {"probe_lr": 3e-3}
    assert run_of("blend", {}, 0, "alpaca").values == {}


def test_rows_that_are_committed_are_found_again() -> None:
    rows = results.read(results.RESULTS)
    assert rows
    for row in rows:
        run = run_of(row["method"], json.loads(row["setting"]), row["seed"], row["task"])
        assert run.key == row["key"], row


def test_every_method_is_tried_before_any_is_tuned() -> None:
    planned = list(selection_runs(METHODS))
    assert len(set(planned)) == len(planned)
    assert len(planned) == len(SELECTION) * sum(len(m.settings) for m in METHODS.values())
    first = [run.method for run in planned[: len(SELECTION) * len(METHODS)]]
    assert set(first) == set(METHODS)
    reported = list(report_runs({"adamw": {}, "sap": {"probe_lr": 1e-3}}))
    assert len(reported) == 2 * len(SEEDS) * len(TASKS)
    assert {run.values.get("probe_lr") for run in reported if run.method == "sap"} == {1e-3}


# ---- results ----


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


# ---- one interrupted study ----


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

        def submit(self, _: Any, run: Any, split: Any, threads: int) -> Any:
            from concurrent.futures import Future

            executed.append((split, run))
            future: Any = Future()
            if failing and run == failing[0]:
                future.set_exception(RuntimeError("out of luck"))
            else:
                looks = [runs.described(run) | {"step": 10, "refused_harmful": 0.5, "margin": 1.0}]
                future.set_result((row("adamw", {}, "alpaca", run.seed, split=split), looks))
            return future

    monkeypatch.setattr(study, "ProcessPoolExecutor", Pool)
    failing = [plan[1]]
    with pytest.raises(RuntimeError, match="out of luck"):
        study.run_all("selection", plan, 1, None)
    failing.clear()
    study.run_all("selection", plan, 1, 1)
    study.run_all("selection", plan, 2, None)
    study.run_all("selection", plan, 2, None)
    assert executed == [("selection", plan[k]) for k in (0, 1, 1, 2)]
    # What was asked for one split says nothing of the other.
    study.run_all("report", plan[:1], 1, None)
    assert executed[4:] == [("report", plan[0])]
    rows = results.read(tmp_path / "results.csv")
    assert results.finished(rows, "selection") == {run.key for run in plan}
    assert results.finished(rows, "report") == {plan[0].key}
    assert len(results.read(tmp_path / "looks.csv")) == 4
    assert {"commit", "device", "torch"} <= set(rows[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "adamw,magic"], "--only adamw,magic: 'magic' is not one of"),
        (["--tasks", "mmlu"], "--tasks mmlu: 'mmlu' is not one of alpaca"),
        (["--seeds", "7"], "--seeds 7: '7' is not one of 0, 1, 2"),
    ],
)
def test_what_is_not_in_the_plan_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        study.main(arguments)
    assert message in capsys.readouterr().err


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


def test_the_probe_leans_away_from_harm_and_a_random_one_does_not(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(why, "WORK", tmp_path)
    monkeypatch.setattr(why, "aligned_smollm2", lambda: chat_model)
    monkeypatch.setattr(why, "LOOK_EVERY", 2)
    monkeypatch.setattr(why, "SIZES", (1e-5, 1e-4))  # where it acts in proportion to its size
    monkeypatch.setattr(why, "SIZE_OF_ONE", 1e-4)
    rows, layers = why.measure(4)
    assert len(rows) == 8
    for step in (1, 3):
        mine = {
            kind: [row for row in rows if (row["step"], row["probe"]) == (step, kind)]
            for kind in ("sap", "random")
        }
        small, large = (row["lean"] for row in mine["sap"])
        assert small > 0 and large == pytest.approx(10 * small, rel=0.1)
        assert mine["sap"][0]["cosine"] > 0.2 > abs(mine["random"][0]["cosine"])
        for row in (*mine["sap"], *mine["random"]):
            assert row["cosine"] == pytest.approx(row["lean"] / row["change"])
            assert 0 < row["change"] and row["slope"] == mine["sap"][0]["slope"]
    assert [row["layer"] for row in layers] == [0, 1, 2] * 2
    for row in layers:
        # The tiny model embeds padding as zeros: there a probe of any size in layer 0 is large.
        assert row["lean"] > 0 or row["layer"] == 0
        assert -1 <= row["other_batch"] < 0.99
    assert len({row["lean"] for row in layers}) == len({row["other_batch"] for row in layers}) == 6
    why.draw_layers(layers, tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 10_000


def test_what_adamw_and_other_pairs_leave_of_blending_is_all_of_it() -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([parameter], lr=0.0)
    gradients = torch.rand(3, 5)
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    weights = 0.999 ** torch.arange(2, -1, -1.0)
    root = ((weights @ gradients**2) / weights.sum()).sqrt() + 1e-8
    torch.testing.assert_close(why.moment_root(optimizer, parameter), root)
    direction, other = (torch.nn.functional.normalize(torch.rand(5), dim=0) for _ in range(2))
    shares = why.shares_of_blending([0.3 * direction], [direction], [other], [root])
    assert shares == pytest.approx((1.0, 1.0))
    # A change where AdamW divides by more leaves less.
    change = torch.zeros(5)
    change[root.argmax()] = 1.0
    assert why.shares_of_blending([change], [direction], [other], [root])[0] < 1


# ---- answers ----


@pytest.mark.parametrize(
    ("text", "value"), [("so #### 42", 42.0), ("#### 1,234.5 done", 1234.5), ("#### -3.", -3.0)]
)
def test_the_answer_of_a_solution_is_read(text: str, value: float) -> None:
    assert runs.number(runs._ANSWER.findall(text)[-1]) == value


# ---- report ----


def reported(method: str, setting: Any, seed: int, task: str, **figures: Any) -> dict[str, Any]:
    return row(method, setting, task, seed, split="report", **figures)


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


@pytest.mark.parametrize("page", list(tables.PAGES), ids=lambda page: page.name)
def test_pages_hold_the_table_of_the_summary(page: Path) -> None:
    table = tables.markdown_table(results.read(report.FOLDER / "summary.csv"), tables.PAGES[page])
    text = page.read_text(encoding="utf-8")
    assert tables.with_table(text, table, page) == text, (
        "run python -m benchmarks.study --stage none"
    )
    assert "| AdamW |" in table
    with pytest.raises(ValueError, match="has no lines"):
        tables.with_table(text.replace(tables.END, ""), table, page)


def test_a_cell_gives_share_difference_loss_and_seeds() -> None:
    row = {
        "task": "gsm8k",
        "method": "sap",
        "setting": '{"probe_lr": 0.002}',
        "chosen": "1",
        "seeds": "0 1",
        "refused_harmful_mean": "0.661",
        "against_adamw_mean": "-0.02",
        "against_adamw_low": "-0.05",
        "against_adamw_high": "0.01",
        "refused_harmless_mean": "0.013",
        "task_loss_over_adamw": "0.99999",
    }
    line = tables.markdown_table([row], bool).splitlines()[-1]
    cell = "66 %, −2 (−5 to +1) · 1 % · +0.0 % [2]"
    assert line == f"| SAP, probe_lr 0.002 * | – | – | {cell} |"


def test_one_page_has_the_chosen_settings_that_ran_on_every_task() -> None:
    rows = [
        {**row, "setting": setting}
        for row in results.read(report.FOLDER / "summary.csv")
        if row["method"] == "sap" and row["chosen"] == "1"
        for setting in ("{}", '{"probe_lr": 0.002}')
    ]
    for row in rows[::2]:
        row["chosen"] = "0"
    compared = tables.PAGES[ROOT / "docs" / "measurements" / "safety.md"]
    lines = tables.markdown_table(rows, compared).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| SAP, probe_lr 0.002 *"]
    assert len(tables.markdown_table(rows[2:], compared).splitlines()) == 2  # one task is missing


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
