"""The rows of a batch that the probe passes see."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast import FusedSAP, ProbeSet, task_loss
from sap_fast.losses import host
from sap_fast.model import rows as module_under_test
from sap_fast.model.rows import part_of, row_count
from tests.oracle import cosine, naive_task_loss, oracle_estimate
from tests.tiny import (
    HIDDEN,
    Batch,
    Problem,
    assert_same_bits,
    distance,
    problem,
    random_batch,
    safety,
    safety_loss,
    task,
    tiny_llama,
)


def sap(case: Problem, rows: float, **settings: Any) -> FusedSAP:
    probes = ProbeSet(case.model, layers=[1, 2], size=0.05, rho=1e-3, rows=rows)
    return FusedSAP(case.trained, probes, lr=1e-2, **settings)


@pytest.mark.parametrize(("fraction", "rows"), [(0.5, 2), (0.6, 3), (0.25, 1), (1.0, 4)])
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
    assert [row_count(micro_batch) for micro_batch in part_of(micro_batches, 0.3).batch] == [2, 1]


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
    assert taken(part_of(batch, 0.25).batch) == [1]
    assert taken(part_of(batch, 0.5).batch) == [1, 3]
    assert taken(part_of(batch, 0.75).batch) == [0, 1, 3]
    assert torch.equal(part_of(batch, 0.5).batch["labels"], batch["labels"][[1, 3]])
    # The first token has nothing before it, and so no loss.
    batch["labels"][2, 0] = 5
    assert taken(part_of(batch, 0.75).batch) == [0, 1, 3]
    batch["labels"][2, 1] = 5
    assert taken(part_of(batch, 0.75).batch) == [1, 2, 3]
    assert taken(part_of(scored(False, False), 0.5).batch) == [0]
    micro_batches = [scored(False, True), scored(False, False), scored(True, True)]
    assert [taken(part) for part in part_of(micro_batches, 0.5).batch] == [[1], [0, 1]]
    assert [taken(part) for part in part_of(micro_batches, 0.6).batch] == [[0, 1], [0, 1]]


def test_each_row_keeps_the_task_of_its_virtual_tokens() -> None:
    batch = {**random_batch(rows=4), "task_ids": torch.tensor([3, 2, 1, 0])}
    batch["labels"][0] = -100
    assert part_of(batch, 0.5).batch["task_ids"].tolist() == [2, 1]


def test_what_has_no_rows_stays_as_it_is() -> None:
    batch = scored(True, False, True, True)
    whole = {"weight": torch.tensor(0.5), "names": ["a", "b", "c", "d"]}
    part = part_of(batch | whole | {"token_type_ids": torch.arange(4)}, 0.5).batch
    assert taken(part) == [0, 2]
    assert part["token_type_ids"].tolist() == [0, 2]
    for name, value in whole.items():
        assert part[name] is value
    assert part_of(batch, 0.9).batch["input_ids"] is batch["input_ids"]


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
        assert part_of(batch, 0.5).batch is batch
    micro_batches = [scored(True, True), batch]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert part_of(micro_batches, 0.5).batch is micro_batches


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


# ---- less than one row ----


def oracle(case: Problem, batch: Batch, shape: tuple[int, ...] = (HIDDEN,)) -> dict[int, Tensor]:
    """h of a batch by double backward, at the layers that `sap` probes."""
    found = ProbeSet(case.model, layers=[1, 2])
    found.detach()
    return oracle_estimate(
        lambda: naive_task_loss(case.model, batch),
        lambda: safety_loss(case),
        case.trained,
        found.modules,
        shape,
    )


@pytest.mark.parametrize("rows", [0.5, 0.1])
def test_h_is_the_oracle_of_the_rows_it_is_of(rows: float) -> None:
    case = problem(dtype=torch.float64)
    batch = random_batch(rows=4, seed=4)
    optimizer = sap(case, rows)
    optimizer.inner_passes(partial(task, case), partial(safety, case), batch)
    # Of less than a row the tokens behind it are there all the same, but are not scored.
    alone = {key: value[: 2 if rows == 0.5 else 1].clone() for key, value in batch.items()}
    if rows == 0.1:
        assert (alone["labels"][0] != -100).sum() == 9
        alone["labels"][0, 3 + 4 :] = -100  # 0.4 of 9 are 4
    assert optimizer.probes is not None
    assert cosine(optimizer.probes.estimates, oracle(case, alone)) > 0.999999
    size = distance(list(optimizer.probes.estimates.values()), list(oracle(case, alone).values()))
    assert size < 5e-4  # measured: 1e-4, of ρ²


def test_less_than_a_row_is_cut_behind_that_part_of_its_scored_tokens() -> None:
    batch = scored(True, True)
    batch["labels"][0, :2] = -100
    # Three of the first row's five tokens are scored.
    assert [part_of(batch, f).batch["input_ids"].shape[1] for f in (0.1, 0.17, 0.34)] == [3, 4, 5]
    assert taken(part_of([batch, scored(True)], 0.1).batch[0]) == [0]
    assert part_of(batch, 0.5).batch["input_ids"].shape == (1, 5)
    # The tokens are counted from where they begin.
    padded = {key: torch.nn.functional.pad(value, (2, 0)) for key, value in batch.items()}
    padded["labels"][:, :2] = -100
    padded["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1, 1]] * 2)
    part = part_of(padded, 0.1).batch
    assert {key: value.shape for key, value in part.items()} == dict.fromkeys(padded, (1, 5))
    # Nothing is known to cut by, or of what is cut.
    for given in (
        {"input_ids": batch["input_ids"]},
        batch | {"labels": torch.full((2, 5), -100)},
        batch | {"attention_mask": torch.ones(2, 1, 5, 5)},
    ):
        assert part_of(given, 0.1).batch["input_ids"].shape == (1, 5)


def test_a_product_that_is_rounded_up_takes_no_further_row() -> None:
    assert 0.07 * 100 > 7
    assert row_count(part_of(scored(*[True] * 100), 0.07).batch) == 7


def test_the_host_reads_a_batch_once_whatever_is_taken_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, batch = tiny_llama(attention="sdpa"), random_batch(rows=4, seed=4)
    task_loss(model, batch)  # finds out what the model is like
    batch["labels"][0] = -100  # a part that is no slice
    copies, copied = [], host.copied
    monkeypatch.setattr(host, "copied", lambda given: copies.append(1) or copied(given))
    for fraction in (0.75, 0.5, 0.1):
        part = part_of(batch, fraction).batch
        ours = task_loss(model, part)
        assert copies == [1]
        fresh = {key: value.clone() for key, value in part.items()}
        assert torch.equal(task_loss(model, fresh), ours)
        assert copies.pop() == 1 and copies == [1]


# ---- V on the rows that it is of ----


def own_rows_step(case: Problem, rows: float, batch: Any, run: Any = None) -> FusedSAP:
    """A step without an update, with V on its own rows; leaves gradients."""
    probes = ProbeSet(case.model, [1, 2], size=0.05, rho=1e-3, rows=rows, own_rows=True)
    optimizer = FusedSAP(case.trained, probes, lr=0.0)
    optimizer.passes.measures_lean = True
    run = run or task
    optimizer.step(partial(run, case), partial(safety, case), batch)
    return optimizer


def gradients(case: Problem) -> list[Tensor]:
    return [p.grad.clone() for p in case.trained if p.grad is not None]


def test_own_rows_take_a_larger_probe_and_the_others_none() -> None:
    case, plain = problem(), problem()
    batch = random_batch(rows=4, seed=4)
    batch["labels"][1] = -100  # so that they are rows 0 and 2
    inputs: list[Tensor] = []
    above = case.model.get_base_model().model.layers[2]
    handle = above.register_forward_pre_hook(lambda m, args: inputs.append(args[0].detach()))
    optimizer, other = own_rows_step(case, 0.5, batch), sap(plain, 0.5)
    other.inner_passes(partial(task, plain), partial(safety, plain), batch)
    assert optimizer.probes is not None and other.probes is not None
    for index, offset in other.probes.offsets.items():
        torch.testing.assert_close(optimizer.probes.offsets[index], offset * 2**0.5)
    # What the lowest probed layer gave in the task pass, and what it gives without a probe.
    with torch.no_grad():
        naive_task_loss(case.model, batch)
    handle.remove()
    shift = inputs[-2] - inputs[-1]
    assert torch.equal(shift[[1, 3]], torch.zeros_like(shift[[1, 3]]))
    torch.testing.assert_close(
        shift[[0, 2]],
        optimizer.probes.offsets[1].expand_as(shift[[0, 2]]),
        rtol=1e-4,
        atol=1e-6,
    )


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("accumulated", [False, True])
def test_the_lean_is_that_of_the_whole_batch(own: bool, accumulated: bool) -> None:
    case = problem(dtype=torch.float64)
    batch = random_batch(rows=4, seed=4)
    halves = [
        {key: value[rows] for key, value in batch.items()} for rows in (slice(2), slice(2, 4))
    ]
    tokens = int((batch["labels"][:, 1:] != -100).sum())

    def of_tokens(part: Any) -> Tensor:
        losses = []
        for one in part if accumulated else [part]:
            scored_tokens = int((one["labels"][:, 1:] != -100).sum())
            losses.append(naive_task_loss(case.model, one) * scored_tokens / tokens)
            losses[-1].backward()
        return torch.stack(losses).sum().detach()

    probes = ProbeSet(case.model, [1, 2], size=0.05, rho=1e-3, rows=0.25, own_rows=own)
    optimizer = FusedSAP(case.trained, probes, lr=0.0)
    given = halves if accumulated else batch
    for measures in (False, True):
        optimizer.passes.measures_lean = measures
        optimizer.step(of_tokens, partial(safety, case), given)
        metrics = optimizer.metrics
        part = sum((probes.estimates[j] * v).sum().item() for j, v in probes.offsets.items())
        assert metrics.lean_of_rows == pytest.approx(part, rel=1e-9) and part > 0
        assert (metrics.lean is None) != measures
    by_token = oracle(case, batch, (*batch["input_ids"].shape, HIDDEN))
    if own:
        by_token = {j: h[:1] for j, h in by_token.items()}
    exact = sum((h.sum((0, 1)) * probes.offsets[j]).sum().item() for j, h in by_token.items())
    assert metrics.lean == pytest.approx(exact, rel=1e-4)
    if not own:
        assert abs(exact / part - 1) > 0.1  # another figure than that of the part


def test_the_lean_is_known_for_nothing_where_all_rows_are_seen() -> None:
    case = problem()
    optimizer = sap(case, 1.0)
    optimizer.passes.measures_lean = True
    passes: list[int] = []

    def counted(part: Any) -> Tensor:
        passes.append(1)
        return task(case, part)

    optimizer.step(counted, partial(safety, case), random_batch(rows=4))
    assert optimizer.metrics.lean is not None and optimizer.metrics.lean_of_rows is None
    assert len(passes) == 3


def with_shared_prefix() -> Batch:
    """Two rows that are scored and two that are not first, all of one prompt."""
    batch = random_batch(rows=4, length=16, seed=4)
    batch["input_ids"][:, :5] = batch["input_ids"][0, :5]
    return batch


@pytest.mark.parametrize("accumulated", [False, True])
def test_own_rows_are_found_in_packed_rows_and_in_micro_batches(
    accumulated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = with_shared_prefix()
    batch["labels"][0] = -100  # so that the second and the third are taken
    parts = (slice(2), slice(2, 4)) if accumulated else (slice(4),)
    given: Any = [{key: value[part] for key, value in batch.items()} for part in parts]
    found, packed_shapes = [], []
    for pack in (True, False):
        case = problem(lora=False)
        case = case._replace(model=tiny_llama(attention="sdpa"))

        def run(case: Problem, part: Any, pack: bool = pack) -> Tensor:
            losses = [task_loss(case.model, one, num_items=30, pack=pack) for one in part]
            for loss in losses:
                loss.backward()
            return torch.stack(losses).sum().detach()

        if pack:
            body = case.model.model
            forward = body.forward

            def spied(*args: Any, forward: Any = forward, **kwargs: Any) -> Any:
                packed_shapes.append(tuple(kwargs["input_ids"].shape))
                return forward(*args, **kwargs)

            spied.reads_no_rows = True  # type: ignore[attr-defined]
            monkeypatch.setattr(body, "forward", spied)
        optimizer = own_rows_step(case, 0.5, given, run)
        assert optimizer.probes is not None
        found.append((gradients(case), list(optimizer.probes.offsets.values())))
    (packed, packed_v), (padded, padded_v) = found
    assert any(rows < 4 and length > 16 for rows, length in packed_shapes)
    assert distance(packed_v, padded_v) < 1e-4
    assert distance(packed, padded) < 1e-5


def test_own_rows_that_cannot_be_told_are_an_error_and_leave_nothing_behind() -> None:
    case = problem()
    batch = random_batch(rows=4, seed=4)

    def twice(case: Problem, part: Batch) -> Tensor:
        task(case, part)
        return task(case, part)

    with pytest.raises(RuntimeError, match=r"own_rows=True: forward pass 2 of the step has 4 rows"):
        own_rows_step(case, 0.5, batch, twice)
    before = [parameter.detach().clone() for parameter in case.trained]
    own_rows_step(case, 0.5, batch)
    assert_same_bits(before, [parameter.detach() for parameter in case.trained])
