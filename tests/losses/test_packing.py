import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from sap_fast.losses import (
    contrastive_loss,
    difference_loss,
    packing,
    response_log_probs,
    task_loss,
)
from sap_fast.losses.packing import pack
from tests.losses.helpers import (
    ANSWERS,
    BATCHES,
    SYSTEM,
    OddLlama,
    assert_same,
    batch_of,
    build,
    gradients,
    random_tokens,
    with_lora,
)
from tests.oracle import naive_contrastive_loss, naive_task_loss, naive_token_log_probs

pytestmark = pytest.mark.usefixtures("no_packing_refused")

CPU = torch.device("cpu")


def safety_pairs():
    """Chosen and rejected answers to the same five prompts."""
    prompts = [SYSTEM + prompt for prompt in ANSWERS]
    answers = random_tokens(5, 9, 3, 4, 8), random_tokens(7, 4, 8, 6, 3, seed=1)
    return [batch_of([p + a for p, a in zip(prompts, side, strict=True)]) for side in answers]


# ---- the packing ----


def unpack(packed, shape):
    """Each sequence's tokens, positions and visible tokens, read off the packed batch."""
    inputs, index = packed.inputs, packed.token_index
    length = inputs["input_ids"].shape[1]
    for row in range(shape[0]):
        slots = index[row][index[row] >= 0]
        rows = set((slots // length).tolist())
        assert len(rows) <= 1
        visible = inputs["attention_mask"][next(iter(rows), 0), 0]
        yield (
            inputs["input_ids"].flatten()[slots],
            inputs["position_ids"].flatten()[slots],
            [visible[slot % length].nonzero()[:, 0].tolist() for slot in slots],
            (slots % length).tolist(),
        )


def check_packing(packed, batch):
    attended = batch["attention_mask"].bool()
    assert torch.equal(packed.token_index >= 0, attended)
    sequences = [row[keep] for row, keep in zip(batch["input_ids"], attended, strict=True)]
    for tokens, (found, positions, visible, slots) in zip(
        sequences, unpack(packed, attended.shape), strict=True
    ):
        assert torch.equal(found, tokens)
        assert torch.equal(positions, torch.arange(len(tokens)))
        assert visible == [slots[: position + 1] for position in range(len(tokens))]
    # What is left are padding slots, each of which sees itself alone.
    rows, length = packed.inputs["input_ids"].shape
    used = set(packed.token_index.flatten().tolist())
    for slot in set(range(rows * length)) - used:
        visible = packed.inputs["attention_mask"][slot // length, 0, slot % length]
        assert visible.nonzero()[:, 0].tolist() == [slot % length]


token_lists = st.lists(st.lists(st.integers(3, 5), max_size=7), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(token_lists.filter(any), st.integers(0, 40), st.sampled_from(["left", "right"]))
def test_packed_rows_hold_every_sequence_and_what_it_sees(sequences, extra, side):
    batch = batch_of([tokens or [] for tokens in sequences], side=side, prompts=[0] * 7)
    built = packing.Sequences(batch["input_ids"], batch["attention_mask"].bool())
    starts = built.cut(max(built.lengths) + extra)
    packed = built.lay_out(starts, torch.bool, CPU)
    check_packing(packed, batch)
    assert packed.inputs["input_ids"].shape[1] <= max(built.lengths) + extra
    if len(starts) == 1:  # every prefix once: the nodes of the tree
        prefixes = {tuple(tokens[: n + 1]) for tokens in sequences for n in range(len(tokens))}
        assert packed.inputs["input_ids"].numel() == len(prefixes)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BATCHES)
def test_pack_of_whole_batches(name, side):
    batch = batch_of(BATCHES[name], side=side)
    attended = batch["attention_mask"].bool()
    packed = pack(batch["input_ids"], attended, 4096, torch.bool, CPU)
    check_packing(packed, batch)
    assert packed.inputs["input_ids"].numel() < 0.95 * attended.numel()
    added = pack(batch["input_ids"], attended, 4096, torch.float16, CPU).inputs["attention_mask"]
    assert added.dtype == torch.float16
    assert torch.equal(added == 0, packed.inputs["attention_mask"])
    assert (added[added != 0] == torch.finfo(torch.float16).min).all()


def plan(sequences, hidden_size=4096):
    batch = batch_of(sequences)
    attended = batch["attention_mask"].bool()
    packed = pack(batch["input_ids"], attended, hidden_size, torch.bool, CPU)
    return packed and tuple(packed.inputs["input_ids"].shape)


def test_rows_are_as_many_as_cost_least():
    lengths = [40, 21, 21, 22]
    assert plan(random_tokens(*lengths)) == (1, 104)
    # Attention over S slots costs S/(6H) of the rest: with H=4 rows of 42 are cheaper.
    assert plan(random_tokens(*lengths), hidden_size=4) == (3, 42)
    # 3 % of padding are not worth it, 8 % are.
    assert plan(random_tokens(64, 60, 64)) is None
    assert plan(random_tokens(64, 49, 64)) is not None
    assert plan([[5]]) is None


def test_the_mask_is_bounded(monkeypatch):
    sequences = random_tokens(40, 21, 21, 22)
    monkeypatch.setattr(packing, "MAX_MASK_ELEMENTS", 104**2)
    assert plan(sequences) == (1, 104)
    monkeypatch.setattr(packing, "MAX_MASK_ELEMENTS", 104**2 - 1)
    assert plan(sequences) != (1, 104)
    monkeypatch.setattr(packing, "MAX_MASK_ELEMENTS", 1)
    assert plan(sequences) is None


def test_a_sequence_with_a_gap_is_not_packed():
    batch = batch_of(BATCHES["identical"])
    batch["attention_mask"][1, 3] = 0
    attended = batch["attention_mask"].bool()
    assert pack(batch["input_ids"], attended, 4096, torch.bool, CPU) is None


# ---- the losses of packed batches ----


def models():
    yield "llama sdpa", lambda: build("llama")
    yield "llama eager", lambda: build("llama", attn_implementation="eager")
    yield "lora", lambda: with_lora(build("llama"))
    yield "gpt2", lambda: build("gpt2")
    yield "gpt2 lora", lambda: with_gpt2_lora(build("gpt2"))
    yield "opt", lambda: build("opt")
    yield "gpt-neox", lambda: build("gpt-neox")
    yield "cohere", lambda: build("cohere")
    yield "mixtral", lambda: build("mixtral", output_router_logits=False)
    yield "wrapped", lambda: Wrapper(build("llama"))


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def with_gpt2_lora(model):
    config = LoraConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False
    )
    return get_peft_model(model, config).eval()


MODELS = dict(models())


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_those_of_the_plain_batch(name, forwards):
    model, batch, pair = MODELS[name](), batch_of(BATCHES["shared prefix"]), safety_pairs()
    for ours, plain, naive in (
        (task_loss(model, batch), task_loss(model, batch, pack=False), naive_task_loss),
        (
            contrastive_loss(model, *pair),
            contrastive_loss(model, *pair, pack=False),
            naive_contrastive_loss,
        ),
    ):
        arguments = (batch,) if naive is naive_task_loss else pair
        expected = naive(model, *arguments)
        assert_same(ours, expected, rtol=2e-6)
        assert_same(gradients(ours, model), gradients(expected, model), rtol=2e-5)
        assert_same(gradients(ours, model), gradients(plain, model), rtol=2e-5)
    assert_same(
        difference_loss(model, *pair),
        difference_loss(model, *pair, pack=False),
        rtol=1e-4,
    )
    assert len(forwards) == 2 and None not in forwards


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("rows", ["one row", "several rows"])
def test_rows_of_every_kind(name, side, rows, forwards, monkeypatch):
    if rows == "several rows":
        monkeypatch.setattr(packing, "MIN_SAVING", -10)
        longest = max(map(len, BATCHES[name]))
        monkeypatch.setattr(packing, "MAX_MASK_ELEMENTS", 2 * (longest + 8) ** 2)
    model = build("gpt2", initializer_range=0.2)
    expected = naive_token_log_probs(model, batch_of(BATCHES[name]))[0]
    batch = batch_of(BATCHES[name], side=side)
    ours = response_log_probs(model, batch)
    assert_same(ours, torch.stack([row.sum() for row in expected]), rtol=2e-6)
    found = gradients(task_loss(model, batch), model)
    expected = naive_task_loss(model, batch_of(BATCHES[name]))
    assert_same(found, gradients(expected, model), rtol=2e-5)
    assert forwards == [forwards[0]]
    assert rows == "several rows" or forwards[0] is not None
    if rows == "several rows" and name in ("nothing in common", "shared prefix"):
        assert forwards[0][0] > 1


@pytest.mark.parametrize("frozen", [True, False])
def test_bf16_autocast_is_no_less_exact(frozen, forwards):
    def make():
        model = build(initializer_range=0.1)
        return with_lora(model) if frozen else model

    pair = safety_pairs()

    def run(model, **options):
        loss = contrastive_loss(model, *pair, **options)
        return loss.detach(), torch.cat([g.flatten() for g in gradients(loss, model)])

    exact = run(make(), pack=False)
    with torch.autocast("cpu", torch.bfloat16):
        # The first forward in it is the test's, whose casts must not serve the second.
        ours = run(make())
        plain = run(make(), pack=False)
    assert forwards[0] is not None
    for fast, reference, value in zip(ours, plain, exact, strict=True):
        assert (fast - value).norm() <= 1.2 * (reference - value).norm() + 2e-3 * value.norm()


@pytest.mark.parametrize("name", ["llama sdpa", "llama eager"])
def test_bf16_models_are_packed(name, forwards):
    model = MODELS[name]().bfloat16()
    batch = batch_of(BATCHES["shared prefix"])
    assert_same(task_loss(model, batch), task_loss(model, batch, pack=False), rtol=1e-3)
    assert forwards == [(1, 43)]


def test_models_whose_head_is_unknown_are_packed_as_well(forwards, body_calls):
    model = OddLlama(build().config).eval()
    model.oddity = "no head"
    batch = batch_of(BATCHES["shared prefix"])
    with pytest.warns(UserWarning, match="gives no head"):
        ours = task_loss(model, batch)
    assert body_calls[-1]["index"].shape == batch["input_ids"].shape
    expected = F.cross_entropy(
        model(batch["input_ids"], batch["attention_mask"])[:, :-1].flatten(0, 1),
        batch["labels"][:, 1:].flatten(),
    )
    assert_same(ours, expected, rtol=2e-6)
    assert forwards == [(1, 43)]


def test_passes_give_the_model_the_very_same_tensors(body_calls):
    model = with_lora(build())
    task_loss(model, batch_of(BATCHES["identical"]))  # tests the model
    batch, pair = batch_of(BATCHES["shared prefix"]), safety_pairs()
    for loss, arguments in ((task_loss, [batch]), (contrastive_loss, pair)):
        body_calls.clear()
        loss(model, *arguments)
        loss(model, *arguments)
        assert packing.current_index() is None
        first, second = body_calls
        assert first["index"] is not None
        for key in ("index", "input_ids", "position_ids", "attention_mask"):
            assert first[key] is second[key]
        assert first["use_cache"] is False
    body_calls.clear()
    task_loss(model, batch, pack=False)
    assert body_calls[0]["index"] is None
    assert body_calls[0]["attention_mask"].dim() == 2


def test_nothing_is_left_of_a_batch_that_is_gone(body_calls):
    model, batch = build(), batch_of(BATCHES["shared prefix"])
    task_loss(model, batch).backward()
    tensors = [weakref.ref(call["attention_mask"]) for call in body_calls]
    body_calls.clear()
    tensors += map(weakref.ref, batch.values())
    assert tensors[-4]() is not None
    del batch
    gc.collect()
    assert [tensor() for tensor in tensors] == [None] * len(tensors)
