"""Parameters that lie in the same memory, or are listed twice."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet, SafetyPasses
from tests.tiny import plain_adamw, problem, safety, task, tiny_llama


def tied() -> LlamaForCausalLM:
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_parameter_that_is_listed_twice_counts_once(backend: str) -> None:
    case = problem(lora=False)._replace(model=tied())
    twin = case.copy()
    listed = [*case.model.model.parameters(), *case.model.lm_head.parameters()]
    assert len(listed) == len({id(p) for p in listed}) + 1
    with pytest.warns(UserWarning, match="duplicate parameters"):
        ours = FusedSAP(listed, ProbeSet(case.model, [1], rho=1e-2), lr=1e-2, backend=backend)
    theirs = FusedSAP(twin.trained, ProbeSet(twin.model, [1], rho=1e-2), lr=1e-2, backend=backend)
    for optimizer, one in ((ours, case), (theirs, twin)):
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.step(lambda one=one: task(one), lambda one=one: safety(one))
    for a, b in zip(case.trained, twin.trained, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_adapters_over_tied_storage_are_refused_by_name(backend: str) -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model = get_peft_model(tied(), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match=r"embed_tokens.*lm_head.*share memory"):
        FusedSAP(trained, ProbeSet(model, [1]), backend=backend)
    with pytest.raises(ValueError, match=r"parameter \d+ \(.*share memory"):
        BlendedAdamW(trained, backend=backend)


def test_views_into_one_storage_are_refused_where_they_overlap() -> None:
    storage = torch.randn(12)
    apart = [nn.Parameter(storage[:6]), nn.Parameter(storage[6:])]
    SafetyPasses(apart)
    for other in (storage[5:8], storage.view(3, 4)[1], storage[::2]):
        with pytest.raises(ValueError, match="share memory"):
            SafetyPasses([nn.Parameter(storage[:6]), nn.Parameter(other)])


def test_a_group_added_later_is_looked_at_as_well() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = BlendedAdamW([weight], safety_weight=0.0)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.add_param_group({"params": [nn.Parameter(weight.detach().T)]})


def test_empty_parameters_and_those_on_meta_share_nothing() -> None:
    empty = [nn.Parameter(torch.empty(0)) for _ in range(2)]
    meta = [nn.Parameter(torch.empty(3, device="meta")) for _ in range(2)]
    assert len(SafetyPasses(empty).trained.parameters) == 2
    plain_adamw(empty)
    SafetyPasses(meta, backend="reference")


@pytest.mark.parametrize("loaded", [False, True])
def test_parameters_put_into_a_group_are_those_of_the_next_step(loaded: bool) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False)
    x = torch.randn(3, 4)
    optimizer = BlendedAdamW(model.parameters(), lr=0.1, safety_level=None, direction_every=5)
    safety_calls: list[int] = []

    def backward(sign: float) -> torch.Tensor:
        if sign < 0:
            safety_calls.append(1)
        loss = (model(x) - sign).square().mean()
        loss.backward()
        return loss

    def step() -> None:
        optimizer.step(lambda: backward(1.0), lambda: backward(-1.0))

    step()
    if loaded:
        optimizer.load_state_dict(optimizer.state_dict())
    step()
    assert len(safety_calls) == 1
    before = model.weight.detach().clone()
    model.weight = nn.Parameter(before.clone())  # as `fully_shard` does, and Accelerate after it
    optimizer.param_groups[0]["params"] = list(model.parameters())
    step()
    assert optimizer.passes.trained.parameters == [model.weight]
    assert len(safety_calls) == 2  # d of a parameter that is gone is of no use
    assert not torch.equal(model.weight, before)


def test_parameters_are_asked_for_their_devices_once_per_step() -> None:
    case = problem()
    trained = FusedSAP(case.trained, ProbeSet(case.model)).passes.trained
    asked: list[bool] = []
    every = trained.every
    trained.every = lambda **inside: asked.append(True) or every(**inside)
    for _ in range(2):
        trained.begin()
        trained.random_state()  # before the first pass: parameters may still be others
        every(inside=True)
        for _ in range(3):
            trained.random_state()
        assert len(asked) == 2
        asked.clear()
