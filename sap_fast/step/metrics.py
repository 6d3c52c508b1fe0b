"""What one step did, for logs and plots, and how it reaches the host without waiting."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sap_fast.model.probes import ProbeSet
from sap_fast.step.calibration import Calibration


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
    above_level: Tensor | bool | None = None
    perturbation_norm: Tensor | None = None
    perturbation_applied: Tensor | None = None
    estimate_finite: Tensor | None = None
    #: ‖g‖ when the task pass ended, where the next step's probe goes by it.
    gradient_norm: Tensor | None = None
    #: What the losses were multiplied by before backward; None: by nothing.
    loss_scale: Tensor | None = None
    safety_loss: Tensor | None = None
    #: The probe passes saw the whole batch; else `lean` is known only where it was measured.
    sees_all_rows: bool = True
    lean: Tensor | None = None
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
        perturbation_applied: the norm left once weights are rounded to the dtype that they are
            multiplied in. Measured in the first step that probes, in the first one with another ρ,
            and where `SafetyPasses.measures_rounding` is set.
        estimate_norms: ‖h_j‖ by layer index.
        probe_sizes: ‖v_j‖/(s_j·√H) by layer index: the probe relative to an ordinary token's hidden
            state: β for `ProbeSet(rule="normalized")`, and 1/√(the part of the rows) times that
            with `own_rows`.
        lean: Σ_j ⟨h_j, v_j⟩, which is ⟨ĝ, ∇_W L_task(W, V) − ∇_W L_task(W, 0)⟩ to first order in V:
            by how much the probe makes the update lean away from the harmful direction ĝ. The probe
            passes have it for nothing, and with the precision of h. Where a method takes a part of
            its forward for a constant in the backward, as DoRA its norms, it is the lean of the
            loss. It is that of the whole batch: where the probe passes see a part of it, h of the
            part says nothing of the other rows, and the lean is None unless
            `SafetyPasses.measures_lean` is set. None if h was not finite, too.
        lean_of_rows: the same for the part that the probe passes saw; None where that is the whole.
            It is larger, as V was made for these rows.
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
    lean_of_rows: float | None = None
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
        lean=_finite(probes.lean() if record.sees_all_rows else record.lean),
        lean_of_rows=None if record.sees_all_rows else _finite(probes.lean()),
    )


def _finite(lean: Tensor | None) -> float | None:
    # Not the difference of two slopes: one by autograd and one from the losses of the probe passes
    # differ by more than the probe does where a method detaches a part of its forward, and two by
    # autograd, for one more pass, by their rounding under bf16 autocast.
    number = math.nan if lean is None else lean.item()
    return number if math.isfinite(number) else None


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
