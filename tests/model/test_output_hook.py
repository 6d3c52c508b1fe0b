"""A hook on a layer's output, inside of the layer or around its compiled code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast.model.output_hook import OutputHook


class Layer(nn.Module):
    def forward(self, hidden: Tensor, *, scale: float = 1.0) -> Tensor:
        return hidden * scale


def plus_one(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    assert len(args) == 1
    return output + 1


@pytest.mark.parametrize("compiled_first", [True, False])
def test_it_runs_once_wherever_the_layer_is_compiled(compiled_first: bool) -> None:
    torch.compiler.reset()
    layer, given = Layer(), torch.ones(2)
    if compiled_first:
        layer.compile(backend="eager")
    hook = OutputHook(layer, plus_one)
    if not compiled_first:
        assert torch.equal(layer(given, scale=2.0), 3 * given)
        layer.compile(backend="eager")
    for _ in range(2):
        hook.settle()
        assert torch.equal(layer(given, scale=2.0), 3 * given)
        assert not layer._forward_hooks
    layer.compile(backend="eager")  # another time, which leaves the hook out
    hook.settle()
    assert torch.equal(layer(given, scale=2.0), 3 * given)
    hook.remove()
    assert torch.equal(layer(given, scale=2.0), 2 * given)
    assert layer._compiled_call_impl is not None


def test_one_that_returns_nothing_changes_nothing() -> None:
    torch.compiler.reset()
    layer, given, seen = Layer(), torch.ones(2), []
    layer.compile(backend="eager")
    hook = OutputHook(layer, lambda module, args, output: seen.append(module))
    assert torch.equal(layer(given), given) and seen == [layer]
    hook.remove()
    hook.remove()
    layer(given)
    assert seen == [layer]
