"""The README's table and picture of results, drawn from the study's and the demo's CSV.

    python -m benchmarks.front

Writes `docs/pictures/kept.svg`, and the table of the README between its two comments.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from benchmarks.provenance import RESULTS, ROOT, read_rows

SUMMARY = RESULTS / "study" / "first" / "summary.csv"
DEMO = RESULTS / "demo.csv"
README = ROOT / "README.md"
PICTURE = ROOT / "docs" / "pictures" / "kept.svg"
BEGIN, END = "<!-- from summary.csv and demo.csv -->\n", "<!-- until here -->\n"

#: Keeps a number and its sign in one line of a narrow cell.
NO_BREAK = "\N{NO-BREAK SPACE}"

TASKS = {"alpaca": "Alpaca", "poisoned": "Alpaca, 10 % poisoned", "gsm8k": "GSM8K"}
#: The study's name of each method, how it is titled, its name in demo.csv, and its colour. White
#: letters on any of the colours have a contrast above 4.5.
METHODS = {
    "aligned": ("before the tuning", "Aligned", "#5f6b73"),
    "adamw": ("AdamW", "AdamW", "#b5481d"),
    "blend": ("blending", "Blending", "#00796b"),
    "sap": ("SAP", "FusedSAP", "#3949ab"),
}

Row = dict[str, str]


def chosen(path: Path = SUMMARY) -> dict[tuple[str, str], Row]:
    """Return the row of the setting that was chosen for each method, by method and task."""
    rows = [row for row in read_rows(path) if row["chosen"] == "1"]
    return {(row["method"], row["task"]): row for row in rows}


def step_over_adamw(path: Path = DEMO) -> dict[str, float]:
    """Return the time of a step over that of AdamW's, by the name in demo.csv; mean over seeds."""
    rows = [row for row in read_rows(path) if row["step_seconds"]]
    seconds = {(row["model"], row["seed"]): float(row["step_seconds"]) for row in rows}
    names = {model for model, _ in seconds}
    seeds = {seed for _, seed in seconds}
    return {
        name: statistics.mean(seconds[name, seed] / seconds["AdamW", seed] for seed in seeds)
        for name in names
    }


def table() -> str:
    """Return the README's table."""
    rows, times = chosen(), step_over_adamw()
    lines = [
        f"| | {' | '.join(TASKS.values())} | step |",
        "|---" * (len(TASKS) + 2) + "|",
    ]
    for method, (title, name, _) in METHODS.items():
        cells = []
        for task in TASKS:
            row = rows[method, task]
            cell = [percent(row[f"refused_{kind}_mean"]) for kind in ("harmful", "harmless")]
            if method not in ("aligned", "adamw"):
                more = 100 * (float(row["task_loss_over_adamw"]) - 1)
                cell.append(f"{round(more, 1) or 0.0:+.1f}{NO_BREAK}%".replace("-", "−"))
            cells.append(" · ".join(cell))
        time = f"×{NO_BREAK}{times[name]:.2f}" if name in times else ""
        lines.append(f"| {title} | {' | '.join(cells)} | {time} |")
    return "\n".join(lines) + "\n"


def percent(share: str) -> str:
    """Return a share as whole percent."""
    return f"{100 * float(share):.0f}{NO_BREAK}%"


def picture() -> str:
    """Return the picture as SVG: harmful requests refused, a panel per task, a bar per method.

    All letters stand on colours of the picture's own, so that it can be read on any ground.
    """
    width, gap, left, bar, pitch, top = 300, 24, 4, 32, 38, 44
    rows = chosen()
    total = left * 2 + len(TASKS) * width + (len(TASKS) - 1) * gap
    height = top + pitch * len(METHODS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total} {height}" role="img" '
        'font-family="system-ui, sans-serif" font-size="18">',
        "<title>Share of 141 unseen harmful requests that the model refuses</title>",
    ]
    for column, (task, title) in enumerate(TASKS.items()):
        x = left + column * (width + gap)
        parts.append(f'<rect x="{x}" y="2" width="{width}" height="34" rx="4" fill="#37474f"/>')
        parts.append(f'<text x="{x + 10}" y="25" fill="#fff" font-weight="600">{title}</text>')
        for line, (method, (name, _, colour)) in enumerate(METHODS.items()):
            share = float(rows[method, task]["refused_harmful_mean"])
            y = top + line * pitch
            parts.append(
                f'<rect x="{x}" y="{y}" width="{width}" height="{bar}" rx="4" fill="{colour}" '
                'fill-opacity=".22"/>'
            )
            parts.append(
                f'<rect x="{x}" y="{y}" width="{share * width:.0f}" height="{bar}" rx="4" '
                f'fill="{colour}"/>'
            )
            parts.append(
                f'<text x="{x + 10}" y="{y + 22.5:g}" fill="#fff">{name} {100 * share:.0f} %</text>'
            )
    return "\n".join([*parts, "</svg>"]) + "\n"


def with_table(text: str) -> str:
    """Return the README's text with its table replaced.

    Raises:
        ValueError: if the text lacks the comments between which the table goes.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the README has no lines {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + table() + END + after


def main() -> int:
    """Write both."""
    PICTURE.write_text(picture(), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"Wrote {PICTURE.relative_to(ROOT)} and the table of {README.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
