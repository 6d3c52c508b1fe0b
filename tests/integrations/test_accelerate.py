"""Loops that Accelerate prepares: a plain loop, its wrapped optimizer, saved and loaded state."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sap_fast import BlendedAdamW, FusedSAP, ProbeSet, contrastive_loss, task_loss
from sap_fast.step.calibration import Calibration
from tests.tiny import assert_same_bits, distance, random_batch, weights
from tests.trainers import small

MICRO_BATCHES = 2
LOADED = [{k: v[0] for k, v in random_batch(rows=1, seed=seed).items()} for seed in range(12)]


def optimizer_of(tuned: nn.Module, method: str = "sap") -> BlendedAdamW:
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    if method == "blend":
        return BlendedAdamW(trained, lr=1e-3)
    # A direction that is kept is state to be saved.
    return FusedSAP(trained, ProbeSet(tuned, [1], rho=1e-2), lr=1e-3, direction_every=3)


def windows_of(loader: Iterable[Any]) -> Iterator[list[Any]]:
    """Micro-batches of a step; what is left over at the end is dropped."""
    return zip(*[iter(loader)] * MICRO_BATCHES, strict=False)


def accelerate_loop(
    tuned: nn.Module, accelerator: Accelerator | None, method: str = "sap"
) -> BlendedAdamW:
    """Two steps of two micro-batches from a loader; without Accelerate by hand."""
    sap = optimizer_of(tuned, method)
    called: Any = tuned
    optimizer: Any = sap
    loader: Any = DataLoader(LOADED, batch_size=3)
    if accelerator is not None:
        called, optimizer, loader = accelerator.prepare(tuned, sap, loader)
    for step, window in enumerate(windows_of(loader)):
        chosen, rejected = random_batch(seed=100 + step), random_batch(seed=200 + step)

        def backward(loss: Tensor, parts: int) -> Tensor:
            if accelerator is None:
                (loss / parts).backward()
            else:
                # It divides by the number of micro-batches itself.
                accelerator.backward(loss * MICRO_BATCHES / parts)
            return loss / parts

        def task(part: list[Any], called: Any = called, backward: Any = backward) -> Tensor:
            return torch.stack(
                [backward(task_loss(called, rows), len(part)) for rows in part]
            ).sum()

        def safety(
            called: Any = called,
            chosen: Any = chosen,
            rejected: Any = rejected,
            backward: Any = backward,
        ) -> Tensor:
            return backward(contrastive_loss(called, chosen, rejected), 1)

        sap.inner_passes(task, safety, list(window))
        for rows in window:
            with accelerator.accumulate(called) if accelerator else nullcontext():
                with sap.task_pass():
                    backward(task_loss(called, rows), MICRO_BATCHES)
                if accelerator is not None or rows is window[-1]:
                    optimizer.step()  # Accelerate's does nothing until the window is complete
                    optimizer.zero_grad()
    return sap


@pytest.mark.parametrize(("method", "lora"), [("sap", True), ("sap", False), ("blend", True)])
def test_an_accelerate_loop_is_the_loop_by_hand(tmp_path: Path, method: str, lora: bool) -> None:
    by_hand, tuned = small(lora), small(lora)
    accelerate_loop(by_hand, None, method)
    # The last window is read before its first micro-batch runs: the loader's end is not the step's.
    plugin = GradientAccumulationPlugin(num_steps=MICRO_BATCHES, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    sap = accelerate_loop(tuned, accelerator, method)
    assert sap.passes.steps == 2 and sap.passes.direction.taken == (1 if method == "sap" else 2)
    assert distance(weights(tuned), weights(by_hand)) <= 1e-7

    state = copy.deepcopy(sap.state_dict())
    assert bool(state["sap"]["direction"]["tensors"]) == (method == "sap")
    accelerator.save_state(str(tmp_path / "state"))
    for tensors in sap.state.values():
        tensors["exp_avg"].zero_()
    sap.passes.direction.release()
    sap.passes.steps = 0
    accelerator.load_state(str(tmp_path / "state"))
    assert_same_bits(sap.state_dict(), state)


def test_the_round_trip_of_prepare_changes_nothing() -> None:
    """`prepare` loads the optimizer's state dict into it, moved to the device."""
    tuned = small(lora=True)
    fresh = optimizer_of(tuned)
    Accelerator(cpu=True).prepare(tuned, fresh)
    passes = fresh.passes
    assert not fresh.state and passes.calibration is None and passes.steps == 0
    assert passes.direction.is_due(0) and not passes.probes.offsets

    used = accelerate_loop(tuned, None)
    used.passes.calibration = Calibration(1e-3, agreement=0.9, agreements={1e-3: 0.9}, step=1)
    before = copy.deepcopy(used.state_dict())
    assert before["sap"]["direction"]["tensors"] and before["state"]
    Accelerator(cpu=True).prepare(tuned, used)
    assert_same_bits(used.state_dict(), before)


def test_a_prepared_step_takes_one_closure_and_says_so() -> None:
    tuned = small(lora=True)
    _, optimizer = Accelerator(cpu=True).prepare(tuned, optimizer_of(tuned))
    with pytest.raises(TypeError, match="needs a safety closure too"):
        optimizer.step(lambda: task_loss(tuned, random_batch()))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_two_deterministic_loops_give_the_same_bits(lora: bool, deterministic: None) -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        tuned = small(lora)
        sap = accelerate_loop(tuned, None)
        assert sap.probes is not None
        found.append(weights(tuned) + list(sap.probes.offsets.values()))
    assert_same_bits(*found)
