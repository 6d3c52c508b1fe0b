"""Task and safety files as encoded rows, ready for a collator."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

from sap_fast.data.conversations import Conversation, read_preference_pair, task_reader
from sap_fast.data.encoding import ChatTemplateError, EncodedRow, encode_chat
from sap_fast.data.files import DataError, Row, read_numbered_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MAX_LENGTH = 1024
"""Tokens of a sequence to keep: the default of TRL's trainers."""

Encoded = TypeVar("Encoded")


class SafetyRow(TypedDict):
    """A safe and a harmful continuation of one prompt, each encoded with the prompt."""

    chosen: EncodedRow
    rejected: EncodedRow


def load_task_dataset(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None = DEFAULT_MAX_LENGTH,
) -> list[EncodedRow]:
    """Reads and encodes a task file; the result serves as a Trainer's `train_dataset`.

    The columns of the first row tell the layout of the file, the first that fits of:

    * ``messages``: a list of ``{"role": ..., "content": ...}``; every assistant turn is trained.
    * ``prompt`` and ``completion``: text, or lists of messages; the completion is trained.
    * ``instruction``, optional ``input``, ``output`` (Alpaca): the prompt is the instruction and,
      where there is one, a blank line and the input; the output is trained.

    Rows of which no answer is left within `max_length` (or that have none) are dropped, with one
    warning.

    Args:
        path: A ``.jsonl``, ``.json`` or ``.parquet`` file.
        tokenizer: The model's tokenizer; see `encode_chat`.
        max_length: Number of tokens to keep from the beginning of a row; None keeps all.

    Returns:
        One ``{"input_ids": [...], "labels": [...]}`` per row, labels -100 where not trained.

    Raises:
        DataError: A row or the file cannot be used.
    """
    rows = read_numbered_rows(path)
    read = task_reader(rows[0])

    def encode(row: Row) -> EncodedRow | None:
        encoded = _encode(row, tokenizer, read(row), max_length)
        return encoded if encoded["labels"] else None

    return _encode_rows(rows, encode, "answer", max_length)


def load_safety_dataset(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None = DEFAULT_MAX_LENGTH,
) -> list[SafetyRow]:
    """Reads and encodes a file of preference rows: ``prompt``, ``chosen`` and ``rejected``.

    Each field is text or a list of messages. Where ``chosen`` and ``rejected`` are lists and
    ``prompt`` is not, the messages that both begin with are the prompt, as in TRL.

    ``chosen`` and ``rejected`` are finished turns, whose end-of-turn token is scored. With
    ``"rejected_is_opening": true`` a row says that ``rejected`` is but the opening of an answer
    ("Sure, here is how to ...:"), which nothing follows: the model must not learn from it that, or
    whether, an answer ends there.

    Rows in which `max_length` leaves nothing of a continuation, or no difference between the two,
    are dropped, with one warning.

    Args:
        path: A ``.jsonl``, ``.json`` or ``.parquet`` file.
        tokenizer: The model's tokenizer; see `encode_chat`.
        max_length: Number of tokens to keep from the beginning of a row; None keeps all.

    Returns:
        One ``{"chosen": ..., "rejected": ...}`` per row, each with ``input_ids`` and ``labels``.

    Raises:
        DataError: A row or the file cannot be used.
    """

    def encode(row: Row) -> SafetyRow | None:
        pair = read_preference_pair(row)
        complete = not pair.rejected_is_opening
        chosen = _encode(row, tokenizer, pair.chosen, max_length)
        rejected = _encode(row, tokenizer, pair.rejected, max_length, complete=complete)
        if not chosen["labels"] or not rejected["labels"] or chosen == rejected:
            return None
        return {"chosen": chosen, "rejected": rejected}

    rows = read_numbered_rows(path)
    return _encode_rows(rows, encode, "difference between 'chosen' and 'rejected'", max_length)


def _encode(
    row: Row,
    tokenizer: "PreTrainedTokenizerBase",
    conversation: Conversation,
    max_length: int | None,
    *,
    complete: bool = True,
) -> EncodedRow:
    try:
        return encode_chat(
            tokenizer,
            conversation.messages,
            max_length,
            context=conversation.context,
            complete=complete,
        )
    except ChatTemplateError as error:
        row.fail(None, f"a chat that cannot be encoded: {error}", "a chat that the template takes")


def _encode_rows(
    rows: list[Row],
    encode: Callable[[Row], Encoded | None],
    wanted: str,
    max_length: int | None,
) -> list[Encoded]:
    encoded_rows = []
    dropped = []
    for row in rows:
        encoded = encode(row)
        if encoded is None:
            dropped.append(row.number)
        else:
            encoded_rows.append(encoded)
    path = rows[0].path
    within = "" if max_length is None else f" within max_length={max_length} tokens"
    if not encoded_rows:
        problem = f"{len(rows)} rows with no {wanted} left{within}"
        raise DataError(path, None, None, problem, "at least one row to train on")
    if dropped:
        warnings.warn(
            f"{path}: dropped {len(dropped)} of {len(rows)} rows, which have no {wanted} left"
            f"{within}; the first is row {dropped[0]}",
            stacklevel=3,
        )
    return encoded_rows
