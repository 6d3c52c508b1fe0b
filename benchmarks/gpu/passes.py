"""Each pass of a step by itself: where its time goes, and how much of the card it uses.

    wall    from an idle device to an idle device
    host    until Python has queued everything
    busy    while at least one kernel runs, as the profiler has it

`mfu` counts the matrix products of a pass once, and of attention the half below the diagonal: what
checkpointing or a fused backward computes again is no use. It is a share of the card's dense peak
in bf16; `of_product` is one of the rate of an 8192³ product here.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import nn

from benchmarks.cost_model import Job, Pass, Tokens, pass_flops
from benchmarks.gpu import ceilings
from benchmarks.gpu.kernels import busy, by_class, kernels_of
from benchmarks.gpu.llama import CASES, backward, build_model, length_of, random_batch, random_pairs
from benchmarks.gpu.parts import Part, Setting, Stage, rows_of
from benchmarks.predictions import PEAK_FLOPS
from benchmarks.provenance import RESULTS
from benchmarks.workloads import RHO, Row, trained_parameters
from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss

ROWS = 4
ROUNDS = 3
#: Of the passes that are ours.
CHECKPOINTING: Literal["auto"] = "auto"
#: Dense peaks in bf16, from NVIDIA's data sheets, by what the name of the card holds.
PEAKS = {"A100": 312e12, "H100": PEAK_FLOPS, "H200": PEAK_FLOPS, "B200": 2250e12}
#: Which pass of the cost model a work is, and how often.
COUNTED: dict[str, tuple[Pass, int]] = {
    "HF's loss": ("task", 1),
    "our loss": ("task", 1),
    "safety pass": ("safety", 1),
    "probe passes": ("probe", 2),
    "task pass": ("task", 1),
}


def measure(name: str, setting: Setting) -> list[Row]:
    """Return a row for each pass of a case, and for the passes that plain AdamW has."""
    device = setting.device
    case = CASES[name].sized(setting.dry)
    model = build_model(case, device)
    torch.manual_seed(1)
    length, vocabulary = length_of(setting.dry), case.shape.vocabulary
    batch = random_batch(ROWS, length, length // 2, vocabulary, device)
    chosen, rejected = random_pairs(vocabulary, device, setting.dry)
    trained = trained_parameters(model)
    probes = ProbeSet(model, rho=RHO, checkpointing=CHECKPOINTING)
    optimizer = FusedSAP(trained, probes, lr=1e-5, max_grad_norm=1.0)
    adamw = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    passes = optimizer.passes

    def task(_: object = None) -> torch.Tensor:
        return backward(lambda: task_loss(model, batch), device)

    def task_pass() -> None:
        with passes.task_pass() as record:
            record(task())

    def plain_update() -> None:
        nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def safety() -> torch.Tensor:
        return backward(lambda: contrastive_loss(model, chosen, rejected), device)

    # Each leaves what the next one needs.
    works: dict[str, Callable[[], object]] = {
        "HF's loss": lambda: backward(lambda: model(**batch).loss, device),
        "clear": lambda: model.zero_grad(),
        "our loss": task,
        "AdamW(fused=True)": plain_update,
        "safety pass": lambda: passes.safety_pass(safety),
        "probe passes": lambda: passes.probe_passes(task, batch),
        "task pass": task_pass,
        "update": update,
    }
    job = Job(
        case.shape,
        case.lora,
        {
            "task": Tokens(ROWS * length, ROWS * length**2 / 2, ROWS * length / 2),
            "probe": Tokens(ROWS * length, ROWS * length**2 / 2, ROWS * length / 2),
            "safety": _safety_tokens(chosen),
        },
        dtype="bf16",
        flash_backward=False,
        device="cuda",
    )
    times: dict[str, list[tuple[float, float]]] = {work: [] for work in works}
    peaks: dict[str, int] = {}
    for number in range(1 if setting.dry else 1 + ROUNDS):
        for label, work in works.items():
            if device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            taken = timed(work, device)
            if number or setting.dry:
                times[label].append(taken)
            peaks[label] = torch.cuda.max_memory_allocated() if device != "cpu" else 0
    rows = []
    ceiling = _product_rate(setting)
    for label, work in works.items():
        kernels = kernels_of(work, device)
        if label == "clear":
            continue
        wall = statistics.median(wall for _, wall in times[label])
        rows.append(
            case.facts()
            | {
                "checkpointing": CHECKPOINTING,
                "pass": label,
                "wall_ms": round(1e3 * wall, 3),
                "host_ms": round(1e3 * statistics.median(host for host, _ in times[label]), 3),
                "busy_ms": round(busy(kernels) / 1e6, 3),
                "kernels": len(kernels),
                "peak_gb": round(peaks[label] / 1e9, 2),
            }
            | utilisation(label, job, wall, ceiling)
            | by_class(kernels)
        )
    probes.detach()
    return rows


def timed(work: Callable[[], object], device: str) -> tuple[float, float]:
    """Return the seconds until all is queued and until all is done."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    queued = time.perf_counter() - start
    if device != "cpu":
        torch.cuda.synchronize()
    return queued, time.perf_counter() - start


def utilisation(label: str, job: Job, wall: float, ceiling: float | None) -> Row:
    """Return the rate of a pass, and its shares of the peak and of what a product reaches here."""
    if label not in COUNTED:
        return {"tflop_per_s": "", "mfu": "", "of_product": ""}
    kind, times = COUNTED[label]
    job = dataclasses.replace(job, full_logits=label == "HF's loss")
    rate = times * pass_flops(job, kind) / wall
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for name, value in PEAKS.items() if name in card), None)
    return {
        "tflop_per_s": round(rate / 1e12, 3),
        "mfu": "" if peak is None else round(rate / peak, 3),
        "of_product": "" if ceiling is None else round(rate / 1e12 / ceiling, 3),
    }


def _safety_tokens(chosen: dict[str, torch.Tensor]) -> Tokens:
    """Pairs packed into one row: a prompt and two answers of each."""
    pairs, length = chosen["input_ids"].shape
    tokens = pairs * 3 * length / 2
    return Tokens(tokens, tokens**2 / 2, pairs * length)


def _product_rate(setting: Setting) -> float | None:
    """Return the TFLOP/s of the product that `ceilings` timed in this run or an earlier one."""
    rows = rows_of(ceilings.STAGE, [setting.output, RESULTS]).get("products", [])
    return next((float(row["value"]) for row in rows if row.get("value")), None)


STAGE = Stage(
    "passes",
    ("model", "pass", "wall_ms", "host_ms", "busy_ms", "kernels", "mfu", "of_product", "peak_gb"),
    tuple(Part(name, 45, partial(measure, name)) for name in CASES),
)
