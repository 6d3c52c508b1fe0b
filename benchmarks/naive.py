"""Safety-Aware Probing as it is usually written: the counter-example of the benchmarks.

Written from the description of the method (arXiv:2505.16737, Algorithm 1) in the plainest way, with
the habits that make the probe gradient of such code noise (`benchmarks/fidelity.py` measures how
much) and its step slow:

* every pass draws dropout masks of its own, so the finite difference is one of masks as well;
* ρ = 2e-5 under bf16 autocast, a perturbation that mostly vanishes in the rounding of the weights;
* W + ΔW is added and subtracted in place, which does not give W back bit for bit;
* the direction is normalised with an epsilon;
* the full batch × sequence × vocabulary logits exist in every pass, and the probe passes compute
  weight gradients that nobody reads.

It departs from the published code where that would hide what is compared: prompt and answer are fed
together and labels are shifted, and log-probabilities are means over tokens, not sums.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Batch = Mapping[str, Tensor]

_PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100}


def concatenate(chosen: Batch, rejected: Batch) -> dict[str, Tensor]:
    """One batch of the rows of two, padded on the right to the longer of them."""
    return {
        key: pad_sequence([*chosen[key], *rejected[key]], batch_first=True, padding_value=value)
        for key, value in _PADDING.items()
    }


class NaiveSAP:
    """A whole step of SAP: safety pass, two probe passes, task pass, `torch.optim.AdamW`.

    Args:
        model: the model, plain or with PEFT adapters; its parameters that require grad are trained.
        layers: the probed decoder layers by index, such as `ProbeSet(model).modules`.
        lr: learning rate.
        weight_decay: of AdamW.
        rho: size ρ of the perturbation relative to ‖W‖; the published value. May be changed at any
            time.
        probe_lr: size β of the probe, one step of AdamW from V = 0; the published value.
        autocast: compute in bf16 where `torch.autocast` does.

    Attributes:
        direction: ĝ of the last safety pass, one tensor per trained parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[int, nn.Module],
        *,
        lr: float = 1e-4,
        weight_decay: float = 0.01,
        rho: float = 2e-5,
        probe_lr: float = 5e-2,
        autocast: bool = True,
    ) -> None:
        self.model = model
        self.params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.adamw = torch.optim.AdamW(self.params, lr=lr, weight_decay=weight_decay)
        self.rho = rho
        self.probe_lr = probe_lr
        self.autocast = autocast
        self.direction: list[Tensor] = []

        config: Any = model.config
        like = self.params[0]
        self.probes = {
            index: torch.zeros(
                config.hidden_size, dtype=like.dtype, device=like.device, requires_grad=True
            )
            for index in layers
        }
        self._handles = [
            layer.register_forward_hook(functools.partial(_add_probe, self.probes[index]))
            for index, layer in layers.items()
        ]

    def step(self, batch: Batch, chosen: Batch, rejected: Batch) -> Tensor:
        """Train on one batch.

        Args:
            batch: `input_ids`, `attention_mask` and `labels` of the task, each (B, S).
            chosen: safe responses, likewise.
            rejected: harmful responses to the same prompts, row for row; S may differ.

        Returns:
            The task loss, 0-d.
        """
        self.find_direction(chosen, rejected)
        clean = self.probe_gradient(batch)
        with self.perturbed():
            moved = self.probe_gradient(batch)
        with torch.no_grad():
            for index, probe in self.probes.items():
                ascent = moved[index] - clean[index]
                probe.copy_(self.probe_lr * ascent / (ascent.abs() + 1e-8))
        loss = self._task_backward(batch)
        self.adamw.step()
        with torch.no_grad():
            for probe in self.probes.values():
                probe.zero_()
        return loss

    def find_direction(self, chosen: Batch, rejected: Batch) -> None:
        """Run the safety pass: ĝ from −logσ(log p(chosen) − log p(rejected))."""
        both = concatenate(chosen, rejected)
        self.adamw.zero_grad()
        with self._autocast():
            logits = self.model(
                input_ids=both["input_ids"], attention_mask=both["attention_mask"]
            ).logits
            targets = both["labels"][:, 1:]
            scored = targets != _PADDING["labels"]
            log_probs = logits[:, :-1].float().log_softmax(-1)
            log_probs = log_probs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
            means = (log_probs * scored).sum(1) / scored.sum(1)
            safe, harmful = means.chunk(2)
            loss = -nn.functional.logsigmoid(safe - harmful).mean()
        loss.backward()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        norm = _norm(gradients)
        self.direction = [gradient / (norm + 1e-8) for gradient in gradients]

    def probe_gradient(self, batch: Batch) -> dict[int, Tensor]:
        """Run a task pass at V = 0 and return ∂L_task/∂V by layer index, each (H,)."""
        self._task_backward(batch)
        return {j: probe.grad.clone() for j, probe in self.probes.items() if probe.grad is not None}

    @contextmanager
    def perturbed(self) -> Iterator[float]:
        """Add ρ‖W‖ĝ to the parameters, yield its norm ρ‖W‖, and subtract it again."""
        norm = self.rho * float(_norm(self.params))
        with torch.no_grad():
            for parameter, direction in zip(self.params, self.direction, strict=True):
                parameter.add_(direction, alpha=norm)
        yield norm
        with torch.no_grad():
            for parameter, direction in zip(self.params, self.direction, strict=True):
                parameter.sub_(direction, alpha=norm)

    def detach(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()

    def _task_backward(self, batch: Batch) -> Tensor:
        self.adamw.zero_grad()
        for probe in self.probes.values():
            probe.grad = None
        with self._autocast():
            loss = self.model(**batch).loss
        loss.backward()
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        device = self.params[0].device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.autocast)


def _add_probe(probe: Tensor, layer: nn.Module, args: tuple[Any, ...], hidden: Tensor) -> Tensor:
    # Not a sum of two dtypes: fp32 adapters on bf16 weights would turn the hidden states to fp32.
    return hidden + probe.to(hidden.dtype)


@torch.no_grad()
def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.float().square().sum() for tensor in tensors]).sum().sqrt()
