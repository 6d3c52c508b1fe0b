"""The page and the table of a safety landscape, from the rows that were measured."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import (
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    ScalarFormatter,
    StrMethodFormatter,
)
from rich.table import Table

from sap_fast.evaluation.landscape import visage
from sap_fast.reports.pages import Picture, picture, render, replace_text

Row = dict[str, Any]
"""One point: the `COLUMNS` of `landscape.csv`."""

COLUMNS = ("direction", "alpha", "refused_harmful", "low", "high", "task_loss")

SAFETY, TUNING = "safety gradient", "fine-tuning"
"""Names of the directions that are not random ones ("random 0", "random 1", …)."""


def shares_by_direction(rows: Sequence[Row]) -> dict[str, list[float]]:
    """Returns the shares of refusals along every random direction, in the order of steps."""
    names = dict.fromkeys(row["direction"] for row in rows if row["direction"].startswith("random"))
    return {name: [row["refused_harmful"] for row in _of(rows, name)] for name in names}


def _itself(rows: Sequence[Row]) -> Row:
    """Returns the point of the model as it is."""
    return next(row for row in rows if row["alpha"] == 0)


def _of(rows: Sequence[Row], name: str) -> list[Row]:
    return sorted((r for r in rows if r["direction"] == name), key=lambda row: row["alpha"])


def landscape_table(rows: Sequence[Row]) -> Table:
    """Returns what the landscape comes to, for a terminal."""
    table = Table("", "refuses harmful requests", title="Safety landscape")
    table.columns[1].justify = "right"
    table.add_row("the model itself", f"{_itself(rows)['refused_harmful']:.1%}")
    volume = visage(list(shares_by_direction(rows).values()))
    between = f" ({volume.low:.1%} – {volume.high:.1%})" if volume.count > 1 else ""
    table.add_row("VISAGE: the mean along random directions", f"{volume.mean:.1%}{between}")
    for name in (SAFETY, TUNING):
        found = _of(rows, name)
        if found:
            worst = min(found, key=lambda row: row["refused_harmful"])
            table.add_row(
                f"least along the {name} direction",
                f"{worst['refused_harmful']:.1%} at α = {worst['alpha']:+.3g}",
            )
    return table


def write_landscape(
    path: str | os.PathLike[str], model: str, rows: Sequence[Row], facts: Mapping[str, str]
) -> Path:
    """Writes the page; on any error, what was at `path` stays as it was.

    Args:
        path: Of the HTML file, in a folder that exists.
        model: Name of the model that was measured.
        rows: Its points; random directions and the model itself, at α = 0, are among them.
        facts: What it takes to measure it again.

    Returns:
        `path`.
    """
    page = render(
        Path(__file__).with_name("landscape.html.j2"),
        model=model,
        volume=visage(list(shares_by_direction(rows).values())),
        itself=_itself(rows),
        pictures=_pictures(rows),
        facts=facts,
    )
    return replace_text(Path(path), page)


def _pictures(rows: Sequence[Row]) -> list[Picture]:
    names = dict.fromkeys(row["direction"] for row in rows)
    loss = " and task loss" * _has_loss(rows)
    kinds = [
        (
            [name for name in names if name not in (SAFETY, TUNING)],
            "Around the model",
            f"Harmful requests refused (bands: 95 % intervals over requests){loss} where every "
            "parameter has moved at random by α of its own norm.",
            "step α, in norms of each parameter",
        ),
        (
            [SAFETY],
            "Along the gradient of the safety loss",
            "The same where all weights W have moved by α‖W‖ along it, as SAP moves them with "
            "ρ = α. It leads uphill in the safety loss: to the right lies harm.",
            "step α, in norms of all weights",
        ),
        (
            [TUNING],
            "From the base model to this one, and beyond",
            "The same along the straight line that the fine-tuning came: the base model at −1, "
            "this model at 0.",
            "base model at −1, this model at 0",
        ),
    ]
    return [
        picture(
            title, caption, _spoken(rows, shown), partial(_draw, rows, shown, label), (9.0, 3.4)
        )
        for directions, title, caption, label in kinds
        if (shown := [name for name in directions if name in names])
    ]


def _plain_numbers() -> ScalarFormatter:
    """Returns a formatter that writes as many digits as tell the ticks apart."""
    formatter = ScalarFormatter(useOffset=False)
    formatter.set_scientific(False)
    return formatter


def _has_loss(rows: Sequence[Row]) -> bool:
    return any(row["task_loss"] is not None for row in rows)


def _spoken(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Returns what a picture shows, for those who cannot see it."""
    spoken = []
    for name in names:
        found = _of(rows, name)
        worst = min(found, key=lambda row: row["refused_harmful"])
        first, last, least = (_share_at(row) for row in (found[0], found[-1], worst))
        spoken.append(f"{name}: from {first} to {last}, least {least}")
    return f"Share of harmful requests refused, {'; '.join(spoken)}."


def _share_at(row: Row) -> str:
    return f"{row['refused_harmful']:.0%} at α = {row['alpha']:.3g}"


def _draw(rows: Sequence[Row], names: Sequence[str], label: str, figure: Figure) -> None:
    has_loss = _has_loss(rows)
    panels = np.atleast_1d(figure.subplots(1, 1 + has_loss))
    for number, name in enumerate(names):
        found = _of(rows, name)
        steps = [row["alpha"] for row in found]
        shares = [row["refused_harmful"] for row in found]
        color = f"C{number % 6}"
        panels[0].plot(steps, shares, marker="o", markersize=4, color=color, label=name)
        panels[0].fill_between(
            steps,
            [row["low"] for row in found],
            [row["high"] for row in found],
            color=color,
            alpha=0.15,
            linewidth=0,
        )
        if has_loss:
            losses = [row["task_loss"] for row in found]
            panels[1].plot(steps, losses, marker="o", markersize=4, color=color)
    panels[0].set(xlabel=label, ylabel="harmful requests refused", ylim=(-0.03, 1.03))
    panels[0].yaxis.set_major_formatter(PercentFormatter(1))
    if has_loss:
        panels[1].set(xlabel=label, ylabel="task loss, nats")
        panels[1].set_yscale("log")
        # Of a range too narrow for two of these it makes even steps. Powers of ten would be
        # formulas, which these pictures do not read.
        panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panels[1].yaxis.set_major_formatter(_plain_numbers())
        panels[1].yaxis.set_minor_formatter(NullFormatter())
    for axes in panels:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    if len(names) > 1:
        figure.legend(loc="outside right upper")
