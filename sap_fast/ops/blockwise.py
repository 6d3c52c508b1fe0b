"""Tensors in a byte per element: int8, with a scale for every 256 elements of a row.

A block of 256 elements x is stored as round(x/s) with s = max|x|/127. Where rounding errors spread
evenly over ±s/2, a block has a squared error of 256·s²/12, which is 0.13 % of max|x|²: the cosine
with the exact tensor is 0.9993 or more, however heavy the tails (`benchmarks/blockwise.py` measures
it). So there is no need of a code that is not linear. Blocks do not cross rows: a tensor that is
sharded by rows is stored as the same bytes on any number of ranks.

This is plain PyTorch on every backend. It runs once per tensor and step where a step costs a
forward and a backward, and `torch.mul` restores a block in one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sap_fast.distributed import is_dtensor, local_shards, shard_like
from sap_fast.ops.reference import accumulation_dtype

BLOCK = 256
_LARGEST = 127

#: Elements below which a tensor is not worth its launches: adapters of LoRA mostly.
SMALLEST = 2**18

#: Elements that are worked on at a time, so that temporaries stay small beside large tensors.
_TOGETHER = 2**24


class Quantized(NamedTuple):
    """A tensor (…, n), or a rank's shard of one, as codes and scales."""

    codes: Tensor
    """(…, n), int8"""
    scales: Tensor
    """(…, n/256 rounded up), fp32, or fp64 for fp64 tensors"""


def is_worth_it(tensor: Tensor) -> bool:
    """Return whether a tensor like this, the same on all ranks, is to be quantized.

    It has to be large, to have no gaps, to lie in rows on every rank, and to become smaller.
    """
    if tensor.dim() < 2 or tensor.numel() < SMALLEST or not tensor.is_contiguous():
        return False
    if is_dtensor(tensor) and any(p.is_shard() and not p.is_shard(0) for p in tensor.placements):
        return False
    scale = accumulation_dtype(tensor.dtype).itemsize
    return 1 + scale / min(tensor.shape[-1], BLOCK) < tensor.dtype.itemsize


@torch.no_grad()
def quantize(tensor: Tensor) -> Quantized:
    """Return a tensor as codes and scales; a block with a NaN or an infinity comes back as NaN."""
    (local,) = local_shards([tensor])
    local = local.contiguous()
    shape = (*tensor.shape[:-1], -(-tensor.shape[-1] // BLOCK))
    codes = torch.empty_like(local, dtype=torch.int8)
    scales = torch.empty(
        (*local.shape[:-1], shape[-1]),
        dtype=accumulation_dtype(tensor.dtype),
        device=local.device,
    )
    for given, code, scale in _blocks(local, codes, scales):
        wide = given.to(scale.dtype)
        torch.div(wide.abs().amax(-1), _LARGEST, out=scale)
        # Of a block of zeros 0/0 is to be 0. Where the scale is subnormal, and so rounded itself, a
        # quotient may be beyond 127.
        quotient = (wide / scale.unsqueeze(-1)).nan_to_num_(0.0)
        code.copy_(quotient.round_().clamp_(-_LARGEST, _LARGEST))
    return Quantized(shard_like(codes, tensor, tensor.shape), shard_like(scales, tensor, shape))


@torch.no_grad()
def dequantize(quantized: Quantized, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return the tensor that codes and scales stand for, rounded once to `dtype`.

    Args:
        quantized: codes and scales.
        dtype: of the result.
        out: where to write what lies on this rank, of the shape of the codes there.
    """
    codes, scales = local_shards(list(quantized))
    if out is None:
        out = torch.empty_like(codes, dtype=dtype)
    for code, result, scale in _blocks(codes, out, scales):
        torch.mul(code, scale.unsqueeze(-1), out=result)
    return shard_like(out, quantized.codes, quantized.codes.shape)


def _blocks(
    tensor: Tensor, other: Tensor, scales: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield views of two tensors as (rows, blocks, elements), some at a time, with their scales.

    The blocks that are full come by themselves, and so do those at the end of each row.
    """
    rows, others = (x.flatten(0, -2) for x in (tensor, other))
    row_scales = scales.flatten(0, -2)
    width = rows.shape[1]
    height = max(1, _TOGETHER // max(width, 1))
    step = max(1, _TOGETHER // BLOCK)
    full = width // BLOCK
    for top in range(0, len(rows), height):
        here = slice(top, top + height)
        for left in range(0, full, step):
            blocks = slice(left, min(left + step, full))
            columns = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
            a, b = (x[here, columns].unflatten(1, (-1, BLOCK)) for x in (rows, others))
            yield a, b, row_scales[here, blocks]
        if full * BLOCK < width:
            a, b = (x[here, full * BLOCK :].unsqueeze(1) for x in (rows, others))
            yield a, b, row_scales[here, full:]
