"""Figures of a step are those of the step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sap_fast import BlendedAdamW, SAPMetrics
from sap_fast.step.metrics import LossRecord, Mailbox, StepRecord
from tests.tiny import closures, norm_of, problem, safety, sap, step_by_passes, task

pytestmark = pytest.mark.usefixtures("cpu_backend")


def test_metrics_are_the_figures_of_the_step() -> None:
    case = problem()
    optimizer = sap(case, {"size": 3e-3})
    clean_task, clean_safety = task(case).item(), safety(case).item()
    norm = norm_of([p.detach() for p in case.trained])
    optimizer.zero_grad()
    step_loss = optimizer.step(lambda: task(case), lambda: safety(case))
    metrics = optimizer.metrics
    assert metrics.safety_loss == pytest.approx(clean_safety, rel=1e-6)
    assert step_loss is not None and metrics.task_loss == step_loss.item()
    assert metrics.task_loss == pytest.approx(clean_task, rel=0.1)
    assert metrics.task_loss != clean_task
    assert metrics.parameter_norm == pytest.approx(norm, rel=1e-5)
    assert metrics.perturbation_wanted == pytest.approx(1e-3 * norm, rel=1e-5)
    assert metrics.perturbation_applied == pytest.approx(1e-3 * norm, rel=1e-3)
    assert optimizer.probes is not None
    for index in (1, 2):
        assert metrics.estimate_norms[index] == optimizer.probes.estimates[index].norm().item()
        assert metrics.probe_sizes[index] == pytest.approx(3e-3, rel=1e-5)
    assert metrics.safety_level is None and metrics.above_level is None
    flat = metrics.flat()
    assert flat["sap/probe_sizes/1"] == metrics.probe_sizes[1]
    assert flat["sap/rho"] == 1e-3
    assert "sap/rho_agreement" not in flat
    assert all(isinstance(figure, float) for figure in metrics.flat("x/").values())
    assert set(metrics.flat("")) == {name.removeprefix("sap/") for name in flat}


def test_metrics_are_of_the_last_step_that_was_completed() -> None:
    case = problem()
    optimizer = sap(case)
    assert optimizer.metrics == SAPMetrics()
    step_by_passes(case, optimizer)
    before = optimizer.metrics
    assert before.rho == 1e-3 and before.skipped_steps == 0
    optimizer.inner_passes(*closures(case))
    assert optimizer.metrics.safety_loss == before.safety_loss
    with optimizer.task_pass():
        task(case)
        assert optimizer.metrics.safety_loss == before.safety_loss
    optimizer.step()
    assert optimizer.metrics.safety_loss != before.safety_loss
    # One without passes has no figures.
    optimizer.step()
    assert optimizer.metrics == SAPMetrics()


def test_lean_is_there_in_every_step_with_a_probe_and_only_there() -> None:
    case = problem()
    optimizer = sap(case)
    step_by_passes(case, optimizer)
    probes = optimizer.probes
    product = sum((probes.estimates[j] * v).sum().item() for j, v in probes.offsets.items())
    assert optimizer.metrics.lean == pytest.approx(product, rel=1e-6) and product > 0
    probes.estimates = {j: h * torch.inf for j, h in probes.estimates.items()}
    assert optimizer.metrics.lean is None
    optimizer.step()
    assert optimizer.metrics.lean is None


def test_metrics_of_blending_and_of_plain_adamw() -> None:
    case = problem()
    optimizer = BlendedAdamW(case.trained, safety_weight=0.0)
    optimizer.step(lambda: task(case))
    metrics = optimizer.metrics
    assert metrics.task_loss is not None
    assert metrics == SAPMetrics(task_loss=metrics.task_loss)
    blended = BlendedAdamW(case.trained, safety_level=0.0)
    step_by_passes(case, blended)
    metrics = blended.metrics
    assert metrics.safety_loss is not None and metrics.parameter_norm is not None
    assert (metrics.safety_level, metrics.above_level) == (0.0, True)
    assert metrics.rho is None and metrics.lean is None and metrics.probe_sizes == {}


def test_losses_of_micro_batches_add_up() -> None:
    record = LossRecord()
    loss = torch.tensor(1.5, requires_grad=True)
    record(loss)
    record(2 * loss)
    assert record.total is not None and record.total.item() == 4.5
    assert not record.total.requires_grad
    with torch.no_grad():
        loss.add_(1)  # a loss that is written to later is another
    assert record.total.item() == 4.5


@pytest.mark.parametrize(
    ("norm", "estimate", "finite"),
    [
        (None, None, True),
        (1.0, None, True),
        (float("nan"), None, False),
        (1.0, False, False),
        (float("inf"), True, False),
    ],
)
def test_a_step_is_finite_if_its_direction_and_h_are(
    norm: float | None, estimate: bool | None, finite: bool
) -> None:
    def tensor(value: float | bool | None) -> Tensor | None:
        return None if value is None else torch.tensor(value)

    record = StepRecord(direction_norm=tensor(norm), estimate_finite=tensor(estimate))
    assert bool(record.is_finite) == finite


def test_what_is_posted_is_collected_once_and_the_latest_only() -> None:
    mailbox = Mailbox()
    assert mailbox.collect() is None
    mailbox.post(torch.tensor([1.0]))
    mailbox.post(torch.tensor([2.0, 3.0]))
    assert mailbox.collect() == [2.0, 3.0]
    assert mailbox.collect() is None
