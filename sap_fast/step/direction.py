"""The safety gradient d: taken in a safety pass, used by the step, kept for later ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.distributed import local_shards
from sap_fast.ops.blockwise import Quantized, dequantize, is_worth_it, quantize

#: What one parameter's part of d is kept as.
Kept = Tensor | Quantized


class Direction:
    """The safety gradient d, and its norm; ĝ = d/‖d‖ is the direction (unit).

    Args:
        every: take it anew every so many steps. Above 1 it is kept from step to step: of large
            parameters in int8, about a byte per element (`ops.blockwise`), and every step, that
            which took it too, uses what is kept.

    Attributes:
        parameters: those that the safety pass gave a gradient.
        kept: d, in the same order; None where there is none, or where the probe passes have used it
            up.
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
        self.kept: list[Kept] | None = None
        self.square: Tensor | None = None
        self.scale: Tensor | None = None
        self._step = None

    def take(
        self,
        parameters: Sequence[nn.Parameter],
        tensors: Sequence[Tensor],
        scale: Tensor | None = None,
        *,
        backend: str = "auto",
    ) -> None:
        """Hold the gradients that a safety pass left; see the attributes."""
        kept: list[Kept] = list(tensors)
        if self.every > 1:
            for place, parameter in enumerate(parameters):
                if is_worth_it(parameter):
                    kept[place] = quantize(tensors[place])
        self.parameters, self.kept, self.scale = list(parameters), kept, scale
        self.square = add_up(
            ops.sum_squares([d for d in directions if d is not None], backend=backend)
            for _, directions in Parts(self.kept_by_parameter()).of(parameters)
        )

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
        return self.kept is not None

    @property
    def tensors(self) -> list[Tensor] | None:
        """d, in the order of `parameters`, as tensors; what is quantized is made anew each time."""
        if self.kept is None:
            return None
        return [_as_tensor(p, d) for p, d in zip(self.parameters, self.kept, strict=True)]

    def buffers(self, *, keep: bool) -> list[Tensor]:
        """Return d as tensors to be written to.

        Args:
            keep: leave it as it is. Otherwise it is used up, for one parameter-sized buffer less.
        """
        kept, tensors = self.kept, self.tensors
        assert kept is not None and tensors is not None
        if keep:
            return [t.clone() if t is d else t for t, d in zip(tensors, kept, strict=True)]
        self.kept = None
        return tensors

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

    def kept_by_parameter(self) -> dict[nn.Parameter, Kept]:
        """Return what is kept of d by parameter."""
        return dict(zip(self.parameters, self.kept or (), strict=False))

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
        by_parameter = self.kept_by_parameter() if self.is_settled else {}
        kept = {places[parameter]: d for parameter, d in by_parameter.items()}
        quantized = {place: d for place, d in kept.items() if isinstance(d, Quantized)}
        return {
            "step": self._step,
            "taken": self.taken,
            "square": self.square if self.is_settled else None,
            "scale": self.scale if self.is_settled else None,
            "tensors": {
                place: d.codes if isinstance(d, Quantized) else d for place, d in kept.items()
            },
            "scales": {place: d.scales for place, d in quantized.items()},
        }

    @torch.no_grad()
    def load_state_dict(
        self, state_dict: dict[str, Any], parameters: Sequence[nn.Parameter]
    ) -> None:
        """Load what `state_dict` returned; tensors go to the device and dtype of their parameter.

        Codes and scales keep their dtype.

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
        scales = state_dict["scales"]
        self.kept = [
            Quantized(tensor.to(p.device, copy=True), scales[place].to(p.device, copy=True))
            if place in scales
            else tensor.to(p.device, p.dtype, copy=True)
            for p, (place, tensor) in zip(self.parameters, kept, strict=True)
        ]


def _as_tensor(parameter: nn.Parameter, kept: Kept) -> Tensor:
    return dequantize(kept, parameter.dtype) if isinstance(kept, Quantized) else kept


def add_up(squares: Iterator[Tensor]) -> Tensor:
    """Return the sum of 0-d tensors on the device of the first, in their order."""
    first, *others = squares
    if not others:
        return first
    return torch.stack([first, *(other.to(first.device) for other in others)]).sum()


#: Into how many parts d is divided where it is quantized, if no parameter is larger than that.
_PARTS = 16


class Parts:
    """d as tensors, a sixteenth at a time where it is quantized, in memory allocated here.

    So the update can't run out of memory half-way. The division is the same on all ranks.

    Args:
        kept: what is kept, by parameter.

    Attributes:
        parameters: those that d has a tensor of.
    """

    def __init__(self, kept: Mapping[nn.Parameter, Kept]) -> None:
        self.parameters = list(kept)
        self._kept = kept
        self._part: dict[nn.Parameter, int] = {}
        #: By parameter: where its tensor begins in the memory for its device and dtype.
        self._start: dict[nn.Parameter, int] = {}
        quantized = {p: d for p, d in kept.items() if isinstance(d, Quantized)}
        limit = sum(p.numel() for p in quantized) // _PARTS
        part = together = 0
        ends: dict[tuple[torch.device, torch.dtype], int] = {}
        largest: dict[tuple[torch.device, torch.dtype], int] = {}
        for parameter, d in quantized.items():
            if together and together + parameter.numel() > limit:
                part, together, ends = part + 1, 0, {}
            together += parameter.numel()
            self._part[parameter] = part
            where = (parameter.device, parameter.dtype)
            self._start[parameter] = ends.get(where, 0)
            (codes,) = local_shards([d.codes])
            # Each begins at a multiple of 64 elements, as kernels like it.
            ends[where] = self._start[parameter] + -(-codes.numel() // 64) * 64
            largest[where] = max(largest.get(where, 0), ends[where])
        self._memory = {
            (device, dtype): torch.empty(size, device=device, dtype=dtype)
            for (device, dtype), size in largest.items()
        }

    def of(
        self, parameters: Sequence[nn.Parameter]
    ) -> Iterator[tuple[list[nn.Parameter], list[Tensor | None]]]:
        """Yield parameters, in their order and all of them, with d of each, None where it has none.

        The tensors of a part are overwritten by those of the next.
        """
        part = 0

        def part_of(parameter: nn.Parameter) -> int:
            nonlocal part
            part = self._part.get(parameter, part)
            return part

        for _, group in groupby(parameters, part_of):
            together = list(group)
            yield together, [self._tensor(parameter) for parameter in together]

    def _tensor(self, parameter: nn.Parameter) -> Tensor | None:
        kept = self._kept.get(parameter)
        if not isinstance(kept, Quantized):
            return kept
        (codes,) = local_shards([kept.codes])
        start = self._start[parameter]
        memory = self._memory[parameter.device, parameter.dtype][start : start + codes.numel()]
        return dequantize(kept, parameter.dtype, out=memory.view(codes.shape))
