"""What every command shares on the terminal: progress bars, one console, errors in one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

#: Progress and messages; results that another program may read go to standard output.
#: Paths such as `a:x:b` are no emoji.
console = Console(stderr=True, emoji=False)


class UserError(Exception):
    """A mistake in what the user gave; its message is all that they see."""


class Bar:
    """One progress bar on the terminal (`sap_fast.evaluation.ProgressTask`)."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: int = 1) -> None:
        """Moves the bar by `amount` of its total."""
        self._progress.advance(self._task, amount)

    def resize(self, total: int) -> None:
        """Says how long the bar is, where that was not known at the start."""
        self._progress.update(self._task, total=total)

    def note(self, text: str) -> None:
        """Shows a short text, such as the loss, behind the bar."""
        self._progress.update(self._task, note=text)


@contextmanager
def progress_bar(description: str, total: int | None = None) -> Iterator[Bar]:
    """Opens a bar of `total` steps, with the time it took and the time left."""
    columns = (
        TextColumn("{task.description:<32}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Bar(progress, progress.add_task(description, total=total, note=""))


def show_warnings() -> None:
    """Shows warnings as one line each, and only those that are meant for users.

    Libraries announce their own deprecations with other categories than `UserWarning`; these stay
    quiet.
    """

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        if category is UserWarning:
            console.print(f"[yellow]Warning:[/yellow] {escape(str(message))}", soft_wrap=True)

    warnings.showwarning = show
