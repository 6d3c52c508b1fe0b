"""The cost model against counted FLOPs and bytes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks import contenders, cost_model, workloads
from benchmarks.contenders import ForwardSizes, TrainerRun
from benchmarks.cost_model import Job, Pass, Tokens
from benchmarks.measuring import memory_events, peak
from benchmarks.step import work_sizes
from benchmarks.workloads import SAFETY_PAIRS, Case, Lora, Shape
from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss
from sap_fast.integrations.safety_batches import SafetyBatches
from tests.tiny import Problem, problem

TINY = Shape("tiny", 32, 4, 4, 2, 64, 128, tied=False)
TINY_LORA = Lora(4, dropout=0.0)
KINDS: tuple[Pass, ...] = ("safety", "probe", "task")
# What is counted are packed batches.
pytestmark = pytest.mark.filterwarnings("error:.*Batches are not packed")


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
    probes = ProbeSet(case.model, [1, 2], rho=1e-2, checkpointing=checkpointing)
    optimizer = FusedSAP(case.trained, probes)
    forwards = ForwardSizes(case.model)
    counted: dict[str, list[int]] = {kind: [] for kind in KINDS}

    def count(kind: str, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
        with CountFlops() as counter:
            value = loss()
            value.backward()
        counted[kind].append(counter.total)
        return value.detach()

    task = functools.partial(task_loss, case.model, case.batch)
    safety = functools.partial(contrastive_loss, case.model, case.chosen, case.rejected)
    for _ in range(2):  # the first use of a model also tests it
        forwards.steps.append([])
        optimizer.inner_passes(lambda _: count("probe", task), lambda: count("safety", safety))
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


SMALL = Shape("small", 128, 6, 4, 2, 384, 1024, tied=True)


#: Every value beside every other once; all combinations are slow.
FEW = {
    ("sap", True, "fp32", "none"),
    ("sap", False, "bf16", "layers"),
    ("blend", True, "bf16", "layers"),
    ("blend", False, "fp32", "none"),
    ("hf_adamw", True, "bf16", "none"),
    ("hf_adamw", False, "fp32", "layers"),
}
ALL = itertools.product(
    ("hf_adamw", "blend", "sap"), (True, False), ("fp32", "bf16"), ("none", "layers")
)


@pytest.mark.parametrize(
    ("name", "lora", "dtype", "checkpointing"),
    [each if each in FEW else pytest.param(*each, marks=pytest.mark.slow) for each in ALL],
)
def test_memory_of_a_counted_step(name: str, lora: bool, dtype: str, checkpointing: str) -> None:
    contenders.start_case()
    data = workloads.random_data(64, vocabulary=1024, rows=16)
    model: Any = workloads.random_llama(
        SMALL, dtype=torch.bfloat16 if lora and dtype == "bf16" else torch.float32
    )
    if lora:
        model = workloads.add_lora(model)
    run = TrainerRun(name, model, data, bf16=dtype == "bf16", checkpointing=checkpointing)
    *first, last = workloads.batches(data, 4, 2)
    for rows in first:
        run.step(run.prepare(rows))
    run.sizes.steps.clear()
    counted = peak(memory_events(functools.partial(run.step, run.prepare(last))))
    case = Case("lora" if lora else "full", "4x96", dtype, "tiny")
    sizes = work_sizes(case, name, run.sizes, [last])
    # Not the mean over the rows of `case`, but those of the second step.
    pairs = SafetyBatches(data.safety, SAFETY_PAIRS, contenders.SEED).rows(1)
    answers = [answer["labels"] for pair in pairs for answer in pair.values()]
    sizes["safety_scored"] = sum(label != -100 for labels in answers for label in labels)
    job = Job(
        SMALL,
        Lora() if lora else None,
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


def test_a_step_that_takes_a_direction_now_and_then_pays_its_share() -> None:
    batches = dict.fromkeys(KINDS, Tokens(100, 1000, 50))
    every = cost_model.step_cost(Job(TINY, TINY_LORA, batches)).flops
    fifth = cost_model.step_cost(Job(TINY, TINY_LORA, batches, direction_every=5)).flops
    safety = cost_model.pass_flops(Job(TINY, TINY_LORA, batches), "safety")
    assert every - fifth == pytest.approx(0.8 * safety)
    kept = [Job(TINY, TINY_LORA, batches, direction_every=k).kept_bytes for k in (1, 5)]
    assert kept[1] == 1.5 * kept[0]
    full = [Job(workloads.SMOLLM2, None, batches, direction_every=k).kept_bytes for k in (1, 5)]
    # A byte and a sixty-fourth of one for each element, beside the moments' eight.
    assert full[1] - full[0] == pytest.approx((1 + 1 / 64) / 8 * full[0])
    exact = Job(workloads.SMOLLM2, None, batches, direction_every=5, direction_bytes=4)
    assert exact.kept_bytes == 1.5 * full[0]


def test_blending_is_a_safety_pass_and_reads_of_the_direction() -> None:
    batch = Tokens(100, 1000, 50)
    blend = Job(TINY, TINY_LORA, {"safety": batch, "task": batch})
    plain = Job(TINY, TINY_LORA, {"task": batch})
    assert blend.blends and not plain.blends
    more = cost_model.step_cost(blend).flops - cost_model.step_cost(plain).flops
    assert more == cost_model.pass_flops(blend, "safety")
    assert cost_model.update_bytes(blend) - cost_model.update_bytes(plain) == 20 * blend.trained
    assert cost_model.step_memory(blend) >= cost_model.step_memory(plain) + 4 * blend.trained
