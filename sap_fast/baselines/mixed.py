"""Refusals among the task rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sap_fast.baselines.plain import PlainTrainer
from sap_fast.losses import task_loss


class MixedTrainer(PlainTrainer):
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

    def _added_loss(self, model: nn.Module) -> Tensor:
        with self.accelerator.autocast():
            refusals = task_loss(model, self._answers("chosen", self._window_position - 1))
        return self._refusal_weight * refusals
