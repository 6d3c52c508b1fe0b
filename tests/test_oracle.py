"""Every way of finding h, against fp64 double backward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast.optimizer import RHO_GRID, FusedSAP
from sap_fast.probes import ProbeSet
from tests.oracle import (
    cosine,
    naive_contrastive_loss,
    naive_task_loss,
    oracle_estimate,
    slope,
)
from tests.tiny import HIDDEN, Problem, problem

LAYERS = [1, 2]


def closures(case: Problem, autocast: bool = False) -> tuple[Any, Any]:
    def task() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = naive_task_loss(case.model, case.batch)
        loss.backward()
        return loss

    def safety() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = naive_contrastive_loss(case.model, case.chosen, case.rejected)
        loss.backward()
        return loss

    return task, safety


def losses(case: Problem) -> tuple[Any, Any]:
    """What `oracle_estimate` differentiates."""
    return (
        lambda: naive_task_loss(case.model, case.batch),
        lambda: naive_contrastive_loss(case.model, case.chosen, case.rejected),
    )


def exact(case: Problem, random_state: Tensor, per_token: bool = False) -> dict[int, Tensor]:
    """The oracle on an fp64 copy of the model."""
    twin = case._replace(model=copy.deepcopy(case.model).double())
    probes = ProbeSet(twin.model, layers=LAYERS)
    probes.detach()
    shape = (*case.batch["input_ids"].shape, HIDDEN) if per_token else (HIDDEN,)
    return oracle_estimate(*losses(twin), twin.trained, probes.modules, shape, random_state)


def estimate(
    case: Problem, random_state: Tensor, autocast: bool = False, **options: Any
) -> tuple[FusedSAP, ProbeSet]:
    """One step with lr=0; leaves h in the probe set."""
    shape = options.pop("shape", "hidden")
    probes = ProbeSet(case.model, layers=LAYERS, shape=shape)
    optimizer = FusedSAP(case.trained, probes, lr=0.0, **options)
    torch.set_rng_state(random_state)
    optimizer.step(*closures(case, autocast))
    return optimizer, probes


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("difference", ["central", "forward"])
def test_h_is_the_oracle_in_fp32(lora: bool, dropout: float, difference: str) -> None:
    case = problem(lora=lora, dropout=dropout)
    random_state = torch.get_rng_state()
    oracle = exact(case, random_state)
    optimizer, probes = estimate(case, random_state, difference=difference)
    # Measured: 1 − 2e-8 central, 1 − 3e-5 forward.
    assert cosine(probes.estimates, oracle) > (0.999999 if difference == "central" else 0.9995)
    for index in LAYERS:
        # The size too: h is in units of ∂_V⟨ĝ, ∇_W L⟩ whatever ρ was chosen.
        ratio = probes.estimates[index].norm() / oracle[index].norm()
        assert abs(ratio - 1) < (1e-3 if difference == "central" else 2e-2)
    assert optimizer.calibration is not None and optimizer.calibration.agreement > 0.999


@pytest.mark.parametrize(
    "options", [{}, {"difference": "forward"}, {"schedule": "lagged"}], ids=str
)
@pytest.mark.parametrize("lora", [True, False])
def test_h_is_the_oracle_under_bf16_autocast_with_dropout(
    lora: bool, options: dict[str, Any]
) -> None:
    case = problem(lora=lora, dropout=0.1)
    random_state = torch.get_rng_state()
    oracle = exact(case, random_state)
    _, probes = estimate(case, random_state, autocast=True, **options)
    assert probes.compute_dtype == torch.bfloat16
    # With full parameters no ρ brings a forward difference there: rounding below, curvature above.
    limit = 0.95 if lora or not options else 0.88
    assert cosine(probes.estimates, oracle) > limit


def test_different_dropout_masks_make_h_noise() -> None:
    # What paired randomness is for: the same step, with the generator moved on between passes.
    case = problem(dropout=0.1)
    random_state = torch.get_rng_state()
    oracle = exact(case, random_state)
    probes = ProbeSet(case.model, layers=LAYERS)
    optimizer = FusedSAP(case.trained, probes, lr=0.0, rho=2e-5)
    task, safety = closures(case)
    torch.set_rng_state(random_state)
    with optimizer.safety_pass():
        safety()
    for _ in optimizer.probe_passes():
        torch.manual_seed(torch.seed())
        task()
    assert cosine(probes.estimates, oracle) < 0.9


def test_h_does_not_depend_on_rho_inside_the_linear_range() -> None:
    case = problem()
    random_state = torch.get_rng_state()
    sizes = []
    for rho in (5e-4, 2e-3):
        _, probes = estimate(case.copy(), random_state, rho=rho)
        sizes.append(probes.estimates[1].norm())
    torch.testing.assert_close(sizes[0], sizes[1], rtol=1e-3, atol=0)


def test_central_differences_beat_forward_ones() -> None:
    case = problem(dtype=torch.float64)
    random_state = torch.get_rng_state()
    oracle = exact(case, random_state)
    errors = {}
    for difference in ("central", "forward"):
        for rho in (1e-2, 5e-3):
            _, probes = estimate(case.copy(), random_state, difference=difference, rho=rho)
            errors[difference, rho] = sum(
                (probes.estimates[index] - oracle[index]).norm() for index in LAYERS
            )
    # Error O(ρ²) against O(ρ): halving ρ divides it by four, or by two.
    assert 3.5 < errors["central", 1e-2] / errors["central", 5e-3] < 4.5
    assert 1.7 < errors["forward", 1e-2] / errors["forward", 5e-3] < 2.3


def test_h_per_token_is_the_oracle() -> None:
    case = problem(dropout=0.1)
    random_state = torch.get_rng_state()
    oracle = exact(case, random_state, per_token=True)
    _, probes = estimate(case, random_state, shape="token")
    assert probes.estimates[1].shape == oracle[1].shape
    assert cosine(probes.estimates, oracle) > 0.99999


def test_h_of_the_lagged_schedule_is_the_oracle_once_v_is_small() -> None:
    # The first lagged step differences at V = 0; its clean pass is the task pass.
    case = problem(dropout=0.1)
    random_state = torch.get_rng_state()
    oracle = exact(case, random_state)
    _, probes = estimate(case, random_state, schedule="lagged")
    assert cosine(probes.estimates, oracle) > 0.9995


def test_the_lagged_schedule_differences_around_the_v_of_the_step_before() -> None:
    # A large V moves h; both of its passes must see that V, or the difference is not one of W.
    case = problem(dtype=torch.float64)
    task, safety = closures(case)
    probes = ProbeSet(case.model, layers=LAYERS)
    optimizer = FusedSAP(case.trained, probes, lr=0.0, schedule="lagged", probe_lr=0.3, rho=1e-4)
    optimizer.step(task, safety)
    offsets = {index: v.clone() for index, v in probes.offsets.items()}
    optimizer.zero_grad()
    optimizer.step(task, safety)
    found = {index: h.clone() for index, h in probes.estimates.items()}
    probes.detach()

    shifted = oracle_estimate(
        *losses(case), case.trained, probes.modules, (HIDDEN,), around=offsets
    )
    assert cosine(found, shifted) > 0.9995


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("lora", [True, False])
def test_the_probe_makes_the_gradient_lean_away_from_the_harmful_direction(
    seed: int, lora: bool
) -> None:
    # ⟨ĝ, ∇L(W, V_safe)⟩ ≥ ⟨ĝ, ∇L(W, 0)⟩ to first order, by the square ‖h‖² of the paper's rule.
    case = problem(lora=lora, dtype=torch.float64, seed=seed)
    probes = ProbeSet(case.model, layers=LAYERS)
    optimizer = FusedSAP(
        case.trained,
        probes,
        lr=0.0,
        rho=1e-3,
        probe_rule="gradient",
        probe_lr=1.0,
        keep_direction=True,
    )
    optimizer.step(*closures(case))
    metrics = optimizer.metrics
    assert metrics.lean is not None and metrics.lean_predicted is not None
    assert metrics.lean_predicted > 0
    # The clean slope is differenced from losses: an error of O(ρ²) beside a lean of O(βρ).
    norm = metrics.perturbation_wanted
    assert norm is not None
    expected = norm * sum(h.square().sum().item() for h in probes.estimates.values())
    assert metrics.lean_predicted == pytest.approx(expected, rel=1e-9)

    probes.detach()
    clean = {index: torch.zeros_like(v) for index, v in probes.offsets.items()}
    slopes = [
        slope(*losses(case), case.trained, probes.modules, offsets).item()
        for offsets in (clean, probes.offsets)
    ]
    assert slopes[1] - slopes[0] == pytest.approx(metrics.lean_predicted, rel=2e-2)


@pytest.mark.parametrize(
    ("dtype", "rho", "tolerance"),
    # In fp32 the rounding of two losses shows that are 2ρ‖W‖ apart: 6 % at half of this ρ.
    [(torch.float64, "auto", 0.01), (torch.float32, RHO_GRID[5], 0.05)],
    ids=str,
)
def test_measured_lean_is_the_predicted_one(
    dtype: torch.dtype, rho: float | str, tolerance: float
) -> None:
    case = problem(dropout=0.1, dtype=dtype)
    optimizer, _ = estimate(
        case, torch.get_rng_state(), keep_direction=True, probe_lr=1e-3, rho=rho
    )
    metrics = optimizer.metrics
    assert metrics.lean == pytest.approx(metrics.lean_predicted, rel=tolerance)
    assert metrics.lean is not None and metrics.lean > 0


@pytest.mark.parametrize(
    ("lora", "autocast", "difference", "tolerance"),
    [
        (True, False, "central", 0.001),
        (True, True, "central", 0.005),
        (False, True, "central", 0.005),
        (True, True, "forward", 0.03),
        (False, True, "forward", 0.03),
    ],
)
def test_calibration_picks_a_rho_near_the_best_of_the_grid(
    lora: bool, autocast: bool, difference: str, tolerance: float
) -> None:
    case = problem(lora=lora, dropout=0.1)
    random_state = torch.get_rng_state()
    oracle = exact(case, random_state)
    cosines = {}
    for rho in RHO_GRID:
        _, probes = estimate(
            case.copy(), random_state, autocast=autocast, rho=rho, difference=difference
        )
        cosines[rho] = cosine(probes.estimates, oracle)
    optimizer, _ = estimate(case, random_state, autocast=autocast, difference=difference)
    assert optimizer.calibration is not None
    assert cosines[optimizer.calibration.rho] > max(cosines.values()) - tolerance
