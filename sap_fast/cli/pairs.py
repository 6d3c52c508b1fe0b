"""Safety pairs from a list of requests: the model itself is asked how it refuses them.

Answers are added to `OUTPUT.unfinished` batch by batch, and `OUTPUT` appears when all are there.
Started again after an interruption, the asking goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sap_fast.cli.console import UserError, console, progress_bar
from sap_fast.cli.models import load_model
from sap_fast.cli.unfinished import refuse_other_settings, removed_on_failure
from sap_fast.data import (
    BUILTIN,
    Request,
    build_safety_pair,
    builtin_requests,
    load_requests,
    spread_requests,
)
from sap_fast.evaluation import own_refusals

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Below this share of refusals there is a word on how little there is to keep.
_FEW = 0.5


@dataclass(frozen=True)
class PairsSettings:
    """Everything that decides the pairs."""

    model: str
    output: str
    requests: str = BUILTIN
    not_refused: str = "stock"
    limit: int | None = None
    precision: str = "fp32"
    batch_size: int = 16
    trust_remote_code: bool = False
    load_in: str | None = None


@dataclass(frozen=True)
class PairsCount:
    """How many requests there were, and how many the model refused in its own words."""

    requests: int
    refused: int

    def sentence(self, not_refused: str) -> str:
        """Returns the counts in words."""
        rest = self.requests - self.refused
        instead = "got a stock refusal" if not_refused == "stock" else "were left out"
        return (
            f"{self.requests} requests: {self.refused} refused in the model's own words, "
            f"{rest} {instead}"
        )


def pairs(settings: PairsSettings) -> PairsCount:
    """Asks a model requests that it should refuse, and writes safety pairs.

    Args:
        settings: what to do.

    Returns:
        How many requests were refused.

    Raises:
        UserError: for an output that is in the way, a model that cannot be loaded, or if nothing
            is left to write.
        DataError: for a request that cannot be used.
        OSError: for an output that cannot be written.
    """
    output = Path(settings.output)
    if output.suffix.lower() != ".jsonl":
        raise UserError(f"--output {output}: expected the name of a .jsonl file")
    if output.exists():
        raise UserError(f"--output {output}: exists already; remove it or choose another name")
    requests = spread_requests(requests_to_train_on(settings.requests), settings.limit)
    work = _unfinished(output)
    # The answers are the same whatever becomes of those that do not refuse.
    asked = {k: v for k, v in dataclasses.asdict(settings).items() if k != "not_refused"}
    if (work / "run.json").exists():
        refuse_other_settings(work, asked)
    with removed_on_failure(work, keep=(work / "answers.jsonl").exists):
        model, tokenizer = load_model(
            settings.model,
            settings.precision,
            trust_remote_code=settings.trust_remote_code,
            load_in=settings.load_in,
        )
        work.mkdir(parents=True, exist_ok=True)
        record = json.dumps({"settings": asked}, indent=2)
        (work / "run.json").write_text(record + "\n", encoding="utf-8")
        return write_pairs(
            output,
            requests,
            model,
            tokenizer,
            not_refused=settings.not_refused,
            batch_size=settings.batch_size,
        )


def requests_to_train_on(requests: str, *, without: Sequence[Request] = ()) -> list[Request]:
    """Returns the requests of a file, or the training half of those that come with the package.

    Args:
        requests: the file, or "builtin".
        without: built-in requests to leave out.
    """
    if requests == BUILTIN:
        half = [Request(each.prompt) for each in builtin_requests("training", "harmful")]
        return [request for request in half if request not in without]
    return load_requests(requests)


def write_pairs(
    output: Path,
    requests: Sequence[Request],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    not_refused: str = "stock",
    batch_size: int = 16,
) -> PairsCount:
    """Asks a model what is not answered yet in `OUTPUT.unfinished`, and writes the pairs.

    Args:
        output: the file to write; it appears only when it is complete.
        requests: what to ask.
        model: whose refusals are the safe answers.
        tokenizer: the model's.
        not_refused: what to do with a request that the model does not refuse: "stock", a refusal
            of `build_safety_pair`; or "drop".
        batch_size: requests per batch.

    Raises:
        UserError: if nothing is refused and `not_refused` is "drop".
    """
    work = _unfinished(output)
    answers = _answers(work / "answers.jsonl", requests, model, tokenizer, batch_size)
    rows: list[dict[str, Any]] = []
    for index, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        if answer is not None or not_refused == "stock":
            pair = build_safety_pair(request.prompt, index)
            pair["chosen"] = answer or request.refusal or pair["chosen"]
            pair["rejected"] = request.opening or pair["rejected"]
            rows.append(pair)
    count = PairsCount(len(requests), sum(answer is not None for answer in answers))
    if not rows:
        raise UserError(
            f"--not-refused drop: the model refused none of the {len(requests)} requests, so that "
            "there is nothing to write; give --not-refused stock"
        )
    write_rows(output, rows)
    shutil.rmtree(work)
    console.print(count.sentence(not_refused))
    if count.refused < _FEW * count.requests:
        console.print(
            f"[yellow]Warning:[/yellow] the model refuses only {count.refused} of "
            f"{count.requests}: fine-tuning has little safety to take away from it",
            soft_wrap=True,
        )
    return count


def ask_for_pairs(
    output: Path,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    without: Sequence[Request] = (),
) -> None:
    """Writes the pairs of the built-in requests, but for some, unless they are there already."""
    if not output.exists():
        requests = requests_to_train_on(BUILTIN, without=without)
        write_pairs(output, requests, model, tokenizer)


def write_stock_pairs(output: Path) -> None:
    """Writes the pairs of the built-in requests with stock refusals, which need no model."""
    requests = requests_to_train_on(BUILTIN)
    write_rows(output, [build_safety_pair(r.prompt, index) for index, r in enumerate(requests)])


def write_rows(output: Path, rows: list[dict[str, Any]]) -> None:
    """Writes a file of rows as JSONL; it appears only when it is complete."""
    unfinished = output.with_name(f".{output.name}.unfinished")
    unfinished.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(unfinished, output)


def _unfinished(output: Path) -> Path:
    return output.with_name(output.name + ".unfinished")


def _answers(
    path: Path,
    requests: Sequence[Request],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> list[str | None]:
    """Returns the model's own refusals, and adds to the file at `path` those that it lacks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prompts = [request.prompt for request in requests]
    answers = _begun(path, prompts)
    if answers:
        console.print(f"Going on after {len(answers)} of {len(prompts)} requests in {path.parent}")
    with progress_bar("Asking the model", len(prompts)) as bar:
        bar.advance(len(answers))
        for start in range(len(answers), len(prompts), batch_size):
            asked = prompts[start : start + batch_size]
            refusals = own_refusals(model, tokenizer, asked, batch_size=batch_size)
            with path.open("a", encoding="utf-8") as file:
                for prompt, refusal in zip(asked, refusals, strict=True):
                    file.write(json.dumps({"prompt": prompt, "refusal": refusal}) + "\n")
            answers += refusals
            bar.advance(len(asked))
            bar.note(f"{sum(answer is not None for answer in answers)} refused")
    return answers


def _begun(path: Path, prompts: Sequence[str]) -> list[str | None]:
    """Returns the answers that an earlier run left, as far as they are to the same requests."""
    if not path.exists():
        return []
    rows = []
    for line, prompt in zip(path.read_text(encoding="utf-8").splitlines(), prompts, strict=False):
        try:
            row = json.loads(line)
        except ValueError:  # the line was cut off
            break
        if row["prompt"] != prompt:
            break
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [row["refusal"] for row in rows]
