"""Two ranks under `DistributedDataParallel` do what one does on both their batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from sap_fast.data import SafetyCollator, TaskCollator
from sap_fast.integrations.trainer import SAPTrainer
from sap_fast.losses import contrastive_loss, task_loss
from sap_fast.optimizer import FusedSAP
from sap_fast.probes import ProbeSet
from tests.ranks import EPSILON, RANKS, on_ranks
from tests.test_trainer import encoded
from tests.tiny import Batch, problem, random_batch

STEPS = 5
ROWS = 4  # of each rank

SETTINGS: dict[str, Any] = {
    "lr": 1e-3,
    "eps": EPSILON,
    "rho": 1e-2,
    "probe_lr": 0.02,
    "backend": "reference",
}

# Per-token means are averaged over ranks, so every row has as many scored tokens.
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "forward": {"difference": "forward"},
    "lagged": {"schedule": "lagged"},
    "balanced": {"preset": "balanced", "probe_fraction": 1.0},
    "economical": {"preset": "economical", "probe_fraction": 1.0},
    "blended": {"safety_weight": 0.5},
    "held": {"safety_weight": 0.5, "safety_level": "auto"},
}


def whole_batch(step: int, kind: int) -> Batch:
    """The rows of both ranks."""
    batch = random_batch(rows=RANKS * ROWS, seed=100 * step + kind)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["input_ids"] = batch["input_ids"].clamp(min=1)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :4] = -100
    return batch


def share(batch: Batch, rank: int | None) -> Batch:
    rows = slice(None) if rank is None else slice(ROWS * rank, ROWS * (rank + 1))
    return {name: value[rows] for name, value in batch.items()}


def sap_step(
    optimizer: FusedSAP, model: nn.Module, step: int, rank: int | None, *, update: bool = True
) -> None:
    batch, chosen, rejected = (share(whole_batch(step, kind), rank) for kind in range(3))
    if optimizer.needs_direction:
        with optimizer.safety_pass() as record:
            loss = contrastive_loss(model, chosen, rejected)
            loss.backward()
            record(loss)
    if optimizer.needs_probe:
        for _ in optimizer.probe_passes():
            task_loss(model, batch).backward()
    with optimizer.task_pass():
        task_loss(model, batch).backward()
    if update:
        optimizer.step()
        optimizer.zero_grad()


def train(model: nn.Module, inner: nn.Module, rank: int | None, options: dict[str, Any]) -> Any:
    """Five steps; the parameters and V."""
    trained = [p for p in inner.parameters() if p.requires_grad]
    optimizer = FusedSAP(trained, ProbeSet(model, layers=[1, 2]), **(SETTINGS | options))
    for step in range(STEPS):
        sap_step(optimizer, model, step, rank)
    assert optimizer.probes is not None
    return [p.detach().clone() for p in trained], optimizer.probes.offsets


def run_ddp(
    rank: int, lora: bool, options: dict[str, dict[str, Any]], setting: str
) -> dict[str, Any]:
    found = {}
    for name in options:
        inner = problem(lora=lora).model
        model = DistributedDataParallel(inner, **({setting: True} if setting else {}))
        found[name] = train(model, inner, rank, options[name])
    return found


def distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """‖a − b‖/‖b‖ over all tensors."""
    pairs = list(zip(actual, expected, strict=True))
    square = sum(((a - b).detach().double() ** 2).sum() for a, b in pairs)
    return float((square / sum((b.detach().double() ** 2).sum() for _, b in pairs)).sqrt())


def assert_as_one_rank(
    first: dict[str, Any], second: dict[str, Any], lora: bool, options: dict[str, dict[str, Any]]
) -> None:
    """Both ranks found the same bits, and what one finds on both batches, to rounding."""
    for name, settings in options.items():
        model = problem(lora=lora).model
        parameters, offsets = train(model, model, None, settings)
        for ours, others in zip(first[name][0], second[name][0], strict=True):
            assert torch.equal(ours, others), name
        assert distance(first[name][0], parameters) <= 1e-6, name
        assert distance(list(first[name][1].values()), list(offsets.values())) <= 1e-3, name
        start = [p for p in problem(lora=lora).model.parameters() if p.requires_grad]
        assert distance(parameters, start) > 1e-4, name


@pytest.mark.parametrize("setting", ["", "gradient_as_bucket_view", "find_unused_parameters"])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_two_ranks_of_ddp_equal_one_on_the_joined_batch(lora, setting, tmp_path):
    options = OPTIONS | {"checkpointing": {"checkpointing": "layers"}}
    if setting:  # how DDP keeps gradients: a step of every pass, and one that leaves passes out
        options = {name: options[name] for name in ("paper", "held")}
    first, second = on_ranks(tmp_path, run_ddp, lora, options, setting)
    assert_as_one_rank(first, second, lora, options)


def run_compiled(rank: int, lora: bool) -> dict[str, Any]:
    inner = problem(lora=lora).model
    model = torch.compile(DistributedDataParallel(inner), backend="eager")
    return {"paper": train(model, inner, rank, {})}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_compiled_model_in_ddp_equals_one_rank_that_is_neither(lora, tmp_path):
    first, second = on_ranks(tmp_path, run_compiled, lora)
    assert_as_one_rank(first, second, lora, {"paper": {}})


def run_accumulated(rank: int) -> Any:
    """Under `no_sync`, as trainers call all but the last micro-batch of an accumulated step."""
    inner = problem().model
    model = DistributedDataParallel(inner)
    trained = [p for p in inner.parameters() if p.requires_grad]
    optimizer = FusedSAP(trained, ProbeSet(model), lr=1e-3, rho=1e-2, backend="reference")
    batch, chosen, rejected = (share(whole_batch(0, kind), rank) for kind in range(3))
    halves = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    with model.no_sync():
        with optimizer.safety_pass():
            contrastive_loss(model, chosen, rejected).backward()
        for _ in optimizer.probe_passes():
            for half in halves:
                (task_loss(model, half) / 2).backward()
        with optimizer.task_pass():
            (task_loss(model, halves[0]) / 2).backward()
    with optimizer.task_pass():
        (task_loss(model, halves[1]) / 2).backward()
    assert model.require_backward_grad_sync
    optimizer.step()
    assert optimizer.probes is not None
    return [p.detach().clone() for p in trained], optimizer.probes.estimates


def test_an_accumulated_step_of_ddp_equals_a_step_on_the_joined_batch(tmp_path):
    first, second = on_ranks(tmp_path, run_accumulated)
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    model = problem().model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = FusedSAP(trained, ProbeSet(model), lr=1e-3, rho=1e-2, backend="reference")
    batch, chosen, rejected = (whole_batch(0, kind) for kind in range(3))

    def backward(loss: Tensor) -> Tensor:
        loss.backward()
        return loss

    optimizer.step(
        lambda: backward(task_loss(model, batch)),
        lambda: backward(contrastive_loss(model, chosen, rejected)),
    )
    assert optimizer.probes is not None
    assert distance(first[0], trained) <= 1e-6
    expected = list(optimizer.probes.estimates.values())
    assert distance(list(first[1].values()), expected) <= 1e-3


def run_counted(rank: int) -> list[int]:
    """How often gradients were reduced in the safety pass, the probe passes and the task pass."""
    inner = problem().model
    # With this the wrapper reduces also what has no gradient.
    model = DistributedDataParallel(inner, find_unused_parameters=True)
    reductions = []

    def reduce(state, bucket):  # DDP reads annotations, and does not know strings
        reductions.append(bucket.index())
        return default_hooks.allreduce_hook(state, bucket)

    model.register_comm_hook(None, reduce)
    trained = [p for p in inner.parameters() if p.requires_grad]
    optimizer = FusedSAP(trained, ProbeSet(model), rho=1e-2, backend="reference")
    batch, chosen, rejected = (share(whole_batch(0, kind), rank) for kind in range(3))
    counts = []
    with optimizer.safety_pass():
        contrastive_loss(model, chosen, rejected).backward()
    counts.append(len(reductions))
    for _ in optimizer.probe_passes():
        task_loss(model, batch).backward()
    counts.append(len(reductions))
    with optimizer.task_pass():
        task_loss(model, batch).backward()
    return [*counts, len(reductions)]


def test_probe_passes_reduce_no_gradients(tmp_path):
    for after_safety, after_probe, after_task in on_ranks(tmp_path, run_counted):
        assert 0 < after_safety == after_probe < after_task


def run_unknown(rank: int) -> list[str]:
    """The messages of a model that is wrapped behind the optimizer's back, and of static graphs."""
    inner = problem().model
    trained = [p for p in inner.parameters() if p.requires_grad]
    optimizer = FusedSAP(trained, ProbeSet(inner), rho=1e-2, backend="reference")
    model = DistributedDataParallel(inner)
    batch, chosen, rejected = (share(whole_batch(0, kind), rank) for kind in range(3))
    messages = []
    with optimizer.safety_pass():
        contrastive_loss(model, chosen, rejected).backward()
    try:
        for _ in optimizer.probe_passes():
            task_loss(model, batch).backward()
    except RuntimeError as error:
        messages.append(str(error))
    try:
        ProbeSet(DistributedDataParallel(problem().model, static_graph=True))
    except ValueError as error:
        messages.append(str(error))
    optimizer.runs_in(model)
    with optimizer.safety_pass():
        contrastive_loss(model, chosen, rejected).backward()
    for _ in optimizer.probe_passes():
        task_loss(model, batch).backward()
    return messages


def test_a_wrapper_that_is_not_known_is_an_error(tmp_path):
    for unknown, static in on_ranks(tmp_path, run_unknown):
        assert "does not know" in unknown and "runs_in" in unknown
        assert "static_graph=True" in static


def run_trainer(rank: int, folder: str, lora: bool, accumulate: int) -> list[Tensor]:
    """Train with `SAPTrainer`, which wraps the model itself; alone if there is no process group."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    case = problem(lora=lora)
    trainer = SAPTrainer(
        model=case.model,
        args=TrainingArguments(
            output_dir=f"{folder}/trainer-{rank}",
            max_steps=3,
            per_device_train_batch_size=4 // ranks,
            gradient_accumulation_steps=accumulate,
            learning_rate=1e-3,
            adam_epsilon=EPSILON,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=True,
            seed=5,
        ),
        train_dataset=[encoded(seed) for seed in range(24)],
        data_collator=TaskCollator(0),
        safety_dataset=[
            {"chosen": encoded(100 + seed), "rejected": encoded(200 + seed)} for seed in range(16)
        ],
        safety_collator=SafetyCollator(0),
        safety_batch_size=4 // ranks,
        sap_options={"rho": 1e-2, "probe_lr": 0.02, "backend": "reference", "safety_weight": 0.3},
    )
    trainer.train()
    assert (trainer.accelerator.num_processes, trainer.state.global_step) == (ranks, 3)
    return [p.detach().clone() for p in case.trained]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_two_ranks_of_the_trainer_equal_one(lora, accumulate, tmp_path):
    first, second = on_ranks(tmp_path, run_trainer, str(tmp_path), lora, accumulate)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = run_trainer(0, str(tmp_path), lora, accumulate)
    assert distance(first, alone) <= 1e-6
    assert distance(first, [p for p in problem(lora=lora).model.parameters() if p.requires_grad])
