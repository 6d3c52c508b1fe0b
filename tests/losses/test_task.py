import pytest
import torch
from torch import nn

from sap_fast.losses import IGNORE_INDEX, response_log_probs, task_loss
from tests.losses.helpers import (
    FAMILIES,
    assert_refused,
    assert_same,
    build,
    gradients,
    make_batch,
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
