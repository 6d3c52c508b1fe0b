"""Answers that begin as the aligned model would begin them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from sap_fast.baselines.constrained import places_in_answer
from sap_fast.losses.aligned import AlignedModel, log_probs_beside, log_softmax
from sap_fast.losses.batches import (
    Batch,
    as_rows,
    check_batch,
    check_every_row_is_scored,
    find_scored,
)
from sap_fast.losses.scoring import by_row


class AlignedStart(nn.Module):
    """A tuned model that takes the first tokens of its answers from the aligned one as well.

    Nothing is trained: this is a defence at decoding, of the kind of SafeDecoding (Xu et al. 2024,
    arXiv:2402.08983), whose expert is here the model that tuning started from. At the first places
    of an answer the next token has the probability (1 − α)·p + α·p_aligned, in fp32 or better; what
    comes after them is the tuned model's, which sees how the answer began. SafeDecoding has α = 3
    for two tokens, among those that both models rank high. A mixture stays a distribution, so that
    the task has a loss under it.

    It generates and scores; it cannot be trained.

    Args:
        tuned: the tuned model.
        aligned: the model that tuning started from; None for `tuned` without its PEFT adapter.
        tokens: the first places of an answer.
        share: α, in [0, 1]; 0 changes nothing.

    Raises:
        ValueError: for a share outside, a negative number of tokens, or without an aligned model.
    """

    def __init__(
        self,
        tuned: nn.Module,
        aligned: nn.Module | None = None,
        *,
        tokens: int = 2,
        share: float = 1.0,
    ) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"share={share}: expected a number in [0, 1]")
        if tokens < 0:
            raise ValueError(f"tokens={tokens}: expected 0 or more")
        super().__init__()
        self.tuned = tuned
        self.tokens, self.share = tokens, share
        self._aligned = AlignedModel(tuned, aligned)

    @property
    def generation_config(self) -> Any:
        """The tuned model's."""
        return self.tuned.generation_config

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Generate as `transformers` models do, from prompts (B, S) that end where S does."""
        processor = _Start(self, input_ids.shape[1], attention_mask)
        tuned: Any = self.tuned
        return tuned.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([processor]),
            **options,
        )

    def response_log_probs(self, batch: Batch) -> Tensor:
        """Return the log-probability of each row's response given its prompt (B,), in nats."""
        check_batch(batch, "batch")
        batch = as_rows(batch)
        scored = find_scored(batch)
        check_every_row_is_scored(scored.counts, "batch")
        found, expected = log_probs_beside(self.tuned, self._aligned, batch, scored, True)
        begins = places_in_answer(scored.positions).to(found.device) < self.tokens
        return by_row(torch.where(begins, self.mixed(found, expected), found), scored, "sum")

    def mixed(self, log_probs: Tensor, aligned: Tensor) -> Tensor:
        """Return the logarithm of the mixture of two distributions, given theirs."""
        if self.share in (0, 1):
            return aligned if self.share else log_probs
        return torch.logaddexp(log_probs + math.log(1 - self.share), aligned + math.log(self.share))

    def aligned_log_probs(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the aligned model's distribution of the token after each row, (B, V)."""
        positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
        with self._aligned.running() as model:
            logits = model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=positions,
                use_cache=False,
            ).logits[:, -1]
        return log_softmax(logits)


class _Start(LogitsProcessor):
    """Mixes the distributions of the first tokens behind prompts of a length."""

    def __init__(self, model: AlignedStart, length: int, attention_mask: Tensor) -> None:
        self._model, self._length, self._mask = model, length, attention_mask

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        written = input_ids.shape[1] - self._length
        if written >= self._model.tokens:
            return scores
        mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), written)], dim=1)
        expected = self._model.aligned_log_probs(input_ids, mask).to(scores.device)
        return self._model.mixed(log_softmax(scores), expected)
