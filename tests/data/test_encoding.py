import pytest
from transformers import ByT5Tokenizer

from sap_fast.data import (
    ChatTemplateError,
    DataError,
    encode_chat,
    encode_prompt,
    encode_turns,
    load_task_dataset,
    padding_token_id,
)
from tests.data.chats import (
    ALTERNATING,
    CALL,
    CHAT,
    CHATML,
    COUNTING,
    ENDLESS,
    LAST_END,
    LLAMA3,
    QWEN3,
    TOOLS,
    TWO_ENDS,
    UNANNOUNCED,
    build_tokenizer,
    marked_text,
    scored_text,
    scored_texts,
    write,
)


@pytest.mark.parametrize("options", [{}, {"ignore_merges": True}])
def test_chatml_scores_every_answer_with_its_end_of_turn(options):
    tokenizer = build_tokenizer(CHATML, **options)
    row = encode_chat(tokenizer, CHAT)
    assert scored_text(tokenizer, row) == "i<|im_end|>The sea, blue<|im_end|>"
    assert tokenizer.decode(row["input_ids"]) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\ni<|im_end|>\n"
        "<|im_start|>user\nWrite a poem<|im_end|>\n<|im_start|>assistant\nThe sea, blue<|im_end|>"
    )
    assert all(label in (-100, token) for token, label in zip(*row.values(), strict=True))


def test_a_template_with_a_beginning_token_gets_one_and_may_trim():
    tokenizer = build_tokenizer(LLAMA3)
    chat = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "\n The sea "}]
    row = encode_chat(tokenizer, chat)
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert scored_text(tokenizer, row) == "The sea<|im_end|>"
    prompt = encode_prompt(tokenizer, " Hi ")
    assert prompt.count(tokenizer.bos_token_id) == 1


def test_without_a_template_the_answer_follows_on_a_line_of_its_own():
    tokenizer = build_tokenizer(None)
    row = encode_chat(tokenizer, CHAT)
    assert tokenizer.decode(row["input_ids"]) == "<s>Hi\ni</s>Write a poem\nThe sea, blue</s>"
    assert scored_text(tokenizer, row) == "i</s>The sea, blue</s>"
    assert tokenizer.decode(encode_prompt(tokenizer, "Hi")) == "<s>Hi\n"


def test_a_template_that_renders_the_last_turn_in_its_own_way():
    tokenizer = build_tokenizer(QWEN3)
    rows = encode_turns(tokenizer, CHAT)
    assert [marked_text(tokenizer, row) for row in rows] == [
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        "[[i<|im_end|>]]",
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\ni<|im_end|>\n"
        "<|im_start|>user\nWrite a poem<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n\n</think>\n\n[[The sea, blue<|im_end|>]]",
    ]
    with pytest.warns(UserWarning, match="2 sequences: only the last is returned") as caught:
        assert encode_chat(tokenizer, CHAT) == rows[1]
    assert caught[0].filename == __file__


def test_a_template_without_an_end_of_turn_gets_the_tokenizers():
    tokenizer = build_tokenizer(ENDLESS)
    rows = encode_turns(tokenizer, CHAT)
    # Without a generation prompt the model has to write the role too.
    assert [marked_text(tokenizer, row) for row in rows] == [
        "<|im_start|>user\nHi[[<|im_start|>assistant\ni</s>]]",
        "<|im_start|>user\nHi<|im_start|>assistant\ni<|im_start|>user\nWrite a poem"
        "[[<|im_start|>assistant\nThe sea, blue</s>]]",
    ]
    (row,) = encode_turns(tokenizer, [CHAT[0], {"role": "assistant", "content": "A \n"}])
    assert scored_text(tokenizer, row) == "<|im_start|>assistant\nA \n</s>"
    tokenizer.eos_token = None
    with pytest.raises(ChatTemplateError, match="ends no answer, and the tokenizer has no eos"):
        encode_turns(tokenizer, CHAT)


def test_a_template_that_ends_the_last_turn_and_the_earlier_ones_differently():
    tokenizer = build_tokenizer(LAST_END)
    rows = encode_turns(tokenizer, CHAT)
    assert [scored_text(tokenizer, row) for row in rows] == ["i</s>", "The sea, blue</s>"]
    assert "assistant\ni<|im_end|>" in marked_text(tokenizer, rows[1])


def test_answers_share_a_sequence_only_while_the_prompts_do():
    """A thought leaves the history once the user speaks again, and not before."""
    tokenizer = build_tokenizer(
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if m['reasoning_content'] and loop.index0 > ns.last %}"
        "{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    answer = {"role": "assistant", "content": "The sea", "reasoning_content": "Hm"}
    rows = encode_turns(tokenizer, [CHAT[0], answer, CHAT[0], answer])
    assert [len(scored_texts(tokenizer, [row])) for row in rows] == [1, 1]
    rows = encode_turns(tokenizer, [CHAT[0], answer, answer, CHAT[0], answer, answer])
    assert [scored_texts(tokenizer, [row]) for row in rows] == [
        ["<think>Hm</think>The sea<|im_end|>"] * 2
    ] * 2
    assert marked_text(tokenizer, rows[1]).count("<think>") == 2


def test_a_sequence_begins_with_the_tokens_of_its_prompt():
    """Also where a tokenizer would join the line breaks on both sides of its end."""
    # Learns "\\n\\n" as one token.
    tokenizer = build_tokenizer(CHATML)
    answer = {"role": "assistant", "content": "\n    for wave in sea:"}
    row = encode_chat(tokenizer, [CHAT[0], answer])
    prompt = encode_prompt(tokenizer, "Hi")
    text = tokenizer.decode(prompt) + answer["content"] + "<|im_end|>"
    assert tokenizer.encode(text, add_special_tokens=False)[: len(prompt)] != prompt
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [-100] * len(prompt)
    assert scored_text(tokenizer, row) == "\n    for wave in sea:<|im_end|>"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_a_template_finds_a_thought_under_the_name_that_it_reads(name):
    reading = CHATML.replace("m['content']", f"(m['{name}'] or '') + m['content']")
    tokenizer = build_tokenizer(reading)
    for field in ("reasoning_content", "thinking", "reasoning"):
        row = encode_chat(tokenizer, [CHAT[0], CHAT[1] | {field: "Hm "}])
        assert scored_text(tokenizer, row) == "Hm i<|im_end|>"


def test_a_template_gets_the_arguments_of_calls_as_it_takes_them():
    """As objects, which is what transformers asks for; or else as text, as DeepSeek-V3 does."""
    calling = CHATML.replace(
        "m['content']", "(m.tool_calls[0].function.name if m.tool_calls else m['content'])"
    )
    argument = "m.tool_calls[0].function.arguments"
    for written, expected in (
        (f"({argument} | tojson if m.tool_calls else '')", 'add{"a": 2}<|im_end|>'),
        (f"({argument} + ';' if m.tool_calls else '')", 'add{"a": 2};<|im_end|>'),
    ):
        tokenizer = build_tokenizer(calling.replace("+ '<|im_end|>", f"+ {written} + '<|im_end|>"))
        for arguments in ({"a": 2}, '{"a": 2}'):
            call = {"function": {"name": "add", "arguments": arguments}}
            answer = {"role": "assistant", "content": "", "tool_calls": [call]}
            assert scored_text(tokenizer, encode_chat(tokenizer, [CHAT[0], answer])) == expected


def test_turns_of_weight_0_are_read_but_not_scored(tokenizer):
    chat = [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[2], CHAT[3] | {"weight": 1}]
    row = encode_chat(tokenizer, chat)
    assert row["input_ids"] == encode_chat(tokenizer, CHAT)["input_ids"]
    assert scored_text(tokenizer, row) == "The sea, blue<|im_end|>"
    assert encode_turns(tokenizer, chat[:2]) == []


def test_template_variables_are_passed_and_those_that_nothing_reads_refused(tokenizer):
    shouting = build_tokenizer(CHATML.replace("m['content']", "(m['content'] + (mark or ''))"))
    row = encode_chat(shouting, CHAT[:2], template_kwargs={"mark": "!"})
    assert marked_text(shouting, row).startswith("<|im_start|>user\nHi!<|im_end|>")
    for name in ("mark", "messages", "chat_template", "tokenize", "add_generation_prompt"):
        with pytest.raises(ChatTemplateError, match=f"does not read '{name}' of 'chat_template_kw"):
            encode_turns(tokenizer, CHAT, template_kwargs={name: "!"})


@pytest.mark.parametrize(
    ("message", "options", "what"),
    [
        ({"reasoning_content": "Hm"}, {}, "the 'reasoning_content' of message 2"),
        ({"thinking": "Hm", "content": ""}, {}, "the 'reasoning_content' of message 2"),
        ({"tool_calls": [CALL]}, {}, "the call of 'add' in 'tool_calls' of message 2"),
        ({"tool_calls": [CALL["function"]]}, {}, "the call of 'add' in 'tool_calls' of message 2"),
        ({}, {"tools": TOOLS}, "the tool 'add'"),
    ],
)
def test_what_a_template_leaves_out_is_refused_by_name(message, options, what):
    for template in (CHATML, None):
        with pytest.raises(ChatTemplateError, match=f"^the chat template leaves out {what}$"):
            encode_turns(build_tokenizer(template), [CHAT[0], CHAT[1] | message], **options)


def test_a_call_in_the_history_that_a_template_leaves_out_is_refused_by_name(tokenizer):
    calling = {"role": "assistant", "content": "I add.", "tool_calls": [CALL]}
    chat = [CHAT[0], calling, {"role": "tool", "content": "four"}, CHAT[1]]
    with pytest.raises(ChatTemplateError, match="leaves out the call of 'add' in 'tool_calls' of"):
        encode_turns(tokenizer, chat, context=3)


def test_a_prompt_that_ends_otherwise_than_that_of_the_last_question_alone_is_refused():
    template = UNANNOUNCED.replace("if add_generation", "if messages|length > 1 and add_generation")
    assert template != UNANNOUNCED
    tokenizer = build_tokenizer(template)
    assert scored_text(tokenizer, encode_chat(tokenizer, CHAT[:2])) == "i<|im_end|>"
    with pytest.raises(ChatTemplateError, match="does not begin the answer of message 4"):
        encode_turns(tokenizer, CHAT)


@pytest.mark.parametrize("role", ["system", "user", "tool"])
def test_a_turn_that_a_template_leaves_out_is_refused_by_name(role):
    only_known = CHATML.replace("in messages", f"in messages if m['role'] != '{role}'")
    chat = [CHAT[0], {"role": role, "content": "u"}, CHAT[1]]
    with pytest.raises(ChatTemplateError, match=rf"the content of message \d \({role}\)"):
        encode_turns(build_tokenizer(only_known), chat)


def test_an_answer_of_which_a_template_leaves_out_a_part_is_refused():
    cutting = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    answer = {"role": "assistant", "content": "<think>Hm</think>The sea"}
    with pytest.raises(ChatTemplateError, match="leaves out the 'reasoning_content' of message 2"):
        encode_turns(build_tokenizer(cutting), [CHAT[0], answer])
    silent = CHATML.replace("m['content']", "(m['content'] if m['role'] == 'user' else '')")
    with pytest.raises(ChatTemplateError, match=r"the content of message 2 \(assistant\)"):
        encode_turns(build_tokenizer(silent), CHAT)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, None])
def test_the_prompt_to_answer_is_how_the_training_row_begins(template):
    tokenizer = build_tokenizer(template)
    row = encode_chat(tokenizer, CHAT[:2])
    prompt = encode_prompt(tokenizer, "Hi")
    assert row["input_ids"][: len(prompt)] == prompt
    assert row["labels"][: len(prompt)] == [-100] * len(prompt)
    assert row["labels"][len(prompt)] != -100


@pytest.mark.parametrize("answer", ["  x = 1\n    y = 2  ", "\n\nfor", "🌊 é\u200b", "assistant"])
def test_white_space_and_odd_characters_of_an_answer_are_scored(tokenizer, answer):
    chat = [{"role": "user", "content": answer}, {"role": "assistant", "content": answer}]
    scored = scored_text(tokenizer, encode_chat(tokenizer, chat))
    # The template's line break may share a token with the first line break of the answer.
    assert scored.removeprefix("\n" * (len(scored) - len(answer + "<|im_end|>"))) == (
        answer + "<|im_end|>"
    )


def test_the_context_is_read_but_not_scored(tokenizer):
    row = encode_chat(tokenizer, CHAT, context=3)
    assert row["input_ids"] == encode_chat(tokenizer, CHAT)["input_ids"]
    assert scored_text(tokenizer, row) == "The sea, blue<|im_end|>"


def test_an_opening_cannot_hold_tool_calls():
    calling = CHATML.replace(
        "+ '<|im_end|>\n' }}", "}}{{ m.tool_calls[0].function.name if m.tool_calls }}<|im_end|>\n"
    )
    chat = [CHAT[0], CHAT[1] | {"tool_calls": [CALL]}]
    tokenizer = build_tokenizer(calling)
    assert scored_text(tokenizer, encode_chat(tokenizer, chat)) == "iadd<|im_end|>"
    with pytest.raises(ChatTemplateError, match="an opening of an answer cannot hold tool calls"):
        encode_chat(tokenizer, chat, complete=False)


def test_an_opening_has_no_end_of_turn(tokenizer):
    row = encode_chat(tokenizer, CHAT, complete=False)
    assert scored_text(tokenizer, row) == "i<|im_end|>The sea, blue"
    assert tokenizer.decode(row["input_ids"]).endswith("The sea, blue")


def test_turns_without_content_and_trailing_messages_are_not_scored(tokenizer):
    chat = [*CHAT[:1], {"role": "assistant", "content": " "}, *CHAT[2:], CHAT[0]]
    row = encode_chat(tokenizer, chat)
    assert scored_text(tokenizer, row) == "The sea, blue<|im_end|>"
    assert row["labels"][-1] != -100


def test_truncation_keeps_the_beginning(tokenizer):
    whole = encode_chat(tokenizer, CHAT)
    length = len(whole["input_ids"])
    cut = encode_chat(tokenizer, CHAT, length - 1)
    assert cut["input_ids"] == whole["input_ids"][:-1]
    assert scored_text(tokenizer, cut) == "i<|im_end|>The sea, blue"
    assert encode_chat(tokenizer, CHAT, length) == whole
    assert encode_chat(tokenizer, CHAT, 3) == {"input_ids": [], "labels": []}
    with pytest.raises(ValueError, match="max_length=0; expected at least 1"):
        encode_chat(tokenizer, CHAT, 0)


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (ALTERNATING, [CHAT[0], *CHAT], "user, user, assistant, .*: roles must alternate"),
        (UNANNOUNCED, CHAT, r"does not begin the answer of message 2 .* \('.*Answer: '\)"),
        (TWO_ENDS, CHAT, "does not begin the answer of message 2 where its generation prompt ends"),
        (COUNTING, CHAT, "changes more than the answer when the answer of message 2"),
    ],
)
def test_a_template_whose_answers_cannot_be_found(tmp_path, template, chat, message):
    tokenizer = build_tokenizer(template)
    with pytest.raises(ChatTemplateError, match=message):
        encode_chat(tokenizer, chat)
    path = write(tmp_path / "rows.jsonl", [{"messages": chat}])
    with pytest.raises(DataError, match="row 1: got a chat that cannot be encoded: the chat templ"):
        load_task_dataset(path, tokenizer)


def test_a_tokenizer_with_neither_template_nor_end_token():
    tokenizer = build_tokenizer(None)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a chat template nor an eos_token"):
        encode_chat(tokenizer, CHAT)


@pytest.mark.filterwarnings("ignore:This sequence already has </s>")
def test_a_slow_tokenizer_that_ends_what_it_encodes():
    tokenizer = ByT5Tokenizer()
    row = encode_chat(tokenizer, CHAT)
    assert marked_text(tokenizer, row) == "Hi\n[[i</s>]]Write a poem\n[[The sea, blue</s>]]"
    assert row["input_ids"].count(tokenizer.eos_token_id) == 2
    assert tokenizer.eos_token_id not in encode_prompt(tokenizer, "Hi")


def test_padding_falls_back_to_the_end_token(tokenizer):
    assert padding_token_id(tokenizer) == tokenizer.eos_token_id
    padded = build_tokenizer(CHATML)
    padded.pad_token = "<s>"
    assert padding_token_id(padded) == padded.bos_token_id
