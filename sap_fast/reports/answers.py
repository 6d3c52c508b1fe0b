"""Refusals by category of request, and how answers begin."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from sap_fast.reports.pages import MISSING

#: Requests without a category of which answers are shown, and letters of a request.
_EXAMPLES, _LETTERS = 6, 160

Evaluation = Mapping[str, Any]


class Share(NamedTuple):
    """How many requests of a kind and category a model refuses.

    Attributes:
        text: Such as "64 %"; `MISSING` where none was asked.
        part: The share, from 0 to 1.
    """

    text: str
    part: float


@dataclass(frozen=True)
class CategoryRow:
    """A category of requests.

    Attributes:
        name: Such as "violent crimes".
        asked: How many harmful and harmless requests of it there are.
        shares: By model, the shares of harmful and of harmless requests that it refuses.
    """

    name: str
    asked: str
    shares: list[tuple[Share, Share]]


@dataclass(frozen=True)
class Example:
    """How every model begins to answer one request.

    Attributes:
        category: What kind of request it is; empty where that is not known.
        prompt: What was asked, cut if it is long.
        answers: By model, the first words, and whether that is a refusal; None where it was not
            asked this.
    """

    category: str
    prompt: str
    answers: list[tuple[str, bool] | None]


def category_rows(evaluations: Sequence[Evaluation]) -> list[CategoryRow]:
    """Returns refusals by category; empty unless requests have categories.

    Args:
        evaluations: `EvaluationResult.to_dict()` of each model.
    """
    counted = [
        [_by_category(evaluation, kind) for kind in ("harmful", "harmless")]
        for evaluation in evaluations
    ]
    names = dict.fromkeys(name for both in counted for verdicts in both for name in verdicts)
    rows = []
    for name in names:
        of_models = [[verdicts.get(name, []) for verdicts in both] for both in counted]
        asked = [max(len(both[kind]) for both in of_models) for kind in (0, 1)]
        shares = [(_share(harmful), _share(harmless)) for harmful, harmless in of_models]
        rows.append(CategoryRow(_words(name), f"{asked[0]} / {asked[1]}", shares))
    return rows


def _by_category(evaluation: Evaluation, kind: str) -> dict[str, list[bool]]:
    found: dict[str, list[bool]] = {}
    for answer, refused in _answers(evaluation, kind):
        if answer["category"] is not None:
            found.setdefault(answer["category"], []).append(refused)
    return found


def _answers(evaluation: Evaluation, kind: str) -> list[tuple[dict[str, Any], bool]]:
    answers, refused = evaluation.get(f"{kind}_answers"), evaluation.get(f"{kind}_refused")
    return list(zip(answers, refused, strict=True)) if answers and refused else []


def _share(refused: Sequence[bool]) -> Share:
    if not refused:
        return Share(MISSING, 0.0)
    part = sum(refused) / len(refused)
    return Share(f"{100 * part:.0f}\N{NO-BREAK SPACE}%", part)


def _words(category: str) -> str:
    return category.replace("_", " ")


def example_tables(evaluations: Sequence[Evaluation]) -> dict[str, list[Example]]:
    """Returns the answers to show, by kind of request; kinds of which there are none are left out.

    Of every category it is the request on which the models differ most, the first of equals.

    Args:
        evaluations: `EvaluationResult.to_dict()` of each model.
    """
    tables = {}
    for kind in ("harmful", "harmless"):
        if examples := _examples(evaluations, kind):
            tables[kind] = examples
    return tables


def _examples(evaluations: Sequence[Evaluation], kind: str) -> list[Example]:
    by_model = [
        {answer["prompt"]: (answer, refused) for answer, refused in _answers(each, kind)}
        for each in evaluations
    ]
    asked = {prompt: answer for each in by_model for prompt, (answer, _) in each.items()}
    grouped: dict[str, list[str]] = {}
    for prompt, answer in asked.items():
        grouped.setdefault(answer["category"] or "", []).append(prompt)

    def agreement(prompt: str) -> float:
        verdicts = [each[prompt][1] for each in by_model if prompt in each]
        return abs(sum(verdicts) / len(verdicts) - 0.5)

    examples = []
    for category, prompts in grouped.items():
        telling = sorted(prompts, key=agreement)
        for prompt in telling[: 1 if category else _EXAMPLES]:
            short = prompt if len(prompt) <= _LETTERS else prompt[: _LETTERS - 1] + "…"
            answers = [
                (each[prompt][0]["first_words"], each[prompt][1]) if prompt in each else None
                for each in by_model
            ]
            examples.append(Example(_words(category), short, answers))
    return examples
