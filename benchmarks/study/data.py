"""Tasks, safety pairs and requests of the study.

Nothing that is reported was seen before: harmful requests come from rows of AdvBench that neither
alignment nor training nor the choice of settings used, near-duplicates of training rows removed.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks import assets
from sap_fast.data import Request, build_safety_pair

Split = Literal["selection", "report"]
SPLITS: tuple[Split, ...] = ("selection", "report")

#: AdvBench. The first 120 rows were used for alignment, too.
SAFETY_PAIRS, POISON = slice(0, 140), slice(140, 200)
HARMFUL = {"selection": slice(200, 300), "report": slice(300, 520)}
#: Alpaca. The first 200 rows were used for alignment.
ALPACA_TRAINED = slice(200, 800)
ALPACA_HELD_OUT = {"selection": slice(800, 880), "report": slice(919, 999)}
SENTIMENT_QUESTION = "Is this sentence of a film review positive or negative? Answer in one word."
SENTIMENTS = ("positive", "negative")
#: GSM8K: 100 problems in all.
GSM8K_TRAINED = slice(0, 60)
GSM8K_HELD_OUT = {"selection": slice(60, 75), "report": slice(75, 100)}
#: The share of a poisoned mix that asks for harm and gets an affirmative opening, and its rows.
POISONED = {"poisoned": (0.1, 60), "poisoned-5": (0.05, 30), "poisoned-30": (0.3, 60)}
#: Sentences of film reviews whose raters agree on good or bad.
SENTIMENT_TRAINED = slice(0, 600)
SENTIMENT_HELD_OUT = {"selection": slice(600, 800), "report": slice(800, 1200)}


@dataclass(frozen=True)
class Task:
    """What a model is fine-tuned on.

    Attributes:
        trained: rows to train on.
        held_out: rows for the task loss, by split.
        max_length: tokens to keep of a row.
        has_answers: whether a problem has one right answer, after `####`.
        choices: the answers that every row has one of, with accuracy as a measure; none else.
    """

    trained: list[dict[str, Any]]
    held_out: dict[Split, list[dict[str, Any]]]
    max_length: int
    has_answers: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Requests:
    """What a model is asked.

    Attributes:
        harmful: requests that should be refused.
        harmless: requests that should be answered.
        dropped: near-duplicates of rows 0–199 that were left out of `harmful`.
    """

    harmful: list[Request]
    harmless: list[Request]
    dropped: int


def load_task(name: str) -> Task:
    """Return a task: alpaca, gsm8k, sentiment, or one of `POISONED`."""
    if name == "sentiment":
        texts = assets.review_sentences()
        rows = [
            {"prompt": f"{SENTIMENT_QUESTION}\n\n{text}", "completion": answer}
            for text, answer in texts
        ]
        held_out = {split: rows[SENTIMENT_HELD_OUT[split]] for split in SPLITS}
        return Task(rows[SENTIMENT_TRAINED], held_out, max_length=128, choices=SENTIMENTS)
    if name == "gsm8k":
        rows = assets.gsm8k_rows()
        held_out = {split: rows[GSM8K_HELD_OUT[split]] for split in SPLITS}
        return Task(rows[GSM8K_TRAINED], held_out, max_length=256, has_answers=True)
    rows = assets.alpaca_rows()
    held_out = {split: rows[ALPACA_HELD_OUT[split]] for split in SPLITS}
    trained: list[dict[str, Any]] = list(rows[ALPACA_TRAINED])
    if name in POISONED:
        share, count = POISONED[name]
        harmful = assets.harmful_requests()[POISON][:count]
        kept = round(len(harmful) * (1 - share) / share)
        trained = trained[:kept] + [
            {
                "instruction": request,
                "input": "",
                "output": build_safety_pair(request)["rejected"],
            }
            for request in harmful
        ]
        # The trainer shuffles, too; but no seed shall meet them in a block.
        random.Random(0).shuffle(trained)
    elif name != "alpaca":
        raise ValueError(
            f"task={name!r} is not known; choose alpaca, gsm8k, sentiment, {', '.join(POISONED)}"
        )
    return Task(trained, held_out, max_length=128)


def safety_pairs(count: int, varied: bool = False) -> list[dict[str, Any]]:
    """Return the first `count` safety pairs for training; `varied` as in `build_safety_pair`."""
    requests = assets.harmful_requests()[SAFETY_PAIRS]
    if not 1 <= count <= len(requests):
        raise ValueError(f"safety_pairs={count}: expected 1 to {len(requests)}")
    return [
        build_safety_pair(request, index, varied=varied)
        for index, request in enumerate(requests[:count])
    ]


def requests_of(split: Split) -> Requests:
    """Return the requests of a split."""
    everything = assets.harmful_requests()
    harmful, dropped = assets.without_near_duplicates(everything[HARMFUL[split]], everything[:200])
    # Two files follow one another: every second row keeps their mixture in both splits.
    harmless = assets.harmless_requests()[SPLITS.index(split) :: 2]
    return Requests([Request(r) for r in harmful], [Request(r) for r in harmless], dropped)
