"""Where and of what the figures of a CSV were taken."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from sap_fast.cli.environment import environment

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def provenance() -> dict[str, str]:
    """Return the columns that every CSV carries: date, device, versions and commit."""
    return {"date": date.today().isoformat()} | environment() | {"commit": commit()}


def gpu_name() -> str:
    """Return a short name of the GPU, for the names of its results: "h100"; without one "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name().lower().replace("nvidia ", "").split()
    return "-".join(words[:1] if words[0][-1].isdigit() else words[:2])


def commit(checkout: Path = ROOT) -> str:
    """Return the short hash of the commit that is checked out.

    It ends in `-dirty` where a Python file or a kernel differs from that commit, and is `unknown`
    outside of a clone. The environment variable SAP_FAST_COMMIT says it for a copy of these files
    on another machine, whose history is missing or not theirs.

    Args:
        checkout: a folder of the clone; by default that of these files.
    """
    if checkout == ROOT and "SAP_FAST_COMMIT" in os.environ:
        return os.environ["SAP_FAST_COMMIT"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(checkout), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/*.py", ":/csrc/*")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def write_rows(name: str, rows: Sequence[Mapping[str, Any]], folder: Path = RESULTS) -> Path:
    """Write `rows`, each with its provenance, to a CSV in `folder`."""
    return _write([], rows, folder / name, provenance())


def replace_rows(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    identity: Sequence[str],
    folder: Path = RESULTS,
    *,
    of: Mapping[str, str] | None = None,
) -> Path:
    """Write `rows` as `write_rows` does, in the place of those with the same `identity` columns.

    The other rows of the CSV stay, with their provenance.

    Args:
        name: of the CSV.
        rows: what to write.
        identity: names of columns.
        folder: where the CSV is.
        of: device and versions of another environment than this, in which the rows were measured.
    """

    def key(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[column]) for column in identity)

    replaced, path = {key(row) for row in rows}, folder / name
    kept = [row for row in read_rows(path) if key(row) not in replaced]
    surroundings = provenance()
    if of is not None:
        surroundings = {column: "" for column in surroundings} | {
            "date": surroundings["date"],
            **of,
            "commit": surroundings["commit"],
        }
    return _write(kept, rows, path, surroundings)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV as text; none if there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_numbers(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a CSV, numbers as such."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    return [{name: value(text) for name, text in row.items()} for row in read_rows(path)]


def _write(
    kept: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    surroundings: Mapping[str, str],
) -> Path:
    """Write rows that have their provenance, then `rows` with theirs; interrupted, no half."""
    columns = [column for row in (*kept, *rows) for column in row if column not in surroundings]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        header = [*dict.fromkeys(columns), *surroundings]
        writer = csv.DictWriter(file, header, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        writer.writerows({**row, **surroundings} for row in rows)
    return unfinished.replace(path)
