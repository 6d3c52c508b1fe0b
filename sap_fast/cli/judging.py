"""Further judges of answers, from what `--judge` names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rich.table import Table

from sap_fast.cli.console import UserError
from sap_fast.cli.models import default_device
from sap_fast.evaluation import (
    ClassifierJudge,
    EndpointJudge,
    EvaluationResult,
    GuardJudge,
    Judge,
    JudgeError,
)
from sap_fast.reports.judges import agreement_text, verdicts_of
from sap_fast.reports.pages import MISSING

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


def load_judges(names: str | None, *, trust_remote_code: bool = False) -> list[Judge]:
    """Loads judges.

    Args:
        names: with commas between them: a folder or hub name of a guard model or of a sequence
            classifier, or the address of an OpenAI-compatible server of this machine.
        trust_remote_code: run Python code that comes with a model.

    Raises:
        UserError: if a judge cannot be used, or two have one name.
    """
    judges: list[Judge] = []
    for name in names.split(",") if names else []:
        try:
            if re.match(r"https?://", name):
                judge: Judge = EndpointJudge(name)
            else:
                judge = _model_judge(name.strip(), trust_remote_code)
        except JudgeError as error:
            raise UserError(f"--judge {name}: {error}") from error
        if any(judge.name == other.name for other in judges):
            raise UserError(f"--judge {name}: two judges are called {judge.name}")
        judges.append(judge)
    return judges


def _model_judge(name: str, trust_remote_code: bool) -> Judge:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
    )

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **options)
        kinds = config.architectures or []
        classifies = any("ForSequenceClassification" in kind for kind in kinds)
        loader = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **options)
        model: nn.Module = loader.from_pretrained(
            name, use_safetensors=True, dtype="auto", **options
        )
    # As for the model itself: errors of many types, all of which are the folder's.
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"--judge {name}: cannot be loaded: {why}") from error
    judge = ClassifierJudge if classifies else GuardJudge
    short = name.rstrip("/").rsplit("/", 1)[-1]
    return judge(short, model.to(default_device()), tokenizer)


def judges_table(result: EvaluationResult) -> Table:
    """Returns what every judge says, and how far it agrees with the phrases."""
    table = Table("judge", "harmful", "harmless", "κ with phrases", title="Refused, or safe")
    for column in table.columns[1:]:
        column.justify = "right"
    harmful, harmless = verdicts_of(result.to_dict())
    for name in harmful | harmless:
        cells = []
        for verdicts in (harmful, harmless):
            given = verdicts.get(name)
            cells.append(f"{sum(given) / len(given):.1%}" if given else MISSING)
        table.add_row(name, *cells, agreement_text([result.to_dict()], "phrases", name))
    return table
