"""The safety gradient blended into the task gradient: g′ = g + c·d."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.distributed import local_shards
from sap_fast.step.direction import Direction, Parts, add_up
from sap_fast.step.rules import RuleFunction, squared_norm


class Blending(NamedTuple):
    """What is to be added to the gradients; on the device, for the update to carry out."""

    directions: Parts
    """d by parameter; a parameter without one keeps its g"""
    coefficient: Tensor
    """c, 0-d; zero leaves every gradient as it is"""
    square: Tensor
    """‖g′‖², 0-d"""


@torch.no_grad()
def find_blending(
    rule: RuleFunction,
    parameters: Sequence[nn.Parameter],
    direction: Direction,
    wanted: Tensor,
    *,
    maximize: bool,
    backend: str,
) -> Blending | None:
    """Return g′ = ±g + c·d of parameters that hold their gradients; None if there is nothing to do.

    Args:
        rule: three numbers to c; see `sap_fast.step.rules`.
        parameters: with the task gradients in `.grad`.
        direction: d.
        wanted: 0-d bool; where it does not hold c is zero.
        maximize: the task objective is maximized: its gradient counts as −g.
        backend: see `sap_fast.ops`.
    """
    kept = direction.kept_by_parameter()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not kept or not gradients or direction.square is None:
        return None
    g_square, d_square = ops.sum_squares(gradients, backend=backend), direction.square
    directions, both = Parts(kept), [p for p in parameters if p.grad is not None and p in kept]
    g_dot_d = torch.zeros_like(g_square)
    if both:
        g_dot_d = add_up(
            ops.dot(
                [p.grad for p in part if p.grad is not None],
                [d for d in of_part if d is not None],
                backend=backend,
            )
            for part, of_part in directions.of(both)
        )
    if maximize:
        g_dot_d = -g_dot_d
    # A loss that is scaled gives a d that is: the rule is told of the d without it.
    scale = torch.ones_like(d_square) if direction.scale is None else direction.scale
    coefficient = rule(g_square, g_dot_d / scale, d_square / scale / scale) / scale
    coefficient = torch.where(wanted, coefficient, 0.0)
    square = torch.where(wanted, squared_norm(g_square, g_dot_d, d_square, coefficient), g_square)
    return Blending(directions, coefficient, square)


@torch.no_grad()
def add_to_gradients(blending: Blending, *, maximize: bool) -> None:
    """Add c·d to the gradients, with the roundings of `ops.adamw_blend_` for fp32 gradients.

    bf16 and fp16 gradients are rounded once more than there, as they are written back.
    """
    reached = [p for p in blending.directions.parameters if p.grad is not None]
    for part, of_part in blending.directions.of(reached):
        gradients, directions = local_shards([p.grad for p in part]), local_shards(of_part)
        for gradient, direction in zip(gradients, directions, strict=True):
            wide = torch.promote_types(gradient.dtype, torch.float32)
            c = blending.coefficient.to(gradient.device)
            change = c * direction.to(wide)
            blended = gradient.to(wide) + (-change if maximize else change)
            gradient.copy_(torch.where(c == 0, gradient, blended))
