import functools
import importlib
import re
import types

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn.utils import prune

from sap_fast.losses import contrastive_loss, task_loss
from sap_fast.model.probes import ProbeSet
from tests.losses.helpers import (
    BATCHES,
    SYSTEM,
    assert_same,
    batch_of,
    build,
    gradients,
    llama,
    with_lora,
)
from tests.versions import older


def scale(*_):
    return None


def neftune(model):
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    # Until transformers 5.2 it is in `trainer_utils`.
    where = transformers.trainer_utils
    if not hasattr(where, "neftune_post_forward_hook"):
        where = importlib.import_module("transformers.integrations.neftune")
    embeddings.register_forward_hook(where.neftune_post_forward_hook)


def noisy_forward(model):
    """NEFTune as it was before transformers knew it: another forward of the embeddings."""
    embeddings = model.get_input_embeddings()
    original = embeddings.forward

    def forward(tokens):
        output = original(tokens)
        return output + torch.zeros_like(output).uniform_(-1, 1) / output[0].numel() ** 0.5

    embeddings.forward = forward


class EveryModule:
    """A hook on all modules, as profilers and tracers set them."""

    def __call__(self, *_):
        return None


class Row(accelerate.hooks.ModelHook):
    """What reads rows as accelerate lets others do."""


READERS = {
    "NEFTune": (neftune, r"the hook neftune_post_forward_hook on model.embed_tokens \(Embedding\)"),
    "noise in another forward": (noisy_forward, r"forward in the place of the forward of model.em"),
    "a layer's forward": (
        lambda model: setattr(model.model.layers[0], "forward", functools.partial(scale)),
        "scale in the place of the forward of model.layers.0 ",
    ),
    "hook before a layer": (
        lambda model: model.model.layers[1].register_forward_pre_hook(scale),
        r"the hook scale on model.layers.1 \(LlamaDecoderLayer\)",
    ),
    "hook inside a layer": (
        lambda model: model.model.layers[1].mlp.up_proj.register_forward_hook(
            functools.partial(scale, 1)
        ),
        r"the hook scale on model.layers.1.mlp.up_proj \(Linear\)",
    ),
    "gradients of each row": (
        lambda model: model.model.layers[1].mlp.register_full_backward_hook(scale),
        "the hook scale on model.layers.1.mlp ",
    ),
    "gradients of each row's output": (
        lambda model: model.model.layers[1].mlp.register_full_backward_pre_hook(scale),
        "the hook scale on model.layers.1.mlp ",
    ),
    "hook on the body": (
        lambda model: model.model.register_forward_pre_hook(scale, with_kwargs=True),
        "the hook scale on model ",
    ),
    "hook on the model": (
        lambda model: model.register_forward_hook(scale),
        "the hook scale on the model ",
    ),
    "hook of accelerate's, of others": (
        lambda model: accelerate.hooks.add_hook_to_module(
            model.model.layers[0],
            accelerate.hooks.SequentialHook(accelerate.hooks.AlignDevicesHook(), Row()),
        ),
        "the hook Row on model.layers.0 ",
    ),
    "hook in the clothes of torch's": (
        lambda model: model.model.norm.register_forward_hook(
            functools.wraps(torch.nn.functional.relu)(lambda *_: None)
        ),
        "the hook relu on model.norm ",
    ),
    "hook of an object": (
        lambda model: model.model.norm.register_forward_hook(EveryModule()),
        "the hook EveryModule on model.norm ",
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_what_reads_a_row_is_not_given_packed_ones(name, forwards, refused):
    (add, message), model = READERS[name], build().train()
    batch = batch_of(BATCHES["shared prefix"])
    task_loss(model, batch)
    assert forwards == [(1, 43)]  # packed before
    if name == "a layer's forward":
        forward = model.model.layers[0].forward
        model.model.layers[0].forward = functools.partial(call, forward)
        message = message.replace("scale", "call")
    else:
        add(model)
    forwards.clear()
    losses = []
    for pack in (True, True, False):
        torch.manual_seed(1)
        losses.append(task_loss(model, batch, pack=pack))
        contrastive_loss(model, batch, batch, pack=pack)
    assert forwards == []
    assert torch.equal(losses[0], losses[2]) and torch.equal(losses[1], losses[2])
    (told,) = refused()
    assert re.match(rf"LlamaForCausalLM: {message}.* may read rows", told)


def call(forward, *args, **kwargs):
    return forward(*args, **kwargs)


def test_a_hook_on_all_modules_is_not_given_packed_rows(forwards, refused):
    model, batch = build(), batch_of(BATCHES["shared prefix"])
    with torch.nn.modules.module.register_module_forward_hook(scale):
        task_loss(model, batch)
    assert forwards == []
    assert "the hook scale on all modules" in refused()[0]
    task_loss(model, batch)  # and is packed once nothing reads rows any more
    assert forwards == [(1, 43)]


def activated_lora(model):
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "v_proj"],
        alora_invocation_tokens=[SYSTEM[1], SYSTEM[2]],
        init_lora_weights=False,
    )
    return get_peft_model(model, config)


needs_activated_lora = pytest.mark.skipif(older("peft", "0.18"), reason="PEFT has no such LoRA")


@needs_activated_lora
def test_an_activated_lora_is_not_given_packed_rows(forwards, refused):
    batch, plain = batch_of(BATCHES["shared prefix"]), build().train()
    task_loss(plain, batch)
    assert forwards == [(1, 43)]
    forwards.clear()
    model = activated_lora(plain).train()
    own = model(**batch).loss
    ours = task_loss(model, batch)
    assert_same(ours, own, rtol=2e-6)
    assert_same(gradients(ours, model), gradients(own, model))
    assert forwards == []
    assert "an activated LoRA of base_model" in refused()[0]


@needs_activated_lora
def test_the_gradient_checkpointing_of_an_activated_lora_is_not_disturbed(forwards):
    # PEFT leaves hooks on each layer there for the backward pass, and refuses to find them again.
    model, batch = activated_lora(build()).train(), batch_of(BATCHES["shared prefix"])
    model.enable_input_require_grads()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    task_loss(model, batch).backward()


class HooksInForward(transformers.LlamaForCausalLM):
    """Sets hooks for the time of a forward, as PEFT does for the adapters of each row."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, **kwargs):
        with self.model.layers[0].register_forward_pre_hook(scale):
            return super().forward(input_ids, attention_mask, position_ids, **kwargs)


def test_hooks_of_the_forward_alone_are_found(forwards, refused):
    model, batch = llama(HooksInForward).train(), batch_of(BATCHES["shared prefix"])
    for _ in range(2):
        task_loss(model, batch)
    assert forwards == []
    (told,) = refused()
    assert (
        "the hook scale on model.layers.0 (LlamaDecoderLayer), there in the forward alone" in told
    )


# ---- what does not ----


def on_accelerate(model):
    hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu")
    accelerate.hooks.add_hook_to_module(model.model.layers[0], hook)
    return model


def with_probes(model):
    ProbeSet(model, [0])
    return model


def with_inputs_that_require_gradients(model):
    model.enable_input_require_grads()
    return model


def with_inputs_of_peft(model):
    model.is_loaded_in_8bit = False
    model.get_input_embeddings().register_forward_hook(make_inputs_require_grad)
    return model


def make_inputs_require_grad(module, args, output):
    output.requires_grad_(True)


def with_disabled_adapter(model):
    model = with_lora(model)
    with model.disable_adapter():
        pass
    return model


def with_an_observer(model):
    def observe(*_):
        pass

    observe.reads_no_rows = True
    model.model.layers[0].register_forward_hook(functools.partial(observe, 1))
    return model


def with_forward_of_trl(model):
    """Replaces the forward as TRL does for its own loss."""
    code = (lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs)).__code__
    forward = types.FunctionType(code, {"__name__": "trl.trainer.utils", "type": type})
    model.forward = types.MethodType(functools.wraps(type(model).forward)(forward), model)
    return model


def with_its_own_forward(model):
    """As what wrapped it, and was taken off, leaves it."""
    model = with_lora(model)
    model.forward = model.forward
    model.base_model.model.model.forward = model.base_model.model.model.forward
    return model


def pruned(model):
    # As FSDP2 does: methods and objects of torch's.
    prune.identity(model.model.layers[0].mlp.up_proj, "weight")
    return model


BLIND = {
    "accelerate's devices": on_accelerate,
    "accelerate's autocast": lambda model: accelerate.Accelerator(
        cpu=True, mixed_precision="bf16"
    ).prepare(model),
    "probes": with_probes,
    "gradient checkpointing": with_inputs_that_require_gradients,
    "PEFT's gradient checkpointing": with_inputs_of_peft,
    "an adapter switched off": with_disabled_adapter,
    "hidden states kept": lambda model: (
        model(torch.ones(1, 3).long(), output_hidden_states=True) and model
    ),
    "TRL's own forward": with_forward_of_trl,
    "the forward of its class": with_its_own_forward,
    "torch's own": pruned,
    "a hook that says so": with_an_observer,
}


@pytest.mark.parametrize("name", BLIND)
def test_what_reads_no_row_is_packed_in_training(name, forwards, refused):
    model, batch = BLIND[name](build()).train(), batch_of(BATCHES["shared prefix"])
    loss = task_loss(model, batch)
    assert forwards == [(1, 43)] and refused() == []
    tolerance = 1e-2 if "autocast" in name else 2e-6
    assert_same(loss, task_loss(model, batch, pack=False), rtol=tolerance)
