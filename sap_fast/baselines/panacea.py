"""Panacea: a perturbation that is added after the tuning."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.baselines.plain import PlainTrainer, add_to_gradient, gradients_of, step_of_length
from sap_fast.distributed import local_shards
from sap_fast.losses import task_loss
from sap_fast.random_state import RandomState
from sap_fast.step.guards import Perturbation

#: h(W + ε) beyond it is not pushed further, as in the authors' code.
_LARGEST_HARM = 5.0


class PanaceaTrainer(PlainTrainer):
    """Panacea: tune so that a step uphill in the harmful loss helps, and take it at the end.

    Wang et al. 2025 (arXiv:2501.18100). With h the loss of harmful answers and
    ε = ρ·∇h(W)/‖∇h(W)‖, every step minimizes L_task(W) − λ·(h(W + ε) − h(W)) with ε held; the tuned
    model is W + ε, with the ε of the last step. Harmful answers are those of the safety rows, here
    affirmative openings. As in the authors' code h(W + ε) counts up to a loss of 5 only. Unlike
    there, both gradients of h are taken under the same dropout masks. A checkpoint holds W without
    ε: a run that is resumed finds ε again in its next step.

    Args:
        *args: as for `SAPTrainer`.
        radius: ρ = ‖ε‖; the authors' 1.0 by default.
        harm_weight: λ; the authors' 0.001 by default.
        **kwargs: as for `SAPTrainer`.
    """

    def __init__(
        self, *args: Any, radius: float = 1.0, harm_weight: float = 0.001, **kwargs: Any
    ) -> None:
        if not radius > 0:
            raise ValueError(f"radius={radius}: expected a number > 0")
        if not harm_weight >= 0:
            raise ValueError(f"harm_weight={harm_weight}: expected a number ≥ 0")
        self._radius, self._harm_weight = radius, harm_weight
        self._ascent: tuple[list[nn.Parameter], list[Tensor], Tensor] | None = None
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then add ε of the last step to the weights."""
        self._ascent = None
        output = super().train(*args, **kwargs)
        if self._ascent is not None:
            parameters, gradients, scale = self._ascent
            ops.perturb_swap_(local_shards(parameters), local_shards(gradients), scale)
            self._ascent = None
        return output

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one micro-batch, after the first of a step with the gradients of h."""
        first = self._window_position == 0
        loss = super().training_step(model, inputs, num_items_in_batch)
        if first:
            self._add_harm_gradients(model)
        return loss

    def _add_harm_gradients(self, model: nn.Module) -> None:
        before = RandomState({self.args.device})
        harmful = self._answers("rejected", 0)

        def backward(largest: float) -> None:
            before.restore()
            with self.accelerator.autocast():
                loss = task_loss(model, harmful)
            self.accelerator.backward(loss.clamp(max=largest))

        reached, gradients = gradients_of(self.passes, lambda: backward(math.inf))
        scale = step_of_length(self._radius, gradients)
        with torch.no_grad():
            for parameter, gradient in zip(reached, gradients, strict=True):
                add_to_gradient(parameter, gradient, self._harm_weight)
        with Perturbation(reached, gradients, scale):
            there, uphill = gradients_of(self.passes, lambda: backward(_LARGEST_HARM))
        with torch.no_grad():
            for parameter, gradient in zip(there, uphill, strict=True):
                add_to_gradient(parameter, gradient, -self._harm_weight)
        self._ascent = reached, gradients, scale
