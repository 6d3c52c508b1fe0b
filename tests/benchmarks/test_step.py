"""The benchmark of whole steps, on tiny models: what it writes."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import step
from benchmarks.claims import ratios_table
from benchmarks.contenders import CONFIGURATIONS
from benchmarks.workloads import RECIPES, Case, period_of
from tests.benchmarks.helpers import QUICK, SURROUNDINGS, is_picture, read

SIZES = {
    f"{kind}_{what}"
    for kind in ("task", "probe", "safety")
    for what in ("tokens", "squares", "scored")
}
COLUMNS = {
    "time": {"setup", "batch", "dtype", "configuration", "period", "periods"}
    | {"median_s", "q25_s", "q75_s", "times_hf", "times_floor", "sap_over_this"}
    | SIZES,
    "memory": {"setup", "batch", "dtype", "configuration", "checkpointing"}
    | {"resident_mb", "tensors_mb", "kept_mb"}
    | SIZES,
    "allocations": {"dtype", "configuration", "parameters_mb", "kept_over_parameters"}
    | {"peak_over_parameters", "tensors_alive", "parameter_tensors"},
    "curves": {"axis", "value", "dtype", "configuration", "seconds", "tensors_mb"}
    | {"slope_seconds", "slope_tensors_mb"},
}
IN_MEMORY = ("hf_adamw", "floor", "sap")
SAVING = ("sap", "sap, direction_every=5, rows=1/2", "sap, direction_every=10, rows=1/4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("step")
    with pytest.MonkeyPatch.context() as patched:
        # Of the others the cost model's tests count the memory.
        patched.setattr(step, "IN_MEMORY", IN_MEMORY)
        assert step.main(["--quick", "--only", "lora,4x96,fp32", "--output", str(folder)]) == 0
    return folder


def table(folder: Path, name: str) -> list[dict[str, str]]:
    return read(folder / f"step_{name}.csv")


def numbers(rows: list[dict[str, str]], *columns: str) -> list[float]:
    return [float(row[column]) for row in rows for column in columns]


def test_every_table_has_its_columns(folder: Path) -> None:
    for name, columns in COLUMNS.items():
        assert set(table(folder, name)[0]) >= columns | SURROUNDINGS
    for name in ("time", "curves"):
        assert is_picture(folder / f"step_{name}.png")


def test_time_has_every_configuration_and_pass(folder: Path) -> None:
    rows = {row["configuration"]: row for row in table(folder, "time")}
    passes = ["safety pass", "probe pass", "task pass", "update"]
    assert list(rows) == [*CONFIGURATIONS, "passes alone", *passes]
    assert all(value > 0 for value in numbers(list(rows.values()), "median_s"))
    assert [rows[name]["period"] for name in RECIPES] == [str(period_of(n)) for n in RECIPES]
    assert float(rows["hf_adamw"]["times_hf"]) == float(rows["floor"]["times_floor"]) == 1
    assert float(rows["sap"]["sap_over_this"]) == 1
    assert rows["hf_adamw"]["safety_tokens"] == ""
    assert rows["blend"]["probe_tokens"] == "" and float(rows["blend"]["safety_tokens"]) > 0
    assert float(rows["published"]["task_tokens"]) == 4 * 96
    # Of 4 rows, half and a quarter; random rows have nothing to merge but padding.
    scored = [float(rows[name]["probe_scored"]) for name in SAVING]
    assert scored == sorted(scored, reverse=True)
    assert scored[0] == float(rows["sap"]["task_scored"])


def test_rows_have_both_ratios_side_by_side(folder: Path) -> None:
    rows = {row["configuration"]: row for row in table(folder, "rows")}
    assert list(rows) == list(step.CHEAP_STEPS)
    assert [row["period"] for row in rows.values()] == ["1"] * 4 + ["10"] * 3
    # A quarter of 4 rows is one; an eighth is a half of its scored tokens.
    quarter, eighth = (float(row["probe_scored"]) for row in list(rows.values())[-2:])
    assert quarter < float(rows["sap"]["probe_scored"]) / 2
    assert eighth == pytest.approx(quarter / 2, abs=0.5)
    tokens = [float(row["probe_tokens"]) for row in list(rows.values())[-2:]]
    assert tokens[1] < tokens[0]
    numbered = [row | {"times_hf": 1.234, "times_floor": 2.5} for row in rows.values()]
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(ratios_table(numbered))
    line = next(x for x in console.export_text().splitlines() if "rows=1/8" in x)
    assert "lora 4x96 fp32" in line and line.index("2.50") < line.index("1.23")


def test_memory_shrinks_with_checkpointing(folder: Path) -> None:
    rows = {(r["configuration"], r["checkpointing"]): r for r in table(folder, "memory")}
    assert set(rows) == {(name, mode) for name in IN_MEMORY for mode in step.CHECKPOINTING}
    for name in IN_MEMORY:
        plain, checkpointed = (float(rows[name, m]["tensors_mb"]) for m in step.CHECKPOINTING)
        assert checkpointed < 0.7 * plain


def test_allocations_are_those_of_adamw(folder: Path) -> None:
    hf, floor, sap = table(folder, "allocations")
    # Two moments per parameter, and a gradient each.
    assert numbers([hf, floor, sap], "kept_over_parameters") == pytest.approx([2] * 3, abs=0.01)
    assert all(0.99 < value < 1.5 for value in numbers([hf, floor], "peak_over_parameters"))
    extra = numbers([sap], "peak_over_parameters")[0]
    assert extra <= numbers([floor], "peak_over_parameters")[0] + 0.02


def test_curves_have_both_configurations_along_each_axis(folder: Path) -> None:
    rows = table(folder, "curves")
    found = {(row["axis"], int(row["value"]), row["configuration"]) for row in rows}
    assert found == {
        (axis, value, name)
        for axis in ("length", "batch")
        for value in step.AXES[axis][:2]
        for name in ("floor", "sap")
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
    with pytest.raises(RuntimeError, match="--measure-memory lora 4x96 fp32 sap none"):
        step.memory_in_a_process(QUICK, "sap", "none")


def test_slope() -> None:
    assert step.slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)


def test_cases_are_kept_as_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(case: Case, *_: Any) -> list[dict[str, Any]]:
        if case.dtype == "bf16":
            raise KeyboardInterrupt
        return [case.facts() | {"configuration": "floor", "times_hf": 2.0, "median_s": 1.0}]

    monkeypatch.setattr(step, "measure_time", measured)
    arguments = ["--quick", "--table", "time", "--only", "lora,4x96", "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        step.main(arguments)
    assert [row["dtype"] for row in table(tmp_path, "time")] == ["fp32"]
