"""Triton kernels of the parameter operations: reductions, perturb, reflect, restore.

Arithmetic comes first, named as in csrc/math.h; memory movement after it. What each operation has
to compute is in `sap_fast.ops.reference`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sap_fast.ops.interrupts import interrupts_deferred
from sap_fast.ops.triton.table import (
    CHUNK,
    Operand,
    check_lists,
    check_overlaps,
    in_blocks,
    launch,
    load_block,
    load_chunk,
    load_operands,
    load_values,
    make_tables,
    on_device,
    scalar,
    transform,
    widen,
)

#: Elements per block: per thread and operand 8 accesses of 128 bits in fp32, 4 in 16 bits.
BLOCK = 4096

#: Elements per partial sum, and how many of them are read at a time.
SUM_CHUNK = 32768
SUM_BLOCK = 2048

#: Partial sums that stage two reads at a time.
FOLD_BLOCK = 1024


# ---- arithmetic ----


@triton.jit
def perturb(parameter: tl.tensor, gradient: tl.tensor, scale: tl.tensor) -> tl.tensor:
    """W + scale·d. At scale zero W as it is, whatever d holds."""
    return tl.where(scale == 0.0, parameter, parameter + scale * gradient)


@triton.jit
def reflect(perturbed: tl.tensor, parameter: tl.tensor) -> tl.tensor:
    """W + ΔW becomes W − ΔW."""
    return 2.0 * parameter - perturbed


@triton.jit
def recover_gradient(
    perturbed: tl.tensor, parameter: tl.tensor, inverse_scale: tl.tensor
) -> tl.tensor:
    """The safety gradient d, to rounding, from W + ΔW and W."""
    return (perturbed - parameter) * inverse_scale


@triton.jit
def perturb_swap(stored: tl.tuple, scale: tl.tensor) -> tl.tuple:
    """p, b become p + scale·b, p."""
    parameter, gradient = stored
    return perturb(widen(parameter), widen(gradient), scale), parameter


@triton.jit
def reflect_params(stored: tl.tuple, _: tl.tuple) -> tl.tuple:
    """p, b become 2·b − p, b."""
    perturbed, parameter = stored
    return (reflect(widen(perturbed), widen(parameter)),)


@triton.jit
def restore_swap(stored: tl.tuple, inverse_scale: tl.tensor) -> tl.tuple:
    """p, b become b, (p − b)·inverse_scale."""
    perturbed, parameter = stored
    return parameter, recover_gradient(widen(perturbed), widen(parameter), inverse_scale)


# ---- memory ----


@triton.jit(do_not_specialize_on_alignment=["scale"])
def perturb_swap_kernel(
    addresses: tl.tensor,
    chunks: tl.tensor,
    scale: tl.tensor,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Set p, b ← p + scale·b, p on one chunk."""
    tensor, offset, size, aligned = load_chunk(chunks, tl.program_id(0))
    operands = load_operands(addresses, tensor, offset, DTYPES)
    transform(perturb_swap, operands, tl.load(scale), size, aligned, BLOCK)


@triton.jit
def reflect_kernel(
    addresses: tl.tensor, chunks: tl.tensor, DTYPES: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """Set p ← 2·b − p on one chunk."""
    tensor, offset, size, aligned = load_chunk(chunks, tl.program_id(0))
    operands = load_operands(addresses, tensor, offset, DTYPES)
    transform(reflect_params, operands, (), size, aligned, BLOCK)


@triton.jit(do_not_specialize_on_alignment=["inverse_scale"])
def restore_swap_kernel(
    addresses: tl.tensor,
    chunks: tl.tensor,
    inverse_scale: tl.tensor,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Set p, b ← b, (p − b)·inverse_scale on one chunk."""
    tensor, offset, size, aligned = load_chunk(chunks, tl.program_id(0))
    operands = load_operands(addresses, tensor, offset, DTYPES)
    transform(restore_swap, operands, tl.load(inverse_scale), size, aligned, BLOCK)


@triton.jit
def _sum_products(
    total: tl.tensor,
    operands: tl.tuple,
    begin: tl.tensor,
    end: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    for start in range(begin, end, BLOCK):
        values = load_values(operands, start, size, BLOCK, WHOLE)
        total += widen(values[0]) * widen(values[len(operands) - 1])
    return total


@triton.jit(do_not_specialize_on_alignment=["partials"])
def sum_products_kernel(
    addresses: tl.tensor,
    chunks: tl.tensor,
    partials: tl.tensor,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Stage one of `dot`, or with one operand of `sum_squares`: one partial sum per chunk."""
    index = tl.program_id(0)
    tensor, offset, size, aligned = load_chunk(chunks, index)
    operands = load_operands(addresses, tensor, offset, DTYPES)
    unmasked = in_blocks(size, aligned, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    total = _sum_products(total, operands, 0, unmasked, size, BLOCK, True)
    total = _sum_products(total, operands, unmasked, size, size, BLOCK, False)
    tl.store(partials + index, tl.sum(total))


@triton.jit(do_not_specialize=["count"])
def fold_kernel(
    partials: tl.tensor, result: tl.tensor, count: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Stage two: one program adds up the partial sums, in order."""
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        total += load_block(partials + start, count - start, BLOCK, False)
    tl.store(result, tl.sum(total))


# ---- operations ----


def sum_squares(tensors: Sequence[Tensor]) -> Tensor:
    """See `reference.sum_squares`; the order depends on sizes, dtypes and alignment alone."""
    return _reduce([Operand("tensors", tensors, written=False)])


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """See `reference.dot`; the order depends on sizes, dtypes and alignment alone."""
    return _reduce([Operand("left", left, written=False), Operand("right", right, written=False)])


def _reduce(operands: Sequence[Operand]) -> Tensor:
    check_lists(operands)
    tables = make_tables(operands, SUM_CHUNK)
    device = tables[0].addresses.device
    count = sum(table.plan.chunk_count for table in tables)
    result = torch.empty((), dtype=torch.float32, device=device)
    partials = torch.empty(count, dtype=torch.float32, device=device)
    done = 0
    with on_device(device):
        for table in tables:
            launch(
                sum_products_kernel,
                (table.plan.chunk_count,),
                table.addresses,
                table.plan.chunks,
                partials[done:],
                written=(),
                DTYPES=table.dtypes,
                BLOCK=SUM_BLOCK,
            )
            done += table.plan.chunk_count
        launch(fold_kernel, (1,), partials, result, count, written=(), BLOCK=FOLD_BLOCK)
    return result


def perturb_swap_(params: Sequence[Tensor], buffers: Sequence[Tensor], scale: Tensor) -> None:
    """See `reference.perturb_swap_`."""
    _elementwise(perturb_swap_kernel, params, buffers, scale=scale)


def reflect_(params: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
    """See `reference.reflect_`."""
    _elementwise(reflect_kernel, params, buffers, buffers_written=False)


def restore_swap_(
    params: Sequence[Tensor], buffers: Sequence[Tensor], inverse_scale: Tensor
) -> None:
    """See `reference.restore_swap_`."""
    _elementwise(restore_swap_kernel, params, buffers, inverse_scale=inverse_scale)


def _elementwise(
    kernel: triton.JITFunction,
    params: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    buffers_written: bool = True,
    **factors: Tensor,
) -> None:
    operands = [
        Operand("params", params, written=True),
        Operand("buffers", buffers, written=buffers_written),
    ]
    check_lists(operands)
    check_overlaps(operands)
    device = params[0].device
    with on_device(device):
        scalars = [scalar(name, factor, device) for name, factor in factors.items()]
        tables = make_tables(operands, CHUNK)
        with interrupts_deferred():
            for table in tables:
                launch(
                    kernel,
                    (table.plan.chunk_count,),
                    table.addresses,
                    table.plan.chunks,
                    *scalars,
                    written=table.written,
                    DTYPES=table.dtypes,
                    BLOCK=BLOCK,
                )
