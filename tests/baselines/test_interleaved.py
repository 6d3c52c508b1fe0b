"""Safety rows among task rows."""

from __future__ import annotations

import pytest

from sap_fast.baselines import interleave


def test_rows_are_spread_evenly_and_all_task_rows_stay_in_order() -> None:
    rows = interleave(list(range(8)), ["a", "b", "c"], 0.2)
    assert rows == [0, 1, 2, 3, "a", 4, 5, 6, 7, "b"]
    assert interleave(["x"], ["a", "b"], 0.75) == ["x", "a", "b", "a"]


def test_a_share_of_zero_changes_nothing() -> None:
    assert interleave([1, 2], [], 0.0) == [1, 2]


def test_what_cannot_be_is_named() -> None:
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="share"):
            interleave([1], [2], share)
    with pytest.raises(ValueError, match="refusals is empty"):
        interleave([1], [], 0.5)
