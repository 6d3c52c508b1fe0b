"""What a model's configuration says, whatever the model is wrapped in."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from sap_fast.compatibility import prompts_disabled


def text_config(model: nn.Module) -> Any:
    """Returns the configuration of a language model, or of the language half of a larger one.

    The outermost module that has a configuration counts, so the model may be inside wrappers
    without one (DDP, a module of the user's). Of a multi-modal model it is the part for the text
    that the model writes: one of transformers may have another for the text that it reads.

    Args:
        model: A language model, possibly wrapped.

    Returns:
        The configuration, or None where no module has one.
    """
    configs = (getattr(module, "config", None) for module in model.modules())
    config = next(filter(_has_settings, configs), None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config(decoder=True) if callable(get_text_config) else config


def text_setting(model: nn.Module, name: str) -> Any:
    """Returns one setting of `text_config(model)`, or None where there is no such setting."""
    return getattr(text_config(model), name, None)


def refuse_encoder_decoder(model: nn.Module) -> None:
    """Raises where a model has an encoder, which reads the prompt apart from the answer.

    Raises:
        ValueError: naming the model.
    """
    if text_setting(model, "is_encoder_decoder"):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, whose prompt and answer are no one "
            "sequence; expected a causal language model"
        )


class VirtualTokens(NamedTuple):
    """How many virtual tokens a model puts before every row."""

    number: int
    in_sequence: bool
    """Whether they have hidden states beside the tokens', or keys and values alone."""


NO_VIRTUAL_TOKENS = VirtualTokens(0, False)


def virtual_tokens(model: nn.Module) -> VirtualTokens:
    """Returns the virtual tokens of PEFT's prompt learning, while the adapter is not disabled.

    Args:
        model: A language model, possibly wrapped.
    """
    # Not imported here: a model of PEFT exists only where that was imported already.
    peft = sys.modules.get("peft")
    if peft is None:
        return NO_VIRTUAL_TOKENS
    adapted: Any = next((m for m in outer_modules(model) if isinstance(m, peft.PeftModel)), None)
    if adapted is None:
        return NO_VIRTUAL_TOKENS
    config = adapted.active_peft_config
    if not config.is_prompt_learning or prompts_disabled(adapted):
        return NO_VIRTUAL_TOKENS
    in_sequence = str(getattr(config.peft_type, "value", config.peft_type)) not in _IN_THE_CACHE
    return VirtualTokens(config.num_virtual_tokens, in_sequence)


def outer_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yields a model and what is in it, from outside, down to the models of transformers.

    Wrappers are outside of these, and a forward should not look at thousands of modules for them.
    """
    transformers = sys.modules.get("transformers")
    innermost = () if transformers is None else transformers.PreTrainedModel
    found = [model]
    for module in found:  # grows meanwhile
        yield module
        if not isinstance(module, innermost):
            found.extend(child for child in module._modules.values() if child is not None)


# Prompt learning whose virtual tokens are keys and values of every layer.
_IN_THE_CACHE = {"PREFIX_TUNING", "CARTRIDGE"}


def _has_settings(config: Any) -> bool:
    # PEFT's config for a model that has none itself is a dict, and the model may hold one that has.
    return config is not None and not isinstance(config, Mapping)
