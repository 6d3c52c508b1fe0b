"""The benchmark of whole steps, on tiny models: what it writes, and how it measures."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_step, provenance, step
from benchmarks.series import preset_period, ratio
from benchmarks.step import Case, Claim
from sap_fast.optimizer import FusedSAP

QUICK = Case("lora", "4x96", "fp32", quick=True)
SURROUNDINGS = {"date", "device", "torch", "transformers", "commit"}
SIZES = {
    f"{kind}_{what}"
    for kind in ("task", "probe", "safety")
    for what in ("tokens", "squares", "scored")
}
COLUMNS = {
    "time": {"setup", "batch", "dtype", "configuration", "period", "periods"}
    | {"median_s", "q25_s", "q75_s", "times_hf", "times_floor", "paper_over_this"}
    | {"h_difference", "h_difference_packed"}
    | SIZES,
    "memory": {"setup", "batch", "dtype", "configuration", "checkpointing"}
    | {"resident_mb", "tensors_mb", "kept_mb"}
    | SIZES,
    "allocations": {"dtype", "configuration", "parameters_mb", "kept_over_parameters"}
    | {"peak_over_parameters", "tensors_alive", "parameter_tensors"},
    "curves": {"axis", "value", "dtype", "configuration", "seconds", "tensors_mb"}
    | {"slope_seconds", "slope_tensors_mb"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    assert step.main(["--quick", "--only", "lora,4x96,fp32", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def read(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"step_{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def numbers(rows: list[dict[str, str]], *columns: str) -> list[float]:
    return [float(row[column]) for row in rows for column in columns]


def test_every_table_has_its_columns(folder: Path) -> None:
    for name, columns in COLUMNS.items():
        rows = read(folder, name)
        assert set(rows[0]) >= columns | SURROUNDINGS
    for name in ("time", "curves"):
        assert (folder / f"step_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_time_has_every_configuration_and_pass(folder: Path) -> None:
    rows = {row["configuration"]: row for row in read(folder, "time")}
    passes = ["safety pass", "probe pass", "task pass", "update"]
    assert list(rows) == [*step.CONFIGURATIONS, "passes alone", *passes]
    assert all(value > 0 for value in numbers(list(rows.values()), "median_s"))
    assert [rows[name]["period"] for name in ("paper", "balanced", "economical")] == [
        str(preset_period(name)) for name in ("paper", "balanced", "economical")
    ]
    assert float(rows["hf_adamw"]["times_hf"]) == float(rows["floor"]["times_floor"]) == 1
    assert rows["hf_adamw"]["safety_tokens"] == ""
    assert float(rows["naive"]["task_tokens"]) == 4 * 96
    # Of 4 rows, three quarters and half; random rows have nothing to merge but padding.
    scored = [float(rows[name]["probe_scored"]) for name in ("paper", "balanced", "economical")]
    assert scored == sorted(scored, reverse=True)
    assert scored[0] == float(rows["paper"]["task_scored"])


def test_h_of_the_naive_step_is_ours(folder: Path) -> None:
    naive = next(row for row in read(folder, "time") if row["configuration"] == "naive")
    # Measured: 9e-6 in either.
    assert 0 < float(naive["h_difference"]) < 1e-4
    assert 0 < float(naive["h_difference_packed"]) < 1e-4


def test_memory_shrinks_with_checkpointing(folder: Path) -> None:
    rows = {(r["configuration"], r["checkpointing"]): r for r in read(folder, "memory")}
    assert set(rows) == {(name, mode) for name in step.IN_MEMORY for mode in step.CHECKPOINTING}
    for name in step.IN_MEMORY:
        plain, checkpointed = (float(rows[name, m]["tensors_mb"]) for m in step.CHECKPOINTING)
        assert checkpointed < 0.7 * plain


def test_allocations_are_those_of_adamw(folder: Path) -> None:
    hf, floor, paper = read(folder, "allocations")
    # Two moments per parameter, and a gradient each.
    assert numbers([hf, floor, paper], "kept_over_parameters") == pytest.approx([2] * 3, abs=0.01)
    assert all(0.99 < value < 1.5 for value in numbers([hf, floor], "peak_over_parameters"))
    extra = numbers([paper], "peak_over_parameters")[0]
    assert extra <= numbers([floor], "peak_over_parameters")[0] + 0.02


def test_curves_have_both_configurations_along_each_axis(folder: Path) -> None:
    rows = read(folder, "curves")
    found = {(row["axis"], int(row["value"]), row["configuration"]) for row in rows}
    assert found == {
        (axis, value, name)
        for axis in ("length", "batch")
        for value in step.AXES[axis][:2]
        for name in ("floor", "paper")
    }
    assert all(value > 0 for value in numbers(rows, "seconds", "tensors_mb"))


def test_only_takes_cases_with_all_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main(["--only", "lora,fp16"])
    assert "--only lora,fp16: no case has these words" in capsys.readouterr().err


def test_memory_of_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    row = step.memory_in_a_process(QUICK, "hf_adamw", "layers")
    assert row["configuration"] == "hf_adamw"
    assert row["tensors_mb"] > 0
    # Code that is loaded at the first step, threads' stacks: some MB, not hundreds.
    assert 0 < row["resident_mb"] < 500
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="--measure-memory lora 4x96 fp32 paper none"):
        step.memory_in_a_process(QUICK, "paper", "none")


# ---- how it measures ----


def test_ratios_are_taken_in_the_same_rounds_over_whole_periods() -> None:
    above = {2: 1.0, 3: 3.0, 4: 2.0, 5: 6.0, 6: 100.0}
    below = {2: 1.0, 3: 1.0, 4: 2.0, 5: 2.0, 6: 1.0}
    assert ratio(above, below, 2) == 2.0  # (1+3)/2 and (2+6)/4; the last period is not whole
    assert ratio({2: 4.0, 5: 8.0}, below, 1) == 4.0


def test_peak_is_of_what_is_alive_at_once() -> None:
    assert step.peak([5, -5, 3, 4, -4]) == 7
    assert step.peak([]) == 0


def test_memory_events_see_what_is_allocated_and_released() -> None:
    def work() -> None:
        first = torch.ones(1000)
        del first
        torch.ones(2000)

    assert step.memory_events(work) == [4000, -4000, 8000, -8000]


def test_slope() -> None:
    assert step.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)


def test_batches_differ_from_step_to_step_and_not_from_call_to_call() -> None:
    data = step.load_data(96, True)
    first, second = step.batches(data, 4, 2)
    assert len(first) == len(second) == 4
    assert first != second
    assert step.batches(data, 4, 3)[:2] == [first, second]


def test_presets_do_their_passes_at_their_pace() -> None:
    step.start_case()
    run = step.build_run(QUICK, "balanced")
    period = preset_period("balanced")
    for rows in step.batches(step.load_data(96, True), 4, period + 1):
        run.step(run.prepare(rows))
    first, *between, again = [len(forwards) for forwards in run.sizes.steps[:]]
    # The first step also tests packing, twice.
    assert first > 4
    assert between == [3] * (period - 1)
    assert again == 4


def test_the_layers_that_are_probed() -> None:
    step.start_case()
    default = step.build_run(QUICK, "paper")
    middle = step.build_run(QUICK, "paper_middle")
    assert isinstance(default, step.TrainerRun) and isinstance(middle, step.TrainerRun)
    layers = [run.optimizer.probes.layers for run in (default, middle)]
    assert layers == [(0, 1), (1, 2)]
    assert tuple(step.probed_layers(step.build_model(QUICK))) == (0, 1)


def test_naive_pads_every_row() -> None:
    run = step.build_run(QUICK, "naive")
    rows = step.batches(step.load_data(96, True), 4, 1)[0]
    run.step(run.prepare(rows))
    assert run.sizes.steps == [[(8, 96), (4, 96), (4, 96), (4, 96)]]


def test_passes_alone_are_four_and_leave_the_model_as_it_was() -> None:
    step.start_case()
    run = step.build_run(QUICK, "passes alone")
    assert isinstance(run, step.PassesAlone)
    rows = step.batches(step.load_data(96, True), 4, 1)[0]
    run.step(run.prepare(rows))
    (safety,), (probe,), (task,), (update,) = run.seconds.values()
    assert run.sums() == [safety + 2 * probe + task + update]
    model: Any = run._run.model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 4
    assert not any(layer._forward_hooks for layer in run._layers.values())


def test_the_trainer_trains_as_its_own_loop() -> None:
    step.start_case()
    data = step.load_data(96, True)
    run = step.TrainerRun("paper", step.build_model(QUICK), data, bf16=False)
    assert isinstance(run.optimizer, FusedSAP)
    before = [p.detach().clone() for p in run.model.parameters() if p.requires_grad]
    batch = run.prepare(step.batches(data, 4, 1)[0])
    run.step(batch)
    run.step(batch)
    after = [p for p in run.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
    elements = sum(parameter.numel() for parameter in after)
    assert run.kept_bytes() == 8 * elements + 4 * len(after)  # two moments, and a counter each


# ---- the claims ----


def cell(name: str, **figures: Any) -> dict[str, Any]:
    return {"setup": "lora", "batch": "8x128", "dtype": "fp32", "configuration": name} | figures


def test_claims_on_time() -> None:
    table = [
        cell("paper", times_hf=2.7, paper_over_this=1.0),
        cell("balanced", times_hf=1.6, paper_over_this=1.0),
        cell("naive", times_hf=5.0, paper_over_this=0.25, h_difference=2e-3),
        cell("passes alone", times_hf=2.7, paper_over_this=1.04),
    ]
    assert [(c.claim, c.value, c.met) for c in step.claims({"time": table})] == [
        ("1 balanced ÷ HF AdamW", 1.6, True),
        ("1 paper ÷ HF AdamW", 2.7, False),
        ("2 h, dropout, unpacked", 2e-3, False),
        ("2 naive ÷ paper", 4.0, True),
        ("3 paper ÷ its passes", 1.04, True),
    ]


def test_claims_on_memory() -> None:
    table = [
        cell(name, checkpointing=mode, resident_mb=resident, tensors_mb=2 * resident)
        for mode, sizes in (("none", (100, 70, 72)), ("layers", (50, 49, 52)))
        for name, resident in zip(("hf_adamw", "floor", "paper"), sizes, strict=True)
    ]
    found = {(c.claim, c.where): (c.value, c.met) for c in step.claims({"memory": table})}
    for kind in ("resident", "tensors"):
        plain, saved = "lora 8x128 fp32 none", "lora 8x128 fp32 layers"
        assert found[f"4 {kind}: paper ÷ our AdamW", plain] == (1.029, True)
        assert found[f"4 {kind}: paper ÷ our AdamW", saved] == (1.061, False)
        assert found[f"4 {kind}: paper ÷ HF", plain] == (0.72, True)
        assert found[f"4 {kind}: paper ÷ HF", saved] == (1.04, False)
        assert found[f"4 {kind}: checkpointed ÷ not", saved] == (0.722, False)
    assert len(found) == 10


def test_claims_on_allocations_and_curves() -> None:
    allocations = [
        {"dtype": "bf16", "configuration": name, "kept_over_parameters": 2.0}
        | {"peak_over_parameters": peak}
        for name, peak in (("floor", 1.2), ("paper", 1.3))
    ]
    curves = [
        {"axis": "depth", "dtype": "fp32", "configuration": name}
        | {"slope_seconds": seconds, "slope_tensors_mb": 1.0}
        for name, seconds in (("floor", 0.9), ("paper", 0.94))
    ]
    found = step.claims({"allocations": allocations, "curves": curves})
    assert [(claim.claim, claim.where, claim.value, claim.met) for claim in found] == [
        ("5 kept: paper − AdamW, in parameters", "full bf16", 0.0, True),
        ("5 peak: paper − AdamW, in parameters", "full bf16", 0.1, False),
        ("6 slope of seconds: paper − AdamW", "depth fp32", 0.04, True),
        ("6 slope of tensors_mb: paper − AdamW", "depth fp32", 0.0, True),
    ]


@pytest.mark.parametrize(
    ("relation", "met"), [("≤", [True, True, False]), ("≥", [False, True, True])]
)
def test_a_claim_is_met_at_its_target(relation: str, met: list[bool]) -> None:
    assert [Claim("", "", value, relation, 1.0).met for value in (0.9, 1.0, 1.1)] == met


def test_what_is_measured_again_replaces_its_own_rows_only(tmp_path: Path) -> None:
    first = [
        {"dtype": dtype, "name": name, "old": 1} for dtype in ("fp32", "bf16") for name in "ab"
    ]
    provenance.write_rows("some.csv", first, tmp_path)
    before = list(csv.DictReader((tmp_path / "some.csv").open(encoding="utf-8", newline="")))
    again = [{"dtype": "fp32", "name": "a", "new": 2}]
    path = provenance.replace_rows("some.csv", again, ("dtype",), tmp_path)
    after = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    assert [{k: v for k, v in row.items() if k != "new"} for row in after[:2]] == before[2:]
    assert [(row["name"], row["old"], row["new"]) for row in after[2:]] == [("a", "", "2")]
    assert set(after[2]) >= SURROUNDINGS and list(after[2])[-1] == "commit"
    assert [file.name for file in tmp_path.iterdir()] == ["some.csv"]


def test_cases_are_kept_as_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(case: Case, rounds: int, tick: Any) -> list[dict[str, Any]]:
        if case.dtype == "bf16":
            raise KeyboardInterrupt
        return [case.facts() | {"configuration": "naive", "times_hf": 2.0, "median_s": 1.0}]

    monkeypatch.setattr(step, "measure_time", measured)
    monkeypatch.setattr(step, "probe_gradient_difference", lambda case, dropout: 0.0)
    arguments = ["--quick", "--table", "time", "--only", "lora,4x96", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        step.main(arguments)
    assert [row["dtype"] for row in read(tmp_path, "time")] == ["fp32"]


# ---- on a GPU ----


def test_the_benchmark_of_gpus_runs_every_configuration(tmp_path: Path) -> None:
    arguments = ["--quick", "--case", "1b-full", "--results", str(tmp_path)]
    assert gpu_step.main(arguments) == 0
    with (tmp_path / "gpu_step.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["configuration"] for row in rows] == list(gpu_step.CONFIGURATIONS)
    assert {row["checkpointing"] for row in rows} == {"layers"}
    assert all(float(row["median_s"]) > 0 and float(row["tflop_per_s"]) > 0 for row in rows)
    assert {row["configuration"]: row["periods"] for row in rows} == {
        "hf_adamw": "5",
        "adamw": "5",
        "paper": "5",
        "balanced": "1",
        "economical": "1",
    }


def test_the_benchmark_of_gpus_needs_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_step.main(["--results", str(tmp_path)]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_is_said_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = []

    def run_turn(name: str, *_: Any) -> tuple[dict[int, float], int]:
        ran.append(name)
        if name == "hf_adamw":
            raise torch.OutOfMemoryError
        return dict.fromkeys(range(10), 2.0 if name == "paper" else 1.0), 10**9

    monkeypatch.setattr(gpu_step, "run_turn", run_turn)
    case = gpu_step.Case(gpu_step.TINY, "full", "none")
    rows = {row["configuration"]: row for row in gpu_step.measure(case, 2, "cpu", 8)}
    assert ran.count("hf_adamw") == 1 and ran.count("paper") == 2
    assert rows["hf_adamw"]["fits"] == "no" and "median_s" not in rows["hf_adamw"]
    assert rows["paper"]["times_adamw"] == 2.0 and rows["paper"]["peak_gb"] == 1.0


def test_a_copy_of_the_files_says_which_commit_they_are_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAP_FAST_COMMIT", "abc1234")
    assert provenance.commit() == "abc1234"
