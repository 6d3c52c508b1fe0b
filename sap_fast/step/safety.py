"""The safety pass: d = ∇_W L_safe, from the caller's backward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from sap_fast.ops.reference import accumulation_dtype
from sap_fast.step.direction import Direction
from sap_fast.step.guards import gradients_set_aside, refuse_sparse
from sap_fast.step.trained import Trained


def take_direction(
    direction: Direction,
    trained: Trained,
    safety: Callable[[], Tensor],
    *,
    backend: str,
    scaler: torch.amp.GradScaler | None,
) -> Tensor:
    """Run the safety pass, let `direction` hold the gradients it leaves, and return L_safe.

    Gradients that parameters hold already, and the random state, are as before afterwards.

    Raises:
        RuntimeError: if no parameter received a gradient, or one a sparse gradient.
    """
    with ExitStack() as stack:
        stack.callback(trained.random_state().restore)
        stack.enter_context(gradients_set_aside(trained.every(inside=True)))
        stack.enter_context(trained.checkpointed())
        stack.enter_context(trained.ranks.gradients_averaged())
        loss = safety()
        trained.ranks.check(trained.trainable)
        reached = [parameter for parameter in trained.trainable if parameter.grad is not None]
        if not reached:
            raise RuntimeError(
                "the safety pass left no gradient in any parameter of the optimizer: call "
                "backward() on the safety loss of the model that the optimizer trains"
            )
        for parameter in reached:
            refuse_sparse(parameter)
        gradients = [parameter.grad for parameter in reached if parameter.grad is not None]
        if any(replica.gradient_as_bucket_view for replica in trained.ranks.replicas):
            # The next pass with gradients writes to the buckets again.
            gradients = [gradient.clone() for gradient in gradients]
        scale = None
        if scaler is not None:
            dtype = accumulation_dtype(gradients[0].dtype)
            scale = scaler.scale(torch.ones((), dtype=dtype, device=gradients[0].device))
        direction.take(reached, gradients, scale, backend=backend)
    return loss
