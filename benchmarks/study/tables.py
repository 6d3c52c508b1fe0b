"""The tables of docs/, from the rows of the study; the README's is in `benchmarks.front`."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

from benchmarks.provenance import ROOT
from benchmarks.study import results
from benchmarks.study.methods import METHODS, MODELS, TASKS
from benchmarks.study.report import MISSING, TASK_TITLES, described
from benchmarks.study.results import FIRST, Row

BEGIN, END = "<!-- from summary.csv -->\n", "<!-- until here -->\n"
#: Where the settings go that were tried on the selection split, model by model.
SELECTION_PAGE = ROOT / "docs" / "second-study.md"
#: Quantiles of the normal distribution: a difference is seen at 5 %, two-sided, in four of five.
SEEN = 1.96 + 0.84
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
    text = SELECTION_PAGE.read_text(encoding="utf-8")
    for model in MODELS:
        rows = results.read(results.of_model(results.RESULTS, model))
        if rows:
            text = with_table(text, selection_table(rows), SELECTION_PAGE, begin_of(model))
    SELECTION_PAGE.write_text(text, encoding="utf-8")


def begin_of(model: str) -> str:
    """Return the line after which the table of a model's selection goes."""
    return f"<!-- from results.csv of {model} -->\n"


def with_table(text: str, table: str, page: Path, begin: str = BEGIN) -> str:
    """Return the text of a page with its table replaced."""
    before, found, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"{page} has no lines {begin.strip()} and {END.strip()}")
    return before + begin + table + END + after


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


def selection_table(rows: Sequence[Row]) -> str:
    """Return one line per method and setting that has run on the selection split, by task.

    And a line on what a difference has to be, to be seen there.
    """
    cells: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if row["split"] == "selection":
            cells.setdefault((row["method"], row["setting"]), {})[row["task"]] = row
    losses = {task: row["task_loss"] for task, row in cells.get(("adamw", "{}"), {}).items()}
    lines = [
        "| refuses harmful · harmless · task loss over AdamW's · margin | "
        f"{' | '.join(TASK_TITLES[task] for task in TASKS)} |",
        "|---" * (len(TASKS) + 1) + "|",
    ]
    for method in METHODS:
        for setting in (json.dumps(each, sort_keys=True) for each in METHODS[method].settings):
            by_task = cells.get((method, setting), {})
            if by_task:
                columns = [
                    _selection_cell(by_task[task], losses.get(task)) if task in by_task else MISSING
                    for task in TASKS
                ]
                lines.append(f"| {_title(method, setting)} | {' | '.join(columns)} |")
    return "\n".join(lines) + "\n\n" + power_line(rows)


def _selection_cell(row: Row, adamw: float | None) -> str:
    cell = f"{row['refused_harmful']:.0%} · {row['refused_harmless']:.0%}".replace("%", " %")
    if adamw is not None and row["method"] != "adamw":
        cell += f" · {100 * (row['task_loss'] / adamw - 1):+.1f} %"
    margin = round(row["margin"]) + 0
    return f"{cell} · {margin}".replace("-", "−").replace("−0.0 %", "+0.0 %")


def power_line(rows: Sequence[Row]) -> str:
    """Return a sentence on which difference of two methods this many requests let one see.

    Of two methods on the same model a share q of the n requests is refused by one and not by the
    other; a difference of q^½·2.8/n^½ of all is then found at the 5 % level in four of five studies
    (McNemar's test, to first order). That is of requests alone: seeds come on top.
    """
    by_place: dict[tuple[str, int], list[str]] = {}
    for row in rows:
        if row["split"] == "selection" and row["method"] not in ("shipped", "aligned", "adamw"):
            place = row["task"], row["seed"]
            by_place.setdefault(place, []).append(row["harmful_refusals"])
    shares = [
        statistics.fmean(a != b for a, b in zip(one, other, strict=True))
        for answers in by_place.values()
        for one, other in combinations(answers, 2)
    ]
    if not shares:
        return ""
    requests = len(next(iter(by_place.values()))[0])
    disagreed = statistics.median(shares)
    seen = SEEN * math.sqrt(disagreed / requests)
    return (
        f"Two methods disagree on {disagreed:.0%} of the {requests} requests (median over pairs): "
        f"a difference of {100 * seen:.0f} points is seen in four of five such comparisons, "
        "a smaller one less often.\n"
    ).replace("%", " %")


def _title(method: str, setting: str) -> str:
    values = json.loads(setting)
    plain = not values and not METHODS[method].has_probe
    defaults = plain or METHODS[method].settings in (({},), (values,))
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
