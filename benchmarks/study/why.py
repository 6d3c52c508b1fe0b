"""What the probe does to the gradient, beside what blending does: why one costs task loss.

Both make the update lean away from the harmful direction ĝ: ⟨ĝ, g⟩ rises. Blending adds a multiple
of ĝ, the smallest change Δg that does so. The probe changes g by M·V, M the mixed second
derivative, which has parts in other directions as well. Along plain fine-tuning this measures the
lean ⟨ĝ, Δg⟩, the size ‖Δg‖ and their ratio, the cosine of Δg and ĝ, for several sizes of the probe
and for a random probe; and what is left of the lean in an update, and on other safety pairs, beside
what is left of a blending's that leans as much:

    after_adamw = ⟨ĝ, D⁻¹Δg⟩ / (⟨ĝ, Δg⟩·⟨ĝ, D⁻¹ĝ⟩), D the root of AdamW's second moment
    other_pairs = ⟨ĝ′, Δg⟩ / (⟨ĝ, Δg⟩·⟨ĝ′, ĝ⟩), ĝ′ the direction of other pairs

A second table has the same of a probe in one layer alone, for every layer, and how much h has in
common with that of another batch: `other_batch`, their cosine under the same ĝ.

A third asks which V has its Δg along ĝ: shapes of the same size in β, the root mean square over the
layers of ‖v_j‖/(s_j√H). `normalized` and `gradient` are those of the rules; `whitened` is h by the
root of its second moments under random directions, which estimate the diagonal of MᵀM, `divided` by
the moments themselves; `three layers` is the normalized one in the layers that lean most for their
change. `best of k` bounds all of them: the cosine of ĝ and of the best combination of k changes, to
first order, which h of ĝ and then of what is left of ĝ make.

There is no dropout: gradients differ by the probe alone.

`python -m benchmarks.study.why` writes `why.csv`, `layers.csv`, `shapes.csv` and `layers.png`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.alignment import aligned_smollm2, write_rows
from benchmarks.provenance import ROOT
from benchmarks.provenance import write_rows as write_csv
from benchmarks.study.arguments import chosen
from benchmarks.study.data import load_task, safety_pairs
from benchmarks.study.methods import TRAINING
from benchmarks.study.report import draw_band
from benchmarks.study.results import FOLDER
from benchmarks.study.runs import WORK, encoded
from sap_fast import FusedSAP, ProbeSet, contrastive_loss, ops, task_loss
from sap_fast.cli.models import add_lora, load_model
from sap_fast.data import SafetyCollator, TaskCollator, load_safety_dataset, padding_token_id
from sap_fast.model.layers import find_decoder_layers

Row = dict[str, Any]
Offsets = dict[int, Tensor]

SIZES = (3e-4, 1e-3, 3e-3, 1e-2)
#: Size of a probe in one layer alone; lean and change are in proportion to it.
SIZE_OF_ONE = 3e-3
LOOK_EVERY = 8
#: Safety pairs of a direction.
PAIRS = 16
#: Of the V whose shapes are compared, and of those whose change is taken to first order.
SIZE_OF_SHAPES, SMALL = 1e-3, 3e-4
#: Random directions in each look, for the second moments of h.
DRAWN = 4
#: Changes that are combined.
COMBINED = (1, 2, 4, 8)


def norm(tensors: Sequence[Tensor]) -> float:
    """Return the joint norm."""
    return ops.sum_squares(list(tensors)).sqrt().item()


def inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Return the joint inner product."""
    return ops.dot(list(left), list(right)).item()


class Found(NamedTuple):
    """The rows of `why.csv`, `layers.csv` and `shapes.csv`."""

    sizes: list[Row]
    layers: list[Row]
    shapes: list[Row]


#: What may be asked for: the tables, by the names of their files.
TABLES = ("why", "layers", "shapes")


def measure(steps: int, tables: Sequence[str] = TABLES) -> Found:
    """Fine-tune plainly, and look at the gradients with and without a probe now and then.

    Args:
        steps: of the fine-tuning.
        tables: those of `TABLES` to return rows of.
    """
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
    layers = range(len(find_decoder_layers(model)[0]))
    optimizers = [
        FusedSAP(trained, ProbeSet(model, layers=chosen, size=1.0), lr=0.0)
        for chosen in ("middle", list(layers))
    ]
    plain = torch.optim.AdamW(trained, lr=TRAINING["learning_rate"], weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    found = Found([], [], [])
    moments: list[Offsets] = []
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
            other_batch = collate([rows[(k + 1) % len(rows)] for k in picked])
            asked = Closures(
                task_backward,
                partial(task_backward, other_batch),
                partial(safety_backward, safety),
                partial(safety_backward, other),
            )
            middle, every = optimizers
            if "why" in tables or "shapes" in tables:
                look = Look(middle, trained, roots, asked)
                if "why" in tables:
                    found.sizes.extend(look_at_sizes(step, look))
                if "shapes" in tables:
                    found.shapes.extend(look_at_shapes(step, look, moments))
                look.end()
            if "layers" in tables:
                look = Look(every, trained, roots, asked)
                found.layers.extend(look_at_layers(step, look))
                look.end()
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


class Closures(NamedTuple):
    """What can be asked for its gradient: each runs backward and returns its loss."""

    task: Callable[[], Tensor]
    other_task: Callable[[], Tensor]
    safety: Callable[[], Tensor]
    other_safety: Callable[[], Tensor]


class Look:
    """The gradients at one point of the fine-tuning, without a probe and with any.

    Args:
        sap: at a learning rate of 0; its probe set is where probes go.
        trained: the parameters.
        roots: what AdamW divides their gradients by.
        asked: what is differentiated.
    """

    def __init__(
        self,
        sap: FusedSAP,
        trained: list[torch.nn.Parameter],
        roots: list[Tensor],
        asked: Closures,
    ) -> None:
        assert sap.probes is not None
        self._sap, self._trained, self._roots, self.asked = sap, trained, roots, asked
        self._probes, self._passes = sap.probes, sap.passes
        self._passes.keeps_direction = True  # for several rounds of probe passes
        self.direction = self._unit_gradient(asked.safety)
        self._elsewhere = self._unit_gradient(asked.other_safety)
        self._start = self._gradient(asked.task)
        sap.zero_grad()
        if self._passes.calibration is None:
            self._passes.calibrate(lambda _: asked.task(), asked.safety)
        self._passes.safety_pass(asked.safety)
        #: h, and V of size 1, by layer.
        self.estimates = self.estimate(asked.task)
        self.unit = self._probes.offsets
        self._of_all = {
            "slope": inner(self.direction, self._start),
            "gradient_norm": norm(self._start),
        }

    def estimate(self, task: Callable[[], Tensor]) -> Offsets:
        """Return h of a task loss under the direction of this look, by layer."""
        self._passes.probe_passes(lambda _: task())
        return {layer: h.clone() for layer, h in self._probes.estimates.items()}

    def _gradient(self, backward: Callable[[], Tensor]) -> list[Tensor]:
        self._sap.zero_grad()
        backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self._trained]

    def _unit_gradient(self, backward: Callable[[], Tensor]) -> list[Tensor]:
        uphill = self._gradient(backward)
        length = norm(uphill)
        return [g / length for g in uphill]

    def estimate_under(self, direction: Sequence[Tensor]) -> Offsets:
        """Return h under another direction than that of this look, which it takes the place of."""

        def instead() -> Tensor:
            for parameter, value in zip(self._trained, direction, strict=True):
                parameter.grad = value.clone()
            return torch.zeros(())

        self._passes.safety_pass(instead)
        return self.estimate(self.asked.task)

    def sized(self, offsets: Offsets, size: float) -> Offsets:
        """Return V at a size β: the root mean square over the layers of ‖v_j‖/(s_j√H)."""
        parts = [v.norm() / self.unit[layer].norm() for layer, v in offsets.items()]
        length = torch.stack(parts).square().mean().sqrt()
        return {layer: size / length * v for layer, v in offsets.items()}

    def slope(self, offsets: Offsets) -> list[Tensor]:
        """Return M·V up to a factor: Δg of a small V, halved with that of −V."""
        up = self._gradient_under(self.sized(offsets, SMALL))
        down = self._gradient_under(self.sized(offsets, -SMALL))
        return [(a - b) / 2 for a, b in zip(up, down, strict=True)]

    def _gradient_under(self, offsets: Offsets) -> list[Tensor]:
        def probed() -> Tensor:
            with self._passes.task_pass():
                return self.asked.task()

        self._probes.offsets = offsets
        return self._gradient(probed)

    def under(self, offsets: Offsets) -> Row:
        """Return what the probe V makes of the gradient."""
        probed = self._gradient_under(offsets)
        change = [g - before for g, before in zip(probed, self._start, strict=True)]
        lean, moved = inner(self.direction, change), norm(change)
        after_adamw, other_pairs = shares_of_blending(
            change, self.direction, self._elsewhere, self._roots
        )
        return self._of_all | {
            "lean": lean,
            "change": moved,
            "cosine": lean / moved,
            "after_adamw": after_adamw,
            "other_pairs": other_pairs,
            "rho": self._passes.rho,
        }

    def end(self) -> None:
        """End the step, at a learning rate of 0."""
        self._sap.zero_grad()
        self._sap.step()


def look_at_sizes(step: int, look: Look) -> list[Row]:
    """Return a row for SAP's probe and one for a random probe, of each size."""
    noise = torch.Generator().manual_seed(step)
    rows = []
    for kind in ("sap", "random"):
        for size in SIZES:
            offsets = {}
            for layer, v in look.unit.items():
                drawn = torch.randn(v.shape, generator=noise)
                offsets[layer] = size * (v if kind == "sap" else drawn * (v.norm() / drawn.norm()))
            rows.append({"step": step, "probe": kind, "probe_lr": size} | look.under(offsets))
    return rows


def look_at_layers(step: int, look: Look) -> list[Row]:
    """Return a row for every layer, with a probe in it alone."""
    other_estimates = look.estimate(look.asked.other_task)
    rows = []
    for layer in look.unit:
        offsets = {
            other: SIZE_OF_ONE * v if other == layer else torch.zeros_like(v)
            for other, v in look.unit.items()
        }
        h, other_h = look.estimates[layer], other_estimates[layer]
        other_batch = torch.nn.functional.cosine_similarity(h.flatten(), other_h.flatten(), dim=0)
        rows.append(
            {"step": step, "layer": layer, "probe_lr": SIZE_OF_ONE}
            | look.under(offsets)
            | {"other_batch": other_batch.item()}
        )
    return rows


def look_at_shapes(step: int, look: Look, moments: list[Offsets]) -> list[Row]:
    """Return a row for every shape of V, and one for every bound.

    Args:
        step: the seed of the random directions.
        look: what to look at.
        moments: the squares of h under the random directions of the looks before; gets more.
    """
    h, normalized = look.estimates, look.unit
    shapes = {"normalized": normalized, "gradient": h}
    alone = {}
    for layer, v in normalized.items():
        only = {other: v if other == layer else torch.zeros_like(v) for other in normalized}
        alone[layer] = look.under(look.sized(only, SIZE_OF_SHAPES))["cosine"]
    leaning = sorted(alone, key=lambda layer: alone[layer])[-3:]
    shapes["three layers"] = {
        layer: v if layer in leaning else torch.zeros_like(v) for layer, v in normalized.items()
    }
    noise = torch.Generator().manual_seed(step)
    for _ in range(DRAWN):
        drawn = [torch.randn(d.shape, generator=noise) for d in look.direction]
        moments.append({layer: v.square() for layer, v in look.estimate_under(drawn).items()})
    for name, power in (("whitened", 0.5), ("divided", 1.0)):
        shapes[name] = {
            layer: v / torch.stack([each[layer] for each in moments]).mean(dim=0) ** power
            for layer, v in h.items()
        }
    rows = [
        {"step": step, "shape": name} | look.under(look.sized(v, SIZE_OF_SHAPES))
        for name, v in shapes.items()
    ]
    unknown = dict.fromkeys(rows[0])
    for count, cosine in enumerate(cosines_of_combinations(look, max(COMBINED)), 1):
        if count in COMBINED:
            rows.append(unknown | {"step": step, "shape": f"best of {count}", "cosine": cosine})
    return rows


def cosines_of_combinations(look: Look, count: int) -> list[float]:
    """Return the cosine of ĝ and of the best combination of 1, 2, … changes, to first order.

    The changes are those of h of ĝ and then, each time, of what of ĝ they do not span yet: Golub
    and Kahan's way to the least squares of M·V = ĝ, in the units of β.
    """
    reached: list[list[Tensor]] = []
    left, cosines = look.direction, []
    for _ in range(count):
        h = look.estimate_under(left)
        change = look.slope({j: v * look.unit[j].norm().square() for j, v in h.items()})
        for _ in range(2):  # twice is enough for orthogonality
            for other in reached:
                change = without(change, other)
        length = norm(change)
        reached.append([part / length for part in change])
        left = without(left, reached[-1])
        cosines.append(max(0.0, 1 - norm(left) ** 2) ** 0.5)
    return cosines


def without(values: Sequence[Tensor], unit: Sequence[Tensor]) -> list[Tensor]:
    """Return what of `values` is orthogonal to a unit vector."""
    along = inner(values, unit)
    return [value - along * part for value, part in zip(values, unit, strict=True)]


def draw_layers(rows: Sequence[Row], path: Path) -> None:
    """Draw what a probe in one layer alone does, over the layers; bands reach from look to look."""
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    style = {"marker": "o", "markersize": 3}
    layers = sorted({row["layer"] for row in rows})
    for panel, label, value in zip(
        panels,
        ("÷ length of the gradient", "cosine of Δg and ĝ", "cosine of h with another batch's"),
        (
            lambda row: row["lean"] / row["gradient_norm"],
            lambda row: row["cosine"],
            lambda row: row["other_batch"],
        ),
        strict=True,
    ):
        values = {j: [value(row) for row in rows if row["layer"] == j] for j in layers}
        name = "lean" if panel is panels[0] else None
        draw_band(panel, values, color="C0", label=name, **style)
        panel.set(xlabel="layer with the probe", ylabel=label)
        panel.axhline(0, color="0.6", linewidth=0.8)
    change = {
        j: [row["change"] / row["gradient_norm"] for row in rows if row["layer"] == j]
        for j in layers
    }
    draw_band(panels[0], change, color="C1", label="change ‖Δg‖", **style)
    panels[0].legend(frameon=False)
    figure.suptitle(f"A probe of β = {SIZE_OF_ONE:g} in one layer alone")
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the CSV.

    Args:
        arguments: of the command line; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.why", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="of the fine-tuning (40)")
    parser.add_argument("--tables", default=",".join(TABLES), help="which to write (%(default)s)")
    options = parser.parse_args(arguments)
    tables = chosen(parser, "--tables", options.tables, TABLES)
    found = measure(options.steps, tables)
    if "why" in tables:
        write_csv("why.csv", found.sizes, FOLDER)
        Console().print(table_of_sizes(found.sizes))
    if "layers" in tables:
        path = write_csv("layers.csv", found.layers, FOLDER)
        draw_layers(found.layers, path.with_suffix(".png"))
    if "shapes" in tables:
        write_csv("shapes.csv", found.shapes, FOLDER)
        Console().print(table_of_shapes(found.shapes))
    Console().print(f"Written to {FOLDER.relative_to(ROOT)}: {', '.join(tables)}")


def table_of_sizes(rows: Sequence[Row]) -> Table:
    """Return the means over the looks, by probe and size."""
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
    return table


def table_of_shapes(rows: Sequence[Row]) -> Table:
    """Return the cosine of Δg and ĝ over the looks, by the shape of V."""
    table = Table("shape of V", "cosine of Δg and ĝ: mean", "least", "most")
    for shape in dict.fromkeys(row["shape"] for row in rows):
        cosines = [row["cosine"] for row in rows if row["shape"] == shape]
        found = (sum(cosines) / len(cosines), min(cosines), max(cosines))
        table.add_row(shape, *(f"{cosine:.3f}" for cosine in found))
    return table


if __name__ == "__main__":
    main()
