"""The tables of docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.provenance import ROOT
from benchmarks.study import results, tables


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
    row = {
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
    line = tables.markdown_table([row], bool).splitlines()[-1]
    cell = "66 %, −2 (−5 to +1) · 1 % · +0.0 % [2]"
    assert line == f"| SAP, probe_lr 0.002 * | – | – | {cell} |"


def test_one_page_has_the_chosen_settings_that_ran_on_every_task() -> None:
    rows = [
        {**row, "setting": setting}
        for row in results.read(results.FIRST / "summary.csv")
        if row["method"] == "sap" and row["chosen"] == "1"
        for setting in ("{}", '{"probe_lr": 0.002}')
    ]
    for row in rows[::2]:
        row["chosen"] = "0"
    _, compared = tables.PAGES[ROOT / "docs" / "measurements" / "safety.md"]
    lines = tables.markdown_table(rows, compared).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| SAP, probe_lr 0.002 *"]
    assert len(tables.markdown_table(rows[2:], compared).splitlines()) == 2  # one task is missing
