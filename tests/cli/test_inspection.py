"""`sap-fast inspect`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sap_fast.cli.finetune import held_out_rows, prepare
from sap_fast.cli.inspection import _shown_tokens
from sap_fast.cli.settings import FinetuneSettings
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


def marked_model(terminal: Terminal, tmp_path: Path) -> Path:
    """The model with a template that marks answers without their ends."""
    model = shutil.copytree(terminal.chat_model, tmp_path / "marked")
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return model


def test_what_the_template_marks_is_shown(terminal: Terminal, tmp_path: Path) -> None:
    model = marked_model(terminal, tmp_path)
    terminal.chat_model = model
    rows = [chat("Hi", "Yes"), chat("Go", "On")]

    def shown(*more: str) -> str:
        lines = inspected(terminal, tmp_path / "rows.jsonl", rows, *more)
        return " ".join(" ".join(lines).split())

    by_marks = shown()
    assert "of which 5 are scored" in by_marks and "⟦Y│e│s⟧" in by_marks
    wanted = (
        "answers are scored as the chat template marks them; they leave 2 tokens of the answers"
    )
    assert wanted in by_marks
    assert shown("--scored", "template") == by_marks
    by_turns = shown("--scored", "turns")
    assert "of which 7 are scored" in by_turns and "⟦Y│e│s│<|im_end|>⟧" in by_turns
    assert "by turns, not by the chat template's marks: they leave 2 tokens" in by_turns


def test_marks_that_are_asked_for_and_missing_are_one_line(
    terminal: Terminal, tmp_path: Path
) -> None:
    for command in ("inspect", "finetune", "evaluate", "compare"):
        line = terminal.refusal(
            *terminal.command(command, tmp_path / "out", "--scored", "template")
        )
        assert f"--scored template: the chat template of {terminal.chat_model} has no" in line
        line = terminal.refusal(*terminal.command(command, tmp_path / "out", "--scored", "all"))
        assert "--scored all: expected auto or template or turns" in line
        line = terminal.refusal(*terminal.command(command, tmp_path / "out", "--reasoning", "no"))
        assert "--reasoning no: expected train or mask" in line


def test_thoughts_are_counted_and_masked_where_that_is_asked_for(
    terminal: Terminal, tmp_path: Path
) -> None:
    rows = [chat("Hi", "<think>\nHm\n</think>\n\nYes"), chat("Go", "On")]

    def shown(*more: str) -> str:
        lines = inspected(terminal, tmp_path / "rows.jsonl", rows, *more)
        return " ".join(" ".join(lines).split())

    # One token per character; two line breaks, two letters, and two more line breaks.
    thought = len("<think>\nHm\n</think>\n\n")
    assert f"{thought} tokens of thoughts, scored; --reasoning mask" in shown()
    masked = shown("--reasoning", "mask")
    assert f"{thought} tokens of thoughts, read, not scored" in masked and "⟦Y│e│s│<" in masked
    assert "answers are scored by turns; the chat template has no generation marks" in masked


def test_training_scores_what_is_shown(terminal: Terminal, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(chat("Hi", "<think>\nHm\n</think>\n\nYes")) + "\n"
    )
    model = str(marked_model(terminal, tmp_path))
    lengths = []
    for scored, reasoning in (("auto", "train"), ("turns", "train"), ("auto", "mask")):
        settings = FinetuneSettings(
            model=model,
            task=str(tmp_path / "rows.jsonl"),
            output=str(tmp_path / "tuned"),
            optimizer="adamw",
            scored=scored,
            reasoning=reasoning,
            eval=str(tmp_path / "rows.jsonl"),
        )
        trainer, tokenizer = prepare(settings, tmp_path)
        rows: Any = trainer.train_dataset
        assert rows == held_out_rows(settings, tokenizer)
        lengths.append(sum(label != -100 for label in rows[0]["labels"]))
    thought = len("<think>\nHm\n</think>\n\n")
    assert lengths == [thought + 3, thought + 4, 3]
