"""FusedSAP as a torch optimizer: AdamW's bits, state, groups, errors, metrics."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast.optimizer import FusedSAP, _most_trusted
from sap_fast.probes import ProbeSet
from tests.oracle import naive_contrastive_loss, naive_task_loss
from tests.tiny import Problem, plain_adamw, problem, random_batch, safety, task

pytestmark = pytest.mark.usefixtures("cpu_backend")

SETTINGS: dict[str, Any] = {"lr": 3e-3, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": 0.1}
FAST = {"rho": 1e-3}


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups with settings of their own."""
    half = len(params) // 2
    return [
        {"params": params[:half]},
        {"params": params[half:], "lr": 1e-3, "weight_decay": 0.0, "betas": (0.9, 0.99)},
    ]


def sap(case: Problem, **options: Any) -> FusedSAP:
    probes = ProbeSet(case.model, layers=[1, 2])
    return FusedSAP(groups(case.trained), probes, **(SETTINGS | FAST | options))


def sap_step(case: Problem, optimizer: FusedSAP, step: int = 0) -> Tensor:
    batch = random_batch(seed=100 + step)
    optimizer.zero_grad()
    loss = optimizer.step(lambda: task(case, batch), lambda: safety(case))
    assert loss is not None
    return loss


def weights(case: Problem) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in case.model.parameters()]


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b)


# ---- AdamW ----


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"rho": 0.0},
        {"probe_lr": 0.0},
        {"rho": 0.0, "schedule": "lagged"},
        {"probe_lr": 0.0, "schedule": "lagged"},
        {"rho": 0.0, "difference": "forward", "probe_rule": "gradient"},
        {"probe_lr": 0.0, "probe_rule": "adam", "rho": "auto"},
    ],
    ids=str,
)
def test_without_rho_or_probe_lr_twenty_steps_have_the_bits_of_adamw(
    lora: bool, options: dict[str, Any]
) -> None:
    ours, theirs = problem(lora=lora, dropout=0.1), problem(lora=lora, dropout=0.1)
    optimizer = sap(ours, **options)
    adamw = plain_adamw(groups(theirs.trained), **SETTINGS)
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


def test_without_probes_it_is_adamw() -> None:
    ours, theirs = problem(), problem()
    optimizer = FusedSAP(groups(ours.trained), **SETTINGS)
    adamw = plain_adamw(groups(theirs.trained), **SETTINGS)
    for step in range(3):
        batch = random_batch(seed=step)
        optimizer.zero_grad()
        adamw.zero_grad()
        # Once with a closure, once without.
        if step % 2:
            loss = optimizer.step(lambda batch=batch: task(ours, batch))
            assert loss is not None and loss.requires_grad
        else:
            task(ours, batch)
            assert optimizer.step() is None
        task(theirs, batch)
        adamw.step()
    assert_same_bits(weights(ours), weights(theirs))


def test_the_probe_changes_the_update() -> None:
    ours, theirs = problem(), problem()
    sap_step(ours, sap(ours, probe_lr=0.05))
    sap_step(theirs, sap(theirs, probe_lr=0.0))
    assert any(not torch.equal(a, b) for a, b in zip(weights(ours), weights(theirs), strict=True))


def test_step_without_closure_is_adamw_even_with_probes() -> None:
    ours, theirs = problem(), problem()
    optimizer = sap(ours)
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
    optimizer = FusedSAP(groups(ours.trained), max_grad_norm=0.1, **SETTINGS)
    adamw = plain_adamw(groups(theirs.trained), **SETTINGS)
    task(ours)
    optimizer.step()
    task(theirs)
    norm = torch.nn.utils.clip_grad_norm_(theirs.trained, 0.1)
    assert norm > 0.2  # or nothing is clipped
    adamw.step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_gradient_blending_adds_gamma_times_the_norm_along_the_direction() -> None:
    gamma, limit = 0.3, 0.2
    ours, theirs = problem(), problem()
    optimizer = FusedSAP(groups(ours.trained), safety_weight=gamma, max_grad_norm=limit, **SETTINGS)
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


# L_safe of the safety passes. "auto" takes the mean of the first three finite ones, 2.
LOSSES = [1.0, math.nan, 2.0, 3.0, 1.9, 2.1, 1.0]


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("what", ["blending", "probe", "probe, not asked for"])
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
    case = problem()
    settings: dict[str, Any] = {"lr": 0.0, "rho": 1e-3, "probe_lr": 0.1, "direction_every": every}
    if what == "blending":
        settings |= {"probes": None, "safety_weight": 0.5}
    else:
        settings["probes"] = ProbeSet(case.model)
    optimizer = FusedSAP(case.trained, safety_level=level, **settings)
    # Under lr=0 the moments show what a step was taken with.
    task(case)
    plain = [p.grad.clone() for p in case.trained if p.grad is not None]
    for step in range(len(LOSSES) * every):
        if step == 4 * every + 1:  # goes on from a checkpoint
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = FusedSAP(case.trained, safety_level=level, **settings)
            optimizer.load_state_dict(saved)
        optimizer.zero_grad()
        assert optimizer.needs_direction == (step % every == 0)
        if optimizer.needs_direction:
            with optimizer.safety_pass() as record:
                safety(case)
                record(torch.tensor(LOSSES[step // every]))
        if what == "probe":
            assert optimizer.needs_probe == above[step // every]
        if optimizer.needs_probe or what == "probe, not asked for":
            for _ in optimizer.probe_passes():
                task(case)
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
        assert is_plain != above[step // every], step
        assert optimizer.metrics.above_level == (None if level is None else above[step // every])
        found = 2.0 if step // every >= 3 else None
        assert optimizer.metrics.safety_level == (found if level == "auto" else level)


def test_a_level_needs_the_loss_of_the_safety_pass() -> None:
    case = problem()
    optimizer = FusedSAP(case.trained, safety_weight=0.5, safety_level="auto")
    with pytest.raises(RuntimeError, match="safety_level='auto' needs L_safe"):
        with optimizer.safety_pass():
            safety(case)
    assert optimizer.step(lambda: task(case), lambda: safety(case)) is not None


def test_a_step_with_closures_leaves_the_probe_passes_out_below_the_level() -> None:
    case, other = problem(), problem()
    optimizer = sap(case, safety_level=1e3)
    calls = {"task": 0, "safety": 0}

    def counted(name: str, backward: Callable[[], Tensor]) -> Tensor:
        calls[name] += 1
        return backward()

    def one_step() -> None:
        optimizer.zero_grad()
        optimizer.step(
            lambda: counted("task", lambda: task(case)),
            lambda: counted("safety", lambda: safety(case)),
        )

    one_step()
    assert calls == {"task": 1, "safety": 1}
    task(other)
    plain_adamw(groups(other.trained), **SETTINGS).step()
    assert_same_bits(weights(case), weights(other))
    assert optimizer.metrics.skipped_steps == 0
    optimizer.safety_level = 0.0
    one_step()
    assert calls == {"task": 4, "safety": 2}


def test_a_level_without_anything_to_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"safety_level='auto'.*safety_weight=0"):
        FusedSAP([nn.Parameter(torch.ones(1))], safety_level="auto")


def test_maximize_is_the_descent_of_the_negated_objective() -> None:
    ours, theirs = problem(), problem()
    up = sap(ours, maximize=True, safety_weight=0.2, max_grad_norm=0.5, keep_direction=True)
    down = sap(theirs, safety_weight=0.2, max_grad_norm=0.5, keep_direction=True)

    def negated() -> Tensor:
        loss = -naive_task_loss(ours.model, ours.batch)
        loss.backward()
        return loss

    up.step(negated, lambda: safety(ours))
    down.step(lambda: task(theirs), lambda: safety(theirs))
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert up.metrics.lean == pytest.approx(down.metrics.lean, rel=1e-4)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_lr_may_be_a_tensor(as_tensor: bool) -> None:
    ours, theirs = problem(), problem()
    lr = torch.tensor(2e-3) if as_tensor else 2e-3
    optimizer = FusedSAP(ours.trained, lr=lr)
    adamw = plain_adamw(theirs.trained, lr=float(lr))
    task(ours)
    optimizer.step()
    task(theirs)
    adamw.step()
    assert_same_bits(weights(ours), weights(theirs))


# ---- state ----


def test_state_goes_through_a_file_mid_run() -> None:
    for schedule in ("paper", "lagged"):
        straight, resumed = problem(dropout=0.1), problem(dropout=0.1)
        options = {"schedule": schedule, "rho": "auto", "probe_lr": 0.05, "safety_weight": 0.1}
        first = sap(straight, **options)
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
        second = sap(resumed, **options)
        second.load_state_dict(saved["optimizer"])
        assert second.calibration is not None and not second.needs_calibration
        torch.set_rng_state(random_state)
        for step in range(2, 4):
            sap_step(resumed, second, step)
        assert_same_bits(weights(straight), weights(resumed))


def test_moments_of_bf16_parameters_stay_in_fp32_through_a_state_dict() -> None:
    case = problem(dtype=torch.bfloat16)
    optimizer = sap(case)
    sap_step(case, optimizer)
    fresh = sap(case)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter in case.trained:
        for moment in ("exp_avg", "exp_avg_sq"):
            saved, loaded = optimizer.state[parameter][moment], fresh.state[parameter][moment]
            assert loaded.dtype == torch.float32
            assert torch.equal(saved, loaded)


def test_a_group_without_gradients_is_left_alone() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = FusedSAP([{"params": [first]}, {"params": [second]}], lr=0.1)
    first.grad = torch.ones(3)
    optimizer.step()
    assert not torch.equal(first, torch.ones(3)) and torch.equal(second, torch.ones(3))


def test_the_state_of_torch_adamw_loads() -> None:
    ours, theirs = problem(), problem()
    adamw = plain_adamw(groups(theirs.trained), **SETTINGS)
    for step in range(3):
        adamw.zero_grad()
        task(theirs, random_batch(seed=step))
        adamw.step()
    ours.model.load_state_dict(theirs.model.state_dict())
    optimizer = FusedSAP(groups(ours.trained), **SETTINGS)
    optimizer.load_state_dict(copy.deepcopy(adamw.state_dict()))
    for case, o in ((ours, optimizer), (theirs, adamw)):
        o.zero_grad()
        task(case)
        o.step()
    assert_same_bits(weights(ours), weights(theirs))


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_an_optimizer_and_its_model_can_be_copied_whole(how: str) -> None:
    case = problem()
    optimizer = sap(case, rho="auto", schedule="lagged", probe_lr=0.05)
    sap_step(case, optimizer)
    pair = (case, optimizer)
    twin, other = pickle.loads(pickle.dumps(pair)) if how == "pickle" else copy.deepcopy(pair)
    assert other.probes.model is twin.model and other.probes is not optimizer.probes
    assert other.calibration == optimizer.calibration
    sap_step(case, optimizer, 1)
    sap_step(twin, other, 1)
    assert_same_bits(weights(case), weights(twin))


def test_add_param_group_trains_the_new_parameters() -> None:
    case = problem()
    params = case.trained
    optimizer = FusedSAP(params[:2], ProbeSet(case.model, layers=[1]), lr=1e-2, **FAST)
    optimizer.add_param_group({"params": params[2:], "lr": 0.0})
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.999)
    before = weights(case)
    sap_step(case, optimizer)
    changed = [not torch.equal(a, b) for a, b in zip(before, weights(case), strict=True)]
    trained = [p.requires_grad for p in case.model.parameters()]
    first_two = [index for index, t in enumerate(trained) if t][:2]
    assert [index for index, c in enumerate(changed) if c] == first_two


def test_step_hooks_run_once_per_step() -> None:
    case = problem()
    optimizer = sap(case)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    sap_step(case, optimizer)
    assert calls == ["before", "after"]


# ---- errors ----


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("lr", -1.0),
        ("eps", -1e-8),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("rho", -0.1),
        ("rho", "large"),
        ("probe_lr", -1.0),
        ("probe_lr", float("nan")),
        ("probe_rule", "sign"),
        ("schedule", "fast"),
        ("difference", "backward"),
        ("safety_weight", -0.5),
        ("safety_level", "low"),
        ("safety_level", float("nan")),
        ("max_grad_norm", 0.0),
        ("backend", "cuda"),
        ("calibrate_every", 0),
    ],
)
def test_settings_out_of_range_are_named(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{argument}.*{'' if argument == 'betas' else value}"):
        FusedSAP([nn.Parameter(torch.ones(1))], **{argument: value})


def test_parameters_of_another_model_are_refused() -> None:
    case, other = problem(), problem()
    with pytest.raises(ValueError, match="share no parameter"):
        FusedSAP(other.trained, ProbeSet(case.model))


def test_a_probe_per_token_does_not_go_with_the_lagged_schedule() -> None:
    case = problem()
    with pytest.raises(ValueError, match="schedule='lagged'"):
        FusedSAP(case.trained, ProbeSet(case.model, shape="token"), schedule="lagged")


def test_missing_closures_are_named() -> None:
    case = problem()
    optimizer = sap(case)
    with pytest.raises(TypeError, match="needs a safety closure"):
        optimizer.step(lambda: task(case))
    with pytest.raises(TypeError, match="without a task closure"):
        optimizer.step(None, lambda: safety(case))


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    before = embedding.weight.detach().clone()
    for safety_weight in (0.0, 0.1):
        optimizer = FusedSAP(embedding.parameters(), safety_weight=safety_weight)

        def backward() -> Tensor:
            loss = embedding(torch.tensor([1, 2])).sum()
            loss.backward()
            return loss

        with pytest.raises(RuntimeError, match=r"shape \(5, 3\).*sparse=False"):
            optimizer.step(backward, backward)
        assert torch.equal(embedding.weight, before)


# ---- directions and probes that are not there ----


@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("schedule", ["paper", "lagged"])
def test_a_step_without_a_direction_is_adamw_is_counted_and_warns_once(
    poison: float, schedule: str
) -> None:
    ours, theirs = problem(), problem()
    optimizer = sap(ours, schedule=schedule, safety_weight=0.3, probe_lr=0.05)
    adamw = plain_adamw(groups(theirs.trained), **SETTINGS)

    def poisoned() -> Tensor:
        loss = safety(ours)
        for parameter in ours.trained:
            assert parameter.grad is not None
            parameter.grad.mul_(poison)
        return loss

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.step(lambda: task(ours), poisoned)
            adamw.zero_grad()
            task(theirs)
            adamw.step()
    assert_same_bits(weights(ours), weights(theirs))
    assert optimizer.metrics.skipped_steps == 2
    messages = [str(w.message) for w in caught if "plain AdamW" in str(w.message)]
    assert len(messages) == 1 and "‖∇L_safe‖ =" in messages[0]


@pytest.mark.filterwarnings("ignore:FusedSAP. 1 step")
def test_a_lagged_step_without_a_direction_does_not_use_the_probe_of_the_step_before() -> None:
    ours = problem()
    optimizer = sap(ours, schedule="lagged", probe_lr=0.05)
    sap_step(ours, optimizer)
    assert optimizer.probes is not None and optimizer.probes.offsets[1].norm() > 0
    theirs = ours.copy()
    adamw = plain_adamw(groups(theirs.trained), **SETTINGS)
    fused = adamw.defaults["fused"]
    adamw.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in adamw.param_groups:
        group["fused"] = fused  # a group of FusedSAP has no word on it, and was loaded so

    def flat() -> Tensor:
        loss = safety(ours)
        for parameter in ours.trained:
            parameter.grad = torch.zeros_like(parameter)
        return loss

    optimizer.zero_grad()
    optimizer.step(lambda: task(ours), flat)
    adamw.zero_grad()
    task(theirs)
    adamw.step()
    assert_same_bits(weights(ours), weights(theirs))


def test_a_probe_gradient_of_nan_switches_the_probe_off_for_that_step() -> None:
    ours, theirs = problem(), problem()
    optimizer = sap(ours, probe_lr=0.05)
    adamw = plain_adamw(groups(theirs.trained), **SETTINGS)
    frozen_calls = 0

    def poisoned() -> Tensor:
        nonlocal frozen_calls
        loss = naive_task_loss(ours.model, ours.batch)
        if not ours.trained:  # parameters are frozen: a probe pass
            frozen_calls += 1
            (loss * float("nan")).backward()
        else:
            loss.backward()
        return loss

    with pytest.warns(UserWarning, match="the probe gradient was not finite"):
        optimizer.step(poisoned, lambda: safety(ours))
    task(theirs)
    adamw.step()
    assert frozen_calls == 2
    assert_same_bits(weights(ours), weights(theirs))
    assert optimizer.metrics.skipped_steps == 1


def test_a_perturbation_lost_to_rounding_warns_once_with_the_figure() -> None:
    case = problem(lora=False, dtype=torch.bfloat16)
    optimizer = sap(case, rho=1e-5, keep_direction=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2):
            sap_step(case, optimizer, step)
    messages = [str(w.message) for w in caught if "survives rounding" in str(w.message)]
    assert len(messages) == 1
    assert "torch.bfloat16" in messages[0] and "%" in messages[0]
    metrics = optimizer.metrics
    assert metrics.perturbation_applied is not None and metrics.perturbation_wanted is not None
    assert metrics.perturbation_applied < 0.5 * metrics.perturbation_wanted


def test_rounding_is_measured_in_the_dtype_of_autocast() -> None:
    # Half the perturbation is below half a unit in the last place of bf16, none of fp32.
    case = problem(lora=False)
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.copy_(parameter.bfloat16())
    optimizer = sap(case, rho=1e-5)

    def autocast_task() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = naive_task_loss(case.model, case.batch)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="survives rounding to torch.bfloat16"):
        optimizer.step(autocast_task, lambda: safety(case))
    optimizer = sap(case, rho=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sap_step(case, optimizer)


# ---- ρ ----


def test_rho_is_calibrated_once_and_again_when_asked() -> None:
    case = problem()
    optimizer = sap(case, rho="auto", calibrate_every=2)
    steps = []
    for step in range(5):
        sap_step(case, optimizer, step)
        assert optimizer.calibration is not None
        steps.append(optimizer.calibration.step)
    assert steps == [0, 0, 2, 2, 4]
    assert optimizer.metrics.rho == optimizer.calibration.rho
    assert optimizer.metrics.rho_agreement == optimizer.calibration.agreement


@pytest.mark.parametrize(
    "options", [{}, {"difference": "forward"}, {"schedule": "lagged"}], ids=str
)
def test_calibration_changes_nothing_but_rho(options: dict[str, Any]) -> None:
    case = problem(dropout=0.1)
    optimizer = sap(case, rho="auto", **options)
    task(case)
    before = weights(case), [p.grad.clone() for p in case.trained], torch.get_rng_state()
    calibration = optimizer.calibrate_rho(lambda: task(case), lambda: safety(case))
    assert calibration is not None and len(calibration.agreements) == 10
    assert_same_bits(weights(case), before[0])
    assert_same_bits([p.grad for p in case.trained], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    found = calibration.agreements
    if options:  # the error is O(ρ): the smaller one of the best pair
        best = max(found, key=lambda rho: found[rho])
        assert calibration.rho == best / 2
    else:  # it is O(ρ²): between two good pairs
        best = max(list(found)[1:], key=lambda rho: found[rho] + found[2 * rho])
        assert calibration.rho == best
    assert calibration.agreement == found[best]
    assert optimizer.current_rho == calibration.rho


def test_rho_is_taken_where_neither_curvature_nor_rounding_shows() -> None:
    # Cosines as found for SmolLM2 under bf16 autocast; h is nearest to the exact one at 0.025.
    found = {0.1: 0.931, 0.05: 0.981, 0.025: 0.98, 0.0125: 0.936, 0.00625: 0.859}
    assert _most_trusted(found, "central") == (0.025, 0.98)
    assert _most_trusted(found, "forward") == (0.025, 0.981)
    # Nothing to both sides.
    assert _most_trusted({0.1: 0.9, 0.01: 0.95}, "central") == (0.01, 0.95)


def test_calibration_without_a_direction_finds_nothing_and_says_so() -> None:
    case = problem()
    optimizer = sap(case, rho="auto")

    def flat() -> Tensor:
        loss = safety(case)
        for parameter in case.trained:
            parameter.grad = torch.zeros_like(parameter)
        return loss

    with pytest.warns(UserWarning, match="calibration found no ρ"):
        assert optimizer.calibrate_rho(lambda: task(case), flat) is None
    assert optimizer.needs_calibration


def test_a_loop_that_never_calibrated_says_so_once() -> None:
    case = problem()
    optimizer = sap(case, rho="auto")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with optimizer.safety_pass():
                safety(case)
            for _ in optimizer.probe_passes():
                task(case)
            with optimizer.task_pass():
                task(case)
            optimizer.step()
    assert len([w for w in caught if "0.01 is used" in str(w.message)]) == 1
    assert optimizer.metrics.rho == 1e-2


# ---- metrics ----


def test_metrics_are_the_figures_of_the_step() -> None:
    case = problem()
    optimizer = sap(case, keep_direction=True)
    clean_task, clean_safety = task(case).item(), safety(case).item()
    norm = torch.sqrt(sum((p.detach() ** 2).sum() for p in case.trained)).item()
    sap_step_loss = None
    optimizer.zero_grad()
    sap_step_loss = optimizer.step(lambda: task(case), lambda: safety(case))
    metrics = optimizer.metrics
    assert metrics.safety_loss == pytest.approx(clean_safety, rel=1e-6)
    assert sap_step_loss is not None and metrics.task_loss == sap_step_loss.item()
    assert metrics.task_loss == pytest.approx(clean_task, rel=0.1)
    assert metrics.task_loss != clean_task
    assert metrics.parameter_norm == pytest.approx(norm, rel=1e-5)
    assert metrics.perturbation_wanted == pytest.approx(1e-3 * norm, rel=1e-5)
    assert metrics.perturbation_applied == pytest.approx(1e-3 * norm, rel=1e-3)
    assert optimizer.probes is not None
    for index in (1, 2):
        assert metrics.estimate_norms[index] == optimizer.probes.estimates[index].norm().item()
        assert metrics.probe_sizes[index] == pytest.approx(3e-3, rel=1e-5)
    flat = metrics.flat()
    assert flat["sap/probe_sizes/1"] == metrics.probe_sizes[1]
    assert flat["sap/rho"] == 1e-3
    assert "sap/rho_agreement" not in flat


def test_lean_needs_the_direction() -> None:
    case = problem()
    optimizer = sap(case)
    sap_step(case, optimizer)
    assert optimizer.metrics.lean is None
    optimizer.keep_direction = True
    sap_step(case, optimizer)
    assert optimizer.metrics.lean is not None


def test_metrics_of_plain_adamw_and_of_no_step() -> None:
    case = problem()
    assert sap(case).metrics.task_loss is None
    optimizer = FusedSAP(case.trained)
    optimizer.step(lambda: task(case))
    assert optimizer.metrics.rho is None and optimizer.metrics.lean is None
