import pytest
import torch
from transformers import DataCollatorWithFlattening, default_data_collator

from sap_fast.losses import (
    IGNORE_INDEX,
    contrastive_loss,
    difference_loss,
    joint_loss,
    refusal_loss,
    response_log_probs,
    task_loss,
)
from tests.losses.helpers import (
    BATCHES,
    EmbeddingModel,
    assert_same,
    batch_of,
    build,
    gradients,
    make_batch,
)

# ---- batches without a mask ----


def rows_of(batch):
    """A batch's rows as a dataset has them, without padding."""
    return [
        {"input_ids": ids[mask.bool()].tolist(), "labels": labels[mask.bool()].tolist()}
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        )
    ]


def flattened(batch, **settings):
    return DataCollatorWithFlattening(**settings)(rows_of(batch), return_tensors="pt")


EVEN = make_batch((9, 9, 9))
UNMASKED = default_data_collator(rows_of(EVEN))


@pytest.mark.parametrize("mask", ["absent", "None"])
@pytest.mark.parametrize("packs", [False, True])
def test_a_batch_without_a_mask_is_attended_everywhere(mask, packs, body_calls, forwards):
    model = build()
    masked = batch_of(BATCHES["identical"]) if packs else EVEN
    batch = {key: value for key, value in masked.items() if key != "attention_mask"}
    if mask == "None":
        batch["attention_mask"] = None
    expected = task_loss(model, masked)
    body_calls.clear()
    ours = task_loss(model, batch)
    assert_same(ours, expected, rtol=2e-6)
    assert_same(gradients(ours, model), gradients(expected, model))
    assert_same(response_log_probs(model, batch), response_log_probs(model, masked), rtol=2e-6)
    if packs:
        assert forwards == [(1, 15)] * 2
    else:
        assert body_calls[0]["attention_mask"] is None  # none is made up


def test_default_data_collator():
    model = build()
    ours, own = task_loss(model, UNMASKED), model(**UNMASKED).loss
    assert_same(ours, own, rtol=2e-6)
    assert_same(gradients(ours, model), gradients(own, model))


@pytest.mark.parametrize("loss", [contrastive_loss, difference_loss, joint_loss, refusal_loss])
@pytest.mark.parametrize("pack", [False, True])
def test_pairs_without_a_mask_may_differ_in_length(loss, pack):
    model, longer = build(), make_batch((14, 14, 14), seed=1)
    pair = EVEN, longer
    unmasked = [default_data_collator(rows_of(batch)) for batch in pair]
    expected = loss(model, *pair, pack=pack)
    for given in (unmasked, (EVEN, unmasked[1]), (unmasked[0], longer)):
        assert_same(loss(model, *given, pack=pack), expected, rtol=2e-5)


def test_a_batch_that_is_packed_already_is_left_so(body_calls, forwards):
    model, batch = build(), make_batch()
    packed = flattened(batch)
    assert set(packed) == {"input_ids", "labels", "position_ids"}
    expected, own = task_loss(model, batch), model(**packed, use_cache=False).loss
    body_calls.clear()
    ours = task_loss(model, packed)
    (call,) = body_calls
    assert call["attention_mask"] is None and call["index"] is None
    assert call["input_ids"].shape == (1, 28)
    assert torch.equal(call["position_ids"], packed["position_ids"])
    assert_same(ours, expected, rtol=2e-6)
    assert_same(ours, own, rtol=2e-6)
    assert_same(gradients(ours, model), gradients(expected, model))


def test_what_kernels_are_told_of_packed_sequences_reaches_them(body_calls):
    packed = flattened(make_batch(), return_flash_attn_kwargs=True, return_seq_idx=True)
    task_loss(build(), packed)
    for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"):
        assert body_calls[-1][key] is packed[key]
    assert body_calls[-1]["max_length_q"] == 12


def test_a_separator_that_is_scored_stays_scored():
    model, packed = build(), flattened(make_batch(), separator_id=2)
    assert_same(task_loss(model, packed), model(**packed, use_cache=False).loss, rtol=2e-6)


@pytest.mark.parametrize("loss", [contrastive_loss, difference_loss, joint_loss, refusal_loss])
def test_pairs_that_are_packed_already_are_pairs_of_sequences(loss):
    model = build()
    pair = make_batch(), make_batch((6, 15, 8), seed=1)
    settings = {"return_flash_attn_kwargs": True, "return_seq_idx": True}
    packed = [flattened(batch, **settings) for batch in pair]
    expected = loss(model, *pair)
    for given in (packed, (packed[0], pair[1]), (pair[0], packed[1])):
        ours = loss(model, *given)
        assert_same(ours, expected, rtol=2e-5)
        assert_same(gradients(ours, model), gradients(expected, model), rtol=2e-4)
    assert_same(response_log_probs(model, packed[0]), response_log_probs(model, pair[0]), rtol=2e-6)


def test_several_rows_of_packed_sequences():
    model, first, second = build(), make_batch((7, 5), (2, 2)), make_batch((4, 8), (2, 2), seed=1)
    packed = [flattened(batch) for batch in (first, second)]
    packed = {key: torch.cat([batch[key] for batch in packed]) for key in packed[0]}
    expected = torch.cat([response_log_probs(model, batch) for batch in (first, second)])
    assert_same(response_log_probs(model, packed), expected, rtol=2e-6)


def test_positions_of_one_sequence_per_row_are_no_packing():
    model = build("gpt2", initializer_range=0.2)
    positions = torch.arange(9).expand(3, 9) + 2
    batch = {**UNMASKED, "position_ids": positions}
    masked = {**EVEN, "position_ids": positions}
    assert_same(response_log_probs(model, batch), response_log_probs(model, masked), rtol=2e-6)


def test_further_tensors_of_packed_pairs_are_an_error():
    packed = flattened(make_batch())
    packed["token_type_ids"] = torch.zeros_like(packed["input_ids"])
    with pytest.raises(ValueError, match=r"flattened batch of pairs has \['token_type_ids'\]"):
        contrastive_loss(EmbeddingModel(), packed, packed)


def test_a_mask_of_another_shape_is_still_an_error():
    with pytest.raises(ValueError, match=r"batch\['attention_mask'\] has shape \(3, 8\)"):
        task_loss(EmbeddingModel(), {**UNMASKED, "attention_mask": torch.ones(3, 8)})


# ---- what is remembered ----


def count_host_copies(monkeypatch):
    copies, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(0) or copy(self))
    return copies


def test_passes_over_the_same_batch_wait_for_the_device_once(monkeypatch):
    model, batch, rejected = EmbeddingModel(), make_batch(), make_batch(seed=1)
    copies = count_host_copies(monkeypatch)
    first = task_loss(model, batch)
    assert torch.equal(task_loss(model, dict(batch)), first)
    assert len(copies) == 1
    pair = contrastive_loss(model, batch, rejected)
    assert torch.equal(contrastive_loss(model, batch, rejected), pair)
    assert len(copies) == 2
    batch["labels"][0, 4:] = IGNORE_INDEX
    assert not torch.equal(task_loss(model, {**batch, "labels": batch["labels"]}), first)
    assert len(copies) == 3
    assert torch.equal(task_loss(model, make_batch()), first)
    assert len(copies) == 4


def test_packed_pairs_are_taken_apart_once(monkeypatch):
    model, packed = build(), flattened(make_batch())
    contrastive_loss(model, packed, packed)
    copies = count_host_copies(monkeypatch)
    contrastive_loss(model, packed, packed)
    assert copies == []
