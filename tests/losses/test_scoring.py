import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from sap_fast.losses import (
    IGNORE_INDEX,
    contrastive_loss,
    difference_loss,
    response_log_probs,
    task_loss,
)
from tests.losses.helpers import (
    FAMILIES,
    VOCABULARY,
    EmbeddingModel,
    assert_refused,
    assert_same,
    build,
    build_odd,
    explicit_log_probs,
    gradients,
    make_batch,
    without_labels,
)

pytestmark = pytest.mark.usefixtures("several_chunks", "no_fallback_unnoticed")


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_side_does_not_matter(family):
    model = build(family, output_router_logits=False)
    # The first token of a row is scored, too: after left padding it has a position before it.
    options = {"prompts": (0, 3, 0), "pad_labels": True}
    right, left = (make_batch(side=side, **options) for side in ("right", "left"))
    expected = explicit_log_probs(model, make_batch(**options), "sum")
    for batch in (right, left):
        assert_same(response_log_probs(model, batch), expected, rtol=2e-6)
    assert_same(gradients(task_loss(model, left), model), gradients(task_loss(model, right), model))


def test_padding_side_does_not_matter_inside_peft():
    # GPT-2 adds learned positions, and PEFT's own forward does not name position_ids.
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(build("gpt2"), config).eval()
    right, left = (response_log_probs(model, make_batch(side=side)) for side in ("right", "left"))
    assert_same(left, right, rtol=2e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_response_log_probs_are_those_of_the_response_tokens(reduction):
    model, batch = build(), make_batch()
    expected = explicit_log_probs(model, batch, reduction)
    assert_same(response_log_probs(model, batch, reduction=reduction), expected, rtol=2e-6)


def test_response_log_probs_sum_by_default():
    model, batch = build(), make_batch()
    assert torch.equal(
        response_log_probs(model, batch), response_log_probs(model, batch, reduction="sum")
    )


def test_further_tensors_of_the_batch_reach_the_model():
    model, batch = EmbeddingModel(), make_batch(side="left")
    weights = torch.rand(3, 12, 2)
    response_log_probs(model, {**batch, "token_weights": weights, "names": ["a", "b", "c"]})
    assert set(model.received) == {"position_ids", "use_cache", "token_weights"}
    assert model.received["token_weights"] is weights
    assert model.received["use_cache"] is False
    expected = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert torch.equal(model.received["position_ids"], expected)

    positions = torch.arange(12).expand(3, 12)
    response_log_probs(model, {**batch, "position_ids": positions})
    assert model.received["position_ids"] is positions

    task_loss(model, make_batch())
    assert model.received["position_ids"] is None


def test_further_tensors_of_chosen_and_rejected_are_padded_where_they_are_per_token():
    model = EmbeddingModel()
    chosen = {**make_batch(), "token_weights": torch.rand(3, 12, 2), "image": torch.rand(3, 4)}
    rejected = {
        **make_batch((15, 9, 7), seed=1),
        "token_weights": torch.rand(3, 15, 2),
        "image": torch.rand(3, 4),
    }
    difference_loss(model, chosen, rejected)
    padded = F.pad(chosen["token_weights"], (0, 0, 0, 3))
    weights, image = model.received["token_weights"], model.received["image"]
    assert torch.equal(weights, torch.cat([padded, rejected["token_weights"]]))
    assert torch.equal(image, torch.cat([chosen["image"], rejected["image"]]))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_batch_seen_in_inference_mode_can_be_trained_on(family):
    model, batch = build(family), make_batch()
    with torch.inference_mode():
        expected = task_loss(model, batch)
        other = task_loss(model, {key: value.clone() for key, value in batch.items()})
    assert torch.equal(expected, other)
    model = build(family)  # the buffers of the other one are of inference mode
    task_loss(model, batch).backward()


ODDITIES = {
    "no head": "get_output_embeddings gives no head",
    "unused head": "ran 0 times",
    "head called twice": "ran 2 times",
    "flattened head": "does not take",
    "head by keyword": "does not take",
    "head with a further argument": "does not take",
    "scaled": r"differ by up to 32 ",
    "scaled in place": r"differ by up to 32 ",
    "softcapped": r"differ by up to 0\.\d+ ",
    "truncated": r"\(\d, 1, 88\) are not of the shape",
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_fallback_to_the_models_own_logits(oddity):
    model, batch = build_odd(oddity), make_batch()
    batch["labels"][batch["labels"] >= VOCABULARY - 8] = IGNORE_INDEX  # the truncated vocabulary
    logits = model(batch["input_ids"], batch["attention_mask"])
    logits = logits[0] if isinstance(logits, tuple) else logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    with pytest.warns(UserWarning, match=f"^OddLlama: .*{ODDITIES[oddity]}") as caught:
        first = task_loss(model, batch)
    assert len(caught) == 1
    second = task_loss(model, batch)  # a second warning would be an error
    for ours in (first, second):
        assert_same(ours, expected, rtol=2e-6)
        assert_same(gradients(ours, model), gradients(expected, model))


def test_models_without_an_oddity_need_no_fallback():
    model, batch = build_odd(None), make_batch()
    expected = build()(**batch).loss
    assert_same(task_loss(model, batch), expected, rtol=2e-6)


def test_fallback_repeats_the_dropout_of_the_forward_it_replaces():
    model, batch = build_odd("scaled", attention_dropout=0.5).train(), make_batch()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="OddLlama"):
        first = task_loss(model, batch)
    after_first = torch.get_rng_state()
    torch.manual_seed(1)
    second = task_loss(model, batch)
    assert torch.equal(first, second)
    assert torch.equal(after_first, torch.get_rng_state())


def test_logits_of_another_length_are_an_error():
    class Shifted(nn.Module):
        def forward(self, input_ids, attention_mask):
            return torch.zeros(len(input_ids), 3, VOCABULARY)

    with (
        pytest.warns(UserWarning, match="Shifted"),
        pytest.raises(ValueError, match=r"Shifted returned logits of shape \(3, 3, 96\)"),
    ):
        task_loss(Shifted(), make_batch())


def shortened(batch, key):
    return {**batch, key: batch[key][:, 1:]}


BATCH = make_batch()
ERRORS = {
    "row without a scored token": (
        lambda model: response_log_probs(model, without_labels(BATCH, [0, 2])),
        r"batch has no scored token in rows \[0, 2\] of its 3: every label is -100",
    ),
    "row scored at padding only": (
        lambda model: response_log_probs(model, make_batch((12, 3), (4, 3), pad_labels=True)),
        r"batch has no scored token in rows \[1\] of its 2: every label is -100 or at padding",
    ),
    "reduction of row log-probabilities": (
        lambda model: response_log_probs(model, BATCH, reduction="none"),
        "reduction is 'none'; expected 'sum' or 'mean'",
    ),
    "missing key": (
        lambda model: difference_loss(model, BATCH, {"input_ids": BATCH["input_ids"]}),
        r"rejected has no labels, only \['input_ids'\]",
    ),
    "wrong shape": (
        lambda model: contrastive_loss(model, shortened(BATCH, "labels"), BATCH),
        r"chosen\['labels'\] has shape \(3, 11\) beside input_ids \(3, 12\)",
    ),
    "no batch axis": (
        lambda model: task_loss(model, {key: value[0] for key, value in BATCH.items()}),
        r"batch\['input_ids'\] has shape \(12,\) .* expected \(batch, sequence\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_is_wrong_before_the_forward(case):
    assert_refused(*ERRORS[case])


def test_import_needs_torch_only():
    code = "import sys, sap_fast.losses; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
