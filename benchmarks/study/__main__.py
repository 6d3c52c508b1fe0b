"""Run the study, or what of it has not run yet."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from itertools import islice

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks import assets
from benchmarks.provenance import provenance
from benchmarks.study import report, results, tables
from benchmarks.study.arguments import chosen
from benchmarks.study.data import Split
from benchmarks.study.landscapes import run_landscapes
from benchmarks.study.lasting import run_lasting
from benchmarks.study.methods import (
    METHODS,
    MODELS,
    MORE_TASKS,
    SEEDS,
    TASKS,
    Run,
    Setting,
    report_runs,
    selection_runs,
)
from benchmarks.study.runs import Row, aligned, execute


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study.

    Args:
        arguments: of the command line; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description="Fine-tune an aligned model with every method and ask every result the same "
        "requests. Rows are added to benchmarks/results/study/results.csv as runs end, and what is "
        "there already is not run again: interrupt it at any time.",
    )
    parser.add_argument("--only", help="these methods: " + ",".join(METHODS))
    parser.add_argument(
        "--tasks",
        help="these tasks: "
        + ",".join(TASKS)
        + "; and, only where they are named and with settings chosen on these: "
        + ",".join(MORE_TASKS),
    )
    parser.add_argument(
        "--model",
        choices=tuple(MODELS),
        default="smollm2",
        help="the model that is aligned and tuned, with LoRA unless it ends in -full; the settings "
        "for another than smollm2 are those that were chosen for it, unless its own selection has "
        "run",
    )
    parser.add_argument("--seeds", help="these seeds: " + ",".join(map(str, SEEDS)))
    parser.add_argument(
        "--stage",
        choices=("selection", "report", "landscape", "lasting", "all", "none"),
        default="all",
        help="selection: every setting on few tasks and seeds; report: the best of each method on "
        "all; landscape: what lies around the tuned models; lasting (only where it is named): "
        "requests of another source, and what is left after plain AdamW on each reported model; "
        "none: only report.html, and the tables of README and docs, from what has run",
    )
    parser.add_argument("--limit", type=int, help="runs to make at most, in each stage")
    parser.add_argument(
        "--jobs",
        type=int,
        default=torch.get_num_threads(),
        help="runs at once, which share the threads of the CPU: by default one for each, which "
        "gets through a quarter more of them than one after the other; each takes 2 GB",
    )
    parser.add_argument(
        "--looks",
        action="store_true",
        help="ask half of the selection split half-way through each tuning as well: for a picture "
        "of refusals over steps, at a tenth of a run's time",
    )
    options = parser.parse_args(arguments)
    methods = chosen(parser, "--only", options.only, list(METHODS))
    known = [*TASKS, *MORE_TASKS]
    tasks = TASKS if options.tasks is None else chosen(parser, "--tasks", options.tasks, known)
    seeds = chosen(parser, "--seeds", options.seeds, [str(seed) for seed in SEEDS])

    if not MODELS[options.model].has_lora:
        need = [name for name in methods if METHODS[name].needs_lora]
        if options.only is not None and need:
            parser.error(
                f"--only {options.only}: {need[0]} changes an adapter, and --model "
                f"{options.model} has none"
            )
        methods = [name for name in methods if name not in need]

    def wanted(run: Run) -> bool:
        return run.method in methods and run.task in tasks and str(run.seed) in seeds

    if options.stage == "none":
        write_pages()
        return
    assets.print_licenses()
    for seed in map(int, seeds):
        aligned(options.model, seed)
    if options.stage in ("selection", "all"):
        references = ("shipped", "aligned", "adamw")
        planned = selection_runs([*references, *methods], options.model)
        everything = dict.fromkeys(run for run in planned)
        run_all("selection", filter(wanted, everything), options.jobs, options.limit, options.looks)
    if options.stage in ("report", "all"):
        planned = report_runs(settings_for(options.model), tasks, options.model)
        run_all("report", filter(wanted, planned), options.jobs, options.limit, options.looks)
    if options.stage == "lasting":
        planned = report_runs(settings_for(options.model), tasks, options.model)
        run_lasting(filter(wanted, planned), options.limit)
    if options.stage in ("landscape", "all") and options.model == "smollm2":
        run_landscapes(settings_for(options.model))
    write_pages()


def settings_for(model: str) -> dict[str, Setting]:
    """Return the setting of every method: chosen with the model itself, or else with SmolLM2."""
    of_first = results.choose_settings(results.read(results.RESULTS))
    return of_first | results.choose_settings(
        results.read(results.of_model(results.RESULTS, model))
    )


def write_pages() -> None:
    """Write the report and the tables of README and docs from the rows there are."""
    files = [results.of_model(results.RESULTS, model) for model in MODELS]
    for file in (results.FIRST / results.RESULTS.name, *files):
        folder, rows = file.parent, results.read(file)
        if results.choose_settings(rows) and any(row["split"] == "report" for row in rows):
            print(report.write_report(folder))
    tables.write_tables()


def run_all(
    split: Split, plan: Iterable[Run], jobs: int, limit: int | None, looks: bool = False
) -> None:
    """Run what of a plan has no row of a split yet, `jobs` at a time.

    Args:
        split: what the tuned models are asked.
        plan: the runs.
        jobs: processes at once. Each run has a process of its own, for its peak of memory.
        limit: runs at most.
        looks: ask the models on the way as well.
    """
    everything = list(plan)
    done = {
        (model, key)
        for model in {run.model for run in everything}
        for key in results.finished(results.read(results.of_model(results.RESULTS, model)), split)
    }
    missing = [run for run in everything if (run.model, run.key) not in done][:limit]
    waiting = iter(missing)
    threads = max(1, torch.get_num_threads() // jobs)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("time left"),
        TimeRemainingColumn(),
    )
    # A new interpreter for each: memory that a forked one shares would not be counted.
    pool = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    )
    with Progress(*columns, speed_estimate_period=3600) as progress, pool:
        name = split.capitalize()
        bar = progress.add_task(name, total=len(missing))
        running: dict[Future[tuple[Row, list[Row]]], Run] = {}
        while True:
            for run in islice(waiting, jobs - len(running)):
                running[pool.submit(execute, run, split, threads, looks)] = run
            if not running:
                break
            progress.update(
                bar, description=f"{name}: {', '.join(_title(run) for run in running.values())}"
            )
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                row, looked = future.result()
                surroundings = provenance()
                looked = [look | surroundings for look in looked]
                results.append(results.of_model(results.LOOKS, run.model), looked)
                results.append(results.of_model(results.RESULTS, run.model), [row | surroundings])
                progress.console.print(
                    f"{_title(run)}: refuses {row['refused_harmful']:.0%} of harmful and "
                    f"{row['refused_harmless']:.0%} of harmless requests, task loss "
                    f"{row['task_loss']:.3f} ({split} split; {row['run_seconds']:.0f} s)",
                    soft_wrap=True,
                )
                progress.advance(bar)


def _title(run: Run) -> str:
    setting = " ".join(f"{name}={value}" for name, value in run.values.items())
    name = run.method if run.model == "smollm2" else f"{run.model} {run.method}"
    return f"{name} {setting} {run.task} {run.seed}".replace("  ", " ")


if __name__ == "__main__":
    main()
