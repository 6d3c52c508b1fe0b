"""ρ, the size of the weight perturbation: given, or found where h can be trusted most.

A ρ too small drowns in rounding, one too large leaves the linear range, and either way the h it
gives disagrees with those of half and of twice the ρ. So h is estimated on a grid, and the ρ is
taken whose h has the largest cosine with both neighbours'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Candidates: 0.1·2⁻ᵏ. Larger ones are outside the linear range of every model measured, smaller
# ones below the rounding of every dtype but fp64.
RHO_GRID = tuple(0.1 * 2.0**-k for k in range(11))

# ρ where no calibration succeeded: inside the linear range of LoRA and of full fine-tuning in fp32,
# and of LoRA in bf16. Calibration does better, in bf16 by much.
UNCALIBRATED_RHO = 1e-2


@dataclass(frozen=True)
class Calibration:
    """The outcome of a calibration.

    Attributes:
        rho: the ρ chosen.
        agreement: the cosine of h at ρ and at half of it, with forward differences at 2ρ and at ρ:
            how far h can be trusted, 1 at best.
        agreements: the cosine of h at ρ and at half of it, for every ρ tried.
        step: number of steps taken before.
    """

    rho: float
    agreement: float
    agreements: dict[float, float]
    step: int


def calibrate(
    estimate: Callable[[float], Mapping[int, Tensor]], difference: str, step: int
) -> Calibration | None:
    """Find the ρ at which h can be trusted most, from two probe passes for each of the grid.

    With central differences it is the ρ whose h agrees best with that of half *and* of twice the ρ;
    with forward differences half of the ρ whose h agrees best with that of half the ρ.

    Args:
        estimate: runs the probe passes at a ρ and returns h by layer.
        difference: as for `ProbeSet`.
        step: number of steps taken before.

    Returns:
        What was found; None if no ρ gave a finite h that is not zero.
    """
    estimates = []
    for rho in RHO_GRID:
        # All of h as one vector; layers may lie on several devices.
        flat = [h.flatten().double().cpu() for h in estimate(rho).values()]
        estimates.append(torch.cat(flat))
    agreements = {
        rho: (h.dot(h_of_half) / (h.norm() * h_of_half.norm())).item()
        for rho, h, h_of_half in zip(RHO_GRID[:-1], estimates[:-1], estimates[1:], strict=True)
    }
    usable = {rho: value for rho, value in agreements.items() if math.isfinite(value)}
    if not usable:
        return None
    rho, agreement = _most_trusted(usable, difference)
    return Calibration(rho, agreement, agreements, step)


def _most_trusted(agreements: dict[float, float], difference: str) -> tuple[float, float]:
    """Return the ρ whose h can be trusted most, and its agreement.

    Args:
        agreements: cosines, all finite, of h at ρ and at ρ/2, for one ρ at least.
        difference: as for `ProbeSet`.
    """
    if difference == "forward":
        # Off by O(ρ): h(ρ) by twice as much as it disagrees with h(ρ/2), h(ρ/2) by as much.
        best = max(agreements, key=lambda rho: agreements[rho])
        return best / 2, agreements[best]
    # Off by O(ρ²), of which h(2ρ) has four times as much, and by rounding, of which h(ρ/2) has
    # twice as much: the first shows in the disagreement with one, the second with the other. By
    # h(ρ/2) alone a ρ twice too large may be taken, at a cosine with the exact h of 0.967 where
    # 0.992 can be had (benchmarks/fidelity.py, SmolLM2 under bf16 autocast).
    between = {
        rho: agreements[rho] + agreements[2 * rho] for rho in agreements if 2 * rho in agreements
    }
    candidates = between or agreements
    best = max(candidates, key=lambda rho: candidates[rho])
    return best, agreements[best]
