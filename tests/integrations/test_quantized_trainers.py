"""Both trainers on quantized weights, and what a checkpoint of them holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torchao")

from torchao.quantization import quantize_
from transformers import Trainer

from sap_fast import SAPTrainer
from tests.integrations.test_stacks import SAPSFTTrainer, build
from tests.quantized import BASES, quantized, with_fp32_lora
from tests.tiny import assert_same_bits, distance, tiny_llama
from tests.trainers import PROBE


def on(base: str) -> nn.Module:
    if base == "torchao int4":
        # As the Trainer refuses what `from_pretrained` loads in torchao's int4.
        model = tiny_llama(layers=2).requires_grad_(False)
        quantize_(model.model.layers, BASES[base].quant_type)
        return with_fp32_lora(model)
    return with_fp32_lora(quantized(base, layers=2))


def adapters(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


METHODS: dict[str, dict[str, Any]] = {
    "sap": {"probe": PROBE | {"layers": [1]}},
    "blend": {"method": "blend", "sap_options": {"safety_level": None}},
}


@pytest.mark.parametrize(
    ("kind", "base", "method"),
    [
        (SAPTrainer, "nf4", "sap"),
        (SAPTrainer, "torchao int4", "sap"),
        pytest.param(SAPTrainer, "int8", "sap", marks=pytest.mark.slow),
        pytest.param(SAPTrainer, "torchao int8", "sap", marks=pytest.mark.slow),
        pytest.param(SAPTrainer, "nf4", "blend", marks=pytest.mark.slow),
        pytest.param(SAPSFTTrainer, "nf4", "sap", marks=pytest.mark.slow),
        (SAPSFTTrainer, "int8", "blend"),
        (SAPSFTTrainer, "torchao int8", "sap"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_resumed_run_on_quantized_weights_ends_with_the_same_bits(
    tmp_path: Path, kind: type[Trainer], base: str, method: str
) -> None:
    settings = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    straight = build(kind, tmp_path / "a", on(base), how=METHODS[method], **settings)
    straight.train()
    logs = [row for row in straight.state.log_history if "loss" in row]
    assert [row["sap/skipped_steps"] for row in logs] == [0, 0]
    if method == "sap":
        assert all(row["sap/estimate_norms/1"] > 0 for row in logs)
    assert straight.sap_optimizer.passes.direction.taken == 2
    found = adapters(straight.model)
    assert all(tensor.isfinite().all() for tensor in found)
    assert any(not torch.equal(a, b) for a, b in zip(found, adapters(on(base)), strict=True))

    resumed = build(kind, tmp_path / "b", on(base), how=METHODS[method], **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    again = adapters(resumed.model)
    if kind is SAPSFTTrainer and base in ("nf4", "int8"):
        # TRL turns these adapters to bf16, and PEFT loads them in fp32.
        assert {tensor.dtype for tensor in found} == {torch.bfloat16}
        assert distance([tensor.float() for tensor in found], again) < 1e-2
    else:
        assert_same_bits(found, again)


def test_the_trainer_of_transformers_refuses_int4_that_it_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not support training"):
        build(SAPTrainer, tmp_path, with_fp32_lora(quantized("torchao int4", layers=2)))
