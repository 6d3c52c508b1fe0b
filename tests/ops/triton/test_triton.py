"""The Triton backend without a GPU: its kernels in Triton's interpreter, and where it runs.

What the kernels compute is in `test_ops.py` and `triton_interpreted.py`; here both are run, in a
process of their own. What only a device shows is in `test_gpu.py`.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sap_fast import ops
from sap_fast.ops import triton as backend

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)
if backend.interpreted:
    pytest.skip("needs compiled kernels, not TRITON_INTERPRET=1", allow_module_level=True)

import triton

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- interpreted ----


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_give_what_the_reference_gives(which: str) -> None:
    files = [str(HERE / "triton_interpreted.py"), str(HERE.parent / "test_ops.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", which, "-W", "ignore", *files],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"\d+ passed", done.stdout), done.stdout
    # Nothing of this file is skipped, as all of it is where kernels are not interpreted.
    assert "triton_interpreted.py" not in done.stdout, done.stdout


# ---- choosing ----


def test_the_backend_says_where_it_runs() -> None:
    assert ops.why_not("triton", "cuda") is None
    assert "TRITON_INTERPRET" in str(ops.why_not("triton", "cpu"))
    assert "mps" in str(ops.why_not("triton", "mps"))
    assert triton.__version__ in backend.describe()
    with pytest.raises(RuntimeError, match="backend='triton' cannot run on cpu"):
        ops.sum_squares([torch.ones(1)], backend="triton")


def test_triton_is_imported_only_where_it_is_asked_for() -> None:
    code = "import sys; from sap_fast import ops; ops.why_not('triton', 'cpu')"
    assert python(f"{code}; print('triton' in sys.modules)").strip() == "False"


def test_without_triton_the_backend_says_what_to_install() -> None:
    code = "import sys; sys.modules['triton'] = None; from sap_fast import ops"
    assert "pip install triton" in python(f"{code}; print(ops.why_not('triton', 'cuda'))")
