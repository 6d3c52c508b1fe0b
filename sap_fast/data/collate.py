"""Collators: encoded rows to padded batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sap_fast.data.datasets import SafetyRow
from sap_fast.data.encoding import EncodedRow
from sap_fast.losses import IGNORE_INDEX

PaddingSide = Literal["left", "right"]


@dataclass
class TaskCollator:
    """Pads encoded rows to the longest of the batch.

    Attributes:
        pad_token_id: Token at the padded positions, which are masked and not scored.
        padding_side: "right" for training, "left" for generation.
        pad_to_multiple_of: Rounds the length up to a multiple of this; None leaves it.

    Raises:
        ValueError: `padding_side` is neither "left" nor "right", or `pad_to_multiple_of` is below
            1.
    """

    pad_token_id: int
    padding_side: PaddingSide = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={self.padding_side!r}; expected 'left' or 'right'")
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise ValueError(
                f"pad_to_multiple_of={self.pad_to_multiple_of}; expected at least 1, or None"
            )

    def __call__(self, rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        """Returns `input_ids`, `attention_mask` and `labels`, each (batch, length) int64."""
        return {
            "input_ids": self._pad([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": self._pad([[1] * len(row["input_ids"]) for row in rows], 0),
            "labels": self._pad([row["labels"] for row in rows], IGNORE_INDEX),
        }

    def _pad(self, sequences: Sequence[list[int]], value: int) -> Tensor:
        length = max(map(len, sequences))
        if self.pad_to_multiple_of is not None:
            length += -length % self.pad_to_multiple_of
        padded = torch.full((len(sequences), length), value)
        for row, sequence in zip(padded, sequences, strict=True):
            start = length - len(sequence) if self.padding_side == "left" else 0
            row[start : start + len(sequence)] = torch.tensor(sequence)
        return padded


@dataclass
class SafetyCollator:
    """Pads safety pairs to two batches; the attributes are those of `TaskCollator`."""

    pad_token_id: int
    padding_side: PaddingSide = "right"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        self._collate = TaskCollator(self.pad_token_id, self.padding_side, self.pad_to_multiple_of)

    def __call__(self, rows: Sequence[SafetyRow]) -> dict[str, dict[str, Tensor]]:
        """Returns the batches `chosen` and `rejected`, each as `TaskCollator` makes it."""
        return {
            "chosen": self._collate([row["chosen"] for row in rows]),
            "rejected": self._collate([row["rejected"] for row in rows]),
        }
