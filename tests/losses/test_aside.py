import pytest
import torch
import transformers
from torch import nn

from sap_fast.losses import task_loss
from tests.losses.helpers import assert_same, llama, make_batch, with_loss_function


class WithStatistics(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.seen = nn.BatchNorm1d(config.hidden_size)
        self.register_buffer("last", torch.zeros(1))

    def forward(self, input_ids, *args, **kwargs):
        self.seen(self.model.embed_tokens(input_ids).flatten(0, 1))
        self.last = self.last + input_ids.max()
        return super().forward(input_ids, *args, **kwargs)


def test_statistics_modes_and_random_numbers_are_put_back():
    model, batch = llama(WithStatistics, attention_dropout=0.5).train(), make_batch()
    model.model.layers[1].eval()
    model.lm_head.eval()
    model.gradient_checkpointing_enable()
    other = llama(WithStatistics, attention_dropout=0.5).train()
    other.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    other(**batch)
    expected, after = dict(other.named_buffers()), torch.get_rng_state()
    kept = {name: id(buffer) for name, buffer in model.seen.named_buffers()}
    torch.manual_seed(3)
    task_loss(model, batch, pack=False)
    assert torch.equal(torch.get_rng_state(), after)
    assert [module.training for module in model.modules()] == modes
    assert model.is_gradient_checkpointing
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name
    assert {name: id(buffer) for name, buffer in model.seen.named_buffers()} == kept


def test_compiled_models_are_not_traced_for_it():
    traced, shapes = [], set()

    def backend(graph, inputs):
        traced.append(graph)
        shapes.update(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor))
        return graph.forward

    plain, batch = with_loss_function().train(), make_batch()
    model = torch.compile(plain, backend=backend)
    with pytest.warns(UserWarning):
        task_loss(model, batch)
    with_labels = len(traced)
    assert with_labels > 0
    assert (3, 12) in shapes and (2, 8) not in shapes
    task_loss(model, batch)
    assert len(traced) == with_labels
    assert_same(task_loss(model, batch), plain(**batch).loss, rtol=2e-6)
