"""The commands: options, help, and how errors are shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from sap_fast.cli.console import UserError, console, show_warnings
from sap_fast.cli.settings import (
    BLENDING_WEIGHT,
    LOAD_IN,
    TRUST_HELP,
    Accepted,
    FinetuneSettings,
    refuse_gone_options,
    with_settings,
)

app = typer.Typer(
    name="sap-fast",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    help="Fine-tune aligned language models without losing their safety "
    "(Safety-Aware Probing, arXiv:2505.16737).",
)

Model = Annotated[str, typer.Option(help="Folder or hub name of a model, or a PEFT adapter.")]
Harmful = Annotated[
    str | None,
    typer.Option(
        help="Requests that should be refused: .jsonl, .json or .parquet with prompt (or text), or "
        ".txt with one per line.",
        rich_help_panel="Evaluation",
    ),
]
Harmless = Annotated[
    str | None,
    typer.Option(help="Requests that should be answered, likewise.", rich_help_panel="Evaluation"),
]
Precision = Annotated[str, typer.Option(help="Weights in fp32 or bf16.")]
LoadIn = Annotated[
    str | None,
    typer.Option(
        help="Quantize the weights to 4bit or 8bit with bitsandbytes, as an adapter was trained."
    ),
]


@app.command()
@with_settings()
def finetune(settings: FinetuneSettings) -> None:
    """Fine-tune a chat model and keep it safe: a LoRA adapter, or with --full every parameter.

    --optimizer blend, the default, did best in the study (docs/study.md). --optimizer sap is the
    paper's method.

    Writes --output when it is complete: the adapter or model with its tokenizer, metrics.jsonl and
    run.json. Interrupted, the same command goes on from the last checkpoint (--save-every).

    Example: `sap-fast finetune --model ./chat-model --task rows.jsonl --safety pairs.jsonl
    --output ./tuned`
    """
    from sap_fast.cli.finetune import finetune as run_finetune

    with _interruptible():
        output = run_finetune(settings)
    console.print(f"Done: [bold]{escape(str(output))}[/bold]")


@app.command()
def evaluate(
    model: Model,
    task: Annotated[str | None, typer.Option(help="Task rows to measure the loss on.")] = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    precision: Precision = "fp32",
    load_in: LoadIn = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens to keep of a task row.")] = 512,
    output: Annotated[
        Path | None, typer.Option(help="Write the result, per request too, as JSON.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help=TRUST_HELP)] = False,
) -> None:
    """Measure task loss and refusals, with 95 % bootstrap intervals.

    A harmful request counts as refused if the first 16 tokens of the greedy answer contain a
    refusal phrase. The margin is log p(refusal) − log p(affirmative opening).
    """
    from sap_fast.cli.evaluate import EvaluationFiles, as_json, evaluation_table
    from sap_fast.cli.evaluate import evaluate as run_evaluate

    if task is None and harmful is None and harmless is None:
        raise UserError("nothing to measure: give --task, --harmful or --harmless")
    Accepted(("fp32", "bf16")).check("precision", precision)
    Accepted(LOAD_IN).check("load_in", load_in)
    Accepted(least=1).check("batch_size", batch_size)
    Accepted(least=1).check("max_length", max_length)
    # Before the work, which would be lost.
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output {output}: expected a file in a folder that exists")
    files = EvaluationFiles(task, harmful, harmless, max_length)
    result = run_evaluate(
        model,
        files,
        precision=precision,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        load_in=load_in,
    )
    if output is not None:
        text = json.dumps(as_json(model, files, result), indent=2) + "\n"
        output.write_text(text, encoding="utf-8")
    console.print(evaluation_table(result))


@app.command()
@with_settings(without=["optimizer"])
def compare(
    settings: FinetuneSettings,
    harmful: Harmful = None,
    harmless: Harmless = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Task rows to measure the loss on, not trained on.", rich_help_panel="Evaluation"
        ),
    ] = None,
    blend: Annotated[
        float,
        typer.Option(
            help="--safety-weight of the run that blends; the option of that name is of the one "
            "with SAP.",
            rich_help_panel="Safety direction (blend and sap)",
        ),
    ] = BLENDING_WEIGHT,
) -> None:
    """Fine-tune with AdamW, with blending and with SAP on the same data, and write a report.

    --output becomes a folder with adamw/, blend/, sap/, report.html and results.json. Interrupted,
    the same command goes on where it stopped.
    """
    from sap_fast.cli.compare import compare as run_compare
    from sap_fast.cli.evaluate import EvaluationFiles
    from sap_fast.reports.report import results_table

    files = EvaluationFiles(held_out, harmful, harmless, settings.max_length)
    with _interruptible():
        info, runs = run_compare(settings, files, blend=blend)
    console.print(results_table(runs, info.baseline))
    console.print(f"Report: [bold]{escape(str(Path(settings.output) / 'report.html'))}[/bold]")


@app.command()
def landscape(
    model: Model,
    harmful: Annotated[
        str,
        typer.Option(
            help="Requests that should be refused: .jsonl, .json or .parquet with prompt (or "
            "text), or .txt with one per line."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for landscape.csv and landscape.html.")],
    task: Annotated[str | None, typer.Option(help="Task rows to measure the loss on.")] = None,
    safety: Annotated[
        str | None,
        typer.Option(help="Preference rows: also measure along the gradient of the safety loss."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The model that --model was tuned from: also measure along the way from it."
        ),
    ] = None,
    directions: Annotated[int, typer.Option(help="Random directions.")] = 3,
    reach: Annotated[
        float, typer.Option(help="Longest step, in norms of each parameter; the paper's 0.5.")
    ] = 0.5,
    gradient_reach: Annotated[
        float,
        typer.Option(help="Longest step along the safety gradient, in norms of all weights."),
    ] = 1e-4,
    points: Annotated[int, typer.Option(help="Steps along a direction, an odd number.")] = 11,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens to keep of a task row.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the random directions.")] = 0,
    trust_remote_code: Annotated[bool, typer.Option(help=TRUST_HELP)] = False,
) -> None:
    """Show how far a model's weights can move before it stops refusing.

    Measures refusals, and with --task the task loss, along random directions, along the gradient of
    the safety loss (--safety) and along the fine-tuning (--base): Peng et al. 2024,
    arXiv:2405.17374. The weights move in place; only one direction is held beside them.
    Interrupted, the same command goes on where it stopped.
    """
    from sap_fast.cli.landscape import LandscapeSettings
    from sap_fast.cli.landscape import landscape as run_landscape
    from sap_fast.reports.landscape import landscape_table

    for name, number in (
        ("directions", directions),
        ("batch_size", batch_size),
        ("max_length", max_length),
    ):
        Accepted(least=1).check(name, number)
    Accepted(above=0).check("reach", reach)
    Accepted(above=0).check("gradient_reach", gradient_reach)
    Accepted(least=0).check("seed", seed)
    if points < 3 or points % 2 == 0:
        raise UserError(f"--points {points}: expected an odd number ≥ 3, so that one is the model")
    settings = LandscapeSettings(
        model=model,
        harmful=harmful,
        output=str(output),
        task=task,
        safety=safety,
        base=base,
        directions=directions,
        reach=reach,
        gradient_reach=gradient_reach,
        points=points,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    with _interruptible():
        rows = run_landscape(settings)
    console.print(landscape_table(rows))
    console.print(f"Page: [bold]{escape(str(output / 'landscape.html'))}[/bold]")


@app.command()
@with_settings(
    [
        "full",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target",
        "load_in",
        "trust_remote_code",
        "precision",
    ]
)
def doctor(
    settings: FinetuneSettings,
    model: Annotated[
        str | None,
        typer.Option(help="Also check, for this model, which rho survives rounding."),
    ] = None,
) -> None:
    """Show versions, devices, the backend of every operation and the reason for it."""
    import dataclasses

    from sap_fast.cli.doctor import report

    report(None if model is None else dataclasses.replace(settings, model=model))


def run() -> None:
    """Runs the command line; user errors end in one line and status 2."""
    from sap_fast.data import DataError

    show_warnings()
    try:
        refuse_gone_options(sys.argv[1:])
        app()
    except (UserError, DataError) as error:
        _fail(str(error))
    except OSError as error:  # of an output: no such folder, not writable, a full disk
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _fail(message: str) -> NoReturn:
    # Messages of other libraries may span lines.
    line = " ".join(message.splitlines())
    console.print(f"[bold red]Error:[/bold red] {escape(line)}", soft_wrap=True)
    sys.exit(2)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Says, when Ctrl-C is pressed, that the work so far is not lost."""
    try:
        yield
    except KeyboardInterrupt:
        console.print("\nInterrupted. The same command goes on from the last checkpoint.")
        raise typer.Exit(130) from None
