"""What a model's chat template makes of task rows: tokens, which are scored, where turns end."""

from __future__ import annotations

import statistics
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from sap_fast.cli.models import load_tokenizer, refuse_without_marks
from sap_fast.data import AnswerScoring, EncodedRow, InspectedRow, inspect_task_rows
from sap_fast.data.encoding import cut_row
from sap_fast.data.scoring import AS_MARKED, WHOLE_ANSWERS
from sap_fast.data.templates import ChatTemplate
from sap_fast.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Of a long stretch of tokens, how many are shown at its beginning, and as many at its end.
_SHOWN = 40
_LEGEND = "⟦ … ⟧ is scored, the rest is only read. │ parts tokens; é² is made of two."
#: How many tokens can be one character, and what a part of one is decoded to.
_BYTES, _UNREADABLE = 4, "�"
_SUPERSCRIPT = str.maketrans("234", "²³⁴")
#: Bars of the histogram of lengths, and their width at most.
_BARS, _WIDTH = 8, 40


@dataclass(frozen=True)
class Inspection:
    """The rows of a file, and the tokenizer that they were encoded with."""

    tokenizer: PreTrainedTokenizerBase
    rows: list[InspectedRow]
    max_length: int
    scoring: AnswerScoring
    has_marks: bool
    """Whether the chat template marks what is generated."""
    beyond_marks: int
    """Tokens of the answers that the template's marks leave out."""
    of_thoughts: int
    """Tokens of thoughts in the answers."""


def inspect(
    model: str,
    task: str,
    *,
    max_length: int,
    scoring: AnswerScoring = AS_MARKED,
    trust_remote_code: bool = False,
) -> Inspection:
    """Reads and encodes a task file with a model's tokenizer; the model's weights are not read.

    Args:
        model: folder or hub name of a model or adapter.
        task: the file of task rows.
        max_length: tokens to keep of a row.
        scoring: what of the answers is scored.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: if the tokenizer cannot be loaded.
        DataError: for a row that cannot be used.
    """
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    refuse_without_marks(scoring.by, model, tokenizer)
    rows = inspect_task_rows(task, tokenizer, max_length, scoring=scoring)
    has_marks = ChatTemplate(tokenizer).has_marks
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are those of the rows above

        def left_out(other: AnswerScoring) -> int:
            """How many tokens are scored of whole answers, and not so."""
            pairs = zip(whole, inspect_task_rows(task, tokenizer, scoring=other), strict=True)
            return sum(
                _scored(one.whole) - _scored(two.whole) for one, two in pairs if not two.refused
            )

        whole = inspect_task_rows(task, tokenizer, scoring=WHOLE_ANSWERS)
        return Inspection(
            tokenizer,
            rows,
            max_length,
            scoring,
            has_marks,
            left_out(AnswerScoring("template")) if has_marks else 0,
            left_out(AnswerScoring("turns", "mask")),
        )


def inspection_page(inspection: Inspection, shown: int = 3) -> RenderableType:
    """Returns what to print: counts, lengths, ends of turns, and some rows token by token.

    Args:
        inspection: of a file.
        shown: how many rows to show, spread from the shortest to the longest.
    """
    parts: list[RenderableType] = [_counts(inspection)]
    sequences = [sequence for row in inspection.rows for sequence in row.kept]
    if sequences:
        lengths = [len(sequence["input_ids"]) for row in inspection.rows for sequence in row.whole]
        parts += [_lengths(lengths, inspection.max_length), _ends(inspection)]
        if shown:
            parts.append(Text(f"\n{_LEGEND}", "dim"))
        for row in _spread(inspection.rows, shown):
            parts += _row(inspection.tokenizer, row)
    return Group(*parts)


def _counts(inspection: Inspection) -> Table:
    rows, limit = inspection.rows, inspection.max_length
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(justify="right", min_width=7)
    table.add_column(overflow="fold")
    refused = [row for row in rows if row.refused is not None]
    dropped = [row for row in rows if row.refused is None and not row.kept]
    cut = [row for row in rows if row.kept and row.is_cut]
    sequences = [sequence for row in rows for sequence in row.kept]
    tokens = sum(len(sequence["labels"]) for sequence in sequences)
    scored = _scored(sequences)
    table.add_row(str(len(rows)), "rows")
    table.add_row(str(len(sequences)), "sequences to train on")
    share = f" ({scored / tokens:.0%})" if tokens else ""
    table.add_row(f"{tokens:,}", f"tokens, of which {scored:,} are scored{share}")
    table.add_row("", Text(_how_scored(inspection)))
    if inspection.of_thoughts:
        masked = inspection.scoring.reasoning == "mask"
        how = "read, not scored" if masked else "scored; --reasoning mask: read alone"
        table.add_row(str(inspection.of_thoughts), Text(f"tokens of thoughts, {how}"))
    for kind, found in (
        ("refused", refused),
        (f"dropped: no answer left within {limit} tokens", dropped),
        (f"cut: a part of the answers is beyond {limit} tokens", cut),
    ):
        numbers = ", ".join(str(row.number) for row in found[:5])
        more = ", …" if len(found) > 5 else ""
        where = f" (row{'s' * (len(found) > 1)} {numbers}{more})" if found else ""
        table.add_row(Text(str(len(found)), "yellow" if found else ""), Text(f"{kind}{where}"))
    if refused:
        table.add_row("", Text(f"the first: {refused[0].refused}"))
    return table


def _how_scored(inspection: Inspection) -> str:
    if not inspection.has_marks:
        return "answers are scored by turns; the chat template has no generation marks"
    beyond = f"they leave {inspection.beyond_marks} tokens of the answers out"
    if inspection.scoring.by == "turns":
        return f"answers are scored by turns, not by the chat template's marks: {beyond}"
    return f"answers are scored as the chat template marks them; {beyond}"


def _lengths(lengths: Sequence[int], limit: int) -> RenderableType:
    """Returns the lengths of whole sequences as a histogram."""
    ordered = sorted(lengths)
    facts = (
        f"Lengths: {ordered[0]} to {ordered[-1]} tokens, median {statistics.median_low(ordered)}, "
        f"95 % within {ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]}"
    )
    step = max(1, -(-(ordered[-1] + 1) // _BARS))
    counts = Counter(length // step for length in ordered)
    table = Table(show_header=False, box=None, pad_edge=False)
    for _ in range(2):
        table.add_column(justify="right", min_width=7)
    table.add_column(overflow="crop", no_wrap=True)
    for bar in range(min(counts), max(counts) + 1):
        size = counts[bar]
        width = -(-_WIDTH * size // max(counts.values()))
        start = bar * step
        beyond = start + step - 1 > limit
        table.add_row(
            f"{start}–{start + step - 1}",
            str(size),
            Text("▇" * width, "yellow" if beyond else "green")
            + Text(" beyond --max-length" if start >= limit else "", "yellow"),
        )
    return Group("", facts, table, "")


def _ends(inspection: Inspection) -> RenderableType:
    """Returns which tokens end the scored stretches that are whole."""
    tokenizer = inspection.tokenizer
    ends: Counter[int] = Counter()
    cut = 0
    for row in inspection.rows:
        for whole in row.whole:
            kept = cut_row(whole, inspection.max_length)
            if not kept["labels"]:
                continue
            marks = [*_is_scored(kept), False]
            places = [at for at in range(len(marks) - 1) if marks[at] > marks[at + 1]]
            if len(kept["labels"]) < len(whole["labels"]) and _is_scored(whole)[len(marks) - 1]:
                cut += 1
                places.pop()
            ends.update(kept["input_ids"][at] for at in places)
    total = sum(ends.values())
    cut_off = f"; {cut} {'is' if cut == 1 else 'are'} cut off" if cut else ""
    if not total:
        return Text(f"No whole answer{cut_off}")
    text = Text("1 whole answer ends with " if total == 1 else f"{total} whole answers end with ")
    for number, (token, count) in enumerate(ends.most_common(3)):
        text.append(", " if number else "")
        text.append(_shown_token(tokenizer, token), "bold")
        text.append(f" ({count})" if len(ends) > 1 else "")
    if len(ends) > 3:
        text.append(f", {len(ends) - 3} others")
    text.append(cut_off)
    stop = tokenizer.eos_token
    if stop is not None and ends.most_common(1)[0][0] != tokenizer.eos_token_id:
        text.append(
            f"\nThe tokenizer's end of sequence is another token, {stop}: make sure that "
            "generation stops where answers end.",
            "yellow",
        )
    return text


def _spread(rows: Sequence[InspectedRow], shown: int) -> list[InspectedRow]:
    """Returns rows of the shortest to the longest, evenly spread, each once."""
    ordered = sorted((row for row in rows if row.kept), key=lambda row: _tokens(row.kept))
    last = len(ordered) - 1
    places = {last * k // max(1, shown - 1) for k in range(shown)}
    return [ordered[place] for place in sorted(places)]


def _tokens(sequences: Sequence[EncodedRow]) -> int:
    return sum(len(sequence["labels"]) for sequence in sequences)


def _row(tokenizer: PreTrainedTokenizerBase, row: InspectedRow) -> Iterator[RenderableType]:
    for number, sequence in enumerate(row.kept, start=1):
        scored = _is_scored(sequence).count(True)
        part = f", sequence {number} of {len(row.kept)}" if len(row.kept) > 1 else ""
        cut = ", cut" if row.is_cut else ""
        title = f"row {row.number}{part}: {len(sequence['labels'])} tokens, {scored} scored{cut}"
        yield Padding(Rule(Text(title), align="left", style="dim"), (1, 0, 0, 0))
        yield _marked(tokenizer, sequence)


def _marked(tokenizer: PreTrainedTokenizerBase, sequence: EncodedRow) -> Text:
    """Returns the tokens of a sequence, with the scored stretches in brackets."""
    ids, marks = sequence["input_ids"], _is_scored(sequence)
    text = Text()
    start = 0
    while start < len(ids):
        stop = start
        while stop < len(ids) and marks[stop] == marks[start]:
            stop += 1
        style = "green" if marks[start] else ""
        text.append("⟦" if marks[start] else "", "bold green")
        text.append_text(_stretch(tokenizer, ids[start:stop], style))
        text.append("⟧" if marks[start] else "", "bold green")
        start = stop
    return text


def _stretch(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], style: str) -> Text:
    left_out = len(ids) - 2 * _SHOWN
    if left_out <= _SHOWN // 2:  # not worth leaving out
        return _joined(_shown_tokens(tokenizer, ids), style)
    text = _joined(_shown_tokens(tokenizer, ids[:_SHOWN]), style)
    text.append(f" … {left_out} tokens … ", "dim italic")
    return text.append_text(_joined(_shown_tokens(tokenizer, ids[-_SHOWN:]), style))


def _joined(tokens: Sequence[str], style: str) -> Text:
    text = Text(style=style)
    for before, token in zip(["\n", *tokens], tokens, strict=False):
        # A line break parts tokens too.
        text.append("" if before.endswith("\n") else "│", "dim")
        text.append(token)
    return text


def _shown_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Returns the texts of tokens; of several that are one character, it and their number."""
    shown: list[str] = []
    ids, start = list(ids), 0
    while start < len(ids):
        # A character of another script may be bytes of which none can be read by itself.
        size = 1
        for longer in range(1, min(_BYTES, len(ids) - start) + 1):
            if _UNREADABLE not in tokenizer.decode(list(ids[start : start + longer])):
                size = longer
                break
        text = "".join(map(_shown, tokenizer.decode(list(ids[start : start + size]))))
        shown.append(text + (str(size).translate(_SUPERSCRIPT) if size > 1 else ""))
        start += size
    return shown


def _shown_token(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Returns the text of a token; line breaks are shown and made, other control codes shown."""
    return "".join(map(_shown, tokenizer.decode([token])))


def _shown(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character == "\t":
        return "⇥"
    return character if character.isprintable() else repr(character)[1:-1]


def _scored(sequences: Sequence[EncodedRow]) -> int:
    return sum(_is_scored(sequence).count(True) for sequence in sequences)


def _is_scored(sequence: EncodedRow) -> list[bool]:
    return [label != IGNORE_INDEX for label in sequence["labels"]]
