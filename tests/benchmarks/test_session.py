"""What docs/how-to/first-hour.md shows was printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import session
from benchmarks.provenance import RESULTS


def test_the_page_shows_what_was_printed() -> None:
    text = (RESULTS / "session.txt").read_text(encoding="utf-8")
    blocks = session.blocks_of(text)
    assert list(blocks) == [command.line for command in session.COMMANDS]
    page = session.PAGE.read_text(encoding="utf-8")
    shown = re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL)
    assert shown == list(blocks.values())


def test_the_last_lines_are_kept() -> None:
    command = session.Command("sap-fast pairs --model m", 2)
    block = session.block(command, "first\n\nsecond  \nthird\n")
    assert block == "$ sap-fast pairs --model m\nsecond\nthird\n"
    text = f"# date: today\n\n{block}\n$ sap-fast merge\nMerged: m\n"
    blocks = session.blocks_of(text)
    assert blocks == {command.line: block, "sap-fast merge": "$ sap-fast merge\nMerged: m\n"}
    page = "Before.\n\n```console\n$ sap-fast merge\nold\n```\n\nAfter.\n"
    assert session.shown_in(page, blocks) == page.replace("old", "Merged: m")


def test_commands_run_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "here.jsonl").write_text("{}")
    shown = session.run(session.Command("sap-fast evaluate --help", 1), tmp_path)
    assert "--harmless" in shown and max(map(len, shown.splitlines())) <= 80
    line = "sap-fast evaluate --model nowhere --harmful here.jsonl"
    with pytest.raises(SystemExit, match=r"here\.jsonl, row 1"):
        session.run(session.Command(line, 1), tmp_path)
