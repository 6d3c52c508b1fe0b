"""What importing the package brings with it, and where it can be imported from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import sap_fast

ROOT = Path(__file__).resolve().parents[1]

#: Modules beside torch's own that the import may bring. It brings none today; with DTensor it was
#: 605 modules, and 1.2 s.
FEW = 20


def output_of(script: str, cwd: Path = ROOT) -> Any:
    """What a script that runs in a new process, from a folder, prints as JSON."""
    command = [sys.executable, "-c", f"import json, sys\n{script}"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_imports_little_beside_torch() -> None:
    found = output_of(
        "import torch\n"
        "known = set(sys.modules)\n"
        "import sap_fast\n"
        "new = set(sys.modules) - known\n"
        "print(json.dumps(sorted(name for name in new if name.partition('.')[0] != 'sap_fast')))"
    )
    assert len(found) <= FEW, found
    slow = ("transformers", "triton", "peft", "pyarrow", "sympy", "torch.distributed.tensor")
    assert not set(slow) & set(found)


def test_a_source_tree_that_is_not_installed_says_its_version(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "sap_fast", tmp_path / "sap_fast", ignore=ignored)
    # Nothing is found by its metadata.
    found = output_of(
        "import importlib.metadata as metadata\n"
        "def none(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = metadata.distribution = none\n"
        "import sap_fast\n"
        "from sap_fast.cli.environment import environment\n"
        "print(json.dumps([sap_fast.__file__, sap_fast.__version__, environment()['sap-fast']]))",
        cwd=tmp_path,
    )
    assert found == [str(tmp_path / "sap_fast" / "__init__.py"), *[sap_fast.__version__] * 2]
