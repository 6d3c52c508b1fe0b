"""The authors' released procedure: SAP as it was published, to be compared with.

Wu et al., arXiv:2505.16737, and the code that they released with it (github.com/ChengcanWu/SAP).
Written anew from what that code does. In every step

1. d is taken from sums of log-probabilities, with the V of the batch before still in the model, and
   ĝ = d/(‖d‖ + 1e-8);
2. ρ‖W‖ĝ with ρ = 2e-5 is added to W, and ∂L_task/∂V taken there, at that V, with W frozen;
3. it is subtracted again, which gives W back but for its rounding;
4. one more pass takes ∂L_task/∂V and ∇_W L_task, at the same V and under other dropout masks;
5. W takes the step of AdamW. V goes to zero, and from there one step of AdamW of size 5e-2 up the
   difference of 2 and 4. The moments of that AdamW last from step to step.

So V was found on the batch before, and h is a difference of two dropout masks more than one of two
weights (benchmarks/fidelity.py has figures). `sap_fast.FusedSAP` does none of this.

Two things are not as released. There the model is given the prompt alone and scored on an answer
that it does not see; here it is given both. There V stays in the model, also when it is evaluated;
here it is off outside the passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.baselines.plain import PlainTrainer
from sap_fast.compatibility import create_optimizer
from sap_fast.integrations.trainer import SafetyLoss
from sap_fast.losses import contrastive_loss
from sap_fast.model.layers import Layers, find_decoder_layers
from sap_fast.model.probes import ProbeSet
from sap_fast.ops.reference import accumulation_dtype
from sap_fast.step.guards import frozen, gradients_set_aside

RHO = 2e-5
SIZE = 5e-2
#: What the authors probe of 32 layers, though their paper says 11 to 20.
LAYERS_OF_32 = (3, 9)
_EPSILON = 1e-8


class PublishedSAP:
    """The passes of the released procedure, around a caller's forward and backward.

        published.inner_passes(trained, modules, task, safety)
        with published.task_pass(modules):
            task()
        published.end_step()

    Args:
        rho: ρ, the size of the perturbation relative to ‖W‖; above 0.
        size: the learning rate of the AdamW that V takes its step by.

    Attributes:
        rho: as given. May be changed between steps.
        offsets: V by layer index, (H,): what the next step runs under.
        estimates: h by layer index, (H,), as the last step found it, in units of
            ∂_V⟨ĝ, ∇_W L_task⟩.
    """

    def __init__(self, *, rho: float = RHO, size: float = SIZE) -> None:
        if not rho > 0:
            raise ValueError(f"rho={rho!r} is out of range; give a number > 0")
        if not size >= 0:
            raise ValueError(f"size={size!r} is out of range; give a number ≥ 0")
        self.rho, self._size = rho, size
        self.offsets: dict[int, Tensor] = {}
        self.estimates: dict[int, Tensor] = {}
        self._adamw: torch.optim.AdamW | None = None
        self._perturbation_norm: Tensor | None = None

    def inner_passes(
        self,
        trained: Sequence[nn.Parameter],
        modules: Mapping[int, nn.Module],
        task: Callable[[], object],
        safety: Callable[[], object],
    ) -> None:
        """Run the safety pass, and the task at W + ΔW.

        Args:
            trained: W.
            modules: the probed layers by index, such as `ProbeSet.modules`.
            task: runs forward and backward on the task loss.
            safety: likewise on the safety loss.
        """
        with gradients_set_aside(trained), self._injected(modules):
            safety()
            reached = [p for p in trained if p.grad is not None]
            gradients = [p.grad for p in reached if p.grad is not None]
        for offset in self.offsets.values():
            offset.grad = None
        with torch.no_grad():
            norm = ops.sum_squares(gradients).sqrt() + _EPSILON
            self._perturbation_norm = self.rho * ops.sum_squares(list(trained)).sqrt()
            change = [self._perturbation_norm * (gradient / norm) for gradient in gradients]
            for parameter, added in zip(reached, change, strict=True):
                parameter.add_(added)
        try:
            with frozen(trained), self._injected(modules):
                task()
        finally:
            with torch.no_grad():
                for parameter, added in zip(reached, change, strict=True):
                    parameter.sub_(added)
        for offset in self.offsets.values():
            if offset.grad is not None:
                offset.grad.neg_()

    @contextmanager
    def task_pass(self, modules: Mapping[int, nn.Module]) -> Iterator[None]:
        """Let the body run forward and backward on the task loss, under V; once per micro-batch."""
        with self._injected(modules):
            yield

    def end_step(self) -> None:
        """Find h and the V of the next step."""
        assert self._perturbation_norm is not None
        if self._adamw is None:
            self._adamw = torch.optim.AdamW(list(self.offsets.values()), lr=self._size)
        self.estimates = {
            layer: -offset.grad / self._perturbation_norm.to(offset.device)
            for layer, offset in self.offsets.items()
            if offset.grad is not None
        }
        with torch.no_grad():
            for offset in self.offsets.values():
                offset.zero_()
        self._adamw.step()
        self._adamw.zero_grad()

    @contextmanager
    def _injected(self, modules: Mapping[int, nn.Module]) -> Iterator[None]:
        """Add V to the outputs of the layers; a V that does not exist yet is made, as zero."""
        # A pass of its own: copies of the weights that autocast keeps may be those of another.
        torch.clear_autocast_cache()
        handles = [
            module.register_forward_hook(partial(self._add, index))
            for index, module in modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, index: int, module: nn.Module, args: Any, output: Any) -> Any:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if index not in self.offsets:
            dtype = accumulation_dtype(hidden.dtype)
            self.offsets[index] = torch.zeros(
                hidden.shape[-1], dtype=dtype, device=hidden.device, requires_grad=True
            )
        # Not a sum of two dtypes: that would turn hidden states to that of V.
        hidden = hidden + self.offsets[index].to(hidden.dtype)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


#: What lasts from call to call of `published_step`.
_PUBLISHED: WeakKeyDictionary[ProbeSet, PublishedSAP] = WeakKeyDictionary()


def published_step(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    probes: ProbeSet,
    task: Callable[[], Tensor],
    safety: Callable[[], Tensor],
    *,
    rho: float = RHO,
) -> Tensor:
    """Run all passes of a step of the released procedure; the update of W is the caller's.

    Args:
        model: the model that the closures run; it is looked at through `probes` alone.
        trained: W. Their `.grad` gets the task gradient under V.
        probes: which layers are probed. Its `estimates` is h of this step afterwards, its `offsets`
            the V that the next call with the same probe set runs under.
        task: runs forward and backward on the task loss and returns it.
        safety: likewise on the safety loss.
        rho: ρ.

    Returns:
        The task loss of the task pass.
    """
    published = _PUBLISHED.setdefault(probes, PublishedSAP())
    published.rho = rho
    published.inner_passes(trained, probes.modules, task, safety)
    with published.task_pass(probes.modules):
        loss = task()
    published.end_step()
    _show(published, probes)
    return loss


def _show(published: PublishedSAP, probes: ProbeSet) -> None:
    """Let what the step found be read where that of SAP is."""
    probes.estimates = published.estimates
    probes.offsets = {layer: v.detach().clone() for layer, v in published.offsets.items()}


class PublishedSAPTrainer(PlainTrainer):
    """A trainer that runs the authors' released procedure; this module says what that is.

    The safety loss is theirs unless given: −log σ of a difference of summed log-probabilities. With
    gradient accumulation one step spans the micro-batches, as in `SAPTrainer`. V is in no
    checkpoint: a run that is resumed begins with V = 0.

    Args:
        *args: as for `SAPTrainer`.
        layers: the probed layers, as for `ProbeSet`; by default the authors' 3 and 9 of 32, scaled
            to the model's depth.
        rho: ρ, above 0.
        size: the learning rate of V.
        **kwargs: as for `SAPTrainer`.

    Raises:
        ValueError: for a number out of range, in fp16, or on several processes, which the released
            code knows neither of.
    """

    def __init__(
        self,
        *args: Any,
        layers: Layers | None = None,
        rho: float = RHO,
        size: float = SIZE,
        safety_loss: str | SafetyLoss | None = None,
        **kwargs: Any,
    ) -> None:
        self._layers = layers
        self._published = PublishedSAP(rho=rho, size=size)
        self._probes: ProbeSet | None = None
        summed = partial(contrastive_loss, reduction="sum")
        super().__init__(*args, safety_loss=safety_loss or summed, **kwargs)
        if self.args.world_size > 1 or self.args.fp16:
            raise ValueError(
                f"world_size={self.args.world_size}, fp16={self.args.fp16}: expected one process, "
                "and fp32 or bf16, as in the released code"
            )

    @property
    def probe_set(self) -> ProbeSet | None:
        """The probed layers, and h and V to be read, once there is an optimizer."""
        return self._probes

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build AdamW, and find the probed layers."""
        if self._probes is None:
            probed: Any = self.model if model is None else model
            layers = _authors_layers(probed) if self._layers is None else self._layers
            self._probes = ProbeSet(probed, layers)
        return create_optimizer(super().create_optimizer, model)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run the task pass of one micro-batch; before the first of a step, the other passes."""
        assert self._probes is not None
        published, modules = self._published, self._probes.modules
        window = self._window or [inputs]
        if self._window_position == 0:
            with self._figures_set_aside():
                published.inner_passes(
                    self.passes.trained.trainable,
                    modules,
                    lambda: self._backward_of_task(model, window, num_items_in_batch),
                    lambda: self._backward_of_safety(model, self.state.global_step),
                )
        with published.task_pass(modules):
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self._window_position == len(window):
            published.end_step()
            _show(published, self._probes)
        return loss


def _authors_layers(model: nn.Module) -> list[int]:
    """Return layers 3 and 9 of 32 in a model of any depth."""
    depth = len(find_decoder_layers(model)[0])
    return sorted({min(round(layer / 32 * depth), depth - 1) for layer in LAYERS_OF_32})
