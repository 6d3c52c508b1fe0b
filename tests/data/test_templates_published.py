"""Every published template that TRL ships, against what inference feeds."""

from __future__ import annotations

import re
from typing import Any

import pytest

from sap_fast.data import ChatTemplateError, encode_prompt, encode_turns
from tests.data.chats import (
    CALL,
    TOOLS,
    chat,
    marked_text,
    published_templates,
    published_tokenizer,
    scored_texts,
)

NAMES = sorted(published_templates())
EMPTY_THOUGHT = re.compile(r"\s*(<think>)?\s*</think>\s*")
THINKING: list[dict[str, Any]] = [{}, {"enable_thinking": False}, {"enable_thinking": True}]

# The templates that write tools, calls and results; those of DeepSeek write no tools.
CALLING = re.compile(
    r"(diffusion_gemma|gemma4(_v\d)?|glm4moe|gptoss|lfm2_2_5.*|lfm2_v2|llama3_[12]|muse_glimmer"
    r"|nemotron_.*|qwen2_5|qwen3.*?)(_training)?"
)


def render(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    """What transformers renders, with text as the template wants it."""

    def in_parts(message: dict[str, Any]) -> dict[str, Any]:
        return message | {"content": [{"type": "text", "text": message["content"]}]}

    question = [{"role": "user", "content": "Is this read?"}]
    try:
        takes_text = "Is this read?" in tokenizer.apply_chat_template(question, tokenize=False)
    except Exception:
        takes_text = False
    if not takes_text:
        messages = [in_parts(message) for message in messages]
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def fed_by_inference(tokenizer: Any, before: list[dict[str, Any]], **options: Any) -> set[str]:
    """The prompts with which inference may ask for the next answer."""
    return {
        render(tokenizer, before, add_generation_prompt=True, **thinking, **options)
        for thinking in THINKING
    }


def check_against_inference(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> None:
    """Each answer is scored once, through its end, behind the tokens that inference feeds."""
    rows = encode_turns(tokenizer, messages, **options)
    answers = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
    starts = [
        (row, place)
        for row in rows
        for place in range(1, len(row["labels"]))
        if row["labels"][place] != -100 and row["labels"][place - 1] == -100
    ]
    texts = scored_texts(tokenizer, rows)
    assert len(starts) == len(texts) == len(answers)
    for (row, start), scored, index in zip(starts, texts, answers, strict=True):
        before = messages[:index]
        fed = tokenizer.decode(row["input_ids"][:start])
        prompts = fed_by_inference(tokenizer, before, **options)
        closed = {prompt for prompt in prompts if fed.startswith(prompt)}
        assert any(
            fed == prompt or EMPTY_THOUGHT.fullmatch(fed.removeprefix(prompt)) for prompt in closed
        ), (fed, prompts)
        assert row["input_ids"][:start] == tokenizer.encode(fed, add_special_tokens=False)
        assert messages[index]["content"] in scored
        assert "Question" not in scored and "Be kind" not in scored
        # What the template writes for the answer, through its end.
        whole = [
            render(tokenizer, messages[: index + 1], **thinking, **options).rstrip()
            for thinking in THINKING
        ]
        end = tokenizer.eos_token
        assert any(text.endswith(scored) for text in whole) or (
            scored.endswith(end) and any(text.endswith(scored.removesuffix(end)) for text in whole)
        ), (scored, whole)
        assert not scored.endswith(messages[index]["content"])
        if "reasoning_content" not in messages[index]:
            assert "think" not in scored


def test_all_published_templates_are_there() -> None:
    assert len([name for name in NAMES if not name.endswith("_training")]) >= 41


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_is_what_inference_would_have_the_model_write(name: str) -> None:
    tokenizer = published_tokenizer(name)
    for turns in (1, 2, 3):
        check_against_inference(tokenizer, chat(turns))
        # Only Gemma's first template takes no system message.
        if name.removesuffix("_training") == "gemma":
            with pytest.raises(
                ChatTemplateError, match=r"the roles system, user, .* not supported"
            ):
                encode_turns(tokenizer, chat(turns, system=True))
        else:
            check_against_inference(tokenizer, chat(turns, system=True))
    prompt = encode_prompt(tokenizer, "Question 0?")
    assert tokenizer.decode(prompt) in fed_by_inference(tokenizer, chat(1)[:1])


@pytest.mark.parametrize("name", NAMES)
def test_a_thought_is_scored_or_refused_by_name(name: str) -> None:
    tokenizer = published_tokenizer(name)
    messages = chat(2, reasoning_content="I think so.")
    written = [render(tokenizer, messages, **thinking) for thinking in THINKING]
    opened = render(tokenizer, messages[:1], add_generation_prompt=True).rstrip()
    if not any("I think so." in text for text in written) and not opened.endswith("<think>"):
        with pytest.raises(ChatTemplateError, match="leaves out the 'reasoning_content' of mess"):
            encode_turns(tokenizer, messages)
        # Where the template knows no thoughts, one in the content is text like any other.
        content = "<think>\nI think so.\n</think>\n\nAnswer."
        (row,) = encode_turns(tokenizer, [messages[0], {"role": "assistant", "content": content}])
        assert content in marked_text(tokenizer, row)
        return
    rows = encode_turns(tokenizer, messages)
    for text in scored_texts(tokenizer, rows):
        assert text.count("I think so.") == 1
        assert text.index("I think so.") < text.index("Answer ")
        if opened.endswith("<think>"):
            assert "<think>" not in text and "</think>" in text
    # The other names of the field, and a thought at the head of the content, are the same.
    for field in ("reasoning", "thinking"):
        assert encode_turns(tokenizer, chat(2, **{field: "I think so."})) == rows
    in_content = [
        {"role": m["role"], "content": f"<think>\nI think so.\n</think>\n\n{m['content']}"}
        if m["role"] == "assistant"
        else m
        for m in messages
    ]
    assert encode_turns(tokenizer, in_content) == rows


@pytest.mark.parametrize("name", NAMES)
def test_tools_and_their_calls_are_written_or_refused_by_name(name: str) -> None:
    tokenizer = published_tokenizer(name)
    question = {"role": "user", "content": "Question 0?"}
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    result = {"role": "tool", "name": "add", "content": "four"}
    answer = {"role": "assistant", "content": "Answer."}
    try:
        rows = encode_turns(tokenizer, [question, calling, result, answer], tools=TOOLS)
    except ChatTemplateError as error:
        assert not CALLING.fullmatch(name)
        assert re.search("leaves out the (tool|call of) 'add'|rejects a chat|begin the", str(error))
        return
    assert CALLING.fullmatch(name)
    call, reply = scored_texts(tokenizer, rows)
    assert "add" in call and "2" in call and '\\"' not in call
    assert "Answer." in reply and "four" not in reply
    fed = tokenizer.decode(rows[0]["input_ids"])
    assert "Adds." in fed and "four" in tokenizer.decode(rows[-1]["input_ids"])
    as_text = CALL | {"function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [question, calling | {"content": None, "tool_calls": [as_text]}, result, answer]
    assert encode_turns(tokenizer, messages, tools=TOOLS) == rows


ANSWERS = [
    # The thought that a model may leave empty is read, not scored; the history is without it.
    (
        "qwen3",
        [
            "<|im_start|>user\nQuestion 0?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n[[Answer 0.<|im_end|>]]",
            "<|im_start|>user\nQuestion 0?<|im_end|>\n"
            "<|im_start|>assistant\nAnswer 0.<|im_end|>\n"
            "<|im_start|>user\nQuestion 1?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n[[Answer 1.<|im_end|>]]",
        ],
    ),
    # The prompt opens a thought, which the template does not close.
    (
        "deepseek_r1_distill",
        [
            "<s><｜User｜>Question 0?<｜Assistant｜><think>\n\n</think>\n\n"
            "[[Answer 0.<｜end▁of▁sentence｜>]]",
            "<s><｜User｜>Question 0?<｜Assistant｜>Answer 0.<｜end▁of▁sentence｜>"
            "<｜User｜>Question 1?<｜Assistant｜><think>\n\n</think>\n\n"
            "[[Answer 1.<｜end▁of▁sentence｜>]]",
        ],
    ),
    # The prompt opens a thought, unless thinking is off; nothing changes in the history.
    (
        "nemotron_3_nano",
        [
            "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nQuestion 0?<|im_end|>\n"
            "<|im_start|>assistant\n<think></think>[[Answer 0.<|im_end|>]]\n"
            "<|im_start|>user\nQuestion 1?<|im_end|>\n"
            "<|im_start|>assistant\n<think></think>[[Answer 1.<|im_end|>]]"
        ],
    ),
    # No token ends a turn, and the tokenizer's does.
    (
        "glm4moe",
        [
            "[gMASK]<sop><|user|>\nQuestion 0?<|assistant|>\n<think></think>\n[[Answer 0.</s>]]",
            "[gMASK]<sop><|user|>\nQuestion 0?<|assistant|>\n<think></think>\nAnswer 0."
            "<|user|>\nQuestion 1?<|assistant|>\n<think></think>\n[[Answer 1.</s>]]",
        ],
    ),
    # The end of a chat is not the end of a turn.
    (
        "phi3",
        [
            "<|user|>\nQuestion 0?<|end|>\n<|assistant|>\n[[Answer 0.<|end|>\n</s>]]",
            "<|user|>\nQuestion 0?<|end|>\n<|assistant|>\nAnswer 0.<|end|>\n"
            "<|user|>\nQuestion 1?<|end|>\n<|assistant|>\n[[Answer 1.<|end|>\n</s>]]",
        ],
    ),
    # The template takes content in parts, and writes none of a text.
    (
        "smolvlm",
        [
            "<|im_start|>User: Question 0?<end_of_utterance>\n"
            "Assistant:[[ Answer 0.<end_of_utterance>]]\n"
            "User: Question 1?<end_of_utterance>\nAssistant:[[ Answer 1.<end_of_utterance>]]"
        ],
    ),
]


@pytest.mark.parametrize(("name", "texts"), ANSWERS, ids=[name for name, _ in ANSWERS])
def test_published_templates_give_these_rows(name: str, texts: list[str]) -> None:
    tokenizer = published_tokenizer(name)
    rows = encode_turns(tokenizer, chat(2))
    assert [marked_text(tokenizer, row) for row in rows] == texts


def test_the_channels_of_an_answer_are_its_own_to_write() -> None:
    tokenizer = published_tokenizer("gptoss")
    first, second = encode_turns(tokenizer, chat(2))
    assert marked_text(tokenizer, first).endswith(
        "<|start|>assistant[[<|channel|>final<|message|>Answer 0.<|return|>]]"
    )
    assert marked_text(tokenizer, second).endswith(
        "<|start|>assistant<|channel|>final<|message|>Answer 0.<|end|><|start|>user<|message|>"
        "Question 1?<|end|><|start|>assistant[[<|channel|>final<|message|>Answer 1.<|return|>]]"
    )


def test_a_thought_before_an_answered_call_stays_where_inference_has_it() -> None:
    """gpt-oss leaves it out of the history once an answer follows, and not before."""
    tokenizer = published_tokenizer("gptoss")
    question = {"role": "user", "content": "Question 0?"}
    calling = {"role": "assistant", "content": "", "thinking": "I add.", "tool_calls": [CALL]}
    result = {"role": "tool", "content": "four"}
    row = encode_turns(tokenizer, [question, calling, result, *chat(1)[1:]], context=2, tools=TOOLS)
    (text,) = (marked_text(tokenizer, r) for r in row)
    assert "<|channel|>analysis<|message|>I add.<|end|>" in text
    assert text.endswith("<|start|>assistant[[<|channel|>final<|message|>Answer 0.<|return|>]]")
