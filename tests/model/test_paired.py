"""Both probe passes as one of twice the rows find what two find."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from sap_fast import FusedSAP, ProbeSet, task_loss
from sap_fast.model.layers import find_decoder_layers
from tests.oracle import cosine, naive_task_loss, oracle_estimate
from tests.tiny import (
    HIDDEN,
    Batch,
    Problem,
    assert_same_bits,
    assert_unchanged,
    distance,
    problem,
    random_batch,
    safety,
    safety_loss,
    snapshot,
    tiny_llama,
    with_lora,
)

Loss = Callable[[nn.Module, Batch], Tensor]


def naive(model: nn.Module, batch: Batch) -> Tensor:
    return naive_task_loss(model, batch)


def adapted(dtype: torch.dtype = torch.float64, dropout: float = 0.0, **options: Any) -> Problem:
    """A problem whose LoRA has dropout, and goes through packing."""
    case = problem(dtype=dtype, dropout=dropout, **options)
    case.model.config._attn_implementation = "sdpa"
    case.batch["input_ids"][:, :6] = case.batch["input_ids"][0, :6]  # so that packing pays
    return case


def found(
    case: Problem,
    passes: str,
    loss: Loss = naive,
    batch: Any = None,
    seed: int = 3,
    **probe: Any,
) -> tuple[FusedSAP, list[Tensor]]:
    """A step without an update; the optimizer and the task gradients."""
    settings: dict[str, Any] = {"rho": 1e-3, "size": 0.05, "passes": passes} | probe
    optimizer = FusedSAP(case.trained, ProbeSet(case.model, [1, 2], **settings), lr=0.0)

    def task(part: Any) -> Tensor:
        losses = [loss(case.model, one) for one in (part if isinstance(part, list) else [part])]
        for one in losses:
            one.backward()
        return torch.stack(losses).sum().detach()

    torch.manual_seed(seed)
    optimizer.step(task, partial(safety, case), case.batch if batch is None else batch)
    return optimizer, [p.grad.clone() for p in case.trained if p.grad is not None]


def assert_equal(case: Callable[[], Problem], limit: float, **how: Any) -> None:
    """One pass finds what two find: h, V, task gradients, scales, and the random state behind."""
    results = []
    for passes in ("two", "paired"):
        optimizer, gradients = found(case(), passes, **how)
        probes = optimizer.probes
        assert probes is not None
        h, scales = probes.estimates, probes.scales
        results.append((h, scales, gradients, optimizer.metrics, torch.get_rng_state()))
    two, paired = results
    for index, h in two[0].items():
        assert distance([paired[0][index]], [h]) < limit and h.norm() > 0
        assert distance([paired[1][index]], [two[1][index]]) < limit
    assert distance(paired[2], two[2]) < limit
    assert paired[3].perturbation_applied == pytest.approx(two[3].perturbation_applied, rel=1e-6)
    assert torch.equal(paired[4], two[4])


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("loss", [naive, task_loss], ids=["full logits", "packed"])
def test_h_is_that_of_two_passes_in_fp64(loss: Loss, dropout: float) -> None:
    assert_equal(lambda: adapted(dropout=dropout), 1e-8, loss=loss)


@pytest.mark.parametrize(
    "how",
    [
        {"rows": 0.5},
        {"batch": [random_batch(2, seed=1), random_batch(3, seed=2)]},
        {"checkpointing": "layers"},
        {"batch": random_batch(1, seed=5)},
    ],
    ids=["rows", "micro-batches", "checkpointing", "one row"],
)
def test_h_is_that_of_two_passes_however_they_run(how: dict[str, Any]) -> None:
    assert_equal(lambda: adapted(dropout=0.3), 1e-8, loss=task_loss, **how)


def test_h_is_the_oracle() -> None:
    case = adapted()
    case.model.config._attn_implementation = "eager"
    optimizer, _ = found(case, "paired", rho="auto")
    probes = optimizer.probes
    assert probes is not None and optimizer.passes.calibration is not None
    exact = oracle_estimate(
        lambda: naive_task_loss(case.model, case.batch),
        lambda: safety_loss(case),
        case.trained,
        probes.modules,
        (HIDDEN,),
    )
    assert cosine(probes.estimates, exact) > 0.999999


def with_head(case: Problem) -> Problem:
    """LoRA on the head too, which is outside of the decoder and runs by halves."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "lm_head"], lora_dropout=0.2)
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(attention="sdpa").double(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return case._replace(model=model.double().train())


def test_what_is_trained_outside_of_the_decoder_runs_by_halves() -> None:
    assert_equal(lambda: with_head(problem()), 1e-8)


@pytest.mark.parametrize("autocast", [False, True])
def test_h_is_that_of_two_passes_to_rounding(autocast: bool) -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return task_loss(model, batch)

    estimates = []
    for passes in ("two", "paired"):
        # ρ of bf16: below it, rounding is most of h.
        optimizer, _ = found(adapted(torch.float32), passes, loss, rho=0.05 if autocast else 1e-2)
        assert optimizer.probes is not None
        estimates.append(optimizer.probes.estimates)
    assert cosine(*estimates) > (0.98 if autocast else 0.9999)


def test_the_decoder_runs_once_and_the_head_twice() -> None:
    case = adapted(torch.float32)
    runs: list[int] = []
    causal_lm = case.model.get_base_model()

    def noted(module: nn.Module, args: Any) -> None:
        runs.append(len(args[0]))

    noted.reads_no_rows = True  # type: ignore[attr-defined]
    causal_lm.model.layers[0].register_forward_pre_hook(noted)
    causal_lm.lm_head.register_forward_pre_hook(noted)
    found(case, "paired")
    rows = len(case.batch["input_ids"])
    # The safety pass has two batches here; then the probe passes, and the task pass.
    assert runs[4:] == [2 * rows, rows, rows, rows, rows]


@pytest.mark.parametrize("at", ["layer", "head", "second", "backward"])
def test_an_error_leaves_nothing_behind(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = adapted(torch.float32, dropout=0.2)
    optimizer = FusedSAP(case.trained, ProbeSet(case.model, [1, 2], rho=1e-3, passes="paired"))
    causal_lm, calls, trained = case.model.get_base_model(), [0], case.trained

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    def task(part: Any) -> Tensor:
        calls[0] += 1
        if at == "second" and calls[0] == 2:
            fail()
        loss = naive_task_loss(case.model, case.batch)
        loss.backward()
        return loss

    before = snapshot(case.model)
    inside = {"layer": causal_lm.model.layers[2].mlp, "head": causal_lm.lm_head}.get(at)
    if inside is not None:
        forward = type(inside).forward

        def failing(self: nn.Module, *args: Any) -> Any:
            if self is inside and not trained[0].requires_grad:
                fail()
            return forward(self, *args)

        monkeypatch.setattr(type(inside), "forward", failing)
    if at == "backward":
        monkeypatch.setattr(torch.autograd, "backward", fail_from_inside(fail))
    with pytest.raises(KeyboardInterrupt):
        optimizer.inner_passes(task, partial(safety, case))
    monkeypatch.undo()
    assert_unchanged(case.model, before)
    # And the next step is as ever.
    optimizer.inner_passes(lambda part: _ran(case), partial(safety, case))


def fail_from_inside(fail: Callable[..., None]) -> Callable[..., None]:
    """`torch.autograd.backward` of the decoder alone: that of `Tensor.backward` goes on."""
    original = torch.autograd.backward

    def backward(tensors: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(tensors, Tensor) and tensors.dim() == 3:
            fail()
        original(tensors, *args, **kwargs)

    return backward


def _ran(case: Problem) -> Tensor:
    loss = naive_task_loss(case.model, case.batch)
    loss.backward()
    return loss


# ---- what cannot be paired ----


def of_model(model: nn.Module) -> Problem:
    return problem()._replace(model=model)


def lora(model: nn.Module, **options: Any) -> nn.Module:
    config = LoraConfig(r=4, **({"target_modules": ["q_proj", "v_proj"]} | options))
    return get_peft_model(model, config).train()


def two_adapters() -> nn.Module:
    model = lora(tiny_llama())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model


def with_dropout_module() -> nn.Module:
    model = with_lora(tiny_llama())
    model.get_base_model().model.layers[0].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.1))
    return model.train()


def with_batch_norm() -> nn.Module:
    model = with_lora(tiny_llama())
    model.get_base_model().model.layers[0].mlp.act_fn = nn.BatchNorm1d(12)
    return model.train()


def with_attention_dropout() -> nn.Module:
    model = with_lora(tiny_llama())
    model.config.attention_dropout = 0.1
    return model


def with_experts() -> nn.Module:
    model = with_lora(tiny_llama())
    model.config.num_local_experts = 4
    return model


def with_stranger() -> nn.Module:
    model = with_lora(tiny_llama())
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: None)
    return model


def compiled() -> nn.Module:
    model = with_lora(tiny_llama())
    model.get_base_model().model.layers[0].compile(backend="eager")
    return model


def disabled() -> nn.Module:
    model = with_lora(tiny_llama())
    model.get_base_model().model.layers[0].self_attn.q_proj.merge()
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "full": (tiny_llama, "embed_tokens.weight is trained, and is no matrix of a plain LoRA"),
    "a norm": (
        lambda: lora(tiny_llama(), modules_to_save=["norm"]),
        "modules_to_save.default.weight is trained, and is no matrix of a plain LoRA layer",
    ),
    "DoRA": (lambda: lora(tiny_llama(), use_dora=True), "is DoraLinearVariant, no plain LoRA"),
    "bias": (lambda: lora(tiny_llama(), lora_bias=True), "has a bias in its adapter"),
    "two": (two_adapters, r"has the active adapters \['default', 'other'\]"),
    "merged": (disabled, "merged: True"),
    "dropout": (with_dropout_module, r"act_fn\.1 draws dropout masks \(p=0\.1\)"),
    "statistics": (with_batch_norm, "takes statistics of the batch"),
    "attention": (with_attention_dropout, r"attention_dropout=0\.1 in its configuration"),
    "experts": (with_experts, "it has experts"),
    "a hook": (with_stranger, "the hook <lambda> on .* may read rows"),
    "compiled": (compiled, "is compiled"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_paired_is_refused_by_name(name: str) -> None:
    build, message = REFUSED[name]
    torch.manual_seed(0)
    case = of_model(build())
    before = snapshot(case.model)
    optimizer = FusedSAP(case.trained, ProbeSet(case.model, [1, 2], rho=1e-3, passes="paired"))
    probes = optimizer.probes
    assert probes is not None
    with pytest.raises(ValueError, match=rf'passes="paired": .*{message}.*; use passes="two"'):
        probes.paired_adapters(case.batch)
    probes.passes = "auto"
    assert probes.paired_adapters(case.batch) == ()
    probes.detach()
    assert_same_bits(before["parameters"], snapshot(case.model)["parameters"])


def test_evaluation_mode_draws_nothing_that_could_differ() -> None:
    case = of_model(with_attention_dropout().eval())
    probes = ProbeSet(case.model, [1, 2], passes="paired")
    assert len(probes.paired_adapters(case.batch)) == 8


def test_a_pair_is_of_central_differences() -> None:
    with pytest.raises(ValueError, match=r'passes="paired" with difference=.forward.'):
        ProbeSet(with_lora(tiny_llama()), passes="paired", difference="forward")
    with pytest.raises(ValueError, match="passes='three' is not known; choose one of two, paired"):
        ProbeSet(tiny_llama(), passes="three")  # type: ignore[arg-type]


def test_a_task_that_runs_on_something_else_is_an_error() -> None:
    case = adapted(torch.float32)
    optimizer = FusedSAP(case.trained, ProbeSet(case.model, [1, 2], rho=1e-3, passes="paired"))
    batches = [case.batch, random_batch(2)]

    def task(_: Any) -> Tensor:
        loss = naive_task_loss(case.model, batches.pop(0))
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match=r"the task ran on \(2, 12\) tokens after \(3, 12\)"):
        optimizer.inner_passes(task, partial(safety, case))


@pytest.mark.parametrize("base", ["nf4", "torchao int8"])
def test_a_quantized_base_is_paired_where_no_more_is_held_than_for_a_task_pass(base: str) -> None:
    from tests.quantized import on_base

    case = on_base(base)
    batch = random_batch(4, seed=4)
    runs: list[int] = []
    estimates = []
    for passes in ("two", "auto"):
        probes = ProbeSet(case.model, [1, 2], rho=1e-2, rows=0.5, passes=passes)
        optimizer = FusedSAP(case.trained, probes, lr=0.0)
        layer = find_decoder_layers(case.model)[0][0]
        forward = type(layer).forward

        def noted(self: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self is layer:  # noqa: B023
                runs.append(len(hidden))
            return forward(self, hidden, *args, **kwargs)  # noqa: B023

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(layer), "forward", noted)
            runs.clear()
            optimizer.inner_passes(lambda part: _of_part(case, part), partial(safety, case), batch)
        estimates.append({index: h.clone() for index, h in probes.estimates.items()})
        # Chosen and rejected answers of the safety pass, then the probe passes.
        assert runs == [3, 3, *([2, 2] if passes == "two" else [4])]
        probes.rows = 0.75
        optimizer.passes.begin()
        assert probes.paired_adapters(probes.take_part(batch)) == ()
        probes.detach()
    assert cosine(*estimates) > 0.999
    plain = ProbeSet(adapted(torch.float32).model, [1, 2], rows=0.5, passes="auto")
    assert plain.paired_adapters(plain.take_part(batch)) == ()


def _of_part(case: Problem, part: Batch) -> Tensor:
    loss = naive_task_loss(case.model, part)
    loss.backward()
    return loss
