"""What the rivals share: a trainer that runs no pass of SAP, and gradients set beside others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.integrations.trainer import SAPTrainer
from sap_fast.step.guards import gradients_set_aside
from sap_fast.step.passes import SafetyPasses


class PlainTrainer(SAPTrainer):
    """`SAPTrainer` that runs no pass of its own: AdamW, with rows of safety data at hand.

    Args:
        *args: as for `SAPTrainer`.
        sap_options: keyword arguments for `BlendedAdamW`. A `safety_weight` blends as well.
        **kwargs: as for `SAPTrainer`.
    """

    _runs_beside_deepspeed = False

    def __init__(
        self, *args: Any, sap_options: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        options = {"safety_weight": 0.0} | (sap_options or {})
        super().__init__(*args, method="blend", sap_options=options, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the task rows, while training with what the method adds to it."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        added = self._added_loss(model) if model.training else None
        if added is None:
            return loss
        if num_items_in_batch is not None:
            # The trainer divides the whole loss only where nothing else did.
            added = added / self.current_gradient_accumulation_steps
        return loss + added.to(loss.device)

    def _added_loss(self, model: nn.Module) -> Tensor | None:
        """Return what a method adds to the loss of each micro-batch; None: nothing."""
        return None

    def _answers(self, kind: Literal["chosen", "rejected"], micro_batch: int) -> Any:
        """Return safe or harmful answers of a safety batch, another one for each micro-batch."""
        number = self.state.global_step * self.args.gradient_accumulation_steps + micro_batch
        rows = self._safety_batches.rows(number, self.args.process_index, self.args.world_size)
        return self._prepare_inputs(self._safety_collator(rows)[kind])


def gradients_of(
    passes: SafetyPasses, backward: Callable[[], object]
) -> tuple[list[nn.Parameter], list[Tensor]]:
    """Return the parameters that `backward` reaches and their gradients, set beside others."""
    parameters = passes.trained.trainable
    with gradients_set_aside(parameters):
        backward()
        reached = [p for p in parameters if p.grad is not None]
        return reached, [p.grad for p in reached if p.grad is not None]


def step_of_length(length: float, gradients: list[Tensor]) -> Tensor:
    """Return the factor that gives `gradients` a joint norm of `length`; 0 if they are zero."""
    norm = ops.sum_squares(gradients).sqrt()
    return torch.where(norm == 0, 0.0, length / norm)


def add_to_gradient(parameter: Tensor, gradient: Tensor, factor: float) -> None:
    """Add a multiple of a gradient to what the parameter holds, also where that is nothing."""
    if parameter.grad is None:
        parameter.grad = factor * gradient
    else:
        parameter.grad.add_(gradient, alpha=factor)
