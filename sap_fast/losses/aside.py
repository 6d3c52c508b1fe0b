"""Forwards that only test a model: what they change is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from sap_fast.random_state import RandomState

# Elements up to which a buffer's content is kept. Statistics are smaller; what is larger are the
# weights of a quantized model, which no forward changes.
_MAX_KEPT = 2**20

#: Tests that are running. A number, as one that is left late must not bring back what it found.
_testing = 0


def being_tested() -> bool:
    """Says whether the forward that is running is a test, whose result is not used."""
    return _testing > 0


@contextmanager
def aside(model: nn.Module, device: torch.device) -> Iterator[RandomState]:
    """Runs forwards without gradients, as a test; puts back what they changed, on any exit.

    That is the random state, buffers (statistics of the batches seen), and autocast's cache. The
    model's own gradient checkpointing is off meanwhile, as hooks that wait for the backward pass
    would be left behind. Modes are as they were, and compiled code is not run.

    Args:
        model: The model as it was given, wrappers included.
        device: Of the batches.

    Yields:
        The random state at the start, to be restored for a second forward like the first.
    """
    global _testing
    random_state = RandomState({device, *(parameter.device for parameter in model.parameters())})
    buffers = _Buffers(model)
    checkpointed = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    _testing += 1
    try:
        for module in checkpointed:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if any(_is_compiled(module) for module in model.modules()):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield random_state
    finally:
        _testing -= 1
        for module in checkpointed:
            module.gradient_checkpointing = True  # type: ignore[assignment]
        buffers.restore()
        # Before pytorch#165068 autocast kept the casts of weights made without gradients, and the
        # forward that follows in the same context would give those weights none.
        torch.clear_autocast_cache()
        random_state.restore()


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switches dropout off and gives every module its own mode back on exit."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


class _Buffers:
    """The buffers of a model as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._kept: list[tuple[nn.Module, str, Tensor, Tensor | None]] = []
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not (buffer.is_inference() or buffer.is_meta):
                    small = buffer.numel() <= _MAX_KEPT
                    copy = buffer.detach().clone() if small else None
                    self._kept.append((module, name, buffer, copy))

    def restore(self) -> None:
        with torch.no_grad():
            for module, name, buffer, copy in self._kept:
                if module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
                # Only where it was written: a graph that is alive may have saved it. Batch norm
                # writes its statistics without a new version.
                if copy is not None and not torch.equal(buffer, copy):
                    buffer.copy_(copy)
