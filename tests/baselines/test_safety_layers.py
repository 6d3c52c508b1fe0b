"""The safety layers: where they are looked for, and that frozen ones stay as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sap_fast.baselines import find_safety_layers, freeze_layers, safety_layers
from sap_fast.baselines.plain import PlainTrainer
from sap_fast.baselines.safety_layers import _gaps, _initial_range, last_hidden_states
from sap_fast.cli.models import load_model
from sap_fast.data import encode_prompt
from tests.tiny import tiny_llama
from tests.trainers import arguments, model, trainer_of

NORMAL = ["Sing", "Bake a cake", "Write a poem about the sea", "Say hello"]
MALICIOUS = ["Break a lock", "Forge a ticket"]
EDGY = ["Kill a process", "Shoot a photo", "Steal the show"]


@pytest.fixture
def chat(chat_model: Path) -> tuple[nn.Module, Any]:
    return load_model(str(chat_model), "fp32")


def test_hidden_states_are_those_of_the_last_token_whatever_the_padding(chat: Any) -> None:
    tuned, tokenizer = chat
    together = last_hidden_states(tuned, tokenizer, NORMAL, batch_size=4)
    assert together.shape == (4, 3, tuned.config.hidden_size)
    assert not any(module._forward_hooks for module in tuned.modules())
    for prompt, states in zip(NORMAL, together, strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        with torch.no_grad():
            outputs = tuned.model(ids, output_hidden_states=True)
        # The last entry has the final norm in it.
        for layer in (0, 1):
            alone = outputs.hidden_states[layer + 1][0, -1]
            torch.testing.assert_close(states[layer], alone, rtol=1e-4, atol=1e-5)


def test_a_gap_is_the_angle_beyond_that_of_normal_pairs() -> None:
    normal = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]] * 3)
    turned = [[math.cos(angle), math.sin(angle)] for angle in (0.3, 1.2)]
    gaps = _gaps(normal, torch.tensor([turned] * 2), pairs=7, seed=0)
    assert gaps == pytest.approx([0.3, 1.2], abs=1e-6)
    # What parts normal requests from one another is no sign of malice.
    scattered = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    both = torch.tensor([[[1.0, 1.0]]])
    assert _gaps(scattered, both, pairs=50, seed=0) == pytest.approx([-math.pi / 4], abs=1e-6)


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([0.0, 0.01, 0.2, 0.7, 0.9, 0.92, 0.9], (2, 4)),
        # Growth that pauses before the steepest stretch does not end the range.
        ([0.0, 0.1, 0.1, 0.6, 0.62], (1, 3)),
        ([0.0, 0.1, 0.3, 0.6], (1, 3)),
        ([0.5, 0.5, 0.5], (0, 0)),
    ],
)
def test_the_first_range_is_where_the_gap_widens(
    gaps: list[float], expected: tuple[int, int]
) -> None:
    assert _initial_range(gaps) == expected


class Refuser:
    """Answers in the place of the model, by which layers are scaled."""

    def __init__(self, model: nn.Module, refused: dict[tuple[int, int], int]) -> None:
        self.model, self.refused = model, refused
        self.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
        self.asked: list[tuple[int, int]] = []

    def __call__(self, *_: Any, **__: Any) -> Sequence[str]:
        scaled = set()
        for name, parameter in self.model.named_parameters():
            if not torch.equal(parameter, self.weights[name]):
                torch.testing.assert_close(parameter, 1.1 * self.weights[name])
                scaled.add(int(name.split(".layers.")[1].split(".")[0]))
        ends = (min(scaled), max(scaled))
        assert scaled == set(range(ends[0], ends[1] + 1))
        self.asked.append(ends)
        count = self.refused.get(ends, 0)
        return ["I cannot"] * count + ["Sure"] * (len(EDGY) - count)

    def assert_restored(self) -> None:
        for name, parameter in self.model.named_parameters():
            assert torch.equal(parameter, self.weights[name])


def search(model: nn.Module, monkeypatch: Any, refuser: Any, **options: Any) -> Any:
    monkeypatch.setattr(safety_layers, "generate_openings", refuser)
    monkeypatch.setattr(safety_layers, "_initial_range", lambda gaps: (2, 4))
    monkeypatch.setattr(
        safety_layers,
        "last_hidden_states",
        lambda m, t, prompts, **_: torch.rand(len(prompts), 8, 4),
    )
    return find_safety_layers(model, None, normal=NORMAL, malicious=MALICIOUS, edgy=EDGY, **options)


def test_the_last_layer_is_moved_to_most_over_rejections_then_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tuned = tiny_llama(layers=8)
    # (1, 3) refuses more still, and (2, 5) as much as (2, 6): the smaller range is taken.
    counts = {(2, 4): 1, (2, 5): 2, (2, 6): 2, (1, 3): 3, (3, 5): 3, (1, 5): 2}
    refuser = Refuser(tuned, counts)
    found = search(tuned, monkeypatch, refuser, reach=2)
    assert refuser.asked == [(2, e) for e in (2, 3, 4, 5, 6)] + [(b, 5) for b in (0, 1, 3, 4)]
    assert (found.first, found.last, list(found.layers)) == (3, 5, [3, 4, 5])
    assert found.over_rejections == {ends: counts.get(ends, 0) for ends in refuser.asked}
    refuser.assert_restored()


def test_weights_are_put_back_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = tiny_llama(layers=8)
    refuser = Refuser(tuned, {})

    def fail(*arguments: Any, **options: Any) -> Any:
        refuser(*arguments, **options)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(tuned, monkeypatch, fail)
    assert refuser.asked
    refuser.assert_restored()


def test_on_a_model_it_finds_a_range_and_leaves_everything_as_it_was(chat: Any) -> None:
    tuned, tokenizer = chat
    before = {name: tensor.clone() for name, tensor in tuned.state_dict().items()}
    random_state, mode = torch.get_rng_state(), tuned.training
    options: dict[str, Any] = {"normal": NORMAL, "malicious": MALICIOUS, "edgy": EDGY, "pairs": 20}
    found = find_safety_layers(tuned, tokenizer, **options)
    assert 0 <= found.first <= found.last < 3 and len(found.gaps) == 3
    assert found == find_safety_layers(tuned, tokenizer, **options)
    assert torch.equal(torch.get_rng_state(), random_state) and tuned.training == mode
    for name, tensor in tuned.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("lora", [True, False])
def test_frozen_layers_stay_and_the_others_move(tmp_path: Path, lora: bool) -> None:
    tuned = model(lora=lora)
    freeze_layers(tuned, [1, 2])
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    trainer = trainer_of(PlainTrainer, tuned, arguments(tmp_path))
    trainer.train()
    for name, parameter in tuned.named_parameters():
        is_trained = ".layers.0." in name and (not lora or "lora_" in name)
        if ".layers." in name:
            assert torch.equal(parameter, before[name]) != is_trained, name


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([3], r"layers=\[3\]: 3 is out of range"),
        ([-1], "-1 is out of"),
        ([0, 1, 2], "no parameter"),
    ],
)
def test_what_cannot_be_frozen_is_named(layers: list[int], message: str) -> None:
    tuned = model()
    trained = [p.requires_grad for p in tuned.parameters()]
    with pytest.raises(ValueError, match=message):
        freeze_layers(tuned, layers)
    assert [p.requires_grad for p in tuned.parameters()] == trained


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normal": ["one"]}, "normal has 1 requests; expected at least 2"),
        ({"malicious": []}, "malicious has 0"),
        ({"edgy": []}, "edgy has 0"),
        ({"pairs": 0}, "pairs=0"),
        ({"reach": -1}, "reach=-1"),
        ({"scale": 1.0}, "scale=1.0"),
        ({"scale": float("nan")}, "scale=nan"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"normal": NORMAL, "malicious": MALICIOUS, "edgy": EDGY}
    with pytest.raises(ValueError, match=message):
        find_safety_layers(tiny_llama(), None, **(given | options))
