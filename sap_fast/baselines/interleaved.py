"""Refusals in the place of some task rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Row = TypeVar("Row")


def interleave(task: Sequence[Row], refusals: Sequence[Row], share: float) -> list[Row]:
    """Return the task rows with safety rows among them, spread evenly.

    Interleaving of safe rows with the training data, as in arXiv:2508.06249, is the defence that
    needs no change of the training at all. Safety rows are repeated where there are too few.

    Args:
        task: rows of the task, all of which are kept, in order.
        refusals: safety rows.
        share: of the rows that are returned, in [0, 1).

    Raises:
        ValueError: for a share outside, or without safety rows where the share is above 0.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share={share}: expected a number in [0, 1)")
    if share > 0 and not refusals:
        raise ValueError("refusals is empty; expected rows for a share above 0")
    added = round(len(task) * share / (1 - share))
    rows: list[Row] = []
    for number, row in enumerate(task):
        rows.append(row)
        # As many as belong before the next task row, when all are spread over the task rows.
        first, last = number * added // len(task), (number + 1) * added // len(task)
        rows += [refusals[index % len(refusals)] for index in range(first, last)]
    return rows
