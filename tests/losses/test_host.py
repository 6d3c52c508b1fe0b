"""What the host knows of batches."""

import gc
import weakref

import pytest
import torch
from transformers import masking_utils

from sap_fast.losses import batches, contrastive_loss, host, task_loss, to_device
from sap_fast.losses.host import TensorMemo, carry_views
from tests.losses.helpers import build, make_batch


@pytest.fixture
def copies(monkeypatch):
    """Batches that were copied to the host to be read."""
    seen, copied = [], host.copied
    for module in (host, batches):
        monkeypatch.setattr(module, "copied", lambda batch: seen.append(batch) or copied(batch))
    return seen


def on_device(batch):
    """A batch as something else moved it: in other tensors."""
    return {key: value.clone() for key, value in batch.items()}


def test_a_batch_that_was_read_on_the_host_is_not_copied_back(copies):
    model, batch = build(), make_batch(side="left")
    task_loss(model, make_batch(seed=9))  # finds out what the model is like
    expected = task_loss(model, on_device(batch))
    copies.clear()
    moved = to_device({**batch, "note": "as it is"}, "cpu")
    assert moved["note"] == "as it is" and len(copies) == 1
    carried = on_device(batch)
    carry_views(batch, carried)
    assert torch.equal(task_loss(model, moved), expected)
    assert torch.equal(task_loss(model, carried), expected)
    assert len(copies) == 1
    # A batch that was written since is another one.
    moved["labels"][0] = -100
    assert not torch.equal(task_loss(model, moved), expected)
    assert len(copies) == 2


def test_pairs_are_known_where_both_are(copies):
    model = build()
    pair = make_batch((9, 12, 7)), make_batch((15, 8, 11), seed=1)
    expected = contrastive_loss(model, *map(on_device, pair))
    copies.clear()
    carried = {"chosen": on_device(pair[0]), "rejected": on_device(pair[1])}
    carry_views(dict(zip(carried, pair, strict=True)), carried)
    copies.clear()
    assert torch.equal(contrastive_loss(model, **carried), expected)
    assert copies == []
    assert torch.equal(contrastive_loss(model, carried["chosen"], on_device(pair[1])), expected)
    assert len(copies) == 1


def test_batches_of_other_kinds_are_moved_and_not_read(copies):
    ids = torch.ones(2, 3, dtype=torch.long)
    for batch in (  # of a form that is not scored by token
        {"input_ids": ids},
        {"inputs_embeds": torch.ones(2, 3, 4), "labels": ids},
        {"input_ids": ids, "labels": ids, "attention_mask": torch.ones(2, 1, 3, 3)},
        {"input_ids": ids, "labels": torch.ones(2)},
    ):
        assert to_device(batch, "cpu").keys() == batch.keys()
        carry_views(batch, on_device(batch))
    carry_views([ids], [ids])
    carry_views({"a": {"b": ids}}, {})
    assert copies == []


def test_memo_tells_tensors_apart_by_identity_and_version():
    memo, calls = TensorMemo(2), []

    def get(*tensors):
        return memo.get(tensors, lambda: calls.append(0) or object())

    a, b = torch.zeros(2), torch.zeros(2)
    first = get(a, b)
    assert get(a, b) is first
    assert get(b, a) is not first
    assert get(a, b) is first
    a.add_(1)
    assert get(a, b) is not first
    assert len(calls) == 3


def test_memo_forgets_with_the_tensors_and_beyond_its_size():
    memo = TensorMemo(2)
    tensors = [torch.zeros(2) for _ in range(4)]
    results = [weakref.ref(memo.get([t], lambda: torch.zeros(3))) for t in tensors]
    gc.collect()
    assert [result() is None for result in results] == [True, True, False, False]
    tensors.pop()
    gc.collect()
    assert results[3]() is None and results[2]() is not None


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_mask_that_hides_nothing_is_not_given_to_the_model(family):
    """Transformers' models look for a zero in one, for which the host waits for the device."""
    model, seen = build(family), []
    search = masking_utils.find_packed_sequence_indices
    task_loss(model, make_batch(seed=9))  # finds out what the model is like
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    whole, padded = make_batch((9, 9, 9)), make_batch((9, 8, 9))
    assert whole["attention_mask"].all()
    found = task_loss(model, whole, pack=False)
    assert seen and all(mask is None for mask in seen)
    seen.clear()
    task_loss(model, padded, pack=False)
    assert seen and all(mask is not None for mask in seen)
    seen.clear()
    # Positions without a mask would say where sequences of one row begin.
    places = torch.arange(9).expand(3, 9)
    task_loss(model, {**whole, "position_ids": places}, pack=False)
    assert seen and all(mask is not None for mask in seen)
    hook.remove()
    assert masking_utils.find_packed_sequence_indices is search
    own = model(**{key: value for key, value in whole.items() if key != "attention_mask"}).loss
    torch.testing.assert_close(found, own, rtol=1e-6, atol=0)
