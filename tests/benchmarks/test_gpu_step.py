"""The benchmark of whole steps on GPUs, on a tiny model and without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_step
from benchmarks.provenance import gpu_name
from benchmarks.workloads import TINY, period_of
from tests.benchmarks.helpers import read


def test_every_configuration_runs(tmp_path: Path) -> None:
    arguments = ["--quick", "--case", "1b-full", "--results", str(tmp_path)]
    assert gpu_step.main(arguments) == 0
    rows = read(tmp_path / f"gpu_step-{gpu_name()}.csv")
    assert [row["configuration"] for row in rows] == list(gpu_step.CONFIGURATIONS)
    assert {row["checkpointing"] for row in rows} == {"layers"}
    assert all(float(row["median_s"]) > 0 and float(row["tflop_per_s"]) > 0 for row in rows)
    for row in rows:
        period = period_of(row["configuration"])
        assert int(row["periods"]) == (gpu_step.STEPS if period == 1 else 1)


def test_it_needs_a_gpu(
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
        return dict.fromkeys(range(10), 2.0 if name == "sap" else 1.0), 10**9

    monkeypatch.setattr(gpu_step, "run_turn", run_turn)
    case = gpu_step.Case(TINY, "full", "none")
    rows = {row["configuration"]: row for row in gpu_step.measure(case, 2, "cpu", 8)}
    assert ran.count("hf_adamw") == 1 and ran.count("sap") == 2
    assert rows["hf_adamw"]["fits"] == "no" and "median_s" not in rows["hf_adamw"]
    assert rows["sap"]["times_adamw"] == 2.0 and rows["sap"]["peak_gb"] == 1.0
