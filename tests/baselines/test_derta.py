"""DeRTa's loss, from the log-probabilities of its rows written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sap_fast.baselines import derta_loss
from sap_fast.data import SafetyCollator
from tests.tiny import tiny_llama
from tests.trainers import SAFETY_ROWS


def nll(model: nn.Module, given: list[int], answers: list[int], read: list[int]) -> Tensor:
    """The mean loss of `answers` after `given`, where the model reads `read` in their place."""
    logits = model(input_ids=torch.tensor([given + read])).logits[0].double().log_softmax(-1)
    places = range(len(given) - 1, len(given) - 1 + len(answers))
    return -torch.stack(
        [logits[place, token] for place, token in zip(places, answers, strict=True)]
    ).mean()


@pytest.mark.parametrize("side", ["right", "left"])
def test_derta_refuses_after_a_harmful_start_and_at_each_of_its_tokens(side: str) -> None:
    model, rows = tiny_llama(layers=2), SAFETY_ROWS[:3]
    pairs = SafetyCollator(0, padding_side=side)(rows)
    torch.manual_seed(3)
    loss = derta_loss(model, pairs["chosen"], pairs["rejected"])
    torch.manual_seed(3)
    expected, starts = [], []
    for row in rows:
        parts = {}
        for kind in ("chosen", "rejected"):
            ids, labels = list(row[kind]["input_ids"]), list(row[kind]["labels"])
            first = next(place for place, label in enumerate(labels) if label != -100)
            parts[kind] = ids[:first], ids[first:]
        (_, safe), (prompt, harmful) = parts["chosen"], parts["rejected"]
        starts.append(int(torch.randint(len(harmful), ())))
        given = prompt + harmful[: starts[-1]]
        expected.append(nll(model, given, safe, safe))
        expected.append(nll(model, prompt, [safe[0]] * len(harmful), harmful))
    assert any(starts)
    torch.testing.assert_close(
        loss.double(), 2 * torch.stack(expected).mean(), rtol=1e-5, atol=1e-6
    )


def test_derta_wants_pairs() -> None:
    pairs = SafetyCollator(0)(SAFETY_ROWS[:3])
    fewer = {name: tensor[:2] for name, tensor in pairs["rejected"].items()}
    with pytest.raises(ValueError, match="chosen has 3 rows and rejected 2"):
        derta_loss(tiny_llama(layers=2), pairs["chosen"], fewer)
    unscored = pairs["rejected"] | {"labels": torch.full_like(pairs["rejected"]["labels"], -100)}
    with pytest.raises(ValueError, match="no scored token"):
        derta_loss(tiny_llama(layers=2), pairs["chosen"], unscored)
