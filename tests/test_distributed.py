"""Two ranks under `DistributedDataParallel` do what one does on both their batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from sap_fast import (
    BlendedAdamW,
    FusedSAP,
    ProbeSet,
    SafetyPasses,
    SAPTrainer,
    contrastive_loss,
    task_loss,
)
from sap_fast.data import SafetyCollator, TaskCollator
from sap_fast.step.metrics import LossRecord
from tests.ranks import EPSILON, distance, on_ranks, share, whole_batch
from tests.tiny import Batch, encoded, problem

STEPS = 5

SETTINGS: dict[str, Any] = {"lr": 1e-3, "eps": EPSILON, "backend": "reference"}
PROBE: dict[str, Any] = {"layers": [1, 2], "rho": 1e-2, "size": 0.02}

#: Arguments of the optimizer; of its probe set, under "probe"; and the optimizer that makes the
#: update in the place of `FusedSAP`, under "optimizer".
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "forward": {"probe": {"difference": "forward"}},
    "rows": {"probe": {"rows": 0.5}},
    "own rows": {"probe": {"rows": 0.5, "own_rows": True}},
    "lean": {"probe": {"rule": "lean", "size": 0.002}},
    "kept": {"direction_every": 3},
    "kept and rows": {"direction_every": 2, "probe": {"rows": 0.25}},
    "blended": {"safety_weight": 0.5},
    "held": {"safety_weight": 0.5, "safety_level": "auto"},
    "project": {"safety_weight": 1.0, "rule": "project"},
    "floor": {"safety_weight": 0.5, "rule": "floor"},
    "without a probe": {"optimizer": BlendedAdamW, "safety_weight": 0.5},
    "held without a probe": {
        "optimizer": BlendedAdamW,
        "safety_level": "auto",
        "direction_every": 2,
    },
    "blend_() for SGD": {"optimizer": torch.optim.SGD, "safety_weight": 0.5},
    "blend_() for SGD, project": {"optimizer": torch.optim.SGD, "rule": "project"},
    "blend_() for AdamW": {"optimizer": torch.optim.AdamW, "rule": "floor"},
}
#: What a rule has to differ from, to have done anything.
WITHOUT_RULE = {
    "blended": "paper",
    "project": "paper",
    "floor": "paper",
    "blend_() for SGD, project": "blend_() for SGD",
}


class WithOther:
    """Another optimizer, and the passes that serve it."""

    def __init__(
        self,
        kind: type[torch.optim.Optimizer],
        trained: list[nn.Parameter],
        probes: ProbeSet,
        **settings: Any,
    ) -> None:
        more = {"momentum": 0.9} if kind is torch.optim.SGD else {"eps": EPSILON}
        lr = 0.1 if kind is torch.optim.SGD else SETTINGS["lr"]
        self.optimizer = kind(trained, lr=lr, **more)
        self.passes = SafetyPasses(self.optimizer.param_groups, probes, **settings)
        self.probes = probes

    def inner_passes(self, *arguments: Any) -> None:
        self.passes.inner_passes(*arguments)

    def task_pass(self) -> AbstractContextManager[LossRecord]:
        return self.passes.task_pass()

    def step(self) -> None:
        self.passes.blend_()
        self.optimizer.step()
        self.passes.end_step()

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()


Optimizer = BlendedAdamW | WithOther


def build(model: nn.Module, **options: Any) -> Optimizer:
    """The optimizer that `OPTIONS` describes, for the parameters of a model, wrapped or not."""
    settings = SETTINGS | options
    kind, probe = settings.pop("optimizer", FusedSAP), settings.pop("probe", {})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind is BlendedAdamW:
        optimizer = BlendedAdamW(trained, **settings)
        optimizer.runs_in(model)
        return optimizer
    probes = ProbeSet(model, **(PROBE | probe))
    if kind is FusedSAP:
        return FusedSAP(trained, probes, **settings)
    del settings["lr"], settings["eps"]
    return WithOther(kind, trained, probes, **settings)


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return optimizer.passes.trained.trainable


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def closures(
    model: nn.Module, step: int, rank: int | None
) -> tuple[Callable[[Batch], Tensor], Callable[[], Tensor], Batch]:
    """What a step is given: a function for its task, one for its safety pairs, its batch."""
    batch, chosen, rejected = (share(whole_batch(step, kind), rank) for kind in range(3))
    return (
        lambda part: backward(task_loss(model, part)),
        lambda: backward(contrastive_loss(model, chosen, rejected)),
        batch,
    )


def sap_step(
    optimizer: Optimizer, model: nn.Module, step: int, rank: int | None, *, update: bool = True
) -> None:
    task, safety, batch = closures(model, step, rank)
    optimizer.inner_passes(task, safety, batch)
    with optimizer.task_pass():
        task(batch)
    if update:
        optimizer.step()
        optimizer.zero_grad()


def train(model: nn.Module, rank: int | None, options: dict[str, Any]) -> Any:
    """Five steps; the parameters and V."""
    optimizer = build(model, **options)
    for step in range(STEPS):
        sap_step(optimizer, model, step, rank)
    offsets = {} if optimizer.probes is None else optimizer.probes.offsets
    return [p.detach().clone() for p in parameters_of(optimizer)], offsets


def run_ddp(
    rank: int, lora: bool, options: dict[str, dict[str, Any]], settings: Sequence[str] = ()
) -> dict[str, Any]:
    """What `train` returns by the name of its options, in `DistributedDataParallel` of settings."""
    found = {}
    for name in options:
        inner = problem(lora=lora).model
        model = DistributedDataParallel(inner, **dict.fromkeys(settings, True))
        found[name] = train(model, rank, options[name])
    return found


def assert_as_one_rank(
    first: dict[str, Any], second: dict[str, Any], lora: bool, options: dict[str, dict[str, Any]]
) -> None:
    """Both ranks found the same bits, and what one finds on both batches, to rounding."""
    start = [p for p in problem(lora=lora).model.parameters() if p.requires_grad]
    alone = {}
    for name, settings in options.items():
        alone[name], offsets = train(problem(lora=lora).model, None, settings)
        for ours, others in zip(first[name][0], second[name][0], strict=True):
            assert torch.equal(ours, others), name
        assert distance(first[name][0], alone[name]) <= 1e-6, name
        assert first[name][1].keys() == offsets.keys(), name
        if offsets:
            assert distance(list(first[name][1].values()), list(offsets.values())) <= 1e-3, name
        assert distance(alone[name], start) > 1e-4, name
    for name, other in WITHOUT_RULE.items():
        if name in alone:
            assert distance(alone[name], alone[other]) > 1e-5, name


def some_with_full(options: dict[str, dict[str, Any]]) -> list[Any]:
    """All options with LoRA, some of each kind with full parameters; all with those is slow."""
    some = (
        "paper",
        "forward",
        "rows",
        "lean",
        "kept",
        "held",
        "project",
        "blend_() for SGD",
        "native",
    )
    return [
        pytest.param(True, options, id="lora"),
        pytest.param(False, {k: v for k, v in options.items() if k in some}, id="full"),
        pytest.param(False, options, id="full-all", marks=pytest.mark.slow),
    ]


#: With LoRA; with full parameters in `make test-slow`.
LORA = pytest.mark.parametrize(
    "lora", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["lora", "full"]
)

CHECKPOINTING = {"checkpointing": {"probe": {"checkpointing": "layers"}}}
#: With LoRA alone.
PAIRED = {"paired": {"probe": {"passes": "paired"}}}


@pytest.mark.parametrize(("lora", "options"), some_with_full(OPTIONS | CHECKPOINTING))
def test_two_ranks_of_ddp_equal_one_on_the_joined_batch(lora, options, tmp_path):
    options = options | PAIRED if lora else options
    first, second = on_ranks(tmp_path, run_ddp, lora, options)
    assert_as_one_rank(first, second, lora, options)


@pytest.mark.parametrize("setting", ["gradient_as_bucket_view", "find_unused_parameters"])
@LORA
def test_how_ddp_keeps_gradients_makes_no_difference(lora, setting, tmp_path):
    # A step of every pass, one that leaves passes out, and one that keeps d.
    options = {name: OPTIONS[name] for name in ("paper", "held", "kept")}
    first, second = on_ranks(tmp_path, run_ddp, lora, options, (setting,))
    assert_as_one_rank(first, second, lora, options)


def run_compiled(rank: int, lora: bool) -> dict[str, Any]:
    model = DistributedDataParallel(problem(lora=lora).model)
    return {"paper": train(torch.compile(model, backend="eager"), rank, {})}


@LORA
def test_a_compiled_model_in_ddp_equals_one_rank_that_is_neither(lora, tmp_path):
    first, second = on_ranks(tmp_path, run_compiled, lora)
    assert_as_one_rank(first, second, lora, {"paper": {}})


#: What an accumulated step is checked with.
ACCUMULATED: dict[str, dict[str, Any]] = {
    "paper": {},
    "project": {"safety_weight": 1.0, "rule": "project"},
    "floor": {"safety_weight": 0.5, "rule": "floor", "max_grad_norm": 0.1},
    "blend_() for SGD": {"optimizer": torch.optim.SGD, "safety_weight": 0.5},
}


def task_of_halves(model: nn.Module) -> Callable[[list[Batch]], Tensor]:
    """The task of a step of two micro-batches."""
    return lambda part: torch.stack([backward(task_loss(model, one) / 2) for one in part]).sum()


def run_accumulated(rank: int) -> dict[str, Any]:
    """Under `no_sync`, as trainers call all but the last micro-batch of an accumulated step."""
    found = {}
    for name, options in ACCUMULATED.items():
        model = DistributedDataParallel(problem().model)
        optimizer = build(model, **options)
        _, safety, batch = closures(model, 0, rank)
        halves = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
        task = task_of_halves(model)
        with model.no_sync():
            optimizer.inner_passes(task, safety, halves)
            with optimizer.task_pass():
                task(halves[:1])
        with optimizer.task_pass():
            task(halves[1:])
        assert model.require_backward_grad_sync
        optimizer.step()
        assert optimizer.probes is not None
        found[name] = (
            [p.detach().clone() for p in parameters_of(optimizer)],
            optimizer.probes.estimates,
        )
    return found


def test_an_accumulated_step_of_ddp_equals_a_step_on_the_joined_batch(tmp_path):
    first, second = on_ranks(tmp_path, run_accumulated)
    for name, options in ACCUMULATED.items():
        ours, estimates = first[name]
        assert all(torch.equal(a, b) for a, b in zip(ours, second[name][0], strict=True)), name
        model = problem().model
        optimizer = build(model, **options)
        sap_step(optimizer, model, 0, None)
        assert distance(ours, parameters_of(optimizer)) <= 1e-6, name
        assert optimizer.probes is not None
        expected = list(optimizer.probes.estimates.values())
        assert distance(list(estimates.values()), expected) <= 1e-3, name


def run_calibrated(rank: int | None) -> tuple[float, list[float]]:
    """ρ, and what it was found by."""
    model = problem().model
    optimizer = build(model if rank is None else DistributedDataParallel(model))
    found = optimizer.passes.calibrate(*closures(optimizer.passes.trained.ranks.model, 0, rank))
    assert found is not None
    return found.rho, list(found.agreements.values())


def test_ranks_calibrate_to_what_one_does(tmp_path):
    first, second = on_ranks(tmp_path, run_calibrated)
    assert first == second
    rho, agreements = run_calibrated(None)
    assert first[0] == rho
    # Further up the grid ΔW is small, and rounding is much of its h.
    assert first[1][:6] == pytest.approx(agreements[:6], abs=1e-5)


def run_counted(rank: int) -> list[int]:
    """How often gradients were reduced in the safety pass, the probe passes and the task pass."""
    # With this the wrapper reduces also what has no gradient.
    model = DistributedDataParallel(problem().model, find_unused_parameters=True)
    reductions = []

    def reduce(state, bucket):  # DDP reads annotations, and does not know strings
        reductions.append(bucket.index())
        return default_hooks.allreduce_hook(state, bucket)

    model.register_comm_hook(None, reduce)
    optimizer = build(model)
    task, safety, batch = closures(model, 0, rank)
    counts = []
    optimizer.passes.safety_pass(safety)
    counts.append(len(reductions))
    optimizer.passes.probe_passes(task, batch)
    counts.append(len(reductions))
    with optimizer.task_pass():
        task(batch)
    return [*counts, len(reductions)]


def test_probe_passes_reduce_no_gradients(tmp_path):
    for after_safety, after_probe, after_task in on_ranks(tmp_path, run_counted):
        assert 0 < after_safety == after_probe < after_task


def run_unknown(rank: int) -> list[str]:
    """The messages of a model that is wrapped behind the optimizer's back, and of static graphs."""
    inner = problem().model
    optimizer = build(inner)
    held = build(inner, optimizer=BlendedAdamW, safety_level="auto")
    model = DistributedDataParallel(inner)
    messages = []
    for step in (
        lambda: optimizer.inner_passes(*closures(model, 0, rank)),
        lambda: held.inner_passes(*closures(model, 0, rank)),
        lambda: ProbeSet(DistributedDataParallel(problem().model, static_graph=True)),
    ):
        with pytest.raises((RuntimeError, ValueError)) as error:
            step()
        messages.append(str(error.value))
    for known in (optimizer, held):
        known.passes.runs_in(model)
        sap_step(known, model, 0, rank)
    return messages


def test_a_wrapper_that_is_not_known_is_an_error(tmp_path):
    for unknown, level, static in on_ranks(tmp_path, run_unknown):
        assert "ProbeSet does not know" in unknown and "runs_in" in unknown
        assert "safety_level='auto'" in level and "runs_in" in level
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
        probe={"rho": 1e-2, "size": 0.02},
        sap_options={"backend": "reference", "safety_weight": 0.3},
    )
    trainer.train()
    assert (trainer.accelerator.num_processes, trainer.state.global_step) == (ranks, 3)
    return [p.detach().clone() for p in case.trained]


@pytest.mark.parametrize(
    ("lora", "accumulate"),
    [
        pytest.param(True, 2, id="lora-2"),
        pytest.param(False, 1, id="full-1"),
        pytest.param(True, 1, id="lora-1", marks=pytest.mark.slow),
        pytest.param(False, 2, id="full-2", marks=pytest.mark.slow),
    ],
)
def test_two_ranks_of_the_trainer_equal_one(lora, accumulate, tmp_path):
    first, second = on_ranks(tmp_path, run_trainer, str(tmp_path), lora, accumulate)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    alone = run_trainer(0, str(tmp_path), lora, accumulate)
    assert distance(first, alone) <= 1e-6
    assert distance(first, [p for p in problem(lora=lora).model.parameters() if p.requires_grad])
