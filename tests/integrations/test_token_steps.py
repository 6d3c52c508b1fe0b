"""Steps of as many scored tokens: how rows are cut into them, and that they are one step each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Trainer

from sap_fast import SAPTrainer
from sap_fast.integrations.token_steps import StepSampler, TokenStepsMixin, scored_tokens
from tests.ranks import distance
from tests.tiny import assert_same_bits, weights
from tests.trainers import TASK_ROWS, arguments, model, small, trainer_of


class TokenTrainer(TokenStepsMixin, SAPTrainer):
    pass


class PlainTokenTrainer(TokenStepsMixin, Trainer):
    pass


def steps(counts: list[int], tokens: int, epoch: int = 0, **more: Any) -> list[list[int]]:
    return list(StepSampler(counts, tokens, seed=3, epoch=lambda: epoch, **more))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 50), min_size=4, max_size=60), st.integers(1, 400))
def test_every_row_is_in_one_step_of_about_as_many_tokens(counts: list[int], tokens: int) -> None:
    found = steps(counts, tokens)
    assert sorted(row for step in found for row in step) == list(range(len(counts)))
    assert all(found) and len(found) == len(StepSampler(counts, tokens, seed=0, epoch=lambda: 0))
    share = sum(counts) / len(found)
    # As close as an epoch can be, unless there are not rows enough.
    assert len(found) == len(counts) or abs(share - tokens) <= tokens / 2 or len(found) == 1
    if share > max(counts):
        for step in found:
            assert abs(sum(counts[row] for row in step) - share) <= max(counts)

    # The same again, in another order in another epoch.
    assert steps(counts, tokens) == found
    assert len(steps(counts, tokens, epoch=1)) == len(found)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 400), st.integers(2, 5)
)
def test_ranks_share_out_the_steps_of_one(counts: list[int], tokens: int, ranks: int) -> None:
    alone = steps(counts, tokens)
    each = [steps(counts, tokens, rank=rank, ranks=ranks) for rank in range(ranks)]
    for step, shares in zip(alone, zip(*each, strict=True), strict=True):
        assert len({len(share) for share in shares}) == 1
        rows = [row for share in shares for row in share]
        assert sorted(row for row in rows if row >= 0) == sorted(step)
        again = [-1 - row for row in rows if row < 0]
        assert set(again) <= set(step) and len(again) < ranks


def test_another_epoch_has_another_order() -> None:
    assert steps([5] * 30, 20) != steps([5] * 30, 20, epoch=1)
    assert steps([5] * 30, 20, epoch=1) == steps([5] * 30, 20, epoch=1)


def trainer_on(kind: type[Trainer], folder: Path, tuned: Any, rows: int, **more: Any) -> Any:
    args = arguments(folder, per_device_train_batch_size=rows, **more)
    if kind is TokenTrainer:
        options = {"probe": {"rho": 1e-3, "size": 0.05}, "tokens_per_step": 20}
        return trainer_of(kind, tuned, args, **options)
    plain: Any = kind
    collator = trainer_of(SAPTrainer, tuned, args).data_collator
    given = {"train_dataset": TASK_ROWS, "data_collator": collator, "tokens_per_step": 20}
    return plain(model=tuned, args=args, **given)


@pytest.mark.parametrize("kind", [TokenTrainer, PlainTokenTrainer])
def test_a_step_of_micro_batches_is_a_step_on_all_its_rows(
    tmp_path: Path, kind: type[Trainer]
) -> None:
    losses, ends = [], []
    for rows in (2, 100):
        tuned = small(True)
        trainer = trainer_on(kind, tmp_path / str(rows), tuned, rows, logging_steps=1)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        ends.append(weights(tuned))
    assert distance(*ends) < 1e-4, distance(*ends)
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    "kind", [PlainTokenTrainer, pytest.param(TokenTrainer, marks=pytest.mark.slow)]
)
def test_a_resumed_run_meets_the_rows_of_one_that_was_not(
    tmp_path: Path, kind: type[Trainer]
) -> None:
    epoch = round(sum(map(scored_tokens, TASK_ROWS)) / 20)
    assert 4 < epoch < 8  # it stops in the second one
    more = {"max_steps": -1, "num_train_epochs": 1.7, "save_strategy": "steps", "save_steps": 7}
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    ends = []
    for folder, checkpoint in ((straight, None), (resumed, str(straight / "checkpoint-7"))):
        tuned = model()
        trainer = trainer_on(kind, folder, tuned, 2, **more)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == trainer.state.max_steps == -(-17 * epoch // 10)
        ends.append(weights(tuned))
    assert_same_bits(*ends)
    assert trainer.get_total_train_batch_size(trainer.args) == round(len(TASK_ROWS) / epoch)
    # The second epoch had an order of its own.
    orders = []
    for step in (0, epoch, epoch + 2):
        trainer.state.global_step = step
        orders.append(list(trainer.get_train_dataloader().batch_sampler))
    assert orders[0] != orders[1] == orders[2]


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    args = arguments(tmp_path, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match="gradient_accumulation_steps=2 with tokens_per_step=20"):
        trainer_of(TokenTrainer, small(True), args, tokens_per_step=20)
    with pytest.raises(ValueError, match="tokens=0; expected at least 1"):
        steps([1, 2], 0)
    assert scored_tokens({"labels": [1, 2, -100, 3]}) == 2
    assert torch.tensor(steps([9, 1, 1], 3)).numel() == 3  # a row of more than a step's tokens
