"""What `torch.distributed.checkpoint` saves of the passes, beside the state of AdamW."""

from __future__ import annotations

import io
from typing import Any

import torch

from sap_fast.ops.blockwise import is_worth_it, quantize
from sap_fast.step.passes import SafetyPasses


class SAPState:
    """The state of `SafetyPasses` as a `Stateful`, for any number of ranks.

    `get_optimizer_state_dict` knows AdamW's state alone, so give this to `dcp.save` and `dcp.load`,
    too: `{"model": …, "optimizer": …, "sap": optimizer.sap_state}`.

    Args:
        passes: whose state it is.
    """

    def __init__(self, passes: SafetyPasses) -> None:
        self._passes = passes

    def state_dict(self) -> dict[str, Any]:
        """Return numbers as one entry of bytes, and a direction that is kept tensor by tensor.

        What is loaded must find its place in an optimizer that never ran: a direction not there yet
        is saved as zeros.
        """
        state = self._passes.state_dict()
        tensors, scales = (state["direction"].pop(name) for name in ("tensors", "scales"))
        stream = io.BytesIO()
        torch.save(state, stream)
        entries: dict[str, Any] = {"sap": stream.getvalue()}
        if self._passes.direction.every > 1:
            for place, parameter in enumerate(self._passes.trained.parameters):
                if not parameter.requires_grad:
                    continue
                name, kept = f"direction.{place}", tensors.get(place)
                if kept is None:
                    kept = torch.zeros_like(parameter, requires_grad=False)
                    if is_worth_it(parameter):
                        kept, scales[place] = quantize(kept)
                entries[name] = kept
                if place in scales:
                    entries[f"{name}.scales"] = scales[place]
        return entries

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        state = torch.load(io.BytesIO(state_dict["sap"]), weights_only=True)
        direction = state["direction"]
        direction["tensors"], direction["scales"] = {}, {}
        if direction["square"] is not None:
            for name, tensor in state_dict.items():
                if name != "sap":
                    _, place, *scales = name.split(".")
                    direction["scales" if scales else "tensors"][int(place)] = tensor
        self._passes.load_state_dict(state)
