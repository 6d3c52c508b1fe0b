"""torch.compile traces a model with probes in one graph, and h is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast import FusedSAP, ProbeSet, contrastive_loss, ops, task_loss
from sap_fast.losses import packing
from tests.oracle import cosine, naive_contrastive_loss, naive_task_loss
from tests.tiny import Problem, problem


def estimates_after_two_steps(case: Problem, model: nn.Module) -> dict[int, Tensor]:
    """Train `case.model` by calls to `model`, which may be a compiled twin of it."""
    probes = ProbeSet(case.model, layers=[1, 2], rho=1e-3)
    optimizer = FusedSAP(case.trained, probes, lr=1e-3)

    def task() -> Tensor:
        loss = naive_task_loss(model, case.batch)
        loss.backward()
        return loss

    def safety() -> Tensor:
        loss = naive_contrastive_loss(model, case.chosen, case.rejected)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.zero_grad()
        optimizer.step(task, safety)
    return probes.estimates


def compiled_and_eager(backend: str) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    case = problem(layers=3)
    twin = case._replace(model=copy.deepcopy(case.model))
    torch.compiler.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend=backend)
    return estimates_after_two_steps(case, compiled), estimates_after_two_steps(twin, twin.model)


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize(
    "cpu_backend", ["native", pytest.param("reference", marks=pytest.mark.slow)], indirect=True
)
def test_a_compiled_model_gives_the_same_h_in_one_graph() -> None:
    # Autograd's graph is traced as for inductor, but every operation runs as it would eagerly.
    compiled, eager = compiled_and_eager("aot_eager")
    assert compiled.keys() == eager.keys()
    assert all(torch.equal(compiled[index], eager[index]) for index in eager)


def test_a_compiled_model_in_fp64_runs_on_the_reference() -> None:
    # The choice is made when the graph is traced: no operation can refuse then.
    anchor = torch.empty(0, requires_grad=True)
    offset, buffer = torch.randn(4).double(), torch.zeros(4).double()

    def inject(hidden: Tensor) -> Tensor:
        return ops.probe_inject(hidden, offset, buffer, anchor=anchor).square().sum()

    torch.compiler.reset()
    hidden = torch.randn(2, 3, 4).double()
    torch.compile(inject, fullgraph=True, backend="aot_eager")(hidden).backward()
    torch.testing.assert_close(buffer, 2 * (hidden + offset).sum((0, 1)))


# ---- layers that are compiled by themselves ----


class Regional:
    """A model, its layers compiled or not, trained by the losses of this package."""

    def __init__(self, backend: str | None, *, before_the_probes: bool, in_place: bool) -> None:
        torch.compiler.reset()
        self.case = problem(layers=6)
        self.case.model.config._attn_implementation = "sdpa"
        for batch in self.case[1:]:  # so that packing pays
            batch["input_ids"][:, :6] = batch["input_ids"][0, :6]
        self.stack = self.case.model.get_base_model().model.layers
        self.in_place, self.backend = in_place, backend
        if before_the_probes:
            self.compile()
        probes = ProbeSet(self.case.model, layers=[1, 2, 3, 4], rho=1e-3)
        self.probes = probes
        self.optimizer = FusedSAP(self.case.trained, probes, lr=1e-3)
        if not before_the_probes:
            self.compile()

    def compile(self) -> None:
        for index, layer in enumerate(self.stack):
            if self.backend is not None and self.in_place:
                layer.compile(backend=self.backend, fullgraph=True)
            elif self.backend is not None:
                self.stack[index] = torch.compile(layer, backend=self.backend, fullgraph=True)

    def run(self, steps: int = 2) -> dict[int, Tensor]:
        def backward(loss: Tensor) -> Tensor:
            loss.backward()
            return loss

        case = self.case
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.optimizer.step(
                lambda: backward(task_loss(case.model, case.batch)),
                lambda: backward(contrastive_loss(case.model, case.chosen, case.rejected)),
            )
        return self.probes.estimates


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each batch of the losses was packed."""
    found, pack = [], packing.pack

    def spy(*arguments: Any) -> Any:
        result = pack(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(packing, "pack", spy)
    return found


@pytest.mark.usefixtures("cpu_backend")
@pytest.mark.parametrize("cpu_backend", ["native"], indirect=True)
@pytest.mark.parametrize(
    ("backend", "before_the_probes", "in_place"),
    [
        ("eager", True, True),
        pytest.param("eager", False, True, marks=pytest.mark.slow),
        pytest.param("eager", True, False, marks=pytest.mark.slow),
        ("aot_eager", True, True),
        pytest.param("inductor", True, True, marks=pytest.mark.slow),
    ],
)
def test_compiled_layers_keep_the_chunked_head_and_packing(
    backend: str,
    before_the_probes: bool,
    in_place: bool,
    packed: list[bool],
    recwarn: pytest.WarningsRecorder,
) -> None:
    expected = Regional(None, before_the_probes=True, in_place=True).run()
    plain, counters = list(packed), torch._dynamo.utils.counters
    packed.clear()
    regional = Regional(backend, before_the_probes=before_the_probes, in_place=in_place)
    counters.clear()
    found = regional.run()
    assert packed == plain and any(packed)
    assert not [w for w in recwarn if "logits" in str(w.message) or "packed" in str(w.message)]
    assert cosine(found, expected) > 0.999999
    if backend == "eager":
        assert all(torch.equal(found[index], expected[index]) for index in expected)
    # Each layer runs the code of the others: with masks of both kinds, with gradients below and
    # above the lowest probe.
    assert 0 < counters["stats"]["unique_graphs"] <= 8
    assert not counters["recompile_limit"]


@pytest.mark.slow
def test_a_probe_set_that_is_detached_leaves_the_compiled_layers_as_they_were() -> None:
    regional = Regional("eager", before_the_probes=False, in_place=True)
    compiled = [layer._compiled_call_impl for layer in regional.stack]
    regional.run(1)
    assert [layer._compiled_call_impl for layer in regional.stack] != compiled
    regional.probes.detach()
    assert [layer._compiled_call_impl for layer in regional.stack] == compiled
    assert all(not layer._forward_hooks for layer in regional.stack)


@pytest.mark.slow
def test_a_model_compiled_by_inductor_gives_the_same_h() -> None:
    # Fused kernels round differently.
    assert cosine(*compiled_and_eager("inductor")) > 0.999999
