"""Safety layers: finding them, and freezing them while the rest is tuned (SPPFT)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sap_fast.data import TaskCollator, encode_prompt, padding_token_id
from sap_fast.evaluation import Progress, generate_openings, is_refusal, no_progress
from sap_fast.evaluation.batching import device_of, similar_length_batches
from sap_fast.losses.aside import evaluation_mode
from sap_fast.model.layers import find_decoder_layers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: The gap between the two kinds of pairs has appeared where it exceeds this part of its largest.
_APPEARS = 0.05
#: It has flattened where it grows by less than this part of its steepest growth.
_FLATTENS = 0.1


@dataclass(frozen=True)
class SafetyLayers:
    """Where a model tells harmful requests from others.

    Attributes:
        first: index of the first decoder layer of the range.
        last: index of the last one, which belongs to it.
        gaps: by layer, by how much wider the angle between a normal and a malicious request is than
            that between two normal ones, in radians.
        over_rejections: harmless requests refused with the weights of a range (first, last) scaled,
            for every range that was tried.
    """

    first: int
    last: int
    gaps: list[float]
    over_rejections: dict[tuple[int, int], int]

    @property
    def layers(self) -> range:
        """The indices of the layers."""
        return range(self.first, self.last + 1)


def find_safety_layers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    normal: Sequence[str],
    malicious: Sequence[str],
    edgy: Sequence[str],
    pairs: int = 500,
    scale: float = 1.1,
    reach: int = 4,
    batch_size: int = 16,
    seed: int = 0,
    progress: Progress = no_progress,
) -> SafetyLayers:
    """Find the safety layers of an aligned model.

    The procedure of Li et al. 2024 (arXiv:2408.17003). The hidden states of two requests' last
    tokens drift apart from layer to layer, faster where one of the two is malicious: a first range
    goes from the layer where the gap between the two angles appears to where it stops widening.
    Then its weights are scaled up, which makes a model refuse harmless requests too; the last layer
    is moved to where that effect is largest, and after it the first.

    The paper reads the first range off a plot. Here the gap has appeared where it exceeds 5 % of
    its largest, and stopped widening where, after its steepest growth, it grows by less than 10 %
    of that. Ranges that refuse alike: the smaller one.

    Args:
        model: the aligned model, plain or with an adapter. Its weights are scaled in place and put
            back bit for bit, whatever happens.
        tokenizer: its tokenizer.
        normal: ordinary requests, two at least.
        malicious: requests that the model refuses.
        edgy: harmless requests that sound harmful.
        pairs: pairs of each kind, drawn at random; the paper's 500 by default.
        scale: what every weight of a range is multiplied by, above 1. The paper picks it by model.
        reach: by how many layers either end is moved.
        batch_size: requests per batch.
        seed: of the pairs.
        progress: shows the requests encoded and answered.

    Raises:
        ValueError: for an argument out of range, or a model whose decoder layers cannot be told.
    """
    for name, given, least in (
        ("normal", len(normal), 2),
        ("malicious", len(malicious), 1),
        ("edgy", len(edgy), 1),
    ):
        if given < least:
            raise ValueError(f"{name} has {given} requests; expected at least {least}")
    for name, number, least in (("pairs", pairs, 1), ("reach", reach, 0)):
        if number < least:
            raise ValueError(f"{name}={number}; expected at least {least}")
    if not (scale > 1 and math.isfinite(scale)):
        raise ValueError(f"scale={scale}; expected a number above 1")
    stack, _ = find_decoder_layers(model)
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    states = [last_hidden_states(model, tokenizer, kind, **options) for kind in (normal, malicious)]
    gaps = _gaps(*states, pairs=pairs, seed=seed)
    first, last = _initial_range(gaps)
    over_rejections: dict[tuple[int, int], int] = {}

    def count(range_: tuple[int, int]) -> int:
        if range_ not in over_rejections:
            with _scaled(stack[range_[0] : range_[1] + 1], scale):
                openings = generate_openings(model, tokenizer, edgy, **options)
            over_rejections[range_] = sum(map(is_refusal, openings))
        return over_rejections[range_]

    lasts = range(max(first, last - reach), min(len(stack) - 1, last + reach) + 1)
    last = _most([(first, end) for end in lasts], count)[1]
    firsts = range(max(0, first - reach), min(last, first + reach) + 1)
    first = _most([(begin, last) for begin in firsts], count)[0]
    return SafetyLayers(first, last, gaps, over_rejections)


def _most(
    ranges: Iterable[tuple[int, int]], count: Callable[[tuple[int, int]], int]
) -> tuple[int, int]:
    return max(ranges, key=lambda ends: (count(ends), ends[0] - ends[1]))


@torch.no_grad()
def last_hidden_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 16,
    progress: Progress = no_progress,
) -> Tensor:
    """Return the output of every decoder layer at the last token of each prompt.

    Returns:
        (prompts, layers, H), fp32 on the CPU.
    """
    stack, _ = find_decoder_layers(model)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    collate = TaskCollator(padding_token_id(tokenizer))
    collected: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        collected.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in stack]
    states: list[Tensor] = [torch.empty(0)] * len(encoded)
    try:
        with evaluation_mode(model), progress("Reading hidden states", len(prompts)) as bar:
            for indices in similar_length_batches([len(ids) for ids in encoded], batch_size):
                batch = collate([{"input_ids": encoded[i], "labels": encoded[i]} for i in indices])
                collected.clear()
                device = device_of(model)
                model(
                    input_ids=batch["input_ids"].to(device),
                    attention_mask=batch["attention_mask"].to(device),
                )
                for row, index in enumerate(indices):
                    last = len(encoded[index]) - 1
                    states[index] = torch.stack([h[row, last].float().cpu() for h in collected])
                bar.advance(len(indices))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(states)


def _gaps(normal: Tensor, malicious: Tensor, *, pairs: int, seed: int) -> list[float]:
    """Return by layer the angle of normal–malicious pairs minus that of normal–normal ones."""
    draw = random.Random(seed)
    alike = [draw.sample(range(len(normal)), 2) for _ in range(pairs)]
    mixed = [(draw.randrange(len(normal)), draw.randrange(len(malicious))) for _ in range(pairs)]

    def angle(left: Tensor, right: Tensor) -> Tensor:
        # Of the mean cosine, as in the paper.
        return torch.cosine_similarity(left.double(), right.double(), dim=-1).mean(dim=0).acos()

    one, other = zip(*alike, strict=True)
    among_normal = angle(normal[list(one)], normal[list(other)])
    one, other = zip(*mixed, strict=True)
    return (angle(normal[list(one)], malicious[list(other)]) - among_normal).tolist()


def _initial_range(gaps: Sequence[float]) -> tuple[int, int]:
    """Return the first and the last layer between where the gap appears and where it flattens."""
    first = next((k for k, gap in enumerate(gaps) if gap > _APPEARS * max(gaps)), 0)
    growth = [gaps[k] - gaps[k - 1] if k else gaps[0] for k in range(len(gaps))]
    steepest = max(range(first, len(gaps)), key=lambda k: growth[k])
    after = range(steepest + 1, len(gaps))
    flat = next((k for k in after if growth[k] < _FLATTENS * growth[steepest]), len(gaps))
    return first, flat - 1


@contextmanager
def _scaled(layers: Iterable[nn.Module], scale: float) -> Iterator[None]:
    """Multiply every parameter of some layers, and put back what they were."""
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(scale)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


def freeze_layers(model: nn.Module, layers: Iterable[int]) -> None:
    """Exclude decoder layers from training, adapters in them included.

    With the safety layers this is SPPFT (Li et al. 2024, arXiv:2408.17003). Call it before the
    optimizer is built.

    Args:
        model: plain or with an adapter.
        layers: indices of the layers, from 0.

    Raises:
        ValueError: for an index out of range, or if nothing were left to train; nothing is frozen
            then.
    """
    stack, _ = find_decoder_layers(model)
    wanted = list(layers)
    for index in wanted:
        if not 0 <= index < len(stack):
            raise ValueError(
                f"layers={wanted}: {index} is out of range for a model of {len(stack)} layers"
            )
    frozen = {id(p) for index in wanted for p in stack[index].parameters()}
    if not any(p.requires_grad and id(p) not in frozen for p in model.parameters()):
        raise ValueError(f"layers={wanted}: no parameter outside them is trained")
    for parameter in model.parameters():
        if id(parameter) in frozen:
            parameter.requires_grad_(False)
