import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from sap_fast.losses import (
    contrastive_loss,
    difference_loss,
    packable,
    response_log_probs,
    task_loss,
)
from tests.losses.helpers import BATCHES, SYSTEM, VOCABULARY, assert_same, batch_of, build


def mistral(**settings):
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        **settings,
    )
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(config).eval()


def with_prompt(model):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    return get_peft_model(model, config).eval()


def with_settings(model, **settings):
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


def with_state(model):
    model._is_stateful = True
    return model


def with_compiled_body(model):
    model.model.compile(backend="eager")
    return model


EXCLUDED = {
    "sliding window": lambda: mistral(sliding_window=4),
    "layers of several kinds": lambda: build("gemma3"),
    "router loss": lambda: build("mixtral"),
    "no model of transformers": lambda: Plain(),
    "compiled": lambda: with_compiled_body(build()),
    "layers that count along the row": lambda: with_settings(
        build(), layer_types=["full_attention", "chunked_attention"]
    ),
    "state": lambda: with_state(build()),
    "no positions": lambda: transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1)
    ).eval(),
}


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, VOCABULARY)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask, position_ids=None):
        return self.head(self.embedding(input_ids))


@pytest.mark.usefixtures("no_packing_refused")
@pytest.mark.parametrize("name", EXCLUDED)
def test_models_that_are_silently_left_alone(name, forwards):
    model, batch = EXCLUDED[name](), batch_of(BATCHES["shared prefix"])
    assert torch.equal(task_loss(model, batch), task_loss(model, batch, pack=False))
    assert forwards == []


@pytest.mark.usefixtures("no_packing_refused")
@pytest.mark.parametrize("in_place", [True, False])
def test_models_whose_layers_are_compiled_are_packed(in_place, forwards):
    torch._dynamo.reset()
    model, batch = build(), batch_of(BATCHES["shared prefix"])
    expected = task_loss(model, batch)
    compiled = build()
    for index, layer in enumerate(compiled.model.layers):
        if in_place:
            layer.compile(backend="eager")
        else:
            compiled.model.layers[index] = torch.compile(layer, backend="eager")
    other = batch_of(BATCHES["shared prefix"])  # the first has its packing already
    assert_same(task_loss(compiled, other), expected, rtol=2e-6)
    assert forwards == [(1, 43)] * 2


def test_virtual_tokens_are_left_alone():
    model, batch = with_prompt(build()), batch_of(BATCHES["shared prefix"])
    assert not packable.usable(model, model.get_base_model(), batch)


@pytest.mark.parametrize("window", [{"sliding_window": None}])
def test_models_without_their_window_are_packed(window, forwards):
    model, batch = mistral(**window), batch_of(BATCHES["shared prefix"])
    assert_same(task_loss(model, batch), task_loss(model, batch, pack=False), rtol=2e-6)
    assert forwards == [(1, 43)]


def test_batches_with_further_tensors_are_left_alone(forwards):
    batch = batch_of(BATCHES["shared prefix"])
    task_loss(build(), {**batch, "position_ids": torch.arange(18).expand(5, 18)})
    assert forwards == []


class Deaf(transformers.LlamaForCausalLM):
    """Does not obey the mask, or the positions, or fails."""

    fault = None

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        if attention_mask.dim() == 4:
            if self.fault == "mask":
                attention_mask = None
            elif self.fault == "positions":
                position_ids = torch.zeros_like(position_ids)
            else:
                raise TypeError("4-D")
        return super().forward(input_ids, attention_mask, position_ids, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fault", ["mask", "positions", "error"])
def test_models_that_fail_the_test_are_left_alone(fault, dtype, forwards, recwarn):
    # As large weights as after some training, without which positions hardly matter.
    config = transformers.LlamaConfig(**{**build().config.to_dict(), "initializer_range": 0.3})
    torch.manual_seed(0)
    model, batch = Deaf(config).eval().to(dtype), batch_of(BATCHES["shared prefix"])
    model.fault = fault
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    message = r"fails \(4-D\)" if fault == "error" else "changes log-probabilities by"
    with pytest.warns(UserWarning, match=rf"^Deaf: .*{message}.*not packed") as caught:
        ours = task_loss(model, batch)
    assert len(caught) == 1
    assert torch.equal(ours, task_loss(model, batch))
    assert_same(ours, task_loss(model, batch, pack=False))
    assert forwards == []
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def what(calls):
    return [(call["tested"], call["training"], call["grad"]) for call in calls]


def test_the_tests_run_once_in_each_mode_and_aside(body_calls):
    model = build(attention_dropout=0.5)
    alone = batch_of([SYSTEM])  # nothing to pack, and tested all the same: other ranks may have
    for training in (True, False):
        model.train(training)
        state = torch.get_rng_state()
        first = task_loss(model, alone)
        # Two for the model's own loss, three for packing.
        assert what(body_calls) == [(True, training, False)] * 5 + [(False, training, True)]
        torch.set_rng_state(state)
        body_calls.clear()
        assert torch.equal(task_loss(model, alone), first)
        assert what(body_calls) == [(False, training, True)]
        body_calls.clear()


def test_pack_false_tests_no_packing(body_calls):
    model, batch = build(), batch_of(BATCHES["identical"])
    task_loss(model, batch, pack=False)
    response_log_probs(model, batch, pack=False)
    contrastive_loss(model, batch, batch, pack=False)
    difference_loss(model, batch, batch, pack=False)
    assert [call["tested"] for call in body_calls] == [True] * 2 + [False] * 4


# ---- what does so in training alone ----


class NoisyEmbedding(nn.Embedding):
    """Adds noise in training mode: `size` of the tokens, times what `draw` gives."""

    def forward(self, tokens):
        output = super().forward(tokens)
        if self.training:
            output = output + self.size(tokens) * self.draw(output)
        return output


def with_noise(size, draw):
    model = build()
    embeddings = model.get_input_embeddings()
    embeddings.__class__ = NoisyEmbedding
    embeddings.size, embeddings.draw = size, draw
    return model


def uniform(like):
    return torch.empty_like(like).uniform_(-1, 1)


def normal(like):
    return torch.empty_like(like).normal_()


BY_LENGTH = {
    "uniform_": uniform,
    "normal_": normal,
    "rand": lambda like: torch.rand(like.shape),
    "randn": lambda like: torch.randn(like.shape),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "bernoulli": lambda like: torch.bernoulli(torch.full_like(like, 0.5)),
    "bernoulli_": lambda like: torch.empty_like(like).bernoulli_(0.5),
}


@pytest.mark.parametrize("draw", BY_LENGTH)
def test_noise_by_the_length_of_a_row_is_found_where_no_hook_shows_it(draw, forwards, refused):
    batch = batch_of(BATCHES["shared prefix"])
    model = with_noise(lambda tokens: 1 / tokens.shape[1] ** 0.5, BY_LENGTH[draw])
    task_loss(model.eval(), batch)
    assert forwards == [(1, 43)] and refused() == []  # evaluation mode knows of no noise
    forwards.clear()
    model.train()
    for _ in range(2):
        torch.manual_seed(1)
        ours = task_loss(model, batch)
        torch.manual_seed(1)
        assert torch.equal(ours, task_loss(model, batch, pack=False))
    assert forwards == []
    (told,) = refused()
    assert "changes log-probabilities by" in told


@pytest.mark.parametrize("draw", BY_LENGTH)
def test_noise_of_each_token_is_packed(draw, forwards, refused):
    model = with_noise(lambda tokens: 0.3, BY_LENGTH[draw]).train()
    task_loss(model, batch_of(BATCHES["shared prefix"]))
    assert forwards == [(1, 43)] and refused() == []


@pytest.mark.parametrize("where", ["sdpa", "eager", "adapters"])
def test_dropout_is_no_difference(where, forwards, refused):
    settings = {"attention_dropout": 0.5, "attn_implementation": where}
    model = build(initializer_range=0.3, **({} if where == "adapters" else settings))
    if where == "adapters":
        config = LoraConfig(target_modules=["o_proj"], lora_dropout=0.5, init_lora_weights=False)
        model = get_peft_model(model, config)
    task_loss(model.train(), batch_of(BATCHES["shared prefix"]))
    assert forwards == [(1, 43)] and refused() == []
