"""Runs the stages that are due in this process, and prints their tables at the end.

`python -m benchmarks.gpu` starts it, and starts it again where a part brings the process down.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Peaks come close to the memory of the GPU, and the sizes of passes differ: without it, fragments
# are what does not fit. Read when CUDA starts.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from rich.console import Console

from benchmarks.gpu import ceilings, checks, memory, operations, passes, steps
from benchmarks.gpu.parts import Setting, release, rows_of, run_stage, table_of

#: In the order of their worth.
STAGES = {
    module.STAGE.name: module.STAGE
    for module in (ceilings, checks, passes, steps, operations, memory)
}


def run(setting: Setting, stages: Sequence[str], skipped: Sequence[str]) -> int:
    """Run the parts that are due; return 1 if a test failed or a part ended in an error."""
    release(setting.device)
    for name in stages:
        run_stage(STAGES[name], setting, skipped, lambda said: print(said, flush=True))
    console = Console(width=170)
    failed = False
    for name in stages:
        console.print(table_of(STAGES[name], setting.output))
        rows = [row for part in rows_of(STAGES[name], [setting.output]).values() for row in part]
        failed |= any(row.get("error") or row.get("outcome") == "failed" for row in rows)
    return int(failed)


def parser() -> argparse.ArgumentParser:
    """Return what the command line of this file reads."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--output", type=Path, required=True)
    made.add_argument("--left", type=float, required=True)
    made.add_argument("--dry-run", action="store_true")
    made.add_argument("--stage", action="append", choices=STAGES)
    made.add_argument("--skip", action="append", default=[])
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; exit status 1 without a GPU, unless it is a dry run."""
    options = parser().parse_args(arguments)
    if not torch.cuda.is_available() and not options.dry_run:
        print("benchmarks.gpu: needs a CUDA device, and PyTorch finds none", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    end = time.monotonic() + options.left
    setting = Setting(device, options.dry_run, options.output, end, save=lambda rows: None)
    return run(setting, options.stage or list(STAGES), options.skip)


if __name__ == "__main__":
    sys.exit(main())
