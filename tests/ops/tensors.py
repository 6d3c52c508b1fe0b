"""Lists of tensors for operations, and whether two have the same bits."""

from __future__ import annotations

import os

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Nothing, one element, around the widths of registers (4, 8, 16), of unrolled sums (64) and of what
# Triton masks (512), and around chunks (1024, 4096, 16384), alone and several.
SIZES = [0, 1, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 257, 511, 512, 513, 1023, 1025, 4096, 8193]
if not INTERPRETED:
    # Native chunks; the interpreter takes its time.
    SIZES += [16383, 16384, 16385, 40_000]


def random_tensor(size: int | tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(size)).to(dtype)


def mixed(dtype: torch.dtype | None, scale: float = 1.0) -> list[Tensor]:
    """One tensor of every size, an unaligned one, a transposed one; of `dtype`, or of all."""
    tensors = []
    for index, size in enumerate(SIZES):
        tensors.append(random_tensor(size, dtype or DTYPES[index % 3], scale))
    kind = dtype or torch.bfloat16
    tensors.append(random_tensor(1001, kind, scale)[1:])
    tensors.append(random_tensor((33, 7), kind, scale).t())
    tensors.append(random_tensor((3, 5, 7), dtype or torch.float32, scale).permute(2, 0, 1))
    return tensors


def like(
    tensors: list[Tensor], scale: float = 1.0, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Random tensors of the same shapes and strides."""
    made = []
    for tensor in tensors:
        fresh = torch.empty_like(tensor, dtype=dtype)
        made.append(fresh.copy_(scale * torch.randn(tensor.shape)))
    return made


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, index
        same = (a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())
        assert same.all(), (index, tuple(a.shape), a[~same][:4], b[~same][:4])
