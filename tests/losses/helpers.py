"""Models, batches and comparisons for the tests of the losses."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sap_fast.losses import IGNORE_INDEX

VOCABULARY = 96
ROWS_PER_CHUNK = 5

LLAMA_LIKE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA_LIKE = {**LLAMA_LIKE, "head_dim": 8, "final_logit_softcapping": 0.5, "sliding_window": 8}

# Model class, config class and settings. The softcaps are low enough to bend the small logits of
# an untrained model.
FAMILIES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA_LIKE),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA_LIKE, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", GEMMA_LIKE),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA_LIKE),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {**LLAMA_LIKE, "logits_scaling": 0.25}),
    "cohere": ("CohereForCausalLM", "CohereConfig", {**LLAMA_LIKE, "logit_scale": 3.0}),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**LLAMA_LIKE, "num_local_experts": 4, "output_router_logits": True},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    "gpt-neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
        },
    ),
}


def build(family="llama", seed=0, **settings):
    model_class, config_class, family_settings = FAMILIES[family]
    config = getattr(transformers, config_class)(
        **{**family_settings, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **settings}
    )
    torch.manual_seed(seed)
    # Without dropout: it would differ between the two computations that a test compares.
    return getattr(transformers, model_class)(config).eval()


def llama(kind, **settings):
    torch.manual_seed(0)
    return kind(transformers.LlamaConfig(**LLAMA_LIKE, **settings))


def smoothed(logits, labels, vocab_size=None, num_items_in_batch=None, smoothing=0.3, **_):
    loss = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing
    )
    count = (labels[:, 1:] != -100).sum()
    return loss if num_items_in_batch is None else loss * count / num_items_in_batch


def with_loss_function():
    model = build()
    model.loss_function = smoothed
    return model


def with_lora(model):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


class OddLlama(transformers.LlamaForCausalLM):
    """Calls its head, and treats the logits, as `oddity` says."""

    oddity = None

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **_):
        hidden = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
        ).last_hidden_state
        if self.oddity == "unused head":
            return F.linear(hidden, self.lm_head.weight)
        if self.oddity == "head called twice":
            return 0.5 * (self.lm_head(hidden) + self.lm_head(2 * hidden))
        if self.oddity == "flattened head":
            return self.lm_head(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        if self.oddity == "head by keyword":
            return self.lm_head(input=hidden)
        if self.oddity == "head with a further argument":
            return self.lm_head(hidden, scale=1.5)
        logits = self.lm_head(hidden)
        if self.oddity == "scaled":
            return (1.5 * logits,)
        if self.oddity == "scaled in place":
            return logits.mul_(1.5)
        if self.oddity == "softcapped":
            return torch.tanh(logits / 300) * 300
        if self.oddity == "truncated":
            return logits[..., :-8]
        return logits

    def get_output_embeddings(self):
        return None if self.oddity == "no head" else self.lm_head


class ScaledLinear(nn.Linear):
    def forward(self, input, scale=1.0):
        return scale * super().forward(input)


def build_odd(oddity, **settings):
    config = transformers.LlamaConfig(**LLAMA_LIKE, **settings)
    torch.manual_seed(0)
    model = OddLlama(config).eval()
    if oddity == "head with a further argument":
        model.lm_head = ScaledLinear(LLAMA_LIKE["hidden_size"], VOCABULARY)
    model.oddity = oddity
    return model


class EmbeddingModel(nn.Module):
    """Embedding and head; records what its forward is given."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)
        self.received = {}

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, position_ids=None, use_cache=True, **further):
        self.received = {"position_ids": position_ids, "use_cache": use_cache, **further}
        return SimpleNamespace(logits=self.head(self.embedding(input_ids)))


def make_batch(lengths=(12, 9, 7), prompts=(4, 3, 5), *, side="right", seed=0, pad_labels=False):
    """Rows of random tokens; the first `prompts[row]` of each row's `lengths[row]` are the prompt.

    With `pad_labels` the labels at padding are tokens, as when labels are copied from input_ids.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    input_ids = torch.zeros(len(lengths), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, 0 if pad_labels else IGNORE_INDEX)
    for row, (length, prompt) in enumerate(zip(lengths, prompts, strict=True)):
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator)
        start = 0 if side == "right" else width - length
        input_ids[row, start : start + length] = tokens
        attention_mask[row, start : start + length] = 1
        labels[row, start : start + length] = tokens
        labels[row, start : start + prompt] = IGNORE_INDEX
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def batch_of(sequences, *, side="right", prompts=None):
    """A batch of lists of tokens, of which the first `prompts[row]` are not scored."""
    width = max(map(len, sequences))
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, tokens in enumerate(sequences):
        place = slice(0, len(tokens)) if side == "right" else slice(width - len(tokens), width)
        input_ids[row, place], attention_mask[row, place] = torch.tensor(tokens), 1
        prompt = prompts[row] if prompts else min(2, len(tokens) - 1)
        labels[row, place] = torch.tensor([-100] * prompt + tokens[prompt:])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def random_tokens(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        # Each begins with another token, so that there is no prefix in common by chance.
        [3 + row, *torch.randint(3, VOCABULARY, (n - 1,), generator=generator).tolist()]
        for row, n in enumerate(lengths)
    ]


SYSTEM, *ANSWERS = random_tokens(6, 9, 4, 12, 5, 7)
BATCHES = {
    "shared prefix": [SYSTEM + answer for answer in ANSWERS],
    "identical": [SYSTEM + ANSWERS[0]] * 3,
    "one a prefix of another": [SYSTEM, SYSTEM + ANSWERS[0], SYSTEM + ANSWERS[0] + ANSWERS[1]],
    "nothing in common": ANSWERS,
    "branches of branches": [
        SYSTEM + ANSWERS[0],
        SYSTEM + ANSWERS[0][:5] + ANSWERS[1],
        SYSTEM + ANSWERS[2],
        SYSTEM + ANSWERS[0][:5] + ANSWERS[3],
    ],
}


def explicit_log_probs(model, batch, reduction):
    """Row by row and token by token, each row alone and without its padding, from full logits."""
    rows = []
    for input_ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True
    ):
        tokens, labels = input_ids[mask], labels[mask]
        log_probs = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
        scored = [
            log_probs[position - 1, tokens[position]]
            for position in range(1, len(tokens))
            if labels[position] != IGNORE_INDEX
        ]
        total = torch.stack(scored).sum()
        rows.append(total / len(scored) if reduction == "mean" else total)
    return torch.stack(rows)


def gradients(loss, model):
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, retain_graph=True)


def assert_same(actual, expected, *, rtol=1e-5):
    """Equal to `rtol` of the largest of all entries: the gradient of OPT's key biases is 0."""
    actual, expected = tree_leaves(actual), tree_leaves(expected)
    largest = max(e.abs().max().item() for e in expected)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=rtol * largest)


def assert_refused(call, message):
    """`call` raises a `ValueError` with this message before the model that it is given runs."""
    model = EmbeddingModel()
    with pytest.raises(ValueError, match=message):
        call(model)
    assert model.received == {}


def without_labels(batch, row):
    return {**batch, "labels": batch["labels"].index_fill(0, torch.tensor(row), IGNORE_INDEX)}


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns, and the operations counted."""

    def __init__(self):
        super().__init__()
        self.elements = 0
        self.counts = Counter()
        self.copies = Counter()  # by shape

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        self.counts[operation] += 1
        if operation == torch.ops.aten._to_copy.default:
            self.copies[tuple(output.shape)] += 1
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(tensor.numel() for tensor in tensors)])
        return output


def peak_bytes(run):
    """The most bytes that `run` held at a time beyond what was there before."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
