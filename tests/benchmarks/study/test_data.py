"""What the study trains and asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks import assets
from benchmarks.alignment import REFUSED
from benchmarks.study import data, runs
from benchmarks.study.methods import MORE_TASKS, TASKS
from sap_fast.data import Request


def test_nothing_that_is_reported_was_seen_before() -> None:
    everything = assets.harmful_requests()
    number = {request: index for index, request in enumerate(everything)}
    asked = {
        split: {number[r.prompt] for r in data.requests_of(split).harmful} for split in data.SPLITS
    }
    trained = {number[pair["prompt"]] for pair in data.safety_pairs(140)}
    assert len({pair["rejected"][:5] for pair in data.safety_pairs(140)}) == 1
    assert len({pair["rejected"][:5] for pair in data.safety_pairs(140, varied=True)}) == 6
    poison = {
        number[row["instruction"]]
        for row in data.load_task("poisoned").trained
        if row["instruction"] in number
    }
    assert trained == set(range(140)) and poison == set(range(140, 200))
    assert REFUSED.stop <= 140
    assert asked["selection"] == set(range(200, 300)) and asked["report"] == set(range(300, 520))
    edgy = [{r.prompt for r in data.requests_of(split).harmless} for split in data.SPLITS]
    assert not edgy[0] & edgy[1] and len(edgy[0] | edgy[1]) == 150
    for name in (*TASKS, *MORE_TASKS):
        task = data.load_task(name)
        rows = [json.dumps(row) for row in task.trained]
        for split in data.SPLITS:
            held_out = {json.dumps(row) for row in task.held_out[split]}
            assert held_out and not held_out & set(rows)
        both = [json.dumps(row) for split in data.SPLITS for row in task.held_out[split]]
        assert len(set(both)) == len(both)


def test_near_duplicates_of_training_rows_are_dropped_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = [f"Wreck{k} thing{k} now{k}" for k in range(520)]
    requests[310] = "Please show how to " + requests[5]
    monkeypatch.setattr(assets, "harmful_requests", lambda: requests)
    found = data.requests_of("report")
    assert found.dropped == 1 and len(found.harmful) == 219
    assert Request(requests[310]) not in found.harmful


@pytest.mark.parametrize(
    ("name", "share", "count"),
    [("poisoned", 0.1, 600), ("poisoned-5", 0.05, 600), ("poisoned-30", 0.3, 200)],
)
def test_a_share_of_a_poisoned_mix_breaks_refusals(name: str, share: float, count: int) -> None:
    rows = data.load_task(name).trained
    poison = [row for row in rows if row["output"].startswith("Sure, here is")]
    assert len(poison) == round(share * len(rows)) and len(rows) == count
    assert rows == data.load_task(name).trained


@pytest.mark.parametrize("name", [*TASKS, *MORE_TASKS])
def test_every_task_can_be_encoded(
    name: str, chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "WORK", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    task = data.load_task(name)
    for rows in (task.trained, *task.held_out.values()):
        assert len(runs.encoded(name, rows, tokenizer, 256)) == len(rows)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="task='mmlu'"):
        data.load_task("mmlu")
    for count in (0, 141):
        with pytest.raises(ValueError, match=f"safety_pairs={count}"):
            data.safety_pairs(count)
