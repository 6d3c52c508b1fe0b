import pickle

import pytest
import torch

from sap_fast.data import SafetyCollator, TaskCollator

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [8], "labels": [8]},
]


def test_task_collator_pads_right_or_left():
    right = pickle.loads(pickle.dumps(TaskCollator(9)))(ROWS)
    assert {name: tensor.tolist() for name, tensor in right.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 9]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
        "labels": [[-100, 6, 7], [8, -100, -100]],
    }
    assert {tensor.dtype for tensor in right.values()} == {torch.int64}
    left = TaskCollator(9, padding_side="left", pad_to_multiple_of=4)(ROWS)
    assert {name: tensor.tolist() for name, tensor in left.items()} == {
        "input_ids": [[9, 5, 6, 7], [9, 9, 9, 8]],
        "attention_mask": [[0, 1, 1, 1], [0, 0, 0, 1]],
        "labels": [[-100, -100, 6, 7], [-100, -100, -100, 8]],
    }
    assert TaskCollator(9, pad_to_multiple_of=3)(ROWS)["labels"].shape == (2, 3)


def test_safety_collator_pads_each_side_by_itself():
    pairs = [{"chosen": ROWS[0], "rejected": ROWS[1]}, {"chosen": ROWS[1], "rejected": ROWS[1]}]
    batch = pickle.loads(pickle.dumps(SafetyCollator(9, "left", 2)))(pairs)
    collate = TaskCollator(9, "left", 2)
    for name in ("chosen", "rejected"):
        expected = collate([pair[name] for pair in pairs])
        for key, tensor in expected.items():
            torch.testing.assert_close(batch[name][key], tensor, rtol=0, atol=0)
    assert batch["chosen"]["input_ids"].tolist() == [[9, 5, 6, 7], [9, 9, 9, 8]]
    assert batch["rejected"]["input_ids"].tolist() == [[9, 8], [9, 8]]


@pytest.mark.parametrize("collator", [TaskCollator, SafetyCollator])
def test_collators_reject_bad_settings(collator):
    with pytest.raises(ValueError, match="padding_side='middle'; expected 'left' or 'right'"):
        collator(0, padding_side="middle")
    with pytest.raises(ValueError, match="pad_to_multiple_of=0; expected at least 1"):
        collator(0, pad_to_multiple_of=0)
