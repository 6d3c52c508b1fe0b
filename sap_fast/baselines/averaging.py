"""SAP with an average over steps."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sap_fast.integrations.trainer import SAPTrainer
from sap_fast.model.probes import ProbeSet
from sap_fast.step.passes import SafetyPasses


class AveragingTrainer(SAPTrainer):
    """SAP with an average over past steps in the place of what one step finds.

    h belongs to its batch, and the direction to four pairs: is what they miss, or what they say by
    chance, in the way? A sum in which the step k steps ago counts decayᵏ takes the place of one
    step's value.

    Args:
        *args: as for `SAPTrainer`.
        averaged: `"probe"`: V is along the average of h, layer by layer, with the norm that this
            step's V has. `"direction"`: the gradient of the safety loss is the average.
        decay: in [0, 1).
        **kwargs: as for `SAPTrainer`.
    """

    _runs_beside_deepspeed = False

    def __init__(
        self,
        *args: Any,
        averaged: Literal["probe", "direction"],
        decay: float = 0.9,
        **kwargs: Any,
    ) -> None:
        if averaged not in ("probe", "direction"):
            raise ValueError(f"averaged={averaged!r} is not known; choose probe or direction")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} is out of range; give 0 ≤ decay < 1")
        self._averaged, self._decay = averaged, decay
        #: Sums over past steps: of h by layer, of the safety gradient by parameter.
        self._estimates: dict[int, Tensor] = {}
        self._directions: dict[nn.Parameter, Tensor] = {}
        super().__init__(*args, **kwargs)

    def compute_safety_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the safety loss; its gradient has that of past steps in it."""
        loss = super().compute_safety_loss(model, inputs)
        past = [(self._decay * g * p).sum() for p, g in self._directions.items()]
        if not past:
            return loss
        slope = torch.stack(past).sum()
        return loss + (slope - slope.detach())  # the gradient alone

    def _keeps_direction(self) -> bool:
        return self._averaged == "direction"

    def _run_inner_passes(
        self, passes: SafetyPasses, model: nn.Module, window: list[Any], num_items: Any
    ) -> None:
        super()._run_inner_passes(passes, model, window, num_items)
        direction, probes = passes.direction, passes.probes
        if self._averaged == "direction":
            if not direction.is_settled:  # it is this step's own
                self._directions = direction.by_parameter()
        elif probes is not None and probes.offsets:
            self._average_probe(probes)

    def _average_probe(self, probes: ProbeSet) -> None:
        for layer, h in probes.estimates.items():
            past = self._estimates.get(layer)
            self._estimates[layer] = h.clone() if past is None else h + self._decay * past
        probes.offsets = {
            layer: total * (probes.offsets[layer].norm() / total.norm())
            for layer, total in self._estimates.items()
        }
