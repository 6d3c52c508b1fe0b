"""Models with Liger's kernels, interpreted: `liger_interpreted.py` in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("liger_kernel", reason="it is of `make test-stacks`")
pytest.importorskip("triton")

HERE = Path(__file__).parent


def test_models_with_ligers_kernels_run_under_sap() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(HERE / "liger_interpreted.py")],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout, done.stdout
