"""A run that is killed, at any moment, and resumed ends with the bits of the run that was not."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from sap_fast import SAPTrainer
from sap_fast.integrations.checkpoints import last_complete_checkpoint
from tests.ranks import on_ranks
from tests.tiny import assert_same_bits, weights
from tests.trainers import arguments, model, sap_trainer, trainer_of

STEPS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "calibrated": {"probe": {"size": 0.05, "rho": "auto"}},
    "kept": {
        "probe": {"size": 0.05, "rho": 1e-2, "rows": 0.25},
        "sap_options": {"direction_every": 4},
    },
    # The level is known from the fourth step on, and holds some of those after it.
    "level": {
        "probe": {"size": 0.05, "rho": 1e-2},
        "sap_options": {"safety_level": "auto", "safety_weight": 0.1},
    },
}


def die() -> None:
    signal.raise_signal(signal.SIGKILL)


def run(name: str, folder: str, kill_at: int, kill_in: str) -> None:
    """Train in `folder`, from its newest complete checkpoint on.

    Args:
        name: one of `OPTIONS`.
        folder: of the run.
        kill_at: the forward pass, counted over all passes of all steps, after which to die; or 0.
        kill_in: the part of a checkpoint in whose writing to die, or "".
    """
    forwards = 0
    began = None

    class Dying(SAPTrainer):
        def forward_ran(self, loss: Tensor) -> Tensor:
            nonlocal forwards, began
            began = self.state.global_step if began is None else began
            forwards += 1
            if forwards == kill_at:
                die()
            return loss

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return self.forward_ran(super().compute_loss(*args, **kwargs))

        def compute_safety_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            return self.forward_ran(super().compute_safety_loss(*args, **kwargs))

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if kill_in == "optimizer":
                die()
            super()._save_optimizer_and_scheduler(output_dir)

        def _save_rng_state(self, output_dir: str) -> None:
            super()._save_rng_state(output_dir)
            if kill_in == "state":  # in the middle of the file that is written last
                Path(output_dir, TRAINER_STATE_NAME).write_text('{"best_global_step": nu')
                die()

    args = {"max_steps": STEPS, "save_steps": 1, "save_strategy": "steps", "logging_steps": 1}
    args |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    tuned = model()
    trainer = trainer_of(Dying, tuned, arguments(Path(folder), **args), **OPTIONS[name])
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) is not None)
    optimizer = trainer.sap_optimizer
    end = {
        "weights": weights(tuned),
        "state": optimizer.state_dict(),
        "offsets": optimizer.probes.offsets,
        "random": torch.get_rng_state(),
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }
    torch.save((end, forwards, began), Path(folder) / "end.pt")


def train(name: str, folder: Path, kill_at: int = 0, kill_in: str = "") -> int | None:
    """Run in a process of its own; how it ended."""
    # Its server imports what every process needs, once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=run, args=(name, str(folder), kill_at, kill_in))
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize(
    ("name", "kill_in", "seed"),
    [("calibrated", "state", 1), ("level", "optimizer", 2), ("kept", "state", 3)],
)
def test_a_killed_run_ends_with_the_bits_of_one_that_was_not(
    tmp_path: Path, name: str, kill_in: str, seed: int
) -> None:
    """Killed in a random forward pass, then in writing the next checkpoint, then let run."""
    assert train(name, tmp_path / "straight") == 0
    expected, forwards, began = torch.load(tmp_path / "straight" / "end.pt")
    assert began == 0

    killed = tmp_path / "killed"
    # In the later steps: calibration, in the first, takes half of all forward passes.
    kill_at = forwards - random.Random(seed).randrange(forwards // 3)
    assert train(name, killed, kill_at) == -signal.SIGKILL
    written = len(list(killed.glob("checkpoint-*")))
    assert 0 < written < STEPS
    assert train(name, killed, 0, kill_in) == -signal.SIGKILL
    assert len(list(killed.glob("checkpoint-*"))) == written + 1

    assert train(name, killed) == 0
    found, _, began = torch.load(killed / "end.pt")
    assert began == written  # from the checkpoint before the one that is incomplete
    assert_same_bits(found, expected)
    state = expected["state"]["sap"]
    assert state["steps"] == STEPS
    if name == "kept":
        assert state["direction"]["taken"] == 2 and state["direction"]["tensors"]
    elif name == "level":
        assert state["level"]["losses"][1] == 3
    else:
        assert state["calibration"]["step"] == 0 and expected["offsets"]


def test_no_complete_checkpoint_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    assert last_complete_checkpoint(tmp_path / "absent") is None
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-best", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-2" / TRAINER_STATE_NAME).write_text("{}")
    with pytest.warns(UserWarning, match="checkpoint-10 is incomplete"):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / TRAINER_STATE_NAME).write_text("{")
    trainer = trainer_of(SAPTrainer, model(), arguments(tmp_path))
    with (
        pytest.warns(UserWarning, match="is incomplete"),
        pytest.raises(ValueError, match="no complete checkpoint; give resume_from_checkpoint=None"),
    ):
        trainer.train(resume_from_checkpoint=True)


def train_while_one_rank_is_late(rank: int, folder: str) -> list[bool]:
    """Trains for a step; what of a checkpoint is there when its state says that it is complete."""
    save, write = Trainer._save_rng_state, TrainerState.save_to_json
    there: list[bool] = []

    def late(self: Trainer, output_dir: str) -> None:
        time.sleep(2.0 * rank)
        save(self, output_dir)

    def looking(self: TrainerState, path: str) -> None:
        there.append(Path(path).with_name("rng_state_1.pth").exists())
        write(self, path)

    Trainer._save_rng_state = late  # type: ignore[method-assign]
    TrainerState.save_to_json = looking  # type: ignore[method-assign]
    args = arguments(Path(folder), max_steps=1, save_strategy="steps", save_steps=1)
    sap_trainer(SAPTrainer, model(), args).train()
    return there


@pytest.mark.slow
def test_a_checkpoint_is_complete_when_every_rank_has_saved_its_random_state(
    tmp_path: Path,
) -> None:
    first, _ = on_ranks(tmp_path, train_while_one_rank_is_late, str(tmp_path / "run"))
    assert first and all(first)
