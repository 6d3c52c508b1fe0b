"""What only a CUDA device shows: its random generator, and that no step waits for it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import accelerate
import pytest
import torch
from torch import Tensor, nn

from sap_fast import (
    BlendedAdamW,
    FusedSAP,
    ProbeSet,
    SafetyPasses,
    contrastive_loss,
    joint_loss,
    ops,
    task_loss,
)
from sap_fast.step.rules import Rule
from tests.oracle import cosine, naive_contrastive_loss, naive_task_loss, oracle_estimate
from tests.tiny import (
    HIDDEN,
    Problem,
    closures,
    problem,
    random_batch,
    safety,
    task,
    tiny_llama,
)

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


@pytest.mark.parametrize("method", ["sap", "blend"])
def test_no_step_of_a_model_of_transformers_waits_for_the_device(method: str) -> None:
    model = tiny_llama(attention="sdpa").cuda()
    batches = [{name: x.cuda() for name, x in random_batch(4, seed=k).items()} for k in range(3)]
    for batch in batches:  # unpadded, so that the losses leave it out
        batch["attention_mask"].fill_(1)
    if method == "sap":
        probes = ProbeSet(model, layers=[1, 2], rho=1e-3)
        optimizer: BlendedAdamW = FusedSAP(model.parameters(), probes, max_grad_norm=1.0)
    else:
        optimizer = BlendedAdamW(model.parameters(), max_grad_norm=1.0)

    def run(loss: Callable[..., Tensor], *given: object) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(model, *given)
        value.backward()
        return value.detach()

    for index in range(3):
        optimizer.zero_grad()
        # The first step finds out what the model is like and what of the batches is scored.
        torch.cuda.set_sync_debug_mode("error" if index else "default")
        try:
            optimizer.step(
                lambda part: run(task_loss, part), lambda: run(joint_loss, *batches[1:]), batches[0]
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert optimizer.metrics.skipped_steps == 0


def test_a_step_on_a_4_bit_base_trains_the_adapters_alone() -> None:
    from tests.quantized import on_base  # skips without the packages that quantize

    case = on_base("nf4", dtype=torch.bfloat16, device_map={"": 0})
    model = case.model
    moved = [{name: x.cuda() for name, x in batch.items()} for batch in case[1:]]
    case = Problem(model, *moved)
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    probes = ProbeSet(model, layers=[1, 2])
    optimizer = FusedSAP(case.trained, probes, lr=1e-3)

    def run(loss: Callable[..., Tensor], *given: object) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16):
            value = loss(model, *given)
        value.backward()
        return value.detach()

    def inner() -> None:
        optimizer.inner_passes(
            lambda part: run(task_loss, part),
            lambda: run(contrastive_loss, case.chosen, case.rejected),
            case.batch,
        )

    inner()
    assert all(torch.equal(x, before[name]) for name, x in model.named_parameters())
    assert all(v.isfinite().all() and v.any() for v in probes.offsets.values())
    with optimizer.task_pass():
        run(task_loss, case.batch)
    optimizer.step()
    changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert changed == {name for name, x in model.named_parameters() if x.requires_grad}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_a_model_over_two_devices_steps_as_on_one(backend: str) -> None:
    reason = ops.why_not(backend, "cuda")
    if reason is not None:
        pytest.skip(reason)
    devices = dict.fromkeys(["model.embed_tokens", "model.rotary_emb"], 0)
    devices |= {f"model.layers.{index}": index // 2 for index in range(4)}
    devices |= dict.fromkeys(["model.norm", "lm_head"], 1)
    found = []
    for apart in (False, True):
        case = on_gpu(problem(lora=False))
        if apart:
            case = case._replace(model=accelerate.dispatch_model(case.model, devices))
        probes = ProbeSet(case.model, layers=[1, 2], rho=1e-3)
        # A backend that is named leaves nothing to the reference.
        settings = {"safety_weight": 0.1, "max_grad_norm": 1.0, "backend": backend}
        optimizer = FusedSAP(case.trained, probes, lr=1e-3, **settings)
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.step(*closures(case), case.batch)
        found.append([parameter.detach().cpu() for parameter in case.trained])
    for left, right in zip(*found, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


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
