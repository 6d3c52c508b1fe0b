"""`SafetyPasses` beside an optimizer of others, by PyTorch's own hooks of an optimizer."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from sap_fast.step.passes import SafetyPasses

#: Of `TrainingArguments`: these update inside of backward, which each pass runs.
_IN_BACKWARD = ("lomo", "layerwise")


def refuse_updates_in_backward(optim: str) -> None:
    """Raise for a choice of `TrainingArguments(optim=…)` that updates before `step`.

    Raises:
        ValueError: naming it.
    """
    if optim.endswith(_IN_BACKWARD):
        raise ValueError(
            f"optim={optim!r} updates parameters inside of backward, and every pass runs one; "
            "choose an optimizer that updates in step()"
        )


def checked_optimizer(optimizer: Any) -> Optimizer:
    """Return what is given as an optimizer, if it has PyTorch's hooks.

    Raises:
        TypeError: if it is no `torch.optim.Optimizer`.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"the optimizer is a {type(optimizer).__name__}; expected a torch.optim.Optimizer, "
            "whose hooks tell the passes of its step"
        )
    return optimizer


def run_beside(optimizer: Optimizer, passes: SafetyPasses) -> None:
    """Let passes end their step with the step of an optimizer that is not of this package.

    Before its update the gradients are blended, after it the step is closed. Its state dict holds
    the state of the passes under the key `"sap"`, as that of `BlendedAdamW` does.

    Args:
        optimizer: one whose own state dict has no such key.
        passes: with the parameters of that optimizer.

    Raises:
        ValueError: if its groups differ in `maximize`.
    """
    given = {bool(group.get("maximize", False)) for group in optimizer.param_groups}
    if len(given) > 1:
        raise ValueError(
            "maximize differs in the parameter groups; expected one value for all, as the "
            "direction and the probe belong to one task objective"
        )
    passes.maximize = given == {True}
    optimizer.register_step_pre_hook(lambda *_: passes.blend_())
    optimizer.register_step_post_hook(lambda *_: passes.end_step())
    optimizer.register_state_dict_post_hook(
        lambda _, state_dict: {**state_dict, "sap": passes.state_dict()}
    )
    load = optimizer.load_state_dict

    # Not by a hook, which 8-bit optimizers of bitsandbytes do not call.
    def load_state_dict(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        load({key: value for key, value in state_dict.items() if key != "sap"}, *args, **kwargs)
        if "sap" in state_dict:
            passes.load_state_dict(state_dict["sap"])

    # Of this one optimizer, whose class is another's: a state dict with "sap" is not for it.
    optimizer.load_state_dict = load_state_dict  # type: ignore[method-assign]
