"""Two ranks under FSDP2 do what one does on both their batches; checkpoints fit other numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet, losses
from sap_fast.losses import task_loss
from sap_fast.model.layers import find_decoder_layers
from sap_fast.ops import blockwise
from sap_fast.step.guards import Perturbation
from tests.ranks import RANKS, distance, on_ranks, sharded, share, whole, whole_batch
from tests.test_distributed import (
    ACCUMULATED,
    CHECKPOINTING,
    LORA,
    OPTIONS,
    assert_as_one_rank,
    build,
    closures,
    parameters_of,
    sap_step,
    some_with_full,
    task_of_halves,
    train,
)
from tests.tiny import problem


def run_fsdp(rank: int, lora: bool, options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    found = {}
    for name, settings in options.items():
        model = sharded(problem(lora=lora).model)
        parameters, offsets = train(model, rank, settings)
        assert all(isinstance(parameter, DTensor) for parameter in parameters)
        found[name] = whole(parameters), offsets
    assert not losses.forward._unchunkable, "the head is applied to chunks as ever"
    return found


#: Of what is left to a backend the native one has all but the reductions' order.
SHARDED_OPTIONS: dict[str, dict[str, Any]] = (
    OPTIONS
    | CHECKPOINTING
    | {
        "native": {"backend": "auto"},
        "clipped": {"max_grad_norm": 0.1},
        "clipped after the floor": {"max_grad_norm": 0.1, "safety_weight": 0.5, "rule": "floor"},
    }
)


@pytest.mark.parametrize(("lora", "options"), some_with_full(SHARDED_OPTIONS))
def test_two_ranks_of_fsdp2_equal_one_on_the_joined_batch(lora, options, tmp_path):
    first, second = on_ranks(tmp_path, run_fsdp, lora, options)
    assert_as_one_rank(first, second, lora, options)


def run_compiled(rank: int, lora: bool) -> dict[str, Any]:
    """Every layer compiled by itself and then sharded, as training stacks do."""
    model = problem(lora=lora).model
    for layer in find_decoder_layers(model)[0]:
        layer.compile(backend="eager")
    sharded(model)
    parameters, offsets = train(model, rank, {})
    return {"paper": (whole(parameters), offsets)}


@LORA
def test_layers_compiled_and_sharded_equal_one_rank_that_is_neither(lora, tmp_path):
    first, second = on_ranks(tmp_path, run_compiled, lora)
    assert_as_one_rank(first, second, lora, {"paper": {}})


def run_three(rank: int) -> dict[str, Any]:
    """Of 32 and 4 rows three ranks get 11, 11, 10 and 2, 2, 0."""
    model = sharded(problem(lora=True).model)
    optimizer = build(model)
    sizes = [p.to_local().numel() for p in parameters_of(optimizer)]
    for step in range(2):
        sap_step(optimizer, model, step, None)
    return {"parameters": whole(parameters_of(optimizer)), "sizes": sizes}


def test_uneven_and_empty_shards(tmp_path):
    found = on_ranks(tmp_path, run_three, ranks=3)
    assert min(found[2]["sizes"]) == 0 < min(found[0]["sizes"])
    model = problem(lora=True).model
    optimizer = build(model)
    for step in range(2):
        sap_step(optimizer, model, step, None)
    # All three see the same batch, and so does one rank.
    assert distance(found[0]["parameters"], parameters_of(optimizer)) <= 1e-6


def run_edges(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    # Replicas of shards (HSDP): here two of one.
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replica", "shard"))
    model = sharded(problem(lora=True).model, mesh=mesh)
    parameters, _ = train(model, rank, {})
    found["hsdp"] = whole(parameters)

    # The gradients of all but the last micro-batch stay where they are, as trainers want it.
    for name, options in ACCUMULATED.items():
        model = sharded(problem(lora=True).model)
        optimizer = build(model, **options)
        halves = [share(whole_batch(0, 0), half) for half in range(2)]
        _, safety, _ = closures(model, 0, None)
        task = task_of_halves(model)
        model.set_requires_gradient_sync(False)
        optimizer.inner_passes(task, safety, halves)
        for index, half in enumerate(halves):
            model.set_requires_gradient_sync(index == 1)
            with optimizer.task_pass():
                task([half])
        if isinstance(optimizer, FusedSAP):
            gradients = whole([p.grad for p in parameters_of(optimizer)])
            found["accumulated", name] = gradients
        optimizer.step()
        found["updated", name] = whole(parameters_of(optimizer))

    model = sharded(problem(lora=True).model)
    optimizer = build(model)
    model.set_requires_gradient_sync(False)
    task_loss(model, halves[0]).backward()
    with pytest.raises(
        RuntimeError, match=r"inner_passes\(\) after .*before the first micro-batch"
    ):
        optimizer.inner_passes(*closures(model, 0, None))

    # A forward without backward leaves the root's parameters gathered: they must not serve on.
    model = sharded(problem(lora=False).model)
    optimizer = build(model)
    trained = parameters_of(optimizer)
    batch = whole_batch(0, 0)
    with torch.no_grad():
        before = task_loss(model, batch)
        direction = [torch.ones_like(parameter) for parameter in trained]
        optimizer.passes.trained.forget_weights()
        with Perturbation(trained, direction, torch.tensor(0.05)) as perturbation:
            found["applied"] = perturbation.applied_norm(torch.float32)
            perturbed = task_loss(model, batch)
            optimizer.passes.trained.forget_weights()
        restored = task_loss(model, batch)
    found |= {"before": before, "perturbed": perturbed, "restored": restored}

    # Mixed precision: shards and moments stay fp32.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(problem(lora=False).model, mp_policy=policy)
    optimizer = build(model)
    for step in range(3):
        sap_step(optimizer, model, step, rank)
    assert optimizer.probes is not None
    assert optimizer.probes.compute_dtype is torch.bfloat16
    state = optimizer.state[parameters_of(optimizer)[0]]
    assert isinstance(state["exp_avg"], DTensor) and state["exp_avg"].dtype is torch.float32
    found["mixed"] = whole(parameters_of(optimizer))

    # Sharded after FusedSAP and ProbeSet, as Accelerate does, with its parameters put in place.
    for name, options in {"late": {}, "late, SGD": OPTIONS["blend_() for SGD"]}.items():
        model = problem(lora=True).model
        optimizer = build(model, **options)
        sharded(model)
        updating = optimizer if isinstance(optimizer, FusedSAP) else optimizer.optimizer
        updating.param_groups[0]["params"] = [p for p in model.parameters() if p.requires_grad]
        with pytest.raises(RuntimeError, match=r"runs_in\(model\)"):
            sap_step(optimizer, model, 0, rank)
        optimizer.passes.runs_in(model)
        for step in range(5):
            sap_step(optimizer, model, step, rank)
        found[name] = whole(parameters_of(optimizer))

    # The head's own group is gathered for its own forward only.
    model = problem(lora=True).model
    fully_shard(model.get_base_model().lm_head)
    sharded(model)
    with pytest.warns(UserWarning, match="its head is sharded by itself"), torch.no_grad():
        loss = task_loss(model, whole_batch(0, 0))
    found["own_head"] = loss
    return found


def test_edges_of_fsdp2(tmp_path):
    first, _ = on_ranks(tmp_path, run_edges)
    plain = problem(lora=True).model
    parameters, _ = train(plain, None, {})
    assert distance(first["hsdp"], parameters) <= 1e-6
    assert distance(first["late"], parameters) <= 1e-6
    parameters, _ = train(problem(lora=True).model, None, OPTIONS["blend_() for SGD"])
    assert distance(first["late, SGD"], parameters) <= 1e-6

    for name, options in ACCUMULATED.items():
        model = problem(lora=True).model
        optimizer = build(model, **options)
        sap_step(optimizer, model, 0, None, update=False)
        if isinstance(optimizer, FusedSAP):
            gradients = [p.grad for p in parameters_of(optimizer)]
            assert distance(first["accumulated", name], gradients) <= 1e-5, name
        optimizer.step()
        assert distance(first["updated", name], parameters_of(optimizer)) <= 1e-6, name

    model = problem(lora=False).model
    count = sum(parameter.numel() for parameter in model.parameters())
    torch.testing.assert_close(first["applied"], torch.tensor(0.05 * count**0.5))
    with torch.no_grad():
        torch.testing.assert_close(first["before"], task_loss(model, whole_batch(0, 0)))
        for parameter in model.parameters():
            parameter += 0.05
        torch.testing.assert_close(first["perturbed"], task_loss(model, whole_batch(0, 0)))
    assert torch.equal(first["restored"], first["before"])
    assert not torch.allclose(first["perturbed"], first["before"])

    model = problem(lora=False).model
    start = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = build(model)
    for step in range(3):
        sap_step(optimizer, model, step, None)
    moved = distance(parameters_of(optimizer), start)
    # bf16 has the gradients right to a few per cent; AdamW's first steps take little but signs.
    assert distance(first["mixed"], parameters_of(optimizer)) < 0.3 * moved
    torch.testing.assert_close(first["own_head"], task_loss(plain_lora(), whole_batch(0, 0)))


def plain_lora() -> nn.Module:
    return problem(lora=True).model


# ---- torch.distributed.checkpoint ----

#: Uses a kept direction, a level, a ρ and counters of earlier steps.
RESUMED: dict[str, Any] = {
    "direction_every": 5,
    "safety_weight": 0.5,
    "safety_level": "auto",
    "probe": {"rho": "auto"},
}
SAVED_AFTER, STEPS = 3, 6


def app_state(model: nn.Module, optimizer: FusedSAP) -> dict[str, Any]:
    return {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
        "sap": optimizer.sap_state,
    }


def resume(folder: str, model: nn.Module, *, ranks: bool, fresh: bool = True) -> list[Tensor]:
    if ranks:
        sharded(model)
    optimizer = build(model, **RESUMED)
    if not fresh:
        sap_step(optimizer, model, 7, None)
    state = app_state(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    passes = optimizer.passes
    assert (passes.steps, passes.direction.taken) == (SAVED_AFTER, 3)
    assert not passes.direction.is_due(SAVED_AFTER) and passes.calibration is not None
    for step in range(SAVED_AFTER, STEPS):
        sap_step(optimizer, model, step, None)
    return whole(parameters_of(optimizer))


def run_saved(rank: int, folder: str) -> list[Tensor]:
    model = sharded(problem(lora=True).model)
    optimizer = build(model, **RESUMED)
    for step in range(STEPS):
        if step == SAVED_AFTER:
            dcp.save(app_state(model, optimizer), checkpoint_id=folder)
        sap_step(optimizer, model, step, None)
    return whole(parameters_of(optimizer))


def run_resumed(rank: int, folder: str, fresh: bool) -> list[Tensor]:
    return resume(folder, problem(lora=True).model, ranks=True, fresh=fresh)


def run_in_int8(rank: int, folder: str, saves: bool) -> list[Tensor]:
    """A rank that keeps directions of small parameters in int8, too; some hold no row of them."""
    blockwise.SMALLEST = 64
    return run_saved(rank, folder) if saves else run_resumed(rank, folder, True)


@pytest.mark.slow
def test_a_direction_in_int8_is_sharded_and_saved_as_on_one_rank(tmp_path, monkeypatch):
    folder = str(tmp_path / "checkpoint")
    expected = on_ranks(tmp_path, run_in_int8, folder, True)[0]
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    assert saved["sap.direction.0"].properties.dtype == torch.int8
    assert saved["sap.direction.0.scales"].size == (*saved["sap.direction.0"].size[:-1], 1)
    assert distance(on_ranks(tmp_path, run_in_int8, folder, False, ranks=3)[2], expected) <= 1e-6
    monkeypatch.setattr(blockwise, "SMALLEST", 64)
    model = problem(lora=True).model
    assert distance(resume(folder, model, ranks=False), expected) <= 1e-6
    model = problem(lora=True).model
    optimizer = build(model, **RESUMED)
    for step in range(STEPS):
        sap_step(optimizer, model, step, None)
    assert optimizer.passes.direction.state_dict(parameters_of(optimizer))["scales"]
    assert distance(parameters_of(optimizer), expected) <= 1e-6


def test_a_checkpoint_of_two_ranks_goes_on_with_one_and_three(tmp_path):
    folder = str(tmp_path / "checkpoint")
    expected = on_ranks(tmp_path, run_saved, folder)[0]
    for fresh in (True, False):
        model = problem(lora=True).model
        assert distance(resume(folder, model, ranks=False, fresh=fresh), expected) <= 1e-6
    for found in on_ranks(tmp_path, run_resumed, folder, True, ranks=3):
        assert distance(found, expected) <= 1e-6


# ---- refusals ----


def run_refused(rank: int) -> dict[str, str]:
    found = {}
    model = problem().model
    fully_shard(model)
    with pytest.raises(ValueError, match="decoder layer") as error:
        ProbeSet(model, layers=[1])
    found["root"] = str(error.value)

    inner = problem(lora=False).model  # FSDP1 wants one requires_grad for all
    before = build(inner)
    flat = torch.distributed.fsdp.FullyShardedDataParallel(inner, device_id=torch.device("cpu"))
    for refused in (lambda: before.runs_in(flat), lambda: ProbeSet(flat, layers=[1])):
        with pytest.raises(ValueError, match=r"FSDP1.*use FSDP2"):
            refused()
    with pytest.raises(ValueError, match=r"FSDP1.*use FSDP2"):
        BlendedAdamW(flat.parameters())

    mesh = init_device_mesh("cpu", (1, RANKS))
    parallel = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0), Shard(1)]))
    with pytest.raises(ValueError, match="tensor parallelism is not supported"):
        BlendedAdamW([parallel])
    found["ranks"] = str(dist.get_world_size())
    return found


def test_what_is_not_supported_names_what_is(tmp_path: Path):
    found = on_ranks(tmp_path, run_refused)
    assert found[0]["ranks"] == str(RANKS)


def test_deepspeed_is_referred_to_its_passes():
    engine = type("DeepSpeedEngine", (nn.Module,), {"__module__": "deepspeed.runtime.engine"})()
    engine.module = problem().model
    with pytest.raises(ValueError, match=r"DeepSpeed.*ZeroPasses"):
        ProbeSet(engine, layers=[1])
    parameter = nn.Parameter(torch.zeros(3))
    parameter.ds_id = 0
    with pytest.raises(ValueError, match=r"DeepSpeed.*ZeroPasses"):
        BlendedAdamW([parameter])
