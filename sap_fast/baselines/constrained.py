"""Constrained SFT: the first tokens of an answer are held near the aligned model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sap_fast.baselines.plain import PlainTrainer
from sap_fast.configuration import virtual_tokens
from sap_fast.losses.aligned import AlignedModel, log_probs_beside
from sap_fast.losses.batches import as_rows, find_scored


class ConstrainedTrainer(PlainTrainer):
    """AdamW on a task loss whose pull on a token ends as its likelihood grows past the aligned one.

    Qi et al. 2024 (arXiv:2406.05946). With Δ = log p(token) − log p_aligned(token), the loss of a
    token is −2/β·log σ(β·Δ), which has the gradient of its log-likelihood at Δ = 0, and less of it
    beyond; a large β allows little. Safety pairs have no part in it. The aligned model runs one
    more forward, in evaluation mode.

    Args:
        *args: as for `SAPTrainer`.
        strengths: β of the first tokens of each answer; the authors' 0.5 for the first and 2 for
            the next four by default.
        later_strength: β of all other tokens; the authors' 0.1.
        aligned: the model that tuning starts from; None for the model without its PEFT adapter.
        **kwargs: as for `SAPTrainer`.
    """

    def __init__(
        self,
        *args: Any,
        strengths: Sequence[float] = (0.5, 2.0, 2.0, 2.0, 2.0),
        later_strength: float = 0.1,
        aligned: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        if not all(strength > 0 for strength in (*strengths, later_strength)):
            raise ValueError(
                f"strengths={tuple(strengths)}, later_strength={later_strength}: expected "
                "numbers > 0"
            )
        self._strengths = (*strengths, later_strength)
        self._aligned = aligned
        super().__init__(*args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the constrained loss while training, and the plain one else."""
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = as_rows(inputs)
        scored = find_scored(batch, after_virtual=virtual_tokens(model).in_sequence)
        with self.accelerator.autocast():
            found, expected = log_probs_beside(
                model, AlignedModel(model, self._aligned), batch, scored, True
            )
        places = places_in_answer(scored.positions).clamp(max=len(self._strengths) - 1)
        beta = torch.tensor(self._strengths, dtype=found.dtype)[places.cpu()].to(found.device)
        loss = -(2 / beta * F.logsigmoid(beta * (found - expected))).sum()
        items = num_items_in_batch if num_items_in_batch is not None else len(scored.targets)
        loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return loss


def places_in_answer(positions: Tensor) -> Tensor:
    """Return for scored positions (N,), in order, how many of the same answer come before each."""
    index = torch.arange(len(positions), device=positions.device)
    begins = torch.ones_like(index, dtype=torch.bool)
    begins[1:] = positions.diff() != 1
    return index - torch.where(begins, index, 0).cummax(dim=0).values
