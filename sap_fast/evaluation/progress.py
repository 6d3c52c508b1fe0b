"""What a long-running function asks of a progress bar."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class ProgressTask(Protocol):
    """One bar."""

    def advance(self, amount: int = 1) -> None:
        """Moves the bar by `amount` of its total."""


class Progress(Protocol):
    """Opens a bar: ``with progress("Scoring", total=320) as bar: bar.advance(16)``."""

    def __call__(self, description: str, total: int) -> AbstractContextManager[ProgressTask]:
        """Opens a bar of `total` steps and closes it when the context ends."""


class _NoTask:
    def advance(self, amount: int = 1) -> None:
        pass


@contextmanager
def no_progress(description: str, total: int) -> Iterator[ProgressTask]:
    """Shows nothing: the default."""
    yield _NoTask()
