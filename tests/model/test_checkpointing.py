"""Checkpointing changes what a pass stores, and not one bit of what it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from sap_fast import FusedSAP, ProbeSet, SafetyPasses
from sap_fast.model import checkpointing as module_under_test
from sap_fast.model.checkpointing import Checkpointing
from sap_fast.model.layers import find_decoder_layers
from sap_fast.step.guards import frozen as frozen_parameters
from tests.oracle import naive_task_loss
from tests.tiny import (
    HIDDEN,
    LiveBytes,
    Problem,
    problem,
    random_batch,
    safety,
    task,
    tiny_llama,
    with_lora,
)

PLENTY = 2**50


def case_with_dropout(lora: bool, layers: int = 4) -> Problem:
    """Dropout in attention, and in the adapters where there are some."""
    model: nn.Module = tiny_llama(layers=layers, dropout=0.1)
    if lora:
        model = with_lora(model, dropout=0.1)
    return problem(lora=False)._replace(model=model)


def checkpointing_of(
    model: nn.Module,
    mode: Literal["none", "layers", "auto"],
    lowest_probed: int = 1,
    budget: int | None = None,
) -> Checkpointing:
    return Checkpointing(*find_decoder_layers(model), mode, lowest_probed, budget)


class Runs:
    """How often the forward of every layer ran; twice in a pass is once more in backward."""

    def __init__(self, model: nn.Module) -> None:
        self._stack = find_decoder_layers(model)[0]
        self.counts = [0] * len(self._stack)
        for index, layer in enumerate(self._stack):
            layer.input_layernorm.register_forward_pre_hook(self._counter(index))

    def _counter(self, index: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self.counts[index] += 1

        return count

    def take(self) -> list[int]:
        """The counts since the last call."""
        counts, self.counts[:] = list(self.counts), [0] * len(self.counts)
        return counts


# ---- the bits ----


def step_by_hand(case: Problem, wrapped: Checkpointing) -> dict[str, list[Tensor]]:
    """The passes of one step, and all that they give."""
    probes = ProbeSet(case.model, layers=[1, 2], size=0.05, rho=1e-3)
    optimizer = FusedSAP(case.trained, probes)
    torch.manual_seed(5)
    losses = []

    def wrapped_safety() -> Tensor:
        with wrapped.active(frozen=False):
            losses.append(safety(case))
        return losses[-1]

    def wrapped_task(part: None, frozen: bool = True) -> Tensor:
        with wrapped.active(frozen=frozen):
            losses.append(task(case))
        return losses[-1]

    optimizer.inner_passes(wrapped_task, wrapped_safety)
    with optimizer.task_pass():
        wrapped_task(None, frozen=False)
    assert len(losses) == 4
    return {
        "losses": losses,
        "h": [probes.estimates[index] for index in (1, 2)],
        "V": [probes.offsets[index] for index in (1, 2)],
        "gradients": [p.grad for p in case.trained if p.grad is not None],
        "random state": [torch.get_rng_state()],
    }


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize(
    ("mode", "budget"), [("layers", None), ("auto", 0), ("auto", 600_000), ("auto", PLENTY)]
)
def test_a_step_gives_the_same_bits_with_and_without(
    lora: bool, mode: Literal["layers", "auto"], budget: int | None
) -> None:
    plain, wrapped = case_with_dropout(lora), case_with_dropout(lora)
    expected = step_by_hand(plain, checkpointing_of(plain.model, "none"))
    found = step_by_hand(wrapped, checkpointing_of(wrapped.model, mode, budget=budget))
    assert any(v.abs().max() > 0 for v in expected["V"])
    for name, values in expected.items():
        for a, b in zip(values, found[name], strict=True):
            assert torch.equal(a, b), name


def test_probes_are_not_injected_again_when_a_layer_runs_again() -> None:
    case = case_with_dropout(lora=True)
    wrapped = checkpointing_of(case.model, "layers")
    calls: list[int] = []
    optimizer = FusedSAP(case.trained, ProbeSet(case.model, layers=[1, 2], rho=1e-3))
    stack = find_decoder_layers(case.model)[0]
    runs = Runs(case.model)
    optimizer.inner_passes(partial(task, case), partial(safety, case))
    runs.take()
    # A hook where those of the probes are.
    stack[1].register_forward_hook(lambda *_: calls.append(1))
    with optimizer.task_pass(), wrapped.active(frozen=False):
        task(case)
    assert runs.take() == [2, 2, 2, 2]
    assert calls == [1]


def test_backward_after_the_context_runs_again_what_ran_inside() -> None:
    plain, wrapped = case_with_dropout(lora=True), case_with_dropout(lora=True)
    torch.manual_seed(3)
    task(plain)
    torch.manual_seed(3)
    runs = Runs(wrapped.model)
    with checkpointing_of(wrapped.model, "layers").active(frozen=False):
        loss = naive_task_loss(wrapped.model, wrapped.batch)
    torch.rand(7)
    loss.backward()
    assert runs.take() == [2, 2, 2, 2]
    for a, b in zip(plain.trained, wrapped.trained, strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("options", [{}, {"difference": "forward"}, {"rows": 0.5}], ids=str)
@pytest.mark.parametrize("lora", [True, False])
def test_the_setting_of_a_probe_set_changes_no_bit(lora: bool, options: dict[str, Any]) -> None:
    results = []
    for mode in ("none", "layers", "auto"):
        case = problem(lora=lora, dropout=0.2)
        settings = {"size": 0.05, "rho": 1e-3, "checkpointing": mode} | options
        probes = ProbeSet(case.model, layers=[1, 2], **settings)
        if probes._checkpointing is not None:
            probes._checkpointing.budget = 2**17  # room for what half the layers store
        optimizer = FusedSAP(case.trained, probes, lr=1e-2)
        runs = Runs(case.model)
        torch.manual_seed(11)
        for step in range(2):
            optimizer.zero_grad()
            batch = random_batch(rows=4, seed=step)
            optimizer.step(partial(task, case), partial(safety, case), batch)
        results.append(([p.detach().clone() for p in case.model.parameters()], runs.take()[3]))
    (plain, once), (layers, twice), (auto, between) = results
    for other in (layers, auto):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    # Every forward of the highest layer, again in its backward.
    assert twice == 2 * once
    assert once <= between <= twice


@pytest.mark.parametrize("mode", ["layers", "auto"])
def test_a_model_compiled_as_a_whole_gives_the_same_bits(mode: Literal["layers", "auto"]) -> None:
    case = problem(layers=2)
    twin = case.copy()
    # The naive loss leaves the cache on, and transformers warns of it, which cannot be compiled.
    find_decoder_layers(case.model)[1].config.use_cache = False
    torch.compiler.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    wrapped = checkpointing_of(case.model, mode, lowest_probed=0)
    with wrapped.active(frozen=False):
        naive_task_loss(compiled, case.batch).backward()
    task(twin)
    for a, b in zip(case.trained, twin.trained, strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)


# ---- which layers ----


def test_layers_checkpoints_what_stores_anything_in_the_pass() -> None:
    case = case_with_dropout(lora=True)
    wrapped, runs = checkpointing_of(case.model, "layers", lowest_probed=1), Runs(case.model)
    with wrapped.active(frozen=False):
        task(case)
    assert runs.take() == [2, 2, 2, 2]
    assert runs_of_probe_passes(case, wrapped, runs) == [[1, 1, 2, 2]] * 2


def runs_of_probe_passes(case: Problem, wrapped: Checkpointing, runs: Runs) -> list[list[int]]:
    """The counts of each of the two."""
    probes = ProbeSet(case.model, layers=[wrapped.lowest_probed], rho=1e-3)
    passes = SafetyPasses(case.trained, probes)
    counts = []

    def counted(part: None) -> Tensor:
        runs.take()
        with wrapped.active(frozen=True):
            loss = task(case)
        counts.append(runs.take())
        return loss

    passes.safety_pass(partial(safety, case))
    passes.probe_passes(counted)
    probes.detach()
    return counts


@contextmanager
def checkpointed_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts the layers that are checkpointed, also where none runs again."""
    calls: list[int] = []

    def spy(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return checkpoint(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module_under_test, "checkpoint", spy)
        yield calls


def test_layers_that_store_nothing_are_not_checkpointed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_with_dropout(lora=True)
    wrapped = checkpointing_of(case.model, "layers", lowest_probed=1)
    with checkpointed_calls(monkeypatch) as calls:
        with wrapped.active(frozen=False), torch.no_grad():
            naive_task_loss(case.model, case.batch)
        assert len(calls) == 0
        # Without a probe in the model, nothing takes a gradient.
        with wrapped.active(frozen=False), frozen_parameters(case.trained):
            naive_task_loss(case.model, case.batch)
        assert len(calls) == 0
        # Adapters in the upper half only.
        for name, parameter in case.model.named_parameters():
            if ".layers.0." in name or ".layers.1." in name:
                parameter.requires_grad_(False)
        with wrapped.active(frozen=False):
            naive_task_loss(case.model, case.batch)
        assert len(calls) == 2


def test_below_the_lowest_probe_of_a_probe_pass_nothing_is_checkpointed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = case_with_dropout(lora=True)
    case.model.enable_input_require_grads()
    wrapped = checkpointing_of(case.model, "layers", lowest_probed=1)
    with checkpointed_calls(monkeypatch) as calls:
        with wrapped.active(frozen=True), frozen_parameters(case.trained):
            naive_task_loss(case.model, case.batch)
    assert len(calls) == 2


@pytest.mark.parametrize("transformers", [True, False])
def test_only_in_training_mode(transformers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model: nn.Module = tiny_llama() if transformers else Residual()
    example = random_batch()["input_ids"] if transformers else torch.randn(2, 3, HIDDEN)
    owner = find_decoder_layers(model)[1] if transformers else model
    wrapped = Checkpointing(owner.layers, owner, "layers", 1)
    for training in (True, False):
        model.train(training)
        with checkpointed_calls(monkeypatch) as calls:
            with wrapped.active(frozen=False):
                model(example)
        assert len(calls) == (4 if training else 0)


@pytest.mark.parametrize("frozen", [True, False])
def test_the_users_own_checkpointing_is_not_doubled(frozen: bool) -> None:
    case = case_with_dropout(lora=True)
    case.model.enable_input_require_grads()
    case.model.gradient_checkpointing_enable({"use_reentrant": False})
    stack = find_decoder_layers(case.model)[0]
    calls: list[int] = []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return checkpoint(*args, use_reentrant=False, **kwargs)

    for layer in stack:
        layer._gradient_checkpointing_func = own
    # As `every_n_layers` of transformers does.
    stack[3].gradient_checkpointing = False
    runs = Runs(case.model)
    for mode in ("none", "layers"):
        with checkpointing_of(case.model, mode).active(frozen=frozen):
            task(case)
        assert len(calls) == 3
        calls.clear()
        assert runs.take() == [2, 2, 2, 1 if mode == "none" else 2]
    assert not stack[3].gradient_checkpointing
    assert all(layer.gradient_checkpointing for layer in stack[:3])
    assert all(layer._gradient_checkpointing_func is own for layer in stack)


# ---- layers that are not of transformers ----


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 4 * HIDDEN)
        self.down = nn.Linear(4 * HIDDEN, HIDDEN)
        self.dropout = nn.Dropout(0.2)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor]:
        inner = torch.tanh(self.up(self.input_layernorm(hidden_states)))
        return (hidden_states + self.dropout(self.down(inner)),)


class Residual(nn.Module):
    """A stack of layers that take their input by name, and return tuples."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer() for _ in range(depth))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden_states=hidden)[0]
        return hidden


def plain_checkpointing(
    model: Residual,
    mode: Literal["none", "layers", "auto"],
    lowest_probed: int = 1,
    budget: int | None = None,
) -> Checkpointing:
    return Checkpointing(model.layers, model, mode, lowest_probed, budget)


@pytest.mark.parametrize(("mode", "budget"), [("layers", None), ("auto", 0), ("auto", PLENTY)])
def test_other_layers_give_the_same_bits(
    mode: Literal["layers", "auto"], budget: int | None
) -> None:
    gradients = []
    for used in ("none", mode):
        model = Residual()
        torch.manual_seed(1)
        with plain_checkpointing(model, used, budget=budget).active(frozen=False):
            model(torch.randn(2, 5, HIDDEN)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)


def test_the_generators_follow_hidden_states_that_are_passed_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # torch.utils.checkpoint restores those of the devices of its positional tensors alone.
    positional: list[tuple[int, ...]] = []

    def spy(function: Any, *args: Any, **kwargs: Any) -> Any:
        positional.append(tuple(args[0].shape))
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(module_under_test, "checkpoint", spy)
    model = Residual()
    with plain_checkpointing(model, "layers").active(frozen=False):
        model(torch.randn(2, 5, HIDDEN))
    assert positional == [(2, 5, HIDDEN)] * 4


@pytest.mark.parametrize("kind", ["owner's switch", "torch.distributed"])
def test_other_layers_that_are_checkpointed_already_are_left_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Residual()
    if kind == "owner's switch":  # transformers before its layers had one; model code of that time
        model.gradient_checkpointing = True
    else:
        model.layers[0] = checkpoint_wrapper(model.layers[0])
    with checkpointed_calls(monkeypatch) as calls:
        with plain_checkpointing(model, "layers").active(frozen=False):
            model(torch.randn(2, 5, HIDDEN))
    assert len(calls) == (0 if kind == "owner's switch" else 3)


# ---- the model as it was ----


def attributes(model: nn.Module) -> list[dict[str, Any]]:
    return [
        {name: dict(v) if isinstance(v, dict) else v for name, v in module.__dict__.items()}
        for module in model.modules()
    ]


class Outer(nn.Module):
    """A wrapper around a wrapper."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


@pytest.mark.parametrize("switched", [True, False])
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("mode", ["none", "layers", "auto"])
def test_the_model_is_put_back(
    mode: Literal["none", "layers", "auto"], error: type[BaseException] | None, switched: bool
) -> None:
    model = Outer(with_lora(tiny_llama(), dropout=0.1))
    if switched:
        model.module.gradient_checkpointing_enable({"use_reentrant": False})
    case = problem()._replace(model=model)
    wrapped = checkpointing_of(model, mode)
    stack = find_decoder_layers(model)[0]
    before = attributes(model)

    def fail(*_: Any) -> None:
        raise error or ZeroDivisionError

    for frozen in (False, True):
        for _ in range(2):  # the first measures
            with wrapped.active(frozen=frozen):
                task(case)
                inside = attributes(model)
            assert (inside == before) == (mode == "none")
        if error is not None:
            handle = stack[2].mlp.register_forward_hook(fail)
            with pytest.raises(error), wrapped.active(frozen=frozen):
                task(case)
            handle.remove()
        assert attributes(model) == before


def test_a_forward_on_the_instance_is_put_back() -> None:
    model = Residual()
    first = model.layers[0]
    original = first.forward
    calls: list[int] = []

    def own(**inputs: Any) -> Any:  # what accelerate does to move inputs between devices
        calls.append(1)
        return original(**inputs)

    first.forward = own
    with plain_checkpointing(model, "layers").active(frozen=False):
        assert first.forward is not own
        model(torch.randn(2, 5, HIDDEN)).sum().backward()
    assert len(calls) == 2
    assert first.forward is own
    assert all("forward" not in layer.__dict__ for layer in model.layers[1:])


# ---- memory ----


def big_case(lora: bool) -> Problem:
    """Eight layers, and a batch that outweighs the head."""
    case = case_with_dropout(lora, layers=8)
    return case._replace(batch=random_batch(rows=4, length=48))


def pass_peak(case: Problem, wrapped: Checkpointing) -> int:
    for parameter in case.trained:
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as memory, wrapped.active(frozen=False):
        task(case)
    return memory.peak


@pytest.mark.parametrize("lora", [True, False])
def test_layers_lowers_the_peak_of_a_task_pass(lora: bool) -> None:
    plain, wrapped = big_case(lora), big_case(lora)
    without = pass_peak(plain, checkpointing_of(plain.model, "none"))
    assert pass_peak(wrapped, checkpointing_of(wrapped.model, "layers")) < 0.5 * without


def test_the_earliest_layers_are_checkpointed_since_that_lowers_the_peak() -> None:
    case = big_case(lora=True)
    without = pass_peak(case, checkpointing_of(case.model, "none"))
    wrapped = checkpointing_of(case.model, "auto", budget=without // 2)
    pass_peak(case, wrapped)  # measures
    runs = Runs(case.model)
    earliest = pass_peak(case, wrapped)
    counts = runs.take()
    count = counts.count(2)
    assert counts == [2] * count + [1] * (8 - count) and 2 <= count <= 6

    # As many from the other end, with the switch of transformers.
    case.model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in find_decoder_layers(case.model)[0][: 8 - count]:
        layer.gradient_checkpointing = False
    latest = pass_peak(case, checkpointing_of(case.model, "none"))
    assert runs.take() == counts[::-1]
    one_layer = without / 8
    assert latest - earliest > 0.5 * one_layer


# ---- auto ----


def task_runs(case: Problem, wrapped: Checkpointing, runs: Runs, passes: int = 2) -> list[int]:
    """The counts of the last of some task passes; the first measures."""
    for _ in range(passes):
        runs.take()
        with wrapped.active(frozen=False):
            task(case)
    return runs.take()


@pytest.mark.parametrize("lora", [True, False])
def test_auto_checkpoints_what_does_not_fit_and_less_in_a_probe_pass(lora: bool) -> None:
    case = big_case(lora)
    without = pass_peak(case, checkpointing_of(case.model, "none"))
    runs = Runs(case.model)
    found = {}
    for name, budget in (
        ("small", without // 50),
        ("middle", 2 * without // 5),
        ("large", 2 * without),
    ):
        wrapped = checkpointing_of(case.model, "auto", lowest_probed=3, budget=budget)
        found[name] = (
            task_runs(case, wrapped, runs).count(2),
            runs_of_probe_passes(case, wrapped, runs)[1].count(2),
        )
    assert found["small"] == (8, 4) and found["large"] == (0, 0)
    assert 0 < found["middle"][0] < 8
    assert found["middle"][1] < found["middle"][0]
    if not lora:  # without weight gradients a layer stores less, so that more of them are kept
        assert 4 - found["middle"][1] > 8 - found["middle"][0]


@pytest.mark.parametrize("autocast", [False, True])
def test_auto_fills_its_budget_and_no_more(autocast: bool) -> None:
    # No head: after a forward, what layers store for backward is all there is, but for the state of
    # the generator, 5 KB for every checkpointed layer.
    hidden = torch.randn(16, 64, HIDDEN, requires_grad=True)
    # Autocast keeps a copy of every frozen weight, for backward to pass through.
    model = Residual(depth=8).requires_grad_(not autocast)

    def stored(wrapped: Checkpointing) -> int:
        with (
            LiveBytes() as memory,
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            wrapped.active(frozen=False),
        ):
            output = model(hidden)
        with_graph = memory.live
        del output
        return with_graph - memory.live  # views of weights and input count as live, and stay

    everything = stored(plain_checkpointing(model, "none"))
    boundary = hidden.numel() * hidden.element_size()
    layer = everything / 8
    kept_before = -1
    for budget in range(0, 2 * everything, everything // 25):
        wrapped = plain_checkpointing(model, "auto", budget=budget)
        stored(wrapped)  # measures
        kept = round((stored(wrapped) - 8 * boundary) / (layer - boundary))
        needed = 8 * boundary + kept * (layer - boundary) + layer
        assert kept >= kept_before
        assert kept == 0 or needed <= 1.01 * budget
        assert kept == 8 or needed + (layer - boundary) > 0.99 * budget
        kept_before = kept
    assert kept_before == 8


def test_layers_that_store_nothing_take_nothing_of_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, hidden = Residual(depth=8), torch.randn(16, 64, HIDDEN)
    for index, layer in enumerate(model.layers):
        layer.requires_grad_(index >= 6)
    with LiveBytes() as memory:
        output = model(hidden)
    with_graph, boundary = memory.live, output.numel() * output.element_size()
    del output
    layer_bytes = (with_graph - memory.live - boundary) / 2
    # Two layers fit where there is room for a third, and their inputs are all they need besides.
    for share, expected in ((2.95, 1), (3.05, 0)):
        wrapped = plain_checkpointing(model, "auto", budget=int(share * layer_bytes))
        with wrapped.active(frozen=False):
            model(hidden)  # measures
            with checkpointed_calls(monkeypatch) as calls:
                model(hidden)
        assert len(calls) == expected


def test_layers_that_store_their_input_alone_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(HIDDEN, HIDDEN) for _ in range(4)))
    hidden = torch.randn(2, 3, HIDDEN)
    boundary = hidden.numel() * hidden.element_size()
    wrapped = Checkpointing(list(model), model, "auto", 1, budget=6 * boundary)
    with checkpointed_calls(monkeypatch) as calls, wrapped.active(frozen=False):
        for _ in range(2):  # the first measures
            model(hidden)
    assert len(calls) == 0


def test_the_first_forward_measures_on_one_layer_and_decides_for_the_others() -> None:
    case = big_case(lora=True)
    runs = Runs(case.model)
    wrapped = checkpointing_of(case.model, "auto", budget=0)
    assert task_runs(case, wrapped, runs, passes=1) == [1] + [2] * 7
    assert task_runs(case, wrapped, runs, passes=1) == [2] * 8
    # In other dtypes, and where other tensors are trained, a layer stores something else.
    with torch.autocast("cpu", torch.bfloat16):
        assert task_runs(case, wrapped, runs, passes=1) == [1] + [2] * 7
        assert task_runs(case, wrapped, runs, passes=1) == [2] * 8
    case.model.to(torch.bfloat16)
    assert task_runs(case, wrapped, runs, passes=1) == [1] + [2] * 7
    for parameter in case.model.parameters():
        parameter.requires_grad_(True)
    assert task_runs(case, wrapped, runs, passes=1) == [1] + [2] * 7
    assert task_runs(case, wrapped, runs, passes=1) == [2] * 8


def test_a_measurement_holds_for_another_number_of_rows() -> None:
    # Under autocast a layer also keeps bf16 copies of its weights, however few the tokens.
    case = problem(dropout=0.1, layers=8)
    few = case._replace(batch=random_batch(rows=2, length=12))
    many = case._replace(batch=random_batch(rows=16, length=12))
    runs = Runs(case.model)
    with torch.autocast("cpu", torch.bfloat16):
        without = pass_peak(many, checkpointing_of(case.model, "none"))
        for share in (0.3, 0.4, 0.5, 0.6, 0.7):
            measured_on = [
                checkpointing_of(case.model, "auto", budget=int(share * without)) for _ in range(2)
            ]
            task_runs(few, measured_on[0], runs)
            expected = task_runs(many, measured_on[1], runs)
            assert task_runs(many, measured_on[0], runs, passes=1) == expected


def test_longer_sequences_and_other_inputs_are_measured_again() -> None:
    # Eager attention stores S numbers per token and head, and masked attention may store the mask.
    case = big_case(lora=True)
    runs = Runs(case.model)
    wrapped = checkpointing_of(case.model, "auto", budget=0)

    def run(length: int, masked: bool = True) -> list[int]:
        batch = random_batch(rows=2 if masked else 1, length=length)
        return task_runs(case._replace(batch=batch), wrapped, runs, passes=1)

    find_decoder_layers(case.model)[1].config._attn_implementation = "sdpa"
    first = [1] + [2] * 7
    assert run(12) == first and run(12) == [2] * 8
    assert run(8) == [2] * 8
    assert run(16) == first and run(16) == [2] * 8
    assert run(12) == [2] * 8
    assert run(12, masked=False) == first and run(12, masked=False) == [2] * 8


def test_auto_takes_half_of_the_memory_that_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    case = big_case(lora=False)
    runs = Runs(case.model)
    stored = pass_peak(case, checkpointing_of(case.model, "none"))  # and makes gradients
    for budget in (stored // 50, stored // 2, 2 * stored):
        expected = task_runs(case, checkpointing_of(case.model, "auto", budget=budget), runs)
        monkeypatch.setattr(
            module_under_test, "_available_memory", lambda budget=budget: 2 * budget
        )
        assert task_runs(case, checkpointing_of(case.model, "auto"), runs) == expected

    # Gradients that do not exist yet will take theirs.
    owner = find_decoder_layers(case.model)[1]
    gradients = sum(p.numel() * p.element_size() for p in owner.parameters())
    for budget in range(stored // 5, stored, stored // 20):
        expected = task_runs(case, checkpointing_of(case.model, "auto", budget=budget), runs)
        available = 2 * (budget + gradients)
        monkeypatch.setattr(module_under_test, "_available_memory", lambda bytes=available: bytes)
        wrapped = checkpointing_of(case.model, "auto")
        task_runs(case, wrapped, runs, passes=1)  # measures
        for parameter in case.trained:
            parameter.grad = None
        assert task_runs(case, wrapped, runs, passes=1) == expected


def test_what_is_free_on_a_gpu_is_what_its_driver_and_its_allocator_have(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Residual().requires_grad_(False)
    wrapped = plain_checkpointing(model, "auto")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert wrapped._free_bytes(torch.device("cuda", 1)) == 1350
    # Nothing is known of others, so everything is checkpointed.
    assert wrapped._free_bytes(torch.device("xpu")) == 0


def test_the_memory_that_is_available_is_read_from_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total = psutil.virtual_memory().total
    assert 0.01 * total < module_under_test._available_memory() <= total

    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", missing)
    assert module_under_test._available_memory() == 0


# ---- what is refused ----


def test_settings_out_of_range_are_refused() -> None:
    model = Residual()
    with pytest.raises(
        ValueError, match='mode=\'all\' is not known; choose "none", "layers" or "a'
    ):
        Checkpointing(model.layers, model, "all", 0)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match="budget=-1 is out of range; give bytes ≥ 0"):
        plain_checkpointing(model, "auto", budget=-1)


@pytest.mark.parametrize("mode", ["layers", "auto"])
@pytest.mark.parametrize("in_place", [True, False])
def test_compiled_layers_are_refused(mode: Literal["layers", "auto"], in_place: bool) -> None:
    model = Residual()
    before = plain_checkpointing(model, mode)
    if in_place:
        model.layers[2].compile()
    else:
        model.layers[2] = torch.compile(model.layers[2])
    with pytest.raises(ValueError, match=f'="{mode}" cannot .* compiled layer, and layer 2 is one'):
        plain_checkpointing(model, mode)
    with pytest.raises(ValueError, match="layer 2 is one"), before.active(frozen=False):
        pass
    with plain_checkpointing(model, "none").active(frozen=False):
        pass
