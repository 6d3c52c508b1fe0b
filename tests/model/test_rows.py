"""The rows of a batch that the probe passes see."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast import FusedSAP, ProbeSet
from sap_fast.model.rows import first_rows, part_of, row_count
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


def test_what_has_no_rows_stays_as_it_is() -> None:
    batch = {
        "input_ids": torch.arange(12).view(4, 3),
        "weight": torch.tensor(0.5),
        "positions": torch.arange(3),
        "names": ["a", "b", "c", "d"],
        "mask": torch.ones(4, dtype=torch.bool),
    }
    part = first_rows(batch, 2)
    assert torch.equal(part["input_ids"], batch["input_ids"][:2])
    assert part["mask"].shape == (2,)
    for name in ("weight", "positions", "names"):
        assert part[name] is batch[name]
    assert first_rows(batch, 4) is batch and first_rows(batch, 9) is batch


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
