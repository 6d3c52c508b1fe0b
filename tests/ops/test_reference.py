"""The reference operations against plain formulas in fp64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from sap_fast import ops
from sap_fast.ops import reference
from tests.ops.tensors import DTYPES, assert_same_bits, clones

probe_inject = functools.partial(ops.probe_inject, backend="reference")
adamw_blend_ = functools.partial(ops.adamw_blend_, backend="reference")

# One element, a vector, an odd matrix, nothing, a transposed (non-contiguous) matrix.
SHAPES = [(1,), (257,), (33, 7), (0,), (16, 24)]


def tensors(dtype: torch.dtype, seed: int, size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [(size * torch.randn(shape, generator=generator)).to(dtype) for shape in SHAPES]
    made[-1] = made[-1].t().contiguous().t()
    return made


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_squares_and_dot_are_those_of_fp64(dtype: torch.dtype) -> None:
    left, right = tensors(dtype, 1), tensors(dtype, 2)
    exact = sum((a.double() ** 2).sum() for a in left)
    product = sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True))
    found = reference.sum_squares(left)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(reference.dot(left, right).double(), product, rtol=1e-5, atol=1e-5)


def test_reductions_of_fp64_stay_in_fp64() -> None:
    assert reference.sum_squares([torch.ones(3, dtype=torch.float64)]).dtype == torch.float64


def test_sum_squares_of_a_large_bf16_tensor_does_not_saturate() -> None:
    # Accumulated in bf16 the sum would stop growing at 256.
    assert reference.sum_squares([torch.ones(100_000, dtype=torch.bfloat16)]) == 100_000


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_adds_the_scaled_direction_and_keeps_the_old_value(dtype: torch.dtype) -> None:
    params, buffers = tensors(dtype, 1), tensors(dtype, 2)
    old, direction = clones(params), clones(buffers)
    reference.perturb_swap_(params, buffers, torch.tensor(0.25))
    assert_same_bits(buffers, old)
    expected = [
        (w.double() + 0.25 * d.double()).to(dtype) for w, d in zip(old, direction, strict=True)
    ]
    assert_same_bits(params, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-6, 3e-3, 0.7])
def test_restore_brings_back_every_bit(dtype: torch.dtype, scale: float) -> None:
    params, buffers = tensors(dtype, 1), tensors(dtype, 2)
    old = clones(params)
    reference.perturb_swap_(params, buffers, torch.tensor(scale))
    reference.restore_swap_(params, buffers, torch.tensor(1 / scale))
    assert_same_bits(params, old)


def test_restore_gives_the_direction_back_to_rounding() -> None:
    params, buffers = tensors(torch.float32, 1), tensors(torch.float32, 2)
    direction = clones(buffers)
    scale = torch.tensor(0.5)
    reference.perturb_swap_(params, buffers, scale)
    reference.restore_swap_(params, buffers, 1 / scale)
    for found, wanted in zip(buffers, direction, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_reflection_and_restore_after_it(dtype: torch.dtype) -> None:
    params, buffers = tensors(dtype, 1), tensors(dtype, 2)
    old = clones(params)
    scale = torch.tensor(0.125)
    reference.perturb_swap_(params, buffers, scale)
    perturbed = clones(params)
    reference.reflect_(params, buffers)
    expected = [
        (2 * w.double() - p.double()).to(dtype) for w, p in zip(old, perturbed, strict=True)
    ]
    assert_same_bits(params, expected)
    reference.restore_swap_(params, buffers, -1 / scale)
    assert_same_bits(params, old)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_scale_of_zero_perturbs_nothing_whatever_the_direction_holds(poison: float) -> None:
    params = [torch.randn(5)]
    old = clones(params)
    reference.perturb_swap_(params, [torch.full((5,), poison)], torch.tensor(0.0))
    assert_same_bits(params, old)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probe_inject_adds_v_and_projects_the_gradient(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 8, generator=generator).to(dtype).requires_grad_()
    offset = torch.randn(8, generator=generator)
    upstream = torch.randn(2, 5, 8, generator=generator).to(dtype)
    buffer = torch.ones(8)
    out = probe_inject(hidden, offset, buffer, sign=-1.0)
    assert torch.equal(out, (hidden.float() + offset).to(dtype))
    out.backward(upstream)
    assert hidden.grad is not None and torch.equal(hidden.grad, upstream)
    torch.testing.assert_close(buffer, 1 - upstream.float().sum((0, 1)), rtol=1e-6, atol=1e-5)


def test_probe_inject_without_offset_or_buffer_is_the_identity() -> None:
    hidden = torch.randn(2, 3, 4)
    assert probe_inject(hidden, None) is hidden
    offset = torch.randn(4)
    assert torch.equal(probe_inject(hidden, offset), hidden + offset)


def test_probe_inject_makes_frozen_hidden_states_differentiable() -> None:
    hidden, buffer = torch.randn(2, 3, 4), torch.zeros(4)
    out = probe_inject(hidden, None, buffer)
    assert out.requires_grad and not hidden.requires_grad
    (3 * out).sum().backward()
    assert torch.equal(buffer, torch.full((4,), 18.0))


def apply_rule(h: list[Tensor], rule: str, radii: list[float], norm: float = 2.0) -> Tensor:
    return reference.probe_rule_(
        h,
        rule,
        0.5,
        perturbation_norm=torch.tensor(norm),
        radii=[torch.tensor(radius) for radius in radii],
    )


def test_probe_rules_are_their_formulas() -> None:
    h = [torch.tensor([3.0, -4.0]), torch.tensor([0.5, 0.0])]
    gradient, normalized, adam = clones(h), clones(h), clones(h)
    assert apply_rule(gradient, "gradient", [1.0, 1.0])
    assert_same_bits(gradient, [torch.tensor([3.0, -4.0]), torch.tensor([0.5, 0.0])])
    assert apply_rule(normalized, "normalized", [10.0, 20.0])
    torch.testing.assert_close(normalized[0], torch.tensor([3.0, -4.0]))
    torch.testing.assert_close(normalized[1], torch.tensor([10.0, 0.0]))
    assert apply_rule(adam, "adam", [1.0, 1.0])
    torch.testing.assert_close(adam[0], torch.tensor([0.5, -0.5]))
    assert adam[1][1] == 0


@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e30])
def test_the_normalized_rule_keeps_its_size_for_any_size_of_h(size: float) -> None:
    h = [size * torch.tensor([3.0, 4.0])]
    assert apply_rule(h, "normalized", [10.0])
    torch.testing.assert_close(h[0], torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("rule", ["gradient", "normalized", "adam"])
def test_a_zero_h_gives_a_zero_probe(rule: str) -> None:
    h = [torch.zeros(3)]
    assert apply_rule(h, rule, [1.0])
    assert torch.equal(h[0], torch.zeros(3))


@pytest.mark.parametrize("rule", ["gradient", "normalized", "adam"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_one_h_that_is_not_finite_switches_every_probe_off(rule: str, poison: float) -> None:
    h = [torch.ones(3), torch.tensor([1.0, poison, 1.0])]
    assert not apply_rule(h, rule, [1.0, 1.0])
    assert_same_bits(h, [torch.zeros(3), torch.zeros(3)])
    assert not apply_rule([torch.ones(3)], rule, [poison])


def adamw(params: list[Tensor], grads: list[Tensor], **overrides: object) -> list[Tensor]:
    """One update from fresh state; returns the parameters."""
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    wide = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    steps = [torch.tensor(0.0) for _ in params]
    adamw_blend_(params, grads, wide, clones(wide), steps, **(settings | overrides))
    assert all(step == 1 for step in steps)
    return params


def test_adamw_gives_the_bits_of_torch() -> None:
    params, start = tensors(torch.float32, 1), tensors(torch.float32, 1)
    moments = [clones([torch.zeros_like(p) for p in params]) for _ in range(2)]
    steps = [torch.tensor(0.0) for _ in params]
    theirs = [torch.nn.Parameter(p) for p in start]
    optimizer = torch.optim.AdamW(theirs, lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    for step in range(5):
        grads = tensors(torch.float32, 100 + step)
        adamw_blend_(
            params,
            grads,
            *moments,
            steps,
            lr=3e-3,
            beta1=0.8,
            beta2=0.95,
            eps=1e-6,
            weight_decay=0.1,
        )
        for parameter, gradient in zip(theirs, grads, strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert_same_bits(params, [p.detach() for p in theirs])


def test_adamw_of_bf16_is_that_of_fp32_rounded_once() -> None:
    params, grads = tensors(torch.bfloat16, 1), tensors(torch.bfloat16, 2)
    wide = adamw([p.float() for p in params], [g.float() for g in grads])
    assert_same_bits(adamw(params, grads), [w.to(torch.bfloat16) for w in wide])


def test_blending_scaling_and_sign_of_the_gradient() -> None:
    start, grads, direction = (tensors(torch.float32, seed) for seed in (1, 2, 3))
    blended = [0.5 * (g + 0.25 * d) for g, d in zip(grads, direction, strict=True)]
    found = adamw(
        clones(start),
        grads,
        directions=direction,
        blend=torch.tensor(0.25),
        gradient_scale=torch.tensor(0.5),
    )
    assert_same_bits(found, adamw(clones(start), blended))
    # Ascent turns the task gradient, not the safety gradient.
    ascent = [d * 0.25 - g for g, d in zip(grads, direction, strict=True)]
    found = adamw(
        clones(start), grads, directions=direction, blend=torch.tensor(0.25), maximize=True
    )
    assert_same_bits(found, adamw(clones(start), ascent))


def test_a_blend_of_zero_ignores_a_direction_of_nan() -> None:
    start, grads = tensors(torch.float32, 1), tensors(torch.float32, 2)
    poison = [torch.full_like(g, float("nan")) for g in grads]
    found = adamw(clones(start), grads, directions=poison, blend=torch.tensor(0.0))
    assert_same_bits(found, adamw(clones(start), grads))


def test_gradients_are_read_only() -> None:
    grads = tensors(torch.float32, 2)
    before = clones(grads)
    adamw(tensors(torch.float32, 1), grads, gradient_scale=torch.tensor(0.5), maximize=True)
    assert_same_bits(grads, before)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend='cuda'.*auto, native, triton, reference"):
        ops.choose_backend("cuda", "cpu")
