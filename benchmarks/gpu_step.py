"""A whole step on a GPU, of models of Llama's shapes: time and peak memory beside AdamW's.

    python -m benchmarks.gpu_step        all cases, a few minutes on an H100; --help for less

Weights and tokens are random: a step takes as long and as much memory as with real ones. Each case
is one of those that `benchmarks.cost_model` predicts for H100s, and its prediction stands in the
same row. Task batches are 4 rows of 2,048 tokens of which half are scored; safety batches 4 pairs
of a prompt of 64 tokens with two answers of 64. All under bf16 autocast, LoRA on bf16 weights,
gradients clipped to norm 1.

    hf_adamw     transformers' own loss, which builds full logits, and `torch.optim.AdamW(fused)`
    adamw        the same with `task_loss`
    paper        `FusedSAP` with the preset of that name; likewise balanced and economical

Configurations share the model. Peak memory is taken while each runs for the first time, less what
those before it left; then all run in turn, round after round. One that does not fit says so in its
row. Writes `gpu_step.csv`, case by case.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Peaks come close to the memory of the GPU, and the sizes of passes differ: without it, fragments
# are what does not fit. Read when CUDA starts.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cost_model import (
    H100,
    LLAMA_8B,
    TASK,
    WAYS,
    Lora,
    Model,
    memory_per_rank,
    predicted_job,
    step_cost,
)
from benchmarks.provenance import RESULTS, replace_rows
from benchmarks.series import Series, preset_period, ratio, summary
from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss
from sap_fast.optimizer import PRESETS

Row = dict[str, Any]
Batch = dict[str, Tensor]

CONFIGURATIONS = ("hf_adamw", "adamw", *PRESETS)
#: A whole period of `economical`.
ROUNDS = 10
WARM_UP_ROUNDS = 1
ROWS, LENGTH = 4, 2048
PAIRS, PART = 4, 64  # tokens of a prompt and of an answer
#: What calibration finds for LoRA in bf16 (`benchmarks.fidelity`), so that it is not timed.
RHO = 1.25e-2

# config.json of meta-llama/Llama-3.2-1B.
LLAMA_1B = Model("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256, tied=True)
TINY = Model("tiny", 64, 4, 4, 2, 128, 512, tied=True)


@dataclass(frozen=True)
class Case:
    """What is trained and how."""

    model: Model
    way: str
    checkpointing: str

    @property
    def lora(self) -> Lora | None:
        """The adapters; None: all parameters."""
        return WAYS[self.way]

    def facts(self) -> Row:
        """Return the columns that name the case."""
        return {
            "model": self.model.name,
            "trained": self.way,
            "checkpointing": self.checkpointing,
        }


CASES = {
    "8b-lora": Case(LLAMA_8B, "LoRA r=16 q,v", "none"),
    "1b-full": Case(LLAMA_1B, "full", "layers"),
    "8b-lora-all": Case(LLAMA_8B, "LoRA r=16 all linear", "layers"),
}


# ---- model and batches ----


def build_model(case: Case, device: str) -> nn.Module:
    """A random Llama on the device: bf16 below LoRA, fp32 where everything is trained."""
    shape = case.model
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if case.lora is None else torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    if case.lora is not None:
        adapters = LoraConfig(
            r=case.lora.rank, lora_dropout=0.05, target_modules=list(case.lora.targets)
        )
        model = get_peft_model(model, adapters)  # the adapters in fp32
    return model.train()


def random_batch(rows: int, length: int, unscored: int, vocabulary: int, device: str) -> Batch:
    """Rows of random tokens, all but the first `unscored` of each scored."""
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
    """A task batch, and pairs that share their prompts."""
    torch.manual_seed(1)
    task = random_batch(ROWS, length, length // 2, vocabulary, device)
    chosen, rejected = (random_batch(PAIRS, 2 * PART, PART, vocabulary, device) for _ in range(2))
    for name in ("input_ids", "labels"):
        rejected[name][:, :PART] = chosen[name][:, :PART]
    return Batches(task, chosen, rejected)


# ---- the configurations ----


def build_step(
    name: str, model: nn.Module, batches: Batches, case: Case, device: str
) -> Callable[[], None]:
    """Return what runs a step of a configuration, with an optimizer of its own."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings: dict[str, Any] = {"lr": 1e-5, "weight_decay": 0.01}

    def autocast() -> torch.autocast:
        return torch.autocast(device, torch.bfloat16)

    def backward(loss: Tensor) -> Tensor:
        loss.backward()
        return loss.detach()

    if name in PRESETS:
        sap = FusedSAP(
            trained,
            ProbeSet(model),
            rho=RHO,
            preset=name,  # type: ignore[arg-type]
            max_grad_norm=1.0,
            checkpointing=case.checkpointing,  # type: ignore[arg-type]
            **settings,
        )

        def task() -> Tensor:
            with autocast():
                loss = task_loss(model, sap.probe_part(batches.task))
            return backward(loss)

        def safety() -> Tensor:
            with autocast():
                loss = contrastive_loss(model, batches.chosen, batches.rejected)
            return backward(loss)

        def sap_step() -> None:
            sap.step(task, safety)
            sap.zero_grad()

        return sap_step

    adamw = torch.optim.AdamW(trained, fused=True, **settings)

    def adamw_step() -> None:
        if case.checkpointing == "layers":
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        with autocast():
            if name == "adamw":
                loss = task_loss(model, batches.task)
            else:
                loss = model(**batches.task).loss
        loss.backward()
        if case.checkpointing == "layers":
            model.gradient_checkpointing_disable()  # type: ignore[operator]
        nn.utils.clip_grad_norm_(trained, 1.0)
        adamw.step()
        adamw.zero_grad()

    return adamw_step


# ---- measuring ----


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device != "cpu":
        torch.accelerator.synchronize()


def measure_memory(
    build: Callable[[], Callable[[], None]], weights: int, device: str
) -> tuple[Callable[[], None] | None, int | None]:
    """Return the step, and the peak in bytes of its first two runs; None if it does not fit.

    Args:
        build: returns the step.
        weights: bytes of the model. What else lies on the device now is not counted.
        device: on the CPU nothing is counted.
    """
    if device == "cpu":
        step = build()
        step()
        return step, None
    others = torch.cuda.memory_allocated() - weights
    torch.cuda.reset_peak_memory_stats()
    try:
        step = build()
        step()
        step()
    except torch.OutOfMemoryError:
        return None, None
    return step, torch.cuda.max_memory_allocated() - others


def measure(case: Case, rounds: int, device: str, length: int) -> list[Row]:
    """Return a row per configuration."""
    model = build_model(case, device)
    batches = make_batches(case.model.vocabulary, device, length)
    weights = torch.cuda.memory_allocated() if device != "cpu" else 0
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, int | None] = {}
    for name in CONFIGURATIONS:

        def build(name: str = name) -> Callable[[], None]:
            return build_step(name, model, batches, case, device)

        step, peaks[name] = measure_memory(build, weights, device)
        if step is not None:
            steps[name] = step
        else:
            model.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
    seconds: dict[str, Series] = {name: {} for name in steps}
    order = list(steps)
    for number in range(WARM_UP_ROUNDS + rounds):
        order.append(order.pop(0))
        for name in order:
            synchronize(device)
            start = time.perf_counter()
            steps[name]()
            synchronize(device)
            if number >= WARM_UP_ROUNDS:
                seconds[name][number] = time.perf_counter() - start
    return [row(case, name, seconds, peaks[name]) for name in CONFIGURATIONS]


def row(case: Case, name: str, seconds: dict[str, Series], peak: int | None) -> Row:
    """Return what was measured of a configuration, and what the cost model says of it."""
    job = predicted_job(case.model, case.lora, name, case.checkpointing)
    job = replace(job, full_logits=name == "hf_adamw")
    adamw = predicted_job(case.model, case.lora, "adamw", case.checkpointing)
    cost = step_cost(job)
    figures: Row = case.facts() | {
        "configuration": name,
        "fits": "yes" if name in seconds else "no",
    }
    if name in seconds:
        period = preset_period(name)
        figures |= summary(seconds[name], period)
        figures |= {
            "times_adamw": ratio(seconds[name], seconds["adamw"], period),
            "tokens_per_s": round(TASK.tokens / figures["median_s"]),
            "tflop_per_s": round(cost.flops / figures["median_s"] / 1e12, 1),
        }
    if peak is not None:
        figures["peak_gb"] = round(peak / 1e9, 2)
    return figures | {
        "predicted_s": round(H100.seconds(cost), 4),
        "predicted_times_adamw": round(H100.seconds(cost) / H100.seconds(step_cost(adamw)), 3),
        "predicted_peak_gb": round(memory_per_rank(job, 1) / 1e9, 2),
    }


# ---- the command ----


def show(rows: Sequence[Row], console: Console) -> None:
    """Print a table."""
    columns = ("configuration", "median_s", "times_adamw", "tokens_per_s", "tflop_per_s", "peak_gb")
    predicted = ("predicted_s", "predicted_times_adamw", "predicted_peak_gb")
    names = (*columns, *predicted)
    table = Table(*names, title=", ".join(str(rows[0][c]) for c in CASES["8b-lora"].facts()))
    for one in rows:
        cells = [str(one.get(name, "")) for name in names]
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
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="a multiple of 10")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV")
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, on the CPU too, to try the benchmark"
    )
    options = parser.parse_args(arguments)
    if options.rounds < ROUNDS or options.rounds % ROUNDS:
        parser.error(
            f"--rounds {options.rounds} is no whole period of the preset economical: "
            f"give a multiple of {ROUNDS}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.quick:
        print("benchmarks.gpu_step: needs a CUDA device, and PyTorch finds none", file=sys.stderr)
        return 1
    # Memory is predicted for whole batches, of which a model this small needs none.
    cases = [CASES[name] for name in options.case or CASES]
    if options.quick:
        cases = list(dict.fromkeys(replace(case, model=TINY) for case in cases))
    console = Console(width=150)
    for case in cases:
        rows = measure(case, options.rounds, device, 32 if options.quick else LENGTH)
        show(rows, console)
        identity = tuple(case.facts())
        path = replace_rows("gpu_step.csv", rows, identity, options.results)
        gc.collect()
        if device != "cpu":
            torch.cuda.empty_cache()
    console.print(f"Wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
