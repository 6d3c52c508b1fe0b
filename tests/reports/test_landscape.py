"""The page of a landscape shows the figures it was given, and those alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from sap_fast.reports.landscape import (
    SAFETY,
    TUNING,
    Row,
    _draw,
    landscape_table,
    shares_by_direction,
    write_landscape,
)
from tests.reports.page import Page

# Figures made up for these tests; none was measured.
STEPS = {
    "random 0": {-0.5: 0.2, 0.0: 0.9, 0.5: 0.4},
    "random 1": {0.5: 0.3, -0.5: 0.6, 0.0: 0.9},
    SAFETY: {-1e-4: 1.0, 0.0: 0.9, 1e-4: 0.1},
    TUNING: {-1.5: 0.7, -1.0: 0.95, 0.0: 0.9, 0.5: 0.5},
}


def points(*names: str, loss: float | None = 1.5) -> list[Row]:
    return [
        {
            "direction": name,
            "alpha": alpha,
            "refused_harmful": share,
            "low": share - 0.1,
            "high": share + 0.1,
            "task_loss": loss,
        }
        for name in names
        for alpha, share in STEPS[name].items()
    ]


def write(tmp_path: Path, rows: list[Row], model: str = "tuned") -> Page:
    path = write_landscape(tmp_path / "landscape.html", model, rows, {"seed": "7"})
    assert path == tmp_path / "landscape.html"
    return Page(path.read_text("utf-8"))


def test_shares_are_those_of_the_random_directions_in_the_order_of_steps() -> None:
    assert shares_by_direction(points(*STEPS)) == {
        "random 0": [0.2, 0.9, 0.4],
        "random 1": [0.6, 0.9, 0.3],
    }


def test_page_shows_the_figures(tmp_path: Path) -> None:
    page = write(tmp_path, points(*STEPS))
    assert (
        "tuned refuses 90 % of harmful requests, and 55 % in the mean over the landscape around it "
        "(VISAGE, 50 to 60 % over 2 directions)." in page.text
    )
    assert page.rows == [["seed", "7"]]
    around, gradient, tuning = page.alternatives
    assert around == (
        "Share of harmful requests refused, random 0: from 20% at α = -0.5 to 40% at α = 0.5, "
        "least 20% at α = -0.5; random 1: from 60% at α = -0.5 to 30% at α = 0.5, least 30% at α = "
        "0.5."
    )
    assert "safety gradient: from 100% at α = -0.0001 to 10% at α = 0.0001" in gradient
    assert tuning.endswith("70% at α = -1.5 to 50% at α = 0.5, least 50% at α = 0.5.")
    for title in ("Around the model", "Along the gradient", "From the base model"):
        assert title in page.text
    assert "task loss where" in page.text


def test_what_was_not_measured_is_not_shown(tmp_path: Path) -> None:
    page = write(tmp_path, points("random 0", loss=None))
    assert len(page.alternatives) == 1
    assert "task loss" not in page.text and "(VISAGE)" in page.text


def test_everything_given_is_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert('&amp;')</script>"
    page = write(tmp_path, points("random 0"), hostile)
    assert page.attributes("script") == [] and page.text.count(hostile) == 3


def test_failure_keeps_the_page_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "landscape.html").write_text("what was there")

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, points("random 0"))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["what was there"]


def test_table_for_the_terminal() -> None:
    console = Console(width=120, record=True, file=open(os.devnull, "w"))
    console.print(landscape_table(points(*STEPS)))
    printed = " ".join(console.export_text().split())
    for words in ("90.0%", "55.0% (50.0% – 60.0%)", "10.0% at α = +0.0001", "50.0% at α = +0.5"):
        assert words in printed


@pytest.mark.parametrize("spread", [1e-4, 1.0, 100.0])
def test_losses_are_numbers_on_the_axis(spread: float) -> None:
    rows = points("random 0")
    for row in rows:
        row["task_loss"] = 1.5 + spread * abs(row["alpha"])
    figure = Figure()
    _draw(rows, ["random 0"], "step", figure)
    figure.canvas.draw()
    low, high = figure.axes[1].get_ylim()
    labels = figure.axes[1].get_yticklabels()
    shown = [float(label.get_text()) for label in labels if low <= label.get_position()[1] <= high]
    assert len(set(shown)) == len(shown) >= 2
