"""torch.compile traces a model with probes in one graph, and h is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sap_fast import FusedSAP, ProbeSet, ops
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


@pytest.mark.slow
def test_a_model_compiled_by_inductor_gives_the_same_h() -> None:
    # Fused kernels round differently.
    assert cosine(*compiled_and_eager("inductor")) > 0.999999
