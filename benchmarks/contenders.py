"""The configurations whose steps are compared, each with a model of its own.

* `hf_adamw`: transformers' `Trainer` with its own loss and `adamw_torch`.
* `floor`: the same with `task_loss`, which never builds full logits.
* `blend`, `sap` and what begins with it: `SAPTrainer` with that recipe of `benchmarks.workloads`.
* `published`: the authors' released procedure, through full logits, every row padded to the maximum
  length.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from benchmarks import full_logits
from benchmarks.measuring import seconds_of
from benchmarks.workloads import (
    RECIPES,
    RHO,
    SAFETY_PAIRS,
    THREADS,
    Batch,
    Case,
    Data,
    Model,
    recipe_of,
    trained_parameters,
)
from sap_fast import BlendedAdamW, ProbeSet, contrastive_loss, task_loss
from sap_fast.baselines.published import published_step
from sap_fast.data import SafetyCollator, TaskCollator
from sap_fast.integrations.safety_batches import SafetyBatches
from sap_fast.integrations.trainer import SAPTrainer
from sap_fast.model.layers import find_decoder_layers

CONFIGURATIONS = ("hf_adamw", "floor", *RECIPES, "published")
#: Seed of `TrainingArguments`, from which the order of the safety rows follows.
SEED = 42


class Run(Protocol):
    """A configuration with a model of its own."""

    sizes: ForwardSizes

    def prepare(self, rows: Sequence[Any]) -> Any:
        """Return the batch of these rows: what a data loader does, and is not timed."""

    def step(self, batch: Any) -> None:
        """Train on a batch."""


#: The passes of a step, by their number: it may do without safety pass or probe passes.
PASSES = {
    1: ("task",),
    2: ("safety", "task"),
    3: ("probe", "probe", "task"),
    4: ("safety", "probe", "probe", "task"),
}


def wrap_forward(module: nn.Module, around: Callable[..., Any]) -> Callable[[], None]:
    """Let `around(forward, *args, **kwargs)` run in the place of a module's forward.

    Not as a hook: that of a stranger might read rows, so that the losses would not pack them.

    Returns:
        What undoes it.
    """
    kind = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return around(partial(kind.forward, self), *args, **kwargs)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return partial(setattr, module, "__class__", kind)


class ForwardSizes:
    """Rows and length of every forward through the decoder, packed or padded as it met them.

    Args:
        model: whose decoder.
        passes: in the order of their forwards, by the number of these in a step.
    """

    def __init__(self, model: Model, passes: Mapping[int, Sequence[str]] = PASSES) -> None:
        _, owner = find_decoder_layers(model)
        self.steps: list[list[tuple[int, int]]] = []
        self._passes = passes
        wrap_forward(owner, self._note)

    def _note(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"][..., 0]
        if self.steps:
            self.steps[-1].append(tuple(tokens.shape))
        return forward(*args, **kwargs)

    _note.reads_no_rows = True  # type: ignore[attr-defined]

    def by_pass(self) -> dict[str, list[tuple[int, int]]]:
        """Return the sizes by pass."""
        found: dict[str, list[tuple[int, int]]] = {"safety": [], "probe": [], "task": []}
        for step in self.steps:
            for name, size in zip(self._passes[len(step)], step, strict=True):
                found[name].append(size)
        return found


class FloorTrainer(Trainer):
    """`Trainer` with the loss of `SAPTrainer`."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return `task_loss`."""
        with self.accelerator.autocast():
            return task_loss(model, inputs, num_items=num_items_in_batch)


class TrainerRun:
    """A trainer, driven step by step as its `train` does it.

    Args:
        name: one of `CONFIGURATIONS` other than `"published"`.
        model: what it trains.
        data: whose rows it trains on.
        bf16: `TrainingArguments(bf16=True)`.
        checkpointing: `"none"` or `"layers"`.
        pairs: safety pairs of a step.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        data: Data,
        *,
        bf16: bool,
        checkpointing: str = "none",
        pairs: int = SAFETY_PAIRS,
    ) -> None:
        self.sizes = ForwardSizes(model)
        self._data = data
        recipe = recipe_of(name)
        self._folder = tempfile.TemporaryDirectory()
        arguments = TrainingArguments(
            output_dir=self._folder.name,
            bf16=bf16,
            use_cpu=True,
            **({} if recipe else {"optim": "adamw_torch"}),
            learning_rate=1e-5,
            max_steps=1,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=SEED,
        )
        common: dict[str, Any] = {
            "model": model,
            "args": arguments,
            "train_dataset": data.task,
            "data_collator": data.batch,
        }
        if recipe is not None:
            self.trainer: Trainer = SAPTrainer(
                **common,
                safety_dataset=data.safety,
                safety_collator=data.pairs,
                safety_batch_size=pairs,
                method=recipe.method,
                probe={**recipe.probe, "rho": RHO, "checkpointing": checkpointing}
                if recipe.method == "sap"
                else {},
                sap_options={"direction_every": recipe.direction_every},
            )
        else:
            self.trainer = {"hf_adamw": Trainer, "floor": FloorTrainer}[name](**common)
        if checkpointing == "layers" and (recipe is None or recipe.method == "blend"):
            model.activation_checkpointing_enable()  # as `Trainer.train` does
        trainer = self.trainer
        self.optimizer: Any = trainer.create_optimizer()
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, self.optimizer)
        trainer.current_gradient_accumulation_steps = 1

    def prepare(self, rows: Sequence[Any]) -> Batch:
        """Return the batch, padded to its longest row."""
        return self._data.batch(rows)

    def step(self, batch: Batch) -> None:
        """Train on a batch: the body of the loop of `Trainer.train`."""
        trainer = self.trainer
        self.sizes.steps.append([])
        (inputs,), items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        trainer.training_step(self.model, inputs, items)
        self.update()

    def update(self) -> None:
        """Clip the gradient, update the parameters and clear the gradients."""
        trainer = self.trainer
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        assert trainer.optimizer is not None
        trainer.optimizer.step()
        self.model.zero_grad()
        trainer.state.global_step += 1

    def kept_bytes(self) -> int:
        """Return the bytes of tensors that the optimizer keeps from one step to the next."""
        states = self.optimizer.state.values()
        tensors = [value for state in states for value in state.values()]
        if isinstance(self.optimizer, BlendedAdamW):
            tensors += tree_leaves(self.optimizer.passes.direction.kept)
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class PublishedRun:
    """The authors' released procedure, on rows that are all padded to the maximum length."""

    def __init__(self, model: Model, data: Data, *, max_length: int, bf16: bool) -> None:
        self.sizes = ForwardSizes(model, {3: ("safety", "probe", "task")})
        self._collate = TaskCollator(data.padding, pad_to_multiple_of=max_length)
        self._collate_pairs = SafetyCollator(data.padding, pad_to_multiple_of=max_length)
        self._safety = SafetyBatches(data.safety, SAFETY_PAIRS, SEED)
        self._model, self._bf16 = model.train(), bf16
        self._trained = trained_parameters(model)
        self._probes = ProbeSet(model)
        self._adamw = torch.optim.AdamW(self._trained, lr=1e-5)

    def prepare(self, rows: Sequence[Any]) -> Batch:
        """Return the batch, padded to the maximum length."""
        return self._collate(rows)

    def step(self, batch: Batch) -> None:
        """Train on a batch."""
        pairs = self._collate_pairs(self._safety.rows(len(self.sizes.steps)))
        self.sizes.steps.append([])

        def backward(loss: Callable[[], Tensor]) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
                value = loss()
            value.backward()
            return value.detach()

        published_step(
            self._model,
            self._trained,
            self._probes,
            partial(backward, lambda: self._model(**batch).loss),
            partial(backward, partial(full_logits.contrastive_loss, self._model, **pairs)),
        )
        self._adamw.step()
        self._adamw.zero_grad()


class PassesAlone:
    """The passes of `sap`, each as plain autograd does it, and the fused update: for claim 3.

    The same losses through the same `Trainer`; in the probe pass the parameters are frozen and a
    vector that requires grad is added to every probed layer's output.
    """

    def __init__(self, model: Model, data: Data, *, bf16: bool) -> None:
        self._run = TrainerRun("floor", model, data, bf16=bf16)
        self.sizes = self._run.sizes
        self._trained = trained_parameters(model)
        adamw = BlendedAdamW(self._trained, lr=1e-5, safety_weight=0.0)
        self._run.optimizer = self._run.trainer.optimizer = adamw
        self._layers = probed_layers(model)
        self._safety = SafetyBatches(data.safety, SAFETY_PAIRS, SEED)
        self._data = data
        self.seconds: dict[str, list[float]] = {
            name: [] for name in ("safety pass", "probe pass", "task pass", "update")
        }

    def prepare(self, rows: Sequence[Any]) -> Batch:
        """Return the batch, padded to its longest row."""
        return self._run.prepare(rows)

    def step(self, batch: Batch) -> None:
        """Time each of the four on a batch."""
        trainer, model = self._run.trainer, self._run.model
        (inputs,), items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        rows = self._safety.rows(len(self.seconds["update"]))

        def safety() -> None:
            pairs = self._data.pairs(rows)
            with trainer.accelerator.autocast():
                loss = contrastive_loss(model, pairs["chosen"], pairs["rejected"])
            trainer.accelerator.backward(loss)

        def task() -> None:
            trainer.training_step(model, inputs, items)

        self._time("safety pass", safety)
        model.zero_grad()
        undo = []
        for parameter in self._trained:
            parameter.requires_grad_(False)
        for layer in self._layers.values():
            probe = torch.zeros(model.config.hidden_size, requires_grad=True)
            undo.append(wrap_forward(layer, partial(_add, probe)))
        self._time("probe pass", task)
        for put_back in undo:
            put_back()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._time("task pass", task)
        self._time("update", self._run.update)

    def _time(self, name: str, work: Callable[[], None]) -> None:
        self.seconds[name].append(seconds_of(work, "cpu"))

    def sums(self) -> list[float]:
        """Return, step by step, what the passes of `sap` take together: two probe passes."""
        parts = zip(*self.seconds.values(), strict=True)
        return [safety + 2 * probe + task + update for safety, probe, task, update in parts]


def _add(probe: Tensor, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    hidden = forward(*args, **kwargs)
    return hidden + probe.to(hidden.dtype)


def probed_layers(model: Model) -> dict[int, nn.Module]:
    """Return the layers that are probed by default."""
    probes = ProbeSet(model)
    probes.detach()
    return dict(probes.modules)


def build_run(case: Case, name: str) -> Run:
    """Return a configuration with a model of its own."""
    data, model, bf16 = case.data(), case.model(), case.dtype == "bf16"
    if name == "published":
        return PublishedRun(model, data, max_length=case.max_length, bf16=bf16)
    if name == "passes alone":
        return PassesAlone(model, data, bf16=bf16)
    return TrainerRun(name, model, data, bf16=bf16)


def start_case() -> None:
    """Forget the precision of the case before, which accelerate keeps per process; set threads."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(THREADS)
    gc.collect()
