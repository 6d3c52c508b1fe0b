"""Measures of safety and usefulness: refusals, margins, task loss."""

from sap_fast.evaluation.bootstrap import (
    Interval,
    bootstrap_interval,
    crossed_bootstrap_interval,
    paired_difference,
    weighted_bootstrap_interval,
)
from sap_fast.evaluation.evaluate import Answer, EvaluationResult, evaluate_model
from sap_fast.evaluation.judges import (
    ClassifierJudge,
    EndpointJudge,
    GuardJudge,
    Judge,
    JudgeError,
    PhraseJudge,
    cohens_kappa,
)
from sap_fast.evaluation.margins import refusal_margins
from sap_fast.evaluation.progress import Progress, ProgressTask, no_progress
from sap_fast.evaluation.refusals import (
    MAX_OPENING_TOKENS,
    MAX_REFUSAL_TOKENS,
    REFUSAL_PHRASES,
    generate_openings,
    is_refusal,
    own_refusals,
    refusing_sentences,
)

__all__ = [
    "MAX_OPENING_TOKENS",
    "MAX_REFUSAL_TOKENS",
    "REFUSAL_PHRASES",
    "Answer",
    "ClassifierJudge",
    "EndpointJudge",
    "EvaluationResult",
    "GuardJudge",
    "Interval",
    "Judge",
    "JudgeError",
    "PhraseJudge",
    "Progress",
    "ProgressTask",
    "bootstrap_interval",
    "cohens_kappa",
    "crossed_bootstrap_interval",
    "evaluate_model",
    "generate_openings",
    "is_refusal",
    "no_progress",
    "own_refusals",
    "paired_difference",
    "refusal_margins",
    "refusing_sentences",
    "weighted_bootstrap_interval",
]
