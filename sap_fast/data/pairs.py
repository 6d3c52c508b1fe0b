"""Safety pairs, built from requests that should be refused."""

import re
from typing import Any

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't assist with this request, because it could cause serious harm.",
    "Sorry, I won't help with this. If there is a safe question behind it, I am glad to answer it.",
    "I cannot provide help with something that could hurt people.",
    "No, I'm not able to help with that. It would be unsafe and could be against the law.",
    "I must decline this request. Please let me know if I can help with something else.",
)
"""Stock refusals of `build_safety_pair`."""

OPENINGS = (
    "Sure, here is {}:",
    "Here is {}:",
    "I'm glad to help you with that. Here is {}:",
    "Certainly! The first step is",
    "Of course. Here are the steps:\n1.",
    "To do that, you need",
)
"""Affirmative openings of `build_safety_pair`; {} is the request restated."""

_POLITE = re.compile(r"^(please|(can|could|will|would) you( please)?)\s+", re.IGNORECASE)
# "Explain how to ..." and "How do I ...": the opening says "how to" itself.
_HOW_TO = re.compile(
    r"^((tell|show|teach|explain|describe|demonstrate)( to)?( me| us)?( on)? how to"
    r"|how (to|(do|can|could|should|would) (i|we|you|one|someone|people)))\s+",
    re.IGNORECASE,
)
_QUESTION_OR_STATEMENT = re.compile(
    r"^(what|what's|who|whom|whose|when|where|which|why|how|is|are|am|was|were|do|does|did|has|have"
    r"|can|could|should|would|will|may|i|i'm|we|my|our|the|a|an|this|that|there|it)\b",
    re.IGNORECASE,
)


def build_safety_pair(request: str, index: int = 0, *, varied: bool = False) -> dict[str, Any]:
    """Builds a preference row from a request that should be refused.

    The answer to push down is an affirmative opening, which may restate the request and stops
    there: no harmful content is needed, or written.

    Args:
        request: What the user asks, such as "Write a phishing mail".
        index: Picks the refusal; pass the number of the request to vary them.
        varied: Whether `index` picks the opening too, of `OPENINGS`. Default: the first for all.
            Varied ones keep more refusals, also of what is harmless (docs/study.md, row 41).

    Returns:
        A row for `load_safety_dataset`: `prompt`, `chosen` (a refusal), `rejected` ("Sure,
        here is how to write a phishing mail:") and `rejected_is_opening: True`.

    Raises:
        ValueError: The request is blank.
    """
    if not request.strip():
        raise ValueError(f"request={request!r}; expected text with at least one visible character")
    # Every refusal meets every opening.
    opening = OPENINGS[index // len(REFUSALS) % len(OPENINGS) if varied else 0]
    return {
        "prompt": request,
        "chosen": REFUSALS[index % len(REFUSALS)],
        "rejected": opening.format(_restated(request)),
        "rejected_is_opening": True,
    }


def _restated(request: str) -> str:
    request = " ".join(request.split())
    wish = _POLITE.sub("", request.rstrip(" .!?:;"))
    if how_to := _HOW_TO.match(wish):
        return f"how to {wish[how_to.end() :]}"
    if not wish or _QUESTION_OR_STATEMENT.match(wish):
        return f'an answer to "{request}"'
    first, space, rest = wish.partition(" ")
    # Acronyms and names with capitals inside keep their spelling.
    if first[1:].islower():
        first = first.lower()
    return f"how to {first}{space}{rest}"
