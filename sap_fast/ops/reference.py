"""The specification of every operation, in plain PyTorch.

Symbols are those of the paper (arXiv:2505.16737): parameters W, gradient g, safety gradient d,
direction ĝ = d/‖d‖, perturbation ΔW = ρ‖W‖ĝ, hidden states x, probe gradient h, probe V of size β.
Arithmetic runs in `accumulation_dtype` of the stored dtype (fp32, or fp64 for fp64 tensors) and
results are rounded once, when they are stored. Norms, scales and coefficients are 0-d tensors, so
that nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values of `dtype` are added up: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(accumulation_dtype(tensor.dtype))


def check_row(name: str, vector: Tensor, matrix_name: str, matrix: Tensor) -> None:
    """Raise ValueError unless `vector` is (H,) and `matrix` (…, H)."""
    if vector.dim() != 1 or vector.shape != matrix.shape[-1:]:
        raise ValueError(
            f"{name} has shape {tuple(vector.shape)}, {matrix_name} has {tuple(matrix.shape)}; "
            f"one dimension is needed, as long as the last one of {matrix_name}"
        )


def check_one_dimension(name: str, tensors: Sequence[Tensor]) -> None:
    """Raise ValueError unless every tensor of a list has one dimension."""
    for index, tensor in enumerate(tensors):
        if tensor.dim() != 1:
            raise ValueError(
                f"{name}[{index}] has shape {tuple(tensor.shape)}; one dimension is needed"
            )


def sum_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of squares of all elements of all tensors, as a 0-d tensor.

    Two stages in fixed order: one sum per tensor, then the sum of those sums, on the first tensor's
    device. In fp32, squares below 2⁻¹⁴⁹ vanish: a list whose norm is under about 1e-19 sums to less
    than it should, and in the end to zero.
    """
    return dot(tensors, tensors)


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the inner product of two lists of tensors of equal shapes, as a 0-d tensor."""
    partial_sums = [
        (_wide(a) * _wide(b)).sum().to(left[0].device) for a, b in zip(left, right, strict=True)
    ]
    return torch.stack(partial_sums).sum()


def perturb_swap_(params: Sequence[Tensor], buffers: Sequence[Tensor], scale: Tensor) -> None:
    """Set p, b ← p + scale·b, p for each parameter p and its buffer b, of equal shape and dtype.

    With b = d and scale = ρ‖W‖/‖d‖, W becomes W + ΔW, and the buffer that held the safety gradient
    holds W: the saved copy costs no memory. Where `scale` is zero p stays as it is, whatever b
    holds, so that a safety gradient of NaN perturbs nothing.

    A parameter is written only after its buffer holds W. `Perturbation`, which puts W back after an
    interrupt, relies on it.
    """
    for parameter, buffer in zip(params, buffers, strict=True):
        step = scale.to(parameter.device)
        wide = _wide(parameter)
        perturbed = torch.where(step == 0, wide, wide + step * _wide(buffer))
        buffer.copy_(parameter)
        parameter.copy_(perturbed)


def reflect_(params: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
    """Set p ← 2·b − p: W + ΔW becomes W − ΔW, with W in the buffers."""
    for parameter, buffer in zip(params, buffers, strict=True):
        parameter.copy_(2 * _wide(buffer) - _wide(parameter))


def restore_swap_(
    params: Sequence[Tensor], buffers: Sequence[Tensor], inverse_scale: Tensor
) -> None:
    """Set p, b ← b, (p − b)·inverse_scale: W comes back bit for bit.

    The safety gradient comes back to rounding only: in fp32 with a relative error of about
    1e-7·|W|/|ΔW| per element, in bf16 with little left of it. Whoever needs it again keeps a copy.
    """
    for parameter, buffer in zip(params, buffers, strict=True):
        recovered = (_wide(parameter) - _wide(buffer)) * inverse_scale.to(parameter.device)
        parameter.copy_(buffer)
        buffer.copy_(recovered)


def probe_add(hidden: Tensor, offset: Tensor) -> Tensor:
    """Return hidden + offset, rounded to the dtype of `hidden`.

    Args:
        hidden: hidden states, (…, H).
        offset: the probe V in fp32, (H,).

    Raises:
        ValueError: if `offset` is not of that shape.
    """
    check_row("offset", offset, "hidden", hidden)
    return (hidden + offset).to(hidden.dtype)


def probe_project_(buffer: Tensor, gradient: Tensor, sign: float) -> None:
    """Add sign·Σ_tokens gradient to `buffer`.

    Args:
        buffer: fp32, (H,).
        gradient: ∂L/∂x of the hidden states x, (…, H).
        sign: +1 or −1, the sign of this pass in the finite difference.

    Raises:
        ValueError: if `buffer` is not of that shape.
    """
    check_row("buffer", buffer, "gradient", gradient)
    rows = torch.atleast_2d(gradient)
    buffer.add_(rows.sum(tuple(range(rows.dim() - 1)), dtype=buffer.dtype), alpha=sign)


def probe_rule_(
    buffers: Sequence[Tensor],
    rule: str,
    probe_size: float,
    perturbation_norm: Tensor,
    radii: Sequence[Tensor],
) -> Tensor:
    """Turn the probe gradients h into the probes V, in place.

    Args:
        buffers: the probe gradient h of each layer, fp32, (H,).
        rule: `"gradient"`: V = β·ρ‖W‖·h. `"normalized"`: V = β·r·h/‖h‖ with r the layer's radius.
            `"adam"`: one step of size β of Adam from V = 0 on g = ρ‖W‖·h, so V = β·g/(|g| + 1e-8).
        probe_size: β, the size of the probe.
        perturbation_norm: ρ‖W‖, 0-d.
        radii: per layer the norm of ordinary hidden states, s_j·√H, 0-d; for `"normalized"`.

    Returns:
        0-d bool: whether every h and radius was finite. If not, every V is zero.

    Raises:
        ValueError: if an h does not have one dimension.
    """
    check_one_dimension("buffers", buffers)
    finite = torch.stack(
        [
            (buffer.isfinite().all() & radius.isfinite()).to(buffers[0].device)
            for buffer, radius in zip(buffers, radii, strict=True)
        ]
    ).all()
    for buffer, radius in zip(buffers, radii, strict=True):
        if buffer.numel() == 0:
            continue
        if rule == "normalized":
            # The largest element is divided out first, so that a small h is not lost when squared.
            largest = buffer.abs().max()
            unit = torch.where(largest > 0, buffer / largest, 0.0)
            norm = torch.linalg.vector_norm(unit)
            probe = torch.where(norm > 0, unit / norm, 0.0) * radius
        else:
            probe = buffer * perturbation_norm.to(buffer.device)
            if rule == "adam":
                probe = probe / (probe.abs() + 1e-8)
        buffer.copy_(torch.where(finite.to(buffer.device), probe_size * probe, 0.0))
    return finite


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
    """Blend, unscale, clip and update with AdamW; gradients are read, not written.

    g′ = gradient_scale·(±g + c·d) with c = `blend`, then AdamW with decoupled weight decay
    (Loshchilov & Hutter, arXiv:1711.05101) on g′. Without `blend` and `gradient_scale` an fp32
    parameter gets the bits that `torch.optim.AdamW` gives it on the CPU.

    There is no `found_inf` as PyTorch's fused optimizers have it. A `torch.amp.GradScaler` already
    skips `step()` on the host. Counters on the host could follow a skip inside of a kernel only by
    waiting for the device.

    Args:
        params: parameters.
        grads: their gradients, of the same dtype.
        exp_avgs: first moments, fp32 for any parameter dtype but fp64.
        exp_avg_sqs: second moments, likewise.
        steps: number of updates each parameter has had, 0-d fp32; counted up here.
        directions: the safety gradient d of each parameter, None where it has none; or an empty
            list.
        lr: learning rate, 0-d.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        maximize: ascend the task objective, −g + c·d: what is blended in is descended all the same.
        blend: c, 0-d, of any sign, whatever rule found it; γ‖g‖/‖d‖ for `"blend"`. Zero leaves the
            gradient, whatever d holds. None: no directions are read.
        gradient_scale: clipping coefficient, or 1/loss scale, or their product; 0-d.
    """
    for index, parameter in enumerate(params):
        gradient = -_wide(grads[index]) if maximize else _wide(grads[index])
        direction = directions[index] if directions else None
        if blend is not None and direction is not None:
            weight = blend.to(parameter.device)
            gradient = torch.where(weight == 0, gradient, gradient + weight * _wide(direction))
        if gradient_scale is not None:
            gradient = gradient * gradient_scale.to(parameter.device)
        # 0-d in fp64, on the device if a counter or lr is: nothing is copied to it or from it.
        step, rate = steps[index].add_(1).double(), lr.double()
        step_size = rate / (1 - beta1**step)
        root_correction = (1 - beta2**step).sqrt()
        exp_avg, exp_avg_sq = exp_avgs[index], exp_avg_sqs[index]
        # For fp32 and fp64 this is the parameter itself, updated in place without a copy.
        value = _wide(parameter)
        value.mul_(1 - rate * weight_decay)
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / root_correction).add_(eps)
        value.sub_(step_size * exp_avg / denominator)
        if value is not parameter:
            parameter.copy_(value)
