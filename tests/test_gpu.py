"""What only a CUDA device shows: its random generator, and that no step waits for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sap_fast import FusedSAP, ProbeSet, ops
from sap_fast.step.rules import Rule
from tests.oracle import cosine, naive_contrastive_loss, naive_task_loss, oracle_estimate
from tests.tiny import HIDDEN, Problem, problem, safety, task

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: none here"),
]


def on_gpu(case: Problem) -> Problem:
    moved = [{name: x.cuda() for name, x in batch.items()} for batch in case[1:]]
    return Problem(case.model.cuda(), *moved)


def test_dropout_masks_of_the_device_are_the_same_in_every_pass() -> None:
    case = on_gpu(problem(dropout=0.3))
    states: list[Tensor] = []
    case.model.register_forward_pre_hook(lambda *_: states.append(torch.cuda.get_rng_state()))
    optimizer = FusedSAP(case.trained, ProbeSet(case.model, layers=[1], rho=1e-3), lr=0.0)
    optimizer.step(lambda: task(case), lambda: safety(case))
    *probe_states, task_state = states[-3:]
    assert all(torch.equal(state, task_state) for state in probe_states)
    before = torch.cuda.get_rng_state()
    optimizer.inner_passes(lambda _: task(case), lambda: safety(case))
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_h_on_the_device_is_the_oracle() -> None:
    case = problem()
    twin = case._replace(model=copy.deepcopy(case.model).double())
    modules = ProbeSet(twin.model, layers=[1, 2]).modules
    oracle = oracle_estimate(
        lambda: naive_task_loss(twin.model, twin.batch),
        lambda: naive_contrastive_loss(twin.model, twin.chosen, twin.rejected),
        twin.trained,
        modules,
        (HIDDEN,),
    )
    moved = on_gpu(case)
    probes = ProbeSet(moved.model, layers=[1, 2])
    FusedSAP(moved.trained, probes, lr=0.0).step(lambda: task(moved), lambda: safety(moved))
    found = {index: h.cpu() for index, h in probes.estimates.items()}
    assert cosine(found, oracle) > 0.9999


@pytest.mark.parametrize("rule", ["blend", "project", "floor"])
def test_no_step_waits_for_the_device(rule: Rule) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).cuda()
    x, y = torch.randn(2, 2, 8, 64, device="cuda")

    def backward(target: Tensor) -> Tensor:
        loss = (model(x) - target).square().mean()
        loss.backward()
        return loss.detach()

    probes = ProbeSet(model, layers=[model[1]], rho=1e-3)
    optimizer = FusedSAP(
        model.parameters(), probes, safety_weight=0.1, rule=rule, max_grad_norm=1.0
    )
    for step in range(3):
        optimizer.zero_grad()
        # The first step allocates state.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step(lambda: backward(y), lambda: backward(-y))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.metrics.skipped_steps == 0


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_the_work_on_weights_is_captured_in_a_cuda_graph(backend: str) -> None:
    reason = ops.why_not(backend, "cuda")
    if reason is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    shapes = [(64, 64), (1000,), (7,)]

    def lists() -> list[list[Tensor]]:
        made = [[torch.randn(shape, device="cuda") for shape in shapes] for _ in range(3)]
        zeros = [[torch.zeros(shape, device="cuda") for shape in shapes] for _ in range(2)]
        return [*made, *zeros, [torch.zeros((), device="cuda") for _ in shapes]]

    def step(params: list[Tensor], buffers: list[Tensor], *state: list[Tensor]) -> None:
        scale = 1e-3 * ops.sum_squares(params, backend=backend).sqrt()
        ops.perturb_swap_(params, buffers, scale, backend=backend)
        ops.reflect_(params, buffers, backend=backend)
        ops.restore_swap_(params, buffers, -1 / scale, backend=backend)
        settings = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
        ops.adamw_blend_(params, *state, lr=lr, **settings, backend=backend)

    eager = lists()
    captured = copy.deepcopy(eager)
    lr = torch.tensor(0.1, device="cuda")
    step(*copy.deepcopy(eager))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(*captured)
    # The learning rate and the step counters are read when the graph runs.
    for rate in (0.1, 0.02):
        lr.fill_(rate)
        step(*eager)
        graph.replay()
    torch.cuda.synchronize()
    for left, right in zip(eager, captured, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
