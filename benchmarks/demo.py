"""The main job on a real model: what benign fine-tuning does to safety, and what keeps it.

SmolLM2-135M-Instruct is aligned, fine-tuned on Alpaca rows with AdamW, with blending and with
FusedSAP, and every model is asked harmful requests that none was trained on. `make demo` runs it;
interrupted, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import assets
from benchmarks.alignment import aligned_smollm2, write_rows
from benchmarks.provenance import ROOT, provenance
from sap_fast.cli.compare import compare
from sap_fast.cli.console import show_warnings
from sap_fast.cli.evaluate import EvaluationFiles
from sap_fast.cli.settings import BLENDING_WEIGHT, FinetuneSettings
from sap_fast.data import build_safety_pair
from sap_fast.reports.report import ReportRun, results_table

#: Alpaca rows: the first 200 were used for alignment.
TRAINED, HELD_OUT = slice(200, 800), slice(939, 999)
#: AdvBench rows: 0–199 for training, 300–519 for what is reported.
SAFETY_PAIRS, TESTED = slice(0, 200), slice(300, 520)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the demo.

    Args:
        arguments: of the command line; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="steps of each fine-tuning (20)")
    parser.add_argument("--seed", type=int, default=0, help="of the fine-tuning (0)")
    parser.add_argument("--harmful", type=int, default=80, help="harmful requests to ask (80)")
    parser.add_argument("--harmless", type=int, default=40, help="harmless requests to ask (40)")
    parser.add_argument(
        "--blend",
        type=float,
        default=BLENDING_WEIGHT,
        help=f"weight of the gradient blending ({BLENDING_WEIGHT})",
    )
    parser.add_argument(
        "--safety-level",
        help="of blending and probe: auto, always (at every step) or a number; by default auto for "
        "blending and always for SAP",
    )
    parser.add_argument("--precision", default="fp32", help="fp32, bf16-mixed or bf16 (fp32)")
    parser.add_argument("--output", type=Path, help="folder (runs/demo-STEPS-SEED)")
    parser.add_argument("--csv", type=Path, help="also append the results to this CSV file")
    options = parser.parse_args(arguments)

    show_warnings()
    console = Console()
    assets.print_licenses()
    shipped = assets.smollm2_folder()
    aligned = aligned_smollm2()
    output = options.output or ROOT / "runs" / f"demo-{options.steps}-{options.seed}"

    requests = assets.harmful_requests()
    tested, dropped = assets.without_near_duplicates(requests[TESTED], requests[SAFETY_PAIRS])
    console.print(
        f"Harmful requests: {len(tested)} held out ({dropped} near-duplicates of training requests "
        f"dropped), {options.harmful} of them asked"
    )
    data = output / "data"
    alpaca = assets.alpaca_rows()
    pairs = [build_safety_pair(r, index) for index, r in enumerate(requests[SAFETY_PAIRS])]
    files = EvaluationFiles(
        task=write_rows(data / "held-out.jsonl", alpaca[HELD_OUT]),
        harmful=write_rows(data / "harmful.jsonl", as_prompts(tested, options.harmful)),
        harmless=write_rows(
            data / "harmless.jsonl", as_prompts(assets.harmless_requests(), options.harmless)
        ),
        max_length=128,
    )
    settings = FinetuneSettings(
        model=str(aligned),
        task=write_rows(data / "alpaca.jsonl", alpaca[TRAINED]),
        safety=write_rows(data / "safety-pairs.jsonl", pairs),
        output=str(output),
        lora_r=8,
        lora_alpha=16,
        max_steps=options.steps,
        batch_size=8,
        learning_rate=1e-3,
        lr_schedule="constant",
        max_length=128,
        precision=options.precision,
        safety_level=options.safety_level,
        log_every=1,
        save_every=10,
        seed=options.seed,
    )
    others = {
        "Shipped": ("SmolLM2-135M-Instruct as published", str(shipped)),
        "Aligned": ("taught to refuse; what the runs below start from", str(aligned)),
    }
    info, runs = compare(settings, files, blend=options.blend, others=others)
    if options.csv is not None:
        append_results(options.csv, runs, steps=options.steps, seed=options.seed)
    console.print(results_table(runs, info.baseline))
    console.print(f"Report: {output / 'report.html'}", soft_wrap=True)


def as_prompts(requests: list[str], count: int) -> list[dict[str, Any]]:
    """Return `count` requests spread evenly over the list, as rows."""
    count = min(count, len(requests))
    return [{"prompt": requests[k * len(requests) // count]} for k in range(count)]


def append_results(path: Path, runs: list[ReportRun], **settings: Any) -> None:
    """Append one row per model to a CSV file that names device, versions and commit."""
    rows = []
    for run in runs:
        row: dict[str, Any] = {"model": run.name} | settings
        row["task_loss"] = run.measure("task_loss")
        for measure in ("refused_harmful", "margin", "refused_harmless"):
            interval = run.measure(measure)
            row |= {measure: interval["mean"]}
            row |= {f"{measure}_{end}": interval[end] for end in ("low", "high", "count")}
        row |= {"step_seconds": run.step_seconds, "peak_bytes": run.peak_bytes}
        rows.append(row | provenance())
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
