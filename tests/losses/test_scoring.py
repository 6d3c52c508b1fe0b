import subprocess
import sys
import warnings
from collections import Counter
from types import SimpleNamespace

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sap_fast.losses import (
    IGNORE_INDEX,
    contrastive_loss,
    difference_loss,
    head,
    joint_loss,
    refusal_loss,
    response_log_probs,
    task_loss,
)

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


@pytest.fixture(autouse=True)
def several_chunks(monkeypatch):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", ROWS_PER_CHUNK * VOCABULARY * 4)


def test_a_gpu_gets_larger_chunks():
    sizes = {device: head.CHUNK_BYTES[device] // (4 * VOCABULARY) for device in ("cpu", "cuda")}
    assert sizes["cuda"] > sizes["cpu"] == ROWS_PER_CHUNK
    for device, expected in {"cpu": sizes["cpu"], "meta": sizes["cuda"]}.items():
        rows = torch.empty(1, 1, dtype=torch.bfloat16, device=device)
        assert head._chunk_size(rows, VOCABULARY) == expected


@pytest.fixture(autouse=True)
def no_fallback_unnoticed():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("family", FAMILIES)
def test_task_loss_is_the_models_own_loss(family):
    model, batch = build(family), make_batch()
    own = model(**batch).loss
    for _ in range(2):  # the first use of a model also tests its head
        ours = task_loss(model, batch)
        assert_same(ours, own, rtol=2e-6)
    assert_same(gradients(ours, model), gradients(own, model))


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_side_does_not_matter(family):
    model = build(family, output_router_logits=False)
    # The first token of a row is scored, too: after left padding it has a position before it.
    options = {"prompts": (0, 3, 0), "pad_labels": True}
    right, left = (make_batch(side=side, **options) for side in ("right", "left"))
    expected = explicit_log_probs(model, make_batch(**options), "sum")
    for batch in (right, left):
        assert_same(response_log_probs(model, batch), expected, rtol=2e-6)
    assert_same(gradients(task_loss(model, left), model), gradients(task_loss(model, right), model))


def test_padding_side_does_not_matter_inside_peft():
    # GPT-2 adds learned positions, and PEFT's own forward does not name position_ids.
    config = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = get_peft_model(build("gpt2"), config).eval()
    right, left = (response_log_probs(model, make_batch(side=side)) for side in ("right", "left"))
    assert_same(left, right, rtol=2e-6)


def test_labels_at_padding_never_count():
    model = build()
    masked, unmasked = make_batch(), make_batch(pad_labels=True)
    assert not torch.equal(masked["labels"], unmasked["labels"])
    assert torch.equal(task_loss(model, unmasked), task_loss(model, masked))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_response_log_probs_are_those_of_the_response_tokens(reduction):
    model, batch = build(), make_batch()
    expected = explicit_log_probs(model, batch, reduction)
    assert_same(response_log_probs(model, batch, reduction=reduction), expected, rtol=2e-6)


def test_response_log_probs_sum_by_default():
    model, batch = build(), make_batch()
    assert torch.equal(
        response_log_probs(model, batch), response_log_probs(model, batch, reduction="sum")
    )


@pytest.mark.parametrize("as_type", [int, torch.tensor])
def test_micro_batches_with_num_items_add_up_to_the_whole_batch(as_type):
    model, batch = build(), make_batch()
    micro_batches = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    num_items = int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
    parts = [task_loss(model, micro, num_items=as_type(num_items)) for micro in micro_batches]
    assert_same(sum(parts), task_loss(model, batch), rtol=2e-6)
    own = model(**micro_batches[1], num_items_in_batch=num_items).loss
    assert_same(parts[1], own, rtol=2e-6)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_safety_losses_are_their_formulas(reduction, side):
    model = build(initializer_range=0.3)
    chosen = make_batch(side=side)
    rejected = make_batch((6, 15, 8), (4, 3, 5), side=side, seed=1)
    margin = explicit_log_probs(model, chosen, reduction) - explicit_log_probs(
        model, rejected, reduction
    )
    for swap in (False, True):
        pair = (rejected, chosen) if swap else (chosen, rejected)
        margin = -margin if swap else margin
        contrastive = contrastive_loss(model, *pair, temperature=2.5, reduction=reduction)
        expected = -torch.log(torch.sigmoid(margin.double() / 2.5)).mean().float()
        assert_same(contrastive, expected)
        joint = joint_loss(model, *pair, temperature=2.5, reduction=reduction)
        assert_same(joint, expected)
        summed = expected - explicit_log_probs(model, pair[0], reduction).mean()
        assert_same(gradients(joint, model), gradients(summed, model), rtol=1e-4)
        assert_same(gradients(contrastive, model), gradients(expected, model), rtol=1e-4)
        difference = difference_loss(model, *pair, reduction=reduction)
        assert_same(difference, -margin.mean())
        assert_same(gradients(difference, model), gradients(-margin.mean(), model), rtol=1e-4)
        expected = -explicit_log_probs(model, pair[0], reduction).mean()
        refusal = refusal_loss(model, *pair, reduction=reduction)
        assert_same(refusal, expected)
        assert_same(gradients(refusal, model), gradients(expected, model), rtol=1e-4)


@pytest.mark.parametrize("loss", [contrastive_loss, difference_loss, joint_loss])
def test_safety_losses_use_per_token_means_and_one_forward(loss):
    model, chosen, rejected = build(), make_batch(), make_batch((6, 15, 8), seed=1)
    shapes = []
    model.model.register_forward_hook(lambda *call: shapes.append(call[2][0].shape[:2]))
    default = loss(model, chosen, rejected, pack=False)
    assert shapes == [(6, 15)]
    assert torch.equal(default, loss(model, chosen, rejected, reduction="mean", pack=False))


def test_temperature_is_one_by_default():
    model, chosen, rejected = build(), make_batch(), make_batch(seed=1)
    default = contrastive_loss(model, chosen, rejected)
    assert torch.equal(default, contrastive_loss(model, chosen, rejected, temperature=1.0))


def test_contrastive_loss_of_pairs_far_apart_is_finite():
    model = build()
    with torch.no_grad():
        model.lm_head.weight.mul_(2000)
    chosen, rejected = make_batch((5,), (2,)), make_batch((12,), (2,), seed=1)
    with torch.no_grad():
        margin = float(response_log_probs(model, chosen) - response_log_probs(model, rejected))
    assert margin > 200  # exp(margin) overflows in fp32
    right = contrastive_loss(model, chosen, rejected, reduction="sum")
    wrong = contrastive_loss(model, rejected, chosen, reduction="sum")
    assert right.item() < 1e-38
    assert_same(wrong, torch.tensor(margin))
    assert all(gradient.isfinite().all() for gradient in gradients(right, model))
    difference = difference_loss(model, rejected, chosen, reduction="sum")
    assert_same(gradients(wrong, model), gradients(difference, model))


@pytest.mark.parametrize(
    "head", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}]
)
def test_peft_adapters_on_the_head(head):
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False} | head)
    model = get_peft_model(build(), config).eval()
    batch = make_batch()
    ours, own = task_loss(model, batch), model(**batch).loss
    assert_same(ours, own, rtol=2e-6)
    assert_same(gradients(ours, model), gradients(own, model))


@pytest.mark.parametrize("trained", ["lm_head", "q_proj"])
def test_dropout_in_the_head_is_the_same_in_forward_and_backward(trained):
    targets = ["lm_head", "q_proj"]
    config = LoraConfig(r=4, target_modules=targets, lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(build(), config).double().train()
    batch = make_batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(f"{trained}.lora_A" in name)
    parameter = next(p for p in model.parameters() if p.requires_grad)

    def loss():
        torch.manual_seed(3)
        return task_loss(model, batch)

    (gradient,) = torch.autograd.grad(loss(), parameter)
    # The norms between q_proj and the loss compute in fp32: a longer step, and less exact.
    size, tolerance = (1e-5, 1e-6) if trained == "lm_head" else (1e-3, 1e-3)
    step = size * gradient / gradient.norm()
    with torch.no_grad():
        parameter.add_(step)
        above = loss()
        parameter.sub_(2 * step)
        below = loss()
    torch.testing.assert_close(
        (above - below) / (2 * size), gradient.norm(), rtol=tolerance, atol=0
    )


def with_lora(model):
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    return get_peft_model(model, config).eval()


@pytest.mark.parametrize("trained", ["adapters", "everything"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "granite", "cohere"])
def test_the_head_runs_once_forward_and_backward(family, trained):
    model, batch = build(family), make_batch()
    if trained == "adapters":
        model = with_lora(model)
    own = model(**batch).loss
    task_loss(model, batch)  # tests the model
    with LargestTensor() as largest:
        ours = task_loss(model, batch)
        found = gradients(ours, model)
    assert_same(ours, own, rtol=2e-6)
    assert_same(found, gradients(own, model))
    chunks = -(-16 // ROWS_PER_CHUNK)
    assert largest.counts[torch.ops.aten._log_softmax.default] == chunks
    assert largest.counts[torch.ops.aten._log_softmax_backward_data.default] == chunks
    with LargestTensor() as largest, torch.no_grad():
        task_loss(model, batch)
    assert torch.ops.aten._log_softmax_backward_data.default not in largest.counts


def test_a_hook_of_a_frozen_head_may_train():
    model, batch = with_lora(build()), make_batch()
    scale = nn.Parameter(torch.ones(VOCABULARY))
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: scale * output)
    (ours,) = torch.autograd.grad(task_loss(model, batch), scale)
    assert_same(ours, torch.autograd.grad(model(**batch).loss, scale)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, "autocast"])
def test_a_frozen_head_is_as_exact_as_one_that_runs_again(dtype, monkeypatch):
    exact_model, batch = with_lora(build(initializer_range=0.3)), make_batch()
    autocast = dtype == "autocast"
    model = with_lora(build(initializer_range=0.3)).to(torch.float32 if autocast else dtype)

    def run(model, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = contrastive_loss(model, batch, make_batch(seed=1))
        return loss, torch.cat([g.flatten().float() for g in gradients(loss, model)])

    exact = run(exact_model, False)
    ours = run(model, autocast)
    monkeypatch.setattr(head, "_is_hooked", lambda head: True)
    again = run(model, autocast)
    for fast, reference, value in zip(ours, again, exact, strict=True):
        assert (fast - value).norm() <= 1.1 * (reference - value).norm() + 1e-3 * value.norm()


def test_the_gradient_of_a_frozen_heads_rows_is_multiplied_in_fp32():
    rows = torch.zeros(4, 2, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([3.0, 5.0])
    incoming = torch.tensor([1.003, 0.7071, -1 / 3, 1.0])

    def log_probs(rows, targets):
        return (rows * weight).sum(1)

    ours = head._FrozenHead.apply(rows, torch.zeros(4), 3, log_probs)
    (gradient,) = torch.autograd.grad(ours, rows, incoming)
    assert torch.equal(gradient, (incoming[:, None] * weight).bfloat16())


def test_autocast_casts_a_frozen_head_once_for_all_chunks():
    model, batch = with_lora(build()), make_batch()
    with torch.autocast("cpu", torch.bfloat16):
        task_loss(model, batch)
        with LargestTensor() as largest:
            task_loss(model, batch)
    # One for the model's own call, one for the chunks.
    assert largest.copies[VOCABULARY, 32] == 2


def test_the_head_is_given_one_position_without_strides():
    model, contiguous = build(), []
    model.lm_head.register_forward_pre_hook(
        lambda module, args: contiguous.append(args[0].is_contiguous())
    )
    task_loss(model, make_batch(), pack=False)
    assert all(contiguous)


def count_host_copies(monkeypatch):
    copies, copy = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(0) or copy(self))
    return copies


def test_passes_over_the_same_batch_wait_for_the_device_once(monkeypatch):
    model, batch, rejected = EmbeddingModel(), make_batch(), make_batch(seed=1)
    copies = count_host_copies(monkeypatch)
    first = task_loss(model, batch)
    assert torch.equal(task_loss(model, dict(batch)), first)
    assert len(copies) == 1
    pair = contrastive_loss(model, batch, rejected)
    assert torch.equal(contrastive_loss(model, batch, rejected), pair)
    assert len(copies) == 2
    batch["labels"][0, 4:] = IGNORE_INDEX
    assert not torch.equal(task_loss(model, {**batch, "labels": batch["labels"]}), first)
    assert len(copies) == 3
    assert torch.equal(task_loss(model, make_batch()), first)
    assert len(copies) == 4


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_batch_seen_in_inference_mode_can_be_trained_on(family):
    model, batch = build(family), make_batch()
    with torch.inference_mode():
        expected = task_loss(model, batch)
        other = task_loss(model, {key: value.clone() for key, value in batch.items()})
    assert torch.equal(expected, other)
    model = build(family)  # the buffers of the other one are of inference mode
    task_loss(model, batch).backward()


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


ODDITIES = {
    "no head": "get_output_embeddings gives no head",
    "unused head": "ran 0 times",
    "head called twice": "ran 2 times",
    "flattened head": "does not take",
    "head by keyword": "does not take",
    "head with a further argument": "does not take",
    "scaled": r"differ by up to 32 ",
    "scaled in place": r"differ by up to 32 ",
    "softcapped": r"differ by up to 0\.\d+ ",
    "truncated": r"\(\d, 1, 88\) are not of the shape",
}


@pytest.mark.parametrize("oddity", ODDITIES)
def test_fallback_to_the_models_own_logits(oddity):
    model, batch = build_odd(oddity), make_batch()
    batch["labels"][batch["labels"] >= VOCABULARY - 8] = IGNORE_INDEX  # the truncated vocabulary
    logits = model(batch["input_ids"], batch["attention_mask"])
    logits = logits[0] if isinstance(logits, tuple) else logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    with pytest.warns(UserWarning, match=f"^OddLlama: .*{ODDITIES[oddity]}") as caught:
        first = task_loss(model, batch)
    assert len(caught) == 1
    second = task_loss(model, batch)  # a second warning would be an error
    for ours in (first, second):
        assert_same(ours, expected, rtol=2e-6)
        assert_same(gradients(ours, model), gradients(expected, model))


def test_models_without_an_oddity_need_no_fallback():
    model, batch = build_odd(None), make_batch()
    expected = build()(**batch).loss
    assert_same(task_loss(model, batch), expected, rtol=2e-6)


def test_unknown_softcap_of_a_new_model_is_noticed():
    model = build_odd("softcapped")
    nn.init.zeros_(model.lm_head.weight)
    with pytest.warns(UserWarning, match="OddLlama"):
        task_loss(model.bfloat16(), make_batch())


def test_fallback_repeats_the_dropout_of_the_forward_it_replaces():
    model, batch = build_odd("scaled", attention_dropout=0.5).train(), make_batch()
    torch.manual_seed(1)
    with pytest.warns(UserWarning, match="OddLlama"):
        first = task_loss(model, batch)
    after_first = torch.get_rng_state()
    torch.manual_seed(1)
    second = task_loss(model, batch)
    assert torch.equal(first, second)
    assert torch.equal(after_first, torch.get_rng_state())


def test_logits_of_another_length_are_an_error():
    class Shifted(nn.Module):
        def forward(self, input_ids, attention_mask):
            return torch.zeros(len(input_ids), 3, VOCABULARY)

    with (
        pytest.warns(UserWarning, match="Shifted"),
        pytest.raises(ValueError, match=r"Shifted returned logits of shape \(3, 3, 96\)"),
    ):
        task_loss(Shifted(), make_batch())


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


def test_further_tensors_of_the_batch_reach_the_model():
    model, batch = EmbeddingModel(), make_batch(side="left")
    weights = torch.rand(3, 12, 2)
    response_log_probs(model, {**batch, "token_weights": weights, "names": ["a", "b", "c"]})
    assert set(model.received) == {"position_ids", "use_cache", "token_weights"}
    assert model.received["token_weights"] is weights
    assert model.received["use_cache"] is False
    expected = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert torch.equal(model.received["position_ids"], expected)

    positions = torch.arange(12).expand(3, 12)
    response_log_probs(model, {**batch, "position_ids": positions})
    assert model.received["position_ids"] is positions

    task_loss(model, make_batch())
    assert model.received["position_ids"] is None


def test_further_tensors_of_chosen_and_rejected_are_padded_where_they_are_per_token():
    model = EmbeddingModel()
    chosen = {**make_batch(), "token_weights": torch.rand(3, 12, 2), "image": torch.rand(3, 4)}
    rejected = {
        **make_batch((15, 9, 7), seed=1),
        "token_weights": torch.rand(3, 15, 2),
        "image": torch.rand(3, 4),
    }
    difference_loss(model, chosen, rejected)
    padded = F.pad(chosen["token_weights"], (0, 0, 0, 3))
    weights, image = model.received["token_weights"], model.received["image"]
    assert torch.equal(weights, torch.cat([padded, rejected["token_weights"]]))
    assert torch.equal(image, torch.cat([chosen["image"], rejected["image"]]))


def test_settings_of_a_multi_modal_model_are_those_of_its_language_model():
    class MultiModal(EmbeddingModel):
        config = SimpleNamespace(
            get_text_config=lambda decoder: SimpleNamespace(logits_scaling=0.5)
        )

        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).logits / 0.5

    model, batch = MultiModal(), make_batch()
    logits = model(batch["input_ids"], batch["attention_mask"])
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert_same(task_loss(model, batch), expected, rtol=2e-6)


@pytest.mark.parametrize("family", ["granite", "mixtral"])
def test_settings_are_found_in_a_module_without_a_configuration(family):
    class Holder(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner = model

        def get_output_embeddings(self):
            return self.inner.lm_head

        def forward(self, **inputs):
            return self.inner(**inputs)

    model, batch = build(family), make_batch()
    # The logits are post-processed, or a warning would be an error; the router loss is part of it.
    assert_same(task_loss(Holder(model), batch), model(**batch).loss, rtol=2e-6)


def test_a_models_head_is_tested_at_its_first_use_only(monkeypatch):
    outputs = []
    model, batch = build(), make_batch()
    model.register_forward_hook(lambda module, args, output: outputs.append(output.logits))
    for _ in range(3):
        task_loss(model, batch, pack=False)
    last_positions = build()(**batch).logits[:, -1:]
    tested = [not torch.allclose(logits, last_positions) for logits in outputs]
    assert tested == [True, False, False]


def hooks_of(model):
    return [
        (name, list(module._forward_pre_hooks), list(module._forward_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["model.layers.1", "lm_head"])
def test_hooks_are_removed_on_any_exit(where, error):
    model, batch = build(), make_batch()

    def fail(*_):
        raise error("stop")

    before = hooks_of(model)
    with model.get_submodule(where).register_forward_hook(fail), pytest.raises(error, match="stop"):
        task_loss(model, batch)
    assert hooks_of(model) == before
    loss = task_loss(model, batch)
    assert hooks_of(model) == before
    assert_same(loss, model(**batch).loss, rtol=2e-6)


def test_other_hooks_of_the_head_act_once():
    model, batch = build(), make_batch()
    model.lm_head.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    model.lm_head.register_forward_hook(lambda module, args, output: 5 * output)
    assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)


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


@pytest.mark.parametrize("loss_name", ["task", "contrastive"])
def test_full_logits_never_exist(loss_name, monkeypatch):
    vocabulary, rows_per_chunk = 128_000, 16
    chunk = rows_per_chunk * vocabulary
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * chunk)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            tie_word_embeddings=True,
        )
    )
    input_ids = torch.randint(vocabulary, (2, 100))
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids,
    }

    def run():
        if loss_name == "task":
            task_loss(model, batch, pack=False).backward()
        else:
            contrastive_loss(model, batch, batch, pack=False).backward()

    with LargestTensor() as largest:
        run()
    assert torch.ops.aten._log_softmax_backward_data.default in largest.counts
    assert largest.elements == chunk
    # Of the 12 chunks' worth of logits in the batch: those of one chunk, log-softmax, their two
    # gradients, and the gradient of the embeddings (8 columns for a chunk's 16) twice.
    assert 2 * 4 * chunk < peak_bytes(run) < 5 * 4 * chunk
    assert peak_bytes(lambda: model(**batch).loss.backward()) > 24 * 4 * chunk


def test_a_chunk_has_at_least_one_row(monkeypatch):
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 1)
    model, batch = build(), make_batch()
    assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)


def record_head_dtypes(model):
    dtypes = []
    model.lm_head.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    return dtypes


@pytest.mark.parametrize("opened_by", ["caller", "accelerate"])
def test_autocast_holds_for_the_chunks_in_forward_and_backward(opened_by):
    model, batch = build(), make_batch()
    if opened_by == "caller":
        with torch.autocast("cpu", torch.bfloat16):
            own = model(**batch).loss
            dtypes = record_head_dtypes(model)
            ours = task_loss(model, batch, pack=False)
    else:
        model = accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        own = model(**batch).loss
        dtypes = record_head_dtypes(model)
        ours = task_loss(model, batch, pack=False)
    forward_calls = len(dtypes)
    gradients(ours, model)
    assert ours.dtype == torch.float32
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == 2 * forward_calls - 1  # all but the model's own call run again
    # Not farther from fp32 than the model's own bf16 computation: chunks add up in fp32.
    exact_model = build()
    exact = exact_model(**batch).loss
    assert (ours - exact).abs() <= (own - exact).abs() + 1e-4
    for ours_one, own_one, exact_one in zip(
        gradients(ours, model), gradients(own, model), gradients(exact, exact_model), strict=True
    ):
        assert (ours_one - exact_one).norm() <= 1.1 * (own_one - exact_one).norm()


def test_bf16_model_has_fp32_losses():
    model, batch = build().bfloat16(), make_batch()
    own, ours = model(**batch).loss, task_loss(model, batch)
    assert ours.dtype == torch.float32
    assert_same(ours, own, rtol=1e-3)
    assert response_log_probs(model, batch).dtype == torch.float32


@pytest.mark.parametrize("trained", ["everything", "adapters"])
@pytest.mark.parametrize("loss_name", ["task", "contrastive"])
def test_double_backward_in_fp64(loss_name, trained):
    model = build(attn_implementation="eager").double()
    if trained == "adapters":
        model = with_lora(model).double()
    chosen, rejected = make_batch(), make_batch(seed=1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    if loss_name == "task":
        ours = task_loss(model, chosen, pack=False)
        plain = model(**chosen, return_dict=True).logits[:, :-1].flatten(0, 1)
        plain = F.cross_entropy(plain, chosen["labels"][:, 1:].flatten())
    else:
        ours = contrastive_loss(model, chosen, rejected, pack=False)
        margin = [explicit_log_probs(model, batch, "mean") for batch in (chosen, rejected)]
        plain = -F.logsigmoid(margin[0] - margin[1]).mean()
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, plain, rtol=1e-14, atol=0)

    def hessian_vector_product(loss):
        first = torch.autograd.grad(loss, parameters, create_graph=True)
        generator = torch.Generator().manual_seed(2)
        vectors = [torch.randn(g.shape, generator=generator, dtype=g.dtype) for g in first]
        product = sum((g * v).sum() for g, v in zip(first, vectors, strict=True))
        return first, torch.autograd.grad(product, parameters)

    # Not to fp64 rounding, because the norms and the softmax of Llama compute in fp32. Beside the
    # head's gradient that is small; the adapters' has nothing larger beside it.
    tolerance = {"everything": 1e-10, "adapters": 1e-6}[trained]
    assert_same(hessian_vector_product(ours), hessian_vector_product(plain), rtol=tolerance)


@pytest.mark.parametrize("what", ["wrapped", "in place", "head"])
def test_compiled_models_are_left_unhooked(what):
    torch._dynamo.reset()
    plain, batch = EmbeddingModel(), make_batch()
    expected = task_loss(plain, batch)
    model = EmbeddingModel()
    if what == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        (model if what == "in place" else model.head).compile(backend="eager")
    with pytest.warns(UserWarning, match="^EmbeddingModel: it is compiled") as caught:
        ours = task_loss(compiled, batch)
    assert len(caught) == 1
    assert_same(ours, expected, rtol=2e-6)
    assert_same(task_loss(compiled, batch), expected, rtol=2e-6)
    logits = compiled(batch["input_ids"], batch["attention_mask"]).logits
    assert logits.shape == (3, 12, VOCABULARY)


@pytest.fixture
def process_group(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_distributed_data_parallel(process_group, find_unused_parameters):
    plain, batch = build(), make_batch()
    expected = gradients(plain(**batch).loss, plain)
    model = build()
    wrapped = nn.parallel.DistributedDataParallel(
        model, find_unused_parameters=find_unused_parameters
    )
    for _ in range(2):  # the first use of a model also tests its head
        model.zero_grad()
        task_loss(wrapped, batch).backward()
        assert_same([p.grad for p in model.parameters()], expected)


def without_labels(batch, row):
    return {**batch, "labels": batch["labels"].index_fill(0, torch.tensor(row), IGNORE_INDEX)}


def shortened(batch, key):
    return {**batch, key: batch[key][:, 1:]}


BATCH = make_batch()
ERRORS = {
    "num_items": (
        lambda model: task_loss(model, BATCH, num_items=0),
        "num_items is 0; expected at least 1",
    ),
    "task batch without a scored token": (
        lambda model: task_loss(model, without_labels(BATCH, [0, 1, 2])),
        r"batch has no scored token in any of its 3 rows: every label is -100 .* maximum length",
    ),
    "row without a scored token": (
        lambda model: response_log_probs(model, without_labels(BATCH, [0, 2])),
        r"batch has no scored token in rows \[0, 2\] of its 3: every label is -100",
    ),
    "row scored at padding only": (
        lambda model: response_log_probs(model, make_batch((12, 3), (4, 3), pad_labels=True)),
        r"batch has no scored token in rows \[1\] of its 2: every label is -100 or at padding",
    ),
    "chosen row without a scored token": (
        lambda model: contrastive_loss(model, without_labels(BATCH, [1]), BATCH),
        r"chosen has no scored token in rows \[1\] of its 3",
    ),
    "rejected row without a scored token": (
        lambda model: difference_loss(model, BATCH, without_labels(BATCH, [2])),
        r"rejected has no scored token in rows \[2\] of its 3",
    ),
    "unequal numbers of rows": (
        lambda model: difference_loss(model, BATCH, make_batch((8,), (3,))),
        "chosen has 3 rows and rejected 1; expected pairs",
    ),
    "unequal tensors": (
        lambda model: difference_loss(model, BATCH, {**BATCH, "token_weights": torch.ones(3, 12)}),
        r"chosen has the tensors \['attention_mask', .* expected the same in both",
    ),
    "temperature": (
        lambda model: contrastive_loss(model, BATCH, BATCH, temperature=0.0),
        r"temperature is 0\.0; expected a number above 0",
    ),
    "temperature that is no number": (
        lambda model: contrastive_loss(model, BATCH, BATCH, temperature=float("nan")),
        "temperature is nan; expected a number above 0",
    ),
    "reduction of row log-probabilities": (
        lambda model: response_log_probs(model, BATCH, reduction="none"),
        "reduction is 'none'; expected 'sum' or 'mean'",
    ),
    "refusal without a scored token": (
        lambda model: refusal_loss(model, without_labels(BATCH, [1])),
        r"chosen has no scored token in rows \[1\] of its 3",
    ),
    "reduction of a safety loss": (
        lambda model: contrastive_loss(model, BATCH, BATCH, reduction="none"),
        "reduction is 'none'; expected 'sum' or 'mean'",
    ),
    "missing key": (
        lambda model: difference_loss(model, BATCH, {"input_ids": BATCH["input_ids"]}),
        r"rejected has no attention_mask, only \['input_ids'\]",
    ),
    "wrong shape": (
        lambda model: contrastive_loss(model, shortened(BATCH, "labels"), BATCH),
        r"chosen\['labels'\] has shape \(3, 11\) beside input_ids \(3, 12\)",
    ),
    "no batch axis": (
        lambda model: task_loss(model, {key: value[0] for key, value in BATCH.items()}),
        r"batch\['input_ids'\] has shape \(12,\) .* expected \(batch, sequence\)",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_say_what_is_wrong_before_the_forward(case):
    call, message = ERRORS[case]
    model = EmbeddingModel()
    with pytest.raises(ValueError, match=message):
        call(model)
    assert model.received == {}


def test_import_needs_torch_only():
    code = "import sys, sap_fast.losses; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
