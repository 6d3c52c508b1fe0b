"""Measuring a model's usefulness and safety from files."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sap_fast.cli.console import UserError, progress_bar
from sap_fast.cli.models import load_model, refuse_without_marks
from sap_fast.cli.settings import Accepted, answer_scoring
from sap_fast.data import (
    BUILTIN,
    EncodedRow,
    Request,
    builtin_requests,
    load_requests,
    load_task_dataset,
    spread_requests,
)
from sap_fast.data.builtin import Kind
from sap_fast.evaluation import EvaluationResult, Interval, Judge, JudgeError, evaluate_model
from sap_fast.evaluation.harness import HarnessError, known_tasks, task_accuracies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What asks for no requests at all.
NO_REQUESTS = "none"


@dataclass(frozen=True)
class EvaluationFiles:
    """What to measure on; None is not measured.

    Attributes:
        task: A file of task rows.
        harmful: A file of requests, or "builtin" for those that come with the package.
        harmless: Likewise.
        max_length: Tokens to keep of a task row.
        scored: Which of them are scored, as `--scored` says.
        reasoning: Whether thoughts are, as `--reasoning` says.
        limit: Ask at most so many requests of each kind, and questions of each task of lm-eval.
        lm_eval: Tasks of lm-eval, with commas between them.
        include_path: A folder with more such tasks.
    """

    task: str | None = None
    harmful: str | None = None
    harmless: str | None = None
    max_length: int = 512
    scored: str = "auto"
    reasoning: str = "train"
    limit: int | None = None
    lm_eval: str | None = None
    include_path: str | None = None

    @classmethod
    def given(
        cls, task: str | None, harmful: str | None, harmless: str | None, **more: Any
    ) -> EvaluationFiles:
        """Returns what options ask for: the built-in requests if they name none, nor "none".

        Raises:
            UserError: for options that do not go together.
        """
        found = cls(task, *cls._requests_named(harmful, harmless), **more)
        Accepted(least=1).check("limit", found.limit)
        if found.include_path is not None and found.lm_eval is None:
            raise UserError(f"--include-path {found.include_path}: names no task; give --lm-eval")
        return found

    @staticmethod
    def _requests_named(harmful: str | None, harmless: str | None) -> tuple[str | None, str | None]:
        if harmful is None and harmless is None:
            harmful = harmless = BUILTIN
        harmful = None if harmful == NO_REQUESTS else harmful
        harmless = None if harmless == NO_REQUESTS else harmless
        return harmful, harmless

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to measure."""
        return not (self.task or self.harmful or self.harmless or self.lm_eval)

    @property
    def tasks(self) -> list[str]:
        """The tasks of lm-eval."""
        return [name.strip() for name in self.lm_eval.split(",")] if self.lm_eval else []

    def known_tasks(self) -> Any:
        """Returns the task manager of lm-eval that knows them all; None where none is asked for.

        Raises:
            UserError: lm-eval is missing, or does not know one.
        """
        if not self.tasks:
            return None
        try:
            return known_tasks(self.tasks, self.include_path)
        except HarnessError as error:
            raise UserError(f"--lm-eval {self.lm_eval}: {error}") from error

    def task_rows(self, tokenizer: PreTrainedTokenizerBase) -> list[EncodedRow] | None:
        """Returns the task rows, encoded.

        Raises:
            DataError: for a row that cannot be used.
        """
        if self.task is None:
            return None
        scoring = answer_scoring(self.scored, self.reasoning)
        return load_task_dataset(self.task, tokenizer, self.max_length, scoring=scoring)

    def requests(self) -> tuple[list[Request] | None, list[Request] | None]:
        """Returns the harmful and the harmless requests.

        Raises:
            DataError: for a request that cannot be used.
        """
        return (
            self._asked(self.harmful, "harmful") if self.harmful else None,
            self._asked(self.harmless, "harmless") if self.harmless else None,
        )

    def _asked(self, file: str, kind: Kind) -> list[Request]:
        return spread_requests(requests_to_ask(file, kind), self.limit)


def requests_to_ask(file: str, kind: Kind) -> list[Request]:
    """Returns the requests of a file, or the built-in ones to evaluate on.

    Raises:
        DataError: for a request that cannot be used.
    """
    if file == BUILTIN:
        found = builtin_requests("evaluation", kind)
        return [Request(each.prompt, category=each.category) for each in found]
    return load_requests(file)


def evaluate(
    model: str,
    files: EvaluationFiles,
    *,
    precision: str = "fp32",
    batch_size: int = 16,
    trust_remote_code: bool = False,
    load_in: str | None = None,
    judges: Sequence[Judge] = (),
) -> EvaluationResult:
    """Measures a model on files, with progress bars.

    Args:
        model: folder or hub name of a model or adapter.
        files: what to measure on.
        precision: fp32, bf16-mixed (as fp32 here: nothing is trained) or bf16.
        batch_size: sequences per batch.
        trust_remote_code: run Python code that comes with the model.
        load_in: how to quantize its weights, as for `load_model`.
        judges: who judges the answers besides the phrases.

    Raises:
        UserError: if the model cannot be loaded, or lm-eval cannot do what is asked of it.
        DataError: for a row that cannot be used.
    """
    # Files first: a mistake in them shows before a large model is loaded.
    harmful, harmless = files.requests()
    manager = files.known_tasks()
    loaded, tokenizer = load_model(
        model, precision, trust_remote_code=trust_remote_code, load_in=load_in
    )
    if files.task is not None:
        refuse_without_marks(files.scored, model, tokenizer)
    task_rows = files.task_rows(tokenizer)
    try:
        result = evaluate_model(
            loaded,
            tokenizer,
            task_rows=task_rows,
            harmful=harmful,
            harmless=harmless,
            batch_size=batch_size,
            judges=judges,
            progress=progress_bar,
        )
    except JudgeError as error:
        raise UserError(f"--judge: {error}") from error
    if manager is None:
        return result
    try:
        accuracies = task_accuracies(
            loaded, tokenizer, files.tasks, manager, limit=files.limit, batch_size=batch_size
        )
    except HarnessError as error:
        raise UserError(f"--lm-eval {files.lm_eval}: {error}") from error
    return dataclasses.replace(result, task_accuracies=accuracies)


def evaluation_table(result: EvaluationResult) -> Table:
    """Returns the measures as a table, with what each one is."""
    table = Table("measure", "value", "95 % interval", "over", title="Evaluation")
    for column in table.columns[1:]:
        column.justify = "right"
    if result.task_loss is not None:
        found = result.task_interval
        between = f"{found.low:.4f} – {found.high:.4f}" if found else ""
        tokens = f"{result.task_tokens} tokens"
        table.add_row("task loss", f"{result.task_loss:.4f}", between, tokens)
    rows: list[tuple[str, Interval | None, str, str]] = [
        *(
            (task, interval, ".1%", "questions")
            for task, interval in (result.task_accuracies or {}).items()
        ),
        ("harmful requests refused", result.refused_harmful, ".1%", "requests"),
        ("harmless requests refused", result.refused_harmless, ".1%", "requests"),
        ("margin, refusal over affirmative opening", result.margin, ".2f", "requests"),
    ]
    for name, interval, style, over in rows:
        if interval is not None:
            between = f"{interval.low:{style}} – {interval.high:{style}}"
            table.add_row(name, f"{interval.mean:{style}}", between, f"{interval.count} {over}")
    return table


def as_json(model: str, files: EvaluationFiles, result: EvaluationResult) -> dict[str, Any]:
    """Returns a result with what it was measured on."""
    return {"model": model, "files": vars(files), "result": result.to_dict()}
