"""What of an answer is scored: what the template marks, and thoughts or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from sap_fast.data import (
    AnswerScoring,
    ChatTemplateError,
    DataError,
    encode_turns,
    inspect_task_rows,
    load_safety_dataset,
    load_task_dataset,
)
from sap_fast.data.scoring import has_marks
from tests.data.chats import (
    CALL,
    CHAT,
    CHATML,
    TOOLS,
    build_tokenizer,
    chat,
    marked_text,
    published_templates,
    published_tokenizer,
    scored_text,
    scored_texts,
    write,
)

BY_TEMPLATE, AS_MARKED = AnswerScoring("template"), AnswerScoring("auto")
UNTHOUGHT = AnswerScoring("turns", "mask")

# Marks of the answer alone, without its end, as transformers' own example has them.
CONTENT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The same on lines of its own, whose white space the marks trim; and with the end.
TRIMMED = """{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\n' }}
    {%- if m['role'] == 'assistant' %}
        {% generation -%}
        {{ m['content'] }}
        {%- endgeneration %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- m['content'] + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
WITH_END = TRIMMED.replace(
    "{%- endgeneration %}\n        {{- '<|im_end|>\n' }}",
    "{{- '<|im_end|>\n' }}\n{% endgeneration %}",
)
# A part of the answer.
QUOTED = CONTENT.replace("{% generation %}", "{{ 'I say: ' }}{%+ generation +%}")


def by_transformers(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """The tokens of a chat, and those of them that transformers' mask has."""
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    return ids, [token if kept else -100 for token, kept in zip(ids, mask, strict=True)]


@pytest.mark.parametrize(
    ("template", "scored"),
    [
        (CONTENT, ["i", "The sea, blue"]),
        (TRIMMED, ["i", "The sea, blue"]),
        (WITH_END, ["i<|im_end|>", "The sea, blue<|im_end|>"]),
        (QUOTED, ["i", "The sea, blue"]),
    ],
    ids=["content", "trimmed", "with its end", "a part"],
)
def test_what_the_template_marks_is_scored(template: str, scored: list[str]) -> None:
    tokenizer = build_tokenizer(template)
    assert WITH_END != TRIMMED
    (row,) = encode_turns(tokenizer, CHAT, scoring=BY_TEMPLATE)
    assert scored_texts(tokenizer, [row]) == scored
    assert encode_turns(tokenizer, CHAT, scoring=AS_MARKED) == [row]
    # The same tokens are fed.
    (whole,) = encode_turns(tokenizer, CHAT)
    length = len(row["input_ids"])
    assert whole["input_ids"][:length] == row["input_ids"]
    # Transformers' own mask says the same, but for white space behind an answer. It goes by
    # offsets, which have to cover all characters for that.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    ids, labels = by_transformers(tokenizer, CHAT)
    assert ids[:length] == row["input_ids"]
    differing = [k for k in range(length) if labels[k] != row["labels"][k]]
    assert not "".join(tokenizer.decode([ids[k]]) for k in differing).strip()


def test_a_token_that_is_marked_in_part_is_scored() -> None:
    # "The" is one token of this tokenizer; the marks begin inside of it.
    halved = "{{ m['content'][:2] }}{% generation %}{{ m['content'][2:] }}"
    tokenizer = build_tokenizer(CONTENT.replace("{% generation %}{{ m['content'] }}", halved))
    question = {"role": "user", "content": "Write"}
    answer = {"role": "assistant", "content": " sea is"}
    (row,) = encode_turns(tokenizer, [question, answer], scoring=BY_TEMPLATE)
    tokens = [tokenizer.decode([t]) for t in row["labels"] if t != -100]
    assert "".join(tokens) in (" sea is", "ea is", "sea is")
    assert len(tokens[0]) > 1 or "".join(tokens) == "ea is"


def test_turns_that_are_only_read_stay_so() -> None:
    tokenizer = build_tokenizer(CONTENT)
    assert [
        scored_texts(tokenizer, encode_turns(tokenizer, messages, context=n, scoring=BY_TEMPLATE))
        for messages, n in ((CHAT, 3), ([CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]], 0))
    ] == [["The sea, blue"]] * 2


def test_marks_that_cannot_be_followed_are_refused_by_name() -> None:
    cut = CONTENT.replace("{% generation %}", "{% set x %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% endset %}{{ x[:20] }}"
    )
    nothing = CONTENT.replace("{{ m['content'] }}{% endgen", "{% endgen").replace(
        "{% endgeneration %}", "{% endgeneration %}{{ m['content'] }}"
    )
    for template, words in (
        (cut, "changes what stands in its generation marks"),
        (nothing, "marks nothing of the answer of message 2 as generated"),
        (CHATML, r"has no {% generation %} marks"),
    ):
        with pytest.raises(ChatTemplateError, match=words):
            encode_turns(build_tokenizer(template), CHAT[:2], scoring=BY_TEMPLATE)


MARKED = [name for name, text in sorted(published_templates().items()) if has_marks(text)]


@pytest.mark.parametrize("name", MARKED)
def test_published_marks_are_the_answers_that_are_found_without_them(name: str) -> None:
    tokenizer = published_tokenizer(name)
    cases: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        (chat(2), {}),
        (chat(2, reasoning_content="I think so."), {}),
        ([CHAT[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}], {"tools": TOOLS}),
    ]
    for messages, more in cases:
        try:
            whole = encode_turns(tokenizer, messages, **more)
        except ChatTemplateError:
            continue  # the template takes no such chat
        assert encode_turns(tokenizer, messages, **more, scoring=BY_TEMPLATE) == whole or (
            # One does not mark what follows a call and is not the model's to write.
            name == "diffusion_gemma_training" and more
        )


def test_thirty_published_templates_have_marks() -> None:
    assert not published_templates() or len(MARKED) >= 30


THOUGHTFUL = [
    name
    for name, text in sorted(published_templates().items())
    if "reasoning" in text or "think" in text
]


@pytest.mark.parametrize("name", THOUGHTFUL)
def test_a_thought_that_is_masked_is_read_and_not_scored(name: str) -> None:
    tokenizer = published_tokenizer(name)
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL], "thinking": "I think so."}
    cases: list[tuple[list[dict[str, Any]], dict[str, Any], str]] = [
        (chat(2, reasoning_content="I think so."), {}, "Answer"),
        ([CHAT[0], calling], {"tools": TOOLS}, "add"),
    ]
    for messages, more, rest in cases:
        try:
            whole = encode_turns(tokenizer, messages, **more)
        except ChatTemplateError:
            continue  # the template takes no such chat
        rows = encode_turns(tokenizer, messages, **more, scoring=UNTHOUGHT)
        assert [row["input_ids"] for row in rows] == [row["input_ids"] for row in whole]
        marked = encode_turns(tokenizer, messages, **more, scoring=AnswerScoring("auto", "mask"))
        assert marked == rows or (name == "diffusion_gemma_training" and more)
        texts = scored_texts(tokenizer, rows)
        for text, before in zip(texts, scored_texts(tokenizer, whole), strict=True):
            assert "think so" in before and "think so" not in text
            assert before.endswith(text) and rest in text and "think>" not in text


def test_a_thought_in_the_content_is_masked_where_the_template_knows_none() -> None:
    tokenizer = build_tokenizer(CHATML)
    answer = {"role": "assistant", "content": "<think>\nHm\n</think>\n\nThe sea"}
    (row,) = encode_turns(tokenizer, [CHAT[0], answer], scoring=UNTHOUGHT)
    assert marked_text(tokenizer, row).endswith("<think>\nHm\n</think>\n\n[[The sea<|im_end|>]]")
    # A thought alone is no answer.
    alone = {"role": "assistant", "content": "<think>\nHm\n</think>\n\n"}
    assert encode_turns(tokenizer, [CHAT[0], alone], scoring=UNTHOUGHT) == []
    assert len(encode_turns(tokenizer, [CHAT[0], alone])) == 1


def test_a_thought_whose_end_is_not_shown_is_refused_by_name() -> None:
    behind = CHATML.replace("m['content']", "m['content'] + (m['thinking'] or '')")
    answer = CHAT[3] | {"thinking": "Hm"}
    tokenizer = build_tokenizer(behind)
    (row,) = encode_turns(tokenizer, [CHAT[0], answer])
    assert scored_text(tokenizer, row) == "The sea, blueHm<|im_end|>"
    with pytest.raises(ChatTemplateError, match="where the thought of message 2 ends"):
        encode_turns(tokenizer, [CHAT[0], answer], scoring=UNTHOUGHT)


def test_files_are_scored_as_it_is_asked_and_pairs_by_turns(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(CONTENT)
    task = write(tmp_path / "task.jsonl", [{"messages": CHAT[:2]}])
    assert scored_text(tokenizer, load_task_dataset(task, tokenizer)[0]) == "i"
    turns = AnswerScoring("turns")
    (row,) = load_task_dataset(task, tokenizer, scoring=turns)
    assert scored_text(tokenizer, row) == "i<|im_end|>"
    assert inspect_task_rows(task, tokenizer, scoring=turns)[0].kept == [row]
    pair = {"prompt": "Hi", "chosen": "i", "rejected": "The"}
    safety = write(tmp_path / "safety.jsonl", json.dumps(pair))
    (read,) = load_safety_dataset(safety, tokenizer)
    assert scored_text(tokenizer, read["chosen"]) == "i<|im_end|>"
    with pytest.raises(DataError, match=r"row 1: got a chat that cannot be encoded: .* no {% gene"):
        load_task_dataset(task, build_tokenizer(CHATML), scoring=BY_TEMPLATE)


def test_other_words_are_refused() -> None:
    with pytest.raises(ValueError, match="by='all'; expected 'auto', 'template' or 'turns'"):
        AnswerScoring("all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reasoning='drop'; expected 'train' or 'mask'"):
        AnswerScoring("turns", "drop")  # type: ignore[arg-type]
