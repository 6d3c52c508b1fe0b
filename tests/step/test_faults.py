"""What goes wrong in a step: errors, numbers that are not finite, odd batches, a lost rank.

Errors inside of operations are in test_passes.py, fp16 overflow in test_grad_scaler.py.
"""

from __future__ import annotations

import copy
import itertools
import time
import warnings
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from sap_fast import FusedSAP, ProbeSet, contrastive_loss, ops, task_loss
from sap_fast.data import SafetyCollator, TaskCollator
from sap_fast.model.layers import find_decoder_layers
from tests.ranks import RANKS, on_ranks
from tests.step.faults import ERRORS, FailingUpdate, Faults
from tests.tiny import (
    Problem,
    assert_same_bits,
    assert_unchanged,
    closures,
    plain_adamw,
    problem,
    random_batch,
    safety,
    snapshot,
    spread,
    task,
    weights,
)
from tests.tiny import sap as sap_of

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1}
PROBE = {"rho": 1e-2, "size": 0.05}


def sap(case: Problem, probe: dict[str, Any] | None = None, **options: Any) -> FusedSAP:
    return sap_of(case, PROBE | (probe or {}), **(SETTINGS | options))


# ---- an error between any two calls of a step ----


class Run:
    """A model in training, by closures or pass by pass; gradients are cleared every second step."""

    def __init__(
        self, faults: Faults, lora: bool, probe: dict[str, Any], options: dict[str, Any]
    ) -> None:
        self.case = problem(lora=lora, layers=2, dropout=0.1)
        self.case.model.register_buffer("kept", torch.ones(3))
        faults.watch_model(self.case)
        self.optimizer = sap(self.case, {"layers": [0, 1]} | probe, **options)
        self.task = faults.around("task closure", self._task)
        self.safety = faults.around("safety closure", self._safety)

    def _task(self, part: Any) -> Tensor:
        loss = task_loss(self.case.model, part)
        loss.backward()
        return loss

    def _safety(self) -> Tensor:
        loss = contrastive_loss(self.case.model, self.case.chosen, self.case.rejected)
        loss.backward()
        return loss

    @property
    def direction_is_due(self) -> bool:
        passes = self.optimizer.passes
        return passes.direction.is_due(passes.steps)

    def step(self, by_passes: bool) -> None:
        optimizer, batch = self.optimizer, self.case.batch
        if optimizer.probes.rho == "auto":
            optimizer.passes.calibration = None  # in every step, to fail there too
        if not by_passes:
            optimizer.step(self.task, self.safety, batch)
            return
        optimizer.inner_passes(self.task, self.safety, batch)
        with optimizer.task_pass() as record:
            record(self.task(batch))
        optimizer.step()

    def state(self, *, with_direction: bool = True) -> list[Any]:
        """Buffers, and what a checkpoint would hold of the optimizer."""
        state_dict = copy.deepcopy(self.optimizer.state_dict())
        # A calibration that was completed before the error stays.
        del state_dict["sap"]["calibration"]
        if not with_direction:
            for name in ("step", "square", "scale", "tensors"):
                del state_dict["sap"]["direction"][name]
        return tree_leaves([copy.deepcopy(list(self.case.model.buffers())), state_dict])

    def everything(self) -> list[Any]:
        values = [p.detach() for p in self.case.model.parameters()]
        gradients = [p.grad for p in self.case.trained]
        return [*values, *gradients, torch.get_rng_state(), *self.state()]


def assert_same(found: list[Any], wanted: list[Any], where: Any) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b) if isinstance(b, Tensor) else a == b, where


#: (keywords of ProbeSet, keywords of FusedSAP)
VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"difference": "central"}, {}),
    ({"difference": "forward"}, {}),
    ({"rule": "gradient"}, {"safety_weight": 0.5, "max_grad_norm": 1.0}),
    ({"rows": 0.5}, {"direction_every": 2, "safety_weight": 0.5, "max_grad_norm": 1.0}),
    ({"rho": "auto"}, {}),
]


@pytest.mark.parametrize(
    ("cpu_backend", "variant"),
    # The last two have in them what the first three have, but forward differences; these are in
    # test_passes.py.
    spread([("native", "reference"), range(len(VARIANTS))], {(0, 3), (1, 4)}),
    indirect=["cpu_backend"],
)
def test_an_error_at_any_call_of_a_step_leaves_no_trace_and_the_next_step_its_bits(
    variant: int, cpu_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run fails at another place in every step, and repeats it; the other is undisturbed.

    A pass that runs out of memory repeats itself, checkpointed; the task pass by closures alone.
    """
    monkeypatch.setattr("sap_fast.step.calibration.RHO_GRID", (0.1, 0.01))
    probe, options = VARIANTS[variant]
    lora = (variant % 2 == 0) == (cpu_backend == "native")  # both, with every backend
    faults = Faults()
    faults.watch_calls(monkeypatch)
    undisturbed, disturbed = (Run(faults, lora, probe, options) for _ in range(2))
    for run in (undisturbed, disturbed):  # the losses test what the model can do, once
        torch.manual_seed(0)
        run.step(by_passes=False)
    # Steps that leave out what one before them did: a second error would come at another place.
    steps_vary = "direction_every" in options
    stride = 5 if "rho" in probe else 1  # it repeats the same calls
    failed_at: Counter[tuple[str, ...]] = Counter()  # by the places of a step
    for step in itertools.count(1):
        if step % 2:
            for run in (undisturbed, disturbed):
                run.optimizer.zero_grad()
        faults.places.clear()
        torch.manual_seed(step)
        undisturbed.step(by_passes=False)
        expected = undisturbed.everything()
        places = tuple(faults.places)
        at = stride * failed_at[places]
        if step > 4 and at >= len(places):
            break
        errors = list(enumerate(ERRORS))
        if steps_vary:
            errors = [errors[failed_at[places] % 3]]
        failed_at[places] += 1
        # What follows the task pass is the update. Once its operation ran, it cannot be undone.
        update = len(places) - 1 - places[::-1].index("task closure ended")
        task_pass = len(places) - 1 - places[::-1].index("task closure begins")
        runs_again = False
        torch.manual_seed(step)
        # The old direction is gone when the new one fails, which changes nothing: it is due again.
        is_due = disturbed.direction_is_due
        before = snapshot(disturbed.case.model)
        state = disturbed.state(with_direction=not is_due)
        for number, error in errors:
            if at >= len(places) or places[at] == "adamw_blend_ ended":
                continue
            where = (places[at], at, error, number)
            faults.places.clear()
            faults.at, faults.error = at, error
            by_passes = (at + number) % 2 == 0
            if error is torch.OutOfMemoryError and at < (task_pass if by_passes else update + 1):
                runs_again = True  # and is the step
                continue
            with pytest.raises(error, match="injected"):
                disturbed.step(by_passes)
            faults.at = None
            if not by_passes:
                assert not disturbed.optimizer.probes.offsets, where
            elif at > update:
                # The pass is over: its gradients and random numbers stay, for a second `step()`.
                for parameter, gradient in zip(
                    disturbed.case.model.parameters(), before["gradients"], strict=True
                ):
                    parameter.grad = None if gradient is None else gradient.clone()
                torch.manual_seed(step)
            assert_unchanged(disturbed.case.model, before)
            assert_same(disturbed.state(with_direction=not is_due), state, where)
            assert disturbed.direction_is_due == is_due
        disturbed.step(by_passes=at % 2 == (0 if runs_again else 1))
        faults.at = None
        trained = disturbed.optimizer.passes.trained
        assert (trained._checkpointing is not None) == runs_again, places[at]
        trained._checkpointing = None  # so that the next step runs as this one began
        assert_same(disturbed.everything(), expected, (places[at % len(places)], at))
    assert {"safety closure begins", "adamw_blend_ begins"} <= {
        p for kind in failed_at for p in kind
    }


def test_after_an_update_that_failed_step_may_be_called_again() -> None:
    cases = problem(), problem()
    optimizers = [sap(case, {"rule": "gradient", "size": 5.0}) for case in cases]
    for case, optimizer in zip(cases, optimizers, strict=True):
        optimizer.inner_passes(*closures(case))
        with optimizer.task_pass():
            task(case)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(ops, "call", FailingUpdate())
        optimizers[1].step()
    for optimizer in optimizers:
        optimizer.step()
    assert_same_bits(*(weights(case) for case in cases))
    assert_same_bits(*(list(optimizer.probes.offsets.values()) for optimizer in optimizers))


@pytest.mark.parametrize("cleared", [True, False])
def test_a_closure_step_whose_update_fails_gives_back_gradients_and_random_state(
    cleared: bool,
) -> None:
    case = problem(dropout=0.1)
    optimizer = sap(case)
    if not cleared:
        task(case)  # an earlier micro-batch
    before = snapshot(case.model)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(ops, "call", FailingUpdate())
        optimizer.step(lambda: task(case), lambda: safety(case))
    assert_unchanged(case.model, before)


def test_running_out_of_memory_does_not_turn_packing_off() -> None:
    case, undisturbed = problem(), problem()
    forwards = itertools.count(1)

    def fail(module: nn.Module, arguments: Any) -> None:
        if next(forwards) == 2:  # the packed one, in the test of what the model can do
            raise torch.OutOfMemoryError("injected")

    handle = case.model.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        task_loss(case.model, case.batch)
    handle.remove()
    assert torch.equal(task_loss(case.model, case.batch), task_loss(undisturbed.model, case.batch))


# ---- not a number, infinite, zero ----

PLACES = ("loss", "weight", "hidden")


def poisoned(run: Callable[[Problem], Tensor], case: Problem, place: str, value: float) -> Tensor:
    """Run a pass with `value` in its loss, in a parameter's gradient or in a hidden state's."""
    if place == "loss":
        real_backward = Tensor.backward

        def backward(loss: Tensor) -> None:
            real_backward(loss * value)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "backward", backward)
            return run(case)
    if place == "weight":
        handle = case.trained[0].register_hook(lambda gradient: gradient * value)
    else:
        layer = case.model.get_base_model().model.layers[3]
        handle = layer.register_full_backward_hook(lambda _, given, __: (given[0] * value,))
    try:
        return run(case)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("cpu_backend", "variant"),
    spread(
        [
            ("native", "reference"),
            [({}, {}), ({"difference": "forward"}, {}), ({}, {"safety_weight": 0.5})],
        ],
        {(1, 0), (0, 1), (0, 2)},
    ),
    indirect=["cpu_backend"],
    ids=str,
)
@pytest.mark.parametrize(
    ("place", "value"),
    [("loss", 0.0), *((place, x) for place in PLACES for x in (float("nan"), float("inf")))],
)
def test_a_bad_direction_makes_the_step_plain_adamw(
    place: str,
    value: float,
    variant: tuple[dict[str, Any], dict[str, Any]],
    cpu_backend: str,
) -> None:
    probe, options = variant
    ours, theirs = problem(), problem()
    optimizer, adamw = sap(ours, probe, **options), plain_adamw(theirs.trained, **SETTINGS)
    with pytest.warns(UserWarning, match="direction was zero or not finite") as warned:
        optimizer.step(lambda: task(ours), lambda: poisoned(safety, ours, place, value))
    assert not any("rounding" in str(warning.message) for warning in warned)
    task(theirs)
    adamw.step()
    assert_same_bits(weights(ours), weights(theirs))
    assert optimizer.metrics.skipped_steps == 1
    optimizer.zero_grad()
    optimizer.step(lambda: task(ours), lambda: safety(ours))
    assert optimizer.metrics.skipped_steps == 1
    assert all(v.isfinite().all() and v.any() for v in optimizer.probes.offsets.values())


@pytest.mark.parametrize("difference", ["central", "forward"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["loss", "hidden"])
def test_a_bad_probe_pass_makes_the_step_plain_adamw(
    place: str, value: float, difference: str, cpu_backend: str
) -> None:
    ours, theirs = problem(), problem()
    optimizer = sap(ours, {"difference": difference})
    adamw = plain_adamw(theirs.trained, **SETTINGS)
    passes = itertools.count()

    def closure() -> Tensor:
        in_probe_pass = next(passes) < 2
        return poisoned(task, ours, place, value) if in_probe_pass else task(ours)

    with pytest.warns(UserWarning, match="probe gradient was not finite"):
        optimizer.step(closure, lambda: safety(ours))
    task(theirs)
    adamw.step()
    assert_same_bits(weights(ours), weights(theirs))
    assert all(not v.any() for v in optimizer.probes.offsets.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", ["loss", "weight"])
def test_a_bad_task_gradient_does_what_it_does_to_adamw(place: str, value: float) -> None:
    ours, theirs = problem(), problem()
    optimizer, adamw = sap(ours), plain_adamw(theirs.trained, **SETTINGS)

    def closure() -> Tensor:
        return poisoned(task, ours, place, value) if ours.trained else task(ours)

    optimizer.step(closure, lambda: safety(ours))
    poisoned(task, theirs, place, value)
    adamw.step()
    bad = [p.isnan().any().item() for p in theirs.trained]
    assert any(bad)
    assert [p.isnan().any().item() for p in ours.trained] == bad
    # h is of the passes before: V is as sound as the weights were.
    assert all(v.isfinite().all() for v in optimizer.probes.offsets.values())


# ---- batches ----


def step_on(batch: Any, chosen: Any, rejected: Any) -> Problem:
    case = problem()
    optimizer = sap(case)

    def backward(loss: Tensor) -> Tensor:
        loss.backward()
        return loss

    before = weights(case)
    try:
        optimizer.step(
            lambda: backward(task_loss(case.model, batch)),
            lambda: backward(contrastive_loss(case.model, chosen, rejected)),
        )
    except BaseException:
        assert_same_bits(weights(case), before)
        raise
    return case


def row(length: int, scored: int) -> dict[str, list[int]]:
    ids = list(range(1, length + 1))
    return {"input_ids": ids, "labels": [-100] * (length - scored) + ids[length - scored :]}


def test_answers_that_truncation_took_are_an_error_that_names_the_rows() -> None:
    good = TaskCollator(0)([row(8, 4), row(9, 3)])
    cut = SafetyCollator(0)(
        [
            {"chosen": row(8, 3), "rejected": row(8, 4)},
            {"chosen": row(8, 0), "rejected": row(8, 4)},
        ]
    )
    with pytest.raises(ValueError, match=r"chosen has no scored token in rows \[1\]"):
        step_on(good, **cut)


def test_labels_that_are_all_ignored_are_an_error() -> None:
    pairs = SafetyCollator(0)([{"chosen": row(8, 3), "rejected": row(8, 4)}])
    with pytest.raises(ValueError, match="no scored token in any of its 2 rows"):
        step_on(TaskCollator(0)([row(8, 0), row(9, 0)]), **pairs)


def test_rows_beyond_the_context_train_as_the_model_alone_would() -> None:
    # Rotary positions go on: 64 is what the model was made for, not a limit of its arithmetic.
    pairs = SafetyCollator(0)([{"chosen": row(90, 3), "rejected": row(80, 4)}])
    case = step_on(TaskCollator(0)([row(100, 40)]), **pairs)
    assert all(parameter.isfinite().all() for parameter in case.trained)


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_probe_lives_where_another_hook_replaces_the_output(ours_first: bool) -> None:
    """v is added before or after the other hook, as they were registered; h is ∂L/∂v either way."""
    case = problem()
    layer = case.model.get_base_model().model.layers[1]

    def halve(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return 0.5 * output

    handle = None if ours_first else layer.register_forward_hook(halve)
    optimizer = sap(case)
    if handle is None:
        layer.register_forward_hook(halve)
    optimizer.step(lambda: task(case), lambda: safety(case))
    assert all(v.any() for v in optimizer.probes.offsets.values())
    # The change of the loss along V, against the one that h predicts.
    figures = optimizer.metrics
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert figures.skipped_steps == 0
    assert figures.estimate_norms[1] > 0 and figures.estimate_norms[2] > 0
    # With the hook in the way of its layer, v_1 counts half if it comes first.
    ratio = figures.estimate_norms[1] / reference_norm(halve)
    assert ratio == pytest.approx(0.5 if ours_first else 1.0, rel=1e-4)


def reference_norm(halve: Any) -> float:
    """‖h_1‖ of a model whose layer 1 is halved by a module of its own, under the probe."""

    class Halved(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            return 0.5 * self.layer(*args, **kwargs)

    case = problem()
    layers = case.model.get_base_model().model.layers
    layers[1] = Halved(layers[1])
    optimizer = sap(case)
    optimizer.step(lambda: task(case), lambda: safety(case))
    return optimizer.metrics.estimate_norms[1]


# ---- a rank that fails ----


def run_failing(rank: int, kind: str, place: str, lost: int, folder: Path) -> dict[str, Any]:
    model: nn.Module = problem(lora=kind == "ddp").model
    inner = model
    if kind == "ddp":
        group = dist.new_group(timeout=timedelta(seconds=2))
        model = DistributedDataParallel(model, process_group=group)
    else:
        for layer in find_decoder_layers(model)[0]:
            fully_shard(layer)
        model = fully_shard(model)
    trained = [p for p in inner.parameters() if p.requires_grad]

    def shards() -> list[Tensor]:
        return [(p.to_local() if isinstance(p, DTensor) else p).detach().clone() for p in trained]

    optimizer = FusedSAP(trained, ProbeSet(model, layers=[1, 2], rho=0.05), **SETTINGS)
    batch, chosen, rejected = (random_batch(rows=2, seed=10 * rank + n) for n in range(3))
    before = shards()

    def backward(loss: Tensor) -> Tensor:
        loss.backward()
        return loss

    def fail_in(this: str) -> None:
        if this == place and rank == lost:
            raise ValueError("injected")

    def task_of(this: str) -> Tensor:
        fail_in(this)
        return backward(task_loss(model, batch))

    def safety_of() -> Tensor:
        fail_in("safety")
        return backward(contrastive_loss(model, chosen, rejected))

    error, checkpoint = "", before
    try:
        optimizer.inner_passes(lambda _: task_of("probe"), safety_of)
        with optimizer.task_pass():
            task_of("task")
        optimizer.step()
    except Exception as raised:  # what a training script's own handler saves a checkpoint in
        error = f"{type(raised).__name__}: {raised}"
        checkpoint = shards()
        if kind == "ddp":  # and where the lost rank stays: the other has to end by the timeout
            (folder / f"{rank} saved").touch()
            for _ in range(600):
                if all((folder / f"{k} saved").exists() for k in range(RANKS)):
                    break
                time.sleep(0.05)
    unchanged = [torch.equal(a, b) for a, b in zip(before, checkpoint, strict=True)]
    return {"error": error, "unchanged": all(unchanged)}


@pytest.mark.parametrize(
    ("kind", "place"),
    # The weights are others in the probe passes alone.
    spread([("ddp", "fsdp"), ("safety", "probe", "task")], {(0, 1), (1, 1)}),
)
def test_a_lost_rank_ends_the_other_with_an_error_and_its_own_weights(
    kind: str, place: str, tmp_path: Any
) -> None:
    found = on_ranks(tmp_path, run_failing, kind, place, 1, tmp_path, timeout=timedelta(seconds=20))
    assert found[1]["error"] == "ValueError: injected"
    assert found[0]["error"] and "injected" not in found[0]["error"]
    assert all(rank["unchanged"] for rank in found)
