"""Tensors as int8 and scales: how close they are, what they take, what they do at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sap_fast.ops import blockwise
from sap_fast.ops.blockwise import BLOCK, dequantize, is_worth_it, quantize

SHAPE = (48, 600)  # rows of two blocks and a shorter one


def normal(shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def heavy_tailed() -> Tensor:
    """Student's t of one degree of freedom: a few elements of a block are all there is."""
    uniform = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))
    return torch.tan(math.pi * (uniform - 0.5))


def sparse() -> Tensor:
    """Rows of an embedding: most of them zero, the others of very different sizes."""
    rows = torch.arange(SHAPE[0]).unsqueeze(-1)
    return normal() * (rows % 5 == 0) * 10.0 ** (-rows / 4)


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return ((a * b).sum() / (a.norm() * b.norm())).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", [normal, heavy_tailed, sparse])
def test_every_element_comes_back_to_half_a_step_and_the_cosine_is_over_0_999(
    make: object, dtype: torch.dtype
) -> None:
    assert callable(make)
    exact = make().to(dtype)
    stored = quantize(exact)
    found = dequantize(stored, dtype)
    assert found.dtype == dtype and found.shape == exact.shape
    assert stored.codes.dtype == torch.int8 and stored.scales.shape == (SHAPE[0], 3)
    for block in range(3):
        columns = slice(block * BLOCK, (block + 1) * BLOCK)
        largest = exact[:, columns].abs().amax(-1, keepdim=True).double()
        torch.testing.assert_close(
            stored.scales[:, block : block + 1].double(), largest / 127, rtol=1e-6, atol=0.0
        )
        rounding = torch.finfo(dtype).eps * largest
        error = (found - exact)[:, columns].double().abs()
        assert (error <= largest / 254 * 1.0001 + rounding).all()
    assert cosine(found, exact) >= 0.999


def test_it_takes_little_more_than_a_byte_of_an_element() -> None:
    stored = quantize(normal((64, 4096)))
    taken = sum(part.numel() * part.element_size() for part in stored)
    assert taken == 64 * 4096 * (1 + 4 / BLOCK)


def test_rows_are_stored_by_themselves_and_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = normal((8, 6, 600))
    whole = quantize(exact)
    halves = [quantize(half) for half in exact.chunk(2)]
    monkeypatch.setattr(blockwise, "_TOGETHER", BLOCK)
    for part, (first, second), again in zip(
        whole, zip(*halves, strict=True), quantize(exact), strict=True
    ):
        assert torch.equal(part, torch.cat([first, second]))  # as on two ranks
        assert torch.equal(part, again)
    out = torch.full_like(exact, torch.nan)
    assert dequantize(whole, exact.dtype, out=out) is out
    monkeypatch.undo()
    assert torch.equal(out, dequantize(whole, exact.dtype))
    assert not torch.equal(out, exact)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_block_that_is_not_finite_comes_back_as_nan_and_the_others_as_they_are(
    value: float,
) -> None:
    exact = normal()
    exact[3, 300] = value
    found = dequantize(quantize(exact), exact.dtype)
    bad = torch.zeros(SHAPE, dtype=torch.bool)
    bad[3, BLOCK : 2 * BLOCK] = True
    assert torch.equal(found.isnan(), bad)


@pytest.mark.parametrize("largest", [0.0, 1e-44, 1e-40, 3e38])
def test_blocks_of_nothing_and_at_the_ends_of_the_range_are_finite(largest: float) -> None:
    exact = torch.linspace(-1, 1, 512).mul(largest).reshape(2, 256)
    found = dequantize(quantize(exact), exact.dtype)
    assert found.isfinite().all()
    torch.testing.assert_close(found, exact, rtol=0.0, atol=largest / 250 + 2e-43)


def test_a_tensor_is_quantized_if_it_is_large_and_becomes_smaller() -> None:
    assert is_worth_it(torch.zeros(512, 512)) and is_worth_it(torch.zeros(8, 256, 128))
    assert is_worth_it(torch.zeros(512, 512, dtype=torch.bfloat16))
    assert not is_worth_it(torch.zeros(511, 512))
    assert not is_worth_it(torch.zeros(2**18))
    assert not is_worth_it(torch.zeros(512, 512).T[:, :-1])
    assert not is_worth_it(torch.zeros(2**18, 4, dtype=torch.bfloat16))  # two bytes either way


def test_values_whose_scale_is_subnormal_keep_their_sign() -> None:
    smallest = torch.finfo(torch.float32).tiny * torch.finfo(torch.float32).eps
    given = torch.linspace(-180, 180, 2 * BLOCK).view(2, BLOCK) * smallest
    kept = dequantize(quantize(given), torch.float32)
    assert (kept * given.sign() >= 0).all() and (kept != 0).any()
