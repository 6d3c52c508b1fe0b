"""The report shows the figures it was given, invents none, and needs nothing from outside."""

import base64
import os
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from sap_fast import SAPMetrics
from sap_fast.evaluation import Answer, EvaluationResult, Interval, paired_difference
from sap_fast.reports import pages, report
from sap_fast.reports.report import Cell, ReportInfo, ReportRun
from tests.reports.page import SPACE, Page

# Figures made up for these tests; none was measured.


def answers(count: int, kind: str) -> list[Answer]:
    return [Answer(f"{kind} {k}", ("hate", "privacy")[k % 2], f"Words {k}") for k in range(count)]


def evaluation(**changes: Any) -> dict[str, Any]:
    measures = {
        "task_loss": 1.4807,
        "task_interval": Interval(1.4807, 1.4, 1.55, count=20),
        "refused_harmful": Interval(0.384, 0.261, 0.509, count=60),
        "refused_harmless": Interval(0.05, 0.0, 0.125, count=40),
        "margin": Interval(37.14, 33.96, 40.21, count=60),
        "harmful_refused": [True] * 23 + [False] * 37,
        "harmless_refused": [True] * 2 + [False] * 38,
        "harmful_answers": answers(60, "harmful"),
        "harmless_answers": answers(40, "harmless"),
    }
    return EvaluationResult(**{**measures, **changes}).to_dict()


def sap_metrics(step: int) -> dict[str, float]:
    figures = SAPMetrics(
        lean=0.01 * step,
        safety_loss=0.5 / step,
        rho=0.0125,
        rho_agreement=0.9987,
        perturbation_applied=1.0 + step / 10,
        skipped_steps=3,
        estimate_norms={2: 0.1 * step, 10: 0.2 * step},
        probe_sizes={2: 0.003, 10: 0.003},
    )
    return {"step": step, "loss": 2.0 - step / 100, **figures.flat()}


ALIGNED = ReportRun(
    "Aligned",
    "before fine-tuning",
    evaluation(task_loss=1.515, task_interval=None),
    [],
    None,
    None,
)
ADAMW = ReportRun(
    name="AdamW",
    description="plain",
    evaluation=evaluation(),
    metrics=[{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.25}],
    step_seconds=0.8,
    peak_bytes=2**30,
)
SAP = ReportRun(
    name="FusedSAP",
    description="with the probe",
    evaluation=evaluation(
        task_loss=1.5021,
        task_interval=Interval(1.5021, 1.42, 1.59, count=20),
        refused_harmful=Interval(0.8, 0.684, 0.897, count=60),
        margin=Interval(-1.25, -3.0, 0.04, count=60),
        harmful_refused=[False] * 12 + [True] * 48,
    ),
    metrics=[sap_metrics(step) for step in range(1, 6)],
    step_seconds=2.0,
    peak_bytes=3 * 2**29,
)
RUNS = [ALIGNED, ADAMW, SAP]
INFO = ReportInfo(
    title="A comparison",
    summary=["First paragraph.", "Second paragraph."],
    settings={"Model": "tiny", "Seed": "7"},
    baseline="AdamW",
)


def write(tmp_path: Path, runs: list[ReportRun], info: ReportInfo = INFO) -> Page:
    path = report.write_report(tmp_path / "report.html", info, runs)
    assert path == tmp_path / "report.html"
    return Page(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return write(tmp_path_factory.mktemp("report"), RUNS)


def test_table_rows() -> None:
    assert report.table_rows(RUNS, "AdamW") == [
        [
            Cell(f"38{SPACE}%", f"26–51{SPACE}%"),
            Cell(f"5{SPACE}%", f"0–12{SPACE}%"),
            Cell("37.1", "34.0 to 40.2"),
            Cell("1.515"),
            Cell("–"),
            Cell("–"),
        ],
        [
            Cell(f"38{SPACE}%", f"26–51{SPACE}%"),
            Cell(f"5{SPACE}%", f"0–12{SPACE}%"),
            Cell("37.1", "34.0 to 40.2"),
            Cell("1.481", "1.400 to 1.550"),
            Cell("800 ms", "1.00×"),
            Cell("1.00 GiB"),
        ],
        [
            Cell(f"80{SPACE}%", f"68–90{SPACE}%"),
            Cell(f"5{SPACE}%", f"0–12{SPACE}%"),
            Cell("−1.2", "−3.0 to 0.0"),
            Cell("1.502", "1.420 to 1.590"),
            Cell("2.00 s", "2.50×"),
            Cell("1.50 GiB"),
        ],
    ]


def test_missing_figures_are_not_invented() -> None:
    empty = ReportRun("empty", "", None, [], None, None)
    partial = ReportRun(
        "partial", "", {"task_loss": 0.0, "refused_harmful": None, "margin": None}, [], 0.5, 2**20
    )
    rows = report.table_rows([empty, partial], "empty")
    assert rows[0] == [Cell("–")] * 6
    assert rows[1] == [*[Cell("–")] * 3, Cell("0.000"), Cell("500 ms"), Cell("1 MiB")]


@pytest.mark.parametrize(
    ("value", "digits", "sign", "expected"),
    [(-0.04, 1, "", "0.0"), (-0.06, 1, "", "−0.1"), (0.04, 1, "+", "+0.0"), (-2, 0, "+", "−2")],
)
def test_number(value: float, digits: int, sign: str, expected: str) -> None:
    assert report._number(value, digits, sign) == expected


def test_page_shows_the_figures(page: Page) -> None:
    text = page.text
    first, second = SAP.measure("harmful_refused"), ADAMW.measure("harmful_refused")
    difference = paired_difference(first, second)
    assert 0.1 < difference.low < difference.high < 0.7

    assert (
        "FusedSAP compared with AdamW: refusals of harmful requests +42 percentage points (95 % "
        f"interval {100 * difference.low:+.0f} to {100 * difference.high:+.0f}), refusals of "
        "harmless requests +0 percentage points (95 % interval +0 to +0), task loss +0.021, time "
        "per step 2.50×." in text
    )
    assert (
        "FusedSAP: refuses 80 % of 60 harmful requests (95 % interval 68–90 %), 5 % of 40 "
        "harmless ones (0–12 %), task loss 1.502." in text
    )
    assert "Aligned compared with" not in text
    assert "AdamW compared with" not in text
    for words in ("A comparison", "First paragraph.", "Second paragraph."):
        assert words in text


def test_page_shows_the_table(page: Page) -> None:
    rows = page.rows
    names = ["Alignedbefore fine-tuning", "AdamW (baseline)plain", "FusedSAPwith the probe"]
    assert rows[0] == ["Model", *report._COLUMNS]
    for row, name, cells in zip(rows[1:], names, report.table_rows(RUNS, "AdamW"), strict=False):
        assert row == [name, *(cell.value + cell.detail for cell in cells)]
    assert rows[-2:] == [["Model", "tiny"], ["Seed", "7"]]


def test_difference_has_an_interval_only_where_requests_are_known(tmp_path: Path) -> None:
    none = {"harmful_answers": None}
    unknown = replace(SAP, evaluation=evaluation(harmful_refused=None, **none))
    others = replace(SAP, name="others", evaluation=evaluation(harmful_refused=[True], **none))
    text = write(tmp_path, [ADAMW, unknown, others]).text
    for name in ("FusedSAP", "others"):
        assert (
            f"{name} compared with AdamW: refusals of harmful requests +0 percentage points, "
            "refusals of harmless" in text
        )


def test_page_without_evaluation_and_metrics(tmp_path: Path) -> None:
    bare = [replace(run, evaluation=None, metrics=[]) for run in RUNS]
    page = write(tmp_path, bare)
    assert "No model of this comparison was evaluated." in page.text
    assert "compared with AdamW" not in page.text
    assert "Over the steps" not in page.text
    assert page.attributes("img") == []


def test_everything_given_is_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert('&amp;')</script>\"x$y_{$"
    run = replace(SAP, name=hostile, description=hostile)
    info = ReportInfo(hostile, [hostile], {hostile: hostile}, baseline=hostile)

    page = write(tmp_path, [run, ADAMW], info)

    assert page.attributes("script") == []
    # Title twice, summary, setting and its value, description, and the name in list, table and
    # the comparison with it.
    assert page.text.count(" ".join(hostile.split())) >= 9
    assert all(hostile in alternative for alternative in page.alternatives[:2])


def test_nothing_is_loaded_from_outside(page: Page) -> None:
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object"})
    assert re.findall(r"url\(|@import", page.source) == []
    sources = [image["src"] for image in page.attributes("img")]
    sources += [source["srcset"] for source in page.attributes("source")]
    assert len(sources) == 2 * 7
    for source in sources:
        assert source is not None
        assert re.fullmatch(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", source)
        picture = ElementTree.fromstring(base64.b64decode(source.partition(",")[2]))
        links = [value for node in picture.iter() for key, value in node.items() if "href" in key]
        assert links
        assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert [link["href"] for link in page.attributes("a")] == [
        "#reading",
        "https://arxiv.org/abs/2505.16737",
    ]


def test_pictures_have_a_dark_version(page: Page) -> None:
    for image, source in zip(page.attributes("img"), page.attributes("source"), strict=True):
        assert source["media"] == "(prefers-color-scheme: dark)"
        light, dark = (
            base64.b64decode(str(uri).partition(",")[2]).decode()
            for uri in (image["src"], source["srcset"])
        )
        assert pages._LIGHT.text in light and pages._DARK.text not in light
        assert pages._DARK.text in dark and pages._LIGHT.text not in dark


def test_page_can_be_read_without_eyes(page: Page) -> None:
    assert page.alternatives == [
        "Aligned: task loss 1.515, refuses 38 % of harmful requests (26–51 %); AdamW: task loss "
        "1.481, refuses 38 % of harmful requests (26–51 %); FusedSAP: task loss 1.502, refuses "
        "80 % of harmful requests (68–90 %).",
        "Aligned: task loss 1.515, refuses 5 % of harmless requests (0–12 %); AdamW: task loss "
        "1.481, refuses 5 % of harmless requests (0–12 %); FusedSAP: task loss 1.502, refuses 5 % "
        "of harmless requests (0–12 %).",
        "Task loss in training: AdamW from 2.5 at step 1 to 2.25 at step 2; FusedSAP from 1.99 at "
        "step 1 to 1.95 at step 5.",
        "Lean: FusedSAP from 0.01 at step 1 to 0.05 at step 5.",
        "Safety loss: FusedSAP from 0.5 at step 1 to 0.1 at step 5.",
        "Weight perturbation ‖ΔW‖: FusedSAP from 1.1 at step 1 to 1.5 at step 5.",
        "Probe gradient by layer, FusedSAP, at the last step: layer 2 0.5, layer 10 1.",
    ]
    headers = page.attributes("th")
    assert headers
    assert {header.get("scope") for header in headers} == {"col", "colgroup", "row"}


def test_figures_that_stay_the_same_are_told_and_not_drawn(page: Page, tmp_path: Path) -> None:
    assert not any(text.startswith(("Agreement", "Probe size")) for text in page.alternatives)
    assert ["FusedSAP", "0.0125", "0.999", "3"] in page.rows

    rounded = [row | {"sap/probe_sizes/2": 3e-3 + 1e-9 * row["step"]} for row in SAP.metrics]
    page = write(tmp_path, [ADAMW, replace(SAP, metrics=rounded)])
    assert not any(text.startswith("Probe size") for text in page.alternatives)

    changing = [row | {"sap/rho_agreement": 1 / row["step"]} for row in SAP.metrics]
    page = write(tmp_path, [ADAMW, replace(SAP, metrics=changing)])
    assert "Agreement: FusedSAP from 1 at step 1 to 0.2 at step 5." in page.alternatives


def test_every_run_gets_a_picture_of_its_layers(tmp_path: Path) -> None:
    page = write(tmp_path, [ADAMW, SAP, replace(SAP, name="Second")])
    titles = [text.partition(", at")[0] for text in page.alternatives if "by layer" in text]
    assert titles == ["Probe gradient by layer, FusedSAP", "Probe gradient by layer, Second"]


def test_series_skips_rows_without_the_figure() -> None:
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2},
        {"step": 3, "loss": None},
        {"step": 4, "loss": 1},
    ]
    run = replace(ADAMW, metrics=rows)
    steps, values = run.series("loss")
    assert steps.tolist() == [1, 4]
    assert values.tolist() == [2, 1]
    assert [len(each) for each in run.series("sap/lean")] == [0, 0]


def test_long_series_are_drawn_under_their_running_mean() -> None:
    axes = Figure().subplots()
    steps = np.arange(60.0)
    values = steps**2
    report._draw_line(axes, steps, values, "C0", label="name")
    faint, strong = axes.get_lines()
    assert np.array_equal(faint.get_ydata(), values)
    assert faint.get_label().startswith("_")
    means = np.asarray(strong.get_ydata())
    assert strong.get_label() == "name"
    assert means[30] == pytest.approx((29**2 + 30**2 + 31**2) / 3)
    assert means[0] == pytest.approx((0 + 1) / 2)


def test_whiskers_end_where_the_interval_ends() -> None:
    figure = Figure()
    report._draw_refusals(RUNS, "refused_harmful", figure)
    (axes,) = figure.axes
    ends = [container.lines[2][0].get_segments()[0].tolist() for container in axes.containers]
    for position, (run, segment) in enumerate(zip(RUNS, ends, strict=True)):
        share = run.measure("refused_harmful")
        assert segment == [pytest.approx([share[end], position]) for end in ("low", "high")]
    assert [label.get_text() for label in axes.get_yticklabels()] == [run.name for run in RUNS]
    assert axes.yaxis_inverted()


def test_trade_off_places_each_run() -> None:
    figure = Figure()
    axis = report._task_axis(RUNS)
    report._draw_trade_off(RUNS, [ADAMW, SAP], "refused_harmful", axis, figure)
    (axes,) = figure.axes
    across, _ = (lines.get_segments()[0] for lines in axes.containers[0].lines[2])
    assert across.tolist() == [pytest.approx([1.4, 0.384]), pytest.approx([1.55, 0.384])]
    points = [container.lines[0].get_xydata().tolist() for container in axes.containers]
    assert points == [[[1.4807, 0.384]], [[1.5021, 0.8]]]
    colors = [container.lines[0].get_color() for container in axes.containers]
    assert colors == ["C1", "C2"]


def test_figures_that_are_not_finite_are_shown(tmp_path: Path) -> None:
    diverged = replace(
        SAP,
        evaluation=evaluation(
            task_loss=float("nan"),
            task_interval=None,
            refused_harmful=Interval(1.0, 1.0, 1 - 1e-16, count=60),
        ),
        metrics=[{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("inf")}],
    )
    page = write(tmp_path, [ADAMW, diverged])
    assert "task loss nan" in page.text
    assert "FusedSAP from 2 at step 1 to inf at step 2" in page.alternatives[4]
    safety, over_refusal, harmful, harmless = page.alternatives[:4]
    assert "FusedSAP" not in safety + over_refusal and "AdamW: task loss 1.481" in safety
    assert harmful.startswith("Harmful requests refused") and "FusedSAP 100 %" in harmful
    assert harmless.startswith("Harmless requests refused") and "FusedSAP 5 %" in harmless


def test_over_refusal_stands_beside_refusal_on_the_way(tmp_path: Path) -> None:
    rows = [
        {"step": step, "held_out/refused": 0.5 + 0.1 * step, "held_out/refused_harmless": 0.25}
        for step in (0, 2)
    ]
    page = write(tmp_path, [replace(ADAMW, metrics=rows)])
    assert page.alternatives[-1] == (
        "Refusals on the way: AdamW from 0.5 at step 0 to 0.7 at step 2. Of harmless requests: "
        "AdamW from 0.25 at step 0 to 0.25 at step 2."
    )


def test_accuracies_of_lm_eval_have_columns_and_an_axis(tmp_path: Path) -> None:
    accuracies = {"gsm8k (exact_match)": Interval(0.25, 0.2, 0.3, count=100)}
    tested = replace(SAP, evaluation=evaluation(task_loss=None, task_accuracies=accuracies))
    without = replace(ADAMW, evaluation=evaluation(task_loss=None))
    page = write(tmp_path, [without, tested])
    assert "gsm8k (exact_match)" in page.rows[0] and f"25{SPACE}%20–30{SPACE}%" in page.rows[2]
    assert page.alternatives[0] == (
        "FusedSAP: gsm8k (exact_match) 25 %, refuses 38 % of harmful requests (26–51 %)."
    )
    assert "gsm8k (exact_match) 25 % (20–30 %)." in page.text
    figure = Figure()
    axis = report._task_axis([tested])
    report._draw_trade_off([tested], [tested], "refused_harmless", axis, figure)
    assert axis.way == "right" and figure.axes[0].get_xlabel() == "gsm8k (exact_match)"


def test_page_shows_refusals_by_category_and_how_answers_begin(page: Page) -> None:
    privacy = next(row for row in page.rows if row[0] == "privacy")
    # 30 harmful requests of it, of which Aligned refuses 11 of 23 refused, and SAP 24.
    assert privacy[1] == "30 / 20"
    assert [cell.replace(SPACE, " ") for cell in privacy[2:]] == ["37 %", "5 %"] * 2 + [
        "80 %",
        "5 %",
    ]
    shares = [
        each["style"] for each in page.attributes("td") if "share" in (each.get("class") or "")
    ]
    assert shares[:2] == ["--share: 0.400", "--share: 0.050"]
    differing = next(row for row in page.rows if row[0] == "harmful 0hate")
    assert differing[1:] == ["Words 0 …refused", "Words 0 …refused", "Words 0 …not refused"]


def test_same_runs_give_the_same_page(page: Page, tmp_path: Path) -> None:
    assert write(tmp_path, RUNS).source == page.source


def test_failure_keeps_the_page_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "report.html").write_text("what was there")

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        report.write_report(tmp_path / "report.html", INFO, [replace(ADAMW, evaluation=None)])
    assert os.listdir(tmp_path) == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "what was there"


@pytest.mark.parametrize("names", [["AdamW", "AdamW"], ["FusedSAP", "Other"]])
def test_names_and_baseline_must_fit(tmp_path: Path, names: list[str]) -> None:
    runs = [replace(ADAMW, name=name) for name in names]
    expected = "every name once" if names[0] == names[1] else "'AdamW' is not among the runs"
    with pytest.raises(ValueError, match=expected):
        report.write_report(tmp_path / "report.html", INFO, runs)
    with pytest.raises(ValueError, match=expected):
        report.results_table(runs, "AdamW")
    assert os.listdir(tmp_path) == []


def test_results_table_for_the_terminal() -> None:
    runs = [ALIGNED, replace(ADAMW, name="[bold]AdamW[/bold]"), SAP]
    console = Console(width=130, record=True, file=open(os.devnull, "w"))
    console.print(report.results_table(runs, "[bold]AdamW[/bold]"))
    printed = console.export_text()
    assert "[bold]AdamW[/bold]" in printed
    for cells in report.table_rows(runs, "[bold]AdamW[/bold]"):
        for cell in cells:
            assert cell.value in printed
            assert cell.detail in printed
    for heading in report._COLUMNS:
        assert heading in printed
