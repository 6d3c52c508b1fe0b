"""An exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from sap_fast.baselines.plain import PlainTrainer
from sap_fast.ops.reference import accumulation_dtype


class EMATrainer(PlainTrainer):
    """AdamW, at whose end the average of the weights over the steps takes their place.

    After each update w̄ ← decay·w̄ + (1 − decay)·w, from the weights before the first on. Averages
    of weights, with a learning rate and a batch size that are tuned, are what arXiv:2508.12531
    finds to keep much of a model's safety without safety data. The average is one parameter-sized
    buffer in the optimizer's state, in fp32 or wider.

    Args:
        *args: as for `SAPTrainer`.
        decay: in [0, 1); 0 gives AdamW.
        **kwargs: as for `SAPTrainer`.
    """

    def __init__(self, *args: Any, decay: float = 0.9, **kwargs: Any) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r} is out of range; give 0 ≤ decay < 1")
        super().__init__(*args, **kwargs)
        self.add_callback(_Average(self, decay))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, then put the average in the place of the weights."""
        output = super().train(*args, **kwargs)
        optimizer = self.sap_optimizer
        with torch.no_grad():
            for parameter in optimizer.passes.trained.trainable:
                if "average" in optimizer.state[parameter]:
                    parameter.copy_(optimizer.state[parameter]["average"])
        return output


class _Average(TrainerCallback):
    def __init__(self, trainer: EMATrainer, decay: float) -> None:
        self._trainer, self._decay = trainer, decay
        self._before: dict[torch.Tensor, torch.Tensor] = {}

    @torch.no_grad()
    def on_step_begin(self, *_: Any, **__: Any) -> None:
        optimizer = self._trainer.sap_optimizer
        self._before = {
            parameter: parameter.to(accumulation_dtype(parameter.dtype), copy=True)
            for parameter in optimizer.passes.trained.trainable
            if "average" not in optimizer.state[parameter]
        }

    @torch.no_grad()
    def on_step_end(self, *_: Any, **__: Any) -> None:
        optimizer = self._trainer.sap_optimizer
        for parameter in optimizer.passes.trained.trainable:
            state, wide = optimizer.state[parameter], accumulation_dtype(parameter.dtype)
            if not state:
                continue  # never updated, as no gradient has reached it
            # A state that was loaded has the parameter's dtype.
            average = state.get("average", self._before.get(parameter)).to(wide)
            state["average"] = average.lerp_(parameter.to(wide), 1 - self._decay)
        self._before = {}
