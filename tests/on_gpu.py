"""A plugin of pytest that runs tests written for the CPU on the GPU: `pytest -p tests.on_gpu`.

Tensors and models are made on the GPU unless a test says where. Random numbers with a generator of
their own are drawn on the CPU, so that a test has the numbers that it has there; autocast, gradient
scaler and `Trainer` of the CPU become those of the GPU. `benchmarks.gpu` says which tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import TrainingArguments


class _DrawnOnTheCpu(TorchFunctionMode):
    """Draws with a CPU generator on the CPU, and moves what it drew."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu" and "device" not in kwargs:
            drawn = function(*args, **kwargs, device="cpu")
            return drawn.cuda() if isinstance(drawn, torch.Tensor) else drawn
        return function(*args, **kwargs)


def _for_cuda(kind: Any) -> None:
    """Make a class whose first argument is the type of device take "cuda" for "cpu"."""
    construct = kind.__init__

    def on_cuda(self: Any, device: str, *args: Any, **kwargs: Any) -> None:
        construct(self, "cuda" if device == "cpu" else device, *args, **kwargs)

    kind.__init__ = on_cuda


def pytest_configure() -> None:
    """Move to the GPU before any test is imported."""
    torch.set_default_device("cuda")
    _DrawnOnTheCpu().__enter__()
    _for_cuda(torch.autocast)
    _for_cuda(torch.amp.GradScaler)
    finish = TrainingArguments.__post_init__

    def on_cuda(self: TrainingArguments) -> None:
        self.use_cpu = False
        finish(self)

    TrainingArguments.__post_init__ = on_cuda
