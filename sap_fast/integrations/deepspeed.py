"""SAP under DeepSpeed's ZeRO, stages 1 to 3: `ZeroPasses`.

ZeRO trains by fp32 copies of the parameters, the masters, of which each rank holds a shard, and
forward and backward run on other weights that are made from them after every update. A backward
pass leaves a rank the averaged gradient of its shard. So the shards of the masters are what is
trained here: DTensors, on which the passes run as they do under FSDP2.

========= ============================================ =========================================
stage     gradients of a rank's shard                  weights that forward uses
========= ============================================ =========================================
1         reduced when the safety pass is over         all of them, gathered after every change
2         reduced by every backward pass               likewise
3         reduced by every backward pass               a shard, gathered for each module's forward
========= ============================================ =========================================

A perturbation is made in the masters and written to those weights. Both come back from copies, so
that no rank waits for another one that failed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from sap_fast.distributed import Ranks, local_shards
from sap_fast.model.probes import ProbeSet
from sap_fast.optimizer import BlendedAdamW
from sap_fast.step.guards import Perturbation
from sap_fast.step.metrics import LossRecord
from sap_fast.step.passes import Safety, SafetyPasses, Stage
from sap_fast.step.rules import Rule
from sap_fast.step.trained import Trained


class ZeroPasses(SafetyPasses):
    """The passes of every step beside a DeepSpeed engine with ZeRO.

    `engine.step()` blends, updates and ends the step, and the engine's checkpoints hold the state
    of the passes:

        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        passes = ZeroPasses(engine, ProbeSet(model), safety_weight=0.0)

        passes.inner_passes(task, safety, batch)
        with passes.task_pass() as record:
            loss = task_loss(engine, batch)
            engine.backward(loss)
            record(loss)
        engine.step()

    The functions `task` and `safety` call the engine and `engine.backward` too, and do not step.
    With gradient accumulation a step begins with `inner_passes`, and has one `task_pass` for each
    micro-batch. Gradient clipping of the engine is that of the blended gradient.

    Args:
        engine: what `deepspeed.initialize` returned.
        probes: where the probe lives, on the model that the engine was given; None for blending
            alone.
        safety_weight: γ; see `SafetyPasses` for it and for what follows.
        safety_level: the level to hold.
        rule: how the safety gradient is blended in.
        direction_every: take the direction anew every so many steps.
        backend: whose operations to use.

    Raises:
        ValueError: for an engine that is set up in a way that the passes cannot run under, saying
            what to change.
    """

    trained: _Shards

    def __init__(
        self,
        engine: Any,
        probes: ProbeSet | None = None,
        *,
        safety_weight: float = 0.3,
        safety_level: float | Literal["auto"] | None = None,
        rule: Rule = "blend",
        direction_every: int = 1,
        backend: str = "auto",
    ) -> None:
        if probes is not None and probes.rule == "lean":
            raise ValueError(
                'rule="lean" goes by the length of the task gradient, which ZeRO does not leave '
                'with the parameters; give ProbeSet(rule="normalized")'
            )
        refuse_unusable(engine)
        zero: _Zero = _Zero3(engine) if engine.zero_optimization_stage() == 3 else _Zero12(engine)
        self.engine, self._zero = engine, zero
        super().__init__(
            _Shards(zero, probes),
            probes,
            safety_weight=safety_weight,
            safety_level=safety_level,
            rule=rule,
            direction_every=direction_every,
            backend=backend,
        )
        self._run_beside(zero.optimizer)

    def _run_beside(self, optimizer: Any) -> None:
        """Blend before the update and end the step after it; be in the optimizer's state dict."""
        if "step" in vars(optimizer):
            raise ValueError(
                "deepspeed: the engine has a ZeroPasses already; two would blend twice, so make "
                "another engine for other settings"
            )
        step, save, load = optimizer.step, optimizer.state_dict, optimizer.load_state_dict

        def blended_step(*args: Any, **kwargs: Any) -> None:
            self.blend_()
            step(*args, **kwargs)
            if optimizer.overflow:
                self.begin()  # the update was left out, as gradients were not finite
            else:
                self.end_step()

        def load_state_dict(state_dict_list: Any, *args: Any, **kwargs: Any) -> None:
            # The states of all ranks, each in its place; a universal checkpoint has none.
            own = None
            if isinstance(state_dict_list, list):
                own = state_dict_list[dist.get_rank(self._zero.group)]
            load(state_dict_list, *args, **kwargs)
            self._zero.clear_padding()
            if own is not None and "sap" in own:
                self.load_state_dict(own["sap"])

        # Of this one optimizer, whose class is DeepSpeed's and knows no hooks.
        optimizer.step = blended_step
        optimizer.state_dict = lambda: {**save(), "sap": self.state_dict()}
        optimizer.load_state_dict = load_state_dict

    def runs_in(self, wrapped: nn.Module) -> None:
        """Check that the loop calls the engine that this was made for.

        Raises:
            ValueError: if it is another module.
        """
        if wrapped is not self.engine:
            raise ValueError(
                f"runs_in({type(wrapped).__name__}): ZeroPasses runs in the engine that it was "
                "given; make another one for another engine"
            )

    @contextmanager
    def _in(self, stage: Stage) -> Iterator[None]:
        # In a probe pass the parameters are frozen.
        apart = self._zero.apart(reduces=stage is Stage.SAFETY)
        with nullcontext() if stage is Stage.TASK else apart, super()._in(stage):
            yield

    def _take_direction(self, direction: Any, safety: Safety) -> Tensor:
        def reduced() -> Tensor:
            loss = safety()
            self._zero.reduce()
            self.trained.take_gradients()
            return loss

        return super()._take_direction(direction, reduced)

    @contextmanager
    def task_pass(self, *, restores_gradients: bool = True) -> Iterator[LossRecord]:
        """Let the backward passes of the body be those of the task; see `SafetyPasses`.

        A call of `engine.step` in the body, as Accelerate makes it right after the backward pass,
        waits for the end of the pass.
        """
        with self._zero.steps_after() as steps:
            with super().task_pass(restores_gradients=restores_gradients) as record:
                yield record
        for step in steps:
            step()

    def blend_(self) -> None:
        """Blend the safety gradient into the gradients of the shards; `engine.step` calls it.

        Raises:
            RuntimeError: inside a pass, or before the task pass of a step.
        """
        if self.safety_weight == 0 or self.stage is not Stage.DONE:
            return super().blend_()
        self.trained.take_gradients()
        try:
            super().blend_()
            self._zero.put_gradients_([shard.grad for shard in self.trained.parameters])
        finally:
            self.trained.drop_gradients()

    def state_dict(self) -> dict[str, Any]:
        """Return what later steps depend on: of a direction that is kept, this rank's shard."""
        state = super().state_dict()
        tensors = state["direction"]["tensors"]
        state["direction"]["tensors"] = dict(
            zip(tensors, local_shards(list(tensors.values())), strict=True)
        )
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned.

        Raises:
            RuntimeError: inside a pass.
            ValueError: if a direction that was kept does not fit the shards, as after a change of
                the number of ranks.
        """
        direction = dict(state_dict["direction"])
        shards = self.trained.parameters
        direction["tensors"] = {
            place: self.trained.sharded(tensor) if place < len(shards) else tensor
            for place, tensor in direction["tensors"].items()
        }
        super().load_state_dict(state_dict | {"direction": direction})


# ---- what is trained ----


class _Shards(Trained):
    """The masters as DTensors, of which this rank holds the shards that ZeRO has for it."""

    def __init__(self, zero: _Zero, probes: ProbeSet | None) -> None:
        self._zero = zero
        device = zero.masters[0].device
        # gloo and NCCL; DTensor takes a group that exists by way of a mesh.
        self._mesh = DeviceMesh.from_group(zero.group, device.type)
        zero.clear_padding()
        shards = [nn.Parameter(self.sharded(master.detach())) for master in zero.masters]
        super().__init__(shards, probes)

    def sharded(self, tensor: Tensor) -> DTensor:
        """Return the tensor of all ranks whose part on this one is `tensor`, (N,)."""
        return DTensor.from_local(tensor, self._mesh, [Shard(0)], run_check=False)

    def belong_to(self, model: nn.Module) -> bool:
        return not set(model.parameters()).isdisjoint(self._zero.engine.module.parameters())

    def runs_in(self, model: nn.Module | None) -> None:
        self.begin()
        self.ranks = _EngineRanks(self._zero)
        if self._probes is not None:
            self._probes.ranks = self.ranks

    def perturbation(
        self, params: Sequence[Tensor], buffers: Sequence[Tensor], scale: Tensor, *, backend: str
    ) -> Perturbation:
        return _ShardPerturbation(self._zero, params, buffers, scale, backend=backend)

    @torch.no_grad()
    def take_gradients(self) -> None:
        """Let `.grad` of every shard be a copy of what ZeRO has for it; None if it has none."""
        for shard, pieces in zip(self.parameters, self._zero.gradients(), strict=True):
            if pieces is not None:
                flat = torch.cat([piece.flatten().to(shard.dtype) for piece in pieces])
                shard.grad = self.sharded(flat)

    def drop_gradients(self) -> None:
        for shard in self.parameters:
            shard.grad = None


class _EngineRanks(Ranks):
    """An engine averages the gradients of its backward passes by itself."""

    def __init__(self, zero: _Zero) -> None:
        self._zero = zero
        module: Any = zero.engine.module
        self.model, self.replicas, self.shards = module, [], [module]

    def reshard(self) -> None:
        """Nothing is left to be dropped: `_Zero.publish_` does so where weights change."""

    @contextmanager
    def gradients_averaged(self) -> Iterator[None]:
        yield

    def check(self, trained: Sequence[Tensor]) -> None:
        """They are the masters of this very engine."""

    def _groups(self) -> list[dist.ProcessGroup]:
        return [self._zero.group]


class _ShardPerturbation(Perturbation):
    """W + ΔW in the masters, and in the weights that forward uses."""

    def __init__(self, zero: _Zero, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._zero = zero

    @torch.no_grad()
    def __enter__(self) -> Perturbation:
        self._weights = [weight.clone() for weight in self._zero.weights]
        super().__enter__()
        try:
            self._zero.publish_()
        except BaseException:
            self.__exit__()
            raise
        return self

    def reflect(self) -> None:
        super().reflect()
        self._zero.publish_()

    def __exit__(self, *exception: object) -> None:
        try:
            super().__exit__(*exception)
        finally:
            self._zero.put_weights_back_(self._weights)


# ---- where ZeRO keeps it ----


class _Zero(ABC):
    """An engine's ZeRO optimizer: what it keeps on this rank.

    Args:
        engine: the engine.

    Attributes:
        engine: likewise.
        optimizer: the ZeRO optimizer.
        group: the ranks that the shards are spread over.
    """

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        self.group: dist.ProcessGroup = self.optimizer.dp_process_group

    @property
    @abstractmethod
    def masters(self) -> list[Tensor]:
        """This rank's shard of each group of parameters, in fp32, (N,)."""

    @property
    @abstractmethod
    def weights(self) -> list[Tensor]:
        """What forward uses, or is gathered from, by the same groups."""

    @property
    @abstractmethod
    def _parameters(self) -> list[list[Any]]: ...

    @abstractmethod
    def publish_(self) -> None:
        """Write the masters to the weights that forward uses, on all ranks."""

    @torch.no_grad()
    def put_weights_back_(self, copies: Sequence[Tensor]) -> None:
        """Write copies of the weights over them."""
        for weight, copy in zip(self.weights, copies, strict=True):
            weight.copy_(copy)

    @abstractmethod
    def reduce(self) -> None:
        """Make of what backward passes left the averaged gradients of the shards."""

    @abstractmethod
    def let_go(self) -> None:
        """Give up weights that were gathered for a forward or backward pass that failed."""

    @abstractmethod
    def clear_padding(self) -> None:
        """Set to zero what fills up a shard: it counts in no norm."""

    def gradients(self) -> list[list[Tensor] | None]:
        """Return the averaged gradient of each shard, in the pieces that it is kept in."""
        found = self.optimizer.averaged_gradients
        return [found.get(group) for group in range(len(self.masters))]

    @torch.no_grad()
    def put_gradients_(self, gradients: Sequence[Any]) -> None:
        """Write gradients over those of the shards."""
        for pieces, flat in zip(self.gradients(), local_shards(gradients), strict=True):
            if pieces is not None:
                parts = flat.split([piece.numel() for piece in pieces])
                for piece, part in zip(pieces, parts, strict=True):
                    piece.copy_(part.view_as(piece))

    def holds_gradients(self) -> bool:
        """Return whether there are gradients of a step that has begun."""
        averaged = self.optimizer.averaged_gradients.values()
        return any(pieces is not None for pieces in averaged) or any(
            parameter.grad is not None for group in self._parameters for parameter in group
        )

    def forget_gradients(self) -> None:
        """Forget the gradients of all backward passes, also those that were interrupted."""
        self.optimizer.zero_grad(set_to_none=True)
        self.optimizer.clear_backward_seen_flag()
        self.optimizer._backward_active_depth = 0

    @contextmanager
    def apart(self, *, reduces: bool) -> Iterator[None]:
        """Let backward passes of the body leave nothing for the next update.

        Accelerate sets the boundary and steps with every backward pass that it is asked for; both
        are ignored.

        Args:
            reduces: backward passes leave gradients of parameters, to be averaged.

        Raises:
            RuntimeError: if a step has begun.
        """
        if self.holds_gradients():
            raise RuntimeError(
                "inner_passes() after micro-batches whose gradients DeepSpeed holds already would "
                "mix them with its own; call it before the first one of a step"
            )
        engine, optimizer = self.engine, self.optimizer
        before = engine._is_gradient_accumulation_boundary
        reduced_before = engine.enable_backward_allreduce
        before_there = optimizer.is_gradient_accumulation_boundary()
        with _in_the_place_of(engine, "step", _ignored):
            with _in_the_place_of(engine, "set_gradient_accumulation_boundary", _ignored):
                try:
                    # So that any number of backward passes add up, until `reduce`.
                    engine._is_gradient_accumulation_boundary = False
                    engine.enable_backward_allreduce = reduces
                    optimizer.set_gradient_accumulation_boundary(False)
                    yield
                except BaseException:
                    self.let_go()
                    raise
                finally:
                    self.forget_gradients()
                    engine._is_gradient_accumulation_boundary = before
                    engine.enable_backward_allreduce = reduced_before
                    optimizer.set_gradient_accumulation_boundary(before_there)

    @contextmanager
    def steps_after(self) -> Iterator[list[Callable[[], None]]]:
        """Collect the calls of `engine.step` in the body instead of making them."""
        step, calls = self.engine.step, []
        # What backward reads in stage 1, where the loss does not come out of the engine's forward.
        self.optimizer.set_gradient_accumulation_boundary(
            self.engine.is_gradient_accumulation_boundary()
        )

        def later(*args: Any, **kwargs: Any) -> None:
            calls.append(lambda: step(*args, **kwargs))

        with _in_the_place_of(self.engine, "step", later):
            yield calls


class _Zero12(_Zero):
    """Stages 1 and 2: every rank holds all weights, and a shard of their masters."""

    @property
    def masters(self) -> list[Tensor]:
        return list(self.optimizer.single_partition_of_fp32_groups)

    @property
    def weights(self) -> list[Tensor]:
        return list(self.optimizer.bit16_groups_flat)

    @property
    def _parameters(self) -> list[list[Any]]:
        return list(self.optimizer.bit16_groups)

    def publish_(self) -> None:
        self.optimizer.update_lp_params()

    def let_go(self) -> None:
        """Leave the weights: they are not gathered."""

    def clear_padding(self) -> None:
        """Leave the shards: ZeRO fills them up with zeros."""

    def holds_gradients(self) -> bool:
        summed = self.optimizer.all_grad_tensors.values()
        return super().holds_gradients() or any(pieces is not None for pieces in summed)

    def reduce(self) -> None:
        if not self.holds_gradients():
            return  # no backward pass reached a parameter
        optimizer = self.optimizer
        if optimizer.partition_gradients:
            optimizer.finalize_gradient_accumulation_boundary()
            return
        # Stage 1 has them in full so far. Not by `reduce_gradients`, which with `overlap_comm`
        # expects that the backward pass has begun with it.
        optimizer.set_gradient_accumulation_boundary(True)
        optimizer.setup_buckets()
        for number, group in enumerate(optimizer.bit16_groups):
            for parameter in group:
                if optimizer.get_gradient_for_reduction(parameter) is not None:
                    optimizer.reduce_ready_partitions_and_remove_grads(parameter, number)
        optimizer.overlapping_partition_gradients_reduce_epilogue()

    def forget_gradients(self) -> None:
        super().forget_gradients()
        optimizer = self.optimizer
        for group in range(len(self.masters)):
            optimizer.averaged_gradients[group] = None
            optimizer.all_grad_tensors[group] = None
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear()
        optimizer._release_ipg_buffers()
        optimizer.params_already_reduced = [False] * len(optimizer.params_already_reduced)


class _Zero3(_Zero):
    """Stage 3: every rank holds a shard of the weights, too."""

    @property
    def masters(self) -> list[Tensor]:
        return list(self.optimizer.fp32_partitioned_groups_flat)

    @property
    def weights(self) -> list[Tensor]:
        return list(self.optimizer.fp16_partitioned_groups_flat)

    @property
    def _parameters(self) -> list[list[Any]]:
        return list(self.optimizer.fp16_groups)

    @torch.no_grad()
    def publish_(self) -> None:
        self.put_weights_back_(self.masters)

    def put_weights_back_(self, copies: Sequence[Tensor]) -> None:
        super().put_weights_back_(copies)
        # Small parameters stay gathered from step to step: the next forward gathers them anew.
        self.let_go()

    def reduce(self) -> None:
        """Leave the gradients: each backward pass averages its own."""

    def let_go(self) -> None:
        self.optimizer._partition_all_parameters()

    @torch.no_grad()
    def clear_padding(self) -> None:
        # ZeRO leaves it as the allocator gave it.
        rank = dist.get_rank(self.group)
        for group, *tensors in zip(self._parameters, self.masters, self.weights, strict=True):
            start = 0
            for parameter in group:
                size = parameter.ds_tensor.numel()
                used = min(max(parameter.ds_numel - rank * size, 0), size)
                for tensor in tensors:
                    tensor[start + used : start + size] = 0
                start += size

    def forget_gradients(self) -> None:
        super().forget_gradients()
        optimizer = self.optimizer
        optimizer.averaged_gradients = {}
        # A parameter that the next backward pass does not reach keeps what is there.
        optimizer.grad_partitions_flat_buffer.zero_()
        for bucket in optimizer.ipg_buckets.values():
            bucket.clear_params()
        optimizer.params_already_reduced.update(
            dict.fromkeys(optimizer.params_already_reduced, False)
        )


@contextmanager
def _in_the_place_of(engine: Any, method: str, function: Callable[..., None]) -> Iterator[None]:
    """Let calls of a method of this one engine be those of a function."""
    kept = vars(engine).get(method)
    setattr(engine, method, function)
    try:
        yield
    finally:
        if kept is None:
            delattr(engine, method)
        else:
            setattr(engine, method, kept)


def _ignored(*_: Any, **__: Any) -> None:
    """Do nothing."""


# ---- what is refused ----


def refuse_unusable(engine: Any) -> None:
    """Raise for an engine that the passes cannot run under.

    Raises:
        ValueError: saying what to change.
    """
    for found, setting, why in _refusals(engine):
        if found:
            raise ValueError(f"deepspeed: {setting}: {why}")


def _refusals(engine: Any) -> Iterator[tuple[bool, str, str]]:
    if not hasattr(engine, "zero_optimization_stage"):
        yield True, type(engine).__name__, "give what deepspeed.initialize returned, the engine"
    yield (
        not hasattr(engine, "managed_gradient_accumulation"),
        "its version",
        "0.19.8 is the oldest that was tried; pip install 'deepspeed>=0.19.8'",
    )
    yield (
        bool(engine.pipeline_parallelism),
        type(engine).__name__,
        "a pipeline runs forward and backward by itself, and so has no passes; use ZeRO without it",
    )
    stage = int(engine.zero_optimization_stage())
    yield (
        stage == 0,
        f'"stage": {stage}',
        "without ZeRO nothing is sharded; use stage 1, 2 or 3, or DistributedDataParallel",
    )
    yield (
        engine.fp16_enabled() or _autocasts_to_fp16(engine),
        "fp16",
        "DeepSpeed scales losses and leaves updates out by its own rule; use bf16",
    )
    optimizer = engine.optimizer
    yield (
        not hasattr(optimizer, "averaged_gradients"),
        type(optimizer).__name__,
        "it is no ZeRO optimizer with gradients of shards. In stage 1 leave "
        '"grad_accum_dtype": "fp32" out, or use stage 2; for evaluation no passes are needed',
    )
    inner = getattr(optimizer, "optimizer", None)
    yield (
        isinstance(inner, BlendedAdamW),
        f"optimizer={type(inner).__name__}(…)",
        "its own passes know nothing of shards; give torch.optim.AdamW, beside which ZeroPasses "
        "blends",
    )
    yield (
        "muon" in type(inner).__name__.lower(),
        f"optimizer={type(inner).__name__}(…)",
        "ZeRO makes the update of Muon before the step, so that there is no gradient to blend into",
    )
    for part in ("optimizer", "param"):
        offload = getattr(engine, f"zero_offload_{part}")()
        device = (
            "none" if offload is None else str(getattr(offload.device, "value", offload.device))
        )
        yield (
            device != "none",
            f'"offload_{part}" to {device}',
            "gradients or weights leave the device during the backward pass; leave it out",
        )
    yield (
        engine.zero_hpz_partition_size() > 1
        or engine.zero_quantized_weights()
        or engine.zero_quantized_nontrainable_weights()
        or engine.zero_quantized_gradients(),
        "ZeRO++ (zero_hpz_partition_size, zero_quantized_…)",
        "a second or quantized copy of the weights would not have the perturbation; leave it out",
    )
    yield (
        bool(engine.zenflow) or engine.super_offload(),
        "ZenFlow or SuperOffload",
        "updates run beside later passes; leave it out",
    )
    yield (
        engine.is_deepcompile_enabled(),
        '"deepcompile": true',
        "compiled code reduces gradients by itself; leave it out",
    )
    yield (
        bool(engine.has_moe_layers) or engine.autotp_size() > 1,
        "expert or tensor parallelism",
        "the shards of a parameter lie on other ranks than those of the next one; use ZeRO alone",
    )
    yield (
        not engine.managed_gradient_accumulation(),
        '"managed_gradient_accumulation": false',
        "a backward pass does not know which step it belongs to; leave it out",
    )
    yield (
        dist.get_world_size(optimizer.dp_process_group) != dist.get_world_size(),
        "sequence or model parallelism",
        "only data parallelism is supported: every rank has rows of its own",
    )


def _autocasts_to_fp16(engine: Any) -> bool:
    return bool(engine.torch_autocast_enabled()) and engine.torch_autocast_dtype() == torch.float16
