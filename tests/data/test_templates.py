"""Templates as published models have them and TRL does not ship, in renderings of their own."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sap_fast.data import ChatTemplateError, encode_chat, encode_turns
from tests.data.chats import build_tokenizer, chat, marked_text, published_tokenizer

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


def test_a_thought_where_the_prompt_opens_one() -> None:
    tokenizer = published_tokenizer("deepseek_r1_distill")
    for thought in ("I think so.", "\nI think so.\n"):
        (row,) = encode_turns(tokenizer, chat(1, reasoning_content=thought))
        assert marked_text(tokenizer, row).endswith(
            "<think>\n[[I think so.\n</think>\n\nAnswer 0.<｜end▁of▁sentence｜>]]"
        )
    # A template that writes thoughts in another way than its prompt opens them.
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] if m['role'] == 'user' else '' }}"
        "{% if m['role'] == 'assistant' %}{{ '<think> ' + (m['reasoning_content'] or 'none') }}"
        "{{ ' </think> ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    )
    for messages in (chat(1), chat(1, reasoning_content="So")):
        with pytest.raises(ChatTemplateError, match="does not begin the answer of message 2"):
            encode_turns(tokenizer, messages)


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
