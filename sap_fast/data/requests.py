"""Requests to evaluate on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sap_fast.data.conversations import alpaca_prompt
from sap_fast.data.files import (
    SUFFIXES,
    DataError,
    Row,
    describe,
    is_dataset,
    read_numbered_lines,
    read_numbered_rows,
)
from sap_fast.data.unread import Unread

_OPTIONAL = ("refusal", "opening", "category")


@dataclass(frozen=True)
class Request:
    """A request to evaluate on.

    Attributes:
        prompt: What the user asks.
        refusal: The refusal to score; None for the one that `build_safety_pair` picks.
        opening: The affirmative opening to score; None for the one that restates the request.
        category: What kind of request it is, such as "privacy"; None where that is not known.
    """

    prompt: str
    refusal: str | None = None
    opening: str | None = None
    category: str | None = None


def load_requests(path: str | Path) -> list[Request]:
    """Reads a file of requests.

    Args:
        path: `.txt` with one request per line, or rows as `read_rows` reads them with the request
            in `prompt`, `text` or `instruction` (with an optional `input`), and optional texts
            `refusal`, `opening` and `category`. Columns that are not read are named in one warning.

    Returns:
        The requests, at least one.

    Raises:
        DataError: A row or the file cannot be used.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        lines = read_numbered_lines(path)
        return [
            Request(Row(path, number, {}).text("prompt", line).strip()) for number, line in lines
        ]
    if path.suffix.lower() not in SUFFIXES and not is_dataset(path):
        expected = f"one of {', '.join((*SUFFIXES, '.txt'))}"
        raise DataError(path, None, None, f"the suffix '{path.suffix}'", expected)
    unread = Unread()
    requests = [_read_request(row, unread) for row in read_numbered_rows(path)]
    unread.warn(path)
    return requests


def spread_requests(requests: Sequence[Request], limit: int | None) -> list[Request]:
    """Returns at most `limit` of the requests, spread evenly over the list; all without one."""
    count = len(requests) if limit is None else min(limit, len(requests))
    return [requests[k * len(requests) // count] for k in range(count)]


def _read_request(row: Row, unread: Unread) -> Request:
    for field in ("prompt", "text", "instruction"):
        value = row.values.get(field)
        if value is not None:
            break
    else:
        row.fail(None, describe(row.values), "one of the fields 'prompt', 'text', 'instruction'")
    context = ("input",) if field == "instruction" else ()
    unread.count_columns(row, (field, *context, *_OPTIONAL))
    prompt = alpaca_prompt(row) if field == "instruction" else row.text(field, value)
    return Request(prompt, **{name: _optional_text(row, name) for name in _OPTIONAL})


def _optional_text(row: Row, field: str) -> str | None:
    value = row.values.get(field)
    return None if value is None else row.text(field, value)
