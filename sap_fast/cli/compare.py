"""The same fine-tuning with AdamW, with blending and with SAP, measured, and a report of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sap_fast.cli.console import UserError, console
from sap_fast.cli.evaluate import EvaluationFiles, as_json, evaluate
from sap_fast.cli.finetune import prepare
from sap_fast.cli.judging import load_judges
from sap_fast.cli.looks import requests_to_look_at
from sap_fast.cli.models import load_model, resolved_precision
from sap_fast.cli.pairs import ask_for_pairs, write_stock_pairs
from sap_fast.cli.settings import BLENDING_WEIGHT, Accepted, FinetuneSettings
from sap_fast.cli.unfinished import removed_on_failure, settings_of
from sap_fast.data import BUILTIN
from sap_fast.reports.pages import MISSING, file_name
from sap_fast.reports.report import ReportInfo, ReportRun, write_report

METHODS = {
    "adamw": ("AdamW", "plain fine-tuning"),
    "blend": ("Blending", "AdamW with the safety direction blended into the gradient, no probe"),
    "sap": ("FusedSAP", "fine-tuning under the safety probe"),
}


def compare(
    settings: FinetuneSettings,
    files: EvaluationFiles,
    *,
    blend: float = BLENDING_WEIGHT,
    judge: str | None = None,
    others: dict[str, tuple[str, str]] | None = None,
) -> tuple[ReportInfo, list[ReportRun]]:
    """Fine-tunes with each method, evaluates every model, writes `report.html` and `results.json`.

    Finished parts are kept: the same call again goes on where an interrupted one stopped. Each
    fine-tuning runs in a process of its own, so that its peak memory is its own.

    Args:
        settings: of the runs; `optimizer` is set per method, `output` is the folder of everything.
            Without `safety`, pairs are made of the requests that come with the package.
        files: what to evaluate on.
        blend: weight of the gradient blending without a probe.
        judge: further judges of the answers, as `load_judges` takes them.
        others: further models to evaluate first: name → (description, folder).

    Returns:
        What the report shows.

    Raises:
        UserError: if a run fails, or for settings that do not go together.
        DataError: for a row that cannot be used.
        OSError: for an output folder that cannot be written.
    """
    Accepted(above=0).check("blend", blend)
    files.known_tasks()  # before anything is trained
    folder = Path(settings.output)
    with removed_on_failure(folder, keep=lambda: any(map(Path.is_file, folder.rglob("*")))):
        folder.mkdir(parents=True, exist_ok=True)
        return _compare(settings, files, folder, blend, judge, others)


def _compare(
    settings: FinetuneSettings,
    files: EvaluationFiles,
    folder: Path,
    blend: float,
    judge: str | None,
    others: dict[str, tuple[str, str]] | None,
) -> tuple[ReportInfo, list[ReportRun]]:
    pairs = None
    if settings.safety in (None, BUILTIN):
        pairs = folder / "safety-pairs.jsonl"
        settings = dataclasses.replace(settings, safety=str(pairs))
    planned = planned_runs(settings, blend)
    # Every mistake shows before the first hour of work, not after it.
    files.requests()
    load_judges(judge, trust_remote_code=settings.trust_remote_code)
    tokenizer = None
    for run in planned.values():
        if not _is_finished(run):
            with TemporaryDirectory() as scratch:
                if pairs is not None and not pairs.exists():
                    stock = Path(scratch) / pairs.name
                    write_stock_pairs(stock)
                    run = dataclasses.replace(run, safety=str(stock))
                _, tokenizer = prepare(run, Path(scratch))
    if tokenizer is not None:
        files.task_rows(tokenizer)
    if pairs is not None and not pairs.exists():
        # Once for all runs, rather than in each.
        looked_at = requests_to_look_at() if settings.eval else []
        ask_for_pairs(pairs, *_asked_model(settings), without=looked_at)

    starting_point = {"Start": ("the model that was fine-tuned", settings.model)}
    runs = []
    for name, (description, model) in (others if others is not None else starting_point).items():
        evaluation = _evaluate(name, model, files, settings, folder, judge)
        runs.append(ReportRun(name, description, evaluation, [], None, None))

    record: dict[str, Any] = {}
    for method, run in planned.items():
        name, description = METHODS[method]
        if method == "blend":
            level, loss = run.held_level, run.descended_loss
            description += f" (weight {blend:g}, level: {level}, loss: {loss})"
        output = _finetune(run)
        evaluation = _evaluate(name, str(output), files, settings, folder, judge)
        record = json.loads((output / "run.json").read_text(encoding="utf-8"))
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [json.loads(line) for line in lines]
        figures = record["figures"]
        if "why_stopped" in figures:
            description += f". {figures['why_stopped']}"
        runs.append(
            ReportRun(
                name,
                description,
                evaluation,
                metrics,
                figures["step_seconds"],
                figures["peak_bytes"],
            )
        )

    info = _info(settings, files, record, pairs is not None)
    write_report(folder / "report.html", info, runs)
    results = {"info": dataclasses.asdict(info), "runs": [dataclasses.asdict(run) for run in runs]}
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return info, runs


def _asked_model(settings: FinetuneSettings) -> Any:
    return load_model(
        settings.model,
        settings.precision,
        trust_remote_code=settings.trust_remote_code,
        load_in=settings.load_in,
        attention=settings.attention,
    )


def planned_runs(settings: FinetuneSettings, blend: float) -> dict[str, FinetuneSettings]:
    """Returns the settings of the run with each method; arguments as for `compare`."""
    planned = {}
    for method in METHODS:
        changes: dict[str, Any] = {
            "optimizer": method,
            "output": str(Path(settings.output) / method),
        }
        if method == "blend":
            changes["safety_weight"] = blend
        elif not settings.safety_weight:
            changes["rule"] = "blend"  # of no use there: these runs blend nothing in
        planned[method] = dataclasses.replace(settings, **changes)
    return planned


def _finetune(settings: FinetuneSettings) -> Path:
    output = Path(settings.output)
    if _is_finished(settings):
        console.print(f"{output} is there already")
        return output
    command = [sys.executable, "-m", "sap_fast.cli", "finetune", *settings.arguments()]
    status = subprocess.run(command, check=False).returncode
    if status != 0:
        raise UserError(f"sap-fast finetune --optimizer {settings.optimizer} failed; see above")
    return output


def _is_finished(settings: FinetuneSettings) -> bool:
    output = Path(settings.output)
    record = output / "run.json"
    if not record.is_file():
        return False
    if settings_of(record) != dataclasses.asdict(settings):
        raise UserError(
            f"--output {output.parent}: {output.name} in it was run with other settings; choose "
            "another folder or remove it"
        )
    return True


def _evaluate(
    name: str,
    model: str,
    files: EvaluationFiles,
    settings: FinetuneSettings,
    folder: Path,
    judge: str | None,
) -> dict[str, Any]:
    path = folder / "evaluations" / f"{name}.json"
    if path.is_file():
        saved = json.loads(path.read_text(encoding="utf-8"))
        measured = saved["model"], saved["files"], saved.get("judge")
        if measured == (model, vars(files), judge):
            return saved["result"]
    console.print(f"Evaluating {name}")
    # Every model is measured in fp32, whatever precision it was trained in, but on the weights that
    # its adapter was trained on.
    result = evaluate(
        model,
        files,
        trust_remote_code=settings.trust_remote_code,
        load_in=settings.load_in,
        # Anew for every model: they take no memory while the next one is trained.
        judges=load_judges(judge, trust_remote_code=settings.trust_remote_code),
    )
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    saved = as_json(model, files, result) | {"judge": judge}
    unfinished.write_text(json.dumps(saved, indent=2), encoding="utf-8")
    unfinished.rename(path)
    return result.to_dict()


def _info(
    settings: FinetuneSettings, files: EvaluationFiles, record: dict[str, Any], own_pairs: bool
) -> ReportInfo:
    how = "every parameter" if settings.full else f"a LoRA adapter of rank {settings.lora_r}"
    every = settings.direction_every
    rows = {
        "model": Path(settings.model).name,
        "trained": how,
        "task rows": file_name(settings.task),
        "safety rows": "built-in requests and the model's own refusals"
        if own_pairs
        else file_name(settings.safety),
        "harmful requests": file_name(files.harmful),
        "harmless requests": file_name(files.harmless),
        "held-out task rows": file_name(files.task),
        "tasks of lm-eval": files.lm_eval or MISSING,
        "asked at most": MISSING if files.limit is None else f"{files.limit} of each",
        "batch": f"{settings.batch_size} × {settings.accumulate}"
        if settings.tokens_per_step is None
        else f"{settings.tokens_per_step} scored tokens, {settings.batch_size} rows at a time",
        "learning rate": f"{settings.learning_rate:g}",
        "seed": str(settings.seed),
        "precision": resolved_precision(settings.precision),
        "base": "as it is stored" if settings.load_in is None else f"in {settings.load_in}",
        "safety direction": "taken "
        + ("at every step" if every == 1 else f"every {every} steps")
        + f", blended in by the rule {settings.rule}",
        "probe": f"layers {settings.probe_layers}, size {settings.probe_size:g}, rule "
        f"{settings.probe_rule}, rows {settings.probe_rows:g}, rho {settings.rho}, difference "
        f"{settings.difference}",
    }
    rows |= record.get("environment", {})
    summary = [
        f"{rows['model']} was fine-tuned on {rows['task rows']} ({how}), on the same data in the "
        "same order, with plain AdamW, with blending (BlendedAdamW) and with Safety-Aware "
        "Probing (FusedSAP). Every model was then asked the same requests."
    ]
    return ReportInfo("Fine-tuning with and without SAP", summary, rows, baseline="AdamW")
