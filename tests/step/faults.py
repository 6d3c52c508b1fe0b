"""Errors where one wants them, to see what they leave behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sap_fast import ops
from sap_fast.model.layers import find_decoder_layers
from tests.tiny import Problem

ERRORS: list[type[BaseException]] = [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError]


class FailAt(TorchDispatchMode):
    """Raises in the place of the n-th aten operation, once; counts them all."""

    def __init__(self, at: int | None, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        if self.count == self.at:
            raise self.error("injected")
        return func(*args, **(kwargs or {}))


class Faults:
    """Raises at the n-th place that a step reaches, and lists the places."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self.at: int | None = None
        self.error: type[BaseException] = RuntimeError

    def __call__(self, place: str) -> None:
        self.places.append(place)
        if len(self.places) - 1 == self.at:
            raise self.error("injected")

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with a place before it and one after it."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            self(f"{name} begins")
            result = function(*arguments, **options)
            self(f"{name} ended")
            return result

        return wrapped

    def watch_calls(self, patch: pytest.MonkeyPatch) -> None:
        """Every operation of `sap_fast.ops` on its backend, and every backward pass."""
        call = ops.call
        patch.setattr(ops, "call", lambda name, *a, **o: self.around(name, call)(name, *a, **o))
        patch.setattr(Tensor, "backward", self.around("backward", Tensor.backward))

    def watch_model(self, case: Problem) -> None:
        """Every forward of a layer, and the middle of every backward with weight gradients."""
        for layer in find_decoder_layers(case.model)[0]:
            layer.register_forward_pre_hook(lambda *_: self("layer begins"))
            layer.register_forward_hook(lambda *_: self("layer ended"))
        case.trained[len(case.trained) // 2].register_hook(lambda _: self("gradient"))


class FailingUpdate:
    """Stands for `ops.call` and runs out of memory in the update of AdamW."""

    def __init__(self) -> None:
        self._call = ops.call

    def __call__(self, name: str, *arguments: Any, **options: Any) -> Any:
        if name == "adamw_blend_":
            raise torch.OutOfMemoryError("injected")
        return self._call(name, *arguments, **options)
