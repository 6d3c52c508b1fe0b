"""SAP in transformers' `Trainer`, and in any subclass of it such as TRL's `SFTTrainer`."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME

from sap_fast.compatibility import create_optimizer, require
from sap_fast.losses import (
    contrastive_loss,
    difference_loss,
    joint_loss,
    refusal_loss,
    task_loss,
)
from sap_fast.model.probes import ProbeSet
from sap_fast.optimizer import BlendedAdamW
from sap_fast.sap import FusedSAP

SafetyLoss = Callable[..., Tensor]
_SAFETY_LOSSES: dict[str, SafetyLoss] = {
    "contrastive": contrastive_loss,
    "difference": difference_loss,
    "refusal": refusal_loss,
    "joint": joint_loss,
}


class _Method(NamedTuple):
    optimizer: type[BlendedAdamW]
    safety_loss: str
    """by the study (docs/study.md)"""


_METHODS = {"sap": _Method(FusedSAP, "contrastive"), "blend": _Method(BlendedAdamW, "joint")}


# Where TRL's trainers keep what their `compute_loss` records.
_FIGURES_OF_TRL = ("_metrics", "_total_train_tokens")

# Long enough to sort well, short enough that batches differ from round to round (transformers'
# length-grouped sampler sorts up to 50 batches).
_BATCHES_SORTED_TOGETHER = 16


class SafetyBatches:
    """The rows of every safety pass: all rows in random order, again and again.

    The rows of pass t follow from the seed and t alone, so that a resumed run needs no saved
    position to go on with the rows it would have had. Rows of about the same length come together,
    for less padding, where the dataset has rows as `sap_fast.data.load_safety_dataset` makes them.

    Args:
        dataset: safety rows, indexable.
        batch_size: rows per safety pass and rank.
        seed: seed of the order.
    """

    def __init__(self, dataset: Any, batch_size: int, seed: int) -> None:
        if len(dataset) == 0:
            raise ValueError("safety_dataset is empty; give at least one row")
        if batch_size < 1:
            raise ValueError(f"safety_batch_size={batch_size} is out of range; give a number ≥ 1")
        self._dataset, self._batch_size, self._seed = dataset, batch_size, seed
        self._round = (-1, 0)
        self._order: list[int] = []

    def rows(self, step: int, rank: int = 0, ranks: int = 1) -> list[Any]:
        """Return the rows that `rank` of `ranks` sees in safety pass number `step`."""
        together = self._batch_size * ranks
        first = step * together + rank * self._batch_size
        return [self._dataset[self._index(first + k, together)] for k in range(self._batch_size)]

    def _index(self, position: int, together: int) -> int:
        round_, place = divmod(position, len(self._dataset))
        if self._round != (round_, together):
            generator = torch.Generator().manual_seed(self._seed + round_)
            order = torch.randperm(len(self._dataset), generator=generator).tolist()
            self._order = self._by_length(order, together, generator)
            self._round = round_, together
        return self._order[place]

    def _by_length(self, order: list[int], together: int, generator: torch.Generator) -> list[int]:
        """Sort stretches of a random order by length, and shuffle the batches they make up."""
        stretch = _BATCHES_SORTED_TOGETHER * together
        batches: list[list[int]] = []
        for start in range(0, len(order), stretch):
            rows = sorted(order[start : start + stretch], key=lambda row: self._length(row))
            cut = [rows[k : k + together] for k in range(0, len(rows), together)]
            batches += [cut[k] for k in torch.randperm(len(cut), generator=generator).tolist()]
        return [row for batch in batches for row in batch]

    def _length(self, index: int) -> int:
        row = self._dataset[index]
        try:
            return max(len(row[answer]["input_ids"]) for answer in ("chosen", "rejected"))
        except (TypeError, KeyError):
            return 0  # rows of a form that only their collator knows


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """Return the newest checkpoint in a trainer's output folder that was written to its end.

    transformers writes into the folder that it later resumes from, its state last of all. A process
    killed meanwhile leaves one without that state, or with half of it; with
    `transformers.trainer_utils.get_last_checkpoint` the run could not be resumed.

    Args:
        folder: `TrainingArguments.output_dir`; it need not exist.

    Returns:
        The path of the checkpoint; None if there is no complete one.
    """
    checkpoints = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in Path(folder).glob("checkpoint-*")
        if path.name.removeprefix("checkpoint-").isdecimal()
    }
    for _, path in sorted(checkpoints.items(), reverse=True):
        try:
            json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError, ValueError):
            warnings.warn(f"{path} is incomplete and is not resumed from", stacklevel=2)
        else:
            return str(path)
    return None


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class SAPTrainerMixin(_Base):
    """Put in front of a `Trainer` class: `class MyTrainer(SAPTrainerMixin, SFTTrainer)`.

    The trainer's own `training_step` and `compute_loss` run in every pass, so overrides of them are
    respected. With gradient accumulation one step of SAP spans the accumulated micro-batches: one
    safety pass, probe passes over all of them, then their task passes. Gradient clipping is the
    trainer's (`TrainingArguments.max_grad_norm`), before gradient blending.

    Every log of the training loss carries the figures of `SAPMetrics` as `sap/…`.

    Args:
        *args: as for the trainer.
        safety_dataset: indexable rows for `safety_collator`.
        safety_collator: turns a list of rows into `{"chosen": batch, "rejected": batch}`, as
            `sap_fast.data.SafetyCollator` does.
        safety_batch_size: safety rows per safety pass.
        safety_loss: `"contrastive"`, `"difference"`, `"refusal"`, `"joint"`, or a function (model,
            chosen, rejected) → scalar; see `sap_fast.losses`. None: `"contrastive"` for the method
            `"sap"`, `"joint"` for `"blend"`.
        method: `"sap"` for `FusedSAP`, `"blend"` for `BlendedAdamW`.
        probe: keyword arguments for `ProbeSet`, with `"sap"`.
        sap_options: keyword arguments for the optimizer, over what `TrainingArguments` says. An
            optimizer given as `optimizers=(FusedSAP(…), …)` is used as it is instead; leave these
            and `probe` out then.
        **kwargs: as for the trainer.

    Raises:
        ValueError: without safety data or collator, for an unknown `safety_loss` or `method`, for a
            `probe` without a method that has one, for another optimizer in `TrainingArguments`, or
            for settings beside an optimizer that is given.
    """

    def __init__(
        self,
        *args: Any,
        safety_dataset: Any = None,
        safety_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        safety_batch_size: int = 4,
        safety_loss: str | SafetyLoss | None = None,
        method: Literal["sap", "blend"] = "sap",
        probe: dict[str, Any] | None = None,
        sap_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if safety_dataset is None or safety_collator is None:
            missing = "safety_dataset" if safety_dataset is None else "safety_collator"
            raise ValueError(
                f"{missing} is missing: SAP needs pairs of a safe and a harmful answer; see "
                "sap_fast.data.load_safety_dataset and SafetyCollator"
            )
        if method not in _METHODS:
            raise ValueError(f"method={method!r} is not known; choose one of {', '.join(_METHODS)}")
        if probe and method != "sap":
            raise ValueError(f"probe={probe!r} with method={method!r}, which has no probe")
        if safety_loss is None:
            safety_loss = _METHODS[method].safety_loss
        if isinstance(safety_loss, str) and safety_loss not in _SAFETY_LOSSES:
            raise ValueError(
                f"safety_loss={safety_loss!r} is not known; choose one of "
                f"{', '.join(_SAFETY_LOSSES)}, or give a function"
            )
        self._safety_loss = (
            _SAFETY_LOSSES[safety_loss] if isinstance(safety_loss, str) else safety_loss
        )
        self._safety_collator = safety_collator
        self._method, self._probe = method, dict(probe or {})
        self._sap_options = dict(sap_options or {})
        self._window: list[Any] = []
        self._window_position = 0
        super().__init__(*args, **kwargs)
        if self.optimizer is None:
            self._refuse_other_optimizers()
        elif self._probe or self._sap_options:
            raise ValueError(
                f"probe={self._probe} and sap_options={self._sap_options} have no effect on an "
                "optimizer that is given: leave them out, or leave optimizers= out"
            )
        self._safety_batches = SafetyBatches(safety_dataset, safety_batch_size, self.args.seed)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(base.__module__.startswith("trl.") for base in cls.__mro__):
            require("trl")

    def _refuse_other_optimizers(self) -> None:
        """Raise for a choice of an optimizer that the update of SAP would overrule."""
        default = next(f.default for f in dataclasses.fields(self.args) if f.name == "optim")
        # PyTorch's AdamW is what the update is, beside SAP.
        accepted = {getattr(default, "value", default), "adamw_torch", "adamw_torch_fused"}
        chosen = getattr(self.args.optim, "value", self.args.optim)
        if chosen not in accepted:
            what = f"optim={chosen!r}"
        elif self.optimizer_cls_and_kwargs is not None:
            what = f"optimizer_cls_and_kwargs with {self.optimizer_cls_and_kwargs[0].__name__}"
        else:
            return
        name = _METHODS[self._method].optimizer.__name__
        raise ValueError(
            f"{what}, but the trainer updates with {name}, which is AdamW with SAP: leave it out, "
            "or run SafetyPasses with that optimizer in a loop of your own "
            "(examples/any_optimizer.py)"
        )

    @property
    def probe_set(self) -> ProbeSet | None:
        """The probe set, once there is an optimizer; None without a probe."""
        return None if self.optimizer is None else self.sap_optimizer.probes

    @property
    def sap_optimizer(self) -> BlendedAdamW:
        """The `FusedSAP` or `BlendedAdamW` under whatever the trainer wrapped around it.

        Raises:
            TypeError: if the trainer's optimizer is another one.
        """
        optimizer: Any = self.optimizer
        while not isinstance(optimizer, BlendedAdamW):
            if not hasattr(optimizer, "optimizer"):
                raise TypeError(
                    f"the trainer's optimizer is of {type(optimizer).__name__}, neither FusedSAP "
                    "nor BlendedAdamW; leave optimizers= out, or give one of these"
                )
            optimizer = optimizer.optimizer
        return optimizer

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Train; with `resume_from_checkpoint=True` from the last *complete* checkpoint.

        Raises:
            ValueError: with `resume_from_checkpoint=True`, if there is none.
        """
        if resume_from_checkpoint is True:
            assert self.args.output_dir is not None  # TrainingArguments fills it in
            resume_from_checkpoint = last_complete_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True: {self.args.output_dir} has no complete "
                    "checkpoint; give resume_from_checkpoint=None to start anew"
                )
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build `FusedSAP` or `BlendedAdamW` on the trainer's parameter groups."""
        if self.optimizer is None:
            trained_model: Any = self.model if model is None else model
            settings = {
                "lr": self.args.learning_rate,
                "betas": (self.args.adam_beta1, self.args.adam_beta2),
                "eps": self.args.adam_epsilon,
                "grad_scaler": self.accelerator.scaler,
            }
            if self._method == "sap":
                settings["probes"] = ProbeSet(trained_model, **self._probe)
            optimizer = _METHODS[self._method].optimizer
            self.optimizer_cls_and_kwargs = (optimizer, settings | self._sap_options)
        return create_optimizer(super().create_optimizer, model)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Fetch the micro-batches of the next step, and remember them for the probe passes."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        # Once and not in each pass: all passes see the same tensors on the device.
        samples = [self._prepare_inputs(micro_batch) for micro_batch in samples]
        self._window, self._window_position = samples, 0
        return samples, items

    def compute_safety_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the safety loss of a batch of `safety_collator`; override for another one."""
        with self.accelerator.autocast():
            return self._safety_loss(model, inputs["chosen"], inputs["rejected"])

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run the task pass of one micro-batch; before the first of a step, the other passes."""
        optimizer = self.sap_optimizer
        if self._window_position == 0:
            optimizer.runs_in(model)
            window = self._window or [inputs]
            with self._figures_set_aside():
                self._run_inner_passes(optimizer, model, window, num_items_in_batch)
        self._window_position += 1
        with optimizer.task_pass() as record:
            loss = super().training_step(model, inputs, num_items_in_batch)
            record(loss)
        return loss

    def _run_inner_passes(
        self, optimizer: BlendedAdamW, model: nn.Module, window: list[Any], num_items: Any
    ) -> None:
        passes = optimizer.passes

        def task(part: list[Any]) -> Tensor:
            items = num_items
            # Asked of the setting and not of the part: to count is to wait for the other ranks.
            if optimizer.probes is not None and optimizer.probes.rows < 1 and items is not None:
                items = self._get_num_items_in_batch(part, self.args.device)
            # What a loss is divided by that no number of items scales.
            self.current_gradient_accumulation_steps = len(part)
            try:
                return self._backward_of_task(model, part, items)
            finally:
                self.current_gradient_accumulation_steps = len(window)

        # A figure for the log, which costs a pass over the weights; other steps go without.
        passes.measures_rounding = self._logs_after_this_step()
        passes.keeps_direction = self._keeps_direction()
        optimizer.inner_passes(
            task, lambda: self._backward_of_safety(model, passes.direction.taken), window
        )

    def _backward_of_task(self, model: nn.Module, batches: list[Any], num_items: Any) -> Tensor:
        """Run the trainer's own step on micro-batches, not in the task pass; return L_task."""
        losses = []
        for micro_batch in batches:
            losses.append(super().training_step(model, micro_batch, num_items))
        return torch.stack(losses).sum()

    def _backward_of_safety(self, model: nn.Module, number: int) -> Tensor:
        """Run forward and backward on the rows of safety pass `number`; return L_safe."""
        model.train()
        rows = self._safety_batches.rows(number, self.args.process_index, self.args.world_size)
        loss = self.compute_safety_loss(model, self._prepare_inputs(self._safety_collator(rows)))
        self.accelerator.backward(loss)
        return loss.detach()

    def _keeps_direction(self) -> bool:
        """Say whether the step keeps its direction to its end, for a method that looks at it."""
        return False

    @contextmanager
    def _figures_set_aside(self) -> Iterator[None]:
        """Keep inner passes out of TRL's figures: its `num_tokens` counts every token once."""
        kept = {name: getattr(self, name) for name in _FIGURES_OF_TRL if hasattr(self, name)}
        try:
            for name, figures in kept.items():
                setattr(self, name, copy.deepcopy(figures))
            yield
        finally:
            for name, figures in kept.items():
                setattr(self, name, figures)

    def _logs_after_this_step(self) -> bool:
        if self.args.logging_strategy != "steps":
            return False
        step = self.state.global_step + 1
        first = self.args.logging_first_step and step == 1
        return first or step % max(1, int(self.state.logging_steps)) == 0

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the random state of this rank, and wait for that of the others.

        The state of the trainer is written after it, and says that a checkpoint is complete.
        """
        super()._save_rng_state(output_dir)
        if self.args.world_size > 1:
            dist.barrier()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures of the last SAP step to logs of the training loss."""
        if "loss" in logs:
            logs |= self.sap_optimizer.metrics.flat()
        super().log(logs, start_time)


class SAPTrainer(SAPTrainerMixin, Trainer):
    """transformers' `Trainer` with SAP, and with a task loss that never builds full logits.

    Arguments are those of `SAPTrainerMixin` and `transformers.Trainer`.
    """

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return `task_loss`; the trainer's own loss where outputs or another loss are wanted."""
        own_loss = self.compute_loss_func is not None or self.label_smoother is not None
        if return_outputs or own_loss or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self.accelerator.autocast():
            loss = task_loss(model, inputs, num_items=num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The items are those of all ranks, and the gradients are averaged over ranks.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss
