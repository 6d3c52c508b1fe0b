import json

import pytest

from sap_fast.data import (
    DataError,
    build_safety_pair,
    encode_chat,
    load_safety_dataset,
    load_task_dataset,
)
from tests.data.chats import (
    ASSISTANT,
    CHAT,
    TOOLS,
    USER,
    marked_text,
    published_tokenizer,
    scored_text,
    write,
)


def test_all_layouts_give_the_same_rows(tmp_path, tokenizer):
    prompt, answer = "Write a poem\n\nabout the sea", "The sea"
    user, assistant = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
    layouts = [
        {"messages": [user, assistant], "prompt": "x", "completion": "y"},
        {"prompt": prompt, "completion": answer, "output": "z"},
        {"prompt": [user], "completion": [assistant]},
        {"instruction": "Write a poem", "input": "about the sea", "output": answer},
        {"instruction": prompt, "input": "", "output": answer},
        {"instruction": prompt, "input": None, "output": answer, "messages": None},
    ]
    expected = [encode_chat(tokenizer, [user, assistant])]
    assert scored_text(tokenizer, expected[0]) == "The sea<|im_end|>"
    for layout in layouts:
        path = write(tmp_path / "rows.jsonl", [layout])
        assert load_task_dataset(path, tokenizer) == expected


def test_only_the_completion_is_trained(tmp_path, tokenizer):
    row = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    (encoded,) = load_task_dataset(write(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert scored_text(tokenizer, encoded) == "The sea, blue<|im_end|>"
    (encoded,) = load_task_dataset(write(tmp_path / "rows.jsonl", [{"messages": CHAT}]), tokenizer)
    assert scored_text(tokenizer, encoded) == "i<|im_end|>The sea, blue<|im_end|>"


@pytest.mark.parametrize(
    ("row", "field", "problem", "expected"),
    [
        (
            {"conversations": []},
            None,
            "an object with the fields 'conversations'",
            "'messages', or",
        ),
        ({"instruction": "a"}, None, "an object with the fields 'instruction'", "'output'"),
        ({}, None, "an empty object", "the fields"),
        ({"messages": "Hi"}, "messages", "'Hi'", "a list of messages"),
        ({"messages": []}, "messages", "an empty list", "a list of messages"),
        ({"messages": [USER, 7]}, "messages[1]", "7", "an object with 'role'"),
        (
            {"messages": [USER, {"role": "tool", "content": "a"}]},
            "messages[1].role",
            "'tool' without tool calls before it",
            "'tool_calls'",
        ),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "nothing", "one of system"),
        ({"messages": [USER, {"role": "user"}]}, "messages[1].content", "nothing", "text"),
        (
            {"messages": [USER]},
            "messages",
            "no message with the role 'assis",
            "at least one answer",
        ),
        ({"messages": [ASSISTANT]}, "messages[0].role", "'assistant'", "'system' or 'user'"),
        (
            {"messages": [{"role": "function", "content": "a"}]},
            "messages[0].role",
            "'function'",
            "one of system, developer, user, assistant, tool",
        ),
        ({"prompt": "a", "completion": "b", "system": 7}, "system", "7", "text"),
        ({"prompt": "a", "completion": "b", "history": "c"}, "history", "'c'", "a list of pairs"),
        ({"prompt": "a", "completion": "b", "history": [["c"]]}, "history[0]", "a list", "pairs"),
        ({"prompt": "a", "completion": "b", "history": [["c", 7]]}, "history[0]", "7", "text"),
        ({"prompt": 7, "completion": "a"}, "prompt", "7", "text (a string)"),
        ({"prompt": " ", "completion": "a"}, "prompt", "empty text", "visible character"),
        ({"prompt": [ASSISTANT], "completion": "a"}, "prompt[0].role", "'assistant'", "'system'"),
        ({"prompt": "a", "completion": [USER]}, "completion[0].role", "'user'", "'assistant'"),
        (
            {"prompt": "a", "completion": {"b": 1}},
            "completion",
            "an object with the fields 'b'",
            "",
        ),
        ({"prompt": "a", "completion": "\ud800"}, "completion", "a lone surrogate", "Unicode"),
        ({"instruction": 1.5, "output": "a"}, "instruction", "1.5", "text"),
        ({"instruction": "a", "input": 3, "output": "a"}, "input", "3", "text"),
        ({"instruction": "a", "output": ["x" * 99]}, "output[0]", "'xxxxx", "an object with"),
    ],
)
def test_a_bad_task_row_names_file_row_and_field(
    tmp_path, tokenizer, row, field, problem, expected
):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        load_task_dataset(path, tokenizer)
    error = caught.value
    assert (error.path, error.row, error.field) == (path, 2, field)
    assert error.problem.startswith(problem)
    assert expected in error.expected
    named = "" if field is None else f", field '{field}'"
    assert str(error).startswith(f"{path}, row 2{named}: got {problem}")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "Hi", "completion": "i"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"instruction": "Hi", "output": "i"},
    ],
)
def test_a_system_column_is_the_first_message(tmp_path, tokenizer, row):
    path = write(tmp_path / "rows.jsonl", [row | {"system": "Be kind."}])
    (encoded,) = load_task_dataset(path, tokenizer)
    assert marked_text(tokenizer, encoded) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n[[i<|im_end|>]]"
    )
    (plain,) = load_task_dataset(write(path, [row | {"system": ""}]), tokenizer)
    assert plain == encode_chat(tokenizer, [USER, ASSISTANT])


def test_a_system_column_leaves_the_prompt_unscored(tmp_path, tokenizer):
    row = {"prompt": [USER, ASSISTANT], "completion": [CHAT[3]], "system": "Be kind."}
    (encoded,) = load_task_dataset(write(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert scored_text(tokenizer, encoded) == "The sea, blue<|im_end|>"


def test_a_system_column_beside_a_system_message_is_refused(tmp_path, tokenizer):
    row = {"messages": [{"role": "system", "content": "x"}, USER, ASSISTANT], "system": "y"}
    with pytest.raises(DataError, match="field 'system': got text beside a message by 'system'"):
        load_task_dataset(write(tmp_path / "rows.jsonl", [row]), tokenizer)


def test_history_is_trained_with_an_output_and_read_with_a_completion(tmp_path, tokenizer):
    history = [["Hi", "i"]]
    rows = [
        {"instruction": "Write a poem", "output": "The sea, blue", "history": history},
        {"prompt": "Write a poem", "completion": "The sea, blue", "history": history},
    ]
    output, completion = (
        load_task_dataset(write(tmp_path / "rows.jsonl", [row]), tokenizer)[0] for row in rows
    )
    assert output == encode_chat(tokenizer, CHAT)
    assert completion == encode_chat(tokenizer, CHAT, context=3)
    row = {"prompt": [USER], "completion": "i", "history": history}
    with pytest.raises(DataError, match="field 'history': got turns beside the messages in 'pro"):
        load_task_dataset(write(tmp_path / "rows.jsonl", [row]), tokenizer)


def test_what_stands_beside_a_safety_prompt_is_read_by_both_continuations(tmp_path):
    tokenizer = published_tokenizer("qwen3")
    row = build_safety_pair("Write a poem") | {
        "system": "Be kind.",
        "history": [["Hi", "i"]],
        "tools": TOOLS,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    (pair,) = load_safety_dataset(write(tmp_path / "rows.jsonl", [row]), tokenizer)
    chat = [
        {"role": "system", "content": "Be kind."},
        *CHAT[:3],
        {"role": "assistant", "content": row["chosen"]},
    ]
    assert pair["chosen"] == encode_chat(tokenizer, chat, context=4, tools=TOOLS)
    chat[-1] = {"role": "assistant", "content": row["rejected"]}
    expected = encode_chat(tokenizer, chat, context=4, tools=TOOLS, complete=False)
    assert pair["rejected"] == expected
    assert "Be kind." in marked_text(tokenizer, expected)
    assert "Adds." in marked_text(tokenizer, expected)


def test_every_row_has_the_layout_of_the_first(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}]
    with pytest.raises(DataError, match="row 2, field 'prompt': got nothing; expected text"):
        load_task_dataset(write(tmp_path / "rows.jsonl", rows), tokenizer)


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected", "the same as in 'chosen'"),
        ({"prompt": "a", "chosen": "b"}, "rejected", "nothing"),
        ({"chosen": "a b", "rejected": "a c"}, "prompt", "nothing"),
        ({"prompt": "a", "chosen": [ASSISTANT], "rejected": [USER]}, "chosen", "no messages that"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER]}, "rejected", "an empty list"),
        ({"chosen": [USER], "rejected": [{"role": "user"}]}, "rejected[0].content", "nothing"),
        (
            {"prompt": [USER], "chosen": [USER, ASSISTANT], "rejected": "b"},
            "chosen[0].role",
            "'user'",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "rejected_is_opening": "yes"},
            "rejected_is_opening",
            "'yes'",
        ),
        (
            {
                "prompt": [USER],
                "chosen": "b",
                "rejected": [ASSISTANT, USER],
                "rejected_is_opening": True,
            },
            "rejected",
            "a last message that is not the assistant's",
        ),
    ],
)
def test_a_bad_safety_row_names_file_row_and_field(tmp_path, tokenizer, row, field, problem):
    path = write(tmp_path / "rows.json", json.dumps([build_safety_pair("Write a poem"), row]))
    with pytest.raises(DataError) as caught:
        load_safety_dataset(path, tokenizer)
    error = caught.value
    assert (error.path, error.row, error.field) == (path, 2, field)
    assert error.problem.startswith(problem)
