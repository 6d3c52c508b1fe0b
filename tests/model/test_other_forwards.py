"""Forward passes inside a pass that are not the loss's, and layers that run more than once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast import FusedSAP, ProbeSet
from tests.tiny import Problem, problem, safety, task


def logits(case: Problem) -> Tensor:
    return case.model(input_ids=case.batch["input_ids"]).logits


def step_with(case: Problem, aside: Any, **probe: Any) -> tuple[FusedSAP, list[Any]]:
    """One step whose task closure runs `aside` first; what it returned, pass by pass."""
    seen: list[Any] = []
    optimizer = FusedSAP(case.trained, ProbeSet(case.model, [1], rho=1e-2, **probe), lr=1e-2)

    def closure() -> Tensor:
        seen.append(aside())
        return task(case)

    optimizer.step(closure, lambda: safety(case))
    return optimizer, seen


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("adapters", [True, False])
def test_a_forward_without_gradients_has_no_probe_and_is_not_collected(
    difference: str, adapters: bool
) -> None:
    case = problem()
    twin = case.copy()

    def reference() -> Tensor:
        with torch.no_grad():
            if adapters:
                return logits(case)
            with case.model.disable_adapter():
                return logits(case)

    optimizer, seen = step_with(case, reference, difference=difference)
    plain, _ = step_with(twin, lambda: None, difference=difference)
    for layer, h in plain.probes.estimates.items():
        assert torch.equal(optimizer.probes.estimates[layer], h)
    for ours, theirs in zip(case.trained, twin.trained, strict=True):
        assert torch.equal(ours, theirs)
    if not adapters:  # the base under the adapters is neither perturbed nor probed
        assert torch.equal(seen[0], seen[-1]) and torch.equal(seen[0], seen[1])


def test_in_the_task_pass_a_reference_is_the_model_without_the_probe() -> None:
    case = problem()
    with torch.no_grad():
        outside = logits(case)

    def reference() -> Tensor:
        with torch.no_grad():
            return logits(case)

    _, seen = step_with(case, reference, size=0.5)
    assert torch.equal(seen[-1], outside)
    assert not torch.equal(seen[0], outside)  # at W + ΔW


def test_adapters_switched_off_and_on_take_no_gradient_in_a_probe_pass() -> None:
    case = problem()
    trained, required = list(case.trained), list[bool]()
    case.model.get_base_model().lm_head.register_forward_hook(
        lambda *_: required.append(any(p.requires_grad for p in trained))
    )
    optimizer = FusedSAP(trained, ProbeSet(case.model, [1], rho=1e-2), lr=1e-2)

    def closure() -> Tensor:
        with case.model.disable_adapter():
            pass  # PEFT leaves the adapters requiring gradients
        return task(case)

    optimizer.step(closure, lambda: safety(case))
    assert required == [True, True, False, False, True]  # safety (two batches), probe, task
    assert all(parameter.requires_grad for parameter in trained)


def test_a_reference_that_fails_leaves_the_probe_as_it_was() -> None:
    case = problem()
    calls = 0

    def failing() -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            broken = case.model.get_base_model().model.layers[2].register_forward_pre_hook(stop)
            try:
                with pytest.raises(ZeroDivisionError), torch.no_grad():
                    logits(case)
            finally:
                broken.remove()

    def stop(*_: Any) -> None:
        raise ZeroDivisionError

    twin = case.copy()
    optimizer, _ = step_with(case, failing)
    plain, _ = step_with(twin, lambda: None)
    assert torch.equal(optimizer.probes.estimates[1], plain.probes.estimates[1])


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_a_layer_that_runs_twice_in_a_forward_is_refused_by_name(difference: str) -> None:
    case = problem(lora=False)
    layers = case.model.model.layers
    run = layers[1].forward

    class Again(nn.Module):
        """The layer behind it once more."""

        def forward(self, hidden_states: Tensor, **inputs: Any) -> Any:
            return layers[1](hidden_states, **inputs | {"past_key_values": None})

    layers[2].forward = Again().forward
    before = [parameter.detach().clone() for parameter in case.trained]
    probes = ProbeSet(case.model, [1], rho=1e-2, difference=difference)
    optimizer = FusedSAP(case.trained, probes, lr=1e-2)
    with pytest.raises(RuntimeError, match=r"decoder layer 1 \(LlamaDecoderLayer\) ran twice"):
        optimizer.step(lambda: task(case), lambda: safety(case))
    assert layers[1].forward == run
    assert all(torch.equal(p, b) for p, b in zip(case.trained, before, strict=True))
    other = FusedSAP(case.trained, ProbeSet(case.model, [0], rho=1e-2), lr=1e-2)
    other.step(lambda: task(case), lambda: safety(case))  # a layer that runs once


@pytest.mark.parametrize("mode", [True, False])
def test_a_checkpointed_layer_that_runs_again_in_backward_is_not_refused(mode: bool) -> None:
    case = problem(lora=False)
    case.model.gradient_checkpointing_enable({"use_reentrant": mode})
    case.model.enable_input_require_grads()
    twin = problem(lora=False)
    for one in (case, twin):
        FusedSAP(one.trained, ProbeSet(one.model, [1], rho=1e-2), lr=1e-2).step(
            lambda one=one: task(one), lambda one=one: safety(one)
        )
    for ours, theirs in zip(case.trained, twin.trained, strict=True):
        torch.testing.assert_close(ours, theirs)
