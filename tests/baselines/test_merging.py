"""Merging with the aligned model is linear in the weights."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model_state_dict

from sap_fast.baselines import merge_with_aligned
from tests.tiny import weights
from tests.trainers import model


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_merging_full_parameters_is_linear(share: float, dtype: torch.dtype, rtol: float) -> None:
    aligned, tuned = model(lora=False).to(dtype), model(lora=False).to(dtype)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    expected = [
        (1 - share) * w.double() + share * a.double()
        for w, a in zip(weights(tuned), weights(aligned), strict=True)
    ]
    merge_with_aligned(tuned, aligned.state_dict(), share)
    for actual, wanted in zip(tuned.parameters(), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=rtol, atol=0.1 * rtol)


def test_merging_lora_is_merging_the_weights_it_stands_for() -> None:
    tuned = model()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    layer = next(m for m in tuned.modules() if hasattr(m, "get_delta_weight") and m.lora_A)
    before, first = layer.get_delta_weight("default"), layer.lora_A["default"].weight.clone()
    merge_with_aligned(tuned, None, 0.25)
    torch.testing.assert_close(layer.get_delta_weight("default"), 0.75 * before)
    assert torch.equal(layer.lora_A["default"].weight, first)
    merge_with_aligned(tuned, None, 1.0)
    state = get_peft_model_state_dict(tuned)
    assert all(not value.any() for name, value in state.items() if "lora_B" in name)


def test_merging_with_other_weights_is_an_error() -> None:
    tuned = model(lora=False)
    aligned = tuned.state_dict()
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="aligned_share"):
            merge_with_aligned(tuned, aligned, share)
    with pytest.raises(ValueError, match="aligned is missing"):
        merge_with_aligned(tuned, None, 0.5)
    with pytest.raises(ValueError, match="LoRA"):
        merge_with_aligned(model(), aligned, 0.5)
    name = next(iter(dict(tuned.named_parameters())))
    with pytest.raises(ValueError, match=r"no .*0 others"):
        merge_with_aligned(tuned, {k: v for k, v in aligned.items() if k != name}, 0.5)
    with pytest.raises(ValueError, match="shape"):
        merge_with_aligned(tuned, aligned | {name: torch.zeros(1)}, 0.5)
