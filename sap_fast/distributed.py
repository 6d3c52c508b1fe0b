"""Data-parallel ranks: when their gradients are averaged, and the probe gradient with them.

In the safety pass and the task pass `DistributedDataParallel` averages gradients as ever; the
safety pass has it do so also inside the `no_sync` of an accumulated step. Parameters are frozen in
probe passes, so it has nothing to average there; h is averaged instead, a few kilobytes.
All ranks then hold the same direction and, with probes shared by all tokens, the same V.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def find_wrappers(model: nn.Module) -> list[DistributedDataParallel]:
    """Return the `DistributedDataParallel` modules in and around a model, the outermost first.

    Raises:
        ValueError: for `static_graph=True`.
    """
    found = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    if any(wrapper.static_graph for wrapper in found):
        raise ValueError(
            "DistributedDataParallel(static_graph=True) expects every backward pass to give the "
            "same parameters gradients, and the passes of SAP do not; leave static_graph out"
        )
    return found


@contextmanager
def gradients_averaged(wrappers: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Average gradients over ranks in the backward passes of the body, also inside `no_sync`."""
    before = [wrapper.require_backward_grad_sync for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_backward_grad_sync = True
        yield
    finally:
        for wrapper, value in zip(wrappers, before, strict=True):
            wrapper.require_backward_grad_sync = value


@torch.no_grad()
def average_(tensors: Sequence[Tensor], wrappers: Sequence[DistributedDataParallel]) -> None:
    """Replace tensors by their mean over the ranks of the outermost wrapper, in one all-reduce."""
    group = wrappers[0].process_group
    device = tensors[0].device
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    flat = torch.cat([tensor.flatten().to(device, dtype) for tensor in tensors])
    dist.all_reduce(flat, group=group)
    flat /= dist.get_world_size(group)
    parts = flat.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


def refuse_unknown_wrapper(wrappers: Sequence[DistributedDataParallel]) -> None:
    """Raise inside the forward of a wrapper if none is known.

    Raises:
        RuntimeError: saying how to make it known.
    """
    if not wrappers and DistributedDataParallel._get_active_ddp_module() is not None:
        raise RuntimeError(
            "the model runs inside a DistributedDataParallel that FusedSAP does not know: give the "
            "wrapped model to ProbeSet, or call optimizer.runs_in(wrapped_model) once"
        )
