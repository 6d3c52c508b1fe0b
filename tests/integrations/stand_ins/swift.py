"""What `sap_fast.integrations.swift` meets of ms-swift 4.6, as its sources have it."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from sap_fast.data import encode_turns


@dataclass
class Seq2SeqTrainingArguments(TrainingArguments):
    optimizer: str | None = None
    tuner_backend: str | None = "peft"


class Template:
    """The tokenizer's chat template, after a system prompt if one is given."""

    sequence_parallel_size = 1
    max_length = 128

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self.tokenizer, self.system = tokenizer, system

    def encode(self, inputs: dict[str, Any]) -> dict[str, list[int]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        (row,) = encode_turns(self.tokenizer, [*messages, *inputs["messages"]], None)
        return dict(row)


class OptimizerCallback:
    """Asks transformers' own method, past every override."""

    def __init__(self, args: Any, trainer: Trainer) -> None:
        self.args, self.trainer = args, trainer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        return Trainer.create_optimizer(self.trainer)


class SGDOptimizerCallback(OptimizerCallback):
    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, lr=self.args.learning_rate)


optimizers_map = {"default": OptimizerCallback, "sgd": SGDOptimizerCallback}


class Seq2SeqTrainer(Trainer):
    """Its arguments, its optimizers by name, its labels cut to what is scored, and its figures."""

    def __init__(self, model: Any, args: Any, template: Template, train_dataset: Any, **more: Any):
        self.template = template
        self.optimizer_callback = optimizers_map[args.optimizer or "default"](args, self)
        self.custom_metrics = {"train": {"tokens": 0}}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=template.tokenizer,
            **more,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        self.optimizer = self.optimizer_callback.create_optimizer(model=model)
        return self.optimizer

    def _prepare_inputs(self, inputs: Any) -> Any:
        prepared = super()._prepare_inputs(inputs)
        labels = prepared["labels"]
        kept = labels.shape[-1] - int((labels != -100).int().argmax(-1).min()) + 1
        assert "logits_to_keep" not in prepared, "prepared twice"
        return prepared | {"labels": labels[:, -kept:], "logits_to_keep": kept}

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.custom_metrics["train"]["tokens"] += int((inputs["labels"] != -100).sum())
        return super().compute_loss(model, inputs, *args, **kwargs)


def modules() -> dict[str, ModuleType]:
    """The modules by name, with a table of trainers of their own."""
    trainers = ModuleType("swift.trainers")
    trainers.Seq2SeqTrainer = Seq2SeqTrainer  # type: ignore[attr-defined]
    trainers.TrainerFactory = SimpleNamespace(  # type: ignore[attr-defined]
        TRAINER_MAPPING={
            "causal_lm": "swift.trainers.Seq2SeqTrainer",
            "seq_cls": "swift.trainers.Trainer",
            "dpo": "swift.rlhf_trainers.DPOTrainer",
        }
    )
    return {"swift": ModuleType("swift"), "swift.trainers": trainers}
