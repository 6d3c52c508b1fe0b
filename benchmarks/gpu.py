"""Everything that needs a GPU: the tests marked `gpu`, the operations' and whole steps' times.

    python -m benchmarks.gpu        or: make gpu

Prints a table of the tests and the operations, and one of each step. Writes, for a GPU named h100,
`ops-h100-native.csv` and `ops-h100-triton.csv` with their pictures, and `gpu_step-h100.csv`.
Without a CUDA device the tests say why they skip, and nothing is timed.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.provenance import RESULTS, ROOT, gpu_name
from sap_fast.ops import describe, why_not


def run_tests() -> tuple[int, dict[str, int]]:
    """Run the tests marked `gpu`; return pytest's exit status and how many ended how.

    Only files that hold such tests are collected: others import packages that a machine with a GPU
    need not have.
    """
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if _has_gpu(path)]
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", *files]
        status = subprocess.run(command, cwd=ROOT).returncode
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    return status, counts


def _has_gpu(path: Path) -> bool:
    return "mark.gpu" in path.read_text(encoding="utf-8")


def run_benchmark(backend: str) -> list[dict[str, str]]:
    """Time the operations on the GPU with one backend; return the rows of the CSV."""
    surroundings = {"SAP_FAST_BACKEND": backend, "SAP_FAST_BENCHMARK_DEVICE": "cuda"}
    command = [sys.executable, "-m", "benchmarks.ops"]
    subprocess.run(command, cwd=ROOT, env=os.environ | surroundings, check=True)
    with (RESULTS / f"ops-{gpu_name()}-{backend}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def main() -> int:
    """Run all, print the table, and return pytest's exit status."""
    status, counts = run_tests()
    table = Table("what", "on", "result", "target", "met", title="On the GPU")
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    table.add_row(
        "tests marked gpu",
        "",
        f"{passed} passed, {counts['skipped']} skipped",
        "",
        str(status == 0),
    )
    for backend in ("native", "triton"):
        reason = why_not(backend, "cuda") if torch.cuda.is_available() else "no CUDA device"
        table.add_section()
        if reason is not None:
            table.add_row(backend, "", f"not timed: {reason}", "", "")
            continue
        table.add_row(backend, torch.cuda.get_device_name(), describe(backend, "cuda"), "", "")
        for row in run_benchmark(backend):
            if row["target"]:
                what = f"{row['claim']}: {row['contender']}"
                lists = f"{row['lists']} {row['dtype']}"
                result = f"{row['ratio']} × {row['baseline']} ({row['median_ms']} ms)"
                table.add_row(what, lists, result, row["target"], row["met"])
    Console(width=140).print(table)
    if torch.cuda.is_available():
        subprocess.run([sys.executable, "-m", "benchmarks.gpu_step"], cwd=ROOT, check=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
