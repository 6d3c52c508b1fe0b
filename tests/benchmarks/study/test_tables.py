"""The tables of docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.provenance import ROOT
from benchmarks.study import results, tables
from benchmarks.study.methods import MODELS
from tests.benchmarks.study.helpers import row, share


@pytest.mark.parametrize("page", list(tables.PAGES), ids=lambda page: page.name)
def test_pages_hold_the_table_of_the_summary(page: Path) -> None:
    folder, is_wanted = tables.PAGES[page]
    table = tables.markdown_table(results.read(folder / "summary.csv"), is_wanted)
    text = page.read_text(encoding="utf-8")
    assert tables.with_table(text, table, page) == text, (
        "run python -m benchmarks.study --stage none"
    )
    assert "| AdamW |" in table
    with pytest.raises(ValueError, match="has no lines"):
        tables.with_table(text.replace(tables.END, ""), table, page)


def test_a_cell_gives_share_difference_loss_and_seeds() -> None:
    reported = {
        "task": "gsm8k",
        "method": "sap",
        "setting": '{"probe_lr": 0.002}',
        "chosen": "1",
        "seeds": "0 1",
        "refused_harmful_mean": "0.661",
        "against_adamw_mean": "-0.02",
        "against_adamw_low": "-0.05",
        "against_adamw_high": "0.01",
        "refused_harmless_mean": "0.013",
        "task_loss_over_adamw": "0.99999",
    }
    line = tables.markdown_table([reported], bool).splitlines()[-1]
    cell = "66 %, −2 (−5 to +1) · 1 % · +0.0 % [2]"
    assert line == f"| SAP, probe_lr 0.002 * | – | – | {cell} |"


def test_one_page_has_the_chosen_settings_that_ran_on_every_task() -> None:
    rows = [
        {**each, "setting": setting}
        for each in results.read(results.FIRST / "summary.csv")
        if each["method"] == "sap" and each["chosen"] == "1"
        for setting in ("{}", '{"probe_lr": 0.002}')
    ]
    for each in rows[::2]:
        each["chosen"] = "0"
    _, compared = tables.PAGES[ROOT / "docs" / "measurements" / "safety.md"]
    lines = tables.markdown_table(rows, compared).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| SAP, probe_lr 0.002 *"]
    assert len(tables.markdown_table(rows[2:], compared).splitlines()) == 2  # one task is missing


def test_what_was_tried_has_a_line_each_and_says_what_could_be_seen() -> None:
    rows = [
        row("aligned", {}, "alpaca", answers=share(10), task_loss=1.53),
        row("adamw", {}, "alpaca", answers=share(4)),
        row("mixed", {"refusal_weight": 0.1}, "alpaca", answers=share(9), task_loss=1.4985),
        row("asft", {"penalty": 1.0}, "alpaca", answers=share(7), edgy=share(1)),
        row("asft", {"penalty": 1.0}, "gsm8k", answers=share(7)),
        row("asft", {"penalty": 0.1}, "alpaca", split="report"),
    ]
    lines = tables.selection_table(rows).splitlines()
    assert lines[2:6] == [
        "| Aligned, not tuned | 100 % · 0 % · +2.0 % · 2 | – | – |",
        "| AdamW | 40 % · 0 % · 2 | – | – |",
        "| Refusals in the data, refusal_weight 0.1 | 90 % · 0 % · −0.1 % · 2 | – | – |",
        "| AsFT, penalty 1.0 | 70 % · 10 % · +0.0 % · 2 | – | 70 % · 0 % · 2 |",
    ]
    # Refusals in the data and AsFT differ on 2 of 10 requests: 2.8 · (0.2/10)^½ is 0.396.
    assert "disagree on 20 % of the 10 requests" in lines[-1] and "of 40 points" in lines[-1]
    assert tables.power_line(rows[:3]) == ""


@pytest.mark.parametrize("model", list(MODELS))
def test_the_page_of_the_second_study_holds_the_tables_of_its_rows(model: str) -> None:
    rows = results.read(results.of_model(results.RESULTS, model))
    text = tables.SELECTION_PAGE.read_text(encoding="utf-8")
    if rows:
        table = tables.selection_table(rows)
        page = tables.SELECTION_PAGE
        assert tables.with_table(text, table, page, tables.begin_of(model)) == text, (
            "run python -m benchmarks.study --stage none"
        )
    assert tables.begin_of(model) in text
