"""The divergence from the aligned model, against full logits in fp64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from sap_fast.losses import kl_loss
from tests.losses.helpers import (
    assert_same,
    build,
    gradients,
    make_batch,
    with_lora,
    without_labels,
)

pytestmark = pytest.mark.usefixtures("several_chunks", "no_fallback_unnoticed")


def explicit(model, aligned, batch):
    """The mean over rows of the mean over scored tokens, from all logits."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if bool((batch["attention_mask"][:, 0] == 0).any()):
        inputs["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    found = model(**inputs).logits.double().log_softmax(-1)[:, :-1]
    with torch.no_grad():
        expected = aligned(**inputs).logits.double().log_softmax(-1)[:, :-1]
    divergences = (expected.exp() * (expected - found)).sum(-1)
    mask = batch["attention_mask"]
    scored = (batch["labels"][:, 1:] != -100) & (mask[:, 1:] * mask[:, :-1]).bool()
    return ((divergences * scored).sum(1) / scored.sum(1)).mean()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "gemma2", "gpt2"])
def test_full_models_are_held_to_another_model(family, side):
    aligned, model = build(family, initializer_range=0.3), build(family, 1, initializer_range=0.3)
    batch = make_batch(side=side)
    loss, expected = kl_loss(model, batch, aligned=aligned), explicit(model, aligned, batch)
    assert expected > 0.01
    assert_same(loss, expected.float(), rtol=1e-5)
    assert_same(gradients(loss, model), gradients(expected, model), rtol=1e-4)


@pytest.mark.parametrize("target_modules", [["q_proj"], ["q_proj", "lm_head"]])
def test_an_adapter_is_held_to_the_model_without_it(target_modules):
    aligned = build(initializer_range=0.3)
    model = get_peft_model(
        copy.deepcopy(aligned),
        LoraConfig(r=4, target_modules=target_modules, init_lora_weights=False, lora_dropout=0.5),
    ).eval()
    batch = make_batch()
    assert_same(kl_loss(model, batch), explicit(model, aligned, batch).float(), rtol=1e-5)
    expected = gradients(explicit(model, aligned, batch), model)
    assert_same(gradients(kl_loss(model, batch), model), expected, rtol=1e-4)


def test_a_model_that_has_not_moved_has_no_loss_and_no_gradient():
    model = get_peft_model(build(), LoraConfig(r=4, target_modules=["q_proj"]))
    loss = kl_loss(model, make_batch())
    assert abs(loss.item()) < 1e-6
    assert all(g.abs().max() < 1e-6 for g in gradients(loss, model))


def test_modes_and_what_learns_are_as_before():
    model = with_lora(build()).train()
    names = iter(dict(model.named_parameters()))
    frozen = next(name for name in names if "lora_A" in name)
    model.get_parameter(frozen).requires_grad_(False)
    model.base_model.model.model.layers[1].eval()
    before = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    kl_loss(model, make_batch()).backward()
    after = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    assert after == before
    assert model.get_parameter(frozen).grad is None


def test_the_aligned_model_runs_without_dropout():
    model = get_peft_model(
        build(attention_dropout=0.5), LoraConfig(r=4, target_modules=["q_proj"])
    ).eval()
    expected = kl_loss(model, make_batch())
    model.train()
    # Of the two the tuned model alone draws masks; alike they would hide each other.
    assert kl_loss(model, make_batch()) > expected + 1e-4


@pytest.mark.parametrize(
    ("message", "model", "others"),
    [
        ("no PEFT adapter", lambda: build(), {}),
        (
            "virtual tokens",
            lambda: get_peft_model(
                build(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
            ),
            {},
        ),
        ("of 104 tokens and model one of 96", lambda: build(), {"aligned": {"vocab_size": 104}}),
    ],
    ids=["no adapter", "virtual tokens", "other vocabulary"],
)
def test_what_has_no_aligned_model_is_refused(message, model, others):
    others = {name: build(**settings) for name, settings in others.items()}
    with pytest.raises(ValueError, match=message):
        kl_loss(model(), make_batch(), **others)


def test_a_row_without_a_scored_token_is_refused():
    batch = make_batch()
    with pytest.raises(ValueError, match=r"chosen has no scored token in rows \[0, 1, 2\]"):
        kl_loss(with_lora(build()), without_labels(batch, [0, 1, 2]))


def test_the_divergence_is_that_of_kl_div():
    model, aligned = build(seed=1), build()
    batch = make_batch((9,), (3,))
    logits = [
        m(input_ids=batch["input_ids"]).logits[0, 2:8].log_softmax(-1) for m in (model, aligned)
    ]
    expected = F.kl_div(*logits, reduction="batchmean", log_target=True)
    assert_same(kl_loss(model, batch, aligned=aligned), expected, rtol=1e-5)
