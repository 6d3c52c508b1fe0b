"""Tiny models whose linear layers are quantized, and the same with plain weights."""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from tests.tiny import Problem, random_batch, tiny_llama

NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}
#: torchao's int4 that computes on any device: the default of its `Int4WeightOnlyConfig` runs on
#: GPUs alone, and PEFT refuses it.
_INT4 = IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(32))
#: Settings of `from_pretrained` by base.
BASES: dict[str, Any] = {
    "nf4": BitsAndBytesConfig(**NF4),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "torchao int8": TorchAoConfig(Int8WeightOnlyConfig()),
    "torchao int4": TorchAoConfig(_INT4),
}
# It says at every product that it computes in fp16.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@functools.cache
def _stored(layers: int) -> Any:
    """A folder with a tiny Llama, removed at the end of the process."""
    folder = tempfile.TemporaryDirectory()
    tiny_llama(layers=layers).save_pretrained(folder.name)
    return folder


def quantized(base: str, *, layers: int = 4, head: bool = False, **settings: Any) -> nn.Module:
    """A tiny Llama on a base.

    Args:
        base: a key of `BASES`.
        layers: how many.
        head: quantize the head too.
        settings: of `from_pretrained`, such as `dtype`.
    """
    config = copy.deepcopy(BASES[base])
    if base in ("nf4", "int8"):
        if settings.get("dtype") == torch.bfloat16:
            config.bnb_4bit_compute_dtype = torch.bfloat16
        if head:
            config.llm_int8_skip_modules = ["nothing"]
    model = AutoModelForCausalLM.from_pretrained(
        _stored(layers).name, quantization_config=config, **settings
    )
    if head and base.startswith("torchao"):
        quantize_(model.lm_head, config.quant_type)
    return model.train()


def dequantized(model: nn.Module) -> nn.Module:
    """A model with the values of its quantized weights in plain ones, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            values = _values(child)
            if values is not None:
                plain = nn.Linear(*values.shape[::-1], bias=False, dtype=values.dtype)
                plain.weight = nn.Parameter(values.clone(), requires_grad=False)
                setattr(module, name, plain)
    # By these PEFT chooses the kind of its adapters.
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "hf_quantizer"):
        vars(model).pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    return model


def _values(module: nn.Module) -> Tensor | None:
    import bitsandbytes.functional as bnb

    weight: Any = getattr(module, "weight", None)
    kind = type(module).__name__
    if kind == "Linear4bit":
        return bnb.dequantize_4bit(weight.data, weight.quant_state)
    if kind == "Linear8bitLt":
        return bnb.int8_vectorwise_dequant(weight.data, weight.SCB)
    if isinstance(module, nn.Linear) and type(weight).__module__.startswith("torchao"):
        return weight.dequantize()
    return None


def on_base(base: str, *, plain: bool = False, **settings: Any) -> Problem:
    """A problem whose model has LoRA on a base, or on the same weights dequantized."""
    model = quantized(base, **settings)
    adapted = with_fp32_lora(dequantized(model) if plain else model)
    return Problem(adapted, *(random_batch(seed=seed) for seed in (1, 2, 3)))


def with_fp32_lora(model: nn.Module) -> nn.Module:
    """LoRA in fp32, whatever the model is in, with B away from zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = ["q_proj", "v_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return adapted.train()
