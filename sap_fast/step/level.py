"""The safety level: a step probes and blends only while L_safe is above it."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from sap_fast.distributed import Ranks

# Safety passes whose mean L_safe is the level "auto": one batch of pairs says little, and after a
# few steps the loss is no longer that of the model as it came.
_PASSES = 3


class Level:
    """The L_safe to hold, and what the last safety pass found of it.

    Args:
        setting: the level; `"auto"` for the mean L_safe of the first three safety passes, which are
            all above it, and which no step may leave out; None for no level.

    Attributes:
        above: whether L_safe in the safety pass whose direction is in use was above the level:
            a bool, or a 0-d bool tensor until the host asks. None: not measured.

    Raises:
        ValueError: if the setting is none of those.
    """

    def __init__(self, setting: float | Literal["auto"] | None) -> None:
        self.setting = setting
        self.above: Tensor | bool | None = None
        #: Sum and number of the L_safe whose mean is the level, with "auto".
        self._losses = torch.zeros(2)
        #: Safety passes of completed steps, as far as the host is to know.
        self._passes = 0
        #: L_safe of the step in progress.
        self._loss: Tensor | None = None

    @property
    def setting(self) -> float | Literal["auto"] | None:
        """The level as given; a new one counts from the next safety pass on."""
        return self._setting

    @setting.setter
    def setting(self, setting: float | Literal["auto"] | None) -> None:
        if (
            setting is not None
            and setting != "auto"
            and (isinstance(setting, str) or not math.isfinite(setting))
        ):
            raise ValueError(
                f'safety_level={setting!r} is not known; give "auto", a number or None'
            )
        self._setting = setting

    def measure(self, loss: Tensor, device: torch.device, ranks: Ranks) -> None:
        """Compare the mean L_safe over ranks with the level; the host does not wait for it.

        Raises:
            RuntimeError: if there are other ranks, and `ranks` does not know them.
        """
        if self.setting is None:
            return
        loss = loss.to(device, torch.float32, copy=True)
        if ranks:
            ranks.average_([loss])
        else:
            ranks.refuse_unknown_ranks(f"safety_level={self.setting!r}")
        self._losses = self._losses.to(device)
        self._loss, self.above = loss, loss > self._value()

    def _value(self) -> Tensor | float:
        if self.setting != "auto":
            return -math.inf if self.setting is None else self.setting
        total, count = self._losses
        return torch.where(count < _PASSES, -math.inf, total / count.clamp(min=1))

    @property
    def wants_pass(self) -> bool:
        """Whether the next step is to have a safety pass, for the level of a model as it came."""
        return self.setting == "auto" and self._passes < _PASSES

    @property
    def is_held(self) -> bool:
        """Whether L_safe is known not to be above the level. The host waits for the device."""
        if self.above is None:
            return False
        self.above = bool(self.above)
        return not self.above

    @property
    def known(self) -> float | None:
        """The level, once it is known. The host waits for the device."""
        value = float(self._value())
        return None if value == -math.inf else value

    def settle(self) -> None:
        """Count what the step in progress measured, as the step is done."""
        if self._loss is None:
            return
        counts = self._loss.isfinite() & (self._losses[1] < _PASSES)
        found = torch.stack([self._loss, torch.ones_like(self._loss)])
        self._losses = self._losses + torch.where(counts, found, 0.0)
        self._passes += 1
        self._loss = None

    def forget(self) -> None:
        """Drop what a safety pass measured whose direction is of no use any more."""
        self._loss = self.above = None

    def state_dict(self) -> dict[str, Any]:
        """Return what later steps depend on: nothing of a step in progress."""
        above = self.above if self._loss is None else None
        return {"losses": self._losses, "passes": self._passes, "above": above}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        self._losses, self._passes = state_dict["losses"], state_dict["passes"]
        self.above, self._loss = state_dict["above"], None
