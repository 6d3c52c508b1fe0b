"""The package before and after a change: time and memory of a step, in turns on one machine.

    python -m benchmarks.before_after --before CHECKOUT        about ten minutes; --help for less

CHECKOUT is another checkout of this repository, whose extension is built
(`python setup.py build_ext --inplace`). Each version has a process of its own, with a model of its
own, and trains it on the same random rows. They take turns, a step each and the other one first in
every round, so that only one computes at a time and both meet the same machine.

    sap      `FusedSAP` on a `ProbeSet`, with their defaults
    blend    `BlendedAdamW` with its defaults; before there was one, `FusedSAP` with the same
             settings

`lora` is SmolLM2-135M's shapes with LoRA (r=8, dropout 0.05) on q and v, `full` four layers of
them, trained in full; both on 4 rows of 48 to 96 tokens and 4 safety pairs. `bf16`, where the
device computes in it, is autocast, for LoRA on bf16 weights. Ratios of time are taken within
rounds. Of memory there are two: `tensors_mb`, what of tensors is alive at most in a step beside the
model, which no other program disturbs; and `resident_mb`, by how much the process has grown at
most (on a GPU: its allocator). The last loss tells whether both did the same.
Writes `before_after.csv`; the exit status is 1 where a step takes more than 3 % more.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import sap_fast
from benchmarks.claims import before_after_claims, claims_table
from benchmarks.measuring import (
    Series,
    live_bytes,
    memory_events,
    peak,
    quartiles,
    ratios,
    reset_peak,
    resident_bytes,
    seconds_of,
    summary,
)
from benchmarks.provenance import RESULTS, ROOT, commit, replace_rows
from benchmarks.workloads import (
    DTYPES,
    SAFETY_PAIRS,
    SETUPS,
    THREADS,
    Batch,
    Case,
    Row,
    batches,
    trained_parameters,
)
from sap_fast import ops

METHODS = ("sap", "blend")
VERSIONS = ("before", "after")
BATCH = "4x96"
#: Of the time that there is, in parts: as a step takes longer, so do as many of them.
SHARES = {"lora": 2, "full": 1, "sap": 2, "blend": 1}
#: The first step calibrates ρ, on one row to save time; the fourth is the first that is not
#: blended whatever its L_safe, as `safety_level="auto"` looks at three.
WARM_UP_ROUNDS = 3
LEAST_ROUNDS = 4
#: Batches that the steps go round.
PREPARED = 8


# ---- one version, in a process of its own ----


def build_optimizer(method: str, model: Any) -> Any:
    """Return the optimizer of a method, in the words of the version that is imported."""
    trained = trained_parameters(model)
    if method == "sap":
        return sap_fast.FusedSAP(trained, sap_fast.ProbeSet(model), lr=1e-5)
    if hasattr(sap_fast, "BlendedAdamW"):
        return sap_fast.BlendedAdamW(trained, lr=1e-5)
    former: Any = sap_fast.FusedSAP
    return former(trained, lr=1e-5, safety_weight=0.3, safety_level="auto")


class Contender:
    """A model, and the optimizer of one version that trains it.

    Args:
        case: what is trained.
        method: one of `METHODS`.
        device: `"cpu"` or `"cuda"`.
    """

    def __init__(self, case: Case, method: str, device: str) -> None:
        torch.set_num_threads(THREADS)
        self._device, self._bf16 = device, case.dtype == "bf16"
        data = case.data()

        def moved(batch: Batch) -> Batch:
            return {name: tensor.to(device) for name, tensor in batch.items()}

        def prepared(task_rows: Sequence[Any], first: int, count: int) -> tuple[Batch, ...]:
            pairs = data.pairs(data.safety[first : first + count])
            return tuple(map(moved, (data.batch(task_rows), pairs["chosen"], pairs["rejected"])))

        rows = batches(data, case.rows, PREPARED)
        self._first = prepared(rows[0][:1], 0, 1)
        self._batches = [
            prepared(rows[number], number * SAFETY_PAIRS, SAFETY_PAIRS)
            for number in range(PREPARED)
        ]
        self._model = case.model().to(device).train()
        self._safety_loss = {
            "sap": sap_fast.contrastive_loss,
            "blend": sap_fast.joint_loss,
        }[method]
        self._loaded = live_bytes()
        self._resident = self._allocated("VmRSS")
        self._start_peak()
        self._optimizer = build_optimizer(method, self._model)
        self._number = 0
        self._loss = float("nan")
        torch.manual_seed(0)

    def facts(self) -> Row:
        """Return where the package lies, and whose operations it uses."""
        backend = ops.choose_backend("auto", self._device)
        return {"package": str(Path(sap_fast.__file__).resolve().parent), "backend": backend}

    def step(self) -> Row:
        """Train on the next batch, and return the seconds."""
        return {"seconds": seconds_of(self._train, self._device)}

    def memory(self) -> Row:
        """Return the peaks so far and of one more step in bytes, and the loss of its task pass."""
        grown = self._allocated("VmHWM") - self._resident
        kept = live_bytes() - self._loaded
        if self._device == "cpu":
            alive = kept + peak(memory_events(self._train))
        else:
            before = torch.cuda.memory_allocated()
            self._start_peak()
            self._train()
            alive = kept + torch.cuda.max_memory_allocated() - before
        return {"tensors": alive, "resident": grown, "loss": self._loss}

    def _allocated(self, entry: str) -> int:
        if self._device == "cpu":
            return resident_bytes(entry)
        names = {"VmRSS": "memory_allocated", "VmHWM": "max_memory_allocated"}
        return getattr(torch.cuda, names[entry])()

    def _start_peak(self) -> None:
        if self._device == "cpu":
            reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device, torch.bfloat16, enabled=self._bf16)

    def _train(self) -> None:
        prepared = self._batches[self._number % PREPARED] if self._number else self._first
        batch, chosen, rejected = prepared

        def task() -> torch.Tensor:
            with self._autocast():
                loss = sap_fast.task_loss(self._model, batch)
            loss.backward()
            return loss.detach()

        def safety() -> torch.Tensor:
            with self._autocast():
                loss = self._safety_loss(self._model, chosen, rejected)
            loss.backward()
            return loss.detach()

        self._loss = float(self._optimizer.step(task, safety))
        self._optimizer.zero_grad()
        self._number += 1


def serve(case: Case, method: str, device: str) -> None:
    """Do what each line of standard input says, and answer with a line of JSON each."""
    # Whatever else prints goes elsewhere.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contender = Contender(case, method, device)
    for order in itertools.chain(["facts"], map(str.strip, sys.stdin)):
        print(json.dumps(getattr(contender, order)()), file=answers, flush=True)


# ---- the process that hands out turns ----


class Worker:
    """A process in which one version serves; it computes only while it is asked.

    Args:
        checkout: whose `sap_fast` it imports.
        arguments: of this script, for the worker.
    """

    def __init__(self, checkout: Path, arguments: Sequence[str]) -> None:
        self._checkout = checkout
        self._folder = tempfile.TemporaryDirectory()
        # These benchmarks beside that package: a checkout's own would come with its `sap_fast`.
        folder = Path(self._folder.name)
        (folder / "sap_fast").symlink_to(checkout / "sap_fast", target_is_directory=True)
        (folder / "benchmarks").symlink_to(ROOT / "benchmarks", target_is_directory=True)
        self._errors = (folder / "errors.txt").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "benchmarks.before_after", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            # Threads that spin while they wait would compute in the other one's turn.
            env=os.environ | {"PYTHONPATH": str(folder), "OMP_WAIT_POLICY": "PASSIVE"},
        )

    def facts(self) -> Row:
        """Wait until it is ready, and return what it imported.

        Raises:
            RuntimeError: if it could not start, or has imported another package.
        """
        found = self._answer()
        if Path(found["package"]) != (self._checkout / "sap_fast").resolve():
            raise RuntimeError(f"{self._checkout} was to be measured, not {found['package']}")
        return found

    def ask(self, order: str) -> Row:
        """Hand over the turn: `"step"` or `"memory"`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Row:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            end = self._errors.read()[-2000:]
            raise RuntimeError(f"{self._checkout} failed:\n{end}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.communicate()
        self._errors.close()
        self._folder.cleanup()


def measure(
    case: Case,
    method: str,
    checkouts: Mapping[str, Path],
    arguments: Sequence[str],
    deadline: float,
) -> Row:
    """Return the row of one case and method.

    Args:
        case: what is trained.
        method: one of `METHODS`.
        checkouts: by version.
        arguments: of this script, for a worker.
        deadline: of `time.perf_counter`, after which no round starts.

    Raises:
        RuntimeError: if the versions use the operations of different backends, or one fails.
    """
    with contextlib.ExitStack() as stack:
        # Both load at once.
        workers = {
            version: stack.enter_context(Worker(checkout, arguments))
            for version, checkout in checkouts.items()
        }
        backends = {version: worker.facts()["backend"] for version, worker in workers.items()}
        if len(set(backends.values())) > 1:
            raise RuntimeError(
                f"the versions use different operations, {backends}: build the extension in both "
                "checkouts (python setup.py build_ext --inplace), or set SAP_FAST_BACKEND"
            )
        seconds: dict[str, Series] = {version: {} for version in workers}
        for number in _rounds(deadline):
            for version in VERSIONS if number % 2 else reversed(VERSIONS):
                taken = workers[version].ask("step")["seconds"]
                if number >= WARM_UP_ROUNDS:
                    seconds[version][number] = taken
        memory = {version: worker.ask("memory") for version, worker in workers.items()}
    low, middle, high = quartiles(ratios(seconds["after"], seconds["before"]))
    row = case.facts() | {"method": method}
    for version, series in seconds.items():
        row[f"{version}_s"] = summary(series, 1)["median_s"]
    row |= {"time_ratio": round(middle, 4), "time_q25": round(low, 4), "time_q75": round(high, 4)}
    fastest = {version: min(series.values()) for version, series in seconds.items()}
    row["fastest_ratio"] = round(fastest["after"] / fastest["before"], 4)
    for what in ("tensors", "resident"):
        sizes = {version: found[what] for version, found in memory.items()}
        row |= {f"{version}_{what}_mb": round(size / 1e6, 1) for version, size in sizes.items()}
        row[f"{what}_ratio"] = round(sizes["after"] / sizes["before"], 4)
    row |= {f"{version}_loss": round(found["loss"], 6) for version, found in memory.items()}
    return row | {"backend": backends["after"], "rounds": len(seconds["after"])}


def _rounds(deadline: float) -> Iterator[int]:
    number = 0
    # Each version begins as often as the other.
    while number < WARM_UP_ROUNDS + LEAST_ROUNDS or (
        time.perf_counter() < deadline or (number - WARM_UP_ROUNDS) % 2
    ):
        yield number
        number += 1


def computes_in_bf16(device: str) -> bool:
    """Return whether the device multiplies bf16 matrices itself."""
    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


# ---- the command ----


def show(rows: Sequence[Row], console: Console) -> None:
    """Print a table."""
    table = Table(
        *("what", "before", "after", "time ÷", "fastest ÷", "tensors ÷", "resident ÷", "losses"),
        title="After ÷ before",
    )
    for row in rows:
        table.add_row(
            f"{row['method']}, {row['setup']} {row['batch']} {row['dtype']}",
            f"{row['before_s']:.3f} s",
            f"{row['after_s']:.3f} s",
            f"{row['time_ratio']:.3f} ({row['time_q25']:.3f} to {row['time_q75']:.3f})",
            *(f"{row[name]:.3f}" for name in ("fastest_ratio", "tensors_ratio", "resident_ratio")),
            f"{row['before_loss']:.4f}, {row['after_loss']:.4f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the CSV, print the table; exit status 1 where the change costs too much.

    Args:
        arguments: of the command line, without the program's name; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, help="the other checkout")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all cases together (9)")
    parser.add_argument(
        "--only", default="", metavar="WORDS", help="what has all of these words, as lora,sap"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models: seconds")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = "tiny" if options.quick else "random"
    if options.serve:
        setup, dtype, method = options.serve
        serve(Case(setup, BATCH, dtype, source), method, device)
        return 0

    if options.before is None or not (options.before / "sap_fast" / "__init__.py").exists():
        parser.error(f"--before {options.before}: expected a folder that holds sap_fast/")
    checkouts = {"before": options.before.resolve(), "after": ROOT}
    wanted = set(options.only.split(",")) - {""}
    native = DTYPES if computes_in_bf16(device) else ("fp32",)
    cells = [
        (Case(setup, BATCH, dtype, source), method)
        for setup in SETUPS
        for dtype in native
        for method in METHODS
        if wanted <= {setup, dtype, method}
    ]
    if not cells:
        parser.error(f"--only {options.only}: no case has these words; see --help")
    torch.set_num_threads(THREADS)  # as the rows say
    console = Console(width=140)
    rows: list[Row] = []
    started = time.perf_counter()
    shares = [SHARES[case.setup] * SHARES[method] for case, method in cells]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(cells))
        for number, (case, method) in enumerate(cells, start=1):
            progress.update(bar, description=f"{method}, {' '.join(case.facts().values())}")
            words = ["--serve", case.setup, case.dtype, method, *["--quick"] * options.quick]
            deadline = started + 60 * options.minutes * sum(shares[:number]) / sum(shares)
            row = measure(case, method, checkouts, words, deadline)
            rows.append(row | {"before_commit": commit(checkouts["before"])})
            identity = ("setup", "batch", "dtype", "method")
            path = replace_rows("before_after.csv", rows[-1:], identity, options.output)
            progress.advance(bar)
    show(rows, console)
    found = before_after_claims(rows)
    console.print(claims_table(found))
    console.print(f"Wrote {path}")
    # The figures of tiny models mean nothing.
    return 0 if options.quick or all(claim.met for claim in found) else 1


if __name__ == "__main__":
    sys.exit(main())
