"""Controls of SAP itself."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.baselines.plain import add_to_gradient, gradients_of
from sap_fast.integrations.trainer import SAPTrainer
from sap_fast.model.probes import ProbeSet
from sap_fast.random_state import RandomState
from sap_fast.step.passes import SafetyPasses

#: Controls of the step on g + Δg, which need g and the direction.
_PROJECTED = ("along", "beside")


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
        **kwargs: as for `SAPTrainer`.
    """

    _runs_beside_deepspeed = False

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
        self._unprobed: dict[nn.Parameter, Tensor] = {}
        super().__init__(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Run one micro-batch; after the last of a step, project what the probe did."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._unprobed and self._window_position == max(1, len(self._window)):
            self._project()
        return loss

    def _run_inner_passes(
        self, passes: SafetyPasses, model: nn.Module, window: list[Any], num_items: Any
    ) -> None:
        super()._run_inner_passes(passes, model, window, num_items)
        if passes.probes is None or not passes.probes.offsets:
            return  # the step is plain AdamW
        if self._control in _PROJECTED:
            self._take_unprobed(passes, model, window, num_items)
        else:
            self._replace_probe(passes.probes)

    def _keeps_direction(self) -> bool:
        return self._control in _PROJECTED

    def _replace_probe(self, probes: ProbeSet) -> None:
        generator = torch.Generator().manual_seed(
            self.args.seed + 1_000_003 * self.state.global_step
        )
        probes.offsets = {
            layer: self._replacement(offset, generator) for layer, offset in probes.offsets.items()
        }

    def _replacement(self, offset: Tensor, generator: torch.Generator) -> Tensor:
        if self._control == "flipped":
            return -offset
        noise = torch.randn(offset.shape, generator=generator).to(offset)
        return noise * (offset.norm() / noise.norm())

    def _take_unprobed(
        self, passes: SafetyPasses, model: nn.Module, window: list[Any], num_items: Any
    ) -> None:
        before = RandomState({self.args.device})
        # Outside every pass, and so without a probe.
        found = gradients_of(passes, lambda: self._backward_of_task(model, window, num_items))
        self._unprobed = dict(zip(*found, strict=True))
        before.restore()

    @torch.no_grad()
    def _project(self) -> None:
        direction = self.passes.direction.by_parameter()
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
            add_to_gradient(parameter, lean * direction[parameter], sign)
        self._unprobed = {}
