"""The probe V: where it lives in the model, how it is injected, how its gradient is collected.

A `ProbeSet` adds an offset v_j to the output of chosen decoder layers,
x_j = layer_j(x_{j−1}) + v_j, but only inside the passes of a step (`sap_fast.step.passes` switches
it on). Outside of them its hooks return at once: evaluation, generation and checkpoints never see a
probe.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.configuration import text_config
from sap_fast.distributed import Ranks
from sap_fast.losses import packing
from sap_fast.losses.host import transferred
from sap_fast.model.checkpointing import Checkpointing
from sap_fast.model.layers import Layers, find_decoder_layers, lower_layers, select_layers
from sap_fast.model.lower_forward import LowerForward
from sap_fast.model.output_hook import OutputHook
from sap_fast.model.paired import (
    Adapter,
    PairedForward,
    Weights,
    find_adapters,
    has_quantized_base,
)
from sap_fast.model.rows import Part, part_of
from sap_fast.model.scales import TokenScales, token_mask
from sap_fast.ops.reference import accumulation_dtype

PROBE_RULES = ("normalized", "lean", "gradient", "adam")
#: The most that `rule="lean"` makes of a v_j, in norms of an ordinary token's hidden state.
LARGEST_OFFSET = 0.03
DIFFERENCES = ("central", "forward")
PASSES = ("two", "paired", "auto")
CHECKPOINTING = ("none", "layers", "auto")


class ProbeSet:
    """Offsets V of the hidden states of chosen decoder layers, one vector of H elements per layer.

    Args:
        model: the model that is trained, plain or wrapped (PEFT, `torch.compile`, DDP).
        layers: `"early"` for layers 1…10 of 32 or `"middle"` for the paper's 11…20, scaled to the
            model's depth; or layer indices, negative ones counted from the end; or the modules
            themselves, for models whose decoder stack is not found by itself (indices are then
            positions in this list).
        size: β, the size of the probe; what it means depends on `rule`.
        rule: how V follows from its gradient h. `"normalized"`: each v_j has β times the norm of an
            ordinary token's hidden state. `"lean"`: the same V, as large as makes the task gradient
            lean by β times the length it had in the step before: Σ_j ⟨h_j, v_j⟩ = β‖g‖ over the
            whole batch, where no v_j exceeds `LARGEST_OFFSET`. β is then the probe's counterpart of
            γ in blending. The first step has no length to go by, and no probe. `"gradient"`:
            V = β·ρ‖W‖·h, the paper's. `"adam"`: one step of AdamW of size β, the authors' code's.
        rho: size ρ of the weight perturbation relative to ‖W‖ of the trained parameters. `"auto"`
            finds it on the first batch (`sap_fast.step.calibration`).
        difference: how h is differenced in ρ: `"central"` (W ± ΔW, error O(ρ²)) or `"forward"`
            (W + ΔW and W, the paper's, error O(ρ)), at the same cost. Under bf16 autocast prefer
            central: the cosine of its h with the exact one is 0.99 and more where forward
            differences reach 0.93 to 0.97 (benchmarks/fidelity.py).
        rows: the part of the task batch, in (0, 1], that the probe passes see, rounded up to whole
            rows; of less than one row, its first tokens. Below 1 the optimizer has to be given the
            batch: `step(task, safety, batch)`.
        own_rows: with `rows` below 1, add V in the task pass to the rows alone that it was found
            from, 1/√(their part of the batch) times as large. That takes one forward pass with
            gradients per micro-batch, and its backward before the next one. By default V serves all
            rows.
        passes: `"two"` probe passes, or `"paired"`: both as one of twice the rows, where LoRA alone
            is trained (`sap_fast.model.paired`). It halves what the host launches and reads the
            frozen base once; the activations of both are held together. `"auto"` pairs them where
            the base is quantized and at most half of one batch's rows are seen, so that no more is
            held than for a task pass, and where nothing speaks against it.
        checkpointing: recompute activations in the backward passes: `"none"` leaves the model as it
            is, `"layers"` recomputes every decoder layer that a pass would store, `"auto"` as many
            as the free memory asks for; see `sap_fast.model.checkpointing`.

    Attributes:
        model: the model.
        layers: the indices of the probed layers, ascending.
        modules: the probed modules by index.
        estimates: h by layer index, (H,), fp32 (fp64 for fp64 models), in units of
            ∂_V⟨ĝ, ∇_W L_task⟩ and so independent of ρ. Empty before the first probe passes.
        offsets: V by layer index, likewise. Injected only inside the step that found it; afterwards
            it is there to be read, until the next step begins.
        compute_dtype: the dtype that autocast or FSDP2's policy multiplied weights in, in the last
            probe pass; None without either, where every weight is multiplied in its own.

    Raises:
        ValueError: if the decoder stack cannot be told, an index is out of range, or an argument is
            none of those above.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Layers = "early",
        *,
        size: float = 3e-3,
        rule: Literal["normalized", "lean", "gradient", "adam"] = "normalized",
        rho: float | Literal["auto"] = "auto",
        difference: Literal["central", "forward"] = "central",
        rows: float = 1.0,
        own_rows: bool = False,
        passes: Literal["two", "paired", "auto"] = "two",
        checkpointing: Literal["none", "layers", "auto"] = "none",
    ) -> None:
        _check_choice("rule", rule, PROBE_RULES)
        _check_choice("difference", difference, DIFFERENCES)
        _check_choice("passes", passes, PASSES)
        if passes == "paired" and difference != "central":
            raise ValueError(
                f'passes="paired" with difference={difference!r}: the halves of a pair are W + ΔW '
                'and W − ΔW; give difference="central"'
            )
        _check_choice("checkpointing", checkpointing, CHECKPOINTING)
        _check_at_least_zero("size", size)
        if rho != "auto":
            if isinstance(rho, str):
                raise ValueError(f'rho={rho!r} is not known; give "auto" or a number ≥ 0')
            _check_at_least_zero("rho", rho)
        if not 0 < rows <= 1:
            raise ValueError(f"rows={rows!r} is out of range; give 0 < rows ≤ 1")
        self.model = model
        self.size = size
        self.rule = rule
        self.rho = rho
        self.difference = difference
        self.rows = rows
        self.own_rows = own_rows
        self.passes = passes
        self.checkpointing = checkpointing
        self.layers, modules, owner = select_layers(model, layers)
        self.modules = dict(zip(self.layers, modules, strict=True))
        self.estimates: dict[int, Tensor] = {}
        self.offsets: dict[int, Tensor] = {}
        self.compute_dtype: torch.dtype | None = None
        #: What spreads the model over ranks, and whose operations run here; `SafetyPasses` sets
        #: both.
        self.ranks = Ranks(model)
        self.backend = "auto"
        self._checkpointing: Checkpointing | None = None
        if checkpointing != "none":
            self._checkpointing = Checkpointing(
                *find_decoder_layers(model), checkpointing, self.layers[0]
            )
        #: H, where the model's configuration tells it.
        self._width: int | None = getattr(text_config(model), "hidden_size", None)
        self._buffers: dict[int, Tensor] = {}
        self._scales = TokenScales()
        #: Makes hidden states differentiable where nothing below them is, see `ops.probe_inject`.
        self._anchor = torch.empty(0, requires_grad=True)
        self._collect = False
        #: A bool and not the sign itself: a compiled model would make a float symbolic.
        self._negative = False
        self._inject = False
        #: Parameters that take no gradient in this pass.
        self._frozen: Sequence[nn.Parameter] = ()
        #: Forward passes since the pass began.
        self._forwards = 0
        #: The layers that have run in the forward pass in progress; None between forward passes.
        self._ran: set[int] | None = None
        self._owner = owner
        #: Runs both probe passes as one; None where they are two.
        self._paired: PairedForward | None = None
        #: The rows of the step's batch that its probe passes see.
        self._part = Part(None, None)
        #: Their part of all rows of all ranks, 0-d.
        self._share: Tensor | None = None
        #: By micro-batch, which rows are injected to and collected from; None: all.
        self._own_rows: list[list[bool]] | None = None
        #: Which hidden states those are in the forward pass in progress, (B, S or 1, 1) bool.
        self._own: Tensor | None = None
        #: The forward pass in progress is without gradients: a reference, not the loss.
        self._aside = False
        self._mask: Tensor | None = None
        #: Where the tokens of a packed batch's sequences lie; see `sap_fast.losses.packing`.
        self._index: Tensor | None = None
        #: Only where the decoder stack is known: layers of an unknown order can't be skipped.
        self._lower = LowerForward(lower_layers(model, self.modules[self.layers[0]]))

        self._layer_hooks = [
            OutputHook(module, functools.partial(self._on_layer_output, index))
            for index, module in self.modules.items()
        ]
        self._handles: list[Any] = [
            owner.register_forward_pre_hook(self._on_forward, with_kwargs=True),
            owner.register_forward_hook(self._after_forward, always_call=True),
            *self._layer_hooks,
        ]

    def __repr__(self) -> str:
        return f"ProbeSet({type(self.model).__name__}, layers={list(self.layers)})"

    @property
    def scales(self) -> dict[int, Tensor]:
        """s_j by layer index: the size of an ordinary token's hidden state; see `TokenScales`."""
        return self._scales.values()

    def relative_sizes(self) -> dict[int, float]:
        """Return ‖v_j‖/(s_j·√H) by layer index; waits for the device."""
        scales = self.scales
        return {
            j: (v.norm() / (scales[j] * v.numel() ** 0.5)).item()
            for j, v in self.offsets.items()
            if j in scales
        }

    def part(self, batch: Any) -> Any:
        """Return the rows of a batch, or of a list of micro-batches, that the probe passes see."""
        return part_of(batch, self.rows).batch

    def detach(self) -> None:
        """Remove every hook from the model. The probe set is of no use afterwards."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._layer_hooks.clear()

    # ---- what the passes call ----

    def clear(self) -> None:
        """Forget V, whose rows it is, and the forward pass that was kept for a task pass."""
        self.offsets = {}
        self._part = Part(None, None)
        self._lower.forget()

    def take_part(self, batch: Any) -> Any:
        """Return what `part` does, and remember whose rows the probe of this step is."""
        self._part = part_of(batch, self.rows)
        return self._part.batch

    @property
    def sees_all_rows(self) -> bool:
        """Whether the probe passes of this step see all rows of its batch."""
        return self._part.rows is None or self._part.share == 1

    def begin_estimate(self) -> None:
        """Forget what earlier probe passes collected."""
        self._buffers.clear()
        if self._width is not None:
            # Before the first forward pass: a compiled one may write to a tensor that exists, but
            # backward could not write to one that the forward pass itself made.
            for index, module in self.modules.items():
                weight = next(module.parameters(), None)
                if weight is not None:
                    self._buffers[index] = _new_buffer(self._width, weight)
        self._scales.clear()

    @contextmanager
    def active(
        self,
        *,
        sign: float | None = None,
        inject: bool = False,
        frozen: Sequence[nn.Parameter] = (),
        keep_lower: bool = False,
        all_rows: bool = True,
    ) -> Iterator[None]:
        """Switch the hooks on, for forward passes with gradients.

        One without gradients inside, such as that of a reference model for a KL term, runs without
        probe and is not collected from.

        Args:
            sign: +1 or −1: collect sign·∂L/∂V of every backward pass; None collects nothing.
            inject: add V to the hidden states.
            frozen: the parameters, none of which takes a gradient: nothing below the lowest probe
                needs one.
            keep_lower: let them take gradients below the lowest probe after all, in a forward pass
                that the task pass goes on from (`sap_fast.model.lower_forward`).
            all_rows: inject to all rows of the batch and collect from all of them, not from those
                alone that the probe is of.
        """
        for hook in self._layer_hooks:
            hook.settle()
        self._own_rows = None if all_rows else self._part.rows
        self._collect, self._negative = sign is not None, sign == -1.0
        self._inject, self._frozen = inject, frozen
        if keep_lower:
            self._lower.begin(frozen)
        try:
            with packing.apart(self._own_rows_of_next_forward):
                yield
        except BaseException:
            self._lower.forget()
            raise
        finally:
            self._collect = self._inject = self._aside = False
            self._frozen = ()
            self._mask = self._index = self._ran = self._own_rows = self._own = None
            self._lower.end()

    def paired_adapters(self, part: Any) -> Sequence[Adapter]:
        """Return the adapters with which both probe passes are one; none where they are two.

        Args:
            part: what they run on.

        Raises:
            ValueError: with `passes="paired"`, if they can't be one.
        """
        if self.passes == "two" or self.difference != "central":
            return ()
        found: list[Adapter] | str = "FSDP2 gathers its weights for one forward at a time"
        if not self.ranks.shards:
            trained = [p for p in self._owner.parameters() if p.requires_grad]
            found = find_adapters(self.model, self._owner, trained)
        if self.passes == "paired":
            if isinstance(found, str):
                raise ValueError(
                    f'passes="paired": {found}; use passes="two", or "auto" for where it can be'
                )
            return found
        several = isinstance(part, Sequence) and len(part) > 1
        if isinstance(found, str) or several or self._part.share > 0.5:
            return ()
        return found if has_quantized_base(found) else ()

    @contextmanager
    def paired(self, adapters: Sequence[Adapter], weights: Weights) -> Iterator[PairedForward]:
        """Let the first probe pass of the body run the decoder for both."""
        self._paired = PairedForward(self._owner, adapters, weights)
        try:
            with self._paired.running():
                yield self._paired
        finally:
            self._paired = None

    def checkpointed(self, *, frozen: bool = False) -> AbstractContextManager[None]:
        """Checkpoint activations in the body, as `checkpointing` says.

        Args:
            frozen: nothing up to the lowest probed layer is differentiated.
        """
        return self._checkpointing.active(frozen=frozen) if self._checkpointing else nullcontext()

    def rewind(self) -> None:
        """Begin a pass: the next forward pass is its first."""
        self._forwards = 0

    def finish_estimate(self, coefficient: Tensor) -> None:
        """Turn what the probe passes collected into `estimates`: h = coefficient·Σ sign·∂L/∂V.

        Raises:
            RuntimeError: if a probed layer saw no forward pass or no backward pass.
        """
        for index in self.layers:
            if index not in self._scales:
                raise RuntimeError(
                    f"no forward pass went through probed layer {index} during the probe passes: "
                    "is the model that computes the task loss the one given to ProbeSet?"
                )
            # A buffer is created with version 0, and every backward pass that reaches it adds one.
            if self._buffers[index]._version == 0:
                raise RuntimeError(
                    f"no gradient reached probed layer {index} during the probe passes: call "
                    "backward() on the task loss in each of them"
                )
        first = self._buffers[self.layers[0]]
        self._share = torch.full((), self._part.share, dtype=first.dtype, device=first.device)
        if self.ranks:
            buffers = [self._buffers[index] for index in self.layers]
            self.ranks.average_([*buffers, *self._scales.tensors(), self._share])
        for buffer in self._buffers.values():
            buffer.mul_(coefficient.to(buffer.device))
        self.estimates = {index: self._buffers[index] for index in self.layers}

    def apply_rule(self, perturbation_norm: Tensor, gradient_norm: Tensor | None = None) -> Tensor:
        """Set V from h by the probe rule (`ops.probe_rule_`).

        Args:
            perturbation_norm: ρ‖W‖, 0-d.
            gradient_norm: ‖g‖ of the step before, 0-d, for `rule="lean"`; None: V is zero.

        Returns:
            0-d bool: whether h was finite; if not, V is zero.
        """
        scales, leans = self.scales, self.rule == "lean"
        offsets = {j: self.estimates[j].clone() for j in self.layers}
        finite = ops.probe_rule_(
            list(offsets.values()),
            "normalized" if leans else self.rule,
            LARGEST_OFFSET if leans else self.size,
            perturbation_norm=perturbation_norm,
            radii=[scales[j] * v.numel() ** 0.5 for j, v in offsets.items()],
            backend=self.backend,
        )
        if leans:
            self._shrink_to_lean(offsets, gradient_norm)
        elif self.own_rows and not self.sees_all_rows:
            # As much of V over the whole batch, in the sum of squares, as if it served all rows.
            assert self._share is not None
            for offset in offsets.values():
                offset.mul_(self._share.rsqrt().to(offset.device))
        self.offsets = offsets
        return finite

    def _shrink_to_lean(self, offsets: dict[int, Tensor], gradient_norm: Tensor | None) -> None:
        """Multiply V, each v_j as large as may be, by what makes it lean as wanted."""
        assert self._share is not None
        # Of h of a part f of the rows about f is that of all: with V on these rows alone by what a
        # mean over rows is, with V on all as its cosine with h of all is about √f
        # (docs/measurements/step.md).
        lean = self._leans(offsets) * self._share
        wanted = torch.zeros_like(lean)
        if gradient_norm is not None:
            wanted = (self.size * gradient_norm).to(lean)
        factor = torch.where(lean > 0, wanted / lean, 0.0).clamp(max=1.0)
        for offset in offsets.values():
            offset.mul_(factor.to(offset.device))

    def lean(self) -> Tensor:
        """Return Σ_j ⟨h_j, v_j⟩, 0-d."""
        return self._leans(self.offsets)

    def _leans(self, offsets: dict[int, Tensor]) -> Tensor:
        products = [torch.sum(self.estimates[j] * v) for j, v in offsets.items()]
        return torch.stack([product.to(products[0].device) for product in products]).sum()

    @contextmanager
    def estimate_set_aside(self) -> Iterator[None]:
        """Let probe passes run in the body of which nothing stays."""
        kept = self.estimates, self._buffers, self._scales, self._share
        self._buffers, self._scales = {}, TokenScales()
        try:
            yield
        finally:
            self.estimates, self._buffers, self._scales, self._share = kept

    def mask_offsets(self, keep: Tensor) -> None:
        """Set V to zero unless the 0-d bool `keep` holds."""
        self.offsets = {j: torch.where(keep.to(v.device), v, 0.0) for j, v in self.offsets.items()}

    # ---- hooks ----

    @property
    def _is_on(self) -> bool:
        return self._collect or self._inject

    def _on_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._is_on:
            return None
        if not torch.is_grad_enabled():
            self._aside = True
            return None
        self._forwards += 1
        if not torch.compiler.is_compiling():
            self._ran = set()
            self.ranks.refuse_unknown_replica()
            # PEFT lets adapters take gradients again after it has switched them off and on.
            if not self._lower.is_keeping:
                for parameter in self._frozen:
                    parameter.requires_grad_(False)
        self._mask = token_mask(self.model, kwargs)
        self._index = packing.current_index()
        if self._own_rows is not None:
            self._own = self._find_own(args, kwargs)
        if self._forwards == 1:
            self._lower.begin_forward(args, kwargs)
            if not self._collect:
                self._lower.skip(args, kwargs)
        if self._paired is None:
            return None
        if self._negative:
            self._paired.skip(args, kwargs)
            return None
        args, kwargs = self._paired.double(args, kwargs)
        self._mask = token_mask(self.model, kwargs)
        if self._index is not None:
            slots = self._paired.tokens.numel()
            beside = torch.where(self._index < 0, self._index, self._index + slots)
            self._index = torch.cat([self._index, beside])
        return args, kwargs

    def _own_rows_of_next_forward(self) -> list[bool] | None:
        if self._own_rows is None or self._forwards >= len(self._own_rows):
            return None
        return self._own_rows[self._forwards]

    def _find_own(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return which hidden states of this forward are those of the rows that V is of."""
        assert self._own_rows is not None
        given = [*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")]
        tokens = next(value for value in given if isinstance(value, Tensor))
        index = self._index
        rows = len(tokens) if index is None else len(index)
        number = self._forwards - 1
        expected = self._own_rows[number] if number < len(self._own_rows) else []
        if len(expected) != rows:
            raise RuntimeError(
                f"own_rows=True: forward pass {number + 1} of the step has {rows} rows, where the "
                f"micro-batches have {[len(flags) for flags in self._own_rows]}: it is not known "
                "which of them V was found from. Run one forward pass with gradients per "
                "micro-batch, in their order, or leave own_rows out"
            )
        own = transferred(torch.tensor(expected), tokens.device)
        if index is None:
            return own[:, None, None]
        # Padding (−1) goes to a place of its own.
        places = index.flatten() + 1
        flat = own.new_zeros(tokens.shape[:2].numel() + 1)
        flat.scatter_(0, places, own[:, None].expand(index.shape).flatten())
        return flat[1:].view(*tokens.shape[:2], 1)

    def _after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        paired = None if self._aside else self._paired
        self._aside, self._ran = False, None
        if paired is None or not self._collect:
            return None
        if self._negative or output is None:  # None: of a forward that failed
            paired.undo()
            return None
        return paired.first_half(output)

    def _on_layer_output(
        self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> Any:
        if not self._is_on or self._aside:
            return None
        if self._ran is not None:  # a checkpointed layer that runs again in backward is none
            if index in self._ran:
                raise RuntimeError(
                    f"decoder layer {index} ({type(module).__name__}) ran twice in one forward "
                    "pass: h of a layer that is shared or looped would be wrong; probe other layers"
                )
            self._ran.add(index)
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
            buffer = self._buffers.get(index)
            if buffer is None:
                buffer = self._buffers[index] = _new_buffer(hidden.shape[-1], hidden)
            if self._paired is not None:
                if not hidden.requires_grad:
                    hidden.requires_grad_()  # detached above: it is the lowest
                hidden.register_hook(functools.partial(self._collect_both, buffer))
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
        offset = self.offsets.get(index) if self._inject else None
        everywhere = buffer is None and self._own is None
        if offset is not None and everywhere and _may_be_written(hidden, args):
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
        if self._own is not None:
            # The other rows take no V, and what comes back of them is not collected.
            injected = torch.where(self._own.to(hidden.device), injected, hidden)
        return (injected, *output[1:]) if isinstance(output, tuple) else injected

    def _collect_both(self, buffer: Tensor, gradient: Tensor) -> None:
        rows = len(gradient) // 2
        ops.probe_project_(buffer, gradient[:rows], 1.0, backend=self.backend)
        ops.probe_project_(buffer, gradient[rows:], -1.0, backend=self.backend)

    def _measure(self, index: int, hidden: Tensor) -> None:
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        # FSDP2's policy has weights and hidden states in one dtype while a layer runs.
        policy = hidden.dtype if self.ranks.shards else None
        self.compute_dtype = torch.get_autocast_dtype(device_type) if autocast else policy
        self._scales.measure(index, hidden, self._mask, self._index)


def _new_buffer(width: int, like: Tensor) -> Tensor:
    return torch.zeros(width, dtype=accumulation_dtype(like.dtype), device=like.device)


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


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; choose one of {', '.join(choices)}")


def _check_at_least_zero(name: str, value: float) -> None:
    if not float(value) >= 0:
        raise ValueError(f"{name}={value!r} is out of range; give a number ≥ 0")
