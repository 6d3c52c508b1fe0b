"""The parameters that are trained, and the model around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sap_fast.distributed import Ranks, local_shards, refuse_foreign_shards
from sap_fast.model.checkpointing import Checkpointing
from sap_fast.model.layers import find_decoder_layers, find_model
from sap_fast.model.probes import ProbeSet
from sap_fast.random_state import RandomState
from sap_fast.step.guards import Perturbation


class Trained:
    """What the passes read, freeze and put back: parameters, random state, copies of weights.

    Args:
        params: the parameters that the optimizer trains, or its parameter groups.
        probes: brings the model; None if only the parameters are known.

    Attributes:
        parameters: all of the optimizer's, in its order, at the beginning of the step.
        groups: what they are read from: the optimizer's groups, if `params` was that list.
        ranks: what spreads the model over ranks.

    Raises:
        ValueError: for a sharding that SAP cannot perturb, or parameters that share nothing with
            the probed model.
    """

    def __init__(self, params: Iterable[Any], probes: ProbeSet | None) -> None:
        self.groups = params if _are_groups(params) else list(_flatten(params))
        self.begin()
        self._probes = probes
        #: Of all decoder layers, in the place of the probe set's: since a pass ran out of memory.
        self._checkpointing: Checkpointing | None = None
        self._refuse_unusable()
        if probes is not None and not self.belong_to(probes.model):
            raise ValueError(
                "params and probes share no parameter: the optimizer would perturb weights that "
                "the probed model does not use; pass the parameters of the model that ProbeSet was "
                "given"
            )
        self.runs_in(None if probes is None else probes.model)

    def belong_to(self, model: nn.Module) -> bool:
        """Return whether some of these are parameters of the model."""
        return not set(model.parameters()).isdisjoint(self.parameters)

    def perturbation(
        self, params: Sequence[Tensor], buffers: Sequence[Tensor], scale: Tensor, *, backend: str
    ) -> Perturbation:
        """Return the context in which the model computes with W + ΔW; see `Perturbation`."""
        return Perturbation(params, buffers, scale, backend=backend)

    def add(self, parameters: Iterable[nn.Parameter]) -> None:
        """Know of more parameters: those of a group that the optimizer was given later.

        Raises:
            ValueError: as at the construction, and none is added.
        """
        before = list(self.parameters)
        self.parameters += parameters
        try:
            self._refuse_unusable()
        except ValueError:
            self.parameters[:] = before
            raise

    def _refuse_unusable(self) -> None:
        refuse_foreign_shards(self.parameters)
        self._refuse_quantized()
        self.refuse_shared_storage()

    def _refuse_quantized(self) -> None:
        """Raise for quantized weights that are to be trained; frozen ones are only read.

        Raises:
            ValueError: naming the first of them.
        """
        local = local_shards([p.detach() for p in self.parameters])
        for place, tensor in enumerate(local):
            if self.parameters[place].requires_grad and is_traceable_wrapper_subclass(tensor):
                raise ValueError(
                    f"{self._name(place)} is a {type(tensor).__name__} that requires grad: its "
                    "values cannot be perturbed and put back bit for bit; freeze the quantized "
                    "weights and train an adapter"
                )

    def refuse_shared_storage(self) -> None:
        """Raise if two parameters lie in the same memory: each would be perturbed and updated.

        Raises:
            ValueError: naming both.
        """
        ends: list[tuple[torch.device, int, int, int]] = []
        for place, tensor in enumerate(local_shards([p.detach() for p in self.parameters])):
            if is_traceable_wrapper_subclass(tensor):
                continue  # frozen, and without an address of its own
            if tensor.numel() and tensor.device.type != "meta":
                last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
                first = tensor.data_ptr()
                end = first + (last + 1) * tensor.element_size()
                ends.append((tensor.device, first, end, place))
        ends.sort(key=lambda entry: (str(entry[0]), entry[1]))
        for (device, _, end, place), (other_device, first, _, other) in pairwise(ends):
            if device == other_device and first < end:
                raise ValueError(
                    f"{self._name(place)} and {self._name(other)} share memory; give one of them "
                    "and call requires_grad_(False) on the other: both would be perturbed and "
                    "updated"
                )

    def _name(self, place: int) -> str:
        parameter = self.parameters[place]
        named = [] if self._probes is None else self._probes.model.named_parameters()
        known = next((name for name, p in named if p is parameter), f"parameter {place}")
        return f"{known} {tuple(parameter.shape)}"

    def runs_in(self, model: nn.Module | None) -> None:
        """Make known the model as the loop calls it; see `SafetyPasses.runs_in`."""
        self.begin()
        refuse_foreign_shards(self.parameters)
        self.ranks = Ranks(model)
        if self._probes is not None:
            self._probes.ranks = self.ranks

    def begin(self) -> None:
        """Begin a step: parameters and modules may be others than in the last one.

        `fully_shard` puts others into the model, and Accelerate those into the optimizer's groups.
        """
        self.parameters = list(dict.fromkeys(_flatten(self.groups)))
        self._every: list[nn.Parameter] | None = None
        self._devices: set[torch.device] | None = None

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The optimizer's parameters that require grad."""
        return [parameter for parameter in self.parameters if parameter.requires_grad]

    def every(self, *, inside: bool = False) -> list[nn.Parameter]:
        """Return the parameters of the optimizer and of the probed model, each once.

        Args:
            inside: a pass is running, so FSDP2 has resharded and these are the parameters
                themselves. They are found once per step then: to walk through the modules of a
                model takes as long as some layers.
        """
        if self._every is not None:
            return self._every
        unique = dict.fromkeys(self.parameters)
        if self._probes is not None:
            unique |= dict.fromkeys(self._probes.model.parameters())
        if inside:
            self._every = list(unique)
        return list(unique)

    def random_state(self) -> RandomState:
        """Return the state of the generators of all devices that hold parameters."""
        devices = self._devices
        if devices is None:
            devices = {parameter.device for parameter in self.every()}
        # A step asks several times, and a model has hundreds of parameters.
        self._devices = None if self._every is None else devices
        return RandomState(devices)

    def checkpointed(self, *, frozen: bool = False) -> AbstractContextManager[None]:
        """Checkpoint activations in the body: as the probe set says, or of every decoder layer.

        Args:
            frozen: nothing up to the lowest probed layer is differentiated.
        """
        if self._checkpointing is not None:
            return self._checkpointing.active(frozen=frozen)
        return nullcontext() if self._probes is None else self._probes.checkpointed(frozen=frozen)

    def checkpoint_layers(self) -> str | None:
        """Checkpoint every decoder layer in the passes from now on.

        Returns:
            None; or why that cannot be, or would change nothing.
        """
        probes = self._probes
        given = None if probes is None else probes.checkpointing
        if self._checkpointing is not None or given == "layers":
            return "every decoder layer is checkpointed already"
        model = self.ranks.model
        if model is None:
            model = find_model(self.trainable)
        if model is None:
            return (
                "no module holds all parameters of the optimizer; call runs_in(model) once, of the "
                "optimizer or of SafetyPasses"
            )
        lowest = 0 if probes is None else probes.layers[0]
        try:
            checkpointing = Checkpointing(*find_decoder_layers(model), "layers", lowest)
        except ValueError as error:
            return str(error)
        if not checkpointing.has_layers:
            return "the model checkpoints its decoder layers itself, or is in eval mode"
        self._checkpointing = checkpointing
        return None

    def forget_weights(self) -> None:
        """Drop copies of the weights: a later pass must not meet those of an earlier one."""
        torch.clear_autocast_cache()
        self.ranks.reshard()


def _are_groups(params: Iterable[Any]) -> bool:
    """Whether this is `param_groups` of an optimizer: a list that may be read again."""
    return isinstance(params, list) and all(
        isinstance(item, Mapping) and isinstance(item["params"], list) for item in params
    )


def _flatten(params: Iterable[Any]) -> Iterator[nn.Parameter]:
    """Yield the parameters of what `torch.optim.Optimizer` accepts as `params`."""
    if isinstance(params, Tensor):
        raise TypeError("params is a single tensor; give an iterable of parameters or of groups")
    for item in params:
        if isinstance(item, Mapping):
            yield from _flatten(item["params"])
        else:
            yield item[1] if isinstance(item, tuple) else item  # (name, parameter)


def returned_loss(name: str, function: Callable[[], Any]) -> Tensor:
    """Run a function of the caller, with gradients, and return the loss that it returns.

    Raises:
        TypeError: if it returns none.
    """
    with torch.enable_grad():
        return checked_loss(name, function()).detach().clone()


def checked_loss(name: str, loss: Any) -> Tensor:
    """Return what a function of the caller returned, if it is a loss.

    Raises:
        TypeError: if it is none.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{name} returned {loss!r}; expected the loss, a 0-d tensor, after its backward()"
        )
    return loss
