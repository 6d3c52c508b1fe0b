"""Steps that were plain AdamW's are counted, and warned of once, with the figure that says why."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from sap_fast.step.account import Account
from sap_fast.step.metrics import StepRecord
from tests.oracle import naive_task_loss
from tests.tiny import (
    assert_same_bits,
    plain_adamw,
    problem,
    safety,
    safety_loss,
    sap,
    step_by_passes,
    task,
    tiny_llama,
    weights,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")


def test_a_probe_gradient_of_nan_switches_the_probe_off_for_that_step() -> None:
    ours, theirs = problem(), problem()
    optimizer = sap(ours)
    adamw = plain_adamw(theirs.trained, lr=1e-2)
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


@pytest.mark.parametrize("every", [1, 2, 3])
def test_steps_under_a_direction_that_is_none_are_counted(every: int) -> None:
    case = problem(layers=3)
    optimizer = sap(case, direction_every=every)

    def no_safety() -> Tensor:
        loss = 0.0 * safety_loss(case)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step(lambda: task(case), no_safety)
    assert optimizer.metrics.skipped_steps == 3


def test_a_perturbation_lost_to_rounding_warns_once_with_the_figure() -> None:
    case = problem(lora=False, dtype=torch.bfloat16)
    optimizer = sap(case, {"rho": 1e-5})
    optimizer.passes.measures_rounding = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            step_by_passes(case, optimizer)
    messages = [str(w.message) for w in caught if "survives rounding" in str(w.message)]
    assert len(messages) == 1
    assert "torch.bfloat16" in messages[0] and "%" in messages[0] and "rho=1e-05" in messages[0]
    metrics = optimizer.metrics
    assert metrics.perturbation_applied is not None and metrics.perturbation_wanted is not None
    assert metrics.perturbation_applied < 0.5 * metrics.perturbation_wanted


def test_rounding_is_measured_in_the_dtype_of_autocast() -> None:
    # Half the perturbation is below half a unit in the last place of bf16, none of fp32.
    case = problem(lora=False)
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.copy_(parameter.bfloat16())
    optimizer = sap(case, {"rho": 1e-5})

    def autocast_task() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            loss = naive_task_loss(case.model, case.batch)
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="survives rounding to torch.bfloat16"):
        optimizer.step(autocast_task, lambda: safety(case))
    optimizer = sap(case, {"rho": 1e-5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_by_passes(case, optimizer)


def test_rounding_is_measured_in_the_dtype_of_an_adapter_whatever_its_base_has() -> None:
    # PEFT keeps adapters of a 16-bit or quantized base in fp32, and casts hidden states to that.
    base = tiny_llama(dtype=torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    case = problem()._replace(model=model)
    assert {p.dtype for p in case.trained} == {torch.float32}
    # Elements whose perturbation is far below a unit in the last place of bf16.
    optimizer = sap(case, {"rho": 1e-5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step_by_passes(case, optimizer)
    metrics = optimizer.metrics
    assert optimizer.probes.compute_dtype is None
    assert metrics.perturbation_applied == pytest.approx(metrics.perturbation_wanted, rel=1e-3)


def test_rounding_is_measured_once_and_again_at_another_rho() -> None:
    case = problem()
    optimizer = sap(case, {"rho": "auto"})
    measured = []
    for step in range(4):
        if step == 2:
            optimizer.passes.calibrate(lambda _: task(case), lambda: safety(case))
        optimizer.zero_grad()
        step_by_passes(case, optimizer)
        measured.append(optimizer.metrics.perturbation_applied is not None)
    assert measured == [True, False, True, False]


# ---- the account by itself ----


def record(
    norm: float, estimate: bool | None = None, applied: float | None = None, **more: Any
) -> StepRecord:
    def tensor(value: Any) -> Any:
        return None if value is None else torch.tensor(value)

    return StepRecord(
        rho=0.01,
        direction_norm=torch.tensor(norm),
        direction_valid=torch.tensor(norm).isfinite() & (torch.tensor(norm) > 0),
        estimate_finite=tensor(estimate),
        perturbation_norm=None if applied is None else torch.tensor(1.0),
        perturbation_applied=tensor(applied),
        **more,
    )


def settled(account: Account, *records: StepRecord) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for each in records:
            account.settle(each, torch.float32)
    return [str(warning.message) for warning in caught]


def test_steps_without_a_direction_or_h_are_counted_and_said_once() -> None:
    account = Account()
    assert settled(account, StepRecord(), record(1.0), record(1.0, True)) == []
    assert account.skipped_steps == 0
    (message,) = settled(account, record(0.0), record(float("nan")), record(1.0, False))
    assert "1 step(s) ran as plain AdamW" in message and "‖∇L_safe‖ = 0" in message
    assert account.skipped_steps == 3


def test_the_norm_that_is_said_is_that_without_the_scale() -> None:
    (message,) = settled(Account(), record(8.0, False, loss_scale=torch.tensor(4.0)))
    assert "‖∇L_safe‖ = 2)" in message


@pytest.mark.parametrize(
    ("norm", "applied", "count"), [(1.0, 0.6, 0), (1.0, 0.4, 1), (0.0, 0.4, 0)]
)
def test_a_perturbation_of_which_half_is_lost_is_said(
    norm: float, applied: float, count: int
) -> None:
    messages = settled(Account(), record(norm, applied=applied), record(norm, applied=applied))
    about = [message for message in messages if "survives rounding" in message]
    assert len(about) == count
    assert all("only 40.0% of the norm" in message for message in about)


def test_the_count_goes_through_a_state_dict_and_what_was_said_through_a_copy() -> None:
    account, other = Account(), Account()
    settled(account, record(0.0), record(0.0))
    other.load_state_dict(account.state_dict())
    settled(account, record(0.0))
    assert (account.skipped_steps, other.skipped_steps) == (3, 2)
    copied = pickle.loads(pickle.dumps(account))
    assert settled(copied, record(0.0)) == [] and copied.skipped_steps == 4
