"""The level: what is left out while L_safe is not above it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet
from sap_fast.distributed import Ranks
from sap_fast.step.level import Level
from tests.tiny import (
    Problem,
    assert_same_bits,
    plain_adamw,
    problem,
    random_batch,
    safety,
    sap,
    spread,
    task,
    weights,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")

#: L_safe of the safety passes. "auto" takes the mean of the first three finite ones, 2.
LOSSES = [1.0, math.nan, 2.0, 3.0, 1.9, 2.1, 1.0]


def safety_that_returns(case: Problem, loss: float) -> Tensor:
    safety(case)
    return torch.tensor(loss)


@pytest.mark.parametrize(
    ("cpu_backend", "every"),
    spread([("native", "reference"), (1, 2)], {(0, 0), (1, 1)}),
    indirect=["cpu_backend"],
)
@pytest.mark.parametrize("what", ["blending", "probe", "both"])
@pytest.mark.parametrize(
    ("level", "above"),
    [
        (None, [True] * 7),
        (2.0625, [False, False, False, True, False, True, False]),
        # Not where L_safe is not known, whatever the gradient.
        ("auto", [True, False, True, True, False, True, False]),
    ],
    ids=str,
)
def test_a_level_leaves_out_probe_and_blending_at_and_below_it(
    level: float | str | None, above: list[bool], what: str, every: int
) -> None:
    case = problem(layers=3)

    def build() -> BlendedAdamW:
        options: dict[str, Any] = {"lr": 0.0, "direction_every": every, "safety_level": level}
        options["safety_weight"] = 0.0 if what == "probe" else 0.5
        if what == "blending":
            return BlendedAdamW(case.trained, **options)
        return FusedSAP(case.trained, ProbeSet(case.model, rho=1e-3, size=0.1), **options)

    optimizer = build()
    # Under lr=0 the moments show what a step was taken with.
    task(case)
    plain = [p.grad.clone() for p in case.trained if p.grad is not None]
    # No older direction serves before "auto" is known: three steps in a row have their own.
    first = [0, 1, 2] if level == "auto" else [0]
    passes = (first + [first[-1] + every * more for more in range(1, 7)])[: len(LOSSES)]
    for step in range(passes[-1] + every):
        if step == 4 * every + 1:  # goes on from a checkpoint
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = build()
            optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        calls = {"safety": 0, "task": 0}

        def counted(name: str, run: Callable[[], Tensor], calls: Any = calls) -> Tensor:
            calls[name] += 1
            return run()

        number = sum(taken <= step for taken in passes) - 1
        loss = LOSSES[number]
        optimizer.inner_passes(
            lambda _: counted("task", lambda: task(case)),
            lambda loss=loss: counted("safety", lambda: safety_that_returns(case, loss)),
        )
        is_above = above[number]
        probes = what != "blending" and is_above
        assert calls == {"safety": int(step in passes), "task": 2 if probes else 0}
        with optimizer.task_pass():
            task(case)
        before = [optimizer.state[p].get("exp_avg", torch.zeros_like(p)) for p in case.trained]
        before = [moment.clone() for moment in before]
        optimizer.step()
        used = [
            (optimizer.state[p]["exp_avg"] - 0.9 * moment) / 0.1
            for p, moment in zip(case.trained, before, strict=True)
        ]
        is_plain = all(
            torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(used, plain, strict=True)
        )
        assert is_plain != is_above, step
        assert optimizer.metrics.above_level == (None if level is None else is_above)
        found = 2.0 if number >= 3 else None
        assert optimizer.metrics.safety_level == (found if level == "auto" else level)


@pytest.mark.parametrize("with_probe", [True, False])
def test_steps_below_the_level_have_the_bits_of_adamw(with_probe: bool) -> None:
    ours, theirs = problem(dropout=0.1), problem(dropout=0.1)
    if with_probe:
        optimizer: BlendedAdamW = sap(ours, safety_level=1e3, safety_weight=0.3)
    else:
        optimizer = BlendedAdamW(ours.trained, lr=1e-2, safety_level=1e3)
    adamw = plain_adamw(theirs.trained, lr=1e-2, weight_decay=0.01)
    torch.manual_seed(3)
    for step in range(3):
        optimizer.zero_grad()
        optimizer.step(lambda step=step: task(ours, random_batch(seed=step)), lambda: safety(ours))
        assert optimizer.metrics.above_level is False
    torch.manual_seed(3)
    for step in range(3):
        adamw.zero_grad()
        task(theirs, random_batch(seed=step))
        adamw.step()
    assert_same_bits(weights(ours), weights(theirs))
    assert optimizer.metrics.skipped_steps == 0
    # And above it they do not.
    optimizer.passes.safety_level = 0.0
    optimizer.step(lambda: task(ours), lambda: safety(ours))
    task(theirs)
    adamw.step()
    assert any(not torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs), strict=True))


def test_without_a_weight_no_level_runs_a_safety_pass() -> None:
    case = problem()

    def never() -> Tensor:
        raise AssertionError("not reached")

    optimizer = BlendedAdamW(case.trained, safety_weight=0.0)
    assert optimizer.passes.safety_level == "auto"
    optimizer.step(lambda: task(case), never)
    optimizer.inner_passes(lambda _: never(), never)
    assert optimizer.metrics.safety_level is None


# ---- the level by itself ----


def measured(level: Level, *losses: float, settles: bool = True) -> list[bool]:
    above = []
    for loss in losses:
        level.measure(torch.tensor(loss), torch.device("cpu"), Ranks(None))
        above.append(not level.is_held)
        if settles:
            level.settle()
    return above


def test_the_mean_of_three_finite_losses_is_the_level() -> None:
    level = Level("auto")
    assert level.known is None and not level.is_held
    assert measured(level, 1.0, math.inf, 2.0) == [True, True, True]
    assert level.known is None, "infinity does not count"
    assert measured(level, 6.0) == [True]
    assert level.known == 3.0
    assert measured(level, 3.0, 3.5, 100.0, 2.9) == [False, True, True, False]
    assert level.known == 3.0, "later ones change nothing"


def test_a_loss_of_a_step_that_was_not_completed_does_not_count() -> None:
    level = Level("auto")
    measured(level, 5.0, 5.0, 5.0, settles=False)
    level.settle()
    assert level.known is None
    measured(level, 5.0, settles=False)
    level.forget()
    level.settle()
    assert level.known is None and level.above is None
    measured(level, 2.0, 2.0)
    assert level.known == 3.0


def test_without_a_level_nothing_is_held_and_nothing_measured() -> None:
    level = Level(None)
    assert measured(level, 1.0, -1.0) == [True, True]
    assert level.above is None and level.known is None


def test_what_the_level_knows_goes_through_a_state_dict() -> None:
    level, other = Level("auto"), Level("auto")
    measured(level, 1.0, 2.0, 3.0, 0.5)
    other.load_state_dict(copy.deepcopy(level.state_dict()))
    assert other.is_held and other.known == 2.0
    assert measured(other, 2.5, 1.5) == [True, False]


def test_the_first_three_steps_have_a_pass_for_the_level_in_whatever_process_they_run() -> None:
    level = Level("auto")
    for loss in (1.0, math.nan, 2.0):
        assert level.wants_pass
        other = Level("auto")
        other.load_state_dict(copy.deepcopy(level.state_dict()))
        assert other.wants_pass
        measured(level, loss)
    assert not level.wants_pass
    other = Level("auto")
    other.load_state_dict(copy.deepcopy(level.state_dict()))
    assert not other.wants_pass
    assert not Level(None).wants_pass and not Level(2.0).wants_pass


@pytest.mark.parametrize("setting", ["low", math.nan, math.inf, -math.inf])
def test_a_level_that_is_none_is_named(setting: Any) -> None:
    with pytest.raises(ValueError, match=rf'safety_level={setting!r}.*"auto", a number or None'):
        Level(setting)
