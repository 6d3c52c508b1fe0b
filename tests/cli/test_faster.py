"""`--compile` and `--liger` of `sap-fast finetune`."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from sap_fast.cli import faster
from sap_fast.cli.finetune import load_trained_model
from sap_fast.cli.settings import FinetuneSettings
from tests.cli.terminal import Terminal
from tests.ranks import distance


def adapter(folder: Path) -> list[torch.Tensor]:
    saved = load_file(folder / "adapter_model.safetensors")
    return [saved[name] for name in sorted(saved)]


@pytest.mark.parametrize(
    ("optimizer", "backend", "steps"),
    [
        ("adamw", "eager", 1),
        pytest.param("sap", "aot_eager", 2, marks=pytest.mark.slow),
        pytest.param("blend", "inductor", 1, marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_train_as_those_that_are_not(
    terminal: Terminal, tmp_path: Path, optimizer: str, backend: str, steps: int
) -> None:
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    torch.compiler.reset()
    graphs: list[Any] = []
    compile_ = torch.nn.Module.compile

    def counted(self: Any, *args: Any, **given: Any) -> None:
        graphs.append(given)
        compile_(self, *args, **given)

    terminal.monkeypatch.setattr(torch.nn.Module, "compile", counted)
    # Without dropout, for which compiled code draws other masks.
    more = ["--optimizer", optimizer, "--max-steps", str(steps), "--lora-dropout", "0"]
    assert terminal.run(*terminal.finetuning(plain, *more)) == 0
    assert not graphs
    run = terminal.finetuning(compiled, *more, "--compile", backend)
    assert terminal.run(*run) == 0, terminal.shown
    assert graphs == [{"backend": backend}] * 3  # one for each layer
    assert distance(adapter(compiled), adapter(plain)) < 1e-3
    assert any(t.abs().sum() > 0 for t in adapter(compiled))
    AutoPeftModelForCausalLM.from_pretrained(compiled)  # no trace of it in the names
    torch.compiler.reset()


def test_a_compiler_that_does_not_work_is_one_line(terminal: Terminal, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No C++ compiler found\nand more")

    run = terminal.finetuning(tmp_path / "tuned", "--compile", "inductor")
    with terminal.monkeypatch.context() as patched:
        patched.setattr(torch, "compile", broken)
        line = terminal.refusal(*run)
    assert line.endswith("--compile inductor: does not work on this machine: No C++ compiler found")
    line = terminal.refusal(*terminal.finetuning(tmp_path / "tuned", "--compile", "gcc"))
    assert "--compile gcc: expected inductor or aot_eager or eager" in line
    more = ["--compile", "eager", "--checkpointing", "layers"]
    line = terminal.refusal(*terminal.finetuning(tmp_path / "tuned", *more))
    assert "--checkpointing layers: with --optimizer sap it changes pass by pass" in line


def liger(monkeypatch: pytest.MonkeyPatch, *model_types: str) -> list[dict[str, Any]]:
    """Stands in for liger-kernel, with kernels for these models; returns its calls."""
    calls: list[dict[str, Any]] = []
    for name in ("liger_kernel", "liger_kernel.transformers"):
        module: Any = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        monkeypatch.setitem(sys.modules, name, module)
    module._apply_liger_kernel_to_instance = lambda **given: calls.append(given)
    patches: Any = ModuleType("liger_kernel.transformers.monkey_patch")
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = dict.fromkeys(model_types)
    monkeypatch.setitem(sys.modules, patches.__name__, patches)
    return calls


def test_liger_has_the_plain_model_and_no_loss_of_its_own(
    terminal: Terminal, tmp_path: Path
) -> None:
    calls = liger(terminal.monkeypatch, "llama")
    gpu = torch.device("cuda")
    terminal.monkeypatch.setattr(faster, "default_device", lambda: gpu)
    made = FinetuneSettings(model=str(terminal.chat_model), liger=True)
    tuned: Any
    tuned, tokenizer = load_trained_model(made)
    tuned.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again: Any = load_trained_model(FinetuneSettings(model=str(tmp_path / "adapter"), liger=True))[
        0
    ]
    assert [call.pop("model") for call in calls] == [
        tuned.get_base_model(),
        again.get_base_model(),
    ]
    assert calls == [{"fused_linear_cross_entropy": False, "cross_entropy": False}] * 2


def test_liger_that_cannot_be_is_one_line(terminal: Terminal, tmp_path: Path) -> None:
    run = terminal.finetuning(tmp_path / "tuned", "--liger")
    with terminal.monkeypatch.context() as patched:
        patched.setattr(faster, "find_spec", lambda name: None)
        line = terminal.refusal(*run)
        assert line == "Error: --liger: needs liger-kernel: pip install liger-kernel"
    calls = liger(terminal.monkeypatch, "gemma", "mistral")
    terminal.monkeypatch.setattr(faster, "default_device", lambda: torch.device("cpu"))
    assert "its kernels run on GPUs, and this device is cpu" in terminal.refusal(*run)
    terminal.monkeypatch.setattr(faster, "default_device", lambda: torch.device("cuda"))
    line = terminal.refusal(*run)
    assert "no kernels for models of type llama; it has for gemma, mistral" in line
    assert not calls
