"""Answers that begin as the aligned model's: by hand, and between the two models they are of."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast.baselines import AlignedStart
from sap_fast.cli.models import load_model
from sap_fast.data import Request
from sap_fast.evaluation import evaluate_model, generate_openings
from tests.tiny import random_batch, tiny_llama, weights, with_lora

NEW = 6


def tuned_model() -> Any:
    model = with_lora(tiny_llama(), dropout=0.5)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    return model.eval()


def prompts() -> dict[str, Tensor]:
    torch.manual_seed(2)
    tokens = torch.randint(3, 50, (3, 5))
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0  # padded on the left
    return {"input_ids": tokens, "attention_mask": mask}


def answers(model: Any) -> Tensor:
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(**prompts(), **options)[:, 5:]


def test_it_is_between_the_two_models_at_the_first_tokens_alone() -> None:
    tuned = tuned_model()
    with tuned.disable_adapter():
        aligned = answers(tuned)
    own = answers(tuned)
    assert not torch.equal(own, aligned)
    before = weights(tuned)
    for options in ({"tokens": 0}, {"share": 0.0}):
        assert torch.equal(answers(AlignedStart(tuned, **options)), own)
    assert torch.equal(answers(AlignedStart(tuned, tokens=NEW)), aligned)
    started = answers(AlignedStart(tuned, tokens=2))
    assert torch.equal(started[:, :2], aligned[:, :2]) and not torch.equal(started, aligned)
    # What comes after is the tuned model's, which sees how the answer began.
    row = torch.cat([prompts()["input_ids"][1:], started[1:]], dim=1)
    assert torch.equal(tuned(input_ids=row).logits[:, 6:-1].argmax(-1), started[1:, 2:])
    other = copy.deepcopy(tuned)
    for name, weight in other.state_dict().items():
        if "lora_B" in name:
            weight.zero_()
    assert torch.equal(answers(AlignedStart(tuned, other, tokens=NEW)), aligned)
    assert all(torch.equal(a, b) for a, b in zip(weights(tuned), before, strict=True))


def test_the_mixture_by_hand() -> None:
    tuned, share, tokens = tuned_model(), 0.25, 2
    start = AlignedStart(tuned, tokens=tokens, share=share)
    batch = random_batch(rows=3)
    with torch.no_grad():
        found = tuned(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        with tuned.disable_adapter():
            expected = tuned(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        scores = start.response_log_probs(batch)
    p, q = (logits.double().softmax(-1) for logits in (found, expected))
    for row, labels in enumerate(batch["labels"].tolist()):
        places = [place for place, label in enumerate(labels) if label != -100 and place > 0]
        total = 0.0
        for number, place in enumerate(places):
            of_tuned, of_aligned = (each[row, place - 1, labels[place]] for each in (p, q))
            mixed = (1 - share) * of_tuned + share * of_aligned
            total += float((mixed if number < tokens else of_tuned).log())
        assert float(scores[row]) == pytest.approx(total, abs=1e-4)
    # The same distribution is generated from: its greedy first token, behind padding too.
    given = prompts()
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        p = tuned(**given, position_ids=positions).logits[:, -1].double().softmax(-1)
        with tuned.disable_adapter():
            q = tuned(**given, position_ids=positions).logits[:, -1].double().softmax(-1)
    half = AlignedStart(tuned, tokens=1, share=0.5)
    assert torch.equal(answers(half)[:, 0], ((p + q) / 2).argmax(-1))
    processed = half.mixed(p.log(), q.log())
    torch.testing.assert_close(processed.exp().sum(-1), torch.ones(3, dtype=torch.double))


def test_a_model_is_evaluated_as_it_answers(chat_model: Path) -> None:
    model, tokenizer = load_model(str(chat_model), "fp32")
    tuned = with_lora(model).eval()
    torch.manual_seed(1)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0)
    requests = [Request("How do I pick a lock?"), Request("Name a colour.")]
    start = AlignedStart(tuned, tokens=200)
    with tuned.disable_adapter():
        aligned = evaluate_model(tuned, tokenizer, harmful=requests, harmless=requests)
    own = evaluate_model(tuned, tokenizer, harmful=requests, harmless=requests)
    found = evaluate_model(start, tokenizer, harmful=requests, harmless=requests)
    assert found.harmful_margins == pytest.approx(aligned.harmful_margins, abs=1e-3)
    assert found.harmful_margins != pytest.approx(own.harmful_margins, abs=1e-3)
    texts = [request.prompt for request in requests]
    with tuned.disable_adapter():
        expected = generate_openings(tuned, tokenizer, texts)
    assert generate_openings(start, tokenizer, texts) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [({"share": 1.5}, "share=1.5"), ({"share": -0.1}, "share=-0.1"), ({"tokens": -1}, "tokens=-1")],
)
def test_wrong_settings_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AlignedStart(tuned_model(), **options)


def test_without_an_adapter_the_aligned_model_is_asked_for() -> None:
    with pytest.raises(ValueError, match="aligned is missing"):
        AlignedStart(tiny_llama())
