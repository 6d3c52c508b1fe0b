"""The run on a GPU, dry: tiny shapes on the CPU; what is done is not done again."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import checks, kernels, operations, parts, passes, steps, worker
from benchmarks.gpu import llama as cases
from benchmarks.gpu.__main__ import NAMES, Supervisor, main
from benchmarks.gpu.kernels import Kernel
from benchmarks.gpu.parts import Part, Setting, Stage
from benchmarks.provenance import gpu_name
from tests.benchmarks.helpers import SURROUNDINGS, read


@pytest.fixture(autouse=True)
def known_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAP_FAST_COMMIT", "abc")
    # A look through all that Python holds takes longer than a part does here.
    monkeypatch.setattr(gc, "collect", lambda: 0)


def setting(folder: Path, left: float = 600) -> Setting:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Setting(device, True, folder, time.monotonic() + left, lambda rows: None)


def dry_run(folder: Path, stage: str) -> list[dict[str, str]]:
    arguments = ["--dry-run", "--output", str(folder), "--left", "600", "--stage", stage]
    assert worker.main(arguments) == 0
    rows = read(folder / f"gpu_{stage}-{gpu_name()}.csv")
    assert [row for row in rows if row.get("error")] == []
    assert {row["part"] for row in rows} == {part.name for part in worker.STAGES[stage].parts}
    return rows


def test_the_command_knows_the_stages() -> None:
    assert list(NAMES) == list(worker.STAGES)
    budgets = [part.budget_s for stage in worker.STAGES.values() for part in stage.parts]
    assert sum(budgets) < 800, "most parts end sooner; the least worth are left out"


# ---- every stage, dry ----


def test_ceilings(tmp_path: Path) -> None:
    rows = dry_run(tmp_path, "ceilings")
    assert {"copy", "triad", "bf16 product of 64³"} < {row["what"] for row in rows}
    assert all(float(row["value"]) > 0 for row in rows)


def check_passes(rows: Sequence[Mapping[str, Any]]) -> None:
    assert sorted(row["pass"] for row in rows) == sorted(
        [*passes.COUNTED, "AdamW(fused=True)", "update"]
    )
    for row in rows:
        assert float(row["wall_ms"]) >= float(row["host_ms"]) > 0
        assert float(row["busy_ms"]) > 0 and int(row["kernels"]) > 10
        assert (row["tflop_per_s"] != "") == (row["pass"] in passes.COUNTED)
    assert all(float(row["products_ms"]) > 0 for row in rows if row["pass"] in passes.COUNTED)


def test_passes(tmp_path: Path) -> None:
    check_passes(passes.measure("8b-lora", setting(tmp_path)))


@pytest.mark.slow
def test_the_command_runs_all_of_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--output", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    found = {}
    for name, stage in worker.STAGES.items():
        rows = found[name] = read(tmp_path / stage.csv)
        assert all(f"{name}/{part.name}: " in said for part in stage.parts)
        assert list(dict.fromkeys(row["part"] for row in rows)) == [p.name for p in stage.parts]
        assert not any(row.get("error") for row in rows)
        assert all(row.keys() >= SURROUNDINGS for row in rows)
        columns = {column for row in rows for column in row}
        # Of a CPU there is no memory to tell.
        assert columns >= set(stage.columns) - {"reserved_gb", "message"}
    # Nothing is left to do.
    assert main(["--dry-run", "--output", str(tmp_path)]) == 0
    assert "begin " not in capfd.readouterr().out

    for case in cases.CASES:
        check_passes([row for row in found["passes"] if row["part"] == case])
    assert "skipped" in found["checks"][0]["outcome"] or torch.cuda.is_available()

    plain = [row["method"] for row in found["steps"] if row["base"] == "plain"]
    assert plain == 2 * list(steps.METHODS) and len(found["steps"]) == 2 * len(plain)
    for row in found["steps"]:
        assert float(row["step_s"]) > 0 and float(row["tokens_per_s"]) > 0
        if row["method"] == "HF's loss":
            assert float(row["times_base"]) == 1.0
        if row["method"] == "our loss":
            assert float(row["times_our_adamw"]) == 1.0

    names = {row["operation"] for row in found["operations"]}
    assert names >= {"sum_squares", "reflect_", "adamw_blend_, blended", "probe_add"}
    for row in found["operations"]:
        # Many small tensors are not limited by the bandwidth.
        large = row["lists"] in ("large", "hidden states")
        for backend in operations.BACKENDS:
            assert float(row[f"{backend}_ms"]) >= 0 and float(row[f"{backend}_call_ms"]) >= 0
            assert (row[f"{backend}_of_triad"] != "") == large

    snapshot, *estimates = found["memory"]
    assert int(snapshot["allocations"]) > 100
    exact = [float(row["cosine"]) for row in estimates if row["arithmetic"] == "fp32"]
    assert exact and min(exact) > 0.999
    assert all(float(row["cosine"]) > 0.9 for row in estimates)


# ---- what is due, and when ----


def stage_of(*measured: Any, budget_s: float = 10) -> Stage:
    named = [Part(f"p{k}", budget_s, measure) for k, measure in enumerate(measured)]
    return Stage("made up", ("part", "figure"), named)


def run(stage: Stage, folder: Path, *skipped: str, left: float = 600) -> list[str]:
    said: list[str] = []
    parts.run_stage(stage, setting(folder, left), skipped, said.append)
    return said


def test_a_part_that_has_rows_of_this_commit_is_not_run_again_and_one_that_failed_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def good(_: Setting) -> list[dict[str, Any]]:
        ran.append(0)
        return [{"figure": 1}]

    def bad(_: Setting) -> list[dict[str, Any]]:
        ran.append(1)
        raise ValueError("no luck\nat all")

    stage = stage_of(good, bad)
    said = run(stage, tmp_path)
    assert "made up/p1: 1 rows in 0 s: ValueError: no luck" in said
    rows = read(tmp_path / stage.csv)
    assert [(row["part"], row["figure"], row["error"]) for row in rows] == [
        ("p0", "1", ""),
        ("p1", "", "ValueError: no luck"),
    ]
    run(stage, tmp_path)
    assert ran == [0, 1, 1]
    run(stage, tmp_path, "made up/p1")
    assert ran == [0, 1, 1]
    monkeypatch.setenv("SAP_FAST_COMMIT", "other")
    run(stage, tmp_path)
    assert ran == [0, 1, 1, 0, 1]
    monkeypatch.setenv("SAP_FAST_COMMIT", "unknown")
    run(stage, tmp_path, "made up/p1")
    run(stage, tmp_path, "made up/p1")
    assert ran == [0, 1, 1, 0, 1, 0, 0]


def test_a_part_that_may_not_end_in_time_is_left_out(tmp_path: Path) -> None:
    stage = stage_of(lambda _: [{"figure": 1}], budget_s=40)
    (said,) = run(stage, tmp_path, left=15)
    assert said == "made up/p0: left out, it may take 40 s and 15 are left"
    deadline: list[float] = []
    stage = stage_of(lambda given: deadline.append(given.left) or [{"figure": 1}], budget_s=40)
    run(stage, tmp_path)
    assert 39 < deadline[0] <= 40


def test_a_part_that_takes_the_process_with_it_or_hangs_is_given_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """if 1:
        import os, sys, time
        print("begin a/1 10", flush=True)
        if "a/1" not in sys.argv:
            os.abort()
        print("a/1: 3 rows", flush=True)
        print("begin b/two words 0.1", flush=True)
        if "b/two words" not in sys.argv:
            time.sleep(60)
        print("b/two words: 1 rows", flush=True)
        sys.exit(7)
    """
    monkeypatch.setattr("benchmarks.gpu.__main__.GRACE_S", 0.2)
    supervisor = Supervisor([sys.executable, "-c", code], time.monotonic() + 30)
    start = time.monotonic()
    assert supervisor.run() == 7
    assert supervisor.given_up == ["a/1", "b/two words"]
    assert time.monotonic() - start < 20
    assert "b/two words: given up, the process ended with status -9" in capsys.readouterr().out


def test_it_needs_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert worker.main(["--output", str(tmp_path / "new"), "--left", "60"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---- what the stages are made of ----


def test_the_device_is_busy_while_any_kernel_runs() -> None:
    found = [Kernel("a", 0, 10), Kernel("b", 5, 10), Kernel("c", 6, 2), Kernel("d", 20, 5)]
    assert kernels.busy(found) == 15 + 5
    names = {
        "sm90_xmma_gemm_bf16": "products",
        "pytorch_flash::flash_fwd_kernel": "attention",
        "void sap_fast::cuda::transform<PerturbSwap>": "ours",
        "void at::native::vectorized_elementwise_kernel<4>": "elementwise",
        "Memcpy DtoD (Device -> Device)": "copies",
        "void at::native::reduce_kernel<512>": "reductions",
        "something": "others",
    }
    row = kernels.by_class([Kernel(name, 0, 2_000_000) for name in names])
    assert {Kernel(name, 0, 0).kind for name in names} == set(names.values())
    assert all(Kernel(name, 0, 0).kind == kind for name, kind in names.items())
    assert row == {f"{kind}_ms": 2.0 for kind in [*kernels.CLASSES, "others"]}


def test_a_report_of_tests_tells_what_did_not_pass(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="t" name="a"/>'
        '<testcase classname="t" name="b"><failure message="boom&#10;more"/></testcase>'
        '<testcase classname="t" name="c"><skipped message=""/></testcase>'
        "</testsuite></testsuites>"
    )
    rows = checks.read_report(report)
    assert rows[0]["outcome"] == "1 passed, 1 failed, 1 skipped"
    assert rows[1] == {"test": "t::b", "outcome": "failed", "message": "boom"}
    assert rows[2] == {"test": "t::c", "outcome": "skipped", "message": ""}


def test_what_a_base_refuses_is_a_row_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, backend: None)
    monkeypatch.setattr(steps, "METHODS", ("HF's loss", "our loss"))
    real, calls = steps.task_loss, []

    def refused(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("it does not fit\n(really)")
        return real(*arguments)

    monkeypatch.setattr(steps, "task_loss", refused)
    rows = steps.measure("1b-full", setting(tmp_path))
    errors = [row.get("error") for row in rows if row["method"] == "our loss"]
    assert errors == ["OutOfMemoryError: it does not fit", None]
    assert all("step_s" in row for row in rows if not row.get("error"))


def test_both_bases_train_the_same_parameters() -> None:
    for name in steps.CASES:
        case = steps.CASES[name].sized(dry=True)
        plain = steps.plain_base(case, "cpu")
        strong = steps.strong_base(case, "cpu", plain)
        pairs = zip(plain.model.parameters(), strong.model.parameters(), strict=True)
        assert all(a is b for a, b in pairs)
        assert strong.has == "strong + compiled layers"


def test_operations_that_fail_leave_the_others(tmp_path: Path) -> None:
    def work() -> None:
        raise RuntimeError("out of memory")

    row = operations.time_work("native", 8, work, None, setting(tmp_path))
    assert row == {"native_ms": "RuntimeError: out of memory"}
