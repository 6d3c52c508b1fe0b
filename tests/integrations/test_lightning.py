"""Lightning's trainer by manual optimization: its steps, precision, checkpoints, processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet, contrastive_loss, joint_loss, task_loss
from tests.ranks import on_ranks, share, whole_batch
from tests.tiny import Batch, assert_same_bits, distance, weights
from tests.trainers import small

lightning = pytest.importorskip("pytorch_lightning", reason="it is of `make test-stacks`")

STEPS = 4
EVERY = {"sap": 3, "blend": 1}
# ε as large as the gradients, so that AdamW sees their size and rounding has no sign to turn.
SETTINGS: dict[str, Any] = {"lr": 5e-3, "eps": 1e-2, "weight_decay": 0.0}


def optimizer_of(tuned: nn.Module, method: str) -> BlendedAdamW:
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    if method == "blend":
        return BlendedAdamW(trained, **SETTINGS)
    probes = ProbeSet(tuned, [1], rho=1e-2, size=0.1)
    # A direction that is kept is state to be saved.
    return FusedSAP(trained, probes, **SETTINGS, direction_every=EVERY["sap"])


class SafeTuning(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """What a user writes; `rank` of the rows, and None for all of them."""

    def __init__(self, tuned: nn.Module, method: str, rank: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model, self.method, self.rank = tuned, method, rank
        self.hooks: list[int] = []

    def configure_optimizers(self) -> BlendedAdamW:
        optimizer = optimizer_of(self.model, self.method)
        optimizer.runs_in(self.trainer.strategy.model)
        return optimizer

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.hooks.append(self.global_step)

    def training_step(self, rows: Batch, index: int) -> None:
        one_step(self.model, self.optimizers(), rows, self.rank, self.method, self.manual_backward)


def one_step(
    tuned: nn.Module, optimizer: Any, rows: Batch, rank: int | None, method: str, backward: Any
) -> None:
    safety_loss = contrastive_loss if method == "sap" else joint_loss

    def task(part: Batch) -> Tensor:
        loss = task_loss(tuned, part)
        backward(loss)
        return loss.detach()

    def safety() -> Tensor:
        number = optimizer.passes.direction.taken
        loss = safety_loss(tuned, *(share(whole_batch(number, kind), rank) for kind in (1, 2)))
        backward(loss)
        return loss.detach()

    optimizer.zero_grad()
    optimizer.inner_passes(task, safety, rows)
    with optimizer.task_pass() as record:
        record(task(rows))
    optimizer.step()


class Batches:
    """The rows of a rank, batch by batch; a loader with a state, so that Lightning resumes it."""

    def __init__(self, rank: int | None = None) -> None:
        self.rank, self.next = rank, 0

    def __len__(self) -> int:  # without it Lightning fetches a batch more than it has saved
        return STEPS

    def __iter__(self) -> Iterator[Batch]:
        while self.next < STEPS:
            self.next += 1
            yield share(whole_batch(self.next, 0), self.rank)

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.next = state_dict["next"]


def trainer_of(**settings: Any) -> Any:
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": STEPS,
        "max_epochs": 1,
        "logger": False,
    }
    quiet = dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False)
    return lightning.Trainer(**(defaults | quiet | {"enable_checkpointing": False} | settings))


def by_hand(method: str, precision: str = "32-true") -> list[Tensor]:
    tuned = small(lora=True)
    optimizer = optimizer_of(tuned, method)
    for rows in Batches():
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            one_step(tuned, optimizer, rows, None, method, Tensor.backward)
    return weights(tuned)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", ["sap", "blend"])
def test_lightning_makes_the_steps_of_a_plain_loop(method: str, precision: str) -> None:
    module = SafeTuning(small(lora=True), method)
    trainer = trainer_of(precision=precision)
    trainer.fit(module, Batches())
    assert_same_bits(weights(module.model), by_hand(method, precision))
    # Its hooks see each update once, and none of the passes before.
    assert module.hooks == list(range(STEPS)) and trainer.global_step == STEPS
    passes = module.optimizers().passes
    assert passes.steps == STEPS and passes.direction.taken == -(-STEPS // EVERY[method])
    assert passes.metrics.task_loss > 0


@pytest.mark.parametrize("method", ["sap", "blend"])
def test_a_run_resumed_from_a_checkpoint_of_lightning_ends_with_the_same_bits(
    tmp_path: Path, method: str
) -> None:
    straight = SafeTuning(small(lora=True), method)
    saving = lightning.callbacks.ModelCheckpoint(
        tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2
    )
    trainer_of(enable_checkpointing=True, callbacks=[saving]).fit(straight, Batches())

    resumed = SafeTuning(small(lora=True), method)
    trainer = trainer_of()
    # Two of three steps with a direction: the checkpoint has it.
    trainer.fit(resumed, Batches(), ckpt_path=tmp_path / "step=2.ckpt")
    assert trainer.global_step == STEPS and resumed.hooks == [2, 3]
    assert_same_bits(weights(resumed.model), weights(straight.model))

    other = SafeTuning(small(lora=True), method)
    trainer_of(max_steps=2).fit(other, Batches())
    assert distance(weights(other.model), weights(straight.model)) > 1e-3


def train(rank: int, method: str) -> list[Tensor]:
    """Train on the rows of a rank; on all if there is no process group."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    own = rank if ranks > 1 else None
    module = SafeTuning(small(lora=True), method, own)
    several: dict[str, Any] = (
        {"devices": ranks, "strategy": "ddp", "use_distributed_sampler": False} if ranks > 1 else {}
    )
    trainer = trainer_of(**several)
    trainer.fit(module, Batches(own))
    assert trainer.world_size == ranks
    return weights(module.model)


@pytest.mark.parametrize("method", ["sap", "blend"])
def test_two_ranks_of_lightnings_ddp_equal_one(tmp_path: Path, method: str) -> None:
    first, second = on_ranks(tmp_path, train, method)
    assert_same_bits(first, second)
    alone = train(0, method)
    assert distance(first, alone) <= 1e-6
    assert distance(alone, weights(small(lora=True))) > 1e-3


def test_automatic_optimization_is_an_error_that_names_the_other_closure() -> None:
    class Automatic(SafeTuning):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            self.automatic_optimization = True

        def training_step(self, rows: Batch, index: int) -> Tensor:
            return task_loss(self.model, rows)

    with pytest.raises(TypeError, match="needs a safety closure too"):
        trainer_of().fit(Automatic(small(lora=True), "blend"), Batches())
