"""Both probe passes as one pass of twice the rows, where LoRA alone is trained.

The probe passes differ by the weights of the adapters, W + ΔW and W − ΔW. The frozen base is the
same in both, so the decoder runs once on the batch below itself: the base's matrices are read (and
those of a 4-bit base dequantized) once, and every adapter is a batch of two.

What comes after the decoder (the head, the loss, whatever the caller does with it) runs as it does
in two passes, on one half at a time, and so does not see any of this:

    task()    the decoder runs on both halves; the head and the loss get the first, and their
              backward pass ends at the decoder's output
    task()    the decoder does not run; the head and the loss get the second
              then the decoder's backward pass, on both halves

The first half draws the dropout masks of the adapters, as one pass would, and the second shares
them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sap_fast.configuration import text_config, virtual_tokens
from sap_fast.losses.row_reader import row_reader
from sap_fast.random_state import RandomState

# What the decoder takes by row, beside what has one row for all.
_BY_ROW = {"attention_mask", "input_ids", "inputs_embeds", "position_ids", "token_type_ids"}
# And what no row of it is in.
_OF_NO_ROW = {"cache_position"}
# Settings of a configuration that a model may read where no module shows it.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")

Weights = Mapping[nn.Parameter, Tensor]
"""W + ΔW and W − ΔW of an adapter's matrices, (2, …)."""


class Adapter(NamedTuple):
    """A LoRA linear layer and the name of its active adapter."""

    module: Any
    name: str

    @property
    def matrices(self) -> tuple[nn.Parameter, nn.Parameter]:
        """A, (r, in), and B, (out, r)."""
        return self.module.lora_A[self.name].weight, self.module.lora_B[self.name].weight


class PairedForward:
    """The decoder's forward on both halves, for the probe passes of one estimate.

    Args:
        owner: the module that runs the decoder layers in its forward.
        adapters: what `find_adapters` found in it.
        weights: of all matrices of the adapters.
    """

    def __init__(self, owner: nn.Module, adapters: Sequence[Adapter], weights: Weights) -> None:
        self._owner, self._adapters, self._weights = owner, adapters, weights
        #: Of each forward pass: the decoder's output on both halves, and where it was cut off.
        self._bodies: list[tuple[Tensor, list[Tensor]]] = []
        self._outputs: list[tuple[Any, RandomState]] = []
        self._rows = 0
        #: What the decoder's next forward returns in the place of running.
        self._next: Callable[[], Any] | None = None
        #: What the decoder was given last, (B, S).
        self.tokens = torch.empty(0)
        self._undo: list[Callable[[], None]] = []

    # ---- the first pass ----

    def double(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Return what the decoder is given, with every row twice; its adapters are paired now.

        Raises:
            ValueError: for an input that is not known to have rows.
        """
        self.tokens = _tokens(args, kwargs)
        self._rows = len(self.tokens)
        doubled = {key: self._doubled(key, value) for key, value in kwargs.items()}
        positional = tuple(self._doubled("input_ids", value) for value in args)
        self._undo += [_replace_forward(a.module, self._lora(a)) for a in self._adapters]
        return positional, doubled

    def _doubled(self, key: str, value: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if not tensors or key in _OF_NO_ROW:
            return value
        if key not in _BY_ROW or not isinstance(value, Tensor):
            raise ValueError(
                f'passes="paired": the decoder is given {key}, of which it is not known what '
                'belongs to which row; use passes="two"'
            )
        # One row that stands for all, such as positions, does so for twice as many.
        alike = value.dim() < 2 or (len(value) == 1 and self._rows > 1)
        return value if alike else torch.cat([value, value])

    def _lora(self, adapter: Adapter) -> Callable[..., Tensor]:
        module, name = adapter
        first, second = (self._weights[matrix] for matrix in adapter.matrices)
        dropout, scaling = module.lora_dropout[name], module.scaling[name]

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            result = module.base_layer(x, *args, **kwargs)
            if not torch.is_autocast_enabled(x.device.type):
                x = x.to(first.dtype)
            halves = x.reshape(2, -1, x.shape[-1])
            if dropout.training and getattr(dropout, "p", 0.0) > 0:
                # The numbers that a pass of one half draws.
                like = torch.ones_like(x[: len(x) // 2])
                halves = halves * F.dropout(like, dropout.p).view(1, -1, x.shape[-1])
            update = torch.bmm(torch.bmm(halves, first.mT), second.mT) * scaling
            return (result + update.view(result.shape)).to(result.dtype)

        return forward

    def first_half(self, output: Any) -> Any:
        """Take the decoder's output on both halves; return what it would be on the first.

        Raises:
            ValueError: if there is more in it than hidden states.
        """
        self.undo()
        both = _hidden_of(output, self._rows)
        half = both[: self._rows].detach().requires_grad_()
        self._bodies.append((both, [half]))
        self._outputs.append((output, RandomState([both.device])))
        return _with_hidden(output, half)

    # ---- the second pass ----

    def skip(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Let the decoder's next forward return what it found for the second half.

        Raises:
            RuntimeError: if its inputs are of another shape than in the first pass.
        """
        if not self._outputs:
            raise RuntimeError(
                f"the task ran the model more often than the {len(self._bodies)} times of the pass "
                "before: task(part) has to do each time the same"
            )
        output, random_state = self._outputs.pop(0)
        both, cuts = self._bodies[len(self._bodies) - len(self._outputs) - 1]
        tokens = _tokens(args, kwargs)
        rows = len(both) // 2
        if (rows, both.shape[1]) != tuple(tokens.shape):
            raise RuntimeError(
                f"the task ran on {tuple(tokens.shape)} tokens after {(rows, both.shape[1])} in "
                "the pass before: task(part) has to run on what it is given, each time alike"
            )
        half = both[rows:].detach().requires_grad_()
        cuts.append(half)

        def found() -> Any:
            random_state.restore()  # as if the decoder had run
            return _with_hidden(output, half)

        self._next = found

    def undo(self) -> None:
        """Put back the forwards of the adapters, if they are replaced."""
        while self._undo:
            self._undo.pop()()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the passes in the body; leave the model as it was, and let go of the graphs."""
        forward = self._owner.forward

        def run_or_pass_on(*args: Any, **kwargs: Any) -> Any:
            found, self._next = self._next, None
            return forward(*args, **kwargs) if found is None else found()

        # Here and not in a hook before the forward, at which the forward to be run is chosen.
        put_back = _replace_forward(self._owner, run_or_pass_on)
        try:
            yield
        finally:
            put_back()
            self.undo()
            self._bodies.clear()
            self._outputs.clear()
            self._next = None

    def backward(self) -> None:
        """Run the decoder's backward pass on both halves."""
        # For layers that are checkpointed, and run again.
        self._undo += [_replace_forward(a.module, self._lora(a)) for a in self._adapters]
        try:
            for both, cuts in self._bodies:
                gradients = [cut.grad for cut in cuts if cut.grad is not None]
                if len(gradients) == 2:
                    torch.autograd.backward(both, torch.cat(gradients))
        finally:
            self.undo()


# ---- what the decoder is given, and returns ----


def _tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return token ids (B, S), or one element of each token's embedding."""
    given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
    tokens = next(value for value in given if isinstance(value, Tensor))
    return tokens if tokens.dim() == 2 else tokens[..., 0]


def _hidden_of(output: Any, rows: int) -> Tensor:
    first = output if isinstance(output, Tensor) else output[0]
    rest = [] if isinstance(output, Tensor) else list(output.values() if _named(output) else output)
    further = [leaf for leaf in tree_leaves(rest[1:]) if isinstance(leaf, Tensor)]
    if further or len(first) != 2 * rows:
        raise ValueError(
            'passes="paired": the decoder returns more than hidden states of its rows '
            f'({type(output).__name__}); leave output_hidden_states out, or use passes="two"'
        )
    return first


def _named(output: Any) -> bool:
    return isinstance(output, Mapping)


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    if isinstance(output, Tensor):
        return hidden
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    changed = copy.copy(output)
    changed[next(iter(output))] = hidden
    return changed


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let a module run another forward; return what puts its own back."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward

    def undo() -> None:
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.__dict__["forward"] = before

    return undo


# ---- which models ----


def find_adapters(
    model: nn.Module, owner: nn.Module, trained: Sequence[nn.Parameter]
) -> list[Adapter] | str:
    """Return the adapters of a model's decoder, or why its probe passes can't be paired.

    Args:
        model: the model as it was given, wrappers included.
        owner: the module that runs the decoder layers.
        trained: the parameters that the probe passes perturb.
    """
    if owner is model:
        return "the module that runs the decoder layers is not known"
    if any(getattr(text_config(model), name, None) for name in _EXPERTS):
        return "it has experts, for whose capacity the rows of a batch may compete"
    if virtual_tokens(model).number:
        return "it has virtual tokens"
    reader = row_reader(model)
    if reader is not None:
        return f"{reader} may read rows, and there are twice as many"
    adapters: list[Adapter] = []
    for name, module in owner.named_modules():
        reason = _refused(module)
        if reason is not None:
            return f"{name or 'the decoder'} ({type(module).__name__}) {reason}"
        if _is_lora(module):
            reason = _refused_lora(module)
            if reason is not None:
                return f"{name} ({type(module).__name__}) {reason}"
            active = [key for key in module.active_adapters if key in module.lora_A]
            adapters += [Adapter(module, key) for key in active]
    known = {matrix for adapter in adapters for matrix in adapter.matrices}
    dropouts = {adapter.module.lora_dropout[adapter.name] for adapter in adapters}
    inside = dict(owner.named_parameters())
    wanted = set(trained)
    for name, parameter in inside.items():
        if parameter in wanted and parameter not in known:
            return f"{name} is trained, and is no matrix of a plain LoRA layer"
    for name, module in owner.named_modules():
        draws = isinstance(module, nn.modules.dropout._DropoutNd) and module.training
        if draws and getattr(module, "p", 0.0) > 0 and module not in dropouts:
            return f"{name} draws dropout masks (p={module.p}) that the halves would not share"
    if owner.training:
        for name, value in _settings(text_config(model)):
            if "drop" in name and isinstance(value, float) and value > 0:
                return f"{name}={value} in its configuration: the halves would not share the masks"
    if not adapters:
        return "no LoRA layer of its decoder is active"
    return adapters


def _settings(config: Any) -> list[tuple[str, Any]]:
    return list(vars(config).items()) if config is not None else []


def _refused(module: nn.Module) -> str | None:
    if module._compiled_call_impl is not None or "_orig_mod" in module._modules:
        return "is compiled"
    if isinstance(module, nn.modules.batchnorm._NormBase) and module.training:
        return "takes statistics of the batch"
    return None


def _is_lora(module: nn.Module) -> bool:
    # Not imported here: a layer of PEFT exists only where that was imported already.
    layers = sys.modules.get("peft.tuners.tuners_utils")
    return layers is not None and isinstance(module, layers.BaseTunerLayer)


def _refused_lora(module: Any) -> str | None:
    lora = sys.modules["peft.tuners.lora"]
    # Of quantized layers there are classes of their own where their libraries are installed.
    names = ("Linear", "Linear8bitLt", "Linear4bit")
    kinds = tuple(kind for name in names if (kind := getattr(lora, name, None)) is not None)
    if not isinstance(module, kinds):
        return "is no plain LoRA layer"
    active = [key for key in module.active_adapters if key in module.lora_A]
    if module.disable_adapters or module.merged or len(active) != 1:
        return (
            f"has the active adapters {active}, merged: {module.merged}; expected one that is not"
        )
    if active[0] in module.lora_variant:
        return f"is {type(module.lora_variant[active[0]]).__name__}, no plain LoRA"
    if any(module.lora_B[key].bias is not None for key in active):
        return "has a bias in its adapter"
    if "forward" in vars(module):
        return "has its forward replaced"
    return None


def has_quantized_base(adapters: Sequence[Adapter]) -> bool:
    """Return whether the base below an adapter has to be dequantized in every forward."""
    return any(
        type(getattr(adapter.module.get_base_layer(), "weight", None)) is not nn.Parameter
        for adapter in adapters
    )
