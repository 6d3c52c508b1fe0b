"""LoRA on quantized weights: what a step finds on them is what it finds on plain ones."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet, contrastive_loss, joint_loss, task_loss
from sap_fast.losses import head, packable
from sap_fast.model import checkpointing
from sap_fast.step.trained import Trained
from tests.oracle import naive_task_loss
from tests.quantized import BASES, on_base, quantized
from tests.tiny import (
    HIDDEN,
    Problem,
    assert_same_bits,
    plain_adamw,
    random_batch,
    repeated,
    weights,
)

transformers_logging.disable_progress_bar()

#: One of each package; the other two store in another width.
QUICK = ("nf4", "torchao int8")


def steps(case: Problem, optimizer: Any, *, number: int = 1, bf16: bool = False) -> list[float]:
    """Steps with the losses of the package; returns task and safety loss of the last one."""
    safety_loss = contrastive_loss if isinstance(optimizer, FusedSAP) else joint_loss

    def task(part: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = task_loss(case.model, part)
        loss.backward()
        return loss

    def safety() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = safety_loss(case.model, case.chosen, case.rejected)
        loss.backward()
        return loss

    for _ in range(number):
        optimizer.zero_grad()
        optimizer.step(task, safety, case.batch)
    metrics = optimizer.metrics
    assert metrics.skipped_steps == 0
    return [metrics.task_loss, metrics.safety_loss]


@pytest.mark.parametrize(
    ("base", "bf16", "least", "rounding"),
    [
        *((base, False, 0.9999, 1e-6) for base in BASES),
        ("nf4", True, 0.99, 4e-3),  # of bf16: 2^-8
        ("torchao int8", True, 0.99, 4e-3),
    ],
)
def test_h_and_losses_are_those_of_the_dequantized_weights(
    base: str, bf16: bool, least: float, rounding: float
) -> None:
    found = []
    for plain in (False, True):
        case = on_base(base, plain=plain)
        probes = ProbeSet(case.model, [1, 2], rho=0.1 if bf16 else "auto")
        losses = steps(case, FusedSAP(case.model.parameters(), probes), bf16=bf16)
        assert probes.compute_dtype == (torch.bfloat16 if bf16 else None)
        found.append((probes.estimates, losses))
    (ours, losses), (expected, plain_losses) = found
    assert losses == pytest.approx(plain_losses, rel=rounding)
    for layer, h in expected.items():
        assert h.norm() > 0
        assert torch.cosine_similarity(ours[layer], h, dim=0) >= least


@pytest.mark.parametrize("base", repeated(BASES, QUICK))
@pytest.mark.parametrize("method", ["sap", "blend"])
def test_adapters_move_and_the_weights_below_keep_their_bits(base: str, method: str) -> None:
    case = on_base(base)
    before = weights(case)
    if method == "sap":
        probes = ProbeSet(case.model, [1, 2], rho=1e-2, rows=0.5)
        optimizer: BlendedAdamW = FusedSAP(case.model.parameters(), probes, lr=1e-2)
    else:
        optimizer = BlendedAdamW(case.model.parameters(), lr=1e-2, safety_level=None)
    steps(case, optimizer, number=2)
    for parameter, was in zip(case.model.parameters(), before, strict=True):
        if parameter.requires_grad:
            assert not torch.equal(parameter, was) and parameter.isfinite().all()
        else:
            assert_same_bits(_plain(parameter), _plain(was))


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that a wrapper holds, or a plain one."""
    if type(tensor).__module__.startswith("torchao"):
        return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [tensor.data]


@pytest.mark.parametrize("base", repeated(BASES, QUICK))
def test_without_a_probe_or_blending_it_is_adamw_bit_for_bit(base: str) -> None:
    found = []
    for size in (0.0, None):
        case = on_base(base)
        if size is None:
            optimizer: Any = plain_adamw(case.trained, lr=1e-2)
            for _ in range(2):
                optimizer.zero_grad()
                task_loss(case.model, case.batch).backward()
                optimizer.step()
        else:
            probes = ProbeSet(case.model, [1], rho=1e-2, size=size)
            steps(case, FusedSAP(case.trained, probes, lr=1e-2), number=2)
        found.append([parameter.detach() for parameter in case.trained])
    assert_same_bits(*found)


@pytest.mark.parametrize("base", repeated(BASES, QUICK))
def test_checkpointing_changes_no_bit_and_measures_what_plain_weights_store(
    base: str,
) -> None:
    found, stored = [], []
    for mode, plain in (("none", False), ("layers", False), ("auto", False), ("auto", True)):
        case = on_base(base, plain=plain)
        probes = ProbeSet(case.model, [1], rho=1e-2, checkpointing=mode)
        if mode == "auto":
            probes._checkpointing.budget = 0  # nothing fits, so every layer but one runs again
        steps(case, FusedSAP(case.trained, probes, lr=1e-2))
        if mode == "auto":
            stored.append(list(probes._checkpointing._measured.values()))
        if not plain:
            found.append([p.detach() for p in case.trained] + list(probes.estimates.values()))
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])
    ours, expected = stored
    assert len(ours) == len(expected) == 2  # with trained adapters and with frozen ones
    for mine, other in zip(ours, expected, strict=True):
        assert (mine.per_token, mine.length) == (other.per_token, other.length)
        # torchao keeps a dequantized copy of each weight, bitsandbytes none.
        assert (mine.constant > 4 * HIDDEN**2) == base.startswith("torchao")
        assert other.constant == 0


def test_elements_of_a_wrapper_lie_in_the_tensors_that_it_holds() -> None:
    model = quantized("torchao int8", layers=1)
    weight = model.model.layers[0].self_attn.q_proj.weight
    sizes = sorted(storage.nbytes() for storage in checkpointing._storages(weight))
    assert sizes == sorted(tensor.untyped_storage().nbytes() for tensor in _plain(weight))
    assert sizes[-1] == weight.numel()  # a byte for each


@pytest.mark.parametrize("base", repeated(BASES, QUICK))
@pytest.mark.parametrize("bf16", [False, True])
def test_a_quantized_head_is_applied_in_chunks(
    base: str, bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(base, layers=2, head=True)
    rows = random_batch(seed=4)
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 5 * 128 * 4)
    with warnings.catch_warnings(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        warnings.simplefilter("error")  # "losses are computed from its own logits"
        ours = task_loss(model, rows)
        with torch.no_grad():
            expected = naive_task_loss(model, rows)
    torch.testing.assert_close(ours.detach(), expected, rtol=1e-3 if bf16 else 1e-5, atol=0)


@pytest.mark.parametrize("base", repeated(BASES, QUICK))
def test_batches_are_packed(base: str) -> None:
    case = on_base(base)
    causal_lm = case.model.get_base_model()
    assert packable.usable(case.model, causal_lm, case.batch)
    packed = contrastive_loss(case.model, case.chosen, case.rejected)
    plain = contrastive_loss(case.model, case.chosen, case.rejected, pack=False)
    torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5)


def test_quantized_weights_that_are_to_be_trained_are_refused_by_name() -> None:
    model = quantized("torchao int8", layers=1)
    Trained(model.parameters(), None)  # frozen, as they are loaded
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.data, requires_grad=True)
    with pytest.raises(ValueError, match=r"up_proj.weight .* is a Int8Tensor that requires grad"):
        FusedSAP(model.parameters(), ProbeSet(model))
