"""A word about the fields of a file that nothing reads."""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from sap_fast.data.files import Row
from sap_fast.data.messages import has_content, unknown_fields
from sap_fast.data.turns import Message


class Unread:
    """Counts, per field that nothing reads, the rows in which it holds something.

    Args:
        in_template: Tells whether the chat template mentions a field of messages.
    """

    def __init__(self, in_template: Callable[[str], bool] = lambda name: False) -> None:
        self._in_template = in_template
        self._rows: Counter[str] = Counter()
        self._total = 0

    def count_columns(self, row: Row, columns: Collection[str]) -> None:
        """Counts what a row holds beside `columns`."""
        self._total += 1
        values = row.values.items()
        self._rows.update(repr(k) for k, value in values if k not in columns and has_content(value))

    def count_fields(self, messages: Iterable[Message]) -> None:
        """Counts what a row's messages hold and neither this package nor the template reads."""
        names = sorted({name for message in messages for name in unknown_fields(message)})
        self._rows.update(f"{name!r} of messages" for name in names if not self._in_template(name))

    def warn(self, path: str | Path) -> None:
        """Warns, in the name of the caller's caller, if there was anything."""
        if self._rows:
            names = ", ".join(
                f"{name} (in {rows} of {self._total} rows)" for name, rows in self._rows.items()
            )
            warnings.warn(f"{path}: nothing reads {names}", stacklevel=3)
