"""Steps that had no usable direction or probe: counted, and warned of once."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from sap_fast.step.metrics import Mailbox, StepRecord


class Account:
    """Counts the steps that ran as plain AdamW, without making the host wait for the device.

    Attributes:
        rounding_is_known: it was measured how much of ΔW survives rounding.
    """

    def __init__(self) -> None:
        self.rounding_is_known = False
        self._skipped = torch.zeros((), dtype=torch.int64)
        self._warned: set[str] = set()
        self._mailbox = Mailbox()

    @property
    def skipped_steps(self) -> int:
        """How many steps ran as plain AdamW. The host waits for the device."""
        return int(self._skipped)

    def settle(self, record: StepRecord, compute_dtype: torch.dtype) -> None:
        """Count a step that is done, and warn once the host hears of it."""
        norm, sound = record.direction_norm, record.direction_valid
        if norm is None or sound is None:
            return
        if record.estimate_finite is not None:
            sound = sound & record.estimate_finite.to(sound.device)
        self._skipped = self._skipped.to(sound.device) + sound.logical_not()
        survives = torch.full_like(norm, torch.nan)
        if record.perturbation_applied is not None and record.perturbation_norm is not None:
            # An unsound direction perturbs nothing, and says nothing about rounding.
            ratio = record.perturbation_applied / record.perturbation_norm
            survives = torch.where(sound, ratio, survives)
            self.rounding_is_known = True
        if record.loss_scale is not None:
            norm = norm / record.loss_scale.to(norm.device)
        self._mailbox.post(torch.stack([self._skipped, norm, survives]))
        figures = self._mailbox.collect()
        if figures is not None:
            self._warn_about(figures, record.rho, compute_dtype)

    def _warn_about(self, figures: list[float], rho: float, compute_dtype: torch.dtype) -> None:
        skipped, direction_norm, survives = figures
        if skipped > 0:
            self.warn_once(
                "skipped",
                f"sap_fast: {skipped:.0f} step(s) ran as plain AdamW because the direction was "
                "zero or not finite, or the probe gradient was not finite (‖∇L_safe‖ = "
                f"{direction_norm:.3g}); further ones are counted in metrics.skipped_steps",
            )
        if survives < 0.5:
            self.warn_once(
                "rounding",
                f"sap_fast: only {survives:.1%} of the norm of the perturbation survives rounding "
                f"to {compute_dtype} at rho={rho:.3g}: the probe gradient is mostly noise; "
                'use a larger rho, rho="auto", or a wider dtype',
            )

    def warn_once(self, kind: str, message: str) -> None:
        """Warn, unless a warning of this kind was given before."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the count."""
        return {"skipped_steps": self._skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._skipped = state_dict["skipped_steps"].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_mailbox": Mailbox()}
