"""What the cost model predicts, beside what was measured, and for Llama-3 on H100s.

    python -m benchmarks.predictions     or: make cost

Checks `benchmarks.cost_model` against `step_time.csv`, `step_memory.csv` and `gpu_step-h100.csv`,
predicts a table, and writes both to `cost_model.csv`. A rate and a bandwidth, one pair per dtype,
are all that is fitted, by least squares of the relative error over `step_time.csv`. On an H100
`gpu_step-h100.csv` has measured steps of models of Llama's shapes; those predictions are compared,
too. Their bandwidth is the data sheet's, and their rate a round number that fits the largest model.

For several GPUs the batch is the same on each, and communication hides behind computation as far as
it is shorter. Stragglers and data loading are left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cost_model import (
    Cost,
    Job,
    Pass,
    Tokens,
    activation_bytes,
    head_bytes,
    layer_peak_bytes,
    lowest_layer,
    step_cost,
    step_memory,
)
from benchmarks.provenance import RESULTS, read_rows, write_rows
from benchmarks.workloads import (
    LLAMA_1B,
    LLAMA_8B,
    LLAMA_70B,
    RECIPES,
    SMOLLM2,
    SMOLLM2_SHORT,
    Lora,
    Row,
    Shape,
    label_of,
)

#: How far from what was measured a prediction may be.
TOLERANCE = 0.2

# ---- a machine ----


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a machine does per second."""

    flops: float
    bandwidth: float

    def seconds(self, cost: Cost) -> float:
        """Return the time of some work."""
        return cost.flops / self.flops + cost.bytes / self.bandwidth


def fit(costs: Sequence[Cost], seconds: Sequence[float]) -> Speed:
    """Return the rate and the bandwidth that explain measured times, by least relative squares."""
    # a·FLOPs/s + b·bytes/s = 1 in every row, solved for a = 1/rate and b = 1/bandwidth.
    x = [cost.flops / second for cost, second in zip(costs, seconds, strict=True)]
    y = [cost.bytes / second for cost, second in zip(costs, seconds, strict=True)]
    xx, yy = math.fsum(v * v for v in x), math.fsum(v * v for v in y)
    xy = math.fsum(v * w for v, w in zip(x, y, strict=True))
    sx, sy = math.fsum(x), math.fsum(y)
    determinant = xx * yy - xy * xy
    if determinant > 1e-9 * xx * yy:
        a, b = (sx * yy - sy * xy) / determinant, (sy * xx - sx * xy) / determinant
        if a > 0 and b > 0:
            return Speed(1 / a, 1 / b)
    # One of the two explains nothing here, so that it costs nothing: the other alone.
    alone = [Speed(xx / sx, math.inf), Speed(math.inf, yy / sy)]

    def error(speed: Speed) -> float:
        pairs = zip(costs, seconds, strict=True)
        return math.fsum((speed.seconds(cost) / second - 1) ** 2 for cost, second in pairs)

    return min(alone, key=error)


# NVIDIA H100 SXM5 data sheet: 989 TFLOP/s dense in bf16, 3.35 TB/s, 80 GB, and NVLink's 900 GB/s,
# of which each direction has half.
PEAK_FLOPS = 989e12
H100_BANDWIDTH = 3.35e12
H100_MEMORY = 80e9
NVLINK = 450e9
#: Share of the peak that matrix products reach while they run: with it the times of the 8B model
#: in `gpu_step-h100.csv` come out within 3 %.
UTILISATION = 0.8
H100 = Speed(UTILISATION * PEAK_FLOPS, H100_BANDWIDTH)


# ---- what was measured ----

MEASURED = {"lora": (SMOLLM2, Lora()), "full": (SMOLLM2_SHORT, None)}


def measured_job(row: Mapping[str, str]) -> Job:
    """Return the job that a row of `step_time.csv` or `step_memory.csv` measured."""
    name = label_of(row["configuration"])
    recipe = RECIPES.get(name)
    model, lora = MEASURED[row["setup"]]
    batches: dict[Pass, Tokens] = {}
    kinds: tuple[Pass, ...] = ("safety", "probe", "task")
    for kind in kinds:
        if row.get(f"{kind}_tokens"):
            columns = (f"{kind}_{what}" for what in ("tokens", "squares", "scored"))
            batches[kind] = Tokens(*(float(row[column]) for column in columns))
    return Job(
        model,
        lora,
        batches,
        direction_every=recipe.direction_every if recipe else 1,
        direction_bytes=4,  # the package kept it as it was when these were measured
        lowest_probed=lowest_layer(recipe.layers if recipe else "early", model),
        full_logits=name in ("hf_adamw", "published", "naive"),
        probe_passes=1 if name == "published" else 2,
        freezes=name != "naive",
        clips=name not in ("published", "naive"),
        torch_adamw=recipe is None,
        checkpointing=row.get("checkpointing") or "none",
        dtype=row["dtype"],
    )


def check_time(rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return predicted beside measured seconds, after fitting rate and bandwidth per dtype."""
    table = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        costs = [step_cost(measured_job(row)) for row in of_dtype]
        speed = fit(costs, [float(row["median_s"]) for row in of_dtype])
        for row, cost in zip(of_dtype, costs, strict=True):
            facts = _compared(row, "seconds", speed.seconds(cost), float(row["median_s"]))
            facts |= {"gflop": round(cost.flops / 1e9, 1), "gbyte": round(cost.bytes / 1e9, 2)}
            facts |= {"gflop_per_s": round(speed.flops / 1e9, 1)}
            table.append(facts | {"gbyte_per_s": round(speed.bandwidth / 1e9, 1)})
    return table


def check_memory(rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return predicted beside counted peaks of tensor bytes, in MB."""
    return [
        _compared(row, "peak MB", step_memory(measured_job(row)) / 1e6, float(row["tensors_mb"]))
        for row in rows
    ]


def check_gpu(rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return predicted beside measured seconds and peaks of rows of `gpu_step-h100.csv`."""
    shapes = {shape.name: shape for shape in (LLAMA_1B, LLAMA_8B, LLAMA_70B)}
    table = []
    for row in rows:
        if row["fits"] == "no":
            continue
        way, mode = WAYS[row["trained"]], row["checkpointing"]
        job = predicted_job(shapes[row["model"]], way, row["configuration"], mode)
        job = dataclasses.replace(job, direction_bytes=4)  # likewise
        facts = row | {"setup": f"{row['model']}, {row['trained']}", "dtype": job.dtype}
        seconds, peak = H100.seconds(step_cost(job)), memory_per_rank(job, 1) / 1e9
        table.append(_compared(facts, "seconds on a GPU", seconds, float(row["median_s"])))
        table.append(_compared(facts, "peak GB on a GPU", peak, float(row["peak_gb"])))
    return table


def _compared(row: Mapping[str, str], what: str, predicted: float, measured: float) -> Row:
    names = ("setup", "batch", "dtype", "configuration", "checkpointing")
    ratio = predicted / measured
    return {"kind": "checked", "what": what} | {
        **{name: row.get(name) or "" for name in names},
        "predicted": round(predicted, 4),
        "measured": round(measured, 4),
        "ratio": round(ratio, 3),
        "met": "yes" if abs(ratio - 1) <= TOLERANCE else "no",
    }


# ---- what was not ----

WAYS: dict[str, Lora | None] = {
    "LoRA r=16 q,v": Lora(16),
    "LoRA r=16 all linear": Lora(16, tuple(LLAMA_8B.projections)),
    "full": None,
}
#: Per GPU: 4 rows of 2,048 tokens of which half are scored, and 4 pairs of a prompt of 64 tokens
#: with two answers of 64, packed into one row.
TASK = Tokens(4 * 2048, 4 * 2048**2, 4 * 1024)
SAFETY = Tokens(4 * 192, (4 * 192) ** 2, 8 * 64)
OPTIMIZERS = ("AdamW", *(name for name, recipe in RECIPES.items() if recipe.layers == "early"))


def predicted_job(model: Shape, lora: Lora | None, optimizer: str, checkpointing: str) -> Job:
    """Return a job of the predicted table, or of `gpu_step-h100.csv`."""
    recipe = RECIPES.get(label_of(optimizer))
    batches: dict[Pass, Tokens] = {"task": TASK}
    if recipe is not None:
        batches["safety"] = SAFETY
    if recipe is not None and recipe.method == "sap":
        batches["probe"] = Tokens(*(recipe.rows * value for value in dataclasses.astuple(TASK)))
    return Job(
        model,
        lora,
        batches,
        direction_every=recipe.direction_every if recipe else 1,
        full_logits=optimizer == "hf_adamw",
        checkpointing=checkpointing,
        dtype="bf16",
        device="cuda",
    )


def communication_bytes(job: Job, ranks: int) -> float:
    """Return what FSDP2 sends to each rank in a step: weights gathered, gradients scattered."""
    model, share = job.model, (ranks - 1) / ranks
    gathered = 2 * model.parameters  # in bf16
    # Resharded after forward, so gathered again for backward. LoRA's gradients are next to nothing.
    passes = {
        kind: gathered * (1 + job.differentiated(kind) / model.layers) for kind in job.batches
    }
    scattered = 2 * job.trained
    total = passes["task"] + scattered
    if "safety" in passes:
        total += (passes["safety"] + scattered) / job.direction_every
    if "probe" in passes:
        total += 2 * passes["probe"]
    return share * total


def memory_per_rank(job: Job, ranks: int) -> float:
    """Return the peak on each GPU: weights, and what a step adds."""
    model, weights = job.model, job.loaded_bytes
    # Gradients, or the buffers of the perturbation, beside what stays.
    sharded = weights + job.kept_bytes + 4 * job.trained * (1 + job.blends)
    # The rest of a pass is each rank's own, the head's gradient too until it is scattered.
    own = max(activation_bytes(job, kind) + head_bytes(job, kind) for kind in job.batches)
    layer = max(layer_peak_bytes(job, kind) for kind in job.batches)
    # Two layers are whole at a time: the one that runs and the next, prefetched; and the head.
    whole = 2 * (2 * model.layer_weights + model.head_weights) if ranks > 1 else 0
    return sharded / ranks + max(own, layer) + whole


def predict() -> list[Row]:
    """Return the predicted table: Llama-3 on one and eight H100."""
    table = []
    for model in (LLAMA_8B, LLAMA_70B):
        for way, lora in WAYS.items():
            for ranks in (1, 8):
                adamw = 0.0
                for optimizer in OPTIMIZERS:
                    modes = ("none", "layers")
                    jobs = [predicted_job(model, lora, optimizer, mode) for mode in modes]
                    # Checkpointing only where it is needed to fit.
                    plain, checkpointed = jobs
                    fits = memory_per_rank(plain, ranks) <= H100_MEMORY
                    job = plain if fits else checkpointed
                    peak = memory_per_rank(job, ranks)
                    transfer = communication_bytes(job, ranks) / NVLINK if ranks > 1 else 0.0
                    seconds = max(H100.seconds(step_cost(job)), transfer)
                    adamw = adamw or seconds
                    table.append(
                        {
                            "kind": "predicted",
                            "model": model.name,
                            "trained": way,
                            "gpus": ranks,
                            "configuration": optimizer,
                            "checkpointing": job.checkpointing,
                            "step_s": round(seconds, 3),
                            "communication_s": round(transfer, 3),
                            "tokens_per_s": round(ranks * TASK.tokens / seconds),
                            "peak_gb_per_gpu": round(peak / 1e9, 1),
                            "fits": "yes" if peak <= H100_MEMORY else "no",
                            "times_adamw": round(seconds / adamw, 2),
                        }
                    )
    return table


def markdown(table: Sequence[Row]) -> str:
    """Return the predicted table for the docs."""
    columns = ("model", "trained", "gpus", "checkpointing", *OPTIMIZERS)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for start in range(0, len(table), len(OPTIMIZERS)):
        rows = table[start : start + len(OPTIMIZERS)]
        cells = [str(rows[0][column]) for column in columns[:3]]
        cells.append(", ".join(dict.fromkeys(row["checkpointing"] for row in rows)))
        for row in rows:
            if row["fits"] == "no":
                cells.append(f"{row['peak_gb_per_gpu']:.0f} GB: does not fit")
            else:
                speed = f"{row['tokens_per_s']:,} tokens/s, {row['peak_gb_per_gpu']:.0f} GB"
                cells.append(f"{speed} (× {row['times_adamw']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- the command ----


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and predict; exit status 1 where a prediction is off by more than 20 %.

    Args:
        arguments: of the command line, without the program's name; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the CSVs that are read and written"
    )
    folder = parser.parse_args(arguments).results
    # Rows of single passes name no task batch.
    tables = {
        name: [row for row in read_rows(folder / f"{name}.csv") if row.get(column)]
        for name, column in (
            ("step_time", "task_tokens"),
            ("step_memory", "task_tokens"),
            ("gpu_step-h100", "fits"),
        )
    }
    checked = check_time(tables["step_time"]) + check_memory(tables["step_memory"])
    checked += check_gpu(tables["gpu_step-h100"])
    predicted = predict()
    path = write_rows("cost_model.csv", checked + predicted, folder)

    console = Console(width=120)
    columns = ("what", "setup", "batch", "dtype", "configuration", "checkpointing")
    figures = ("predicted", "measured", "ratio", "met")
    report = Table(*columns, *figures, title="Predicted beside measured")
    for row in checked:
        report.add_row(*(str(row[column]) for column in (*columns, *figures)))
    console.print(report)
    speeds = {row["dtype"]: row for row in checked if "gflop_per_s" in row}
    for dtype, row in speeds.items():
        print(f"{dtype}: {row['gflop_per_s']} GFLOP/s and {row['gbyte_per_s']} GB/s fitted")
    missed = sum(row["met"] == "no" for row in checked)
    print(f"{missed} of {len(checked)} predictions are off by more than {TOLERANCE:.0%}\n")
    print(markdown(predicted))
    print(f"Wrote {path}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
