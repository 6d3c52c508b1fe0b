"""A direction: of whom it is, how long it is kept, when it is freed, what makes it none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet
from sap_fast.ops.blockwise import Quantized, dequantize, quantize
from sap_fast.step.direction import Direction, Parts
from tests.tiny import (
    Problem,
    assert_same_bits,
    closures,
    norm_of,
    plain_adamw,
    problem,
    random_batch,
    safety,
    safety_loss,
    sap,
    step_by_passes,
    task,
    weights,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")


def gradients(case: Problem) -> list[Tensor]:
    """∇_W L_safe by autograd alone."""
    return list(torch.autograd.grad(safety_loss(case), case.trained))


# ---- kept from step to step ----


def test_a_kept_direction_is_that_of_the_step_that_took_it() -> None:
    case = problem()
    optimizer = sap(case, {"size": 0.0}, direction_every=2)
    direction = gradients(case)
    step_by_passes(case, optimizer)

    params = case.trained
    before = [p.detach().clone() for p in params]
    wanted = 1e-3 * norm_of(before)
    signs = iter([1, -1])

    def looking(_: None) -> Tensor:
        sign = next(signs)
        for p, w, g in zip(params, before, direction, strict=True):
            torch.testing.assert_close(
                p - w, sign * wanted * g / norm_of(direction), rtol=1e-3, atol=1e-6
            )
        return task(case)

    def never() -> Tensor:
        raise AssertionError("not due")

    optimizer.inner_passes(looking, never)
    assert_same_bits(params, before)
    for kept, g in zip(optimizer.passes.direction.tensors or [], direction, strict=True):
        torch.testing.assert_close(kept, g)


def test_blending_alone_may_use_a_direction_several_times() -> None:
    case = problem()
    optimizer = BlendedAdamW(
        case.trained, lr=0.0, safety_weight=0.5, safety_level=None, direction_every=3
    )
    direction = gradients(case)
    ran: list[int] = []

    def counted() -> Tensor:
        ran[-1] += 1
        return safety(case)

    for seed in range(4):
        optimizer.zero_grad()
        ran.append(0)
        optimizer.inner_passes(lambda _: task(case), counted)
        with optimizer.task_pass():
            task(case, random_batch(seed=seed))
        g = [p.grad.clone() for p in case.trained if p.grad is not None]
        moments = [optimizer.state[p].get("exp_avg", torch.zeros(())) for p in case.trained]
        moments = [moment.clone() for moment in moments]
        optimizer.step()
        scale = 0.5 * norm_of(g) / norm_of(direction)
        for p, own, d, m in zip(case.trained, g, direction, moments, strict=True):
            torch.testing.assert_close(
                optimizer.state[p]["exp_avg"], 0.9 * m + 0.1 * (own + scale * d)
            )
    assert ran == [1, 0, 0, 1]


@pytest.mark.parametrize("options", [{}, {"safety_weight": 0.1}], ids=str)
def test_a_kept_direction_keeps_its_bits_through_steps_and_their_probe_passes(
    options: dict[str, Any],
) -> None:
    case = problem()
    optimizer = sap(case, direction_every=3, **options)
    step_by_passes(case, optimizer)
    kept = optimizer.passes.direction.kept
    assert kept is not None
    copies = [tensor.clone() for tensor in kept]
    for _ in range(2):
        step_by_passes(case, optimizer)
        assert optimizer.passes.direction.kept is kept
        assert_same_bits(kept, copies)
    step_by_passes(case, optimizer)
    assert optimizer.passes.direction.kept is not kept


def test_a_direction_is_freed_before_another_takes_its_place() -> None:
    case = problem()
    optimizer = sap(case, direction_every=2)
    direction = optimizer.passes.direction
    there: list[bool] = []

    def looking() -> Tensor:
        there.append(direction.is_there)
        return safety(case)

    for step in range(5):
        optimizer.zero_grad()
        optimizer.step(lambda: task(case), looking)
        assert direction.parameters == case.trained and direction.is_there, step
    assert there == [False, False, False]


@pytest.mark.parametrize(
    ("weight", "keeps_direction", "after_inner_passes"),
    [(0.0, False, False), (0.1, False, True), (0.0, True, True)],
)
def test_a_direction_that_is_not_kept_is_gone_after_the_step(
    weight: float, keeps_direction: bool, after_inner_passes: bool
) -> None:
    case = problem()
    optimizer = sap(case, safety_weight=weight)
    optimizer.passes.keeps_direction = keeps_direction
    optimizer.inner_passes(*closures(case))
    direction = optimizer.passes.direction
    assert direction.is_there == after_inner_passes
    assert direction.valid is not None and bool(direction.valid)
    assert direction.norm.item() == pytest.approx(norm_of(gradients(case)), rel=1e-5)
    with optimizer.task_pass():
        task(case)
    optimizer.step()
    assert direction.tensors is None and direction.norm is None and direction.valid is None
    assert direction.taken == 1 and direction.is_due(optimizer.passes.steps)


def test_calibration_keeps_the_direction_of_an_earlier_step() -> None:
    case = problem()
    optimizer = sap(case, direction_every=3)
    step_by_passes(case, optimizer)
    direction = optimizer.passes.direction
    kept, copies = direction.kept, [tensor.clone() for tensor in direction.tensors or []]
    optimizer.passes.calibrate(*closures(case))
    assert optimizer.passes.direction is direction and direction.kept is kept
    assert not direction.is_due(optimizer.passes.steps)
    assert direction.taken == 1
    assert_same_bits(kept, copies)


def test_a_step_that_fails_after_the_safety_pass_takes_the_direction_again() -> None:
    case = problem()
    optimizer = sap(case, direction_every=3)

    def failing(_: None) -> Tensor:
        raise ValueError("injected")

    for _ in range(2):
        with pytest.raises(ValueError, match="injected"):
            optimizer.inner_passes(failing, lambda: safety(case))
        assert not optimizer.passes.direction.is_there
        assert optimizer.passes.direction.taken == 0
        assert optimizer.passes.direction.is_due(optimizer.passes.steps)
    step_by_passes(case, optimizer)
    # In a step that does not take one, it stays.
    with pytest.raises(ValueError, match="injected"):
        optimizer.inner_passes(failing, lambda: safety(case))
    assert optimizer.passes.direction.is_there
    assert not optimizer.passes.direction.is_due(optimizer.passes.steps)


# ---- the direction by itself ----


def taken(every: int = 2) -> tuple[Direction, list[nn.Parameter]]:
    """A direction of the second and the third of three parameters."""
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    direction = Direction(every)
    tensors = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    direction.take(params[1:], tensors, torch.tensor(8.0))
    return direction, params


def test_it_is_due_again_after_so_many_steps_and_settled_once() -> None:
    direction, _ = taken(every=3)
    assert direction.norm == 5.0 and direction.is_due(0) and not direction.is_settled
    direction.settle(0)
    assert [direction.is_due(step) for step in range(1, 6)] == [False, False, True, True, True]
    direction.settle(1)  # a step that used it, and took none
    assert direction.taken == 1 and direction.is_due(3)
    direction.release()
    assert direction.is_due(1) and not direction.is_there and direction.scale is None


def test_a_state_dict_holds_it_by_the_places_of_its_parameters() -> None:
    direction, params = taken()
    assert direction.state_dict(params)["tensors"] == {}, "of a step that is not done"
    direction.settle(4)
    state = copy.deepcopy(direction.state_dict(params))
    assert set(state["tensors"]) == {1, 2} and state["step"] == 4 and state["taken"] == 1
    other, others = taken()
    other.release()
    other.load_state_dict(state, others)
    assert other.parameters == others[1:] and other.taken == 1
    assert other.norm == 5.0 and other.scale == 8.0
    assert not other.is_due(5) and other.is_due(6)
    assert_same_bits(other.tensors or [], [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])])
    # Copies: what is loaded later must not be written to.
    assert all(
        a is not b for a, b in zip(other.tensors or [], state["tensors"].values(), strict=True)
    )


def test_what_is_loaded_goes_where_the_parameters_are() -> None:
    direction, params = taken()
    direction.settle(0)
    other = Direction(2)
    elsewhere = [nn.Parameter(torch.zeros(2, device="meta", dtype=torch.bfloat16)) for _ in params]
    other.load_state_dict(direction.state_dict(params), elsewhere)
    for tensor in [*(other.tensors or []), other.square, other.scale, other.norm]:
        assert tensor is not None and tensor.device.type == "meta"
    assert all(tensor.dtype == torch.bfloat16 for tensor in other.tensors or [])


def test_one_that_is_not_kept_or_was_not_is_taken_anew() -> None:
    direction, params = taken()
    direction.settle(0)
    every_step = Direction(1)
    every_step.load_state_dict(direction.state_dict(params), params)
    assert not every_step.is_there and every_step.is_due(1) and every_step.taken == 1
    unkept, _ = taken(every=1)
    unkept.settle(0)
    other = Direction(5)
    other.load_state_dict(unkept.state_dict(params), params)
    assert not other.is_there and other.is_due(1)


@pytest.mark.parametrize("shapes", [[2, 2, 3], [2, 2]])
def test_one_of_other_parameters_is_refused(shapes: list[int]) -> None:
    direction, params = taken()
    direction.settle(0)
    state = direction.state_dict(params)
    others = [nn.Parameter(torch.zeros(n)) for n in shapes]
    with pytest.raises(ValueError, match=r"saved direction of parameter 2 has the shape \(2,\)"):
        Direction(2).load_state_dict(state, others)


@pytest.mark.parametrize("element", [0.0, float("nan"), float("inf")])
def test_a_norm_of_zero_or_of_no_number_is_no_direction(element: float) -> None:
    direction, params = taken()
    assert bool(direction.valid)
    direction.take(params, [torch.full((2,), element) for _ in params])
    assert not bool(direction.valid)


# ---- steps without one ----


def poisoned(case: Problem, poison: float) -> Callable[[], Tensor]:
    def backward() -> Tensor:
        loss = safety(case)
        for parameter in case.trained:
            assert parameter.grad is not None
            parameter.grad.mul_(poison)
        return loss

    return backward


@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("options", [{}, {"direction_every": 2}], ids=str)
def test_a_step_without_a_direction_is_adamw_is_counted_and_warns_once(
    poison: float, options: dict[str, Any]
) -> None:
    ours, theirs = problem(), problem()
    optimizer: FusedSAP = sap(ours, safety_weight=0.3, max_grad_norm=1e6, **options)
    adamw = plain_adamw(theirs.trained, lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.step(lambda: task(ours), poisoned(ours, poison))
            adamw.zero_grad()
            task(theirs)
            adamw.step()
    assert_same_bits(weights(ours), weights(theirs))
    # Under a direction that is kept, the next step has none either.
    assert optimizer.metrics.skipped_steps == 2
    messages = [str(w.message) for w in caught if "plain AdamW" in str(w.message)]
    assert len(messages) == 1 and "‖∇L_safe‖ =" in messages[0]
    assert all(not v.any() for v in optimizer.probes.offsets.values())


@pytest.mark.filterwarnings("ignore:sap_fast. 1 step")
def test_a_step_without_a_direction_does_not_use_the_probe_of_the_step_before() -> None:
    ours = problem()
    optimizer = sap(ours)
    optimizer.step(lambda: task(ours), lambda: safety(ours))
    assert optimizer.probes is not None and optimizer.probes.offsets[1].norm() > 0
    theirs = ours.copy()
    adamw = plain_adamw(theirs.trained, lr=1e-2)
    fused = adamw.defaults["fused"]
    adamw.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for group in adamw.param_groups:
        group["fused"] = fused  # a group of FusedSAP has no word on it, and was loaded so
    optimizer.zero_grad()
    optimizer.step(lambda: task(ours), poisoned(ours, 0.0))
    adamw.zero_grad()
    task(theirs)
    adamw.step()
    assert_same_bits(weights(ours), weights(theirs))


# ---- kept in int8 ----


class Wide(nn.Module):
    """Two layers large enough for it, and a norm that is not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(2))
        self.norm = nn.LayerNorm(512)

    def backward(self, seed: int) -> Tensor:
        x, y = torch.randn(2, 8, 512, generator=torch.Generator().manual_seed(seed))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        loss = (self.norm(x) - y).square().mean()
        loss.backward()
        return loss.detach()


def wide(probe: bool, **options: Any) -> tuple[Wide, BlendedAdamW]:
    model = Wide()
    settings: dict[str, Any] = {"lr": 1e-3, "safety_weight": 0.3, "direction_every": 3, **options}
    if not probe:
        return model, BlendedAdamW(model.parameters(), safety_level=None, **settings)
    probes = ProbeSet(model, layers=[model.layers[0]], rho=1e-2, size=0.05)
    return model, FusedSAP(model.parameters(), probes, **settings)


def wide_step(model: Wide, optimizer: BlendedAdamW, number: int) -> None:
    optimizer.zero_grad()
    optimizer.step(lambda: model.backward(10 + number), lambda: model.backward(number))


@pytest.mark.parametrize("by_blend", [False, True])
def test_every_step_blends_with_what_is_kept_of_a_large_direction(by_blend: bool) -> None:
    model, optimizer = wide(probe=False, lr=0.0)
    exact = Wide()
    exact.backward(1)
    for number in (1, 2):
        optimizer.zero_grad()
        optimizer.passes.inner_passes(lambda _: torch.zeros(()), lambda: model.backward(1))
        with optimizer.task_pass():
            model.backward(10 + number)
        direction = optimizer.passes.direction
        assert [isinstance(d, Quantized) for d in direction.kept or []] == [
            True,
            True,
            False,
            False,
        ]
        kept = direction.tensors or []
        for d, parameter in zip(kept, exact.parameters(), strict=True):
            assert parameter.grad is not None
            cosine = torch.cosine_similarity(d.flatten(), parameter.grad.flatten(), dim=0)
            assert cosine > 0.9999
        norm = norm_of([d.double() for d in kept])
        assert direction.norm is not None and direction.norm.item() == pytest.approx(norm, rel=1e-6)
        g = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        c = 0.3 * norm_of([own.double() for own in g]) / norm
        blended = [own + c * d for own, d in zip(g, kept, strict=True)]
        before = [optimizer.state[p].get("exp_avg", torch.zeros(())) for p in model.parameters()]
        moments = [0.9 * m + 0.1 * b for m, b in zip(before, blended, strict=True)]
        if by_blend:
            optimizer.passes.blend_()
            for p, b in zip(model.parameters(), blended, strict=True):
                torch.testing.assert_close(p.grad, b)
            optimizer.passes.end_step()
            continue
        optimizer.step()
        for p, moment in zip(model.parameters(), moments, strict=True):
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], moment)


@pytest.mark.parametrize("probe", [False, True])
def test_a_direction_kept_in_int8_is_saved_and_goes_on_with_its_bits(probe: bool) -> None:
    model, optimizer = wide(probe)
    wide_step(model, optimizer, 1)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    saved = state[1]["sap"]["direction"]
    assert {place: tensor.dtype for place, tensor in saved["tensors"].items()} == {
        0: torch.int8,
        1: torch.int8,
        2: torch.float32,
        3: torch.float32,
    }
    assert set(saved["scales"]) == {0, 1}
    other_model, other = wide(probe)
    other_model.load_state_dict(state[0])
    other.load_state_dict(state[1])
    # In the layout of torch.distributed.checkpoint there is a place for it before the first step.
    entries = optimizer.sap_state.state_dict()
    places = wide(probe)[1].sap_state.state_dict()
    assert entries.keys() == places.keys() and "direction.0.scales" in entries
    for name in entries.keys() - {"sap"}:
        assert entries[name].dtype == places[name].dtype
        assert entries[name].shape == places[name].shape
    other.sap_state.load_state_dict(entries)
    for number in (2, 3, 4):  # the last takes one of its own
        wide_step(model, optimizer, number)
        wide_step(other_model, other, number)
        assert_same_bits(weights(model), weights(other_model))
    assert optimizer.passes.direction.taken == other.passes.direction.taken == 2


def test_a_large_direction_that_is_not_kept_is_exact() -> None:
    model, optimizer = wide(probe=False, direction_every=1)
    optimizer.passes.inner_passes(lambda _: torch.zeros(()), lambda: model.backward(1))
    exact = Wide()
    exact.backward(1)
    for d, parameter in zip(optimizer.passes.direction.kept or [], exact.parameters(), strict=True):
        assert isinstance(d, Tensor) and parameter.grad is not None
        assert torch.equal(d, parameter.grad)


def test_parts_hold_every_parameter_in_order_and_each_a_sixteenth_of_what_is_quantized() -> None:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(512, 512, generator=generator)) for _ in range(33)]
    params[7] = nn.Parameter(torch.randn(3))
    kept: dict[nn.Parameter, Any] = {p: quantize(p.detach()) for p in params if p.dim() > 1}
    kept[params[7]] = params[7].detach()
    del kept[params[9]]
    parts = Parts(kept)
    assert sum(memory.numel() for memory in parts._memory.values()) == 512 * 512
    found = []
    for together, tensors in parts.of(params):
        assert len(together) <= 3  # one of them quantized, beside the two that are not
        for parameter, tensor in zip(together, tensors, strict=True):
            found.append(parameter)
            d = kept.get(parameter)
            if isinstance(d, Quantized):
                assert tensor is not None
                assert torch.equal(tensor, dequantize(d, torch.float32))
            else:
                assert tensor is d
    assert all(a is b for a, b in zip(found, params, strict=True))
    exact = {p: d for p, d in kept.items() if isinstance(d, Tensor)}
    ((together, _),) = Parts(exact).of(params)
    assert len(together) == len(params), "nothing is quantized, so all at once"
