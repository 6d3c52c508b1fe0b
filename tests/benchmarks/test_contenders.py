"""The configurations that `make step` compares, on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from benchmarks import contenders
from benchmarks.workloads import RECIPES, batches
from sap_fast import BlendedAdamW, FusedSAP
from tests.benchmarks.helpers import QUICK

# What is added to a model here may not keep the losses from packing.
pytestmark = pytest.mark.filterwarnings("error:.*Batches are not packed")


@pytest.fixture(autouse=True)
def new_case() -> None:
    contenders.start_case()


def rows(count: int) -> list[list[Any]]:
    return batches(QUICK.data(), 4, count)


def run_of(name: str) -> Any:
    return contenders.build_run(QUICK, name)


def test_a_recipe_does_its_passes_at_its_pace() -> None:
    run = run_of("sap, direction_every=5, rows=1/2")
    for each in rows(6):
        run.step(run.prepare(each))
    first, *between, again = [len(forwards) for forwards in run.sizes.steps]
    # The first step also tests packing, twice.
    assert first > 4
    assert between == [3] * 4
    assert again == 4
    # Half of four rows find the probe, which all of them are trained under.
    probe, _, task = run.sizes.steps[1]
    assert probe[1] < task[1]


def test_blending_runs_a_safety_pass_and_a_task_pass() -> None:
    run = run_of("blend")
    assert type(run.optimizer) is BlendedAdamW
    for each in rows(2):
        run.step(run.prepare(each))
    del run.sizes.steps[0]  # which tests packing, too
    found = {kind: len(sizes) for kind, sizes in run.sizes.by_pass().items()}
    assert found == {"safety": 1, "probe": 0, "task": 1}


def test_the_layers_that_are_probed() -> None:
    layers = [run_of(name).optimizer.probes.layers for name in ("sap", "sap, middle layers")]
    assert layers == [(0, 1), (1, 2)]
    assert tuple(contenders.probed_layers(QUICK.model())) == (0, 1)


def test_the_published_procedure_pads_every_row() -> None:
    run = run_of("published")
    before = [p.detach().clone() for p in run._trained]
    run.step(run.prepare(rows(1)[0]))
    (forwards,) = run.sizes.steps
    assert forwards == [(8, 96), (4, 96), (4, 96)]
    assert {kind: len(sizes) for kind, sizes in run.sizes.by_pass().items()} == {
        "safety": 1,
        "probe": 1,
        "task": 1,
    }
    assert any(not torch.equal(a, b) for a, b in zip(before, run._trained, strict=True))
    assert all(parameter.grad is None for parameter in run._trained)


def test_passes_alone_are_four_and_leave_the_model_as_it_was() -> None:
    run = run_of("passes alone")
    assert isinstance(run, contenders.PassesAlone)
    run.step(run.prepare(rows(1)[0]))
    (safety,), (probe,), (task,), (update,) = run.seconds.values()
    assert run.sums() == [safety + 2 * probe + task + update]
    model: Any = run._run.model
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 4
    assert {type(layer) for layer in run._layers.values()} == {LlamaDecoderLayer}


def test_the_trainer_trains_as_its_own_loop() -> None:
    run = run_of("sap")
    assert isinstance(run.optimizer, FusedSAP)
    before = [p.detach().clone() for p in run.model.parameters() if p.requires_grad]
    batch = run.prepare(rows(1)[0])
    run.step(batch)
    run.step(batch)
    after = [p for p in run.model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
    elements = sum(parameter.numel() for parameter in after)
    assert run.kept_bytes() == 8 * elements + 4 * len(after)  # two moments, and a counter each


def test_a_direction_that_is_kept_counts() -> None:
    run = run_of("sap, direction_every=10, rows=1/4")
    run.step(run.prepare(rows(1)[0]))
    trained = [p for p in run.model.parameters() if p.requires_grad]
    elements = sum(parameter.numel() for parameter in trained)
    assert run.kept_bytes() == 12 * elements + 4 * len(trained)


def test_every_recipe_is_a_configuration() -> None:
    assert set(RECIPES) < set(contenders.CONFIGURATIONS)
    assert {"hf_adamw", "floor", "published"} < set(contenders.CONFIGURATIONS)
