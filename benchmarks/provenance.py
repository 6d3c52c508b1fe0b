"""Where and of what the figures of a CSV were taken."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from sap_fast.cli.environment import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def provenance() -> dict[str, str]:
    """Return the columns that every CSV carries: date, device, versions and commit."""
    return {"date": date.today().isoformat()} | environment() | {"commit": commit()}


def commit() -> str:
    """Return the short hash of the commit that is checked out.

    It ends in `-dirty` where a Python file or a kernel differs from that commit, and is `unknown`
    outside of a clone.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/*.py", ":/csrc/*")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def write_rows(name: str, rows: Sequence[Mapping[str, Any]], folder: Path = RESULTS) -> Path:
    """Write `rows`, each with its provenance, to a CSV in `folder`."""
    surroundings = provenance()
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*columns, *surroundings], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **surroundings} for row in rows)
    return path
