"""All measures of one model."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from sap_fast.data import EncodedRow, Request, padding_token_id
from sap_fast.evaluation.batching import score_rows
from sap_fast.evaluation.bootstrap import (
    Interval,
    bootstrap_interval,
    weighted_bootstrap_interval,
)
from sap_fast.evaluation.judges import Judge
from sap_fast.evaluation.margins import refusal_margins
from sap_fast.evaluation.progress import Progress, no_progress
from sap_fast.evaluation.refusals import MAX_OPENING_TOKENS, generate_openings, is_refusal
from sap_fast.losses import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIRST_WORDS = 8
"""How many words of an answer a result keeps: enough to see what it sets out to do."""

_INTERVALS = ("task_interval", "refused_harmful", "refused_harmless", "margin")
_ANSWERS = ("harmful_answers", "harmless_answers")


@dataclass(frozen=True)
class Answer:
    """How a model begins to answer a request.

    Attributes:
        prompt: What was asked.
        category: What kind of request it is; None where that is not known.
        first_words: The first words of the greedy answer, at most `FIRST_WORDS` of them.
    """

    prompt: str
    category: str | None
    first_words: str


@dataclass(frozen=True)
class EvaluationResult:
    """Measures of one model; None where there was nothing to measure on.

    Attributes:
        task_loss: Mean negative log-likelihood of all response tokens of the task rows, in nats.
        task_tokens: Number of those tokens.
        task_interval: The same loss with its interval over the rows; None where it is not finite.
        task_accuracies: Accuracy by task and metric of lm-eval, with its interval over questions.
        refused_harmful: Share of the harmful requests that are refused.
        refused_harmless: Share of the harmless requests that are refused.
        margin: Mean log p(refusal) − log p(affirmative opening) on the harmful requests, in nats.
        harmful_refused: Whether each harmful request is refused.
        harmful_margins: The margin of each harmful request.
        harmless_refused: Whether each harmless request is refused.
        harmful_answers: How the answer to each harmful request begins.
        harmless_answers: Likewise of each harmless request.
        judged_harmful: What every further judge says of each harmful request, by its name: whether
            it is refused, or answered safely.
        judged_harmless: Likewise of each harmless request, by judges that tell refusals.

    The values per request are in the order of the requests, so that `paired_difference` can
    compare two models.
    """

    task_loss: float | None = None
    task_tokens: int | None = None
    task_interval: Interval | None = None
    task_accuracies: dict[str, Interval] | None = None
    refused_harmful: Interval | None = None
    refused_harmless: Interval | None = None
    margin: Interval | None = None
    harmful_refused: list[bool] | None = None
    harmful_margins: list[float] | None = None
    harmless_refused: list[bool] | None = None
    harmful_answers: list[Answer] | None = None
    harmless_answers: list[Answer] | None = None
    judged_harmful: dict[str, list[bool]] | None = None
    judged_harmless: dict[str, list[bool]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The result as plain types that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "EvaluationResult":
        """The result that `to_dict` gave `values` for."""
        typed: dict[str, Any] = {
            name: Interval(**values[name]) for name in _INTERVALS if values.get(name) is not None
        }
        for name in _ANSWERS:
            if values.get(name) is not None:
                typed[name] = [Answer(**each) for each in values[name]]
        if values.get("task_accuracies") is not None:
            found = values["task_accuracies"].items()
            typed["task_accuracies"] = {task: Interval(**each) for task, each in found}
        return cls(**{**values, **typed})


def evaluate_model(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    task_rows: Sequence[EncodedRow] | None = None,
    harmful: Sequence[Request] | None = None,
    harmless: Sequence[Request] | None = None,
    batch_size: int = 16,
    judges: Sequence[Judge] = (),
    progress: Progress | None = None,
) -> EvaluationResult:
    """Measures usefulness and safety of a model.

    Args:
        model: A causal language model of transformers, a PEFT model around one, or a module that
            answers and scores in a way of its own, as `sap_fast.baselines.AlignedStart` does.
        tokenizer: Its tokenizer.
        task_rows: Encoded rows, as `load_task_dataset` returns them.
        harmful: Requests that should be refused.
        harmless: Requests that should be answered.
        batch_size: Sequences per batch.
        judges: Who judges the answers besides the phrases of `is_refusal`; they see the first
            `MAX_OPENING_TOKENS` tokens.
        progress: Shows how far each measure is; None shows nothing.

    Returns:
        The measures for what was given. Intervals are 95 % bootstrap intervals over requests.

    Raises:
        JudgeError: A judge does not answer as it should.
        ValueError: A list is empty, or `batch_size` is below 1.
    """
    for name, given in (("task_rows", task_rows), ("harmful", harmful), ("harmless", harmless)):
        if given is not None and len(given) == 0:
            raise ValueError(f"{name} is empty; expected at least one entry, or None")
    progress = progress or no_progress
    measures: dict[str, Any] = {}
    if task_rows is not None:
        log_probs = score_rows(
            model,
            task_rows,
            pad_token_id=padding_token_id(tokenizer),
            batch_size=batch_size,
            progress=progress,
            description="Scoring task rows",
        )
        # The first token of a sequence has no prediction.
        counts = [sum(label != IGNORE_INDEX for label in row["labels"][1:]) for row in task_rows]
        measures["task_tokens"] = sum(counts)
        measures["task_loss"] = -float(log_probs.sum()) / sum(counts)
        if math.isfinite(measures["task_loss"]):
            measures["task_interval"] = weighted_bootstrap_interval(-log_probs, counts)
    if harmful is not None:
        answers, refused, judged = _asked(model, tokenizer, harmful, batch_size, judges, progress)
        measures["harmful_answers"] = answers
        measures["judged_harmful"] = judged or None
        margins = refusal_margins(
            model, tokenizer, harmful, batch_size=batch_size, progress=progress
        ).tolist()
        measures["harmful_refused"] = refused
        measures["refused_harmful"] = bootstrap_interval(refused)
        measures["harmful_margins"] = margins
        measures["margin"] = bootstrap_interval(margins)
    if harmless is not None:
        able = [judge for judge in judges if judge.tells_refusals]
        answers, refused, judged = _asked(model, tokenizer, harmless, batch_size, able, progress)
        measures["harmless_answers"] = answers
        measures["judged_harmless"] = judged or None
        measures["harmless_refused"] = refused
        measures["refused_harmless"] = bootstrap_interval(refused)
    return EvaluationResult(**measures)


def _asked(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    requests: Sequence[Request],
    batch_size: int,
    judges: Sequence[Judge],
    progress: Progress,
) -> tuple[list[Answer], list[bool], dict[str, list[bool]]]:
    """Returns how answers begin, the verdicts by phrases, and those of further judges by name."""
    prompts = [request.prompt for request in requests]
    openings = generate_openings(
        model, tokenizer, prompts, batch_size=batch_size, progress=progress
    )
    begun = [
        Answer(request.prompt, request.category, " ".join(opening.split()[:FIRST_WORDS]))
        for request, opening in zip(requests, openings, strict=True)
    ]
    refused = [is_refusal(opening) for opening in openings]
    if not judges:
        return begun, refused, {}
    answers = generate_openings(
        model,
        tokenizer,
        prompts,
        max_new_tokens=MAX_OPENING_TOKENS,
        batch_size=batch_size,
        progress=progress,
    )
    verdicts = {
        judge.name: judge(prompts, answers, batch_size=batch_size, progress=progress)
        for judge in judges
    }
    return begun, refused, verdicts
