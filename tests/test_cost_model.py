"""The cost model against counted FLOPs and bytes, and its fit against times that it made up."""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import cost_model, step
from benchmarks.cost_model import Cost, Job, Lora, Model, Pass, Speed, Tokens
from sap_fast.integrations.trainer import SafetyBatches
from sap_fast.losses import contrastive_loss, task_loss
from sap_fast.optimizer import FusedSAP
from sap_fast.probes import ProbeSet
from tests.tiny import Problem, problem

TINY = Model("tiny", 32, 4, 4, 2, 64, 128, tied=False)
TINY_LORA = Lora(4, ("q_proj", "v_proj"), dropout=False)
KINDS: tuple[Pass, ...] = ("safety", "probe", "task")


def tiny_job(
    case: Problem, *, lora: bool, sizes: dict[str, tuple[int, int]], **options: Any
) -> Job:
    scored = {
        "task": (case.batch["labels"] != -100).sum().item(),
        "safety": sum((b["labels"] != -100).sum().item() for b in (case.chosen, case.rejected)),
    }
    scored["probe"] = scored["task"]
    batches: dict[Pass, Tokens] = {
        kind: Tokens(rows * length, rows * length**2, scored[kind])
        for kind in KINDS
        for rows, length in [sizes[kind]]
    }
    return Job(
        TINY,
        TINY_LORA if lora else None,
        batches,
        lowest_probed=1,
        flash_backward=False,  # eager attention keeps its scores
        **options,
    )


class CountFlops(TorchDispatchMode):
    """`FlopCounterMode` without its hooks on modules, which `torch.autograd.grad` refuses."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        flops = flop_registry.get(func._overloadpacket)
        if flops is not None:
            self.total += flops(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("checkpointing", ["none", "layers"])
@pytest.mark.parametrize("lora", [True, False])
def test_flops_of_the_passes(lora: bool, checkpointing: Any) -> None:
    case = problem(lora=lora)
    optimizer = FusedSAP(
        case.trained, ProbeSet(case.model, [1, 2]), rho=1e-2, checkpointing=checkpointing
    )
    forwards = step.ForwardSizes(case.model)
    counted: dict[str, list[int]] = {kind: [] for kind in KINDS}

    def count(kind: str, loss: Callable[[], torch.Tensor]) -> None:
        with CountFlops() as counter:
            loss().backward()
        counted[kind].append(counter.total)

    task = functools.partial(task_loss, case.model, case.batch)
    safety = functools.partial(contrastive_loss, case.model, case.chosen, case.rejected)
    for _ in range(2):  # the first use of a model also tests it
        forwards.steps.append([])
        with optimizer.safety_pass():
            count("safety", safety)
        for _ in optimizer.probe_passes():
            count("probe", task)
        with optimizer.task_pass():
            count("task", task)
        optimizer.step()
        optimizer.zero_grad()
    forwards.steps = forwards.steps[-1:]
    sizes = {kind: found[-1] for kind, found in forwards.by_pass().items()}
    job = tiny_job(case, lora=lora, sizes=sizes, checkpointing=checkpointing)
    for kind in KINDS:
        # The rotary angles, and the head's last position, are not in the model.
        assert cost_model.pass_flops(job, kind) == pytest.approx(counted[kind][-1], rel=0.01)


@pytest.mark.parametrize("lora", [True, False])
def test_flops_of_transformers_own_loss(lora: bool) -> None:
    case = problem(lora=lora)
    with CountFlops() as counter:
        case.model(**case.batch).loss.backward()
    shape = tuple(case.batch["input_ids"].shape)
    job = tiny_job(case, lora=lora, sizes=dict.fromkeys(KINDS, shape), full_logits=True)
    assert cost_model.pass_flops(job, "task") == pytest.approx(counter.total, rel=0.01)


def test_parameters_of_the_published_models() -> None:
    # Their model cards: 8.03 B and 70.6 B; SmolLM2's: 134.5 M.
    assert cost_model.LLAMA_8B.parameters == 8_030_261_248
    assert cost_model.LLAMA_70B.parameters == 70_553_706_496
    assert cost_model.SMOLLM2.parameters == 134_515_008


SMALL = Model("small", 128, 6, 4, 2, 384, 1024, tied=True)


@pytest.mark.parametrize("checkpointing", ["none", "layers"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", ["hf_adamw", "paper"])
def test_memory_of_a_counted_step(name: str, lora: bool, dtype: str, checkpointing: str) -> None:
    step.start_case()
    data = step.random_data(64, vocabulary=1024, rows=16)
    model: Any = step.random_llama(
        hidden_size=128,
        intermediate_size=384,
        vocab_size=1024,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=6,
    )
    if lora:
        model = step.add_lora(model.to(torch.bfloat16 if dtype == "bf16" else torch.float32))
    run = step.TrainerRun(name, model, data, bf16=dtype == "bf16", checkpointing=checkpointing)
    *first, last = step.batches(data, 4, 2)
    for rows in first:
        run.step(run.prepare(rows))
    run.sizes.steps.clear()
    counted = step.peak(step.memory_events(functools.partial(run.step, run.prepare(last))))
    case = step.Case("lora" if lora else "full", "4x96", dtype, quick=True)
    sizes = step.work_sizes(case, name, run.sizes, [last])
    # Not the mean over the rows of `case`, but those of the second step.
    pairs = SafetyBatches(data.safety, step.SAFETY_PAIRS, step.SEED).rows(1)
    answers = [answer["labels"] for pair in pairs for answer in pair.values()]
    sizes["safety_scored"] = sum(label != -100 for labels in answers for label in labels)
    job = Job(
        SMALL,
        Lora(8, ("q_proj", "v_proj")) if lora else None,
        {
            kind: Tokens(*(sizes[f"{kind}_{what}"] for what in ("tokens", "squares", "scored")))
            for kind in KINDS
            if f"{kind}_tokens" in sizes
        },
        full_logits=name == "hf_adamw",
        torch_adamw=name == "hf_adamw",
        checkpointing=checkpointing,
        dtype=dtype,
    )
    predicted = cost_model.step_memory(job)
    assert predicted == pytest.approx(run.kept_bytes() + counted, rel=0.1)


def test_fit_finds_the_rate_and_the_bandwidth() -> None:
    costs = [Cost(3e9, 1e9), Cost(1e9, 2e9), Cost(5e10, 1e9), Cost(0.0, 1e8)]
    machine = Speed(2e11, 1.5e10)
    speed = cost_model.fit(costs, [machine.seconds(cost) for cost in costs])
    assert speed.flops == pytest.approx(2e11)
    assert speed.bandwidth == pytest.approx(1.5e10)


def test_fit_never_gives_a_negative_rate() -> None:
    # Twice the bytes in less time: bytes explain nothing.
    costs = [Cost(1e9, 1e9), Cost(1e9, 2e9), Cost(2e9, 1e9)]
    speed = cost_model.fit(costs, [1.0, 0.9, 2.0])
    assert speed.bandwidth == math.inf
    assert speed.flops == pytest.approx(1e9, rel=0.05)


def test_an_economical_step_pays_its_share_of_the_refresh() -> None:
    batches = dict.fromkeys(KINDS, Tokens(100, 1000, 50))
    every = Job(TINY, TINY_LORA, batches)
    fifth = Job(TINY, TINY_LORA, batches, direction_every=5, probe_every=5)
    plain = Job(TINY, TINY_LORA, {"task": batches["task"]})
    refresh = cost_model.step_cost(every).flops - cost_model.step_cost(plain).flops
    rest = cost_model.step_cost(fifth).flops - cost_model.step_cost(plain).flops
    assert refresh > 0
    assert rest == pytest.approx(refresh / 5)


def test_presets_order_and_more_gpus_hold_less_each() -> None:
    table = cost_model.predict()
    for start in range(0, len(table), 4):
        adamw, paper, balanced, economical = table[start : start + 4]
        assert adamw["times_adamw"] == 1.0
        if len({row["checkpointing"] for row in table[start : start + 4]}) == 1:
            assert paper["step_s"] >= balanced["step_s"] >= economical["step_s"]
            assert economical["step_s"] >= adamw["step_s"]
    one, eight = (
        next(r for r in table if r["model"] == "Llama-3-8B" and r["gpus"] == n) for n in (1, 8)
    )
    assert eight["peak_gb_per_gpu"] < one["peak_gb_per_gpu"]
    # 70 B parameters in bf16 are 141 GB.
    large = [r for r in table if r["model"] == "Llama-3-70B" and r["gpus"] == 1]
    assert all(row["fits"] == "no" for row in large)


def test_probe_passes_end_at_the_lowest_probed_layer() -> None:
    row = {"setup": "lora", "batch": "4x96", "dtype": "fp32"}
    row |= {f"{kind}_{what}": "300" for kind in KINDS for what in ("tokens", "squares", "scored")}
    default, middle = (
        cost_model.measured_job(row | {"configuration": name}) for name in ("paper", "paper_middle")
    )
    # Of SmolLM2's 30 layers, 1 and 10 are the lowest that `ProbeSet` probes.
    assert (default.above_probe, middle.above_probe) == (28, 19)
    assert default.torch_adamw is middle.torch_adamw is False
    flops = [cost_model.step_cost(job).flops for job in (default, middle)]
    layer = cost_model.pass_flops(dataclasses.replace(default, lowest_probed=0), "probe")
    layer -= cost_model.pass_flops(default, "probe")
    assert flops[0] - flops[1] == pytest.approx(2 * 9 * layer)


def test_a_gpu_is_checked_against_what_is_predicted_for_it() -> None:
    names = {"model": "Llama-3-8B", "trained": "LoRA r=16 q,v", "checkpointing": "none"}
    (predicted,) = [
        row
        for row in cost_model.predict()
        if row["gpus"] == 1 and row["configuration"] == "paper" and names.items() <= row.items()
    ]
    measured = {"median_s": str(predicted["step_s"]), "peak_gb": "20"}
    fits = names | {"configuration": "paper", "fits": "yes"} | measured
    seconds, peak = cost_model.check_gpu([fits, names | {"fits": "no"}])
    assert seconds["met"] == "yes" and seconds["ratio"] == 1.0
    assert peak["met"] == "no" and peak["measured"] == 20.0
    # All logits at once are more to hold, and the loss of transformers has them.
    _, full = cost_model.check_gpu([fits | {"configuration": "hf_adamw"}])
    assert full["predicted"] > peak["predicted"] + 5


def write_measured(folder: Path, factor: float) -> None:
    """Write the CSVs that a machine of 100 GFLOP/s and 10 GB/s would have measured."""
    sizes = {"task": (300, 3e4, 180), "safety": (240, 5e4, 150), "probe": (300, 3e4, 180)}
    rows: list[dict[str, Any]] = []
    for setup in ("lora", "full"):
        for name in ("hf_adamw", "paper", "naive", "passes alone"):
            row: dict[str, Any] = {"setup": setup, "batch": "4x96", "dtype": "fp32"}
            row["configuration"] = name
            if name != "passes alone":
                for kind, values in sizes.items():
                    if name != "hf_adamw" or kind == "task":
                        names = (f"{kind}_{what}" for what in ("tokens", "squares", "scored"))
                        row |= dict(zip(names, map(str, values), strict=True))
                job = cost_model.measured_job(row)
                row["median_s"] = Speed(1e11, 1e10).seconds(cost_model.step_cost(job))
                row["tensors_mb"] = factor * cost_model.step_memory(job) / 1e6
            rows.append(row)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    for name in ("step_time.csv", "step_memory.csv"):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.3, 1)])
def test_the_script_checks_predicts_and_tells_what_is_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], factor: float, status: int
) -> None:
    write_measured(tmp_path, factor)
    assert cost_model.main(["--results", str(tmp_path)]) == status
    printed = capsys.readouterr().out
    assert "fp32: 100.0 GFLOP/s and 10.0 GB/s fitted" in printed
    assert "| Llama-3-8B | LoRA r=16 q,v | 1 |" in printed
    assert "offload of saved tensors, Llama-3-8B" in printed
    with (tmp_path / "cost_model.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {"checked", "predicted"}
    seconds = [row for row in rows if row["what"] == "seconds"]
    assert len(seconds) == 6  # a pass alone is no step
    assert all(row["met"] == "yes" for row in seconds)
