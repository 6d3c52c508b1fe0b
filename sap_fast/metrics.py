"""What one step of SAP did, for logs and plots, and how it reaches the host without waiting."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """The outcome of `FusedSAP.calibrate_rho`.

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


@dataclass(frozen=True)
class SAPMetrics:
    """Figures of the last step; `None` where the step did not have or measure them.

    Attributes:
        safety_loss: L_safe at W.
        safety_level: the L_safe above which steps probe and blend, once it is known.
        above_level: whether this step did; `None` without a level.
        task_loss: L_task at W under the probe V_safe, as trained on.
        rho: ρ.
        rho_agreement: the calibration's agreement, if ρ was calibrated.
        parameter_norm: ‖W‖ over the trained parameters.
        perturbation_wanted: ‖ΔW‖ = ρ‖W‖.
        perturbation_applied: the norm left once weights are rounded to the dtype computed in.
        estimate_norms: ‖h_j‖ by layer index.
        probe_sizes: ‖v_j‖/(s_j·√H) by layer index: the probe relative to an ordinary token's hidden
            state, β for `probe_rule="normalized"`. With probes per token, per token in the mean.
        lean: ⟨ĝ, ∇_W L_task(W, V_safe)⟩ − ⟨ĝ, ∇_W L_task(W, 0)⟩: by how much the probe makes the
            update lean away from the harmful direction ĝ. The second term is the finite difference
            of the losses of the probe passes, where these were recorded and the schedule is
            `"paper"`; otherwise `lean` is the first term alone. Losses curve sooner than h does:
            for ρ of 0.05 and more, trust `lean_predicted`. Needs `keep_direction`.
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
