"""Where probes live, when they are on, and what they measure."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.optimizer import FusedSAP
from sap_fast.probes import ProbeSet, find_decoder_layers
from tests.oracle import naive_task_loss
from tests.tiny import HIDDEN, Problem, problem, random_batch, safety, task, tiny_llama, with_lora

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


# ---- where ----


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_step_runs_on_every_architecture_plain_and_with_lora(architecture: str) -> None:
    for lora in (False, True):
        model = tiny(architecture)
        stack, owner = find_decoder_layers(model)
        assert len(stack) == 4
        assert stack in list(owner.children())
        if lora:
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
            assert find_decoder_layers(model)[0] is stack
        batches = (random_batch(seed=seed) for seed in (1, 2, 3))
        case = Problem(model.train(), *batches)
        probes = ProbeSet(model)
        assert probes.layers == (0, 1)
        optimizer = FusedSAP(case.trained, probes, lr=1e-3, rho=1e-2)
        optimizer.step(lambda case=case: task(case), lambda case=case: safety(case))
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
    with pytest.raises(ValueError, match="shape='row'"):
        ProbeSet(model, layers=[model[0]], shape="row")
    probes = ProbeSet(model, layers=[model[0]])
    optimizer = FusedSAP(model.parameters(), probes, rho=1e-3)
    x = torch.randn(3, 4, 2)
    optimizer.step(lambda: backward(model(x).square().mean()), lambda: backward(model(x).mean()))
    assert probes.estimates[0].norm() > 0


def backward(loss: Tensor) -> Tensor:
    loss.backward()
    return loss


def test_two_stacks_of_the_same_depth_are_ambiguous() -> None:
    model = tiny_llama(layers=2)
    model.second = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
    with pytest.raises(ValueError, match=r"2 lists of 2 modules, one expected.*second"):
        ProbeSet(model)


# ---- when ----


def test_outside_a_step_the_model_is_the_one_without_probes() -> None:
    case, plain = problem(), problem()
    probes = ProbeSet(case.model, layers=[1, 2])
    optimizer = FusedSAP(case.trained, probes, lr=0.0, rho=1e-3, probe_lr=0.5)
    optimizer.step(lambda: task(case), lambda: safety(case))
    assert all(v.norm() > 0 for v in probes.offsets.values())
    ids = case.batch["input_ids"]
    for mode in (True, False):
        case.model.train(mode)
        plain.model.train(mode)
        assert torch.equal(case.model(ids).logits, plain.model(ids).logits)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(case.model.generate(ids, **settings), plain.model.generate(ids, **settings))
    assert set(case.model.state_dict()) == set(plain.model.state_dict())


def test_inside_the_task_pass_the_offsets_are_added() -> None:
    case = problem()
    probes = ProbeSet(case.model, layers=[1])
    optimizer = FusedSAP(case.trained, probes, lr=0.0, rho=1e-3, probe_lr=0.5)
    outputs: list[Tensor] = []
    with optimizer.safety_pass():
        safety(case)
    for _ in optimizer.probe_passes():
        task(case)
    handle = probes.modules[1].register_forward_hook(lambda m, a, out: outputs.append(out))
    naive_task_loss(case.model, case.batch)
    with optimizer.task_pass():
        task(case)
    handle.remove()
    torch.testing.assert_close(outputs[1] - outputs[0], probes.offsets[1].expand_as(outputs[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_are_added_in_place_where_autograd_allows(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = problem(dtype=dtype, lora=False)
    probes = ProbeSet(case.model, layers=[1, 2])
    generator = torch.Generator().manual_seed(0)
    probes.load_state_dict({j: 0.1 * torch.randn(HIDDEN, generator=generator) for j in (1, 2)})

    def gradients() -> list[Tensor]:
        with probes.active(inject=True):
            return list(torch.autograd.grad(naive_task_loss(case.model, case.batch), case.trained))

    calls: list[Any] = []
    inject = ops.probe_inject
    monkeypatch.setattr(ops, "probe_inject", lambda *a, **k: (calls.append(a), inject(*a, **k))[1])
    in_place = gradients()
    assert not calls
    monkeypatch.setattr("sap_fast.probes._may_be_written", lambda *_: False)
    apart = gradients()
    assert len(calls) == 2
    assert all(torch.equal(a, b) for a, b in zip(in_place, apart, strict=True))


class EndsInTanh(nn.Module):
    """A layer whose result autograd saves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


@pytest.mark.parametrize("layer", [EndsInTanh(), nn.Identity(), nn.Unflatten(-1, (4,))], ids=repr)
def test_hidden_states_that_others_hold_are_not_written(layer: nn.Module) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.probed = nn.Linear(4, 4), layer

        def forward(self, x: Tensor) -> Tensor:
            before = x + self.first(x)
            return (self.probed(before) * before.sigmoid() * before).sum()

    model = Model()
    probes = ProbeSet(model, layers=[layer])
    probes.load_state_dict({0: torch.ones(4)})
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    before = x + model.first(x)
    expected = ((layer(before) + 1) * before.sigmoid() * before).sum()
    with probes.active(inject=True):
        loss = model(x)
    torch.testing.assert_close(loss, expected)
    wanted = torch.autograd.grad(expected, list(model.first.parameters()))
    for ours, exact in zip(
        torch.autograd.grad(loss, list(model.first.parameters())), wanted, strict=True
    ):
        torch.testing.assert_close(ours, exact)


def test_detach_removes_every_hook() -> None:
    model = with_lora(tiny_llama())
    before = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    probes = ProbeSet(model)
    during = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    assert during != before
    probes.detach()
    after = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()]
    assert after == before


@pytest.mark.parametrize("input_requires_grad", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_the_probe_passes_store_nothing_below_the_lowest_probe(
    lora: bool, input_requires_grad: bool
) -> None:
    case = problem(lora=lora)
    if input_requires_grad:  # what gradient checkpointing with PEFT does
        case.model.enable_input_require_grads()
    probes = ProbeSet(case.model, layers=[2])
    optimizer = FusedSAP(case.trained, probes, rho=1e-3)
    graph_reaches: list[bool] = []

    def below(module: nn.Module, args: Any, output: Tensor) -> None:
        graph_reaches.append(output.requires_grad)

    stack = find_decoder_layers(case.model)[0]
    with optimizer.safety_pass():
        safety(case)
    stack[1].register_forward_hook(below)
    for _ in optimizer.probe_passes():
        nodes: set[Any] = set()
        loss = naive_task_loss(case.model, case.batch)
        collect(loss.grad_fn, nodes)
        leaves = [n for n in nodes if type(n).__name__ == "AccumulateGrad"]
        # The graph ends at the probe: no weight and no embedding is a leaf of it.
        assert all(leaf.variable.numel() == 0 for leaf in leaves)
        loss.backward()
    if not input_requires_grad:
        assert graph_reaches == [False, False]
    assert all(parameter.requires_grad for parameter in optimizer.trained_parameters())


def collect(node: Any, nodes: set[Any]) -> None:
    if node is not None and node not in nodes:
        nodes.add(node)
        for following, _ in node.next_functions:
            collect(following, nodes)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_h(reentrant: bool) -> None:
    estimates = []
    for checkpointing in (False, True):
        case = problem(dropout=0.1)
        if checkpointing:
            case.model.enable_input_require_grads()
            case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        probes = ProbeSet(case.model, layers=[1, 2])
        optimizer = FusedSAP(case.trained, probes, rho=1e-3, probe_lr=0.05)
        torch.manual_seed(4)
        optimizer.step(lambda case=case: task(case), lambda case=case: safety(case))
        estimates.append((probes.estimates, [p.detach() for p in case.trained]))
    for index in (1, 2):
        assert torch.equal(estimates[0][0][index], estimates[1][0][index])
    for a, b in zip(estimates[0][1], estimates[1][1], strict=True):
        assert torch.equal(a, b)


# ---- what ----


def test_an_ordinary_token_is_the_median_over_what_is_not_padding() -> None:
    case = problem()
    probes = ProbeSet(case.model, layers=[1])
    optimizer = FusedSAP(case.trained, probes, lr=0.0, rho=1e-6)
    hidden: list[Tensor] = []

    def spike(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # A first token of massive activations, and padding of any size.
        changed = output.clone()
        changed[:, 0] *= 1000
        changed = torch.where(case.batch["attention_mask"][..., None] == 0, 1e4, changed)
        hidden.append(changed.detach())
        return changed

    with optimizer.safety_pass():
        safety(case)
    probes.modules[1].register_forward_hook(spike, prepend=True)
    for _ in optimizer.probe_passes():
        task(case)
    medians = []
    for states in hidden:
        for row, mask in zip(states, case.batch["attention_mask"].bool(), strict=True):
            rms = row[mask].square().mean(-1).sqrt()
            medians.append(rms.sort().values[(len(rms) - 1) // 2])
    expected = torch.stack(medians).mean()
    torch.testing.assert_close(probes.scales[1], expected, rtol=1e-5, atol=0)
    norm = probes.offsets[1].norm()
    torch.testing.assert_close(norm, 3e-3 * expected * HIDDEN**0.5, rtol=1e-5, atol=0)


def test_a_row_of_padding_alone_does_not_spoil_the_measure() -> None:
    case = problem()
    case.batch["attention_mask"][1] = 0
    case.batch["labels"][1] = -100
    probes = ProbeSet(case.model, layers=[1])
    optimizer = FusedSAP(case.trained, probes, rho=1e-3)
    optimizer.step(lambda: task(case), lambda: safety(case))
    assert optimizer.metrics.skipped_steps == 0
    assert probes.offsets[1].norm() > 0


def test_probes_per_token_have_the_size_of_one_token_each_in_the_mean() -> None:
    case = problem()
    probes = ProbeSet(case.model, layers=[1], shape="token")
    optimizer = FusedSAP(case.trained, probes, rho=1e-3, probe_lr=0.01)
    optimizer.step(lambda: task(case), lambda: safety(case))
    rows, length = case.batch["input_ids"].shape
    assert probes.offsets[1].shape == (rows, length, HIDDEN)
    assert optimizer.metrics.probe_sizes[1] == pytest.approx(0.01, rel=1e-5)


def test_a_probe_per_token_refuses_another_batch() -> None:
    case = problem()
    probes = ProbeSet(case.model, layers=[1], shape="token")
    optimizer = FusedSAP(case.trained, probes, rho=1e-3)
    with optimizer.safety_pass():
        safety(case)
    for _ in optimizer.probe_passes():
        task(case)
    other = case._replace(batch=random_batch(rows=2, length=7))
    with pytest.raises(RuntimeError, match="must see the same micro-batches"):
        with optimizer.task_pass():
            task(other)


def test_offsets_of_other_layers_do_not_load() -> None:
    case = problem()
    first = FusedSAP(case.trained, ProbeSet(case.model, layers=[1]), schedule="lagged", rho=1e-3)
    first.step(lambda: task(case), lambda: safety(case))
    saved = first.state_dict()
    assert list(saved["sap"]["offsets"]) == [1]
    second = FusedSAP(case.trained, ProbeSet(case.model, layers=[2]), schedule="lagged")
    with pytest.raises(ValueError, match=r"layers \[1\], this one \[2\]"):
        second.load_state_dict(saved)


def test_a_model_with_probes_can_be_pickled() -> None:
    case = problem()
    probes = ProbeSet(case.model)
    model, twin = pickle.loads(pickle.dumps((case.model, probes)))
    assert twin.model is model
    assert twin.modules[1] is find_decoder_layers(model)[0][1]
