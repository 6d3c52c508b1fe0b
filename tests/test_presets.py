"""What a step leaves out, and what the steps in between run under."""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import presets
from sap_fast.optimizer import PRESETS, FusedSAP
from sap_fast.probes import ProbeSet, find_decoder_layers
from tests.oracle import naive_contrastive_loss, naive_task_loss
from tests.tiny import Batch, Problem, problem, random_batch, safety, task

pytestmark = pytest.mark.usefixtures("cpu_backend")


def sap(case: Problem, **options: Any) -> FusedSAP:
    settings: dict[str, Any] = {"lr": 1e-2, "rho": 1e-3, "probe_lr": 0.05}
    return FusedSAP(case.trained, ProbeSet(case.model, layers=[1, 2]), **(settings | options))


class Counted:
    """A task and a safety closure that say when they ran."""

    def __init__(self, case: Problem, optimizer: FusedSAP) -> None:
        self.case, self.optimizer = case, optimizer
        self.task_calls = self.safety_calls = 0

    def step(self, seed: int = 0) -> tuple[int, int]:
        """Run a step; return how often the safety and the task closure ran."""
        self.task_calls = self.safety_calls = 0
        batch = random_batch(rows=4, seed=seed)

        def task_closure() -> Tensor:
            self.task_calls += 1
            return task(self.case, self.optimizer.probe_part(batch))

        def safety_closure() -> Tensor:
            self.safety_calls += 1
            return safety(self.case)

        self.optimizer.zero_grad()
        self.optimizer.step(task_closure, safety_closure)
        return self.safety_calls, self.task_calls


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [(1, 3)] * 6),
        ({"probe_every": 2}, [(1, 3), (0, 1)] * 3),
        ({"probe_every": 3, "direction_every": 2}, [(1, 3), (0, 1), (0, 1)] * 2),
        ({"direction_every": 2}, [(1, 3), (0, 3)] * 3),
        ({"direction_every": 4, "probe_every": 2}, [(1, 3), (0, 1), (0, 3), (0, 1)] * 2),
        ({"probe_every": 3, "safety_weight": 0.1}, [(1, 3), (1, 1), (1, 1)] * 2),
        (
            {"probe_every": 2, "direction_every": 3, "safety_weight": 0.1},
            [(1, 3), (0, 1), (0, 3), (1, 1), (0, 3), (0, 1)],
        ),
        ({"probe_every": 2, "schedule": "lagged"}, [(1, 2), (0, 1)] * 3),
    ],
    ids=str,
)
def test_only_the_passes_that_are_due_run(
    options: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    case = problem()
    optimizer = sap(case, **options)
    counted = Counted(case, optimizer)
    for step, calls in enumerate(expected):
        due = optimizer.needs_direction, optimizer.needs_probe
        passes = 2 if optimizer.schedule == "lagged" else 3
        assert due == (calls[0] == 1, calls[1] == passes)
        assert counted.step(step) == calls, step


def test_presets_are_settings_that_arguments_override() -> None:
    for name, preset in PRESETS.items():
        optimizer = sap(problem(), preset=name)
        for setting, value in vars(preset).items():
            assert getattr(optimizer, setting) == value
    optimizer = sap(problem(), preset="economical", probe_every=1)
    assert optimizer.probe_every == 1
    assert optimizer.direction_every == PRESETS["economical"].direction_every


def test_steps_in_between_run_under_the_probe_there_is() -> None:
    case = problem()
    optimizer = sap(case, probe_every=3)
    assert optimizer.probes is not None
    counted = Counted(case, optimizer)
    counted.step()
    offsets = optimizer.probes.offsets
    for seed in (1, 2):
        batch = random_batch(rows=4, seed=seed)
        with optimizer.probes.active(inject=True):
            expected = torch.autograd.grad(naive_task_loss(case.model, batch), case.trained)
        without = torch.autograd.grad(naive_task_loss(case.model, batch), case.trained)
        counted.step(seed)
        assert any(not torch.equal(a, b) for a, b in zip(expected, without, strict=True))
        for parameter, gradient in zip(case.trained, expected, strict=True):
            assert torch.equal(parameter.grad, gradient)
        for index, offset in optimizer.probes.offsets.items():
            assert torch.equal(offset, offsets[index])
    counted.step(3)
    assert not torch.equal(optimizer.probes.offsets[1], offsets[1])


def test_a_kept_direction_is_that_of_the_step_that_took_it() -> None:
    case = problem()
    optimizer = sap(case, direction_every=2, probe_lr=0.0)
    gradient = torch.autograd.grad(safety_loss(case), case.trained)
    norm = torch.stack([(g * g).sum() for g in gradient]).sum().sqrt()
    Counted(case, optimizer).step()

    before = [p.detach().clone() for p in case.trained]
    wanted = 1e-3 * torch.stack([(w * w).sum() for w in before]).sum().sqrt()
    params = case.trained
    assert not optimizer.needs_direction
    for _ in optimizer.probe_passes():
        if optimizer._passes.record.probe_losses[1:]:
            break
        for p, w, g in zip(params, before, gradient, strict=True):
            torch.testing.assert_close(p - w, wanted * g / norm, rtol=1e-3, atol=1e-6)
        task(case)
    for p, w in zip(params, before, strict=True):
        assert torch.equal(p, w)


def safety_loss(case: Problem) -> Tensor:
    return naive_contrastive_loss(case.model, case.chosen, case.rejected)


def test_blending_alone_may_use_a_direction_several_times() -> None:
    case = problem()
    optimizer = FusedSAP(case.trained, None, lr=0.0, safety_weight=0.5, direction_every=3)
    direction = torch.autograd.grad(safety_loss(case), case.trained)
    ran = []
    for seed in range(4):
        optimizer.zero_grad()
        ran.append(optimizer.needs_direction)
        if optimizer.needs_direction:
            with optimizer.safety_pass():
                safety(case)
        with optimizer.task_pass():
            task(case, random_batch(seed=seed))
        gradients = [p.grad.clone() for p in case.trained if p.grad is not None]
        moments = [optimizer.state[p].get("exp_avg", 0.0) for p in case.trained]
        moments = [m.clone() if isinstance(m, Tensor) else m for m in moments]
        optimizer.step()
        scale = 0.5 * norm_of(gradients) / norm_of(direction)
        for p, g, d, m in zip(case.trained, gradients, direction, moments, strict=True):
            expected = 0.9 * m + 0.1 * (g + scale * d)
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected)
    assert ran == [True, False, False, True]


def norm_of(tensors: Any) -> Tensor:
    return torch.stack([(t * t).sum() for t in tensors]).sum().sqrt()


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "balanced"},
        {"preset": "economical"},
        {"direction_every": 3},
        {"direction_every": 3, "probe_every": 2, "safety_weight": 0.1},
        {"schedule": "lagged", "probe_every": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("after", [1, 3])
def test_a_resumed_run_goes_on_with_the_same_bits(options: dict[str, Any], after: int) -> None:
    straight, resumed = problem(dropout=0.1), problem(dropout=0.1)
    first = sap(straight, **options)
    torch.manual_seed(3)
    for step in range(after):
        Counted(straight, first).step(step)
    random_state = torch.get_rng_state()
    buffer = io.BytesIO()
    torch.save({"model": straight.model.state_dict(), "optimizer": first.state_dict()}, buffer)
    for step in range(after, after + 5):
        Counted(straight, first).step(step)

    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    second = sap(resumed, **options)
    second.load_state_dict(saved["optimizer"])
    torch.set_rng_state(random_state)
    for step in range(after, after + 5):
        Counted(resumed, second).step(step)
    for left, right in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert first.directions_taken == second.directions_taken


def test_a_direction_is_freed_before_another_takes_its_place() -> None:
    case = problem()
    optimizer = sap(case, direction_every=2)
    kept: list[bool] = []

    def safety_closure() -> Tensor:
        kept.append(any("direction" in state for state in optimizer.state.values()))
        return safety(case)

    for step in range(5):
        optimizer.zero_grad()
        optimizer.step(lambda: task(case), safety_closure)
        assert all("direction" in optimizer.state[p] for p in case.trained), step
    assert kept == [False, False, False]


def test_calibration_keeps_the_direction_of_an_earlier_step() -> None:
    case = problem()
    optimizer = sap(case, direction_every=3)
    Counted(case, optimizer).step()
    before = [optimizer.state[p]["direction"].clone() for p in case.trained]
    optimizer.calibrate_rho(lambda: task(case), lambda: safety(case))
    assert not optimizer.needs_direction
    for parameter, direction in zip(case.trained, before, strict=True):
        assert torch.equal(optimizer.state[parameter]["direction"], direction)


def test_a_probe_that_was_not_saved_is_found_anew() -> None:
    case = problem()
    optimizer = sap(case)
    Counted(case, optimizer).step()
    other = sap(case, probe_every=5, direction_every=5)
    other.load_state_dict(optimizer.state_dict())
    assert other.needs_probe and other.needs_direction


def test_the_place_of_the_direction_is_there_before_the_first_step() -> None:
    case = problem()
    optimizer = sap(case, direction_every=2)
    for parameter in case.trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all("direction" in optimizer.state[parameter] for parameter in case.trained)
    assert optimizer.needs_direction
    # Where no later step uses it, there is none.
    plain = sap(case, direction_every=5, probe_every=5)
    Counted(case, plain).step()
    assert all("direction" not in plain.state[parameter] for parameter in case.trained)


def test_steps_under_the_probe_of_a_step_without_a_direction_are_counted() -> None:
    case = problem()
    optimizer = sap(case, probe_every=2)

    def no_safety() -> Tensor:
        loss = 0.0 * safety_loss(case)
        loss.backward()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in range(3):
            optimizer.zero_grad()
            batch = random_batch(seed=seed)
            optimizer.step(lambda batch=batch: task(case, batch), no_safety)
    assert optimizer.metrics.skipped_steps == 3


@pytest.mark.parametrize(("fraction", "rows"), [(0.5, 2), (0.6, 3), (0.01, 1), (1.0, 4)])
def test_the_probe_passes_see_the_first_rows(fraction: float, rows: int) -> None:
    case = problem()
    optimizer = sap(case, probe_fraction=fraction)
    Counted(case, optimizer).step(seed=4)
    other = problem()
    whole = sap(other)
    batch = random_batch(rows=4, seed=4)
    with whole.safety_pass():
        safety(other)
    for _ in whole.probe_passes():
        task(other, {key: value[:rows] for key, value in batch.items()})
    assert optimizer.probes is not None and whole.probes is not None
    for index, estimate in whole.probes.estimates.items():
        assert torch.equal(optimizer.probes.estimates[index], estimate)


def test_a_part_of_micro_batches_counts_their_rows() -> None:
    case = problem()
    optimizer = sap(case, probe_fraction=0.5)
    micro_batches: list[Batch] = [random_batch(rows=rows, seed=rows) for rows in (2, 3, 4)]
    sizes = []
    with optimizer.safety_pass():
        safety(case)
    parts = []
    for _ in optimizer.probe_passes():
        parts.append(optimizer.probe_part(micro_batches))
        sizes.append([len(part["input_ids"]) for part in parts[-1]])
        for part in parts[-1]:
            task(case, part)
    assert sizes == [[2, 3], [2, 3]]
    assert parts[0] is parts[1]
    with optimizer.task_pass():
        assert optimizer.probe_part(micro_batches) is micro_batches


def test_a_fraction_that_no_one_asks_for_warns() -> None:
    case = problem()
    optimizer = sap(case, probe_fraction=0.5)
    with pytest.warns(UserWarning, match=r"probe_fraction=0.5 had no effect.*probe_part"):
        optimizer.step(lambda: task(case), lambda: safety(case))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "cheap"}, "preset='cheap'.*paper, balanced, economical"),
        ({"direction_every": 0}, "direction_every=0 is out of range"),
        ({"probe_every": -1}, "probe_every=-1 is out of range"),
        ({"probe_fraction": 0.0}, "probe_fraction=0.0 is out of range"),
        ({"probe_fraction": 1.5}, "probe_fraction=1.5 is out of range"),
        ({"checkpointing": "some"}, "checkpointing='some'.*none, layers, auto"),
    ],
)
def test_settings_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sap(problem(), **options)


@pytest.mark.parametrize("options", [{"probe_every": 2}, {"probe_fraction": 0.5}], ids=str)
def test_a_probe_per_token_fits_its_own_batch_only(options: dict[str, Any]) -> None:
    case = problem()
    probes = ProbeSet(case.model, shape="token")
    with pytest.raises(ValueError, match="fits its own batch only"):
        FusedSAP(case.trained, probes, **options)


def test_checkpointing_without_a_probe_set_is_refused() -> None:
    case = problem()
    with pytest.raises(ValueError, match="needs a ProbeSet"):
        FusedSAP(case.trained, None, checkpointing="layers")


@pytest.mark.parametrize(
    "options", [{}, {"difference": "forward"}, {"schedule": "lagged"}, {"probe_every": 2}], ids=str
)
@pytest.mark.parametrize("lora", [True, False])
def test_checkpointing_changes_no_bit(lora: bool, options: dict[str, Any]) -> None:
    results = []
    for mode in ("none", "layers", "auto"):
        case = problem(lora=lora, dropout=0.2)
        optimizer = sap(case, checkpointing=mode, **options)
        if optimizer.activation_checkpointing is not None:
            # Room for what half the layers store.
            optimizer.activation_checkpointing.budget = 2**17
        torch.manual_seed(11)
        layer_runs = []
        handle = find_decoder_layers(case.model)[0][3].input_layernorm.register_forward_hook(
            lambda *_, runs=layer_runs: runs.append(1)
        )
        for step in range(2):
            Counted(case, optimizer).step(step)
        handle.remove()
        results.append(([p.detach().clone() for p in case.model.parameters()], len(layer_runs)))
    (plain, runs), (layers, more_runs), (auto, auto_runs) = results
    for other in (layers, auto):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    # Every forward of the highest layer, again in its backward.
    assert more_runs == 2 * runs
    assert runs <= auto_runs <= more_runs


def test_the_price_of_presets_is_measured_against_the_full_step(tmp_path: Path) -> None:
    vectors = {0: torch.tensor([1.0, 0.0]), 1: torch.tensor([0.0, 2.0])}
    turned = {0: torch.tensor([3.0, 0.0]), 1: torch.tensor([1.0, 0.0])}
    assert presets.similarity(vectors, turned) == pytest.approx(0.5)

    presets.main(["--quick", "--steps", "9", "--output", str(tmp_path)])
    with (tmp_path / "presets.csv").open(encoding="utf-8") as file:
        rows = {row["settings"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(presets.SETTINGS)
    assert {row["steps"] for row in rows.values()} == {"4"}
    # Of steps 5 to 8 the probe of every second one is the full step's.
    assert float(rows["probe_every=2"]["cosine_high"]) > 0.999
    assert float(rows["probe_every=2"]["cosine"]) < 0.99
    assert all(row["commit"] and row["device"] for row in rows.values())
    assert (tmp_path / "presets.png").stat().st_size > 10_000
