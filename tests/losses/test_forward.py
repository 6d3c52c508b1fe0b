"""Virtual tokens: losses of models that put some before every row."""

import pytest
import torch
from peft import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from sap_fast.losses import IGNORE_INDEX, contrastive_loss, response_log_probs, task_loss
from tests.losses.helpers import (
    BATCHES,
    assert_same,
    batch_of,
    build,
    build_odd,
    gradients,
    make_batch,
    without_labels,
)
from tests.versions import older

VIRTUAL = {
    "prompt tuning": PromptTuningConfig,
    "p-tuning": PromptEncoderConfig,
    "prefix tuning": PrefixTuningConfig,
    "multitask prompt tuning": MultitaskPromptTuningConfig,
}


def with_virtual_tokens(name, model=None):
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    if name == "p-tuning":
        settings["encoder_hidden_size"] = 8
    if name == "multitask prompt tuning":
        settings["num_tasks"] = 2
    torch.manual_seed(0)
    model = get_peft_model(model or build(), VIRTUAL[name](**settings))
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0, 0.5)
    return model.train()


def make(name, *arguments, **settings):
    batch = make_batch(*arguments, **settings)
    if name == "multitask prompt tuning":
        batch["task_ids"] = torch.tensor([0, 1, 1])
    return batch


def own_log_probs(model, batch):
    """Of each row, from the model's own logits, right-aligned with the tokens."""
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits.log_softmax(-1)
    length = batch["input_ids"].shape[1]
    logits = logits[:, -length:]
    labels = batch["labels"]
    found = logits[:, :-1].gather(2, labels[:, 1:, None].clamp(min=0))[:, :, 0]
    scored = (labels[:, 1:] != IGNORE_INDEX) & (batch["attention_mask"][:, :-1] != 0)
    return (found * scored).sum(1)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("name", VIRTUAL)
def test_the_task_loss_is_the_models_own(name, mask, recwarn):
    model, batch = with_virtual_tokens(name), make(name)
    if not mask:
        batch = make(name, (9, 9, 9))
        del batch["attention_mask"]
    own = model(**batch).loss
    for ours in (task_loss(model, batch), task_loss(model, batch)):
        assert_same(ours, own, rtol=2e-6)
        assert_same(gradients(ours, model), gradients(own, model))
    items = task_loss(model, batch, num_items=40)
    assert_same(items, model(**batch, num_items_in_batch=40).loss, rtol=2e-6)
    nothing = task_loss(model, without_labels(batch, [0, 1, 2]), num_items=40)
    assert nothing == 0
    assert all(not gradient.any() for gradient in gradients(nothing, model))
    assert [w for w in recwarn if w.category is UserWarning] == []


@pytest.mark.parametrize("name", VIRTUAL)
def test_the_first_token_is_scored_where_a_virtual_one_predicts_it(name):
    model, batch = with_virtual_tokens(name), make(name, prompts=(0, 3, 0))
    assert batch["labels"][0, 0] != IGNORE_INDEX
    ours, own = task_loss(model, batch), model(**batch).loss
    assert_same(ours, own, rtol=2e-6)
    assert_same(gradients(ours, model), gradients(own, model))
    in_sequence = name != "prefix tuning"
    counts = torch.tensor([11 + in_sequence, 6, 6 + in_sequence])
    log_probs = response_log_probs(model, batch)
    assert_same(-log_probs.sum() / counts.sum(), own, rtol=2e-6)
    other = {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}
    margins = log_probs / counts - response_log_probs(model, other, reduction="mean")
    assert_same(contrastive_loss(model, batch, other), -margins.sigmoid().log().mean(), rtol=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", VIRTUAL)
def test_the_safety_losses_are_of_the_models_own_logits(name, side, recwarn):
    model = with_virtual_tokens(name)
    pair = make(name, side=side), make(name, (6, 15, 8), (4, 3, 5), side=side, seed=1)
    expected = [own_log_probs(model, batch) for batch in pair]
    # Counts positions without the padding; before PEFT 0.19 with it, whatever the positions given.
    if side == "left" and name == "prefix tuning" and not older("peft", "0.19"):
        expected = [response_log_probs(model, make(name)), None]
    assert_same(response_log_probs(model, pair[0]), expected[0], rtol=2e-6)
    if expected[1] is not None:
        lengths = [(batch["labels"] != IGNORE_INDEX).sum(1) for batch in pair]
        margins = expected[0] / lengths[0] - expected[1] / lengths[1]
        assert_same(contrastive_loss(model, *pair), -margins.sigmoid().log().mean(), rtol=1e-5)
    assert [w for w in recwarn if w.category is UserWarning] == []


@pytest.mark.parametrize("name", VIRTUAL)
def test_a_disabled_adapter_has_no_virtual_tokens(name):
    model, batch = with_virtual_tokens(name), make(name, prompts=(0, 3, 0))
    batch.pop("task_ids", None)
    with model.disable_adapter():
        ours = task_loss(model, batch, pack=False)
    assert_same(ours, build()(**batch).loss, rtol=2e-6)


@pytest.mark.parametrize("name", VIRTUAL)
def test_the_models_own_logits_are_aligned_as_well(name):
    model, batch = with_virtual_tokens(name), make(name, prompts=(0, 3, 0))
    own = model(**batch).loss
    model.base_model.get_output_embeddings = lambda: None
    with pytest.warns(UserWarning, match="gives no head"):
        ours = task_loss(model, batch)
    assert_same(ours, own, rtol=2e-6)


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_are_not_packed(name, forwards):
    model, batch = with_virtual_tokens(name), batch_of(BATCHES["shared prefix"])
    if name == "multitask prompt tuning":
        batch["task_ids"] = torch.tensor([0, 1, 1, 0, 1])
    assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)
    assert forwards == []


def test_hidden_states_of_another_length_are_not_taken_for_virtual_tokens():
    model = build_odd(None)
    original = model.model.forward

    def longer(input_ids, attention_mask, position_ids=None):
        return original(torch.cat([input_ids[:, :2], input_ids], dim=1))

    model.model.forward = longer
    with (
        pytest.warns(UserWarning, match="does not take"),
        pytest.raises(ValueError, match=r"logits of shape \(3, 14, 96\) for input_ids .* \(3, 12"),
    ):
        task_loss(model, make_batch(), pack=False)
