"""What one step did, for logs and plots, and how it reaches the host without waiting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sap_fast import ops
from sap_fast.model.probes import ProbeSet
from sap_fast.step.calibration import Calibration
from sap_fast.step.direction import Direction


class LossRecord:
    """Adds up the losses of one pass; calling it is optional."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def __call__(self, loss: Tensor) -> None:
        """Add the loss of one micro-batch, already scaled as it was for its backward."""
        value = loss.detach().clone()
        self.total = value if self.total is None else self.total + value


@dataclass
class StepRecord:
    """What the passes of one step found, as tensors on the device; `None` where not measured."""

    rho: float = 0.0
    parameter_norm: Tensor | None = None
    direction_norm: Tensor | None = None
    direction_valid: Tensor | None = None
    direction_slope: Tensor | None = None
    above_level: Tensor | bool | None = None
    perturbation_norm: Tensor | None = None
    perturbation_applied: Tensor | None = None
    estimate_finite: Tensor | None = None
    #: What the losses were multiplied by before backward; None: by nothing.
    loss_scale: Tensor | None = None
    safety_loss: Tensor | None = None
    #: Of W + ΔW, and of W − ΔW or W.
    probe_losses: list[Tensor] = field(default_factory=list)
    task_loss: LossRecord = field(default_factory=LossRecord)

    @property
    def is_finite(self) -> Tensor:
        """Whether the direction and h are finite, as 0-d bool; true where there are none."""
        if self.direction_norm is None:
            return torch.tensor(True)
        finite = self.direction_norm.isfinite()
        if self.estimate_finite is None:
            return finite
        return finite & self.estimate_finite.to(finite.device)

    @torch.no_grad()
    def measure_slope(self, direction: Direction, backend: str) -> None:
        """Record ⟨ĝ, ∇_W L_task⟩ of the gradients so far, where the direction was kept."""
        pairs = [(d, p.grad) for p, d in direction.by_parameter().items() if p.grad is not None]
        if pairs and self.direction_norm is not None:
            directions, gradients = zip(*pairs, strict=True)
            product = ops.dot(directions, gradients, backend=backend)
            self.direction_slope = product / self.direction_norm


@dataclass(frozen=True)
class SAPMetrics:
    """Figures of the last step; `None` where the step did not have or measure them.

    Attributes:
        safety_loss: L_safe at W.
        safety_level: the L_safe above which steps probe and blend, once it is known.
        above_level: whether this step did; `None` without a level.
        task_loss: L_task at W under the probe V, as trained on.
        rho: ρ.
        rho_agreement: the calibration's agreement, if ρ was calibrated.
        parameter_norm: ‖W‖ over the trained parameters.
        perturbation_wanted: ‖ΔW‖ = ρ‖W‖.
        perturbation_applied: the norm left once weights are rounded to the dtype computed in.
        estimate_norms: ‖h_j‖ by layer index.
        probe_sizes: ‖v_j‖/(s_j·√H) by layer index: the probe relative to an ordinary token's hidden
            state, β for `ProbeSet(rule="normalized")`.
        lean: ⟨ĝ, ∇_W L_task(W, V)⟩ − ⟨ĝ, ∇_W L_task(W, 0)⟩: by how much the probe makes the update
            lean away from the harmful direction ĝ. The second term is the finite difference of the
            losses of the probe passes. Losses curve sooner than h does: for ρ of 0.05 and more,
            trust `lean_predicted`. Needs `SafetyPasses.measures_lean`, or a direction that is kept
            anyway.
        lean_predicted: Σ_j ⟨h_j, v_j⟩, what `lean` would be if L_task were quadratic.
        skipped_steps: how many steps ran as plain AdamW so far, because the direction was zero or
            not finite, or h was not finite.
    """

    safety_loss: float | None = None
    safety_level: float | None = None
    above_level: bool | None = None
    task_loss: float | None = None
    rho: float | None = None
    rho_agreement: float | None = None
    parameter_norm: float | None = None
    perturbation_wanted: float | None = None
    perturbation_applied: float | None = None
    estimate_norms: dict[int, float] = field(default_factory=dict)
    probe_sizes: dict[int, float] = field(default_factory=dict)
    lean: float | None = None
    lean_predicted: float | None = None
    skipped_steps: int = 0

    def flat(self, prefix: str = "sap/") -> dict[str, float]:
        """Return the figures there are as numbers in one dict, per-layer ones as `name/layer`."""
        flat: dict[str, float] = {}
        for name, value in vars(self).items():
            values: dict[Any, Any] = value if isinstance(value, dict) else {None: value}
            for layer, figure in values.items():
                if figure is not None:
                    flat[prefix + name + ("" if layer is None else f"/{layer}")] = float(figure)
        return flat


def read_metrics(
    record: StepRecord,
    probes: ProbeSet | None,
    calibration: Calibration | None,
    *,
    level: float | None,
    skipped_steps: int,
    maximize: bool,
) -> SAPMetrics:
    """Return the figures of a step. Waits for the device."""
    figures: dict[str, Any] = {
        "safety_loss": _number(record.safety_loss),
        "task_loss": _number(record.task_loss.total),
        "safety_level": level,
        "above_level": None if record.above_level is None else bool(record.above_level),
        "parameter_norm": _number(record.parameter_norm),
        "skipped_steps": skipped_steps,
    }
    if probes is None or record.perturbation_norm is None:
        return SAPMetrics(**figures)
    return SAPMetrics(
        **figures,
        rho=record.rho,
        rho_agreement=None if calibration is None else calibration.agreement,
        perturbation_wanted=_number(record.perturbation_norm),
        perturbation_applied=_number(record.perturbation_applied),
        estimate_norms={j: h.norm().item() for j, h in probes.estimates.items()},
        probe_sizes=probes.relative_sizes(),
        lean=_lean(record, central=probes.difference == "central", maximize=maximize),
        lean_predicted=sum(
            torch.sum(probes.estimates[j] * v).item() for j, v in probes.offsets.items()
        ),
    )


def _lean(record: StepRecord, *, central: bool, maximize: bool) -> float | None:
    slope, norm = _number(record.direction_slope), _number(record.perturbation_norm)
    if slope is None:
        return None
    slope /= _number(record.loss_scale) or 1.0
    sign = -1.0 if maximize else 1.0
    if not norm:
        return sign * slope
    # ⟨ĝ, ∇_W L_task(W, 0)⟩, differenced from the losses that the probe passes had anyway.
    there, back = record.probe_losses
    return sign * (slope - (there - back).item() / (2 * norm if central else norm))


def _number(tensor: Tensor | None) -> float | None:
    return None if tensor is None else tensor.item()


class Mailbox:
    """Brings a small tensor to the host without making the host wait for the device.

    On CUDA what is posted can be collected once the device got that far; elsewhere at once.
    """

    def __init__(self) -> None:
        self._posted: tuple[Tensor, torch.cuda.Event | None] | None = None

    def post(self, tensor: Tensor) -> None:
        """Send a tensor on its way, in the place of one not collected yet."""
        if tensor.device.type != "cuda":
            self._posted = (tensor, None)
            return
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        copy.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(tensor.device))
        self._posted = (copy, event)

    def collect(self) -> list[float] | None:
        """Return the posted tensor as a list if it has arrived, once; else None."""
        if self._posted is None or (self._posted[1] is not None and not self._posted[1].query()):
            return None
        values = self._posted[0].tolist()
        self._posted = None
        return values
