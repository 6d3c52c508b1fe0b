"""The operations by themselves, the CUDA kernels beside Triton's, and both beside PyTorch.

`…_ms` is the time of a CUDA graph's replay, in which no host takes part; `…_call_ms` that of calls
from Python, one after the other, which is what lists of many small tensors cost in a step.
`…_of_triad` is the share of a STREAM triad's rate at which an operation moves its bytes, for lists
that are large enough to be limited by it.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu.parts import Part, Setting, Stage, failure
from benchmarks.measuring import seconds_of
from benchmarks.ops import ADAMW, DTYPES, LARGE, LISTS, State, make_state, torch_fused_adamw
from benchmarks.workloads import Row
from sap_fast import ops

BACKENDS = ("native", "triton")
#: By name, the bytes that an operation moves and the operation.
Works = dict[str, tuple[float, Callable[[], object]]]
REPLAYS, ROUNDS = 10, 5
#: Tokens × hidden of what the probe's operations run on.
HIDDEN = (8192, 4096)


def works_on_lists(state: State, backend: str) -> Works:
    """Return the operations on lists."""
    width, elements = state.width, state.elements
    scale = torch.tensor(1e-3, device=state.params[0].device)
    blend, half = torch.tensor(0.1, device=scale.device), torch.tensor(0.5, device=scale.device)
    ours = (state.params, state.grads, *state[3:])

    def call(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
        return functools.partial(function, *arguments, backend=backend)

    def adamw(*directions: object, **settings: Tensor) -> Callable[[], object]:
        options = ADAMW | settings | {"backend": backend}
        return functools.partial(ops.adamw_blend_, *ours, *directions, **options)

    return {
        "sum_squares": (width * elements, call(ops.sum_squares, state.params)),
        "perturb_swap_": (
            4 * width * elements,
            call(ops.perturb_swap_, state.params, state.buffers, scale),
        ),
        "reflect_": (3 * width * elements, call(ops.reflect_, state.params, state.buffers)),
        "restore_swap_": (
            4 * width * elements,
            call(ops.restore_swap_, state.params, state.buffers, 1 / scale),
        ),
        "adamw_blend_": ((3 * width + 16) * elements, adamw()),
        "adamw_blend_, blended": (
            (4 * width + 16) * elements,
            adamw(state.buffers, blend=blend, gradient_scale=half),
        ),
    }


def torch_works(state: State) -> Works:
    """Return what PyTorch has beside them."""
    width, elements = state.width, state.elements
    return {
        "sum_squares": (width * elements, lambda: torch._foreach_norm(state.params)),
        "adamw_blend_": (7 * width * elements, torch_fused_adamw(state)),
    }


def probe_works(dtype: torch.dtype, device: str, dry: bool, backend: str) -> Works:
    """Return the operations on hidden states."""
    tokens, width = (8, 64) if dry else HIDDEN
    hidden = torch.randn(tokens, width, device=device).to(dtype)
    offset, buffer = torch.randn(2, width, device=device).unbind()
    size = hidden.nbytes
    return {
        "probe_add": (2 * size, lambda: ops.call("probe_add", backend, hidden, offset)),
        "probe_project_": (
            size,
            lambda: ops.call("probe_project_", backend, buffer, hidden, 1.0),
        ),
    }


def measure(lists: str, kind: str, setting: Setting) -> list[Row]:
    """Return a row for each operation on one of the lists, or on hidden states."""
    device, dtype = setting.device, DTYPES[kind]
    on_hidden = lists == "hidden states"
    state = None if on_hidden else make_state(_shapes(lists, setting.dry), dtype, device)
    triad = triad_rate(setting) if on_hidden or lists in LARGE else None
    rows: dict[str, Row] = {}

    def add(works: Works, backend: str) -> None:
        for name, (size, work) in works.items():
            row = rows.setdefault(name, {"lists": lists, "dtype": kind, "operation": name})
            if triad is not None:
                row["triad_GB_per_s"] = round(triad, 1)
            row |= time_work(backend, size, work, triad, setting)

    # Where a dry run has no GPU, what there is takes the place of the backends.
    for column, backend in zip(BACKENDS, ("native", "reference"), strict=True):
        backend = backend if device == "cpu" else column
        if ops.why_not(backend, device) is None:
            ours = (
                probe_works(dtype, device, setting.dry, backend)
                if state is None
                else works_on_lists(state, backend)
            )
            add(ours, column)
    if state is not None:
        add(torch_works(state), "torch")
    return list(rows.values())


def _shapes(lists: str, dry: bool) -> list[tuple[int, ...]]:
    return [(3, 5), (7,)] if dry else LISTS[lists]


def triad_rate(setting: Setting) -> float:
    """Return the GB/s of a ← b + 3·c on arrays of 256 MiB, as `time_work` times."""
    count = 2**10 if setting.dry else 2**26
    a, b, c = (torch.ones(count, device=setting.device) for _ in range(3))
    milliseconds = device_ms(lambda: torch.add(b, c, alpha=3.0, out=a), setting)
    return 12 * count / milliseconds / 1e6


def time_work(
    backend: str, size: float, work: Callable[[], object], triad: float | None, setting: Setting
) -> Row:
    """Return the columns of a backend; what goes wrong if it cannot be run."""
    count = _replays(setting)
    try:
        calls = [
            seconds_of(lambda: [work() for _ in range(count)], setting.device)
            for _ in range(2 if setting.dry else 1 + ROUNDS)
        ]
        milliseconds = device_ms(work, setting)
    except Exception as error:  # one that fails leaves the others
        return {f"{backend}_ms": failure(error)["error"]}
    row: Row = {f"{backend}_ms": round(milliseconds, 4)}
    row[f"{backend}_call_ms"] = round(1e3 * statistics.median(calls[1:]) / count, 4)
    if triad is not None:
        row[f"{backend}_of_triad"] = round(size / milliseconds / 1e6 / triad, 3)
    return row


def _replays(setting: Setting) -> int:
    return 1 if setting.dry else REPLAYS


def device_ms(work: Callable[[], object], setting: Setting) -> float:
    """Return the milliseconds of some work in a CUDA graph; on the CPU, of a call."""
    if setting.device == "cpu":
        return 1e3 * seconds_of(work, "cpu")
    count = _replays(setting)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()  # compiles, and fills what is kept per stream
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            work()
    graph.replay()
    rounds = [seconds_of(graph.replay, "cuda") for _ in range(ROUNDS)]
    return 1e3 * statistics.median(rounds) / count


STAGE = Stage(
    "operations",
    (
        *("lists", "dtype", "operation"),
        *(f"{backend}_ms" for backend in (*BACKENDS, "torch")),
        *(f"{backend}_call_ms" for backend in (*BACKENDS, "torch")),
        *(f"{backend}_of_triad" for backend in BACKENDS),
    ),
    tuple(
        Part(f"{lists} {kind}", 15, functools.partial(measure, lists, kind))
        for lists in ("large", "lora", "mixed", "hidden states")
        for kind in DTYPES
    ),
)
