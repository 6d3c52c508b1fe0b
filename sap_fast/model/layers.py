"""Which modules of a model are its decoder layers, and which of them are probed."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import nn

from sap_fast.configuration import refuse_encoder_decoder, text_config

#: What `ProbeSet(layers=…)` accepts.
Layers = Literal["early", "middle"] | Sequence[int] | Sequence[nn.Module]

#: Named choices of layers: the first and the last of them, as fractions of the depth. The paper
#: probes layers 11 to 20 of models of 32 layers; the ten below keep more at less cost of task loss
#: (docs/study.md), and need a longer backward in the probe passes.
LAYER_RANGES = {"early": (1 / 32, 10 / 32), "middle": (11 / 32, 20 / 32)}


def select_layers(
    model: nn.Module, layers: Layers
) -> tuple[tuple[int, ...], list[nn.Module], nn.Module]:
    """Return the probed layers' indices, the layers, and the module whose forward runs them."""
    if isinstance(layers, str):
        if layers not in LAYER_RANGES:
            names = ", ".join(f'"{name}"' for name in LAYER_RANGES)
            raise ValueError(f"layers={layers!r} is not known; give {names}, indices or modules")
        stack, owner = find_decoder_layers(model)
        depth = len(stack)
        first, last = (min(round(fraction * depth), depth - 1) for fraction in LAYER_RANGES[layers])
        indices = list(range(first, last + 1))
        return tuple(indices), [stack[index] for index in indices], owner

    chosen = list(layers)
    if not chosen:
        raise ValueError("layers=[] probes nothing; give at least one layer")
    if all(isinstance(layer, nn.Module) for layer in chosen):
        inside = {id(module) for module in model.modules()}
        for position, layer in enumerate(chosen):
            if id(layer) not in inside:
                raise ValueError(
                    f"layers[{position}] ({type(layer).__name__}) is not a module of the model"
                )
        return tuple(range(len(chosen))), [m for m in chosen if isinstance(m, nn.Module)], model
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in chosen):
        raise ValueError(
            f"layers={chosen!r} mixes kinds; give either layer indices or modules, nothing else"
        )
    stack, owner = find_decoder_layers(model)
    depth = len(stack)
    wanted = [layer for layer in chosen if isinstance(layer, int)]
    for layer in wanted:
        if not -depth <= layer < depth:
            raise ValueError(
                f"layers={chosen!r}: {layer} is out of range for a model of {depth} layers"
            )
    indices = sorted({layer % depth for layer in wanted})
    return tuple(indices), [stack[index] for index in indices], owner


def find_decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """Find a causal language model's stack of decoder layers by the model's own structure.

    The stack is the only outermost `nn.ModuleList` with as many entries as the model's
    configuration has hidden layers. Lists inside the layers (experts) are not outermost.

    Returns:
        The list, and the module that owns it and runs it in its forward.

    Raises:
        ValueError: if there is no such list, or more than one, or it is not the only stack that
            reads the text: an encoder-decoder.
    """
    refuse_encoder_decoder(model)
    depth = getattr(text_config(model), "num_hidden_layers", None)

    found: list[tuple[str, nn.ModuleList, nn.Module]] = []

    def search(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                found.append((f"{prefix}{name}", child, module))
            else:
                search(child, f"{prefix}{name}.")

    search(model, "")
    stacks = [(stack, owner) for _, stack, owner in found if len(stack) == depth]
    if depth is None or len(stacks) != 1:
        lists = ", ".join(f"{name} ({len(stack)})" for name, stack, _ in found) or "none"
        reason = (
            "its configuration has no num_hidden_layers"
            if depth is None
            else f"{len(stacks)} lists of {depth} modules, one expected"
        )
        raise ValueError(
            f"cannot tell the decoder layers of {type(model).__name__}: {reason} (module lists: "
            f"{lists}). Give the modules to probe: ProbeSet(model, layers=[module, …])"
        )
    return stacks[0]


def find_model(parameters: Iterable[nn.Parameter]) -> nn.Module | None:
    """Find the outermost module that holds all of these parameters; None if none does.

    A parameter does not know its module, so this looks at every object of the process.
    """
    wanted, outermost, most = set(parameters), None, 0
    # Of an object that stands for another one, `isinstance` would ask the other one.
    modules = [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
    for module in modules:
        if "_parameters" in vars(module) and wanted.issubset(module.parameters()):
            size = sum(1 for _ in module.modules())
            if size > most:
                outermost, most = module, size
    return outermost


#: What a decoder layer takes beside its hidden states that does not come of the layers below it.
_KNOWN_INPUTS = frozenset(
    {
        "args",
        "attention_mask",
        "cache",  # what transformers from 5.24 on calls past_key_values
        "cache_position",
        "hidden_states",
        "kwargs",
        "output_attentions",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "use_cache",
    }
)


def lower_layers(model: nn.Module, lowest: nn.Module) -> list[nn.Module]:
    """Return the decoder layers up to `lowest`; none if they may not be skipped.

    What runs above them may depend on them through the hidden states alone. Layers that take more
    (inputs for each layer, keys and values of other layers) may not, nor models whose loss reads
    the routers of all layers.
    """
    if getattr(text_config(model), "output_router_logits", False):
        return []
    try:
        stack = list(find_decoder_layers(model)[0])
    except ValueError:
        return []
    inputs = {name for layer in stack for name in inspect.signature(layer.forward).parameters}
    if lowest not in stack or not inputs <= _KNOWN_INPUTS:
        return []
    return stack[: stack.index(lowest) + 1]
