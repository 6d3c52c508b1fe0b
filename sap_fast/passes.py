"""The passes of one SAP step (arXiv:2505.16737, Algorithm 1): safety, probe, task.

Each pass is a stretch of the caller's code that runs forward and backward. This file decides what
the model looks like meanwhile and what is taken from it:

======== ================== ============== ================ =====================================
pass     weights            probe V        frozen           leaves behind
======== ================== ============== ================ =====================================
safety   W                  off            no               the direction ∇_W L_safe
probe 1  W + ΔW             0 (1)          all of W         +∂L_task/∂V
probe 2  W − ΔW or W (2)    0              all of W         −∂L_task/∂V; then h and V_safe
task     W                  V_safe         no               ∇_W L_task(W, V_safe), for AdamW
======== ================== ============== ================ =====================================

(1) `schedule="lagged"`: the V of the step before, and the task pass takes the place of probe 2.
(2) `difference="central"` or `"forward"`.

However a pass ends (return, exception, KeyboardInterrupt), parameters, `requires_grad`, hooks and
the gradients of earlier micro-batches are bit for bit what they were. Every pass starts from the
same state of the random number generators, so all see the same dropout masks; only the task pass
moves it on, as plain training would.

A step whose direction or probe is still fresh enough (`FusedSAP(direction_every=…, probe_every=…)`)
leaves those passes out: its task pass runs under the V there is. One whose model is as safe as
`safety_level` asks leaves the probe passes out, too; its task pass runs without a probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.distributed import Ranks, add_over_ranks_, by_shard_group, local_shards
from sap_fast.ops.reference import accumulation_dtype
from sap_fast.random_state import RandomState

if TYPE_CHECKING:
    from sap_fast.optimizer import FusedSAP
    from sap_fast.probes import ProbeSet


class LossRecord:
    """Adds up the losses of one pass, for the metrics; calling it is optional."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def __call__(self, loss: Tensor) -> None:
        """Add the loss of one micro-batch, already scaled as it was for its backward."""
        value = loss.detach().clone()
        self.total = value if self.total is None else self.total + value


@dataclass
class StepRecord:
    """What the passes of one step found, as tensors on the device; `None` where not measured."""

    rho: float = 0.0
    parameter_norm: Tensor | None = None
    direction_norm: Tensor | None = None
    perturbation_norm: Tensor | None = None
    perturbation_applied: Tensor | None = None
    direction_valid: Tensor | None = None
    direction_slope: Tensor | None = None
    #: L_safe, over ranks in the mean, and whether it (or that of the direction in use) is above the
    #: level, a 0-d bool until the host asks; for `safety_level`.
    level_loss: Tensor | None = None
    above_level: Tensor | bool | None = None
    estimate_finite: Tensor | None = None
    #: What the losses were multiplied by before backward; None: by nothing.
    loss_scale: Tensor | None = None
    safety_loss: LossRecord = field(default_factory=LossRecord)
    probe_losses: list[LossRecord] = field(default_factory=list)
    task_loss: LossRecord = field(default_factory=LossRecord)


class Perturbation:
    """W + ΔW in the place of W, for as long as the context lasts.

    Args:
        params: parameters W.
        buffers: the direction, one tensor per parameter and of its dtype; they hold W meanwhile,
            and the direction again afterwards, to rounding (`ops.restore_swap_`).
        scale: ρ‖W‖/‖direction‖, 0-d; zero perturbs nothing.
        backend: whose operations to use, see `sap_fast.ops`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        buffers: Sequence[Tensor],
        scale: Tensor,
        *,
        backend: str = "auto",
    ) -> None:
        self._params, self._buffers, self._scale = params, buffers, scale
        #: What is written, and so has a version.
        self._written = local_shards(params)
        self._kept = local_shards(buffers)
        self._backend = backend
        self._reflected = False

    @torch.no_grad()
    def __enter__(self) -> Perturbation:
        before = [parameter._version for parameter in self._written]
        try:
            ops.perturb_swap_(self._params, self._buffers, self._scale, backend=self._backend)
        except BaseException:
            # A parameter that was written has its old value in its buffer; no other one has.
            for parameter, buffer, version in zip(self._written, self._kept, before, strict=True):
                if parameter._version != version:
                    parameter.copy_(buffer)
            raise
        return self

    @torch.no_grad()
    def reflect(self) -> None:
        """Go from W + ΔW to W − ΔW."""
        self._reflected = True
        ops.reflect_(self._params, self._buffers, backend=self._backend)

    @torch.no_grad()
    def applied_norm(self, dtype: torch.dtype) -> Tensor:
        """Return the norm of the perturbation that is left once weights are rounded to `dtype`."""
        wide = accumulation_dtype(self._params[0].dtype)
        squares = [
            ops.sum_squares([p.to(dtype).to(wide) - b.to(dtype).to(wide)], backend=self._backend)
            for p, b in zip(self._written, self._kept, strict=True)
        ]
        sums = [
            add_over_ranks_(torch.stack([s.to(part[0].device) for s in part]).sum(), group)
            for group, (_, part) in by_shard_group([self._params, squares])
        ]
        return torch.stack([total.to(sums[0].device) for total in sums]).sum().sqrt()

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        before = [parameter._version for parameter in self._written]
        try:
            inverse = torch.where(self._scale == 0, 0.0, 1 / self._scale)
            ops.restore_swap_(
                self._params,
                self._buffers,
                -inverse if self._reflected else inverse,
                backend=self._backend,
            )
        except BaseException:
            # A parameter that was written is back at W; its buffer may not hold W any more.
            for parameter, buffer, version in zip(self._written, self._kept, before, strict=True):
                if parameter._version == version:
                    parameter.copy_(buffer)
            raise


@contextmanager
def gradients_set_aside(params: Sequence[Tensor]) -> Iterator[None]:
    """Give every parameter an empty `.grad`; put the old ones back at the end, whatever happens."""
    saved = [parameter.grad for parameter in params]
    try:
        for parameter in params:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in zip(params, saved, strict=True):
            parameter.grad = gradient


@contextmanager
def gradients_restored_on_error(params: Sequence[Tensor]) -> Iterator[None]:
    """Put gradients back if the body fails.

    Costs a copy of the gradients that exist on entry: none, if they were cleared before the step;
    one parameter-sized buffer from the second micro-batch of an accumulated step on.
    """
    saved = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in params]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for parameter, gradient, copy in saved:
                if gradient is not None and copy is not None:
                    gradient.copy_(copy)
                parameter.grad = gradient
        raise


@contextmanager
def frozen(params: Sequence[Tensor]) -> Iterator[None]:
    """Turn `requires_grad` off, and back on for those that had it."""
    trainable = [parameter for parameter in params if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def first_rows(batch: Mapping[str, Any], count: int) -> Mapping[str, Any]:
    """Return the first `count` rows of a batch: of each tensor whose first axis counts its rows."""
    rows = row_count(batch)
    if count >= rows:
        return batch
    return {
        key: value[:count] if isinstance(value, Tensor) and len(value) == rows else value
        for key, value in batch.items()
    }


def row_count(batch: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch: the length of its first tensor.

    Raises:
        ValueError: if it has no tensor with an axis.
    """
    for value in batch.values():
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise ValueError(f"a batch with the entries {sorted(batch)} has no tensor to count rows by")


def refuse_sparse(parameter: Tensor) -> None:
    """Raise if a parameter has a sparse gradient.

    Raises:
        RuntimeError: naming the parameter's shape and the cure.
    """
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise RuntimeError(
            f"sparse gradient in a parameter of shape {tuple(parameter.shape)}: FusedSAP needs "
            "dense ones; build the embedding with sparse=False"
        )


class Passes:
    """The passes of the step in progress, and what is carried from one to the next.

    `FusedSAP` owns one and hands its methods on. Nothing here survives a step: V lives in the
    `ProbeSet`, a direction that later steps use in the optimizer's state.
    """

    def __init__(self, optimizer: FusedSAP) -> None:
        self._optimizer = optimizer
        #: Name of the pass that is running, if one is.
        self.open: str | None = None
        probes = optimizer.probes
        #: What spreads the model over ranks.
        self.ranks = Ranks(None if probes is None else probes.model)
        if probes is not None:
            probes.ranks = self.ranks  # it may be older than a `fully_shard` of its model
        #: `given_up_on_error` has the gradients to put back: one copy of them is enough.
        self._restores_step = False
        #: V from before this step, while the step may still be given up.
        self._offsets_before: dict[int, list[Tensor]] | None = None
        self.reset()

    def reset(self, *, completed: bool = False) -> None:
        """Forget the step in progress; if it was not completed, with the V that it found."""
        probes = self._optimizer.probes
        if self._offsets_before is not None and not completed:
            assert probes is not None
            probes.replace_offsets(self._offsets_before)
        self._offsets_before = None
        self.record = StepRecord()
        #: Parameters that the safety pass gave a gradient, and that gradient, in the same order.
        self.perturbed: list[nn.Parameter] = []
        self.direction: list[Tensor] | None = None
        self.safety_pass_ran = False
        #: The task pass below means the one that belongs to the last probe passes.
        self.probe_passes_ran = False
        self.task_pass_ran = False
        self._lagged_estimate_finished = False
        self._task_random_state: RandomState | None = None
        #: `_every_parameter`, once a pass of this step has asked for it.
        self._parameters: list[nn.Parameter] | None = None
        #: What `probe_part` was given in this step, and what it returned.
        self._parts: list[tuple[Any, Any]] = []
        if probes is not None:
            probes.forget_lower_forward()

    def settled_offsets(self) -> dict[int, Tensor]:
        """Return V for a checkpoint, without that of a step in progress or given up."""
        probes = self._optimizer.probes
        return {} if probes is None else probes.state_dict(self._offsets_before)

    def refuse_inside(self, call: str) -> None:
        """Raise if a pass is running.

        Raises:
            RuntimeError: naming the call and the pass.
        """
        if self.open is not None:
            raise RuntimeError(
                f"{call} inside {self.open}: the model does not hold its own weights or gradients "
                f"there; call it after {self.open} has ended"
            )

    # ---- pass 1 ----

    @contextmanager
    def safety_pass(self, *, keeps_earlier: bool = False) -> Iterator[LossRecord]:
        """Start a step: take ∇_W L_safe from the backward passes of the body.

        Args:
            keeps_earlier: leave the direction of an earlier step where it is, for later ones.
        """
        self.refuse_inside("safety_pass()")
        self.reset()
        if not keeps_earlier:
            self._optimizer.release_direction()
        record = self.record
        with ExitStack() as stack:
            random_state = self._enter(stack, "safety_pass()")
            stack.callback(random_state.restore)
            stack.enter_context(gradients_set_aside(self._every_parameter()))
            stack.enter_context(self._checkpointing())
            stack.enter_context(self.ranks.gradients_averaged())
            yield record.safety_loss
            self._take_direction()

    @torch.no_grad()
    def _take_direction(self) -> None:
        trained = self._optimizer.trained_parameters()
        self.ranks.check(trained)
        perturbed = [parameter for parameter in trained if parameter.grad is not None]
        if not perturbed:
            raise RuntimeError(
                "the safety pass left no gradient in any parameter of the optimizer: call "
                "backward() on the safety loss of the model that the optimizer trains"
            )
        for parameter in perturbed:
            refuse_sparse(parameter)
        direction = [parameter.grad for parameter in perturbed if parameter.grad is not None]
        if any(replica.gradient_as_bucket_view for replica in self.ranks.replicas):
            # The next pass with gradients writes to the buckets again.
            direction = [gradient.clone() for gradient in direction]
        norm = ops.sum_squares(direction, backend=self._optimizer.backend).sqrt()
        self._measure_level(norm.device)
        self._set_direction(perturbed, direction, norm)
        self.safety_pass_ran = True

    def _measure_level(self, device: torch.device) -> None:
        """Compare the mean L_safe over ranks with the level, where the optimizer holds one."""
        if not self._optimizer.holds_level:
            return
        loss = self.record.safety_loss.total
        if loss is None:
            raise RuntimeError(
                f"safety_level={self._optimizer.safety_level!r} needs L_safe: record it, as in "
                "`with optimizer.safety_pass() as record: …; record(loss)`"
            )
        self.record.level_loss = loss.to(device, torch.float32, copy=True)
        if self.ranks:
            self.ranks.average_([self.record.level_loss])
        else:
            self.ranks.refuse_unknown_ranks(f"safety_level={self._optimizer.safety_level!r}")
        self.record.above_level = self._optimizer.is_above_level(self.record.level_loss)

    @torch.no_grad()
    def _recall_direction(self) -> None:
        """Take the kept direction of an earlier step, if this step has none of its own."""
        kept = self._optimizer.kept_direction()
        if kept is not None and self.record.direction_norm is None:
            self._set_direction(*kept)
            self.record.above_level = self._optimizer.above_level

    def _set_direction(
        self, perturbed: list[nn.Parameter], direction: list[Tensor], norm: Tensor
    ) -> None:
        optimizer, record = self._optimizer, self.record
        # First, as it can fail: what follows says that there is a direction.
        trained = optimizer.trained_parameters()
        record.parameter_norm = ops.sum_squares(trained, backend=optimizer.backend).sqrt()
        self.perturbed, self.direction = perturbed, direction
        record.direction_norm = norm
        record.direction_valid = norm.isfinite() & (norm > 0)
        if optimizer.grad_scaler is not None:
            # Of the losses to come in this step, too: scales change with `GradScaler.update`.
            record.loss_scale = optimizer.grad_scaler.scale(torch.ones_like(norm))

    # ---- passes 2 and 3 ----

    def probe_passes(self) -> Iterator[LossRecord]:
        """Yield once per probe pass, with the weights of that pass in place; then set V.

        Raises:
            RuntimeError: at the call, if there is no probe set or no direction.
        """
        self.refuse_inside("probe_passes()")
        probes = self._optimizer.probes
        if probes is None:
            raise RuntimeError(
                "probe_passes() without a probe set: construct FusedSAP(params, ProbeSet(model)), "
                "or leave the probe passes out"
            )
        self._recall_direction()
        if self.direction is None:
            raise RuntimeError(
                "probe_passes() without a direction: run safety_pass() first; one safety pass "
                "serves several rounds of probe passes only with FusedSAP(keep_direction=True), "
                "and several steps only with FusedSAP(direction_every=…)"
            )
        return self._run_probe_passes(probes)

    def _run_probe_passes(self, probes: ProbeSet) -> Iterator[LossRecord]:
        optimizer, record = self._optimizer, self.record
        record.rho = optimizer.current_rho
        if self._offsets_before is None:
            self._offsets_before = probes.copy_offsets()
        lagged = optimizer.schedule == "lagged"
        yield from self.estimate(
            probes,
            difference="lagged" if lagged else optimizer.difference,
            keep_direction=optimizer.direction_is_kept,
            measure_rounding=optimizer.measures_rounding,
            keep_lower_forward=optimizer.probe_fraction == 1,
        )
        if not lagged:
            self._set_probe(probes)
        assert record.direction_valid is not None
        wanted = record.direction_valid
        if record.above_level is not None:
            # A loop that did not ask `needs_probe` has the same step, if not as quickly.
            wanted = wanted & record.above_level
        probes.mask_offsets(wanted)
        self.probe_passes_ran, self.task_pass_ran = True, False
        self._lagged_estimate_finished = False
        if optimizer.probe_fraction < 1 and not self._parts:
            optimizer.warn_once(
                "probe_fraction",
                f"FusedSAP: probe_fraction={optimizer.probe_fraction:g} had no effect: the loop "
                "has to ask for the part of its batch, task_loss(model, "
                "optimizer.probe_part(batch))",
            )

    def probe_part(self, batch: Any) -> Any:
        """Return what of a batch, or of a list of micro-batches, the pass in progress needs."""
        fraction = self._optimizer.probe_fraction
        if self.open != "probe_passes()" or fraction == 1:
            return batch
        # The same tensors in both probe passes: what the losses found out about them is remembered.
        for given, part in self._parts:
            if given is batch:
                return part
        micro_batches = [batch] if isinstance(batch, Mapping) else list(batch)
        wanted = math.ceil(fraction * sum(row_count(one) for one in micro_batches))
        part = []
        for one in micro_batches:
            if wanted > 0:
                part.append(first_rows(one, wanted))
                wanted -= row_count(one)
        result = part[0] if isinstance(batch, Mapping) else part
        self._parts.append((batch, result))
        return result

    def estimate(
        self,
        probes: ProbeSet,
        *,
        difference: str,
        keep_direction: bool,
        measure_rounding: bool = False,
        keep_lower_forward: bool = False,
    ) -> Iterator[LossRecord]:
        """Yield once per probe pass, then leave h in `probes.estimates`.

        Args:
            probes: the probe set.
            difference: `"central"`, `"forward"`, or `"lagged"`: the pass at W + ΔW alone, at the V
                of the step before; `finish_lagged` finds h after the task pass.
            keep_direction: leave `direction` exact instead of using it up; costs one more buffer.
            measure_rounding: record how much of ΔW survives the dtype that the model computes in.
            keep_lower_forward: let the task pass have the forward below the lowest probed layer
                from the probe pass at W, if there is one.
        """
        record, direction = self.record, self.direction
        assert direction is not None
        # The buffers hold W during the passes. No weight gradients exist meanwhile, so that a copy
        # of the direction does not raise the peak of a step that accumulates nothing.
        buffers = [tensor.clone() for tensor in direction] if keep_direction else direction
        self.direction = direction if keep_direction else None
        scale = self._set_perturbation_norm()
        record.probe_losses = []
        with ExitStack() as stack:
            random_state = self._enter(stack, "probe_passes()")
            stack.callback(random_state.restore)
            # Nothing is added to gradients here, but a closure may clear them.
            stack.enter_context(gradients_set_aside(self._every_parameter()))
            trainable = [p for p in self._every_parameter() if p.requires_grad]
            stack.enter_context(frozen(trainable))
            probes.begin_estimate()

            def one_pass(sign: float, keep_lower: bool = False) -> Iterator[LossRecord]:
                random_state.restore()
                self._forget_weights()
                probes.rewind()
                loss = LossRecord()
                record.probe_losses.append(loss)
                active = probes.active(
                    sign=sign,
                    inject=difference == "lagged",
                    frozen=True,
                    keep_lower=trainable if keep_lower else (),
                )
                with self._checkpointing(frozen=not keep_lower), active:
                    yield loss

            with Perturbation(
                self.perturbed, buffers, scale, backend=self._optimizer.backend
            ) as perturbation:
                yield from one_pass(+1.0)
                if measure_rounding:
                    dtype = probes.compute_dtype or self.perturbed[0].dtype
                    record.perturbation_applied = perturbation.applied_norm(dtype)
                if difference == "central":
                    perturbation.reflect()
                    yield from one_pass(-1.0)
            if difference == "forward":
                # At W, V = 0 and under the masks of the task pass: up to the lowest probed layer
                # this is the task pass.
                yield from one_pass(-1.0, keep_lower=keep_lower_forward)
            if difference != "lagged":
                self._finish_estimate(probes, 2.0 if difference == "central" else 1.0)
            self._task_random_state = random_state

    @torch.no_grad()
    def _set_perturbation_norm(self) -> Tensor:
        """Record ‖ΔW‖ = ρ‖W‖ and return the factor that turns the safety gradient into ΔW."""
        record = self.record
        assert record.parameter_norm is not None
        assert record.direction_norm is not None and record.direction_valid is not None
        record.perturbation_norm = record.rho * record.parameter_norm
        scale = record.perturbation_norm / record.direction_norm
        return torch.where(record.direction_valid, scale, 0.0)

    @torch.no_grad()
    def _finish_estimate(self, probes: ProbeSet, norms_apart: float) -> None:
        norm = self.record.perturbation_norm
        assert norm is not None
        # A task objective that is maximized is a task loss with its sign turned.
        sign = -1.0 if self._optimizer.defaults["maximize"] else 1.0
        coefficient = torch.where(norm > 0, sign / (norms_apart * norm), 0.0)
        if self.record.loss_scale is not None:
            coefficient = coefficient / self.record.loss_scale.to(coefficient.device)
        probes.finish_estimate(coefficient)

    @torch.no_grad()
    def _set_probe(self, probes: ProbeSet) -> None:
        optimizer, norm = self._optimizer, self.record.perturbation_norm
        assert norm is not None
        self.record.estimate_finite = probes.apply_rule(
            optimizer.probe_rule, optimizer.probe_lr, norm
        )

    # ---- pass 4 ----

    @contextmanager
    def task_pass(self) -> Iterator[LossRecord]:
        """Let the backward passes of the body add ∇_W L_task(W, V_safe) to the gradients."""
        self.refuse_inside("task_pass()")
        probes = self._optimizer.probes
        self._recall_direction()
        if probes is not None and not self.probe_passes_ran and self._optimizer.needs_probe:
            raise RuntimeError(
                "task_pass() without a probe: run safety_pass() and probe_passes() first, all of "
                "them; for a step of plain AdamW leave the passes out and call backward() and "
                "step()"
            )
        with ExitStack() as stack:
            random_state = self._enter(stack, "task_pass()")
            try:
                # Later micro-batches go on where the one before stopped, as the probe passes did.
                if self._task_random_state is not None:
                    self._task_random_state.restore()
                if not self._restores_step:
                    stack.enter_context(gradients_restored_on_error(self._every_parameter()))
                stack.enter_context(self._checkpointing())
                if probes is not None and (self.probe_passes_ran or not self._optimizer.is_held):
                    if not self.task_pass_ran:
                        probes.rewind()
                    lagged = self._optimizer.schedule == "lagged" and self.probe_passes_ran
                    collect = -1.0 if lagged else None
                    stack.enter_context(probes.active(sign=collect, inject=True))
                yield self.record.task_loss
                self._report_overflow()
                self._measure_slope()
            except BaseException:
                random_state.restore()
                raise
            self._task_random_state = self._random_state()
            self.task_pass_ran = True

    @torch.no_grad()
    def _report_overflow(self) -> None:
        """Make a gradient NaN if an inner pass overflowed: that is where a `GradScaler` looks."""
        record = self.record
        if self._optimizer.grad_scaler is None or record.direction_norm is None:
            return
        finite = record.direction_norm.isfinite()
        if record.estimate_finite is not None:
            finite = finite & record.estimate_finite.to(finite.device)
        elif self.probe_passes_ran:  # lagged: h is found at the end of the step
            assert self._optimizer.probes is not None
            finite = finite & self._optimizer.probes.collected_finite().to(finite.device)
        trained = self._optimizer.trained_parameters()
        gradients = local_shards([p.grad for p in trained if p.grad is not None])
        gradients = [gradient for gradient in gradients if gradient.numel()]
        if gradients:
            smallest = min(gradients, key=Tensor.numel)
            smallest.add_(torch.where(finite, 0.0, torch.nan).to(smallest))

    @torch.no_grad()
    def _measure_slope(self) -> None:
        """Record ⟨ĝ, ∇_W L_task⟩ of the gradients so far, where the direction was kept."""
        if self.direction is None or self.record.direction_norm is None:
            return
        pairs = [
            (direction, parameter.grad)
            for direction, parameter in zip(self.direction, self.perturbed, strict=True)
            if parameter.grad is not None
        ]
        if pairs:
            directions, gradients = zip(*pairs, strict=True)
            product = ops.dot(directions, gradients, backend=self._optimizer.backend)
            self.record.direction_slope = product / self.record.direction_norm

    def finish_lagged(self) -> None:
        """Find h, and V for the next step, from the probe pass and the task pass of this one."""
        probes = self._optimizer.probes
        assert probes is not None
        if not self._lagged_estimate_finished:  # else an update failed after it
            self._finish_estimate(probes, 1.0)
            self._lagged_estimate_finished = True
        self._set_probe(probes)

    # ---- shared ----

    @contextmanager
    def given_up_on_error(self) -> Iterator[None]:
        """Put gradients, V and random state back if the body, a whole step, fails."""
        random_state = self._random_state()
        self._restores_step = True
        try:
            with gradients_restored_on_error(self._every_parameter()):
                yield
        except BaseException:
            self.reset()
            random_state.restore()
            raise
        finally:
            self._restores_step = False

    def _enter(self, stack: ExitStack, name: str) -> RandomState:
        """Open the pass and return the state of the generators on entry."""
        self.open = name

        def close() -> None:
            self.open = None

        stack.callback(close)
        self._forget_weights()
        return self._random_state()

    def _forget_weights(self) -> None:
        """Drop copies of the weights: a later pass must not meet those of an earlier one."""
        torch.clear_autocast_cache()
        self.ranks.reshard()

    def _checkpointing(self, *, frozen: bool = False) -> AbstractContextManager[None]:
        """Checkpoint activations in this pass, as the optimizer is set."""
        checkpointing = self._optimizer.activation_checkpointing
        return nullcontext() if checkpointing is None else checkpointing.active(frozen=frozen)

    def _every_parameter(self) -> list[nn.Parameter]:
        """Return the parameters of the optimizer and of the probed model, each once.

        Found once per step: to walk through the modules of a model takes as long as some layers.
        """
        if self._parameters is not None:
            return self._parameters
        optimizer = self._optimizer
        unique = {id(p): p for group in optimizer.param_groups for p in group["params"]}
        if optimizer.probes is not None:
            unique |= {id(p): p for p in optimizer.probes.model.parameters()}
        if self.open is not None:  # FSDP2 has resharded: these are the parameters themselves
            self._parameters = list(unique.values())
        return list(unique.values())

    def _random_state(self) -> RandomState:
        devices = {parameter.device for parameter in self._every_parameter()}
        return RandomState(device for device in devices if device.type not in ("cpu", "meta"))
