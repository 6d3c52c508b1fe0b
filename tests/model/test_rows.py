"""The rows of a batch that the probe passes see."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast import FusedSAP, ProbeSet
from sap_fast.model import rows as module_under_test
from sap_fast.model.rows import part_of, row_count
from tests.tiny import Batch, Problem, problem, random_batch, safety, task


def sap(case: Problem, rows: float, **settings: Any) -> FusedSAP:
    probes = ProbeSet(case.model, layers=[1, 2], size=0.05, rho=1e-3, rows=rows)
    return FusedSAP(case.trained, probes, lr=1e-2, **settings)


@pytest.mark.parametrize(("fraction", "rows"), [(0.5, 2), (0.6, 3), (0.01, 1), (1.0, 4)])
def test_the_probe_passes_see_the_first_rows(fraction: float, rows: int) -> None:
    case, other = problem(), problem()
    optimizer, whole = sap(case, fraction), sap(other, 1.0)
    batch = random_batch(rows=4, seed=4)
    sizes = []

    def counted(part: Batch) -> Tensor:
        sizes.append(row_count(part))
        return task(case, part)

    optimizer.step(counted, partial(safety, case), batch)
    assert sizes == [rows, rows, 4]
    first = {key: value[:rows] for key, value in batch.items()}
    whole.inner_passes(partial(task, other), partial(safety, other), first)
    assert optimizer.probes is not None and whole.probes is not None
    for index, estimate in whole.probes.estimates.items():
        assert torch.equal(optimizer.probes.estimates[index], estimate)


def test_a_part_of_micro_batches_counts_their_rows() -> None:
    case = problem()
    optimizer = sap(case, 0.5)
    micro_batches: list[Batch] = [random_batch(rows=rows, seed=rows) for rows in (2, 3, 4)]
    parts: list[list[Batch]] = []

    def counted(part: list[Batch]) -> Tensor:
        parts.append(part)
        return torch.stack([task(case, micro_batch).detach() for micro_batch in part]).sum()

    optimizer.inner_passes(counted, partial(safety, case), micro_batches)
    assert [[row_count(micro_batch) for micro_batch in part] for part in parts] == [[2, 3]] * 2
    assert parts[0] is parts[1]
    assert [row_count(micro_batch) for micro_batch in part_of(micro_batches, 0.3)] == [2, 1]


def test_calibration_sees_the_same_rows() -> None:
    case = problem()
    probes = ProbeSet(case.model, layers=[1, 2], rows=0.5)
    optimizer = FusedSAP(case.trained, probes)
    sizes = []

    def counted(part: Batch) -> Tensor:
        sizes.append(row_count(part))
        return task(case, part)

    batch = random_batch(rows=4)
    assert optimizer.passes.calibrate(counted, partial(safety, case), batch) is not None
    assert sizes == [2] * 22


@pytest.mark.parametrize("micro_batches", [False, True])
def test_all_rows_are_the_batch_itself(micro_batches: bool) -> None:
    case = problem()
    batch: Any = [random_batch(seed=1), random_batch(seed=2)] if micro_batches else random_batch()
    seen = []

    def task_of(part: Any) -> Tensor:
        seen.append(part)
        return task(case)

    sap(case, 1.0).inner_passes(task_of, partial(safety, case), batch)
    assert seen[0] is batch and seen[1] is batch
    # What it is does not matter then.
    sap(case, 1.0).inner_passes(task_of, partial(safety, case), "anything")
    assert seen[2] == "anything"
    sap(case, 1.0).inner_passes(task_of, partial(safety, case))
    assert seen[4] is None


def test_a_part_without_a_batch_is_an_error_before_any_pass() -> None:
    case = problem()

    def unwanted(*_: Any) -> Tensor:
        raise AssertionError("no pass runs")

    for optimizer in (sap(case, 0.5), sap(case, 0.5, direction_every=3)):
        for call in (optimizer.step, optimizer.inner_passes):
            with pytest.raises(ValueError, match=r"rows=0\.5 without a batch.*task\(part\)"):
                call(unwanted, unwanted)
    optimizer.step()  # the update alone asks for nothing


def scored(*rows: bool) -> Batch:
    """A batch whose row k holds the tokens k, and labels where `rows` says so."""
    ids = torch.arange(len(rows))[:, None].expand(-1, 5).clone()
    return {"input_ids": ids, "labels": torch.where(torch.tensor(rows)[:, None], ids, -100)}


def taken(part: Any) -> list[int]:
    return part["input_ids"][:, 0].tolist()


def test_rows_without_a_scored_token_come_last() -> None:
    batch = scored(False, True, False, True)
    assert taken(part_of(batch, 0.25)) == [1]
    assert taken(part_of(batch, 0.5)) == [1, 3]
    assert taken(part_of(batch, 0.75)) == [0, 1, 3]
    assert torch.equal(part_of(batch, 0.5)["labels"], batch["labels"][[1, 3]])
    # The first token has nothing before it, and so no loss.
    batch["labels"][2, 0] = 5
    assert taken(part_of(batch, 0.75)) == [0, 1, 3]
    batch["labels"][2, 1] = 5
    assert taken(part_of(batch, 0.75)) == [1, 2, 3]
    assert taken(part_of(scored(False, False), 0.5)) == [0]
    micro_batches = [scored(False, True), scored(False, False), scored(True, True)]
    assert [taken(part) for part in part_of(micro_batches, 0.5)] == [[1], [0, 1]]
    assert [taken(part) for part in part_of(micro_batches, 0.6)] == [[0, 1], [0, 1]]


def test_each_row_keeps_the_task_of_its_virtual_tokens() -> None:
    batch = {**random_batch(rows=4), "task_ids": torch.tensor([3, 2, 1, 0])}
    batch["labels"][0] = -100
    assert part_of(batch, 0.5)["task_ids"].tolist() == [2, 1]


def test_what_has_no_rows_stays_as_it_is() -> None:
    batch = scored(True, False, True, True)
    whole = {"weight": torch.tensor(0.5), "names": ["a", "b", "c", "d"]}
    part = part_of(batch | whole | {"token_type_ids": torch.arange(4)}, 0.5)
    assert taken(part) == [0, 2]
    assert part["token_type_ids"].tolist() == [0, 2]
    for name, value in whole.items():
        assert part[name] is value
    assert part_of(batch, 0.9)["input_ids"] is batch["input_ids"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_values", torch.ones(4, 3)),
        ("weight_of_the_rows", torch.ones(4)),
        ("position_ids", torch.ones(1, 5)),
        ("position_ids", torch.ones(3, 3, 5)),  # one for each axis of an image: (3, B, S)
    ],
    ids=lambda value: value if isinstance(value, str) else str(tuple(value.shape)),
)
def test_what_may_belong_to_any_row_keeps_the_batch_whole(
    name: str, value: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "_said", set())
    rows = (True, True, True) if value.shape[0] == 3 else (True,) * 4
    batch = scored(*rows) | {name: value}
    with pytest.warns(UserWarning, match=f"rows below 1 has no effect: the batch holds {name}"):
        assert part_of(batch, 0.5) is batch
    micro_batches = [scored(True, True), batch]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert part_of(micro_batches, 0.5) is micro_batches


def test_what_rows_cannot_be_taken_of_is_named() -> None:
    with pytest.raises(TypeError, match=r"batch is a Tensor; rows=0\.5 needs a mapping"):
        part_of(torch.ones(4, 2), 0.5)
    with pytest.raises(TypeError, match="batch is a str"):
        part_of("batch", 0.5)
    with pytest.raises(ValueError, match=r"entries \['a', 'b'\] has no tensor to count rows by"):
        part_of({"b": 1, "a": torch.tensor(1.0)}, 0.5)


@pytest.mark.parametrize("rows", [0.0, -0.5, 1.5, float("nan")])
def test_a_part_out_of_range_is_named(rows: float) -> None:
    with pytest.raises(ValueError, match=rf"rows={rows!r} is out of range; give 0 < rows ≤ 1"):
        ProbeSet(problem().model, rows=rows)
