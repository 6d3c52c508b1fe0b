"""s_j of models with virtual tokens, and h of them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from peft import (
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor

from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss
from sap_fast.model.scales import TokenScales, token_mask
from tests.oracle import cosine, oracle_estimate
from tests.tiny import HIDDEN, random_batch, tiny_llama

VIRTUAL: dict[str, Any] = {
    "prompt tuning": (PromptTuningConfig, {}),
    "p-tuning": (PromptEncoderConfig, {"encoder_hidden_size": 8}),
    "prefix tuning": (PrefixTuningConfig, {}),
    "multitask prompt tuning": (MultitaskPromptTuningConfig, {"num_tasks": 2}),
}
VIRTUAL_TOKENS = 9  # more than the median leaves alone


def with_virtual_tokens(name: str, dtype: torch.dtype = torch.float32) -> PeftModel:
    kind, settings = VIRTUAL[name]
    torch.manual_seed(0)
    model = get_peft_model(
        tiny_llama(layers=3),
        kind(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS, **settings),
    ).to(dtype)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0, 3.0)
    return model.train()


def batch_for(name: str, seed: int = 0) -> dict[str, Tensor]:
    batch = random_batch(seed=seed)
    if name == "multitask prompt tuning":
        batch["task_ids"] = torch.tensor([0, 1, 1])
    return batch


def scale(
    model: PeftModel, batch: dict[str, Tensor], layer: int, everything: bool = False
) -> Tensor:
    """The median of each row's own tokens, or of everything in it, row by row, averaged."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    hidden = model(**inputs, output_hidden_states=True).hidden_states[layer + 1]
    rms = hidden.square().mean(-1).sqrt()
    if everything:
        return rms.median(-1).values.mean()
    rms = rms[:, -batch["input_ids"].shape[1] :]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    medians = [row[keep].median() for row, keep in zip(rms, mask, strict=True)]
    return torch.stack(medians).mean()


def measure(model: PeftModel, probes: ProbeSet, batch: dict[str, Tensor]) -> None:
    probes.begin_estimate()
    probes.rewind()
    with probes.active(sign=1.0):
        task_loss(model, batch).backward()


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_and_padding_are_left_out(name: str, masked: bool) -> None:
    model, batch = with_virtual_tokens(name), batch_for(name)
    if not masked:
        del batch["attention_mask"]
    probes = ProbeSet(model, [0, 1])
    measure(model, probes, batch)
    for layer in (0, 1):
        expected = scale(model, batch, layer)
        torch.testing.assert_close(probes.scales[layer], expected, rtol=1e-5, atol=0)
        if masked or name != "prefix tuning":  # what is left out would be seen
            assert abs(scale(model, batch, layer, everything=True) / expected - 1) > 1e-3


@pytest.mark.parametrize("name", VIRTUAL)
def test_a_disabled_adapter_has_no_tokens_to_leave_out(name: str) -> None:
    model, batch = with_virtual_tokens(name), batch_for(name)
    batch.pop("task_ids", None)
    probes = ProbeSet(model, [1])
    with model.disable_adapter():
        for parameter in model.base_model.parameters():
            parameter.requires_grad_()
        measure(model, probes, batch)
        expected = scale(model, batch, 1)
    torch.testing.assert_close(probes.scales[1], expected, rtol=1e-5, atol=0)


def test_masks_that_say_nothing_of_tokens_are_none() -> None:
    plain, prompted = tiny_llama(), with_virtual_tokens("prompt tuning")
    mask = torch.ones(2, 4)
    assert token_mask(plain, {"attention_mask": mask}) is mask
    for other in (None, torch.ones(2, 1, 4, 4), {"full_attention": mask}):
        assert token_mask(plain, {"attention_mask": other}) is None
        assert token_mask(prompted, {"attention_mask": other}) is None


@pytest.mark.parametrize("name", VIRTUAL)
def test_h_of_trained_virtual_tokens_is_the_oracles(name: str) -> None:
    model = with_virtual_tokens(name, torch.float64)
    batch, chosen, rejected = (batch_for(name, seed) for seed in range(3))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    probes = ProbeSet(model, [0, 1], rho=1e-4)
    optimizer = FusedSAP(trained, probes, lr=0.0)

    def task(part: Any = None) -> Tensor:
        return task_loss(model, batch, pack=False)

    def safety() -> Tensor:
        return contrastive_loss(model, chosen, rejected, pack=False)

    def backward(loss: Tensor) -> Tensor:
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimizer.inner_passes(lambda part: backward(task()), lambda: backward(safety()))
    expected = oracle_estimate(task, safety, trained, probes.modules, (HIDDEN,))
    assert cosine(probes.estimates, expected) > 0.9999
    for layer, estimate in probes.estimates.items():
        torch.testing.assert_close(estimate.norm(), expected[layer].norm(), rtol=1e-2, atol=0)


def test_the_median_of_a_row_has_the_bits_of_torch() -> None:
    """Whose own has no deterministic kernel on CUDA."""
    scales = TokenScales()
    hidden = torch.randn(5, 9, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([9, 8, 1, 0, 4])[:, None]
    scales.measure(0, hidden, mask, None)
    rms = torch.linalg.vector_norm(hidden, dim=-1) / 2
    medians = rms.masked_fill(~mask, torch.nan).nanmedian(dim=-1).values
    assert medians.isnan().tolist() == [False, False, False, True, False]
    assert torch.equal(scales.values()[0], medians.nansum() / 4)
