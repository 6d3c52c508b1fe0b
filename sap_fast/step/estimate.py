"""h, the probe gradient, from two probe passes at W + ΔW and W − ΔW (or W)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from sap_fast.model.paired import Adapter
from sap_fast.model.probes import ProbeSet
from sap_fast.step.direction import Direction
from sap_fast.step.guards import frozen, gradients_set_aside
from sap_fast.step.metrics import StepRecord
from sap_fast.step.trained import Trained


def estimate(
    probes: ProbeSet,
    trained: Trained,
    direction: Direction,
    task: Callable[[], object],
    record: StepRecord,
    *,
    backend: str,
    maximize: bool,
    keep_direction: bool,
    measure_rounding: bool = False,
    keep_lower_forward: bool = False,
    all_rows: bool = True,
    adapters: Sequence[Adapter] = (),
) -> None:
    """Run two probe passes at `record.rho`, and leave h in `probes.estimates`.

    Both run under the state that the random number generators have on entry, and leave it so.

    Args:
        probes: the probe set.
        trained: the parameters.
        direction: the safety gradient.
        task: runs forward and backward on the task loss and returns it.
        record: gets ‖ΔW‖; its norms of parameters and direction are there.
        backend: see `sap_fast.ops`.
        maximize: the task objective is maximized, so that it is a task loss with its sign turned.
        keep_direction: leave its tensors exact instead of using them up, for one more buffer.
        measure_rounding: record how much of ΔW survives the dtype that weights are multiplied in.
        keep_lower_forward: let the task pass have the forward below the lowest probed layer from
            the probe pass at W, if there is one.
        all_rows: collect from all rows that `task` runs on, not from those alone that the probe is
            of.
        adapters: run both passes as one of twice the rows, as these are all that is trained of the
            decoder (`sap_fast.model.paired`).
    """
    # The buffers hold W during the passes. No weight gradients exist meanwhile, so that a copy of
    # the direction does not raise the peak of a step that accumulates nothing.
    buffers = direction.buffers(keep=keep_direction)
    central = probes.difference == "central"
    scale = _set_perturbation_norm(record)
    random_state = trained.random_state()
    with ExitStack() as stack:
        stack.callback(random_state.restore)
        # Nothing is added to gradients here, but the task may clear them.
        stack.enter_context(gradients_set_aside(trained.every(inside=True)))
        trainable = [p for p in trained.every(inside=True) if p.requires_grad]
        stack.enter_context(frozen(trainable))
        probes.begin_estimate()

        def one_pass(sign: float, keep_lower: bool = False) -> None:
            random_state.restore()
            trained.forget_weights()
            probes.rewind()
            with (
                trained.checkpointed(frozen=not keep_lower),
                probes.active(
                    sign=sign, frozen=trainable, keep_lower=keep_lower, all_rows=all_rows
                ),
            ):
                task()

        with trained.perturbation(
            direction.parameters, buffers, scale, backend=backend
        ) as perturbation:
            if adapters:
                matrices = [matrix for adapter in adapters for matrix in adapter.matrices]
                both = dict(zip(matrices, perturbation.of_both_signs(matrices), strict=True))
                paired = stack.enter_context(probes.paired(adapters, both))
            one_pass(+1.0)
            if measure_rounding:
                record.perturbation_applied = perturbation.applied_norm(probes.compute_dtype)
            if central:
                perturbation.reflect()
                one_pass(-1.0)
            if adapters:
                paired.backward()
        if not central:
            # At W, V = 0 and under the masks of the task pass: up to the lowest probed layer this
            # is the task pass.
            one_pass(-1.0, keep_lower=keep_lower_forward)
        probes.finish_estimate(_coefficient(record, central, maximize))


@torch.no_grad()
def _set_perturbation_norm(record: StepRecord) -> Tensor:
    """Record ‖ΔW‖ = ρ‖W‖ and return the factor that turns the safety gradient into ΔW."""
    assert record.parameter_norm is not None
    assert record.direction_norm is not None and record.direction_valid is not None
    record.perturbation_norm = record.rho * record.parameter_norm
    scale = record.perturbation_norm / record.direction_norm
    return torch.where(record.direction_valid, scale, 0.0)


@torch.no_grad()
def _coefficient(record: StepRecord, central: bool, maximize: bool) -> Tensor:
    """Return what turns the difference of the passes into a derivative along ĝ."""
    norm = record.perturbation_norm
    assert norm is not None
    apart = (-1.0 if maximize else 1.0) / (2.0 if central else 1.0)
    coefficient = torch.where(norm > 0, apart / norm, 0.0)
    if record.loss_scale is not None:
        coefficient = coefficient / record.loss_scale.to(coefficient.device)
    return coefficient
