"""Gradients computed by hand, for the baselines to be held to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from sap_fast import task_loss
from sap_fast.data import SafetyCollator
from tests.trainers import BeforeEachUpdate, arguments, model, trainer_of

ACCUMULATED = 2


def plain_trainer(kind: type[Trainer], folder: Path, **options: Any) -> Any:
    """Full parameters, no dropout, no clipping, micro-batches."""
    args = arguments(folder, gradient_accumulation_steps=ACCUMULATED, max_grad_norm=0.0)
    return trainer_of(kind, model(lora=False), args, safety_batch_size=2, **options)


def window_loss(tuned: nn.Module, window: list[Any]) -> Tensor:
    """The mean over all scored tokens of the micro-batches."""
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in window)
    return sum(task_loss(tuned, batch, num_items=items) for batch in window)


def gradient(tuned: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(tuned.parameters())))


def refusal_loss(trainer: Any, step: int) -> Tensor:
    """The mean over the micro-batches of a step of the loss of their refusals."""
    numbers = range(ACCUMULATED * step, ACCUMULATED * (step + 1))
    batches = [SafetyCollator(0)(trainer._safety_batches.rows(number)) for number in numbers]
    losses = [task_loss(trainer.model, batch["chosen"]) for batch in batches]
    return torch.stack(losses).mean()


def check_gradients(trainer: Any, expected: Callable[[int], list[Tensor]]) -> None:
    """Train, and hold the gradients of every step to those that `expected` gives."""
    seen = []

    def look(step: int) -> None:
        actual = [parameter.grad.clone() for parameter in trainer.model.parameters()]
        torch.testing.assert_close(actual, expected(step), rtol=1e-4, atol=1e-6)
        seen.append(step)

    trainer.add_callback(BeforeEachUpdate(look))
    trainer.train()
    assert seen == list(range(trainer.args.max_steps))
