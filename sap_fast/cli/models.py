"""Loading and saving of models for the commands."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from sap_fast.cli.console import UserError
from sap_fast.compatibility import current_accelerator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Precision = Literal["fp32", "bf16-mixed", "bf16"]

#: The dtype in which weights are stored: mixed precision computes in bf16 on fp32 weights.
WEIGHT_DTYPES = {"fp32": torch.float32, "bf16-mixed": torch.float32, "bf16": torch.bfloat16}


def default_device() -> torch.device:
    """Returns the accelerator if there is one, else the CPU."""
    accelerator = current_accelerator()
    return torch.device("cpu") if accelerator is None else accelerator


def resolved_precision(precision: str) -> str:
    """Returns what a precision stands for on this machine: itself, unless it is "auto"."""
    if precision != "auto":
        return precision
    kind = default_device().type
    has_bf16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16-mixed" if has_bf16 or kind == "xpu" else "fp32"


def load_model(
    name: str,
    precision: str,
    *,
    trainable: bool = False,
    trust_remote_code: bool = False,
    load_in: str | None = None,
    attention: str | None = None,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Loads a model or a PEFT adapter (with its base model), and the tokenizer.

    Args:
        name: a folder, or a name on the hub that transformers is configured for.
        precision: a key of `WEIGHT_DTYPES`, or `"auto"`.
        trainable: an adapter is to be trained further.
        trust_remote_code: run Python code that comes with the model.
        load_in: `"4bit"` or `"8bit"`, to quantize all linear layers of the model but its head;
            None: as it is stored.
        attention: the implementation, as transformers names it; None for its choice.

    Raises:
        UserError: if there is no such model, it cannot be loaded, or its tokenizer cannot encode a
            chat; for `load_in` without bitsandbytes.
    """
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    precision = resolved_precision(precision)
    options: dict[str, Any] = {"dtype": WEIGHT_DTYPES[precision]}
    if attention is not None:
        options["attn_implementation"] = attention
    if load_in is not None:
        options["quantization_config"] = _quantization(load_in, precision)
        # Layer by layer: the model as it is stored may be too large for the device.
        options["device_map"] = {"": default_device()}
    is_adapter = (Path(name) / "adapter_config.json").is_file()
    loader = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    if is_adapter:
        options["is_trainable"] = trainable
        if not (Path(name) / "adapter_model.safetensors").is_file():
            # PEFT would look for a pickled adapter_model.bin instead.
            raise UserError(
                f"--model {name}: has no adapter_model.safetensors; nothing else is read"
            )
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    try:
        model: Any = loader.from_pretrained(
            name, use_safetensors=True, trust_remote_code=trust_remote_code, **options
        )
    # A damaged folder makes transformers, PEFT and safetensors raise errors of many types; what is
    # wrong is the folder in every case.
    except Exception as error:
        raise _cannot_be_loaded(name, error) from error
    return model.to(default_device()), tokenizer


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a model or adapter.

    Args:
        name: a folder, or a name on the hub that transformers is configured for.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        UserError: if it cannot be loaded, or cannot encode a chat.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    from sap_fast.data import encode_chat

    # Their bars and notes would tear the command's own progress display: bitsandbytes repeats at
    # every product that 8-bit ones are computed in fp16.
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    # The tokenizers library raises a bare Exception.
    except Exception as error:
        raise _cannot_be_loaded(name, error) from error
    try:
        roles = ("user", "assistant")
        encode_chat(tokenizer, [{"role": role, "content": "Hello"} for role in roles])
    except ValueError as error:
        raise UserError(f"--model {name}: the tokenizer cannot be used: {error}") from error
    return tokenizer


def refuse_without_marks(scored: str, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that a chat template marks what is generated, where that is to be scored.

    Args:
        scored: What `--scored` was given.
        name: Of the model.
        tokenizer: Its tokenizer.

    Raises:
        UserError: It does not.
    """
    from sap_fast.data.templates import ChatTemplate

    if scored == "template" and not ChatTemplate(tokenizer).has_marks:
        raise UserError(
            f"--scored template: the chat template of {name} has no {{% generation %}} marks; give "
            "--scored turns, or a model whose template has them"
        )


def _cannot_be_loaded(name: str, error: Exception) -> UserError:
    # transformers names its own argument.
    if "trust_remote_code" in str(error):
        why = "it comes with Python code of its own, which runs only with --trust-remote-code"
    else:
        why = next(iter(str(error).splitlines()), type(error).__name__)
    return UserError(f"--model {name}: cannot be loaded: {why}")


def _quantization(load_in: str, precision: str) -> Any:
    """Returns how bitsandbytes is to store the weights, and in what to compute with them."""
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UserError(f"--load-in {load_in}: needs bitsandbytes: pip install 'sap-fast[qlora]'")
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    # NormalFloat4 with quantized constants, as QLoRA has it (Dettmers et al. 2023,
    # arXiv:2305.14314).
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32 if precision == "fp32" else torch.bfloat16,
    )


def add_lora(
    model: nn.Module,
    *,
    r: int,
    alpha: int,
    dropout: float,
    targets: list[str] | str | None,
    variant: str = "lora",
    saved: Sequence[str] = (),
) -> nn.Module:
    """Puts a fresh LoRA adapter on a model.

    Args:
        model: a transformers model.
        r: rank.
        alpha: scale; the adapter's output is multiplied by alpha/r.
        dropout: dropout on the adapter's input.
        targets: names of the linear layers to adapt; `"all-linear"`; None for PEFT's choice for the
            architecture.
        variant: "lora", "rslora" or "dora".
        saved: names of modules to train whole, and to save beside the adapter.

    Raises:
        UserError: if the targets or the modules to save do not fit the model.
    """
    from peft import LoraConfig, get_peft_model

    given = f"--modules-to-save {','.join(saved)}"
    for name in saved:
        if not _named(model, name):
            raise UserError(
                f"{given}: no module of the model is called {name!r}; expected such as "
                f"{', '.join(_names_to_save(model))}"
            )
    tied: dict[str, Any] = {"ensure_weight_tying": True} if _are_tied(model, saved) else {}
    if tied and "ensure_weight_tying" not in LoraConfig.__dataclass_fields__:
        raise UserError(
            f"{given}: the model's head and embeddings share their weights, which this version of "
            "peft saves apart: pip install --upgrade peft"
        )
    config = LoraConfig(
        modules_to_save=list(saved) or None,
        **tied,
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets,
        use_rslora=variant == "rslora",
        use_dora=variant == "dora",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        names = "auto" if targets is None else targets
        names = names if isinstance(names, str) else ",".join(names)
        raise UserError(f"--lora-target {names}: does not fit the model: {error}") from error
    # Of quantized weights, which no gradient reaches.
    except RuntimeError as error:
        if not saved:
            raise
        raise UserError(f"{given}: cannot be trained: {error}") from error


def _named(model: nn.Module, name: str) -> list[nn.Module]:
    """Returns the modules of a name, as PEFT understands it: the last parts of a path."""
    return [m for path, m in model.named_modules() if path == name or path.endswith(f".{name}")]


def _names_to_save(model: Any) -> list[str]:
    """Returns the names of the embeddings and of the head, the modules that are mostly saved."""
    wanted = {id(each) for each in _ends(model)}
    return [path.rpartition(".")[2] for path, m in model.named_modules() if id(m) in wanted]


def _ends(model: Any) -> list[nn.Module]:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end for end in ends if end is not None]


def _are_tied(model: nn.Module, saved: Sequence[str]) -> bool:
    """Says whether a module to save is the embeddings or the head, and both are one matrix."""
    ends = _ends(model)
    if len({id(end.weight) for end in ends}) == len(ends):
        return False
    return any(module in ends for name in saved for module in _named(model, name))
