"""The passes of one SAP step (arXiv:2505.16737, Algorithm 1): safety, probe, task.

Each pass runs the caller's forward and backward. This file decides in which order, what the model
looks like meanwhile, and what is taken from it:

======== ================== ============== ================ =====================================
pass     weights            probe V        frozen           leaves behind
======== ================== ============== ================ =====================================
safety   W                  off            no               the safety gradient d = ∇_W L_safe
probe 1  W + ΔW             0              all of W         +∂L_task/∂V
probe 2  W − ΔW or W (1)    0              all of W         −∂L_task/∂V; then h and V
task     W                  V              no               ∇_W L_task(W, V), for the optimizer
======== ================== ============== ================ =====================================

(1) `ProbeSet(difference=…)`: `"central"` or `"forward"`.

However a pass ends (return, exception, KeyboardInterrupt), parameters, `requires_grad`, hooks and
the gradients of earlier micro-batches are bit for bit what they were. Every pass starts from the
same state of the random number generators, so all see the same dropout masks; only the task pass
moves it on, as plain training would.

A step leaves out what it does not need. A direction that is fresh enough (`direction_every`) is not
taken again, and while L_safe is not above `safety_level` the step is that of plain AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from sap_fast.model.probes import ProbeSet
from sap_fast.step.blending import Blending, add_to_gradients, find_blending
from sap_fast.step.calibration import Calibration
from sap_fast.step.guards import gradients_restored_on_error, refuse_sparse
from sap_fast.step.metrics import SAPMetrics, StepRecord, read_metrics
from sap_fast.step.rules import Rule, find_rule
from sap_fast.step.single_passes import Safety, SinglePasses, Stage, Task
from sap_fast.step.trained import Trained

__all__ = ["Safety", "SafetyPasses", "Stage", "Task"]


class SafetyPasses(SinglePasses):
    """The passes of every step, for an optimizer that makes the update itself.

    `FusedSAP` and `BlendedAdamW` own one. Any other optimizer is served like this:

        passes.inner_passes(task, safety, batch)
        with passes.task_pass():
            task_loss(model, batch).backward()
        passes.blend_()
        optimizer.step()
        passes.end_step()

    Args:
        params: the parameters that the optimizer trains, or its parameter groups; or what stands
            for them where a stack keeps them in another form (`sap_fast.integrations.deepspeed`).
        probes: where the probe lives; None for blending alone.
        safety_weight: γ, the size of the blending; 0 blends nothing.
        safety_level: probe and blend only while the last safety pass found L_safe above this level:
            further down lie refusals of harmless requests (docs/study.md). `"auto"`: the mean over
            the first three safety passes. None: every step probes and blends.
        rule: how d is blended in: `"blend"`, `"project"`, `"floor"`, or a function of ‖g‖², ⟨g, d⟩
            and ‖d‖² to the coefficient of d; see `sap_fast.step.rules`.
        direction_every: take the direction anew every so many steps, and in each of the first
            three where `safety_level="auto"` is to be found; above 1 it is kept, of large
            parameters in int8, a byte per element.
        backend: whose operations to use, see `sap_fast.ops`.
        grad_scaler: the `torch.amp.GradScaler` that scales the losses of all passes, for fp16.

    Attributes:
        stage: where the step in progress is.
        steps: how many were completed.
        direction: the safety gradient (`Direction`).
        level: the safety level (`Level`).
        calibration: what the calibration of ρ found, or None.
        keeps_direction: keep the direction until the end of the step, to be looked at or to serve
            several rounds of probe passes, in one parameter-sized buffer. May be switched between
            steps.
        measures_rounding: measure in every step how much of ΔW survives rounding, not only where
            it is not known yet. May be switched between steps.
        measures_lean: with `ProbeSet(rows=…)` below 1, measure the lean of the whole batch, by two
            more probe passes over all of it. May be switched between steps.
        maximize: the optimizer ascends the task loss. L_safe is descended all the same.

    Raises:
        ValueError: for a setting out of range, parameters that share nothing with the probed model,
            or a sharding that SAP cannot perturb.
        RuntimeError: if a backend is named that cannot run where the parameters are.
    """

    def __init__(
        self,
        params: Iterable[Any] | Trained,
        probes: ProbeSet | None = None,
        *,
        safety_weight: float = 0.3,
        safety_level: float | Literal["auto"] | None = None,
        rule: Rule = "blend",
        direction_every: int = 1,
        backend: str = "auto",
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        find_rule(rule, safety_weight)
        if rule != "blend" and safety_weight == 0:
            raise ValueError(
                f"rule={rule!r} with safety_weight=0 blends nothing; give a safety_weight above 0, "
                'or leave the rule out. "project" and a function have no use for its size'
            )
        super().__init__(
            params, probes, safety_weight, safety_level, direction_every, backend, grad_scaler
        )
        self.rule: Rule = rule
        self._last_record = StepRecord()

    def inner_passes(self, task: Task, safety: Safety, batch: Any = None) -> None:
        """Begin a step: run whatever is due in it before the task pass.

        Gradients that parameters hold already are set aside and come back. Whatever the two
        functions raise, the model is as it was when this returns. Where memory runs out, the passes
        run once more with every decoder layer checkpointed; see `again_out_of_memory`.

        Args:
            task: runs forward and backward on the task loss of what it is given, and returns that
                loss. It is given `batch`, or the rows of it for the probe, or None without a batch.
                Runs twice, and 22 times more where ρ is to be calibrated.
            safety: runs forward and backward on the safety loss and returns it.
            batch: a mapping of tensors (B, …), or the list of the step's micro-batches.

        Raises:
            RuntimeError: inside a pass; if no parameter or no probed layer received a gradient.
            ValueError: with `ProbeSet(rows=…)` below 1 and no batch to take the rows of.
            TypeError: if a function returns no loss.
        """
        self.refuse_inside("inner_passes()")
        self.begin()
        self.again_out_of_memory(lambda: self._inner_passes(task, safety, batch))
        self.stage = Stage.READY

    def _inner_passes(self, task: Task, safety: Safety, batch: Any) -> None:
        try:
            part = self._part(batch)  # here, as a pass that is put back forgets it
            is_due = self.direction.is_due(self.steps) or self.level.wants_pass
            if self.is_active and is_due:
                self.safety_pass(safety)
            self._describe_direction()
            if self.probes is not None and not self.is_held:
                if self.probes.rho == "auto" and self.calibration is None:
                    self._calibrate(self.probes, task, part)
                self._probe_passes(self.probes, task, part, batch)
        except BaseException:
            self.begin()
            raise

    @property
    def is_held(self) -> bool:
        """Whether the step is the optimizer's alone, as L_safe is not above the level.

        False before the safety pass of a step that has one. The host waits for the device.
        """
        return self.level.is_held

    def runs_in(self, wrapped: nn.Module) -> None:
        """Make known the model as the loop calls it, where it was wrapped after the construction.

        Args:
            wrapped: the `DistributedDataParallel` around the model, or the model that
                `fully_shard` was called on.

        Raises:
            ValueError: for FSDP1, DeepSpeed, tensor parallelism, and `static_graph=True`.
        """
        self.trained.runs_in(wrapped)

    def blending(self) -> Blending | None:
        """Return what is to be added to the gradients; None if there is nothing."""
        wanted = self.record.direction_valid
        if self.stage is not Stage.DONE or self.safety_weight == 0 or wanted is None:
            return None
        if self.record.above_level is not None:
            wanted = wanted & self.record.above_level
        return find_blending(
            find_rule(self.rule, self.safety_weight),
            self.trained.parameters,
            self.direction,
            wanted,
            maximize=self.maximize,
            backend=self.backend,
        )

    def blend_(self) -> None:
        """Blend the safety gradient into the gradients of the parameters, in place.

        Raises:
            RuntimeError: inside a pass, or before the task pass of a step; for a sparse gradient.
        """
        self.refuse_without_task_pass("blend_()")
        for parameter in self.trained.parameters:
            refuse_sparse(parameter)
        blending = self.blending()
        if blending is not None:
            add_to_gradients(blending, maximize=self.maximize)

    def end_step(self) -> None:
        """Count the step, and keep of it what later steps use.

        Raises:
            RuntimeError: inside a pass, or before the task pass of a step.
        """
        self.refuse_without_task_pass("end_step()")
        probes = self.probes
        computed = None if probes is None else probes.compute_dtype
        self._account.settle(self.record, computed or self.trained.parameters[0].dtype)
        if self.direction.square is not None:
            self.direction.settle(self.steps)
            self.level.settle()
        if self.record.gradient_norm is not None:
            self.gradient_norm = self.record.gradient_norm
        self._last_record, offsets = self.record, None if probes is None else probes.offsets
        self.steps += 1
        self.begin()
        if probes is not None and offsets is not None:
            probes.offsets = offsets  # to be read; the next step forgets them

    def refuse_without_task_pass(self, call: str) -> None:
        """Raise inside a pass, and between the inner passes and the task pass.

        Raises:
            RuntimeError: saying what is missing.
        """
        self.refuse_inside(call)
        if self.stage is Stage.READY:
            raise RuntimeError(
                f"{call} after inner_passes() without task_pass(): the gradients were not taken "
                "under the probe; run backward on the task loss inside task_pass() first"
            )

    @contextmanager
    def given_up_on_error(self) -> Iterator[Callable[[], None]]:
        """Put gradients and random state back, and forget the step, if the body fails.

        Binds what puts the gradients back, for a pass of the body that is run again.
        """
        random_state = self.trained.random_state()
        try:
            with gradients_restored_on_error(self.trained.every()) as put_back:
                yield put_back
        except BaseException:
            self.begin()
            random_state.restore()
            raise

    @property
    def metrics(self) -> SAPMetrics:
        """Figures of the last step. Reading waits for the device; not reading costs nothing."""
        return read_metrics(
            self._last_record,
            self.probes,
            self.calibration,
            level=self.level.known,
            skipped_steps=self._account.skipped_steps,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what later steps depend on, each part by its owner.

        Raises:
            RuntimeError: inside a pass.
        """
        self.refuse_inside("state_dict()")
        return {
            "steps": self.steps,
            "direction": self.direction.state_dict(self.trained.parameters),
            "level": self.level.state_dict(),
            "calibration": None if self.calibration is None else dict(vars(self.calibration)),
            "gradient_norm": self.gradient_norm,
            "account": self._account.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            RuntimeError: inside a pass.
            ValueError: if a direction does not fit the parameters.
        """
        self.refuse_inside("load_state_dict()")
        self.begin()
        self.direction.load_state_dict(state_dict["direction"], self.trained.parameters)
        self.level.load_state_dict(state_dict["level"])
        found = state_dict["calibration"]
        self.calibration = None if found is None else Calibration(**found)
        self.gradient_norm = state_dict["gradient_norm"]
        self._account.load_state_dict(state_dict["account"])
        self.steps = state_dict["steps"]

    def __getstate__(self) -> dict[str, Any]:
        # A scaler belongs to its process, and a step in progress cannot be gone on with.
        gone = {"stage": Stage.IDLE, "record": StepRecord(), "_task_random_state": None}
        return {**vars(self), **gone, "_last_record": StepRecord(), "grad_scaler": None}
