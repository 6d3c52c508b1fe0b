"""SAP in transformers' `Trainer`, and in any subclass of it such as TRL's `SFTTrainer`."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from sap_fast.compatibility import checkpoint_without_reentry, create_optimizer, require
from sap_fast.integrations.beside import (
    checked_optimizer,
    refuse_updates_in_backward,
    run_beside,
)
from sap_fast.integrations.checkpoints import last_complete_checkpoint
from sap_fast.integrations.safety_batches import SafetyBatches
from sap_fast.losses import (
    contrastive_loss,
    difference_loss,
    joint_loss,
    kl_loss,
    refusal_loss,
    task_loss,
)
from sap_fast.losses.host import carry_views
from sap_fast.model.probes import ProbeSet
from sap_fast.optimizer import BlendedAdamW
from sap_fast.sap import FusedSAP
from sap_fast.step.passes import SafetyPasses

SafetyLoss = Callable[..., Tensor]
SAFETY_LOSSES: dict[str, SafetyLoss] = {
    "contrastive": contrastive_loss,
    "difference": difference_loss,
    "refusal": refusal_loss,
    "joint": joint_loss,
    "kl": kl_loss,
}


class _Method(NamedTuple):
    optimizer: type[BlendedAdamW]
    safety_loss: str
    """by the study (docs/study.md)"""


METHODS = {"sap": _Method(FusedSAP, "contrastive"), "blend": _Method(BlendedAdamW, "joint")}


# Where trainers keep what their `compute_loss` records: TRL's, ms-swift's, and Axolotl's as
# `sap_fast.integrations.axolotl` has them.
_FIGURES_OF_TRL = ("_metrics", "_total_train_tokens", "custom_metrics", "_tokens_seen")

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

    The update is that of `FusedSAP` or `BlendedAdamW` where `TrainingArguments` ask for an AdamW of
    PyTorch, and else that of the optimizer that they, `optimizer_cls_and_kwargs` or `optimizers`
    say: the passes run beside it. So they do beside DeepSpeed, which clips after the blending.

    Every log of the training loss carries the figures of `SAPMetrics` as `sap/…`.

    Args:
        *args: as for the trainer.
        safety_dataset: indexable rows for `safety_collator`.
        safety_collator: turns a list of rows into `{"chosen": batch, "rejected": batch}`, as
            `sap_fast.data.SafetyCollator` does.
        safety_batch_size: safety rows per safety pass.
        safety_loss: `"contrastive"`, `"difference"`, `"refusal"`, `"joint"`, `"kl"`, or a function
            (model, chosen, rejected) → scalar; see `sap_fast.losses`. None: `"contrastive"` for the
            method `"sap"`, `"joint"` for `"blend"`.
        method: `"sap"` for the passes of `FusedSAP`, `"blend"` for those of `BlendedAdamW`.
        probe: keyword arguments for `ProbeSet`, with `"sap"`.
        sap_options: keyword arguments for the optimizer, over what `TrainingArguments` says; beside
            another optimizer those of `SafetyPasses`. A `FusedSAP` or `BlendedAdamW` given in
            `optimizers` is used as it is; leave these and `probe` out then.
        **kwargs: as for the trainer.

    Raises:
        ValueError: without safety data or collator, for an unknown `safety_loss` or `method`, for a
            `probe` without a method that has one, for an optimizer that updates inside of backward,
            for options of an update that another optimizer makes, for settings beside a `FusedSAP`
            or `BlendedAdamW` that is given, or for a rival under DeepSpeed.
        TypeError: for an optimizer that is no `torch.optim.Optimizer`.
    """

    #: Whether the method is in the passes alone, and reads no gradients by itself.
    _runs_beside_deepspeed = True

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
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not known; choose one of {', '.join(METHODS)}")
        if probe and method != "sap":
            raise ValueError(f"probe={probe!r} with method={method!r}, which has no probe")
        if safety_loss is None:
            safety_loss = METHODS[method].safety_loss
        if isinstance(safety_loss, str) and safety_loss not in SAFETY_LOSSES:
            raise ValueError(
                f"safety_loss={safety_loss!r} is not known; choose one of "
                f"{', '.join(SAFETY_LOSSES)}, or give a function"
            )
        self._safety_loss = (
            SAFETY_LOSSES[safety_loss] if isinstance(safety_loss, str) else safety_loss
        )
        self._safety_collator = safety_collator
        self._method, self._probe = method, dict(probe or {})
        self._sap_options = dict(sap_options or {})
        self._window: list[Any] = []
        self._window_position = 0
        self._passes: SafetyPasses | None = None
        super().__init__(*args, **kwargs)
        checkpoint_without_reentry(self.args)
        self._other_update = self._find_other_update()
        if self._other_update is not None:
            self._refuse_options_of_the_update(self._other_update)
            if self.optimizer is not None and not self.is_deepspeed_enabled:
                self._run_beside(self.model)
        elif self.optimizer is not None and (self._probe or self._sap_options):
            raise ValueError(
                f"probe={self._probe} and sap_options={self._sap_options} have no effect on an "
                "optimizer that is given: leave them out, or leave optimizers= out"
            )
        self._safety_batches = SafetyBatches(safety_dataset, safety_batch_size, self.args.seed)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(base.__module__.startswith("trl.") for base in cls.__mro__):
            require("trl")

    def _find_other_update(self) -> str | None:
        """Say who makes the update, if it is none of this package's optimizers."""
        if self.is_deepspeed_enabled:
            if not self._runs_beside_deepspeed:
                raise ValueError(
                    f"{type(self).__name__} reads the gradients of parameters, where DeepSpeed "
                    "leaves none; train it without DeepSpeed"
                )
            return "DeepSpeed's ZeRO"
        if self.optimizer is not None:
            given = _unwrapped(self.optimizer)
            name = type(given).__name__
            return None if isinstance(given, BlendedAdamW) else f"optimizers=({name}(…), …)"
        if self.optimizer_cls_and_kwargs is not None:
            return f"optimizer_cls_and_kwargs=({self.optimizer_cls_and_kwargs[0].__name__}, …)"
        default = next(f.default for f in dataclasses.fields(self.args) if f.name == "optim")
        # PyTorch's AdamW is what the update is, beside SAP.
        own = {getattr(default, "value", default), "adamw_torch", "adamw_torch_fused"}
        chosen = str(getattr(self.args.optim, "value", self.args.optim))
        refuse_updates_in_backward(chosen)
        return None if chosen in own else f"optim={chosen!r}"

    def _refuse_options_of_the_update(self, other: str) -> None:
        accepted = inspect.signature(SafetyPasses).parameters
        unknown = sorted(set(self._sap_options) - set(accepted))
        if unknown:
            raise ValueError(
                f"sap_options={self._sap_options}: {', '.join(unknown)} would be of an update that "
                f"another optimizer makes, {other}; say it there. Beside it SafetyPasses takes "
                "safety_weight, safety_level, rule, direction_every and backend"
            )

    def _run_beside(self, model: Any) -> None:
        """Run the passes beside the optimizer that there is."""
        optimizer = checked_optimizer(_unwrapped(self.optimizer))
        probes, options = self._settings_of_passes(model)
        options = {"grad_scaler": self.accelerator.scaler} | options
        self._passes = SafetyPasses(optimizer.param_groups, probes, **options)
        run_beside(optimizer, self._passes)

    def _settings_of_passes(self, model: Any) -> tuple[ProbeSet | None, dict[str, Any]]:
        """Return the probe set and the options of passes that run beside another update."""
        options = dict(self._sap_options)
        for name in ("safety_weight", "safety_level"):
            default = inspect.signature(METHODS[self._method].optimizer).parameters[name].default
            options.setdefault(name, default)
        return ProbeSet(model, **self._probe) if self._method == "sap" else None, options

    @property
    def deepspeed(self) -> Any:
        """DeepSpeed's engine, once there is one; None without DeepSpeed."""
        return self._engine

    # Trainer sets it as soon as the engine is there, and loads a checkpoint after that: the state
    # of the passes is in the checkpoint.
    @deepspeed.setter
    def deepspeed(self, engine: Any) -> None:
        self._engine = engine
        if engine is None or self.optimizer is None:  # for evaluation there is no optimizer
            return
        # Not above: most who train have no DeepSpeed.
        from sap_fast.integrations.deepspeed import ZeroPasses

        if self._passes is not None and self._passes.probes is not None:
            self._passes.probes.detach()  # those of an earlier call of train()
        probes, options = self._settings_of_passes(self.model)
        self._passes = ZeroPasses(engine, probes, **options)

    @property
    def probe_set(self) -> ProbeSet | None:
        """The probe set, once there is an optimizer; None without a probe."""
        return None if self.optimizer is None else self.passes.probes

    @property
    def passes(self) -> SafetyPasses:
        """The passes of a step and what they find, once there is an optimizer."""
        return self.sap_optimizer.passes if self._passes is None else self._passes

    @property
    def sap_optimizer(self) -> BlendedAdamW:
        """The `FusedSAP` or `BlendedAdamW` under whatever the trainer wrapped around it.

        Raises:
            TypeError: if the update is made by another optimizer.
        """
        optimizer = _unwrapped(self.optimizer)
        if not isinstance(optimizer, BlendedAdamW):
            raise TypeError(
                f"the trainer's optimizer is of {type(optimizer).__name__}, neither FusedSAP nor "
                "BlendedAdamW; trainer.passes are the passes that run beside it"
            )
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
        """Build `FusedSAP` or `BlendedAdamW`, or another optimizer and the passes beside it."""
        if self.optimizer is not None:
            return create_optimizer(super().create_optimizer, model)
        trained_model: Any = self.model if model is None else model
        if self._other_update is not None:
            optimizer = create_optimizer(super().create_optimizer, model)
            if not self.is_deepspeed_enabled:
                self._run_beside(trained_model)
            return optimizer
        settings = {
            "lr": self.args.learning_rate,
            "betas": (self.args.adam_beta1, self.args.adam_beta2),
            "eps": self.args.adam_epsilon,
            "grad_scaler": self.accelerator.scaler,
        }
        if self._method == "sap":
            settings["probes"] = ProbeSet(trained_model, **self._probe)
        own = METHODS[self._method].optimizer
        self.optimizer_cls_and_kwargs = (own, settings | self._sap_options)
        optimizer = create_optimizer(super().create_optimizer, model)
        if not isinstance(_unwrapped(optimizer), BlendedAdamW):
            # A trainer that asks nobody: LLaMA-Factory's has LoRA+, GaLore and others of its own.
            if self._method == "sap":
                settings["probes"].detach()
            self._other_update = f"{type(optimizer).__name__} of {type(self).__name__}"
            self._refuse_options_of_the_update(self._other_update)
            self._run_beside(trained_model)
        return optimizer

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Fetch the micro-batches of the next step, and remember them for the probe passes."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        # Once and not in each pass: all passes see the same tensors on the device.
        samples = [self._to_device(micro_batch) for micro_batch in samples]
        self._window, self._window_position = samples, 0
        return samples, items

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Bring a batch to the device, and keep of it what the losses would have to copy back."""
        prepared = super()._prepare_inputs(inputs)
        carry_views(inputs, prepared)
        return prepared

    def _to_device(self, inputs: Any) -> Any:
        """Return a batch on the device; `training_step` prepares task batches once more."""
        return self._prepare_inputs(inputs)

    def compute_safety_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the safety loss of a batch of `safety_collator`; override for another one."""
        with self.accelerator.autocast():
            return self._safety_loss(model, inputs["chosen"], inputs["rejected"])

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run the task pass of one micro-batch; before the first of a step, the other passes."""
        passes = self.passes
        if self._window_position == 0:
            self._enter_training()
            passes.runs_in(model)
            window = self._window or [inputs]
            with self._figures_set_aside():
                self._run_inner_passes(passes, model, window, num_items_in_batch)
        self._window_position += 1
        return passes.again_out_of_memory(
            lambda: self._task_pass(passes, model, inputs, num_items_in_batch)
        )

    def _task_pass(
        self, passes: SafetyPasses, model: nn.Module, inputs: Any, num_items: Any
    ) -> Tensor:
        with self._figures_set_aside(on_error=True), passes.task_pass() as record:
            loss = super().training_step(model, inputs, num_items)
            record(loss)
        return loss

    def _enter_training(self) -> None:
        """Let a schedule-free optimizer put its own weights into the model before any pass."""
        train = getattr(self.optimizer, "train", None)
        if callable(train):
            train()

    def _run_inner_passes(
        self, passes: SafetyPasses, model: nn.Module, window: list[Any], num_items: Any
    ) -> None:
        def task(part: list[Any]) -> Tensor:
            items = num_items
            # Asked of the setting and not of the part: to count is to wait for the other ranks.
            if passes.probes is not None and passes.probes.rows < 1 and items is not None:
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
        passes.inner_passes(
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
        loss = self.compute_safety_loss(model, self._to_device(self._safety_collator(rows)))
        # As the trainer does: the loss is that of the step, not of one of its micro-batches.
        scaling = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **scaling)
        return loss.detach()

    def _keeps_direction(self) -> bool:
        """Say whether the step keeps its direction to its end, for a method that looks at it."""
        return False

    @contextmanager
    def _figures_set_aside(self, *, on_error: bool = False) -> Iterator[None]:
        """Keep inner passes out of TRL's figures: its `num_tokens` counts every token once.

        Args:
            on_error: only if the body fails, as a task pass may that runs again.
        """
        kept = {name: getattr(self, name) for name in _FIGURES_OF_TRL if hasattr(self, name)}
        done = False
        try:
            for name, figures in kept.items():
                setattr(self, name, copy.deepcopy(figures))
            yield
            done = on_error
        finally:
            for name, figures in kept.items():
                if not done:
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
            logs |= self.passes.metrics.flat()
        super().log(logs, start_time)


def _unwrapped(optimizer: Any) -> Any:
    """Return the optimizer inside what Accelerate wrapped around it."""
    while not isinstance(optimizer, BlendedAdamW) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


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
