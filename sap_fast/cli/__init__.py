"""The `sap-fast` command line; every command is a thin layer over the package's own functions."""

from __future__ import annotations

import sys
from importlib.util import find_spec

from sap_fast.compatibility import require

#: What the commands need beyond the package's own dependencies.
_NEEDED = (
    "typer",
    "rich",
    "transformers",
    "peft",
    "accelerate",
    "pyarrow",
    "matplotlib",
    "jinja2",
    "yaml",
)


def main() -> None:
    """Runs `sap-fast`; bad input ends with one clear line and exit status 2."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"sap-fast needs {', '.join(missing)}: pip install 'sap-fast[train]'")
    try:
        require("transformers", "peft", "accelerate")
    except ImportError as error:
        sys.exit(str(error))
    from sap_fast.cli.app import run

    run()
