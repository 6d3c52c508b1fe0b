"""Triton kernels of the probe in the hidden states: add, project, and the probe rules.

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
from sap_fast.ops.reference import check_one_dimension, check_row
from sap_fast.ops.triton.table import (
    DTYPES,
    Operand,
    address_table,
    check_lists,
    check_overlaps,
    check_same,
    launch,
    load_address,
    load_block,
    load_chunk,
    load_operands,
    make_tables,
    narrow,
    on_device,
    scalar,
    transform,
    widen,
)

#: Elements of the hidden states per program.
BLOCK = 2048

#: Stage one of the column sum: tokens per partial sum; tokens and columns read at a time.
ROWS = 128
ROW_BLOCK = 16
COLUMN_BLOCK = 128

#: Elements of h per program: the probe of a layer is cut into a few.
RULE_BLOCK = 1024

#: The rules of `reference.probe_rule_`.
RULES = ("gradient", "normalized", "adam")


# ---- arithmetic ----


@triton.jit
def is_finite(a: tl.tensor) -> tl.tensor:
    """Neither NaN nor infinite."""
    return tl.abs(a) <= 3.402823466e38


@triton.jit
def normalized_rule(
    h: tl.tensor, largest: tl.tensor, norm: tl.tensor, radius: tl.tensor, probe_size: tl.tensor
) -> tl.tensor:
    """β·r·h/‖h‖ with largest = max|h| and norm = ‖h/largest‖; zero for h = 0."""
    unit = tl.math.div_rn(tl.math.div_rn(h, largest), norm)
    return probe_size * (tl.where(largest > 0.0, unit, 0.0) * radius)


@triton.jit
def gradient_rule(h: tl.tensor, perturbation_norm: tl.tensor, probe_size: tl.tensor) -> tl.tensor:
    """β·ρ‖W‖·h."""
    return probe_size * (h * perturbation_norm)


@triton.jit
def adam_rule(h: tl.tensor, perturbation_norm: tl.tensor, probe_size: tl.tensor) -> tl.tensor:
    """The first step of Adam on ρ‖W‖·h, of size β."""
    g = h * perturbation_norm
    return probe_size * tl.math.div_rn(g, tl.abs(g) + 1e-8)


@triton.jit
def probe_rule(stored: tl.tuple, coefficients: tl.tuple) -> tl.tuple:
    """Turn h into V by the rule, or zero if anything anywhere is not finite."""
    h = stored[0]
    finite, probe_size, perturbation_norm, largest, norm, radius = coefficients[1]
    if coefficients[0] == "normalized":
        probe = normalized_rule(h, largest, norm, radius, probe_size)
    elif coefficients[0] == "adam":
        probe = adam_rule(h, perturbation_norm, probe_size)
    else:
        probe = gradient_rule(h, perturbation_norm, probe_size)
    return (tl.where(finite, probe, 0.0),)


# ---- memory: add and project ----


@triton.jit
def add_kernel(
    hidden: tl.tensor,
    offset: tl.tensor,
    result: tl.tensor,
    count: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Hidden + offset on BLOCK elements; the offset of `width` serves every token."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    index = start + tl.arange(0, BLOCK)
    inside = index < count
    # One division of 64 bits per program, then 32 bits per element.
    column = ((start % width).to(tl.int32) + tl.arange(0, BLOCK)) % width
    added = tl.load(offset + column, mask=inside, other=0.0)
    values = widen(tl.load(hidden + index, mask=inside, other=0.0)) + added
    tl.store(result + index, narrow(values, result.dtype.element_ty), mask=inside)


@triton.jit
def column_sums_kernel(
    gradient: tl.tensor,
    partials: tl.tensor,
    rows: tl.tensor,
    width: tl.tensor,
    ROWS: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    COLUMN_BLOCK: tl.constexpr,
) -> None:
    """Stage one: the sums over ROWS tokens of COLUMN_BLOCK columns of a (rows, width) gradient."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    total = tl.zeros((ROW_BLOCK, COLUMN_BLOCK), tl.float32)
    for start in range(0, ROWS, ROW_BLOCK):
        row = part * ROWS + start + tl.arange(0, ROW_BLOCK)
        inside = (row < rows)[:, None] & (column < width)[None, :]
        pointers = gradient + row[:, None] * width + column[None, :]
        total += widen(tl.load(pointers, mask=inside, other=0.0))
    sums = tl.sum(total, axis=0)
    tl.store(partials + part * width + column, sums, mask=column < width)


@triton.jit(do_not_specialize=["parts"])
def project_kernel(
    partials: tl.tensor,
    buffer: tl.tensor,
    parts: tl.tensor,
    width: tl.tensor,
    sign: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Stage two: add up the (parts, width) partial sums in order, and add sign times them.

    With Kahan's compensation: thousands of parts lose no more than a few.
    """
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    excess = tl.zeros((BLOCK,), tl.float32)
    row = partials + column
    for _ in range(parts):
        value = tl.load(row, mask=inside, other=0.0) - excess
        larger = total + value
        excess = (larger - total) - value
        total = larger
        row += width
    values = tl.load(buffer + column, mask=inside, other=0.0)
    tl.store(buffer + column, values + tl.full((), sign, tl.float32) * total, mask=inside)


# ---- memory: the probe rules ----


@triton.jit
def _load_h(
    addresses: tl.tensor,
    tensor: tl.tensor,
    offset: tl.tensor,
    size: tl.tensor,
    aligned: tl.tensor,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    pointer = load_address(addresses, tensor, 0, 1, tl.float32) + offset
    if aligned & (size == BLOCK):
        h = load_block(pointer, size, BLOCK, True)
    else:
        h = load_block(pointer, size, BLOCK, False)
    return h


@triton.jit
def extent_kernel(
    addresses: tl.tensor,
    chunks: tl.tensor,
    largest: tl.tensor,
    finite: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Per chunk of h: max|h|, and whether all of it is finite."""
    index = tl.program_id(0)
    tensor, offset, size, aligned = load_chunk(chunks, index)
    h = _load_h(addresses, tensor, offset, size, aligned, BLOCK)
    inside = is_finite(h)
    tl.store(largest + index, tl.max(tl.where(inside, tl.abs(h), 0.0)))
    tl.store(finite + index, tl.min(inside.to(tl.int32)))


@triton.jit
def layer_extent_kernel(
    starts: tl.tensor,
    radii: tl.tensor,
    largest: tl.tensor,
    finite: tl.tensor,
    layer_largest: tl.tensor,
    layer_finite: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Per layer: max|h|, and whether h and the radius are finite."""
    layer = tl.program_id(0)
    begin = tl.load(starts + layer)
    end = tl.load(starts + layer + 1)
    maxima = tl.zeros((BLOCK,), tl.float32)
    flags = tl.full((BLOCK,), 1, tl.int32)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        maxima = tl.maximum(maxima, tl.load(largest + index, mask=index < end, other=0.0))
        flags &= tl.load(finite + index, mask=index < end, other=1)
    radius = load_radius(radii, layer)
    tl.store(layer_largest + layer, tl.max(maxima))
    tl.store(layer_finite + layer, tl.min(flags) & is_finite(radius).to(tl.int32))


@triton.jit
def load_radius(radii: tl.tensor, layer: tl.tensor) -> tl.tensor:
    """Return a layer's radius from the table of their addresses."""
    return tl.load(load_address(radii, layer, 0, 1, tl.float32))


@triton.jit(do_not_specialize=["layers"])
def all_finite_kernel(
    layer_finite: tl.tensor, result: tl.tensor, layers: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Whether every layer is finite, by one program."""
    flags = tl.full((BLOCK,), 1, tl.int32)
    for start in range(0, layers, BLOCK):
        index = start + tl.arange(0, BLOCK)
        flags &= tl.load(layer_finite + index, mask=index < layers, other=1)
    tl.store(result, tl.min(flags).to(tl.uint8))


@triton.jit
def unit_squares_kernel(
    addresses: tl.tensor,
    chunks: tl.tensor,
    layer_largest: tl.tensor,
    partials: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Per chunk: the sum of (h/max|h|)²."""
    index = tl.program_id(0)
    tensor, offset, size, aligned = load_chunk(chunks, index)
    h = _load_h(addresses, tensor, offset, size, aligned, BLOCK)
    unit = tl.math.div_rn(h, tl.load(layer_largest + tensor))
    tl.store(partials + index, tl.sum(unit * unit))


@triton.jit
def layer_norm_kernel(
    starts: tl.tensor, partials: tl.tensor, norms: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Per layer: the root of its partial sums, added up in order."""
    layer = tl.program_id(0)
    begin = tl.load(starts + layer)
    end = tl.load(starts + layer + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(begin, end, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partials + index, mask=index < end, other=0.0)
    tl.store(norms + layer, tl.math.sqrt_rn(tl.sum(total)))


@triton.jit(do_not_specialize_on_alignment=["perturbation_norm"])
def rule_kernel(
    addresses: tl.tensor,
    chunks: tl.tensor,
    radii: tl.tensor,
    perturbation_norm: tl.tensor,
    layer_largest: tl.tensor,
    norms: tl.tensor,
    finite: tl.tensor,
    probe_size: tl.tensor,
    DTYPES: tl.constexpr,
    RULE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Per chunk: h becomes V, or zero if anything anywhere is not finite."""
    layer, offset, size, aligned = load_chunk(chunks, tl.program_id(0))
    buffers = load_operands(addresses, layer, offset, DTYPES)
    coefficients = (
        tl.load(finite) != 0,
        tl.full((), probe_size, tl.float32),
        tl.load(perturbation_norm),
        tl.load(layer_largest + layer),
        tl.load(norms + layer),
        load_radius(radii, layer),
    )
    transform(probe_rule, buffers, (RULE, coefficients), size, aligned, BLOCK)


# ---- operations ----


def probe_add(hidden: Tensor, offset: Tensor) -> Tensor:
    """See `reference.probe_add`; hidden states with gaps are copied first."""
    check_row("offset", offset, "hidden", hidden)
    _check_hidden("hidden", hidden)
    check_same("offset", offset, torch.float32, hidden.device)
    dense = hidden.contiguous()
    result = torch.empty_like(dense)
    count = hidden.numel()
    with on_device(hidden.device):
        launch(
            add_kernel,
            (triton.cdiv(count, BLOCK),),
            dense,
            offset.contiguous(),
            result,
            count,
            len(offset),
            written=(),
            BLOCK=BLOCK,
        )
    # The result has the layout of `hidden`, as that of any addition.
    return result if hidden.is_contiguous() else torch.empty_like(hidden).copy_(result)


def probe_project_(buffer: Tensor, gradient: Tensor, sign: float) -> None:
    """See `reference.probe_project_`; gradients that are not contiguous are copied first."""
    check_row("buffer", buffer, "gradient", gradient)
    _check_hidden("gradient", gradient)
    check_same("buffer", buffer, torch.float32, gradient.device)
    if not buffer.is_contiguous():
        raise NotImplementedError(f"buffer has strides {buffer.stride()}; it must be contiguous")
    gradient = gradient.contiguous()
    check_overlaps(
        [
            Operand("buffer", [buffer], written=True),
            Operand("gradient", [gradient], written=False),
        ]
    )
    with on_device(buffer.device):
        width = len(buffer)
        rows = gradient.numel() // max(width, 1)
        parts = triton.cdiv(rows, ROWS)
        partials = torch.empty((parts, width), dtype=torch.float32, device=buffer.device)
        columns = triton.cdiv(width, COLUMN_BLOCK)
        launch(
            column_sums_kernel,
            (parts, columns),
            gradient,
            partials,
            rows,
            width,
            written=(),
            ROWS=ROWS,
            ROW_BLOCK=ROW_BLOCK,
            COLUMN_BLOCK=COLUMN_BLOCK,
        )
        with interrupts_deferred():
            launch(
                project_kernel,
                (columns,),
                partials,
                buffer,
                parts,
                width,
                sign,
                written=[buffer],
                BLOCK=COLUMN_BLOCK,
            )


def _check_hidden(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise NotImplementedError(
            f"{name} has dtype {tensor.dtype}; the Triton kernels take "
            f"{', '.join(str(known) for known in DTYPES)}"
        )


def probe_rule_(
    buffers: Sequence[Tensor],
    rule: str,
    probe_size: float,
    perturbation_norm: Tensor,
    radii: Sequence[Tensor],
) -> Tensor:
    """See `reference.probe_rule_`; four launches, for `"normalized"` six."""
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is not known; choose one of {', '.join(RULES)}")
    if len(radii) != len(buffers):
        raise ValueError(f"buffers has {len(buffers)} tensors, radii has {len(radii)}")
    check_one_dimension("buffers", buffers)
    operands = [Operand("buffers", buffers, written=True, dtype=torch.float32)]
    check_lists(operands)
    check_overlaps(operands)
    device = buffers[0].device
    layers = len(buffers)
    with on_device(device):
        (table,) = make_tables(operands, RULE_BLOCK)
        chunks, starts, count = table.plan
        # Kept until the launches are queued: the table has no more than their addresses.
        radius_tensors = [scalar("radii", radius, device) for radius in radii]
        radius_table = address_table([radius.data_ptr() for radius in radius_tensors], device)
        norm = scalar("perturbation_norm", perturbation_norm, device)
        largest, layer_largest = norm.new_empty(count), norm.new_empty(layers)
        partials, norms = norm.new_empty(count), norm.new_empty(layers)
        finite = norm.new_empty(count, dtype=torch.int32)
        layer_finite = norm.new_empty(layers, dtype=torch.int32)
        result = torch.empty((), dtype=torch.bool, device=device)
        launch(
            extent_kernel,
            (count,),
            table.addresses,
            chunks,
            largest,
            finite,
            written=(),
            BLOCK=RULE_BLOCK,
        )
        launch(
            layer_extent_kernel,
            (layers,),
            starts,
            radius_table,
            largest,
            finite,
            layer_largest,
            layer_finite,
            written=(),
            BLOCK=RULE_BLOCK,
        )
        launch(
            all_finite_kernel,
            (1,),
            layer_finite,
            result.view(torch.uint8),
            layers,
            written=(),
            BLOCK=RULE_BLOCK,
        )
        if rule == "normalized":
            launch(
                unit_squares_kernel,
                (count,),
                table.addresses,
                chunks,
                layer_largest,
                partials,
                written=(),
                BLOCK=RULE_BLOCK,
            )
            launch(
                layer_norm_kernel,
                (layers,),
                starts,
                partials,
                norms,
                written=(),
                BLOCK=RULE_BLOCK,
            )
        with interrupts_deferred():
            launch(
                rule_kernel,
                (count,),
                table.addresses,
                chunks,
                radius_table,
                norm,
                layer_largest,
                norms,
                result.view(torch.uint8),
                probe_size,
                written=table.written,
                DTYPES=table.dtypes,
                RULE=rule,
                BLOCK=RULE_BLOCK,
            )
    return result
