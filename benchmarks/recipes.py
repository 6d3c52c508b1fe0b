"""What leaving work out of a step costs: the V that it uses against the V of the full step.

    python -m benchmarks.recipes        or: make recipes

SmolLM2-135M-Instruct, aligned, is fine-tuned on Alpaca rows with LoRA and SAP's defaults. At every
step other optimizers look at the same weights, batch and safety pairs, find what V they would use,
and change nothing. The figure is the cosine of that V with the V that the full step finds there,
per probed layer (`ProbeSet`'s default; the probe rule gives each layer its own size), in the mean
over layers and then over steps. 1 is the full step; a V of random direction has 0 ± 0.04 in 576
dimensions. Writes `recipes.csv` and `recipes.png`.

Rows of `recipes.csv` that are older also name settings that are gone: `probe_every=2` found V at
every second step only; `balanced` and `economical` were the two recipes.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks import pictures
from benchmarks.measuring import quartiles
from benchmarks.provenance import RESULTS, replace_rows
from benchmarks.workloads import (
    BATCHES,
    DTYPES,
    RECIPES,
    SAFETY_PAIRS,
    THREADS,
    Case,
    Recipe,
    Row,
    batches,
    trained_parameters,
)
from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss

#: Each setting alone, and the recipes, which join them.
COMPARED = {
    "direction_every=5": Recipe(direction_every=5),
    "rows=1/2": Recipe(rows=0.5),
    "rows=1/4": Recipe(rows=0.25),
    **{
        label.removeprefix("sap, "): recipe
        for label, recipe in RECIPES.items()
        if recipe.direction_every > 1
    },
}
LEARNING_RATE = 1e-3
STEPS = 60
#: The first steps are left out of the means: LoRA's B starts at zero, and so does half of ĝ.
SKIPPED = 5

Closure = Callable[..., Tensor]


def similarity(used: dict[int, Tensor], full: dict[int, Tensor]) -> float:
    """Return the cosine of two V per layer, in the mean over layers."""
    cosines = [torch.cosine_similarity(v, full[layer], dim=0) for layer, v in used.items()]
    return torch.stack(cosines).mean().item()


def look(optimizer: FusedSAP, task: Closure, safety: Closure, batch: Any) -> dict[int, Tensor]:
    """Run the inner passes that are due, and return V by layer; update nothing but counters."""
    optimizer.inner_passes(task, safety, batch)
    offsets = optimizer.probes.offsets
    with optimizer.task_pass():
        optimizer.zero_grad()
    optimizer.step()
    return offsets


def measure(case: Case, steps: int, progress: Progress) -> list[Row]:
    """Train, and return one row per setting and step."""
    torch.manual_seed(0)
    model = case.model().train()
    data = case.data()
    optimizer = FusedSAP(
        trained_parameters(model), ProbeSet(model), lr=LEARNING_RATE, max_grad_norm=1.0
    )
    rows: list[Row] = []
    lookers: dict[str, Any] = {}
    order = torch.randperm(len(data.safety), generator=torch.Generator().manual_seed(0)).tolist()
    bar = progress.add_task(f"{case.setup} {case.batch} {case.dtype}", total=steps)
    for number, task_rows in enumerate(batches(data, case.rows, steps)):
        batch = data.batch(task_rows)
        first = number * SAFETY_PAIRS
        picked = [order[(first + k) % len(order)] for k in range(SAFETY_PAIRS)]
        pairs = data.pairs([data.safety[index] for index in picked])

        def task(part: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
                loss = task_loss(model, part)
            loss.backward()
            return loss.detach()

        def safety(pairs: dict[str, dict[str, Tensor]] = pairs) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
                loss = contrastive_loss(model, pairs["chosen"], pairs["rejected"])
            loss.backward()
            return loss.detach()

        optimizer.zero_grad()
        if not lookers:
            optimizer.passes.calibrate(task, safety, batch)
            lookers = {
                name: recipe.optimizer(model, rho=optimizer.passes.rho, lr=0.0)
                for name, recipe in COMPARED.items()
            }
        used = {name: look(other, task, safety, batch) for name, other in lookers.items()}
        optimizer.step(task, safety, batch)
        rows += [
            {
                **case.facts(),
                "settings": name,
                "step": number,
                "cosine": round(similarity(offsets, optimizer.probes.offsets), 5),
                "rho": optimizer.passes.rho,
            }
            for name, offsets in used.items()
        ]
        progress.advance(bar)
    return rows


def summary(rows: Sequence[Row]) -> list[Row]:
    """Return mean, quartiles and count of the cosines by case and settings."""
    keys = ("setup", "batch", "dtype", "settings", "rho")
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        if row["step"] >= SKIPPED:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row["cosine"])
    results = []
    for group, cosines in groups.items():
        low, _, high = quartiles(cosines)
        results.append(
            dict(zip(keys, group, strict=True))
            | {"cosine": round(statistics.mean(cosines), 4)}
            | {"cosine_low": round(low, 4), "cosine_high": round(high, 4), "steps": len(cosines)}
        )
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, write CSV and picture, print the table.

    Args:
        arguments: of the command line; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.recipes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the run ({STEPS})")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES, help="of the run (fp32)")
    parser.add_argument("--batch", default="4x96", choices=tuple(BATCHES), help="(4x96)")
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.steps <= SKIPPED + 1:
        parser.error(f"--steps {options.steps}; expected at least {SKIPPED + 2}")
    case = Case("lora", options.batch, options.dtype, "tiny" if options.quick else "real")
    torch.set_num_threads(THREADS)
    with Progress(console=Console(stderr=True)) as progress:
        rows = measure(case, options.steps, progress)
    results = summary(rows)
    table = Table("settings", "cosine", "quartiles", "steps")
    for row in results:
        spread = f"{row['cosine_low']:.3f} to {row['cosine_high']:.3f}"
        table.add_row(row["settings"], f"{row['cosine']:.3f}", spread, str(row["steps"]))
    Console().print(table)
    identity = ("setup", "batch", "dtype", "settings")
    path = replace_rows("recipes.csv", results, identity, options.output)
    print(f"Wrote {path} and {pictures.draw(path)}")


if __name__ == "__main__":
    main()
