"""ρ is found where h can be trusted most; all else stays as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast.step import calibration as module
from sap_fast.step.calibration import RHO_GRID, UNCALIBRATED_RHO, calibrate
from tests.tiny import (
    Problem,
    assert_same_bits,
    assert_unchanged,
    closures,
    norm_of,
    problem,
    random_batch,
    safety,
    safety_loss,
    sap,
    snapshot,
    step_by_passes,
    task,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")


def flat(case: Problem) -> Tensor:
    """A safety function that leaves a gradient of zeros."""
    loss = safety(case)
    for parameter in case.trained:
        parameter.grad = torch.zeros_like(parameter)
    return loss


# ---- in a step ----


def test_rho_is_calibrated_in_the_first_step_that_probes_and_again_when_asked() -> None:
    case = problem()
    optimizer = sap(case, {"rho": "auto"}, safety_level=1e3)
    passes = optimizer.passes
    assert passes.calibration is None and passes.rho == UNCALIBRATED_RHO
    step_by_passes(case, optimizer)
    assert passes.calibration is None, "a step that is held has no use for it"
    passes.safety_level = None
    steps = []
    for step in range(4):
        if step == 2:
            found = passes.calibrate(*closures(case))
            assert passes.calibration is found
        step_by_passes(case, optimizer, random_batch(seed=step))
        assert passes.calibration is not None
        steps.append(passes.calibration.step)
    assert steps == [1, 1, 3, 3]
    assert optimizer.metrics.rho == passes.calibration.rho == passes.rho
    assert optimizer.metrics.rho_agreement == passes.calibration.agreement


def test_a_rho_that_is_given_is_never_calibrated() -> None:
    case = problem()
    optimizer = sap(case, {"rho": 0.02})
    step_by_passes(case, optimizer)
    assert optimizer.passes.calibration is None
    assert optimizer.passes.rho == optimizer.metrics.rho == 0.02
    assert optimizer.metrics.rho_agreement is None


def test_the_step_that_calibrates_goes_on_as_if_its_rho_had_been_given() -> None:
    runs = []
    rho: Any = "auto"
    for _ in range(2):
        case = problem(dropout=0.1)
        optimizer = sap(case, {"rho": rho})
        torch.manual_seed(8)
        step_by_passes(case, optimizer)
        runs.append([p.detach().clone() for p in case.trained])
        rho = optimizer.passes.rho
    assert_same_bits(*runs)


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_calibration_changes_nothing_but_rho(difference: str) -> None:
    case = problem(dropout=0.1)
    optimizer = sap(case, {"rho": "auto", "difference": difference})
    task(case)
    before = snapshot(case.model)
    calibration = optimizer.passes.calibrate(*closures(case))
    assert calibration is not None and len(calibration.agreements) == 10
    assert_unchanged(case.model, before)
    assert not optimizer.probes.offsets
    found = calibration.agreements
    if difference == "forward":  # the error is O(ρ): the smaller one of the best pair
        best = max(found, key=lambda rho: found[rho])
        assert calibration.rho == best / 2
    else:  # it is O(ρ²): between two good pairs
        best = max(list(found)[1:], key=lambda rho: found[rho] + found[2 * rho])
        assert calibration.rho == best
    assert calibration.agreement == found[best]
    assert optimizer.passes.rho == calibration.rho
    # A step that was in progress is given up.
    optimizer.inner_passes(*closures(case))
    optimizer.passes.calibrate(*closures(case))
    with pytest.raises(RuntimeError, match="without inner_passes"), optimizer.task_pass():
        raise AssertionError("not reached")


def test_every_rho_of_the_grid_is_perturbed_by_exactly_and_with_the_same_direction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a calibration in a step measures must not depend on the direction being used up.
    monkeypatch.setattr(module, "RHO_GRID", (0.1, 0.05, 0.025))
    case = problem()
    optimizer = sap(case, {"rho": "auto"})
    params, start = case.trained, [p.detach().clone() for p in case.trained]
    direction = torch.autograd.grad(safety_loss(case), params)
    moved = []

    def looking(_: None) -> Tensor:
        moved.append([p.detach() - w for p, w in zip(params, start, strict=True)])
        return task(case)

    optimizer.inner_passes(looking, lambda: safety(case))
    expected = [(sign, rho) for rho in (0.1, 0.05, 0.025, optimizer.passes.rho) for sign in (1, -1)]
    assert len(moved) == len(expected)
    for by, (sign, rho) in zip(moved, expected, strict=True):
        scale = sign * rho * norm_of(start) / norm_of(list(direction))
        for change, d in zip(by, direction, strict=True):
            torch.testing.assert_close(change, scale * d, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("in_a_step", [True, False])
def test_calibration_without_a_direction_finds_nothing_and_says_so_once(in_a_step: bool) -> None:
    case = problem()
    optimizer = sap(case, {"rho": "auto"})
    with pytest.warns(UserWarning) as caught:
        for _ in range(2):
            if in_a_step:
                optimizer.step(lambda: task(case), lambda: flat(case))
            else:
                found = optimizer.passes.calibrate(lambda _: task(case), lambda: flat(case))
                assert found is None
    messages = [str(w.message) for w in caught if "calibration found no ρ" in str(w.message)]
    assert len(messages) == 1 and "0.1 … 9.8e-05" in messages[0] and "0.01 is used" in messages[0]
    assert optimizer.passes.calibration is None and optimizer.passes.rho == 1e-2
    # The next step tries again.
    step_by_passes(case, optimizer)
    assert optimizer.passes.calibration is not None


# ---- the choice ----


def cosines(found: dict[float, float], difference: str) -> tuple[float, float]:
    return module._most_trusted(found, difference)


def test_rho_is_taken_where_neither_curvature_nor_rounding_shows() -> None:
    # Cosines as found for SmolLM2 under bf16 autocast; h is nearest to the exact one at 0.025.
    found = {0.1: 0.931, 0.05: 0.981, 0.025: 0.98, 0.0125: 0.936, 0.00625: 0.859}
    assert cosines(found, "central") == (0.025, 0.98)
    assert cosines(found, "forward") == (0.025, 0.981)
    # Nothing to both sides.
    assert cosines({0.1: 0.9, 0.01: 0.95}, "central") == (0.01, 0.95)


def test_a_rho_with_an_h_that_is_no_number_or_zero_is_left_out() -> None:
    h = {rho: torch.tensor([1.0, 0.1 * rho]) for rho in RHO_GRID}
    h[RHO_GRID[0]] = torch.tensor([math.nan, 1.0])
    h[RHO_GRID[4]] = torch.zeros(2)
    found = calibrate(lambda rho: {3: h[rho]}, "central", step=7)
    assert found is not None and found.step == 7
    assert math.isnan(found.agreements[RHO_GRID[0]])
    assert found.rho not in (RHO_GRID[0], RHO_GRID[3], RHO_GRID[4])
    assert found.agreement == pytest.approx(1.0, abs=1e-4)
    nothing = calibrate(lambda rho: {3: torch.full((2,), math.nan)}, "central", step=0)
    assert nothing is None
