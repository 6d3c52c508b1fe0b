"""Short runs of transformers' trainers on tiny models, for the tests of all that builds on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from sap_fast.data import SafetyCollator, TaskCollator
from tests.tiny import encoded, tiny_llama, with_lora

TASK_ROWS = [encoded(seed) for seed in range(24)]
SAFETY_ROWS = [{"chosen": encoded(100 + k), "rejected": encoded(200 + k)} for k in range(7)]
#: A probe that can be seen, and no calibration.
PROBE: dict[str, Any] = {"rho": 1e-3, "size": 0.02}


def model(lora: bool = True) -> nn.Module:
    tiny = tiny_llama(layers=3)
    return with_lora(tiny, dropout=0.1) if lora else tiny


def small(lora: bool) -> nn.Module:
    """Two layers, and no dropout."""
    tiny = tiny_llama(layers=2)
    return with_lora(tiny) if lora else tiny


def arguments(folder: Path, **overrides: Any) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "learning_rate": 5e-3,
        "weight_decay": 0.1,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "use_cpu": True,
        "seed": 5,
    }
    return TrainingArguments(**(settings | overrides))


def trainer_of(
    kind: type[Trainer], tuned: nn.Module, args: TrainingArguments, **options: Any
) -> Any:
    """A trainer on the rows of this module."""
    return kind(
        model=tuned,
        args=args,
        train_dataset=TASK_ROWS,
        data_collator=TaskCollator(0),
        safety_dataset=SAFETY_ROWS,
        safety_collator=SafetyCollator(0),
        **options,
    )


def sap_trainer(
    kind: type[Trainer],
    tuned: nn.Module,
    args: TrainingArguments,
    *,
    probe: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The same, with `PROBE` where `probe` says nothing else."""
    return trainer_of(kind, tuned, args, probe=PROBE | (probe or {}), **options)


def by_length() -> dict[str, Any]:
    """Arguments that have batches of rows of about the same length."""
    known = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
    # Until transformers 5.2 a switch of its own.
    return {"train_sampling_strategy": "group_by_length"} if known else {"group_by_length": True}


class BeforeEachUpdate(TrainerCallback):
    """Calls a function once the gradients of a step are there, with its number."""

    def __init__(self, look: Callable[[int], None]) -> None:
        self.look = look

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.look(state.global_step)


def gradients(tuned: nn.Module) -> Tensor:
    """All gradients there are, as one vector."""
    return torch.cat([p.grad.flatten() for p in tuned.parameters() if p.grad is not None])
