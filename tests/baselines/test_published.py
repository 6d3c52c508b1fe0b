"""The released procedure is what the authors released, with its faults."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sap_fast import BlendedAdamW, ProbeSet, contrastive_loss, task_loss
from sap_fast.baselines import PublishedSAP, PublishedSAPTrainer, published, published_step
from sap_fast.data import SafetyCollator
from sap_fast.model.layers import find_decoder_layers
from tests.oracle import cosine, naive_contrastive_loss, naive_task_loss, oracle_estimate
from tests.tiny import (
    HIDDEN,
    Problem,
    assert_same_bits,
    norm_of,
    problem,
    safety,
    task,
    tiny_llama,
    weights,
)
from tests.trainers import BeforeEachUpdate, arguments, model, trainer_of

LAYERS = [1, 2]
STEPS = 3


def steps_of(case: Problem, update: Callable[[], object], **options: Any) -> ProbeSet:
    """Three steps, each with `update` at its end."""
    probes = ProbeSet(case.model, LAYERS)
    torch.manual_seed(0)
    for _ in range(STEPS):
        run = (case.model, case.trained, probes, lambda: task(case), lambda: safety(case))
        published_step(*run, **options)
        update()
    return probes


def test_it_is_the_released_code() -> None:
    """Held to that code's steps: V is the bias of `down_proj`, and an AdamW of its own moves it."""
    ours, theirs = (problem(dtype=torch.float64, dropout=0.1) for _ in range(2))
    adamw = torch.optim.AdamW(ours.trained, lr=1e-2)
    probes = steps_of(ours, lambda: (adamw.step(), adamw.zero_grad()))

    trained = theirs.trained
    stack = find_decoder_layers(theirs.model)[0]
    biases = [nn.Parameter(torch.zeros(HIDDEN, dtype=torch.float64)) for _ in LAYERS]
    for layer, bias in zip(LAYERS, biases, strict=True):
        stack[layer].mlp.down_proj.bias = bias
    adamw = torch.optim.AdamW(trained, lr=1e-2)
    adamw_of_biases = torch.optim.AdamW(biases, lr=5e-2)
    torch.manual_seed(0)
    for _ in range(STEPS):
        for bias in biases:
            bias.requires_grad_(False)
        safety(theirs)
        unit = [p.grad / (norm_of([q.grad for q in trained]) + 1e-8) for p in trained]
        size = 2e-5 * norm_of([p.detach() for p in trained])
        added = [size * u for u in unit]
        adamw.zero_grad()
        with torch.no_grad():
            for parameter, change in zip(trained, added, strict=True):
                parameter += change
        for bias in biases:
            bias.requires_grad_(True)
        for parameter in trained:
            parameter.requires_grad_(False)
        (-naive_task_loss(theirs.model, theirs.batch)).backward()
        with torch.no_grad():
            for parameter, change in zip(trained, added, strict=True):
                parameter -= change
        for parameter in trained:
            parameter.requires_grad_(True)
        task(theirs)
        adamw.step()
        with torch.no_grad():
            for bias in biases:
                bias.zero_()
        adamw_of_biases.step()
        adamw.zero_grad()
        adamw_of_biases.zero_grad()
    for layer, bias in zip(LAYERS, biases, strict=True):
        torch.testing.assert_close(probes.offsets[layer], bias.detach(), rtol=1e-6, atol=1e-9)
    found, expected = ([p.detach() for p in tuned] for tuned in (ours.trained, trained))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    before = [p.detach() for p in problem(dtype=torch.float64).trained]
    assert norm_of([a - b for a, b in zip(found, before, strict=True)]) > 0.01 * norm_of(before)


def loss_under(case: Problem, offsets: dict[int, Tensor]) -> Tensor:
    stack = find_decoder_layers(case.model)[0]
    handles = [
        stack[layer].register_forward_hook(lambda m, a, output, v=v: output + v)
        for layer, v in offsets.items()
    ]
    loss = naive_task_loss(case.model, case.batch)
    for handle in handles:
        handle.remove()
    return loss.detach()


def test_the_probe_is_that_of_the_batch_before() -> None:
    """Also in the safety pass and at W + ΔW."""
    case = problem()
    probes = ProbeSet(case.model, LAYERS)
    for number in range(2):
        before = {layer: v.clone() for layer, v in probes.offsets.items()}
        plain, probed = loss_under(case, {}), loss_under(case, before)
        losses: list[Tensor] = []

        def record(loss: Tensor, losses: list[Tensor] = losses) -> Tensor:
            losses.append(loss.detach())
            return loss

        safe = naive_contrastive_loss(case.model, case.chosen, case.rejected).detach()
        published_step(
            case.model,
            case.trained,
            probes,
            lambda record=record: record(task(case)),
            lambda record=record: record(safety(case)),
        )
        torch.testing.assert_close(losses[1:], [probed, probed], rtol=1e-4, atol=1e-4)
        if number == 0:
            assert torch.equal(plain, probed) and torch.equal(losses[0], safe)
        else:
            assert (probed - plain).abs() > 0.01 and not torch.equal(losses[0], safe)
        case.model.zero_grad()
    assert torch.equal(loss_under(case, {}), plain), "outside of the step it is off"


def test_every_pass_draws_masks_of_its_own() -> None:
    case, states = problem(dropout=0.1), []

    def remember(backward: Callable[[Problem], Tensor]) -> Tensor:
        states.append(torch.get_rng_state())
        return backward(case)

    probes = ProbeSet(case.model, LAYERS)
    published_step(
        case.model, case.trained, probes, lambda: remember(task), lambda: remember(safety)
    )
    safety_state, first, second = states
    assert not torch.equal(safety_state, first) and not torch.equal(first, second)
    assert not torch.equal(second, torch.get_rng_state())


@pytest.mark.parametrize("rho", [2e-5, 1e-3])
def test_the_perturbation_is_added_and_subtracted(rho: float) -> None:
    case, seen = problem(lora=False), []

    def remember() -> Tensor:
        seen.append(weights(case.model))
        return task(case)

    before = weights(case.model)
    options = {} if rho == 2e-5 else {"rho": rho}  # the one by default is theirs
    probes = ProbeSet(case.model, LAYERS)
    published_step(case.model, case.trained, probes, remember, lambda: safety(case), **options)
    there, back = seen
    moved = norm_of([a - b for a, b in zip(there, before, strict=True)])
    assert moved == pytest.approx(rho * norm_of(before), rel=1e-2)
    apart = torch.cat([(a != b).flatten() for a, b in zip(back, before, strict=True)])
    assert 1e-4 < apart.float().mean() < 0.1, "some elements are not what they were"
    assert norm_of([a - b for a, b in zip(back, before, strict=True)]) < 1e-2 * moved
    assert_same_bits(weights(case.model), back)


def test_the_first_probe_is_a_step_of_adamw_along_h() -> None:
    case = problem(dtype=torch.float64)
    before = norm_of([parameter.detach() for parameter in case.trained])
    probes = ProbeSet(case.model, LAYERS)
    published_step(case.model, case.trained, probes, lambda: task(case), lambda: safety(case))
    expected = oracle_estimate(
        lambda: naive_task_loss(case.model, case.batch),
        lambda: naive_contrastive_loss(case.model, case.chosen, case.rejected),
        case.trained,
        {layer: probes.modules[layer] for layer in LAYERS},
        (HIDDEN,),
    )
    # Without dropout, in fp64, a forward difference from so near is as good as any.
    assert cosine(probes.estimates, expected) > 0.999
    for layer, h in probes.estimates.items():
        assert h.norm() == pytest.approx(expected[layer].norm().item(), rel=0.01)
        g = 2e-5 * before * h
        torch.testing.assert_close(probes.offsets[layer], 5e-2 * g / (g.abs() + 1e-8))


def test_an_error_leaves_no_hook_and_nothing_frozen() -> None:
    case = problem()
    probes = ProbeSet(case.model, LAYERS)
    hooks = [len(module._forward_hooks) for module in case.model.modules()]
    before, trained = weights(case.model), len(case.trained)

    def fail() -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        published_step(case.model, case.trained, probes, fail, lambda: safety(case))
    assert [len(module._forward_hooks) for module in case.model.modules()] == hooks
    assert len(case.trained) == trained
    torch.testing.assert_close(weights(case.model), before)


def test_what_is_kept_from_step_to_step_goes_with_the_probe_set() -> None:
    case = problem()
    probes = ProbeSet(case.model, LAYERS)
    closures = partial(task, case), partial(safety, case)
    published_step(case.model, case.trained, probes, *closures)
    assert probes in published._PUBLISHED
    gone = weakref.ref(probes)
    del probes, case, closures
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("options", [{"rho": 0.0}, {"size": -1.0}, {"rho": float("nan")}], ids=str)
def test_wrong_settings_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* is out of range"):
        PublishedSAP(**options)


# ---- the trainer ----


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_runs_it(tmp_path: Path, accumulate: int) -> None:
    ours, theirs = model(), model()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulate, max_grad_norm=0.0)
    trainer = trainer_of(PublishedSAPTrainer, ours, args, layers=LAYERS)
    windows: list[Any] = []
    fetch = trainer.get_batch_samples

    def remember(*arguments: Any, **kwargs: Any) -> Any:
        fetched, lr = fetch(*arguments, **kwargs), trainer.optimizer.param_groups[0]["lr"]
        windows.append((fetched, torch.get_rng_state(), lr))
        return fetched

    trainer.get_batch_samples = remember
    trainer.train()

    trained = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    adamw = BlendedAdamW(trained, weight_decay=0.1, safety_weight=0.0)
    probes = ProbeSet(theirs, LAYERS)
    torch.set_rng_state(windows[0][1])
    for step, ((window, items), state, lr) in enumerate(windows):
        assert torch.equal(state, torch.get_rng_state())
        pairs = SafetyCollator(0)(trainer._safety_batches.rows(step))

        def by_hand(window: Any = window, items: Any = items) -> Tensor:
            for rows in window:
                task_loss(theirs, rows, num_items=items).backward()
            return torch.zeros(())

        def safe(pairs: Any = pairs) -> Tensor:
            loss = contrastive_loss(theirs, pairs["chosen"], pairs["rejected"], reduction="sum")
            loss.backward()
            return loss

        published_step(theirs, trained, probes, by_hand, safe)
        adamw.param_groups[0]["lr"] = lr
        adamw.step()
        adamw.zero_grad()
    assert len(windows) == 4
    assert_same_bits(weights(ours), weights(theirs))
    assert_same_bits(trainer.probe_set.offsets, probes.offsets)
    assert all(v.abs().max() > 1e-3 for v in probes.offsets.values())


def test_it_probes_the_layers_of_the_authors(tmp_path: Path) -> None:
    for depth, expected in ((32, (3, 9)), (4, (0, 1)), (1, (0,))):
        trainer = trainer_of(PublishedSAPTrainer, tiny_llama(layers=depth), arguments(tmp_path))
        trainer.create_optimizer()
        assert trainer.probe_set.layers == expected


def test_it_is_evaluated_without_a_probe(tmp_path: Path) -> None:
    tuned = model()
    trainer = trainer_of(PublishedSAPTrainer, tuned, arguments(tmp_path))
    seen: list[bool] = []
    trainer.add_callback(BeforeEachUpdate(lambda _: seen.append(bool(trainer.probe_set.offsets))))
    trainer.train()
    assert seen == [True] * 4
    found = trainer.evaluate([{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}])
    trainer.probe_set.detach()
    assert not any(module._forward_hooks for module in tuned.modules())
    again = trainer.evaluate([{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]}])
    assert found["eval_loss"] == again["eval_loss"]


def test_the_trainer_refuses_fp16_and_a_probe_of_sap(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    args.fp16 = True
    with pytest.raises(ValueError, match="fp16=True: expected one process"):
        trainer_of(PublishedSAPTrainer, model(), args)
    with pytest.raises(ValueError, match="which has no probe"):
        trainer_of(PublishedSAPTrainer, model(), arguments(tmp_path), probe={"rows": 0.5})
