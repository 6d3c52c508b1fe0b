"""Every published template that TRL ships, and what is known of others, against inference."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sap_fast.data import ChatTemplateError, encode_chat, encode_prompt, encode_turns
from tests.data.chats import (
    CALL,
    TOOLS,
    build_tokenizer,
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


def chat(turns: int, *, system: bool = False, **answer: Any) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": "Be kind."}] if system else []
    for number in range(turns):
        messages.append({"role": "user", "content": f"Question {number}?"})
        messages.append({"role": "assistant", "content": f"Answer {number}.", **answer})
    return messages


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


# Write a system message into the last user turn only, as those of Mistral-7B-v0.3 and Nemo do.
MISTRAL_NEMO = (
    "{{ bos_token }}{% set s = messages[0]['content'] if messages[0]['role'] == 'system' else '' %}"
    "{% for m in messages if m['role'] != 'system' %}{% if m['role'] == 'user' %}"
    "[INST]{{ (s + '\n\n' if s and loop.last else '') + m['content'] }}[/INST]"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
# Closes the thought in the prompt unless told to think, opens it if so, and writes none, as that of
# DeepSeek-V3.1 does.
DEEPSEEK_V3_1 = (
    "{{ bos_token }}{% if thinking is not defined %}{% set thinking = false %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|Assistant|></think>' }}"
    "{{ m['content'].split('</think>')[-1] + eos_token }}{% else %}{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|>' }}"
    "{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
# Puts the answer behind its thought into tags of its own, as that of Hunyuan does.
HUNYUAN = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|Assistant|>' }}"
    "{% if loop.last %}{{ '<think>\n' + (m['reasoning_content'] or '') + '\n</think>\n' }}"
    "{{ '<answer>\n' + m['content'] + '\n</answer>' }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ eos_token }}{% else %}{{ '<|User|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|>' }}{% endif %}"
)
# Surrounds answers with spaces, as that of Llama 2 does.
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def test_a_system_message_that_moves_is_where_inference_has_it() -> None:
    tokenizer = build_tokenizer(MISTRAL_NEMO)
    assert [marked_text(tokenizer, r) for r in encode_turns(tokenizer, chat(2, system=True))] == [
        "<s>[INST]Be kind.\n\nQuestion 0?[/INST][[Answer 0.</s>]]",
        "<s>[INST]Question 0?[/INST]Answer 0.</s>[INST]Be kind.\n\nQuestion 1?[/INST]"
        "[[Answer 1.</s>]]",
    ]


def test_a_thought_that_the_prompt_closes_unless_told_to_think() -> None:
    tokenizer = build_tokenizer(DEEPSEEK_V3_1)
    (row,) = encode_turns(tokenizer, chat(2))
    assert marked_text(tokenizer, row) == (
        "<s><|User|>Question 0?<|Assistant|></think>[[Answer 0.</s>]]"
        "<|User|>Question 1?<|Assistant|></think>[[Answer 1.</s>]]"
    )
    (row,) = encode_turns(tokenizer, chat(1, reasoning_content="I think so."))
    assert marked_text(tokenizer, row) == (
        "<s><|User|>Question 0?<|Assistant|><think>[[I think so.</think>Answer 0.</s>]]"
    )
    in_content = [*chat(1)[:1], {"role": "assistant", "content": "<think>So</think>Answer 0."}]
    (row,) = encode_turns(tokenizer, in_content)
    assert marked_text(tokenizer, row).endswith("<think>[[So</think>Answer 0.</s>]]")
    # Told not to think, the prompt has no place for it.
    with pytest.raises(ChatTemplateError, match="leaves out the 'reasoning_content' of message 2"):
        encode_turns(
            tokenizer, chat(1, reasoning_content="So"), template_kwargs={"thinking": False}
        )


def test_an_empty_thought_before_tags_of_the_answer() -> None:
    tokenizer = build_tokenizer(HUNYUAN)
    rows = encode_turns(tokenizer, chat(2))
    assert [marked_text(tokenizer, row) for row in rows] == [
        "<|User|>Question 0?<|Assistant|><think>\n\n</think>\n"
        "[[<answer>\nAnswer 0.\n</answer></s>]]",
        "<|User|>Question 0?<|Assistant|>Answer 0.</s><|User|>Question 1?<|Assistant|>"
        "<think>\n\n</think>\n[[<answer>\nAnswer 1.\n</answer></s>]]",
    ]


def test_a_thought_in_a_notation_of_its_own() -> None:
    """As Magistral's: known by what the template writes around a thought."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['role'] == 'assistant' %}{{ '[THINK]' + (m['reasoning_content'] or '') }}"
        "{{ '[/THINK]' }}{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = build_tokenizer(template)
    row = encode_chat(tokenizer, chat(1))
    assert marked_text(tokenizer, row).endswith("assistant\n[THINK][/THINK][[Answer 0.<|im_end|>]]")
    row = encode_chat(tokenizer, chat(1, reasoning_content="So"))
    assert marked_text(tokenizer, row).endswith(
        "assistant\n[[[THINK]So[/THINK]Answer 0.<|im_end|>]]"
    )


def test_a_tokenizer_that_marks_words_by_the_space_before_them() -> None:
    """As Llama 2's, whose template writes spaces around the answer."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(["[INST] Question 0? [/INST] Answer 0. Answer 1."] * 9, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = LLAMA2
    (row,) = encode_turns(tokenizer, chat(2))
    whole = tokenizer.apply_chat_template(chat(2), tokenize=True)["input_ids"]
    assert row["input_ids"] == whole
    prompts = [chat(2)[:1], chat(2)[:3]]
    for prompt, answer in zip(prompts, ("Answer 0.", "Answer 1."), strict=True):
        fed = tokenizer.apply_chat_template(prompt, tokenize=True)["input_ids"]
        assert row["input_ids"][: len(fed)] == fed
        assert row["labels"][len(fed) - 1] == -100
        end = row["labels"].index(tokenizer.eos_token_id, len(fed))
        assert tokenizer.decode(row["labels"][len(fed) : end]).strip() == answer
