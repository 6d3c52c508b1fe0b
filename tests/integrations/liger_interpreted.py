"""Liger's kernels in Triton's interpreter on the CPU, in the models that it patches.

Triton reads TRITON_INTERPRET when a kernel is defined, so this has a process of its own:
`test_liger.py` starts it, and pytest does not collect this file by itself.
"""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from liger_kernel.ops import rms_norm
from liger_kernel.transformers import apply_liger_kernel_to_llama
from liger_kernel.transformers.model import llama as liger_llama
from torch import Tensor
from transformers.models.llama import modeling_llama
from triton.runtime import interpreter

from sap_fast import (
    BlendedAdamW,
    FusedSAP,
    ProbeSet,
    SAPTrainer,
    contrastive_loss,
    joint_loss,
    task_loss,
)
from sap_fast.losses import packable, packing
from tests.tiny import distance, random_batch, tiny_llama, weights, with_lora
from tests.trainers import arguments, sap_trainer

# Small: the interpreter takes a program for every token and kernel.
BATCH = random_batch(rows=2, length=8)
PAIRS = random_batch(rows=2, length=8, seed=1), random_batch(rows=2, length=8, seed=2)


@pytest.fixture(autouse=True)
def as_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give interpreted kernels what compiled ones have: floats with a dtype, CUDA's rsqrt."""
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
    as_before = interpreter._implicit_cvt

    def convert(argument: Any) -> Any:
        if isinstance(argument, float):
            handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
            return tl.tensor(handle, tl.float32)
        return as_before(argument)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert)


@pytest.fixture(autouse=True)
def only_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put transformers' functions back, which Liger replaces for the whole process."""
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))


@pytest.fixture
def unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what a model's first use tests of packing, most of the time here otherwise."""
    monkeypatch.setattr(packable, "usable", lambda *_: False)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls of Liger's fused loss."""
    calls: Counter[str] = Counter()
    loss = liger_llama.LigerForCausalLMLoss

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls["fused loss"] += 1
        return loss(*args, **kwargs)

    monkeypatch.setattr(liger_llama, "LigerForCausalLMLoss", counted)
    return calls


def two(lora: bool = False) -> tuple[Any, Any]:
    """The same model as it is, and with Liger's RMSNorm, SwiGLU, RoPE and loss."""
    plain = tiny_llama(layers=2, attention="sdpa")
    patched = copy.deepcopy(plain)
    apply_liger_kernel_to_llama(model=patched)
    if not lora:
        return plain, patched
    adapted = []
    for model in (plain, patched):
        torch.manual_seed(0)  # for A
        adapted.append(with_lora(model))
    return adapted[0], adapted[1]


def test_losses_and_gradients_are_those_of_the_model_without_liger(
    monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    packed: list[Any] = []
    pack = packing.pack

    def spy(*given: Any) -> Any:
        packed.append(pack(*given))
        return packed[-1]

    monkeypatch.setattr(packing, "pack", spy)
    plain, patched = two()
    found = []
    for model in (patched, plain):
        loss = task_loss(model, BATCH) + contrastive_loss(model, *PAIRS)
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, expected in zip(*found, strict=True):
        assert distance([ours], [expected]) <= 1e-5
    assert packed and packed[0] is not None
    # One is chosen, and told: nothing else is.
    (told,) = {str(w.message) for w in recwarn if "LlamaForCausalLM: " in str(w.message)}
    assert "Liger's fused linear cross entropy is in its forward" in told


@pytest.mark.usefixtures("unpacked")
def test_without_liger_in_the_forward_nothing_is_told(recwarn: pytest.WarningsRecorder) -> None:
    model = tiny_llama(layers=2)
    apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=False)
    task_loss(model, BATCH)
    assert not [w for w in recwarn if "Liger" in str(w.message)]


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize("method", ["sap", "blend"])
def test_steps_are_those_of_the_model_without_liger(fused: Counter[str], method: str) -> None:
    found = []
    for model in two(lora=True):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        # ε as large as the gradients: AdamW sees their size, and rounding has no sign to turn.
        settings: dict[str, Any] = {"lr": 5e-3, "eps": 1e-2}
        safety_loss: Any = joint_loss
        optimizer = BlendedAdamW(trained, **settings)
        if method == "sap":
            safety_loss = contrastive_loss
            optimizer = FusedSAP(trained, ProbeSet(model, [0], rho=1e-2, size=0.1), **settings)

        def task(model: Any = model) -> Tensor:
            loss = task_loss(model, BATCH)
            loss.backward()
            return loss

        def safety(model: Any = model, safety_loss: Any = safety_loss) -> Tensor:
            loss = safety_loss(model, *PAIRS)
            loss.backward()
            return loss

        optimizer.step(task, safety)
        found.append(weights(model))
    plain, patched = found
    assert distance(patched, plain) <= 1e-5
    # To be compared with ours, at the first use; no pass runs it.
    assert fused["fused loss"] == 1


@pytest.mark.usefixtures("unpacked")
def test_the_trainer_takes_use_liger_kernel(tmp_path: Path, fused: Counter[str]) -> None:
    found = []
    for liger in (False, True):
        settings = {"max_steps": 1, "per_device_train_batch_size": 2, "adam_epsilon": 1e-2}
        args = arguments(tmp_path, use_liger_kernel=liger, **settings)
        tuned = with_lora(tiny_llama(layers=2))
        trainer = sap_trainer(SAPTrainer, tuned, args, safety_batch_size=2)
        trainer.train()
        found.append(weights(trainer.model))
    assert distance(*found) <= 1e-5
    assert fused["fused loss"] == 1
