"""Fields of messages, tools and template variables: passed on, honoured, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sap_fast.data import DataError, encode_chat, encode_turns, load_task_dataset
from tests.data.chats import (
    ASSISTANT,
    CALL,
    TOOLS,
    USER,
    marked_text,
    published_tokenizer,
    scored_text,
    write,
)

THOUGHT = ASSISTANT | {"reasoning_content": "Hm"}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "add", "tool_call_id": "1", "content": "four"}


def load(tmp_path: Path, row: dict[str, Any], template: str = "qwen3") -> list[Any]:
    path = write(tmp_path / "rows.jsonl", [row])
    return load_task_dataset(path, published_tokenizer(template))


@pytest.mark.parametrize(
    "message",
    [
        THOUGHT,
        ASSISTANT | {"reasoning": "Hm"},
        ASSISTANT | {"thinking": "Hm", "reasoning": "Hm", "reasoning_content": ""},
        {"role": "assistant", "content": "<think>\nHm\n</think>\n\ni"},
    ],
)
def test_a_thought_is_trained_under_every_name(tmp_path: Path, message: Any) -> None:
    tokenizer = published_tokenizer("qwen3")
    (row,) = load(tmp_path, {"messages": [USER, message]})
    assert scored_text(tokenizer, row) == "<think>\nHm\n</think>\n\ni<|im_end|>"


@pytest.mark.parametrize(
    "message", [ASSISTANT, ASSISTANT | {"reasoning_content": None}, ASSISTANT | {"thinking": " "}]
)
def test_no_thought_is_trained_that_the_data_does_not_have(tmp_path: Path, message: Any) -> None:
    tokenizer = published_tokenizer("qwen3")
    (row,) = load(tmp_path, {"messages": [USER, message]})
    assert marked_text(tokenizer, row).endswith("<think>\n\n</think>\n\n[[i<|im_end|>]]")


def test_calls_tools_and_results_are_passed_on(tmp_path: Path) -> None:
    tokenizer = published_tokenizer("qwen2_5")
    chat = [USER, CALLING, RESULT, ASSISTANT]
    (row,) = load(tmp_path, {"messages": chat, "tools": TOOLS}, "qwen2_5")
    assert [row] == encode_turns(tokenizer, chat, tools=TOOLS)
    text = marked_text(tokenizer, row)
    assert '"description": "Adds."' in text
    assert "<tool_response>\nfour\n</tool_response>" in text
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
    assert f"[[{called}<|im_end|>]]" in text
    assert text.endswith("[[i<|im_end|>]]")
    for content in ({"content": None}, {}):
        bare = {k: v for k, v in CALLING.items() if k != "content"} | content
        given = {"messages": [USER, bare, RESULT, ASSISTANT], "tools": json.dumps(TOOLS)}
        assert load(tmp_path, given, "qwen2_5") == [row]
    assert load(tmp_path, {"messages": [USER, ASSISTANT], "tools": "[]"}, "qwen2_5") == load(
        tmp_path, {"messages": [USER, ASSISTANT]}, "qwen2_5"
    )


def test_a_parquet_file_adds_nothing_to_tools_and_calls(tmp_path: Path) -> None:
    """Its columns give every object the fields of all."""
    import pyarrow
    import pyarrow.parquet

    other = {"type": "function", "function": {"name": "sing", "arguments": {"song": "la"}}}
    tool = {"type": "function", "function": {"name": "sing", "parameters": {"song": {"x": "y"}}}}
    rows: list[dict[str, Any]] = [
        {"messages": [USER, CALLING], "tools": TOOLS},
        {"messages": [USER, CALLING | {"tool_calls": [other]}], "tools": [tool]},
        {"messages": [USER, THOUGHT | {"weight": 1}], "tools": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tokenizer = published_tokenizer("qwen3")
    loaded = load_task_dataset(tmp_path / "rows.parquet", tokenizer)
    assert loaded == load_task_dataset(write(tmp_path / "rows.jsonl", rows), tokenizer)


def test_template_variables_are_honoured(tmp_path: Path) -> None:
    tokenizer = published_tokenizer("qwen3_8")
    chat = [USER, ASSISTANT]
    low = {"reasoning_effort": "low", "enable_thinking": None}
    (row,) = load(tmp_path, {"messages": chat, "chat_template_kwargs": low}, "qwen3_8")
    options = {"reasoning_effort": "low"}
    assert row == encode_chat(tokenizer, chat, template_kwargs=options)
    assert row != encode_chat(tokenizer, chat)


def test_text_in_parts_is_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    (row,) = load(tmp_path, {"messages": [USER | {"content": parts}, ASSISTANT]})
    assert row == encode_chat(published_tokenizer("qwen3"), [USER, ASSISTANT])


@pytest.mark.parametrize(
    ("message", "field", "problem"),
    [
        ({"content": [{"type": "image", "image": "x"}]}, "content[0].type", "'image'"),
        ({"weight": 0.5}, "weight", "0.5"),
        ({"weight": "1"}, "weight", "'1'"),
        ({"function_call": {"name": "add"}}, "function_call", "a call in the old form"),
        ({"reasoning": "a", "thinking": "b"}, "", "thoughts that differ in thinking, reasoning"),
        ({"role": "user", "weight": 1}, "weight", "1 for a turn by 'user'"),
        ({"role": "user", "reasoning": "Hm"}, "reasoning", "a thought of 'user'"),
        ({"role": "user", "tool_calls": [CALL]}, "tool_calls", "tool calls by 'user'"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(
    tmp_path: Path, message: Any, field: str, problem: str
) -> None:
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT | message, ASSISTANT]}]
    path = write(tmp_path / "rows.jsonl", rows)
    name = f"messages[1].{field}".rstrip(".")
    with pytest.warns(UserWarning, match="refused 1 of 2 rows") as caught:
        assert len(load_task_dataset(path, published_tokenizer("qwen3"))) == 1
    assert f"row 2, field '{name}': got {problem}; expected " in str(caught[0].message)


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        ({"tools": "x"}, "tools", "invalid JSON"),
        ({"tools": {"a": 1}}, "tools", "an object with the fields 'a'"),
        ({"tools": [7]}, "tools[0]", "7"),
        ({"tools": [{"function": {"name": 7}}]}, "tools[0]", "an object with the fields"),
        ({"chat_template_kwargs": "x"}, "chat_template_kwargs", "'x'"),
        ({"messages": [USER, CALLING | {"tool_calls": "x"}]}, "messages[1].tool_calls", "'x'"),
        ({"messages": [USER, CALLING | {"tool_calls": [{}]}]}, "messages[1].tool_calls[0]", "an e"),
        ({"messages": [USER, ASSISTANT | {"thinking": 7}]}, "messages[1].thinking", "7"),
        ({"messages": [USER, ASSISTANT, RESULT]}, "messages[2].role", "'tool' without tool calls"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "nothing"),
        ({"messages": [USER | {"content": [7]}, ASSISTANT]}, "messages[0].content[0]", "7"),
        ({"messages": [USER | {"content": []}, ASSISTANT]}, "messages[0].content", "an empty list"),
        (
            {"messages": [USER | {"content": [{"type": "text"}]}, ASSISTANT]},
            "messages[0].content[0].text",
            "nothing",
        ),
    ],
)
def test_what_is_malformed_is_an_error(tmp_path: Path, row: Any, field: str, problem: str) -> None:
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": [USER, ASSISTANT]} | row]
    with pytest.raises(DataError) as caught:
        load_task_dataset(write(tmp_path / "rows.jsonl", rows), published_tokenizer("qwen3"))
    assert (caught.value.row, caught.value.field) == (2, field)
    assert caught.value.problem.startswith(problem)


def test_half_a_surrogate_pair_in_a_tool_is_refused(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "add", "description": "\ud800"}}]
    with pytest.raises(DataError, match="surrogates not allowed"):
        load(tmp_path, {"messages": [USER, ASSISTANT], "tools": tools}, "qwen3_vl")
