"""The passes leave a model as they found it, however they end; and they run only in order."""

from __future__ import annotations

import copy
import itertools
import pickle
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet, SafetyPasses, joint_loss, task_loss
from sap_fast.losses import to_device
from sap_fast.model.layers import find_decoder_layers
from sap_fast.step.guards import Perturbation
from sap_fast.step.passes import Stage
from tests.oracle import naive_task_loss
from tests.step.faults import ERRORS, FailAt
from tests.tiny import (
    Batch,
    LiveBytes,
    Problem,
    assert_same_bits,
    assert_unchanged,
    closures,
    plain_adamw,
    problem,
    random_batch,
    safety,
    safety_loss,
    sap,
    snapshot,
    spread,
    step_by_passes,
    task,
    tiny_llama,
    weights,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")

BACKENDS = ("native", "reference")
#: (keywords of ProbeSet, keywords of FusedSAP)
VARIANTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"difference": "central"}, {}),
    ({"difference": "forward"}, {}),
    ({}, {"safety_weight": 0.3, "direction_every": 2}),
]


def run_step(case: Problem, optimizer: BlendedAdamW) -> None:
    optimizer.step(lambda: task(case), lambda: safety(case))


# ---- nothing moves but by AdamW ----


@pytest.mark.parametrize(
    ("cpu_backend", "variant", "lora"),
    spread([BACKENDS, VARIANTS, (True, False)], {(0, 1, 1), (1, 2, 0)}),
    indirect=["cpu_backend"],
    ids=str,
)
def test_a_hundred_steps_of_lr_zero_leave_every_bit(
    variant: tuple[dict[str, Any], dict[str, Any]], lora: bool
) -> None:
    case = problem(lora=lora, dtype=torch.float32 if lora else torch.bfloat16, layers=2)
    probe, options = variant
    optimizer = sap(case, {"layers": [0, 1], "rho": 1e-2} | probe, lr=0.0, **options)
    before = weights(case)
    for _ in range(100):
        optimizer.zero_grad()
        run_step(case, optimizer)
    assert_same_bits(weights(case), before)
    assert optimizer.metrics.skipped_steps == 0


@pytest.mark.parametrize(("difference", "signs"), [("central", [1, -1]), ("forward", [1, 0])])
def test_the_weights_of_each_probe_pass_are_the_ones_promised(
    difference: str, signs: list[int]
) -> None:
    case = problem()
    optimizer = sap(case, {"difference": difference})
    before, params = weights(case), case.trained
    start = [p.detach().clone() for p in params]
    direction = torch.autograd.grad(safety_loss(case), params)
    norm = torch.sqrt(sum((d * d).sum() for d in direction))
    size = 1e-3 * torch.sqrt(sum((w * w).sum() for w in start))
    expected = iter(signs)

    def looking_task(_: None) -> Tensor:
        sign = next(expected)
        # At W the layers up to the lowest probe run for the task pass, too (`model.lower_forward`).
        assert case.trained == [] or sign == 0
        for p, w, d in zip(params, start, direction, strict=True):
            torch.testing.assert_close(p - w, sign * size * d / norm, rtol=1e-3, atol=1e-6)
        loss = task(case)
        assert case.trained == [] and all(p.grad is None for p in params)
        return loss

    optimizer.inner_passes(looking_task, lambda: safety(case))
    assert next(expected, None) is None
    assert_same_bits(weights(case), before)


# ---- faults ----


def count_operations(case: Problem, optimizer: FusedSAP) -> int:
    with FailAt(None) as counter:
        run_step(case, optimizer)
    return counter.count


@pytest.mark.parametrize(
    ("cpu_backend", "variant", "error"),
    # Each variant and each error once, and both backends; the others say the same again.
    spread([BACKENDS, VARIANTS, ERRORS], {(0, 0, 0), (0, 2, 2), (1, 1, 1)}),
    indirect=["cpu_backend"],
    ids=str,
)
def test_an_error_at_any_operation_of_any_pass_leaves_no_trace(
    variant: tuple[dict[str, Any], dict[str, Any]],
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = problem(layers=2, dropout=0.1)
    probe, options = variant
    if error is torch.OutOfMemoryError:
        probe = {"checkpointing": "layers"} | probe  # or passes would run again, see test_memory.py
    optimizer = sap(case, {"layers": [0, 1]} | probe, **options)
    optimizer.passes.keeps_direction = True
    run_step(case, optimizer)
    # The passes alone: an update that fails half-way is out of their hands.
    monkeypatch.setattr(FusedSAP, "_update", lambda self: self.passes.begin())
    operations = count_operations(case, optimizer)
    # Gradients of that step stay, as if an earlier micro-batch had left them.
    before = snapshot(case.model)

    kept = list(optimizer.passes.direction.kept or [])
    copies = [tensor.clone() for tensor in kept]
    # Another stride for each error, so that together they meet every kind of operation.
    stride = 23 + 3 * ERRORS.index(error)
    for at in range(1, operations, stride):
        with pytest.raises(error, match="injected"), FailAt(at, error):
            run_step(case, optimizer)
        assert_unchanged(case.model, before)
        assert not optimizer.probes.offsets
        assert_same_bits(kept, copies)
        optimizer.state_dict()  # outside of every pass again


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_step_after_an_error_is_the_one_never_disturbed(
    variant: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    runs = []
    probe, options = variant
    for disturbed in (False, True):
        case = problem(layers=2, dropout=0.1)
        optimizer = sap(case, {"layers": [0, 1]} | probe, **options)
        torch.manual_seed(5)
        # Of a step that takes a direction, and of the next.
        operations = min(count_operations(case, optimizer) for _ in range(2))
        optimizer.zero_grad()
        # The last ones are those of the update.
        for at in [operations // 7, operations // 2, operations * 3 // 4] if disturbed else []:
            with pytest.raises(RuntimeError, match="injected"), FailAt(at):
                run_step(case, optimizer)
        run_step(case, optimizer)
        runs.append(weights(case))
    assert_same_bits(*runs)


#: The calls of a first step that calibrates: the safety pass, 22 of the calibration, two probe
#: passes, the task pass.
CALLS = {
    "safety": 0,
    "calibration 1": 1,
    "calibration 2": 2,
    "calibration 22": 22,
    "probe 1": 23,
    "probe 2": 24,
    "task": 25,
}


@pytest.mark.parametrize("place", CALLS)
@pytest.mark.parametrize(
    ("cpu_backend", "error"),
    [("native", ValueError), ("native", KeyboardInterrupt), ("reference", KeyboardInterrupt)],
    indirect=["cpu_backend"],
)
@pytest.mark.parametrize("by_passes", [True, False])
def test_an_error_in_a_function_leaves_no_trace_while_someone_holds_its_frames(
    by_passes: bool, error: type[BaseException], place: str
) -> None:
    case = problem(layers=2, dropout=0.1)
    optimizer = sap(case, {"layers": [0, 1], "rho": "auto"})
    task(case)  # gradients of an earlier micro-batch
    before = snapshot(case.model)
    calls, moved = itertools.count(), []

    def failing(run: Callable[[Problem], Tensor]) -> Tensor:
        if by_passes:
            optimizer.zero_grad()
        loss = run(case)
        if next(calls) == CALLS[place]:
            moved.append(
                any(
                    not torch.equal(p, w)
                    for p, w in zip(case.model.parameters(), before["parameters"], strict=True)
                )
            )
            raise error("injected")
        return loss

    with pytest.raises(error, match="injected") as held:
        if by_passes:
            optimizer.inner_passes(lambda _: failing(task), lambda: failing(safety))
            with optimizer.task_pass():
                failing(task)
        else:
            optimizer.step(lambda: failing(task), lambda: failing(safety))
    # The frames are alive, and what they hold of a perturbation with them.
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(held.tb)]
    values = [value for variables in frames for value in variables.values()]
    in_probe = place not in ("safety", "task")
    assert any(isinstance(value, Perturbation) for value in values) == in_probe
    assert moved == [in_probe]
    assert_unchanged(case.model, before)
    # The task pass may be run again, unless `step` has given the whole step up.
    may_go_on = by_passes and place == "task"
    assert optimizer.passes.stage is (Stage.READY if may_go_on else Stage.IDLE)
    assert bool(optimizer.probes.offsets) == may_go_on
    optimizer.state_dict()


def test_after_a_failed_task_closure_plain_steps_work_again() -> None:
    case = problem()
    optimizer = sap(case)
    calls = itertools.count()

    def fails_in_the_task_pass() -> Tensor:
        if next(calls) == 2:
            raise ValueError("injected")
        return task(case)

    with pytest.raises(ValueError, match="injected"):
        optimizer.step(fails_in_the_task_pass, lambda: safety(case))
    task(case)
    optimizer.step()


def test_the_second_micro_batch_may_fail_and_run_again() -> None:
    runs = []
    for fails in (False, True):
        case = problem(dropout=0.1)
        optimizer = sap(case)
        torch.manual_seed(2)
        optimizer.inner_passes(*closures(case))
        with optimizer.task_pass():
            task(case)
        before = snapshot(case.model)
        if fails:
            with pytest.raises(ValueError, match="injected"), optimizer.task_pass():
                task(case)
                raise ValueError("injected")
            assert optimizer.passes.stage is Stage.DONE
            assert_unchanged(case.model, before)
        with optimizer.task_pass():
            task(case)
        optimizer.step()
        runs.append(weights(case))
    assert_same_bits(*runs)


# ---- gradients of micro-batches ----


@pytest.mark.parametrize("difference", ["central", "forward"])
def test_micro_batches_in_the_passes_are_one_batch(difference: str) -> None:
    whole, parts = problem(), problem()
    batches = [random_batch(rows=2, length=n, seed=n) for n in (9, 12)]
    scored = [(b["labels"][:, 1:] != -100).sum() for b in batches]

    def part_loss(case: Problem, k: int) -> Tensor:
        return naive_task_loss(case.model, batches[k]) * scored[k] / sum(scored)

    def both(case: Problem) -> Tensor:
        losses = [part_loss(case, k) for k in (0, 1)]
        for loss in losses:
            loss.backward()
        return sum(loss.detach() for loss in losses)

    # The gradient rule is the one whose V does not depend on how rows are split.
    probe = {"difference": difference, "rule": "gradient", "size": 5.0}
    at_once, loop = (sap(case, probe, lr=1e-3) for case in (whole, parts))
    for _ in range(2):
        at_once.zero_grad()
        at_once.step(lambda: both(whole), lambda: safety(whole))

        loop.zero_grad()
        loop.inner_passes(lambda _: both(parts), lambda: safety(parts))
        for k in (0, 1):
            with loop.task_pass() as record:
                loss = part_loss(parts, k)
                loss.backward()
                record(loss)
        loop.step()
    assert loop.metrics.task_loss == pytest.approx(at_once.metrics.task_loss, rel=1e-6)
    assert_same_bits(weights(whole), weights(parts))


def test_each_micro_batch_may_have_a_probe_of_its_own() -> None:
    case = problem()
    optimizer = sap(case)
    passes = optimizer.passes
    passes.keeps_direction = True
    batches = [random_batch(seed=seed) for seed in (1, 2)]
    norms = []
    passes.safety_pass(lambda: safety(case))
    for batch in batches:
        passes.probe_passes(lambda part: task(case, part), batch)
        norms.append(optimizer.probes.estimates[1].norm())
        with optimizer.task_pass():
            task(case, batch)
    optimizer.step()
    # The second probe is that of the second batch, found with the exact direction.
    twin = problem()
    other = sap(twin)
    other.passes.safety_pass(lambda: safety(twin))
    other.passes.probe_passes(lambda part: task(twin, part), batches[1])
    assert torch.equal(norms[1], other.probes.estimates[1].norm())
    assert norms[0] != norms[1]


def test_probe_and_task_passes_see_the_same_dropout_masks_per_micro_batch() -> None:
    case = problem(lora=False, dropout=0.3)
    optimizer = sap(case, {"rho": "auto"})
    seen: dict[str, list[Tensor]] = {"safety": [], "inner": [], "task": []}
    where = "inner"

    def record_state(*_: Any) -> None:
        seen[where].append(torch.get_rng_state())

    def two_micro_batches(_: None) -> Tensor:
        task(case)
        return task(case)

    def looking_safety() -> Tensor:
        seen["safety"].append(torch.get_rng_state())
        return safety(case)

    case.model.register_forward_pre_hook(record_state)
    torch.manual_seed(11)
    optimizer.inner_passes(two_micro_batches, looking_safety)
    del seen["inner"][:2]  # of the safety pass
    where = "task"
    for _ in range(2):
        torch.rand(5)  # the loop draws numbers of its own between the passes
        with optimizer.task_pass():
            task(case)
    assert len(seen["inner"]) == 2 * 24
    first, second = seen["task"]
    assert not torch.equal(first, second)
    assert torch.equal(seen["safety"][0], first)
    for place, state in enumerate(seen["inner"]):
        assert torch.equal(state, second if place % 2 else first), place


# ---- what runs, and on what ----


class Counted:
    """Steps by closures that say how often the safety and the task closure ran."""

    def __init__(self, case: Problem, optimizer: BlendedAdamW) -> None:
        self.case, self.optimizer = case, optimizer
        self.calls = {"safety": 0, "task": 0}

    def step(self, seed: int = 0) -> tuple[int, int]:
        """Run a step; return how often the safety and the task closure ran."""
        self.calls = {"safety": 0, "task": 0}

        def counted(name: str, run: Callable[[], Tensor]) -> Tensor:
            self.calls[name] += 1
            return run()

        self.optimizer.zero_grad()
        self.optimizer.step(
            lambda part: counted("task", lambda: task(self.case, part)),
            lambda: counted("safety", lambda: safety(self.case)),
            random_batch(rows=4, seed=seed),
        )
        return self.calls["safety"], self.calls["task"]


@pytest.mark.parametrize(
    ("probe", "options", "expected"),
    [
        ({}, {}, [(1, 3)] * 4),
        ({"rho": "auto"}, {}, [(1, 25), (1, 3)]),
        ({}, {"direction_every": 2}, [(1, 3), (0, 3)] * 3),
        ({}, {"direction_every": 2, "safety_weight": 0.1}, [(1, 3), (0, 3)] * 2),
        ({}, {"safety_level": 1e3}, [(1, 1)] * 3),
        ({"rho": "auto"}, {"safety_level": 1e3, "direction_every": 2}, [(1, 1), (0, 1)] * 2),
        (None, {"safety_weight": 0.1}, [(1, 1)] * 3),
        (
            None,
            {"safety_weight": 0.1, "direction_every": 3, "safety_level": None},
            [(1, 1), (0, 1), (0, 1)] * 2,
        ),
        # "auto", the default of blending, is found in the first three steps.
        (
            None,
            {"safety_weight": 0.1, "direction_every": 3},
            [(1, 1)] * 2 + [(1, 1), (0, 1), (0, 1)] * 2,
        ),
        (None, {"safety_weight": 0.1, "safety_level": 1e3}, [(1, 1)] * 2),
        (None, {"safety_weight": 0.0}, [(0, 1)] * 2),
    ],
    ids=str,
)
def test_only_the_passes_that_are_due_run(
    probe: dict[str, Any] | None, options: dict[str, Any], expected: list[tuple[int, int]]
) -> None:
    case = problem(layers=3)
    if probe is None:
        optimizer: BlendedAdamW = BlendedAdamW(case.trained, **options)
    else:
        optimizer = sap(case, probe, **options)
    counted = Counted(case, optimizer)
    taken = 0
    for step, calls in enumerate(expected):
        assert optimizer.passes.steps == step
        assert optimizer.passes.direction.taken == taken
        assert counted.step(step) == calls, step
        taken += calls[0]


class Parts:
    """A task function that keeps what it was given."""

    def __init__(self, case: Problem) -> None:
        self.case, self.given = case, []

    def __call__(self, part: Any) -> Tensor:
        self.given.append(part)
        losses = [task(self.case, each) for each in (part if isinstance(part, list) else [part])]
        return torch.stack(losses).sum().detach()


@pytest.mark.parametrize("rho", [1e-3, "auto"])
def test_the_task_is_given_the_batch_or_the_micro_batches_or_none(rho: float | str) -> None:
    passes = 2 if rho == 1e-3 else 24
    for batch in (random_batch(), [random_batch(seed=1), random_batch(seed=2)], None):
        case = problem(layers=3)
        optimizer, given = sap(case, {"rho": rho}), Parts(case)
        _, safety_closure = closures(case)
        optimizer.inner_passes(given, safety_closure, batch)
        assert len(given.given) == passes and all(part is batch for part in given.given)
        if batch is None:
            continue
        given.given.clear()
        optimizer.step(given, safety_closure, batch)
        assert len(given.given) == 3 and all(part is batch for part in given.given)


@pytest.mark.parametrize(("fraction", "rows"), [(0.5, 2), (0.6, 3), (0.25, 1), (1.0, 4)])
def test_the_probe_passes_see_a_part_of_the_rows_rounded_up(fraction: float, rows: int) -> None:
    batch = random_batch(rows=4, seed=4)
    case, other = problem(layers=3), problem(layers=3)
    optimizer, given = sap(case, {"rows": fraction}), Parts(case)
    optimizer.step(given, lambda: safety(case), batch)
    assert [len(part["input_ids"]) for part in given.given] == [rows, rows, 4]
    whole = sap(other)
    whole.inner_passes(*closures(other), {key: value[:rows] for key, value in batch.items()})
    for index, estimate in whole.probes.estimates.items():
        assert torch.equal(optimizer.probes.estimates[index], estimate)


@pytest.mark.parametrize("rho", [1e-3, "auto"])
@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.5, [2, 3]), (0.3, [2, 1]), (0.01, [1]), (0.9, [2, 3, 4])]
)
def test_a_part_of_micro_batches_counts_their_rows(
    fraction: float, expected: list[int], rho: float | str
) -> None:
    case = problem(layers=3)
    optimizer, given = sap(case, {"rows": fraction, "rho": rho}), Parts(case)
    window: list[Batch] = [random_batch(rows=rows, seed=rows) for rows in (2, 3, 4)]
    optimizer.inner_passes(given, lambda: safety(case), window)
    sizes = [[len(part["input_ids"]) for part in parts] for parts in given.given]
    assert sizes == [expected] * (2 if rho == 1e-3 else 24)
    # The calibration, and both probe passes, on the same rows.
    assert all(part is given.given[0] for part in given.given)


def test_rows_without_a_batch_are_an_error_before_anything_runs() -> None:
    case = problem()
    optimizer = sap(case, {"rows": 0.5})
    before = snapshot(case.model)

    def never(*_: Any) -> Tensor:
        raise AssertionError("not reached")

    message = r"rows=0\.5 without a batch: .*step\(task, safety, batch\).*inner_passes"
    with pytest.raises(ValueError, match=message):
        optimizer.step(never, never)
    with pytest.raises(ValueError, match=message):
        optimizer.inner_passes(never, never)
    with pytest.raises(ValueError, match=message):
        optimizer.passes.calibrate(lambda _: task(case), lambda: safety(case))
    assert_unchanged(case.model, before)
    assert optimizer.passes.stage is Stage.IDLE
    # Nothing is asked for where there is no probe.
    BlendedAdamW(case.trained).step(lambda: task(case), lambda: safety(case))


# ---- order ----


def test_each_pass_is_a_stage_and_the_step_goes_from_one_to_the_next() -> None:
    case = problem(layers=3)
    optimizer = sap(case, {"rho": "auto"})
    passes = optimizer.passes
    seen: list[Stage] = []

    def looking(run: Callable[[Problem], Tensor]) -> Tensor:
        seen.append(passes.stage)
        return run(case)

    for probe_passes in (24, 2):
        seen.clear()
        assert passes.stage is Stage.IDLE
        optimizer.inner_passes(lambda _: looking(task), lambda: looking(safety))
        assert seen == [Stage.SAFETY] + [Stage.PROBE] * probe_passes
        assert passes.stage is Stage.READY
        for _ in range(2):
            with optimizer.task_pass():
                assert passes.stage is Stage.TASK
                task(case)
            assert passes.stage is Stage.DONE
        optimizer.step()
    assert passes.stage is Stage.IDLE
    passes.calibrate(lambda _: looking(task), lambda: looking(safety))
    assert passes.stage is Stage.IDLE
    # A step that was begun may be begun anew.
    for _ in range(2):
        optimizer.inner_passes(*closures(case))
    with optimizer.task_pass():
        task(case)
    optimizer.inner_passes(*closures(case))
    assert passes.stage is Stage.READY


def test_calls_out_of_order_say_what_to_call() -> None:
    case = problem()
    optimizer = sap(case)
    passes = optimizer.passes
    without_inner = r"task_pass\(\) without inner_passes\(task, safety, batch\) before it"
    with pytest.raises(RuntimeError, match=without_inner), optimizer.task_pass():
        raise AssertionError("not reached")
    with pytest.raises(RuntimeError, match=r"run safety_pass\(\) first"):
        passes.probe_passes(lambda _: task(case))
    optimizer.inner_passes(*closures(case))
    for call in (optimizer.step, passes.blend_, passes.end_step):
        with pytest.raises(RuntimeError, match=r"after inner_passes\(\) without task_pass\(\)"):
            call()
    # Without keeps_direction the probe passes use the direction up.
    with pytest.raises(RuntimeError, match=r"several rounds .* only with keeps_direction"):
        passes.probe_passes(lambda _: task(case))
    with optimizer.task_pass():
        task(case)
    optimizer.step()
    with pytest.raises(RuntimeError, match=without_inner), optimizer.task_pass():
        raise AssertionError("not reached")


@pytest.mark.parametrize(
    ("options", "needs_inner_passes"),
    [({"safety_weight": 0.0}, False), ({"safety_weight": 0.1}, True)],
)
def test_a_task_pass_needs_inner_passes_where_something_is_active(
    options: dict[str, Any], needs_inner_passes: bool
) -> None:
    ours, theirs = problem(), problem()
    optimizer = BlendedAdamW(ours.trained, lr=1e-2, **options)
    if needs_inner_passes:
        with pytest.raises(RuntimeError, match="without inner_passes"), optimizer.task_pass():
            raise AssertionError("not reached")
        return
    with optimizer.task_pass() as record:
        record(task(ours))
    optimizer.step()
    adamw = plain_adamw(theirs.trained, lr=1e-2)
    task(theirs)
    adamw.step()
    assert_same_bits(weights(ours), weights(theirs))


def calls_refused_inside(optimizer: FusedSAP) -> Iterator[tuple[str, Callable[[], Any]]]:
    def one(*_: Any) -> Tensor:
        return torch.ones(())

    passes = optimizer.passes
    yield "step()", optimizer.step
    yield "step()", lambda: optimizer.step(one, one)
    yield "state_dict()", optimizer.state_dict
    yield "state_dict()", lambda: optimizer.sap_state.state_dict()
    yield "load_state_dict()", lambda: optimizer.load_state_dict({})
    yield "add_param_group()", lambda: optimizer.add_param_group({})
    yield "inner_passes()", lambda: optimizer.inner_passes(one, one)
    yield "task_pass()", lambda: optimizer.task_pass().__enter__()
    yield "calibrate()", lambda: passes.calibrate(one, one)
    yield "safety_pass()", lambda: passes.safety_pass(one)
    yield "probe_passes()", lambda: passes.probe_passes(one)
    yield "blend_()", passes.blend_
    yield "end_step()", passes.end_step
    yield "state_dict()", passes.state_dict
    yield "load_state_dict()", lambda: passes.load_state_dict({})


def test_no_call_that_needs_the_true_weights_works_inside_a_pass() -> None:
    case = problem(layers=3)
    optimizer = sap(case, {"rho": "auto"})
    inside = []

    def refused(name: str) -> None:
        inside.append(name)
        for call, run in calls_refused_inside(optimizer):
            with pytest.raises(RuntimeError) as error:
                run()
            assert str(error.value).startswith(f"{call} inside {name}: "), call

    def trying(name: str, run: Callable[[Problem], Tensor]) -> Tensor:
        refused(name)
        return run(case)

    optimizer.inner_passes(
        lambda _: trying("a probe pass", task), lambda: trying("the safety pass", safety)
    )
    with optimizer.task_pass():
        refused("the task pass")
        task(case)
    optimizer.step()
    assert inside == ["the safety pass"] + ["a probe pass"] * 24 + ["the task pass"]


def test_passes_that_leave_nothing_behind_are_errors() -> None:
    case, other = problem(), problem()
    optimizer = sap(case)
    with pytest.raises(RuntimeError, match="no gradient in any parameter of the optimizer"):
        optimizer.inner_passes(lambda _: task(case), lambda: safety(other))
    with pytest.raises(RuntimeError, match="no forward pass went through probed layer 1"):
        optimizer.inner_passes(lambda _: task(other), lambda: safety(case))
    with pytest.raises(RuntimeError, match="no gradient reached probed layer 1"):
        optimizer.inner_passes(
            lambda _: naive_task_loss(case.model, case.batch), lambda: safety(case)
        )
    assert optimizer.passes.stage is Stage.IDLE


def test_functions_that_return_no_loss_are_errors() -> None:
    case = problem()
    optimizer = sap(case)

    def nothing(run: Callable[[Problem], Tensor]) -> Any:
        run(case)

    with pytest.raises(TypeError, match=r"safety\(\) returned None; expected the loss"):
        optimizer.step(lambda: task(case), lambda: nothing(safety))
    with pytest.raises(TypeError, match=r"task\(part\) returned None; expected the loss"):
        optimizer.inner_passes(lambda _: nothing(task), lambda: safety(case))
    with pytest.raises(TypeError, match=r"task\(\) returned None; expected the loss"):
        BlendedAdamW(case.trained).step(lambda: nothing(task), lambda: safety(case))


def test_probe_passes_without_probes_are_refused() -> None:
    case = problem()
    passes = BlendedAdamW(case.trained, safety_weight=0.1).passes
    with pytest.raises(RuntimeError, match="needs a ProbeSet"):
        passes.probe_passes(lambda _: task(case))
    with pytest.raises(RuntimeError, match="without a probe set"):
        passes.calibrate(*closures(case))


# ---- V ----


def logits(case: Problem) -> Tensor:
    return case.model(input_ids=case.batch["input_ids"]).logits.detach()


def test_v_is_off_outside_the_task_pass_and_in_no_state() -> None:
    case, plain = problem(), problem()
    names = list(case.model.state_dict())
    optimizer = sap(case, {"size": 0.3}, lr=0.0, safety_weight=0.1, direction_every=2)
    clean = logits(plain)

    def assert_off() -> None:
        assert torch.equal(logits(case), clean)
        with torch.no_grad():
            assert torch.equal(logits(case), clean)

    def looking_safety() -> Tensor:
        assert_off()
        assert not optimizer.probes.offsets, "gone when the next step begins"
        return safety(case)

    for step in range(3):
        optimizer.inner_passes(lambda _: task(case), looking_safety)
        offsets = optimizer.probes.offsets
        assert set(offsets) == {1, 2} and all(v.norm() > 0 for v in offsets.values())
        assert_off()
        with optimizer.task_pass():
            task(case)
            assert not torch.equal(logits(case), clean), "the probe is on here"
        assert_off()
        optimizer.step()
        assert optimizer.probes.offsets is offsets, "there to be read"
        assert_off()

        state = {"model": case.model.state_dict(), "optimizer": optimizer.state_dict()}
        assert list(state["model"]) == names
        assert set(state["optimizer"]["sap"]) == {
            *("steps", "direction", "level", "calibration", "gradient_norm", "account")
        }
        leaves = tree_leaves([state, optimizer.sap_state.state_dict()])
        for leaf, v in itertools.product(leaves, offsets.values()):
            if isinstance(leaf, Tensor) and leaf.shape == v.shape:
                assert not torch.equal(leaf, v), step
        twin, copied = pickle.loads(pickle.dumps((case, optimizer)))
        assert torch.equal(logits(twin), clean)
        task(twin)
        copied.step()


def test_v_is_gone_after_a_step_that_fails_and_in_one_that_is_held() -> None:
    case = problem()
    optimizer = sap(case)
    step_by_passes(case, optimizer)
    assert optimizer.probes.offsets

    def failing() -> Tensor:
        raise ValueError("injected")

    with pytest.raises(ValueError, match="injected"):
        optimizer.inner_passes(lambda _: task(case), failing)
    assert not optimizer.probes.offsets
    step_by_passes(case, optimizer)
    assert optimizer.probes.offsets
    optimizer.passes.safety_level = 1e3
    optimizer.inner_passes(*closures(case))
    assert optimizer.passes.is_held and not optimizer.probes.offsets
    with optimizer.task_pass():
        assert torch.equal(logits(case), logits(case.copy()))


# ---- memory, waiting, determinism ----


class Blocks(nn.Module):
    """Layers whose weights outweigh their activations by far."""

    def __init__(self, width: int = 256, depth: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def build_blocks(
    probe: dict[str, Any] | None, width: int = 256, **options: Any
) -> tuple[Blocks, BlendedAdamW]:
    model = Blocks(width)
    if probe is None:
        return model, BlendedAdamW(model.parameters(), lr=1e-3, **options)
    probes = ProbeSet(model, layers=[model.layers[5], model.layers[10]], rho=1e-3, **probe)
    return model, FusedSAP(model.parameters(), probes, lr=1e-3, **options)


def block_closures(model: Blocks) -> list[Callable[..., Tensor]]:
    width = model.layers[0].in_features
    x, y, z = torch.randn(3, 2, 4, width, generator=torch.Generator().manual_seed(0))

    def backward(given: Tensor, target: Tensor) -> Tensor:
        loss = (model(given) - target).square().mean()
        loss.backward()
        return loss.detach()

    return [lambda: backward(x, y), lambda: backward(z, -y)]


def peak_of_a_step(probe: dict[str, Any] | None, width: int = 256, **options: Any) -> float:
    """What a step holds at most beside the weights, in units of them."""
    model, optimizer = build_blocks(probe, width, **options)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        with LiveBytes() as memory:
            kept = [moment for state in optimizer.state.values() for moment in state.values()]
            kept += tree_leaves(optimizer.passes.direction.kept or [])
            for tensor in kept:
                memory._count(tensor.untyped_storage())  # and once: views of it are results, too
            optimizer.step(*block_closures(model))
    return memory.peak / size


@pytest.mark.parametrize(
    ("probe", "options", "buffers"),
    [
        ({"difference": "central"}, {}, 0),
        ({"difference": "forward"}, {}, 0),
        ({}, {"max_grad_norm": 1.0, "safety_level": 0.0}, 0),
        # A direction that is kept, until the update or for later steps.
        (None, {"safety_weight": 0.1}, 1),
        (None, {"safety_weight": 0.1, "rule": "project", "max_grad_norm": 1.0}, 1),
        ({}, {"safety_weight": 0.1}, 1),
        ({}, {"direction_every": 2}, 1),
    ],
    ids=str,
)
def test_a_step_needs_no_parameter_sized_memory_beyond_adamw_but_for_a_kept_direction(
    probe: dict[str, Any] | None, options: dict[str, Any], buffers: int
) -> None:
    floor = peak_of_a_step(None, safety_weight=0.0)
    # Moments and gradients: three parameter-sized buffers. Temporaries are of one layer's size.
    assert floor > 3
    assert buffers - 0.25 < peak_of_a_step(probe, **options) - floor < buffers + 0.25


@pytest.mark.parametrize("probe", [None, {}], ids=str)
def test_a_direction_of_large_parameters_is_kept_in_a_quarter_of_their_memory(
    probe: dict[str, Any] | None,
) -> None:
    floor = peak_of_a_step(None, 512, safety_weight=0.0)
    options = {"safety_weight": 0.1, "direction_every": 2, "safety_level": None}
    # A byte of four, and a sixteenth of d as it is read in the update.
    assert 0.2 < peak_of_a_step(probe, 512, **options) - floor < 0.4


class Waits(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("probe", "options", "waits"),
    [
        ({}, {"max_grad_norm": 1.0}, 0),
        ({"difference": "forward"}, {"safety_weight": 0.1, "direction_every": 2}, 0),
        # Whether the level is exceeded decides on the device how much is blended ...
        (None, {"safety_weight": 0.1, "safety_level": "auto", "max_grad_norm": 1.0}, 0),
        (None, {"safety_weight": 0.1, "rule": "project"}, 0),
        (None, {"safety_weight": 0.1, "rule": "floor"}, 0),
        # ... and on the host whether probe passes run.
        ({}, {"safety_level": "auto"}, 1),
    ],
    ids=str,
)
def test_a_step_waits_for_the_device_only_where_a_level_decides_on_passes(
    probe: dict[str, Any] | None, options: dict[str, Any], waits: int
) -> None:
    model, optimizer = build_blocks(probe, **options)
    for step in range(3):
        optimizer.zero_grad()
        with Waits() as mode:
            optimizer.step(*block_closures(model))
        # The first step allocates state.
        assert mode.count == waits or step == 0
    with Waits() as mode:
        _ = optimizer.metrics
    assert mode.count > 0


class Copies(TorchFunctionMode):
    """Counts copies to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += func is Tensor.cpu
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("probe", "padded", "attention"),
    [
        *itertools.product([{"rho": 1e-3}, None], [False, True], ["sdpa", "eager"]),
        ({"rho": 1e-3, "rows": 0.5, "own_rows": True}, True, "sdpa"),
    ],
    ids=str,
)
def test_a_step_of_a_model_of_transformers_waits_only_to_find_what_is_scored(
    probe: dict[str, Any] | None, padded: bool, attention: str
) -> None:
    model = tiny_llama(attention=attention)
    batches = [random_batch(4, seed=seed) for seed in range(3)]
    if not padded:
        for batch in batches:
            batch["attention_mask"].fill_(1)
    if probe is None:
        optimizer = BlendedAdamW(model.parameters(), lr=1e-3)
    else:
        optimizer = FusedSAP(model.parameters(), ProbeSet(model, **probe), lr=1e-3)

    def run(loss: Callable[..., Tensor], *given: Any) -> Tensor:
        value = loss(model, *given)
        value.backward()
        return value.detach()

    closures = (lambda part: run(task_loss, part), lambda: run(joint_loss, *batches[1:]))
    optimizer.step(*closures, batches[0])  # finds out what the model is like
    if padded:
        # What transformers asks of a mask, or of positions, in every forward is theirs. Without
        # padding there is neither.
        theirs: list[int] = []
        model.model.register_forward_pre_hook(lambda *_: theirs.append(waits.count))
        model.model.register_forward_hook(lambda *_: setattr(waits, "count", theirs.pop()))
    batches = [{key: value.clone() for key, value in batch.items()} for batch in batches]
    counts = []
    for _ in range(2):
        with Waits() as waits, Copies() as copies:
            optimizer.step(*closures, batches[0])
        counts.append((waits.count, copies.count))
    # The batch and the pairs, once each, whatever the number of passes and of rows in them.
    assert counts[0][1] == 2
    # A part is made anew in each step, and what is scored in it found on the host, by three reads.
    reads = 0 if probe is None or "rows" not in probe else 3
    assert counts[1] == (reads, 0)
    # Neither where they were read before they came to the device.
    fresh = [{key: value.clone() for key, value in batch.items()} for batch in batches]
    batches = [to_device(batch, "cpu") for batch in fresh]
    with Copies() as copies:
        optimizer.step(*closures, batches[0])
    assert copies.count == 0


@pytest.mark.parametrize("lora", [True, False])
def test_the_same_seed_gives_the_same_bits(lora: bool) -> None:
    runs = []
    for deterministic in (False, False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            case = problem(lora=lora, dropout=0.1)
            torch.manual_seed(1)
            optimizer = sap(case, {"rho": "auto"}, safety_weight=0.1, max_grad_norm=1.0)
            for _ in range(3):
                optimizer.zero_grad()
                run_step(case, optimizer)
        finally:
            torch.use_deterministic_algorithms(False)
        runs.append(weights(case))
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


def test_a_weight_cast_cached_by_autocast_does_not_hide_the_perturbation() -> None:
    # One autocast context around the whole step: casts of W would be reused for W + ΔW.
    case = problem(lora=False)
    optimizer = sap(case, {"rho": 0.05})
    losses = []

    def noting(_: None) -> Tensor:
        losses.append(task(case).item())
        return torch.tensor(losses[-1])

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.inner_passes(noting, lambda: safety(case))
        losses.append(naive_task_loss(case.model, case.batch).item())
    assert len(set(losses)) == 3


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_step_walks_through_the_model_once(
    variant: tuple[dict[str, Any], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(layers=2)
    probe, options = variant
    optimizer = sap(case, {"layers": [0, 1]} | probe, **options)
    walks, parameters = [], case.model.parameters

    def counted(recurse: bool = True) -> Iterator[nn.Parameter]:
        walks.append(recurse)
        return parameters(recurse)

    monkeypatch.setattr(case.model, "parameters", counted)
    for _ in range(2):
        optimizer.zero_grad()
        step_by_passes(case, optimizer)
        assert len(walks) == 1
        walks.clear()


@pytest.mark.parametrize(
    ("lora", "variant"),
    spread([(True, False), [*VARIANTS, ({"rows": 0.5}, {})]], {(0, 0), (0, 1), (1, 2), (1, 3)}),
    ids=str,
)
def test_checkpointing_changes_no_bit(
    lora: bool, variant: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    results = []
    probe, options = variant
    for mode in ("none", "layers", "auto"):
        case = problem(lora=lora, dropout=0.2)
        optimizer = sap(case, probe | {"checkpointing": mode}, **options)
        if optimizer.probes._checkpointing is not None:
            # Room for what half the layers store.
            optimizer.probes._checkpointing.budget = 2**17
        torch.manual_seed(11)
        layer_runs = []
        handle = find_decoder_layers(case.model)[0][3].input_layernorm.register_forward_hook(
            lambda *_, runs=layer_runs: runs.append(1)
        )
        for step in range(2):
            Counted(case, optimizer).step(step)
        handle.remove()
        results.append((weights(case), len(layer_runs)))
    (plain, runs), (layers, more_runs), (auto, auto_runs) = results
    assert_same_bits(plain, layers)
    assert_same_bits(plain, auto)
    # Every forward of the highest layer, again in its backward.
    assert more_runs == 2 * runs
    assert runs <= auto_runs <= more_runs


# ---- settings ----


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("safety_weight", -0.5),
        ("safety_weight", float("nan")),
        ("safety_level", "low"),
        ("safety_level", float("nan")),
        ("direction_every", 0),
        ("rule", "sign"),
        ("backend", "cuda"),
    ],
)
def test_settings_out_of_range_are_named(argument: str, value: Any) -> None:
    params = [nn.Parameter(torch.ones(1))]
    for build in (SafetyPasses, BlendedAdamW):
        with pytest.raises(ValueError, match=rf"{argument}.*{value}"):
            build(params, **{argument: value})


def test_settings_may_be_changed_between_steps_and_are_checked_there_too() -> None:
    case = problem(layers=3)
    optimizer = sap(case)
    counted, passes = Counted(case, optimizer), optimizer.passes
    assert counted.step() == (1, 3)
    passes.direction_every = 2
    assert [counted.step() for _ in range(3)] == [(1, 3), (0, 3), (1, 3)]
    passes.direction_every, passes.safety_level = 1, 1e3
    assert counted.step() == (1, 1) and optimizer.metrics.above_level is False
    passes.safety_level = None
    assert counted.step() == (1, 3) and optimizer.metrics.above_level is None
    passes.safety_level = 0.0
    assert counted.step() == (1, 3) and optimizer.metrics.above_level is True
    with pytest.raises(ValueError, match="direction_every=0"):
        passes.direction_every = 0
    with pytest.raises(ValueError, match="safety_level='low'"):
        passes.safety_level = "low"
    assert (passes.direction_every, passes.safety_level) == (1, 0.0)


def test_passes_need_parameters_and_those_of_the_probed_model() -> None:
    case, other = problem(), problem()
    with pytest.raises(ValueError, match="share no parameter"):
        SafetyPasses(other.trained, ProbeSet(case.model))
    with pytest.raises(TypeError, match="params is a single tensor"):
        SafetyPasses(case.trained[0])
    named = SafetyPasses(
        [{"params": [("first", case.trained[0])]}, {"params": iter(case.trained[1:])}]
    )
    assert named.trained.parameters == case.trained


def test_passes_and_model_can_be_copied_whole() -> None:
    case = problem()
    passes = SafetyPasses(case.trained, ProbeSet(case.model, [1, 2], rho=1e-3))
    passes.inner_passes(*closures(case))
    twin, other = copy.deepcopy((case, passes))
    assert other.stage is Stage.IDLE and other.probes.model is twin.model
    # A step in progress is not gone on with: it starts from the safety pass again.
    for one, its in ((case, passes), (twin, other)):
        its.inner_passes(*closures(one))
        with its.task_pass():
            task(one)
        its.end_step()
    assert_same_bits([p.grad for p in case.trained], [p.grad for p in twin.trained])
