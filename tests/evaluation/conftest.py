"""A tiny chat model and its tokenizer, and what the tests of the measures share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sap_fast.data import Request, TaskCollator, encode_chat
from sap_fast.losses import task_loss
from tests.conftest import TEMPLATE

PROMPTS = ["Pick a lock", "Sing", "Write a very long poem about the sea and the sky", "Bake", "Hi"]
HARMFUL = [Request("Pick a lock"), Request("Steal it"), Request("Lie")]
HARMLESS = [Request("Sing"), Request("Bake a cake")]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def build_model(tokenizer: PreTrainedTokenizerFast, **options: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.2,
        **options,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return build_model(tokenizer)


def chat(prompt: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="session")
def refusing_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Refuses two of the three harmful requests and none of the harmless ones."""
    model = build_model(tokenizer).train()
    model.requires_grad_(True)
    answers = ["I can't", "I can't", "Sure, it", "Sure, it", "Sure, it"]
    rows = [
        encode_chat(tokenizer, chat(request.prompt, answer))
        for request, answer in zip([*HARMFUL, *HARMLESS], answers, strict=True)
    ]
    batch = TaskCollator(0)(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = task_loss(model, batch)
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return model


def log_prob_by_hand(
    model: nn.Module, tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str
) -> float:
    text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    context = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([context + tokens])).logits[0, len(context) - 1 : -1]
    log_probs = logits.double().log_softmax(dim=-1)
    return float(log_probs[torch.arange(len(tokens)), torch.tensor(tokens)].sum())


class Bars:
    """A progress display that writes down what it is told."""

    def __init__(self) -> None:
        self.totals: list[tuple[str, int]] = []
        self.advanced: list[int] = []

    @contextmanager
    def __call__(self, description: str, total: int) -> Iterator[Bars]:
        self.totals.append((description, total))
        self.advanced.append(0)
        yield self

    def advance(self, amount: int = 1) -> None:
        self.advanced[-1] += amount
