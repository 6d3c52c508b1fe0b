"""A hook on a layer's output that stays out of what `layer.compile()` traces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

#: Takes the layer, its positional arguments and its output; returns another output, or None.
Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


class OutputHook:
    """A forward hook; on a layer that is compiled in place, around the compiled code.

    Layers of a stack share their compiled code. A hook inside would make it differ from layer to
    layer and from pass to pass, beyond the number of variants that PyTorch compiles (8): what comes
    after those runs uncompiled. A model that is compiled as a whole traces the hook, in one graph.

    Args:
        layer: the layer, compiled or not. It may be compiled later.
        hook: the hook.
    """

    def __init__(self, layer: nn.Module, hook: Hook) -> None:
        self._layer, self._hook = layer, hook
        self._handle: Any = None
        self._compiled: Callable[..., Any] | None = None
        self.settle()

    def settle(self) -> None:
        """Go where the hook belongs, as the layer is now."""
        compiled = self._layer._compiled_call_impl
        if compiled is None:
            if self._handle is None:
                self._handle = self._layer.register_forward_hook(self._hook)
        elif compiled != self._call:
            if self._handle is not None:
                self._handle.remove()
                self._handle = None
            self._compiled = compiled
            self._layer._compiled_call_impl = self._call

    def remove(self) -> None:
        """Leave the layer as it was."""
        if self._handle is not None:
            self._handle.remove()
        if self._layer._compiled_call_impl == self._call:
            self._layer._compiled_call_impl = self._compiled
        self._handle = self._compiled = None

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        assert self._compiled is not None
        output = self._compiled(*args, **kwargs)
        changed = self._hook(self._layer, args, output)
        return output if changed is None else changed
