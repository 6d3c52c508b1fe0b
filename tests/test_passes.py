"""The passes leave a model as they found it, however they end; and they run only in order."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sap_fast.optimizer import FusedSAP
from sap_fast.passes import Perturbation
from sap_fast.probes import ProbeSet
from tests.oracle import naive_contrastive_loss, naive_task_loss
from tests.tiny import Problem, problem, random_batch, safety, task

pytestmark = pytest.mark.usefixtures("cpu_backend")

VARIANTS = [
    {"schedule": "paper", "difference": "central"},
    {"schedule": "paper", "difference": "forward"},
    {"schedule": "lagged"},
]


def sap(case: Problem, **options: Any) -> FusedSAP:
    settings = {"lr": 1e-2, "rho": 1e-3, "probe_lr": 0.02}
    return FusedSAP(case.trained, ProbeSet(case.model, layers=[0, 1]), **(settings | options))


def run_step(case: Problem, optimizer: FusedSAP) -> None:
    optimizer.step(lambda: task(case), lambda: safety(case))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a pass must leave as it was."""
    return {
        "parameters": [p.detach().clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "random state": torch.get_rng_state(),
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        "training": [m.training for m in model.modules()],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    for name, value in snapshot(model).items():
        expected = before[name]
        if name == "random state":
            assert torch.equal(value, expected), name
        elif name in ("parameters", "gradients"):
            for a, b in zip(value, expected, strict=True):
                assert (a is None) == (b is None), name
                assert a is None or torch.equal(a, b), name
        else:
            assert value == expected, name


# ---- nothing moves but by AdamW ----


@pytest.mark.parametrize(
    ("dtype", "lora"), [(torch.float32, True), (torch.bfloat16, False)], ids=["lora", "full"]
)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_hundred_steps_of_lr_zero_leave_every_bit(
    dtype: torch.dtype, lora: bool, variant: dict[str, Any]
) -> None:
    case = problem(lora=lora, dtype=dtype, layers=2)
    optimizer = sap(case, lr=0.0, rho=1e-2, **variant)
    before = [p.detach().clone() for p in case.model.parameters()]
    for _ in range(100):
        optimizer.zero_grad()
        run_step(case, optimizer)
    for parameter, old in zip(case.model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
    assert optimizer.metrics.skipped_steps == 0


def test_the_weights_of_each_probe_pass_are_the_ones_promised() -> None:
    for difference, signs in (("central", [1, -1]), ("forward", [1, 0])):
        case = problem()
        optimizer = sap(case, difference=difference)
        weights = [p.detach().clone() for p in case.trained]
        params = case.trained
        direction = torch.autograd.grad(
            naive_contrastive_loss(case.model, case.chosen, case.rejected), params
        )
        norm = torch.sqrt(sum((d * d).sum() for d in direction))
        size = 1e-3 * torch.sqrt(sum((w * w).sum() for w in weights))
        with optimizer.safety_pass():
            safety(case)
        for sign, _ in zip(signs, optimizer.probe_passes(), strict=True):
            # At W the layers up to the lowest probe run for the task pass too (sap_fast/reuse.py).
            assert case.trained == [] or sign == 0
            for p, w, d in zip(params, weights, direction, strict=True):
                torch.testing.assert_close(p - w, sign * size * d / norm, rtol=1e-3, atol=1e-6)
            task(case)
            assert case.trained == [] and all(p.grad is None for p in params)
        assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))


# ---- faults ----


class FailAt(TorchDispatchMode):
    """Raises in the place of the n-th aten operation, once; counts them all."""

    def __init__(self, at: int | None, error: type[BaseException] = RuntimeError) -> None:
        super().__init__()
        self.at, self.error, self.count = at, error, 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        if self.count == self.at:
            raise self.error("injected")
        return func(*args, **(kwargs or {}))


def count_operations(case: Problem, optimizer: FusedSAP) -> int:
    with FailAt(None) as counter:
        run_step(case, optimizer)
    return counter.count


ERRORS: list[type[BaseException]] = [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_at_any_operation_of_any_pass_leaves_no_trace(
    variant: dict[str, Any], error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(layers=2, dropout=0.1)
    optimizer = sap(case, keep_direction=True, **variant)
    run_step(case, optimizer)
    # The passes alone: an update that fails half-way is out of their hands.
    monkeypatch.setattr(FusedSAP, "_update", lambda self: self._passes.reset())
    operations = count_operations(case, optimizer)
    # Gradients of that step stay, as if an earlier micro-batch had left them.
    before = snapshot(case.model)
    offsets = {index: v.clone() for index, v in optimizer.probes.offsets.items()}

    # Another stride for each error, so that together they meet every kind of operation.
    stride = 23 + 3 * ERRORS.index(error)
    for at in range(1, operations, stride):
        with pytest.raises(error, match="injected"), FailAt(at, error):
            run_step(case, optimizer)
        assert_unchanged(case.model, before)
        if variant["schedule"] == "lagged":
            for index, v in optimizer.probes.offsets.items():
                assert torch.equal(v, offsets[index])
        optimizer.state_dict()  # outside of every pass again


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_step_after_an_error_is_the_one_never_disturbed(variant: dict[str, Any]) -> None:
    runs = []
    for disturbed in (False, True):
        case = problem(layers=2, dropout=0.1)
        optimizer = sap(case, **variant)
        torch.manual_seed(5)
        operations = count_operations(case, optimizer)
        optimizer.zero_grad()
        # The last ones are those of the update.
        for at in [operations // 7, operations // 2, operations * 3 // 4] if disturbed else []:
            with pytest.raises(RuntimeError, match="injected"), FailAt(at):
                run_step(case, optimizer)
        run_step(case, optimizer)
        runs.append([p.detach() for p in case.model.parameters()])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_an_error_between_any_two_statements_of_the_swaps_leaves_no_trace() -> None:
    # Finer than the test above: every operation inside perturb, reflect and restore.
    def run(at: int | None) -> tuple[list[Tensor], int]:
        generator = torch.Generator().manual_seed(0)
        params = [torch.randn(5, generator=generator) for _ in range(3)]
        buffers = [torch.randn(5, generator=generator) for _ in range(3)]
        mode = FailAt(at)
        with pytest.raises(RuntimeError, match="injected") if at else nullcontext(), mode:
            with Perturbation(
                params, buffers, torch.tensor(0.1), backend="reference"
            ) as perturbation:
                perturbation.applied_norm(torch.float32)
                perturbation.reflect()
        return params, mode.count

    original, total = run(None)
    assert total > 40
    for at in range(1, total + 1):
        params, _ = run(at)
        for found, wanted in zip(params, original, strict=True):
            assert torch.equal(found, wanted), at


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("zero_grad", [True, False])
def test_an_error_in_a_closure_leaves_no_trace(call: int, zero_grad: bool) -> None:
    case = problem(dropout=0.1)
    optimizer = sap(case)
    task(case)  # gradients of an earlier micro-batch
    before = snapshot(case.model)
    calls = itertools.count()

    def failing(run: Callable[[Problem], Tensor]) -> Tensor:
        if zero_grad:
            optimizer.zero_grad()
        loss = run(case)
        if next(calls) == call:
            raise ValueError("injected")
        return loss

    with pytest.raises(ValueError, match="injected"):
        optimizer.step(lambda: failing(task), lambda: failing(safety))
    assert_unchanged(case.model, before)


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


def test_leaving_the_loop_of_probe_passes_early_restores_the_model() -> None:
    case = problem(dropout=0.1)
    optimizer = sap(case)
    with optimizer.safety_pass():
        safety(case)
    before = snapshot(case.model)
    for _ in optimizer.probe_passes():
        break
    assert_unchanged(case.model, before)
    with pytest.raises(RuntimeError, match="without a direction"):
        optimizer.probe_passes()
    with pytest.raises(RuntimeError, match="without a probe"), optimizer.task_pass():
        raise AssertionError("not reached")


# ---- gradients of micro-batches ----


@pytest.mark.parametrize(
    ("variant", "shape"),
    # A probe per token fits its own batch only, so FusedSAP refuses it with the lagged schedule.
    [(variant, "hidden") for variant in VARIANTS]
    + [(variant, "token") for variant in VARIANTS[:2]],
    ids=str,
)
def test_micro_batches_in_the_passes_are_one_batch(variant: dict[str, Any], shape: str) -> None:
    whole, parts = problem(), problem()
    batches = [random_batch(rows=2, length=n, seed=n) for n in (9, 12)]
    scored = [(b["labels"][:, 1:] != -100).sum() for b in batches]

    def part_loss(case: Problem, k: int) -> Tensor:
        return naive_task_loss(case.model, batches[k]) * scored[k] / sum(scored)

    def make(case: Problem) -> FusedSAP:
        probes = ProbeSet(case.model, layers=[1, 2], shape=shape)
        # The gradient rule is the one whose V does not depend on how rows are split.
        return FusedSAP(
            case.trained, probes, lr=1e-3, rho=1e-3, probe_rule="gradient", probe_lr=5.0, **variant
        )

    closures, loop = make(whole), make(parts)
    for _ in range(2):

        def closure() -> Tensor:
            losses = [part_loss(whole, k) for k in (0, 1)]
            for loss in losses:
                loss.backward()
            return sum(loss.detach() for loss in losses)

        closures.zero_grad()
        closures.step(closure, lambda: safety(whole))

        loop.zero_grad()
        with loop.safety_pass():
            safety(parts)
        for record in loop.probe_passes():
            for k in (0, 1):
                loss = part_loss(parts, k)
                loss.backward()
                record(loss)
        for k in (0, 1):
            with loop.task_pass() as record:
                loss = part_loss(parts, k)
                loss.backward()
                record(loss)
        loop.step()
    assert loop.metrics.task_loss == pytest.approx(closures.metrics.task_loss, rel=1e-6)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_micro_batch_may_have_a_probe_of_its_own() -> None:
    case = problem()
    optimizer = sap(case, keep_direction=True)
    batches = [random_batch(seed=seed) for seed in (1, 2)]
    norms = []
    with optimizer.safety_pass():
        safety(case)
    for batch in batches:
        for _ in optimizer.probe_passes():
            naive_task_loss(case.model, batch).backward()
        norms.append(optimizer.probes.estimates[1].norm())
        with optimizer.task_pass():
            naive_task_loss(case.model, batch).backward()
    optimizer.step()
    # The second probe is that of the second batch, found with the exact direction.
    twin = problem()
    other = sap(twin)
    with other.safety_pass():
        safety(twin)
    for _ in other.probe_passes():
        naive_task_loss(twin.model, batches[1]).backward()
    assert torch.equal(norms[1], other.probes.estimates[1].norm())
    assert norms[0] != norms[1]


def test_probe_and_task_passes_see_the_same_dropout_masks_per_micro_batch() -> None:
    case = problem(lora=False, dropout=0.3)
    optimizer = sap(case)
    seen: dict[str, list[Tensor]] = {"probe": [], "task": []}
    where = "probe"

    def record_state(*_: Any) -> None:
        seen[where].append(torch.get_rng_state())

    case.model.register_forward_pre_hook(record_state)
    torch.manual_seed(11)
    with optimizer.safety_pass():
        safety(case)
    torch.rand(3)  # the loop draws numbers of its own between the passes
    seen["probe"].clear()
    for _ in optimizer.probe_passes():
        for _ in range(2):
            task(case)
    where = "task"
    for _ in range(2):
        torch.rand(5)
        with optimizer.task_pass():
            task(case)
    first, second = seen["probe"][:2], seen["probe"][2:]
    for a, b, c in zip(first, second, seen["task"], strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not torch.equal(first[0], first[1])


# ---- order ----


def test_calls_out_of_order_say_what_to_call() -> None:
    case = problem()
    optimizer = sap(case)
    with pytest.raises(RuntimeError, match="run safety_pass\\(\\) first"):
        optimizer.probe_passes()
    with pytest.raises(RuntimeError, match="run safety_pass\\(\\) and probe_passes\\(\\) first"):
        with optimizer.task_pass():
            raise AssertionError("not reached")
    with optimizer.safety_pass():
        safety(case)
    for _ in optimizer.probe_passes():
        task(case)
    with pytest.raises(RuntimeError, match="inside task_pass"):
        optimizer.step()
    with pytest.raises(RuntimeError, match="run safety_pass\\(\\) first"):
        optimizer.probe_passes()
    with optimizer.task_pass():
        task(case)
    optimizer.step()


def calls_refused_inside(optimizer: FusedSAP) -> Iterator[Callable[[], Any]]:
    yield optimizer.step
    yield optimizer.state_dict
    yield lambda: optimizer.load_state_dict({})
    yield lambda: optimizer.add_param_group({})
    yield lambda: optimizer.safety_pass().__enter__()
    yield optimizer.probe_passes
    yield lambda: optimizer.task_pass().__enter__()
    yield lambda: optimizer.calibrate_rho(lambda: torch.ones(()), lambda: torch.ones(()))


def test_no_call_that_needs_the_true_weights_works_inside_a_pass() -> None:
    case = problem()
    optimizer = sap(case)
    with optimizer.safety_pass():
        for call in calls_refused_inside(optimizer):
            with pytest.raises(RuntimeError, match=r"inside safety_pass\(\)"):
                call()
        safety(case)
    for _ in optimizer.probe_passes():
        for call in calls_refused_inside(optimizer):
            with pytest.raises(RuntimeError, match=r"inside probe_passes\(\)"):
                call()
        task(case)
    with optimizer.task_pass():
        for call in calls_refused_inside(optimizer):
            with pytest.raises(RuntimeError, match=r"inside task_pass\(\)"):
                call()
        task(case)
    optimizer.step()


def test_passes_that_leave_nothing_behind_are_errors() -> None:
    case, other = problem(), problem()
    optimizer = sap(case)
    with pytest.raises(RuntimeError, match="no gradient in any parameter of the optimizer"):
        with optimizer.safety_pass():
            safety(other)
    with optimizer.safety_pass():
        safety(case)
    with pytest.raises(RuntimeError, match="no forward pass went through probed layer 0"):
        for _ in optimizer.probe_passes():
            task(other)
    with optimizer.safety_pass():
        safety(case)
    with pytest.raises(RuntimeError, match="no gradient reached probed layer 0"):
        for _ in optimizer.probe_passes():
            naive_task_loss(case.model, case.batch)


def test_probe_passes_without_probes_are_refused() -> None:
    case = problem()
    optimizer = FusedSAP(case.trained, safety_weight=0.1)
    with pytest.raises(RuntimeError, match="without a probe set"):
        optimizer.probe_passes()
    with pytest.raises(RuntimeError, match="without a probe set"):
        optimizer.calibrate_rho(lambda: task(case), lambda: safety(case))


# ---- memory and determinism ----


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made inside and alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)

        def forget() -> None:
            self._known.discard(key)
            self.live -= size

        weakref.finalize(storage, forget)


class Blocks(nn.Module):
    """Layers whose weights outweigh their activations by far."""

    def __init__(self, width: int = 256, depth: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_step_needs_no_parameter_sized_memory_beyond_adamw(variant: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x, y, z = torch.randn(3, 2, 4, 256)

    def peak(use_sap: bool) -> tuple[int, int]:
        model = Blocks()
        size = sum(p.numel() * p.element_size() for p in model.parameters())

        def task() -> Tensor:
            loss = (model(x) - y).square().mean()
            loss.backward()
            return loss.detach()

        def safety() -> Tensor:
            loss = (model(z) + y).square().mean()
            loss.backward()
            return loss.detach()

        probes = ProbeSet(model, layers=[model.layers[5], model.layers[10]]) if use_sap else None
        optimizer = FusedSAP(model.parameters(), probes, rho=1e-3, lr=1e-3, **variant)
        for _ in range(2):
            optimizer.zero_grad()
            with LiveBytes() as memory:
                memory.live = sum(
                    moment.untyped_storage().nbytes()
                    for state in optimizer.state.values()
                    for moment in state.values()
                )
                optimizer.step(task, safety)
        return memory.peak, size

    floor, size = peak(use_sap=False)
    ours, _ = peak(use_sap=True)
    # Moments and gradients: three parameter-sized buffers. Temporaries are of one layer's size.
    assert floor > 3 * size
    assert ours < floor + 0.25 * size


@pytest.mark.parametrize("lora", [True, False])
def test_the_same_seed_gives_the_same_bits(lora: bool) -> None:
    runs = []
    for _ in range(2):
        case = problem(lora=lora, dropout=0.1)
        torch.manual_seed(1)
        optimizer = sap(case, rho="auto", safety_weight=0.1, max_grad_norm=1.0)
        for _ in range(3):
            optimizer.zero_grad()
            run_step(case, optimizer)
        runs.append([p.detach() for p in case.model.parameters()])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_weight_cast_cached_by_autocast_does_not_hide_the_perturbation() -> None:
    # One autocast context around the whole step: casts of W would be reused for W + ΔW.
    case = problem(lora=False)
    optimizer = sap(case, rho=0.05)
    with torch.autocast("cpu", torch.bfloat16):
        with optimizer.safety_pass():
            safety(case)
        losses = [naive_task_loss(case.model, case.batch).item()]
        for _ in optimizer.probe_passes():
            losses.append(task(case).item())
    assert len(set(losses)) == 3


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_step_walks_through_the_model_once(
    variant: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(layers=2)
    optimizer = sap(case, **variant)
    walks, parameters = [], case.model.parameters

    def counted(recurse: bool = True) -> Iterator[nn.Parameter]:
        walks.append(recurse)
        return parameters(recurse)

    monkeypatch.setattr(case.model, "parameters", counted)
    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.safety_pass():
            naive_contrastive_loss(case.model, case.chosen, case.rejected).backward()
        for _ in optimizer.probe_passes():
            naive_task_loss(case.model, case.batch).backward()
        with optimizer.task_pass():
            naive_task_loss(case.model, case.batch).backward()
        optimizer.step()
        assert len(walks) == 1
        walks.clear()
