"""`torch.amp.GradScaler`: the scale leaves no trace in a step, an overflow leaves none at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet
from sap_fast.losses import contrastive_loss, task_loss
from tests.oracle import cosine, naive_task_loss
from tests.tiny import Problem, assert_same_bits, problem, safety_loss

SCALE = 2.0**12
#: (keywords of ProbeSet, None without a probe; keywords of the optimizer)
Variant = tuple[dict[str, Any] | None, dict[str, Any]]
CENTRAL: Variant = ({"difference": "central"}, {})
FORWARD: Variant = ({"difference": "forward"}, {})
KEPT: Variant = ({}, {"direction_every": 3, "safety_weight": 0.5, "rule": "floor"})
BLENDED: Variant = (None, {"safety_level": "auto", "max_grad_norm": 1.0})
RULES = ["normalized", "gradient", "adam"]
PROBES = ("probe 0", "probe 1")
PLACES = [
    *((variant, place) for variant in (CENTRAL, FORWARD) for place in ("safety", *PROBES, "task")),
    # Disturbed in its third step, for which a direction is kept.
    *((KEPT, place) for place in (*PROBES, "task")),
    *((BLENDED, place) for place in ("safety", "task")),
]


class Run:
    """A model that is trained pass by pass, with or without a scaler."""

    def __init__(
        self, scaler: torch.amp.GradScaler | None, variant: Variant = CENTRAL, **options: Any
    ) -> None:
        self.case: Problem = problem()
        self.scaler = scaler
        probe, more = variant
        options = {"lr": 1e-2, "backend": "reference", "grad_scaler": scaler} | more | options
        rule = options.pop("probe_rule", "normalized")
        if probe is None:
            self.optimizer = BlendedAdamW(self.case.trained, **options)
            return
        settings: dict[str, Any] = {"rho": 1e-3, "size": 0.02, "rule": rule} | probe
        probes = ProbeSet(self.case.model, [1, 2], **settings)
        self.optimizer = FusedSAP(self.case.trained, probes, **options)

    def step(self, overflow: str = "") -> None:
        """Run a step; the loss of the pass `overflow` is multiplied by infinity."""
        optimizer, case = self.optimizer, self.case
        names = iter(PROBES)

        def backward(loss: Tensor, name: str) -> Tensor:
            scaled = loss * torch.inf if name == overflow else loss
            (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()
            return loss

        optimizer.inner_passes(
            lambda _: backward(task_loss(case.model, case.batch), next(names)),
            lambda: backward(contrastive_loss(case.model, case.chosen, case.rejected), "safety"),
        )
        with optimizer.task_pass() as record:
            record(backward(task_loss(case.model, case.batch), "task"))
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad()

    def state(self) -> Any:
        """Everything that a later step depends on, a kept direction without its scale."""
        parameters = {name: p.detach().clone() for name, p in self.case.model.named_parameters()}
        state = copy.deepcopy(self.optimizer.state_dict())
        direction = state["sap"]["direction"]
        scale = direction.pop("scale")
        if scale is not None:
            direction["square"] /= scale**2
            for tensor in direction["tensors"].values():
                tensor /= scale
        return parameters, state


def scaler(growth_interval: int = 2000) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=growth_interval)


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        *((CENTRAL, {"probe_rule": rule}) for rule in RULES),
        *((FORWARD, {"probe_rule": rule}) for rule in RULES),
        (CENTRAL, {"direction_every": 2, "rule": "project"}),
        (CENTRAL, {"rule": "floor", "safety_level": "auto"}),
        (BLENDED, {}),
    ],
    ids=str,
)
def test_a_scale_of_a_power_of_two_leaves_every_bit(
    variant: Variant, options: dict[str, Any]
) -> None:
    options = {"safety_weight": 0.5, "max_grad_norm": 1.0} | options
    # The scale doubles after every other step.
    plain = Run(None, variant, **options)
    scaled = Run(scaler(growth_interval=2), variant, **options)
    for run in (plain, scaled):
        for _ in range(4):
            run.step()
    assert scaled.scaler is not None and scaled.scaler.get_scale() == 4 * SCALE
    assert_same_bits(scaled.state()[0], plain.state()[0])
    assert scaled.optimizer.metrics == plain.optimizer.metrics
    if variant is not BLENDED:
        assert_same_bits(scaled.optimizer.probes.offsets, plain.optimizer.probes.offsets)
        held = scaled.optimizer.metrics.above_level is False
        assert (scaled.optimizer.metrics.lean is None) == held


@pytest.mark.parametrize(("variant", "place"), PLACES, ids=str)
def test_an_overflow_in_any_pass_skips_the_step_and_leaves_all_as_it_was(
    variant: Variant, place: str
) -> None:
    disturbed, undisturbed = Run(scaler(), variant), Run(scaler(), variant)
    for run in (disturbed, undisturbed):
        run.step()
        if variant is KEPT:
            run.step()
    before = disturbed.state()
    disturbed.step(overflow=place)
    assert_same_bits(disturbed.state(), before)
    assert disturbed.scaler is not None and disturbed.scaler.get_scale() == SCALE / 2
    for run in (disturbed, undisturbed):
        run.step()
        run.step()
    assert_same_bits(disturbed.state(), undisturbed.state())


def test_without_a_scaler_an_overflow_in_a_probe_pass_is_plain_adamw() -> None:
    run = Run(None)
    before = run.state()[0]
    with pytest.warns(UserWarning, match="ran as plain AdamW"):
        run.step(overflow="probe 0")
        run.step()
    assert any(not torch.equal(a, before[name]) for name, a in run.state()[0].items())


@pytest.mark.parametrize("variant", [CENTRAL, KEPT], ids=str)
def test_a_step_that_is_given_up_is_in_no_state(variant: Variant) -> None:
    run = Run(None, variant)
    run.step()
    run.step()
    kept = copy.deepcopy(run.optimizer.state_dict()["sap"])

    def backward(loss: Tensor) -> Tensor:
        loss.backward()
        return loss

    for factor in (0.0, 1.0):  # a direction of zero norm, and one that is sound
        run.optimizer.inner_passes(
            lambda _: backward(task_loss(run.case.model, run.case.batch)),
            lambda factor=factor: backward(factor * safety_loss(run.case)),
        )
        assert_same_bits(run.optimizer.state_dict()["sap"], kept)


def test_h_under_fp16_autocast_is_that_of_fp32() -> None:
    """Without the scale, small gradients of fp16 vanish; with it, h is divided by it again."""
    estimates = []
    for half in (False, True):
        case = problem(lora=False)
        own = scaler() if half else None
        probes = ProbeSet(case.model, [1, 2], rho=1e-2)
        optimizer = FusedSAP(case.trained, probes, lr=0.0, grad_scaler=own)

        def scaled(loss: Tensor, own: torch.amp.GradScaler | None = own) -> Tensor:
            (loss if own is None else own.scale(loss)).backward()
            return loss

        def task(_: None, case: Problem = case, half: bool = half, scaled: Any = scaled) -> Tensor:
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = naive_task_loss(case.model, case.batch)
            return scaled(loss)

        def safety(case: Problem = case, half: bool = half, scaled: Any = scaled) -> Tensor:
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = safety_loss(case)
            return scaled(loss)

        optimizer.inner_passes(task, safety)
        estimates.append(probes.estimates)
    assert cosine(*estimates) > 0.98
    for index in (1, 2):
        assert estimates[1][index].norm() == pytest.approx(
            estimates[0][index].norm().item(), rel=0.05
        )


def test_accelerate_drives_a_scaled_step() -> None:
    """Its scaler goes in; `backward` scales, the prepared optimizer's `step` unscales and skips."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler()  # as mixed_precision="fp16" sets it on a GPU
    run = Run(accelerator.scaler)
    prepared = accelerator.prepare(run.optimizer)
    prepared.scaler = accelerator.scaler
    plain = Run(None)
    plain.step()
    case = run.case

    def backward(loss: Tensor) -> Tensor:
        accelerator.backward(loss)
        return loss

    run.optimizer.inner_passes(
        lambda _: backward(task_loss(case.model, case.batch)),
        lambda: backward(contrastive_loss(case.model, case.chosen, case.rejected)),
    )
    with run.optimizer.task_pass():
        backward(task_loss(case.model, case.batch))
    prepared.step()
    assert not prepared.step_was_skipped
    assert_same_bits(run.state()[0], plain.state()[0])
