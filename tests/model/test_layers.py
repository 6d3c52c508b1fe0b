"""Which modules are taken for decoder layers, and which of them are probed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from sap_fast import FusedSAP, ProbeSet, task_loss
from sap_fast.model.layers import find_decoder_layers, find_model, lower_layers
from tests.tiny import HIDDEN, Problem, random_batch, safety, task, tiny_llama, with_lora
from tests.versions import older

MOE = {
    "num_experts": 5,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {},
    "Gemma2": {},
    "Gemma3Text": {},
    "Phi3": {"pad_token_id": 0, "eos_token_id": 1},
    "GPT2": {"eos_token_id": 1, "bos_token_id": 1},
    "GPTNeoX": {},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "Mixtral": MOE,
    "Qwen2Moe": MOE,
    "Qwen3Moe": MOE,
}


def tiny(architecture: str) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{architecture}Config")(
        **{
            "vocab_size": 128,
            "hidden_size": HIDDEN,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 64,
            "initializer_range": 0.1,
            "attn_implementation": "eager",
        }
        | ARCHITECTURES[architecture]
    )
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_runs_on_every_architecture_plain_and_with_lora(architecture: str) -> None:
    # PEFT 0.19 takes "all-linear" for a list of letters, with the experts of transformers 5.
    letters = not older("peft", "0.19") and older("peft", "0.20")
    names = ["q_proj", "v_proj"]
    targets: Any = names if letters and architecture in ("Mixtral", "Qwen3Moe") else "all-linear"
    for lora in (False, True):
        model = tiny(architecture)
        stack, owner = find_decoder_layers(model)
        assert len(stack) == 4
        assert stack in list(owner.children())
        if lora:
            model = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
            assert find_decoder_layers(model)[0] is stack
        batches = (random_batch(seed=seed) for seed in (1, 2, 3))
        case = Problem(model.train(), *batches)
        probes = ProbeSet(model, rho=1e-2)
        assert probes.layers == (0, 1)
        optimizer = FusedSAP(case.trained, probes, lr=1e-3)
        optimizer.step(partial(task, case), partial(safety, case))
        assert optimizer.metrics.skipped_steps == 0
        for index in (0, 1):
            assert probes.estimates[index].shape == (HIDDEN,)
            assert probes.estimates[index].norm() > 0
            # Every architecture's mask reaches the measure of ordinary tokens.
            assert optimizer.metrics.probe_sizes[index] == pytest.approx(3e-3, rel=1e-4)


@pytest.mark.parametrize(
    ("depth", "early", "middle"),
    [
        (1, range(1), range(1)),
        (2, range(2), range(1, 2)),
        (12, range(5), range(4, 9)),
        (30, range(1, 10), range(10, 20)),
        (32, range(1, 11), range(11, 21)),
    ],
)
def test_named_layers_are_scaled_to_the_depth(depth: int, early: range, middle: range) -> None:
    model = tiny_llama(layers=depth)
    assert ProbeSet(model).layers == ProbeSet(model, "early").layers == tuple(early)
    assert ProbeSet(model, "middle").layers == tuple(middle)


def test_layers_by_index_and_by_module() -> None:
    model = tiny_llama()
    assert ProbeSet(model, layers=[-1, 0, 0]).layers == (0, 3)
    stack = model.model.layers
    probes = ProbeSet(model, layers=[stack[2], stack[3]])
    assert probes.layers == (0, 1)
    assert probes.modules == {0: stack[2], 1: stack[3]}


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([4], "4 is out of range for a model of 4 layers"),
        ([-5], "-5 is out of range"),
        ([], "probes nothing"),
        ("all", "layers='all' is not known"),
        ([1.5], "mixes kinds"),
        ([nn.Linear(1, 1)], r"layers\[0\] \(Linear\) is not a module of the model"),
    ],
)
def test_layers_that_are_not_there_are_named(layers: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeSet(tiny_llama(), layers=layers)


def test_a_model_of_unknown_structure_asks_for_modules() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no num_hidden_layers.*layers=\[module, …\]"):
        ProbeSet(model)
    probes = ProbeSet(model, layers=[model[0]], rho=1e-3)
    optimizer = FusedSAP(model.parameters(), probes)
    x = torch.randn(3, 4, 2)

    def backward(power: int) -> torch.Tensor:
        loss = model(x).pow(power).mean()
        loss.backward()
        return loss

    optimizer.step(lambda: backward(2), lambda: backward(1))
    assert probes.estimates[0].norm() > 0


def test_two_stacks_of_the_same_depth_are_ambiguous() -> None:
    model = tiny_llama(layers=2)
    model.second = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    with pytest.raises(ValueError, match=r"2 lists of 2 modules, one expected.*second"):
        ProbeSet(model)


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_an_encoder_decoder_is_refused_by_name(kind: str) -> None:
    shape = {"vocab_size": 128, "d_model": 32, "num_layers": 2, "num_decoder_layers": 3}
    shape |= {"encoder_layers": 2, "decoder_layers": 3, "num_heads": 4, "d_kv": 8}
    config = getattr(transformers, f"{kind}Config")(**shape)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
    with pytest.raises(ValueError, match=f"{kind}ForConditionalGeneration is an encoder-decoder"):
        ProbeSet(model)
    with pytest.raises(ValueError, match=f"{kind}ForConditionalGeneration is an encoder-decoder"):
        task_loss(model, random_batch())


def test_the_lower_layers_are_those_up_to_the_lowest_probe() -> None:
    model = with_lora(tiny_llama())
    stack, _ = find_decoder_layers(model)
    assert lower_layers(model, stack[1]) == [stack[0], stack[1]]
    # Where their order is not known, and where the loss reads the routers of all of them.
    assert lower_layers(model, stack[1].mlp) == []
    assert lower_layers(nn.Sequential(nn.Linear(1, 1)), stack[1]) == []
    mixture = tiny("Mixtral")
    lowest = find_decoder_layers(mixture)[0][0]
    assert lower_layers(mixture, lowest) == [lowest]
    mixture.config.output_router_logits = True
    assert lower_layers(mixture, lowest) == []


def test_the_model_of_parameters_is_the_outermost_module_that_holds_them_all() -> None:
    model, other = with_lora(tiny_llama(layers=2)), tiny_llama(layers=2)
    assert find_model(p for p in model.parameters() if p.requires_grad) is model
    wrapped = nn.ModuleDict({"model": model})
    assert find_model(model.parameters()) is wrapped
    assert find_model([*model.parameters(), *other.parameters()]) is None
