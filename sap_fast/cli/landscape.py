"""The safety landscape of a model, measured point by point into a CSV file and a page."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sap_fast.cli.console import Bar, UserError, console, progress_bar
from sap_fast.cli.evaluate import requests_to_ask
from sap_fast.cli.models import load_model
from sap_fast.cli.unfinished import refuse_other_settings, removed_on_failure
from sap_fast.data import (
    SafetyCollator,
    load_safety_dataset,
    load_task_dataset,
    padding_token_id,
)
from sap_fast.evaluation import bootstrap_interval, evaluate_model, generate_openings, is_refusal
from sap_fast.evaluation.landscape import along, as_long_as, random_direction
from sap_fast.losses import contrastive_loss
from sap_fast.reports.landscape import COLUMNS, SAFETY, TUNING, Row, write_landscape
from sap_fast.reports.pages import file_name


@dataclass(frozen=True)
class LandscapeSettings:
    """What to measure: the options of `sap-fast landscape`."""

    model: str
    harmful: str
    output: str
    task: str | None = None
    safety: str | None = None
    base: str | None = None
    directions: int = 3
    reach: float = 0.5
    gradient_reach: float = 1e-4
    points: int = 11
    batch_size: int = 16
    max_length: int = 512
    seed: int = 0
    trust_remote_code: bool = False

    def alphas(self, direction: str) -> list[float]:
        """Returns the steps along a direction; 0, the model itself, is one of them.

        Along the fine-tuning direction −1 is the base model, and is one of them, too.
        """
        half = self.points // 2
        reach = self.gradient_reach if direction == SAFETY else self.reach
        around = [reach * k / half for k in range(-half, half + 1)]
        if direction != TUNING:
            return around
        between = [-1 + k / half for k in range(half + 1)]
        return [-1 - self.reach, *between, self.reach]


def landscape(settings: LandscapeSettings) -> list[Row]:
    """Measures a landscape, or what an interrupted run left of it, and writes the page.

    Args:
        settings: what to measure.

    Returns:
        The rows of `landscape.csv`.

    Raises:
        UserError: for an output that exists, a model that cannot be loaded or a base that is of
            another shape.
        DataError: for a row that cannot be used.
    """
    output = Path(settings.output)
    if output.exists():
        raise UserError(f"--output {output}: exists already; remove it or choose another folder")
    work = output.with_name(output.name + ".unfinished")
    points = work / "landscape.csv"
    begun = _rows_of(settings, work)
    with removed_on_failure(work, keep=points.exists):
        ground = _Ground(settings)
        work.mkdir(parents=True, exist_ok=True)
        record = {"settings": dataclasses.asdict(settings)}
        (work / "run.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        names = [f"random {number}" for number in range(settings.directions)]
        names += [SAFETY] * bool(settings.safety) + [TUNING] * bool(settings.base)
        total = sum(len(settings.alphas(name)) for name in names)
        with progress_bar("Measuring the landscape", total) as bar:
            rows = list(begun)
            for name in names:
                rows += _measure(ground, name, rows, points, bar)
        facts = {
            "model": Path(settings.model).name,
            "harmful requests": file_name(settings.harmful),
            "task rows": file_name(settings.task),
            "random directions": str(settings.directions),
            "seed": str(settings.seed),
        }
        write_landscape(work / "landscape.html", facts["model"], rows, facts)
        work.rename(output)
    return rows


def _rows_of(settings: LandscapeSettings, work: Path) -> list[Row]:
    """Returns what an earlier run with these settings has measured."""
    if not (work / "run.json").exists() or not (work / "landscape.csv").exists():
        return []
    refuse_other_settings(work, dataclasses.asdict(settings))
    with (work / "landscape.csv").open(newline="", encoding="utf-8") as file:
        rows = [
            row | {name: float(row[name]) if row[name] else None for name in COLUMNS[1:]}
            for row in csv.DictReader(file)
            if row["task_loss"] is not None  # else its line was cut off
        ]
    _append(work / "landscape.csv", rows, anew=True)
    console.print(f"Going on after {len(rows)} points in {work}")
    return rows


class _Ground:
    """The model, and what it is asked."""

    def __init__(self, settings: LandscapeSettings) -> None:
        self.settings = settings
        # Files first: a mistake in them shows before a large model is loaded.
        self.requests = requests_to_ask(settings.harmful, "harmful")
        self.model, self.tokenizer = self._load(settings.model)
        self.task_rows = None
        if settings.task is not None:
            self.task_rows = load_task_dataset(settings.task, self.tokenizer, settings.max_length)
        self.safety_rows = None
        if settings.safety is not None:
            self.safety_rows = load_safety_dataset(
                settings.safety, self.tokenizer, settings.max_length
            )
        self.parameters: list[Tensor] = list(self.model.parameters())
        if settings.base is not None:
            self._base(settings.base)  # now, not when all else has been measured

    def _load(self, name: str) -> tuple[nn.Module, Any]:
        # In fp32, where moving to and fro does not wear the direction away.
        model, tokenizer = load_model(
            name, "fp32", trust_remote_code=self.settings.trust_remote_code
        )
        if getattr(model, "is_quantized", False):
            raise UserError(f"--model {name}: its weights are quantized and cannot be moved")
        if hasattr(model, "peft_config"):
            model = cast(Any, model).merge_and_unload()
        return model.requires_grad_(False), tokenizer

    def direction(self, name: str) -> list[Tensor]:
        if name == SAFETY:
            return as_long_as(self._safety_gradient(), self.parameters)
        if name == TUNING:
            return self._tuning()
        number = int(name.removeprefix("random "))
        return random_direction(self.parameters, self.settings.seed + number)

    def _safety_gradient(self) -> list[Tensor]:
        assert self.safety_rows is not None
        collate = SafetyCollator(padding_token_id(self.tokenizer))
        rows, size = self.safety_rows, self.settings.batch_size
        device = self.parameters[0].device
        self.model.eval()
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        for start in range(0, len(rows), size):
            given = [rows[k] for k in range(start, min(start + size, len(rows)))]
            pairs = {
                kind: {name: tensor.to(device) for name, tensor in batch.items()}
                for kind, batch in collate(given).items()
            }
            loss = contrastive_loss(self.model, pairs["chosen"], pairs["rejected"])
            (loss * len(given) / len(rows)).backward()
        gradients = [
            torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in self.parameters
        ]
        for parameter in self.parameters:
            parameter.grad = None
            parameter.requires_grad_(False)
        return gradients

    def _base(self, name: str) -> list[Tensor]:
        """Returns the parameters of the base model in the order of this model's."""
        try:
            base = dict(self._load(name)[0].named_parameters())
        except UserError as error:
            raise UserError(str(error).replace("--model", "--base", 1)) from error
        mine = dict(self.model.named_parameters())
        for parameter in mine:
            if parameter not in base or base[parameter].shape != mine[parameter].shape:
                raise UserError(
                    f"--base {name}: its parameters are not those of {self.settings.model}: "
                    f"{parameter} differs"
                )
        return [base[parameter] for parameter in mine]

    def _tuning(self) -> list[Tensor]:
        """Returns W − W_base, as it is: its length is what the tuning did."""
        assert self.settings.base is not None
        pairs = zip(self._base(self.settings.base), self.parameters, strict=True)
        # In the place of the base's own weights: no third copy.
        return [base.neg_().add_(parameter) for base, parameter in pairs]

    def look(self, alpha: float) -> Row:
        prompts = [request.prompt for request in self.requests]
        size = self.settings.batch_size
        openings = generate_openings(self.model, self.tokenizer, prompts, batch_size=size)
        refused = bootstrap_interval([is_refusal(opening) for opening in openings])
        loss: float | None = None
        if self.task_rows is not None:
            measured = evaluate_model(
                self.model, self.tokenizer, task_rows=self.task_rows, batch_size=size
            )
            loss = measured.task_loss
        return {
            "alpha": alpha,
            "refused_harmful": refused.mean,
            "low": refused.low,
            "high": refused.high,
            "task_loss": loss,
        }


def _measure(ground: _Ground, name: str, rows: list[Row], path: Path, bar: Bar) -> list[Row]:
    """Measures what of a direction is missing, adding row by row to the file at `path`."""
    alphas = ground.settings.alphas(name)
    done = {row["alpha"] for row in rows if row["direction"] == name}
    bar.advance(sum(alpha in done for alpha in alphas))
    missing = [alpha for alpha in alphas if alpha not in done]
    itself = next((row for row in rows if row["alpha"] == 0), None)
    if not missing:
        return []

    def look(alpha: float) -> Row:
        # The model itself is the same point of every direction.
        seen = itself if alpha == 0 and itself is not None else ground.look(alpha)
        row = {**seen, "direction": name}
        _append(path, [row], anew=not path.exists())
        bar.advance()
        return row

    with _described(bar, name):
        return along(ground.parameters, ground.direction(name), missing, look)


def _append(path: Path, rows: Sequence[Row], *, anew: bool) -> None:
    with path.open("w" if anew else "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if anew:
            writer.writeheader()
        writer.writerows(rows)


@contextmanager
def _described(bar: Bar, name: str) -> Iterator[None]:
    bar.note(name)
    yield
    bar.note("")
