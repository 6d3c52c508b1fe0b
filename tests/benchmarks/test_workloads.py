"""What the benchmarks train, and how."""

from __future__ import annotations

import pytest
import torch

from benchmarks import workloads
from benchmarks.workloads import RECIPES, TINY, Case, Lora
from tests.benchmarks.helpers import QUICK


def test_parameters_of_the_published_models() -> None:
    # Their model cards: 8.03 B and 70.6 B; SmolLM2's: 134.5 M.
    assert workloads.LLAMA_8B.parameters == 8_030_261_248
    assert workloads.LLAMA_70B.parameters == 70_553_706_496
    assert workloads.SMOLLM2.parameters == 134_515_008


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_llama_has_its_shape_and_is_the_same_in_every_call(dtype: torch.dtype) -> None:
    first, second = (workloads.random_llama(TINY, dtype=dtype) for _ in range(2))
    assert sum(parameter.numel() for parameter in first.parameters()) == TINY.parameters
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert left.dtype == dtype and torch.equal(left, right)
    assert torch.get_default_dtype() == torch.float32
    modules = dict(first.model.layers[0].named_modules())
    for name, shape in TINY.projections.items():
        (module,) = (each for path, each in modules.items() if path.endswith(f".{name}"))
        assert (module.in_features, module.out_features) == shape


@pytest.mark.parametrize(("setup", "dtype"), [("lora", "bf16"), ("lora", "fp32"), ("full", "bf16")])
def test_a_case_trains_adapters_or_everything(setup: str, dtype: str) -> None:
    model = Case(setup, "4x96", dtype, "tiny").model()
    trained = workloads.trained_parameters(model)
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    if setup == "full":
        assert not frozen
        return
    # Two adapters of two factors each in four layers.
    assert len(trained) == 2 * 2 * 4
    assert {p.dtype for p in frozen} == {torch.bfloat16 if dtype == "bf16" else torch.float32}


def test_adapters_are_those_that_are_asked_for() -> None:
    model = workloads.add_lora(workloads.random_llama(TINY), Lora(4, ("k_proj",), dropout=0.0))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 4 and all("k_proj" in name for name in names)


def test_batches_differ_from_step_to_step_and_not_from_call_to_call() -> None:
    data = QUICK.data()
    first, second = workloads.batches(data, 4, 2)
    assert len(first) == len(second) == 4
    assert first != second
    assert workloads.batches(data, 4, 3)[:2] == [first, second]


def test_rows_are_padded_to_the_longest() -> None:
    data = QUICK.data()
    rows = data.task[:3]
    batch = data.batch(rows)
    assert batch["input_ids"].shape == (3, max(len(row["input_ids"]) for row in rows))
    pairs = data.pairs(data.safety[:2])
    assert set(pairs) == {"chosen", "rejected"}
    prompt = 96 // 4
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(pairs["chosen"][name][:, :prompt], pairs["rejected"][name][:, :prompt])


# ---- recipes ----


@pytest.mark.parametrize("label", RECIPES)
def test_a_recipe_builds_its_optimizer(label: str) -> None:
    recipe, model = RECIPES[label], workloads.random_llama(TINY)
    optimizer = recipe.optimizer(model, rho=1e-2, lr=1e-3, max_grad_norm=1.0)
    assert optimizer.passes.direction.every == recipe.direction_every
    assert (optimizer.probes is None) == (recipe.method == "blend")
    if optimizer.probes is not None:
        assert (optimizer.probes.rows, optimizer.probes.rho) == (recipe.rows, 1e-2)
        assert (optimizer.probes.layers == (1, 2)) == (recipe.layers == "middle")
    assert f"direction_every={recipe.direction_every}" in label or recipe.direction_every == 1


def test_older_labels_mean_recipes_of_today() -> None:
    labels = {workloads.label_of(name) for name in workloads.FORMER_LABELS}
    assert labels == set(RECIPES) - {"blend"}
    assert workloads.label_of("hf_adamw") == "hf_adamw"
    periods = [workloads.period_of(n) for n in ("floor", "blend", "sap", "balanced", "economical")]
    assert periods == [1, 1, 1, 5, 10]
