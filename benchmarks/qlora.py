"""The memory of fine-tuning an 8B model on one card of 24 GB, pass by pass.

    python -m benchmarks.qlora

Nothing here is measured: `benchmarks.cost_model` counts it. Writes `qlora.csv`, and the tables of
`docs/how-to/qlora.md` between their comments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.cost_model import Job, Pass, Tokens, pass_memory
from benchmarks.provenance import RESULTS, ROOT, write_rows
from benchmarks.workloads import LLAMA_8B, Lora, Row

PAGE = ROOT / "docs" / "how-to" / "qlora.md"
#: The comments around a table that is written.
BEGIN, END = "<!-- from qlora.csv: {} -->\n", "<!-- until here -->\n"

#: What a card of 24 GB has for PyTorch: 1.5 GB of 24 GiB go to the CUDA context, cuBLAS's workspace
#: and fragments of the allocator.
CARD = 24 * 2**30 - 1.5e9
LORA = Lora(16, tuple(LLAMA_8B.projections))
#: 4 rows of 1,024 tokens of which half are scored, and 4 pairs of a prompt of 64 tokens with two
#: answers of 64, packed into one row.
TASK = Tokens(4 * 1024, 4 * 1024**2, 4 * 512)
SAFETY = Tokens(4 * 192, (4 * 192) ** 2, 8 * 64)

METHODS: dict[str, tuple[Pass, ...]] = {
    "AdamW": ("task",),
    "blending": ("safety", "task"),
    "SAP": ("safety", "probe", "task"),
}
BASES: dict[str, str | None] = {"4 bit": "4bit", "8 bit": "8bit", "bf16": None}
MODES = ("none", "layers")


def job_of(method: str, base: str, checkpointing: str) -> Job:
    """Return what is priced: LoRA on all linear layers under bf16 autocast."""
    batches: Mapping[Pass, Tokens] = {
        kind: SAFETY if kind == "safety" else TASK for kind in METHODS[method]
    }
    return Job(
        LLAMA_8B,
        LORA,
        batches,
        checkpointing=checkpointing,
        dtype="bf16",
        device="cuda",
        base=BASES[base],
    )


def passes_of(job: Job) -> dict[str, float]:
    """Return the peak bytes of each pass on top of what stays from step to step.

    The probe passes run beside the direction, which holds W meanwhile; a task pass that is blended
    runs beside it too.
    """
    beside = {"safety": 0, "probe": 1, "task": int(job.blends)}
    return {kind: pass_memory(job, kind) + 4 * beside[kind] * job.trained for kind in job.batches}


def table() -> list[Row]:
    """Return the bytes of every configuration, in GB."""
    rows = []
    for base in BASES:
        for checkpointing in MODES:
            for method in METHODS:
                job = job_of(method, base, checkpointing)
                stays = job.loaded_bytes + job.kept_bytes
                passes = passes_of(job)
                peak = stays + max(passes.values())
                rows.append(
                    {
                        "kind": "predicted",
                        "model": LLAMA_8B.name,
                        "base": base,
                        "checkpointing": checkpointing,
                        "method": method,
                        "model_gb": round(job.loaded_bytes / 1e9, 2),
                        "moments_gb": round(job.kept_bytes / 1e9, 2),
                        **{f"{kind}_gb": "" for kind in ("safety", "probe", "task")},
                        **{f"{kind}_gb": round(size / 1e9, 2) for kind, size in passes.items()},
                        "peak_gb": round(peak / 1e9, 2),
                        "fits": "yes" if peak <= CARD else "no",
                    }
                )
    return rows


def passes_table(rows: Sequence[Row]) -> str:
    """Return the passes on the 4-bit base, as the page shows them."""
    columns = ("", "checkpointing", "model", "moments", "safety pass", "probe passes", "task pass")
    lines = [f"| {' | '.join(columns)} | peak |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        if row["base"] == "4 bit":
            sizes = [row[f"{name}_gb"] for name in ("model", "moments", "safety", "probe", "task")]
            cells = [f"{size:.1f}" if size != "" else "" for size in sizes]
            what = [row["method"], row["checkpointing"]]
            lines.append(f"| {' | '.join([*what, *cells])} | {_peak(row)} |")
    return "\n".join(lines) + "\n"


def bases_table(rows: Sequence[Row]) -> str:
    """Return the peaks of SAP on all bases, likewise."""
    lines = ["| base | model | without checkpointing | every layer |", "|---|---|---|---|"]
    for base in BASES:
        plain, checkpointed = (
            row for row in rows if row["base"] == base and row["method"] == "SAP"
        )
        cells = [f"{plain['model_gb']:.1f}", _peak(plain), _peak(checkpointed)]
        lines.append(f"| {base} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def tables(rows: Sequence[Row]) -> dict[str, str]:
    """Return the tables of the page by name."""
    return {"passes": passes_table(rows), "bases": bases_table(rows)}


def _peak(row: Row) -> str:
    return f"{row['peak_gb']:.1f}" + ("" if row["fits"] == "yes" else ": does not fit")


def written(page: str, tables: Mapping[str, str]) -> str:
    """Return a page with its tables replaced."""
    for name, text in tables.items():
        begin = BEGIN.format(name)
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(END)
        page = head + begin + text + END + tail
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the CSV and the tables of the page.

    Args:
        arguments: of the command line, without the program's name; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page with the tables")
    options = parser.parse_args(arguments)
    rows = table()
    path = write_rows("qlora.csv", rows, options.results)
    found = tables(rows)
    options.page.write_text(written(options.page.read_text(encoding="utf-8"), found), "utf-8")
    print("\n".join(found.values()) + f"Wrote {path} and {options.page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
