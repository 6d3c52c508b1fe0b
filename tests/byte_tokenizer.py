"""A byte-level BPE tokenizer for the tests, with a chat template."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import TEMPLATE


def byte_tokenizer(*steps: Any, ignore_merges: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, and one for "th".

    Args:
        steps: of its pre-tokenizer; by default those of GPT-2.
        ignore_merges: look whole words up first.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([*alphabet, "th"])}
    backend = Tokenizer(models.BPE(vocabulary, [("t", "h")], ignore_merges=ignore_merges))
    steps = steps or (pre_tokenizers.ByteLevel(add_prefix_space=False),)
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(list(steps))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    wrapped.chat_template = TEMPLATE
    return wrapped
