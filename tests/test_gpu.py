"""What only a CUDA device shows: its random generator, and that no step waits for it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from sap_fast import FusedSAP, ProbeSet, SafetyPasses, ops
from sap_fast.step.rules import Rule
from tests.oracle import cosine, naive_contrastive_loss, naive_task_loss, oracle_estimate
from tests.tiny import HIDDEN, Problem, closures, problem, safety, task

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


@pytest.mark.parametrize("rows", [1.0, 0.5])
def test_two_runs_with_deterministic_algorithms_have_the_same_bits(
    rows: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(2):
            case = on_gpu(problem(dropout=0.1))
            probes = ProbeSet(case.model, layers=[1, 2], rho=1e-3, rows=rows)
            optimizer = FusedSAP(case.trained, probes, lr=1e-2, safety_weight=0.1)
            torch.manual_seed(0)
            for _ in range(3):
                optimizer.zero_grad()
                optimizer.step(*closures(case), case.batch)
            runs.append([parameter.detach().clone() for parameter in case.trained])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


class Chain:
    """A small model, and passes and updates that must not wait for the device."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).cuda()
        self.probes = ProbeSet(self.model, layers=[self.model[1]], rho=1e-3)
        self._x, self._y = torch.randn(2, 2, 8, 64, device="cuda")

    def backward(self, sign: float) -> Tensor:
        loss = (self.model(self._x) - sign * self._y).square().mean()
        loss.backward()
        return loss.detach()

    def run(self, step: Callable[[], object], count: int = 4) -> None:
        """The step several times; the first one allocates state, and may wait."""
        for index in range(count):
            self.model.zero_grad()
            torch.cuda.set_sync_debug_mode("error" if index else "default")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", ["blend", "project", "floor"])
@pytest.mark.parametrize("direction_every", [1, 3])
def test_no_step_waits_for_the_device(rule: Rule, direction_every: int) -> None:
    chain = Chain()
    optimizer = FusedSAP(
        chain.model.parameters(),
        chain.probes,
        safety_weight=0.1,
        rule=rule,
        direction_every=direction_every,
        max_grad_norm=1.0,
    )
    chain.run(lambda: optimizer.step(lambda: chain.backward(1.0), lambda: chain.backward(-1.0)))
    assert optimizer.metrics.skipped_steps == 0


def test_blending_for_another_optimizer_does_not_wait_either() -> None:
    chain = Chain()
    other = torch.optim.SGD(chain.model.parameters(), lr=0.1, momentum=0.9)
    passes = SafetyPasses(other.param_groups, chain.probes, safety_weight=0.1)

    def step() -> None:
        passes.inner_passes(lambda _: chain.backward(1.0), lambda: chain.backward(-1.0))
        with passes.task_pass():
            chain.backward(1.0)
        passes.blend_()
        other.step()
        passes.end_step()

    chain.run(step)
    assert passes.metrics.skipped_steps == 0


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
