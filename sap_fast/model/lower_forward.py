"""The forward up to the lowest probed layer, run once for two passes.

With `difference="forward"` the second probe pass and the task pass have the same weights, inputs
and dropout masks, and differ only by V, which is first added to the output of the lowest probed
layer. So the probe pass keeps that output with its graph, and in the task pass the layers up to
there do not run. It costs no memory: the probe pass then holds what a task pass holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from sap_fast.distributed import any_dtensor
from sap_fast.random_state import RandomState


class LowerForward:
    """Keeps the output of the lowest probed layer in one forward pass and gives it to the next.

    Only the first forward pass after `begin` is kept: with the others of an accumulated step the
    memory of several task passes would be held at once.

    Args:
        layers: the decoder layers up to and including the lowest probed one, in order. What runs
            above them may depend on them through the hidden states alone.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._layers = list(layers)
        self._trainable: Sequence[nn.Parameter] = ()
        self._inputs: list[Any] | None = None
        #: The inputs themselves: no tensor of the task pass may come to lie where they lay.
        self._alive: Any = None
        self._output: Any = None
        self._random_state: RandomState | None = None
        #: What hid the layers' own `forward` while they are skipped, by position.
        self._hidden_forwards: dict[int, Callable[..., Any] | None] = {}

    @property
    def is_possible(self) -> bool:
        """Whether the layers can be skipped: not compiled, and not sharded by FSDP2."""
        return bool(self._layers) and all(
            layer._compiled_call_impl is None and not any_dtensor(layer.parameters())
            for layer in self._layers
        )

    @property
    def is_keeping(self) -> bool:
        """Whether parameters take gradients until the lowest probed layer has run."""
        return bool(self._trainable)

    # ---- the probe pass at W ----

    def begin(self, trainable: Sequence[nn.Parameter]) -> None:
        """Let parameters take gradients until the lowest probed layer has run."""
        self.forget()
        if self.is_possible:
            self._trainable = trainable
            _require_grad(trainable, True)

    def begin_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the inputs of the forward pass that is to be kept."""
        if self._trainable:
            self._inputs, self._alive = _fingerprint(args, kwargs), (args, kwargs)

    def keep(self, output: Any) -> None:
        """Keep the output of the lowest probed layer; above it, parameters are frozen again."""
        if not self._trainable:
            return
        self.end()
        hidden = _hidden(output)
        # Reentrant checkpointing runs the layer without gradients first: nothing to go on from.
        if hidden is not None and torch.is_grad_enabled():
            self._output = output
            self._random_state = RandomState([hidden.device])

    def end(self) -> None:
        """Freeze the parameters again, if that was not done yet."""
        _require_grad(self._trainable, False)
        self._trainable = ()

    # ---- the task pass ----

    def skip(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the layers pass on what was kept, if this forward pass has the same inputs."""
        if self._output is None or self._inputs != _fingerprint(args, kwargs):
            return
        kept, rest = self._output, self._output[1:] if isinstance(self._output, tuple) else None

        def pass_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return hidden_states if rest is None else (hidden_states, *rest)

        for position, layer in enumerate(self._layers):
            self._hidden_forwards[position] = layer.__dict__.get("forward")
            layer.__dict__["forward"] = pass_on
        self._layers[-1].__dict__["forward"] = lambda *args, **kwargs: kept
        self._output = None

    def resume(self) -> None:
        """Let the layers run again, and the random numbers go on as if they had run."""
        if not self._hidden_forwards:
            return
        self._show_forwards()
        assert self._random_state is not None
        self._random_state.restore()

    def forget(self) -> None:
        """Drop what is kept, and leave model and parameters as they were."""
        self._show_forwards()
        self.end()
        self._inputs = self._alive = self._output = self._random_state = None

    def _show_forwards(self) -> None:
        for position, forward in self._hidden_forwards.items():
            if forward is None:
                del self._layers[position].__dict__["forward"]
            else:
                self._layers[position].__dict__["forward"] = forward
        self._hidden_forwards.clear()


def _require_grad(params: Iterable[nn.Parameter], required: bool) -> None:
    for parameter in params:
        parameter.requires_grad_(required)


def _hidden(output: Any) -> Tensor | None:
    """Return the hidden states, if there is nothing else in a layer's output."""
    if isinstance(output, tuple):
        output = output[0] if len(output) == 1 else None
    return output if isinstance(output, Tensor) else None


def _fingerprint(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return what tells inputs apart without reading tensors: the same ones, unchanged since.

    Objects that are no plain values are told apart by identity: they may hold tensors.
    """
    leaves, structure = tree_flatten((args, kwargs))
    plain = (bool, int, float, str, type(None), torch.dtype, torch.device)
    return [
        str(structure),
        *(
            (id(leaf), leaf._version)
            if isinstance(leaf, Tensor)
            else (leaf if isinstance(leaf, plain) else id(leaf))
            for leaf in leaves
        ),
    ]
