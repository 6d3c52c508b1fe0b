"""What is put back, whatever happens in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.step.guards import (
    Perturbation,
    frozen,
    gradients_restored_on_error,
    gradients_set_aside,
    refuse_sparse,
    report_overflow,
)
from tests.step.faults import FailAt
from tests.tiny import assert_same_bits


def tensors(count: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and a direction."""
    generator = torch.Generator().manual_seed(0)
    return tuple([torch.randn(5, generator=generator) for _ in range(count)] for _ in range(2))


# ---- the perturbation ----


def test_the_perturbation_is_w_plus_and_w_minus_the_scaled_direction(cpu_backend: str) -> None:
    params, buffers = tensors()
    before, direction = [p.clone() for p in params], [b.clone() for b in buffers]
    scale = torch.tensor(0.1)
    with Perturbation(params, buffers, scale) as perturbation:
        for p, w, d in zip(params, before, direction, strict=True):
            torch.testing.assert_close(p, w + 0.1 * d)
        applied = perturbation.applied_norm(torch.float32)
        torch.testing.assert_close(applied, 0.1 * torch.cat(direction).norm())
        assert perturbation.applied_norm(torch.bfloat16) != applied
        other = torch.ones(3)
        *both, unperturbed = perturbation.of_both_signs([*params, other])
        assert_same_bits([pair[0] for pair in both], params)
        assert torch.equal(unperturbed, torch.ones(2, 3))
        perturbation.reflect()
        assert_same_bits([pair[1] for pair in both], params)
        for p, w, d in zip(params, before, direction, strict=True):
            torch.testing.assert_close(p, w - 0.1 * d)
    assert_same_bits(params, before)
    # The buffers hold the direction again, to rounding.
    for b, d in zip(buffers, direction, strict=True):
        torch.testing.assert_close(b, d, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reflects", [True, False])
def test_a_scale_of_zero_perturbs_nothing(reflects: bool, cpu_backend: str) -> None:
    params, buffers = tensors()
    before = [p.clone() for p in params]
    with Perturbation(params, buffers, torch.tensor(0.0)) as perturbation:
        if reflects:
            perturbation.reflect()
        assert_same_bits(params, before)
    assert_same_bits(params, before)


def test_an_error_between_any_two_statements_of_the_swaps_leaves_no_trace() -> None:
    # Finer than what test_passes.py does: every operation inside perturb, reflect and restore.
    def run(at: int | None) -> tuple[list[Tensor], int]:
        params, buffers = tensors()
        mode = FailAt(at)
        with pytest.raises(RuntimeError, match="injected") if at else nullcontext(), mode:
            with Perturbation(
                params, buffers, torch.tensor(0.1), backend="reference"
            ) as perturbation:
                perturbation.applied_norm(torch.float32)
                perturbation.reflect()
        return params, mode.count

    original, total = run(None)
    assert total > 40
    for at in range(1, total + 1):
        params, _ = run(at)
        assert_same_bits(params, original)


@pytest.mark.parametrize("operation", ["perturb_swap_", "reflect_", "restore_swap_"])
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
def test_an_interrupt_around_an_operation_leaves_no_trace(
    operation: str, done: bool, cpu_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes to Python as a call of C++ begins or as it returns, the work done."""
    params, buffers = tensors()
    before = [p.clone() for p in params]
    real = getattr(ops, operation)

    def interrupted(*arguments: Any, **options: Any) -> None:
        if done:
            real(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, operation, interrupted)
    with pytest.raises(KeyboardInterrupt):
        with Perturbation(params, buffers, torch.tensor(0.1)) as perturbation:
            perturbation.reflect()
    assert_same_bits(params, before)


# ---- gradients, requires_grad ----


def parameters() -> list[nn.Parameter]:
    """One with a gradient, one without, one that takes none."""
    first, second, third = (nn.Parameter(torch.ones(2)) for _ in range(3))
    first.grad = torch.tensor([1.0, 2.0])
    third.requires_grad_(False)
    return [first, second, third]


GUARDS: list[Callable[[Any], AbstractContextManager[None]]] = [
    gradients_set_aside,
    gradients_restored_on_error,
    frozen,
]


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.__name__)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_guard_puts_back_what_an_error_left(
    guard: Callable[[Any], AbstractContextManager[None]], error: type[BaseException]
) -> None:
    params = parameters()
    gradient = params[0].grad
    with pytest.raises(error), guard(params):
        if params[0].grad is None:
            params[0].grad = torch.zeros(2)
        else:
            params[0].grad.zero_()  # in place, as an accumulating backward does
        params[1].grad = torch.ones(2)
        raise error
    if guard is frozen:
        params[0].grad = gradient.copy_(torch.tensor([1.0, 2.0]))
        params[1].grad = None
    assert params[0].grad is gradient
    assert torch.equal(gradient, torch.tensor([1.0, 2.0]))
    assert params[1].grad is None and params[2].grad is None
    assert [p.requires_grad for p in params] == [True, True, False]


def test_gradients_set_aside_are_out_of_sight_and_come_back_the_same_tensors() -> None:
    params = parameters()
    gradient = params[0].grad
    with gradients_set_aside(params):
        assert all(p.grad is None for p in params)
        params[1].grad = torch.ones(2)
    assert params[0].grad is gradient and params[1].grad is None


def test_gradients_that_were_accumulated_stay_where_nothing_fails() -> None:
    params = parameters()
    with gradients_restored_on_error(params):
        params[0].grad.add_(1)
        params[1].grad = torch.ones(2)
    assert torch.equal(params[0].grad, torch.tensor([2.0, 3.0]))
    assert torch.equal(params[1].grad, torch.ones(2))


def test_frozen_parameters_take_gradients_again_if_they_did() -> None:
    params = parameters()
    with frozen(params):
        assert not any(p.requires_grad for p in params)
    assert [p.requires_grad for p in params] == [True, True, False]


# ---- what gradients tell ----


def test_an_overflow_is_reported_in_a_gradient_and_nothing_else_is() -> None:
    params = [*parameters(), nn.Parameter(torch.empty(0))]
    params[3].grad = torch.empty(0)
    before = params[0].grad.clone()
    report_overflow(params, torch.tensor(True))
    assert torch.equal(params[0].grad, before)
    report_overflow(params, torch.tensor(False))
    assert params[0].grad.isnan().all() and params[1].grad is None
    report_overflow(params[1:], torch.tensor(False))  # nobody to tell


def test_a_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    refuse_sparse(embedding.weight)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"shape \(5, 3\).*sparse=False"):
        refuse_sparse(embedding.weight)
