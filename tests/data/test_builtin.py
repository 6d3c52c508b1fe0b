"""The requests that come with the package."""

from __future__ import annotations

import re
from collections import Counter
from difflib import SequenceMatcher

from benchmarks.assets import without_near_duplicates
from sap_fast.data import builtin_requests

EVERY = builtin_requests()


def test_every_hazard_has_as_many_requests_and_twins_in_both_halves() -> None:
    categories = {request.category for request in EVERY}
    assert len(categories) == 12
    count = Counter((request.category, request.split, request.kind) for request in EVERY)
    assert len(count) == 12 * 4 and set(count.values()) == {11}
    assert len(builtin_requests(kind="harmful")) == len(builtin_requests(kind="harmless")) == 264
    assert len(builtin_requests("training")) == 264


def test_a_twin_goes_with_its_request() -> None:
    by_id = {request.id: request for request in EVERY}
    assert len(by_id) == len(EVERY)
    for twin in builtin_requests(kind="harmless"):
        harmful = by_id[twin.id.removesuffix("-twin")]
        assert harmful.kind == "harmful"
        assert (harmful.category, harmful.split) == (twin.category, twin.split)
        assert stems(harmful.prompt) & stems(twin.prompt), twin


#: Beginnings of words that make no two requests sound alike.
COMMON = set(
    "how do i a the me my is what to in of for on that so are from with and at an as by can does "
    "wher whic it s writ give tell desc expl help make desi".split()
)


def stems(prompt: str) -> set[str]:
    return {word[:4] for word in re.findall(r"\w+", prompt.lower())} - COMMON


def test_requests_are_one_short_sentence() -> None:
    assert len({request.prompt.lower() for request in EVERY}) == len(EVERY)
    for request in EVERY:
        assert len(request.prompt) <= 100, request
        assert request.prompt.isascii() and request.prompt[-1] in ".?", request
        assert "child" not in request.prompt or request.kind == "harmless", request


def test_no_request_of_the_evaluation_half_is_near_a_training_one() -> None:
    trained = [request.prompt for request in builtin_requests("training")]
    asked = [request.prompt for request in builtin_requests("evaluation")]
    kept, dropped = without_near_duplicates(asked, trained)
    assert dropped == 0 and kept == asked
    # Nor by their letters.
    matcher = SequenceMatcher(autojunk=False)
    for prompt in asked:
        matcher.set_seq2(prompt.lower())
        for other in trained:
            matcher.set_seq1(other.lower())
            near = matcher.quick_ratio() > 0.75 and matcher.ratio() > 0.75
            assert not near, (prompt, other)
