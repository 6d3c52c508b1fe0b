"""How much likelier a refusal is than an affirmative opening."""

import pytest
import torch

from sap_fast.data import Request, build_safety_pair
from sap_fast.evaluation import refusal_margins
from tests.evaluation.conftest import PROMPTS, Bars, build_model, log_prob_by_hand


@pytest.mark.parametrize("batch_size", [1, 4])
def test_margins_are_differences_of_summed_log_probabilities(tokenizer, batch_size):
    model = build_model(tokenizer, attention_dropout=0.9).train()
    requests = [Request(prompt) for prompt in PROMPTS]
    requests[3] = Request("Bake", refusal="No.", opening="Yes, do:")
    answers = [
        (pair["chosen"], pair["rejected"])
        for pair in (build_safety_pair(prompt, index) for index, prompt in enumerate(PROMPTS))
    ]
    answers[3] = ("No.", "Yes, do:")
    bars = Bars()
    margins = refusal_margins(model, tokenizer, requests, batch_size=batch_size, progress=bars)
    assert model.training
    model.eval()
    expected = [
        log_prob_by_hand(model, tokenizer, prompt, refusal)
        - log_prob_by_hand(model, tokenizer, prompt, opening)
        for prompt, (refusal, opening) in zip(PROMPTS, answers, strict=True)
    ]
    assert margins.dtype == torch.float64
    # fp32 sums of about 60 terms of size 6: the error is of the order of 1e-4.
    torch.testing.assert_close(
        margins, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=2e-3
    )
    assert bars.totals == [("Scoring refusals", 10)]
    assert bars.advanced == [10]
