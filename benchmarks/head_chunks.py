"""How large the chunks of the logits should be: time and memory of the task loss by their bytes.

    python -m benchmarks.head_chunks      half a minute on an H100; --quick tries it anywhere

A model of one layer of Llama-3.2-1B's shapes with its head of 128,256 tokens, so that the head is
most of the work: once with everything trained in fp32, once with LoRA on bf16 weights; both under
bf16 autocast, forward and backward on 4 rows of 2,048 tokens of which half are scored. `hf` is
transformers' own loss, which builds all logits at once. Sizes run in turn, round after round.
Writes `head_chunks.csv`; `sap_fast.losses.CHUNK_BYTES` is chosen from it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.gpu_step import (
    LENGTH,
    LLAMA_1B,
    TINY,
    Batches,
    Case,
    build_model,
    make_batches,
    release,
    synchronize,
)
from benchmarks.provenance import RESULTS, write_rows
from sap_fast import losses

Row = dict[str, Any]
MIB = 2**20
#: Bytes of a chunk's logits; 0: transformers' own loss.
SIZES = (0, 32 * MIB, 64 * MIB, 128 * MIB, 256 * MIB, 512 * MIB, 1024 * MIB, 2048 * MIB)
ROUNDS = 7
WARM_UP_ROUNDS = 2


def run(model: nn.Module, batches: Batches, size: int, device: str) -> tuple[float, float]:
    """Return the seconds of forward and backward, and the MB they allocate at most."""
    release(model, device)
    before = torch.cuda.memory_allocated() if device != "cpu" else 0
    synchronize(device)
    start = time.perf_counter()
    with torch.autocast(device, torch.bfloat16):
        if size:
            losses.CHUNK_BYTES[device] = size
            loss = losses.task_loss(model, batches.task)
        else:
            loss = model(**batches.task).loss
    loss.backward()
    synchronize(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() - before if device != "cpu" else 0
    return seconds, peak / 1e6


def measure(case: Case, device: str, length: int) -> list[Row]:
    """Return a row per size."""
    model = build_model(case, device)
    batches = make_batches(case.model.vocabulary, device, length)
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in SIZES}
    chosen = dict(losses.CHUNK_BYTES)
    try:
        for number in range(WARM_UP_ROUNDS + ROUNDS):
            for size in SIZES:
                figures = run(model, batches, size, device)
                if number >= WARM_UP_ROUNDS:
                    found[size].append(figures)
    finally:
        losses.CHUNK_BYTES.update(chosen)
    rows = []
    for size, figures in found.items():
        seconds, peaks = zip(*figures, strict=True)
        rows.append(
            {
                "trained": case.way,
                "loss": f"chunks of {size // MIB} MiB" if size else "hf",
                "rows_per_chunk": size // (4 * case.model.vocabulary) if size else "",
                "median_ms": round(1e3 * statistics.median(seconds), 2),
                "peak_mb": round(max(peaks)),
                "chosen": "yes" if size == chosen[device] else "no",
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; exit status 1 without a GPU.

    Args:
        arguments: of the command line, without the program's name; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--quick", action="store_true", help="a tiny model, on the CPU too")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        print("benchmarks.head_chunks: needs a CUDA device, PyTorch finds none", file=sys.stderr)
        return 1
    shape = replace(TINY if options.quick else LLAMA_1B, layers=1)
    rows = []
    for way in ("full", "LoRA r=16 q,v"):
        rows += measure(Case(shape, way, "none"), device, 32 if options.quick else LENGTH)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=120).print(table)
    print(f"Wrote {write_rows('head_chunks.csv', rows, options.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
