"""`sap-fast inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sap_fast.cli.inspection import _shown_tokens
from tests.byte_tokenizer import byte_tokenizer
from tests.cli.terminal import Terminal


def inspected(terminal: Terminal, path: Path, rows: list[Any], *more: str) -> list[str]:
    """The lines that are shown of a file with these rows, in a terminal of 80 columns."""
    terminal.monkeypatch.setenv("COLUMNS", "80")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["inspect", "--model", str(terminal.chat_model), "--task", str(path), *more]
    assert terminal.run(*arguments) == 0, terminal.shown
    lines = [line.rstrip() for line in terminal.shown.splitlines()]
    assert max(map(len, lines)) <= 80
    return lines


def chat(question: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def test_a_row_is_shown_by_token_with_what_is_scored(terminal: Terminal, tmp_path: Path) -> None:
    both = {"messages": chat("Hi", "No\nYes")["messages"] + chat("Go", "On")["messages"]}
    lines = inspected(terminal, tmp_path / "rows.jsonl", [both])
    at = next(number for number, line in enumerate(lines) if line.startswith("row 1: "))
    # One token per character; the template writes a line break behind each turn.
    assert lines[at].startswith("row 1: 53 tokens, 10 scored ─")
    assert lines[at + 1 : at + 8] == [
        "<|im_start|>│u│s│e│r│↵",
        "H│i│<|im_end|>│↵",
        "<|im_start|>│a│s│s│i│s│t│a│n│t│↵",
        "⟦N│o│↵",
        "Y│e│s│<|im_end|>⟧↵",
        "<|im_start|>│u│s│e│r│↵",
        "G│o│<|im_end|>│↵",
    ]
    assert lines[at + 9] == "⟦O│n│<|im_end|>⟧"
    assert "2 whole answers end with <|im_end|>" in lines
    assert "Lengths: 53 to 53 tokens, median 53, 95 % within 53" in lines


def test_what_becomes_of_the_rows_is_counted(terminal: Terminal, tmp_path: Path) -> None:
    rows = [
        chat("Hi", "Yes"),
        chat("x" * 60, "Yes"),
        chat("Hi", "x" * 60),
        chat("Hi", ""),
        {"messages": chat("Hi", "Yes")["messages"], "system": [1, 2]},
    ]
    shown = " ".join(inspected(terminal, tmp_path / "rows.jsonl", rows[:4], "--max-length", "50"))
    shown = " ".join(shown.split())
    for wanted in (
        "4 rows 2 sequences to train on",
        "0 refused",
        "2 dropped: no answer left within 50 tokens (rows 2, 4)",
        "1 cut: a part of the answers is beyond 50 tokens (row 3)",
        "row 3: 50 tokens, 29 scored, cut",
        "1 whole answer ends with <|im_end|>; 1 is cut off",
        "beyond --max-length",
    ):
        assert wanted in shown, wanted
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = terminal.refusal("inspect", "--model", str(terminal.chat_model), "--task", str(path))
    assert f"{path}, row 5, field 'system'" in line


def test_a_refused_row_says_why(terminal: Terminal, tmp_path: Path) -> None:
    rows = [chat("Hi", "Yes"), chat("Hi", "Yes") | {"chat_template_kwargs": {"colour": "red"}}]
    shown = " ".join(" ".join(inspected(terminal, tmp_path / "rows.jsonl", rows)).split())
    assert "1 refused (row 2) 0 dropped" in shown
    assert "the first:" in shown and "'colour'" in shown


def test_rows_are_spread_from_the_shortest_to_the_longest(
    terminal: Terminal, tmp_path: Path
) -> None:
    rows = [chat("Hi", "x" * length) for length in (60, 1, 90, 30, 120)]
    for asked, expected in (("3", ["2", "1", "5"]), ("1", ["2"]), ("0", []), ("9", list("24135"))):
        lines = inspected(terminal, tmp_path / "rows.jsonl", rows, "--rows", asked)
        shown = [line.split()[1].strip(":") for line in lines if line.startswith("row ")]
        assert shown == expected
    assert any("… 41 tokens …" in line for line in lines)  # of the 121 that are scored in row 5


def test_an_end_that_stops_no_generation_is_told(terminal: Terminal, tmp_path: Path) -> None:
    path = terminal.chat_model / "tokenizer_config.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before) | {"eos_token": "<|im_start|>"}))
        lines = inspected(terminal, tmp_path / "rows.jsonl", [chat("Hi", "Yes")])
    finally:
        path.write_text(before)
    assert "The tokenizer's end of sequence is another token, <|im_start|>" in " ".join(lines)


def test_characters_of_several_tokens_can_be_read() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("aé日🙂\n")["input_ids"]
    assert _shown_tokens(tokenizer, ids) == ["a", "é²", "日³", "🙂⁴", "↵\n"]
    assert _shown_tokens(tokenizer, ids[:2]) == ["a", "�"]
