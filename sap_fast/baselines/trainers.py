"""Baselines and controls as trainers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.distributed import local_shards
from sap_fast.integrations.trainer import SAPTrainer, SAPTrainerMixin
from sap_fast.losses import task_loss
from sap_fast.optimizer import FusedSAP
from sap_fast.passes import Perturbation, gradients_set_aside
from sap_fast.probes import ProbeSet
from sap_fast.random_state import RandomState


class _WithoutProbe(SAPTrainer):
    """`SAPTrainer` that runs no pass of its own: AdamW, with rows of safety data at hand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, probe_layers=None, **kwargs)

    def _answers(self, kind: Literal["chosen", "rejected"], micro_batch: int) -> Any:
        """Return safe or harmful answers of a safety batch, another one for each micro-batch."""
        number = self.state.global_step * self.args.gradient_accumulation_steps + micro_batch
        rows = self._safety_batches.rows(number, self.args.process_index, self.args.world_size)
        return self._prepare_inputs(self._safety_collator(rows)[kind])


def _refuse_lagged(sap_options: dict[str, Any], what: str) -> None:
    """Raise for a schedule whose V is not used in the step that finds it."""
    if sap_options.get("schedule", "paper") != "paper":
        raise ValueError(f"{what} needs schedule='paper', whose V is used where it is found")


def _gradients_of(
    optimizer: FusedSAP, backward: Callable[[], None]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the parameters that `backward` reaches and their gradients, set beside others."""
    parameters = optimizer.trained_parameters()
    with gradients_set_aside(parameters):
        backward()
        reached = [p for p in parameters if p.grad is not None]
        return list(reached), [p.grad for p in reached if p.grad is not None]


def _step_of_length(length: float, gradients: list[Tensor]) -> Tensor:
    """Return the factor that gives `gradients` a joint norm of `length`; 0 if they are zero."""
    norm = ops.sum_squares(gradients).sqrt()
    return torch.where(norm == 0, 0.0, length / norm)


class MixedTrainer(_WithoutProbe):
    """AdamW on task rows and refusals at once: L_task + w·L(refusals).

    The simplest use of safety data (Bianchi et al. 2024, arXiv:2309.07875), and what the reviewers
    of SAP asked to see beside it. Every micro-batch brings a safety batch of its own; the mean over
    its tokens has the weight w whatever its size.

    Args:
        *args: as for `SAPTrainer`.
        refusal_weight: w.
        **kwargs: as for `SAPTrainer`.
    """

    def __init__(self, *args: Any, refusal_weight: float = 0.5, **kwargs: Any) -> None:
        if not refusal_weight >= 0:
            raise ValueError(f"refusal_weight={refusal_weight}: expected a number ≥ 0")
        self._refusal_weight = refusal_weight
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of the task rows, while training with that of the refusals."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not model.training:
            return loss
        with self.accelerator.autocast():
            refusals = task_loss(model, self._answers("chosen", self._window_position - 1))
        if num_items_in_batch is not None:
            # The trainer divides the whole loss only where nothing else did.
            refusals = refusals / self.current_gradient_accumulation_steps
        return loss + self._refusal_weight * refusals


class LisaTrainer(_WithoutProbe):
    """Lisa: some steps on refusals, then some on the task, each held near where the other ended.

    Huang et al. 2024 (arXiv:2405.18641). Steps of alignment come first. Where a state begins, the
    weights are kept as w̄, one parameter-sized buffer in the optimizer's state, and each step of
    the state adds ρ/2·‖w − w̄‖² to its loss. As in the authors' code the term is left out in the
    first tenth of the run.

    Args:
        *args: as for `SAPTrainer`.
        alignment_steps: steps on refusals, in turn with
        task_steps: steps on task rows. The authors take 100 and 900 in runs of 20,000; what counts
            in a shorter one is their ratio and how often they alternate.
        proximal: ρ.
        **kwargs: as for `SAPTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        alignment_steps: int = 100,
        task_steps: int = 900,
        proximal: float = 1.0,
        **kwargs: Any,
    ) -> None:
        if alignment_steps < 1 or task_steps < 1:
            raise ValueError(
                f"alignment_steps={alignment_steps}, task_steps={task_steps}: expected ≥ 1"
            )
        if not proximal >= 0:
            raise ValueError(f"proximal={proximal}: expected a number ≥ 0")
        self._alignment_steps, self._task_steps = alignment_steps, task_steps
        self._proximal = proximal
        super().__init__(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one micro-batch of the state that the step is in."""
        micro_batch, step = self._window_position, self.state.global_step
        position = step % (self._alignment_steps + self._task_steps)
        aligning = position < self._alignment_steps
        if micro_batch == 0 and position in (0, self._alignment_steps):
            for parameter in self.sap_optimizer.trained_parameters():
                self.sap_optimizer.state[parameter]["anchor"] = parameter.detach().clone()
        if aligning:
            # A mean over their own tokens: the items are those of the task rows.
            inputs, num_items_in_batch = self._answers("chosen", micro_batch), None
        loss = super().training_step(model, inputs, num_items_in_batch)
        if micro_batch == 0 and step >= 0.1 * self.state.max_steps:
            self._add_proximal_gradient()
        return loss

    @torch.no_grad()
    def _add_proximal_gradient(self) -> None:
        optimizer = self.sap_optimizer
        for parameter in optimizer.trained_parameters():
            if parameter.grad is not None:
                drift = parameter - optimizer.state[parameter]["anchor"]
                parameter.grad.add_(drift, alpha=self._proximal)


class SAMTrainer(_WithoutProbe):
    """Sharpness-aware minimization of the task loss: its gradient at W + ε, ε = ρ·g/‖g‖.

    Foret et al. 2021 (arXiv:2010.01412): the worst loss near W in its place. g is taken over
    all micro-batches of the step. Needs no safety data, and twice the time.

    Args:
        *args: as for `SAPTrainer`.
        radius: ρ = ‖ε‖; the paper's 0.05 by default.
        **kwargs: as for `SAPTrainer`.
    """

    def __init__(self, *args: Any, radius: float = 0.05, **kwargs: Any) -> None:
        if not radius > 0:
            raise ValueError(f"radius={radius}: expected a number > 0")
        self._radius = radius
        super().__init__(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one micro-batch at W + ε, having found ε before the first of the step."""
        if self._window_position == 0:
            self._find_ascent(model, self._window or [inputs], num_items_in_batch)
        with Perturbation(*self._ascent):
            return super().training_step(model, inputs, num_items_in_batch)

    def _find_ascent(self, model: nn.Module, window: list[Any], num_items: Any) -> None:
        def backward() -> None:
            for micro_batch in window:
                # The Trainer's own: neither at W + ε nor one of the step's task passes.
                super(SAPTrainerMixin, self).training_step(model, micro_batch, num_items)

        reached, gradients = _gradients_of(self.sap_optimizer, backward)
        self._ascent = (reached, gradients, _step_of_length(self._radius, gradients))


class PanaceaTrainer(_WithoutProbe):
    """Panacea: tune so that a step uphill in the harmful loss helps, and take it at the end.

    Wang et al. 2025 (arXiv:2501.18100). With h the loss of harmful answers and
    ε = ρ·∇h(W)/‖∇h(W)‖, every step minimizes L_task(W) − λ·(h(W + ε) − h(W)) with ε held; the tuned
    model is W + ε, with the ε of the last step. Harmful answers are those of the safety rows, here
    affirmative openings. As in the authors' code h(W + ε) counts up to a loss of 5 only. Unlike
    there, both gradients of h are taken under the same dropout masks. A checkpoint holds W without
    ε: a run that is resumed finds ε again in its next step.

    Args:
        *args: as for `SAPTrainer`.
        radius: ρ = ‖ε‖; the authors' 1.0 by default.
        harm_weight: λ; the authors' 0.001 by default.
        **kwargs: as for `SAPTrainer`.
    """

    def __init__(
        self, *args: Any, radius: float = 1.0, harm_weight: float = 0.001, **kwargs: Any
    ) -> None:
        if not radius > 0:
            raise ValueError(f"radius={radius}: expected a number > 0")
        if not harm_weight >= 0:
            raise ValueError(f"harm_weight={harm_weight}: expected a number ≥ 0")
        self._radius, self._harm_weight = radius, harm_weight
        self._ascent: tuple[list[Tensor], list[Tensor], Tensor] | None = None
        super().__init__(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then add ε of the last step to the weights."""
        self._ascent = None
        output = super().train(*args, **kwargs)
        if self._ascent is not None:
            parameters, gradients, scale = self._ascent
            ops.perturb_swap_(local_shards(parameters), local_shards(gradients), scale)
            self._ascent = None
        return output

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one micro-batch, after the first of a step with the gradients of h."""
        first = self._window_position == 0
        loss = super().training_step(model, inputs, num_items_in_batch)
        if first:
            self._add_harm_gradients(model)
        return loss

    def _add_harm_gradients(self, model: nn.Module) -> None:
        devices = {self.args.device} - {torch.device("cpu")}
        before = RandomState(devices)
        harmful = self._answers("rejected", 0)

        def backward(largest: float) -> None:
            before.restore()
            with self.accelerator.autocast():
                loss = task_loss(model, harmful)
            self.accelerator.backward(loss.clamp(max=largest))

        reached, gradients = _gradients_of(self.sap_optimizer, lambda: backward(math.inf))
        scale = _step_of_length(self._radius, gradients)
        with torch.no_grad():
            for parameter, gradient in zip(reached, gradients, strict=True):
                _add_to_gradient(parameter, gradient, self._harm_weight)
        with Perturbation(reached, gradients, scale):
            there, uphill = _gradients_of(self.sap_optimizer, lambda: backward(_LARGEST_HARM))
        with torch.no_grad():
            for parameter, gradient in zip(there, uphill, strict=True):
                _add_to_gradient(parameter, gradient, -self._harm_weight)
        self._ascent = reached, gradients, scale


#: h(W + ε) beyond it is not pushed further, as in Panacea's code.
_LARGEST_HARM = 5.0


def _add_to_gradient(parameter: Tensor, gradient: Tensor, factor: float) -> None:
    if parameter.grad is None:
        parameter.grad = factor * gradient
    else:
        parameter.grad.add_(gradient, alpha=factor)


class ControlTrainer(SAPTrainer):
    """SAP with a part of it taken away: what does its probe do, and how?

    With Δg what the probe V adds to the task gradient g, and ĝ the direction of the safety pass:

    =========== ==================================================================================
    `control`   the step
    =========== ==================================================================================
    `"random"`  under a normal vector of the norm of V in each layer, drawn anew with every V
    `"flipped"` under −V
    `"along"`   on g + ⟨ĝ, Δg⟩ĝ: the lean of the probe and nothing else
    `"beside"`  on g + Δg − ⟨ĝ, Δg⟩ĝ: all that it does but its lean
    =========== ==================================================================================

    The last two take g in one more pass, under the masks of the task pass, and keep two
    parameter-sized buffers.

    Args:
        *args: as for `SAPTrainer`.
        control: which.
        **kwargs: as for `SAPTrainer`, with its schedule `"paper"`.
    """

    def __init__(
        self,
        *args: Any,
        control: Literal["random", "flipped", "along", "beside"],
        **kwargs: Any,
    ) -> None:
        if control not in ("random", "flipped", "along", "beside"):
            raise ValueError(
                f"control={control!r} is not known; choose random, flipped, along or beside"
            )
        self._control = control
        #: By parameter: g without a probe, until the step is projected.
        self._unprobed: dict[Tensor, Tensor] = {}
        super().__init__(*args, **kwargs)
        _refuse_lagged(self._sap_options, "a control")
        if control in ("along", "beside"):
            self._sap_options["keep_direction"] = True

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one micro-batch; after the last of a step, project what the probe did."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._unprobed and self._window_position == max(1, len(self._window)):
            self._project()
        return loss

    def _run_inner_passes(
        self, optimizer: FusedSAP, model: nn.Module, window: list[Any], num_items: Any
    ) -> None:
        super()._run_inner_passes(optimizer, model, window, num_items)
        if self._control in ("along", "beside"):
            self._take_unprobed(model, window, num_items)
        elif optimizer.needs_probe and self.probe_set is not None:
            self._replace_probe(self.probe_set)

    def _replace_probe(self, probe_set: ProbeSet) -> None:
        generator = torch.Generator().manual_seed(
            self.args.seed + 1_000_003 * self.state.global_step
        )
        probe_set.replace_offsets(
            {
                layer: [self._replacement(offset, generator) for offset in calls]
                for layer, calls in probe_set.copy_offsets().items()
            }
        )

    def _replacement(self, offset: Tensor, generator: torch.Generator) -> Tensor:
        if self._control == "flipped":
            return -offset
        noise = torch.randn(offset.shape, generator=generator).to(offset)
        return noise * (offset.norm() / noise.norm())

    def _take_unprobed(self, model: nn.Module, window: list[Any], num_items: Any) -> None:
        before = RandomState({self.args.device} - {torch.device("cpu")})

        def backward() -> None:
            for micro_batch in window:
                # Outside every pass: the Trainer's own, without a probe.
                super(SAPTrainerMixin, self).training_step(model, micro_batch, num_items)

        self._unprobed = dict(zip(*_gradients_of(self.sap_optimizer, backward), strict=True))
        before.restore()

    @torch.no_grad()
    def _project(self) -> None:
        passes = self.sap_optimizer._passes
        assert passes.direction is not None
        direction: dict[Tensor, Tensor] = dict(zip(passes.perturbed, passes.direction, strict=True))
        change = {p: p.grad - g for p, g in self._unprobed.items() if p.grad is not None}
        shared = [p for p in change if p in direction]
        toward = [direction[p] for p in shared]
        squares = ops.sum_squares(toward)
        lean = ops.dot(toward, [change[p] for p in shared]) / squares.where(squares > 0, 1.0)
        if self._control == "along":
            for parameter in change:
                assert parameter.grad is not None
                parameter.grad.copy_(self._unprobed[parameter])
        sign = 1.0 if self._control == "along" else -1.0
        for parameter in shared:
            _add_to_gradient(parameter, lean * direction[parameter], sign)
        self._unprobed = {}


class AveragingTrainer(SAPTrainer):
    """SAP with an average over past steps in the place of what one step finds.

    h belongs to its batch, and the direction to four pairs: is what they miss, or what they say by
    chance, in the way? A sum in which the step k steps ago counts decayᵏ takes the place of one
    step's value.

    Args:
        *args: as for `SAPTrainer`.
        averaged: `"probe"`: V is along the average of h, layer by layer, with the norm that this
            step's V has. `"direction"`: the gradient of the safety loss is the average.
        decay: in [0, 1).
        **kwargs: as for `SAPTrainer`, with its schedule `"paper"`.
    """

    def __init__(
        self,
        *args: Any,
        averaged: Literal["probe", "direction"],
        decay: float = 0.9,
        **kwargs: Any,
    ) -> None:
        if averaged not in ("probe", "direction"):
            raise ValueError(f"averaged={averaged!r} is not known; choose probe or direction")
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} is out of range; give 0 ≤ decay < 1")
        self._averaged, self._decay = averaged, decay
        #: Sums over past steps: of h by layer, of the safety gradient by parameter.
        self._estimates: dict[int, Tensor] = {}
        self._directions: dict[Tensor, Tensor] = {}
        super().__init__(*args, **kwargs)
        _refuse_lagged(self._sap_options, "an average")
        if averaged == "direction":
            self._sap_options["keep_direction"] = True

    def compute_safety_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the safety loss; its gradient has that of past steps in it."""
        loss = super().compute_safety_loss(model, inputs)
        past = [(self._decay * g * p).sum() for p, g in self._directions.items()]
        if not past:
            return loss
        slope = torch.stack(past).sum()
        return loss + (slope - slope.detach())  # the gradient alone

    def _run_inner_passes(
        self, optimizer: FusedSAP, model: nn.Module, window: list[Any], num_items: Any
    ) -> None:
        super()._run_inner_passes(optimizer, model, window, num_items)
        if self._averaged == "direction":
            passes = optimizer._passes
            if passes.safety_pass_ran and passes.direction is not None:
                pairs = zip(passes.perturbed, passes.direction, strict=True)
                self._directions = {parameter: d.clone() for parameter, d in pairs}
        elif optimizer.needs_probe and self.probe_set is not None:
            self._average_probe(self.probe_set)

    def _average_probe(self, probe_set: ProbeSet) -> None:
        for layer, h in probe_set.estimates.items():
            past = self._estimates.get(layer)
            self._estimates[layer] = h.clone() if past is None else h + self._decay * past
        offsets = probe_set.offsets
        probe_set.replace_offsets(
            {
                layer: [total * (offsets[layer].norm() / total.norm())]
                for layer, total in self._estimates.items()
            }
        )
