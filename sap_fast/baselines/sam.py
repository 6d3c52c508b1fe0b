"""Sharpness-aware minimization."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sap_fast.baselines.plain import PlainTrainer, gradients_of, step_of_length
from sap_fast.step.guards import Perturbation


class SAMTrainer(PlainTrainer):
    """Sharpness-aware minimization of the task loss: its gradient at W + ε, ε = ρ·g/‖g‖.

    Foret et al. 2021 (arXiv:2010.01412): the worst loss near W in its place. g is taken over
    all micro-batches of the step. Needs no safety data, and twice the time.

    Args:
        *args: as for `SAPTrainer`.
        radius: ρ = ‖ε‖; the paper's 0.05 by default.
        **kwargs: as for `SAPTrainer`.
    """

    def __init__(self, *args: Any, radius: float = 0.05, **kwargs: Any) -> None:
        if not radius > 0:
            raise ValueError(f"radius={radius}: expected a number > 0")
        self._radius = radius
        super().__init__(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one micro-batch at W + ε, having found ε before the first of the step."""
        if self._window_position == 0:
            self._find_ascent(model, self._window or [inputs], num_items_in_batch)
        with Perturbation(*self._ascent):
            return super().training_step(model, inputs, num_items_in_batch)

    def _find_ascent(self, model: nn.Module, window: list[Any], num_items: Any) -> None:
        # Neither at W + ε nor one of the step's task passes.
        reached, gradients = gradients_of(
            self.passes, lambda: self._backward_of_task(model, window, num_items)
        )
        self._ascent = (reached, gradients, step_of_length(self._radius, gradients))
