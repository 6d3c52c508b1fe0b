"""What later steps depend on goes through state dicts and checkpoints, and V does not."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet, SafetyPasses
from tests.tiny import (
    Problem,
    assert_same_bits,
    closures,
    problem,
    random_batch,
    sap,
    spread,
    step_by_passes,
    task,
    weights,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")

#: (keywords of ProbeSet, None without a probe; keywords of the optimizer). The first two are the
#: recipes of the docs.
SETTINGS: list[tuple[dict[str, Any] | None, dict[str, Any]]] = [
    ({"rows": 0.5}, {"direction_every": 5}),
    ({"rows": 0.25}, {"direction_every": 10}),
    ({"rho": "auto"}, {"safety_weight": 0.1}),
    ({}, {"direction_every": 3, "safety_weight": 0.1, "safety_level": "auto"}),
    (None, {"direction_every": 3, "rule": "project"}),
    (None, {"safety_level": "auto"}),
]


def build(case: Problem, setting: tuple[dict[str, Any] | None, dict[str, Any]]) -> BlendedAdamW:
    probe, options = setting
    if probe is None:
        return BlendedAdamW(case.trained, lr=1e-2, **options)
    return sap(case, probe, **options)


def run(case: Problem, optimizer: BlendedAdamW, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        step_by_passes(case, optimizer, random_batch(rows=4, seed=step))


def through_a_file(case: Problem, optimizer: BlendedAdamW, other: Problem, fresh: Any) -> None:
    """By `torch.save`, as a training script does it."""
    buffer = io.BytesIO()
    torch.save({"model": case.model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other.model.load_state_dict(saved["model"])
    fresh.load_state_dict(saved["optimizer"])


def through_a_checkpoint(
    case: Problem, optimizer: BlendedAdamW, other: Problem, fresh: Any, folder: Path
) -> None:
    """By `torch.distributed.checkpoint`, into an optimizer that never ran."""

    def parts(case: Problem, optimizer: BlendedAdamW) -> dict[str, Any]:
        return {
            "model": get_model_state_dict(case.model),
            "optimizer": get_optimizer_state_dict(case.model, optimizer),
            "sap": optimizer.sap_state,
        }

    dcp.save(parts(case, optimizer), checkpoint_id=folder, no_dist=True)
    found = parts(other, fresh)
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    set_model_state_dict(other.model, found["model"])
    set_optimizer_state_dict(other.model, fresh, found["optimizer"])


@pytest.mark.parametrize(
    ("cpu_backend", "way", "after"),
    spread(
        [("native", "reference"), ("file", "checkpoint"), (1, 3)], {(0, 0, 0), (1, 0, 1), (0, 1, 1)}
    ),
    indirect=["cpu_backend"],
)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_resumed_run_goes_on_with_the_same_bits(
    setting: tuple[dict[str, Any] | None, dict[str, Any]], after: int, way: str, tmp_path: Path
) -> None:
    straight, resumed = (problem(dropout=0.1, layers=3) for _ in range(2))
    first = build(straight, setting)
    torch.manual_seed(3)
    run(straight, first, range(after))
    random_state = torch.get_rng_state()
    second = build(resumed, setting)
    if way == "file":
        through_a_file(straight, first, resumed, second)
    else:
        through_a_checkpoint(straight, first, resumed, second, tmp_path)
    torch.set_rng_state(random_state)
    run(straight, first, range(after, after + 4))
    torch.set_rng_state(random_state)
    run(resumed, second, range(after, after + 4))
    assert_same_bits(weights(straight), weights(resumed))
    assert first.passes.direction.taken == second.passes.direction.taken
    assert first.passes.steps == second.passes.steps == after + 4
    assert first.passes.calibration == second.passes.calibration
    assert first.metrics == second.metrics
    found, wanted = second.passes.direction, first.passes.direction
    assert_same_bits(found.tensors or [], wanted.tensors or [])


def test_passes_beside_another_optimizer_have_a_state_dict_of_their_own() -> None:
    straight, resumed = (problem(layers=3) for _ in range(2))

    def passes_of(case: Problem) -> tuple[SafetyPasses, torch.optim.Optimizer]:
        probes = ProbeSet(case.model, [1, 2], size=0.05)
        passes = SafetyPasses(case.trained, probes, safety_weight=0.1, direction_every=3)
        return passes, torch.optim.SGD(case.trained, lr=0.05)

    def steps(case: Problem, passes: SafetyPasses, sgd: torch.optim.Optimizer, n: int) -> None:
        for _ in range(n):
            sgd.zero_grad()
            passes.inner_passes(*closures(case))
            with passes.task_pass():
                task(case)
            passes.blend_()
            sgd.step()
            passes.end_step()

    first, second = passes_of(straight), passes_of(resumed)
    steps(straight, *first, 2)
    resumed.model.load_state_dict(straight.model.state_dict())
    second[0].load_state_dict(copy.deepcopy(first[0].state_dict()))
    for case, (passes, sgd) in ((straight, first), (resumed, second)):
        steps(case, passes, sgd, 2)
    assert_same_bits(weights(straight), weights(resumed))
    assert first[0].calibration == second[0].calibration is not None


def tensors_of(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def test_the_place_of_the_direction_is_there_before_the_first_step() -> None:
    case = problem()
    optimizer = sap(case, direction_every=2)
    names = {f"direction.{place}" for place in range(len(case.trained))}
    before = tensors_of(optimizer.sap_state.state_dict())
    assert set(before) == names
    for tensor, parameter in zip(before.values(), case.trained, strict=True):
        assert tensor.shape == parameter.shape and not tensor.any()
        assert not tensor.requires_grad
    step_by_passes(case, optimizer)
    after = tensors_of(optimizer.sap_state.state_dict())
    assert set(after) == names
    assert_same_bits(after.values(), optimizer.passes.direction.tensors or [])
    # Zeros that were saved in the place of a direction are none.
    fresh = sap(case, direction_every=2)
    fresh.sap_state.load_state_dict(sap(case, direction_every=2).sap_state.state_dict())
    assert fresh.passes.direction.is_due(1) and not fresh.passes.direction.is_there
    # Where no later step uses it, there is none.
    plain = sap(case)
    step_by_passes(case, plain)
    assert set(plain.sap_state.state_dict()) == {"sap"}


def test_a_parameter_that_the_direction_does_not_reach_has_a_place_all_the_same() -> None:
    case = problem()
    unused = torch.nn.Parameter(torch.ones(3))

    def build_one() -> FusedSAP:
        probes = ProbeSet(case.model, [1, 2], rho=1e-3)
        return FusedSAP([unused, *case.trained], probes, direction_every=2)

    optimizer, fresh = build_one(), build_one()
    step_by_passes(case, optimizer)
    state = optimizer.sap_state.state_dict()
    assert not state["direction.0"].any() and state["direction.1"].any()
    fresh.sap_state.load_state_dict(state)
    direction = fresh.passes.direction
    assert direction.norm == optimizer.passes.direction.norm
    assert not direction.is_due(fresh.passes.steps)
    step_by_passes(case, fresh)
    assert torch.equal(unused, torch.ones(3))


def test_the_direction_of_a_step_in_progress_is_in_no_state() -> None:
    case = problem()
    optimizer = sap(case, direction_every=2)
    empty = copy.deepcopy(optimizer.state_dict()["sap"])
    optimizer.inner_passes(*closures(case))
    state = optimizer.state_dict()["sap"]
    assert state["direction"] == empty["direction"] and state["steps"] == 0
    assert not any(t.any() for t in tensors_of(optimizer.sap_state.state_dict()).values())


def test_a_direction_that_was_not_saved_is_taken_anew() -> None:
    case = problem()
    optimizer = sap(case)
    step_by_passes(case, optimizer)
    other = sap(case, direction_every=5)
    other.load_state_dict(optimizer.state_dict())
    assert other.passes.direction.is_due(other.passes.steps)
    assert other.passes.steps == 1 and other.passes.direction.taken == 1


def test_loading_gives_a_step_in_progress_up() -> None:
    case = problem()
    optimizer = sap(case)
    step_by_passes(case, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.inner_passes(*closures(case))
    optimizer.load_state_dict(saved)
    assert not optimizer.probes.offsets and optimizer.passes.steps == 1
    with pytest.raises(RuntimeError, match="without inner_passes"), optimizer.task_pass():
        raise AssertionError("not reached")
