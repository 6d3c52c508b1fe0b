"""The task pass goes on from the probe pass at W, with the bits of one that starts anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sap_fast import FusedSAP, ProbeSet
from sap_fast.model.layers import find_decoder_layers
from sap_fast.model.lower_forward import LowerForward
from tests.tiny import Batch, Problem, problem, random_batch, safety, task


def sap(case: Problem, **options: Any) -> FusedSAP:
    settings: dict[str, Any] = {"layers": [1, 2], "size": 0.05, "rho": 1e-3}
    probes = ProbeSet(case.model, **(settings | {"difference": "forward"} | options))
    return FusedSAP(case.trained, probes, lr=1e-2)


@contextmanager
def calls_of(case: Problem, layer: int) -> Iterator[list[int]]:
    """Count how often a decoder layer really runs."""
    calls: list[int] = []
    attention: Any = find_decoder_layers(case.model)[0][layer].self_attn
    handle = attention.register_forward_hook(lambda *_: calls.append(layer))
    yield calls
    handle.remove()


def weights(case: Problem) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in case.model.parameters()]


def run(case: Problem, micro_batches: int = 1) -> list[Tensor]:
    """Three steps; return the weights."""
    optimizer = sap(case)
    torch.manual_seed(7)
    for step in range(3):
        batches = [random_batch(seed=10 * step + k) for k in range(micro_batches)]

        def closure(batches: list[Batch] = batches) -> Tensor:
            return torch.stack([task(case, batch).detach() for batch in batches]).sum()

        optimizer.zero_grad()
        optimizer.step(closure, partial(safety, case))
    return weights(case)


class RunsAgain(torch.autograd.Function):
    """Checkpointing as Unsloth has it: without gradients at first, and again in backward."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], hidden: Tensor, *args: Any) -> Tensor:
        ctx.run, ctx.args = run, args
        ctx.save_for_backward(hidden)
        with torch.no_grad():
            return run(hidden, *args)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (saved,) = ctx.saved_tensors
        hidden = saved.detach().requires_grad_(True)
        with torch.enable_grad():
            output = ctx.run(hidden, *ctx.args)
        torch.autograd.backward(output, gradient)
        return None, hidden.grad, *(None for _ in ctx.args)


def checkpointed_with_its_hooks(layer: nn.Module, function: Callable[..., Tensor]) -> None:
    """Let a layer be checkpointed as Unsloth does, hooks included."""

    class Checkpointed(type(layer)):  # type: ignore[misc]
        def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return function(partial(nn.Module.__call__, self, **kwargs), hidden, *args)

    layer.__class__ = Checkpointed


@pytest.mark.parametrize(
    "function",
    [RunsAgain.apply, partial(checkpoint, use_reentrant=True)],
    ids=["runs again", "reentrant"],
)
@pytest.mark.parametrize("lora", [True, False])
def test_a_layer_that_ran_without_gradients_is_not_gone_on_from(
    lora: bool, function: Callable[..., Tensor]
) -> None:
    expected = run(problem(lora=lora))
    case = problem(lora=lora)
    model: Any = case.model
    model.enable_input_require_grads()
    model.config.use_cache = False  # a layer that runs again would write to it again
    for layer in find_decoder_layers(model)[0]:
        checkpointed_with_its_hooks(layer, function)
    # AdamW makes much of how a gradient near zero is rounded, in moves of up to 0.01 a step.
    for left, right in zip(run(case), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-4)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("lora", [True, False])
def test_bits_do_not_change(
    lora: bool, micro_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(lora=lora, dropout=0.2)
    with calls_of(case, 0) as lowest, calls_of(case, 1) as probed, calls_of(case, 2) as above:
        reused = run(case, micro_batches)
    # Three steps of a safety pass of two forwards, two probe passes and a task pass; of the last,
    # the first forward goes on from the probe pass, through the lowest probed layer.
    assert len(above) == 3 * (2 + 3 * micro_batches)
    assert len(lowest) == len(probed) == len(above) - 3

    monkeypatch.setattr(LowerForward, "is_possible", False)
    case = problem(lora=lora, dropout=0.2)
    with calls_of(case, 0) as lowest:
        plain = run(case, micro_batches)
    assert len(lowest) == 3 * (2 + 3 * micro_batches)
    for left, right in zip(reused, plain, strict=True):
        assert torch.equal(left, right)


def the_same(batch: Batch) -> Batch:
    return batch


def passes(case: Problem, optimizer: FusedSAP, last: Callable[[Batch], Batch] = the_same) -> None:
    """A step whose task pass sees `last` of the batch that the probe passes saw."""
    batch = random_batch(seed=5)
    optimizer.zero_grad()
    optimizer.inner_passes(partial(task, case), partial(safety, case), batch)
    with optimizer.task_pass():
        task(case, last(batch))
    optimizer.step()


def changed_in_place(batch: Batch) -> Batch:
    batch["input_ids"][0, 1] = 1
    return batch


@pytest.mark.parametrize(
    ("last", "reused"),
    [
        (the_same, True),
        (lambda batch: {key: value.clone() for key, value in batch.items()}, False),
        (changed_in_place, False),
        (lambda batch: random_batch(seed=99), False),
    ],
)
def test_only_the_same_inputs_are_gone_on_from(
    last: Callable[[Batch], Batch], reused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, plain = problem(), problem()
    with calls_of(case, 0) as calls:
        passes(case, sap(case), last)
    assert len(calls) == (4 if reused else 5)
    monkeypatch.setattr(LowerForward, "is_possible", False)
    passes(plain, sap(plain), last)
    for left, right in zip(weights(case), weights(plain), strict=True):
        assert torch.equal(left, right)


class Stop(Exception):
    """What the test raises."""


@pytest.mark.parametrize("layer", [0, 1, 3])
@pytest.mark.parametrize("running", ["probe", "task"])
def test_an_error_leaves_layers_and_parameters_as_they_were(layer: int, running: str) -> None:
    case = problem(dropout=0.2)
    optimizer = sap(case)
    assert optimizer.probes is not None
    lower = optimizer.probes._lower
    layers = find_decoder_layers(case.model)[0]
    trained = case.trained
    raising = [False]

    def stop(*_: Any) -> None:
        if raising[0]:
            raise Stop

    handle = layers[layer].register_forward_pre_hook(stop)
    turns: list[int] = []

    def probed(part: None) -> Tensor:
        raising[0] = running == "probe" and len(turns) == 1
        turns.append(1)
        return task(case)

    with pytest.raises(Stop):
        optimizer.inner_passes(probed, partial(safety, case))
        assert running == "task" and lower._output is not None
        raising[0] = True
        with optimizer.task_pass():
            task(case)
    handle.remove()
    assert len(turns) == 2
    assert lower._output is None
    assert all("forward" not in module.__dict__ for module in layers)
    assert case.trained == trained
    # Nothing is left over that another step would go on from.
    undisturbed = problem(dropout=0.2)
    for one in (case, undisturbed):
        torch.manual_seed(1)
        passes(one, sap(one))
    for left, right in zip(weights(case), weights(undisturbed), strict=True):
        assert torch.equal(left, right)


def test_a_forward_of_ones_own_on_a_layer_comes_back() -> None:
    case = problem()
    layer: nn.Module = find_decoder_layers(case.model)[0][0]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: own(*args, **kwargs)  # type: ignore[method-assign]  # as accelerate does
    mine = layer.forward
    with calls_of(case, 0) as calls:
        passes(case, sap(case))
    assert layer.forward is mine
    assert len(calls) == 4


def test_central_differences_and_layers_of_unknown_order_have_nothing_to_reuse() -> None:
    case = problem()
    with calls_of(case, 0) as calls:
        passes(case, sap(case, difference="central"))
        passes(case, sap(case, layers=[find_decoder_layers(case.model)[0][2].mlp]))
    assert len(calls) == 10


def test_a_part_of_the_batch_is_nothing_to_go_on_from() -> None:
    case = problem()
    with calls_of(case, 0) as calls:
        passes(case, sap(case, rows=0.5))
    assert len(calls) == 5


def test_what_is_kept_is_dropped_with_the_step() -> None:
    case = problem()
    optimizer = sap(case)
    assert optimizer.probes is not None
    lower = optimizer.probes._lower
    kept: list[bool] = []

    def looks() -> Tensor:
        kept.append(lower._output is not None)
        return safety(case)

    for _ in range(2):  # the second gives the step of the first up
        optimizer.inner_passes(partial(task, case), looks)
        kept.append(lower._output is not None)
    assert kept == [False, True, False, True]
