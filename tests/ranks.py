"""Work in several processes that form a gloo group, for tests of data parallel training."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

RANKS = 2

#: AdamW's ε where several ranks are held to one. Its default of 1e-8 is as small as the rounding of
#: a gradient: an element whose gradient is no larger takes a step of that rounding's sign, which
#: differs between orders of summation. One element in 2,048 did, and made 2e-6 of the whole.
EPSILON = 1e-6


def _on_a_rank(
    rank: int, folder: str, ranks: int, timeout: timedelta | None, work: Any, *arguments: Any
) -> None:
    torch.set_num_threads(1)
    # What launchers set, for trainers that look there.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # not used: the group exists
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{ranks}",
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
    mp.spawn(_on_a_rank, (str(folder), ranks, timeout, work, *arguments), nprocs=ranks)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]
