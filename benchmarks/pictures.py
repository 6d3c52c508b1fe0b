"""The pictures of results, drawn from their CSVs.

python -m benchmarks.pictures       every picture of a CSV in `results/`, again
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

from benchmarks.claims import AT_LEAST, STEP_TARGETS
from benchmarks.provenance import RESULTS, read_numbers
from benchmarks.workloads import Row, label_of


def draw(path: Path) -> Path:
    """Draw what a CSV of results says, and return the path of the picture beside it."""
    picture = path.with_suffix(".png")
    figure = next(drawn for name, drawn in PICTURES.items() if path.match(name))(read_numbers(path))
    figure.savefig(picture, dpi=130)
    return picture


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


# ---- steps ----

_COLORS = {
    "hf_adamw": "#8a8a8a",
    "floor": "#b9b9b9",
    "blend": "#3b6ea5",
    "sap": "#c0532b",
    "sap, middle layers": "#d98b6a",
    "sap, direction_every=5, rows=1/2": "#d9a441",
    "sap, direction_every=10, rows=1/4": "#2a7f62",
    "published": "#5b4a8a",
    "naive": "#5b4a8a",
}


def draw_step_time(table: Sequence[Row]) -> Figure:
    """Draw, per case, each configuration's time over that of HF's AdamW."""
    cases = _distinct((row["setup"], row["batch"], row["dtype"]) for row in table)
    figure = Figure(figsize=(9, 1.8 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, sharex=True)
    for panel, case in zip(panels[:, 0], cases, strict=True):
        rows = [
            row
            for row in table
            if (row["setup"], row["batch"], row["dtype"]) == case
            and label_of(row["configuration"]) in _COLORS
        ]
        names = [label_of(row["configuration"]) for row in rows]
        panel.barh(names, [row["times_hf"] for row in rows], color=[_COLORS[n] for n in names])
        for place, (name, row) in enumerate(zip(names, rows, strict=True)):
            target = STEP_TARGETS.get(name, 0.0)
            if target:
                panel.plot([target] * 2, [place - 0.45, place + 0.45], color="black")
            text = f" {row['times_hf']:.2f} × ({row['median_s']:.2f} s)"
            panel.text(max(row["times_hf"], target), place, text, va="center", fontsize=7)
        panel.set_title(" ".join(case), fontsize=9)
        panel.tick_params(labelsize=7)
        panel.invert_yaxis()
        panel.margins(x=0.15)
    figure.supxlabel("time of a step ÷ Trainer with AdamW; line: target", fontsize=8)
    return figure


_CURVES = {"seconds": "seconds of a step", "tensors_mb": "peak of live tensors, MB"}
_AXIS_TITLES = {
    "length": "tokens of a row",
    "batch": "rows of a batch",
    "depth": "decoder layers",
    "targets": "projections with LoRA, of 7 a layer",
}


def draw_step_curves(table: Sequence[Row]) -> Figure:
    """Draw seconds and bytes along each axis, with the fitted slopes."""
    axes = _distinct(row["axis"] for row in table)
    figure = Figure(figsize=(2.9 * len(axes), 5.2), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        along = [row for row in table if row["axis"] == axis]
        for place, (what, unit) in enumerate(_CURVES.items()):
            panel = panels[place, column]
            for dtype, name in _distinct((row["dtype"], row["configuration"]) for row in along):
                rows = [
                    row for row in along if (row["dtype"], row["configuration"]) == (dtype, name)
                ]
                panel.loglog(
                    [row["value"] for row in rows],
                    [row[what] for row in rows],
                    "-" if dtype == "fp32" else "--",
                    marker="o",
                    markersize=3,
                    # Where both use the same, one shows around the other.
                    linewidth=3.5 if name == "floor" else 1.5,
                    color=_COLORS[label_of(name)],
                    label=f"{label_of(name)} {dtype}: {rows[0][f'slope_{what}']:.2f}",
                )
            panel.xaxis.set_major_locator(FixedLocator(_distinct(row["value"] for row in along)))
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for scale in (panel.xaxis, panel.yaxis):
                scale.set_major_formatter(StrMethodFormatter("{x:g}"))
                scale.set_minor_locator(NullLocator())
            panel.tick_params(labelsize=7)
            panel.grid(alpha=0.2)
            panel.set_xlabel(_AXIS_TITLES[axis], fontsize=8)
            # Room for the legend above the curves.
            bottom, top = panel.get_ylim()
            panel.set_ylim(bottom, top * (top / bottom) ** 0.45)
            panel.legend(fontsize=6, title="slope", title_fontsize=6, loc="upper left")
            if not column:
                panel.set_ylabel(unit, fontsize=8)
    return figure


# ---- operations ----


def draw_ops(table: Sequence[Row]) -> Figure:
    """Draw a bar for every ratio that has a target."""
    claims = _distinct(row["claim"] for row in table if row["target"] != "")
    figure = Figure(layout="constrained")
    panels = figure.subplots(len(claims), 1, squeeze=False)
    for panel, claim in zip(panels[:, 0], claims, strict=True):
        judged = [row for row in table if row["claim"] == claim and row["target"] != ""]
        labels = [f"{row['contender']} · {row['lists']} {row['dtype']}" for row in judged]
        colors = ["#2a7f62" if row["met"] == "yes" else "#c0532b" for row in judged]
        panel.barh(labels, [row["ratio"] for row in judged], color=colors)
        for place, row in enumerate(judged):
            panel.plot([row["target"]] * 2, [place - 0.45, place + 0.45], color="black")
            panel.text(row["ratio"], place, f" {row['ratio']:.2f}", va="center", fontsize=7)
        better = "more is better" if claim in AT_LEAST else "less is better"
        panel.set_title(f"{claim}: ratio to the baseline, {better}; line: target", fontsize=9)
        panel.tick_params(labelsize=6)
        panel.invert_yaxis()
        panel.margins(x=0.08)
    figure.set_size_inches(9, sum(0.7 + 0.16 * len(panel.patches) for panel in panels[:, 0]) + 1)
    return figure


# ---- fidelity ----


def draw_recipes(table: Sequence[Row]) -> Figure:
    """Draw mean and quartiles of the cosines of each setting."""
    figure = Figure(figsize=(8, 0.5 * len(table) + 1.4), layout="constrained")
    panel = figure.subplots()
    for place, row in enumerate(table):
        panel.plot([row["cosine_low"], row["cosine_high"]], [place] * 2, color="C0", linewidth=5)
        panel.plot(row["cosine"], place, "o", color="black")
        panel.text(row["cosine"], place - 0.2, f"{row['cosine']:.2f}", ha="center", fontsize=8)
    names = [label_of(row["settings"]).removeprefix("sap, ") for row in table]
    panel.set_yticks(range(len(table)), names)
    panel.set(
        xlim=(min(0.0, *(row["cosine_low"] for row in table)), 1.02),
        ylim=(len(table) - 0.5, -0.6),
        xlabel="cosine of the V used with the V of the full step; bars: quartiles over steps",
        title="What leaving work out costs, per step of a real run",
    )
    panel.grid(axis="x", color="0.92")
    return figure


def draw_fidelity(table: Sequence[Row]) -> Figure:
    """Draw ρ against the cosine, and the table of numerics as dots."""
    configs = _distinct(row["config"] for row in table)
    # Of the palette of Okabe and Ito, told apart by colour-blind readers as well.
    colours = dict(zip(configs, ("#0072B2", "#D55E00", "#009E73"), strict=False))
    markers = dict(zip(configs, "os^", strict=False))
    styles: dict[str, Any] = {"fp32": "-", "bf16 autocast": "--"}
    numerics = [row for row in table if row["table"] == "numerics"]
    title = "cosine of h with the fp64 oracle"

    figure = Figure(figsize=(10, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for config, arithmetic in itertools.product(configs, styles):
        line = [
            (row["rho"], row["cosine"])
            for row in table
            if (row["table"], row["config"], row["arithmetic"]) == ("grid", config, arithmetic)
        ]
        if line:
            left.plot(*zip(*line, strict=True), styles[arithmetic], color=colours[config])
    for row in numerics:
        if row["rho_setting"] == "auto" and row["path"].endswith(", central"):
            left.plot(
                *(row["rho"], row["cosine"], markers[row["config"]]),
                markersize=8,
                markeredgecolor=colours[row["config"]],
                markerfacecolor=colours[row["config"]] if row["arithmetic"] == "fp32" else "white",
                clip_on=False,
                zorder=3,
            )
    published = min(row["rho"] for row in table)
    left.axvline(published, color="grey", linestyle=":")
    left.text(published * 1.15, 0.5, "published ρ", color="dimgrey", rotation=90)
    cosines = [row["cosine"] for row in table if row["cosine"] != ""]
    left.set(
        xscale="log",
        xlabel="ρ, size of the perturbation relative to ‖W‖",
        ylabel=title,
        ylim=(min(0.0, *cosines) - 0.02, 1.03),
        title="For every ρ",
    )

    labels = _distinct(_fidelity_label(row) for row in numerics)
    for row in numerics:
        right.plot(
            *(row["cosine"], labels.index(_fidelity_label(row)), markers[row["config"]]),
            color=colours[row["config"]],
            alpha=0.8,
            clip_on=False,
        )
    ours = sum(", masks: " not in label for label in labels)
    right.axhline(ours - 0.5, color="dimgrey", linewidth=0.8)
    right.set_yticks(range(len(labels)), labels, fontsize=9)
    right.invert_yaxis()
    right.grid(axis="y", color="0.92")
    right.set_axisbelow(True)
    right.set(xlim=left.get_ylim(), xlabel=title, title="Ways to run the probe passes")
    for panel in (left, right):
        panel.spines[["top", "right"]].set_visible(False)

    def key(label: str, **style: Any) -> Line2D:
        return Line2D([], [], **{"color": "dimgrey", "label": label} | style)

    chosen = {"marker": "o", "linestyle": ""}
    figure.legend(
        handles=[
            *(key(config, color=colours[config], marker=markers[config]) for config in configs),
            *(key(arithmetic, linestyle=style) for arithmetic, style in styles.items()),
            key('rho="auto", fp32', **chosen),
            key('rho="auto", bf16', markerfacecolor="white", **chosen),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return figure


def _fidelity_label(row: Row) -> str:
    arithmetic = row["arithmetic"].removesuffix(" autocast")
    if row["rho_setting"] == "auto":
        return f"{row['path']}, {arithmetic}"
    return f"{label_of(row['path'])}, {arithmetic}, masks: {row['masks']}, ρ={row['rho']:g}"


#: What draws a CSV, by its name.
PICTURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "step_time.csv": draw_step_time,
    "step_curves.csv": draw_step_curves,
    "ops*.csv": draw_ops,
    "recipes.csv": draw_recipes,
    "fidelity.csv": draw_fidelity,
}


def main() -> None:
    """Draw every picture again."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    folder = parser.parse_args().results
    for name in PICTURES:
        for path in sorted(folder.glob(name)):
            print(draw(path))


if __name__ == "__main__":
    main()
