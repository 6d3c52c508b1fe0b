"""s_j: how large an ordinary token's hidden state is, by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sap_fast.configuration import virtual_tokens
from sap_fast.ops.reference import accumulation_dtype


def token_mask(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor | None:
    """Return which hidden states of a forward are those of ordinary tokens.

    Args:
        model: the model as it was given, wrappers included.
        inputs: what the decoder is given by name, virtual tokens of `model` included.

    Returns:
        (B, S), zero at padding and at virtual tokens, where S counts what has hidden states, or
        None if there is neither.
    """
    mask, embedded = inputs.get("attention_mask"), inputs.get("inputs_embeds")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = None
    virtual = virtual_tokens(model)
    if virtual.number == 0:
        return mask
    if not virtual.in_sequence:  # the mask has them, the hidden states have not
        return None if mask is None else mask[:, virtual.number :]
    if mask is None:
        if not isinstance(embedded, Tensor):
            return None
        mask = torch.ones(embedded.shape[:2], device=embedded.device)
    ordinary = torch.arange(mask.shape[1], device=mask.device) >= virtual.number
    return mask.bool() & ordinary


class TokenScales:
    """The size (rms) of an ordinary token's hidden state after each probed layer.

    The median over a sequence's tokens, since the first token of Llama-like models carries
    activations a hundred times larger than the rest; averaged over the sequences seen.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}

    def clear(self) -> None:
        """Forget the sequences seen."""
        self._sums.clear()
        self._counts.clear()

    def __contains__(self, layer: int) -> bool:
        return layer in self._sums

    def measure(
        self, layer: int, hidden: Tensor, mask: Tensor | None, packed: Tensor | None
    ) -> None:
        """Add the sequences of a batch.

        Args:
            layer: the layer's index.
            hidden: (B, S, H), its output.
            mask: (B, S), zero at padding; of another shape or None, every token counts.
            packed: where the tokens of each sequence lie, as `losses.packing` has it, or None.
        """
        dtype = accumulation_dtype(hidden.dtype)
        rms = torch.linalg.vector_norm(hidden, dim=-1, dtype=dtype) / hidden.shape[-1] ** 0.5
        if packed is not None:
            # Back to one row per sequence; where two share tokens, each has them.
            rms = rms.flatten().take(packed.clamp(min=0))
            rms = torch.where(packed >= 0, rms, torch.nan)
        elif mask is not None and mask.shape == rms.shape:
            rms = torch.where(mask.to(rms.device).bool(), rms, torch.nan)
        medians = _median(rms)
        # A row of nothing but padding has no median and does not count.
        total, count = medians.nansum(), medians.isnan().logical_not().sum()
        if layer in self._sums:
            total, count = total + self._sums[layer], count + self._counts[layer]
        self._sums[layer], self._counts[layer] = total, count

    def tensors(self) -> list[Tensor]:
        """Return all sums and counts, to be averaged over ranks in place."""
        # Counts in the dtype of the sums: exact up to 2²⁴ sequences.
        self._counts = {j: count.to(self._sums[j].dtype) for j, count in self._counts.items()}
        return [*self._sums.values(), *self._counts.values()]

    def values(self) -> dict[int, Tensor]:
        """Return s_j by layer, 0-d fp32 (fp64 for fp64 models)."""
        return {j: total / self._counts[j] for j, total in self._sums.items()}


def _median(values: Tensor) -> Tensor:
    """Return the lower median along the last axis, NaN left out; NaN where all are.

    The bits of `torch.nanmedian`, which has no deterministic kernel on CUDA.
    """
    ordered = values.sort(dim=-1).values  # NaN come last
    count = values.isnan().logical_not().sum(dim=-1, keepdim=True)
    middle = (count - 1).clamp(min=0) // 2
    return ordered.gather(-1, middle).squeeze(-1)
