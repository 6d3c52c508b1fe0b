"""Refusals by category, and how answers begin."""

from __future__ import annotations

from typing import Any

from sap_fast.reports.answers import category_rows, example_tables
from sap_fast.reports.pages import MISSING

SPACE = "\N{NO-BREAK SPACE}"


def evaluation(kind: str, *given: tuple[str, str | None, bool]) -> dict[str, Any]:
    answers = [
        {"prompt": prompt, "category": category, "first_words": f"{prompt}!"}
        for prompt, category, _ in given
    ]
    return {f"{kind}_answers": answers, f"{kind}_refused": [refused for *_, refused in given]}


def test_shares_are_those_of_each_category_and_kind() -> None:
    first = evaluation("harmful", ("a", "sex_crimes", True), ("b", "sex_crimes", False))
    first |= evaluation("harmless", ("c", "hate", False))
    second = evaluation("harmful", ("a", "sex_crimes", True), ("b", "sex_crimes", True))
    crimes, hate = category_rows([first, second])
    assert (crimes.name, crimes.asked) == ("sex crimes", "2 / 0")
    assert [harmful.text for harmful, _ in crimes.shares] == [f"50{SPACE}%", f"100{SPACE}%"]
    assert [harmful.part for harmful, _ in crimes.shares] == [0.5, 1.0]
    assert (hate.name, hate.asked) == ("hate", "0 / 1")
    assert [harmless.text for _, harmless in hate.shares] == [f"0{SPACE}%", MISSING]


def test_there_are_no_rows_without_categories_or_answers() -> None:
    assert category_rows([evaluation("harmful", ("a", None, True))]) == []
    assert category_rows([{"harmful_refused": [True], "harmful_answers": None}]) == []
    assert example_tables([{}]) == {}


def test_the_example_of_a_category_is_where_models_differ_most() -> None:
    first = evaluation("harmful", ("a", "hate", True), ("b", "hate", True), ("c", "x", False))
    second = evaluation("harmful", ("a", "hate", True), ("b", "hate", False), ("c", "x", False))
    (table,) = example_tables([first, second]).values()
    assert [(each.category, each.prompt) for each in table] == [("hate", "b"), ("x", "c")]
    assert table[0].answers == [("b!", True), ("b!", False)]


def test_without_categories_there_are_a_few_examples() -> None:
    many = [(f"request {k} " + "x" * 200, None, True) for k in range(9)]
    first, second = evaluation("harmless", *many), evaluation("harmless", many[0])
    (table,) = example_tables([first, second]).values()
    assert len(table) == 6 and table[0].answers[1] is not None and table[1].answers[1] is None
    assert len(table[0].prompt) == 160 and table[0].prompt.endswith("x…")
