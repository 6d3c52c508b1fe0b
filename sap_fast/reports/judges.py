"""What several judges say of the same answers, and how far they agree."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sap_fast.evaluation import cohens_kappa
from sap_fast.reports.pages import MISSING

PHRASES, MARGIN = "phrases", "margin"

Verdicts = dict[str, list[bool]]


def verdicts_of(evaluation: Mapping[str, Any]) -> tuple[Verdicts, Verdicts]:
    """Returns who says what of harmful and of harmless requests.

    Args:
        evaluation: `EvaluationResult.to_dict()`.

    Returns:
        Two dicts of verdicts by the name of the judge: the phrases, the margin (above 0, the
        refusal is likelier than the affirmative opening), and the further judges.
    """
    harmful: Verdicts = {}
    harmless: Verdicts = {}
    if evaluation.get("harmful_refused"):
        harmful[PHRASES] = evaluation["harmful_refused"]
    if evaluation.get("harmful_margins"):
        harmful[MARGIN] = [margin > 0 for margin in evaluation["harmful_margins"]]
    if evaluation.get("harmless_refused"):
        harmless[PHRASES] = evaluation["harmless_refused"]
    harmful |= evaluation.get("judged_harmful") or {}
    harmless |= evaluation.get("judged_harmless") or {}
    return harmful, harmless


def agreement(evaluations: Sequence[Mapping[str, Any]], first: str, second: str) -> float | None:
    """Returns Cohen's κ of two judges over all answers that both judged; None without any."""
    one: list[bool] = []
    other: list[bool] = []
    for evaluation in evaluations:
        for verdicts in verdicts_of(evaluation):
            if first in verdicts and second in verdicts:
                one += verdicts[first]
                other += verdicts[second]
    return cohens_kappa(one, other) if one else None


def agreement_text(evaluations: Sequence[Mapping[str, Any]], first: str, second: str) -> str:
    """Returns κ to two digits; `MISSING` where it is not defined, or of a judge with itself."""
    kappa = None if first == second else agreement(evaluations, first, second)
    return MISSING if kappa is None or math.isnan(kappa) else f"{kappa:.2f}".replace("-", "−")


def judged_by(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the names of all judges, if there are others than those that are always there."""
    names: dict[str, None] = {}
    for evaluation in evaluations:
        for verdicts in verdicts_of(evaluation):
            names |= dict.fromkeys(verdicts)
    return list(names) if names.keys() - {PHRASES, MARGIN} else []


def judges_rows(evaluations: Mapping[str, Mapping[str, Any] | None]) -> list[tuple[str, list[str]]]:
    """Returns the rows of the report's table of judges.

    Args:
        evaluations: by the name of the model; None where it was not evaluated.

    Returns:
        For every judge its name, the share that it finds refused or safe of the harmful requests
        and, behind a slash, of the harmless ones, by model, and its κ with the phrases over all
        models. Empty where the phrases and the margin are the only ones.
    """
    given = {name: each for name, each in evaluations.items() if each is not None}
    rows = []
    for judge in judged_by(list(given.values())):
        cells = []
        for name in evaluations:
            shares = [verdicts.get(judge) for verdicts in verdicts_of(given.get(name, {}))]
            cells.append(" / ".join(_share(verdicts) for verdicts in shares))
        cells.append(agreement_text(list(given.values()), PHRASES, judge))
        rows.append((judge, cells))
    return rows


def _share(verdicts: list[bool] | None) -> str:
    if not verdicts:
        return MISSING
    return f"{100 * sum(verdicts) / len(verdicts):.0f}\N{NO-BREAK SPACE}%"
