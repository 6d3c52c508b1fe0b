"""One run of the study, on a tiny model."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch

from benchmarks.study import data, lasting, results, runs
from benchmarks.study.methods import METHODS, TRAINING, run_of
from sap_fast.cli.models import add_lora, load_model
from sap_fast.data import Request


@pytest.mark.usefixtures("tiny_study")
def test_a_model_is_tuned_once_and_asked_for_each_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "LOOK_EVERY", 1)
    monkeypatch.setitem(TRAINING, "learning_rate", 0.1)
    adamw = run_of("adamw", {}, 0, "alpaca")
    selection, looks = runs.execute(adamw, "selection", 1, looked_at=True)
    monkeypatch.delattr(runs, "tune")
    reported, unseen = runs.execute(adamw, "report", 1)
    found = [
        runs.execute(run_of(*given, 0, "alpaca"), "selection", 1)[0]["task_loss"]
        for given in (
            ("aligned", {}),
            ("merge", {"aligned_share": 0.0}),
            ("merge", {"aligned_share": 1.0}),
            ("adamw", {"aligned_share": 1.0}),
            ("start", {"start_tokens": 200, "start_share": 1.0}),
            ("start", {"start_tokens": 2, "start_share": 0.0}),
        )
    ]
    assert [look["step"] for look in looks] == [1] and unseen == []
    assert list(selection) == list(reported)
    for name in ("key", "steps", "step_seconds", "peak_bytes", "lean_predicted"):
        assert selection[name] == reported[name], name
    assert (selection["split"], reported["split"]) == ("selection", "report")
    assert len(selection["harmful_refusals"]) == 100 and len(reported["harmful_refusals"]) == 220
    aligned, untouched, merged, likewise, started, not_started = found
    assert started == pytest.approx(aligned, abs=1e-4)
    assert not_started == pytest.approx(selection["task_loss"], abs=1e-4)
    assert likewise == merged
    assert untouched == selection["task_loss"] != aligned
    assert merged == pytest.approx(aligned, abs=1e-3)


@pytest.mark.usefixtures("tiny_study")
def test_every_weight_is_tuned_and_read_back(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned: list[Any] = []
    kl_loss = runs.kl_loss

    def counted(model: Any, chosen: Any, rejected: Any, *, aligned_model: Any) -> Any:
        aligned.append(aligned_model)
        return kl_loss(model, chosen, rejected, aligned=aligned_model)

    monkeypatch.setattr(
        runs, "kl_loss", lambda *batches, aligned: counted(*batches, aligned_model=aligned)
    )
    kl = run_of("kl", {"safety_weight": 0.3, "safety_loss": "kl"}, 0, "alpaca", "smollm2-full")
    selection, _ = runs.execute(kl, "selection", 1)
    monkeypatch.delattr(runs, "tune")
    again, _ = runs.execute(kl, "selection", 1)
    back = run_of("kl", json.loads(kl.setting) | {"aligned_share": 1.0}, 0, "alpaca", kl.model)
    merged, _ = runs.execute(back, "selection", 1)
    start, _ = runs.execute(run_of("aligned", {}, 0, "alpaca", kl.model), "selection", 1)
    assert len(aligned) == 2 and aligned[0] is aligned[1]
    assert selection["task_loss"] == again["task_loss"] != start["task_loss"]
    assert merged["task_loss"] == start["task_loss"]
    before = load_model(str(chat_model), "fp32")[0].state_dict()
    assert runs.folder_of(kl).parent == tmp_path / "smollm2-full" / "adapters"
    tuned = load_model(str(runs.folder_of(kl)), "fp32")[0].state_dict()
    assert tuned.keys() == before.keys()
    assert not any(torch.equal(tuned[name], before[name]) for name in tuned)
    for name, weight in load_model(str(chat_model), "fp32")[0].named_parameters():
        copied = dict(aligned[0].named_parameters())[name]
        assert torch.equal(copied, weight) and not copied.requires_grad


@pytest.mark.usefixtures("tiny_study")
def test_what_somebody_else_makes_of_a_tuned_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "LASTING", tmp_path / "lasting.csv")
    monkeypatch.setattr(lasting, "STEPS", 2)
    monkeypatch.setattr(lasting, "AFTERWARDS", ("", "alpaca"))
    run = run_of("adamw", {}, 0, "alpaca")
    tuned: list[Any] = []
    tune = runs.tune

    def counted(*arguments: Any) -> Any:
        tuned.append(arguments[0])
        return tune(*arguments)

    monkeypatch.setattr(runs, "tune", counted)
    monkeypatch.setattr(lasting, "tune", counted)
    monkeypatch.setattr(lasting, "builtin", lambda kind: [Request(f"A {kind} request")])
    lasting.run_lasting([run], 1)
    lasting.run_lasting([run], None)
    lasting.run_lasting([run], None)
    assert [(r.seed, r.training["steps"]) for r in tuned] == [(0, 2), (100, 2)]
    rows = results.read(results.LASTING)
    assert [row["afterwards"] for row in rows] == ["", "alpaca"]
    first, second = rows
    assert first["margin"] != second["margin"] != second["builtin_margin"]
    assert len(first["harmful_refusals"]) == 220 and len(first["builtin_harmful_refusals"]) == 1


def test_the_time_of_a_step_counts_the_passes_of_others() -> None:
    assert runs.seconds_of_a_step([9.0, 1.0, 2.0, 4.0], {}) == 2.0
    # Two directions of three steps each, and a step more.
    seconds = [9.0, 3.0, 3.0, *(1.0, 1.0, 4.0), *(1.0, 1.0, 7.0), 1.0]
    assert runs.seconds_of_a_step(seconds, {"direction_every": 3}) == 2.5
    assert runs.seconds_of_a_step(seconds[:5], {"direction_every": 3}) == 1.0


def test_the_right_of_two_choices_is_the_likelier_one(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "WORK", tmp_path)
    task = data.load_task("sentiment")
    rows = {"positive": torch.zeros(200), "negative": torch.tensor([-1.0, 1.0]).repeat(100)}

    def scores(model: Any, encoded: Any, **_: Any) -> torch.Tensor:
        assert len(encoded) == 200
        return rows.pop(next(iter(rows)))

    monkeypatch.setattr(runs, "score_rows", scores)
    _, tokenizer = load_model(str(chat_model), "fp32", trainable=False)
    # Row k of the split is positive where k is even.
    assert runs.right_choices(torch.nn.Identity(), tokenizer, task, "selection") == 1.0


def test_what_a_merge_starts_from() -> None:
    held = {"safety_level": "auto", "safety_weight": 0.3}
    blend = run_of("blend", held, 1, "gsm8k")
    assert runs.tuning_of(blend) == blend
    assert runs.tuning_of(run_of("blend", held | {"aligned_share": 0.2}, 1, "gsm8k")) == blend
    adamw = run_of("adamw", {}, 1, "gsm8k", "gemma3")
    merged = run_of("merge", {"aligned_share": 0.2}, 1, "gsm8k", "gemma3")
    projected = run_of("safelora", {"threshold": 0.5}, 1, "gsm8k", "gemma3")
    started = run_of("start", {"start_tokens": 2, "start_share": 1.0}, 1, "gsm8k", "gemma3")
    assert {runs.tuning_of(run) for run in (merged, projected, started)} == {adamw}
    assert runs.folder_of(adamw).parent == runs.WORK / "gemma3" / "adapters"


@pytest.mark.usefixtures("tiny_study")
def test_two_runs_of_one_tuning_at_once_tune_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned: list[Any] = []
    tune = runs.tune

    def counted(*arguments: Any) -> Any:
        tuned.append(arguments[0])
        return tune(*arguments)

    monkeypatch.setattr(runs, "tune", counted)
    # The study has a process for each; what loads or tests a model is for one thread at a time.
    alone = Lock()

    def one_at_a_time(function: Any) -> Any:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            with alone:
                return function(*arguments, **options)

        return wrapped

    for name in ("load_model", "measure"):
        monkeypatch.setattr(runs, name, one_at_a_time(getattr(runs, name)))
    with ThreadPoolExecutor(2) as pool:
        shares = (0.3, 0.7)
        merges = [run_of("merge", {"aligned_share": share}, 0, "alpaca") for share in shares]
        rows = list(pool.map(lambda run: runs.execute(run, "selection", 1)[0], merges))
    assert tuned == [run_of("adamw", {}, 0, "alpaca")]
    assert [row["key"] for row in rows] == [run.key for run in merges]


@pytest.mark.parametrize(
    ("text", "value"), [("so #### 42", 42.0), ("#### 1,234.5 done", 1234.5), ("#### -3.", -3.0)]
)
def test_the_answer_of_a_solution_is_read(text: str, value: float) -> None:
    assert runs.number(runs._ANSWER.findall(text)[-1]) == value


EARLY = {"probe_layers": [0, 1]}


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        ("sap", EARLY | {"rows": 0.5, "direction_every": 5}),
        ("blend", {"safety_weight": 0.3, "safety_level": "auto", "safety_loss": "joint"}),
        ("along", EARLY),
        ("safegrad", {"rule": "project", "safety_weight": 1.0, "safety_loss": "kl"}),
        *(
            pytest.param(method, setting, marks=pytest.mark.slow)
            for method, setting in (
                ("sap", {"safety_batch_size": 2, "probe_rule": "adam", "probe_lr": 0.05}),
                ("blend", {"safety_weight": 0.1, "direction_every": 5, "varied_openings": True}),
                ("sap+blend", EARLY | {"safety_weight": 0.3, "safety_level": "auto"}),
                ("mixed", {"refusal_weight": 0.1}),
                ("random", {}),
                ("averaging", EARLY | {"averaged": "direction"}),
                ("sam", {"radius": 0.05}),
                ("lisa", {"alignment_steps": 1, "task_steps": 9, "proximal": 1.0}),
                ("panacea", {"radius": 1.0, "harm_weight": 0.001}),
                ("derta", {"safety_weight": 0.1, "safety_loss": "derta"}),
                ("constrained", {}),
                ("ema", {"decay": 0.9}),
                ("asft", {"penalty": 1.0}),
                ("interleaved", {"share": 0.2}),
                ("published", {}),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_of_the_rows_still_tunes(
    method: str,
    setting: dict[str, Any],
    chat_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runs, "WORK", tmp_path)
    monkeypatch.setitem(TRAINING, "steps", 5)  # after which the trainer logs
    run = run_of(method, setting, 0, "alpaca")
    model, tokenizer = load_model(str(chat_model), "fp32", trainable=True)
    before_alignment = {name: w + 1e-3 for name, w in model.state_dict().items()}
    monkeypatch.setattr(runs, "unaligned_weights", lambda model: before_alignment)
    model = add_lora(model, r=2, alpha=4, dropout=0.1, targets=None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    figures, looks = runs.tune(run, data.load_task("alpaca"), model, tokenizer, False)
    trained = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert trained and all("lora" in name for name in trained)
    assert figures["step_seconds"] > 0 and looks == []
    if "safety_level" not in setting:  # the step that is logged may be held
        # The lean of a probe is known where there is one.
        assert (figures["lean_predicted"] is not None) == METHODS[method].has_probe
