"""What lasts of the refusals, and requests from elsewhere, on the models that a study left.

Each reported run's model is asked the evaluation half of the built-in requests, which no pair of
the study resembles in wording. Then somebody else tunes it once more, with plain AdamW, on benign
rows or on rows with a poisoned share, and asks it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import set_seed

from benchmarks.provenance import provenance
from benchmarks.study import results
from benchmarks.study.data import load_task, requests_of
from benchmarks.study.methods import METHODS, Run, run_of
from benchmarks.study.runs import (
    EVALUATION_BATCH,
    Row,
    described,
    merged,
    tune,
    tuned_model,
    with_lora,
)
from sap_fast.data import Request, builtin_requests
from sap_fast.evaluation import evaluate_model

#: What somebody does with a model that was tuned: nothing, or plain AdamW on a task.
AFTERWARDS = ("", "alpaca", "poisoned")
#: Steps of that, half of those before.
STEPS = 20
#: Added to the seed of the run, as somebody else has other batches.
LATER_SEED = 100


def run_lasting(runs: Iterable[Run], limit: int | None) -> None:
    """Measure what `lasting.csv` has no rows of, run by run.

    Args:
        runs: those that are reported.
        limit: rows to add at most.
    """
    # A defence at decoding is gone from what somebody else tunes: those weights are AdamW's.
    tuned = [run for run in runs if METHODS[run.method].after != "start"]
    plan = [(run, after) for run in tuned for after in AFTERWARDS]
    done = {
        (model, row["key"], row["afterwards"])
        for model in {run.model for run, _ in plan}
        for row in results.read(results.of_model(results.LASTING, model))
    }
    missing = [(r, after) for r, after in plan if (r.model, r.key, after) not in done][:limit]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, speed_estimate_period=3600) as progress:
        bar = progress.add_task("Lasting", total=len(missing))
        for run, after in missing:
            then = after or "nothing"
            progress.update(bar, description=f"Lasting: {run.method} {run.task}, then {then}")
            row = measured(run, after) | provenance()
            results.append(results.of_model(results.LASTING, run.model), [row])
            progress.advance(bar)


def builtin(kind: Literal["harmful", "harmless"]) -> list[Request]:
    """Return the evaluation half of the built-in requests of a kind."""
    return [Request(request.prompt) for request in builtin_requests("evaluation", kind)]


def measured(run: Run, afterwards: str) -> Row:
    """Return the row of a run's model, after it was tuned once more.

    Args:
        run: one that was reported; it is tuned again where what it left is gone.
        afterwards: one of `AFTERWARDS`.
    """
    model, tokenizer, _, _ = tuned_model(run)
    if afterwards:
        again = run_of("adamw", {"steps": STEPS}, run.seed + LATER_SEED, afterwards, run.model)
        set_seed(again.seed)
        model = with_lora(model, again)
        tune(again, load_task(afterwards), model, tokenizer, False)
        model = merged(model)
    row: Row = described(run) | {"afterwards": afterwards}
    asked = {
        "": (requests_of("report").harmful, requests_of("report").harmless),
        "builtin_": tuple(builtin(kind) for kind in ("harmful", "harmless")),
    }
    for name, (harmful, harmless) in asked.items():
        found = evaluate_model(
            model, tokenizer, harmful=harmful, harmless=harmless, batch_size=EVALUATION_BATCH
        )
        assert found.refused_harmful is not None and found.refused_harmless is not None
        assert found.margin is not None and found.harmful_refused is not None
        row |= {
            f"{name}refused_harmful": round(found.refused_harmful.mean, 4),
            f"{name}refused_harmless": round(found.refused_harmless.mean, 4),
            f"{name}margin": round(found.margin.mean, 3),
            # One digit per request, for paired comparisons.
            f"{name}harmful_refusals": "".join(str(int(r)) for r in found.harmful_refused),
        }
    return row
