"""Which tokens of an answer are scored: all, or those that the chat template marks, or no thoughts.

A template marks what the model is to write by `{% generation %}` … `{% endgeneration %}`, which
render to nothing. To see where they are, text is put beside them and taken out again.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sap_fast.data.turns import ChatTemplateError

Span = tuple[int, int]
"""The first character of a stretch of text, and the one behind its last."""


@dataclass(frozen=True)
class AnswerScoring:
    """What of the assistant's answers is scored.

    Attributes:
        by: "turns": each answer through its end of turn; "template": of that, what the template's
            generation marks enclose; "auto": as the template marks it, where it marks something.
        reasoning: "train": thoughts are scored as the rest of the answer; "mask": they are read.

    Raises:
        ValueError: One of them is something else.
    """

    by: Literal["auto", "template", "turns"] = "auto"
    reasoning: Literal["train", "mask"] = "train"

    def __post_init__(self) -> None:
        if self.by not in ("auto", "template", "turns"):
            raise ValueError(f"by={self.by!r}; expected 'auto', 'template' or 'turns'")
        if self.reasoning not in ("train", "mask"):
            raise ValueError(f"reasoning={self.reasoning!r}; expected 'train' or 'mask'")


AS_MARKED = AnswerScoring()
"""As the template marks answers, and whole where it marks nothing."""

WHOLE_ANSWERS = AnswerScoring("turns")
"""Answers through their ends of turn, with their thoughts."""


def has_marks(template: str) -> bool:
    """Whether a chat template has generation marks."""
    return _START.search(template) is not None


def made_visible(template: str) -> str:
    """Returns a chat template that writes text where its generation marks are.

    The empty blocks beside the text trim white space as the marks do: a template is rendered with
    `trim_blocks` and `lstrip_blocks`.
    """
    shown = _START.sub(rf"{{%\1 generation %}}{_FIRST}{{% if true %}}{{% endif \2%}}", template)
    return _END.sub(
        rf"{{%\1 if true %}}{{% endif %}}{_LAST}{{% endgeneration \2%}}",
        shown,
    )


def marked_spans(shown: str, plain: str) -> list[Span]:
    """Returns what the marks enclose, as spans of `plain`.

    Args:
        shown: A render of `made_visible(template)`.
        plain: The render of the template itself.

    Raises:
        ChatTemplateError: They differ in more than the marks, which the template reads itself then.
    """
    parts = re.split(f"({_FIRST}|{_LAST})", shown)
    spans: list[Span] = []
    at = start = 0
    for part in parts:
        if part == _FIRST:
            start = at
        elif part == _LAST:
            spans.append((start, at))
        else:
            at += len(part)
    if "".join(part for part in parts if part not in (_FIRST, _LAST)) != plain:
        raise ChatTemplateError(
            "the chat template changes what stands in its generation marks, so that they cannot be "
            "followed"
        )
    return spans


def within(spans: Sequence[Span], first: int, last: int) -> list[Span]:
    """Returns what of the spans lies between two places, and is not empty."""
    cut = ((max(start, first), min(end, last)) for start, end in spans)
    return [(start, end) for start, end in cut if start < end]


# Plain ASCII, so that no template escapes it.
_FIRST, _LAST = "SapFastMarkBegins", "SapFastMarkEnds"
_START = re.compile(r"\{%([-+]?)\s*generation\s*([-+]?)%\}")
_END = re.compile(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}")
