import pytest
import torch
from torch import nn

from sap_fast import FusedSAP, ProbeSet
from sap_fast.losses import IGNORE_INDEX, contrastive_loss, response_log_probs, task_loss
from tests.losses.helpers import (
    BATCHES,
    FAMILIES,
    assert_refused,
    assert_same,
    batch_of,
    build,
    build_odd,
    gradients,
    make_batch,
    with_lora,
    without_labels,
)

pytestmark = pytest.mark.usefixtures("several_chunks", "no_fallback_unnoticed")


@pytest.mark.parametrize("family", FAMILIES)
def test_task_loss_is_the_models_own_loss(family):
    model, batch = build(family), make_batch()
    own = model(**batch).loss
    for _ in range(2):  # the first use of a model also tests its head
        ours = task_loss(model, batch)
        assert_same(ours, own, rtol=2e-6)
    assert_same(gradients(ours, model), gradients(own, model))


def test_labels_at_padding_never_count():
    model = build()
    masked, unmasked = make_batch(), make_batch(pad_labels=True)
    assert not torch.equal(masked["labels"], unmasked["labels"])
    assert torch.equal(task_loss(model, unmasked), task_loss(model, masked))


@pytest.mark.parametrize("as_type", [int, torch.tensor])
def test_micro_batches_with_num_items_add_up_to_the_whole_batch(as_type):
    model, batch = build(), make_batch()
    micro_batches = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    num_items = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    parts = [task_loss(model, micro, num_items=as_type(num_items)) for micro in micro_batches]
    assert_same(sum(parts), task_loss(model, batch), rtol=2e-6)
    own = model(**micro_batches[1], num_items_in_batch=num_items).loss
    assert_same(parts[1], own, rtol=2e-6)


NOTHING_SCORED = {
    **{family: lambda family=family: build(family) for family in ("llama", "llama-tied", "gpt2")},
    "router": lambda: build("mixtral", router_aux_loss_coef=0.5),
    "frozen head": lambda: with_lora(build()),
    "bf16": lambda: build().bfloat16(),
}


@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("as_type", [int, torch.tensor])
@pytest.mark.parametrize("name", NOTHING_SCORED)
def test_a_micro_batch_of_which_nothing_is_scored_adds_nothing(name, as_type, packs):
    model = NOTHING_SCORED[name]().train()
    batch = batch_of(BATCHES["identical"]) if packs else make_batch()
    batch = without_labels(batch, [0, 1, 2])
    loss = task_loss(model, batch, num_items=as_type(7))
    own = model(**batch).logits.sum() * 0
    if name == "router":
        own = model(**batch, num_items_in_batch=7).loss
        assert own > 0
    assert loss.item() == pytest.approx(own.item(), rel=1e-5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # All are in the graph, as DDP wants them.
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert all(gradient is not None for gradient in found)
    expected = torch.autograd.grad(own, parameters)
    assert_same(found, expected) if name == "router" else assert_zero(found)


def assert_zero(gradients):
    assert all(not gradient.any() for gradient in gradients)


def test_a_micro_batch_of_which_nothing_is_scored_of_a_model_with_an_unknown_head():
    model, batch = build_odd("scaled"), without_labels(make_batch(), [0, 1, 2])
    with pytest.warns(UserWarning, match="differ by up to 32"):
        loss = task_loss(model, batch, num_items=7)
    assert loss == 0
    assert_zero(gradients(loss, model))


def test_probe_passes_over_a_micro_batch_of_which_nothing_is_scored():
    batch, estimates = make_batch(), []
    for batches in ([batch], [without_labels(batch, [0, 1, 2]), batch]):
        model = build().train()
        probes = ProbeSet(model, [0, 1], rho=1e-3)
        optimizer = FusedSAP(model.parameters(), probes)

        def task(part, model=model):
            losses = [task_loss(model, one, num_items=16) for one in part]
            for loss in losses:
                loss.backward()
            return sum(losses)

        def safety(model=model):
            loss = contrastive_loss(model, batch, make_batch(seed=1))
            loss.backward()
            return loss

        optimizer.inner_passes(task, safety, batches)
        estimates.append(probes.estimates)
    assert_same(estimates[1], estimates[0], rtol=1e-4)


@pytest.mark.parametrize("num_items", [None, torch.tensor(0), 0])
def test_a_step_of_which_nothing_is_scored_is_an_error(num_items):
    assert_refused(
        lambda model: task_loss(
            model, without_labels(make_batch(), [0, 1, 2]), num_items=num_items
        ),
        r"num_items is 0" if num_items is not None else "no scored token in any of its 3 rows: ",
    )


@pytest.mark.parametrize("family", ["granite", "mixtral"])
def test_settings_are_found_in_a_module_without_a_configuration(family):
    class Holder(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def get_output_embeddings(self):
            return self.inner.lm_head

        def forward(self, **inputs):
            return self.inner(**inputs)

    model, batch = build(family), make_batch()
    # The logits are post-processed, or a warning would be an error; the router loss is part of it.
    assert_same(task_loss(Holder(model), batch), model(**batch).loss, rtol=2e-6)


def test_bf16_model_has_fp32_losses():
    model, batch = build().bfloat16(), make_batch()
    own, ours = model(**batch).loss, task_loss(model, batch)
    assert ours.dtype == torch.float32
    assert_same(ours, own, rtol=1e-3)
    assert response_log_probs(model, batch).dtype == torch.float32


BATCH = make_batch()
ERRORS = {
    "num_items": (
        lambda model: task_loss(model, BATCH, num_items=0),
        "num_items is 0; expected at least 1",
    ),
    "task batch without a scored token": (
        lambda model: task_loss(model, without_labels(BATCH, [0, 1, 2])),
        r"batch has no scored token in any of its 3 rows: every label is -100 .* maximum length",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_is_wrong_before_the_forward(case):
    assert_refused(*ERRORS[case])
