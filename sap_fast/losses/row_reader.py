"""What of a model may read rows: packed ones are not those of the batch.

A hook that looks at what passes, and at no row of it, says so: `hook.reads_no_rows = True`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from torch.nn.modules import module as global_hooks

# Where hooks are defined that do not look at rows: they move, shard, count or keep what passes.
_KNOWN_HOOKS = (
    "sap_fast.",
    "torch.",
    "accelerate.",
    "deepspeed.",
    "transformers.utils.output_capturing",
    "trl.",
)
# What makes the embeddings' output require gradients, for gradient checkpointing: a function of
# transformers, of PEFT and of TRL.
_HOOKS_FOR_CHECKPOINTING = {"make_inputs_require_grad", "make_inputs_require_grads"}
# Where a module's own forward may be replaced: beside the above by the faster kernels, by another
# method of the same model, and by what takes an adapter's input to its device.
_KNOWN_FORWARDS = (
    *_KNOWN_HOOKS,
    "transformers.",
    "peft.",
    "liger_kernel.",
    "kernels.",
    "axolotl.kernels.",
    "swift.tuners.",
)

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# What else of a module may read rows, if it is set.
_MAY_BE_SET = {"_hf_hook", "forward", "peft_config"}


def row_reader(model: nn.Module) -> str | None:
    """Returns what may read a row in a forward or backward pass, in words; None if nothing does.

    Those are hooks and replaced forwards of others than are known to read none, and adapters that
    look for tokens in the row. A module whose class does so is not seen here.

    Args:
        model: The model as it was given, wrappers included.
    """
    for module in all_modules(model):
        reader = _reader(module)
        if reader is not None:
            name = next(name for name, other in model.named_modules() if other is module)
            return f"{reader} {name or 'the model'} ({type(module).__name__})"
    for hook in _hooks(global_hooks, "_global"):
        if not _is_known(hook, _KNOWN_HOOKS):
            return f"the hook {_name(hook)} on all modules"
    return None


def all_modules(model: nn.Module) -> list[nn.Module]:
    """Returns what `model.modules()` yields, in another order and a tenth of the time.

    Every forward asks, and a large model with adapters has thousands of modules.
    """
    found, seen = [model], {id(model)}
    for module in found:  # grows meanwhile
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                found.append(child)
    return found


def _reader(module: nn.Module) -> str | None:
    own = vars(module)
    if not (any(own[kind] for kind in _HOOKS) or _MAY_BE_SET & own.keys()):
        return None
    for hook in _hooks(module, ""):
        if not _is_known(hook, _KNOWN_HOOKS):
            return f"the hook {_name(hook)} on"
    for hook in _accelerate_hooks(own.get("_hf_hook")):
        if not _is_known(hook, _KNOWN_HOOKS):
            return f"the hook {_name(hook)} on"
    forward = own.get("forward")
    if forward is not None and not _is_known(forward, _KNOWN_FORWARDS):
        return f"{_name(forward)} in the place of the forward of"
    configs = own.get("peft_config")
    if isinstance(configs, Mapping) and any(map(_invokes, configs.values())):
        return "an activated LoRA of"
    return None


def _hooks(owner: Any, prefix: str) -> Iterator[Any]:
    for kind in _HOOKS:
        yield from getattr(owner, prefix + kind).values()


def _accelerate_hooks(hook: Any) -> list[Any]:
    """Returns the hooks that Accelerate holds for a module, whose forward it replaces."""
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _invokes(config: Any) -> bool:
    """Says whether an adapter acts from certain tokens of a row on."""
    return bool(getattr(config, "alora_invocation_tokens", None))


def _innermost(function: Any) -> Any:
    while True:
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        else:
            return function


def _is_known(function: Any, places: tuple[str, ...]) -> bool:
    function = _innermost(function)
    if getattr(function, "reads_no_rows", False):
        return True
    # Not by __module__, which a decorator takes from what it wraps.
    home = getattr(function, "__globals__", {}).get("__name__") or type(function).__module__
    return f"{home}.".startswith(places) or _name(function) in _HOOKS_FOR_CHECKPOINTING


def _name(function: Any) -> str:
    function = _innermost(function)
    return getattr(function, "__name__", type(function).__name__)
