"""Random models of Llama's shapes on the device, and what they are trained on.

Weights and tokens are random: a step takes as long and as much memory as with real ones. All runs
under bf16 autocast, LoRA on bf16 weights; pairs are 4 prompts of 64 tokens with two answers of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.predictions import WAYS
from benchmarks.workloads import (
    LLAMA_1B,
    LLAMA_8B,
    TINY,
    Batch,
    Lora,
    Model,
    Row,
    Shape,
    add_lora,
    random_llama,
)

#: Tokens of a row, where a stage does not say otherwise.
LENGTH = 2048
PAIRS, PART = 4, 64  # tokens of a prompt and of an answer


@dataclass(frozen=True)
class Case:
    """What is trained and how."""

    shape: Shape
    way: str

    @property
    def lora(self) -> Lora | None:
        """The adapters; None: all parameters."""
        return WAYS[self.way]

    def sized(self, dry: bool) -> Case:
        """Return the case, of tiny shapes in a dry run."""
        return Case(TINY, self.way) if dry else self

    def facts(self) -> Row:
        """Return the columns that name the case."""
        return {"model": self.shape.name, "trained": self.way}


CASES = {"8b-lora": Case(LLAMA_8B, "LoRA r=16 q,v"), "1b-full": Case(LLAMA_1B, "full")}


def length_of(dry: bool) -> int:
    """Return the tokens of a row."""
    return 32 if dry else LENGTH


def build_model(case: Case, device: str) -> Model:
    """Return a random Llama on the device: bf16 below LoRA, fp32 where everything is trained."""
    model: Model = random_llama(
        case.shape,
        dtype=torch.float32 if case.lora is None else torch.bfloat16,
        device=device,
        max_position_embeddings=LENGTH,
        attn_implementation="sdpa",
        use_cache=False,
    )
    if case.lora is not None:
        model = add_lora(model, case.lora)
    return model.train()


def random_batch(rows: int, length: int, unscored: int, vocabulary: int, device: str) -> Batch:
    """Return rows of random tokens, all but the first `unscored` of each scored."""
    tokens = torch.randint(1, vocabulary, (rows, length), device=device)
    labels = tokens.clone()
    labels[:, :unscored] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


def padded_batch(rows: int, length: int, vocabulary: int, device: str) -> Batch:
    """Return rows of which the first is as long as all; the others have half of that at least."""
    batch = random_batch(rows, length, length // 4, vocabulary, "cpu")
    for row in range(1, rows):
        end = int(torch.randint(length // 2, length + 1, ()))
        for name, padding in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            batch[name][row, end:] = padding
    return {name: tensor.to(device) for name, tensor in batch.items()}


def random_pairs(vocabulary: int, device: str, dry: bool) -> tuple[Batch, Batch]:
    """Return pairs that share their prompts."""
    part = 8 if dry else PART
    chosen, rejected = (random_batch(PAIRS, 2 * part, part, vocabulary, device) for _ in range(2))
    for name in ("input_ids", "labels"):
        rejected[name][:, :part] = chosen[name][:, :part]
    return chosen, rejected


def backward(loss: Callable[[], Tensor], device: str) -> Tensor:
    """Run forward under autocast, then backward; return the loss."""
    with torch.autocast(device, torch.bfloat16):
        value = loss()
    value.backward()
    return value.detach()
