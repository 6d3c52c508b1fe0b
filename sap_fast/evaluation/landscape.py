"""The safety landscape: what a model does as its weights move along a direction.

Peng et al. 2024, "Navigating the Safety Landscape" (arXiv:2405.17374). The weights move in place,
by the operations that SAP perturbs them with: beside the model there is one direction, of the size
of what is moved, and no copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from sap_fast.evaluation.bootstrap import Interval, bootstrap_interval
from sap_fast.step.guards import Perturbation

Result = TypeVar("Result")


@torch.no_grad()
def random_direction(parameters: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return a normal random direction, normalized layer by layer as the paper's.

    Args:
        parameters: what is to be moved.
        seed: the same seed gives the same direction on every device.

    Returns:
        A tensor for each parameter, of its shape, dtype, device and norm.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(p.shape, generator=generator).to(p.device, p.dtype) for p in parameters]
    return normalized(drawn, parameters)


@torch.no_grad()
def normalized(direction: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Scale every tensor of a direction to the norm of the parameter it belongs to, in place.

    A step α along it then moves every parameter by α of its own norm. A tensor of zeros stays one.
    """
    for moved, parameter in zip(direction, parameters, strict=True):
        norm = torch.linalg.vector_norm(moved, dtype=torch.float64)
        wanted = torch.linalg.vector_norm(parameter, dtype=torch.float64)
        moved.mul_(torch.where(norm == 0, 0.0, wanted / norm).to(moved.dtype))
    return list(direction)


@torch.no_grad()
def as_long_as(direction: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Scale a direction as a whole to the norm of all parameters, in place.

    A step α along a gradient then is the perturbation of SAP with ρ = α. All zeros stay zeros.
    """
    norm, wanted = (
        torch.stack([torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]).norm()
        for tensors in (direction, parameters)
    )
    scale = torch.where(norm == 0, 0.0, wanted / norm)
    for moved in direction:
        moved.mul_(scale.to(moved.dtype))
    return list(direction)


def along(
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    alphas: Sequence[float],
    measure: Callable[[float], Result],
) -> list[Result]:
    """Measure at W + α·direction for every α; W comes back bit for bit, whatever happens.

    The direction comes back to rounding, an error of about ε/α relative to it after each step: in
    fp32 below 1e-5 for |α| ≥ 0.01 and below 1e-3 for |α| ≥ 1e-4; in bf16 far too much for small α,
    so hold the model in fp32.

    Args:
        parameters: what is moved, in place.
        direction: a tensor for each parameter, of its dtype; holds W meanwhile.
        alphas: steps; at 0 nothing is touched.
        measure: called with α while W + α·direction is in place.

    Returns:
        What `measure` returned for every α.
    """
    results = []
    for alpha in alphas:
        if alpha == 0:
            results.append(measure(alpha))
            continue
        scale = torch.tensor(alpha, dtype=torch.float32, device=parameters[0].device)
        with Perturbation(parameters, direction, scale):
            results.append(measure(alpha))
    return results


def visage(refused: Sequence[Sequence[float]]) -> Interval:
    """Return the volume of the safety basin: the share of refusals in the mean over the landscape.

    VISAGE of the paper, with its largest harmfulness of 1: the mean of 1 − (share answered) over
    steps drawn evenly from [−reach, reach] (0.5 there) along random directions.

    Args:
        refused: share of harmful requests refused, (directions, steps), steps evenly spaced.

    Returns:
        The mean and its bootstrap interval over directions; of one direction the mean alone, with
        an interval of no width.
    """
    return bootstrap_interval([sum(shares) / len(shares) for shares in refused])
