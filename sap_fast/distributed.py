"""Models spread over ranks, by `DistributedDataParallel` or by FSDP2's `fully_shard`.

Both average gradients over ranks in the safety pass and in the task pass; in the safety pass also
where an accumulated step has switched that off. Probe passes freeze the parameters, so no gradient
is averaged there; h is, a few kilobytes. All ranks then hold the same safety gradient (FSDP2: each
its shard of it) and the same V.

Shards are perturbed where they lie. The operations of `sap_fast.ops` run on the local tensors of
DTensors, and one all-reduce adds up each sum over all parameters.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs


# ---- classes that exist only where something else imported them ----

# To import FSDP and DTensor takes 0.7 s, most of it for sympy. One of them can exist only where its
# module was imported already.


def is_dtensor(value: Any) -> TypeIs[DTensor]:
    """Return whether this is a DTensor."""
    return isinstance(value, _class_of("torch.distributed.tensor", "DTensor"))


def any_dtensor(tensors: Iterable[Any]) -> bool:
    """Return whether one of these is a DTensor."""
    dtensor = _class_of("torch.distributed.tensor", "DTensor")
    return dtensor != () and any(isinstance(tensor, dtensor) for tensor in tensors)


def is_fsdp2(module: Any) -> TypeIs[FSDPModule]:
    """Return whether `fully_shard` was called on this module, alone or in a list."""
    return isinstance(module, _class_of("torch.distributed.fsdp", "FSDPModule"))


def _is_fsdp1(module: Any) -> TypeIs[FullyShardedDataParallel]:
    return isinstance(module, _class_of("torch.distributed.fsdp", "FullyShardedDataParallel"))


def _class_of(module: str, name: str) -> Any:
    """Return a class for `isinstance`; where its module was not imported, one of nothing."""
    return getattr(sys.modules.get(module), name, ())


# ---- what spreads a model over ranks ----


class Ranks:
    """The data parallel wrappers in and around a model.

    Args:
        model: the model as the training loop calls it.

    Attributes:
        model: that model.
        replicas: its `DistributedDataParallel` modules, the outermost first.
        shards: its modules that `fully_shard` was called on.

    Raises:
        ValueError: for wrappers that SAP cannot run under, saying what to use instead.
    """

    def __init__(self, model: nn.Module | None) -> None:
        modules = [] if model is None else list(model.modules())
        self.model = model
        self.replicas = [m for m in modules if isinstance(m, DistributedDataParallel)]
        self.shards = [m for m in modules if is_fsdp2(m)]
        for module in modules:
            _refuse_wrapper(module)
        if len(self.shards) == 1 and self.shards[0] is model:
            raise ValueError(
                "fully_shard was called on the whole model alone: its one group of parameters "
                "would gather them all at once, and waits in backward for logits that the losses "
                "of sap_fast leave out; call fully_shard on every decoder layer first, then on the "
                "model"
            )

    def __bool__(self) -> bool:
        return bool(self.replicas or self.shards)

    def reshard(self) -> None:
        """Let the next forward pass gather parameters anew, as those that are there may be old.

        The root keeps its parameters from forward to backward, and after a forward without one.
        """
        for shard in self.shards:
            shard.reshard()

    @contextmanager
    def gradients_averaged(self) -> Iterator[None]:
        """Average gradients over ranks in the backward passes of the body, accumulating or not.

        Raises:
            RuntimeError: if FSDP2 holds gradients of micro-batches that were not reduced yet.
        """
        groups = [group for shard in self.shards for group in _parameter_groups(shard)]
        for group in groups:
            if any(_has_unreduced_gradient(parameter) for parameter in group.fsdp_params):
                raise RuntimeError(
                    "inner_passes() after micro-batches whose gradients FSDP2 has not reduced "
                    "(set_requires_gradient_sync(False)) would mix them with its own; call it "
                    "before the first micro-batch"
                )
        replicas_before = [replica.require_backward_grad_sync for replica in self.replicas]
        groups_before = [(group.reduce_grads, group.all_reduce_grads) for group in groups]
        try:
            for replica in self.replicas:
                replica.require_backward_grad_sync = True
            for shard in self.shards:
                shard.set_requires_gradient_sync(True, recurse=False)
            yield
        finally:
            for replica, value in zip(self.replicas, replicas_before, strict=True):
                replica.require_backward_grad_sync = value
            for group, values in zip(groups, groups_before, strict=True):
                group.reduce_grads, group.all_reduce_grads = values

    @torch.no_grad()
    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their mean over all ranks, in one all-reduce (HSDP: two)."""
        device = tensors[0].device
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        flat = torch.cat([tensor.flatten().to(device, dtype) for tensor in tensors])
        for group in self._groups():
            dist.all_reduce(flat, group=group)
            flat /= dist.get_world_size(group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def _groups(self) -> list[dist.ProcessGroup]:
        if self.replicas:
            return [self.replicas[0].process_group]
        assert self.model is not None
        self.reshard()
        sharded = next(p for p in self.model.parameters() if is_dtensor(p))
        return sharded.device_mesh.get_all_groups()

    def check(self, trained: Sequence[Tensor]) -> None:
        """Check that these are the trained parameters of the model, as it is wrapped now.

        Raises:
            RuntimeError: if they are sharded, and the modules that shard them not known.
        """
        if not self.shards and any_dtensor(trained):
            raise RuntimeError(
                "the parameters are sharded, but it is not known by what: give ProbeSet the "
                "sharded model, or call runs_in(model) once, of the optimizer or of SafetyPasses"
            )

    def refuse_unknown_ranks(self, setting: str) -> None:
        """Raise if there are other ranks whose figures would be needed, but no known wrapper.

        Raises:
            RuntimeError: saying how to make it known.
        """
        if not self and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                f"{setting} decides by the mean loss over ranks, but it is not known what spreads "
                "the model over them: call runs_in(wrapped_model) once, of the optimizer or of "
                "SafetyPasses"
            )

    def refuse_unknown_replica(self) -> None:
        """Raise inside the forward of a `DistributedDataParallel` if none is known.

        Raises:
            RuntimeError: saying how to make it known.
        """
        if not self.replicas and DistributedDataParallel._get_active_ddp_module() is not None:
            raise RuntimeError(
                "the model runs inside a DistributedDataParallel that ProbeSet does not know: give "
                "it the wrapped model, or call runs_in(wrapped_model) once, of the optimizer or of "
                "SafetyPasses"
            )


def _parameter_groups(shard: FSDPModule) -> list[Any]:
    # FSDP2 has a public setter for gradient synchronisation but no getter to restore it by.
    # Earlier releases than the one tested here keep a single group.
    state: Any = shard._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]


def _has_unreduced_gradient(parameter: Any) -> bool:
    gathered = getattr(parameter, "_unsharded_param", None)  # from the first forward on
    in_parameter = gathered is not None and gathered.grad is not None
    # Where gradients are reduced in another dtype than they are found in, they are moved there.
    return in_parameter or parameter.unsharded_accumulated_grad is not None


def _refuse_wrapper(module: nn.Module) -> None:
    if isinstance(module, DistributedDataParallel) and module.static_graph:
        raise ValueError(
            "DistributedDataParallel(static_graph=True) expects every backward pass to give the "
            "same parameters gradients, and the passes of SAP do not; leave static_graph out"
        )
    if _is_fsdp1(module):
        raise ValueError(
            "FSDP1 (FullyShardedDataParallel) keeps parameters in flat buffers that are of use in "
            "its own passes only; use FSDP2: torch.distributed.fsdp.fully_shard, in Accelerate "
            "fsdp_version=2"
        )
    if type(module).__module__.startswith("deepspeed"):
        raise ValueError(f"{type(module).__name__}: {_NO_DEEPSPEED}")


_NO_DEEPSPEED = (
    "DeepSpeed trains its own copies of the parameters; give deepspeed.initialize another "
    "optimizer, and its engine to sap_fast.integrations.deepspeed.ZeroPasses(engine, "
    "ProbeSet(model)), with the model inside of it"
)


def refuse_foreign_shards(parameters: Sequence[Tensor]) -> None:
    """Raise if parameters belong to a sharding that is not FSDP2's.

    Raises:
        ValueError: for DeepSpeed ZeRO, FSDP1 and tensor parallelism, with what to use instead.
    """
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):  # what ZeRO-3 marks parameters with
            raise ValueError(_NO_DEEPSPEED)
        if hasattr(parameter, "_is_flat_param"):  # likewise FSDP1
            raise ValueError(
                "params holds FSDP1's flat parameters, which are of use in its own passes only; "
                "use FSDP2: torch.distributed.fsdp.fully_shard, in Accelerate fsdp_version=2"
            )
        if is_dtensor(parameter):
            sharded = [p for p in parameter.placements if not p.is_replicate()]
            if any(not p.is_shard() for p in sharded) or len(sharded) > 1:
                raise ValueError(
                    f"a parameter of shape {tuple(parameter.shape)} has the placements "
                    f"{parameter.placements}; tensor parallelism is not supported, only "
                    "fully_shard on a mesh of one dimension (FSDP) or two (HSDP)"
                )


# ---- what operations see of sharded tensors ----


@torch.no_grad()
def local_shards(tensors: Sequence[Any]) -> list[Any]:
    """Return the part of each tensor that lies on this rank; shares its memory."""
    return [t.to_local() if is_dtensor(t) else t for t in tensors]


def shard_like(local: Tensor, like: Any, shape: Sequence[int]) -> Any:
    """Return this rank's part of a tensor of `shape` as a DTensor that lies as `like` does.

    Where `like` is none, `local` is the whole and is returned.
    """
    if not is_dtensor(like):
        return local
    from torch.distributed.tensor import DTensor

    size = torch.Size(shape)
    stride = torch.empty(size, device="meta").stride()
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=size, stride=stride)


def by_shard_group(
    lists: Sequence[Sequence[Any]],
) -> list[tuple[dist.ProcessGroup | None, list[list[Any]]]]:
    """Split lists of equal length by the ranks that the first one's tensors are sharded over.

    None stands for tensors that every rank holds in full: a sum over ranks counts them once.
    """
    if not any_dtensor(lists[0]):
        return [(None, [list(items) for items in lists])]
    groups: dict[dist.ProcessGroup | None, list[list[Any]]] = {}
    for row in zip(*lists, strict=True):
        group = groups.setdefault(_shard_group(row[0]), [[] for _ in row])
        for items, item in zip(group, row, strict=True):
            items.append(item)
    return list(groups.items())


def add_over_ranks_(total: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Replace a 0-d tensor by its sum over the ranks of a group, if there is one; return it."""
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def _shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    if is_dtensor(tensor):
        for dimension, placement in enumerate(tensor.placements):
            if placement.is_shard():
                return tensor.device_mesh.get_group(dimension)
    return None
