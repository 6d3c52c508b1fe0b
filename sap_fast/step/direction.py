"""The safety gradient d: taken in a safety pass, used by the step, kept for later ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Direction:
    """The safety gradient d, and its norm; ĝ = d/‖d‖ is the direction (unit).

    Args:
        every: take it anew every so many steps. Above 1 it is kept from step to step, one
            parameter-sized buffer.

    Attributes:
        parameters: those that the safety pass gave a gradient.
        tensors: d, in the same order; None where there is none, or where the probe passes have used
            it up.
        square: ‖d‖², 0-d; None where there is no direction.
        scale: what the safety loss was multiplied by, 0-d, and so d; None: by nothing.
        taken: how many steps so far took one: which safety rows are due.

    Raises:
        ValueError: if `every` is below 1.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.taken = 0
        #: The step that took it; None before that step is done.
        self._step: int | None = None
        self.release()

    @property
    def every(self) -> int:
        """It is taken anew every so many steps; above 1 it is kept in between."""
        return self._every

    @every.setter
    def every(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"direction_every={every!r} is out of range; give 1 or more")
        self._every = every

    def release(self) -> None:
        """Free it, before one is taken that replaces it: both at once would be a buffer more."""
        self.parameters: list[nn.Parameter] = []
        self.tensors: list[Tensor] | None = None
        self.square: Tensor | None = None
        self.scale: Tensor | None = None
        self._step = None

    def take(
        self,
        parameters: Sequence[nn.Parameter],
        tensors: Sequence[Tensor],
        square: Tensor,
        scale: Tensor | None = None,
    ) -> None:
        """Hold the gradients that a safety pass left; see the attributes."""
        self.parameters, self.tensors = list(parameters), list(tensors)
        self.square, self.scale = square, scale

    @property
    def norm(self) -> Tensor | None:
        """‖d‖, 0-d."""
        return None if self.square is None else self.square.sqrt()

    @property
    def valid(self) -> Tensor | None:
        """Whether it is one, as 0-d bool: neither zero nor infinite nor NaN."""
        norm = self.norm
        return None if norm is None else norm.isfinite() & (norm > 0)

    @property
    def is_there(self) -> bool:
        """Whether its tensors can be used."""
        return self.tensors is not None

    @property
    def is_settled(self) -> bool:
        """Whether the step that took it was completed."""
        return self._step is not None

    def is_due(self, step: int) -> bool:
        """Whether step number `step` has to take one."""
        return self._step is None or step - self._step >= self.every

    def by_parameter(self) -> dict[nn.Parameter, Tensor]:
        """Return d by parameter; empty where its tensors are gone."""
        return dict(zip(self.parameters, self.tensors or (), strict=False))

    def settle(self, step: int) -> None:
        """Keep it for the steps after `step`, which took it, or free it if each takes its own."""
        if not self.is_settled:
            self.taken += 1
            self._step = step
        if self.every == 1:
            self.release()

    def state_dict(self, parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
        """Return what later steps depend on.

        Args:
            parameters: all that the passes know; tensors are saved by their places in this list.
        """
        places = {parameter: place for place, parameter in enumerate(parameters)}
        tensors = self.by_parameter() if self.is_settled else {}
        return {
            "step": self._step,
            "taken": self.taken,
            "square": self.square if self.is_settled else None,
            "scale": self.scale if self.is_settled else None,
            "tensors": {places[parameter]: tensor for parameter, tensor in tensors.items()},
        }

    @torch.no_grad()
    def load_state_dict(
        self, state_dict: dict[str, Any], parameters: Sequence[nn.Parameter]
    ) -> None:
        """Load what `state_dict` returned; tensors go to the device and dtype of their parameter.

        Raises:
            ValueError: if a tensor belongs to no parameter, or to one of another shape.
        """
        self.release()
        self.taken = state_dict["taken"]
        for place, tensor in state_dict["tensors"].items():
            shape = tuple(parameters[place].shape) if place < len(parameters) else None
            if tuple(tensor.shape) != shape:
                raise ValueError(
                    f"the saved direction of parameter {place} has the shape "
                    f"{tuple(tensor.shape)}; expected {shape}"
                )
        if not state_dict["tensors"] or self.every == 1:
            return  # it was not kept, or is not: the next step takes one
        kept = sorted(state_dict["tensors"].items())
        self.parameters = [parameters[place] for place, _ in kept]
        # A checkpoint may have been read to the CPU.
        device, scale = self.parameters[0].device, state_dict["scale"]
        self._step, self.square = state_dict["step"], state_dict["square"].to(device)
        self.scale = None if scale is None else scale.to(device)
        self.tensors = [
            tensor.to(p.device, p.dtype, copy=True)
            for p, (_, tensor) in zip(self.parameters, kept, strict=True)
        ]
