"""`torch.amp.GradScaler`: the scale leaves no trace in a step, an overflow leaves none at all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from sap_fast.losses import contrastive_loss, task_loss
from sap_fast.optimizer import FusedSAP
from sap_fast.probes import ProbeSet
from tests.tiny import Problem, problem

SCALE = 2.0**12
VARIANTS = [
    {"schedule": "paper", "difference": "central"},
    {"schedule": "paper", "difference": "forward"},
    {"schedule": "lagged"},
]
RULES = ["normalized", "gradient", "adam"]
PROBES = ("probe 0", "probe 1")
PLACES = [
    *((variant, place) for variant in VARIANTS[:2] for place in ("safety", *PROBES, "task")),
    *((VARIANTS[2], place) for place in ("safety", "probe 0", "task")),
    # Disturbed in its third step, for which a direction is kept.
    *(({"probe_every": 2, "direction_every": 3}, place) for place in (*PROBES, "task")),
]


class Run:
    """A model that is trained pass by pass, with or without a scaler."""

    def __init__(self, scaler: torch.amp.GradScaler | None, **options: Any) -> None:
        self.case: Problem = problem()
        self.scaler = scaler
        settings: dict[str, Any] = {
            "lr": 1e-2,
            "rho": 1e-3,
            "probe_lr": 0.02,
            "backend": "reference",
        }
        probes = ProbeSet(self.case.model, layers=[1, 2])
        self.optimizer = FusedSAP(
            self.case.trained, probes, grad_scaler=scaler, **(settings | options)
        )

    def step(self, overflow: str = "") -> None:
        """Run a step; the loss of the pass `overflow` is multiplied by infinity."""
        optimizer, case = self.optimizer, self.case

        def backward(loss: Tensor, name: str) -> None:
            loss = loss * torch.inf if name == overflow else loss
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

        if optimizer.needs_direction:
            with optimizer.safety_pass():
                backward(contrastive_loss(case.model, case.chosen, case.rejected), "safety")
        if optimizer.needs_probe:
            for number, _ in enumerate(optimizer.probe_passes()):
                backward(task_loss(case.model, case.batch), f"probe {number}")
        with optimizer.task_pass():
            backward(task_loss(case.model, case.batch), "task")
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad()

    def state(self) -> Any:
        """Everything that a later step depends on."""
        parameters = {name: p.detach().clone() for name, p in self.case.model.named_parameters()}
        return parameters, copy.deepcopy(self.optimizer.state_dict())


def scaler(growth_interval: int = 2000) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=SCALE, growth_interval=growth_interval)


def assert_same_bits(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_scale_of_a_power_of_two_leaves_every_bit(options, rule):
    options = options | {"probe_rule": rule, "safety_weight": 0.5, "max_grad_norm": 1.0}
    # The scale doubles after every other step.
    plain, scaled = Run(None, **options), Run(scaler(growth_interval=2), **options)
    for _ in range(4):
        plain.step()
        scaled.step()
    assert scaled.scaler is not None and scaled.scaler.get_scale() == 4 * SCALE
    assert_same_bits(scaled.state()[0], plain.state()[0])
    assert_same_bits(scaled.optimizer.probes.offsets, plain.optimizer.probes.offsets)
    assert_same_bits(scaled.optimizer.metrics.lean, plain.optimizer.metrics.lean)


@pytest.mark.parametrize(("options", "place"), PLACES, ids=str)
def test_an_overflow_in_any_pass_skips_the_step_and_leaves_all_as_it_was(options, place):
    disturbed, undisturbed = Run(scaler(), **options), Run(scaler(), **options)
    for run in (disturbed, undisturbed):
        run.step()
        if "probe_every" in options:
            run.step()
    before = disturbed.state()
    disturbed.step(overflow=place)
    assert_same_bits(disturbed.state(), before)
    assert disturbed.scaler is not None and disturbed.scaler.get_scale() == SCALE / 2
    for run in (disturbed, undisturbed):
        run.step()
        run.step()
    assert_same_bits(disturbed.state(), undisturbed.state())


def test_without_a_scaler_an_overflow_in_a_probe_pass_is_plain_adamw():
    run = Run(None)
    before = run.state()[0]
    with pytest.warns(UserWarning, match="ran as plain AdamW"):
        run.step(overflow="probe 0")
        run.step()
    assert any(not torch.equal(a, before[name]) for name, a in run.state()[0].items())


def test_a_step_that_is_given_up_gives_back_v():
    run = Run(None, schedule="lagged")
    run.step()
    run.step()
    before = run.optimizer.probes.copy_offsets()
    kept = copy.deepcopy(run.optimizer.state_dict()["sap"])
    with run.optimizer.safety_pass():
        contrastive_loss(run.case.model, run.case.chosen, run.case.rejected).mul(0).backward()
    for _ in run.optimizer.probe_passes():  # a direction of zero norm sets V to zero
        task_loss(run.case.model, run.case.batch).backward()
    assert_same_bits(run.optimizer.state_dict()["sap"], kept)
    with run.optimizer.safety_pass():
        contrastive_loss(run.case.model, run.case.chosen, run.case.rejected).backward()
    assert_same_bits(run.optimizer.probes.copy_offsets(), before)


def test_accelerate_drives_a_scaled_step():
    """Its scaler goes in; `backward` scales, the prepared optimizer's `step` unscales and skips."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler()  # as mixed_precision="fp16" sets it on a GPU
    run = Run(accelerator.scaler)
    prepared = accelerator.prepare(run.optimizer)
    prepared.scaler = accelerator.scaler
    plain = Run(None)
    plain.step()
    optimizer, case = run.optimizer, run.case
    with optimizer.safety_pass():
        accelerator.backward(contrastive_loss(case.model, case.chosen, case.rejected))
    for _ in optimizer.probe_passes():
        accelerator.backward(task_loss(case.model, case.batch))
    with optimizer.task_pass():
        accelerator.backward(task_loss(case.model, case.batch))
    prepared.step()
    assert not prepared.step_was_skipped
    assert_same_bits(run.state()[0], plain.state()[0])
