"""What `sap_fast.integrations.axolotl` meets of Axolotl 0.19, as its sources have it."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments


class BasePlugin:
    """The methods of a plugin that Axolotl calls by name; each does nothing."""

    def register(self, cfg: dict[str, Any]) -> None: ...

    def get_input_args(self) -> str | None: ...

    def get_trainer_cls(self, cfg: Any) -> type[Trainer] | None: ...

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None: ...


@dataclass
class AxolotlTrainingArguments(TrainingArguments):
    include_tkps: bool = True


class AxolotlTrainer(Trainer):
    """Its arguments, its groups of parameters, and its counters of tokens."""

    def __init__(
        self,
        *args: Any,
        bench_data_collator: Any = None,
        eval_data_collator: Any = None,
        dataset_tags: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer_cls_and_kwargs is None:
            return super().create_optimizer()
        kind, options = self.optimizer_cls_and_kwargs
        trained = self.model if model is None else model
        params = [p for p in trained.parameters() if p.requires_grad]
        group = {"params": params, "weight_decay": self.args.weight_decay, "lr": options["lr"]}
        self.optimizer = kind([group], **options)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if self.args.include_tkps and model.training:
            if not hasattr(self.state, "tokens"):
                self.state.tokens = {"trainable": torch.zeros(1), "total": torch.zeros(1)}
            found = {
                "trainable": (inputs["labels"] != -100).sum(),
                "total": inputs["labels"].numel(),
            }
            for name, count in found.items():
                self.state.tokens[name] = self.state.tokens[name] + count
        return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)


def modules() -> dict[str, ModuleType]:
    """The modules by name."""
    contents: dict[str, dict[str, Any]] = {
        "axolotl": {},
        "axolotl.integrations": {},
        "axolotl.integrations.base": {"BasePlugin": BasePlugin},
        "axolotl.core": {},
        "axolotl.core.trainers": {"AxolotlTrainer": AxolotlTrainer},
        "axolotl.core.training_args": {"AxolotlTrainingArguments": AxolotlTrainingArguments},
        "axolotl.utils": {},
        "axolotl.utils.import_helper": {"get_cls_from_module_str": _class_by_name},
    }
    found = {name: ModuleType(name) for name in contents}
    for name, content in contents.items():
        vars(found[name]).update(content)
    return found


def _class_by_name(name: str) -> Any:
    module, _, kind = name.rpartition(".")
    return getattr(__import__(module, fromlist=[kind]), kind)
