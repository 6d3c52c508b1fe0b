"""Each pass of a step by itself; in which order, and which, is decided in `passes`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from sap_fast import ops
from sap_fast.model.probes import ProbeSet
from sap_fast.random_state import RandomState
from sap_fast.step.account import Account
from sap_fast.step.calibration import RHO_GRID, UNCALIBRATED_RHO, Calibration, calibrate
from sap_fast.step.direction import Direction
from sap_fast.step.estimate import estimate
from sap_fast.step.guards import gradients_restored_on_error, report_overflow
from sap_fast.step.level import Level
from sap_fast.step.memory import run_again_out_of_memory
from sap_fast.step.metrics import LossRecord, StepRecord
from sap_fast.step.safety import take_direction
from sap_fast.step.trained import Trained, returned_loss

#: Runs forward and backward on what it is given, and returns the loss.
Task = Callable[[Any], Tensor]
Safety = Callable[[], Tensor]

_Result = TypeVar("_Result")


class Stage(Enum):
    """Where a step is."""

    IDLE = "between steps"
    SAFETY = "the safety pass"
    PROBE = "a probe pass"
    READY = "after the inner passes"
    TASK = "the task pass"
    DONE = "after the task pass"


class SinglePasses:
    """The passes, each with what it needs; `SafetyPasses` runs them as a step.

    Args:
        params: see `SafetyPasses`, for these and the attributes.
        probes: where the probe lives.
        safety_weight: γ.
        safety_level: the level.
        direction_every: how often a direction is taken.
        backend: whose operations to use.
        grad_scaler: what scales the losses.
    """

    def __init__(
        self,
        params: Iterable[Any] | Trained,
        probes: ProbeSet | None,
        safety_weight: float,
        safety_level: float | Literal["auto"] | None,
        direction_every: int,
        backend: str,
        grad_scaler: torch.amp.GradScaler | None,
    ) -> None:
        if not safety_weight >= 0:
            raise ValueError(f"safety_weight={safety_weight!r} is out of range; give a number ≥ 0")
        self.probes = probes
        self.safety_weight = safety_weight
        self.backend = backend
        self.grad_scaler = grad_scaler
        self.keeps_direction = self.measures_rounding = self.measures_lean = self.maximize = False
        self.steps = 0
        self.trained = params if isinstance(params, Trained) else Trained(params, probes)
        self.direction = Direction(direction_every)
        self.level = Level(safety_level)
        self.calibration: Calibration | None = None
        #: ‖g‖ of the last step, 0-d; None before it, and where the probe has no use for it.
        self.gradient_norm: Tensor | None = None
        self._account = Account()
        ops.check_backend(backend, {p.device.type for p in self.trained.parameters})
        if probes is not None:
            probes.backend = backend
        self.begin()

    def begin(self) -> None:
        """Forget the step in progress, if there is one, with the direction and V that it found."""
        self.stage = Stage.IDLE
        self.record = StepRecord()
        self.trained.begin()
        self._task_random_state: RandomState | None = None
        known = set(self.trained.parameters)
        if not self.direction.is_settled or not known.issuperset(self.direction.parameters):
            self.direction.release()
            self.level.forget()
        if self.probes is not None:
            self.probes.clear()

    @property
    def safety_level(self) -> float | Literal["auto"] | None:
        """The level to hold. A new one counts from the next safety pass on."""
        return self.level.setting

    @safety_level.setter
    def safety_level(self, setting: float | Literal["auto"] | None) -> None:
        self.level.setting = setting

    @property
    def direction_every(self) -> int:
        """How often the direction is taken: in every so manieth step. May be set between steps."""
        return self.direction.every

    @direction_every.setter
    def direction_every(self, every: int) -> None:
        self.direction.every = every

    @property
    def is_active(self) -> bool:
        """Whether there is anything to do beside the optimizer's own update."""
        return self.probes is not None or self.safety_weight != 0

    def refuse_inside(self, call: str) -> None:
        """Raise if a pass is running.

        Raises:
            RuntimeError: naming the call and the pass.
        """
        if self.stage in (Stage.SAFETY, Stage.PROBE, Stage.TASK):
            raise RuntimeError(
                f"{call} inside {self.stage.value}: the model does not hold its own weights or "
                "gradients there; call it after that pass has ended"
            )

    def _part(self, batch: Any) -> Any:
        if self.probes is None or self.probes.rows == 1:
            return batch
        if batch is None:
            raise ValueError(
                f"rows={self.probes.rows:g} without a batch: give it, step(task, safety, batch) or "
                "inner_passes(task, safety, batch), and let task(part) run on what it is given"
            )
        return self.probes.take_part(batch)

    @contextmanager
    def _in(self, stage: Stage) -> Iterator[None]:
        before, self.stage = self.stage, stage
        try:
            self.trained.forget_weights()
            self.trained.every(inside=True)  # finds them, once per step
            yield
        finally:
            self.stage = before

    def again_out_of_memory(
        self, run: Callable[[], _Result], put_back: Callable[[], None] | None = None
    ) -> _Result:
        """Run passes; if they run out of memory, once more with every decoder layer checkpointed.

        `inner_passes` runs its own so. Checkpointing stays on for the steps that follow, and
        changes no bit.

        Args:
            run: leaves model, gradients and random state as they were if it fails.
            put_back: called in between, for what it does not put back.

        Returns:
            What `run` returns.

        Raises:
            torch.OutOfMemoryError: if memory runs out again, if it would, as the layers are
                checkpointed already or are not known, or on one of several ranks.
        """
        return run_again_out_of_memory(
            run,
            self.trained,
            warn=lambda message: self._account.warn_once("memory", message),
            put_back=put_back,
        )

    def safety_pass(self, safety: Safety) -> None:
        """Take the direction, and compare L_safe with the level; a part of `inner_passes`."""
        self.refuse_inside("safety_pass()")
        self.direction.release()
        self.level.forget()
        loss = self._take_direction(self.direction, safety)
        self.record = StepRecord(safety_loss=loss)
        assert self.direction.square is not None
        self.level.measure(loss, self.direction.square.device, self.trained.ranks)
        self._describe_direction()

    def _take_direction(self, direction: Direction, safety: Safety) -> Tensor:
        with self._in(Stage.SAFETY):
            return take_direction(
                direction,
                self.trained,
                lambda: returned_loss("safety()", safety),
                backend=self.backend,
                scaler=self.grad_scaler,
            )

    def _describe_direction(self) -> None:
        """Record the direction that the step uses, its own or that of an earlier one."""
        record, norm = self.record, self.direction.norm
        if norm is None or record.direction_norm is not None:
            return
        squares = ops.sum_squares(self.trained.trainable, backend=self.backend)
        record.parameter_norm = squares.sqrt()
        record.direction_norm, record.direction_valid = norm, self.direction.valid
        record.above_level = self.level.above
        if self.grad_scaler is not None:
            record.loss_scale = self.grad_scaler.scale(torch.ones_like(norm))

    def probe_passes(self, task: Task, batch: Any = None) -> None:
        """Find h and V under the direction there is; a part of `inner_passes`.

        One direction serves several rounds with `keeps_direction`, which keeps it exact.
        """
        self.refuse_inside("probe_passes()")
        if self.probes is None or not self.direction.is_there:
            raise RuntimeError(
                "probe_passes() needs a ProbeSet and a direction: run safety_pass() first; it "
                "serves several rounds of probe passes only with keeps_direction=True"
            )
        self._probe_passes(self.probes, task, self._part(batch), batch)
        self.stage = Stage.READY

    def _probe_passes(self, probes: ProbeSet, task: Task, part: Any, batch: Any) -> None:
        record = self.record
        record.rho = self.rho
        keeps = self.safety_weight != 0 or self.direction.every > 1 or self.keeps_direction
        measures_lean = self.measures_lean and not probes.sees_all_rows
        self._estimate(
            probes,
            task,
            part,
            keep_direction=keeps or measures_lean,
            measure_rounding=self.measures_rounding or not self._account.rounding_is_known,
            keep_lower_forward=probes.rows == 1,
        )
        assert record.perturbation_norm is not None and record.direction_valid is not None
        if probes.rule == "lean" and self.gradient_norm is None and self.steps > 0:
            raise RuntimeError(
                'rule="lean" goes by the length of the task gradient, and no parameter had one in '
                '.grad when the task pass of the step before ended; use rule="normalized" where '
                "gradients are kept elsewhere"
            )
        record.estimate_finite = probes.apply_rule(record.perturbation_norm, self.gradient_norm)
        probes.mask_offsets(record.direction_valid)
        record.sees_all_rows = probes.sees_all_rows
        if measures_lean:
            with probes.estimate_set_aside():
                self._estimate(
                    probes, task, batch, keep_direction=keeps, all_rows=not probes.own_rows
                )
                record.lean = probes.lean()

    def _estimate(
        self, probes: ProbeSet, task: Task, part: Any, *, all_rows: bool = True, **options: bool
    ) -> None:
        with self._in(Stage.PROBE):
            self._task_random_state = self.trained.random_state()
            estimate(
                probes,
                self.trained,
                self.direction,
                lambda: returned_loss("task(part)", lambda: task(part)),
                self.record,
                backend=self.backend,
                maximize=self.maximize,
                all_rows=all_rows,
                adapters=probes.paired_adapters(part) if all_rows else (),
                **options,
            )

    @contextmanager
    def task_pass(self, *, restores_gradients: bool = True) -> Iterator[LossRecord]:
        """Let the backward passes of the body add ∇_W L_task(W, V) to the gradients.

        Once per micro-batch. Call what it binds with the loss, for `metrics`.

        Args:
            restores_gradients: put gradients that exist back if the body fails, which costs a copy
                of them.

        Raises:
            RuntimeError: inside another pass, or without the inner passes before.
        """
        self.refuse_inside("task_pass()")
        if self.is_active and self.stage is Stage.IDLE:
            raise RuntimeError(
                "task_pass() without inner_passes(task, safety, batch) before it; for a step of "
                "plain AdamW leave both out and call backward() and step()"
            )
        trained, probes, first = self.trained, self.probes, self.stage is not Stage.DONE
        with ExitStack() as stack:
            stack.enter_context(self._in(Stage.TASK))
            random_state, losses = trained.random_state(), self.record.task_loss.total
            try:
                # Later micro-batches go on where the one before stopped, as the probe passes did.
                if self._task_random_state is not None:
                    self._task_random_state.restore()
                if restores_gradients:
                    every = trained.every(inside=True)
                    stack.enter_context(gradients_restored_on_error(every))
                stack.enter_context(trained.checkpointed())
                if probes is not None and probes.offsets:
                    if first:
                        probes.rewind()
                    stack.enter_context(probes.active(inject=True, all_rows=not probes.own_rows))
                yield self.record.task_loss
                if self.grad_scaler is not None and self.record.direction_norm is not None:
                    report_overflow(trained.trainable, self.record.is_finite)
                if probes is not None and probes.rule == "lean":
                    self.record.gradient_norm = self._gradient_norm()
            except BaseException:
                random_state.restore()
                self.record.task_loss.total = losses
                raise
            self._task_random_state = trained.random_state()
        self.stage = Stage.DONE

    def _gradient_norm(self) -> Tensor | None:
        """Return ‖g‖ of the gradients that parameters hold; the one before if it is not finite."""
        gradients = [p.grad for p in self.trained.parameters if p.grad is not None]
        if not gradients:
            return None
        norm = ops.sum_squares(gradients, backend=self.backend).sqrt()
        if self.grad_scaler is not None:
            norm = norm / self.grad_scaler.scale(torch.ones_like(norm))
        before = torch.zeros_like(norm) if self.gradient_norm is None else self.gradient_norm
        return torch.where(norm.isfinite(), norm, before.to(norm))

    @property
    def rho(self) -> float:
        """ρ of the next step: the number given, or the calibrated one, or else 1e-2."""
        if self.probes is not None and self.probes.rho != "auto":
            return float(self.probes.rho)
        if self.calibration is not None:
            return self.calibration.rho
        return UNCALIBRATED_RHO

    def calibrate(self, task: Task, safety: Safety, batch: Any = None) -> Calibration | None:
        """Find the ρ at which h can be trusted most, and use it from now on.

        `inner_passes` does so in the first step that probes. Costs a safety pass, 22 probe passes
        and one parameter-sized buffer meanwhile; changes nothing but ρ.

        Returns:
            What was found; None, with a warning, if no ρ gave a usable h.

        Raises:
            RuntimeError: inside a pass, or without a probe set.
        """
        self.refuse_inside("calibrate()")
        if self.probes is None:
            raise RuntimeError("calibrate() without a probe set: there is no ρ to calibrate")
        self.begin()
        kept, self.direction = self.direction, Direction()
        try:
            self._take_direction(self.direction, safety)
            self._describe_direction()
            return self._calibrate(self.probes, task, self._part(batch))
        finally:
            self.direction = kept
            self.begin()

    def _calibrate(self, probes: ProbeSet, task: Task, part: Any) -> Calibration | None:
        def estimates(rho: float) -> dict[int, Tensor]:
            self.record.rho = rho
            self._estimate(probes, task, part, keep_direction=True)
            return probes.estimates

        found = calibrate(estimates, probes.difference, self.steps)
        if found is None:
            self._account.warn_once(
                "calibration",
                "sap_fast: calibration found no ρ with a finite, non-zero probe gradient among "
                f"{RHO_GRID[0]:g} … {RHO_GRID[-1]:.2g}; ρ={UNCALIBRATED_RHO:g} is used, and the "
                "next step tries again",
            )
            return None
        self.calibration = found
        self._account.rounding_is_known = False
        return found
