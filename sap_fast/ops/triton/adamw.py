"""Triton kernels of the parameter update: gradient blending, unscaling, clipping and AdamW.

Arithmetic comes first, named as in csrc/math.h; memory movement after it. What the operation has to
compute is in `sap_fast.ops.reference`.

The coefficients that depend on the step, lr/(1 − β₁ᵗ) and √(1 − β₂ᵗ), are found in fp64 by a few
PyTorch operations on all step counters at once, as the reference finds them one by one, and rounded
to fp32 once: 1 − β₂ᵗ would lose 10 of 24 bits in fp32 at t = 1 and β₂ = 0.999, and the kernels
themselves stay free of fp64, of which many GPUs have little.
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
    address_table,
    check_lists,
    check_overlaps,
    check_same,
    launch,
    load_chunk,
    load_operands,
    make_tables,
    on_device,
    scalar,
    transform,
    widen,
)

#: Elements per block: up to five operands of 8 elements per thread are in registers at once.
BLOCK = 1024

#: Step counters per program.
STEP_BLOCK = 128


# ---- arithmetic ----


@triton.jit
def blend_gradient(gradient: tl.tensor, direction: tl.tensor, blend: tl.tensor) -> tl.tensor:
    """Return g + c·d. At c = 0 g as it is, whatever d holds."""
    return tl.where(blend == 0.0, gradient, gradient + blend * direction)


@triton.jit
def adamw(
    parameter: tl.tensor,
    gradient: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    decay: tl.tensor,
    gradient_weight: tl.tensor,
    beta2: tl.tensor,
    square_weight: tl.tensor,
    negative_step: tl.tensor,
    root_correction: tl.tensor,
    eps: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One step of AdamW with the roundings of torch.optim.AdamW(fused=True) on the CPU."""
    exp_avg = tl.fma(gradient - exp_avg, gradient_weight, exp_avg)
    exp_avg_sq = tl.fma(square_weight * gradient, gradient, exp_avg_sq * beta2)
    denominator = tl.math.div_rn(tl.math.sqrt_rn(exp_avg_sq), root_correction) + eps
    update = tl.math.div_rn(negative_step * exp_avg, denominator)
    return parameter * decay + update, exp_avg, exp_avg_sq


@triton.jit
def adamw_blend(stored: tl.tuple, coefficients: tl.tuple) -> tl.tuple:
    """p, m, v, g and, where there is a blend, d become the p, m and v of the next step."""
    of_gradient, of_step = coefficients
    sign, blend, gradient_scale = of_gradient
    gradient = widen(stored[3]) * sign
    if blend is not None:
        gradient = blend_gradient(gradient, widen(stored[4]), blend)
    if gradient_scale is not None:
        gradient = gradient * gradient_scale
    return adamw(widen(stored[0]), gradient, stored[1], stored[2], *of_step)


# ---- memory ----


@triton.jit(do_not_specialize=["tensors"])
def count_steps_kernel(
    addresses: tl.tensor, counts: tl.tensor, tensors: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Count the step counters up where they lie, and gather them."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < tensors
    steps = tl.load(addresses + index, mask=inside, other=0).to(tl.pointer_type(tl.float32))
    count = tl.load(steps, mask=inside, other=0.0) + 1.0
    tl.store(steps, count, mask=inside)
    tl.store(counts + index, count, mask=inside)


@triton.jit(do_not_specialize_on_alignment=["blend", "gradient_scale"])
def adamw_blend_kernel(
    addresses: tl.tensor,
    chunks: tl.tensor,
    coefficients: tl.tensor,
    blend: tl.tensor | None,
    gradient_scale: tl.tensor | None,
    sign: tl.tensor,
    gradient_weight: tl.tensor,
    beta2: tl.tensor,
    square_weight: tl.tensor,
    eps: tl.tensor,
    DTYPES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The update of one chunk; without `blend` the table has no directions."""
    tensor, offset, size, aligned = load_chunk(chunks, tl.program_id(0))
    of_gradient = (
        tl.full((), sign, tl.float32),
        None if blend is None else tl.load(blend),
        None if gradient_scale is None else tl.load(gradient_scale),
    )
    of_step = (
        tl.load(coefficients + 3 * tensor),
        tl.full((), gradient_weight, tl.float32),
        tl.full((), beta2, tl.float32),
        tl.full((), square_weight, tl.float32),
        tl.load(coefficients + 3 * tensor + 1),
        tl.load(coefficients + 3 * tensor + 2),
        tl.full((), eps, tl.float32),
    )
    operands = load_operands(addresses, tensor, offset, DTYPES)
    transform(adamw_blend, operands, (of_gradient, of_step), size, aligned, BLOCK)


# ---- operation ----


def adamw_blend_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    directions: Sequence[Tensor | None],
    *,
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    blend: Tensor | None,
    gradient_scale: Tensor | None,
) -> None:
    """See `reference.adamw_blend_`; nothing here waits for the device."""
    operands = [
        Operand("params", params, written=True),
        Operand("exp_avgs", exp_avgs, written=True, dtype=torch.float32),
        Operand("exp_avg_sqs", exp_avg_sqs, written=True, dtype=torch.float32),
        Operand("grads", grads, written=False),
    ]
    if blend is not None and directions:
        operands.append(Operand("directions", directions, written=False))
    check_lists(operands)
    device = params[0].device
    _check_steps(steps, len(params), device)
    check_overlaps([*operands, Operand("steps", steps, written=True)])
    with on_device(device):
        gradient_factor = (
            None if gradient_scale is None else scalar("gradient_scale", gradient_scale, device)
        )
        weight = None if blend is None else scalar("blend", blend, device)
        rate = scalar("lr", lr, device, torch.float64)
        with interrupts_deferred():
            for table in make_tables(operands, CHUNK):
                members = [steps[index] for index in table.members]
                step_table = address_table([step.data_ptr() for step in members], device)
                counts = torch.empty(len(members), dtype=torch.float32, device=device)
                launch(
                    count_steps_kernel,
                    (triton.cdiv(len(members), STEP_BLOCK),),
                    step_table,
                    counts,
                    len(members),
                    written=members,
                    BLOCK=STEP_BLOCK,
                )
                has_directions = len(table.dtypes) == 5
                launch(
                    adamw_blend_kernel,
                    (table.plan.chunk_count,),
                    table.addresses,
                    table.plan.chunks,
                    _coefficients(counts, rate, beta1, beta2, weight_decay),
                    weight if has_directions else None,
                    gradient_factor,
                    -1.0 if maximize else 1.0,
                    1 - beta1,
                    beta2,
                    1 - beta2,
                    eps,
                    written=table.written,
                    DTYPES=table.dtypes,
                    BLOCK=BLOCK,
                )


def _check_steps(steps: Sequence[Tensor], count: int, device: torch.device) -> None:
    if len(steps) != count:
        raise ValueError(f"params has {count} tensors, steps has {len(steps)}")
    for index, step in enumerate(steps):
        if step.numel() != 1:
            raise ValueError(f"steps[{index}] has shape {tuple(step.shape)}; one element is needed")
        check_same(f"steps[{index}]", step, torch.float32, device)


def _coefficients(
    counts: Tensor, rate: Tensor, beta1: float, beta2: float, weight_decay: float
) -> Tensor:
    """Return 1 − lr·weight_decay, −lr/(1 − β₁ᵗ) and √(1 − β₂ᵗ) per tensor, (tensors, 3)."""
    step = counts.double()
    negative_step = -rate / (1 - beta1**step)
    root_correction = (1 - beta2**step).sqrt()
    decay = (1 - rate * weight_decay).expand_as(step)
    return torch.stack([decay, negative_step, root_correction], dim=1).float()
