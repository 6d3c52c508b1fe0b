import pytest
import torch

from sap_fast.losses import (
    contrastive_loss,
    difference_loss,
    joint_loss,
    refusal_loss,
    response_log_probs,
)
from tests.losses.helpers import (
    assert_refused,
    assert_same,
    build,
    explicit_log_probs,
    gradients,
    make_batch,
    without_labels,
)

pytestmark = pytest.mark.usefixtures("several_chunks", "no_fallback_unnoticed")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_safety_losses_are_their_formulas(reduction, side):
    model = build(initializer_range=0.3)
    chosen = make_batch(side=side)
    rejected = make_batch((6, 15, 8), (4, 3, 5), side=side, seed=1)
    margin = explicit_log_probs(model, chosen, reduction) - explicit_log_probs(
        model, rejected, reduction
    )
    for swap in (False, True):
        pair = (rejected, chosen) if swap else (chosen, rejected)
        margin = -margin if swap else margin
        contrastive = contrastive_loss(model, *pair, temperature=2.5, reduction=reduction)
        expected = -torch.log(torch.sigmoid(margin.double() / 2.5)).mean().float()
        assert_same(contrastive, expected)
        joint = joint_loss(model, *pair, temperature=2.5, reduction=reduction)
        assert_same(joint, expected)
        summed = expected - explicit_log_probs(model, pair[0], reduction).mean()
        assert_same(gradients(joint, model), gradients(summed, model), rtol=1e-4)
        assert_same(gradients(contrastive, model), gradients(expected, model), rtol=1e-4)
        difference = difference_loss(model, *pair, reduction=reduction)
        assert_same(difference, -margin.mean())
        assert_same(gradients(difference, model), gradients(-margin.mean(), model), rtol=1e-4)
        expected = -explicit_log_probs(model, pair[0], reduction).mean()
        refusal = refusal_loss(model, *pair, reduction=reduction)
        assert_same(refusal, expected)
        assert_same(gradients(refusal, model), gradients(expected, model), rtol=1e-4)


@pytest.mark.parametrize("loss", [contrastive_loss, difference_loss, joint_loss])
def test_safety_losses_use_per_token_means_and_one_forward(loss):
    model, chosen, rejected = build(), make_batch(), make_batch((6, 15, 8), seed=1)
    shapes = []
    loss(model, chosen, rejected, pack=False)  # tests the model
    model.model.register_forward_hook(lambda *call: shapes.append(call[2][0].shape[:2]))
    default = loss(model, chosen, rejected, pack=False)
    assert shapes == [(6, 15)]
    assert torch.equal(default, loss(model, chosen, rejected, reduction="mean", pack=False))


def test_temperature_is_one_by_default():
    model, chosen, rejected = build(), make_batch(), make_batch(seed=1)
    default = contrastive_loss(model, chosen, rejected)
    assert torch.equal(default, contrastive_loss(model, chosen, rejected, temperature=1.0))


def test_contrastive_loss_of_pairs_far_apart_is_finite():
    model = build()
    with torch.no_grad():
        model.lm_head.weight.mul_(2000)
    chosen, rejected = make_batch((5,), (2,)), make_batch((12,), (2,), seed=1)
    with torch.no_grad():
        margin = float(response_log_probs(model, chosen) - response_log_probs(model, rejected))
    assert margin > 200  # exp(margin) overflows in fp32
    right = contrastive_loss(model, chosen, rejected, reduction="sum")
    wrong = contrastive_loss(model, rejected, chosen, reduction="sum")
    assert right.item() < 1e-38
    assert_same(wrong, torch.tensor(margin))
    assert all(gradient.isfinite().all() for gradient in gradients(right, model))
    difference = difference_loss(model, rejected, chosen, reduction="sum")
    assert_same(gradients(wrong, model), gradients(difference, model))


BATCH = make_batch()
ERRORS = {
    "chosen row without a scored token": (
        lambda model: contrastive_loss(model, without_labels(BATCH, [1]), BATCH),
        r"chosen has no scored token in rows \[1\] of its 3",
    ),
    "rejected row without a scored token": (
        lambda model: difference_loss(model, BATCH, without_labels(BATCH, [2])),
        r"rejected has no scored token in rows \[2\] of its 3",
    ),
    "unequal numbers of rows": (
        lambda model: difference_loss(model, BATCH, make_batch((8,), (3,))),
        "chosen has 3 rows and rejected 1; expected pairs",
    ),
    "unequal tensors": (
        lambda model: difference_loss(model, BATCH, {**BATCH, "token_weights": torch.ones(3, 12)}),
        r"chosen has the tensors \['attention_mask', .* expected the same in both",
    ),
    "temperature": (
        lambda model: contrastive_loss(model, BATCH, BATCH, temperature=0.0),
        r"temperature is 0\.0; expected a number above 0",
    ),
    "temperature that is no number": (
        lambda model: contrastive_loss(model, BATCH, BATCH, temperature=float("nan")),
        "temperature is nan; expected a number above 0",
    ),
    "refusal without a scored token": (
        lambda model: refusal_loss(model, without_labels(BATCH, [1])),
        r"chosen has no scored token in rows \[1\] of its 3",
    ),
    "reduction of a safety loss": (
        lambda model: contrastive_loss(model, BATCH, BATCH, reduction="none"),
        "reduction is 'none'; expected 'sum' or 'mean'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_is_wrong_before_the_forward(case):
    assert_refused(*ERRORS[case])
