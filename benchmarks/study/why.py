"""What the probe does to the gradient, beside what blending does: why one costs task loss.

Both make the update lean away from the harmful direction ĝ: ⟨ĝ, g⟩ rises. Blending adds a multiple
of ĝ, the smallest change Δg that does so. The probe changes g by M·V, M the mixed second
derivative, which has parts in other directions as well. Along plain fine-tuning this measures the
lean ⟨ĝ, Δg⟩, the size ‖Δg‖ and their ratio, the cosine of Δg and ĝ, for several sizes of the probe
and for a random probe; and what is left of the lean in an update, and on other safety pairs, beside
what is left of a blending's that leans as much:

    after_adamw = ⟨ĝ, D⁻¹Δg⟩ / (⟨ĝ, Δg⟩·⟨ĝ, D⁻¹ĝ⟩), D the root of AdamW's second moment
    other_pairs = ⟨ĝ′, Δg⟩ / (⟨ĝ, Δg⟩·⟨ĝ′, ĝ⟩), ĝ′ the direction of other pairs

There is no dropout: gradients differ by the probe alone.

`python -m benchmarks.study.why` writes `why.csv`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.alignment import aligned_smollm2, write_rows
from benchmarks.provenance import ROOT
from benchmarks.provenance import write_rows as write_csv
from benchmarks.study.data import load_task, safety_pairs
from benchmarks.study.methods import TRAINING
from benchmarks.study.runs import WORK, encoded
from sap_fast import FusedSAP, ProbeSet, contrastive_loss, ops, task_loss
from sap_fast.cli.models import add_lora, load_model
from sap_fast.data import SafetyCollator, TaskCollator, load_safety_dataset, padding_token_id

Row = dict[str, Any]

SIZES = (3e-4, 1e-3, 3e-3, 1e-2)
LOOK_EVERY = 8
#: Safety pairs of a direction.
PAIRS = 16


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the joint norm."""
    return ops.sum_squares(list(tensors)).sqrt().item()


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the joint inner product."""
    return ops.dot(list(left), list(right)).item()


def measure(steps: int) -> list[Row]:
    """Fine-tune plainly, and look at the gradients with and without a probe now and then."""
    torch.manual_seed(0)
    model, tokenizer = load_model(str(aligned_smollm2()), "fp32", trainable=True)
    model = add_lora(
        model,
        r=TRAINING["lora_r"],
        alpha=TRAINING["lora_alpha"],
        dropout=0.0,
        targets=None,
    ).train()
    task, pad = load_task("alpaca"), padding_token_id(tokenizer)
    rows = encoded("alpaca-why", task.trained, tokenizer, task.max_length)
    pairs_file = write_rows(WORK / "data" / "why-pairs.jsonl", safety_pairs(140))
    pairs = load_safety_dataset(pairs_file, tokenizer, task.max_length)
    collate, pair = TaskCollator(pad), SafetyCollator(pad)
    trained = [p for p in model.parameters() if p.requires_grad]
    probes = ProbeSet(model)
    sap = FusedSAP(trained, probes, lr=0.0, probe_lr=1.0, keep_direction=True)
    plain = torch.optim.AdamW(trained, lr=TRAINING["learning_rate"], weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    found: list[Row] = []
    for step in track(range(steps), "Looking at gradients"):
        picked = torch.randint(len(rows), (TRAINING["batch_size"],), generator=generator).tolist()
        batch = collate([rows[k] for k in picked])
        shuffled = torch.randperm(len(pairs), generator=generator).tolist()
        safety, other = (
            pair([pairs[k] for k in shuffled[first : first + PAIRS]]) for first in (0, PAIRS)
        )

        def task_backward(batch: dict[str, Tensor] = batch) -> Tensor:
            loss = task_loss(model, batch)
            loss.backward()
            return loss.detach()

        def safety_backward(safety: dict[str, Any]) -> Tensor:
            loss = contrastive_loss(model, safety["chosen"], safety["rejected"])
            loss.backward()
            return loss.detach()

        if step % LOOK_EVERY == LOOK_EVERY - 1:
            roots = [moment_root(plain, parameter) for parameter in trained]
            directions = partial(safety_backward, safety), partial(safety_backward, other)
            found += look(step, sap, probes, trained, roots, task_backward, *directions)
        plain.zero_grad()
        task_backward()
        torch.nn.utils.clip_grad_norm_(trained, TRAINING["max_grad_norm"])
        plain.step()
    return found


def moment_root(optimizer: torch.optim.AdamW, parameter: torch.nn.Parameter) -> Tensor:
    """Return what AdamW divides the gradient of a parameter by: √v̂ + ε."""
    state, group = optimizer.state[parameter], optimizer.param_groups[0]
    unbiased = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])
    return unbiased.sqrt() + group["eps"]


def shares_of_blending(
    change: list[Tensor], direction: list[Tensor], elsewhere: list[Tensor], roots: list[Tensor]
) -> tuple[float, float]:
    """Return `after_adamw` and `other_pairs` of a change of the gradient: 1 is blending's.

    Args:
        change: Δg.
        direction: ĝ.
        elsewhere: ĝ′.
        roots: the diagonal of D.
    """
    lean = inner(direction, change)
    scaled_change, scaled_direction = (
        [value / root for value, root in zip(values, roots, strict=True)]
        for values in (change, direction)
    )
    after_adamw = inner(direction, scaled_change) / inner(direction, scaled_direction)
    other_pairs = inner(elsewhere, change) / inner(elsewhere, direction)
    return after_adamw / lean, other_pairs / lean


def look(
    step: int,
    sap: FusedSAP,
    probes: ProbeSet,
    trained: list[torch.nn.Parameter],
    roots: list[Tensor],
    task: Callable[[], Tensor],
    safety: Callable[[], Tensor],
    other: Callable[[], Tensor],
) -> list[Row]:
    """Return a row for each probe."""

    def gradient(backward: Callable[[], Tensor]) -> list[Tensor]:
        sap.zero_grad()
        backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained]

    def unit_gradient(backward: Callable[[], Tensor]) -> list[Tensor]:
        uphill = gradient(backward)
        length = norm(uphill)
        return [g / length for g in uphill]

    def probed() -> Tensor:
        with sap.task_pass():
            return task()

    direction, elsewhere = unit_gradient(safety), unit_gradient(other)
    start = gradient(task)
    sap.zero_grad()
    if sap.needs_calibration:
        sap.calibrate_rho(task, safety)
    with sap.safety_pass():
        safety()
    for _ in sap.probe_passes():
        task()
    unit = probes.copy_offsets()
    noise = torch.Generator().manual_seed(step)
    rows = []
    for kind in ("sap", "random"):
        for size in SIZES:
            offsets = {}
            for layer, calls in unit.items():
                drawn = [torch.randn(v.shape, generator=noise) for v in calls]
                offsets[layer] = [
                    size * (v if kind == "sap" else n * (v.norm() / n.norm()))
                    for v, n in zip(calls, drawn, strict=True)
                ]
            probes.replace_offsets(offsets)
            change = [g - before for g, before in zip(gradient(probed), start, strict=True)]
            lean, moved = inner(direction, change), norm(change)
            after_adamw, other_pairs = shares_of_blending(change, direction, elsewhere, roots)
            rows.append(
                {
                    "step": step,
                    "probe": kind,
                    "probe_lr": size,
                    "slope": inner(direction, start),
                    "gradient_norm": norm(start),
                    "lean": lean,
                    "change": moved,
                    "cosine": lean / moved,
                    "after_adamw": after_adamw,
                    "other_pairs": other_pairs,
                    "rho": sap.current_rho,
                }
            )
    sap.zero_grad()
    sap.step()  # ends the step, at a learning rate of 0
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the CSV.

    Args:
        arguments: of the command line; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.why", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="of the fine-tuning (40)")
    options = parser.parse_args(arguments)
    rows = measure(options.steps)
    path = write_csv("why.csv", rows, ROOT / "benchmarks" / "study")
    table = Table("probe", "probe_lr", "⟨ĝ, g⟩/‖g‖", "lean/‖g‖", "‖Δg‖/‖g‖", "cosine of Δg and ĝ")
    table.add_column("lean after AdamW ÷ blending's")
    table.add_column("lean on other pairs ÷ blending's")
    for kind in ("sap", "random"):
        for size in SIZES:
            mine = [row for row in rows if (row["probe"], row["probe_lr"]) == (kind, size)]

            def mean(value: Callable[[Row], float], mine: list[Row] = mine) -> float:
                return sum(map(value, mine)) / len(mine)

            table.add_row(
                kind,
                f"{size:g}",
                f"{mean(lambda row: row['slope'] / row['gradient_norm']):+.3f}",
                f"{mean(lambda row: row['lean'] / row['gradient_norm']):+.3f}",
                f"{mean(lambda row: row['change'] / row['gradient_norm']):.2f}",
                f"{mean(lambda row: row['cosine']):+.3f}",
                f"{mean(lambda row: row['after_adamw']):.2f}",
                f"{mean(lambda row: row['other_pairs']):.2f}",
            )
    Console().print(table)
    Console().print(f"Written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
