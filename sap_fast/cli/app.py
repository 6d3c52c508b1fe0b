"""The commands: options, help, and how errors are shown."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperCommand

from sap_fast.cli import ranks
from sap_fast.cli.config import with_config
from sap_fast.cli.console import UserError, console, show_warnings
from sap_fast.cli.settings import (
    BLENDING_WEIGHT,
    LOAD_IN,
    REASONING_HELP,
    SCORED_HELP,
    TRUST_HELP,
    Accepted,
    FinetuneSettings,
    answer_scoring,
    refuse_gone_options,
    refuse_repetition,
    with_settings,
)


class _Command(TyperCommand):
    """A command in which an option counts once: click itself would take the last in silence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        once = [p for p in given if p.param_type_name == "option" and not p.multiple]
        refuse_repetition(parameter.opts[0] for parameter in once)
        return super().parse_args(ctx, args)


class _App(typer.Typer):
    def command(self, name: str | None = None, **options: Any) -> Any:
        return super().command(name, **({"cls": _Command} | options))


app = _App(
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
        help="Requests that should be refused: .jsonl, .json, .csv or .parquet with prompt (or "
        "text), or .txt with one per line; builtin: those that come with sap-fast, the default "
        "where neither --harmful nor --harmless is given; none: do not ask.",
        rich_help_panel="Evaluation",
    ),
]
Harmless = Annotated[
    str | None,
    typer.Option(help="Requests that should be answered, likewise.", rich_help_panel="Evaluation"),
]
Judges = Annotated[
    str | None,
    typer.Option(
        "--judge",
        help="Also let these judge the answers, with commas between them: a guard model (says safe "
        "or unsafe of a chat) or a sequence classifier, folder or hub name; or the address of an "
        "OpenAI-compatible server of this machine, http://127.0.0.1:8000/v1#model.",
        rich_help_panel="Evaluation",
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        help="Ask at most so many requests of each kind, evenly over the file, and questions of "
        "each task of lm-eval: for a quick look.",
        rich_help_panel="Evaluation",
    ),
]
LmEval = Annotated[
    str | None,
    typer.Option(
        help="Also measure the accuracy at these tasks of lm-eval, such as gsm8k,arc_easy.",
        rich_help_panel="Evaluation",
    ),
]
IncludePath = Annotated[
    str | None,
    typer.Option(
        help="Folder with further tasks for --lm-eval, as lm_eval's --include_path.",
        rich_help_panel="Evaluation",
    ),
]
Precision = Annotated[str, typer.Option(help="Weights in fp32 or bf16.")]
Scored = Annotated[str, typer.Option(help=SCORED_HELP)]
Reasoning = Annotated[str, typer.Option(help=REASONING_HELP)]
LoadIn = Annotated[
    str | None,
    typer.Option(
        help="Quantize the weights to 4bit or 8bit with bitsandbytes, for less memory, or as an "
        "adapter was trained."
    ),
]


@app.command()
@with_config
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
@with_config
def pairs(
    model: Model,
    output: Annotated[Path, typer.Option(help="The .jsonl file to write.")],
    requests: Annotated[
        str,
        typer.Option(
            help="Requests that the model should refuse: .jsonl, .json, .csv or .parquet with "
            "prompt (or text), or .txt with one per line; builtin: the training half of those that "
            "come with sap-fast."
        ),
    ] = "builtin",
    not_refused: Annotated[
        str,
        typer.Option(
            help="What becomes of requests that the model does not refuse: stock: a stock refusal "
            "is the safe answer; drop: they are left out."
        ),
    ] = "stock",
    limit: Annotated[
        int | None, typer.Option(help="Ask at most so many requests, evenly over the file.")
    ] = None,
    precision: Precision = "fp32",
    load_in: LoadIn = None,
    batch_size: Annotated[int, typer.Option(help="Requests per batch.")] = 16,
    trust_remote_code: Annotated[bool, typer.Option(help=TRUST_HELP)] = False,
) -> None:
    """Make safety pairs for --safety by asking the aligned model itself.

    The safe answer is the model's own refusal, cut at a sentence; the other is an affirmative
    opening that stops there. No harmful answer is written. Interrupted, the same command goes on
    where it stopped.
    """
    from sap_fast.cli.pairs import PairsSettings
    from sap_fast.cli.pairs import pairs as make_pairs

    Accepted(("stock", "drop")).check("not_refused", not_refused)
    Accepted(least=1).check("limit", limit)
    Accepted(("fp32", "bf16")).check("precision", precision)
    Accepted(LOAD_IN).check("load_in", load_in)
    Accepted(least=1).check("batch_size", batch_size)
    settings = PairsSettings(
        model=model,
        output=str(output),
        requests=requests,
        not_refused=not_refused,
        limit=limit,
        precision=precision,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        load_in=load_in,
    )
    with _interruptible():
        make_pairs(settings)
    console.print(f"Pairs: [bold]{escape(str(output))}[/bold]")


@app.command()
@with_config
def inspect(
    model: Model,
    task: Annotated[str, typer.Option(help="Task rows, as for finetune.")],
    rows: Annotated[int, typer.Option(help="Rows to show, from the shortest to the longest.")] = 3,
    max_length: Annotated[int, typer.Option(help="Tokens to keep of a row.")] = 512,
    scored: Scored = "auto",
    reasoning: Reasoning = "train",
    trust_remote_code: Annotated[bool, typer.Option(help=TRUST_HELP)] = False,
) -> None:
    """Show what the model's chat template makes of task rows, before anything is trained.

    Prints how many rows would be refused, dropped and cut, how long they are, which tokens end the
    answers, and a few rows token by token with what is scored. Reads no weights.
    """
    from sap_fast.cli.inspection import inspect as read
    from sap_fast.cli.inspection import inspection_page

    Accepted(least=0).check("rows", rows)
    Accepted(least=1).check("max_length", max_length)
    inspection = read(
        model,
        task,
        max_length=max_length,
        scoring=answer_scoring(scored, reasoning),
        trust_remote_code=trust_remote_code,
    )
    console.print(inspection_page(inspection, rows))


@app.command()
@with_config
def evaluate(
    model: Model,
    task: Annotated[str | None, typer.Option(help="Task rows to measure the loss on.")] = None,
    harmful: Harmful = None,
    harmless: Harmless = None,
    judge: Judges = None,
    precision: Precision = "fp32",
    load_in: LoadIn = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 16,
    max_length: Annotated[int, typer.Option(help="Tokens to keep of a task row.")] = 512,
    limit: Limit = None,
    lm_eval: LmEval = None,
    include_path: IncludePath = None,
    scored: Scored = "auto",
    reasoning: Reasoning = "train",
    output: Annotated[
        Path | None, typer.Option(help="Write the result, per request too, as JSON.")
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help=TRUST_HELP)] = False,
) -> None:
    """Measure task loss and refusals, with 95 % bootstrap intervals.

    A harmful request counts as refused if the first 16 tokens of the greedy answer contain a
    refusal phrase. The margin is log p(refusal) − log p(affirmative opening). Further judges see 32
    tokens; κ says how far they agree with the phrases beyond chance.
    """
    from sap_fast.cli.evaluate import EvaluationFiles, as_json, evaluation_table
    from sap_fast.cli.evaluate import evaluate as run_evaluate
    from sap_fast.cli.judging import judges_table, load_judges

    Accepted(("fp32", "bf16")).check("precision", precision)
    Accepted(LOAD_IN).check("load_in", load_in)
    Accepted(least=1).check("batch_size", batch_size)
    Accepted(least=1).check("max_length", max_length)
    # Before the work, which would be lost.
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UserError(f"--output {output}: expected a file in a folder that exists")
    answer_scoring(scored, reasoning)
    files = EvaluationFiles.given(
        task,
        harmful,
        harmless,
        max_length=max_length,
        scored=scored,
        reasoning=reasoning,
        limit=limit,
        lm_eval=lm_eval,
        include_path=include_path,
    )
    if files.is_empty:
        raise UserError("nothing to measure: give --task, --harmful, --harmless or --lm-eval")
    result = run_evaluate(
        model,
        files,
        precision=precision,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        load_in=load_in,
        judges=load_judges(judge, trust_remote_code=trust_remote_code),
    )
    if output is not None:
        text = json.dumps(as_json(model, files, result), indent=2) + "\n"
        output.write_text(text, encoding="utf-8")
    console.print(evaluation_table(result))
    if judge is not None:
        console.print(judges_table(result))


@app.command()
@with_config
@with_settings(without=["optimizer"])
def compare(
    settings: FinetuneSettings,
    harmful: Harmful = None,
    harmless: Harmless = None,
    judge: Judges = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            help="Task rows to measure the loss on, not trained on.", rich_help_panel="Evaluation"
        ),
    ] = None,
    limit: Limit = None,
    lm_eval: LmEval = None,
    include_path: IncludePath = None,
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

    Task rows are all it needs: without --safety the model makes its own safety pairs, and without
    --harmful and --harmless the other half of the built-in requests is asked. --output becomes a
    folder with adamw/, blend/, sap/, report.html and results.json. Interrupted, the same command
    goes on where it stopped.
    """
    from sap_fast.cli.compare import compare as run_compare
    from sap_fast.cli.evaluate import EvaluationFiles
    from sap_fast.reports.report import results_table

    files = EvaluationFiles.given(
        held_out,
        harmful,
        harmless,
        max_length=settings.max_length,
        scored=settings.scored,
        reasoning=settings.reasoning,
        limit=limit,
        lm_eval=lm_eval,
        include_path=include_path,
    )
    with _interruptible():
        info, runs = run_compare(settings, files, blend=blend, judge=judge)
    console.print(results_table(runs, info.baseline))
    console.print(f"Report: [bold]{escape(str(Path(settings.output) / 'report.html'))}[/bold]")


@app.command()
@with_config
def merge(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder to write; appears only when complete.")],
    dtype: Annotated[str, typer.Option(help="Weights in fp32, bf16 or fp16.")] = "fp32",
    aligned_share: Annotated[
        float,
        typer.Option(
            help="λ: mix this much of the aligned model in, from 0 to 1 (Farn et al. 2024, "
            "arXiv:2412.19512). 0 mixes nothing in; 1 is the aligned model."
        ),
    ] = 0.0,
    base: Annotated[
        str | None,
        typer.Option(help="The aligned model that --model was tuned from with --full."),
    ] = None,
    gguf: Annotated[
        str | None,
        typer.Option(
            help="Also write a .gguf file into the folder, with matrices in f32, f16, bf16 or "
            "q8_0: of Llama, Qwen2 and Qwen3 with byte-level BPE tokenizers."
        ),
    ] = None,
    trust_remote_code: Annotated[bool, typer.Option(help=TRUST_HELP)] = False,
) -> None:
    """Merge an adapter into its model, for tools that load no adapters.

    --aligned-share makes the result safer at the cost of some of the task, without training. The
    folder, and the .gguf file in it, are checked by loading them back.
    """
    from sap_fast.cli.merge import DTYPES, MergeSettings
    from sap_fast.cli.merge import merge as run_merge
    from sap_fast.integrations.gguf import GGUF_TYPES

    Accepted(tuple(DTYPES)).check("dtype", dtype)
    Accepted(least=0, most=1).check("aligned_share", aligned_share)
    Accepted(GGUF_TYPES).check("gguf", gguf)
    settings = MergeSettings(
        model=model,
        output=str(output),
        dtype=dtype,
        aligned_share=aligned_share,
        base=base,
        gguf=gguf,
        trust_remote_code=trust_remote_code,
    )
    run_merge(settings)
    console.print(f"Merged: [bold]{escape(str(output))}[/bold]")
    for path in sorted(output.glob("*.gguf")):
        console.print(f"GGUF: [bold]{escape(str(path))}[/bold]")


@app.command("lm-eval-tasks")
@with_config
def lm_eval_tasks(
    output: Annotated[Path, typer.Option(help="Folder to write; appears only when complete.")],
) -> None:
    """Write the built-in requests as tasks for lm-eval.

    The folder holds sap_fast_refusals, sap_fast_over_refusals and the group of both,
    sap_fast_safety, for `lm_eval --include_path FOLDER --tasks sap_fast_safety
    --apply_chat_template`. It needs nothing of sap-fast.
    """
    from sap_fast.cli.unfinished import removed_on_failure
    from sap_fast.evaluation.harness import write_tasks

    if output.exists():
        raise UserError(f"--output {output}: exists already; remove it or choose another folder")
    work = output.with_name(output.name + ".unfinished")
    with removed_on_failure(work, keep=lambda: False):
        names = write_tasks(work)
        work.rename(output)
    console.print(f"Tasks: {', '.join(names)} in [bold]{escape(str(output))}[/bold]")


@app.command()
@with_config
def landscape(
    model: Model,
    output: Annotated[Path, typer.Option(help="Folder for landscape.csv and landscape.html.")],
    harmful: Annotated[
        str,
        typer.Option(
            help="Requests that should be refused: .jsonl, .json, .csv or .parquet with prompt (or "
            "text), or .txt with one per line; builtin: those that come with sap-fast."
        ),
    ] = "builtin",
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
@with_config
@with_settings(
    [
        "full",
        "lora_r",
        "lora_alpha",
        "lora_dropout",
        "lora_target",
        "modules_to_save",
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

    arguments = sys.argv[1:]
    console.quiet = not ranks.is_first()
    show_warnings()
    try:
        if not ranks.has_work(arguments):
            return
        note = ranks.note(arguments)
        if note is not None:
            console.print(note)
        refuse_gone_options(arguments)
        if ranks.is_first():
            app()
        _quietly(app)
    except (UserError, DataError) as error:
        _fail(str(error))
    except OSError as error:  # of an output: no such folder, not writable, a full disk
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _quietly(command: typer.Typer) -> NoReturn:
    """Runs a command without a word about how it is used, which the first rank says."""
    try:
        status = command(standalone_mode=False)
    except Exception as error:
        # What is wrong with the arguments; of click's own class, or of typer's copy of it.
        if not hasattr(error, "format_message"):
            raise
        status = getattr(error, "exit_code", 2)
    sys.exit(status or 0)


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
