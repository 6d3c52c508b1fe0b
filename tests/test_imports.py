"""What importing the package brings with it."""

from __future__ import annotations

import subprocess
import sys


def test_importing_the_package_imports_neither_transformers_nor_triton() -> None:
    script = (
        "import sap_fast, sys; "
        "print([m for m in ('transformers', 'triton', 'peft', 'pyarrow') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
