"""The table of judges."""

from __future__ import annotations

from typing import Any

from sap_fast.reports.judges import agreement, agreement_text, judged_by, judges_rows
from sap_fast.reports.pages import MISSING

FIRST: dict[str, Any] = {
    "harmful_refused": [True, True, False, False],
    "harmful_margins": [1.0, -1.0, -1.0, -2.0],
    "harmless_refused": [False, True],
    "judged_harmful": {"guard": [True, True, True, False]},
    "judged_harmless": None,
}
SECOND = FIRST | {
    "harmful_refused": [True, True, True, True],
    "judged_harmful": {"guard": [True, True, True, True]},
}


def test_every_judge_has_its_shares_and_its_agreement() -> None:
    rows = dict(judges_rows({"AdamW": FIRST, "Blending": SECOND, "Start": None}))
    assert list(rows) == ["phrases", "margin", "guard"]
    percent = "\N{NO-BREAK SPACE}%"
    both = [f"50{percent} / 50{percent}", f"100{percent} / 50{percent}"]
    assert rows["phrases"] == [*both, f"{MISSING} / {MISSING}", MISSING]
    assert rows["guard"][:2] == [f"75{percent} / {MISSING}", f"100{percent} / {MISSING}"]
    # Over the eight answers to harmful requests of both: 7 alike.
    assert rows["guard"][3] == f"{agreement([FIRST, SECOND], 'phrases', 'guard'):.2f}" == "0.60"
    assert rows["margin"][0] == f"25{percent} / {MISSING}"


def test_there_is_no_table_without_further_judges() -> None:
    plain = FIRST | {"judged_harmful": None}
    assert judges_rows({"AdamW": plain}) == [] == judged_by([plain])
    assert agreement([plain], "phrases", "guard") is None
    assert agreement_text([SECOND], "phrases", "guard") == MISSING  # both say yes to all
