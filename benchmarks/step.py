"""A whole training step: time, memory, allocations and growth.

    python -m benchmarks.step            everything, two hours; --help for less

What is measured is written case by case, over the rows of that case only: interrupt it at any time,
and go on with --table and --only. What the tables have to satisfy is in `benchmarks.claims`.

Every configuration of `benchmarks.contenders` trains a copy of the same model on the same batches.
`lora` is SmolLM2-135M-Instruct, aligned, with LoRA (r=8, dropout 0.05) on q and v; `full` a random
Llama of 4 layers of SmolLM2's shapes and vocabulary whose parameters are all trained. Task batches
are Alpaca rows, safety batches four pairs on AdvBench. `bf16` is `TrainingArguments(bf16=True)`,
for LoRA on bf16 weights. Five tables, each a CSV:

* time: seconds of a step. All configurations run in turn in each round, starting with another one
  each time; a recipe's figure is the mean over the steps from one safety pass to the next. Ratios
  are taken within a round, and their medians reported. The passes of `sap` are timed alone too.
* rows: seconds of a step, likewise, of blending with a direction every step and every ten, and of
  SAP whose probe passes see all rows, a quarter and an eighth of them, with a direction every ten.
  `--table rows --only lora,8x128,fp32` takes ten minutes on two cores, `full` half of that.
* memory: what three steps add to the loaded model, as peak resident size of a fresh process; and
  the peak of live tensor bytes in a fourth step, with what the optimizer keeps between steps.
* allocations: parameter-sized tensors alive during a step that trains everything on 8 tokens.
* curves: time and live tensor bytes against sequence length, batch, depth and trained tensors.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import pictures
from benchmarks.claims import claims_table, ratios_table, step_claims
from benchmarks.contenders import (
    CONFIGURATIONS,
    ForwardSizes,
    PassesAlone,
    TrainerRun,
    build_run,
    start_case,
)
from benchmarks.measuring import (
    Series,
    memory_events,
    peak,
    ratio,
    reset_peak,
    resident_bytes,
    seconds_of,
    summary,
)
from benchmarks.provenance import RESULTS, ROOT, replace_rows
from benchmarks.workloads import (
    BATCHES,
    CHEAPER,
    DTYPES,
    SAFETY_PAIRS,
    SETUPS,
    THREADS,
    Case,
    Lora,
    Row,
    Shape,
    add_lora,
    batches,
    period_of,
    random_data,
    random_llama,
    recipe_of,
)

IN_MEMORY = ("hf_adamw", "floor", "blend", "sap", "sap, direction_every=5, rows=1/2")
CHEAP_STEPS = ("hf_adamw", "floor", "blend", "sap", *CHEAPER)
CHECKPOINTING = ("none", "layers")
TABLES = ("time", "rows", "memory", "allocations", "curves")

# A whole period of the recipe with the longest. The published step takes as long as all others
# together and spreads by less than 2 %, so it runs in every third round.
ROUNDS = 10
WARM_UP_ROUNDS = 2
PUBLISHED_EVERY = 3

# ---- time ----


def measure_time(
    case: Case, rounds: int, contenders: Sequence[str] = (*CONFIGURATIONS, "passes alone")
) -> list[Row]:
    """Return a row per configuration, and one per pass of `sap` alone, if that is among them."""
    start_case()
    runs = {name: build_run(case, name) for name in contenders}
    seconds: dict[str, Series] = {name: {} for name in contenders}
    all_rows = batches(case.data(), case.rows, WARM_UP_ROUNDS + rounds)
    order = list(contenders)
    for number, rows in enumerate(all_rows):
        order.append(order.pop(0))
        for name in order:
            if name == "published" and number >= WARM_UP_ROUNDS and number % PUBLISHED_EVERY:
                continue
            batch = runs[name].prepare(rows)
            if number == WARM_UP_ROUNDS:
                runs[name].sizes.steps.clear()
            seconds[name][number] = seconds_of(partial(runs[name].step, batch), "cpu")
    alone = runs.pop("passes alone", None)
    passes = alone.seconds if isinstance(alone, PassesAlone) else {}
    if isinstance(alone, PassesAlone):
        seconds["passes alone"] = dict(enumerate(alone.sums()))
    for name, values in passes.items():
        seconds[name] = dict(enumerate(values))

    table = []
    for name, series in seconds.items():
        series = {number: value for number, value in series.items() if number >= WARM_UP_ROUNDS}
        period = period_of(name)
        row = case.facts() | {"configuration": name, "period": period} | summary(series, period)
        if name not in passes:
            row |= {
                "times_hf": ratio(series, seconds["hf_adamw"], period),
                "times_floor": ratio(series, seconds["floor"], period),
                "sap_over_this": ratio(seconds["sap"], series, period),
            }
        if name in runs:
            row |= work_sizes(case, name, runs[name].sizes, all_rows[WARM_UP_ROUNDS:])
        table.append(row)
    return table


def work_sizes(case: Case, name: str, sizes: ForwardSizes, steps: Sequence[Sequence[Any]]) -> Row:
    """Return what the cost model needs to know: mean tokens, Σ S² and scored tokens by pass."""
    found: Row = {}
    for kind, forwards in sizes.by_pass().items():
        if forwards:
            found[f"{kind}_tokens"] = statistics.mean(rows * length for rows, length in forwards)
            found[f"{kind}_squares"] = statistics.mean(
                rows * length**2 for rows, length in forwards
            )
    recipe = recipe_of(name)
    part = case.rows * (1.0 if recipe is None else recipe.rows)
    answers = [len(pair) * _scored(list(pair.values())) / 2 for pair in case.data().safety]
    scored = {
        "task": statistics.mean(_scored(rows) for rows in steps),
        "probe": statistics.mean(_scored_of(rows, part) for rows in steps),
        "safety": SAFETY_PAIRS * statistics.mean(answers),
    }
    found |= {f"{kind}_scored": scored[kind] for kind in scored if f"{kind}_tokens" in found}
    return {column: round(value, 1) for column, value in found.items()}


def _scored_of(rows: Sequence[Any], part: float) -> int:
    """Return the scored tokens of the first rows; of less than one, as `ProbeSet(rows=…)` cuts."""
    if part < 1:
        return math.ceil(part * _scored(rows[:1]))
    return _scored(rows[: math.ceil(part)])


def _scored(rows: Sequence[Any]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])


# ---- memory ----


def measure_memory(case: Case, name: str, checkpointing: str) -> Row:
    """Return the row of one configuration: bytes on top of the loaded model."""
    start_case()
    torch.set_num_threads(1)  # two of these processes share two cores; no size depends on it
    data = case.data()
    model = case.model()
    gc.collect()
    loaded = resident_bytes("VmRSS")
    reset_peak()
    run = TrainerRun(name, model, data, bf16=case.dtype == "bf16", checkpointing=checkpointing)
    *first, last = batches(data, case.rows, 4)
    for rows in first:
        run.step(run.prepare(rows))
    resident = resident_bytes("VmHWM") - loaded
    # The step that is counted has to be one of those with all passes.
    while len(run.sizes.steps) % period_of(name):
        run.step(run.prepare(first[0]))
    batch = run.prepare(last)
    run.sizes.steps.clear()
    events = memory_events(partial(run.step, batch))
    kept = run.kept_bytes()
    return (
        case.facts()
        | {"configuration": name, "checkpointing": checkpointing}
        | {"resident_mb": round(resident / 1e6, 1)}
        | {"tensors_mb": round((kept + peak(events)) / 1e6, 1)}
        | {"kept_mb": round(kept / 1e6, 1)}
        | work_sizes(case, name, run.sizes, [last])
    )


def memory_in_a_process(case: Case, name: str, checkpointing: str) -> Row:
    """Run `measure_memory` in a process of its own."""
    words = [case.setup, case.batch, case.dtype, name, checkpointing]
    command = [sys.executable, "-m", "benchmarks.step", "--measure-memory", *words]
    if case.source == "tiny":
        command.append("--quick")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def measure_memories(case: Case) -> list[Row]:
    """Return a row per configuration and mode of checkpointing."""
    work = [(name, mode) for mode in CHECKPOINTING for name in IN_MEMORY]
    if case.source == "tiny":  # its tensors would drown in a process
        return [measure_memory(case, *one) for one in work]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(lambda one: memory_in_a_process(case, *one), work))


# ---- allocations ----


def measure_allocations(dtype: str, quick: bool) -> list[Row]:
    """Count live parameter-sized tensors in a step of AdamW and of SAP.

    Everything is trained, on 8 tokens, so that activations are small beside the parameters. What is
    counted are allocations of exactly the size of a parameter of at least 64 KiB: gradients,
    directions, temporaries of updates.
    """
    start_case()
    shape = Shape("wide", 1024, 8, 8, 2, 2816, 2048, tied=True)
    if quick:
        shape = Shape("less wide", 256, 4, 8, 2, 512, 512, tied=True)
    data = random_data(8, vocabulary=512, rows=8, equal=True)
    table = []
    for name in ("hf_adamw", "floor", "sap"):
        model = random_llama(shape)
        run = TrainerRun(name, model, data, bf16=dtype == "bf16", pairs=1)
        for rows in batches(data, 1, 2):
            run.step(run.prepare(rows))
        batch = run.prepare(data.task[:1])
        events = memory_events(partial(run.step, batch))
        sizes = {parameter.nbytes for parameter in model.parameters() if parameter.nbytes >= 2**16}
        events = [size for size in events if abs(size) in sizes]
        parameters = sum(parameter.nbytes for parameter in model.parameters())
        table.append(
            {
                "dtype": dtype,
                "configuration": name,
                "parameters_mb": round(parameters / 1e6, 2),
                "kept_over_parameters": round(run.kept_bytes() / parameters, 4),
                "peak_over_parameters": round(peak(events) / parameters, 4),
                "tensors_alive": peak([1 if size > 0 else -1 for size in events]),
                "parameter_tensors": sum(p.nbytes in sizes for p in model.parameters()),
            }
        )
    return table


# ---- curves ----

PROJECTIONS = ("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AXES: dict[str, Sequence[int]] = {
    "length": (64, 128, 256, 512),
    "batch": (2, 4, 8, 16),
    "depth": (4, 8, 16, 32),
    # Projections of a layer that LoRA is put on.
    "targets": (1, 2, 4, 7),
}


def measure_curves(axis: str, dtype: str, quick: bool) -> list[Row]:
    """Return rows of `floor` and `sap` along one axis; the other axes stay at 64, 4, 8, 2."""
    table: list[Row] = []
    base = {"length": 64, "batch": 4, "depth": 8, "targets": 2}
    values, repeats = AXES[axis], 1 if quick else 5
    if quick:
        base, values = {"length": 16, "batch": 2, "depth": 4, "targets": 1}, values[:2]
    for value in values:
        start_case()
        at = base | {axis: value}
        data = random_data(at["length"], vocabulary=4096, rows=64, equal=True)
        widths = (64, 128) if quick else (256, 688)
        shape = Shape("narrow", widths[0], at["depth"], 4, 2, widths[1], 4096, tied=True)
        runs = {}
        for name in ("floor", "sap"):
            model = add_lora(random_llama(shape), Lora(targets=PROJECTIONS[: at["targets"]]))
            # As many safety as task sequences, or their share would shrink along the axis.
            pairs = at["batch"] // 2
            runs[name] = TrainerRun(name, model, data, bf16=dtype == "bf16", pairs=pairs)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number, rows in enumerate(batches(data, at["batch"], WARM_UP_ROUNDS + repeats)):
            for name in sorted(runs, reverse=bool(number % 2)):
                batch = runs[name].prepare(rows)
                seconds[name].append(seconds_of(partial(runs[name].step, batch), "cpu"))
        for name, run in runs.items():
            batch = run.prepare(data.task[: at["batch"]])
            events = memory_events(partial(run.step, batch))
            table.append(
                {
                    "axis": axis,
                    "value": value,
                    "dtype": dtype,
                    "configuration": name,
                    # The least disturbed: a slope has no use for the other programs of a machine.
                    "seconds": round(min(seconds[name][WARM_UP_ROUNDS:]), 5),
                    "tensors_mb": round((run.kept_bytes() + peak(events)) / 1e6, 3),
                }
            )
    for name in ("floor", "sap"):
        rows_of = [row for row in table if row["configuration"] == name]
        for figure in ("seconds", "tensors_mb"):
            fitted = slope([row["value"] for row in rows_of], [row[figure] for row in rows_of])
            for row in rows_of:
                row[f"slope_{figure}"] = round(fitted, 3)
    return table


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of log y over log x, by least squares."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


# ---- the command ----

#: Columns of what is measured, and written, at once.
IDENTITY = {
    "time": ("setup", "batch", "dtype"),
    "rows": ("setup", "batch", "dtype"),
    "memory": ("setup", "batch", "dtype"),
    "allocations": ("dtype",),
    "curves": ("axis", "dtype"),
}


def parts(table: str, cases: Sequence[Case], quick: bool) -> Iterator[Callable[[], list[Row]]]:
    """Yield what measures a table, part by part."""
    dtypes = dict.fromkeys(case.dtype for case in cases)
    if table == "time":
        yield from (partial(measure_time, case, ROUNDS) for case in cases)
    elif table == "rows":
        yield from (partial(measure_time, case, ROUNDS, CHEAP_STEPS) for case in cases)
    elif table == "memory":
        yield from (partial(measure_memories, case) for case in cases)
    elif table == "allocations":
        yield from (partial(measure_allocations, dtype, quick) for dtype in dtypes)
    else:
        axes = list(AXES)[:2] if quick else AXES
        yield from (partial(measure_curves, a, dtype, quick) for dtype in dtypes for a in axes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write CSVs and pictures, print the claims; exit status 1 where one is not met.

    Args:
        arguments: of the command line, without the program's name; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=[*TABLES, "all"], default="all", help="what to measure")
    parser.add_argument(
        "--only",
        default="",
        metavar="WORDS",
        help="cases that have all of these words, such as lora,bf16 or full,4x96",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny random models, for trying the script: seconds"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of CSVs and pictures")
    parser.add_argument("--measure-memory", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    source = "tiny" if options.quick else "real"
    if options.measure_memory:
        *words, name, checkpointing = options.measure_memory
        print(json.dumps(measure_memory(Case(*words, source), name, checkpointing)))
        return 0

    wanted = set(options.only.split(",")) - {""}
    cases = [
        Case(setup, batch, dtype, source)
        for setup in SETUPS
        for batch in BATCHES
        for dtype in DTYPES
        if wanted <= {setup, batch, dtype}
    ]
    if not cases:
        parser.error(f"--only {options.only}: no case has these words; see --help")
    names = TABLES if options.table == "all" else (options.table,)
    todo = [(name, part) for name in names for part in parts(name, cases, options.quick)]
    tables: dict[str, list[Row]] = {name: [] for name in names}
    console = Console(width=120)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(todo))
        for name, measure in todo:
            progress.update(bar, description=name)
            rows = measure()
            tables[name] += rows
            path = replace_rows(f"step_{name}.csv", rows, IDENTITY[name], options.output)
            measured = " ".join(str(rows[0][column]) for column in IDENTITY[name])
            console.print(f"Wrote {name} of {measured} to {path}")
            if path.name in pictures.PICTURES:
                pictures.draw(path)
            progress.advance(bar)
    for name in ("time", "rows"):
        if tables.get(name):
            console.print(ratios_table(tables[name]))
    found = step_claims(tables)
    console.print(claims_table(found))
    # The figures of tiny models mean nothing.
    return 0 if options.quick or all(claim.met for claim in found) else 1


if __name__ == "__main__":
    sys.exit(main())
