"""Fit, checks and predictions of the cost model, against times that it made up and those it has."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cost_model, predictions
from benchmarks.cost_model import Cost, Pass
from benchmarks.predictions import OPTIMIZERS, Speed
from benchmarks.provenance import RESULTS, read_rows
from tests.benchmarks.helpers import read

KINDS: tuple[Pass, ...] = ("safety", "probe", "task")


def test_fit_finds_the_rate_and_the_bandwidth() -> None:
    costs = [Cost(3e9, 1e9), Cost(1e9, 2e9), Cost(5e10, 1e9), Cost(0.0, 1e8)]
    machine = Speed(2e11, 1.5e10)
    speed = predictions.fit(costs, [machine.seconds(cost) for cost in costs])
    assert speed.flops == pytest.approx(2e11)
    assert speed.bandwidth == pytest.approx(1.5e10)


def test_fit_never_gives_a_negative_rate() -> None:
    # Twice the bytes in less time: bytes explain nothing.
    costs = [Cost(1e9, 1e9), Cost(1e9, 2e9), Cost(2e9, 1e9)]
    speed = predictions.fit(costs, [1.0, 0.9, 2.0])
    assert speed.bandwidth == math.inf
    assert speed.flops == pytest.approx(1e9, rel=0.05)


def test_recipes_order_and_more_gpus_hold_less_each() -> None:
    table = predictions.predict()
    for start in range(0, len(table), len(OPTIMIZERS)):
        rows = table[start : start + len(OPTIMIZERS)]
        adamw, blend, sap, fifth, tenth = rows
        assert adamw["times_adamw"] == 1.0
        if len({row["checkpointing"] for row in rows}) == 1:
            assert sap["step_s"] >= fifth["step_s"] >= tenth["step_s"]
            assert tenth["step_s"] >= blend["step_s"] >= adamw["step_s"]
    one, eight = (
        next(r for r in table if r["model"] == "Llama-3-8B" and r["gpus"] == n) for n in (1, 8)
    )
    assert eight["peak_gb_per_gpu"] < one["peak_gb_per_gpu"]
    # 70 B parameters in bf16 are 141 GB.
    large = [r for r in table if r["model"] == "Llama-3-70B" and r["gpus"] == 1]
    assert all(row["fits"] == "no" for row in large)


def test_probe_passes_end_at_the_lowest_probed_layer() -> None:
    row = {"setup": "lora", "batch": "4x96", "dtype": "fp32"}
    row |= {f"{kind}_{what}": "300" for kind in KINDS for what in ("tokens", "squares", "scored")}
    default, middle = (
        predictions.measured_job(row | {"configuration": name})
        for name in ("sap", "sap, middle layers")
    )
    # Of SmolLM2's 30 layers, 1 and 10 are the lowest that `ProbeSet` probes.
    assert (default.above_probe, middle.above_probe) == (28, 19)
    assert default.torch_adamw is middle.torch_adamw is False
    flops = [cost_model.step_cost(job).flops for job in (default, middle)]
    layer = cost_model.pass_flops(dataclasses.replace(default, lowest_probed=0), "probe")
    layer -= cost_model.pass_flops(default, "probe")
    assert flops[0] - flops[1] == pytest.approx(2 * 9 * layer)


def test_a_gpu_is_checked_against_what_is_predicted_for_it() -> None:
    names = {"model": "Llama-3-8B", "trained": "LoRA r=16 q,v", "checkpointing": "none"}
    (predicted,) = [
        row
        for row in predictions.predict()
        if row["gpus"] == 1 and row["configuration"] == "sap" and names.items() <= row.items()
    ]
    measured = {"median_s": str(predicted["step_s"]), "peak_gb": "20"}
    fits = names | {"configuration": "sap", "fits": "yes"} | measured
    seconds, peak = predictions.check_gpu([fits, names | {"fits": "no"}])
    assert seconds["met"] == "yes" and seconds["ratio"] == 1.0
    assert peak["met"] == "no" and peak["measured"] == 20.0
    # All logits at once are more to hold, and the loss of transformers has them.
    _, full = predictions.check_gpu([fits | {"configuration": "hf_adamw"}])
    assert full["predicted"] > peak["predicted"] + 5


def write_measured(folder: Path, factor: float) -> None:
    """Write the CSVs that a machine of 100 GFLOP/s and 10 GB/s would have measured."""
    sizes = {"task": (300, 3e4, 180), "safety": (240, 5e4, 150), "probe": (300, 3e4, 180)}
    rows: list[dict[str, Any]] = []
    for setup in ("lora", "full"):
        for name in ("hf_adamw", "sap", "published", "passes alone"):
            row: dict[str, Any] = {"setup": setup, "batch": "4x96", "dtype": "fp32"}
            row["configuration"] = name
            if name != "passes alone":
                for kind, values in sizes.items():
                    if name != "hf_adamw" or kind == "task":
                        names = (f"{kind}_{what}" for what in ("tokens", "squares", "scored"))
                        row |= dict(zip(names, map(str, values), strict=True))
                job = predictions.measured_job(row)
                row["median_s"] = Speed(1e11, 1e10).seconds(cost_model.step_cost(job))
                row["tensors_mb"] = factor * cost_model.step_memory(job) / 1e6
            rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for name in ("step_time.csv", "step_memory.csv"):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.3, 1)])
def test_the_script_checks_predicts_and_tells_what_is_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, status: int
) -> None:
    write_measured(tmp_path, factor)
    assert predictions.main(["--results", str(tmp_path)]) == status
    printed = capsys.readouterr().out
    assert "fp32: 100.0 GFLOP/s and 10.0 GB/s fitted" in printed
    assert "| Llama-3-8B | LoRA r=16 q,v | 1 |" in printed
    rows = read(tmp_path / "cost_model.csv")
    assert {row["kind"] for row in rows} == {"checked", "predicted"}
    seconds = [row for row in rows if row["what"] == "seconds"]
    assert len(seconds) == 6  # a pass alone is no step
    assert all(row["met"] == "yes" for row in seconds)


def test_rows_that_are_older_mean_what_they_meant() -> None:
    row = {"setup": "lora", "batch": "4x96", "dtype": "fp32"}
    row |= {f"{kind}_{what}": "300" for kind in KINDS for what in ("tokens", "squares", "scored")}
    for former, label in (("paper", "sap"), ("balanced", "sap, direction_every=5, rows=1/2")):
        jobs = [predictions.measured_job(row | {"configuration": n}) for n in (former, label)]
        assert jobs[0] == jobs[1]
    naive, published = (
        predictions.measured_job(row | {"configuration": name}) for name in ("naive", "published")
    )
    assert (naive.probe_passes, naive.frozen("probe")) == (2, False)
    assert (published.probe_passes, published.frozen("probe")) == (1, True)
    assert naive.full_logits and published.full_logits


def test_what_is_committed_is_predicted_as_the_docs_say() -> None:
    times = [r for r in read_rows(RESULTS / "step_time.csv") if r["task_tokens"]]
    sizes = [r for r in read_rows(RESULTS / "step_memory.csv") if r["task_tokens"]]
    checked = predictions.check_time(times) + predictions.check_memory(sizes)
    assert len(checked) == len(times) + len(sizes)
    missed = [row for row in checked if row["met"] == "no"]
    assert len(missed) <= 0.04 * len(checked)
    assert all(0.78 < row["ratio"] < 1.25 for row in checked)
