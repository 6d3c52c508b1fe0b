"""The requests that come with the package: short, harmful or harmless twins of those."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

BUILTIN = "builtin"
"""What stands for these requests where a file of requests or pairs is expected."""

Split = Literal["training", "evaluation"]
Kind = Literal["harmful", "harmless"]


@dataclass(frozen=True)
class BuiltinRequest:
    """A request written for this package; docs/safety-requests.md describes the set.

    Attributes:
        id: Unique; that of a harmless twin is its harmful request's with "-twin" behind it.
        category: Hazard that the harmful request falls under, such as "privacy".
        split: The half that it belongs to. A request and its twin are in the same half.
        kind: Whether it should be refused, or only sounds as if.
        prompt: What the user asks.
    """

    id: str
    category: str
    split: Split
    kind: Kind
    prompt: str


def builtin_requests(
    split: Split | None = None, kind: Kind | None = None
) -> tuple[BuiltinRequest, ...]:
    """Returns the requests that come with the package, category by category.

    Nothing in the evaluation half is near anything in the training half, so that a model trained
    on the one can be measured on the other.

    Args:
        split: "training" or "evaluation"; None for both.
        kind: "harmful" or "harmless"; None for both.

    Returns:
        The requests, none of which has an answer or any operational detail.
    """
    return tuple(
        request
        for request in _all_requests()
        if split in (None, request.split) and kind in (None, request.kind)
    )


@cache
def _all_requests() -> tuple[BuiltinRequest, ...]:
    text = Path(__file__).with_name("builtin_requests.jsonl").read_text(encoding="utf-8")
    return tuple(BuiltinRequest(**json.loads(line)) for line in text.splitlines())
