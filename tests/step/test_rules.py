"""Rules of blending, against gradients that were worked out by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast import BlendedAdamW, SafetyPasses
from sap_fast.step.rules import RULES, Rule
from tests.tiny import assert_same_bits, plain_adamw, problem, safety_loss, task, weights

pytestmark = pytest.mark.usefixtures("cpu_backend")

SCALE = 2.0**12


def name_of(value: Any) -> str:
    """The same in every process: the address of a function is not."""
    return getattr(value, "__name__", str(value))


def some_function(g_square: Tensor, g_dot_d: Tensor, d_square: Tensor) -> Tensor:
    """A rule of the user's own: c = (‖g‖² + ⟨g, d⟩)/(‖d‖² + 1)."""
    return (g_square + g_dot_d) / (d_square + 1)


#: The task gradient g, the safety gradient d and what is to come out, each of two parameters of one
#: element; by hand:
CASES: list[tuple[Rule, float, tuple[float, float], tuple[float, float], tuple[float, float]]] = [
    # ‖g‖ = 5, ‖d‖ = 2: c = 0.5·5/2 = 1.25
    ("blend", 0.5, (3, 4), (0, 2), (3, 6.5)),
    ("blend", 0.5, (3, -4), (0, 2), (3, -1.5)),
    # ‖g‖ = 13, ‖d‖ = 5: c = 0.2·13/5 = 0.52
    ("blend", 0.2, (5, 12), (3, -4), (6.56, 9.92)),
    # ⟨g, d⟩ = 8: points away from harm already
    ("project", 1.0, (3, 4), (0, 2), (3, 4)),
    # ⟨g, d⟩ = −8, ‖d‖² = 4: c = 2, whatever the weight
    ("project", 1.0, (3, -4), (0, 2), (3, 0)),
    ("project", 0.1, (3, -4), (0, 2), (3, 0)),
    # ⟨g, d⟩ = 15 − 48 = −33, ‖d‖² = 25: c = 1.32
    ("project", 1.0, (5, 12), (3, -4), (8.96, 6.72)),
    # wanted 0.6·5 = 3 along d/‖d‖, there are 4
    ("floor", 0.6, (3, 4), (0, 2), (3, 4)),
    # there are −4: c = (3 + 4)/2 = 3.5
    ("floor", 0.6, (3, -4), (0, 2), (3, 3)),
    # wanted 0.5·13 = 6.5, there are −33/5 = −6.6: c = 13.1/5 = 2.62
    ("floor", 0.5, (5, 12), (3, -4), (12.86, 1.52)),
    # ‖g‖² = 25, ⟨g, d⟩ = −8, ‖d‖² = 4: c = 17/5 = 3.4
    (some_function, 1.0, (3, -4), (0, 2), (3, 2.8)),
    # ‖g‖² = 169, ⟨g, d⟩ = −33, ‖d‖² = 25: c = 136/26
    (some_function, 1.0, (5, 12), (3, -4), (5 + 3 * 136 / 26, 12 - 4 * 136 / 26)),
]

#: Beside the plain step: every combination of these.
WAYS = [
    frozenset(chosen)
    for count in range(5)
    for chosen in itertools.combinations(("accumulated", "clipped", "maximized", "scaled"), count)
]


class Given:
    """Two parameters of one element, and functions whose gradients are the ones given."""

    def __init__(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self.params = [nn.Parameter(torch.tensor([v])) for v in (0.5, -0.25)]
        self.scaler = scaler

    def backward(self, gradients: tuple[float, ...]) -> Tensor:
        loss = torch.stack([p.sum() * g for p, g in zip(self.params, gradients, strict=True)]).sum()
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss


def scaler_for(way: frozenset[str]) -> torch.amp.GradScaler | None:
    return torch.amp.GradScaler("cpu", init_scale=SCALE) if "scaled" in way else None


def run_passes(
    given: Given, passes: Any, g: tuple[float, float], d: tuple[float, float], way: frozenset[str]
) -> None:
    """The inner passes, and the task pass in one or in two micro-batches."""
    sign = -1 if "maximized" in way else 1  # the gradient that is gone down is −g then
    passes.inner_passes(lambda _: given.backward((0, 0)), lambda: given.backward(d))
    shares = [(0.25, 3.0), (0.75, -3.0)] if "accumulated" in way else [(1.0, 0.0)]
    for share, more in shares:
        with passes.task_pass():
            given.backward((sign * (share * g[0] + more), sign * (share * g[1] - more)))


def clipped(expected: tuple[float, float], way: frozenset[str]) -> list[float]:
    norm = (expected[0] ** 2 + expected[1] ** 2) ** 0.5
    return [value * (min(1, 2 / norm) if "clipped" in way else 1) for value in expected]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(sorted(way)) or "plain")
@pytest.mark.parametrize(("rule", "weight", "g", "d", "expected"), CASES, ids=name_of)
def test_the_update_is_made_with_the_gradient_worked_out_by_hand(
    rule: Rule,
    weight: float,
    g: tuple[float, float],
    d: tuple[float, float],
    expected: tuple[float, float],
    way: frozenset[str],
) -> None:
    scaler = scaler_for(way)
    given = Given(scaler)
    optimizer = BlendedAdamW(
        [{"params": given.params, "maximize": "maximized" in way}],
        lr=0.0,
        safety_weight=weight,
        safety_level=None,
        rule=rule,
        max_grad_norm=2.0 if "clipped" in way else None,
        grad_scaler=scaler,
    )
    run_passes(given, optimizer, g, d, way)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
    # A tenth of the gradient is what the first moment holds after one step.
    found = [10 * optimizer.state[p]["exp_avg"].item() for p in given.params]
    assert found == pytest.approx(clipped(expected, way), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(sorted(way)) or "plain")
@pytest.mark.parametrize(("rule", "weight", "g", "d", "expected"), CASES, ids=name_of)
def test_another_optimizer_finds_it_in_the_gradients(
    rule: Rule,
    weight: float,
    g: tuple[float, float],
    d: tuple[float, float],
    expected: tuple[float, float],
    way: frozenset[str],
) -> None:
    scaler = scaler_for(way)
    given = Given(scaler)
    before = [p.item() for p in given.params]
    passes = SafetyPasses(given.params, safety_weight=weight, rule=rule, grad_scaler=scaler)
    passes.maximize = "maximized" in way
    sgd = torch.optim.SGD(given.params, lr=0.5, maximize=passes.maximize)
    run_passes(given, passes, g, d, way)
    if scaler is not None:
        scaler.unscale_(sgd)
    passes.blend_()
    if "clipped" in way:
        torch.nn.utils.clip_grad_norm_(given.params, 2.0)
    if scaler is None:
        sgd.step()
    else:
        scaler.step(sgd)
    passes.end_step()
    moved = [(b - p.item()) / 0.5 for b, p in zip(before, given.params, strict=True)]
    assert moved == pytest.approx(clipped(expected, way), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_gradients_that_are_still_scaled_may_be_blended(rule: Rule) -> None:
    """c grows with g in the named rules, so that a scale of both falls out of it."""
    found = []
    for unscaled_first in (True, False):
        scaler = scaler_for(frozenset({"scaled"}))
        given = Given(scaler)
        passes = SafetyPasses(given.params, safety_weight=0.5, rule=rule, grad_scaler=scaler)
        sgd = torch.optim.SGD(given.params, lr=0.5)
        run_passes(given, passes, (5, 12), (3, -4), frozenset())
        if unscaled_first:
            scaler.unscale_(sgd)
        passes.blend_()
        scaler.step(sgd)
        found.append([p.detach().clone() for p in given.params])
    assert_same_bits(*found)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(sorted(way)) or "plain")
def test_a_function_is_told_the_three_numbers_without_any_scale(way: frozenset[str]) -> None:
    told: list[tuple[Tensor, ...]] = []

    def rule(*numbers: Tensor) -> Tensor:
        told.append(numbers)
        assert not torch.is_grad_enabled()
        return torch.zeros(())

    scaler = scaler_for(way)
    given = Given(scaler)
    optimizer = BlendedAdamW(
        [{"params": given.params, "maximize": "maximized" in way}],
        safety_weight=1.0,
        safety_level=None,
        rule=rule,
        max_grad_norm=2.0 if "clipped" in way else None,
        grad_scaler=scaler,
    )
    run_passes(given, optimizer, (5, 12), (3, -4), way)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
    ((g_square, g_dot_d, d_square),) = told  # once per step
    assert all(number.shape == () and number.dtype == torch.float32 for number in told[0])
    assert (g_square, g_dot_d, d_square) == (169, -33, 25)


def test_parameters_that_only_one_of_the_gradients_reaches() -> None:
    both, task_only, safety_only = (nn.Parameter(torch.ones(1)) for _ in range(3))
    told = []

    def rule(*numbers: Tensor) -> Tensor:
        told.append([number.item() for number in numbers])
        return torch.tensor(0.5)

    def backward(pairs: list[tuple[nn.Parameter, float]]) -> Tensor:
        loss = torch.stack([p.sum() * g for p, g in pairs]).sum()
        loss.backward()
        return loss

    params = [both, task_only, safety_only]
    optimizer = BlendedAdamW(params, lr=0.0, safety_weight=1.0, safety_level=None, rule=rule)
    optimizer.step(
        lambda: backward([(both, 3.0), (task_only, 4.0)]),
        lambda: backward([(both, 2.0), (safety_only, 6.0)]),
    )
    assert told == [[25.0, 6.0, 40.0]]
    found = [10 * optimizer.state[p]["exp_avg"].item() for p in (both, task_only)]
    assert found == pytest.approx([4.0, 4.0], rel=1e-6)
    # What the task does not reach is left alone, as AdamW leaves it.
    assert safety_only not in optimizer.state and safety_only.grad is None


# ---- on a model ----


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("rule", [*RULES, some_function], ids=name_of)
def test_a_step_of_a_model_is_adamw_on_the_gradient_of_the_rule(
    rule: Rule, sign: float, cpu_backend: str
) -> None:
    gamma, limit = 0.3, 0.2
    ours, theirs = problem(), problem()
    settings: dict[str, Any] = {"lr": 3e-3, "eps": 1e-7, "weight_decay": 0.1}

    def signed(backward: bool) -> Tensor:
        loss = sign * safety_loss(ours)
        loss.backward()
        return loss

    optimizer = BlendedAdamW(
        ours.trained,
        safety_weight=gamma,
        safety_level=None,
        rule=rule,
        max_grad_norm=limit,
        **settings,
    )
    optimizer.step(lambda: task(ours), lambda: signed(True))

    d = torch.cat([x.flatten() for x in torch.autograd.grad(safety_loss(theirs), theirs.trained)])
    d = sign * d.double()
    task(theirs)
    g = torch.cat([p.grad.flatten() for p in theirs.trained]).double()
    length, along = d.norm(), g.dot(d)
    if rule == "blend":
        c = gamma * g.norm() / length
    elif rule == "project":
        c = -along / length**2 if along < 0 else torch.tensor(0.0)
    elif rule == "floor":
        missing = gamma * g.norm() - along / length
        c = missing / length if missing > 0 else torch.tensor(0.0)
    else:
        c = some_function(g.dot(g), along, d.dot(d))
    blended = (g + c * d).float()
    sizes = [p.numel() for p in theirs.trained]
    for p, part in zip(theirs.trained, blended.split(sizes), strict=True):
        p.grad.copy_(part.view_as(p))
    assert torch.nn.utils.clip_grad_norm_(theirs.trained, limit) > 2 * limit
    plain_adamw(theirs.trained, **settings).step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def vectors(seed: int) -> tuple[Tensor, Tensor]:
    g, d = torch.randn(2, 17, generator=torch.Generator().manual_seed(seed))
    return g, (-1.0 if seed % 2 else 1.0) * (g.dot(d).sign() * d + g)


def blended(rule: Rule, weight: float, g: Tensor, d: Tensor, **options: Any) -> Tensor:
    """What the moments hold of g′ after one step."""
    parameter = nn.Parameter(torch.zeros(17))

    def backward(gradient: Tensor) -> Tensor:
        loss = parameter.dot(gradient)
        loss.backward()
        return loss

    optimizer = BlendedAdamW(
        [parameter], lr=0.0, safety_weight=weight, safety_level=None, rule=rule, **options
    )
    optimizer.step(lambda: backward(g), lambda: backward(d))
    return optimizer.state[parameter]["exp_avg"]


@pytest.mark.parametrize("seed", range(6))
def test_project_and_floor_leave_what_they_promise_and_alone_what_is_good_already(
    seed: int,
) -> None:
    g, d = vectors(seed)
    conflict = bool(g.dot(d) < 0)
    assert conflict == bool(seed % 2)
    plain = blended(lambda *_: torch.zeros(()), 1.0, g, d)
    projected, floored = blended("project", 1.0, g, d), blended("floor", 0.3, g, d)
    if conflict:
        assert abs(10 * projected.dot(d)) < 1e-5 * g.norm() * d.norm()
        torch.testing.assert_close(10 * floored.dot(d) / d.norm(), 0.3 * g.norm())
    else:
        assert torch.equal(projected, plain)
        assert g.dot(d) / d.norm() > 0.3 * g.norm()
        assert torch.equal(floored, plain)


@pytest.mark.parametrize("rule", [*RULES, some_function], ids=name_of)
@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf")])
@pytest.mark.filterwarnings("ignore:sap_fast. 1 step")
def test_without_a_direction_every_rule_leaves_the_gradient_as_it_is(
    rule: Rule, poison: float
) -> None:
    g, d = vectors(1)
    plain = blended(lambda *_: torch.zeros(()), 1.0, g, d, max_grad_norm=1.0)
    assert torch.equal(blended(rule, 0.5, g, poison * d, max_grad_norm=1.0), plain)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rule", ["blend", "project", "floor"])
def test_a_gradient_that_is_taken_away_whole_is_zero_and_not_nan(rule: Rule, seed: int) -> None:
    # g = −k·d: rounding may leave ‖g′‖² below zero, whose root the clipping takes.
    g, _ = vectors(seed)
    d = -g / 3.3
    weight = 1e-7 if rule == "floor" else 1.0
    found = blended(rule, weight, g, d, max_grad_norm=1.0)
    assert found.isfinite().all() and found.norm() < 1e-4 * g.norm()


# ---- errors ----


@pytest.mark.parametrize("rule", ["project", "floor", some_function], ids=name_of)
def test_a_rule_without_a_weight_is_refused(rule: Rule) -> None:
    params = [nn.Parameter(torch.ones(1))]
    for build in (SafetyPasses, BlendedAdamW):
        with pytest.raises(ValueError, match=r"rule=.* with safety_weight=0 blends nothing"):
            build(params, safety_weight=0, rule=rule)
        build(params, safety_weight=0.1, rule=rule)
        build(params, safety_weight=0, rule="blend")


def test_an_unknown_rule_is_named_with_those_there_are() -> None:
    unknown: list[tuple[Callable[..., Any], Any]] = [(SafetyPasses, "sign"), (BlendedAdamW, "sum")]
    for build, rule in unknown:
        with pytest.raises(ValueError, match=rf"rule='{rule}'.*blend, project, floor.*function"):
            build([nn.Parameter(torch.ones(1))], rule=rule)
