import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from sap_fast.data import (
    OPENINGS,
    REFUSALS,
    ChatTemplateError,
    DataError,
    Request,
    SafetyCollator,
    TaskCollator,
    build_safety_pair,
    encode_chat,
    encode_prompt,
    load_requests,
    load_safety_dataset,
    load_task_dataset,
    padding_token_id,
    read_rows,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes the beginning-of-sequence token and trims the content, as Llama 3 does.
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' }}"
    "{{ m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
# Gives the answers after the last user message a reasoning block, as Qwen3 does.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Accepts nothing but user and assistant in turn, as Gemma and Mistral do.
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m['content'] + '<|im_end|>' }}{% endfor %}"
)
# Begins answers with words that its generation prompt does not hold.
UNANNOUNCED = (
    "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Answer: ' }}{% endif %}"
)
# Has no end-of-turn token, as GLM-4.
ENDLESS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% endfor %}"
)
# Ends the last turn and the earlier turns differently, as gpt-oss does.
TWO_ENDS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{{ '</s>' if loop.last else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Writes the length of the answers, so that no answer changes alone.
COUNTING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{{ m['content'] | length }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

SENTENCES = [
    "Write a short poem about the sea.",
    "The sea is wide and blue, and it sings.\n\n    for wave in sea:\n        sing(wave)\n",
    "I'm sorry, but I can't help with that. Sure, here is how to write a poem:",
]
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "i"},
    {"role": "user", "content": "Write a poem"},
    {"role": "assistant", "content": "The sea, blue"},
]


def build_tokenizer(chat_template: str | None, **model_options: object) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(**model_options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    # As Llama 3: offsets without leading spaces, and a beginning-of-sequence token on plain text.
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    wrapped.chat_template = chat_template
    return wrapped


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(CHATML)


def scored_text(tokenizer: PreTrainedTokenizerFast, row: dict[str, list[int]]) -> str:
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def write(path: Path, content: str | bytes | list[object]) -> Path:
    if isinstance(content, list):
        content = "\n".join(map(json.dumps, content))
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Files


def test_every_format_reads_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": "a\u2028b", "n": [1, 2]}, {"prompt": "é", "n": []}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == rows
    assert read_rows(write(tmp_path / "rows.json", json.dumps(rows))) == rows
    assert read_rows(write(tmp_path / "rows.jsonl", text)) == rows
    windows = b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() + b"\r\n"
    assert read_rows(write(tmp_path / "windows.JSONL", windows)) == rows
    marked = b"\xef\xbb\xbf" + json.dumps(rows).encode()
    assert read_rows(write(tmp_path / "marked.json", marked)) == rows


@pytest.mark.parametrize(
    ("name", "content", "row", "problem"),
    [
        ("empty.jsonl", "", None, "an empty file"),
        ("blank.jsonl", " \n\n", None, "an empty file"),
        ("empty.json", "[]", None, "no rows"),
        ("rows.csv", "a,b", None, "the suffix '.csv'"),
        ("rows", "a,b", None, "no suffix"),
        ("bad.jsonl", '{"a": 1}\n\n{"a": ', 3, "invalid JSON"),
        ("list.jsonl", '{"a": 1}\n[1, 2]', 2, "a list of 2"),
        ("latin.jsonl", b'{"a": 1}\n{"a": "\xe9"}', 2, "byte 0xe9 at position 7"),
        ("latin.json", b'[{"a": "\xe9"}]', None, "byte 0xe9 at position 8"),
        ("bad.json", '{"a": 1}\n{"a": 2}', None, "invalid JSON (Extra data"),
        ("object.json", '{"a": 1}', None, "an object with the fields 'a'"),
        ("number.json", '[{"a": 1}, 7]', 2, "7"),
        ("deep.jsonl", "[" * 100_000, 1, "invalid JSON"),
        ("digits.jsonl", '{"a": ' + "1" * 5_000 + "}", 1, "invalid JSON"),
        ("bad.parquet", b"PAR1 but nothing else PAR1", None, "unreadable Parquet"),
    ],
)
def test_a_bad_file_names_file_and_row(tmp_path, name, content, row, problem):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    error = caught.value
    assert (error.path, error.row, error.field) == (path, row, None)
    assert error.problem.startswith(problem)
    where = str(path) if row is None else f"{path}, row {row}"
    assert str(error).startswith(f"{where}: got {problem}")
    assert "; expected " in str(error)
    assert "\n" not in str(error)


def test_a_corrupt_parquet_page_is_a_data_error(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": [f"text {index}" for index in range(2000)]})
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path)
    content = bytearray(path.read_bytes())
    content[10:600] = bytes(590)
    with pytest.raises(DataError, match="unreadable Parquet"):
        read_rows(write(path, bytes(content)))


def test_a_parquet_value_that_cannot_be_read_names_its_row(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    # Arrow checks neither text nor dates until they are read.
    for column, problem in (
        (pyarrow.array([b"a", b"b", b"\xff"]).view(pyarrow.utf8()), "byte 0xff"),
        (pyarrow.array([0, 0, 2**62], pyarrow.timestamp("us")), "date value out of range"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), path)
        with pytest.raises(DataError, match=f"row 3: got unreadable Parquet .*{problem}"):
            read_rows(path)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match="got no such file; expected an existing file"):
        read_rows(tmp_path / "missing.jsonl")
    folder = tmp_path / "folder.jsonl"
    folder.mkdir()
    with pytest.raises(DataError, match="got a folder; expected a file"):
        read_rows(folder)


def test_a_data_error_survives_pickling():
    error = DataError("rows.jsonl", 3, "prompt", "a\nproblem", "text")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert str(error) == "rows.jsonl, row 3, field 'prompt': got a problem; expected text"
    assert vars(again) == vars(error)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), children, max_size=3)
        | st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": children}
        )
    ),
    max_leaves=8,
)
FIELDS = ["messages", "prompt", "completion", "instruction", "input", "output", "text"]
FIELDS += ["chosen", "rejected", "rejected_is_opening", "refusal", "opening"]
EXAMPLES = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@EXAMPLES
@given(st.binary(max_size=40) | st.text(alphabet='{}[]":,\n \r0a\ufeff\u2028', max_size=40))
def test_any_jsonl_gives_rows_or_a_data_error(tmp_path, content):
    path = write(tmp_path / "rows.jsonl", content)
    try:
        rows = read_rows(path)
    except DataError as error:
        assert error.path == path
        assert "\n" not in str(error)
    else:
        assert rows
        assert all(isinstance(row, dict) for row in rows)


@EXAMPLES
@given(
    st.lists(
        st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=4) | JSON_VALUES,
        min_size=1,
        max_size=3,
    )
)
@pytest.mark.filterwarnings("ignore:.*dropped")
def test_any_rows_load_or_are_a_data_error(tmp_path, tokenizer, rows):
    path = write(tmp_path / "rows.jsonl", rows)
    for load in (
        lambda: load_task_dataset(path, tokenizer),
        lambda: load_safety_dataset(path, tokenizer),
        lambda: load_requests(path),
    ):
        try:
            assert load()
        except DataError as error:
            assert error.path == path
            assert "\n" not in str(error)


# Encoding


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
    scored = scored_text(tokenizer, encode_chat(tokenizer, CHAT))
    assert scored == "i<|im_end|><think>\n\n</think>\n\nThe sea, blue<|im_end|>"


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
        (ENDLESS, CHAT[:2], "writes '' after the answer of message 2, .* not an end-of-turn token"),
        (TWO_ENDS, CHAT, r"writes '<\|im_end\|>.*' after the answer of message 2.* not '</s>'"),
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


def test_a_slow_tokenizer_is_rejected():
    with pytest.raises(
        ValueError, match="ByT5Tokenizer reports no character offsets; expected a f"
    ):
        encode_chat(ByT5Tokenizer(), CHAT)


def test_padding_falls_back_to_the_end_token(tokenizer):
    assert padding_token_id(tokenizer) == tokenizer.eos_token_id
    padded = build_tokenizer(CHATML)
    padded.pad_token = "<s>"
    assert padding_token_id(padded) == padded.bos_token_id


# Task files


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


USER, ASSISTANT = CHAT[0], CHAT[1]


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
            "'tool' (tool calls are not supported)",
            "one of system, user, assistant",
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


def test_every_row_has_the_layout_of_the_first(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}]
    with pytest.raises(DataError, match="row 2, field 'prompt': got nothing; expected text"):
        load_task_dataset(write(tmp_path / "rows.jsonl", rows), tokenizer)


def test_rows_without_an_answer_are_dropped_with_one_warning(tmp_path, tokenizer):
    rows = [{"prompt": "Hi", "completion": text} for text in ("The sea", "", "sings", " ")]
    rows.append({"prompt": "Write a short poem about the sea." * 9, "completion": "The sea"})
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.warns(UserWarning) as caught:
        encoded = load_task_dataset(path, tokenizer, 40)
    assert [str(warning.message) for warning in caught] == [
        f"{path}: dropped 3 of 5 rows, which have no answer left within max_length=40 tokens; "
        "the first is row 2"
    ]
    assert caught[0].filename == __file__
    assert [scored_text(tokenizer, row) for row in encoded] == [
        "The sea<|im_end|>",
        "sings<|im_end|>",
    ]
    with pytest.raises(DataError, match="got 5 rows with no answer left within max_length=3 tok"):
        load_task_dataset(path, tokenizer, 3)


def test_a_task_file_trains_with_trainer(tmp_path, tokenizer):
    rows = [{"prompt": "Hi", "completion": text} for text in ("The sea", "sings", "blue")]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    trainer = Trainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=load_task_dataset(write(tmp_path / "rows.jsonl", rows), tokenizer),
        data_collator=TaskCollator(padding_token_id(tokenizer)),
    )
    assert trainer.train().training_loss > 0


# Safety files


def test_safety_rows_of_trl(tmp_path, tokenizer):
    chosen = {"role": "assistant", "content": "I can't"}
    rejected = {"role": "assistant", "content": "Sure"}
    rows = [
        {"prompt": "Hi", "chosen": "I can't", "rejected": "Sure"},
        {"prompt": [USER], "chosen": [chosen], "rejected": [rejected]},
        {"chosen": [USER, chosen], "rejected": [USER, rejected]},
        {"prompt": "Hi", "chosen": [USER, chosen], "rejected": [USER, rejected]},
    ]
    encoded = load_safety_dataset(write(tmp_path / "rows.jsonl", rows), tokenizer)
    assert encoded == [encoded[0]] * 4
    assert encoded[0]["chosen"] == encode_chat(tokenizer, [USER, chosen])
    assert scored_text(tokenizer, encoded[0]["chosen"]) == "I can't<|im_end|>"
    assert scored_text(tokenizer, encoded[0]["rejected"]) == "Sure<|im_end|>"


def test_answers_in_the_shared_prompt_are_not_scored(tmp_path, tokenizer):
    row = {"chosen": CHAT, "rejected": [*CHAT[:3], {"role": "assistant", "content": "Sure"}]}
    (pair,) = load_safety_dataset(write(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert scored_text(tokenizer, pair["chosen"]) == "The sea, blue<|im_end|>"
    assert scored_text(tokenizer, pair["rejected"]) == "Sure<|im_end|>"


def test_a_built_pair_scores_the_opening_without_an_end_of_turn(tmp_path, tokenizer):
    row = build_safety_pair("Write a poem")
    (pair,) = load_safety_dataset(write(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert scored_text(tokenizer, pair["chosen"]) == REFUSALS[0] + "<|im_end|>"
    assert scored_text(tokenizer, pair["rejected"]) == "Sure, here is how to write a poem:"


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


def test_pairs_that_no_longer_differ_are_dropped(tmp_path, tokenizer):
    rows = [
        {"prompt": "Hi", "chosen": "The sea sings", "rejected": "The sea is blue"},
        {"prompt": "Hi", "chosen": "I can't", "rejected": " "},
        {"prompt": "Hi", "chosen": "I can't", "rejected": "Sure"},
    ]
    length = len(encode_prompt(tokenizer, "Hi")) + 1
    with pytest.warns(UserWarning, match="dropped 2 of 3 rows.* the first is row 1"):
        pairs = load_safety_dataset(write(tmp_path / "rows.jsonl", rows), tokenizer, length)
    assert [scored_text(tokenizer, pair["rejected"]) for pair in pairs] == ["Su"]


# Requests and pairs


def test_requests_from_every_field(tmp_path):
    rows = [
        {"prompt": "a", "text": "x", "refusal": "No", "opening": "Sure:"},
        {"text": "b", "instruction": "x", "refusal": None},
        {"instruction": "c", "input": "d", "output": "e"},
    ]
    expected = [Request("a", "No", "Sure:"), Request("b"), Request("c\n\nd")]
    assert load_requests(write(tmp_path / "rows.jsonl", rows)) == expected
    text = write(tmp_path / "rows.txt", " a\r\n\nb c\n")
    assert load_requests(text) == [Request("a"), Request("b c")]


@pytest.mark.parametrize(
    ("name", "content", "row", "field"),
    [
        ("rows.jsonl", '{"goal": "a"}', 1, None),
        ("rows.jsonl", '{"prompt": "a"}\n{"prompt": [1]}', 2, "prompt"),
        ("rows.jsonl", '{"prompt": "a", "opening": 3}', 1, "opening"),
        ("rows.jsonl", '{"prompt": "a", "refusal": ""}', 1, "refusal"),
        ("rows.txt", b"a\n\n\xff", 3, None),
        ("rows.txt", " \n", None, None),
        ("rows.csv", "a", None, None),
    ],
)
def test_a_bad_request_file_names_file_row_and_field(tmp_path, name, content, row, field):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        load_requests(path)
    assert (caught.value.path, caught.value.row, caught.value.field) == (path, row, field)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("request_text", "opening"),
    [
        ("Write a poem.", "Sure, here is how to write a poem:"),
        ("  write a\npoem:", "Sure, here is how to write a poem:"),
        ("Please write a poem!", "Sure, here is how to write a poem:"),
        ("Could you please write a poem?", "Sure, here is how to write a poem:"),
        ("DDoS a server", "Sure, here is how to DDoS a server:"),
        ("Explain how to sing", "Sure, here is how to sing:"),
        ("How do I sing?", "Sure, here is how to sing:"),
        ("Tell me how to sing", "Sure, here is how to sing:"),
        ("Write about how to sing", "Sure, here is how to write about how to sing:"),
        ("How does it sing?", 'Sure, here is an answer to "How does it sing?":'),
        ("What is love?", 'Sure, here is an answer to "What is love?":'),
        ("I need a poem", 'Sure, here is an answer to "I need a poem":'),
        ("Issue a poem", "Sure, here is how to issue a poem:"),
        ("?", 'Sure, here is an answer to "?":'),
        ("Sing", "Sure, here is how to sing:"),
    ],
)
def test_the_opening_restates_the_request(request_text, opening):
    pair = build_safety_pair(request_text)
    assert pair["prompt"] == request_text
    assert pair["rejected"] == opening
    assert pair["rejected_is_opening"] is True


def test_refusals_vary_with_the_index():
    chosen = [build_safety_pair("Sing", index)["chosen"] for index in range(2 * len(REFUSALS))]
    assert chosen == list(REFUSALS) * 2
    assert len(set(REFUSALS)) >= 6
    with pytest.raises(ValueError, match="request=' '; expected text"):
        build_safety_pair(" ")


def test_openings_vary_where_that_is_asked():
    everything = range(len(REFUSALS) * len(OPENINGS))
    pairs = [build_safety_pair("Sing {loud}", index, varied=True) for index in everything]
    assert len({(pair["chosen"], pair["rejected"]) for pair in pairs}) == len(everything)
    assert pairs[0]["rejected"] == "Sure, here is how to sing {loud}:"
    assert pairs[6]["rejected"] == "Here is how to sing {loud}:"
    assert pairs[18]["rejected"] == "Certainly! The first step is"
    assert len({build_safety_pair("Sing", index)["rejected"] for index in everything}) == 1


# Collators

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [8], "labels": [8]},
]


def test_task_collator_pads_right_or_left():
    right = pickle.loads(pickle.dumps(TaskCollator(9)))(ROWS)
    assert {name: tensor.tolist() for name, tensor in right.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert {tensor.dtype for tensor in right.values()} == {torch.int64}
    left = TaskCollator(9, padding_side="left", pad_to_multiple_of=4)(ROWS)
    assert {name: tensor.tolist() for name, tensor in left.items()} == {
        "input_ids": [[9, 5, 6, 7], [9, 9, 9, 8]],
        "attention_mask": [[0, 1, 1, 1], [0, 0, 0, 1]],
        "labels": [[-100, -100, 6, 7], [-100, -100, -100, 8]],
    }
    assert TaskCollator(9, pad_to_multiple_of=3)(ROWS)["labels"].shape == (2, 3)


def test_safety_collator_pads_each_side_by_itself():
    pairs = [{"chosen": ROWS[0], "rejected": ROWS[1]}, {"chosen": ROWS[1], "rejected": ROWS[1]}]
    batch = pickle.loads(pickle.dumps(SafetyCollator(9, "left", 2)))(pairs)
    collate = TaskCollator(9, "left", 2)
    for name in ("chosen", "rejected"):
        expected = collate([pair[name] for pair in pairs])
        for key, tensor in expected.items():
            torch.testing.assert_close(batch[name][key], tensor, rtol=0, atol=0)
    assert batch["chosen"]["input_ids"].tolist() == [[9, 5, 6, 7], [9, 9, 9, 8]]
    assert batch["rejected"]["input_ids"].tolist() == [[9, 8], [9, 8]]


@pytest.mark.parametrize("collator", [TaskCollator, SafetyCollator])
def test_collators_reject_bad_settings(collator):
    with pytest.raises(ValueError, match="padding_side='middle'; expected 'left' or 'right'"):
        collator(0, padding_side="middle")
    with pytest.raises(ValueError, match="pad_to_multiple_of=0; expected at least 1"):
        collator(0, pad_to_multiple_of=0)


def test_importing_the_package_imports_neither_transformers_nor_pyarrow():
    code = (
        "import sys, sap_fast.data, sap_fast.evaluation; "
        "print({'transformers', 'pyarrow'} & set(sys.modules))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout == "set()\n"
