"""Safe LoRA and AsFT: updates held to what alignment had changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from sap_fast.baselines.plain import PlainTrainer


class AsFTTrainer(PlainTrainer):
    """AdamW with a penalty on what an update does outside of the directions of alignment.

    AsFT (arXiv:2506.08473): L_task + λ·Σ‖(I − C)·ΔW‖² over the layers with LoRA, C and ΔW as for
    `project_onto_alignment`. Safety pairs have no part in it. I − C takes the square of a layer's
    outputs in fp32: for all layers of a large model as much as its weights.

    Args:
        *args: as for `SAPTrainer`; the model has LoRA, on the aligned model.
        unaligned: state dict of the model before it was aligned.
        penalty: λ; the authors' 1.0 by default.
        **kwargs: as for `SAPTrainer`.
    """

    def __init__(
        self, *args: Any, unaligned: Mapping[str, Tensor], penalty: float = 1.0, **kwargs: Any
    ) -> None:
        if not penalty >= 0:
            raise ValueError(f"penalty={penalty}: expected a number ≥ 0")
        super().__init__(*args, **kwargs)
        self._penalty = penalty
        self._layers = []
        assert self.model is not None  # Trainer wants one, or makes it
        for layer in alignment_layers(self.model, unaligned):
            identity = torch.eye(len(layer.projection), device=layer.projection.device)
            self._layers.append((layer, identity - layer.projection))

    def _added_loss(self, model: nn.Module) -> Tensor:
        squares = torch.stack([self._square(*layer) for layer in self._layers])
        return self._penalty * squares.sum()

    @staticmethod
    def _square(layer: AlignmentLayer, outside: Tensor) -> Tensor:
        """Return ‖(I − C)·B·A‖² from products of r × r: ΔW itself is never formed."""
        left = outside @ layer.up.float()
        right = layer.down.float()
        return layer.scaling**2 * ((left.T @ left) * (right @ right.T)).sum()


class AlignmentLayer(NamedTuple):
    """A layer with LoRA, whose update is ΔW = scaling·up·down."""

    name: str
    up: Tensor  # B, (outputs, r)
    down: Tensor  # A, (r, inputs)
    scaling: float
    projection: Tensor  # C, (outputs, outputs), fp32


@torch.no_grad()
def project_onto_alignment(
    model: nn.Module, unaligned: Mapping[str, Tensor], threshold: float = 0.35
) -> dict[str, float]:
    """Replace LoRA updates that have little to do with alignment by their projection, in place.

    Safe LoRA (Hsu et al. 2024, arXiv:2405.16833). With D = W_aligned − W_unaligned and
    C = D·Dᵀ/‖D‖ of a layer, ΔW becomes C·ΔW where the cosine of the two is below `threshold`.
    With LoRA that is B ← C·B. Products are formed in fp32.

    Args:
        model: with LoRA on linear layers of the aligned model.
        unaligned: state dict of the model before it was aligned.
        threshold: τ, in [−1, 1]; −1 changes nothing. The authors' 0.35 by default.

    Returns:
        By layer, the cosine of ΔW and C·ΔW as it was before.

    Raises:
        ValueError: for a threshold outside, a model without LoRA, a layer that is not linear or
            has a quantized weight, or an `unaligned` that does not fit the model.
    """
    if not -1 <= threshold <= 1:
        raise ValueError(f"threshold={threshold}: expected a number in [-1, 1]")
    cosines = {}
    for layer in alignment_layers(model, unaligned):
        up = layer.up.float()
        projected = layer.projection @ up
        gram = layer.down.float() @ layer.down.float().T  # of the columns, whatever is left of it
        product = ((projected.T @ up) * gram).sum()
        norms = ((up.T @ up) * gram).sum() * ((projected.T @ projected) * gram).sum()
        cosine = float(product / norms.sqrt()) if norms > 0 else 1.0
        cosines[layer.name] = cosine
        if cosine < threshold:
            layer.up.copy_(projected)
    return cosines


def alignment_layers(model: nn.Module, unaligned: Mapping[str, Tensor]) -> Iterator[AlignmentLayer]:
    """Yield the layers with LoRA and their C; see `project_onto_alignment`."""
    get_base_model: Any = getattr(model, "get_base_model", None)
    layers: list[tuple[str, Any]] = [
        (name, module)
        for name, module in (get_base_model() if get_base_model else model).named_modules()
        if isinstance(module, LoraLayer)
    ]
    if not layers:
        raise ValueError("the model has no LoRA, whose updates could be projected")
    for name, module in layers:
        base, key = module.get_base_layer(), f"{name}.weight"
        if not isinstance(base, nn.Linear) or not base.weight.is_floating_point():
            raise ValueError(f"{name} is no nn.Linear with weights of floating point")
        aligned = base.weight
        if any(module.use_dora.values()):
            raise ValueError(f"{name} has a DoRA, whose update isn't the product of its matrices")
        if key not in unaligned or unaligned[key].shape != aligned.shape:
            found = tuple(unaligned[key].shape) if key in unaligned else "missing"
            raise ValueError(f"unaligned[{key!r}] is {found}; expected {tuple(aligned.shape)}")
        moved = aligned.detach().float() - unaligned[key].to(aligned.device).float()
        norm = moved.norm()
        if not norm > 0:
            raise ValueError(f"unaligned[{key!r}] is the aligned weight: nothing was aligned here")
        projection = moved @ moved.T / norm
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                yield AlignmentLayer(
                    name,
                    module.lora_B[adapter].weight,
                    module.lora_A[adapter].weight,
                    module.scaling[adapter],
                    projection,
                )
