"""What the examples share: a model, and random rows in the place of a data loader's."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

Batch = dict[str, Tensor]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every example."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="hub id or folder"
    )
    found.add_argument("--tiny", action="store_true", help="a random model of four layers instead")
    found.add_argument("--steps", type=int, default=3, help="steps to train (default: 3)")
    return found


def load_model(options: argparse.Namespace) -> Any:
    """The model in fp32; random but the same everywhere with `--tiny`."""
    if not options.tiny:
        return AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def batch(model: Any, seed: int, rows: int = 4) -> Batch:
    """Random rows of 32 tokens, the last 24 of which are the answer."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (rows, 32), generator=generator)
    ids = ids.to(model.device)
    labels = ids.clone()
    labels[:, :8] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def task_batches(model: Any, steps: int, rank: int = 0) -> Iterator[Batch]:
    """A batch for every step."""
    return (batch(model, 1000 * rank + step) for step in range(steps))


def safety_pairs(model: Any, rank: int = 0) -> Iterator[tuple[Batch, Batch]]:
    """Safe and harmful answers to the same requests, without end: `safety` takes the next."""
    seeds = count(1_000_000 * (rank + 1))
    return ((batch(model, next(seeds)), batch(model, next(seeds))) for _ in count())


def encoded_rows(model: Any, seed: int, rows: int) -> list[dict[str, list[int]]]:
    """The same as rows of a dataset, for trainers."""
    tensors = batch(model, seed, rows)
    return [
        {"input_ids": ids, "labels": labels}
        for ids, labels in zip(
            tensors["input_ids"].tolist(), tensors["labels"].tolist(), strict=True
        )
    ]


def safety_rows(model: Any, rows: int = 8) -> list[dict[str, Any]]:
    """Pairs of a safe and a harmful answer, as `load_safety_dataset` reads them from a file."""
    chosen, rejected = encoded_rows(model, 1, rows), encoded_rows(model, 2, rows)
    return [{"chosen": a, "rejected": b} for a, b in zip(chosen, rejected, strict=True)]
