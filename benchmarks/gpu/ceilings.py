"""What the card and its host can do at best: everything else is a share of these figures."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu.parts import Part, Setting, Stage
from benchmarks.measuring import seconds_of
from benchmarks.workloads import Row
from sap_fast import ops

#: Elements of an operand in fp32: 1 GiB, many times the cache of any card.
ELEMENTS = 2**28
SIDE = 8192
LAUNCHES = 2000
ROUNDS = 10


def bandwidth(setting: Setting) -> list[Row]:
    """Return the rate of a copy and of a STREAM triad, bytes read and written counted."""
    count = 2**12 if setting.dry else ELEMENTS
    a, b, c = (torch.ones(count, device=setting.device) for _ in range(3))
    works: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (8 * count, lambda: a.copy_(b)),
        "triad": (12 * count, lambda: torch.add(b, c, alpha=3.0, out=a)),
    }
    rows = []
    for name, (size, work) in works.items():
        milliseconds = _ms(work, setting)
        row: Row = {"what": name, "median_ms": round(milliseconds, 4)}
        rows.append(row | {"value": float(f"{size / milliseconds / 1e6:.4g}"), "unit": "GB/s"})
    return rows


def products(setting: Setting) -> list[Row]:
    """Return the rate of a product of random matrices in bf16."""
    side = 64 if setting.dry else SIDE
    a, b = (torch.randn(side, side, device=setting.device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    milliseconds = _ms(lambda: torch.mm(a, b, out=out), setting)
    rate = 2 * side**3 / milliseconds / 1e9
    return [
        {
            "what": f"bf16 product of {side}³",
            "median_ms": round(milliseconds, 4),
            "value": float(f"{rate:.4g}"),
            "unit": "TFLOP/s",
        }
    ]


def launches(setting: Setting) -> list[Row]:
    """Return how long the host takes to queue small work, in microseconds a call."""
    x = torch.ones(64, device=setting.device)
    params, buffers = ([torch.ones(64, device=setting.device)] for _ in range(2))
    works: dict[str, Callable[[], object]] = {"torch: x.add_(1)": lambda: x.add_(1.0)}
    for backend in ("native", "triton", "reference"):
        if ops.why_not(backend, setting.device) is None:
            works[f"{backend}: reflect_ of one tensor"] = lambda backend=backend: ops.reflect_(
                params, buffers, backend=backend
            )
    rows = []
    count = 5 if setting.dry else LAUNCHES
    for name, work in works.items():
        for _ in range(3):
            work()
        _wait(setting.device)
        start = time.perf_counter()
        for _ in range(count):
            work()
        taken = time.perf_counter() - start
        _wait(setting.device)
        row = {"what": f"launch, {name}", "median_ms": round(1e3 * taken / count, 5)}
        rows.append(row | {"value": round(1e6 * taken / count, 2), "unit": "µs"})
    return rows


def _ms(work: Callable[[], object], setting: Setting) -> float:
    for _ in range(1 if setting.dry else 3):
        work()
    rounds = 1 if setting.dry else ROUNDS
    return 1e3 * statistics.median(seconds_of(work, setting.device) for _ in range(rounds))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


STAGE = Stage(
    "ceilings",
    ("what", "value", "unit"),
    (Part("bandwidth", 20, bandwidth), Part("products", 15, products), Part("host", 25, launches)),
)
