"""The price of leaving passes out: the V that a step uses against the V of the full step.

SmolLM2-135M-Instruct, aligned, is fine-tuned on Alpaca rows with LoRA and the `paper` preset. At
every step other optimizers look at the same weights, batch and safety pairs, find what V they would
use, and change nothing: the presets, and each of their settings alone. The figure is the cosine of
that V with the V that the full step finds there, per probed layer (`ProbeSet`'s default; the probe
rule gives each layer its own size), in the mean over layers and then over steps. 1 is the full
step; a V of random direction has 0 ± 0.04 in 576 dimensions.

Writes `presets.csv` and `presets.png`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from benchmarks import step
from benchmarks.provenance import RESULTS, write_rows
from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss
from sap_fast.data import SafetyCollator, TaskCollator
from sap_fast.optimizer import PRESETS

#: Each setting alone, and the presets, which join them.
SETTINGS: dict[str, dict[str, Any]] = {
    "direction_every=5": {"direction_every": 5},
    "probe_every=2": {"probe_every": 2, "direction_every": 2},
    **{name: {"preset": name} for name in PRESETS if name != "paper"},
}

LEARNING_RATE = 1e-3
STEPS = 60
#: The first steps are left out of the means: LoRA's B starts at zero, and so does half of ĝ.
SKIPPED = 5

Row = dict[str, Any]


class Shadow:
    """An optimizer that finds its V at every step of another one's run, and never updates.

    Args:
        model: the model that is trained.
        settings: for `FusedSAP`.
        rho: ρ.
    """

    def __init__(self, model: nn.Module, settings: dict[str, Any], rho: float) -> None:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.probes = ProbeSet(model)
        self.optimizer = FusedSAP(trained, self.probes, lr=0.0, rho=rho, **settings)

    def look(self, task: Any, safety: Any) -> dict[int, Tensor]:
        """Run the inner passes that are due, and return V by layer."""
        optimizer = self.optimizer
        if optimizer.needs_direction:
            with optimizer.safety_pass():
                safety()
        if optimizer.needs_probe:
            for _ in optimizer.probe_passes():
                task(optimizer)
        # Without a backward pass there is no gradient, and nothing is updated but counters.
        with optimizer.task_pass():
            optimizer.zero_grad()
        optimizer.step()
        return self.probes.offsets


def similarity(used: dict[int, Tensor], full: dict[int, Tensor]) -> float:
    """Return the cosine of two V per layer, in the mean over layers."""
    cosines = [torch.cosine_similarity(v, full[layer], dim=0) for layer, v in used.items()]
    return torch.stack(cosines).mean().item()


def measure(case: step.Case, steps: int, progress: Progress) -> list[Row]:
    """Train, and return one row per setting and step."""
    torch.manual_seed(0)
    model = step.build_model(case).train()
    data = step.load_data(case.max_length, case.quick)
    collate, pair = TaskCollator(data.padding), SafetyCollator(data.padding)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    probes = ProbeSet(model)
    optimizer = FusedSAP(trained, probes, lr=LEARNING_RATE, max_grad_norm=1.0)
    rows: list[Row] = []
    shadows: dict[str, Shadow] = {}
    order = torch.randperm(len(data.safety), generator=torch.Generator().manual_seed(0)).tolist()
    bar = progress.add_task(f"{case.setup} {case.batch} {case.dtype}", total=steps)
    for number, task_rows in enumerate(step.batches(data, case.rows, steps)):
        batch = collate(task_rows)
        first = number * step.SAFETY_PAIRS
        picked = [order[(first + k) % len(order)] for k in range(step.SAFETY_PAIRS)]
        pairs = pair([data.safety[index] for index in picked])

        def task(asking: FusedSAP, batch: dict[str, Tensor] = batch) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
                loss = task_loss(model, asking.probe_part(batch))
            loss.backward()
            return loss.detach()

        def safety(pairs: dict[str, dict[str, Tensor]] = pairs) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "bf16"):
                loss = contrastive_loss(model, pairs["chosen"], pairs["rejected"])
            loss.backward()
            return loss.detach()

        optimizer.zero_grad()
        if optimizer.calibration is None:
            optimizer.calibrate_rho(lambda task=task: task(optimizer), safety)
            shadows = {
                name: Shadow(model, settings, optimizer.current_rho)
                for name, settings in SETTINGS.items()
            }
        used = {name: shadow.look(task, safety) for name, shadow in shadows.items()}
        optimizer.step(lambda task=task: task(optimizer), safety)
        rows += [
            {
                **case.facts(),
                "settings": name,
                "step": number,
                "cosine": round(similarity(offsets, probes.offsets), 5),
                "rho": optimizer.current_rho,
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
        low, _, high = statistics.quantiles(cosines, n=4)
        results.append(
            dict(zip(keys, group, strict=True))
            | {"cosine": round(statistics.mean(cosines), 4)}
            | {"cosine_low": round(low, 4), "cosine_high": round(high, 4), "steps": len(cosines)}
        )
    return results


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the cosines of the steps, per setting."""
    from matplotlib import pyplot

    names = list(SETTINGS)
    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    taken = [row for row in rows if row["step"] >= SKIPPED]
    points = [[row["cosine"] for row in taken if row["settings"] == name] for name in names]
    axes.boxplot(points, orientation="horizontal", tick_labels=names, showmeans=True)
    axes.invert_yaxis()
    axes.set(
        xlim=(min(0.0, *(min(p) for p in points)), 1.0),
        xlabel="cosine of the V used with the V of the full step, mean over layers",
        title="What leaving passes out costs, per step of a real run",
    )
    axes.grid(axis="x", color="0.92")
    figure.savefig(path, dpi=180)
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, write CSV and picture, print the table.

    Args:
        arguments: of the command line; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.presets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of the run ({STEPS})")
    parser.add_argument("--dtype", default="fp32", choices=step.DTYPES, help="of the run (fp32)")
    parser.add_argument("--batch", default="4x96", choices=tuple(step.BATCHES), help="(4x96)")
    parser.add_argument("--quick", action="store_true", help="a tiny random model")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    if options.steps <= SKIPPED + 1:
        parser.error(f"--steps {options.steps}; expected at least {SKIPPED + 2}")
    case = step.Case("lora", options.batch, options.dtype, options.quick)
    torch.set_num_threads(step.THREADS)
    with Progress(console=Console(stderr=True)) as progress:
        rows = measure(case, options.steps, progress)
    results = summary(rows)
    table = Table("settings", "cosine", "quartiles", "steps")
    for row in results:
        quartiles = f"{row['cosine_low']:.3f} to {row['cosine_high']:.3f}"
        table.add_row(row["settings"], f"{row['cosine']:.3f}", quartiles, str(row["steps"]))
    Console().print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    print(f"Wrote {write_rows('presets.csv', results, options.output)}")
    draw(rows, options.output / "presets.png")


if __name__ == "__main__":
    main()
