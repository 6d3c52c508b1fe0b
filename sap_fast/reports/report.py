"""The report of a comparison: one HTML page without external parts, and its table for a terminal.

The figures and pictures are made here; the explanations are in the template, `report.html.j2`.
"""

import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.table import Table
from rich.text import Text

from sap_fast.evaluation import paired_difference
from sap_fast.reports.answers import category_rows, example_tables
from sap_fast.reports.judges import judges_rows
from sap_fast.reports.pages import MARKERS, MISSING, Picture, picture, render, replace_text

_Line: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Steps, and a figure at each of them."""


@dataclass(frozen=True)
class ReportRun:
    """One model of a comparison.

    Attributes:
        name: Short and unique, as in "AdamW".
        description: What was done to get it, in one line.
        evaluation: `EvaluationResult.to_dict()`, or None where it was not evaluated.
        metrics: The rows of its `metrics.jsonl`, empty where it was not trained: `step` and any of
            `loss` and the figures of `SAPMetrics.flat()`.
        step_seconds: Median wall time of an optimizer step, in seconds.
        peak_bytes: Peak memory of the training process, or of the device it ran on.
    """

    name: str
    description: str
    evaluation: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    step_seconds: float | None
    peak_bytes: int | None

    def measure(self, name: str) -> Any:
        """Returns an entry of `evaluation`, or None where there is none."""
        return (self.evaluation or {}).get(name)

    def series(self, key: str) -> _Line:
        """Returns the steps at which `metrics` has a figure, and the figures."""
        points = [(row["step"], row[key]) for row in self.metrics if row.get(key) is not None]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        return steps, values


@dataclass(frozen=True)
class ReportInfo:
    """What a report says about the comparison as a whole.

    Attributes:
        title: Of the page.
        summary: Paragraphs on what was done.
        settings: What it takes to run it again: model, data, seed, device, dtype, versions, commit.
        baseline: Name of the run that the others are compared with.
    """

    title: str
    summary: list[str]
    settings: dict[str, str]
    baseline: str


def write_report(path: str | os.PathLike[str], info: ReportInfo, runs: Sequence[ReportRun]) -> Path:
    """Writes the page; on any error, what was at `path` stays as it was.

    Args:
        path: Of the HTML file, in a folder that exists.
        info: What was compared.
        runs: The models, in the order in which to show them.

    Returns:
        `path`.

    Raises:
        ValueError: Two runs have the same name, or `info.baseline` is none of them.
    """
    path = Path(path)
    page = render(
        Path(__file__).with_name("report.html.j2"),
        info=info,
        comparisons=_comparisons(runs, _find_run(runs, info.baseline)),
        findings=_findings(runs),
        headings=list(_columns_of(runs)),
        rows=list(zip(runs, table_rows(runs, info.baseline), strict=True)),
        judges_headings=[run.name for run in runs],
        judges_rows=judges_rows({run.name: run.evaluation for run in runs}),
        evaluation_pictures=_evaluation_pictures(runs),
        categories_headings=[run.name for run in runs if run.evaluation],
        categories=category_rows([run.evaluation for run in runs if run.evaluation]),
        examples=example_tables([run.evaluation for run in runs if run.evaluation]),
        training_pictures=_training_pictures(runs),
        last_headings=list(_LAST_FIGURES),
        last_rows=_last_figures(runs),
        missing=MISSING,
    )
    return replace_text(path, page)


def results_table(runs: Sequence[ReportRun], baseline: str) -> Table:
    """Returns the table of the report for a terminal; arguments as for `table_rows`."""
    table = Table(show_lines=True)
    table.add_column("Model", overflow="fold")
    for heading in _columns_of(runs):
        table.add_column(heading, justify="right")
    for run, cells in zip(runs, table_rows(runs, baseline), strict=True):
        figures = [Text.assemble(cell.value, (f"\n{cell.detail}", "dim")) for cell in cells]
        table.add_row(Text(run.name), *figures)
    return table


class Cell(NamedTuple):
    """A figure of the table, and the smaller one below it."""

    value: str
    detail: str = ""


def table_rows(runs: Sequence[ReportRun], baseline: str) -> list[list[Cell]]:
    """Returns the figures of each run: what the page and `results_table` show.

    Args:
        runs: The models compared.
        baseline: Name of the run by whose step time the others' are divided.

    Raises:
        ValueError: Two runs have the same name, or `baseline` is none of them.
    """
    reference = _find_run(runs, baseline)
    columns = _columns_of(runs).values()
    return [[make_cell(run, reference) for make_cell in columns] for run in runs]


def _find_run(runs: Sequence[ReportRun], name: str) -> ReportRun:
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"the runs are named {names}; expected every name once")
    if name not in names:
        raise ValueError(f"the baseline {name!r} is not among the runs; expected one of {names}")
    return runs[names.index(name)]


def _number(value: float, digits: int, sign: str = "") -> str:
    """Formats with a true minus sign, and without one where the value rounds to 0."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{_number(100 * share, 0)}\N{NO-BREAK SPACE}%"


def _percent_range(interval: Mapping[str, float]) -> str:
    return f"{_number(100 * interval['low'], 0)}–{_percent(interval['high'])}"


def _share_cell(share: Mapping[str, float] | None) -> Cell:
    if share is None:
        return Cell(MISSING)
    return Cell(_percent(share["mean"]), _percent_range(share))


def _margin_cell(margin: Mapping[str, float] | None) -> Cell:
    if margin is None:
        return Cell(MISSING)
    low, high = _number(margin["low"], 1), _number(margin["high"], 1)
    return Cell(_number(margin["mean"], 1), f"{low} to {high}")


def _loss_cell(loss: float | None, interval: Mapping[str, float] | None) -> Cell:
    if loss is None:
        return Cell(MISSING)
    ends = [_number(interval[end], 3) for end in ("low", "high")] if interval else []
    return Cell(_number(loss, 3), " to ".join(ends))


def _time_cell(seconds: float | None, baseline_seconds: float | None) -> Cell:
    if seconds is None:
        return Cell(MISSING)
    value = f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"
    return Cell(value, f"{seconds / baseline_seconds:.2f}×" if baseline_seconds else "")


def _memory_cell(size: int | None) -> Cell:
    if size is None:
        return Cell(MISSING)
    return Cell(f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB")


# Heading to the cell of a run; the second argument is the baseline.
_COLUMNS: dict[str, Callable[[ReportRun, ReportRun], Cell]] = {
    "Refuses harmful": lambda run, _: _share_cell(run.measure("refused_harmful")),
    "Refuses harmless": lambda run, _: _share_cell(run.measure("refused_harmless")),
    "Refusal margin": lambda run, _: _margin_cell(run.measure("margin")),
    "Task loss": lambda run, _: _loss_cell(run.measure("task_loss"), run.measure("task_interval")),
    "Time per step": lambda run, base: _time_cell(run.step_seconds, base.step_seconds),
    "Peak memory": lambda run, _: _memory_cell(run.peak_bytes),
}


def _columns_of(
    runs: Sequence[ReportRun],
) -> dict[str, Callable[[ReportRun, ReportRun], Cell]]:
    """Returns `_COLUMNS`, with the accuracy of every task of lm-eval behind the task loss."""
    columns = {}
    for heading, make_cell in _COLUMNS.items():
        columns[heading] = make_cell
        if heading == "Task loss":
            columns |= {task: partial(_accuracy_cell, task) for task in _tasks_of(runs)}
    return columns


def _accuracy_cell(task: str, run: ReportRun, _: ReportRun) -> Cell:
    return _share_cell((run.measure("task_accuracies") or {}).get(task))


def _tasks_of(runs: Sequence[ReportRun]) -> list[str]:
    return list(
        dict.fromkeys(task for run in runs for task in run.measure("task_accuracies") or {})
    )


def _findings(runs: Sequence[ReportRun]) -> list[tuple[str, str]]:
    """Returns what each evaluated run does, as its name and the rest of a sentence."""
    findings = []
    for run in runs:
        parts = []
        if share := run.measure("refused_harmful"):
            parts.append(
                f"refuses {_percent(share['mean'])} of {share['count']} harmful requests "
                f"(95\N{NO-BREAK SPACE}% interval {_percent_range(share)})"
            )
        if share := run.measure("refused_harmless"):
            parts.append(
                f"{_percent(share['mean'])} of {share['count']} harmless ones "
                f"({_percent_range(share)})"
                if parts
                else f"refuses {_percent(share['mean'])} of {share['count']} harmless requests "
                f"(95\N{NO-BREAK SPACE}% interval {_percent_range(share)})"
            )
        if (loss := run.measure("task_loss")) is not None:
            parts.append(f"task loss {_number(loss, 3)}")
        for task, share in (run.measure("task_accuracies") or {}).items():
            parts.append(f"{task} {_percent(share['mean'])} ({_percent_range(share)})")
        if parts:
            findings.append((run.name, ", ".join(parts)))
    return findings


def _comparisons(runs: Sequence[ReportRun], baseline: ReportRun) -> list[tuple[str, str]]:
    """Returns how each other trained run differs from the baseline, as name and figures."""
    comparisons = []
    for run in runs:
        if run is baseline or not run.metrics:
            continue
        parts = []
        for kind, words in (("harmful", "harmful requests"), ("harmless", "harmless requests")):
            share, other = run.measure(f"refused_{kind}"), baseline.measure(f"refused_{kind}")
            if share and other:
                points = _number(100 * (share["mean"] - other["mean"]), 0, "+")
                interval = _paired_interval(run, baseline, kind)
                parts.append(f"refusals of {words} {points} percentage points{interval}")
        loss, other = run.measure("task_loss"), baseline.measure("task_loss")
        if loss is not None and other is not None:
            parts.append(f"task loss {_number(loss - other, 3, '+')}")
        if run.step_seconds and baseline.step_seconds:
            parts.append(f"time per step {run.step_seconds / baseline.step_seconds:.2f}×")
        if parts:
            comparisons.append((run.name, ", ".join(parts)))
    return comparisons


def _paired_interval(run: ReportRun, baseline: ReportRun, kind: str) -> str:
    """Returns the interval of the difference in refusals where both have them by request."""
    first, second = run.measure(f"{kind}_refused"), baseline.measure(f"{kind}_refused")
    if not first or not second or len(first) != len(second):
        return ""
    interval = paired_difference(first, second)
    low, high = (_number(100 * end, 0, "+") for end in (interval.low, interval.high))
    return f" (95\N{NO-BREAK SPACE}% interval {low} to {high})"


_KINDS = {"refused_harmful": "harmful requests", "refused_harmless": "harmless requests"}


def _evaluation_pictures(runs: Sequence[ReportRun]) -> list[Picture]:
    """Returns safety against the task, and refusals alone if that leaves a measured run out."""
    kinds = [name for name in _KINDS if any(run.measure(name) for run in runs)]
    measured = [run for run in runs if any(map(run.measure, kinds))]
    axis = _task_axis(measured)
    placed = [run for run in measured if axis is not None and axis.of(run) is not None]
    pictures = []
    if axis is not None and placed:
        pictures += [_trade_off(runs, placed, kind, axis) for kind in kinds]
    if len(placed) < len(measured):
        pictures += [_refusals(runs, kind) for kind in kinds]
    return pictures


@dataclass(frozen=True)
class _TaskAxis:
    """How useful a run is: its task loss, or its accuracy at a task of lm-eval."""

    label: str
    task: str | None

    def of(self, run: ReportRun) -> dict[str, float] | None:
        """Returns the figure of a run, with the ends of its interval where that is known."""
        if self.task is not None:
            return (run.measure("task_accuracies") or {}).get(self.task)
        loss = run.measure("task_loss")
        if not math.isfinite(math.nan if loss is None else loss):
            return None
        return run.measure("task_interval") or {"mean": loss, "low": loss, "high": loss}

    @property
    def way(self) -> str:
        """Returns the side to which it is better."""
        return "left" if self.task is None else "right"

    def text(self, run: ReportRun) -> str:
        figure = self.of(run)
        assert figure is not None
        if self.task is not None:
            return f"{self.label} {_percent(figure['mean'])}"
        return f"{self.label} {_number(figure['mean'], 3)}"


def _task_axis(runs: Sequence[ReportRun]) -> _TaskAxis | None:
    if any(run.measure("task_loss") is not None for run in runs):
        return _TaskAxis("task loss", None)
    return next((_TaskAxis(task, task) for task in _tasks_of(runs)), None)


def _trade_off(
    runs: Sequence[ReportRun], placed: Sequence[ReportRun], kind: str, axis: _TaskAxis
) -> Picture:
    spoken = [
        f"{run.name}: {axis.text(run)}, refuses {_percent(share['mean'])} of {_KINDS[kind]} "
        f"({_percent_range(share)})"
        for run in placed
        if (share := run.measure(kind))
    ]
    is_safety = kind == "refused_harmful"
    subject = "Safety" if is_safety else "Over-refusal"
    return picture(
        f"{subject} against the task",
        f"{_KINDS[kind].capitalize()}: {'up' if is_safety else 'down'} and to the {axis.way} is "
        "better. Whiskers are 95\N{NO-BREAK SPACE}% intervals.",
        "; ".join(spoken) + ".",
        partial(_draw_trade_off, runs, placed, kind, axis),
    )


def _refusals(runs: Sequence[ReportRun], kind: str) -> Picture:
    spoken = [
        f"{run.name} {_percent(share['mean'])} ({_percent_range(share)})"
        for run in runs
        if (share := run.measure(kind))
    ]
    side = "right is safer" if kind == "refused_harmful" else "left is more useful"
    return picture(
        f"{_KINDS[kind].capitalize()} refused",
        f"Whiskers are 95\N{NO-BREAK SPACE}% intervals; {side}.",
        f"{_KINDS[kind].capitalize()} refused: {', '.join(spoken)}.",
        partial(_draw_refusals, runs, kind),
        size=(5.4, 0.42 * len(runs) + 0.9),
    )


def _draw_refusals(runs: Sequence[ReportRun], kind: str, figure: Figure) -> None:
    axes = figure.subplots()
    for position, run in enumerate(runs):
        if share := run.measure(kind):
            axes.errorbar(share["mean"], position, xerr=_whiskers(share), **_point_style(position))
        else:
            axes.text(0, position, "not measured", va="center", fontsize=9)
    axes.set(xlabel="share refused", xlim=(-0.03, 1.03), ylim=(len(runs) - 0.5, -0.5))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(axis="y", visible=False)
    axes.set_yticks(range(len(runs)), [textwrap.fill(run.name, 24) for run in runs])


def _draw_trade_off(
    runs: Sequence[ReportRun],
    placed: Sequence[ReportRun],
    kind: str,
    axis: _TaskAxis,
    figure: Figure,
) -> None:
    axes = figure.subplots()
    for run in placed:
        share, useful = run.measure(kind), axis.of(run)
        if share and useful:
            axes.errorbar(
                useful["mean"],
                share["mean"],
                xerr=_whiskers(useful),
                yerr=_whiskers(share),
                label=textwrap.fill(run.name, 24),
                **_point_style(runs.index(run)),
            )
    axes.set(xlabel=axis.label, ylabel=f"{_KINDS[kind]} refused", ylim=(-0.03, 1.03))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    if axis.task is not None:
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.margins(x=0.1)
    # Below, where no interval is hidden by it.
    figure.legend(loc="outside lower center", ncols=4)


def _whiskers(interval: Mapping[str, float]) -> list[list[float]]:
    """Returns their lengths; where all values are alike, rounding can make one a hair negative."""
    mean, low, high = interval["mean"], interval["low"], interval["high"]
    return [[max(0.0, mean - low)], [max(0.0, high - mean)]]


def _point_style(position: int) -> dict[str, Any]:
    """Returns how the run at `position` is marked, the same in all pictures."""
    marker = MARKERS[position % len(MARKERS)]
    return {"color": f"C{position}", "fmt": marker, "markersize": 7, "capsize": 4}


# Figures by step: their key in the metrics to the title and the caption of the picture.
_STEP_PICTURES = {
    "loss": (
        "Task loss in training",
        "Loss of the batches trained on, with the probe on where there is one.",
    ),
    "held_out/loss": (
        "Held-out task loss",
        "Loss of task rows that were not trained on, without the probe.",
    ),
    "held_out/refused": (
        "Refusals on the way",
        "Share of a few harmful requests that the model refuses, and, dashed, of their harmless "
        "twins. They are in no training pair and not those of the results above.",
    ),
    "sap/lean": (
        "Lean",
        "How far the probe turns the update away from the harmful direction: above 0 it does what "
        "it is for.",
    ),
    "sap/safety_loss": (
        "Safety loss",
        "Loss of the safety pairs, without the probe: low where the safe answer is likelier than "
        "the harmful one.",
    ),
    "sap/perturbation_applied": (
        "Weight perturbation ‖ΔW‖",
        "Norm of the trial step in the harmful direction from which the probe is computed. The "
        "weights are put back after it.",
    ),
    "sap/rho_agreement": (
        "Agreement",
        "Cosine of the probe gradients found with ρ and with ρ/2, where ρ sets the size of the "
        "trial step: how far it can be trusted, 1 at best.",
    ),
}
# Drawn dashed in the same picture, whose figure means little without it.
_DASHED = {"held_out/refused": "held_out/refused_harmless"}
# The same for figures by step and decoder layer, whose keys end in the layer's index.
_LAYER_PICTURES = {
    "sap/estimate_norms/": (
        "Probe gradient by layer",
        "Norm of the gradient that each decoder layer's probe is made from.",
    ),
    "sap/probe_sizes/": (
        "Probe size by layer",
        "Norm of each layer's probe relative to the hidden state of an ordinary token.",
    ),
}


def _training_pictures(runs: Sequence[ReportRun]) -> list[Picture]:
    """Returns a picture of every figure that changes over the steps of a run."""
    pictures = []
    colors = {run.name: f"C{position}" for position, run in enumerate(runs)}
    for key, (title, caption) in _STEP_PICTURES.items():
        lines, dashed = (_lines_of(runs, each) for each in (key, _DASHED.get(key)))
        if _any_varies(lines | {f"{name}, dashed": line for name, line in dashed.items()}):
            told = "; ".join(_spoken(lines))
            if dashed:
                told += f". Of harmless requests: {'; '.join(_spoken(dashed))}"
            draw = partial(_draw_lines, lines, colors, dashed)
            pictures.append(picture(title, caption, f"{title}: {told}.", draw))
    for prefix, (title, caption) in _LAYER_PICTURES.items():
        for run in runs:
            keys = {key for row in run.metrics for key in row if key.startswith(prefix)}
            layers = sorted(int(key.removeprefix(prefix)) for key in keys)
            layer_lines = {layer: run.series(f"{prefix}{layer}") for layer in layers}
            if _any_varies(layer_lines):
                spoken = [f"layer {layer} {line[1][-1]:.3g}" for layer, line in layer_lines.items()]
                alternative = f"{title}, {run.name}, at the last step: {', '.join(spoken)}."
                draw = partial(_draw_layers, layer_lines)
                pictures.append(picture(f"{title}, {run.name}", caption, alternative, draw))
    return pictures


def _lines_of(runs: Sequence[ReportRun], key: str | None) -> dict[str, _Line]:
    if key is None:
        return {}
    return {run.name: run.series(key) for run in runs if len(run.series(key)[0])}


def _spoken(lines: Mapping[str, _Line]) -> list[str]:
    return [
        f"{name} from {values[0]:.3g} at step {steps[0]:.0f} to {values[-1]:.3g} at step "
        f"{steps[-1]:.0f}"
        for name, (steps, values) in lines.items()
    ]


def _any_varies(lines: Mapping[Any, _Line]) -> bool:
    """Returns whether a line is more than one value and its rounding."""
    return any(
        not np.allclose(values, values[:1], rtol=1e-5, atol=0, equal_nan=True)
        for _, values in lines.values()
    )


def _draw_lines(
    lines: Mapping[str, _Line],
    colors: Mapping[str, str],
    dashed: Mapping[str, _Line],
    figure: Figure,
) -> None:
    axes = figure.subplots()
    for name, (steps, values) in dashed.items():
        axes.plot(steps, values, color=colors[name], linestyle="--", marker=".")
    for name, (steps, values) in lines.items():
        _draw_line(axes, steps, values, colors[name], label=textwrap.fill(name, 24))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.legend()


def _draw_layers(lines: Mapping[int, _Line], figure: Figure) -> None:
    axes = figure.subplots()
    # Between two colours of the theme: common colour maps fade into white at one end or into black.
    colors = LinearSegmentedColormap.from_list("layers", [to_rgb("C2"), to_rgb("C1")])
    scale = Normalize(min(lines), max(lines))
    for layer, (steps, values) in lines.items():
        _draw_line(axes, steps, values, colors(scale(layer)))
    axes.set(xlabel="step", ylim=(0, None))
    axes.xaxis.set_major_locator(_whole_numbers())
    bar = figure.colorbar(ScalarMappable(scale, colors), ax=axes, label="decoder layer")
    bar.ax.yaxis.set_major_locator(_whole_numbers())


def _whole_numbers() -> MaxNLocator:
    return MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def _draw_line(
    axes: Axes, steps: np.ndarray, values: np.ndarray, color: Any, label: str | None = None
) -> None:
    """Draws a series; a long one faintly, under its running mean over a twentieth of it."""
    if len(values) <= 40:
        axes.plot(steps, values, color=color, marker=".", label=label)
        return
    window = np.ones(len(values) // 20)
    mean = np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")
    axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
    axes.plot(steps, mean, color=color, label=label)


_LAST_FIGURES = {
    "ρ": "sap/rho",
    "Agreement": "sap/rho_agreement",
    "Skipped steps": "sap/skipped_steps",
}


def _last_figures(runs: Sequence[ReportRun]) -> list[tuple[ReportRun, list[str]]]:
    """Returns the latest of `_LAST_FIGURES` for every run that has one."""
    rows = []
    for run in runs:
        values = [run.series(key)[1] for key in _LAST_FIGURES.values()]
        if any(map(len, values)):
            rows.append((run, [f"{each[-1]:.3g}" if len(each) else MISSING for each in values]))
    return rows
