"""Task and safety files as encoded rows, ready for a collator."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, TypeVar

from sap_fast.data.conversations import (
    SAFETY_COLUMNS,
    Conversation,
    read_preference_pair,
    task_layout,
)
from sap_fast.data.encoding import EncodedRow, cut_row, encode_turns
from sap_fast.data.files import DataError, RefusedRow, Row, read_numbered_rows
from sap_fast.data.scoring import AS_MARKED, WHOLE_ANSWERS, AnswerScoring
from sap_fast.data.templates import ChatTemplate
from sap_fast.data.turns import ChatTemplateError
from sap_fast.data.unread import Unread
from sap_fast.losses import IGNORE_INDEX

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
    *,
    scoring: AnswerScoring = AS_MARKED,
) -> list[EncodedRow]:
    """Reads and encodes a task file; the result serves as a Trainer's `train_dataset`.

    The columns of the first row tell the layout of the file, the first that fits of:

    * `messages`: a list of `{"role": ..., "content": ...}`; every assistant turn is trained whose
      `weight` is not 0.
    * `prompt` and `completion`: text, or lists of messages; the completion is trained.
    * `instruction`, optional `input`, `output` (Alpaca): the prompt is the instruction and, where
      there is one, a blank line and the input; the output is trained.

    All of them may have `system` (text that becomes the first message), `tools` (JSON schemas) and
    `chat_template_kwargs` (variables for the template). The last two may have `history`: pairs of
    earlier questions and answers, which are trained with an `output` and read with a `completion`.
    Columns that are not read are named in one warning.

    A chat makes one row as long as its turns read the same in the prompts of later turns, and else
    a row per answer; see `encode_turns`.

    Rows that cannot be encoded are refused, and rows of which no answer is left within `max_length`
    (or that have none) are dropped, each with one warning that tells how many and the first; see
    docs/refused.md.

    Args:
        path: A `.jsonl`, `.json`, `.csv` or `.parquet` file, or a dataset; see `read_rows`.
        tokenizer: The model's tokenizer; see `encode_turns`.
        max_length: Number of tokens to keep from the beginning of a row; None keeps all.
        scoring: What of the answers is scored. By default what the chat template marks as
            generated, or where it has no such marks all of it.

    Returns:
        One `{"input_ids": [...], "labels": [...]}` per row, labels -100 where not trained.

    Raises:
        DataError: A row is malformed, the file cannot be used, or no row of it is left.
    """
    rows = read_numbered_rows(path)
    unread = Unread(ChatTemplate(tokenizer).reads)
    encoded = _encode_rows(
        rows, _task_encoder(rows, tokenizer, unread, max_length, scoring), "answer", max_length
    )
    unread.warn(path)
    return encoded


@dataclass(frozen=True)
class InspectedRow:
    """What becomes of a task row.

    Attributes:
        number: Of the row, as errors give it.
        whole: Its sequences at full length.
        kept: What of them is trained, within the length that is kept; none for a dropped row.
        refused: Why it is refused; None if it is not.
    """

    number: int
    whole: list[EncodedRow]
    kept: list[EncodedRow]
    refused: RefusedRow | None = None

    @property
    def is_cut(self) -> bool:
        """Whether a part of what would be scored is beyond the length that is kept."""
        return _scored(self.kept) < _scored(self.whole)


def inspect_task_rows(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None = DEFAULT_MAX_LENGTH,
    *,
    scoring: AnswerScoring = AS_MARKED,
) -> list[InspectedRow]:
    """Reads a task file as `load_task_dataset` does, and tells what becomes of every row.

    Args:
        path: As there.
        tokenizer: As there.
        max_length: As there.
        scoring: As there.

    Returns:
        One entry per row of the file, also where nothing of it is left.

    Raises:
        DataError: A row is malformed, or the file cannot be used.
    """
    rows = read_numbered_rows(path)
    unread = Unread(ChatTemplate(tokenizer).reads)
    encode = _task_encoder(rows, tokenizer, unread, None, scoring)
    inspected = []
    for row in rows:
        try:
            whole = encode(row)
        except RefusedRow as refusal:
            inspected.append(InspectedRow(row.number, [], [], refusal))
            continue
        cut = [cut_row(sequence, max_length) for sequence in whole]
        kept = [sequence for sequence in cut if sequence["labels"]]
        inspected.append(InspectedRow(row.number, whole, kept))
    unread.warn(path)
    return inspected


def _scored(sequences: list[EncodedRow]) -> int:
    return sum(label != IGNORE_INDEX for row in sequences for label in row["labels"])


def _task_encoder(
    rows: list[Row],
    tokenizer: "PreTrainedTokenizerBase",
    unread: Unread,
    max_length: int | None,
    scoring: AnswerScoring,
) -> Callable[[Row], list[EncodedRow]]:
    layout = task_layout(rows[0])

    def encode(row: Row) -> list[EncodedRow]:
        unread.count_columns(row, layout.columns)
        conversation = layout.read(row)
        unread.count_fields(conversation.messages)
        return _encode(row, tokenizer, conversation, max_length, scoring=scoring)

    return encode


def load_safety_dataset(
    path: str | Path,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None = DEFAULT_MAX_LENGTH,
) -> list[SafetyRow]:
    """Reads and encodes a file of preference rows: `prompt`, `chosen` and `rejected`.

    Each field is text or a list of messages. Where `chosen` and `rejected` are lists and `prompt`
    is not, the messages that both begin with are the prompt, as in TRL. Rows may have `system`,
    `tools`, `chat_template_kwargs` and `history` too, as in `load_task_dataset`.

    `chosen` and `rejected` are finished turns, whose end-of-turn token is scored. With
    `"rejected_is_opening": true` a row says that `rejected` is but the opening of an answer ("Sure,
    here is how to ...:"), which nothing follows: the model must not learn from it that, or whether,
    an answer ends there.

    Answers are scored whole, also where the template has generation marks: it is by their tokens
    that the two differ.

    Rows that cannot be encoded are refused, and rows in which `max_length` leaves nothing of a
    continuation, or no difference between the two, are dropped, each with one warning that tells
    how many and the first; see docs/refused.md.

    Args:
        path: A `.jsonl`, `.json`, `.csv` or `.parquet` file, or a dataset; see `read_rows`.
        tokenizer: The model's tokenizer; see `encode_turns`.
        max_length: Number of tokens to keep from the beginning of a row; None keeps all.

    Returns:
        One `{"chosen": ..., "rejected": ...}` per row, each with `input_ids` and `labels`.

    Raises:
        DataError: A row is malformed, the file cannot be used, or no row of it is left.
    """
    unread = Unread(ChatTemplate(tokenizer).reads)

    def encode(row: Row) -> list[SafetyRow]:
        unread.count_columns(row, SAFETY_COLUMNS)
        pair = read_preference_pair(row)
        unread.count_fields([*pair.chosen.messages, *pair.rejected.messages])
        complete = not pair.rejected_is_opening
        chosen = _encode(row, tokenizer, pair.chosen, max_length)
        rejected = _encode(row, tokenizer, pair.rejected, max_length, complete=complete)
        for field, encoded in (("chosen", chosen), ("rejected", rejected)):
            if len(encoded) > 1:
                row.refuse(
                    field,
                    "answers whose earlier turns the chat template changes",
                    "a continuation in one sequence: one answer",
                )
        if not chosen or not rejected or chosen == rejected:
            return []
        return [{"chosen": chosen[0], "rejected": rejected[0]}]

    rows = read_numbered_rows(path)
    pairs = _encode_rows(rows, encode, "difference between 'chosen' and 'rejected'", max_length)
    unread.warn(path)
    return pairs


def _encode(
    row: Row,
    tokenizer: "PreTrainedTokenizerBase",
    conversation: Conversation,
    max_length: int | None,
    *,
    complete: bool = True,
    scoring: AnswerScoring = WHOLE_ANSWERS,
) -> list[EncodedRow]:
    try:
        return encode_turns(
            tokenizer,
            conversation.messages,
            max_length,
            context=conversation.context,
            complete=complete,
            tools=conversation.tools,
            template_kwargs=conversation.template_kwargs,
            scoring=scoring,
        )
    except ChatTemplateError as error:
        problem = f"a chat that cannot be encoded: {error}"
        row.refuse(None, problem, "a chat that the template takes")


def _encode_rows(
    rows: list[Row],
    encode: Callable[[Row], list[Encoded]],
    wanted: str,
    max_length: int | None,
) -> list[Encoded]:
    encoded_rows: list[Encoded] = []
    dropped = []
    refused = []
    for row in rows:
        try:
            encoded = encode(row)
        except RefusedRow as refusal:
            refused.append(refusal)
            continue
        encoded_rows += encoded
        if not encoded:
            dropped.append(row.number)
    path = rows[0].path
    within = "" if max_length is None else f" within max_length={max_length} tokens"
    if not encoded_rows and refused:
        first = refused[0]
        others = "" if len(rows) == 1 else f" (the first of {len(refused)} rows that are refused)"
        raise DataError(path, first.row, first.field, first.problem + others, first.expected)
    if not encoded_rows:
        problem = f"{len(rows)} rows with no {wanted} left{within}"
        raise DataError(path, None, None, problem, "at least one row to train on")
    if refused:
        warnings.warn(
            f"{path}: refused {len(refused)} of {len(rows)} rows; the first: {refused[0]}",
            stacklevel=3,
        )
    if dropped:
        warnings.warn(
            f"{path}: dropped {len(dropped)} of {len(rows)} rows, which have no {wanted} left"
            f"{within}; the first is row {dropped[0]}",
            stacklevel=3,
        )
    return encoded_rows
