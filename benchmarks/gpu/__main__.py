"""The command: builds if it is asked to, and sees to it that every stage gets its turn in time.

A fault of a kernel takes the process with it, and a part may hang: so the stages run in another
process (`worker`), which says what it begins. Where it ends or is too slow, that part is given up
and the others go on in a new one.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("ceilings", "checks", "passes", "steps", "operations", "memory")
#: Times its budget, and seconds on top of that, after which a part is given up.
PATIENCE, GRACE_S = 1.5, 10.0


def build() -> None:
    """Compile the extension for the GPU of this machine alone; Triton is left if that fails."""
    start = time.monotonic()
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    environment = os.environ | {"SAP_FAST_BUILD": "cuda"}
    try:
        found = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
        environment.setdefault("TORCH_CUDA_ARCH_LIST", found[0])
    except (FileNotFoundError, IndexError, subprocess.CalledProcessError) as error:
        print(f"nvidia-smi names no GPU ({error}): the build is for several", flush=True)
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "build_ext", "--inplace"]
    status = subprocess.run(command, cwd=ROOT, env=environment, timeout=180).returncode
    what = "built" if status == 0 else "could not build"
    print(f"{what} the extension in {time.monotonic() - start:.0f} s", flush=True)


class Supervisor:
    """Runs the worker until all parts had their turn or the time is up.

    Args:
        command: of the worker, without the time that is left and the parts that are not to be run.
        end: `time.monotonic()` at which everything ends.
    """

    def __init__(self, command: Sequence[str], end: float) -> None:
        self._command, self._end = list(command), end
        self.given_up: list[str] = []

    def run(self) -> int:
        """Return the exit status of the last worker."""
        while True:
            status, running = self._run_once()
            if running is None or time.monotonic() > self._end:
                return status
            print(f"{running}: given up, the process ended with status {status}", flush=True)
            self.given_up.append(running)

    def _run_once(self) -> tuple[int, str | None]:
        """Return the exit status, and the part during which the worker ended, if it was one."""
        left = self._end - time.monotonic()
        command = [*self._command, "--left", f"{left:.0f}"]
        for name in self.given_up:
            command += ["--skip", name]
        worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        timer = self._kill_after(worker, left)
        running = None
        assert worker.stdout is not None
        for line in worker.stdout:
            print(line, end="", flush=True)
            if line.startswith("begin "):
                running, _, budget = line.removeprefix("begin ").rpartition(" ")
                timer.cancel()
                timer = self._kill_after(worker, PATIENCE * float(budget) + GRACE_S)
            elif running is not None and line.startswith(f"{running}: "):
                running = None
        timer.cancel()
        return worker.wait(), running

    def _kill_after(self, worker: subprocess.Popen[str], seconds: float) -> threading.Timer:
        left = max(0.0, self._end - time.monotonic())
        timer = threading.Timer(min(seconds, left + 5), worker.kill)
        timer.daemon = True
        timer.start()
        return timer


def main(arguments: Sequence[str] | None = None) -> int:
    """Build if asked to, run, and return the exit status of the worker.

    Args:
        arguments: of the command line, without the program's name; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        help="folder of the CSVs; default: $OUT, else "
        "benchmarks/results, in a dry run one that is removed",
    )
    parser.add_argument("--limit", type=float, default=560, help="seconds for all, build included")
    parser.add_argument("--stage", action="append", choices=NAMES, help="only this; repeatable")
    parser.add_argument("--build", action="store_true", help="compile the extension first")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, on the CPU too")
    options = parser.parse_args(arguments)
    end = time.monotonic() + options.limit
    if options.build:
        build()
    with tempfile.TemporaryDirectory() as scratch:
        default = scratch if options.dry_run else os.environ.get("OUT") or "benchmarks/results"
        output = (options.output or Path(default)).absolute()
        command = [sys.executable, "-u", "-m", "benchmarks.gpu.worker", "--output", str(output)]
        command += ["--dry-run"] * options.dry_run
        for name in options.stage or ():
            command += ["--stage", name]
        return Supervisor(command, end).run()


if __name__ == "__main__":
    sys.exit(main())
