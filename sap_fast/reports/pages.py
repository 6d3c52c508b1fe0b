"""HTML pages without external parts, and pictures on them for light and dark screens."""

import base64
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

MISSING = "–"
"""Stands for what was not measured or not given."""


@dataclass(frozen=True)
class Picture:
    """A picture in two colour schemes, as data URIs, with what goes around it.

    `is_wide` says that it has to be scrolled on a narrow screen to be read.
    """

    title: str
    caption: str
    alternative: str
    light: str
    dark: str
    is_wide: bool


@dataclass(frozen=True)
class _Theme:
    text: str
    faint: str
    runs: tuple[str, ...]


# Hues that stay apart with the common colour blindnesses (after Okabe and Ito, 2008), darkened to
# be read on white and lightened for black. The seven markers tell the runs apart as well, and make
# a pair of colour and marker come back only after 42 runs.
_LIGHT = _Theme(
    "#1f2328", "#d5dae0", ("#6e7781", "#c4570a", "#0969b8", "#0b7a5c", "#a1408f", "#8a6d00")
)
_DARK = _Theme(
    "#e6edf3", "#3d444d", ("#9aa4af", "#f0954a", "#5cb3f5", "#3fc39a", "#df8fd0", "#e0c04d")
)
MARKERS = "osD^vPX"


def picture(
    title: str,
    caption: str,
    alternative: str,
    draw: Callable[[Figure], None],
    size: tuple[float, float] = (5.4, 3.4),
) -> Picture:
    """Returns what `draw` puts on a figure of `size` inches, once for each theme."""
    light, dark = (_svg_uri(draw, size, theme) for theme in (_LIGHT, _DARK))
    return Picture(title, caption, alternative, light, dark, is_wide=size[0] > 6)


def _svg_uri(draw: Callable[[Figure], None], size: tuple[float, float], theme: _Theme) -> str:
    text = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    style: dict[Any, Any] = {
        **dict.fromkeys(text, theme.text),
        **dict.fromkeys(("axes.edgecolor", "grid.color"), theme.faint),
        **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
        **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
        **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
        "axes.prop_cycle": cycler(color=theme.runs),
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.titlesize": 10,
        "text.parse_math": False,  # a "$" in the name of a run is a "$"
        "svg.hashsalt": "sap_fast",  # the same runs give the same bytes
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def render(template: Path, **values: Any) -> str:
    """Returns what a template makes of `values`.

    Args:
        template: Its file. It can import `style` and `show` from `page.html.j2`, which lies here.
        **values: Every name it uses.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**values)


def file_name(path: str | None) -> str:
    """Returns the names of files without their folders, or `MISSING` where none was given."""
    return ", ".join(Path(part).name for part in path.split(",")) if path else MISSING


def replace_text(path: Path, text: str) -> Path:
    """Writes a file; on any error, what was at `path` stays as it was."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(text, "utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path
