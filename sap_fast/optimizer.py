"""BlendedAdamW: AdamW that also goes down the safety loss, as a `torch.optim.Optimizer`.

The passes of a step are in `sap_fast.step.passes`, the arithmetic in `sap_fast.ops`. Here are the
parameter groups, AdamW's state, and the update at the end of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from sap_fast import ops
from sap_fast.model.probes import ProbeSet
from sap_fast.ops.reference import accumulation_dtype
from sap_fast.step.blending import Blending
from sap_fast.step.guards import refuse_sparse
from sap_fast.step.metrics import LossRecord, SAPMetrics
from sap_fast.step.passes import Safety, SafetyPasses, Stage, Task
from sap_fast.step.rules import Rule
from sap_fast.step.saving import SAPState
from sap_fast.step.trained import checked_loss


class BlendedAdamW(Optimizer):
    """AdamW on g + c·d: the task gradient g with some of the safety gradient d blended in.

    With closures, each of which runs forward and backward and returns its loss:

        optimizer.step(task, safety)

    or, for loops that own their backward:

        optimizer.inner_passes(task, safety, batch)
        with optimizer.task_pass():
            task_loss(model, batch).backward()
        optimizer.step()

    `step()` without closures is the update alone.

    Args:
        params: parameters or parameter groups; a group may set its own `lr`, `betas`, `eps` and
            `weight_decay`. `maximize`, if a group sets it, has to be the same in all: the task
            objective is ascended then, and the safety loss descended all the same.
        lr: learning rate; a 0-d tensor is accepted. Default of the paper's experiments.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        safety_weight: γ, the size of the blending. 0: plain AdamW. 0.3 by the study
            (docs/study.md).
        safety_level: blend only while the last safety pass found L_safe above this level, so that
            the blending undoes what the tuning does to L_safe and goes no further: further down lie
            refusals of harmless requests. `"auto"`: the mean over the first three safety passes.
            None: every step blends. Over ranks, the mean L_safe counts.
        rule: the coefficient c. `"blend"`: γ‖g‖/‖d‖. `"project"`: what removes the part of g that
            points at harm. `"floor"`: the smallest c ≥ 0 with which the step goes down the safety
            loss by γ‖g‖. Or a function of ‖g‖², ⟨g, d⟩ and ‖d‖² to c; see `sap_fast.step.rules`.
        direction_every: run the safety pass in every so manieth step, and in the first three, which
            find the level `"auto"`; above 1 d is kept, of large parameters in int8, a byte per
            element.
        max_grad_norm: clip the blended gradient to this global norm.
        backend: whose operations to use, `"auto"` for the fastest that can run; see `sap_fast.ops`.
        grad_scaler: the `torch.amp.GradScaler` that scales the losses of all passes, for fp16. End
            the step with `scaler.step(optimizer)` and `scaler.update()`. A gradient of any pass
            that is not finite skips the step and lowers the scale. Not kept by pickling.

    Attributes:
        passes: the passes of a step and what they find (`SafetyPasses`).

    Raises:
        ValueError: for a setting out of range, or groups that differ in `maximize`.
        RuntimeError: if a backend is named that cannot run where the parameters are.
    """

    #: Where the probe lives; `FusedSAP` sets it before this class builds the passes.
    _probe_set: ProbeSet | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        safety_weight: float = 0.3,
        safety_level: float | Literal["auto"] | None = "auto",
        rule: Rule = "blend",
        direction_every: int = 1,
        max_grad_norm: float | None = None,
        backend: str = "auto",
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if not float(value) >= 0:
                raise ValueError(f"{name}={value!r} is out of range; give a number ≥ 0")
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas[{index}]={beta!r} is out of range; give 0 ≤ beta < 1")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm!r} is out of range; give a number > 0")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": False,
        }
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self.passes = SafetyPasses(
            self.param_groups,
            self._probe_set,
            safety_weight=safety_weight,
            safety_level=safety_level,
            rule=rule,
            direction_every=direction_every,
            backend=backend,
            grad_scaler=grad_scaler,
        )
        self._read_maximize()

    @property
    def probes(self) -> ProbeSet | None:
        """The probe set; None without a probe."""
        return self.passes.probes

    @property
    def metrics(self) -> SAPMetrics:
        """Figures of the last step. Reading waits for the device; not reading costs nothing."""
        return self.passes.metrics

    # ---- the step ----

    def inner_passes(self, task: Task, safety: Safety, batch: Any = None) -> None:
        """Begin a step: run whatever is due before the task pass; see `SafetyPasses`."""
        self._read_maximize()
        self.passes.inner_passes(task, safety, batch)

    def task_pass(self) -> AbstractContextManager[LossRecord]:
        """Open the pass whose backward leaves the task gradient in `.grad`; see `SafetyPasses`."""
        return self.passes.task_pass()

    def runs_in(self, wrapped: nn.Module) -> None:
        """Make known the model as the loop calls it, wrapped; see `SafetyPasses.runs_in`."""
        self.passes.runs_in(wrapped)

    # The base class declares one overload without a closure and one with; here a second closure
    # comes in, which it cannot express. Calls that it allows mean the same.
    def step(  # type: ignore[override]
        self,
        task: Callable[..., Tensor] | None = None,
        safety: Safety | None = None,
        batch: Any = None,
        *,
        closure: Callable[[], Tensor] | None = None,
    ) -> Tensor | None:
        """Update the parameters; with closures, after all passes of the step.

        Where memory runs out in a pass, it is put back and run once more with every decoder layer
        checkpointed, which stays so; see `SafetyPasses.again_out_of_memory`. A closure may run once
        more in that step.

        Args:
            task: runs forward and backward on the task loss and returns it: `task()`, or with a
                batch `task(part)`, where `part` is the batch, or its rows for the probe. Runs once
                per probe pass and once in the task pass, on the same data each time. Clear
                gradients before `step` rather than in it: gradients that exist on entry are copied,
                to come back if the step fails.
            safety: runs forward and backward on the safety loss and returns it.
            batch: a mapping of tensors (B, …), or a list of micro-batches.
            closure: `task` by the name that PyTorch gives it: torch.distributed.checkpoint, for
                one, calls `step(closure=None)`. After `task_pass` one that returns nothing is
                called before the update: Lightning hands its hooks on in that way.

        Returns:
            The task loss of the task pass, if there was a closure.

        Raises:
            RuntimeError: inside a pass; after inner passes without a task pass; for a sparse
                gradient.
            TypeError: with one closure but not the other that is needed, with `task` under both
                of its names, for a closure that returns no loss, or after `task_pass` for one that
                does.
            ValueError: with `ProbeSet(rows=…)` below 1 and no batch.
        """
        self.passes.refuse_inside("step()")
        if closure is not None:
            if task is not None:
                raise TypeError("step(task, closure=…): closure is another name for task; give one")
            task = closure
        if task is None:
            if safety is not None:
                raise TypeError("step(safety=…) without a task closure: give both, or neither")
            self.passes.refuse_without_task_pass("step()")
            self._update()
            return None
        if safety is None:
            if self.passes.stage is Stage.DONE:
                self._update_after(task)
                return None
            if self.passes.is_active:
                raise TypeError(
                    "step(task) needs a safety closure too: step(task, safety); for plain AdamW "
                    "run backward yourself and call step()"
                )
            safety = task  # of no use: there is no safety pass
        with self.passes.given_up_on_error() as put_back:
            self.inner_passes(task if batch is not None else lambda _: task(), safety, batch)
            run = task if batch is None else partial(task, batch)
            loss = self.passes.again_out_of_memory(lambda: self._task_pass(run), put_back)
            self._update()
        return loss

    def _update_after(self, closure: Callable[[], Any]) -> None:
        """Call what is to run before the update of a step whose passes have run."""
        with torch.enable_grad():
            returned = closure()
        if returned is not None:
            raise TypeError(
                "step(task) after task_pass(): the task pass of this step has run already, and "
                "its gradients would count twice; call step() without closures"
            )
        self._update()

    def _task_pass(self, run: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad(), self.passes.task_pass(restores_gradients=False) as record:
            loss = checked_loss("task()", run())
            record(loss)
        return loss

    @torch.no_grad()
    def _update(self) -> None:
        self._read_maximize()
        passes = self.passes
        trained = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        # All state first: an update that runs out of memory half-way cannot be undone.
        for parameter in trained:
            refuse_sparse(parameter)
            self._initialize_state(parameter)
        blending = passes.blending()
        gradient_scale = self._clipping(trained, blending)
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            for part, directions in blending.directions.of(params) if blending else [(params, [])]:
                states = [self.state[parameter] for parameter in part]
                ops.adamw_blend_(
                    part,
                    [parameter.grad for parameter in part],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [state["step"] for state in states],
                    directions,
                    lr=group["lr"],
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    maximize=passes.maximize,
                    blend=blending.coefficient if blending else None,
                    gradient_scale=gradient_scale,
                    backend=passes.backend,
                )
        passes.end_step()

    def _clipping(self, trained: list[nn.Parameter], blending: Blending | None) -> Tensor | None:
        """Return the coefficient of `torch.nn.utils.clip_grad_norm_` for the blended gradient."""
        if self.max_grad_norm is None or not trained:
            return None
        if blending is None:
            gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
            square = ops.sum_squares(gradients, backend=self.passes.backend)
        else:
            square = blending.square
        return (self.max_grad_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)

    def _initialize_state(self, parameter: nn.Parameter) -> None:
        state = self.state[parameter]
        if "step" in state:
            return
        dtype = accumulation_dtype(parameter.dtype)
        state["step"] = torch.tensor(0.0, device=_step_device(parameter))
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = torch.zeros_like(
                parameter, dtype=dtype, memory_format=torch.preserve_format
            )

    # ---- groups and state ----

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see `torch.optim.Optimizer.add_param_group`.

        Raises:
            RuntimeError: inside a pass.
            ValueError: as at the construction, and nothing is added.
        """
        passes: SafetyPasses | None = vars(self).get("passes")  # not yet, for the first groups
        if passes is not None:
            passes.refuse_inside("add_param_group()")
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        added["params"] = list(dict.fromkeys(added["params"]))  # one that is listed twice, once
        if passes is not None:
            try:
                self._read_maximize()
                passes.trained.add(added["params"])
            except ValueError:
                del self.param_groups[-1]
                raise

    def _read_maximize(self) -> None:
        """Hand `maximize` of the groups on to the passes, for which there is one task objective.

        Raises:
            ValueError: if groups differ in it.
        """
        given = [group["maximize"] for group in self.param_groups]
        if len(set(given)) > 1:
            raise ValueError(
                f"maximize is {given} in the parameter groups; expected one value for all, as the "
                "direction and the probe belong to one task objective"
            )
        self.passes.maximize = given[0]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of AdamW, interchangeable with `torch.optim.AdamW`'s, and SAP's.

        That of the passes is under the key `"sap"`; see `SafetyPasses.state_dict`.

        Raises:
            RuntimeError: inside a pass.
        """
        self.passes.refuse_inside("state_dict()")
        return {**super().state_dict(), "sap": self.passes.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict`, or that of `torch.optim.AdamW`, returned.

        Moments keep their fp32, where `torch.optim.Optimizer` would round them to the dtype of the
        parameter.

        Raises:
            RuntimeError: inside a pass.
            ValueError: if parameter groups do not match, or differ in `maximize`.
        """
        self.passes.refuse_inside("load_state_dict()")
        super().load_state_dict(state_dict)
        self._read_maximize()
        saved = [identifier for g in state_dict["param_groups"] for identifier in g["params"]]
        ours = [parameter for group in self.param_groups for parameter in group["params"]]
        for identifier, parameter in zip(saved, ours, strict=True):
            if identifier not in state_dict["state"]:
                continue
            state, given = self.state[parameter], state_dict["state"][identifier]
            state["step"] = state["step"].to(_step_device(parameter))
            dtype = accumulation_dtype(parameter.dtype)
            if parameter.dtype != dtype:
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[moment] = given[moment].to(parameter.device, dtype)
        if "sap" in state_dict:
            self.passes.load_state_dict(state_dict["sap"])

    @property
    def sap_state(self) -> SAPState:
        """What the passes add to AdamW's state, for `torch.distributed.checkpoint`."""
        return SAPState(self.passes)

    def __getstate__(self) -> dict[str, Any]:
        own = {"passes": self.passes, "max_grad_norm": self.max_grad_norm}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "passes" in vars(self):
            self.passes.trained.groups = self.param_groups
        for group in self.param_groups:
            group.setdefault("maximize", False)


def _step_device(parameter: Tensor) -> torch.device:
    """Where a parameter's step counter lies: on the GPU, so that a step can be a CUDA graph."""
    return parameter.device if parameter.is_cuda else torch.device("cpu")
