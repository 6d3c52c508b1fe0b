"""A whole step on a GPU, of models of Llama's shapes: time and peak memory beside AdamW's.

    python -m benchmarks.gpu_step        all cases, a few minutes on an H100; --help for less

Weights and tokens are random: a step takes as long and as much memory as with real ones. The cases
are some of those that `benchmarks.predictions` makes for H100s; it compares. Task batches are 4
rows of 2,048 tokens of which half are scored; safety batches 4 pairs of a prompt of 64 tokens with
two answers of 64. All under bf16 autocast, LoRA on bf16 weights, gradients clipped to norm 1.

    hf_adamw     transformers' own loss, which builds full logits, and `torch.optim.AdamW(fused)`
    adamw        the same with `task_loss`
    blend, sap   the optimizer of a recipe of `benchmarks.workloads`

Configurations share the model and run in turn, for a whole period of the recipe, each with the
memory for itself: optimizer states beside each other would fill the GPU, and what is timed would be
its allocator. One that does not fit says so in its row. Writes `gpu_step-….csv` with the name
of the GPU, case by case.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Peaks come close to the memory of the GPU, and the sizes of passes differ: without it, fragments
# are what does not fit. Read when CUDA starts.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.cost_model import step_cost
from benchmarks.measuring import Series, seconds_of, summary
from benchmarks.predictions import TASK, WAYS, predicted_job
from benchmarks.provenance import RESULTS, gpu_name, replace_rows
from benchmarks.workloads import (
    LLAMA_1B,
    LLAMA_8B,
    RECIPES,
    RHO,
    TINY,
    Batch,
    Lora,
    Model,
    Row,
    Shape,
    add_lora,
    period_of,
    random_llama,
    trained_parameters,
)
from sap_fast import contrastive_loss, joint_loss, task_loss

CONFIGURATIONS = (
    "hf_adamw",
    "adamw",
    *(name for name, recipe in RECIPES.items() if recipe.layers == "early"),
)
#: Timed steps of a turn at least; a recipe with a longer period runs a whole one.
STEPS = 5
#: The first allocates state and meets every pass for the first time.
WARM_UP_STEPS = 2
ROWS, LENGTH = 4, 2048
PAIRS, PART = 4, 64  # tokens of a prompt and of an answer


@dataclass(frozen=True)
class Case:
    """What is trained and how."""

    shape: Shape
    way: str
    checkpointing: str

    @property
    def lora(self) -> Lora | None:
        """The adapters; None: all parameters."""
        return WAYS[self.way]

    def facts(self) -> Row:
        """Return the columns that name the case."""
        return {
            "model": self.shape.name,
            "trained": self.way,
            "checkpointing": self.checkpointing,
        }


CASES = {
    "8b-lora": Case(LLAMA_8B, "LoRA r=16 q,v", "none"),
    "1b-full": Case(LLAMA_1B, "full", "layers"),
    "8b-lora-all": Case(LLAMA_8B, "LoRA r=16 all linear", "layers"),
}


# ---- model and batches ----


def build_model(case: Case, device: str) -> Model:
    """Return a random Llama on the device: bf16 below LoRA, fp32 where everything is trained."""
    model: Model = random_llama(
        case.shape,
        dtype=torch.float32 if case.lora is None else torch.bfloat16,
        device=device,
        max_position_embeddings=LENGTH,
        attn_implementation="sdpa",
    )
    if case.lora is not None:
        model = add_lora(model, case.lora)
    return model.train()


def random_batch(rows: int, length: int, unscored: int, vocabulary: int, device: str) -> Batch:
    """Return rows of random tokens, all but the first `unscored` of each scored."""
    tokens = torch.randint(1, vocabulary, (rows, length), device=device)
    labels = tokens.clone()
    labels[:, :unscored] = -100
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}


@dataclass(frozen=True)
class Batches:
    """What a step trains on."""

    task: Batch
    chosen: Batch
    rejected: Batch


def make_batches(vocabulary: int, device: str, length: int) -> Batches:
    """Return a task batch, and pairs that share their prompts."""
    torch.manual_seed(1)
    task = random_batch(ROWS, length, length // 2, vocabulary, device)
    chosen, rejected = (random_batch(PAIRS, 2 * PART, PART, vocabulary, device) for _ in range(2))
    for name in ("input_ids", "labels"):
        rejected[name][:, :PART] = chosen[name][:, :PART]
    return Batches(task, chosen, rejected)


# ---- the configurations ----


@contextmanager
def configuration(
    name: str, model: Model, batches: Batches, case: Case, device: str
) -> Iterator[Callable[[], None]]:
    """Yield what runs a step of a configuration, with an optimizer that lives as long."""
    trained = trained_parameters(model)
    settings: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}
    recipe = RECIPES.get(name)
    has_probe = recipe is not None and recipe.method == "sap"

    def backward(loss: Callable[[], Tensor]) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            value = loss()
        value.backward()
        return value.detach()

    if recipe is None:
        adamw = torch.optim.AdamW(trained, fused=True, **settings)

        def step() -> None:
            own = name == "hf_adamw"
            backward(lambda: model(**batches.task).loss if own else task_loss(model, batches.task))
            nn.utils.clip_grad_norm_(trained, 1.0)
            adamw.step()
            adamw.zero_grad()

    else:
        optimizer = recipe.optimizer(
            model, rho=RHO, checkpointing=case.checkpointing, max_grad_norm=1.0, **settings
        )
        safety_loss = contrastive_loss if has_probe else joint_loss

        def step() -> None:
            optimizer.step(
                lambda part: backward(lambda: task_loss(model, part)),
                lambda: backward(lambda: safety_loss(model, batches.chosen, batches.rejected)),
                batches.task,
            )
            optimizer.zero_grad()

    # A probe set sees to it itself.
    checkpointed = case.checkpointing == "layers" and not has_probe
    if checkpointed:
        model.gradient_checkpointing_enable()  # of every version; 5.23 has another name, too
    try:
        yield step
    finally:
        if checkpointed:
            model.gradient_checkpointing_disable()
        if has_probe:
            optimizer.probes.detach()


# ---- measuring ----


def run_turn(
    name: str, model: Model, batches: Batches, case: Case, turn: int, device: str
) -> tuple[Series, int]:
    """Run some steps after others that are not timed, with nothing else on the device.

    Returns:
        Seconds by the number of the step, counted over all turns, and the peak of allocated bytes
        (0 on the CPU).
    """
    release(model, device)
    seconds: Series = {}
    count = max(STEPS, period_of(name))
    with configuration(name, model, batches, case, device) as step:
        for number in range(-WARM_UP_STEPS, count):
            taken = seconds_of(step, device)
            if number >= 0:
                seconds[turn * count + number] = taken
        return seconds, torch.cuda.max_memory_allocated() if device != "cpu" else 0


def measure(case: Case, turns: int, device: str, length: int) -> list[Row]:
    """Return a row per configuration."""
    model = build_model(case, device)
    batches = make_batches(case.shape.vocabulary, device, length)
    seconds: dict[str, Series] = {name: {} for name in CONFIGURATIONS}
    peaks: dict[str, int] = {}
    order = list(CONFIGURATIONS)
    for turn in range(turns):
        for name in list(order):
            try:
                found, peaks[name] = run_turn(name, model, batches, case, turn, device)
            except torch.OutOfMemoryError:
                order.remove(name)
            else:
                seconds[name] |= found
        order = order[1:] + order[:1]
    return [row(case, name, seconds, peaks.get(name)) for name in CONFIGURATIONS]


def release(model: Model, device: str) -> None:
    """Free all but the model, and count the peak anew."""
    model.zero_grad()
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def row(case: Case, name: str, seconds: dict[str, Series], peak: int | None) -> Row:
    """Return what was measured of a configuration; no figures if it does not fit."""
    figures: Row = case.facts() | {
        "configuration": name,
        "fits": "no" if peak is None else "yes",
    }
    if peak is None:
        return figures
    figures |= summary(seconds[name], period_of(name))
    job = predicted_job(case.shape, case.lora, name, case.checkpointing)
    adamw_s = summary(seconds["adamw"], 1)["median_s"] if seconds["adamw"] else math.nan
    return figures | {
        "times_adamw": round(figures["median_s"] / adamw_s, 3),
        "tokens_per_s": round(TASK.tokens / figures["median_s"]),
        "tflop_per_s": round(step_cost(job).flops / figures["median_s"] / 1e12, 1),
        "peak_gb": round(peak / 1e9, 2),
    }


# ---- the command ----


def show(case: Case, rows: Sequence[Row], console: Console) -> None:
    """Print a table."""
    columns = ("configuration", "median_s", "times_adamw", "tokens_per_s", "tflop_per_s", "peak_gb")
    table = Table(*columns, title=", ".join(case.facts().values()))
    for one in rows:
        cells = [str(one.get(name, "")) for name in columns]
        if one["fits"] == "no":
            cells[1] = "does not fit"
        table.add_row(*cells)
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write; exit status 1 without a GPU.

    Args:
        arguments: of the command line, without the program's name; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--case", choices=CASES, action="append", help="only this one; repeatable")
    parser.add_argument(
        "--turns", type=int, default=1, help=f"of each configuration, {STEPS} steps at least"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, on the CPU too, to try the benchmark"
    )
    options = parser.parse_args(arguments)
    if options.turns < 1:
        parser.error(f"--turns {options.turns} is out of range: give 1 or more")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        print("benchmarks.gpu_step: needs a CUDA device, and PyTorch finds none", file=sys.stderr)
        return 1
    cases = [CASES[name] for name in options.case or CASES]
    if options.quick:
        cases = list(dict.fromkeys(replace(case, shape=TINY) for case in cases))
    console = Console(width=150)
    for case in cases:
        rows = measure(case, options.turns, device, 32 if options.quick else LENGTH)
        show(case, rows, console)
        path = replace_rows(
            f"gpu_step-{gpu_name()}.csv", rows, tuple(case.facts()), options.results
        )
    console.print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
