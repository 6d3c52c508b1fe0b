"""BlendedAdamW as a torch optimizer: AdamW's bits, groups, state, hooks, errors."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet, SafetyPasses
from tests.oracle import naive_contrastive_loss, naive_task_loss
from tests.tiny import (
    Problem,
    assert_same_bits,
    closures,
    plain_adamw,
    problem,
    random_batch,
    safety,
    task,
    weights,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups with settings of their own."""
    half = len(params) // 2
    return [
        {"params": params[:half]},
        {"params": params[half:], "lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.99)},
    ]


def sap(case: Problem, probe: dict[str, Any] | None = None, **options: Any) -> FusedSAP:
    """FusedSAP on two groups."""
    probes = ProbeSet(case.model, [1, 2], **{"rho": 1e-3, **(probe or {})})
    return FusedSAP(groups(case.trained), probes, **(SETTINGS | options))


def one_step(case: Problem, optimizer: BlendedAdamW, step: int = 0) -> Tensor:
    batch = random_batch(seed=100 + step)
    optimizer.zero_grad()
    loss = optimizer.step(*closures(case), batch)
    assert loss is not None
    return loss


# ---- the contract ----


def test_the_signatures_are_those_that_users_rely_on() -> None:
    adamw = (
        "lr=0.0001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.01, *, {}, rule='blend', "
        "direction_every=1, max_grad_norm=None, backend='auto', grad_scaler=None"
    )
    expected = {
        BlendedAdamW: "params, " + adamw.format("safety_weight=0.3, safety_level='auto'"),
        FusedSAP: "params, probes, " + adamw.format("safety_weight=0.0, safety_level=None"),
        ProbeSet: (
            "model, layers='early', *, size=0.003, rule='normalized', rho='auto', "
            "difference='central', rows=1.0, checkpointing='none'"
        ),
        SafetyPasses: (
            "params, probes=None, *, safety_weight=0.3, safety_level=None, rule='blend', "
            "direction_every=1, backend='auto', grad_scaler=None"
        ),
    }
    for of, text in expected.items():
        signature = inspect.signature(of)
        bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        assert str(inspect.Signature(bare)) == f"({text})"
        assert len(bare) <= 14


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    ("probe", "options"),
    [
        ({"rho": 0.0}, {}),
        ({"size": 0.0}, {"direction_every": 3}),
        ({"rho": 0.0, "difference": "forward", "rule": "gradient"}, {}),
        ({"size": 0.0, "rule": "adam", "rho": "auto", "rows": 0.5}, {}),
        (None, {"safety_weight": 0.0}),
        (None, {"safety_weight": 0.0, "safety_level": None, "direction_every": 2}),
    ],
    ids=str,
)
def test_without_rho_size_or_weight_twenty_steps_have_the_bits_of_adamw(
    lora: bool, probe: dict[str, Any] | None, options: dict[str, Any]
) -> None:
    ours, theirs = problem(lora=lora, dropout=0.1), problem(lora=lora, dropout=0.1)
    optimizer: BlendedAdamW
    if probe is None:
        optimizer = BlendedAdamW(groups(ours.trained), **(SETTINGS | options))
    else:
        optimizer = sap(ours, probe, **options)
    adamw = plain_adamw(groups(theirs.trained), **SETTINGS)
    schedules = [
        torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=20) for o in (optimizer, adamw)
    ]
    torch.manual_seed(7)
    for step in range(20):
        one_step(ours, optimizer, step)
        schedules[0].step()
    torch.manual_seed(7)
    for step in range(20):
        adamw.zero_grad()
        task(theirs, random_batch(seed=100 + step))
        adamw.step()
        schedules[1].step()
    assert_same_bits(weights(ours), weights(theirs))
    assert optimizer.metrics.skipped_steps == 0


def test_without_a_weight_a_closure_is_that_of_torch() -> None:
    ours, theirs = problem(), problem()
    optimizer = BlendedAdamW(groups(ours.trained), safety_weight=0.0, **SETTINGS)
    adamw = plain_adamw(groups(theirs.trained), **SETTINGS)
    for step in range(4):
        batch = random_batch(seed=step)
        optimizer.zero_grad()
        adamw.zero_grad()
        if step % 2:
            name = "task" if step == 1 else "closure"
            loss = optimizer.step(**{name: lambda batch=batch: task(ours, batch)})
            assert loss is not None and loss.requires_grad
        else:
            task(ours, batch)
            assert optimizer.step() is None
        task(theirs, batch)
        adamw.step()
    assert_same_bits(weights(ours), weights(theirs))


@pytest.mark.parametrize("has_probe", [True, False])
def test_a_step_without_closures_is_adamw_and_never_probes(has_probe: bool) -> None:
    ours, theirs = problem(), problem()
    optimizer = sap(ours) if has_probe else BlendedAdamW(groups(ours.trained), **SETTINGS)
    adamw = plain_adamw(groups(theirs.trained), **SETTINGS)
    task(ours)
    optimizer.step()
    task(theirs)
    adamw.step()
    assert_same_bits(weights(ours), weights(theirs))


def test_a_fresh_optimizer_with_zero_gradients_gets_all_its_state() -> None:
    # What torch.distributed.checkpoint does before it loads.
    case = problem()
    optimizer = sap(case, lr=0.0)
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
    optimizer = BlendedAdamW(groups(ours.trained), max_grad_norm=0.1, **SETTINGS)
    adamw = plain_adamw(groups(theirs.trained), **SETTINGS)
    task(ours)
    optimizer.step()
    task(theirs)
    norm = torch.nn.utils.clip_grad_norm_(theirs.trained, 0.1)
    assert norm > 0.2  # or nothing is clipped
    adamw.step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_blending_adds_gamma_times_the_norm_along_the_direction() -> None:
    gamma, limit = 0.3, 0.2
    ours, theirs = problem(), problem()
    optimizer = BlendedAdamW(groups(ours.trained), max_grad_norm=limit, **SETTINGS)
    optimizer.step(lambda: task(ours), lambda: safety(ours))

    direction = torch.autograd.grad(
        naive_contrastive_loss(theirs.model, theirs.chosen, theirs.rejected), theirs.trained
    )
    length = torch.sqrt(sum((d * d).sum() for d in direction))
    task(theirs)
    norm = torch.sqrt(sum((p.grad * p.grad).sum() for p in theirs.trained))
    for parameter, d in zip(theirs.trained, direction, strict=True):
        parameter.grad += gamma * norm * d / length
    assert torch.nn.utils.clip_grad_norm_(theirs.trained, limit) > 2 * limit
    plain_adamw(groups(theirs.trained), **SETTINGS).step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


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


# ---- maximize ----


def maximized(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [group | {"maximize": True} for group in groups(params)]


@pytest.mark.parametrize("has_probe", [True, False])
def test_maximize_is_the_descent_of_the_negated_objective(has_probe: bool) -> None:
    ours, theirs = problem(), problem()
    options: dict[str, Any] = {"safety_weight": 0.2, "max_grad_norm": 0.5} | SETTINGS
    up: BlendedAdamW
    down: BlendedAdamW
    if has_probe:
        up = FusedSAP(maximized(ours.trained), ProbeSet(ours.model, [1, 2], rho=1e-3), **options)
        down = FusedSAP(groups(theirs.trained), ProbeSet(theirs.model, [1, 2], rho=1e-3), **options)
    else:
        up = BlendedAdamW(maximized(ours.trained), **options)
        down = BlendedAdamW(groups(theirs.trained), **options)

    def negated() -> Tensor:
        loss = -naive_task_loss(ours.model, ours.batch)
        loss.backward()
        return loss

    up.step(negated, lambda: safety(ours))
    down.step(lambda: task(theirs), lambda: safety(theirs))
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    if has_probe:
        assert up.metrics.lean == pytest.approx(down.metrics.lean, rel=1e-4)


def test_groups_that_differ_in_maximize_are_refused_whenever_they_come() -> None:
    case = problem()
    params = case.trained
    mixed = [{"params": params[:1], "maximize": True}, {"params": params[1:]}]
    with pytest.raises(ValueError, match=r"maximize is \[True, False\]"):
        BlendedAdamW(mixed)
    optimizer = BlendedAdamW(params[:1])
    with pytest.raises(ValueError, match="maximize"):
        optimizer.add_param_group({"params": params[1:], "maximize": True})
    optimizer = BlendedAdamW(groups(params))
    optimizer.param_groups[1]["maximize"] = True
    with pytest.raises(ValueError, match="maximize"):
        optimizer.step(lambda: task(case), lambda: safety(case))


# ---- state ----


@pytest.mark.parametrize("options", [{"safety_weight": 0.1}, {"direction_every": 3}], ids=str)
def test_state_goes_through_a_file_mid_run(options: dict[str, Any]) -> None:
    straight, resumed = problem(dropout=0.1), problem(dropout=0.1)
    probe = {"rho": "auto", "size": 0.05}
    first = sap(straight, probe, **options)
    torch.manual_seed(3)
    for step in range(2):
        one_step(straight, first, step)
    random_state = torch.get_rng_state()
    buffer = io.BytesIO()
    torch.save({"model": straight.model.state_dict(), "optimizer": first.state_dict()}, buffer)
    for step in range(2, 4):
        one_step(straight, first, step)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    second = sap(resumed, probe, **options)
    second.load_state_dict(saved["optimizer"])
    assert second.passes.calibration is not None
    torch.set_rng_state(random_state)
    for step in range(2, 4):
        one_step(resumed, second, step)
    assert_same_bits(weights(straight), weights(resumed))


def test_moments_of_bf16_parameters_stay_in_fp32_through_a_state_dict() -> None:
    case = problem(dtype=torch.bfloat16)
    optimizer = sap(case)
    one_step(case, optimizer)
    fresh = sap(case)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in case.trained:
        for moment in ("exp_avg", "exp_avg_sq"):
            saved, loaded = optimizer.state[parameter][moment], fresh.state[parameter][moment]
            assert loaded.dtype == torch.float32
            assert torch.equal(saved, loaded)


@pytest.mark.parametrize("to_adamw", [True, False])
def test_the_state_is_interchangeable_with_that_of_torch(to_adamw: bool) -> None:
    case, twin = problem(), problem()
    ours = BlendedAdamW(groups(case.trained), safety_weight=0.0, **SETTINGS)
    theirs = plain_adamw(groups(twin.trained), **SETTINGS)
    fused = theirs.defaults["fused"]
    giver, taker = (ours, theirs) if to_adamw else (theirs, ours)
    gives, takes = (case, twin) if to_adamw else (twin, case)
    for step in range(3):
        giver.zero_grad()
        task(gives, random_batch(seed=step))
        giver.step()
    takes.model.load_state_dict(gives.model.state_dict())
    taker.load_state_dict(copy.deepcopy(giver.state_dict()))
    if to_adamw:
        for group in theirs.param_groups:
            group["fused"] = fused  # a group of ours has no word on it, and was loaded so
    for one, optimizer in ((case, ours), (twin, theirs)):
        optimizer.zero_grad()
        task(one)
        optimizer.step()
    assert_same_bits(weights(case), weights(twin))


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_an_optimizer_and_its_model_can_be_copied_whole(how: str) -> None:
    case = problem()
    optimizer = sap(case, {"rho": "auto", "size": 0.05}, direction_every=2)
    one_step(case, optimizer)
    pair = (case, optimizer)
    twin, other = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    assert other.probes.model is twin.model and other.probes is not optimizer.probes
    assert other.passes.calibration == optimizer.passes.calibration
    one_step(case, optimizer, 1)
    one_step(twin, other, 1)
    assert_same_bits(weights(case), weights(twin))


# ---- groups and hooks ----


def test_a_group_without_gradients_is_left_alone() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = BlendedAdamW([{"params": [first]}, {"params": [second]}], lr=0.1)
    first.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(first, torch.ones(3)) and torch.equal(second, torch.ones(3))


def test_add_param_group_trains_the_new_parameters() -> None:
    case = problem()
    params = case.trained
    optimizer = FusedSAP(params[:2], ProbeSet(case.model, [1], rho=1e-3), lr=1e-2)
    optimizer.add_param_group({"params": params[2:], "lr": 0.0})
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    before = weights(case)
    one_step(case, optimizer)
    assert len(optimizer.passes.trained.parameters) == len(params)
    changed = [not torch.equal(a, b) for a, b in zip(before, weights(case), strict=True)]
    trained = [p.requires_grad for p in case.model.parameters()]
    first_two = [index for index, t in enumerate(trained) if t][:2]
    assert [index for index, c in enumerate(changed) if c] == first_two


def test_named_parameters_are_accepted_as_torch_accepts_them() -> None:
    case, twin = problem(), problem()
    named = [(name, p) for name, p in case.model.named_parameters() if p.requires_grad]
    one_step(case, BlendedAdamW(named, **SETTINGS))
    one_step(twin, BlendedAdamW(twin.trained, **SETTINGS))
    assert_same_bits(weights(case), weights(twin))


def test_step_hooks_run_once_per_step() -> None:
    case = problem()
    optimizer = sap(case)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    one_step(case, optimizer)
    assert calls == ["before", "after"]


# ---- errors ----


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", -1.0),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("safety_weight", -0.5),
        ("safety_level", "low"),
        ("safety_level", float("nan")),
        ("max_grad_norm", 0.0),
        ("direction_every", 0),
        ("backend", "cuda"),
        ("rule", "mean"),
    ],
)
def test_settings_out_of_range_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{argument}.*{'' if argument == 'betas' else value}"):
        BlendedAdamW([nn.Parameter(torch.ones(1))], **{argument: value})


def test_missing_closures_are_named() -> None:
    case = problem()
    optimizer = sap(case)
    with pytest.raises(TypeError, match="needs a safety closure"):
        optimizer.step(lambda: task(case))
    with pytest.raises(TypeError, match="without a task closure"):
        optimizer.step(None, lambda: safety(case))
    with pytest.raises(TypeError, match="another name for task"):
        optimizer.step(lambda: task(case), lambda: safety(case), closure=lambda: task(case))


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    before = embedding.weight.detach().clone()
    for safety_weight in (0.0, 0.1):
        optimizer = BlendedAdamW(embedding.parameters(), safety_weight=safety_weight)

        def backward() -> Tensor:
            loss = embedding(torch.tensor([1, 2])).sum()
            loss.backward()
            return loss

        with pytest.raises(RuntimeError, match=r"shape \(5, 3\).*sparse=False"):
            optimizer.step(backward, backward)
        assert torch.equal(embedding.weight, before)
