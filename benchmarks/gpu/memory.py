"""What a step allocates, and how true h is on this device.

`snapshot` records the allocations of one step of SAP, and keeps them as PyTorch's memory viewer
(pytorch.org/memory_viz) reads them, packed by gzip. `oracle` compares h with an fp32 oracle by
double backward on the device, for every backend, in fp32 and under bf16 autocast.
"""

from __future__ import annotations

import gzip
import pickle
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from benchmarks import full_logits
from benchmarks.gpu.llama import (
    CASES,
    Case,
    backward,
    build_model,
    length_of,
    random_batch,
    random_pairs,
)
from benchmarks.gpu.parts import Part, Setting, Stage, release
from benchmarks.measuring import memory_events, peak
from benchmarks.provenance import gpu_name
from benchmarks.workloads import LLAMA_1B, RHO, TINY, Row, random_llama, trained_parameters
from sap_fast import FusedSAP, ProbeSet, contrastive_loss, ops, task_loss
from tests.oracle import cosine, naive_task_loss, oracle_estimate

ROWS = 4
#: Events of the allocator that are recorded, and bytes of the file beyond which it is not kept.
MOST_EVENTS, MOST_BYTES = 200_000, 15 * 2**20
#: Layers and tokens of a row of the model that has an oracle: with double backward they fit on any
#: card.
ORACLE_LAYERS, ORACLE_LENGTH = 8, 128


def snapshot(setting: Setting) -> list[Row]:
    """Return what the allocator says of a step, and write its snapshot."""
    device, case = setting.device, CASES["8b-lora"].sized(setting.dry)
    model = build_model(case, device)
    torch.manual_seed(1)
    length, vocabulary = length_of(setting.dry), case.shape.vocabulary
    batch = random_batch(ROWS, length, length // 2, vocabulary, device)
    pairs = random_pairs(vocabulary, device, setting.dry)
    probes = ProbeSet(model, rho=RHO)
    optimizer = FusedSAP(trained_parameters(model), probes, lr=1e-5, max_grad_norm=1.0)

    def step() -> None:
        optimizer.step(
            lambda part: backward(lambda: task_loss(model, part), device),
            lambda: backward(lambda: contrastive_loss(model, *pairs), device),
            batch,
        )
        optimizer.zero_grad()

    step()  # allocates state
    row = case.facts()
    if device == "cpu":
        events = memory_events(step)
        return [row | {"allocations": sum(e > 0 for e in events), "peak_gb": peak(events) / 1e9}]
    release(device)
    torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python")
    before = torch.cuda.memory_stats()
    try:
        step()
        torch.cuda.synchronize()
        packed = gzip.compress(pickle.dumps(torch.cuda.memory._snapshot()))
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    after = torch.cuda.memory_stats()
    kept = len(packed) <= MOST_BYTES
    if kept:
        file = setting.output / f"gpu_snapshot-{gpu_name()}.pickle.gz"
        file.write_bytes(packed)
    probes.detach()

    def counted(name: str) -> int:
        return int(after[name] - before[name])

    return [
        row
        | {
            "peak_gb": round(after["allocated_bytes.all.peak"] / 1e9, 2),
            "reserved_gb": round(after["reserved_bytes.all.peak"] / 1e9, 2),
            "stays_gb": round(after["allocated_bytes.all.current"] / 1e9, 2),
            "allocations": counted("allocation.all.allocated"),
            "segments": counted("segment.all.allocated"),
            "retries": counted("num_alloc_retries"),
            "snapshot_mb": round(len(packed) / 1e6, 2) if kept else "too large",
        }
    ]


def oracle(setting: Setting) -> list[Row]:
    """Return cosine and size of h beside the oracle's, by backend and arithmetic."""
    device = setting.device
    case = Case(TINY if setting.dry else LLAMA_1B, "full")
    shape = case.shape
    length = 16 if setting.dry else ORACLE_LENGTH
    model: Any = random_llama(shape, device=device, attn_implementation="eager", use_cache=False)
    layers = model.model.layers
    del layers[min(len(layers), ORACLE_LAYERS) :]
    model.config.num_hidden_layers = len(layers)
    torch.manual_seed(1)
    batch = random_batch(2, length, length // 2, shape.vocabulary, device)
    chosen, rejected = random_pairs(shape.vocabulary, device, setting.dry)
    trained = trained_parameters(model)
    probes = ProbeSet(model, layers=[0, 1])
    with torch.device(device):
        exact = oracle_estimate(
            lambda: naive_task_loss(model, batch),
            lambda: full_logits.contrastive_loss(model, chosen, rejected),
            trained,
            dict(probes.modules),
            (shape.hidden,),
        )
    probes.detach()
    release(device)
    rows = []
    for backend in ("native", "triton", "reference"):
        if ops.why_not(backend, device) is not None:
            continue
        for arithmetic in ("fp32", "bf16 autocast"):
            pairs = chosen, rejected
            found, rho = _estimate(model, backend, arithmetic, batch, pairs, setting)
            ratio = _norm(found) / _norm(exact)
            rows.append(
                {"model": shape.name, "trained": f"full, {len(layers)} layers"}
                | {"backend": backend, "arithmetic": arithmetic, "rho": f"{rho:.3g}"}
                | {"cosine": round(cosine(found, exact), 6), "relative_size": round(ratio, 4)}
            )
    return rows


def _estimate(
    model: Any,
    backend: str,
    arithmetic: str,
    batch: dict[str, Tensor],
    pairs: tuple[dict[str, Tensor], dict[str, Tensor]],
    setting: Setting,
) -> tuple[dict[int, Tensor], float]:
    """Return h, and the ρ that was calibrated, of a step with the learning rate at zero."""
    probes = ProbeSet(model, layers=[0, 1])
    optimizer = FusedSAP(trained_parameters(model), probes, lr=0.0, backend=backend)

    def run(loss: Any) -> Tensor:
        bf16 = arithmetic != "fp32"
        with torch.autocast(setting.device, torch.bfloat16) if bf16 else nullcontext():
            value: Tensor = loss()
        value.backward()
        return value.detach()

    optimizer.step(
        lambda part: run(lambda: task_loss(model, part)),
        lambda: run(lambda: contrastive_loss(model, *pairs)),
        batch,
    )
    optimizer.zero_grad()
    found, calibration = dict(probes.estimates), optimizer.passes.calibration
    probes.detach()
    return found, calibration.rho if calibration is not None else float("nan")


def _norm(estimate: dict[int, Tensor]) -> float:
    return float(torch.cat([h.flatten().double() for h in estimate.values()]).norm())


STAGE = Stage(
    "memory",
    (
        "part",
        "model",
        "backend",
        "arithmetic",
        "cosine",
        "relative_size",
        "peak_gb",
        "allocations",
    ),
    (Part("snapshot", 40, snapshot), Part("oracle", 40, oracle)),
)
