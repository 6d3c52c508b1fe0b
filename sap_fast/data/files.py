"""Reads JSONL, JSON, CSV and Parquet files of rows, and datasets of the hub or of a folder.

Every problem becomes one `DataError`.
"""

import csv
import io
import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""What the names of files of rows end in."""

# Such as "org/name:train", "./folder:train[:100]" or "folder:train+test".
_DATASET = re.compile(r"([^:]+):(\w[\w.-]*(?:\[[\d%:]+\])?(?:\+\w[\w.-]*(?:\[[\d%:]+\])?)*)")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class DataError(ValueError):
    """A file, a row or a field that cannot be used, told in one line.

    Attributes:
        path: The file.
        row: Line number (JSONL, text) or row number from 1 (JSON, Parquet); None for the whole
            file.
        field: Name of the field, such as `"messages[2].role"`; None for the whole row.
        problem: What was found.
        expected: What would be accepted.
    """

    def __init__(
        self, path: str | Path, row: int | None, field: str | None, problem: str, expected: str
    ):
        # All five go to `args`, so that the error survives the pickling between processes.
        super().__init__(path, row, field, problem, expected)
        self.path = Path(path)
        self.row = row
        self.field = field
        self.problem = problem
        self.expected = expected

    def __str__(self) -> str:
        where = str(self.path)
        if self.row is not None:
            where += f", row {self.row}"
        if self.field is not None:
            where += f", field '{self.field}'"
        # Messages of other libraries that end up in `problem` may span lines.
        problem = " ".join(self.problem.split())
        return f"{where}: got {problem}; expected {self.expected}"


class RefusedRow(DataError):
    """A row that is well formed, and yet cannot be trained as it stands; the others can."""


@dataclass(frozen=True)
class Row:
    """One row of a file, with the place it came from."""

    path: Path
    number: int
    values: dict[str, Any]

    def fail(self, field: str | None, problem: str, expected: str) -> NoReturn:
        """Raises the `DataError` that names this row."""
        raise DataError(self.path, self.number, field, problem, expected)

    def refuse(self, field: str | None, problem: str, expected: str) -> NoReturn:
        """Raises the `RefusedRow` that names this row."""
        raise RefusedRow(self.path, self.number, field, problem, expected)

    def text(self, field: str, value: Any, *, blank: bool = False) -> str:
        """Returns `value` if it is usable text.

        Args:
            field: The name to report.
            value: What the file holds; None where it holds nothing.
            blank: Whether empty text and text of spaces are accepted.

        Raises:
            DataError: `value` is not a string, is blank, or cannot be encoded as UTF-8.
        """
        if not isinstance(value, str):
            self.fail(field, describe(value), "text (a string)")
        if not blank and not value.strip():
            self.fail(field, "empty text", "text with at least one visible character")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            # JSON may escape half of a surrogate pair, which no tokenizer takes.
            self.fail(field, f"a lone surrogate at character {error.start}", "valid Unicode text")
        return value


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Reads a file of rows; the suffix names the format.

    Args:
        path: `.jsonl` (one object per line, blank lines are skipped), `.json` (a list of
            objects), `.csv` (names in the first line, all values text) or `.parquet`. Text is
            UTF-8, with or without a byte order mark. Or a dataset, `org/name:split` of the hub that
            `datasets` is configured for, or `folder:split`.

    Returns:
        The rows, at least one.

    Raises:
        DataError: The file is missing, unreadable, empty or malformed, or a row is not an object.
    """
    return [row.values for row in read_numbered_rows(path)]


def read_numbered_rows(path: str | Path) -> list[Row]:
    """Like `read_rows`, but each row knows its file and number."""
    path = Path(path)
    readers = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    reader = _read_dataset if is_dataset(path) else readers.get(path.suffix.lower())
    if reader is None:
        suffix = f"the suffix '{path.suffix}'" if path.suffix else "no suffix"
        expected = f"one of {', '.join(SUFFIXES)}, or a dataset: org/name:split or folder:split"
        raise DataError(path, None, None, suffix, expected)
    rows = []
    for number, values in reader(path):
        if not isinstance(values, dict):
            raise DataError(path, number, None, describe(values), "an object with named fields")
        rows.append(Row(path, number, values))
    if not rows:
        raise DataError(path, None, None, "no rows", "at least one row")
    return rows


def is_dataset(path: Path) -> bool:
    """Returns whether a name is that of a split of a dataset rather than of a file."""
    return _dataset_and_split(path) is not None


def _dataset_and_split(path: Path) -> tuple[str, str] | None:
    match = _DATASET.fullmatch(str(path))
    if match is None or path.exists():
        return None
    name, split = match.groups()
    if Path(name).is_dir() or (_HUB_NAME.fullmatch(name) and not name.endswith(SUFFIXES)):
        return name, split
    return None


def read_numbered_lines(path: Path) -> list[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, with their 1-based line numbers.

    Raises:
        DataError: The file is missing, unreadable or empty, or a line is not UTF-8.
    """
    lines = []
    # Only "\n" ends a line: U+2028 and its like are legal inside JSON strings.
    for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
        text = _decode(path, number, line)
        if text.strip():
            lines.append((number, text.removesuffix("\r")))
    if not lines:
        raise DataError(path, None, None, "an empty file", "at least one row")
    return lines


def describe(value: Any) -> str:
    """A short description of a value for an error message."""
    if value is None:
        return "nothing"
    if isinstance(value, dict):
        return f"an object with the fields {_names(value)}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return _shortened(repr(value))


def _names(fields: dict[Any, Any]) -> str:
    shown = [_shortened(repr(name)) for name in islice(fields, 12)]
    return ", ".join(shown) + (", ..." if len(fields) > len(shown) else "")


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _read_bytes(path: Path) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(path, None, None, "no such file", "an existing file") from None
    except IsADirectoryError:
        raise DataError(path, None, None, "a folder", "a file") from None
    except OSError as error:
        raise DataError(path, None, None, f"{error.strerror}", "a readable file") from error
    if not content:
        raise DataError(path, None, None, "an empty file", "at least one row")
    return content


def _decode(path: Path, row: int | None, content: bytes) -> str:
    # Editors on Windows write a byte order mark, which is no part of the first row.
    encoding = "utf-8-sig" if row in (None, 1) else "utf-8"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        problem = f"byte 0x{content[error.start]:02x} at position {error.start}"
        raise DataError(path, row, None, problem, "UTF-8 text") from None


def _parse_json(path: Path, row: int | None, text: str, expected: str) -> Any:
    try:
        return json.loads(text)
    # Besides JSONDecodeError, integers of more than 4,300 digits raise a plain ValueError.
    except (ValueError, RecursionError) as error:
        raise DataError(path, row, None, f"invalid JSON ({error})", expected) from None


def _read_jsonl(path: Path) -> list[tuple[int, Any]]:
    return [
        (number, _parse_json(path, number, line, "one JSON object per line"))
        for number, line in read_numbered_lines(path)
    ]


def _read_json(path: Path) -> list[tuple[int, Any]]:
    expected = "a JSON list of objects (one object per line is '.jsonl')"
    rows = _parse_json(path, None, _decode(path, None, _read_bytes(path)), expected)
    if not isinstance(rows, list):
        raise DataError(path, None, None, describe(rows), expected)
    return list(enumerate(rows, start=1))


def _read_csv(path: Path) -> list[tuple[int, Any]]:
    expected = "CSV with the names of the columns in the first line"
    text = _decode(path, None, _read_bytes(path))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, Any]] = []
    names: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue  # a blank line
            if names is None:
                names = cells
                if len(set(names)) < len(names):
                    raise DataError(path, None, None, "two columns of one name", expected)
                continue
            number = len(rows) + 1
            if len(cells) != len(names):
                problem = f"{len(cells)} values"
                raise DataError(path, number, None, problem, f"{len(names)}, as in the first line")
            # An empty cell is one without a value.
            values = {name: cell or None for name, cell in zip(names, cells, strict=True)}
            rows.append((number, values))
    except csv.Error as error:
        raise DataError(path, len(rows) + 1, None, f"invalid CSV ({error})", expected) from error
    return rows


def _read_dataset(path: Path) -> list[tuple[int, Any]]:
    found = _dataset_and_split(path)
    assert found is not None
    name, split = found
    expected = "a split of a dataset: org/name:split or folder:split"
    try:
        import datasets
    except ImportError as error:
        problem = "a dataset, but the package datasets is not installed"
        raise DataError(path, None, None, problem, "pip install datasets, or a file") from error
    bars = datasets.are_progress_bars_disabled()
    # Its bars would tear the command's own progress display.
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, split=split)
        return list(enumerate(rows, start=1))
    # It raises errors of many types, some of them of other libraries.
    except Exception as error:
        problem = f"what cannot be loaded ({_shortened(' '.join(str(error).split()), 300)})"
        raise DataError(path, None, None, problem, expected) from error
    finally:
        if not bars:
            datasets.enable_progress_bars()


def _read_parquet(path: Path) -> list[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    # Corrupt pages surface as OSError, invalid UTF-8 in a text column as ValueError, and a date
    # after the year 9999 as OverflowError.
    errors = (pyarrow.ArrowException, OSError, ValueError, OverflowError)

    def unreadable(row: int | None, error: Exception) -> DataError:
        problem = f"unreadable Parquet ({_shortened(str(error), 300)})"
        return DataError(path, row, None, problem, "a valid Parquet file")

    content = _read_bytes(path)
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
    except errors as error:
        raise unreadable(None, error) from error
    try:
        return list(enumerate(table.to_pylist(), start=1))
    except errors as error:
        # Row by row takes long, but tells which one it is.
        for number in range(table.num_rows):
            try:
                table.slice(number, 1).to_pylist()
            except errors as its_error:
                raise unreadable(number + 1, its_error) from its_error
        raise unreadable(None, error) from error
