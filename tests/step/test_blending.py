"""The passes beside other optimizers: what they leave in the gradients is what FusedSAP uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet, SafetyPasses
from sap_fast.step.passes import Stage
from tests.oracle import naive_task_loss
from tests.tiny import (
    Problem,
    assert_same_bits,
    closures,
    plain_adamw,
    problem,
    random_batch,
    safety,
    safety_loss,
    spread,
    step_by_passes,
    task,
    weights,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")

BLENDING: dict[str, Any] = {"safety_weight": 0.3}
PROBE: dict[str, Any] = {"safety_weight": 0.0}
BOTH: dict[str, Any] = {"safety_weight": 0.3}
#: Whether there is a probe, and keywords of the passes.
SETTINGS = [
    (False, BLENDING),
    (True, PROBE),
    (True, BOTH),
    (False, BLENDING | {"direction_every": 3}),
    (True, PROBE | {"direction_every": 3}),
    (True, BOTH | {"direction_every": 3, "rule": "project"}),
    (False, BLENDING | {"safety_level": "auto", "rule": "floor"}),
    (True, BOTH | {"safety_level": "auto"}),
]
STEPS = 6


def probe_set(case: Problem, has_probe: bool, **options: Any) -> ProbeSet | None:
    settings: dict[str, Any] = {"rho": 1e-3, "size": 0.05} | options
    return ProbeSet(case.model, [1, 2], **settings) if has_probe else None


def step_of(
    case: Problem, passes: SafetyPasses, optimizer: torch.optim.Optimizer, seed: int
) -> None:
    """One step of any optimizer, on two micro-batches."""
    window = [random_batch(rows=2, seed=2 * seed + k) for k in (0, 1)]

    def both(_: None) -> Tensor:
        return torch.stack([task(case, each).detach() for each in window]).sum()

    optimizer.zero_grad()
    passes.inner_passes(both, lambda: safety(case))
    for each in window:
        with passes.task_pass() as record:
            record(task(case, each))
    passes.blend_()
    optimizer.step()
    passes.end_step()


def fused_step(case: Problem, optimizer: BlendedAdamW, seed: int) -> None:
    window = [random_batch(rows=2, seed=2 * seed + k) for k in (0, 1)]

    def both() -> Tensor:
        return torch.stack([task(case, each).detach() for each in window]).sum()

    optimizer.zero_grad()
    optimizer.step(both, lambda: safety(case))


@pytest.mark.parametrize(
    ("cpu_backend", "lora", "setting"),
    spread(
        [("native", "reference"), (True, False), SETTINGS],
        {(k % 2, 1 - k % 2, k) for k in range(len(SETTINGS))},
    ),
    indirect=["cpu_backend"],
    ids=str,
)
def test_adamw_beside_the_passes_has_the_bits_of_the_fused_update(
    lora: bool, setting: tuple[bool, dict[str, Any]]
) -> None:
    has_probe, options = setting
    ours, theirs = (problem(lora=lora, dropout=0.1, layers=3) for _ in range(2))
    update: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    probes = probe_set(ours, has_probe)
    if probes is None:
        fused = BlendedAdamW(ours.trained, **update, **({"safety_level": None} | options))
    else:
        fused = FusedSAP(ours.trained, probes, **update, **options)
    passes = SafetyPasses(theirs.trained, probe_set(theirs, has_probe), **options)
    adamw = plain_adamw(theirs.trained, **update)
    torch.manual_seed(4)
    for step in range(STEPS):
        fused_step(ours, fused, step)
    torch.manual_seed(4)
    for step in range(STEPS):
        step_of(theirs, passes, adamw, step)
    assert_same_bits(weights(ours), weights(theirs))
    assert passes.metrics == fused.metrics
    assert passes.steps == STEPS
    assert passes.direction.taken == (2 if options.get("direction_every") else STEPS)


@pytest.mark.parametrize("kind", ["sgd", "muon"])
@pytest.mark.parametrize(
    ("has_probe", "options"),
    [
        (False, BLENDING | {"direction_every": 3}),
        (True, PROBE),
        (True, BOTH | {"direction_every": 3}),
    ],
    ids=str,
)
def test_any_optimizer_goes_on_with_the_gradient_of_the_rule_under_the_probe(
    kind: str, has_probe: bool, options: dict[str, Any]
) -> None:
    case, twin = problem(), problem()
    passes = SafetyPasses(case.trained, probe_set(case, has_probe), **options)

    def build(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        if kind == "sgd":
            return torch.optim.SGD(params, lr=0.05, momentum=0.9)
        return torch.optim.Muon(params, lr=0.05)

    optimizer, other = build(case.trained), build(twin.trained)
    start = weights(case)
    direction: list[Tensor] = []
    for step in range(4):
        # By hand, from the weights of this step: d, the task gradient under V, and their sum.
        if step % options.get("direction_every", 1) == 0:
            direction = list(torch.autograd.grad(safety_loss(twin), twin.trained))
        optimizer.zero_grad()
        passes.inner_passes(*closures(case))
        handles = [
            twin.model.get_base_model()
            .model.layers[layer]
            .register_forward_hook(lambda m, a, output, v=v: output + v)
            for layer, v in (passes.probes.offsets.items() if passes.probes else ())
        ]
        g = torch.autograd.grad(naive_task_loss(twin.model, twin.batch), twin.trained)
        for handle in handles:
            handle.remove()
        assert len(handles) == (2 if has_probe else 0)
        gamma = options["safety_weight"]
        norm_g, norm_d = (torch.cat([x.flatten() for x in v]).norm() for v in (g, direction))
        expected = [x + gamma * norm_g / norm_d * d for x, d in zip(g, direction, strict=True)]

        with passes.task_pass():
            task(case)
        passes.blend_()
        for p, q, wanted in zip(case.trained, twin.trained, expected, strict=True):
            torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-6)
            q.grad = p.grad.clone()
        optimizer.step()
        passes.end_step()
        other.step()
        assert_same_bits(weights(case), weights(twin))
    assert all(
        not torch.equal(p, w) for p, w in zip(case.trained, trained_of(start, case), strict=True)
    )


def trained_of(copies: list[Tensor], case: Problem) -> list[Tensor]:
    return [w for w, p in zip(copies, case.model.parameters(), strict=True) if p.requires_grad]


def test_clipping_after_blending_is_that_of_the_fused_update() -> None:
    ours, theirs = problem(), problem()
    update: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}
    fused = BlendedAdamW(ours.trained, **update, safety_weight=0.3, max_grad_norm=0.1)
    passes = SafetyPasses(theirs.trained, safety_weight=0.3)
    adamw = plain_adamw(theirs.trained, **update)
    for _ in range(2):
        fused.zero_grad()
        step_by_passes(ours, fused)
        adamw.zero_grad()
        passes.inner_passes(*closures(theirs))
        with passes.task_pass():
            task(theirs)
        passes.blend_()
        assert torch.nn.utils.clip_grad_norm_(theirs.trained, 0.1) > 0.2  # or nothing is clipped
        adamw.step()
        passes.end_step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("has_probe", [True, False])
def test_a_scale_of_a_power_of_two_leaves_every_bit(has_probe: bool) -> None:
    runs = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)):
        case = problem()
        options = BOTH | {"grad_scaler": scaler, "direction_every": 2}
        passes = SafetyPasses(case.trained, probe_set(case, has_probe), **options)
        sgd = torch.optim.SGD(case.trained, lr=0.05)
        task_of, safety_of = closures(case, scaler)
        for _ in range(4):
            sgd.zero_grad()
            passes.inner_passes(task_of, safety_of)
            with passes.task_pass():
                task_of(None)
            if scaler is not None:
                scaler.unscale_(sgd)
            passes.blend_()
            if scaler is None:
                sgd.step()
            else:
                scaler.step(sgd)
                scaler.update()
            passes.end_step()
        runs.append(weights(case))
    assert_same_bits(*runs)


def test_ascent_goes_up_the_task_loss_and_down_the_safety_loss() -> None:
    ours, theirs = problem(), problem()
    up = SafetyPasses(ours.trained, probe_set(ours, True), **BOTH)
    down = SafetyPasses(theirs.trained, probe_set(theirs, True), **BOTH)
    up.maximize = True

    def negated(_: None) -> Tensor:
        loss = -naive_task_loss(ours.model, ours.batch)
        loss.backward()
        return loss

    for case, passes, task_of, ascends in (
        (ours, up, negated, True),
        (theirs, down, lambda _: task(theirs), False),
    ):
        sgd = torch.optim.SGD(case.trained, lr=0.05, maximize=ascends)
        passes.inner_passes(task_of, lambda case=case: safety(case))
        with passes.task_pass() as record:
            record(task_of(None))
        passes.blend_()
        sgd.step()
        passes.end_step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert up.metrics.lean == pytest.approx(down.metrics.lean, rel=1e-4)
    assert up.metrics.lean > 0


def test_a_step_that_is_not_ended_does_not_count() -> None:
    case = problem()
    passes = SafetyPasses(case.trained, **BLENDING, direction_every=5)
    for _ in range(2):
        passes.inner_passes(*closures(case))
        with passes.task_pass():
            task(case)
        passes.blend_()
        assert passes.stage is Stage.DONE
    assert (passes.steps, passes.direction.taken) == (0, 0)
    assert passes.direction.is_due(passes.steps)
    passes.end_step()
    assert (passes.steps, passes.direction.taken) == (1, 1)
    assert not passes.direction.is_due(passes.steps)


def test_gradients_of_bf16_parameters_are_blended_with_one_rounding() -> None:
    case = problem(lora=False, dtype=torch.bfloat16, layers=2)
    passes = SafetyPasses(case.trained, **BLENDING)
    passes.inner_passes(*closures(case))
    with passes.task_pass():
        task(case)
    g = [p.grad.clone() for p in case.trained]
    d = passes.direction.by_parameter()
    blending = passes.blending()
    assert blending is not None
    passes.blend_()
    for p, before in zip(case.trained, g, strict=True):
        wanted = before.float() + blending.coefficient * d[p].float()
        assert torch.equal(p.grad, wanted.bfloat16())


def test_sparse_gradients_are_refused() -> None:
    embedding, scale = nn.Embedding(5, 3, sparse=True), nn.Parameter(torch.ones(3))
    passes = SafetyPasses([embedding.weight, scale])

    def task_of(_: None) -> Tensor:
        loss = (embedding(torch.tensor([1, 2])) * scale).sum()
        loss.backward()
        return loss

    def safety_of() -> Tensor:
        loss = scale.square().sum()
        loss.backward()
        return loss

    passes.inner_passes(task_of, safety_of)
    with passes.task_pass():
        task_of(None)
    before = scale.grad.clone()
    with pytest.raises(RuntimeError, match=r"shape \(5, 3\).*sparse=False"):
        passes.blend_()
    assert torch.equal(scale.grad, before)
