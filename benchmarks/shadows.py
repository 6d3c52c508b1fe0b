"""W ± ΔW written as shadows of W, beside the swap that the package does: time, memory, faults.

The swap (`step.guards.Perturbation`) writes W + ΔW over W, and W into the buffer that held the
direction. Under autocast with fp32 parameters every linear layer then casts its weight to bf16. A
shadow is that cast: W ± ΔW in bf16, rounded once, in the place of the parameter's tensor, whose own
memory is never written. What is not multiplied in bf16 (embeddings, norms) has its shadow in fp32.

    python -m benchmarks.shadows            # two minutes on an idle machine
    python -m benchmarks.shadows --facts    # memory and faults alone: other work does not move them

Runs the two probe passes of a full fine-tuning under bf16 autocast in both ways, with a direction
that they may use up and with one that is kept in int8. Writes `shadows.csv`: the peak of memory on
top of what is there before; what errors at operations leave behind; and seconds, interleaved, as
medians and as the ratio to the swap's in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measuring import Series, memory_events, peak, ratio, seconds_of
from benchmarks.provenance import RESULTS, replace_rows
from benchmarks.workloads import LLAMA_1B, THREADS, Row, Shape, random_data, random_llama
from sap_fast import ProbeSet, SafetyPasses, contrastive_loss, task_loss
from sap_fast.ops.blockwise import Quantized, dequantize
from sap_fast.step import trained
from sap_fast.step.direction import Direction, Kept
from sap_fast.step.guards import Perturbation

#: What is trained, by device. The first is large enough for int8, and small enough for a CPU.
SHAPES = {
    "cpu": Shape("random Llama of 17 M", 512, 4, 8, 8, 1408, 4096, tied=False),
    "cuda": LLAMA_1B,
}
ROWS, LENGTH = 4, 64
ROUNDS = 7
#: What errors are injected into, at every so manieth operation.
SMALL = Shape("random Llama of 7 M", 512, 2, 8, 8, 1408, 1024, tied=False)
STRIDE = 101
WAYS = ("swap", "shadows")
DIRECTIONS = ("used up", "kept")
FILE = "shadows.csv"


# ---- the prototype ----


class Shadows:
    """W ± ΔW in the place of W, in memory of its own; with the interface of `Perturbation`.

    Args:
        params: parameters W.
        kept: the direction, a tensor or codes and scales per parameter. Only read.
        scale: ρ‖W‖/‖direction‖, 0-d.
        backend: unused.
    """

    #: Parameters that are multiplied in bf16 and in nothing else.
    low: frozenset[nn.Parameter] = frozenset()

    def __init__(
        self,
        params: Sequence[nn.Parameter],
        kept: Sequence[Kept],
        scale: Tensor,
        *,
        backend: str = "auto",
    ) -> None:
        self._params, self._kept, self._scale = params, kept, scale
        self._own: list[Tensor] = []

    def __enter__(self) -> Shadows:
        self._own = [parameter.data for parameter in self._params]
        try:
            self._write(self._scale)
        except BaseException:
            self.__exit__()
            raise
        return self

    def reflect(self) -> None:
        """Go from W + ΔW to W − ΔW."""
        self._write(-self._scale)

    @torch.no_grad()
    def _write(self, scale: Tensor) -> None:
        for parameter, own, kept in zip(self._params, self._own, self._kept, strict=True):
            d = dequantize(kept, own.dtype) if isinstance(kept, Quantized) else kept
            moved = torch.where(scale == 0, own, own + scale * d)
            parameter.data = moved.bfloat16() if parameter in self.low else moved

    @torch.no_grad()
    def applied_norm(self, dtype: torch.dtype | None) -> Tensor:
        """Return the norm of the perturbation that is left once weights are rounded to `dtype`."""
        squares = [
            (p.to(dtype or p.dtype).float() - own.to(dtype or own.dtype).float()).square().sum()
            for p, own in zip(self._params, self._own, strict=True)
        ]
        return torch.stack(squares).sum().sqrt()

    def __exit__(self, *exception: object) -> None:
        # Nothing is computed and nothing allocated here, so that nothing can fail.
        for parameter, own in zip(self._params, self._own, strict=True):
            parameter.data = own


def multiplied_in_bf16(model: nn.Module) -> frozenset[nn.Parameter]:
    """Return the weights that only linear modules have: autocast casts no other ones here."""
    linear = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    others = {
        parameter
        for module in model.modules()
        if not isinstance(module, nn.Linear)
        for parameter in module.parameters(recurse=False)
    }
    return frozenset(linear - others)


@contextmanager
def way(name: str, model: nn.Module) -> Iterator[None]:
    """Let probe passes perturb in one of the two ways."""
    if name == "swap":
        yield
        return

    def read_only(self: Direction, *, keep: bool) -> Any:
        assert self.kept is not None
        return self.kept

    buffers, low = Direction.buffers, Shadows.low
    # mypy takes it for a mistake to put something in the place of a class or a method.
    try:
        trained.Perturbation = Shadows  # type: ignore[assignment, misc]
        Direction.buffers = read_only  # type: ignore[method-assign]
        Shadows.low = multiplied_in_bf16(model)
        yield
    finally:
        trained.Perturbation = Perturbation  # type: ignore[misc]
        Direction.buffers = buffers  # type: ignore[method-assign]
        Shadows.low = low


# ---- what runs ----


class Run:
    """Probe passes of a full fine-tuning under bf16 autocast, any number of times.

    Args:
        shape: of the model.
        device: where it is.
        kept: the direction is kept, for later steps.
        rows: of the task batch.
        length: tokens of a row.
    """

    def __init__(self, shape: Shape, device: str, kept: bool, rows: int, length: int) -> None:
        self.device = device
        self.model = random_llama(shape, device=device).train()
        data = random_data(length, vocabulary=shape.vocabulary, rows=rows, equal=True)
        self._batch, self._pairs = data.batch(data.task), data.pairs(data.safety[: rows // 2 or 1])
        probes = ProbeSet(self.model, rho=1e-2)
        self.passes = SafetyPasses(
            self.model.parameters(), probes, safety_weight=0.0, direction_every=2 if kept else 1
        )
        self.prepare()

    def prepare(self) -> None:
        """Take the direction that the next probe passes use, if there is none."""
        if not self.passes.direction.is_there:
            self.passes.safety_pass(self._safety)

    def probe_passes(self) -> None:
        """Run the two probe passes."""
        self.passes.probe_passes(self._task)

    def _backward(self, loss: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            value = loss()
        value.backward()
        return value

    def _task(self, _: object) -> Tensor:
        batch = {name: tensor.to(self.device) for name, tensor in self._batch.items()}
        return self._backward(lambda: task_loss(self.model, batch))

    def _safety(self) -> Tensor:
        chosen, rejected = (
            {name: tensor.to(self.device) for name, tensor in self._pairs[which].items()}
            for which in ("chosen", "rejected")
        )
        return self._backward(lambda: contrastive_loss(self.model, chosen, rejected))


# ---- memory ----


def memory(run: Run) -> int:
    """Return the peak in bytes of probe passes, on top of what is there before them."""
    run.prepare()
    if run.device == "cpu":
        return peak(memory_events(run.probe_passes))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run.probe_passes()
    return torch.cuda.max_memory_allocated() - before


# ---- faults ----


class FailFrom(TorchDispatchMode):
    """Raises in the place of the n-th operation, and if `lasting` of all that follow.

    Looks at memory when it first raises.
    """

    def __init__(self, at: int | None, lasting: bool, look: Callable[[], bool]) -> None:
        super().__init__()
        self._at, self._lasting, self._look = at, lasting, look
        self.count = 0
        self.found: bool | None = None

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        if self._at is not None and (
            self.count == self._at or (self._lasting and self.count > self._at)
        ):
            if self.found is None:
                self.found = self._look()
            raise RuntimeError("injected")
        return func(*args, **(kwargs or {}))


def faults(run: Run, stride: int) -> Row:
    """Return what errors at operations of the probe passes find and leave.

    Counted are errors; those at which the memory of W did not hold W, as a kill would leave it; and
    those after which the parameters did not hold W: where the operation alone failed, and where all
    that follow did too, as on a device that is lost.
    """
    own = [parameter.data for parameter in run.model.parameters()]
    copies = [tensor.clone() for tensor in own]

    def moved(tensors: Sequence[Tensor]) -> bool:
        return any(not torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))

    run.prepare()
    with FailFrom(None, False, bool) as counter:
        run.probe_passes()
    tried = overwritten = lost = lost_for_good = 0
    for at in range(1, counter.count, stride):
        for lasting in (False, True):
            run.prepare()
            mode = FailFrom(at, lasting, lambda: moved(own))
            try:
                with mode:
                    run.probe_passes()
            except RuntimeError as error:
                if "injected" not in str(error):
                    raise
            after = moved([parameter.data for parameter in run.model.parameters()])
            for parameter, tensor, copy in zip(run.model.parameters(), own, copies, strict=True):
                parameter.data = tensor.copy_(copy)
                parameter.requires_grad_(True)
            if lasting:
                lost_for_good += after
            else:
                tried, overwritten, lost = tried + 1, overwritten + bool(mode.found), lost + after
            run.passes.begin()
    return {
        "errors": tried,
        "overwritten": overwritten,
        "lost": lost,
        "lost_if_lasting": lost_for_good,
    }


# ---- all of it ----


def measure(
    shape: Shape,
    small: Shape,
    device: str,
    *,
    rounds: int,
    stride: int,
    rows: int = ROWS,
    length: int = LENGTH,
) -> Iterator[Row]:
    """Yield a row for every measurement; errors go into a `small` model.

    Without rounds no time is taken.
    """
    for direction in DIRECTIONS:
        run = Run(small, device, direction == "kept", 2, 16)
        for name in WAYS:
            with way(name, run.model):
                found = faults(run, stride)
            yield {
                "kind": "faults",
                "direction": direction,
                "way": name,
                **_of(run, small),
                **found,
            }
        run = Run(shape, device, direction == "kept", rows, length)
        facts = {"direction": direction, **_of(run, shape)}
        estimates: dict[str, Tensor] = {}
        for name in WAYS:
            with way(name, run.model):
                size = memory(run)
                assert run.passes.probes is not None
                estimates[name] = torch.cat(list(run.passes.probes.estimates.values()))
            cosine = torch.cosine_similarity(estimates[name], estimates["swap"], dim=0).item()
            yield {
                **facts,
                "kind": "memory",
                "way": name,
                "peak_mb": round(size / 1e6, 1),
                "bytes_per_parameter": round(size / facts["parameters"], 2),
                "cosine_of_h": round(cosine, 6),
            }
        series: dict[str, Series] = {name: {} for name in WAYS}
        for number in range(rounds + 1 if rounds else 0):
            for name in WAYS:
                with way(name, run.model):
                    run.prepare()
                    taken = seconds_of(run.probe_passes, device)
                if number:  # the first warms up
                    series[name][number] = taken
        for name in WAYS if rounds else ():
            yield {
                **facts,
                "kind": "seconds",
                "way": name,
                "rounds": rounds,
                "median_s": round(statistics.median(series[name].values()), 4),
                "ratio": ratio(series[name], series["swap"], 1),
            }


def _of(run: Run, shape: Shape) -> Row:
    count = sum(parameter.numel() for parameter in run.model.parameters())
    return {"model": shape.name, "parameters": count}


def show(rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    columns = ("kind", "direction", "way")
    figures = ("peak_mb", "errors", "overwritten", "lost", "lost_if_lasting", "median_s", "ratio")
    table = Table(*columns, *figures)
    for row in rows:
        table.add_row(*(str(row.get(name, "")) for name in (*columns, *figures)))
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """Measure both ways, write the CSV and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the CSV goes")
    parser.add_argument("--device", choices=tuple(SHAPES), default="cpu")
    parser.add_argument("--facts", action="store_true", help="take no time")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(THREADS)
    rows = []
    for row in measure(
        SHAPES[options.device],
        SMALL,
        options.device,
        rounds=0 if options.facts else ROUNDS,
        stride=STRIDE,
    ):
        rows.append(row)  # as they come: a run that is interrupted keeps them
        replace_rows(FILE, [row], ("kind", "model", "direction", "way"), options.folder)
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
