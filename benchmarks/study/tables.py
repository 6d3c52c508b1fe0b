"""The tables of docs/, written from `summary.csv`; the README's is in `benchmarks.front`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.provenance import ROOT
from benchmarks.study import results
from benchmarks.study.methods import METHODS, TASKS
from benchmarks.study.report import MISSING, TASK_TITLES, described
from benchmarks.study.results import FIRST, Row

BEGIN, END = "<!-- from summary.csv -->\n", "<!-- until here -->\n"
HEADING = "refuses harmful, and points over AdamW (95 %) · harmless · task loss"


def _is_chosen(by_task: dict[str, Row]) -> bool:
    """Whether a setting is the one that was chosen for its method."""
    return any(row["chosen"] == "1" for row in by_task.values())


def _is_compared(by_task: dict[str, Row]) -> bool:
    """Whether a setting was chosen and has run on every task."""
    return len(by_task) == len(TASKS) and _is_chosen(by_task)


#: Files with a table, the folder of its study, and which settings get a line in it, given their
#: rows by task.
PAGES: dict[Path, tuple[Path, Callable[[dict[str, Row]], bool]]] = {
    ROOT / "docs" / "measurements" / "safety.md": (FIRST, _is_compared),
    ROOT / "docs" / "study.md": (FIRST, bool),
}


def write_tables() -> None:
    """Put the tables of every `summary.csv` into docs/.

    Raises:
        ValueError: if a page lacks the comments between which its table goes.
    """
    for page, (folder, is_wanted) in PAGES.items():
        rows = results.read(folder / "summary.csv")
        text = page.read_text(encoding="utf-8")
        page.write_text(with_table(text, markdown_table(rows, is_wanted), page), encoding="utf-8")


def with_table(text: str, table: str, page: Path) -> str:
    """Return the text of a page with its table replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no lines {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + table + END + after


def markdown_table(rows: list[Row], is_wanted: Callable[[dict[str, Row]], bool]) -> str:
    """Return one line per method and setting, one column per task.

    Args:
        rows: of `summary.csv`.
        is_wanted: whether a setting with such rows, by task, gets a line.
    """
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["setting"]), {})[row["task"]] = row
    lines = [
        f"| {HEADING} | {' | '.join(TASK_TITLES[task] for task in TASKS)} |",
        "|---" * (len(TASKS) + 1) + "|",
    ]
    for method in METHODS:
        for (name, setting), by_task in cells.items():
            if name == method != "shipped" and is_wanted(by_task):
                columns = [_cell(by_task[t]) if t in by_task else MISSING for t in TASKS]
                was_choice = len(METHODS[method].settings) > 1
                chosen = was_choice and _is_chosen(by_task)
                title = _title(method, setting) + (" *" if chosen else "")
                lines.append(f"| {title} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n"


def _title(method: str, setting: str) -> str:
    values = json.loads(setting)
    defaults = METHODS[method].settings in (({},), (values,))
    return METHODS[method].title + ("" if defaults else f", {described(values)}")


def _cell(row: Row) -> str:
    def percent(name: str, style: str = ".0f") -> str:
        return f"{100 * float(row[name]):{style}}".replace("-", "−")

    text = f"{percent('refused_harmful_mean')} %"
    if row["against_adamw_mean"] and row["method"] != "adamw":
        ends = ("mean", "low", "high")
        difference, low, high = (percent(f"against_adamw_{end}", "+.0f") for end in ends)
        text += f", {difference} ({low} to {high})"
    text += f" · {percent('refused_harmless_mean')} %"
    if row["task_loss_over_adamw"] and row["method"] != "adamw":
        loss = round(100 * (float(row["task_loss_over_adamw"]) - 1), 1)
        text += f" · {loss or 0.0:+.1f} %".replace("-", "−")
    seeds = len(row["seeds"].split())
    return text + (f" [{seeds}]" if seeds > 1 else "")
