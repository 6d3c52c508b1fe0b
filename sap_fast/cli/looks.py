"""Looks at a model while it is trained: held-out task loss, and whether it still refuses."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainingArguments

from sap_fast.cli import ranks
from sap_fast.data import EncodedRow, Request, builtin_requests
from sap_fast.data.builtin import Kind
from sap_fast.evaluation import evaluate_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Trainer, TrainerControl, TrainerState

#: Requests of each category that a look asks, which are then in no built-in pair, and as many of
#: their harmless twins.
_PER_CATEGORY = 2

Row = dict[str, Any]


def requests_to_look_at(kind: Kind = "harmful") -> list[Request]:
    """Returns the last requests of each category of the training half.

    The evaluation half is left alone: a model that was chosen by it could not be measured on it.
    """
    chosen: dict[str, list[str]] = {}
    for request in builtin_requests("training", kind):
        chosen.setdefault(request.category, []).append(request.prompt)
    return [Request(prompt) for prompts in chosen.values() for prompt in prompts[-_PER_CATEGORY:]]


class Looks(TrainerCallback):
    """Evaluates before the first step, every few steps and after the last one.

    A look adds a row to `metrics.jsonl`: `step`, `held_out/loss`, `held_out/refused` and
    `held_out/refused_harmless` (shares), and `held_out/margin`. With `keep`, the model of the best
    look after the first step lies in the folder `best`.

    Args:
        work: folder of the run.
        trainer: that trains.
        tokenizer: the model's.
        rows: held-out task rows.
        every: steps between looks; None for none between the first and the last.
        keep: "loss", the lowest held-out loss; "safety", the lowest one among the looks at which
            the model refuses no less than before the tuning, or if there is none, the one at which
            it refuses most; None keeps no model.
        patience: looks in a row without a better one after which the training stops; None for as
            long as it was meant to go on.
        kept: rows of `metrics.jsonl` that an interrupted run left.
        batch_size: sequences per batch.
    """

    def __init__(
        self,
        work: Path,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[EncodedRow],
        *,
        every: int | None,
        keep: str | None,
        patience: int | None = None,
        kept: Sequence[Row],
        batch_size: int = 16,
    ) -> None:
        self._work, self._trainer, self._tokenizer = work, trainer, tokenizer
        self._rows, self._every, self._keep = rows, every, keep
        self._harmful = requests_to_look_at("harmful")
        self._harmless = requests_to_look_at("harmless")
        self._patience = patience
        self._batch_size = batch_size
        self._seen = [row for row in kept if "held_out/loss" in row]
        self.why_stopped: str | None = None
        """Why the training was stopped before its last step, in a sentence; None if it was not."""

    @property
    def best(self) -> Row | None:
        """The best look so far, the first of equals; None before the first step."""
        after = [row for row in self._seen if row["step"] > 0]
        return max(after, key=self._goodness) if after else None

    @property
    def without_a_better_one(self) -> int:
        """How many looks there were since the best one."""
        best = self.best
        return sum(row["step"] > best["step"] for row in self._seen) if best else 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Looks before the first step, unless an interrupted run did."""
        if not self._seen:
            self._look(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Looks where a look is due and after the last step, and says whether to stop."""
        due = self._every is not None and state.global_step % self._every == 0
        is_last = state.global_step == state.max_steps
        if due or is_last:
            self._look(state.global_step)
        if self._patience is None or is_last or self.without_a_better_one < self._patience:
            return
        assert self.best is not None
        followed = "safe model" if self._keep == "safety" else "held-out loss"
        self.why_stopped = (
            f"Stopped at step {state.global_step} of {state.max_steps}: {self._patience} look(s) "
            f"without a better {followed} than at step {self.best['step']}"
        )
        control.should_training_stop = True
        # A run that goes on from a checkpoint takes a step first, and this one has had its last.
        control.should_save = False

    def _goodness(self, row: Row) -> tuple[float, ...]:
        loss, refused = row["held_out/loss"], row["held_out/refused"]
        loss = loss if loss == loss else float("inf")
        if self._keep != "safety":
            return (-loss,)
        enough = refused >= self._seen[0]["held_out/refused"]
        return (1.0, -loss) if enough else (0.0, refused, -loss)

    def _look(self, step: int) -> None:
        row = ranks.on_first(lambda: self._measured(step))
        self._seen.append(row)
        if ranks.is_first():
            with (self._work / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        # To log is to take back that the figures of this step are still to be logged.
        control = self._trainer.control
        due = control.should_log
        self._trainer.log({name: value for name, value in row.items() if name != "step"})
        control.should_log = due
        if self._keep is not None and self.best is row:
            ranks.on_first(self._save)

    def _measured(self, step: int) -> Row:
        model: Any = self._trainer.accelerator.unwrap_model(self._trainer.model)
        found = evaluate_model(
            model,
            self._tokenizer,
            task_rows=self._rows,
            harmful=self._harmful,
            harmless=self._harmless,
            batch_size=self._batch_size,
        )
        assert found.refused_harmful is not None and found.margin is not None
        assert found.refused_harmless is not None
        return {
            "step": step,
            "held_out/loss": found.task_loss,
            "held_out/refused": found.refused_harmful.mean,
            "held_out/refused_harmless": found.refused_harmless.mean,
            "held_out/margin": found.margin.mean,
        }

    def _save(self) -> None:
        model: Any = self._trainer.accelerator.unwrap_model(self._trainer.model)
        unfinished, best = self._work / "best.unfinished", self._work / "best"
        shutil.rmtree(unfinished, ignore_errors=True)
        model.save_pretrained(unfinished)
        shutil.rmtree(best, ignore_errors=True)
        unfinished.rename(best)


def move_best(work: Path) -> None:
    """Moves what the folder `best` holds to where a finished run has its model."""
    best = work / "best"
    for path in best.iterdir():
        os.replace(path, work / path.name)
    best.rmdir()
