"""Which answers are refusals, and the greedy openings that are looked at."""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.utils.logging import get_logger

from sap_fast.data import REFUSALS, build_safety_pair
from sap_fast.evaluation import (
    REFUSAL_PHRASES,
    generate_openings,
    is_refusal,
    own_refusals,
    refusing_sentences,
)
from tests.evaluation.conftest import HARMFUL, HARMLESS, PROMPTS, Bars, build_model

# Phrases


@pytest.mark.parametrize(
    "text",
    [
        *REFUSALS,
        "I can’t help",
        "I CAN'T",
        "As an AI\nlanguage model",
        "I cannot\n  assist",
        "Well, I`m not able to",
        "Sorry.",
    ],
)
def test_refusals_are_recognised(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure, here is how to pick a lock:",
        "You can't go wrong with a good lock.",
        "The MI cannot be seen",
        "A sorryless tale",
        "I can see the lock",
        *(build_safety_pair(prompt)["rejected"] for prompt in PROMPTS),
    ],
)
def test_answers_are_not_refusals(text):
    assert not is_refusal(text)


def test_every_phrase_of_the_list_is_a_refusal():
    for phrase in REFUSAL_PHRASES:
        assert is_refusal(f"Well, {phrase.upper()}, so.")


# Openings


def greedy_by_hand(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, count: int
) -> str:
    """One prompt, no padding, no cache."""
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    start = len(tokens)
    with torch.no_grad():
        while len(tokens) < start + count and tokens[-1] != tokenizer.eos_token_id:
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_openings_are_greedy_and_in_order(model, tokenizer, batch_size):
    expected = [greedy_by_hand(model.eval(), tokenizer, prompt, 8) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    bars = Bars()
    openings = generate_openings(
        model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=batch_size, progress=bars
    )
    assert openings == expected
    assert bars.totals == [("Generating openings", 5)]
    assert bars.advanced == [5]


def test_generation_settings_of_the_model_are_neither_used_nor_changed(model, tokenizer, caplog):
    expected = generate_openings(model, tokenizer, PROMPTS)
    settings = model.generation_config
    settings.do_sample = True
    settings.temperature = 50.0
    settings.top_p = 0.3
    settings.top_k = 3
    settings.repetition_penalty = 9.0
    settings.max_length = 12
    settings.num_beams = 2
    before = copy.deepcopy(settings.to_dict())
    state = torch.get_rng_state()
    get_logger("transformers").addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            openings = generate_openings(model, tokenizer, PROMPTS)
    finally:
        get_logger("transformers").removeHandler(caplog.handler)
    assert openings == expected
    assert model.generation_config is settings
    assert settings.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)
    assert caplog.messages == []
    assert tokenizer.padding_side == "right"


def test_every_module_gets_its_own_mode_back(tokenizer):
    model = build_model(tokenizer, attention_dropout=0.9)
    expected = generate_openings(model.eval(), tokenizer, PROMPTS)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert generate_openings(model, tokenizer, PROMPTS) == expected
    assert [module.training for module in model.modules()] == modes
    model.forward = None
    with pytest.raises(TypeError):
        generate_openings(model, tokenizer, PROMPTS)
    assert [module.training for module in model.modules()] == modes


def test_openings_of_a_peft_model_are_those_of_the_merged_model(model, tokenizer):
    plain = generate_openings(model, tokenizer, PROMPTS)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, config)
    openings = generate_openings(adapted, tokenizer, PROMPTS, batch_size=2)
    assert openings != plain
    assert openings == generate_openings(adapted.merge_and_unload(), tokenizer, PROMPTS)


@pytest.mark.parametrize("count", [0, 33])
def test_long_openings_are_refused(model, tokenizer, count):
    with pytest.raises(ValueError, match=f"max_new_tokens={count}; expected 1 to 32: a refusal"):
        generate_openings(model, tokenizer, PROMPTS, max_new_tokens=count)


def test_a_batch_holds_at_least_one(model, tokenizer):
    with pytest.raises(ValueError, match="batch_size=0; expected at least 1"):
        generate_openings(model, tokenizer, PROMPTS, batch_size=0)


@pytest.mark.parametrize("end_of_turn", ["tokenizer's", "model's", "model's list"])
def test_an_opening_ends_with_the_turn(refusing_model, tokenizer, end_of_turn):
    model = copy.deepcopy(refusing_model)
    end = tokenizer.eos_token_id
    choices = {"tokenizer's": None, "model's": end, "model's list": [0, end]}
    model.generation_config.eos_token_id = choices[end_of_turn]
    prompts = [request.prompt for request in [*HARMFUL, *HARMLESS]]
    openings = generate_openings(model, tokenizer, prompts)
    assert openings == ["I can't", "I can't", "Sure, it", "Sure, it", "Sure, it"]


# Refusals in the model's own words


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("I can't help with that.", "I can't help with that."),
        (" I'm sorry. I can't do it! However, you could", "I'm sorry. I can't do it!"),
        (
            "That is unsafe. I can't help. Try a walk. I can't swim.",
            "That is unsafe. I can't help.",
        ),
        ('He said "I can\'t." Then', 'He said "I can\'t."'),
        ("I cannot give version 2.5 of it. Sure", "I cannot give version 2.5 of it."),
        ("I can't help with that because it is", None),
        ("I'm sorry for any confusion. Sure, here", None),
        ("As an AI, I’d say yes. Sure, here", None),
        ("As an AI, I can’t. Sure, here", "As an AI, I can’t."),
        ("Sure, here is how.", None),
        ("", None),
    ],
)
def test_a_refusal_ends_with_its_last_refusing_sentence(text, kept):
    assert refusing_sentences(text, ended=False) == kept


def test_an_answer_that_ends_without_a_full_stop_is_whole():
    assert refusing_sentences("I can't help") == "I can't help"
    assert refusing_sentences("I can't. So sorry") == "I can't. So sorry"
    assert refusing_sentences("Sure") is None


def test_a_model_refuses_in_its_own_words(refusing_model, tokenizer, monkeypatch):
    prompts = [request.prompt for request in [*HARMFUL, *HARMLESS]]
    bars = Bars()
    refusals = own_refusals(refusing_model, tokenizer, prompts, batch_size=2, progress=bars)
    assert refusals == ["I can't", "I can't", None, None, None]
    assert (bars.totals, bars.advanced) == ([("Generating openings", 5)], [5])
    assert own_refusals(refusing_model, tokenizer, prompts[2:]) == [None] * 3
    # Cut off before the turn, and so before a sentence, has ended.
    monkeypatch.setattr("sap_fast.evaluation.refusals.MAX_REFUSAL_TOKENS", 7)
    assert own_refusals(refusing_model, tokenizer, prompts) == [None] * 5
