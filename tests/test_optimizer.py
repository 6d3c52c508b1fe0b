"""BlendedAdamW as a torch optimizer: AdamW's bits, state, groups, errors; and the blending."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast import BlendedAdamW, SafetyPasses
from sap_fast.ops import choose_backend
from tests.oracle import naive_task_loss
from tests.tiny import (
    Problem,
    assert_same_bits,
    assert_unchanged,
    closures,
    plain_adamw,
    problem,
    random_batch,
    safety,
    safety_loss,
    signature,
    snapshot,
    spread,
    step_by_passes,
    task,
    two_groups,
    weights,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def blended(case: Problem, **options: Any) -> BlendedAdamW:
    return BlendedAdamW(two_groups(case.trained), **(SETTINGS | {"safety_level": None} | options))


# ---- the signature ----


def test_the_arguments_are_those_of_adamw_and_eight_for_the_blending() -> None:
    position, keyword = "POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY"
    assert signature(BlendedAdamW) == [
        ("params", position, inspect.Parameter.empty),
        ("lr", position, 1e-4),
        ("betas", position, (0.9, 0.999)),
        ("eps", position, 1e-8),
        ("weight_decay", position, 0.01),
        ("safety_weight", keyword, 0.3),
        ("safety_level", keyword, "auto"),
        ("rule", keyword, "blend"),
        ("direction_every", keyword, 1),
        ("max_grad_norm", keyword, None),
        ("backend", keyword, "auto"),
        ("grad_scaler", keyword, None),
    ]
    assert [name for name, _, _ in signature(BlendedAdamW.step)] == [
        *("self", "task", "safety", "batch", "closure")
    ]
    assert signature(BlendedAdamW.inner_passes)[1:] == [
        ("task", position, inspect.Parameter.empty),
        ("safety", position, inspect.Parameter.empty),
        ("batch", position, None),
    ]


# ---- AdamW ----


@pytest.mark.parametrize(
    ("cpu_backend", "lora"),
    spread([("native", "reference"), (True, False)], {(0, 1), (1, 0)}),
    indirect=["cpu_backend"],
)
@pytest.mark.parametrize("how", ["closures", "passes", "step"])
def test_without_a_weight_twenty_steps_have_the_bits_of_adamw(how: str, lora: bool) -> None:
    ours, theirs = problem(lora=lora, dropout=0.1), problem(lora=lora, dropout=0.1)
    optimizer = blended(ours, safety_weight=0.0, direction_every=3)
    adamw = plain_adamw(two_groups(theirs.trained), **SETTINGS)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20) for o in (optimizer, adamw)
    ]
    torch.manual_seed(7)
    for step in range(20):
        batch = random_batch(seed=100 + step)
        optimizer.zero_grad()
        if how == "closures":
            loss = optimizer.step(lambda batch=batch: task(ours, batch), lambda: safety(ours))
            assert loss is not None and loss.requires_grad
        elif how == "passes":
            step_by_passes(ours, optimizer, batch)
        else:
            task(ours, batch)
            assert optimizer.step() is None
        schedules[0].step()
    torch.manual_seed(7)
    for step in range(20):
        adamw.zero_grad()
        task(theirs, random_batch(seed=100 + step))
        adamw.step()
        schedules[1].step()
    assert_same_bits(weights(ours), weights(theirs))
    assert optimizer.metrics.skipped_steps == 0
    # The states are each other's, but for what SAP adds.
    state, other = optimizer.state_dict(), adamw.state_dict()
    assert_same_bits(state["state"], other["state"])
    assert set(state) == {"state", "param_groups", "sap"}


def test_without_a_weight_one_closure_is_enough() -> None:
    ours, theirs = problem(), problem()
    optimizer = blended(ours, safety_weight=0.0)
    adamw = plain_adamw(two_groups(theirs.trained), **SETTINGS)
    assert optimizer.step(lambda: task(ours)) is not None
    optimizer.step(closure=lambda: task(ours))
    for _ in range(2):
        task(theirs)
        adamw.step()
    assert_same_bits(weights(ours), weights(theirs))


def test_a_step_without_closures_is_adamw_whatever_the_weight() -> None:
    ours, theirs = problem(), problem()
    optimizer = blended(ours)
    adamw = plain_adamw(two_groups(theirs.trained), **SETTINGS)
    task(ours)
    optimizer.step()
    task(theirs)
    adamw.step()
    assert_same_bits(weights(ours), weights(theirs))


def test_a_closure_of_hooks_runs_once_between_the_passes_and_the_update() -> None:
    ours, plain = problem(), problem()
    optimizer, other = blended(ours), blended(plain)
    seen = []
    for _ in range(2):
        for case, each in ((ours, optimizer), (plain, other)):
            each.zero_grad()
            each.inner_passes(*closures(case))
            with each.task_pass():
                task(case)
        before = weights(ours)
        # What Lightning calls, whose closures return nothing.
        optimizer.step(closure=lambda: seen.append(weights(ours)))
        assert_same_bits(seen[-1], before)
        other.step()
    assert len(seen) == 2 and optimizer.passes.steps == 2
    assert_same_bits(weights(ours), weights(plain))

    optimizer.inner_passes(*closures(ours))
    with optimizer.task_pass():
        task(ours)
    before = weights(ours)
    with pytest.raises(TypeError, match=r"has run already.*call step\(\) without closures"):
        optimizer.step(lambda: task(ours))
    assert_same_bits(weights(ours), before)


def test_a_fresh_optimizer_with_zero_gradients_gets_all_its_state() -> None:
    # What torch.distributed.checkpoint does before it loads.
    case = problem()
    optimizer = blended(case, lr=0.0)
    before = weights(case)
    for parameter in case.trained:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], Tensor) else 0.0
    optimizer.step(closure=None)
    assert_same_bits(weights(case), before)
    for parameter in case.trained:
        assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


def test_clipping_is_that_of_torch() -> None:
    ours, theirs = problem(), problem()
    optimizer = blended(ours, safety_weight=0.0, max_grad_norm=0.1)
    adamw = plain_adamw(two_groups(theirs.trained), **SETTINGS)
    task(ours)
    optimizer.step()
    task(theirs)
    norm = torch.nn.utils.clip_grad_norm_(theirs.trained, 0.1)
    assert norm > 0.2  # or nothing is clipped
    adamw.step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_a_norm_below_the_limit_is_not_clipped_at_all() -> None:
    runs = []
    for limit in (None, 1e6):
        case = problem()
        step_by_passes(case, blended(case, max_grad_norm=limit))
        runs.append(weights(case))
    assert_same_bits(*runs)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_lr_may_be_a_tensor(as_tensor: bool) -> None:
    ours, theirs = problem(), problem()
    lr = torch.tensor(2e-3) if as_tensor else 2e-3
    optimizer = BlendedAdamW(ours.trained, lr=lr)
    adamw = plain_adamw(theirs.trained, lr=float(lr))
    task(ours)
    optimizer.step()
    task(theirs)
    adamw.step()
    assert_same_bits(weights(ours), weights(theirs))


def test_both_ways_to_make_a_step_have_the_same_bits() -> None:
    runs = []
    for by_passes in (True, False):
        case = problem(dropout=0.1)
        optimizer = blended(case, safety_level="auto", max_grad_norm=0.5, direction_every=2)
        torch.manual_seed(1)
        for step in range(5):
            optimizer.zero_grad()
            batch = random_batch(seed=step)
            if by_passes:
                step_by_passes(case, optimizer, batch)
            else:
                optimizer.step(*closures(case), batch)
        runs.append((weights(case), optimizer.metrics.flat()))
    assert_same_bits(*runs)


# ---- blending ----


def test_gradient_blending_adds_gamma_times_the_norm_along_the_direction() -> None:
    gamma, limit = 0.3, 0.2
    ours, theirs = problem(), problem()
    optimizer = blended(ours, safety_weight=gamma, max_grad_norm=limit)
    optimizer.step(lambda: task(ours), lambda: safety(ours))

    direction = torch.autograd.grad(safety_loss(theirs), theirs.trained)
    length = torch.sqrt(sum((d * d).sum() for d in direction))
    task(theirs)
    norm = torch.sqrt(sum((p.grad * p.grad).sum() for p in theirs.trained))
    for parameter, d in zip(theirs.trained, direction, strict=True):
        parameter.grad += gamma * norm * d / length
    assert torch.nn.utils.clip_grad_norm_(theirs.trained, limit) > 2 * limit
    plain_adamw(two_groups(theirs.trained), **SETTINGS).step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_blending_goes_down_the_safety_loss() -> None:
    losses = {}
    for gamma in (0.0, 1.0):
        case = problem()
        optimizer = BlendedAdamW(
            case.trained, lr=1e-2, safety_weight=gamma, safety_level=None, weight_decay=0.0
        )
        for _ in range(5):
            optimizer.zero_grad()
            optimizer.step(lambda case=case: task(case), lambda case=case: safety(case))
        losses[gamma] = safety_loss(case).item()
    assert losses[1.0] < losses[0.0] - 0.1


# ---- maximize ----


@pytest.mark.parametrize("how", ["at the construction", "between steps", "loaded"])
def test_maximize_is_the_descent_of_the_negated_objective(how: str) -> None:
    ours, theirs = problem(), problem()
    options = {"safety_weight": 0.2, "max_grad_norm": 0.5, "rule": "floor", "safety_level": None}
    given = {"maximize": True} if how == "at the construction" else {}
    up = BlendedAdamW(two_groups(ours.trained, **given), **SETTINGS, **options)
    down = blended(theirs, **options)
    if how == "between steps":
        for group in up.param_groups:
            group["maximize"] = True
    elif how == "loaded":
        twin = [nn.Parameter(torch.zeros_like(p)) for p in ours.trained]
        other = BlendedAdamW(two_groups(twin, maximize=True), **SETTINGS, **options)
        up.load_state_dict(other.state_dict())

    def negated() -> Tensor:
        loss = -naive_task_loss(ours.model, ours.batch)
        loss.backward()
        return loss

    for _ in range(2):
        up.zero_grad()
        down.zero_grad()
        up.step(negated, lambda: safety(ours))
        down.step(lambda: task(theirs), lambda: safety(theirs))
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_maximize_without_blending_has_the_bits_of_adamw() -> None:
    ours, theirs = problem(), problem()
    optimizer = BlendedAdamW([{"params": ours.trained, "maximize": True}], **SETTINGS)
    adamw = plain_adamw(theirs.trained, **SETTINGS, maximize=True)
    for case, either in ((ours, optimizer), (theirs, adamw)):
        task(case)
        either.step()
    assert_same_bits(weights(ours), weights(theirs))


def test_groups_that_differ_in_maximize_are_refused_and_nothing_is_changed() -> None:
    case = problem()
    params = case.trained
    mixed = [{"params": params[:1]}, {"params": params[1:], "maximize": True}]
    message = r"maximize is \[False, True\] in the parameter groups; expected one value for all"
    with pytest.raises(ValueError, match=message):
        BlendedAdamW(mixed)
    optimizer = BlendedAdamW(params[:1], safety_level=None)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": params[1:], "maximize": True})
    assert len(optimizer.param_groups) == 1
    assert optimizer.passes.trained.parameters == params[:1]
    optimizer.add_param_group({"params": params[1:]})
    optimizer.param_groups[1]["maximize"] = True
    before = snapshot(case.model)
    for run in (
        lambda: optimizer.step(lambda: task(case), lambda: safety(case)),
        lambda: optimizer.inner_passes(*closures(case)),
        optimizer.step,
    ):
        with pytest.raises(ValueError, match=message):
            run()
        assert_unchanged(case.model, before)
    optimizer.param_groups[1]["maximize"] = False
    step_by_passes(case, optimizer)


# ---- state ----


def test_state_goes_through_a_file_mid_run() -> None:
    straight, resumed = problem(dropout=0.1), problem(dropout=0.1)
    options: dict[str, Any] = {"safety_level": "auto", "max_grad_norm": 0.5}
    first = blended(straight, **options)

    def run(case: Problem, optimizer: BlendedAdamW, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            optimizer.step(*closures(case), random_batch(seed=step))

    torch.manual_seed(3)
    run(straight, first, range(2))
    random_state = torch.get_rng_state()
    buffer = io.BytesIO()
    torch.save({"model": straight.model.state_dict(), "optimizer": first.state_dict()}, buffer)
    run(straight, first, range(2, 5))

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    second = blended(resumed, **options)
    second.load_state_dict(saved["optimizer"])
    torch.set_rng_state(random_state)
    run(resumed, second, range(2, 5))
    assert_same_bits(weights(straight), weights(resumed))
    assert first.metrics == second.metrics


def test_the_state_of_torch_adamw_loads_and_theirs_loads_ours() -> None:
    ours, theirs = problem(), problem()
    optimizer = blended(ours, safety_weight=0.0)
    adamw = plain_adamw(two_groups(theirs.trained), **SETTINGS)
    fused = adamw.defaults["fused"]

    def steps(case: Problem, either: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            either.zero_grad()
            task(case, random_batch(seed=seed))
            either.step()

    steps(theirs, adamw, range(2))
    ours.model.load_state_dict(theirs.model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    # On with ours, which go back as well.
    steps(ours, optimizer, range(2, 4))
    third = problem()
    third.model.load_state_dict(ours.model.state_dict())
    back = plain_adamw(two_groups(third.trained), **SETTINGS)
    saved = copy.deepcopy(optimizer.state_dict())
    assert "sap" in saved
    back.load_state_dict(saved)
    for group in back.param_groups:
        group["fused"] = fused  # a group of ours has no word on it, and was loaded so
    steps(third, back, range(4, 6))
    steps(theirs, adamw, range(2, 6))
    assert_same_bits(weights(third), weights(theirs))
    assert_same_bits(back.state_dict()["state"], adamw.state_dict()["state"])


def test_moments_of_bf16_parameters_stay_in_fp32_through_a_state_dict() -> None:
    case = problem(dtype=torch.bfloat16)
    optimizer = blended(case)
    step_by_passes(case, optimizer)
    fresh = blended(case)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in case.trained:
        for moment in ("exp_avg", "exp_avg_sq"):
            saved, loaded = optimizer.state[parameter][moment], fresh.state[parameter][moment]
            assert loaded.dtype == torch.float32
            assert torch.equal(saved, loaded)


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_an_optimizer_and_its_model_can_be_copied_whole(how: str) -> None:
    case = problem()
    optimizer = blended(case, direction_every=2, rule="floor", max_grad_norm=0.7)
    step_by_passes(case, optimizer)
    pair = (case, optimizer)
    twin, other = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    assert other.passes is not optimizer.passes and other.max_grad_norm == 0.7
    assert other.passes.trained.parameters == twin.trained
    for step in (1, 2):  # under the kept direction, and with one that is taken
        for one, its in ((case, optimizer), (twin, other)):
            its.zero_grad()
            step_by_passes(one, its, random_batch(seed=step))
    assert_same_bits(weights(case), weights(twin))
    assert other.metrics == optimizer.metrics


def test_a_scaler_is_not_kept_by_pickling() -> None:
    scaler = torch.amp.GradScaler("cpu")
    optimizer = BlendedAdamW([nn.Parameter(torch.ones(1))], grad_scaler=scaler)
    assert pickle.loads(pickle.dumps(optimizer)).passes.grad_scaler is None


# ---- groups ----


def test_a_group_without_gradients_is_left_alone() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = BlendedAdamW([{"params": [first]}, {"params": [second]}], lr=0.1)
    first.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(first, torch.ones(3)) and torch.equal(second, torch.ones(3))
    assert second not in optimizer.state


def test_add_param_group_trains_the_new_parameters() -> None:
    case = problem()
    params = case.trained
    optimizer = BlendedAdamW(params[:2], lr=1e-2, safety_level=None)
    optimizer.add_param_group({"params": params[2:], "lr": 0.0})
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    before = weights(case)
    step_by_passes(case, optimizer)
    changed = [not torch.equal(a, b) for a, b in zip(before, weights(case), strict=True)]
    trained = [p.requires_grad for p in case.model.parameters()]
    first_two = [index for index, t in enumerate(trained) if t][:2]
    assert [index for index, c in enumerate(changed) if c] == first_two
    # The direction is of all of them.
    optimizer.inner_passes(*closures(case))
    assert set(optimizer.passes.direction.parameters) == set(params)


def test_named_parameters_keep_their_names() -> None:
    case = problem()
    named = [(name, p) for name, p in case.model.named_parameters() if p.requires_grad]
    optimizer = BlendedAdamW(named, safety_level=None)
    step_by_passes(case, optimizer)
    (group,) = optimizer.state_dict()["param_groups"]
    assert group["param_names"] == [name for name, _ in named]


def test_step_hooks_run_once_per_step() -> None:
    case = problem()
    optimizer = blended(case)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step(lambda: task(case), lambda: safety(case))
    assert calls == ["before", "after"]


def test_its_parts_are_there_to_be_read(cpu_backend: str) -> None:
    optimizer = BlendedAdamW([nn.Parameter(torch.ones(1))])
    assert isinstance(optimizer.passes, SafetyPasses)
    assert optimizer.probes is None
    assert optimizer.passes.safety_level == "auto" and optimizer.passes.safety_weight == 0.3
    assert choose_backend("auto", "cpu") == cpu_backend
    assert isinstance(optimizer, torch.optim.Optimizer)


# ---- errors ----


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", -1.0),
        ("lr", float("nan")),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("max_grad_norm", 0.0),
        ("max_grad_norm", float("nan")),
    ],
)
def test_settings_out_of_range_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{argument}.*{'' if argument == 'betas' else value}"):
        BlendedAdamW([nn.Parameter(torch.ones(1))], **{argument: value})


def test_missing_closures_are_named() -> None:
    case = problem()
    optimizer = blended(case)
    with pytest.raises(TypeError, match=r"needs a safety closure too: step\(task, safety\)"):
        optimizer.step(lambda: task(case))
    with pytest.raises(TypeError, match="without a task closure"):
        optimizer.step(None, lambda: safety(case))
    with pytest.raises(TypeError, match="closure is another name for task; give one"):
        optimizer.step(lambda: task(case), lambda: safety(case), closure=lambda: task(case))


@pytest.mark.parametrize("weight", [0.0, 0.1])
def test_sparse_gradients_are_refused_before_anything_changes(weight: float) -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = BlendedAdamW(embedding.parameters(), safety_weight=weight)

    def backward() -> Tensor:
        loss = embedding(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"shape \(5, 3\).*sparse=False"):
        optimizer.step(backward, backward)
    assert torch.equal(embedding.weight, before)


def test_a_state_of_other_groups_is_refused() -> None:
    case = problem()
    optimizer = blended(case)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(BlendedAdamW(case.trained).state_dict())
