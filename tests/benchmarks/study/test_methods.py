"""What the study plans, and what a row is cached by."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from benchmarks.study import results
from benchmarks.study.methods import (
    EARLY,
    METHODS,
    OPTIMIZER,
    SEEDS,
    SELECTION,
    TASKS,
    TRAINING,
    Setting,
    options_of,
    report_runs,
    run_of,
    selection_runs,
)
from sap_fast import BlendedAdamW, FusedSAP, ProbeSet
from sap_fast.baselines import derta_loss
from sap_fast.integrations.trainer import SAPTrainerMixin

EVERY = [(name, setting) for name, method in METHODS.items() for setting in method.settings]


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


def test_rows_that_are_committed_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, precision in ((results.FIRST, "bf16-mixed"), (results.FOLDER, "fp32")):
        monkeypatch.setitem(TRAINING, "precision", precision)
        rows = results.read(folder / "results.csv")
        assert len(rows) >= {"bf16-mixed": 250, "fp32": 1}[precision]
        first = [(name, each) for name, method in METHODS.items() for each in method.first]
        keys = {
            (run := run_of(method, setting, seed, task)).key: run
            for method, setting in [*EVERY, *first]
            for seed in SEEDS
            for task in TASKS
        }
        assert len(keys) == (len(EVERY) + len(first)) * len(SEEDS) * len(TASKS)
        for row in [*rows, *results.read(folder / "looks.csv")]:
            run = keys[row["key"]]
            found = (run.method, run.setting, run.seed, run.task)
            assert found == tuple(row[name] for name in ("method", "setting", "seed", "task"))


def test_what_has_run_is_not_run_again() -> None:
    done = results.finished(results.read(results.RESULTS), "selection")
    assert done & {run.key for run in selection_runs(METHODS)}


@pytest.mark.parametrize(("method", "setting"), EVERY, ids=str)
def test_a_setting_is_one_of_the_package_of_today(method: str, setting: Setting) -> None:
    """Every word goes to an argument that is there."""
    trainer = METHODS[method].trainer
    options = options_of(run_of(method, setting, 0, "alpaca"))
    if trainer is None:
        return
    accepted = {
        name
        for kind in (trainer, SAPTrainerMixin)
        for name in inspect.signature(kind.__init__).parameters
    }
    assert set(options) <= accepted
    if not METHODS[method].has_probe:
        assert "probe" not in options
    else:
        probes = inspect.signature(ProbeSet).parameters
        assert {"layers", "size"} <= set(options["probe"]) <= set(probes)
    if "sap_options" in options:
        optimizer = BlendedAdamW if options.get("method") == "blend" else FusedSAP
        assert set(options["sap_options"]) <= set(inspect.signature(optimizer).parameters)
        # What is default today may not decide what a row means.
        assert set(OPTIMIZER) <= set(options["sap_options"]) and options["safety_loss"]


@pytest.mark.parametrize(
    ("method", "setting", "expected"),
    [
        (
            "adamw",
            {},
            {"method": "blend", "safety_loss": "contrastive", "sap_options": OPTIMIZER},
        ),
        (
            "blend",
            {"safety_weight": 0.3, "safety_level": "auto", "safety_loss": "joint"},
            {
                "method": "blend",
                "safety_loss": "joint",
                "sap_options": {"safety_weight": 0.3, "safety_level": "auto"},
            },
        ),
        (
            "sap",
            {"probe_layers": [1, 2], "rows": 0.25, "own_rows": True, "direction_every": 10},
            {
                "safety_loss": "contrastive",
                "probe": {"layers": [1, 2], "size": 3e-3, "rows": 0.25, "own_rows": True},
                "sap_options": {**OPTIMIZER, "direction_every": 10},
            },
        ),
        (
            "sap",
            {"probe_rule": "adam", "probe_lr": 0.05},
            {
                "safety_loss": "contrastive",
                "probe": {"layers": "middle", "size": 0.05, "rule": "adam"},
                "sap_options": OPTIMIZER,
            },
        ),
        ("lisa", {"proximal": 1.0}, {"proximal": 1.0}),
        (
            "safegrad",
            {"rule": "project", "safety_weight": 1.0, "safety_loss": "kl"},
            {
                "method": "blend",
                "safety_loss": "kl",
                "sap_options": {"rule": "project", "safety_weight": 1.0, "safety_level": None},
            },
        ),
        (
            "derta",
            {"safety_weight": 0.1, "safety_loss": "derta"},
            {
                "method": "blend",
                "safety_loss": derta_loss,
                "sap_options": {"safety_weight": 0.1, "safety_level": None},
            },
        ),
        ("merge", {"aligned_share": 0.3}, options_of(run_of("adamw", {}, 0, "alpaca"))),
    ],
)
def test_words_of_a_row_in_those_of_today(
    method: str, setting: Setting, expected: dict[str, Any]
) -> None:
    assert options_of(run_of(method, setting, 0, "alpaca")) == expected


def test_what_is_gone_stays_in_the_rows_and_is_not_run_again() -> None:
    rows = results.read(results.FIRST / "results.csv")
    ran = {(row["method"], row["setting"]) for row in rows}
    first = [(name, setting) for name, method in METHODS.items() for setting in method.first]
    for name, setting in first:
        run = run_of(name, setting, 0, "alpaca")
        assert (name, run.setting) in ran
        assert run not in set(selection_runs([name]))
    gone = [(n, s) for n, s in first if set(s) & {"schedule", "probe_shape", "preset"}]
    assert len(gone) == 5
    for name, setting in gone:
        with pytest.raises(ValueError, match="is no more to be had"):
            options_of(run_of(name, setting, 0, "alpaca"))


def test_another_model_has_rows_of_its_own_under_the_same_keys() -> None:
    mine, other = run_of("sap", {"probe_layers": EARLY}, 0, "alpaca"), "gemma3"
    theirs = run_of("sap", {"probe_layers": EARLY}, 0, "alpaca", other)
    assert mine != theirs and mine.key == theirs.key
    # Layers 1 to 9 of 30 are named, as another model has not as many.
    assert options_of(mine)["probe"]["layers"] == EARLY
    assert options_of(theirs)["probe"]["layers"] == "early"
    assert results.of_model(results.RESULTS, mine.model) == results.RESULTS
    apart = results.of_model(results.RESULTS, other)
    assert apart == results.FOLDER / other / results.RESULTS.name
    runs = [*selection_runs(METHODS, other), *report_runs({"sap": {}}, ["sentiment"], other)]
    assert {run.model for run in runs} == {other}
    assert {run.task for run in runs} == {*TASKS, "sentiment"}


def test_every_method_is_tried_before_any_is_tuned() -> None:
    planned = list(selection_runs(METHODS))
    assert len(set(planned)) == len(planned)
    assert len(planned) == len(SELECTION) * sum(len(m.settings) for m in METHODS.values())
    first = [run.method for run in planned[: len(SELECTION) * len(METHODS)]]
    assert set(first) == set(METHODS)
    reported = list(report_runs({"adamw": {}, "sap": {"probe_lr": 1e-3}}))
    assert len(reported) == 2 * len(SEEDS) * len(TASKS)
    assert {run.values.get("probe_lr") for run in reported if run.method == "sap"} == {1e-3}
