"""Several files of task rows with weights, given as one text."""

import random
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sap_fast.data.datasets import DEFAULT_MAX_LENGTH, load_task_dataset
from sap_fast.data.encoding import EncodedRow
from sap_fast.data.files import DataError
from sap_fast.data.scoring import AS_MARKED, AnswerScoring

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WEIGHTED = re.compile(r"(.+)=([^=,/]*)")


class Source(NamedTuple):
    """A file or dataset of rows, and how often an epoch takes each of its rows."""

    name: str
    weight: float = 1.0


def task_sources(text: str) -> list[Source]:
    """Reads what `--task` was given.

    Args:
        text: Names with commas between them, each with an optional weight: "a.jsonl,b.jsonl=0.5".
            A file of exactly that name is meant where there is one.

    Returns:
        The sources, at least one.

    Raises:
        DataError: A weight is no number above 0, or a name is empty.
    """
    if Path(text).exists():
        return [Source(text)]
    return [_source(part.strip()) for part in text.split(",")]


def _source(part: str) -> Source:
    match = _WEIGHTED.fullmatch(part)
    if match is None or Path(part).exists():
        if not part:
            raise DataError(part, None, None, "an empty name", "files with commas between them")
        return Source(part)
    name, given = match.groups()
    try:
        weight = float(given)
    except ValueError:
        weight = 0.0
    if not 0 < weight <= 1000:
        raise DataError(name, None, None, f"the weight {given!r}", "a number > 0 and ≤ 1000")
    return Source(name, weight)


def load_task_sources(
    text: str,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int | None = DEFAULT_MAX_LENGTH,
    *,
    seed: int = 0,
    scoring: AnswerScoring = AS_MARKED,
) -> list[EncodedRow]:
    """Reads and encodes the task rows of several files or datasets.

    A weight says how often an epoch takes a row: 2 takes each twice, 0.5 takes half of them, which
    half is drawn once by the seed, and 1.5 takes all and half of them again.

    Args:
        text: As `task_sources` reads it.
        tokenizer: As for `load_task_dataset`.
        max_length: Likewise.
        seed: Of the draw.
        scoring: As for `load_task_dataset`.

    Returns:
        The encoded rows of all, file after file.

    Raises:
        DataError: A row is malformed, a file cannot be used, or a weight leaves nothing of it.
    """
    rows: list[EncodedRow] = []
    for number, source in enumerate(task_sources(text)):
        encoded = load_task_dataset(source.name, tokenizer, max_length, scoring=scoring)
        whole, rest = divmod(source.weight, 1)
        rows += encoded * int(whole)
        drawn = round(rest * len(encoded))
        if whole == 0 and drawn == 0:
            problem = f"the weight {source.weight:g} of {len(encoded)} rows, which leaves none"
            raise DataError(source.name, None, None, problem, "a weight that leaves one")
        # Every file draws for itself: another file beside it changes nothing.
        places = random.Random(f"{seed} {number}").sample(range(len(encoded)), drawn)
        rows += [encoded[place] for place in sorted(places)]
    return rows
