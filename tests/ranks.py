"""Work in several processes that form a gloo group, for tests of data parallel training."""

from __future__ import annotations

import multiprocessing
import os
import secrets
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from sap_fast.model.layers import find_decoder_layers
from tests.tiny import Batch, random_batch

RANKS = 2
ROWS = 4  # of each of them

#: Imported once, by the server that ranks are forked from: each by itself would take 6 s.
_PRELOADED = ["tests.tiny", "sap_fast.integrations.trainer"]

#: AdamW's ε where several ranks are held to one. Its default of 1e-8 is as small as the rounding of
#: a gradient: an element whose gradient is no larger takes a step of that rounding's sign, which
#: differs between orders of summation. One element in 2,048 did, and made 2e-6 of the whole.
EPSILON = 1e-6


def _on_a_rank(
    rank: int,
    folder: str,
    meeting: str,
    environment: dict[str, str],
    ranks: int,
    timeout: timedelta | None,
    work: Any,
    *arguments: Any,
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ |= environment
    # What launchers set, for trainers that look there.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # not used: the group exists
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/{meeting}",
        rank=rank,
        world_size=ranks,
        timeout=timeout,
    )
    try:
        torch.save(work(rank, *arguments), Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
    # Without the end of the interpreter: a wrapped model that is still alive keeps gloo's threads,
    # and one that lets go of a Python object then ends the process with SIGABRT (PyTorch #179291).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def on_ranks(
    folder: Path,
    work: Any,
    *arguments: Any,
    ranks: int = RANKS,
    timeout: timedelta | None = None,
) -> list[Any]:
    """What `work(rank, *arguments)` returns in each of `ranks` processes."""
    multiprocessing.set_forkserver_preload(_PRELOADED)
    meeting, environment = f"rendezvous-{secrets.token_hex(4)}", dict(os.environ)
    given = (str(folder), meeting, environment, ranks, timeout, work, *arguments)
    mp.start_processes(_on_a_rank, given, nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


# ---- batches that are shared out, and models that are sharded ----


def whole_batch(step: int, kind: int) -> Batch:
    """The rows of all ranks, each with as many scored tokens: ranks average their means."""
    batch = random_batch(rows=RANKS * ROWS, seed=100 * step + kind)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    batch["input_ids"] = batch["input_ids"].clamp(min=1)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, :4] = -100
    return batch


def share(batch: Batch, rank: int | None) -> Batch:
    """The rows of a rank: every second, so that the first halves of all are the first half."""
    return {
        name: value[slice(rank, None, None if rank is None else RANKS)]
        for name, value in batch.items()
    }


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    """Call `fully_shard` on every decoder layer, then on the model."""
    for layer in find_decoder_layers(model)[0]:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def whole(tensors: Sequence[Tensor | None]) -> list[Any]:
    """What shards are parts of."""
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def distance(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """‖a − b‖/‖b‖ over all tensors."""
    pairs = list(zip(actual, expected, strict=True))
    square = sum(((a - b).detach().double() ** 2).sum() for a, b in pairs)
    return float((square / sum((b.detach().double() ** 2).sum() for _, b in pairs)).sqrt())
