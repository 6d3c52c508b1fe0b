from types import SimpleNamespace

import pytest
import torch
import transformers
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

from sap_fast.configuration import outer_modules, text_config, text_setting, virtual_tokens
from tests.tiny import tiny_llama


class Holder(nn.Module):
    """Holds a model and has no configuration."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


WRAPPERS = {
    "nothing": lambda model: model,
    "a module without a configuration": Holder,
    "a module whose configuration is None": lambda model: with_config(Holder(model), None),
    "PEFT": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])),
    "PEFT around a module without a configuration": lambda model: get_peft_model(
        Holder(model), LoraConfig(target_modules=["q_proj"])
    ),
    "compiled": lambda model: torch.compile(model, backend="eager"),
}


def with_config(module, config):
    module.config = config
    return module


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_configuration_is_found_inside(wrapper):
    model = tiny_llama(layers=1)
    wrapped = WRAPPERS[wrapper](model)
    assert text_config(wrapped) is model.config
    assert text_setting(wrapped, "hidden_size") == model.config.hidden_size
    assert text_setting(wrapped, "of_no_model") is None


@pytest.mark.parametrize("config", [None, {"hidden_size": 3}])
def test_a_model_without_a_configuration_has_no_settings(config):
    model = with_config(nn.Linear(2, 2), config)
    assert text_config(model) is None
    assert text_setting(model, "hidden_size") is None


def test_a_configuration_that_is_no_transformers_one_is_taken_as_it_is():
    config = SimpleNamespace(hidden_size=3)
    assert text_config(with_config(nn.Linear(2, 2), config)) is config


def test_the_language_half_of_a_multi_modal_model():
    config = transformers.Gemma3Config(text_config={"hidden_size": 24})
    assert text_config(with_config(nn.Linear(2, 2), config)) is config.text_config


def test_the_text_that_is_written_counts_where_text_is_read_too():
    # Without decoder=True transformers says that this is ambiguous.
    config = transformers.PretrainedConfig()
    config.text_encoder = transformers.LlamaConfig(hidden_size=32)
    config.decoder = transformers.LlamaConfig(hidden_size=64)
    assert text_setting(with_config(nn.Linear(2, 2), config), "hidden_size") == 64


def test_modules_around_a_model_are_told_from_those_inside_it():
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    around = nn.ModuleDict({"inner": adapted, "other": nn.Linear(2, 2)})
    kinds = [type(module).__name__ for module in outer_modules(around)]
    assert kinds == ["ModuleDict", "PeftModel", "Linear", "LoraModel", "LlamaForCausalLM"]


@pytest.mark.parametrize("prefix", [True, False])
def test_virtual_tokens_count_while_the_adapter_is_on(prefix):
    config = transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    assert virtual_tokens(model).number == 0
    kind = PrefixTuningConfig if prefix else PromptTuningConfig
    adapted = get_peft_model(model, kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert virtual_tokens(nn.ModuleDict({"inner": adapted})) == (3, not prefix)
    with adapted.disable_adapter():
        assert virtual_tokens(adapted).number == 0


def test_the_decoder_of_an_encoder_decoder():
    config = transformers.BartConfig(decoder_layers=3, encoder_layers=5)
    model = with_config(nn.Linear(2, 2), config)
    assert text_setting(model, "num_hidden_layers") == 3
    assert text_setting(model, "is_encoder_decoder")
