"""The probe V: where it lives in the model, how it is injected, how its gradient is collected.

A `ProbeSet` adds an offset v_j to the output of chosen decoder layers,
x_j = layer_j(x_{j−1}) + v_j, but only inside the passes of an optimizer step (`sap_fast.passes`
switches it on). Outside of them its hooks return at once: evaluation, generation and checkpoints
never see a probe.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.distributed import Ranks
from sap_fast.losses import packing
from sap_fast.ops.reference import accumulation_dtype
from sap_fast.reuse import LowerForward

PROBE_RULES = ("gradient", "normalized", "adam")

#: Named choices of layers: the first and the last of them, as fractions of the depth. The paper
#: probes layers 11 to 20 of models of 32 layers; the ten below keep more at less cost of task loss
#: (docs/study.md), and need a longer backward in the probe passes.
LAYER_RANGES = {"early": (1 / 32, 10 / 32), "middle": (11 / 32, 20 / 32)}


class ProbeSet:
    """Offsets V of the hidden states of chosen decoder layers.

    Args:
        model: the model that is trained, plain or wrapped (PEFT, `torch.compile`, DDP).
        layers: `"early"` for layers 1…10 of 32 or `"middle"` for the paper's 11…20, scaled to the
            model's depth; or layer indices, negative ones counted from the end; or the modules
            themselves, for models whose decoder stack is not found by itself (indices are then
            positions in this list).
        shape: `"hidden"`, one vector of H elements per layer, as in the authors' code; or
            `"token"`, one per token, (B, S, H), which lives for one batch only.

    Attributes:
        layers: the indices of the probed layers, ascending.
        modules: the probed modules by index.
        estimates: h by layer index, fp32 (fp64 for fp64 models), in units of ∂_V⟨ĝ, ∇_W L_task⟩ and
            so independent of ρ. Shape (H,), or with `shape="token"` (B, S, H), or (tokens, H) if
            the pass ran several forward passes. Empty before the first step.
        offsets: V_safe, likewise; kept between steps for the lagged schedule and for reading, but
            injected only inside a step.

    Raises:
        ValueError: if the decoder stack cannot be told, or an index is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Literal["early", "middle"] | Sequence[int] | Sequence[nn.Module] = "early",
        shape: Literal["hidden", "token"] = "hidden",
    ) -> None:
        if shape not in ("hidden", "token"):
            raise ValueError(f'shape={shape!r} is not known; choose "hidden" or "token"')
        self.model = model
        self.shape = shape
        #: What spreads the model over ranks; `FusedSAP.runs_in` sets it, too.
        self.ranks = Ranks(model)
        #: Whose operations inject the probe and apply its rule; `FusedSAP(backend=…)` sets it.
        self.backend = "auto"
        self.layers, modules, owner = _select_layers(model, layers)
        self.modules = dict(zip(self.layers, modules, strict=True))

        #: H, where the model's configuration tells it.
        self._width: int | None = getattr(_text_config(model), "hidden_size", None)
        self._buffers: dict[int, list[Tensor]] = {}
        self._scale_sums: dict[int, Tensor] = {}
        self._scale_counts: dict[int, Tensor] = {}
        self._token_count = 0
        self._offsets: dict[int, list[Tensor]] = {}
        self.estimates: dict[int, Tensor] = {}
        #: The dtype that the last probe pass computed in: autocast's, or the hidden states'.
        self.compute_dtype: torch.dtype | None = None

        #: Makes hidden states differentiable where nothing below them is, see `ops.probe_inject`.
        self._anchor = torch.empty(0, requires_grad=True)
        self._collect = False
        #: A bool and not the sign itself: a compiled model would make a float symbolic.
        self._negative = False
        self._inject = False
        self._frozen = False
        self._forward_index = -1
        self._mask: Tensor | None = None
        #: Where the tokens of a packed batch's sequences lie; see `sap_fast.losses.packing`.
        self._index: Tensor | None = None
        #: Only where the decoder stack is known: layers of an unknown order can't be skipped.
        self._lower = LowerForward(_lower_layers(model, self.modules[self.layers[0]]))

        self._handles = [owner.register_forward_pre_hook(self._on_forward, with_kwargs=True)]
        for index, module in self.modules.items():
            hook = functools.partial(self._on_layer_output, index)
            self._handles.append(module.register_forward_hook(hook))

    def __repr__(self) -> str:
        name = type(self.model).__name__
        return f"ProbeSet({name}, layers={list(self.layers)}, shape={self.shape!r})"

    @property
    def offsets(self) -> dict[int, Tensor]:
        """V_safe by layer index; see the class."""
        return {index: _one_tensor(calls) for index, calls in self._offsets.items()}

    @property
    def scales(self) -> dict[int, Tensor]:
        """s_j by layer index: the size (rms) of an ordinary token's hidden state, 0-d fp32.

        The median over a sequence's tokens, since the first token of Llama-like models carries
        activations a hundred times larger than the rest; averaged over the sequences seen by the
        last probe passes.
        """
        return {j: total / self._scale_counts[j] for j, total in self._scale_sums.items()}

    def relative_sizes(self) -> dict[int, float]:
        """Return ‖v_j‖/(s_j·√H) by layer index, per token in the mean; waits for the device."""
        scales, offsets = self.scales, self.offsets
        return {
            j: (v.norm() / (scales[j] * v.numel() ** 0.5)).item()
            for j, v in offsets.items()
            if j in scales
        }

    def detach(self) -> None:
        """Remove every hook from the model. The probe set is of no use afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # ---- what the passes call ----

    def begin_estimate(self) -> None:
        """Forget what earlier probe passes collected."""
        self._buffers.clear()
        if self.shape == "hidden" and self._width is not None:
            # Before the first forward pass: a compiled one may write to a tensor that exists, but
            # backward could not write to one that the forward pass itself made.
            for index, module in self.modules.items():
                weight = next(module.parameters(), None)
                if weight is not None:
                    self._buffers[index] = [self._new_buffer((self._width,), weight)]
        self._scale_sums.clear()
        self._scale_counts.clear()
        self._token_count = 0

    @contextmanager
    def active(
        self,
        *,
        sign: float | None = None,
        inject: bool = False,
        frozen: bool = False,
        keep_lower: Sequence[nn.Parameter] = (),
    ) -> Iterator[None]:
        """Switch the hooks on.

        Args:
            sign: +1 or −1: collect sign·∂L/∂V of every backward pass; None collects nothing.
            inject: add V to the hidden states.
            frozen: no parameter takes a gradient, so nothing below the lowest probe needs one.
            keep_lower: parameters that take gradients below the lowest probe after all, in a
                forward pass that the task pass goes on from (`sap_fast.reuse`).
        """
        self._collect, self._negative = sign is not None, sign == -1.0
        self._inject, self._frozen = inject, frozen
        if keep_lower:
            self._lower.begin(keep_lower)
        try:
            yield
        except BaseException:
            self._lower.forget()
            raise
        finally:
            self._collect = self._inject = self._frozen = False
            self._mask = self._index = None
            self._lower.end()

    def forget_lower_forward(self) -> None:
        """Drop the forward pass that a probe pass kept for a task pass that does not come."""
        self._lower.forget()

    def rewind(self) -> None:
        """Count forward passes from the first micro-batch again; tells per-token probes apart."""
        self._forward_index = -1

    def finish_estimate(self, coefficient: Tensor) -> None:
        """Turn what the probe passes collected into `estimates`: h = coefficient·Σ sign·∂L/∂V.

        Raises:
            RuntimeError: if a probed layer saw no forward pass or no backward pass.
        """
        for index in self.layers:
            if index not in self._scale_sums:
                raise RuntimeError(
                    f"no forward pass went through probed layer {index} during the probe passes: "
                    "is the model that computes the task loss the one given to ProbeSet?"
                )
            buffers = self._buffers[index]
            # A buffer is created with version 0, and every backward pass that reaches it adds one.
            if all(buffer._version == 0 for buffer in buffers):
                raise RuntimeError(
                    f"no gradient reached probed layer {index} during the probe passes: call "
                    "backward() on the task loss in each of them"
                )
        if self.shape == "hidden":  # probes of single tokens belong to the tokens of one rank
            self._average_over_ranks()
        for index in self.layers:
            for buffer in self._buffers[index]:
                buffer.mul_(coefficient.to(buffer.device))
        self.estimates = {index: _one_tensor(self._buffers[index]) for index in self.layers}

    def _average_over_ranks(self) -> None:
        if not self.ranks:
            return
        # Counts in the dtype of the sums: exact up to 2²⁴ sequences.
        self._scale_counts = {
            j: count.to(self._scale_sums[j].dtype) for j, count in self._scale_counts.items()
        }
        sums = [buffer for index in self.layers for buffer in self._buffers[index]]
        self.ranks.average_([*sums, *self._scale_sums.values(), *self._scale_counts.values()])

    def collected_finite(self) -> Tensor:
        """Return whether all that the probe passes have collected so far is finite, as 0-d bool."""
        buffers = [buffer for index in self.layers for buffer in self._buffers[index]]
        finite = [buffer.isfinite().all() for buffer in buffers]
        return torch.stack([found.to(finite[0].device) for found in finite]).all()

    def apply_rule(self, rule: str, probe_lr: float, perturbation_norm: Tensor) -> Tensor:
        """Set V_safe from the collected h by the probe rule (`ops.probe_rule_`).

        Returns:
            0-d bool: whether h was finite; if not, V_safe is zero.
        """
        offsets, radii = [], []
        scales = self.scales
        for index in self.layers:
            for buffer in self._buffers[index]:
                # A probe of N tokens has N times the elements of one for a single token.
                elements = buffer.shape[-1] * (self._token_count if self.shape == "token" else 1)
                offsets.append(buffer.clone())
                radii.append(scales[index] * elements**0.5)
        finite = ops.probe_rule_(
            offsets,
            rule,
            probe_lr,
            perturbation_norm=perturbation_norm,
            radii=radii,
            backend=self.backend,
        )
        remaining = iter(offsets)
        self._offsets = {j: [next(remaining) for _ in self._buffers[j]] for j in self.layers}
        return finite

    def mask_offsets(self, keep: Tensor) -> None:
        """Set V to zero unless the 0-d bool `keep` holds."""
        for calls in self._offsets.values():
            calls[:] = [torch.where(keep.to(v.device), v, 0.0) for v in calls]

    def copy_offsets(self) -> dict[int, list[Tensor]]:
        """Return V, for `replace_offsets`: shares the tensors, which nothing writes to."""
        return {index: list(calls) for index, calls in self._offsets.items()}

    def replace_offsets(self, offsets: dict[int, list[Tensor]]) -> None:
        """Put a V that `copy_offsets` returned in the place of the current one."""
        self._offsets = offsets

    def state_dict(self, offsets: dict[int, list[Tensor]] | None = None) -> dict[int, Tensor]:
        """Return V of probes shared by all tokens, which the lagged schedule needs to resume.

        Args:
            offsets: what `copy_offsets` returned, to save that V instead of the current one.
        """
        offsets = self._offsets if offsets is None else offsets
        if self.shape != "hidden":
            return {}
        return {index: _one_tensor(calls) for index, calls in offsets.items()}

    def load_state_dict(self, offsets: dict[int, Tensor]) -> None:
        """Load what `state_dict` returned.

        Raises:
            ValueError: if it belongs to other layers.
        """
        unknown = sorted(set(offsets) - set(self.layers))
        if unknown:
            raise ValueError(
                f"the saved probe has layers {sorted(offsets)}, this one {list(self.layers)}; "
                f"{unknown} are not probed here"
            )
        self._offsets = {index: [offset.clone()] for index, offset in offsets.items()}

    # ---- hooks ----

    @property
    def _is_on(self) -> bool:
        return (self._collect or self._inject) and not packing.being_tested()

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._is_on:
            return
        self._forward_index += 1
        if not torch.compiler.is_compiling():
            self.ranks.refuse_unknown_replica()
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self._index = packing.current_index()
        if self._forward_index == 0:
            self._lower.begin_forward(args, kwargs)
            if not self._collect:
                self._lower.skip(args, kwargs)

    def _on_layer_output(
        self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        if not self._is_on:
            return None
        if index == self.layers[0]:
            self._lower.keep(output)
            self._lower.resume()
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        buffer = None
        if self._collect:
            if self._frozen and index == self.layers[0]:
                # Nothing below may be kept for backward, also where something (the input hook
                # of gradient checkpointing) made the embeddings require grad.
                hidden = hidden.detach()
            self._measure(index, hidden.detach())
            buffer = self._buffer(index, hidden)
        offset = self._offset(index, hidden)
        if buffer is None and offset is not None and _may_be_written(hidden, args):
            hidden.add_(offset)  # the bits of `ops.probe_add`, and no second B×S×H tensor
            return None
        injected = ops.probe_inject(
            hidden,
            offset,
            buffer,
            -1.0 if self._negative else 1.0,
            anchor=self._anchor,
            backend=self.backend,
        )
        return (injected, *output[1:]) if isinstance(output, tuple) else injected

    def _measure(self, index: int, hidden: Tensor) -> None:
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        self.compute_dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype

        dtype = accumulation_dtype(hidden.dtype)
        rms = torch.linalg.vector_norm(hidden, dim=-1, dtype=dtype) / hidden.shape[-1] ** 0.5
        if self._index is not None:
            # Back to one row per sequence; where two share tokens, each has them.
            rms = rms.flatten().take(self._index.clamp(min=0))
            rms = torch.where(self._index >= 0, rms, torch.nan)
        elif self._mask is not None and self._mask.shape == rms.shape:
            rms = torch.where(self._mask.to(rms.device).bool(), rms, torch.nan)
        medians = rms.nanmedian(dim=-1).values
        # A row of nothing but padding has no median and does not count.
        total, count = medians.nansum(), medians.isnan().logical_not().sum()
        if index in self._scale_sums:
            total, count = total + self._scale_sums[index], count + self._scale_counts[index]
        self._scale_sums[index], self._scale_counts[index] = total, count

    def _buffer(self, index: int, hidden: Tensor) -> Tensor:
        """Return where the gradient of this layer's probe is added up in this forward pass."""
        if index not in self._buffers:
            self._buffers[index] = []
        calls = self._buffers[index]
        position = self._forward_index if self.shape == "token" else 0
        if position == len(calls):
            shape = hidden.shape if self.shape == "token" else hidden.shape[-1:]
            calls.append(self._new_buffer(shape, hidden))
            if self.shape == "token" and index == self.layers[0]:
                self._token_count += hidden[..., 0].numel()
        return calls[position]

    @staticmethod
    def _new_buffer(shape: Sequence[int], like: Tensor) -> Tensor:
        dtype = accumulation_dtype(like.dtype)
        return torch.zeros(shape, dtype=dtype, device=like.device)

    def _offset(self, index: int, hidden: Tensor) -> Tensor | None:
        if not self._inject or index not in self._offsets:
            return None
        calls = self._offsets[index]
        if self.shape == "hidden":
            return calls[0]
        if self._forward_index >= len(calls) or calls[self._forward_index].shape != hidden.shape:
            found = [tuple(offset.shape) for offset in calls]
            raise RuntimeError(
                f"the task pass gave layer {index} hidden states of shape {tuple(hidden.shape)} in "
                f"forward pass {self._forward_index}, but the probe passes found offsets of shapes "
                f'{found}: with shape="token" both must see the same micro-batches in the same '
                "order"
            )
        return calls[self._forward_index]


def _may_be_written(hidden: Tensor, args: tuple[Any, ...]) -> bool:
    """Whether V may be added in place: autograd saved these hidden states for no one.

    A sum, such as the residual one that ends a decoder layer, does not save its result. What the
    layer was given does not count: others may have saved it.
    """
    return (
        not torch.compiler.is_compiling()
        and type(hidden.grad_fn).__name__ == "AddBackward0"
        and not hidden._is_view()
        and all(hidden is not given for given in args)
    )


def _lower_layers(model: nn.Module, lowest: nn.Module) -> list[nn.Module]:
    """Return the decoder layers up to `lowest`; none if they may not be skipped."""
    if getattr(_text_config(model), "output_router_logits", False):
        return []  # the loss reads the routers of all layers
    try:
        stack = list(find_decoder_layers(model)[0])
    except ValueError:
        return []
    return stack[: stack.index(lowest) + 1] if lowest in stack else []


def _one_tensor(calls: list[Tensor]) -> Tensor:
    return calls[0] if len(calls) == 1 else torch.cat([call.flatten(0, -2) for call in calls])


def _select_layers(
    model: nn.Module, layers: Literal["early", "middle"] | Sequence[int] | Sequence[nn.Module]
) -> tuple[tuple[int, ...], list[nn.Module], nn.Module]:
    """Return the probed layers' indices, the layers, and the module whose forward runs them."""
    if isinstance(layers, str):
        if layers not in LAYER_RANGES:
            names = ", ".join(f'"{name}"' for name in LAYER_RANGES)
            raise ValueError(f"layers={layers!r} is not known; give {names}, indices or modules")
        stack, owner = find_decoder_layers(model)
        depth = len(stack)
        first, last = (min(round(fraction * depth), depth - 1) for fraction in LAYER_RANGES[layers])
        indices = list(range(first, last + 1))
        return tuple(indices), [stack[index] for index in indices], owner

    chosen = list(layers)
    if not chosen:
        raise ValueError("layers=[] probes nothing; give at least one layer")
    if all(isinstance(layer, nn.Module) for layer in chosen):
        inside = {id(module) for module in model.modules()}
        for position, layer in enumerate(chosen):
            if id(layer) not in inside:
                raise ValueError(
                    f"layers[{position}] ({type(layer).__name__}) is not a module of the model"
                )
        return tuple(range(len(chosen))), [m for m in chosen if isinstance(m, nn.Module)], model
    if not all(isinstance(layer, int) and not isinstance(layer, bool) for layer in chosen):
        raise ValueError(
            f"layers={chosen!r} mixes kinds; give either layer indices or modules, nothing else"
        )
    stack, owner = find_decoder_layers(model)
    depth = len(stack)
    wanted = [layer for layer in chosen if isinstance(layer, int)]
    for layer in wanted:
        if not -depth <= layer < depth:
            raise ValueError(
                f"layers={chosen!r}: {layer} is out of range for a model of {depth} layers"
            )
    indices = sorted({layer % depth for layer in wanted})
    return tuple(indices), [stack[index] for index in indices], owner


def _text_config(model: nn.Module) -> Any:
    """Return the configuration of a language model, or of the language half of a larger one."""
    config = next((m.config for m in model.modules() if hasattr(m, "config")), None)
    get_text_config = getattr(config, "get_text_config", None)
    return get_text_config(decoder=True) if callable(get_text_config) else config


def find_decoder_layers(model: nn.Module) -> tuple[nn.ModuleList, nn.Module]:
    """Find a causal language model's stack of decoder layers by the model's own structure.

    The stack is the only outermost `nn.ModuleList` with as many entries as the model's
    configuration has hidden layers. Lists inside the layers (experts) are not outermost.

    Returns:
        The list, and the module that owns it and runs it in its forward.

    Raises:
        ValueError: if there is no such list, or more than one.
    """
    depth = getattr(_text_config(model), "num_hidden_layers", None)

    found: list[tuple[str, nn.ModuleList, nn.Module]] = []

    def search(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList):
                found.append((f"{prefix}{name}", child, module))
            else:
                search(child, f"{prefix}{name}.")

    search(model, "")
    stacks = [(stack, owner) for _, stack, owner in found if len(stack) == depth]
    if depth is None or len(stacks) != 1:
        lists = ", ".join(f"{name} ({len(stack)})" for name, stack, _ in found) or "none"
        reason = (
            "its configuration has no num_hidden_layers"
            if depth is None
            else f"{len(stacks)} lists of {depth} modules, one expected"
        )
        raise ValueError(
            f"cannot tell the decoder layers of {type(model).__name__}: {reason} (module lists: "
            f"{lists}). Give the modules to probe: ProbeSet(model, layers=[module, …])"
        )
    return stacks[0]
