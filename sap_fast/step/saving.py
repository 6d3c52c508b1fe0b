"""What `torch.distributed.checkpoint` saves of the passes, beside the state of AdamW."""

from __future__ import annotations

import io
from typing import Any

import torch

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
        tensors = state["direction"].pop("tensors")
        stream = io.BytesIO()
        torch.save(state, stream)
        entries: dict[str, Any] = {"sap": stream.getvalue()}
        if self._passes.direction.every > 1:
            for place, parameter in enumerate(self._passes.trained.parameters):
                if parameter.requires_grad:
                    kept = tensors.get(place)
                    entries[f"direction.{place}"] = (
                        torch.zeros_like(parameter, requires_grad=False) if kept is None else kept
                    )
        return entries

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned."""
        state = torch.load(io.BytesIO(state_dict["sap"]), weights_only=True)
        kept = {k: v for k, v in state_dict.items() if k != "sap"}
        state["direction"]["tensors"] = (
            {int(name.removeprefix("direction.")): tensor for name, tensor in kept.items()}
            if state["direction"]["square"] is not None
            else {}
        )
        self._passes.load_state_dict(state)
