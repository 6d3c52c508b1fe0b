"""When probes are on, and what they measure."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sap_fast import FusedSAP, ProbeSet, ops
from sap_fast.model.layers import find_decoder_layers
from tests.oracle import naive_task_loss
from tests.tiny import HIDDEN, problem, safety, task, tiny_llama, with_lora

# ---- when ----


def test_outside_a_step_the_model_is_the_one_without_probes() -> None:
    case, plain = problem(), problem()
    probes = ProbeSet(case.model, layers=[1, 2], size=0.5, rho=1e-3)
    optimizer = FusedSAP(case.trained, probes, lr=0.0)
    optimizer.step(partial(task, case), partial(safety, case))
    assert all(v.norm() > 0 for v in probes.offsets.values())
    ids = case.batch["input_ids"]
    for mode in (True, False):
        case.model.train(mode)
        plain.model.train(mode)
        assert torch.equal(case.model(ids).logits, plain.model(ids).logits)
    settings = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(case.model.generate(ids, **settings), plain.model.generate(ids, **settings))
    assert set(case.model.state_dict()) == set(plain.model.state_dict())


def test_offsets_can_be_read_until_the_next_step_and_are_in_no_state() -> None:
    case = problem()
    probes = ProbeSet(case.model, layers=[1], rho=1e-3)
    optimizer = FusedSAP(case.trained, probes)
    found: list[dict[int, Tensor]] = []

    def looks_back() -> Tensor:
        found.append(dict(probes.offsets))
        return safety(case)

    for _ in range(2):
        optimizer.step(partial(task, case), looks_back)
        assert probes.offsets[1].norm() > 0
    assert found == [{}, {}]
    saved = [x for x in tree_leaves(optimizer.state_dict()) if isinstance(x, Tensor)]
    assert len(saved) > 3 * len(case.trained)
    assert not any(torch.equal(x, probes.offsets[1]) for x in saved if x.shape == (HIDDEN,))


def test_inside_the_task_pass_the_offsets_are_added() -> None:
    case = problem()
    probes = ProbeSet(case.model, layers=[1], size=0.5, rho=1e-3)
    optimizer = FusedSAP(case.trained, probes, lr=0.0)
    outputs: list[Tensor] = []
    optimizer.inner_passes(partial(task, case), partial(safety, case))
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
    probes.offsets = {j: 0.1 * torch.randn(HIDDEN, generator=generator) for j in (1, 2)}

    def gradients() -> list[Tensor]:
        with probes.active(inject=True):
            return list(torch.autograd.grad(naive_task_loss(case.model, case.batch), case.trained))

    calls: list[Any] = []
    inject = ops.probe_inject
    monkeypatch.setattr(ops, "probe_inject", lambda *a, **k: (calls.append(a), inject(*a, **k))[1])
    in_place = gradients()
    assert not calls
    monkeypatch.setattr("sap_fast.model.probes._may_be_written", lambda *_: False)
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
    probes.offsets = {0: torch.ones(4)}
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
    passes = FusedSAP(case.trained, ProbeSet(case.model, layers=[2], rho=1e-3)).passes
    graph_reaches: list[bool] = []

    def below(module: nn.Module, args: Any, output: Tensor) -> None:
        graph_reaches.append(output.requires_grad)

    def inspected(part: None) -> Tensor:
        nodes: set[Any] = set()
        loss = naive_task_loss(case.model, case.batch)
        collect(loss.grad_fn, nodes)
        leaves = [n for n in nodes if type(n).__name__ == "AccumulateGrad"]
        # The graph ends at the probe: no weight and no embedding is a leaf of it.
        assert all(leaf.variable.numel() == 0 for leaf in leaves)
        loss.backward()
        return loss

    passes.safety_pass(partial(safety, case))
    find_decoder_layers(case.model)[0][1].register_forward_hook(below)
    trained = case.trained
    passes.probe_passes(inspected)
    assert len(graph_reaches) == 2
    if not input_requires_grad:
        assert graph_reaches == [False, False]
    assert case.trained == trained


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
        probes = ProbeSet(case.model, layers=[1, 2], size=0.05, rho=1e-3)
        optimizer = FusedSAP(case.trained, probes)
        torch.manual_seed(4)
        optimizer.step(partial(task, case), partial(safety, case))
        estimates.append((probes.estimates, [p.detach() for p in case.trained]))
    for index in (1, 2):
        assert torch.equal(estimates[0][0][index], estimates[1][0][index])
    for a, b in zip(estimates[0][1], estimates[1][1], strict=True):
        assert torch.equal(a, b)


# ---- what ----


def test_an_ordinary_token_is_the_median_over_what_is_not_padding() -> None:
    case = problem()
    probes = ProbeSet(case.model, layers=[1], rho=1e-6)
    passes = FusedSAP(case.trained, probes, lr=0.0).passes
    hidden: list[Tensor] = []

    def spike(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # A first token of massive activations, and padding of any size.
        changed = output.clone()
        changed[:, 0] *= 1000
        changed = torch.where(case.batch["attention_mask"][..., None] == 0, 1e4, changed)
        hidden.append(changed.detach())
        return changed

    passes.safety_pass(partial(safety, case))
    probes.modules[1].register_forward_hook(spike, prepend=True)
    passes.probe_passes(partial(task, case))
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
    probes = ProbeSet(case.model, layers=[1], rho=1e-3)
    optimizer = FusedSAP(case.trained, probes)
    optimizer.step(partial(task, case), partial(safety, case))
    assert optimizer.metrics.skipped_steps == 0
    assert probes.offsets[1].norm() > 0


def test_a_model_with_probes_can_be_pickled() -> None:
    case = problem()
    probes = ProbeSet(case.model)
    model, twin = pickle.loads(pickle.dumps((case.model, probes)))
    assert twin.model is model
    assert twin.modules[1] is find_decoder_layers(model)[0][1]


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("size", -1.0, "size=-1.0 is out of range; give a number ≥ 0"),
        ("size", float("nan"), "size=nan is out of range"),
        ("rho", -0.1, "rho=-0.1 is out of range; give a number ≥ 0"),
        ("rho", "large", "rho='large' is not known; give \"auto\" or a number ≥ 0"),
        (
            "rule",
            "sign",
            "rule='sign' is not known; choose one of normalized, lean, gradient, adam",
        ),
        ("difference", "backward", "difference='backward'.*central, forward"),
        ("checkpointing", "some", "checkpointing='some'.*none, layers, auto"),
    ],
)
def test_settings_out_of_range_are_named(argument: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbeSet(tiny_llama(layers=1), **{argument: value})
