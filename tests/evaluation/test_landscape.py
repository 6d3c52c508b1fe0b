"""The safety landscape: where the weights go, and that they come back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast.evaluation.landscape import (
    along,
    as_long_as,
    normalized,
    random_direction,
    visage,
)
from tests.tiny import norm_of, tiny_llama


@pytest.fixture
def parameters() -> list[Tensor]:
    return [p.detach() for p in tiny_llama(layers=2).parameters()]


def copies(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.clone() for parameter in parameters]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# ---- directions ----


def test_a_direction_has_the_norm_of_every_parameter_and_follows_from_its_seed(
    parameters: list[Tensor],
) -> None:
    parameters.append(torch.zeros(3))
    direction = random_direction(parameters, seed=1)
    for moved, parameter in zip(direction, parameters, strict=True):
        assert moved.shape == parameter.shape
        torch.testing.assert_close(moved.norm(), parameter.norm())
    assert_same_bits(direction, random_direction(parameters, seed=1))
    other = random_direction(parameters, seed=2)
    assert torch.cosine_similarity(direction[0].flatten(), other[0].flatten(), dim=0).abs() < 0.1


@pytest.mark.parametrize("scale", [normalized, as_long_as])
def test_a_tensor_of_zeros_stays_one(scale: Any, parameters: list[Tensor]) -> None:
    zeros = [torch.zeros_like(parameter) for parameter in parameters]
    assert not any(moved.any() for moved in scale(zeros, parameters))


def test_a_gradient_is_scaled_as_a_whole(parameters: list[Tensor]) -> None:
    gradient = [torch.randn_like(parameter) * k for k, parameter in enumerate(parameters)]
    scaled = as_long_as(copies(gradient), parameters)
    one, all_of_it, weights = (
        torch.cat([tensor.flatten() for tensor in tensors])
        for tensors in (scaled, gradient, parameters)
    )
    torch.testing.assert_close(one.norm(), weights.norm())
    torch.testing.assert_close(one / one.norm(), all_of_it / all_of_it.norm())


# ---- walking ----


def test_weights_are_where_a_step_leads_and_come_back_bit_for_bit(
    parameters: list[Tensor],
) -> None:
    before, direction = copies(parameters), random_direction(parameters, seed=0)
    wanted = copies(direction)
    addresses = [parameter.data_ptr() for parameter in parameters]

    def measure(alpha: float) -> float:
        for parameter, start, moved in zip(parameters, before, wanted, strict=True):
            if alpha == 0:
                assert torch.equal(parameter, start)
            torch.testing.assert_close(parameter, start + alpha * moved, rtol=1e-5, atol=1e-6)
        return 2 * alpha

    alphas = [-0.5, -0.1, 0.0, 0.01, 0.5]
    assert along(parameters, direction, alphas, measure) == [2 * alpha for alpha in alphas]
    assert_same_bits(parameters, before)
    # In place: nothing that holds the weights has to be told.
    assert [parameter.data_ptr() for parameter in parameters] == addresses


@pytest.mark.parametrize(("alpha", "error"), [(1e-2, 1e-5), (1e-4, 1e-3)])
def test_a_direction_comes_back_to_what_the_docstring_says(
    parameters: list[Tensor], alpha: float, error: float
) -> None:
    direction = random_direction(parameters, seed=0)
    before = copies(direction)
    along(parameters, direction, [alpha], lambda _: None)
    drift = norm_of([a - b for a, b in zip(direction, before, strict=True)])
    assert 0 < drift < error * norm_of(before)


def test_weights_come_back_when_measuring_fails(parameters: list[Tensor]) -> None:
    before = copies(parameters)

    def fail(alpha: float) -> None:
        assert not torch.equal(parameters[0], before[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        along(parameters, random_direction(parameters, seed=0), [0.3], fail)
    assert_same_bits(parameters, before)


def test_visage_is_the_mean_over_the_landscape() -> None:
    volume = visage([[0.0, 1.0, 0.5], [0.0, 0.6, 0.0]])
    assert volume.mean == pytest.approx(0.35) and volume.count == 2
    assert volume.low == pytest.approx(0.2) and volume.high == pytest.approx(0.5)
