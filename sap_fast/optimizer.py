"""FusedSAP: Safety-Aware Probing (arXiv:2505.16737) as a `torch.optim.Optimizer`.

The passes of a step are in `sap_fast.passes`, the probe in `sap_fast.probes`, the arithmetic in
`sap_fast.ops`. Here are the settings, the AdamW update at the end of the step, and the state.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from sap_fast import ops
from sap_fast.checkpointing import Checkpointing
from sap_fast.distributed import Ranks, refuse_foreign_shards
from sap_fast.metrics import Calibration, Mailbox, SAPMetrics
from sap_fast.ops.reference import accumulation_dtype
from sap_fast.passes import LossRecord, Passes, StepRecord, refuse_sparse
from sap_fast.probes import PROBE_RULES, ProbeSet, find_decoder_layers

Closure = Callable[[], Tensor]

# ρ of a loop that never calibrated it: inside the linear range of LoRA and of full fine-tuning in
# fp32, and of LoRA in bf16. Calibration does better, in bf16 by much.
_UNCALIBRATED_RHO = 1e-2

# Safety passes whose mean L_safe is the level that `safety_level="auto"` holds: one batch of pairs
# says little, and after a few steps the loss is no longer that of the model as it came.
_LEVEL_PASSES = 3

# Candidates for ρ: 0.1·2⁻ᵏ. Larger ones are outside the linear range of every model measured,
# smaller ones below the rounding of every dtype but fp64.
RHO_GRID = tuple(0.1 * 2.0**-k for k in range(11))


@dataclass(frozen=True)
class Preset:
    """How often a step does what; arguments of `FusedSAP` of the same names override it."""

    direction_every: int
    probe_every: int
    probe_fraction: float


#: The direction changes slowly, V belongs to its batch (benchmarks/presets.py has the cosines): so
#: the presets save directions first, rows of the probe passes second, and whole probe passes not at
#: all.
PRESETS = {
    "paper": Preset(direction_every=1, probe_every=1, probe_fraction=1.0),
    "balanced": Preset(direction_every=5, probe_every=1, probe_fraction=0.5),
    "economical": Preset(direction_every=10, probe_every=1, probe_fraction=0.25),
}


class FusedSAP(Optimizer):
    """AdamW on gradients taken under the safety probe of SAP.

    With closures, each of which runs forward and backward and returns its loss:

        optimizer.step(task_closure, safety_closure)

    or pass by pass, for loops that own their backward:

        with optimizer.safety_pass():
            contrastive_loss(model, chosen, rejected).backward()
        for _ in optimizer.probe_passes():
            task_loss(model, batch).backward()
        with optimizer.task_pass():
            task_loss(model, batch).backward()
        optimizer.step()

    `step()` without a closure is the AdamW update alone, and never probes.

    Args:
        params: parameters or parameter groups; a group may set its own `lr`, `betas`, `eps` and
            `weight_decay`.
        probes: where the probe lives. None: plain AdamW, with gradient blending if `safety_weight`
            is set.
        lr: learning rate; a 0-d tensor is accepted. Default of the paper's experiments.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        rho: size ρ of the weight perturbation relative to ‖W‖ of the trained parameters. `"auto"`
            finds it on the first batch (`calibrate_rho`).
        probe_lr: size β of the probe; what it means depends on `probe_rule`.
        probe_rule: `"normalized"`: each v_j has β times the norm of an ordinary token's hidden
            state. `"gradient"`: V = β·ρ‖W‖·h, the paper's. `"adam"`: one step of AdamW of size β,
            the authors' code's.
        schedule: `"paper"`: four passes. `"lagged"`: three, with the V found on the batch before,
            as in the authors' code.
        difference: how h is differenced in ρ: `"central"` (W ± ΔW, error O(ρ²)) or `"forward"`
            (W + ΔW and W, the paper's, error O(ρ)); same cost. `schedule="lagged"` is always
            forward: its second pass is the task pass, at W. Under bf16 autocast prefer central:
            the cosine of its h with the exact one is 0.99 and more where forward differences reach
            0.93 to 0.97 (benchmarks/fidelity.py).
        safety_weight: γ of gradient blending, g ← g + γ‖g‖ĝ, so that W also descends L_safe. 0 is
            the paper. Keeps the direction: one parameter-sized buffer until `step`.
        safety_level: probe and blend only while the last safety pass found L_safe above this level,
            so that they undo what the tuning does to L_safe and go no further: further down lie
            refusals of harmless requests (docs/study.md). Other steps are AdamW's, and their probe
            passes are left out, for which the host waits for the safety pass. `"auto"`: the mean
            over the first three safety passes, whose steps leave out nothing. None: every step
            probes and blends. The safety pass has to record its loss; over ranks, their mean
            counts.
        max_grad_norm: clip the (blended) gradient to this global norm.
        maximize: ascend the task objective. L_safe is descended all the same.
        backend: whose operations to use, `"auto"` for the fastest that can run; see `sap_fast.ops`.
        calibrate_every: with `rho="auto"`, calibrate again after so many steps.
        keep_direction: keep ĝ until `step`, at the cost of one parameter-sized buffer: needed for
            `metrics.lean` and for several rounds of probe passes after one safety pass. May be
            switched between steps.
        preset: what a step leaves out: `"paper"` nothing, `"balanced"` and `"economical"` as
            `PRESETS` says. The next three arguments override it.
        direction_every: take the direction anew every so many steps. Where a step in between uses
            it (probes more often than directions, or `safety_weight`), it is kept in the state of
            its parameter, one parameter-sized buffer.
        probe_every: find V anew every so many steps, and run the steps between under the V there
            is: the idea of LookSAM (Liu et al., arXiv:2203.02714).
        probe_fraction: the part of the task batch, in (0, 1], that the probe passes see, rounded
            up to whole rows. The loop has to ask for it: `task_loss(model,
            optimizer.probe_part(batch))`; `SAPTrainer` does.
        checkpointing: recompute activations in the backward passes: `"none"` leaves the model as it
            is, `"layers"` recomputes every decoder layer that a pass would store, `"auto"` as many
            as the free memory asks for; see `sap_fast.checkpointing`.
        grad_scaler: the `torch.amp.GradScaler` that scales the losses of all passes, for fp16:
            `scaler.scale(loss).backward()` in each, then `scaler.step(optimizer)` and
            `scaler.update()`. h is divided by the scale, exactly where that is a power of two. A
            gradient of any pass that is not finite skips the step, lowers the scale, and leaves
            parameters, moments, counters and V as they were. Not kept when the optimizer is
            pickled.

    Attributes:
        calibration: what `calibrate_rho` found, or None.

    Raises:
        ValueError: for a setting out of range, or parameters that share nothing with the probed
            model.
        RuntimeError: if a backend is named that cannot run where the parameters are.
    """

    def __init__(
        self,
        params: ParamsT,
        probes: ProbeSet | None = None,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        rho: float | Literal["auto"] = "auto",
        probe_lr: float = 3e-3,
        probe_rule: Literal["gradient", "normalized", "adam"] = "normalized",
        schedule: Literal["paper", "lagged"] = "paper",
        difference: Literal["central", "forward"] = "central",
        safety_weight: float = 0.0,
        safety_level: float | Literal["auto"] | None = None,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        backend: str = "auto",
        calibrate_every: int | None = None,
        keep_direction: bool = False,
        preset: Literal["paper", "balanced", "economical"] = "paper",
        direction_every: int | None = None,
        probe_every: int | None = None,
        probe_fraction: float | None = None,
        checkpointing: Literal["none", "layers", "auto"] = "none",
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        _check_choice("probe_rule", probe_rule, PROBE_RULES)
        _check_choice("schedule", schedule, ("paper", "lagged"))
        _check_choice("difference", difference, ("central", "forward"))
        _check_choice("preset", preset, tuple(PRESETS))
        _check_choice("checkpointing", checkpointing, ("none", "layers", "auto"))
        _check_at_least_zero("lr", lr)
        _check_at_least_zero("eps", eps)
        _check_at_least_zero("weight_decay", weight_decay)
        _check_at_least_zero("probe_lr", probe_lr)
        _check_at_least_zero("safety_weight", safety_weight)
        for index, beta in enumerate(betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas[{index}]={beta!r} is out of range; give 0 ≤ beta < 1")
        if rho != "auto":
            if isinstance(rho, str):
                raise ValueError(f'rho={rho!r} is not known; give "auto" or a number ≥ 0')
            _check_at_least_zero("rho", rho)
        _check_level(safety_level, safety_weight, probes)
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm={max_grad_norm!r} is out of range; give a number > 0")
        if calibrate_every is not None and calibrate_every < 1:
            raise ValueError(
                f"calibrate_every={calibrate_every!r} is out of range; give a number ≥ 1, or None"
            )
        settings = PRESETS[preset]
        self.direction_every = _or(direction_every, settings.direction_every)
        self.probe_every = _or(probe_every, settings.probe_every)
        self.probe_fraction = _or(probe_fraction, settings.probe_fraction)
        for name in ("direction_every", "probe_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is out of range; give 1 or more")
        if not 0 < self.probe_fraction <= 1:
            raise ValueError(f"probe_fraction={probe_fraction!r} is out of range; give 0 < f ≤ 1")
        if probes is not None and probes.shape == "token":
            _refuse_for_tokens(schedule, self.probe_every, self.probe_fraction)
        if checkpointing != "none" and probes is None:
            raise ValueError(
                f"checkpointing={checkpointing!r} needs a ProbeSet, which knows the decoder "
                "layers; without one use the model's own gradient_checkpointing_enable()"
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
        }
        super().__init__(params, defaults)
        self.probes = probes
        self.rho = rho
        self.probe_lr = probe_lr
        self.probe_rule = probe_rule
        self.schedule = schedule
        self.difference = difference
        self.safety_weight = safety_weight
        self.safety_level = safety_level
        self.max_grad_norm = max_grad_norm
        self.backend = backend
        self.calibrate_every = calibrate_every
        self.keep_direction = keep_direction
        self.calibration: Calibration | None = None
        self.checkpointing = checkpointing
        self._steps = 0
        #: When the direction and V that are in use were found; None: there is none.
        self._direction_step: int | None = None
        self._probe_step: int | None = None
        #: ‖∇L_safe‖ of a direction that is kept in the parameters' state.
        self._direction_norm: Tensor | None = None
        #: 0-d bool: the V in use came of a sound direction and a finite h.
        self._sound: Tensor | None = None
        self._directions_taken = 0
        #: Sum and number of the L_safe whose mean is the level, with `safety_level="auto"`.
        self._level_losses = torch.zeros(2)
        #: Whether L_safe was above the level in the safety pass whose direction is in use; a 0-d
        #: bool until the host asks.
        self._above_level: Tensor | bool | None = None
        self._skipped_steps = torch.zeros((), dtype=torch.int64)
        self._start_session()
        self.grad_scaler = grad_scaler

        refuse_foreign_shards(self._all_parameters())
        ops.check_backend(backend, {p.device.type for p in self._all_parameters()})
        if probes is not None:
            probes.backend = backend
            probed = {id(parameter) for parameter in probes.model.parameters()}
            if not any(id(parameter) in probed for parameter in self._all_parameters()):
                raise ValueError(
                    "params and probes share no parameter: the optimizer would perturb weights "
                    "that the probed model does not use; pass the parameters of the model that "
                    "ProbeSet was given"
                )

    def _start_session(self) -> None:
        """Set what is neither a setting nor part of a checkpoint."""
        self.grad_scaler = None
        self.activation_checkpointing: Checkpointing | None = None
        if self.checkpointing != "none":
            assert self.probes is not None
            layers, owner = find_decoder_layers(self.probes.model)
            self.activation_checkpointing = Checkpointing(
                layers, owner, self.checkpointing, self.probes.layers[0]
            )
        self._passes = Passes(self)
        self._last_record = StepRecord()
        self._mailbox = Mailbox()
        self._warned: set[str] = set()
        self._rounding_checked = False

    # ---- the passes ----

    def runs_in(self, wrapped: nn.Module) -> None:
        """Make known the model as the loop calls it, where it was wrapped after the construction.

        Args:
            wrapped: the `DistributedDataParallel` around the probed model, or the model that
                `fully_shard` was called on.

        Raises:
            ValueError: for FSDP1, DeepSpeed, tensor parallelism, and `static_graph=True`.
        """
        refuse_foreign_shards(self._all_parameters())
        self._passes.ranks = Ranks(wrapped)
        if self.probes is not None:
            self.probes.ranks = self._passes.ranks

    def safety_pass(self) -> AbstractContextManager[LossRecord]:
        """Start a step: the body runs backward on the safety loss, and ΔW is taken from that.

        Gradients that parameters hold already are set aside and come back. The body may run several
        backward passes. Calling the object that `with … as` binds with the loss records it for
        `metrics`; so do those of the other passes.

        Raises:
            RuntimeError: inside another pass; at the end, if no parameter received a gradient.
        """
        return self._passes.safety_pass()

    def probe_passes(self) -> Iterator[LossRecord]:
        """Iterate over the probe passes: each turn of the loop runs backward on the task loss.

        Every turn must run the same micro-batches in the same order, and the task pass after them
        as well. Parameters are frozen meanwhile, and perturbed as the turn wants them.

        Raises:
            RuntimeError: inside another pass, without a probe set, or without a safety pass before.
        """
        return self._passes.probe_passes()

    def task_pass(self) -> AbstractContextManager[LossRecord]:
        """Open the pass whose backward leaves ∇_W L_task(W, V_safe) in the parameters' `.grad`.

        Gradients are added to those that exist, as usual. May be entered once per micro-batch.

        Raises:
            RuntimeError: inside another pass, or without probe passes before.
        """
        return self._passes.task_pass()

    @property
    def needs_direction(self) -> bool:
        """Whether the coming step has to run the safety pass."""
        if not (self._probe_is_due or self.safety_weight != 0):
            return False
        if self._direction_step is None or self._direction_norm is None:
            return True
        return self._steps - self._direction_step >= self.direction_every

    @property
    def needs_probe(self) -> bool:
        """Whether the coming step has to run the probe passes; else it keeps its V.

        With `safety_level`, ask after the safety pass: where that found L_safe at the level or
        below, the step has no probe. The host waits for it, unless it was asked before.
        """
        return self._probe_is_due and not self.is_held

    @property
    def _probe_is_due(self) -> bool:
        if self.probes is None:
            return False
        return self._probe_step is None or self._steps - self._probe_step >= self.probe_every

    @property
    def is_held(self) -> bool:
        """Whether the step is AdamW's alone, as L_safe is not above `safety_level`.

        False before the safety pass of a step that has one. The host waits for the device.
        """
        if not self._passes.safety_pass_ran:
            if self.needs_direction or self._above_level is None:
                return False
            self._above_level = bool(self._above_level)
            return not self._above_level
        record = self._passes.record
        if record.above_level is None:
            return False
        record.above_level = bool(record.above_level)
        return not record.above_level

    @property
    def directions_taken(self) -> int:
        """How many steps so far ran a safety pass: which safety rows are due."""
        return self._directions_taken

    def probe_part(self, batch: Any) -> Any:
        """Return what of the task batch the pass in progress needs.

        Args:
            batch: a batch, that is a mapping of tensors (B, …), or a list of micro-batches.

        Returns:
            Inside the probe passes its first ⌈probe_fraction·B⌉ rows, with B counted over all
            micro-batches; elsewhere `batch` itself.
        """
        return self._passes.probe_part(batch)

    # ---- the step ----

    # The base class declares one overload without a closure and one with; here a second closure
    # comes in, which it cannot express. Calls that it allows mean the same.
    def step(  # type: ignore[override]
        self, closure: Closure | None = None, safety_closure: Closure | None = None
    ) -> Tensor | None:
        """Update the parameters; with closures, after all passes of a SAP step.

        Args:
            closure: clears gradients if they are not cleared already, computes the task loss, calls
                backward and returns the loss. Runs once per probe pass and once in the task pass;
                must use the same batch each time. Clear gradients before `step` rather than in the
                closure: gradients that exist on entry are copied, to come back if the step fails.
            safety_closure: the same for the safety loss.

        Returns:
            The task loss of the task pass, if there was a closure.

        Raises:
            RuntimeError: inside a pass; with probe passes run but no task pass after them; for a
                sparse gradient.
            TypeError: with one closure but not the other that is needed.
        """
        self._passes.refuse_inside("step()")
        if closure is not None and self.probes is None and self.safety_weight == 0:
            with torch.enable_grad():
                loss = closure()
            self._update()
            return loss
        if closure is not None:
            with self._passes.given_up_on_error():
                loss = self._run_closures(closure, safety_closure)
                self._update()
            return loss
        if safety_closure is not None:
            raise TypeError("step(safety_closure=…) without a task closure: give both, or neither")
        if self._passes.probe_passes_ran and not self._passes.task_pass_ran:
            raise RuntimeError(
                "step() after probe_passes() without task_pass(): the gradients were not taken "
                "under the probe; run backward on the task loss inside task_pass() first"
            )
        self._update()
        return None

    def _run_closures(self, closure: Closure, safety_closure: Closure | None) -> Tensor:
        if safety_closure is None:
            raise TypeError(
                "step(task_closure) needs a safety closure too: step(task_closure, "
                "safety_closure); for plain AdamW run backward yourself and call step()"
            )
        if self.needs_calibration:
            self.calibrate_rho(closure, safety_closure)
        with torch.enable_grad():
            if self.needs_direction:
                with self.safety_pass() as record:
                    record(safety_closure())
            if self.needs_probe:
                for record in self.probe_passes():
                    record(closure())
            with self.task_pass() as record:
                loss = closure()
                record(loss)
        return loss

    @torch.no_grad()
    def _update(self) -> None:
        passes, record = self._passes, self._passes.record
        if self.schedule == "lagged" and passes.task_pass_ran and passes.probe_passes_ran:
            passes.finish_lagged()
        trained = [p for p in self._all_parameters() if p.grad is not None]
        # All state first: an update that runs out of memory half-way cannot be undone.
        for parameter in trained:
            refuse_sparse(parameter)
            self._initialize_state(parameter)
        directions, blend, gradient_scale = self._blend_and_scale(trained)
        for group in self.param_groups:
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            states = [self.state[parameter] for parameter in params]
            ops.adamw_blend_(
                params,
                [parameter.grad for parameter in params],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [state["step"] for state in states],
                [directions.get(parameter) for parameter in params] if directions else [],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                maximize=group["maximize"],
                blend=blend,
                gradient_scale=gradient_scale,
                backend=self.backend,
            )
        self._account(record)
        if passes.safety_pass_ran:
            self._directions_taken += 1
            self._keep_direction()
            self._keep_level(record)
        if passes.probe_passes_ran:
            self._probe_step = self._steps
        self._steps += 1
        self._last_record = record
        passes.reset(completed=True)

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
        if self._direction_outlives_step and not self._passes.safety_pass_ran:
            # For checkpoints: what is loaded must find its place in an optimizer that never ran.
            state["direction"] = torch.zeros_like(parameter)

    @property
    def _direction_outlives_step(self) -> bool:
        used_every = 1 if self.safety_weight != 0 else self.probe_every
        return self.direction_every > used_every

    def _keep_direction(self) -> None:
        """Put the direction of this step where the steps that still use it will find it."""
        if not self._direction_outlives_step or self._passes.direction is None:
            return
        directions = dict(zip(self._passes.perturbed, self._passes.direction, strict=True))
        for parameter in self.trained_parameters():
            direction = directions.get(parameter)
            self.state[parameter]["direction"] = (
                torch.zeros_like(parameter) if direction is None else direction
            )
        self._direction_norm = self._passes.record.direction_norm
        self._direction_step = self._steps

    def release_direction(self) -> None:
        """Free the direction of an earlier step, as one is taken that replaces it.

        Both at once would be a second parameter-sized buffer. If the safety pass fails, the next
        step takes a direction, as it would have anyway.
        """
        self._direction_step = self._direction_norm = None
        for parameter in self._all_parameters():
            self.state.get(parameter, {}).pop("direction", None)

    @property
    def holds_level(self) -> bool:
        """Whether the safety pass has to record its loss, for `safety_level`."""
        changes_gradients = self.safety_weight != 0 or self.probes is not None
        return changes_gradients and self.safety_level is not None

    def _level(self) -> Tensor | float:
        """Return the L_safe to hold; −∞ before it is found."""
        if self.safety_level != "auto":
            return -math.inf if self.safety_level is None else self.safety_level
        total, count = self._level_losses
        return torch.where(count < _LEVEL_PASSES, -math.inf, total / count.clamp(min=1))

    def is_above_level(self, safety_loss: Tensor) -> Tensor:
        """Return whether an L_safe, 0-d, is above the level, as a 0-d bool."""
        self._level_losses = self._level_losses.to(safety_loss.device)
        return safety_loss > self._level()

    @property
    def above_level(self) -> Tensor | bool | None:
        """Whether L_safe of the direction that is kept was above the level; None: no level."""
        return self._above_level

    def _keep_level(self, record: StepRecord) -> None:
        """Remember for later steps what the safety pass of this one found."""
        if record.level_loss is None:
            return
        self._above_level = record.above_level
        counts = record.level_loss.isfinite() & (self._level_losses[1] < _LEVEL_PASSES)
        found = torch.stack([record.level_loss, torch.ones_like(record.level_loss)])
        self._level_losses = self._level_losses + torch.where(counts, found, 0.0)

    def kept_direction(self) -> tuple[list[nn.Parameter], list[Tensor], Tensor] | None:
        """Return parameters, direction and its norm, if an earlier step's direction is in use."""
        if self._direction_norm is None or not self._direction_outlives_step:
            return None
        perturbed = [p for p in self.trained_parameters() if "direction" in self.state.get(p, {})]
        direction = [self.state[parameter]["direction"] for parameter in perturbed]
        return perturbed, direction, self._direction_norm

    def _blend_and_scale(
        self, trained: list[nn.Parameter]
    ) -> tuple[dict[nn.Parameter, Tensor], Tensor | None, Tensor | None]:
        """Return the direction by parameter, γ‖g‖/‖d‖, and the clipping coefficient."""
        passes, valid = self._passes, self._passes.record.direction_valid
        norm_of_direction = self._passes.record.direction_norm
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        blending = self.safety_weight != 0 and passes.direction is not None
        directions: dict[nn.Parameter, Tensor] = {}
        blend = gradient_scale = None
        if not gradients or not (blending or self.max_grad_norm is not None):
            return directions, blend, gradient_scale

        square = ops.sum_squares(gradients, backend=self.backend)
        if blending:
            assert passes.direction is not None and norm_of_direction is not None
            assert valid is not None
            directions = dict(zip(passes.perturbed, passes.direction, strict=True))
            above = passes.record.above_level
            blends = valid if above is None else valid & above
            blend = torch.where(blends, self.safety_weight * square.sqrt() / norm_of_direction, 0.0)
            pairs = [(p.grad, directions[p]) for p in trained if p in directions]
            if pairs:
                # ‖±g + b·d‖² from its parts: no buffer holds the sum before the update.
                sign = -1.0 if self.defaults["maximize"] else 1.0
                cross = 2 * sign * blend * ops.dot(*zip(*pairs, strict=True), backend=self.backend)
                blended = square + cross + (blend * norm_of_direction).square()
                square = torch.where(valid, blended, square)
        if self.max_grad_norm is not None:
            # The coefficient of torch.nn.utils.clip_grad_norm_.
            gradient_scale = (self.max_grad_norm / (square.sqrt() + 1e-6)).clamp(max=1.0)
        return directions, blend, gradient_scale

    def _account(self, record: StepRecord) -> None:
        """Count a step that ran as plain AdamW, and warn about it once the host hears of it."""
        sound = record.direction_valid
        if sound is not None and record.estimate_finite is not None:
            sound = sound & record.estimate_finite.to(sound.device)
        if self._passes.probe_passes_ran:
            self._sound = sound
        elif self.probes is not None and self._passes.task_pass_ran and not self.is_held:
            # The V of an earlier step, which is zero if that step had no direction or no h.
            sound = self._sound
        if sound is None:
            return
        self._skipped_steps = self._skipped_steps.to(sound.device) + sound.logical_not()
        if record.direction_norm is None:
            return
        survives = torch.full_like(record.direction_norm, torch.nan)
        if record.perturbation_applied is not None and record.perturbation_norm is not None:
            assert record.direction_valid is not None  # set with the norm
            # An unsound direction perturbs nothing, and says nothing about rounding.
            ratio = record.perturbation_applied / record.perturbation_norm
            survives = torch.where(record.direction_valid, ratio, survives)
            self._rounding_checked = True
        norm = record.direction_norm
        if record.loss_scale is not None:
            norm = norm / record.loss_scale.to(norm.device)
        self._mailbox.post(torch.stack([self._skipped_steps, norm, survives]))
        self._warn_about(self._mailbox.collect(), record.rho)

    def _warn_about(self, figures: list[float] | None, rho: float) -> None:
        if figures is None:
            return
        skipped, direction_norm, survives = figures
        if skipped > 0:
            self.warn_once(
                "skipped",
                f"FusedSAP: {skipped:.0f} step(s) ran as plain AdamW because the direction was "
                "zero or not finite, or the probe gradient was not finite (‖∇L_safe‖ = "
                f"{direction_norm:.3g}); further ones are counted in metrics.skipped_steps",
            )
        if survives < 0.5:
            assert self.probes is not None
            self.warn_once(
                "rounding",
                f"FusedSAP: only {survives:.1%} of the norm of the perturbation survives rounding "
                f"to {self.probes.compute_dtype} at rho={rho:.3g}: the probe gradient "
                'is mostly noise; use a larger rho, rho="auto", or a wider dtype',
            )

    def warn_once(self, kind: str, message: str) -> None:
        """Warn, unless a warning of this kind was given before."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=2)

    # ---- ρ ----

    @property
    def needs_calibration(self) -> bool:
        """Whether the next step should calibrate ρ first; `step` with closures does so itself."""
        if self.rho != "auto" or not self.needs_probe:
            return False
        if self.calibration is None:
            return True
        since = self._steps - self.calibration.step
        return self.calibrate_every is not None and since >= self.calibrate_every

    @property
    def current_rho(self) -> float:
        """ρ of the next step: the number given, or the calibrated one, or else 1e-2."""
        if self.rho != "auto":
            return float(self.rho)
        if self.calibration is not None:
            return self.calibration.rho
        self.warn_once(
            "uncalibrated",
            f'FusedSAP: rho="auto" was not calibrated and {_UNCALIBRATED_RHO:g} is used; call '
            "calibrate_rho(task_closure, safety_closure) before the first step, or give a number",
        )
        return _UNCALIBRATED_RHO

    def calibrate_rho(self, task_closure: Closure, safety_closure: Closure) -> Calibration | None:
        """Find the ρ at which h can be trusted most, and use it from now on.

        A ρ too small drowns in rounding, one too large leaves the linear range, and either way the
        h it gives disagrees with those of half and of twice the ρ. So h is estimated on the grid
        0.1·2⁻ᵏ, k = 0…10, and the ρ is taken whose h has the largest cosine with both; with forward
        differences and in the lagged schedule, half of that whose h has the largest with that of
        ρ/2. Costs 22 probe passes and a safety pass, and one parameter-sized buffer meanwhile;
        changes nothing but ρ.

        Args:
            task_closure: runs forward and backward on the task loss and returns it.
            safety_closure: the same for the safety loss.

        Returns:
            What was found; None, with a warning, if no ρ gave a usable h.

        Raises:
            RuntimeError: inside a pass, or without a probe set.
        """
        self._passes.refuse_inside("calibrate_rho()")
        probes = self.probes
        if probes is None:
            raise RuntimeError("calibrate_rho() without a probe set: there is no ρ to calibrate")
        difference = "forward" if self.schedule == "lagged" else self.difference
        estimates: list[Tensor] = []
        try:
            with torch.enable_grad():
                with self._passes.safety_pass(keeps_earlier=True) as record:
                    record(safety_closure())
                for rho in RHO_GRID:
                    self._passes.record.rho = rho
                    for _ in self._passes.estimate(
                        probes, difference=difference, keep_direction=True
                    ):
                        task_closure()
                    # All of h as one vector; layers may lie on several devices.
                    flat = [h.flatten().double().cpu() for h in probes.estimates.values()]
                    estimates.append(torch.cat(flat))
        finally:
            self._passes.reset()
        agreements = {
            rho: (h.dot(h_of_half) / (h.norm() * h_of_half.norm())).item()
            for rho, h, h_of_half in zip(RHO_GRID[:-1], estimates[:-1], estimates[1:], strict=True)
        }
        usable = {rho: value for rho, value in agreements.items() if math.isfinite(value)}
        if not usable:
            self.warn_once(
                "calibration",
                "FusedSAP: calibration found no ρ with a finite, non-zero probe gradient among "
                f"{RHO_GRID[0]:g} … {RHO_GRID[-1]:.2g}; trying again at the next step",
            )
            return None
        rho, agreement = _most_trusted(usable, difference)
        self.calibration = Calibration(rho, agreement, agreements, self._steps)
        self._rounding_checked = False
        return self.calibration

    # ---- metrics ----

    @property
    def metrics(self) -> SAPMetrics:
        """Figures of the last step. Reading waits for the device; not reading costs nothing."""
        record, probes = self._last_record, self.probes
        calibration = self.calibration if self.rho == "auto" else None
        figures: dict[str, Any] = {
            "safety_loss": _number(record.safety_loss.total),
            "task_loss": _number(record.task_loss.total),
            "safety_level": self._known_level(),
            "above_level": None if record.above_level is None else bool(record.above_level),
            "parameter_norm": _number(record.parameter_norm),
            "skipped_steps": int(self._skipped_steps),
        }
        if probes is None or record.perturbation_norm is None:
            return SAPMetrics(**figures)
        figures |= {
            "rho": record.rho,
            "rho_agreement": calibration.agreement if calibration else None,
            "perturbation_wanted": _number(record.perturbation_norm),
            "perturbation_applied": _number(record.perturbation_applied),
            "estimate_norms": {j: h.norm().item() for j, h in probes.estimates.items()},
            "probe_sizes": probes.relative_sizes(),
            "lean": self._lean(record),
        }
        if self.schedule == "paper":
            offsets = probes.offsets
            figures["lean_predicted"] = sum(
                torch.sum(h * offsets[j]).item() for j, h in probes.estimates.items()
            )
        return SAPMetrics(**figures)

    def _known_level(self) -> float | None:
        level = float(self._level()) if self.holds_level else -math.inf
        return None if level == -math.inf else level

    def _lean(self, record: StepRecord) -> float | None:
        sign = -1.0 if self.defaults["maximize"] else 1.0
        slope, norm = _number(record.direction_slope), _number(record.perturbation_norm)
        if slope is None:
            return None
        slope /= _number(record.loss_scale) or 1.0
        losses = [loss.total for loss in record.probe_losses if loss.total is not None]
        if self.schedule == "lagged" or not norm or len(losses) != 2:
            return sign * slope
        apart = 2 * norm if self.difference == "central" else norm
        # ⟨ĝ, ∇_W L_task(W, 0)⟩, differenced from the losses that the probe passes had anyway.
        return sign * (slope - (losses[0] - losses[1]).item() / apart)

    # ---- state ----

    @property
    def direction_is_kept(self) -> bool:
        """Whether ĝ stays exact until the end of the step."""
        return self.keep_direction or self.safety_weight != 0 or self._direction_outlives_step

    @property
    def measures_rounding(self) -> bool:
        """Whether the next probe pass measures how much of ΔW survives rounding."""
        return self.keep_direction or not self._rounding_checked

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of all groups that require grad."""
        return [parameter for parameter in self._all_parameters() if parameter.requires_grad]

    def _all_parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group; see `torch.optim.Optimizer.add_param_group`."""
        if "_passes" in self.__dict__:  # not yet, while the base class adds the first groups
            self._passes.refuse_inside("add_param_group()")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of AdamW, interchangeable with `torch.optim.AdamW`'s, and SAP's.

        Under the key `"sap"`: the calibration, V where later steps use it, and the step counters.

        Raises:
            RuntimeError: inside a pass.
        """
        self._passes.refuse_inside("state_dict()")
        state_dict = super().state_dict()
        state_dict["sap"] = self._sap_state_dict()
        return state_dict

    def _sap_state_dict(self) -> dict[str, Any]:
        calibration = self.calibration
        outlives_step = self.schedule == "lagged" or self.probe_every > 1
        return {
            "calibration": None if calibration is None else dict(vars(calibration)),
            "offsets": self._passes.settled_offsets() if outlives_step else {},
            "steps": self._steps,
            "skipped_steps": self._skipped_steps,
            "direction_step": self._direction_step,
            "direction_norm": self._direction_norm,
            "directions_taken": self._directions_taken,
            "level_losses": self._level_losses,
            "above_level": self._above_level,
            "probe_step": self._probe_step,
            "sound": self._sound,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict`, or that of `torch.optim.AdamW`, returned.

        Moments keep their fp32, where `torch.optim.Optimizer` would round them to the dtype of the
        parameter.

        Raises:
            RuntimeError: inside a pass.
            ValueError: if parameter groups or probed layers do not match.
        """
        self._passes.refuse_inside("load_state_dict()")
        super().load_state_dict(state_dict)
        saved = [identifier for g in state_dict["param_groups"] for identifier in g["params"]]
        for identifier, parameter in zip(saved, self._all_parameters(), strict=True):
            dtype = accumulation_dtype(parameter.dtype)
            if identifier in state_dict["state"]:
                step = self.state[parameter]["step"]
                self.state[parameter]["step"] = step.to(_step_device(parameter))
            for moment in ("exp_avg", "exp_avg_sq"):
                if identifier in state_dict["state"] and parameter.dtype != dtype:
                    value = state_dict["state"][identifier][moment]
                    self.state[parameter][moment] = value.to(parameter.device, dtype)
        if "sap" in state_dict:
            self._load_sap_state_dict(state_dict["sap"])

    def _load_sap_state_dict(self, sap: dict[str, Any]) -> None:
        found = sap["calibration"]
        self.calibration = None if found is None else Calibration(**found)
        self._steps = sap["steps"]
        self._skipped_steps = sap["skipped_steps"].clone()
        self._direction_step = sap["direction_step"]
        self._direction_norm = sap["direction_norm"]
        self._directions_taken = sap["directions_taken"]
        self._level_losses = sap["level_losses"]
        self._above_level = sap["above_level"]
        # Saved by an optimizer that finds V at every step, it comes without.
        self._probe_step = sap["probe_step"] if sap["offsets"] else None
        self._sound = sap["sound"]
        if self.probes is not None:
            self.probes.load_state_dict(sap["offsets"])

    @property
    def sap_state(self) -> SAPState:
        """V, calibration and counters for `torch.distributed.checkpoint`, beside what AdamW has.

        Its `get_optimizer_state_dict` knows AdamW's state alone, so give it this, too:
        `dcp.save({"model": …, "optimizer": …, "sap": optimizer.sap_state})`, and likewise to
        `dcp.load`, after the state dict of the optimizer was taken and before it is used.
        """
        return SAPState(self)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state |= {name: getattr(self, name) for name in _PICKLED}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("maximize", False)
        # The base class also comes here from load_state_dict, with groups and state alone.
        if "probes" in state:
            self._start_session()


class SAPState:
    """What SAP adds to the state of AdamW, as a `Stateful`; see `FusedSAP.sap_state`."""

    def __init__(self, optimizer: FusedSAP) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return it as one entry of bytes: entry by entry, a fresh optimizer would miss some."""
        stream = io.BytesIO()
        torch.save(self._optimizer.state_dict()["sap"], stream)
        return {"sap": stream.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        stream = io.BytesIO(state_dict["sap"])
        self._optimizer._load_sap_state_dict(torch.load(stream, weights_only=True))


# Settings and counters that a pickled optimizer keeps, besides what the base class keeps.
_PICKLED = (
    "probes",
    "rho",
    "probe_lr",
    "probe_rule",
    "schedule",
    "difference",
    "safety_weight",
    "safety_level",
    "max_grad_norm",
    "backend",
    "calibrate_every",
    "keep_direction",
    "direction_every",
    "probe_every",
    "probe_fraction",
    "checkpointing",
    "calibration",
    "_direction_step",
    "_direction_norm",
    "_directions_taken",
    "_level_losses",
    "_above_level",
    "_probe_step",
    "_sound",
    "_steps",
    "_skipped_steps",
)


def _step_device(parameter: Tensor) -> torch.device:
    """Where a parameter's step counter lies: on the GPU, so that a step can be a CUDA graph."""
    return parameter.device if parameter.is_cuda else torch.device("cpu")


def _number(tensor: Tensor | None) -> float | None:
    return None if tensor is None else tensor.item()


_Setting = TypeVar("_Setting")


def _or(given: _Setting | None, default: _Setting) -> _Setting:
    return default if given is None else given


def _refuse_for_tokens(schedule: str, probe_every: int, probe_fraction: float) -> None:
    """Raise if a setting asks for one batch's probe in another."""
    for name, value, needed in (
        ("schedule", schedule, "paper"),
        ("probe_every", probe_every, 1),
        ("probe_fraction", probe_fraction, 1),
    ):
        if value != needed:
            raise ValueError(
                f"{name}={value!r} uses the probe of one batch in another, but a probe with "
                f'shape="token" fits its own batch only; use shape="hidden" or {name}={needed!r}'
            )


def _most_trusted(agreements: dict[float, float], difference: str) -> tuple[float, float]:
    """Return the ρ whose h can be trusted most, and its agreement.

    Args:
        agreements: cosines, all finite, of h at ρ and at ρ/2, for one ρ at least.
        difference: as for `FusedSAP`.
    """
    if difference == "forward":
        # Off by O(ρ): h(ρ) by twice as much as it disagrees with h(ρ/2), h(ρ/2) by as much.
        best = max(agreements, key=lambda rho: agreements[rho])
        return best / 2, agreements[best]
    # Off by O(ρ²), of which h(2ρ) has four times as much, and by rounding, of which h(ρ/2) has
    # twice as much: the first shows in the disagreement with one, the second with the other. By
    # h(ρ/2) alone a ρ twice too large may be taken, at a cosine with the exact h of 0.967 where
    # 0.992 can be had (benchmarks/fidelity.py, SmolLM2 under bf16 autocast).
    between = {
        rho: agreements[rho] + agreements[2 * rho] for rho in agreements if 2 * rho in agreements
    }
    candidates = between or agreements
    best = max(candidates, key=lambda rho: candidates[rho])
    return best, agreements[best]


def _check_level(level: float | str | None, weight: float, probes: ProbeSet | None) -> None:
    """Raise if a level is none, or has nothing to bound."""
    if level is None:
        return
    if level != "auto" and (isinstance(level, str) or not math.isfinite(level)):
        raise ValueError(f'safety_level={level!r} is not known; give "auto", a number or None')
    if weight == 0 and probes is None:
        raise ValueError(
            f"safety_level={level!r} bounds probe and γ-blending, and probes=None with "
            "safety_weight=0 has neither; give one of them, or safety_level=None"
        )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")


def _check_at_least_zero(name: str, value: float | Tensor) -> None:
    if not float(value) >= 0:
        raise ValueError(f"{name}={value!r} is out of range; give a number ≥ 0")
