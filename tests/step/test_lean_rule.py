"""`ProbeSet(rule="lean")`: a probe as large as makes the gradient lean by a part of its length."""

from __future__ import annotations

import math
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast import FusedSAP, ProbeSet
from sap_fast.model.probes import LARGEST_OFFSET
from tests.tiny import (
    Problem,
    assert_same_bits,
    closures,
    problem,
    random_batch,
    safety,
    task,
    weights,
)

LAMBDA = 0.002
ROWS = 4


def leaning(case: Problem, size: float = LAMBDA, **options: Any) -> FusedSAP:
    keys = ("rows", "own_rows")
    probe = {key: options.pop(key) for key in keys if key in options}
    probes = ProbeSet(case.model, layers=[1, 2], size=size, rule="lean", rho=1e-3, **probe)
    return FusedSAP(case.trained, probes, lr=1e-2, **options)


def step(case: Problem, optimizer: FusedSAP) -> float:
    """Take a step on four rows, and return ‖g‖ of its task pass."""
    batch = random_batch(rows=ROWS, seed=4)
    optimizer.zero_grad()
    optimizer.inner_passes(partial(task, case), partial(safety, case), batch)
    with optimizer.task_pass():
        task(case, batch)
    length = gradient(case).norm().item()
    optimizer.step()
    return length


def gradient(case: Problem) -> Tensor:
    return torch.cat([p.grad.flatten() for p in case.trained if p.grad is not None])


@pytest.mark.parametrize("rows", [1.0, 0.5, 0.25])
def test_the_lean_is_a_part_of_the_length_of_the_gradient_before(rows: float) -> None:
    case = problem()
    optimizer = leaning(case, rows=rows)
    length = step(case, optimizer)
    # Nothing to go by yet.
    assert all(v.norm() == 0 for v in optimizer.probes.offsets.values())
    for _ in range(3):
        before, length = length, step(case, optimizer)
        metrics = optimizer.metrics
        seen = metrics.lean if rows == 1 else metrics.lean_of_rows
        assert seen == pytest.approx(LAMBDA * before / rows, rel=1e-4)
        # The shape is that of "normalized": as large in every layer.
        first, second = metrics.probe_sizes.values()
        assert first == pytest.approx(second, rel=1e-4) and 0 < first < LARGEST_OFFSET


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 0.02),
        # Half of the rows have more than half of the tokens here.
        ({"rows": 0.5, "own_rows": True}, 0.15),
    ],
    ids=["all", "own"],
)
def test_the_gradient_does_lean_by_that(options: dict[str, Any], tolerance: float) -> None:
    """Against the gradients themselves, with and without the probe."""
    case = problem()
    optimizer = leaning(case, **options)
    before = step(case, optimizer)
    batch = random_batch(rows=ROWS, seed=4)
    optimizer.zero_grad()
    task(case, batch)
    plain = gradient(case)
    optimizer.zero_grad()
    safety(case)
    harmful = -gradient(case)
    optimizer.zero_grad()
    optimizer.inner_passes(partial(task, case), partial(safety, case), batch)
    with optimizer.task_pass():
        task(case, batch)
    change = gradient(case) - plain
    lean = abs(torch.dot(change, harmful / harmful.norm()).item())
    assert lean == pytest.approx(LAMBDA * before, rel=tolerance)


def test_no_offset_is_longer_than_the_largest() -> None:
    case = problem()
    optimizer = leaning(case, size=1e3)
    for _ in range(2):
        step(case, optimizer)
    assert list(optimizer.metrics.probe_sizes.values()) == pytest.approx([LARGEST_OFFSET] * 2)


def test_a_probe_without_a_lean_is_none() -> None:
    case = problem()
    optimizer = leaning(case, size=0.0)
    for _ in range(2):
        step(case, optimizer)
    assert all(v.norm() == 0 for v in optimizer.probes.offsets.values())
    assert all(h.norm() > 0 for h in optimizer.probes.estimates.values())


def test_a_scaled_loss_leaves_every_bit() -> None:
    runs = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)):
        case = problem()
        optimizer = leaning(case, grad_scaler=scaler)
        task_of, safety_of = closures(case, scaler)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.inner_passes(task_of, safety_of)
            with optimizer.task_pass():
                task_of(None)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        runs.append(weights(case))
    assert_same_bits(*runs)


def test_a_gradient_that_overflows_is_no_length() -> None:
    case = problem()
    optimizer = leaning(case)
    length = step(case, optimizer)
    for gradient_is in (math.inf, length):
        optimizer.zero_grad()
        optimizer.inner_passes(lambda _: task(case), partial(safety, case))
        with optimizer.task_pass():
            task(case)
            next(p for p in case.trained if p.grad is not None).grad.mul_(gradient_is)
        optimizer.passes.end_step()
        assert optimizer.passes.gradient_norm is not None
        known = optimizer.passes.gradient_norm.item()
        assert (known == pytest.approx(length)) == math.isinf(gradient_is)


@pytest.mark.parametrize("how", ["state_dict", "sap_state", "pickle"])
def test_a_run_that_is_resumed_has_the_same_bits(how: str) -> None:
    through, stopped = problem(), problem()
    whole, first = leaning(through), leaning(stopped)
    for _ in range(4):
        step(through, whole)
    for _ in range(2):
        step(stopped, first)
    if how == "pickle":
        stopped, second = pickle.loads(pickle.dumps((stopped, first)))
    else:
        second = leaning(stopped)
        state = first.state_dict()
        if how == "sap_state":
            sap = first.sap_state.state_dict()
            del state["sap"]
            second.load_state_dict(state)
            second.sap_state.load_state_dict(sap)
        else:
            second.load_state_dict(state)
    for _ in range(2):
        step(stopped, second)
    assert_same_bits(weights(through), weights(stopped))


def test_a_step_that_fails_leaves_the_length() -> None:
    case = problem()
    optimizer = leaning(case)
    step(case, optimizer)
    known = optimizer.passes.gradient_norm

    def failing(_: Any) -> Tensor:
        if optimizer.passes.stage.value == "the task pass":
            task(case)
            raise ValueError("injected")
        return task(case)

    with pytest.raises(ValueError, match="injected"):
        optimizer.step(failing, partial(safety, case), case.batch)
    assert optimizer.passes.gradient_norm is known


def test_gradients_that_are_kept_elsewhere_are_an_error() -> None:
    case = problem()
    optimizer = leaning(case)
    optimizer.inner_passes(lambda _: task(case), partial(safety, case))
    with optimizer.task_pass():
        task(case)
        optimizer.zero_grad()
    optimizer.passes.end_step()
    with pytest.raises(RuntimeError, match='rule="lean" goes by the length of the task gradient'):
        optimizer.inner_passes(lambda _: task(case), partial(safety, case))
