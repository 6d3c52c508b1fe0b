"""A message's thought, and markers in the place of fields."""

from __future__ import annotations

import time
from typing import Any

import pytest

from sap_fast.data import ChatTemplateError
from sap_fast.data.turns import Markers, with_one_thought, with_thought_apart


def test_a_message_keeps_one_thought_and_what_templates_read() -> None:
    message = {"role": "assistant", "weight": 1, "name": None, "reasoning": "b", "thinking": " "}
    assert with_one_thought(message) == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "b",
    }


@pytest.mark.parametrize(
    ("content", "thought", "rest"),
    [
        ("<think>\nHm\n</think>\n\nHi\n", "Hm", "Hi\n"),
        (" <think>a</think>b</think>", "a", "b</think>"),
        ("<think> \n</think>Hi", None, None),
        ("<think>Hm", None, None),
        ("Hm</think>Hi", None, None),
        ("Hi <think>Hm</think>", None, None),
    ],
)
def test_a_thought_at_the_head_of_the_content_is_moved(
    content: str, thought: str | None, rest: str | None
) -> None:
    message: dict[str, Any] = {"role": "assistant", "content": content}
    moved = with_thought_apart(message)
    if thought is None:
        assert moved == message
    else:
        assert moved == {"role": "assistant", "content": rest, "reasoning_content": thought}
    assert with_thought_apart(message | {"role": "user"})["content"] == content
    assert with_thought_apart(message | {"reasoning_content": "x"})["content"] == content


def test_a_long_thought_that_does_not_end_costs_nothing() -> None:
    begun = time.process_time()
    with_thought_apart({"role": "assistant", "content": "<think>" + " a" * 500_000})
    assert time.process_time() - begun < 1


def test_markers_name_what_is_missing() -> None:
    markers = Markers()
    tool = markers.in_tool({"type": "function", "function": {"name": "add", "strict": True}})
    calls = [{"function": {"name": "add"}}, {"name": "sing", "arguments": {}}]
    message = markers.in_calls({"role": "assistant", "content": "", "tool_calls": calls}, 3)
    assert tool["function"]["strict"] is True
    assert markers.in_calls({"role": "user", "content": "Hi"}, 0) == {
        "role": "user",
        "content": "Hi",
    }
    names = [
        tool["function"]["name"],
        message["tool_calls"][0]["function"]["name"],
        message["tool_calls"][1]["name"],
    ]
    assert len(set(names)) == 3
    markers.refuse_missing(" ".join(names))
    for left_out, what in enumerate(("the tool 'add'", "the call of 'add'", "the call of 'sing'")):
        text = " ".join(name for index, name in enumerate(names) if index != left_out)
        with pytest.raises(ChatTemplateError, match=f"leaves out {what}"):
            markers.refuse_missing(text)
