"""Activation checkpointing made for the passes of a SAP step.

A checkpointed layer keeps its input alone and runs again in the backward pass, with the dropout
masks, the autocast and the weights of its own pass. V is added by hooks on a layer's output,
outside of what runs again. So losses, gradients and h are the same bits with and without.

A probe pass (W frozen) stores less than a task pass: nothing up to the lowest probed layer, and in
the layers above nothing that only a weight gradient needs. What is right for the one wastes time or
memory in the other, so `Checkpointing.active` is entered, and decides, once per pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

Mode = Literal["none", "layers", "auto"]

# Shares of the free memory that "auto" fills. The rest of a GPU is left to its allocator's
# fragments and workspaces; the rest of a host's memory to the other processes it is shared with.
_CUDA_SHARE = 0.9
_CPU_SHARE = 0.5


class _StoredBytes(NamedTuple):
    """What one layer stores for backward, on top of its input."""

    per_token: float
    constant: int
    #: Of the sequence that it was measured on.
    length: int


class Checkpointing:
    """Checkpoints decoder layers inside the passes, and leaves the model alone outside of them.

    With `"auto"` each forward of `owner` checkpoints as few layers as the budget allows. The bytes
    of one layer are measured in the first forward of each kind (dtype, autocast, which tensors are
    trained, with or without a mask) and of each sequence longer than those before, and scaled by
    the number of tokens. The earliest layers are checkpointed: backward comes to them last, when
    the layers that kept everything are released, so that what they store again fits into that
    memory. Were they the latest, it would add one layer to the peak.

    Not in the estimate, and so left to the share of the memory that is not filled: the head and its
    logits; casts of trained weights that autocast caches; layers on other devices than the first. A
    limit of the container that the process runs in is not seen. For short sequences after long ones
    the estimate is too high where a layer stores what grows faster than the tokens, as eager
    attention's S×S scores.

    Args:
        layers: the whole stack of decoder layers, in the order in which they run. A layer takes its
            hidden states as its first tensor, and may have no effect but its output.
        owner: the module that runs them in its forward, see `layers.find_decoder_layers`.
        mode: `"none"` changes nothing: a model's own checkpointing works as ever. `"layers"`
            checkpoints every layer that stores anything in the pass. `"auto"` as few as fit;
            as `"layers"` in a compiled model, and without a budget on devices whose free memory
            cannot be told (others than CPU on Linux and CUDA). Layers in eval mode, and those that
            the model's own switch checkpoints, are left as they are.
        lowest_probed: index of the lowest probed layer.
        budget: bytes that the layers of one forward may store for backward, with `"auto"`. Default:
            measured before every forward, half of what is available on the CPU and 0.9 of what is
            free on a GPU, less the gradients that are still to be allocated.

    Raises:
        ValueError: if `mode` is not known, `budget` is negative, or layers are compiled.
    """

    def __init__(
        self,
        layers: nn.ModuleList | Sequence[nn.Module],
        owner: nn.Module,
        mode: Mode,
        lowest_probed: int,
        budget: int | None = None,
    ) -> None:
        if mode not in get_args(Mode):
            raise ValueError(
                f'checkpointing mode={mode!r} is not known; choose "none", "layers" or "auto"'
            )
        if budget is not None and budget < 0:
            raise ValueError(
                f"budget={budget!r} is out of range; give bytes ≥ 0, or None for what is free"
            )
        self.mode = mode
        self.lowest_probed = lowest_probed
        self.budget = budget
        self._layers = layers
        self._owner = owner
        self._measured: dict[Hashable, _StoredBytes] = {}
        #: Indices of the layers that the open context may checkpoint.
        self._candidates: list[int] = []
        #: "auto" keeps what this layer and the later ones store; None: not decided in this forward.
        self._first_kept: int | None = None
        if mode != "none":
            self._refuse_compiled()

    @contextmanager
    def active(self, *, frozen: bool) -> Iterator[None]:
        """Checkpoint what runs forward inside; backward may run inside or after.

        Args:
            frozen: a probe pass: nothing up to the lowest probed layer is differentiated.

        Raises:
            ValueError: if layers have been compiled meanwhile.
        """
        if self.mode == "none":
            yield
            return
        self._refuse_compiled()
        lowest = self.lowest_probed + 1 if frozen else 0
        chosen = {
            index: layer
            for index, layer in enumerate(self._layers)
            if index >= lowest and not self._has_its_own(layer)
        }
        self._candidates = list(chosen)
        with ExitStack() as stack:
            handle = self._owner.register_forward_pre_hook(self._on_forward)
            stack.callback(handle.remove)
            for index, layer in chosen.items():
                run = functools.partial(self._run, index, layer)
                stack.enter_context(_attributes(layer, _hand_over(layer, run)))
            yield

    @property
    def has_layers(self) -> bool:
        """Whether there is a layer that it may checkpoint in the mode that the model is in now."""
        return any(layer.training and not self._has_its_own(layer) for layer in self._layers)

    def _refuse_compiled(self) -> None:
        for index, layer in enumerate(self._layers):
            # `layer.compile()` sets the one, `torch.compile(layer)` is a module with the other.
            if layer._compiled_call_impl is not None or hasattr(layer, "_orig_mod"):
                raise ValueError(
                    f'checkpointing="{self.mode}" cannot be switched per pass inside a compiled '
                    f"layer, and layer {index} is one; compile the whole model or nothing, or use "
                    'checkpointing="none"'
                )

    def _has_its_own(self, layer: nn.Module) -> bool:
        """Whether the user has this layer checkpointed already.

        By the switch of transformers, which sits on the layer, or in older models on the module
        that runs the layers; or by the wrapper of torch.distributed.
        """
        switched = getattr(self._owner, "gradient_checkpointing", False)
        return getattr(layer, "gradient_checkpointing", switched) or hasattr(
            layer, "_checkpoint_wrapped_module"
        )

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._first_kept = None

    def _run(
        self, index: int, layer: nn.Module, forward: functools.partial[Any], *args: Any
    ) -> Any:
        """Run a layer's forward, which has its keyword arguments already, in the place of it."""
        inputs = [x for x in tree_leaves((args, forward.keywords)) if isinstance(x, Tensor)]
        if not (layer.training and inputs and _stores(layer, inputs[0])):
            return forward(*args)
        hidden = inputs[0]
        # What a compiled graph stores was decided when it was traced, and cannot be measured here.
        measurable = self.mode == "auto" and not torch.compiler.is_compiling()
        if measurable and self._first_kept is None:
            kind = _what_decides_the_bytes(layer, inputs)
            stored = self._measured.get(kind)
            if stored is None or stored.length < hidden.shape[-2]:
                # Checkpointed layers show nothing of what they would store, so this one keeps it,
                # once. It is the layer that the estimate leaves room for.
                with _measuring(layer, inputs) as saved:
                    output = forward(*args)
                self._measured[kind] = stored = _summarize(layer, hidden, saved)
                self._first_kept = self._decide(index, hidden, stored)
                return output
            self._first_kept = self._decide(index, hidden, stored)
        if self._first_kept is not None and index >= self._first_kept:
            return forward(*args)

        # `checkpoint` restores the generators of the devices of its positional tensors, and a model
        # may pass the hidden states by name. On a GPU dropout would then draw another mask.
        def run_again(_: Tensor, *rest: Any) -> Any:
            return forward(*rest)

        return checkpoint(run_again, hidden, *args, use_reentrant=False)

    def _decide(self, lowest: int, hidden: Tensor, stored: _StoredBytes) -> int:
        """Return the first layer that keeps what it stores, where `lowest` is the first to store.

        Of n layers each keeps its input anyway, and memory for what one more stores has to be free:
        to run a checkpointed layer again, and for the gradients inside a layer in backward.
        """
        candidates = [index for index in self._candidates if index >= lowest]
        budget = self.budget
        if budget is None:
            budget = self._free_bytes(hidden.device)
        boundary = hidden.numel() * hidden.element_size()
        extra = stored.per_token * _tokens(hidden) + stored.constant
        # At least a byte: a layer that stores its input alone costs nothing to keep.
        room = (budget - len(candidates) * boundary - (boundary + extra)) // max(extra, 1)
        kept = int(min(max(room, 0), len(candidates)))
        return candidates[-kept] if kept else len(self._layers)

    def _free_bytes(self, device: torch.device) -> int:
        """Return what a forward may fill now: 0, which checkpoints all, where that is not known."""
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            share = _CUDA_SHARE * (free + unused)
        elif device.type == "cpu":
            share = _CPU_SHARE * _available_memory()
        else:
            return 0
        gradients = sum(
            parameter.numel() * parameter.element_size()
            for parameter in self._owner.parameters()
            if parameter.requires_grad and parameter.grad is None
        )
        return int(share) - gradients


def _available_memory() -> int:
    """Return the bytes of main memory that are free or can be freed; 0 where Linux is not."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


@contextmanager
def _attributes(module: nn.Module, values: Mapping[str, Any]) -> Iterator[None]:
    """Set attributes on the instance; put back what it had, or the class's, at the end."""
    absent = object()
    before = {name: module.__dict__.get(name, absent) for name in values}
    module.__dict__.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is absent:
                del module.__dict__[name]
            else:
                module.__dict__[name] = value


def _hand_over(layer: nn.Module, run: Callable[..., Any]) -> dict[str, Any]:
    """Return the attributes with which a layer calls `run(forward, *args)` for its forward."""
    # transformers is no dependency, so its class is known by name. Its switch also takes away the
    # cache of keys and values, which running again would write a second time.
    if any(base.__name__ == "GradientCheckpointingLayer" for base in type(layer).__mro__):
        return {"gradient_checkpointing": True, "_gradient_checkpointing_func": run}
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return run(functools.partial(original, **kwargs), *args)

    return {"forward": forward}


def _stores(layer: nn.Module, hidden: Tensor) -> bool:
    """Whether a forward of this layer leaves anything for a backward."""
    return torch.is_grad_enabled() and (
        hidden.requires_grad or any(parameter.requires_grad for parameter in layer.parameters())
    )


def _tokens(hidden: Tensor) -> int:
    return hidden[..., 0].numel()


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype that autocast computes in, or None where it is off."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def _what_decides_the_bytes(layer: nn.Module, inputs: Sequence[Tensor]) -> Hashable:
    """Return what tells the forwards apart in which a layer stores as much for each token."""
    hidden = inputs[0]
    trainable = sum(parameter.requires_grad for parameter in layer.parameters())
    # A tiny Llama stored 868 bytes per token without a mask among the inputs and 944 with one.
    return hidden.dtype, _autocast_dtype(hidden.device), trainable, len(inputs)


class _Saved(NamedTuple):
    """A storage that autograd saved."""

    shape: torch.Size
    size: int


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    """Return where a tensor's elements lie: in several places, if it is a wrapper around others.

    Quantized weights of torchao are such wrappers (values, scales), and have no storage themselves.
    """
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.untyped_storage()]
    inner = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [storage for each in inner if isinstance(each, Tensor) for storage in _storages(each)]


@contextmanager
def _measuring(layer: nn.Module, inputs: Sequence[Tensor]) -> Iterator[dict[int, _Saved]]:
    """Collect the distinct storages that are saved for backward, by address.

    Not those of parameters and buffers, and of the layer's inputs, which exist anyway.
    """
    there = {
        storage.data_ptr()
        for tensor in (*layer.parameters(), *layer.buffers(), *inputs)
        for storage in _storages(tensor)
    }
    saved: dict[int, _Saved] = {}

    def pack(tensor: Tensor) -> Tensor:
        for storage in _storages(tensor):
            if storage.data_ptr() not in there:
                saved[storage.data_ptr()] = _Saved(tensor.shape, storage.nbytes())
        return tensor

    def unpack(tensor: Tensor) -> Tensor:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield saved


def _summarize(layer: nn.Module, hidden: Tensor, saved: Mapping[int, _Saved]) -> _StoredBytes:
    """Divide what was saved into a part that grows with the tokens and one that does not."""
    weights: set[tuple[int, ...]] = set()
    copied = _autocast_dtype(hidden.device) is not None
    if copied or any(map(is_traceable_wrapper_subclass, layer.parameters())):
        # Autocast saves a cast copy of every weight whose input takes a gradient, and torchao's
        # quantized weights a dequantized one.
        weights = {tuple(sorted(parameter.shape)) for parameter in layer.parameters()}
    casts = [entry.size for entry in saved.values() if tuple(sorted(entry.shape)) in weights]
    total = sum(entry.size for entry in saved.values())
    return _StoredBytes((total - sum(casts)) / _tokens(hidden), sum(casts), hidden.shape[-2])
