"""The oracle: the probe gradient h by fp64 double backward, and nothing of sap_fast in it.

h = ∂_V⟨ĝ, ∇_W L_task(W, V)⟩ at V = 0, with ĝ = ∇_W L_safe/‖∇_W L_safe‖ (arXiv:2505.16737, to first
order). Needs attention with a second derivative: build models with `attn_implementation="eager"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def naive_task_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the response tokens, from full logits."""
    return naive_token_log_probs(model, batch)[1].mean().neg()


def naive_token_log_probs(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[list[Tensor], Tensor]:
    """Log-probabilities of the response tokens: one tensor per row, and all of them."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    targets = batch["labels"][:, 1:]
    scored = targets != -100
    chosen = log_probs[:, :-1].gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    rows = [chosen[i][scored[i]] for i in range(len(chosen))]
    return rows, torch.cat(rows)


def naive_contrastive_loss(
    model: nn.Module, chosen: dict[str, Tensor], rejected: dict[str, Tensor]
) -> Tensor:
    """−logσ(log p(chosen) − log p(rejected)), per-token means, from full logits."""
    good = torch.stack([row.mean() for row in naive_token_log_probs(model, chosen)[0]])
    bad = torch.stack([row.mean() for row in naive_token_log_probs(model, rejected)[0]])
    return nn.functional.softplus(bad - good).mean()


def direction(safety_loss: Callable[[], Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """ĝ: the gradient of the safety loss over one global norm."""
    gradients = torch.autograd.grad(safety_loss(), params)
    norm = torch.sqrt(sum((g * g).sum() for g in gradients))
    return [g / norm for g in gradients]


def slope(
    task_loss: Callable[[], Tensor],
    safety_loss: Callable[[], Tensor],
    params: Sequence[Tensor],
    layers: dict[int, nn.Module],
    offsets: dict[int, Tensor],
    random_state: Tensor | None = None,
) -> Tensor:
    """⟨ĝ, ∇_W L_task(W, V)⟩, differentiable in the offsets V.

    Args:
        task_loss: computes L_task; runs no backward.
        safety_loss: computes L_safe, likewise; it never sees V.
        params: W.
        layers: the probed decoder layers by index.
        offsets: V by index, of a shape that adds to the layer's output.
        random_state: state of the CPU generator that each loss starts from.
    """
    if random_state is not None:
        torch.set_rng_state(random_state)
    unit = direction(safety_loss, params)
    handles = [
        layer.register_forward_hook(lambda m, a, output, index=index: output + offsets[index])
        for index, layer in layers.items()
    ]
    try:
        if random_state is not None:
            torch.set_rng_state(random_state)
        gradients = torch.autograd.grad(
            task_loss(), params, create_graph=True, allow_unused=True, materialize_grads=True
        )
    finally:
        for handle in handles:
            handle.remove()
    return sum((u * g).sum() for u, g in zip(unit, gradients, strict=True))


def oracle_estimate(
    task_loss: Callable[[], Tensor],
    safety_loss: Callable[[], Tensor],
    params: Sequence[Tensor],
    layers: dict[int, nn.Module],
    shape: tuple[int, ...],
    random_state: Tensor | None = None,
    around: dict[int, Tensor] | None = None,
) -> dict[int, Tensor]:
    """h by layer index: the gradient of `slope` in V, at V = 0 or at `around`.

    Args:
        task_loss: as for `slope`.
        safety_loss: as for `slope`.
        params: as for `slope`.
        layers: as for `slope`.
        shape: of one offset: (H,), or (B, S, H) for one per token.
        random_state: as for `slope`.
        around: where to differentiate.
    """
    dtype = params[0].dtype
    probes = {
        index: (around[index].clone() if around else torch.zeros(shape, dtype=dtype))
        for index in layers
    }
    for probe in probes.values():
        probe.requires_grad_()
    value = slope(task_loss, safety_loss, params, layers, probes, random_state)
    estimates = torch.autograd.grad(value, list(probes.values()))
    return dict(zip(probes, estimates, strict=True))


def cosine(left: dict[int, Tensor], right: dict[int, Tensor]) -> float:
    """Cosine of two estimates, all layers as one vector, in fp64."""
    a = torch.cat([left[index].flatten().double() for index in sorted(left)])
    b = torch.cat([right[index].flatten().double() for index in sorted(right)])
    return float(a.dot(b) / (a.norm() * b.norm()))
