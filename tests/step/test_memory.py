"""Passes that run out of memory: put back, run again with layers checkpointed, once."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sap_fast import BlendedAdamW, SafetyPasses
from tests.tiny import (
    LiveBytes,
    Problem,
    assert_same_bits,
    assert_unchanged,
    problem,
    random_batch,
    safety,
    sap,
    snapshot,
    task,
    tiny_llama,
    weights,
    with_lora,
)

Batch = dict[str, Tensor]


class Run:
    """A model in training whose functions run out of memory in some of their calls."""

    def __init__(self, build: Callable[[Problem], BlendedAdamW], *fails_in: int) -> None:
        self.case = problem(dropout=0.1)
        self.optimizer = build(self.case)
        self.fails_in = fails_in
        self.calls: list[str] = []
        self.random_state: Tensor | None = None

    def _call(self, name: str, run: Callable[[], Tensor]) -> Tensor:
        self.calls.append(name)
        loss = run()
        if len(self.calls) - 1 in self.fails_in:
            torch.rand(1)  # the random state has moved on, and gradients are there
            raise torch.OutOfMemoryError("Out of memory. Tried to allocate 2 GiB. Free is 1 GiB.")
        return loss

    def task(self, part: Batch | None) -> Tensor:
        return self._call("task", lambda: task(self.case, part))

    def safety(self) -> Tensor:
        return self._call("safety", lambda: safety(self.case))

    def step(self) -> None:
        self.optimizer.step(self.task, self.safety, self.case.batch)

    @property
    def is_checkpointed(self) -> bool:
        return self.optimizer.passes.trained._checkpointing is not None


def blended(case: Problem) -> BlendedAdamW:
    return BlendedAdamW(case.trained, lr=1e-2)


def forward_differences(case: Problem) -> BlendedAdamW:
    return sap(case, {"difference": "forward"})


def with_everything(case: Problem) -> BlendedAdamW:
    return sap(case, {"checkpointing": "auto"}, safety_weight=0.3, direction_every=2)


CALLS = ["safety", "task", "task", "task"]


@pytest.mark.parametrize(
    ("build", "calls", "fails_in", "again"),
    [
        # The last calls are those of the task pass, which runs again by itself.
        (blended, ["safety", "task"], 0, ["safety", "safety", "task"]),
        (blended, ["safety", "task"], 1, ["safety", "task", "task"]),
        (forward_differences, CALLS, 2, [*CALLS[:3], *CALLS]),
        (forward_differences, CALLS, 3, [*CALLS, "task"]),
        (with_everything, CALLS, 1, [*CALLS[:2], *CALLS]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_pass_that_runs_out_of_memory_is_run_again_and_the_step_is_the_one_never_disturbed(
    build: Callable[[Problem], BlendedAdamW], calls: list[str], fails_in: int, again: list[str]
) -> None:
    undisturbed, disturbed = Run(build), Run(build, fails_in)
    for run in (undisturbed, disturbed):
        torch.manual_seed(3)
        task(run.case)  # gradients of an earlier micro-batch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run.step()
            run.random_state = torch.get_rng_state()
            run.optimizer.zero_grad()
            run.step()
        said = [str(w.message) for w in caught if "out of memory" in str(w.message)]
        assert len(said) == (run is disturbed)
        assert all("(Out of memory. Tried to allocate 2 GiB)" in message for message in said)
        assert run.is_checkpointed == (run is disturbed)
    assert undisturbed.calls[: len(calls)] == calls
    assert disturbed.calls[: len(again)] == again
    assert len(disturbed.calls) - len(again) == len(undisturbed.calls) - len(calls)
    assert_same_bits(weights(disturbed.case), weights(undisturbed.case))
    assert_same_bits(disturbed.random_state, undisturbed.random_state)
    assert_same_bits(disturbed.optimizer.state_dict(), undisturbed.optimizer.state_dict())
    assert disturbed.optimizer.metrics == undisturbed.optimizer.metrics
    assert disturbed.optimizer.passes.steps == 2


def test_the_loss_of_a_task_pass_that_is_run_again_counts_once() -> None:
    run = Run(blended)
    passes = run.optimizer.passes
    run.optimizer.inner_passes(run.task, run.safety)
    attempts = itertools.count()

    def task_pass() -> Tensor:
        with passes.task_pass() as record:
            loss = run.task(None)
            record(loss)
            if next(attempts) == 0:
                raise torch.OutOfMemoryError
        return loss

    with pytest.warns(UserWarning, match="it is run again"):
        loss = passes.again_out_of_memory(task_pass)
    run.optimizer.step()
    assert run.optimizer.metrics.task_loss == loss.item()


@pytest.mark.parametrize("first", [0, 3])
def test_a_second_error_is_raised_as_it_is_and_leaves_no_trace(first: int) -> None:
    # The call after the one that failed: the safety pass, or the task pass, that is run again.
    run = Run(lambda case: sap(case), first, first + 1)
    task(run.case)
    before = snapshot(run.case.model)
    with pytest.warns(UserWarning, match="it is run again"):
        with pytest.raises(torch.OutOfMemoryError) as raised:
            run.step()
    assert not hasattr(raised.value, "__notes__") and raised.value.__context__ is None
    assert_unchanged(run.case.model, before)
    assert run.optimizer.passes.steps == 0
    # What comes later is told why there is no second run any more.
    run.fails_in = (len(run.calls),)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        run.step()
    assert "is checkpointed already" in raised.value.__notes__[0]
    assert_unchanged(run.case.model, before)


def test_in_a_loop_of_ones_own_inner_passes_are_run_again_and_task_passes_are_not() -> None:
    run = Run(lambda case: sap(case), 2)
    with pytest.warns(UserWarning, match="it is run again"):
        run.optimizer.inner_passes(run.task, run.safety)
    assert run.calls == ["safety", "task", "task"] * 2
    with run.optimizer.task_pass():
        run.task(None)
    run.optimizer.step()
    run.optimizer.inner_passes(run.task, run.safety)
    before = snapshot(run.case.model)
    run.fails_in = (len(run.calls),)
    with pytest.raises(torch.OutOfMemoryError), run.optimizer.task_pass():
        run.task(None)
    assert_unchanged(run.case.model, before)


# ---- memory ----


class Limited(LiveBytes):
    """A device with so much memory."""

    limit = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.live > self.limit:
            raise torch.OutOfMemoryError
        return result


def long_case() -> Problem:
    """Activations that outweigh the adapters by far."""
    case = problem()._replace(model=with_lora(tiny_llama(layers=6)))
    return case._replace(
        **{name: random_batch(6, 48, seed) for seed, name in enumerate(case._fields[1:])}
    )


@pytest.mark.parametrize("kind", ["blend", "sap"])
def test_the_second_run_has_the_memory_of_the_first_to_itself(kind: str) -> None:
    def build(checkpointed: bool) -> tuple[Problem, BlendedAdamW]:
        case = long_case()
        optimizer = blended(case) if kind == "blend" else sap(case)
        if checkpointed:
            assert optimizer.passes.trained.checkpoint_layers() is None
        return case, optimizer

    def step(case: Problem, optimizer: BlendedAdamW) -> None:
        optimizer.step(lambda: task(case), lambda: safety(case))

    peaks = []
    for checkpointed in (False, True):
        made = build(checkpointed)
        with LiveBytes() as memory:
            step(*made)
        peaks.append(memory.peak)
    stored, checkpointed = peaks
    assert checkpointed < 0.7 * stored
    case, optimizer = build(False)
    with Limited() as memory, pytest.warns(UserWarning, match="it is run again"):
        memory.limit = (stored + checkpointed) // 2
        step(case, optimizer)


# ---- where it cannot help ----


class Unknown(nn.Module):
    """A model whose decoder layers nobody can tell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


def notes_of(passes: SafetyPasses) -> str:
    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("injected")

    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError) as raised:
        warnings.simplefilter("error")
        passes.again_out_of_memory(out_of_memory)
    (note,) = raised.value.__notes__
    return str(note)


def test_an_error_that_checkpointing_cannot_help_is_raised_with_the_reason() -> None:
    case = problem(layers=2)
    layers = {"layers": [0, 1]}
    always = sap(case, {"checkpointing": "layers"} | layers)
    assert "is checkpointed already" in notes_of(always.passes)
    unknown = Unknown()
    assert "cannot tell the decoder layers of Unknown" in notes_of(
        SafetyPasses(unknown.parameters())
    )
    other = nn.Parameter(torch.zeros(2))
    assert "call runs_in(model) once" in notes_of(SafetyPasses([*case.trained, other]))
    evaluated = sap(case, layers)
    case.model.eval()
    assert "eval mode" in notes_of(evaluated.passes)
    case.model.train().get_base_model().gradient_checkpointing_enable()
    assert "checkpoints its decoder layers itself" in notes_of(evaluated.passes)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_one_rank_of_several_runs_nothing_again(
    one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(layers=2)
    passes = SafetyPasses(case.trained)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)  # of ranks that nobody made known
    assert "the others wait for this one" in notes_of(passes)
    monkeypatch.undo()
    assert passes.trained.checkpoint_layers() is None
    passes = SafetyPasses(case.trained)
    passes.runs_in(DistributedDataParallel(case.model))
    assert "the others wait for this one" in notes_of(passes)


def test_an_update_that_runs_out_of_memory_is_not_run_again() -> None:
    run = Run(blended)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(torch.OutOfMemoryError) as raised:

        def no_moments(*_: Any) -> None:
            raise torch.OutOfMemoryError("injected")

        patch.setattr(BlendedAdamW, "_initialize_state", no_moments)
        run.step()
    assert not hasattr(raised.value, "__notes__")
    assert run.calls == ["safety", "task"] and not run.is_checkpointed
