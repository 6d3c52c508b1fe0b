"""The tests marked `gpu`: operations, deterministic mode, waits for the device, quantized bases."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.parts import Part, Setting, Stage
from benchmarks.provenance import ROOT
from benchmarks.workloads import Row


def run_tests(setting: Setting) -> list[Row]:
    """Run them in a process of its own; return how each ended.

    Only files that hold such tests are collected: others import packages that a machine with a GPU
    need not have. A dry run collects one of the files, and on a machine without a GPU all skip.
    """
    # Most of their time goes to compiling Triton's kernels.
    several = [] if setting.dry or importlib.util.find_spec("xdist") is None else ["-n", "4"]
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if _has_gpu(path)]
    if setting.dry:
        files = [ROOT / "tests" / "test_gpu.py"]
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", f"--junitxml={report}"]
        command += [*several, *map(str, files)]
        # For products that are the same in every run; read when CUDA starts.
        surroundings = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        subprocess.run(command, cwd=ROOT, env=surroundings, stdout=sys.stderr, timeout=setting.left)
        return read_report(report)


def read_report(report: Path) -> list[Row]:
    """Return a row for each test that did not pass, and one for all together.

    Raises:
        FileNotFoundError: if there is no report: pytest itself failed.
    """
    rows, counts = [], {"passed": 0, "failed": 0, "skipped": 0}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome, message = _outcome(case)
        counts[outcome] += 1
        if outcome != "passed":
            name = f"{case.get('classname')}::{case.get('name')}"
            rows.append({"test": name, "outcome": outcome, "message": message})
    total = ", ".join(f"{count} {name}" for name, count in counts.items())
    rows.insert(0, {"test": "all that are marked gpu", "outcome": total, "message": ""})
    return rows


def _outcome(case: ElementTree.Element) -> tuple[str, str]:
    ends: Sequence[tuple[str, str]] = (
        ("failure", "failed"),
        ("error", "failed"),
        ("skipped", "skipped"),
    )
    for tag, outcome in ends:
        found = case.find(tag)
        if found is not None:
            return outcome, (found.get("message") or "").strip().partition("\n")[0][:200]
    return "passed", ""


def _has_gpu(path: Path) -> bool:
    return "mark.gpu" in path.read_text(encoding="utf-8")


STAGE = Stage("checks", ("test", "outcome", "message"), (Part("tests", 120, run_tests),))
