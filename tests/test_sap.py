"""FusedSAP: AdamW's bits where the probe is off, and a probe that leans away from harm."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sap_fast
from sap_fast import BlendedAdamW, FusedSAP, ProbeSet, SafetyPasses
from tests.oracle import naive_task_loss
from tests.tiny import (
    Problem,
    assert_same_bits,
    closures,
    plain_adamw,
    problem,
    random_batch,
    safety,
    sap,
    signature,
    spread,
    step_by_passes,
    task,
    two_groups,
    weights,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def in_groups(case: Problem, probe: dict[str, Any] | None = None, **options: Any) -> FusedSAP:
    """FusedSAP on two groups with settings of their own."""
    probes = ProbeSet(case.model, **({"layers": [1, 2], "rho": 1e-3} | (probe or {})))
    return FusedSAP(two_groups(case.trained), probes, **(SETTINGS | options))


def sap_step(case: Problem, optimizer: FusedSAP, step: int = 0) -> Tensor:
    optimizer.zero_grad()
    loss = optimizer.step(*closures(case), random_batch(seed=100 + step))
    assert loss is not None
    return loss


# ---- signatures ----

POSITION, KEYWORD = "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY"


def test_the_arguments_are_those_of_blended_adamw_and_a_probe_set() -> None:
    own = {"safety_weight": 0.0, "safety_level": None}
    expected = [
        (name, kind, own.get(name, default)) for name, kind, default in signature(BlendedAdamW)
    ]
    expected.insert(1, ("probes", POSITION, inspect.Parameter.empty))
    assert signature(FusedSAP) == expected
    assert len(expected) <= 14
    assert issubclass(FusedSAP, BlendedAdamW)


def test_what_the_probe_needs_belongs_to_the_probe_set() -> None:
    assert signature(ProbeSet) == [
        ("model", POSITION, inspect.Parameter.empty),
        ("layers", POSITION, "early"),
        ("size", KEYWORD, 3e-3),
        ("rule", KEYWORD, "normalized"),
        ("rho", KEYWORD, "auto"),
        ("difference", KEYWORD, "central"),
        ("rows", KEYWORD, 1.0),
        ("own_rows", KEYWORD, False),
        ("passes", KEYWORD, "two"),
        ("checkpointing", KEYWORD, "none"),
    ]


def test_the_passes_of_any_optimizer_take_what_is_theirs() -> None:
    assert signature(SafetyPasses) == [
        ("params", POSITION, inspect.Parameter.empty),
        ("probes", POSITION, None),
        ("safety_weight", KEYWORD, 0.3),
        ("safety_level", KEYWORD, None),
        ("rule", KEYWORD, "blend"),
        ("direction_every", KEYWORD, 1),
        ("backend", KEYWORD, "auto"),
        ("grad_scaler", KEYWORD, None),
    ]


def test_the_package_exports_what_users_rely_on() -> None:
    assert set(sap_fast.__all__) == {
        *("BlendedAdamW", "FusedSAP", "ProbeSet", "SafetyPasses", "SAPTrainer"),
        *("SAPTrainerMixin", "SAPMetrics", "task_loss", "contrastive_loss", "difference_loss"),
        *("refusal_loss", "joint_loss", "kl_loss"),
    }
    assert all(getattr(sap_fast, name) is not None for name in sap_fast.__all__)


# ---- AdamW ----


#: (keywords of ProbeSet, keywords of FusedSAP), with which the probe is off.
OFF: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"rho": 0.0}, {}),
    ({"size": 0.0}, {}),
    ({"rho": 0.0, "difference": "forward", "rule": "gradient"}, {"direction_every": 3}),
    ({"size": 0.0, "rule": "adam", "rho": "auto"}, {}),
    ({"size": 0.0, "rows": 0.5}, {"direction_every": 2}),
]


@pytest.mark.parametrize(
    ("cpu_backend", "lora", "variant"),
    spread(
        [("native", "reference"), (True, False), OFF],
        {(k % 2, 1 - k % 2, k) for k in range(len(OFF))},
    ),
    indirect=["cpu_backend"],
    ids=str,
)
def test_without_rho_or_size_twenty_steps_have_the_bits_of_adamw(
    lora: bool, variant: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    probe, options = variant
    ours, theirs = problem(lora=lora, dropout=0.1), problem(lora=lora, dropout=0.1)
    optimizer = in_groups(ours, probe, **options)
    adamw = plain_adamw(two_groups(theirs.trained), **SETTINGS)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20) for o in (optimizer, adamw)
    ]
    torch.manual_seed(7)
    for step in range(20):
        sap_step(ours, optimizer, step)
        schedules[0].step()
    torch.manual_seed(7)
    for step in range(20):
        adamw.zero_grad()
        task(theirs, random_batch(seed=100 + step))
        adamw.step()
        schedules[1].step()
    assert_same_bits(weights(ours), weights(theirs))
    assert optimizer.metrics.skipped_steps == 0
    assert_same_bits(optimizer.state_dict()["state"], adamw.state_dict()["state"])


def test_it_is_a_blended_adamw_that_blends_nothing_by_itself() -> None:
    case = problem()
    probes = ProbeSet(case.model)
    optimizer = FusedSAP(case.trained, probes)
    assert optimizer.probes is optimizer.passes.probes is probes
    assert optimizer.passes.safety_weight == 0 and optimizer.passes.safety_level is None


def test_the_probe_changes_the_update() -> None:
    ours, theirs = problem(), problem()
    sap_step(ours, sap(ours))
    sap_step(theirs, sap(theirs, {"size": 0.0}))
    assert any(not torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs), strict=True))


def test_a_step_without_closures_is_adamw_even_with_probes() -> None:
    ours, theirs = problem(), problem()
    optimizer = in_groups(ours)
    adamw = plain_adamw(two_groups(theirs.trained), **SETTINGS)
    task(ours)
    optimizer.step()
    task(theirs)
    adamw.step()
    assert_same_bits(weights(ours), weights(theirs))


def test_a_fresh_optimizer_with_zero_gradients_gets_all_its_state() -> None:
    # What torch.distributed.checkpoint does before it loads.
    case = problem()
    optimizer = in_groups(case, lr=0.0, direction_every=2)
    before = weights(case)
    for parameter in case.trained:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure=None)
    assert_same_bits(weights(case), before)
    for parameter in case.trained:
        assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


def test_the_state_of_torch_adamw_loads_and_theirs_loads_ours() -> None:
    case, other = problem(), problem()
    adamw = plain_adamw(two_groups(case.trained), **SETTINGS)
    task(case)
    adamw.step()
    optimizer = in_groups(case)
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    assert_same_bits(optimizer.state_dict()["state"], adamw.state_dict()["state"])
    sap_step(case, optimizer)
    back = plain_adamw(two_groups(other.trained), **SETTINGS)
    back.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_bits(back.state_dict()["state"], optimizer.state_dict()["state"])


def test_blending_and_a_probe_of_size_zero_are_blended_adamw() -> None:
    ours, theirs = problem(dropout=0.1), problem(dropout=0.1)
    options: dict[str, Any] = {"safety_weight": 0.4, "rule": "floor", "max_grad_norm": 0.5}
    optimizer = in_groups(ours, {"size": 0.0}, **options)
    other = BlendedAdamW(two_groups(theirs.trained), **SETTINGS, safety_level=None, **options)
    for case, either in ((ours, optimizer), (theirs, other)):
        torch.manual_seed(2)
        for step in range(3):
            either.zero_grad()
            step_by_passes(case, either, random_batch(seed=step))
    assert_same_bits(weights(ours), weights(theirs))


def test_both_ways_to_make_a_step_have_the_same_bits() -> None:
    runs = []
    for by_passes in (True, False):
        case = problem(dropout=0.1)
        optimizer = sap(case, {"rho": "auto", "rows": 0.5}, direction_every=2, safety_weight=0.2)
        torch.manual_seed(1)
        for step in range(4):
            optimizer.zero_grad()
            batch = random_batch(rows=4, seed=step)
            if by_passes:
                step_by_passes(case, optimizer, batch)
            else:
                optimizer.step(*closures(case), batch)
        runs.append((weights(case), optimizer.metrics.flat()))
    assert_same_bits(*runs)


# ---- the probe ----


@pytest.mark.parametrize("size", [0.02, 0.05])
def test_a_step_is_adamw_on_the_gradient_under_v(size: float) -> None:
    ours, theirs = problem(), problem()
    optimizer = sap(ours, {"size": size})
    optimizer.step(lambda: task(ours), lambda: safety(ours))
    layers = theirs.model.get_base_model().model.layers
    for index, v in optimizer.probes.offsets.items():
        layers[index].register_forward_hook(lambda m, a, output, v=v: output + v)
    task(theirs)
    plain_adamw(theirs.trained, lr=1e-2).step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lora", [True, False])
def test_the_update_leans_away_from_harm(lora: bool) -> None:
    case = problem(lora=lora)
    optimizer = sap(case, {"size": 0.01}, lr=0.0)
    sap_step(case, optimizer)
    assert optimizer.metrics.lean > 0


def test_maximize_is_the_descent_of_the_negated_objective() -> None:
    ours, theirs = problem(), problem()
    options: dict[str, Any] = {"lr": 3e-3, "safety_weight": 0.2, "max_grad_norm": 0.5}

    def build(case: Problem, maximize: bool) -> FusedSAP:
        probes = ProbeSet(case.model, [1, 2], rho=1e-3)
        group = {"params": case.trained, "maximize": maximize}
        optimizer = FusedSAP([group], probes, **options)
        return optimizer

    def negated() -> Tensor:
        loss = -naive_task_loss(ours.model, ours.batch)
        loss.backward()
        return loss

    up, down = build(ours, True), build(theirs, False)
    up.step(negated, lambda: safety(ours))
    down.step(lambda: task(theirs), lambda: safety(theirs))
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert up.metrics.lean == pytest.approx(down.metrics.lean, rel=1e-4)


# ---- state ----


def test_state_goes_through_a_file_mid_run() -> None:
    straight, resumed = problem(dropout=0.1), problem(dropout=0.1)
    probe, options = {"rho": "auto", "size": 0.05}, {"safety_weight": 0.1}
    first = in_groups(straight, probe, **options)
    torch.manual_seed(3)
    for step in range(2):
        sap_step(straight, first, step)
    random_state = torch.get_rng_state()
    buffer = io.BytesIO()
    torch.save({"model": straight.model.state_dict(), "optimizer": first.state_dict()}, buffer)
    for step in range(2, 4):
        sap_step(straight, first, step)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    second = in_groups(resumed, probe, **options)
    second.load_state_dict(saved["optimizer"])
    assert second.passes.calibration == first.passes.calibration is not None
    torch.set_rng_state(random_state)
    for step in range(2, 4):
        sap_step(resumed, second, step)
    assert_same_bits(weights(straight), weights(resumed))


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_an_optimizer_and_its_model_can_be_copied_whole(how: str) -> None:
    case = problem()
    optimizer = sap(case, {"rho": "auto"}, direction_every=2)
    sap_step(case, optimizer)
    pair = (case, optimizer)
    twin, other = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    assert other.probes.model is twin.model and other.probes is not optimizer.probes
    assert other.passes.probes is other.probes
    assert other.passes.calibration == optimizer.passes.calibration
    for step in (1, 2):
        sap_step(case, optimizer, step)
        sap_step(twin, other, step)
    assert_same_bits(weights(case), weights(twin))


def test_add_param_group_trains_the_new_parameters() -> None:
    case = problem()
    params = case.trained
    optimizer = FusedSAP(params[:2], ProbeSet(case.model, layers=[1], rho=1e-3), lr=1e-2)
    optimizer.add_param_group({"params": params[2:], "lr": 0.0})
    before = weights(case)
    moved: list[bool] = []

    def looking() -> Tensor:
        moved.append(
            all(
                not torch.equal(p, w)
                for p, w in zip(case.model.parameters(), before, strict=True)
                if any(p is q for q in params[2:])
            )
        )
        return task(case)

    optimizer.step(looking, lambda: safety(case))
    assert moved == [True, True, False], "the new ones are perturbed, too"
    changed = [not torch.equal(a, b) for a, b in zip(before, weights(case), strict=True)]
    names = [index for index, p in enumerate(case.model.parameters()) if p in set(params[:2])]
    assert [index for index, c in enumerate(changed) if c] == names


# ---- errors ----


def test_parameters_of_another_model_are_refused() -> None:
    case, other = problem(), problem()
    with pytest.raises(ValueError, match="share no parameter"):
        FusedSAP(other.trained, ProbeSet(case.model))


@pytest.mark.parametrize("given", [None, "early", problem], ids=["none", "text", "function"])
def test_what_is_no_probe_set_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=r"is no ProbeSet.*without a probe use BlendedAdamW"):
        FusedSAP([nn.Parameter(torch.ones(1))], given)


def test_missing_closures_are_named() -> None:
    case = problem()
    optimizer = sap(case)
    with pytest.raises(TypeError, match=r"needs a safety closure too: step\(task, safety\)"):
        optimizer.step(lambda: task(case))
    with pytest.raises(TypeError, match="without a task closure"):
        optimizer.step(None, lambda: safety(case))


def test_a_rule_of_blending_goes_with_a_weight() -> None:
    case = problem()

    def build(**options: Any) -> FusedSAP:
        return FusedSAP(case.trained, ProbeSet(case.model), **options)

    with pytest.raises(ValueError, match="rule='project' with safety_weight=0 blends nothing"):
        build(rule="project")
    assert build(rule="project", safety_weight=0.1).passes.rule == "project"
