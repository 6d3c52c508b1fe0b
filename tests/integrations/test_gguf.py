"""A .gguf file holds the model and its tokenizer, laid out as llama.cpp has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Regex, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sap_fast.integrations.gguf import (
    _LLAMA_3,
    _QWEN_2,
    GgufError,
    _pre_tokenizer,
    write_gguf,
)
from tests.byte_tokenizer import byte_tokenizer as tokenizer
from tests.conftest import TEMPLATE

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'sap-fast[gguf]'")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
}


def model(kind: str = "llama", **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    given = {"vocab_size": 264, **SIZES, **options}
    classes: dict[str, tuple[Any, Any]] = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config, build = classes[kind]
    built = build(config(**given)).eval()
    with torch.no_grad():  # biases and norms that are not what they begin with
        for parameter in built.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter))
    return built


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()


def logits(given: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return given(torch.arange(3, 40)[None]).logits


@pytest.mark.parametrize(
    ("kind", "stored", "options"),
    [
        ("llama", "f32", {"tie_word_embeddings": True}),
        ("llama", "f16", {"rope_theta": 5e5, "rms_norm_eps": 1e-5}),
        ("llama", "bf16", {"num_key_value_heads": 4}),
        ("llama", "q8_0", {}),
        ("qwen2", "f16", {}),
        ("qwen3", "f16", {"head_dim": 128}),
    ],
)
def test_what_is_written_loads_to_the_logits_of_the_rounded_weights(
    tmp_path: Path, kind: str, stored: str, options: dict[str, Any]
) -> None:
    path, given = tmp_path / "model.gguf", model(kind, **options)
    before = logits(given)
    write_gguf(path, given, tokenizer(), stored)
    assert torch.equal(logits(given), before)
    with torch.no_grad():
        for parameter in given.parameters():
            if parameter.ndim == 2:
                parameter.copy_(rounded(parameter, stored))
    expected, found = logits(given), logits(loaded(path))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert (expected - before).abs().max() > 0 or stored == "f32"


def rounded(matrix: torch.Tensor, stored: str) -> torch.Tensor:
    if stored == "q8_0":  # blocks of 32 in a row, with one scale in fp16
        blocks = matrix.unflatten(-1, (-1, 32))
        scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
        return ((blocks / scale).round() * scale.half().float()).flatten(-2)
    kinds = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    return matrix.to(kinds[stored]).float()


def test_rows_of_queries_are_pairs_and_the_names_are_llama_cpps(tmp_path: Path) -> None:
    path, given = tmp_path / "model.gguf", model(tie_word_embeddings=False)
    write_gguf(path, given, tokenizer(), "f32")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == 3 + 2 * 9 and {"token_embd.weight", "output.weight"} <= set(tensors)
    weight = dict(given.named_parameters())["model.layers.1.self_attn.q_proj.weight"]
    rows = torch.from_numpy(tensors["blk.1.attn_q.weight"].data.copy())
    # Heads of 16: feature i of a head and feature i + 8 of it are neighbours.
    assert torch.equal(rows[0], weight[0]) and torch.equal(rows[1], weight[8])
    assert torch.equal(rows[16], weight[16]) and torch.equal(rows[17], weight[24])
    value = dict(given.named_parameters())["model.layers.1.self_attn.v_proj.weight"]
    assert torch.equal(torch.from_numpy(tensors["blk.1.attn_v.weight"].data.copy()), value)


def test_the_tokenizer_is_in_the_file(tmp_path: Path) -> None:
    path, given = tmp_path / "model.gguf", tokenizer()
    write_gguf(path, model(), given, "f16")
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.merges"].contents() == ["t h"]
    types = fields["tokenizer.ggml.token_type"].contents()
    # 256 bytes, a merged token, two special ones, and five rows of the embedding without a token.
    assert types == [1] * 257 + [3] * 2 + [5] * 5
    assert fields["tokenizer.ggml.eos_token_id"].contents() == given.eos_token_id
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    text = "<|im_start|>user\nthe path, 12 times<|im_end|>"
    assert again(text)["input_ids"] == given(text)["input_ids"]
    assert again.chat_template == TEMPLATE


def test_frequencies_of_llama_3_are_divided_by_their_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    path, given = tmp_path / "model.gguf", model(rope_parameters=scaling)
    write_gguf(path, given, tokenizer(), "f16")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    factors = torch.from_numpy(tensors["rope_freqs.weight"].copy())
    assert factors.shape == (8,) and factors[0] == 1
    torch.testing.assert_close(factors[-1], torch.tensor(8.0))


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ((pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)), False, "smollm"),
        (
            (
                pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ),
            True,
            "llama-bpe",
        ),
        (
            (
                pre_tokenizers.Split(Regex(_QWEN_2), "isolated"),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ),
            False,
            "qwen2",
        ),
        ((pre_tokenizers.Digits(False), pre_tokenizers.ByteLevel(False)), False, None),
        ((pre_tokenizers.ByteLevel(True),), False, None),
        ((pre_tokenizers.ByteLevel(False),), True, None),
    ],
)
def test_pre_tokenizers_are_told_apart(steps: Any, ignore_merges: bool, name: str | None) -> None:
    backend = json.loads(tokenizer(*steps, ignore_merges=ignore_merges).backend_tokenizer.to_str())
    if name is None:
        with pytest.raises(GgufError, match="splits text in a way"):
            _pre_tokenizer(backend)
    else:
        assert _pre_tokenizer(backend) == name


def test_what_cannot_be_written_is_refused_by_name(tmp_path: Path, chat_model: Path) -> None:
    path = tmp_path / "model.gguf"
    gemma = Gemma2ForCausalLM(Gemma2Config(vocab_size=264, head_dim=16, **SIZES))
    with pytest.raises(GgufError, match="Gemma2ForCausalLM; expected one of LlamaForCausalLM, Q"):
        write_gguf(path, gemma, tokenizer(), "f16")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(GgufError, match="scales positions by yarn"):
        write_gguf(path, model(rope_parameters=yarn), tokenizer(), "f16")
    with pytest.raises(GgufError, match="has attention_bias"):
        write_gguf(path, model(attention_bias=True), tokenizer(), "f16")
    with pytest.raises(GgufError, match="is WordLevel; expected a byte-level BPE"):
        write_gguf(path, model(), AutoTokenizer.from_pretrained(chat_model), "f16")
    large = model()
    with torch.no_grad():
        large.lm_head.weight[0, 0] = 1e6
    with pytest.raises(GgufError, match=r"f16 cannot hold the values of lm_head\.weight"):
        write_gguf(path, large, tokenizer(), "f16")


def test_a_file_that_loads_to_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sap_fast.integrations.gguf._neighbouring", lambda _, data, __: data)
    with pytest.raises(GgufError, match="loads to other logits"):
        write_gguf(tmp_path / "model.gguf", model(), tokenizer(), "f32")
