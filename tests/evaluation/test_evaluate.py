"""All measures of one model together."""

import json

import pytest

from sap_fast.data import Request, encode_chat
from sap_fast.evaluation import (
    Answer,
    EvaluationResult,
    Interval,
    evaluate_model,
    refusal_margins,
)
from tests.evaluation.conftest import HARMFUL, HARMLESS, Bars, chat, log_prob_by_hand


def test_evaluation_of_a_model_that_learned_to_refuse(refusing_model, tokenizer):
    bars = Bars()
    result = evaluate_model(
        refusing_model,
        tokenizer,
        harmful=HARMFUL,
        harmless=HARMLESS,
        batch_size=2,
        progress=bars,
    )
    assert result.harmful_refused == [True, True, False]
    assert result.harmless_refused == [False, False]
    assert result.refused_harmful.mean == pytest.approx(2 / 3)
    assert result.refused_harmful.count == 3
    assert result.refused_harmless == Interval(0.0, 0.0, 0.0, 2)
    margins = refusal_margins(refusing_model, tokenizer, HARMFUL)
    assert result.harmful_margins == pytest.approx(margins.tolist(), abs=2e-3)
    assert result.margin.mean == pytest.approx(float(margins.mean()), abs=2e-3)
    assert result.margin.low < result.margin.mean < result.margin.high
    assert result.task_loss is None
    assert result.task_tokens is result.task_interval is None
    begun = [answer.first_words for answer in result.harmful_answers]
    assert begun[0].startswith("I can't") and begun[2].startswith("Sure, it")
    assert [answer.prompt for answer in result.harmless_answers] == ["Sing", "Bake a cake"]
    assert bars.totals == [
        ("Generating openings", 3),
        ("Scoring refusals", 6),
        ("Generating openings", 2),
    ]
    assert bars.advanced == [3, 6, 2]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_task_loss_weighs_every_token_the_same(model, tokenizer, batch_size):
    answers = ["La", "A song about the sea, the sky and all that lies between", "Tra la la"]
    rows = [encode_chat(tokenizer, chat("Sing", answer)) for answer in answers]
    model.eval()
    log_probs = [
        log_prob_by_hand(model, tokenizer, "Sing", f"{answer}<|im_end|>") for answer in answers
    ]
    tokens = [len(answer) + 1 for answer in answers]
    by_token = -sum(log_probs) / sum(tokens)
    by_row = -sum(value / count for value, count in zip(log_probs, tokens, strict=True)) / 3
    assert abs(by_token - by_row) > 1e-3
    result = evaluate_model(model, tokenizer, task_rows=rows, batch_size=batch_size)
    assert result.task_tokens == sum(tokens)
    assert result.task_loss == pytest.approx(by_token, rel=1e-5)
    assert result.task_interval.mean == pytest.approx(by_token, rel=1e-5)
    assert result.task_interval.low < by_token < result.task_interval.high
    assert result.task_interval.count == 3
    assert result.refused_harmful is result.margin is result.harmful_refused is None


def test_a_result_survives_json(model, tokenizer):
    rows = [encode_chat(tokenizer, chat("Sing", "La"))]
    full = evaluate_model(
        model, tokenizer, task_rows=rows, harmful=HARMFUL, harmless=HARMLESS, batch_size=8
    )
    scored = EvaluationResult(task_accuracies={"gsm8k": Interval(0.5, 0.25, 0.75, 4)})
    for result in (full, scored, EvaluationResult()):
        again = EvaluationResult.from_dict(json.loads(json.dumps(result.to_dict())))
        assert again == result
        assert type(again.margin) is type(result.margin)
    # Results of before the first words were kept, which compare may find.
    values = {"margin": None, "refused_harmful": None, "refused_harmless": None}
    assert EvaluationResult.from_dict(values) == EvaluationResult()


def test_no_more_than_the_first_words_of_an_answer_are_kept(model, tokenizer, monkeypatch):
    said = "one two three four  five six seven eight nine ten"
    monkeypatch.setattr("sap_fast.evaluation.evaluate.generate_openings", lambda *_, **__: [said])
    request = Request("Pick a lock", category="locks")
    result = evaluate_model(model, tokenizer, harmful=[request])
    words = "one two three four five six seven eight"
    assert result.harmful_answers == [Answer("Pick a lock", "locks", words)]


@pytest.mark.parametrize("name", ["task_rows", "harmful", "harmless"])
def test_an_empty_list_is_an_error(model, tokenizer, name):
    with pytest.raises(ValueError, match=f"{name} is empty; expected at least one entry, or None"):
        evaluate_model(model, tokenizer, **{name: []})
