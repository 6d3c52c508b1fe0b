"""A model of transformers as one .gguf file, for llama.cpp and what is built on it.

The names of tensors and keys are those of the `gguf` package. What is left to say here is which
models are stored as they are: how llama.cpp lays out the rows of queries and keys, and which of its
pre-tokenizers does what a tokenizer does.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")
"""How the matrices can be stored; vectors are always in fp32, as llama.cpp has them."""

GGUF_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""Classes of transformers, and what llama.cpp calls them."""

# How the pre-tokenizers that llama.cpp knows by name split text. Facts of `llama-vocab.cpp`.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3, _QWEN_2 = _WORDS % r"\p{N}{1,3}", _WORDS % r"\p{N}"


class GgufError(ValueError):
    """A model that cannot be written as GGUF, told in one line."""


def write_gguf(
    path: Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase, stored: str
) -> None:
    """Writes a model with its tokenizer, and checks the file by loading it back.

    Args:
        path: Of the file, whose folder exists.
        model: A causal language model of `GGUF_ARCHITECTURES`, in fp32 on the CPU.
        tokenizer: Its tokenizer, a byte-level BPE.
        stored: One of `GGUF_TYPES`.

    Raises:
        GgufError: The model or the tokenizer is of another kind, the type cannot hold the weights,
            or what was written does not load to the same logits.
        OSError: The file cannot be written.
    """
    import gguf

    config = cast(Any, model).config
    _refuse_unknown(type(model).__name__, config)
    vocabulary = _Vocabulary(tokenizer, config.vocab_size)
    writer = gguf.GGUFWriter(path, GGUF_ARCHITECTURES[type(model).__name__])
    _add_settings(writer, config, path.stem, stored)
    vocabulary.add_to(writer, tokenizer)
    rounded: dict[str, Tensor] = {}
    names = gguf.get_tensor_name_map(_architecture(model), config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # without an output matrix the embedding is the head
        short = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if short is None:
            raise GgufError(f"llama.cpp has no tensor for {name}")
        data, rounded[name] = _stored(name, tensor, stored)
        if GGUF_ARCHITECTURES[type(model).__name__] == "llama":
            data = _neighbouring(name, data, config)
        writer.add_tensor(short, data, raw_dtype=_type_of(tensor, stored))
    factors = _rope_factors(model)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    _check(path, model, rounded)


def _architecture(model: nn.Module) -> Any:
    import gguf

    name = GGUF_ARCHITECTURES[type(model).__name__]
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _refuse_unknown(name: str, config: Any) -> None:
    if name not in GGUF_ARCHITECTURES:
        expected = ", ".join(GGUF_ARCHITECTURES)
        raise GgufError(f"the model is a {name}; expected one of {expected}")
    kind = _positions(config)["rope_type"]
    if kind not in ("default", "llama3"):
        raise GgufError(f"the model scales positions by {kind}; expected default or llama3")
    # Biases of Llama, sliding windows: of no model that is in use, and untried.
    for setting in ("attention_bias", "mlp_bias", "use_sliding_window"):
        if getattr(config, setting, False):
            raise GgufError(f"the model has {setting}, which is not written")


def _positions(config: Any) -> dict[str, Any]:
    """Returns the kind and the base of rotary positions."""
    given = getattr(config, "rope_parameters", None)
    if given is None:  # transformers before 5
        scaling = getattr(config, "rope_scaling", None) or {}
        given = {"rope_type": "default", "rope_theta": config.rope_theta} | scaling
    return given


def _add_settings(writer: Any, config: Any, name: str, stored: str) -> None:
    import gguf

    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(_positions(config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    kinds = gguf.LlamaFileType
    writer.add_file_type(
        {
            "f32": kinds.ALL_F32,
            "f16": kinds.MOSTLY_F16,
            "bf16": kinds.MOSTLY_BF16,
            "q8_0": kinds.MOSTLY_Q8_0,
        }[stored]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _type_of(tensor: Tensor, stored: str) -> Any:
    import gguf

    kinds = gguf.GGMLQuantizationType
    if tensor.ndim < 2:
        return kinds.F32
    if stored == "q8_0" and tensor.shape[-1] % 32:  # its blocks would span rows
        return kinds.F16
    return kinds[stored.upper()]


def _stored(name: str, tensor: Tensor, stored: str) -> tuple[np.ndarray, Tensor]:
    """Returns a tensor as it is written, and as it is read again."""
    import gguf

    kind = _type_of(tensor, stored)
    whole = tensor.detach().float().cpu().numpy()
    with np.errstate(over="ignore"):  # refused below
        data = gguf.quants.quantize(whole, kind)
    again = torch.from_numpy(gguf.quants.dequantize(data, kind).astype(np.float32))
    if not bool(again.isfinite().all()):
        raise GgufError(f"{stored} cannot hold the values of {name}; choose bf16 or f32")
    return data, again


def _neighbouring(name: str, data: np.ndarray, config: Any) -> np.ndarray:
    """Returns the rows of queries and keys in the order of llama.cpp's Llama.

    Rotary positions turn pairs of features. In transformers a pair is feature i of the first half
    of a head and feature i of its second half; in llama.cpp's Llama the two are neighbours.
    """
    for part, heads in (
        ("q_proj", config.num_attention_heads),
        ("k_proj", config.num_key_value_heads),
    ):
        if f".{part}." in name:
            halves = data.reshape(heads, 2, data.shape[0] // heads // 2, *data.shape[1:])
            return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(data.shape)
    return data


def _rope_factors(model: nn.Module) -> np.ndarray | None:
    """Returns what llama.cpp divides the frequencies by; None where they are the plain ones."""
    config = cast(Any, model).config
    positions = _positions(config)
    if positions["rope_type"] == "default":
        return None
    scaled = cast(Any, model).model.rotary_emb.inv_freq.float().cpu()
    steps = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
    plain = positions["rope_theta"] ** -steps
    return (plain / scaled).numpy()


class _Vocabulary:
    """The tokens of a byte-level BPE tokenizer as llama.cpp wants them.

    Args:
        tokenizer: A fast tokenizer.
        size: Rows of the model's embedding; tokens that the tokenizer lacks are unused.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
        import gguf

        if not tokenizer.is_fast:
            raise GgufError("the tokenizer has no tokenizer.json, from which its tokens are read")
        backend = json.loads(cast(Any, tokenizer).backend_tokenizer.to_str())
        self.pre = _pre_tokenizer(backend)
        kinds = gguf.TokenType
        self.tokens = [f"[PAD{number}]" for number in range(size)]
        self.types = [int(kinds.UNUSED)] * size
        for token, number in backend["model"]["vocab"].items():
            self.tokens[number], self.types[number] = token, int(kinds.NORMAL)
        for added in backend["added_tokens"]:
            kind = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
            self.tokens[added["id"]], self.types[added["id"]] = added["content"], int(kind)
        self.merges = [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in backend["model"]["merges"]
        ]

    def add_to(self, writer: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        """Adds tokens, merges, special tokens and the chat template to a file."""
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        writer.add_token_merges(self.merges)
        for kind in ("bos", "eos", "pad", "unk"):
            number = getattr(tokenizer, f"{kind}_token_id")
            if number is not None:
                getattr(writer, f"add_{kind}_token_id")(number)
        ids = tokenizer("a")["input_ids"]
        writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
        writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
        if isinstance(tokenizer.chat_template, str):
            writer.add_chat_template(tokenizer.chat_template)


def _pre_tokenizer(backend: Mapping[str, Any]) -> str:
    """Returns llama.cpp's name of what a tokenizer does before it merges bytes."""
    model, given = backend["model"], backend["pre_tokenizer"] or {"type": "none"}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise GgufError(
            f"the tokenizer is {'SentencePiece' if model.get('byte_fallback') else model['type']}; "
            "expected a byte-level BPE"
        )
    steps = given["pretokenizers"] if given["type"] == "Sequence" else [given]
    found = tuple(map(_step, steps))
    names = {
        (("ByteLevel", True),): "gpt-2",
        (("Digits", True), ("ByteLevel", True)): "smollm",
        (("Split", _LLAMA_3), ("ByteLevel", False)): "llama-bpe",
        (("Split", _QWEN_2), ("ByteLevel", False)): "qwen2",
    }
    name = names.get(found)
    # Of these, llama.cpp looks whole words up for Llama 3 alone.
    if name is None or bool(model.get("ignore_merges")) != (name == "llama-bpe"):
        raise GgufError(
            "the tokenizer splits text in a way that is none of those of llama.cpp that are known "
            f"here: {', '.join(names.values())}"
        )
    return name


def _step(step: Mapping[str, Any]) -> tuple[str, Any]:
    """Returns what decides in a step of a pre-tokenizer."""
    kind = step["type"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return kind, step.get("use_regex", True)
    if kind == "Digits":
        return kind, step["individual_digits"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return kind, step["pattern"].get("Regex")
    return kind, None


def _check(path: Path, model: nn.Module, rounded: Mapping[str, Tensor]) -> None:
    """Raises a `GgufError` unless the file loads to the logits of the rounded weights."""
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        with redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent,
                gguf_file=path.name,
                dtype=torch.float32,
                use_safetensors=True,
                **options,
            )
    # transformers reads some sizes as those of the models that it knows, and then tells it so.
    except (RuntimeError, ValueError, KeyError) as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise GgufError(f"what was written does not load: {why}") from error
    if _positions(cast(Any, model).config)["rope_type"] != "default":
        # transformers does not read the factors of the frequencies.
        loaded.model.rotary_emb = cast(Any, model).model.rotary_emb
    rows = cast(Any, model).config.vocab_size
    ids = torch.arange(min(32, rows))[None] * (rows // 32 or 1) % rows
    was_training = model.training
    with torch.no_grad():
        expected = torch.func.functional_call(model.eval(), dict(rounded), (ids,)).logits
        found = loaded.eval()(input_ids=ids).logits
    model.train(was_training)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference < 1e-4:
        raise GgufError(
            f"what was written loads to other logits, off by {difference:.1e} of the largest"
        )
