import subprocess
import sys
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from sap_fast.cli.console import show_warnings
from sap_fast.data import (
    REFUSALS,
    DataError,
    TaskCollator,
    build_safety_pair,
    encode_chat,
    encode_prompt,
    load_requests,
    load_safety_dataset,
    load_task_dataset,
    padding_token_id,
)
from tests.data.chats import (
    ASSISTANT,
    CHAT,
    EXAMPLES,
    QWEN3,
    USER,
    build_tokenizer,
    published_tokenizer,
    scored_text,
    write,
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.sampled_from(["role", "content", "x"]), children, max_size=3)
        | st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": children},
            optional=dict.fromkeys(
                ["weight", "tool_calls", "reasoning_content", "thinking", "name"], children
            ),
        )
        | st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": children})})
    ),
    max_leaves=8,
)
FIELDS = ["messages", "prompt", "completion", "instruction", "input", "output", "text"]
FIELDS += ["chosen", "rejected", "rejected_is_opening", "refusal", "opening"]
FIELDS += ["system", "history", "tools", "chat_template_kwargs"]


@EXAMPLES
@given(
    st.lists(
        st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=4) | JSON_VALUES,
        min_size=1,
        max_size=3,
    )
)
@pytest.mark.filterwarnings("ignore:.*(dropped|refused|nothing reads)")
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


def test_rows_that_cannot_be_encoded_are_refused_with_one_warning(tmp_path, tokenizer):
    image = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    thought = ASSISTANT | {"reasoning_content": "Hm"}
    rows = [
        {"messages": CHAT},
        {"messages": [USER, thought]},
        {"messages": [image, ASSISTANT]},
        {"messages": [USER, ASSISTANT]},
        {"messages": [USER, ASSISTANT | {"content": " "}]},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.warns(UserWarning) as caught:
        encoded = load_task_dataset(path, tokenizer)
    assert [str(warning.message) for warning in caught] == [
        f"{path}: refused 2 of 5 rows; the first: {path}, row 2: got a chat that cannot be encoded:"
        " the chat template leaves out the 'reasoning_content' of message 2; expected a chat that "
        "the template takes",
        f"{path}: dropped 1 of 5 rows, which have no answer left within max_length=1024 tokens; "
        "the first is row 5",
    ]
    assert {warning.filename for warning in caught} == {__file__}
    assert encoded == [encode_chat(tokenizer, CHAT), encode_chat(tokenizer, CHAT[:2])]


def test_a_file_of_which_every_row_is_refused_is_an_error(tmp_path, tokenizer):
    thought = {"messages": [USER, ASSISTANT | {"reasoning_content": "Hm"}]}
    half = {"messages": [USER, ASSISTANT | {"weight": 0.5}]}
    empty = {"messages": [USER, ASSISTANT | {"content": ""}]}
    path = write(tmp_path / "rows.jsonl", [empty, half, thought])
    with pytest.raises(DataError) as caught:
        load_task_dataset(path, tokenizer)
    error = caught.value
    assert (error.row, error.field) == (2, "messages[1].weight")
    assert error.problem == "0.5 (the first of 2 rows that are refused)"
    with pytest.raises(DataError, match=r"row 1, field 'messages\[1\].weight': got 0.5; expected"):
        load_task_dataset(write(path, [half]), tokenizer)


def test_a_malformed_row_is_an_error_of_the_file(tmp_path, tokenizer):
    path = write(tmp_path / "rows.jsonl", [{"messages": CHAT}, {"messages": [USER, 7]}])
    with pytest.raises(DataError, match=r"row 2, field 'messages\[1\]': got 7; expected an object"):
        load_task_dataset(path, tokenizer)


def test_a_chat_whose_history_changes_makes_a_row_per_answer(tmp_path):
    tokenizer = build_tokenizer(QWEN3)
    path = write(tmp_path / "rows.jsonl", [{"messages": CHAT}, {"messages": CHAT[:2]}])
    rows = load_task_dataset(path, tokenizer)
    assert [scored_text(tokenizer, row) for row in rows] == [
        "i<|im_end|>",
        "The sea, blue<|im_end|>",
        "i<|im_end|>",
    ]
    # Of a chat that is too long, the answers that fit are left.
    assert load_task_dataset(path, tokenizer, len(rows[0]["input_ids"])) == [rows[0], rows[2]]


def test_a_pair_is_two_sequences(tmp_path):
    tokenizer = build_tokenizer(QWEN3)
    answer = [USER, {"role": "assistant", "content": "Sure"}]
    rows = [
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": answer[1:]},
        {"prompt": CHAT[:3], "chosen": CHAT[3:], "rejected": answer[1:]},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.warns(
        UserWarning, match="refused 1 of 2 rows.* row 1, field 'chosen': got answers"
    ):
        (pair,) = load_safety_dataset(path, tokenizer)
    assert scored_text(tokenizer, pair["chosen"]) == "The sea, blue<|im_end|>"
    assert scored_text(tokenizer, pair["rejected"]) == "Sure<|im_end|>"


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "nemotron_3_nano", "glm4moe", "qwen3"])
def test_an_opening_is_scored_without_a_thought_and_without_an_end(tmp_path, name):
    tokenizer = published_tokenizer(name)
    path = write(tmp_path / "rows.jsonl", [build_safety_pair("Write a poem")])
    (pair,) = load_safety_dataset(path, tokenizer)
    assert scored_text(tokenizer, pair["rejected"]) == "Sure, here is how to write a poem:"
    assert scored_text(tokenizer, pair["chosen"]).startswith(REFUSALS[0])
    prompt = pair["chosen"]["labels"].count(-100)
    assert pair["chosen"]["input_ids"][:prompt] == pair["rejected"]["input_ids"][:prompt]


def test_the_command_line_prints_how_many_were_refused_and_the_first(tmp_path, tokenizer, capsys):
    rows = [{"messages": CHAT}, {"messages": [USER, ASSISTANT | {"weight": 0.5}], "id": 7}]
    path = write(tmp_path / "rows.jsonl", rows)
    with warnings.catch_warnings():
        show_warnings()
        load_task_dataset(path, tokenizer)
    assert capsys.readouterr().err.splitlines() == [
        f"Warning: {path}: refused 1 of 2 rows; the first: {path}, row 2, field "
        "'messages[1].weight': got 0.5; expected 0 (read only) or 1 (trained)",
        f"Warning: {path}: nothing reads 'id' (in 1 of 2 rows)",
    ]


@pytest.mark.parametrize("name", ["gptoss", "qwen3_5_think", "idefics3", "deepseekv3"])
def test_the_command_line_loads_models_with_templates_of_their_own(name):
    """Before anything else it encodes this chat."""
    tokenizer = published_tokenizer(name)
    row = encode_chat(tokenizer, [{"role": r, "content": "Hello"} for r in ("user", "assistant")])
    assert "Hello" in scored_text(tokenizer, row)


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


def test_importing_the_package_imports_neither_transformers_nor_pyarrow():
    code = (
        "import sys, sap_fast.data, sap_fast.evaluation; "
        "print({'transformers', 'pyarrow'} & set(sys.modules))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout == "set()\n"
