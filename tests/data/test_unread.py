"""One word about the fields that nothing reads."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from sap_fast.data import load_requests, load_safety_dataset, load_task_dataset
from tests.data.chats import (
    ASSISTANT,
    CALL,
    CHATML,
    USER,
    build_tokenizer,
    published_tokenizer,
    write,
)


def warned(load: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load()
    assert {warning.filename for warning in caught} <= {__file__}
    return [str(warning.message) for warning in caught]


def test_unread_columns_are_named_once_with_their_rows(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"prompt": "Hi", "completion": "i", "source": "x", "weight": 0},
        {"prompt": "Hi", "completion": "i", "source": None, "output": ""},
        {"prompt": "Hi", "completion": "i", "source": "y", "labels": [], "meta": {}},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    assert warned(lambda: load_task_dataset(path, tokenizer)) == [
        f"{path}: nothing reads 'source' (in 2 of 3 rows), 'weight' (in 1 of 3 rows)"
    ]


def test_columns_that_are_read_are_not_named(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"instruction": "Hi", "input": "you", "output": "i", "system": "Be kind.", "tools": []},
        {"instruction": "Hi", "output": "i", "history": [["a", "b"]], "chat_template_kwargs": {}},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    assert warned(lambda: load_task_dataset(path, tokenizer)) == []
    pairs = [{"prompt": "Hi", "chosen": "a", "rejected": "b", "rejected_is_opening": True}]
    path = write(path, [pairs[0] | {"system": "Be kind.", "history": [["a", "b"]]}])
    assert warned(lambda: load_safety_dataset(path, tokenizer)) == []


def test_fields_of_messages_are_named_unless_the_template_reads_them(tmp_path: Path) -> None:
    named = {"name": "Bob", "end_turn": True, "reasoning_content": "", "tool_call_id": None}
    rows = [{"messages": [USER | named, USER | {"name": "Eve"}, ASSISTANT]}] * 2
    path = write(tmp_path / "rows.jsonl", [*rows, {"messages": [USER, ASSISTANT]}])
    plain, reading = build_tokenizer(CHATML), build_tokenizer(CHATML + "{# name #}")
    (text,) = warned(lambda: load_task_dataset(path, plain))
    assert "'name' of messages (in 2 of 3 rows)" in text
    assert "'end_turn' of messages (in 2 of 3 rows)" in text
    assert warned(lambda: load_task_dataset(path, reading)) == [
        f"{path}: nothing reads 'end_turn' of messages (in 2 of 3 rows)"
    ]


def test_the_links_of_tool_results_are_not_named(tmp_path: Path) -> None:
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "four", "name": "add", "tool_call_id": "1"}
    tokenizer = published_tokenizer("qwen2_5")
    assert "tool_call_id" not in tokenizer.chat_template
    path = write(tmp_path / "rows.jsonl", [{"messages": [USER, calling, result, ASSISTANT]}])
    assert warned(lambda: load_task_dataset(path, tokenizer)) == []


def test_refused_rows_are_counted_too(tmp_path: Path, tokenizer: Any) -> None:
    half = ASSISTANT | {"weight": 0.5}
    rows = [{"messages": [USER, half], "id": 1}, {"messages": [USER, ASSISTANT], "id": 2}]
    path = write(tmp_path / "rows.jsonl", rows)
    refused, unread = warned(lambda: load_task_dataset(path, tokenizer))
    assert refused.startswith(f"{path}: refused 1 of 2 rows")
    assert unread == f"{path}: nothing reads 'id' (in 2 of 2 rows)"


def test_columns_of_pairs_and_requests(tmp_path: Path, tokenizer: Any) -> None:
    pair = {"prompt": "Hi", "chosen": "a", "rejected": "b", "score": 1}
    path = write(tmp_path / "pairs.jsonl", [pair])
    assert warned(lambda: load_safety_dataset(path, tokenizer)) == [
        f"{path}: nothing reads 'score' (in 1 of 1 rows)"
    ]
    rows = [
        {"prompt": "a", "system": "Be kind.", "refusal": "No"},
        {"instruction": "a", "input": "b"},
        {"text": "a", "input": "b"},
    ]
    requests = write(tmp_path / "requests.jsonl", rows)
    assert warned(lambda: load_requests(requests)) == [
        f"{requests}: nothing reads 'system' (in 1 of 3 rows), 'input' (in 1 of 3 rows)"
    ]


@pytest.mark.parametrize("value", [0, False, "x", [0], {"a": None}])
def test_whatever_holds_something_counts(tmp_path: Path, tokenizer: Any, value: Any) -> None:
    row = {"prompt": "Hi", "completion": "i", "x": value}
    path = write(tmp_path / "rows.jsonl", [row])
    assert len(warned(lambda: load_task_dataset(path, tokenizer))) == 1
