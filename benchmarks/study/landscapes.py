"""The safety landscape of the tuned models, by `sap-fast landscape` on the adapters they left."""

from __future__ import annotations

import torch

from benchmarks.alignment import aligned_smollm2, write_rows
from benchmarks.demo import as_prompts
from benchmarks.provenance import provenance
from benchmarks.study import results
from benchmarks.study.data import load_task, requests_of, safety_pairs
from benchmarks.study.methods import Setting, run_of
from benchmarks.study.runs import WORK, execute, folder_of
from sap_fast.cli.console import console
from sap_fast.cli.landscape import LandscapeSettings, landscape

METHODS = ("aligned", "adamw", "blend", "sap")
#: Requests asked and safety pairs used at every point; a point takes seconds.
ASKED, PAIRS = 40, 16


def run_landscapes(settings: dict[str, Setting]) -> None:
    """Measure what `landscape.csv` has no rows of, for seed 0 of Alpaca.

    Args:
        settings: chosen for each method.
    """
    done = {row["method"] for row in results.read(results.LANDSCAPE)}
    requests = [request.prompt for request in requests_of("report").harmful]
    harmful = write_rows(WORK / "landscape" / "harmful.jsonl", as_prompts(requests, ASKED))
    safety = write_rows(WORK / "landscape" / "pairs.jsonl", safety_pairs(PAIRS))
    alpaca = load_task("alpaca")
    task = write_rows(WORK / "landscape" / "task.jsonl", alpaca.held_out["report"])
    for method in METHODS:
        if method in done or method not in settings:
            continue
        aligned = model = aligned_smollm2(0)
        if method != "aligned":
            run = run_of(method, settings[method], 0, "alpaca")
            model = folder_of(run)
            if not model.exists():
                console.print(f"{method}: tuned again, its adapter is no longer in {model.parent}")
                execute(run, "report", torch.get_num_threads())
        rows = landscape(
            LandscapeSettings(
                model=str(model),
                harmful=harmful,
                safety=safety,
                task=task,
                base=None if method == "aligned" else str(aligned),
                output=str(WORK / "landscape" / model.name),
                directions=2,
                reach=0.15,
                points=7,
                batch_size=ASKED,
                max_length=alpaca.max_length,
            )
        )
        surroundings = provenance()
        results.append(results.LANDSCAPE, [{"method": method} | row | surroundings for row in rows])
