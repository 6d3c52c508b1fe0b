"""`sap-fast merge`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cli.terminal import Terminal
from tests.tiny import with_lora


@pytest.fixture
def adapter(terminal: Terminal, tmp_path: Path) -> Path:
    """An adapter on the chat model, away from zero."""
    folder = tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(terminal.chat_model)
    with_lora(model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(terminal.chat_model).save_pretrained(folder)
    config = folder / "adapter_config.json"
    changed = json.loads(config.read_text()) | {
        "base_model_name_or_path": str(terminal.chat_model),
        "task_type": "CAUSAL_LM",
    }
    config.write_text(json.dumps(changed))
    return folder


IDS = torch.arange(3, 20)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(("share", "dtype"), [(0.0, "fp32"), (0.25, "fp32"), (0.0, "bf16")])
def test_a_merged_adapter_is_a_plain_model(
    terminal: Terminal, tmp_path: Path, adapter: Path, share: float, dtype: str
) -> None:
    output = tmp_path / "merged"
    arguments = ["merge", "--model", str(adapter), "--output", str(output), "--dtype", dtype]
    assert terminal.run(*arguments, "--aligned-share", str(share)) == 0, terminal.shown
    merged = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert merged.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert not (output / "adapter_config.json").exists()
    assert AutoTokenizer.from_pretrained(output).chat_template
    tuned = AutoPeftModelForCausalLM.from_pretrained(adapter)
    for layer in tuned.modules():
        if hasattr(layer, "lora_B"):
            layer.scaling = {name: scale * (1 - share) for name, scale in layer.scaling.items()}
    expected = logits(tuned)
    start = logits(AutoModelForCausalLM.from_pretrained(terminal.chat_model))
    found = logits(merged.float())
    error = (found - expected).norm()
    assert error < (1e-4 if dtype == "fp32" else 0.2) * (start - expected).norm()
    assert "exists already" in terminal.refusal(*arguments)


def test_a_gguf_file_lies_beside_the_weights(
    terminal: Terminal, tmp_path: Path, adapter: Path
) -> None:
    pytest.importorskip("gguf")
    written: list[tuple[Path, str]] = []

    def write(path: Path, model: torch.nn.Module, tokenizer: object, stored: str) -> None:
        assert next(model.parameters()).dtype == torch.float32
        written.append((path, stored))
        path.write_text("GGUF")

    output = tmp_path / "merged"
    arguments = ["merge", "--model", str(adapter), "--output", str(output)]
    # The tests' model reads characters, which llama.cpp does not.
    line = terminal.refusal(*arguments, "--gguf", "q8_0")
    assert "--gguf q8_0: the tokenizer is WordLevel; expected a byte-level BPE" in line
    assert "--gguf q4: expected f32 or f16" in terminal.refusal(*arguments, "--gguf", "q4")
    terminal.monkeypatch.setattr("sap_fast.integrations.gguf.write_gguf", write)
    assert terminal.run(*arguments, "--dtype", "bf16", "--gguf", "q8_0") == 0, terminal.shown
    assert written == [(tmp_path / "merged.unfinished" / "merged-q8_0.gguf", "q8_0")]
    assert (output / "merged-q8_0.gguf").exists() and (output / "model.safetensors").exists()
    terminal.monkeypatch.setattr("sap_fast.cli.merge.find_spec", lambda _: None)
    again = [*arguments[:-1], str(tmp_path / "other"), "--gguf", "f16"]
    assert "--gguf f16: needs gguf: pip install 'sap-fast[gguf]'" in terminal.refusal(*again)


def test_a_full_model_is_merged_with_the_one_it_came_from(
    terminal: Terminal, tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    model = AutoModelForCausalLM.from_pretrained(terminal.chat_model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tuned)
    AutoTokenizer.from_pretrained(terminal.chat_model).save_pretrained(tuned)
    output = tmp_path / "merged"
    arguments = ["merge", "--model", str(tuned), "--output", str(output)]
    assert "is no adapter" in terminal.refusal(*arguments)
    arguments += ["--base", str(terminal.chat_model)]
    assert "is no adapter" in terminal.refusal(*arguments)
    assert terminal.run(*arguments, "--aligned-share", "0.5") == 0, terminal.shown
    start = AutoModelForCausalLM.from_pretrained(terminal.chat_model).state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(output).state_dict().items():
        torch.testing.assert_close(tensor, 1.25 * start[name])


def test_what_cannot_be_merged_is_one_line(
    terminal: Terminal, tmp_path: Path, adapter: Path
) -> None:
    arguments = ["merge", "--model", str(adapter), "--output", str(tmp_path / "out")]
    for more, message in (
        (["--dtype", "fp8"], "--dtype fp8: expected fp32 or bf16 or fp16"),
        (["--aligned-share", "2"], "--aligned-share 2.0: expected a number ≤ 1"),
        (["--base", "b"], "--base b:"),
    ):
        assert message in terminal.refusal(*arguments, *more)
    line = terminal.refusal("merge", "--model", "no/such/folder", "--output", str(tmp_path / "out"))
    assert "--model no/such/folder: cannot be loaded" in line
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 10**9}))
    assert "--dtype fp16: model." in terminal.refusal(*arguments, "--dtype", "fp16")


def test_what_does_not_load_back_is_removed(
    terminal: Terminal, tmp_path: Path, adapter: Path
) -> None:
    load = AutoModelForCausalLM.from_pretrained

    def other(*arguments: object, **options: object) -> torch.nn.Module:
        model = load(*arguments, **options)
        model.lm_head.weight.data[0, 0] += 1
        return model

    terminal.monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", other)
    terminal.monkeypatch.setattr("sap_fast.cli.merge.load_model", _loaded_with(load, adapter))
    line = terminal.refusal("merge", "--model", str(adapter), "--output", str(tmp_path / "out"))
    assert "lm_head.weight differs" in line


def _loaded_with(load: object, adapter: Path) -> object:
    tuned = AutoPeftModelForCausalLM.from_pretrained(adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    return lambda *_, **__: (tuned, tokenizer)
