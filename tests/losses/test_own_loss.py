import warnings
from typing import Any

import pytest
import torch
import transformers
from peft import AdaLoraConfig, CPTConfig, LoraConfig, get_peft_model
from torch import nn

from sap_fast.losses import contrastive_loss, response_log_probs, task_loss
from tests.losses.helpers import (
    VOCABULARY,
    assert_same,
    build,
    explicit_log_probs,
    gradients,
    llama,
    make_batch,
    smoothed,
    with_lora,
    with_loss_function,
    without_labels,
)

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "output_router_logits": True,
}


def jetmoe(**settings):
    return transformers.JetMoeForCausalLM(
        transformers.JetMoeConfig(
            **SIZES,
            num_attention_heads=4,  # two experts of two
            num_key_value_heads=2,
            kv_channels=8,
            intermediate_size=32,
            num_local_experts=4,
            aux_loss_coef=0.5,
            **settings,
        )
    )


class WithZLoss(transformers.LlamaForCausalLM):
    """Adds the loss of a router that keeps its logits small, and returns it by itself."""

    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, labels=labels, **kwargs)
        outputs.z_loss = self.model.layers[0].mlp.up_proj.weight.logsumexp(0).square().mean()
        if labels is not None:
            outputs.loss = outputs.loss + self.config.router_z_loss_coef * outputs.z_loss
        return outputs


def adalora():
    model = get_peft_model(
        build(),
        AdaLoraConfig(
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "v_proj"],
            init_r=6,
            target_r=3,
            total_step=20,
            tinit=2,
            tfinal=5,
            orth_reg_weight=0.5,
        ),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_E" in name:
                parameter.normal_(0, 0.3)
    return model


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


KNOWN = {
    "JetMoe": jetmoe,
    "Mixtral": lambda: build("mixtral", router_aux_loss_coef=0.5),
    "z-loss": lambda: llama(WithZLoss, router_z_loss_coef=0.1),
    "AdaLoRA": adalora,
    "AdaLoRA, wrapped": lambda: Wrapper(adalora()),
}


def make(models, name):
    torch.manual_seed(0)
    return models[name]().train()


@pytest.mark.parametrize("name", KNOWN)
def test_known_terms_are_added(name):
    model, batch = make(KNOWN, name), make_batch()
    outputs = model(**batch)
    if name == "JetMoe" and outputs.aux_loss is None:  # in older versions of transformers
        pytest.skip("its forward adds no term unless asked for router logits")
    own = outputs.loss
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        ours = task_loss(model, batch)
        none = task_loss(model, without_labels(batch, [0, 1, 2]), num_items=9)
    assert_same(ours, own, rtol=2e-6)
    assert_same(gradients(ours, model), gradients(own, model), rtol=2e-5)
    assert none > 1e-3  # a term of the model's is not one of the tokens


def test_a_term_is_that_of_the_model_and_not_of_its_configuration(recwarn):
    model, batch = make(KNOWN, "JetMoe"), make_batch()
    model.aux_loss_coef = 0.25
    assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)
    assert len(recwarn) == 0


# ---- what is not known ----


class WithTerm(transformers.LlamaForCausalLM):
    """Adds a term, in training mode only if so configured; passes on what it does not know."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if outputs.loss is not None and (self.training or not self.config.in_training_only):
            outputs.loss = outputs.loss + 5e-4 * self.lm_head.weight.square().sum()
        return outputs


class Fused(transformers.LlamaForCausalLM):
    """Returns no logits where it computes the loss, as with fused kernels; smooths labels."""

    smoothing = 0.0

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):
        outputs = super().forward(input_ids, attention_mask, **kwargs)
        if labels is not None:
            outputs.loss = smoothed(
                outputs.logits, labels, None, kwargs.get("num_items_in_batch"), self.smoothing
            )
            outputs.logits = None
        return outputs


class WithoutItems(transformers.LlamaForCausalLM):
    """Takes no number of items."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, labels=None):
        outputs = super().forward(input_ids, attention_mask, position_ids)
        outputs.loss = None if labels is None else smoothed(outputs.logits, labels)
        return outputs


class TupleOfARouter(transformers.MixtralForCausalLM):
    """Returns a tuple, which does not say what is in it."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).to_tuple()


def tuple_of_a_router():
    config = build("mixtral", router_aux_loss_coef=0.5).config
    # The others are only for classes of its own, in some versions of transformers 5.
    config._experts_implementation = "eager"
    return TupleOfARouter(config)


def smoothing_kernel():
    model = llama(Fused)
    model.smoothing = 0.3
    return model


def cpt():
    model = get_peft_model(
        build(),
        CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=[5, 6, 7, 8],
            cpt_tokens_type_mask=[1, 2, 3, 4],
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=0.8,
        ),
    )
    # It has no gradient; PEFT before 0.18 does not freeze it.
    model.prompt_encoder.default.embedding.requires_grad_(False)
    return model


UNKNOWN = {
    "loss_function": with_loss_function,
    "loss_function inside PEFT": lambda: with_lora(with_loss_function()),
    "term": lambda: llama(WithTerm, in_training_only=False),
    "term in training only": lambda: llama(WithTerm, in_training_only=True),
    "bf16 term": lambda: llama(WithTerm, in_training_only=False).bfloat16(),
    "no logits beside a loss": smoothing_kernel,
    "no number of items": lambda: llama(WithoutItems),
    "router of a tuple": tuple_of_a_router,
    "CPT": cpt,
}


def own_loss(model, batch, **items):
    outputs = model(**batch, **items)
    return outputs[0] if isinstance(outputs, tuple) else outputs.loss


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_loss_that_is_not_known_is_the_models_own(name):
    model, batch = make(UNKNOWN, name), make_batch()
    own = own_loss(model, batch)
    with pytest.warns(UserWarning, match=r"its own loss is .* The task loss is its own") as caught:
        ours = task_loss(model, batch)
    assert len(caught) == 1
    assert torch.equal(ours, own)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert_same(gradients(task_loss(model, batch), model), gradients(own, model))
        # A batch that is left-padded, or has labels at padding, as ever.
        unmasked = make_batch(pad_labels=True)
        assert_same(task_loss(model, unmasked), own, rtol=2e-6)
        items = 40
        part = task_loss(model, batch, num_items=torch.tensor(items))
        nothing = task_loss(model, without_labels(batch, [0, 1, 2]), num_items=items)
    if name == "no number of items":
        assert_same(part, own * 16 / items)
    else:
        assert_same(part, own_loss(model, batch, num_items_in_batch=items), rtol=2e-6)
    assert nothing.isfinite()
    nothing.backward()


def test_micro_batches_of_a_models_own_loss_add_up():
    model, batch = with_loss_function(), make_batch()
    with pytest.warns(UserWarning, match="its own loss"):
        whole = task_loss(model, batch)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    items = torch.tensor(16)
    assert_same(sum(task_loss(model, part, num_items=items) for part in parts), whole, rtol=2e-6)


def test_fused_kernels_that_return_no_logits_are_rebuilt(recwarn):
    model, batch = llama(Fused), make_batch()
    assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)
    assert len(recwarn) == 0


def test_the_loss_is_compared_in_each_mode_and_again_where_it_was_changed(recwarn):
    model, batch = llama(WithTerm, in_training_only=True), make_batch()
    for training, warned in ((False, 0), (True, 1), (False, 1)):
        model.train(training)
        assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)
        assert len(recwarn) == warned
    model = build()
    assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)
    model.loss_function = smoothed
    assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)
    model = build("mixtral", output_router_logits=False, router_aux_loss_coef=0.5)
    task_loss(model, batch)
    model.config.output_router_logits = True
    assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)
    # And an adapter on a model that is known already.
    model = build()
    task_loss(model, batch)
    model = get_peft_model(model, AdaLoraConfig(task_type="CAUSAL_LM", total_step=9))
    assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)


class LeavesNoLogits(transformers.LlamaForCausalLM):
    """Fuses head and loss where labels are given, as Unsloth's and Liger's models do."""

    left: Any = None

    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            outputs.logits = self.left
        return outputs


class EmptyLogits:
    """In the place of logits: every use raises."""

    def __getattr__(self, name: str) -> Any:
        def refuse(*_: Any, **__: Any) -> None:
            raise NotImplementedError("logits are empty")

        return refuse


@pytest.mark.parametrize("left", [None, EmptyLogits()], ids=["none", "an object that raises"])
def test_a_fused_loss_that_leaves_no_logits_is_rebuilt(left, recwarn):
    model, batch = llama(LeavesNoLogits), make_batch()
    model.left = left
    assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)
    assert not [w for w in recwarn if "own loss" in str(w.message) or "fails" in str(w.message)]


class FailsWithLabels(transformers.LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        if labels is not None:
            raise NotImplementedError("no loss here")
        return super().forward(*args, **kwargs)


def test_a_loss_that_fails_is_told_once():
    model, batch = llama(FailsWithLabels), make_batch()
    with pytest.warns(UserWarning, match=r"fails with labels \(no loss here\)") as caught:
        ours = task_loss(model, batch)
        assert torch.equal(task_loss(model, batch), ours)
    assert len(caught) == 1
    assert_same(ours, build().float()(**batch).loss, rtol=2e-6)


# ---- the log-probabilities ----


class ByPosition(transformers.LlamaForCausalLM):
    """Treats its logits by how many of them there are, which one position does not show."""

    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, **kwargs)
        length = outputs.logits.shape[1]
        outputs.logits = outputs.logits * torch.linspace(1, 3 - 2 / length, length)[:, None]
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, VOCABULARY, **kwargs)
        return outputs


@pytest.mark.parametrize("training", [False, True])
def test_log_probs_are_those_of_the_models_own_logits_at_all_positions(training):
    model = llama(ByPosition, initializer_range=0.3).train(training)
    batch = make_batch((9, 9, 9))
    with pytest.warns(UserWarning, match="of its own logits at all positions") as caught:
        ours = response_log_probs(model, batch)
    assert len(caught) == 1
    assert_same(ours, explicit_log_probs(model, batch, "sum"), rtol=2e-6)
    assert_same(task_loss(model, batch), model(**batch).loss, rtol=2e-6)


class SharpInTraining(transformers.LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if self.training:
            outputs.logits = 1.5 * outputs.logits
        return outputs


def test_the_head_is_tested_in_each_mode():
    model, batch = llama(SharpInTraining, initializer_range=0.3), make_batch()
    model.eval()
    assert_same(response_log_probs(model, batch), explicit_log_probs(model, batch, "sum"))
    model.train()
    with pytest.warns(UserWarning, match="differ by up to 32"):
        ours = response_log_probs(model, batch)
    assert_same(ours, explicit_log_probs(model, batch, "sum"), rtol=2e-6)


# ---- which batches, which losses ----


@pytest.mark.parametrize("where", ["lm_head", "q_proj", "attention"])
def test_dropout_is_no_difference(where, recwarn):
    model = build(initializer_range=0.3, attention_dropout=0.5)
    if where != "attention":
        config = LoraConfig(target_modules=[where], lora_dropout=0.5, init_lora_weights=False)
        model = get_peft_model(build(), config)
    recwarn.clear()  # of what PEFT says
    task_loss(model.train(), make_batch(), pack=False)
    assert [w for w in recwarn if w.category is UserWarning] == []


def test_batches_with_further_tensors_are_compared_as_they_are():
    class Images(transformers.LlamaForCausalLM):
        def forward(self, input_ids, *args, pixel_values, labels=None, **kwargs):
            assert len(pixel_values) == len(input_ids)
            outputs = super().forward(input_ids, *args, labels=labels, **kwargs)
            if labels is not None:
                outputs.loss = outputs.loss + pixel_values.mean()
            return outputs

    model, batch = llama(Images), make_batch()
    batch["pixel_values"] = torch.ones(3, 2)
    with pytest.warns(UserWarning, match="its own loss is 5.* is 4"):
        ours = task_loss(model, batch)
    assert torch.equal(ours, model(**batch).loss)


def test_the_safety_losses_do_not_take_the_models_own_loss():
    model, batch, rejected = with_loss_function(), make_batch(), make_batch(seed=1)
    with pytest.warns(UserWarning, match="The task loss is its own") as caught:
        ours = contrastive_loss(model, batch, rejected)
    assert len(caught) == 1
    assert_same(ours, contrastive_loss(build(), batch, rejected), rtol=2e-6)
