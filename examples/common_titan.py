"""What torchtitan's example needs of torchtitan: a configuration on random rows."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config.configs import ParallelismConfig, TrainingConfig
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry
from torchtitan.tools.logging import init_logger


class RandomRows(BaseDataLoader):
    """Random rows of one sequence each; a loader with a state, as torchtitan's are."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Of how many tokens there are."""

        vocabulary: int = 256

    def __init__(
        self, config: Config, *, dp_rank: int, seq_len: int, local_batch_size: int, **_: Any
    ) -> None:
        self._shape, self._vocabulary = (local_batch_size, seq_len + 1), config.vocabulary
        self._rank, self._next = dp_rank, 0

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        while True:
            generator = torch.Generator().manual_seed(1000 * self._rank + self._next)
            ids = torch.randint(1, self._vocabulary, self._shape, generator=generator)
            self._next += 1
            yield {"input": ids[:, :-1]}, ids[:, 1:].clone()

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the rows."""
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""
        self._next = state_dict["next"]


class NoTokenizer(BaseTokenizer):
    """Random rows need none."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Of nothing."""

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        """Return nothing."""
        return []

    def decode(self, *_: Any, **__: Any) -> str:
        """Return nothing."""
        return ""

    def get_vocab_size(self) -> int:
        """Return that there is none."""
        return 0


class Answers(nn.Module):
    """A model of torchtitan as the losses call one. Rows are padded on the right."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def get_output_embeddings(self) -> Any:
        """Return the head, which the losses apply in chunks."""
        return self.inner.lm_head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits."""
        return self.inner(input_ids)


def random_pairs(trainer: Any) -> list[dict[str, Tensor]]:
    """Random safe and harmful answers for a safety pass, by its number; two rows for each rank."""
    seed = 1_000_000 + trainer.passes.direction.taken
    generator = torch.Generator().manual_seed(seed)
    shape = (2, dist.get_world_size(), 2, 32)
    ids = torch.randint(1, trainer.model_config.vocab_size, shape, generator=generator)
    own = ids[:, dist.get_rank()].to(trainer.device)
    return [{"input_ids": rows, "labels": rows} for rows in own]


def options_of(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of the example."""
    parser.add_argument("--flavor", default="8B", help="of torchtitan's Llama (default: 8B)")
    parser.add_argument("--folder", help="folder for checkpoints; goes on from the last one in it")
    return parser.parse_args()


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """The keywords of a `Trainer.Config` for a Llama of torchtitan, on random rows."""
    init_logger()  # as torchtitan's own script does
    spec = model_registry("debugmodel" if options.tiny else options.flavor, attn_backend="varlen")
    for layer in spec.model.layers:  # a row is one sequence, and needs no mask
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    training = TrainingConfig(
        local_batch_size=2,
        global_batch_size=8,  # two micro-batches to a step, on two ranks
        seq_len=32,
        steps=options.steps,
        disable_cuda_graphs=True,  # a graph of a pass would not see the probe of the next
    )
    return {
        "model_spec": spec,
        "hf_assets_path": options.model,
        "tokenizer": NoTokenizer.Config(),
        "dataloader": RandomRows.Config(vocabulary=spec.model.vocab_size),
        "optimizer": default_adamw(lr=1e-4),
        "loss": CrossEntropyLoss.Config(),
        "checkpoint": CheckpointManager.Config(
            enable=options.folder is not None,
            folder=options.folder or "checkpoint",
            interval=1,
            last_save_model_only=False,
        ),
        "training": training,
        # Parameters that are sharded over the ranks of FSDP alone.
        "parallelism": ParallelismConfig(spmd_backend="partial_dtensor"),
    }
