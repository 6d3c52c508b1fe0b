"""Lisa: steps of alignment and of the task in turn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sap_fast.baselines.plain import PlainTrainer


class LisaTrainer(PlainTrainer):
    """Lisa: some steps on refusals, then some on the task, each held near where the other ended.

    Huang et al. 2024 (arXiv:2405.18641). Steps of alignment come first. Where a state begins, the
    weights are kept as w̄, one parameter-sized buffer in the optimizer's state, and each step of
    the state adds ρ/2·‖w − w̄‖² to its loss. As in the authors' code the term is left out in the
    first tenth of the run.

    Args:
        *args: as for `SAPTrainer`.
        alignment_steps: steps on refusals, in turn with
        task_steps: steps on task rows. The authors take 100 and 900 in runs of 20,000; what counts
            in a shorter one is their ratio and how often they alternate.
        proximal: ρ.
        **kwargs: as for `SAPTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        alignment_steps: int = 100,
        task_steps: int = 900,
        proximal: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if alignment_steps < 1 or task_steps < 1:
            raise ValueError(
                f"alignment_steps={alignment_steps}, task_steps={task_steps}: expected ≥ 1"
            )
        if not proximal >= 0:
            raise ValueError(f"proximal={proximal}: expected a number ≥ 0")
        self._alignment_steps, self._task_steps = alignment_steps, task_steps
        self._proximal = proximal
        super().__init__(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one micro-batch of the state that the step is in."""
        micro_batch, step = self._window_position, self.state.global_step
        position = step % (self._alignment_steps + self._task_steps)
        aligning = position < self._alignment_steps
        if micro_batch == 0 and position in (0, self._alignment_steps):
            optimizer = self.sap_optimizer
            for parameter in optimizer.passes.trained.trainable:
                optimizer.state[parameter]["anchor"] = parameter.detach().clone()
        if aligning:
            # A mean over their own tokens: the items are those of the task rows.
            inputs, num_items_in_batch = self._answers("chosen", micro_batch), None
        loss = super().training_step(model, inputs, num_items_in_batch)
        if micro_batch == 0 and step >= 0.1 * self.state.max_steps:
            self._add_proximal_gradient()
        return loss

    @torch.no_grad()
    def _add_proximal_gradient(self) -> None:
        optimizer = self.sap_optimizer
        for parameter in optimizer.passes.trained.trainable:
            if parameter.grad is not None:
                drift = parameter - optimizer.state[parameter]["anchor"]
                parameter.grad.add_(drift, alpha=self._proximal)
