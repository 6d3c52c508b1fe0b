"""Stages and their parts: which are due, how they are run, where their rows go."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from rich.table import Table

from benchmarks.provenance import RESULTS, commit, gpu_name, read_rows, replace_rows
from benchmarks.workloads import Row
from sap_fast.cli.environment import device_name


class Setting(NamedTuple):
    """What a part is run with."""

    #: `"cuda"`, or `"cpu"` in a dry run.
    device: str
    #: Tiny shapes, and once of everything.
    dry: bool
    #: Where rows and files go.
    output: Path
    #: `time.monotonic()` when the part should have ended.
    deadline: float
    #: Writes the rows that a part has so far, in case it does not come to its end.
    save: Callable[[list[Row]], None]

    @property
    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - time.monotonic()


class Part(NamedTuple):
    """What is measured in one go."""

    name: str
    #: Seconds that it may take; it is not begun where less than half of them are left.
    budget_s: float
    measure: Callable[[Setting], list[Row]]


class Stage(NamedTuple):
    """Parts whose rows stand in one CSV."""

    name: str
    #: Columns that are printed.
    columns: tuple[str, ...]
    parts: Sequence[Part]

    @property
    def csv(self) -> str:
        """The name of its file."""
        return f"gpu_{self.name}-{gpu_name()}.csv"


def rows_of(stage: Stage, folders: Sequence[Path]) -> dict[str, list[dict[str, str]]]:
    """Return, by part, the rows of this commit and device in the first folder that has any."""
    here = commit(), device_name()
    found: dict[str, list[dict[str, str]]] = {}
    if here[0] == "unknown":
        return found
    for folder in dict.fromkeys(folders):
        of_folder: dict[str, list[dict[str, str]]] = {}
        for row in read_rows(folder / stage.csv):
            if (row["commit"], row["device"]) == here:
                of_folder.setdefault(row["part"], []).append(row)
        found = of_folder | found
    return found


def is_done(rows: Sequence[dict[str, str]]) -> bool:
    """Whether a part has rows, and did not end in an error."""
    return bool(rows) and not any(row.get("error") for row in rows)


def run_stage(
    stage: Stage, setting: Setting, skipped: Sequence[str], announce: Callable[[str], None]
) -> None:
    """Run the parts that are due, each until its budget is spent.

    Args:
        stage: whose parts.
        setting: its deadline is that of the whole run.
        skipped: parts that are not to be run, as `STAGE/PART`.
        announce: is told what begins and what was found.
    """
    for part in stage.parts:
        name = f"{stage.name}/{part.name}"
        if name in skipped:
            continue
        if is_done(rows_of(stage, [setting.output, RESULTS]).get(part.name, [])):
            announce(f"{name}: there are rows of this commit and card")
            continue
        if setting.left < part.budget_s / 2:
            announce(
                f"{name}: left out, it may take {part.budget_s:.0f} s and {setting.left:.0f} "
                "are left"
            )
            continue
        announce(f"begin {name} {part.budget_s:.0f}")
        start = time.monotonic()
        limit = min(setting.deadline, start + part.budget_s)
        so_far: list[Row] = []

        def save(rows: list[Row], part: Part = part, so_far: list[Row] = so_far) -> None:
            so_far[:] = rows
            named = [{"part": part.name} | row for row in rows]
            replace_rows(stage.csv, named, ("part",), setting.output)

        try:
            rows = part.measure(setting._replace(deadline=limit, save=save))
        except Exception as error:  # whatever a part meets: the others are worth running
            traceback.print_exc()
            rows = [*so_far, failure(error)]
        save(rows)
        errors = [row["error"] for row in rows if row.get("error")]
        said = f": {errors[0]}" if errors else ""
        announce(f"{name}: {len(rows)} rows in {time.monotonic() - start:.0f} s{said}")
        release(setting.device)


def failure(error: Exception) -> Row:
    """Return the column `error`: the first line of what was said."""
    return {"error": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]}


def release(device: str) -> None:
    """Free what nobody holds any more, and count peaks anew."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def table_of(stage: Stage, output: Path) -> Table:
    """Return the rows of a stage as they are printed: those of this commit and device."""
    printed = Table(*stage.columns, title=f"{stage.name}, {device_name()}")
    for rows in rows_of(stage, [output, RESULTS]).values():
        printed.add_section()
        for row in rows:
            if row.get("error"):
                cells = [row.get(name) or "" for name in stage.columns]
                printed.add_row(*cells[:-1], row["error"], style="red")
            else:
                printed.add_row(*[row.get(name) or "" for name in stage.columns])
    return printed
