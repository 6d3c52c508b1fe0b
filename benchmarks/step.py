"""A whole training step: time, memory, allocations and growth, and the six claims made for them.

    python -m benchmarks.step            everything, two hours; --help for less

What is measured is written case by case, over the rows of that case only: interrupt it at any time,
and go on with --table and --only.

Every configuration trains a copy of the same model on the same batches:

    hf_adamw     transformers' `Trainer` with its own loss and `adamw_torch`
    floor        the same with `task_loss`, which never builds full logits
    paper        `SAPTrainer` with the preset of that name; likewise balanced and economical
    paper_middle the same as paper with `probe_layers="middle"`, the paper's; all others probe the
                 layers that are the default, from which backward goes deeper
    naive        `benchmarks.naive`: published style, every row padded to the maximum length

`lora` is SmolLM2-135M-Instruct, aligned, with LoRA (r=8, dropout 0.05) on q and v; `full` a random
Llama of 4 layers of SmolLM2's shapes and vocabulary whose parameters are all trained. Task batches
are Alpaca rows, safety batches four pairs on AdvBench. `bf16` is `TrainingArguments(bf16=True)`,
for LoRA on bf16 weights. Four tables, each a CSV:

* time: seconds of a step. All configurations run in turn in each round, starting with another one
  each time; a preset's figure is the mean over the steps from one safety pass to the next. Ratios
  are taken within a round, and their medians reported. The passes of `paper` are timed alone too.
* memory: what three steps add to the loaded model, as peak resident size of a fresh process; and
  the peak of live tensor bytes in a fourth step, with what the optimizer keeps between steps.
* allocations: parameter-sized tensors alive during a step that trains everything on 8 tokens.
* curves: time and live tensor bytes against sequence length, batch, depth and trained tensors.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import gc
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from benchmarks import assets
from benchmarks.alignment import aligned_smollm2
from benchmarks.alignment import write_rows as write_jsonl
from benchmarks.naive import NaiveSAP
from benchmarks.provenance import RESULTS, ROOT, replace_rows
from benchmarks.series import Series, preset_period, ratio, summary
from sap_fast.data import (
    SafetyCollator,
    TaskCollator,
    build_safety_pair,
    load_safety_dataset,
    load_task_dataset,
    padding_token_id,
)
from sap_fast.integrations.trainer import SafetyBatches, SAPTrainer
from sap_fast.losses import contrastive_loss, task_loss
from sap_fast.optimizer import PRESETS, FusedSAP
from sap_fast.probes import ProbeSet, find_decoder_layers

Row = dict[str, Any]
#: A `LlamaForCausalLM`, plain or in a `PeftModel`.
Model = Any

SETUPS = ("lora", "full")
#: Rows × most tokens of a row.
BATCHES = {"4x96": (4, 96), "8x128": (8, 128)}
DTYPES = ("fp32", "bf16")
CONFIGURATIONS = (
    "hf_adamw",
    "floor",
    "paper",
    "paper_middle",
    "balanced",
    "economical",
    "naive",
)
IN_MEMORY = ("hf_adamw", "floor", "paper", "balanced")
CHECKPOINTING = ("none", "layers")
TABLES = ("time", "memory", "allocations", "curves")

THREADS = 2
SAFETY_PAIRS = 4
#: What calibration finds for LoRA in bf16 (`benchmarks.fidelity`), so that it is not timed.
RHO = 1.25e-2
# A whole period of `economical`. The naive step takes as long as all others together and spreads
# by less than 2 %, so it runs in every third round.
ROUNDS = 10
WARM_UP_ROUNDS = 2
NAIVE_EVERY = 3
#: Seed of `TrainingArguments`, from which the order of the safety rows follows.
SEED = 42

TARGETS = {"paper": 2.6, "paper_middle": 2.6, "balanced": 1.7, "economical": 1.3}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained on what: a cell of the tables.

    Attributes:
        setup: `"lora"` or `"full"`.
        batch: a key of `BATCHES`.
        dtype: `"fp32"` or `"bf16"`.
        quick: a tiny random model and random rows in the place of the real ones.
    """

    setup: str
    batch: str
    dtype: str
    quick: bool = False

    @property
    def rows(self) -> int:
        """Rows of a task batch."""
        return BATCHES[self.batch][0]

    @property
    def max_length(self) -> int:
        """Tokens at which rows are cut."""
        return BATCHES[self.batch][1]

    def facts(self) -> Row:
        """Return the columns that name the case."""
        return {"setup": self.setup, "batch": self.batch, "dtype": self.dtype}


class Data(NamedTuple):
    """Encoded rows, as `sap_fast.data` loads them."""

    task: Sequence[Any]
    safety: Sequence[Any]
    padding: int


# ---- models and data ----


def random_llama(**settings: Any) -> LlamaForCausalLM:
    """A random Llama with tied embeddings, the same in every call."""
    torch.manual_seed(0)
    tied: dict[str, Any] = {"tie_word_embeddings": True, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**tied | settings))


def add_lora(model: Model, targets: Sequence[str] = ("q_proj", "v_proj"), rank: int = 8) -> Model:
    """Put LoRA on `model`: α=16, dropout 0.05; adapters in fp32."""
    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=16, lora_dropout=0.05, target_modules=list(targets))
    return get_peft_model(model, config)


def build_model(case: Case) -> Model:
    """A model of its own for one configuration."""
    weights = torch.bfloat16 if case.dtype == "bf16" and case.setup == "lora" else torch.float32
    if case.quick:
        small: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 512}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        model: Model = random_llama(**small, **heads, num_hidden_layers=4)
        model = model.to(weights)
    elif case.setup == "lora":
        model = AutoModelForCausalLM.from_pretrained(aligned_smollm2(), dtype=weights)
    else:
        config = LlamaConfig.from_pretrained(aligned_smollm2()).to_dict()
        model = random_llama(**config | {"num_hidden_layers": 4, "dtype": None})
    return add_lora(model) if case.setup == "lora" else model


@functools.cache
def load_data(max_length: int, quick: bool) -> Data:
    """Alpaca rows 200 to 799 and pairs on AdvBench 0 to 199; or random rows."""
    if quick:
        return random_data(max_length, vocabulary=512, rows=64)
    tokenizer = AutoTokenizer.from_pretrained(aligned_smollm2())
    pairs = [
        build_safety_pair(request, index)
        for index, request in enumerate(assets.harmful_requests()[:200])
    ]
    with tempfile.TemporaryDirectory() as folder:
        task = write_jsonl(Path(folder) / "task.jsonl", list(assets.alpaca_rows()[200:800]))
        safety = write_jsonl(Path(folder) / "safety.jsonl", pairs)
        return Data(
            load_task_dataset(task, tokenizer, max_length),
            load_safety_dataset(safety, tokenizer, max_length),
            padding_token_id(tokenizer),
        )


def random_data(length: int, *, vocabulary: int, rows: int, equal: bool = False) -> Data:
    """Random rows, the first quarter of each a prompt; of `equal` length, or of half to all."""
    generator = random.Random(0)

    def encoded(tokens: list[int], prompt: int) -> Row:
        return {"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]}

    def tokens(count: int) -> list[int]:
        return [generator.randrange(1, vocabulary) for _ in range(count)]

    def size() -> int:
        return length if equal else generator.randint(length // 2, length)

    task = [encoded(tokens(size()), length // 4) for _ in range(rows)]
    safety = []
    for _ in range(rows):
        prompt = tokens(length // 4)
        answers = [prompt + tokens(size() - len(prompt)) for _ in range(2)]
        chosen, rejected = (encoded(answer, len(prompt)) for answer in answers)
        safety.append({"chosen": chosen, "rejected": rejected})
    return Data(task, safety, 0)


def batches(data: Data, rows: int, count: int) -> list[list[Any]]:
    """The rows of `count` task batches, the same for every configuration."""
    order = list(range(len(data.task)))
    random.Random(0).shuffle(order)
    chosen = [order[place % len(order)] for place in range(rows * count)]
    return [[data.task[index] for index in chosen[rows * k : rows * (k + 1)]] for k in range(count)]


# ---- the configurations ----


class Run(Protocol):
    """A configuration with a model of its own."""

    sizes: ForwardSizes

    def prepare(self, rows: Sequence[Any]) -> Any:
        """Return the batch of these rows: what a data loader does, and is not timed."""

    def step(self, batch: Any) -> None:
        """Train on a batch."""


class ForwardSizes:
    """Rows and length of every forward through the decoder, packed or padded as it met them."""

    def __init__(self, model: Model) -> None:
        _, owner = find_decoder_layers(model)
        owner.register_forward_pre_hook(self._note, with_kwargs=True)
        self.steps: list[list[tuple[int, int]]] = []

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"][..., 0]
        if self.steps:
            self.steps[-1].append(tuple(tokens.shape))

    def by_pass(self) -> dict[str, list[tuple[int, int]]]:
        """Return the sizes by pass; a step may do without safety pass or probe passes."""
        found: dict[str, list[tuple[int, int]]] = {"safety": [], "probe": [], "task": []}
        for step in self.steps:
            safety = ["safety"] * (len(step) in (2, 4))
            probe = ["probe", "probe"] * (len(step) in (3, 4))
            names = [*safety, *probe, "task"]
            for name, size in zip(names, step, strict=True):
                found[name].append(size)
        return found


class FloorTrainer(Trainer):
    """`Trainer` with the loss of `SAPTrainer`."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return `task_loss`."""
        with self.accelerator.autocast():
            return task_loss(model, inputs, num_items=num_items_in_batch)


class TrainerRun:
    """A trainer, driven step by step as its `train` does it.

    Args:
        name: one of `CONFIGURATIONS` other than `"naive"`.
        model: what it trains.
        data: whose rows it trains on.
        bf16: `TrainingArguments(bf16=True)`.
        checkpointing: `"none"` or `"layers"`.
        pairs: safety pairs of a step.
    """

    def __init__(
        self,
        name: str,
        model: Model,
        data: Data,
        *,
        bf16: bool,
        checkpointing: str = "none",
        pairs: int = SAFETY_PAIRS,
    ) -> None:
        self.is_sap = name in PRESETS or name == "paper_middle"
        self.sizes = ForwardSizes(model)
        self._folder = tempfile.TemporaryDirectory()
        arguments = TrainingArguments(
            output_dir=self._folder.name,
            bf16=bf16,
            use_cpu=True,
            optim="adamw_torch",
            learning_rate=1e-5,
            max_steps=1,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            seed=SEED,
        )
        self._collate = TaskCollator(data.padding)
        common: dict[str, Any] = {
            "model": model,
            "args": arguments,
            "train_dataset": data.task,
            "data_collator": self._collate,
        }
        if self.is_sap:
            self.trainer: Trainer = SAPTrainer(
                **common,
                safety_dataset=data.safety,
                safety_collator=SafetyCollator(data.padding),
                safety_batch_size=pairs,
                probe_layers="middle" if name == "paper_middle" else "early",
                sap_options={
                    "preset": name.removesuffix("_middle"),
                    "rho": RHO,
                    "checkpointing": checkpointing,
                },
            )
        else:
            self.trainer = {"hf_adamw": Trainer, "floor": FloorTrainer}[name](**common)
            if checkpointing == "layers":
                model.activation_checkpointing_enable()  # as `Trainer.train` does
        trainer = self.trainer
        self.optimizer = trainer.create_optimizer()
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, self.optimizer)
        trainer.current_gradient_accumulation_steps = 1

    def prepare(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return the batch, padded to its longest row."""
        return self._collate(rows)

    def step(self, batch: dict[str, Tensor]) -> None:
        """Train on a batch: the body of the loop of `Trainer.train`."""
        trainer = self.trainer
        self.sizes.steps.append([])
        (inputs,), items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        trainer.training_step(self.model, inputs, items)
        self.update()

    def update(self) -> None:
        """Clip the gradient, update the parameters and clear the gradients."""
        trainer = self.trainer
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        assert trainer.optimizer is not None
        trainer.optimizer.step()
        self.model.zero_grad()
        trainer.state.global_step += 1

    def kept_bytes(self) -> int:
        """Return the bytes of tensors that the optimizer keeps from one step to the next."""
        states = self.optimizer.state.values()
        tensors = [value for state in states for value in state.values()]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


class NaiveRun:
    """`NaiveSAP` on rows that are all padded to the maximum length."""

    def __init__(self, model: Model, data: Data, *, max_length: int, bf16: bool) -> None:
        self.sizes = ForwardSizes(model)
        self._collate = TaskCollator(data.padding, pad_to_multiple_of=max_length)
        self._collate_pairs = SafetyCollator(data.padding, pad_to_multiple_of=max_length)
        self._safety = SafetyBatches(data.safety, SAFETY_PAIRS, SEED)
        self._naive = NaiveSAP(model.train(), probed_layers(model), lr=1e-5, autocast=bf16)

    def prepare(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return the batch, padded to the maximum length."""
        return self._collate(rows)

    def step(self, batch: dict[str, Tensor]) -> None:
        """Train on a batch."""
        pairs = self._collate_pairs(self._safety.rows(len(self.sizes.steps)))
        self.sizes.steps.append([])
        self._naive.step(batch, pairs["chosen"], pairs["rejected"])


def probed_layers(model: Model) -> dict[int, nn.Module]:
    """Return the layers that are probed by default."""
    probes = ProbeSet(model)
    probes.detach()
    return dict(probes.modules)


class PassesAlone:
    """The passes of `paper`, each as plain autograd does it, and the fused update: for claim 3.

    The same losses through the same `Trainer`; in the probe pass the parameters are frozen and a
    hook adds a vector that requires grad to every probed layer's output.
    """

    def __init__(self, model: Model, data: Data, *, bf16: bool) -> None:
        self._run = TrainerRun("floor", model, data, bf16=bf16)
        self.sizes = self._run.sizes
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._trained = trained
        self._run.optimizer = self._run.trainer.optimizer = FusedSAP(trained, lr=1e-5)
        self._layers = probed_layers(model)
        self._safety = SafetyBatches(data.safety, SAFETY_PAIRS, SEED)
        self._collate_pairs = SafetyCollator(data.padding)
        self.seconds: dict[str, list[float]] = {
            name: [] for name in ("safety pass", "probe pass", "task pass", "update")
        }

    def prepare(self, rows: Sequence[Any]) -> dict[str, Tensor]:
        """Return the batch, padded to its longest row."""
        return self._run.prepare(rows)

    def step(self, batch: dict[str, Tensor]) -> None:
        """Time each of the four on a batch."""
        trainer, model = self._run.trainer, self._run.model
        (inputs,), items = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        rows = self._safety.rows(len(self.seconds["update"]))

        def safety() -> None:
            pairs = self._collate_pairs(rows)
            with trainer.accelerator.autocast():
                loss = contrastive_loss(model, pairs["chosen"], pairs["rejected"])
            trainer.accelerator.backward(loss)

        def task() -> None:
            trainer.training_step(model, inputs, items)

        self._time("safety pass", safety)
        model.zero_grad()
        handles = []
        for parameter in self._trained:
            parameter.requires_grad_(False)
        for layer in self._layers.values():
            probe = torch.zeros(model.config.hidden_size, requires_grad=True)
            handles.append(layer.register_forward_hook(functools.partial(_add, probe)))
        self._time("probe pass", task)
        for handle in handles:
            handle.remove()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        self._time("task pass", task)
        self._time("update", self._run.update)

    def _time(self, name: str, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        self.seconds[name].append(time.perf_counter() - start)

    def sums(self) -> list[float]:
        """Return, step by step, what the passes of `paper` take together: two probe passes."""
        parts = zip(*self.seconds.values(), strict=True)
        return [safety + 2 * probe + task + update for safety, probe, task, update in parts]


def _add(probe: Tensor, module: nn.Module, args: tuple[Any, ...], hidden: Tensor) -> Tensor:
    return hidden + probe.to(hidden.dtype)


def build_run(case: Case, name: str) -> Run:
    """A configuration with a model of its own."""
    data, bf16 = load_data(case.max_length, case.quick), case.dtype == "bf16"
    model = build_model(case)
    if name == "naive":
        return NaiveRun(model, data, max_length=case.max_length, bf16=bf16)
    if name == "passes alone":
        return PassesAlone(model, data, bf16=bf16)
    return TrainerRun(name, model, data, bf16=bf16)


def start_case() -> None:
    """Forget the precision of the case before, which accelerate keeps per process; set threads."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.set_num_threads(THREADS)
    gc.collect()


# ---- time ----


def measure_time(case: Case, rounds: int, tick: Callable[[], None]) -> list[Row]:
    """Return a row per configuration, and one per pass of `paper` alone."""
    start_case()
    contenders = [*CONFIGURATIONS, "passes alone"]
    runs = {name: build_run(case, name) for name in contenders}
    seconds: dict[str, Series] = {name: {} for name in contenders}
    all_rows = batches(load_data(case.max_length, case.quick), case.rows, WARM_UP_ROUNDS + rounds)
    order = list(contenders)
    for number, rows in enumerate(all_rows):
        order.append(order.pop(0))
        for name in order:
            if name == "naive" and number >= WARM_UP_ROUNDS and number % NAIVE_EVERY:
                continue
            batch = runs[name].prepare(rows)
            if number == WARM_UP_ROUNDS:
                runs[name].sizes.steps.clear()
            start = time.perf_counter()
            runs[name].step(batch)
            seconds[name][number] = time.perf_counter() - start
        tick()
    alone = runs.pop("passes alone")
    assert isinstance(alone, PassesAlone)
    seconds["passes alone"] = dict(enumerate(alone.sums()))
    for name, values in alone.seconds.items():
        seconds[name] = dict(enumerate(values))

    table = []
    for name, series in seconds.items():
        series = {number: value for number, value in series.items() if number >= WARM_UP_ROUNDS}
        period = preset_period(name)
        row = case.facts() | {"configuration": name, "period": period} | summary(series, period)
        if name not in alone.seconds:
            row |= {
                "times_hf": ratio(series, seconds["hf_adamw"], period),
                "times_floor": ratio(series, seconds["floor"], period),
                "paper_over_this": ratio(seconds["paper"], series, period),
            }
        if name in runs:
            row |= work_sizes(case, name, runs[name].sizes, all_rows[WARM_UP_ROUNDS:])
        table.append(row)
    return table


def work_sizes(case: Case, name: str, sizes: ForwardSizes, steps: Sequence[Sequence[Any]]) -> Row:
    """Return what the cost model needs to know: mean tokens, Σ S² and scored tokens by pass."""
    found: Row = {}
    for kind, forwards in sizes.by_pass().items():
        if forwards:
            found[f"{kind}_tokens"] = statistics.mean(rows * length for rows, length in forwards)
            found[f"{kind}_squares"] = statistics.mean(
                rows * length**2 for rows, length in forwards
            )
    fraction = PRESETS[name].probe_fraction if name in PRESETS else 1.0
    part = math.ceil(fraction * case.rows)
    pairs = load_data(case.max_length, case.quick).safety
    answers = [len(pair) * _scored(list(pair.values())) / 2 for pair in pairs]
    scored = {
        "task": statistics.mean(_scored(rows) for rows in steps),
        "probe": statistics.mean(_scored(rows[:part]) for rows in steps),
        "safety": SAFETY_PAIRS * statistics.mean(answers),
    }
    found |= {f"{kind}_scored": scored[kind] for kind in scored if f"{kind}_tokens" in found}
    return {column: round(value, 1) for column, value in found.items()}


def _scored(rows: Sequence[Any]) -> int:
    return sum(label != -100 for row in rows for label in row["labels"][1:])


# ---- claim 2: the V of both ----


def probe_gradient_difference(case: Case, *, dropout: bool) -> float:
    """Return ‖h(naive) − h(FusedSAP)‖/‖h(FusedSAP)‖ at one ρ and by forward differences, in fp32.

    The safety pass and both probe passes of either start from the same seed, so that they draw the
    same dropout masks where they run the same shapes: with dropout our losses do not merge the
    prefixes that sequences share, without it they do. Rows are padded to the longest of the batch.
    """
    start_case()
    data = load_data(case.max_length, case.quick)
    models = [build_model(case).train() for _ in range(2)]
    for model in models:
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # at its start, zero, the gradient of A is zero as well
                nn.init.normal_(parameter, std=0.02)
        if not dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
    batch = TaskCollator(data.padding)(batches(data, case.rows, 1)[0])
    pairs = SafetyCollator(data.padding)(data.safety[:SAFETY_PAIRS])
    chosen, rejected = pairs["chosen"], pairs["rejected"]

    naive = NaiveSAP(models[0], probed_layers(models[0]), rho=RHO, autocast=False)
    torch.manual_seed(1)
    naive.find_direction(chosen, rejected)
    torch.manual_seed(1)
    clean = naive.probe_gradient(batch)
    with naive.perturbed() as norm:
        torch.manual_seed(1)
        moved = naive.probe_gradient(batch)

    ours, pack = models[1], not dropout
    trained = [parameter for parameter in ours.parameters() if parameter.requires_grad]
    probes = ProbeSet(ours)
    optimizer = FusedSAP(trained, probes, lr=0.0, rho=RHO, difference="forward")

    def task() -> Tensor:
        loss = task_loss(ours, batch, pack=pack)
        loss.backward()
        return loss

    def safety() -> Tensor:
        loss = contrastive_loss(ours, chosen, rejected, pack=pack)
        loss.backward()
        return loss

    torch.manual_seed(1)
    optimizer.step(task, safety)
    theirs = torch.cat([(moved[j] - clean[j]).double() / norm for j in probes.layers])
    expected = torch.cat([probes.estimates[j].double() for j in probes.layers])
    return float((theirs - expected).norm() / expected.norm())


# ---- memory ----


def measure_memory(case: Case, name: str, checkpointing: str) -> Row:
    """Return the row of one configuration: bytes on top of the loaded model."""
    start_case()
    torch.set_num_threads(1)  # two of these processes share two cores; no size depends on it
    data = load_data(case.max_length, case.quick)
    model = build_model(case)
    gc.collect()
    loaded = _resident_bytes("VmRSS")
    _reset_peak()
    bf16 = case.dtype == "bf16"
    run = TrainerRun(name, model, data, bf16=bf16, checkpointing=checkpointing)
    *first, last = batches(data, case.rows, 4)
    for rows in first:
        run.step(run.prepare(rows))
    resident = _resident_bytes("VmHWM") - loaded
    # The step that is counted has to be one of those with all passes.
    while isinstance(run.optimizer, FusedSAP) and not (
        run.optimizer.needs_direction and run.optimizer.needs_probe
    ):
        run.step(run.prepare(first[0]))
    batch = run.prepare(last)
    run.sizes.steps.clear()
    events = memory_events(functools.partial(run.step, batch))
    kept = run.kept_bytes()
    return (
        case.facts()
        | {"configuration": name, "checkpointing": checkpointing}
        | {"resident_mb": round(resident / 1e6, 1)}
        | {"tensors_mb": round((kept + peak(events)) / 1e6, 1)}
        | {"kept_mb": round(kept / 1e6, 1)}
        | work_sizes(case, name, run.sizes, [last])
    )


def _resident_bytes(entry: str) -> int:
    """Return an entry of `/proc/self/status` in bytes; elsewhere the peak that `getrusage` has."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(entry))


def _reset_peak() -> None:
    """Start the peak of the resident size anew; where that is not allowed, loading counts too."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        print("the peak resident size includes the loading of the model", file=sys.stderr)


def memory_events(work: Callable[[], None]) -> list[int]:
    """Return the bytes that PyTorch's allocator gives out (+) and takes back (−), in order."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return [size for _, size in sorted(changes, key=lambda change: change[0])]


def peak(events: Sequence[int]) -> int:
    """Return the most bytes that are alive at once, of those allocated in `events`."""
    alive = most = 0
    for size in events:
        alive += size
        most = max(most, alive)
    return most


def memory_in_a_process(case: Case, name: str, checkpointing: str) -> Row:
    """Run `measure_memory` in a process of its own."""
    words = [case.setup, case.batch, case.dtype, name, checkpointing]
    command = [sys.executable, "-m", "benchmarks.step", "--measure-memory", *words]
    if case.quick:
        command.append("--quick")
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-2000:]}")
    return json.loads(result.stdout.splitlines()[-1])


# ---- allocations ----


def measure_allocations(dtype: str, quick: bool) -> list[Row]:
    """Count live parameter-sized tensors in a step of AdamW and of the paper preset.

    Everything is trained, on 8 tokens, so that activations are small beside the parameters. What is
    counted are allocations of exactly the size of a parameter of at least 64 KiB: gradients,
    directions, temporaries of updates.
    """
    start_case()
    shapes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 2048}
    if quick:
        shapes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    data = random_data(8, vocabulary=512, rows=8, equal=True)
    table = []
    for name in ("hf_adamw", "floor", "paper"):
        model = random_llama(**shapes, **heads, num_hidden_layers=4 if quick else 8)
        run = TrainerRun(name, model, data, bf16=dtype == "bf16", pairs=1)
        for rows in batches(data, 1, 2):
            run.step(run.prepare(rows))
        batch = run.prepare(data.task[:1])
        events = memory_events(functools.partial(run.step, batch))
        sizes = {parameter.nbytes for parameter in model.parameters() if parameter.nbytes >= 2**16}
        events = [size for size in events if abs(size) in sizes]
        parameters = sum(parameter.nbytes for parameter in model.parameters())
        table.append(
            {
                "dtype": dtype,
                "configuration": name,
                "parameters_mb": round(parameters / 1e6, 2),
                "kept_over_parameters": round(run.kept_bytes() / parameters, 4),
                "peak_over_parameters": round(peak(events) / parameters, 4),
                "tensors_alive": peak([1 if size > 0 else -1 for size in events]),
                "parameter_tensors": sum(p.nbytes in sizes for p in model.parameters()),
            }
        )
    return table


# ---- curves ----

PROJECTIONS = ("q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
AXES: dict[str, Sequence[int]] = {
    "length": (64, 128, 256, 512),
    "batch": (2, 4, 8, 16),
    "depth": (4, 8, 16, 32),
    # Projections of a layer that LoRA is put on.
    "targets": (1, 2, 4, 7),
}


def measure_curves(axis: str, dtype: str, repeats: int, quick: bool) -> list[Row]:
    """Return rows of `floor` and `paper` along one axis; the other axes stay at 64, 4, 8, 2."""
    table: list[Row] = []
    base = {"length": 64, "batch": 4, "depth": 8, "targets": 2}
    values = AXES[axis]
    if quick:
        base, values = {"length": 16, "batch": 2, "depth": 4, "targets": 1}, values[:2]
    for value in values:
        start_case()
        at = base | {axis: value}
        data = random_data(at["length"], vocabulary=4096, rows=64, equal=True)
        runs = {}
        for name in ("floor", "paper"):
            model: Model = random_llama(
                hidden_size=64 if quick else 256,
                intermediate_size=128 if quick else 688,
                vocab_size=4096,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_hidden_layers=at["depth"],
            )
            model = add_lora(model, PROJECTIONS[: at["targets"]])
            # As many safety as task sequences, or their share would shrink along the axis.
            pairs = at["batch"] // 2
            runs[name] = TrainerRun(name, model, data, bf16=dtype == "bf16", pairs=pairs)
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for number, rows in enumerate(batches(data, at["batch"], WARM_UP_ROUNDS + repeats)):
            for name in sorted(runs, reverse=bool(number % 2)):
                batch = runs[name].prepare(rows)
                start = time.perf_counter()
                runs[name].step(batch)
                seconds[name].append(time.perf_counter() - start)
        for name, run in runs.items():
            batch = run.prepare(data.task[: at["batch"]])
            events = memory_events(functools.partial(run.step, batch))
            table.append(
                {
                    "axis": axis,
                    "value": value,
                    "dtype": dtype,
                    "configuration": name,
                    # The least disturbed: a slope has no use for the other programs of a machine.
                    "seconds": round(min(seconds[name][WARM_UP_ROUNDS:]), 5),
                    "tensors_mb": round((run.kept_bytes() + peak(events)) / 1e6, 3),
                }
            )
    for name in ("floor", "paper"):
        rows_of = [row for row in table if row["configuration"] == name]
        for figure in ("seconds", "tensors_mb"):
            fitted = slope([row["value"] for row in rows_of], [row[figure] for row in rows_of])
            for row in rows_of:
                row[f"slope_{figure}"] = round(fitted, 3)
    return table


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of log y over log x, by least squares."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


# ---- the claims ----


class Claim(NamedTuple):
    """One figure that was promised."""

    claim: str
    where: str
    value: float
    relation: str
    target: float

    @property
    def met(self) -> bool:
        """Whether the figure keeps the promise."""
        return self.value <= self.target if self.relation == "≤" else self.value >= self.target


def claims(tables: Mapping[str, Sequence[Row]]) -> list[Claim]:
    """Return the six claims, each wherever the tables have its figures."""
    return [
        *_claims_on_time(tables.get("time", ())),
        *_claims_on_memory(tables.get("memory", ())),
        *_claims_on_allocations(tables.get("allocations", ())),
        *_claims_on_curves(tables.get("curves", ())),
    ]


def _claims_on_time(table: Sequence[Row]) -> list[Claim]:
    found = []
    for row in table:
        name = row["configuration"]
        where = f"{row['setup']} {row['batch']} {row['dtype']}"
        if name in TARGETS:
            found.append(Claim(f"1 {name} ÷ HF AdamW", where, row["times_hf"], "≤", TARGETS[name]))
        if name == "naive":
            faster = round(1 / row["paper_over_this"], 3)
            found.append(Claim("2 naive ÷ paper", where, faster, "≥", 2.5))
            for column, what in _DIFFERENCES.items():
                if row.get(column) not in (None, ""):
                    found.append(Claim(f"2 h, {what}", where, row[column], "≤", 1e-3))
        if name == "passes alone":
            found.append(Claim("3 paper ÷ its passes", where, row["paper_over_this"], "≤", 1.05))
    return sorted(found, key=lambda claim: claim.claim)


_DIFFERENCES = {"h_difference": "dropout, unpacked", "h_difference_packed": "packed, no dropout"}


def _claims_on_memory(table: Sequence[Row]) -> list[Claim]:
    found = []
    cells: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in table:
        key: tuple[str, ...] = (row["setup"], row["batch"], row["dtype"], row["checkpointing"])
        cells.setdefault(key, {})[row["configuration"]] = row
    for kind, figure in (("resident", "resident_mb"), ("tensors", "tensors_mb")):
        for key, rows in cells.items():
            where, paper = " ".join(key), rows["paper"][figure]
            for name, words, target in (("floor", "our AdamW", 1.05), ("hf_adamw", "HF", 0.8)):
                if rows[name][figure] == 0:  # of a tiny model, which no process was started for
                    continue
                value = round(paper / rows[name][figure], 3)
                found.append(Claim(f"4 {kind}: paper ÷ {words}", where, value, "≤", target))
            plain = cells.get((*key[:3], "none"))
            if key[3] == "layers" and key[1] == "8x128" and plain and plain["paper"][figure]:
                value = round(paper / plain["paper"][figure], 3)
                found.append(Claim(f"4 {kind}: checkpointed ÷ not", where, value, "≤", 0.7))
    return sorted(found, key=lambda claim: claim.claim)


def _claims_on_allocations(table: Sequence[Row]) -> list[Claim]:
    found = []
    for row in table:
        if row["configuration"] == "paper":
            floor = next(
                other
                for other in table
                if other["configuration"] == "floor" and other["dtype"] == row["dtype"]
            )
            for column in ("kept_over_parameters", "peak_over_parameters"):
                what = f"5 {column.split('_')[0]}: paper − AdamW, in parameters"
                value = round(row[column] - floor[column], 4)
                found.append(Claim(what, f"full {row['dtype']}", value, "≤", 0.02))
    return found


def _claims_on_curves(table: Sequence[Row]) -> list[Claim]:
    found = {}
    slopes = {(row["axis"], row["dtype"], row["configuration"]): row for row in table}
    for axis, dtype, _ in slopes:
        for figure in ("seconds", "tensors_mb"):
            paper, floor = (slopes[axis, dtype, n][f"slope_{figure}"] for n in ("paper", "floor"))
            what = f"6 slope of {figure}: paper − AdamW"
            found[what, axis, dtype] = Claim(
                what, f"{axis} {dtype}", round(paper - floor, 3), "≤", 0.05
            )
    return sorted(found.values(), key=lambda claim: claim.claim)


# ---- pictures ----

_CURVES = {"seconds": "seconds of a step", "tensors_mb": "peak of live tensors, MB"}
_AXIS_TITLES = {
    "length": "tokens of a row",
    "batch": "rows of a batch",
    "depth": "decoder layers",
    "targets": "projections with LoRA, of 7 a layer",
}
_COLORS = {
    "hf_adamw": "#8a8a8a",
    "floor": "#b9b9b9",
    "paper": "#c0532b",
    "paper_middle": "#d98b6a",
    "balanced": "#d9a441",
    "economical": "#2a7f62",
    "naive": "#5b4a8a",
}


def draw_time(table: Sequence[Row], path: Path) -> None:
    """Write a picture: per case, each configuration's time over that of HF's AdamW."""
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys((row["setup"], row["batch"], row["dtype"]) for row in table))
    figure = Figure(figsize=(9, 1.7 * len(cases)), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, sharex=True)
    for panel, case in zip(panels[:, 0], cases, strict=True):
        rows = [
            row
            for row in table
            if (row["setup"], row["batch"], row["dtype"]) == case
            and row["configuration"] in _COLORS
        ]
        names = [row["configuration"] for row in rows]
        panel.barh(names, [row["times_hf"] for row in rows], color=[_COLORS[n] for n in names])
        for place, row in enumerate(rows):
            target = TARGETS.get(row["configuration"], 0.0)
            if target:
                panel.plot([target] * 2, [place - 0.45, place + 0.45], color="black")
            text = f" {row['times_hf']:.2f} × ({row['median_s']:.2f} s)"
            panel.text(max(row["times_hf"], target), place, text, va="center", fontsize=7)
        panel.set_title(" ".join(case), fontsize=9)
        panel.tick_params(labelsize=7)
        panel.invert_yaxis()
        panel.margins(x=0.15)
    figure.supxlabel("time of a step ÷ Trainer with AdamW; line: target", fontsize=8)
    figure.savefig(path, dpi=130)


def draw_curves(table: Sequence[Row], path: Path) -> None:
    """Write a picture: seconds and bytes along each axis, with the fitted slopes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

    axes = list(dict.fromkeys(row["axis"] for row in table))
    figure = Figure(figsize=(2.9 * len(axes), 5.2), layout="constrained")
    panels = figure.subplots(2, len(axes), squeeze=False)
    for column, axis in enumerate(axes):
        for place, (what, unit) in enumerate(_CURVES.items()):
            panel = panels[place, column]
            for dtype, style in (("fp32", "-"), ("bf16", "--")):
                for name in ("floor", "paper"):
                    rows = [
                        row
                        for row in table
                        if (row["axis"], row["dtype"], row["configuration"]) == (axis, dtype, name)
                    ]
                    if rows:
                        panel.loglog(
                            [row["value"] for row in rows],
                            [row[what] for row in rows],
                            style,
                            marker="o",
                            markersize=3,
                            # Where both use the same, one shows around the other.
                            linewidth=3.5 if name == "floor" else 1.5,
                            color=_COLORS[name],
                            label=f"{name} {dtype}: {rows[0][f'slope_{what}']:.2f}",
                        )
            panel.xaxis.set_major_locator(FixedLocator(AXES[axis]))
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            for scale in (panel.xaxis, panel.yaxis):
                scale.set_major_formatter(StrMethodFormatter("{x:g}"))
                scale.set_minor_locator(NullLocator())
            panel.tick_params(labelsize=7)
            panel.grid(alpha=0.2)
            panel.set_xlabel(_AXIS_TITLES[axis], fontsize=8)
            # Room for the legend above the curves.
            bottom, top = panel.get_ylim()
            panel.set_ylim(bottom, top * (top / bottom) ** 0.45)
            panel.legend(fontsize=6, title="slope", title_fontsize=6, loc="upper left")
            if not column:
                panel.set_ylabel(unit, fontsize=8)
    figure.savefig(path, dpi=130)


# ---- the command ----


def _time_table(cases: Sequence[Case], quick: bool, progress: Progress) -> Iterator[list[Row]]:
    rounds = preset_period("economical") if quick else ROUNDS
    bar = progress.add_task("time", total=len(cases) * (WARM_UP_ROUNDS + rounds))
    for case in cases:
        progress.update(bar, description=f"time: {' '.join(case.facts().values())}")
        rows = measure_time(case, rounds, lambda: progress.advance(bar))
        # One batch is enough for a property that has nothing to do with its size.
        if case.dtype == "fp32" and case.batch == "4x96":
            naive = next(row for row in rows if row["configuration"] == "naive")
            naive["h_difference"] = probe_gradient_difference(case, dropout=True)
            naive["h_difference_packed"] = probe_gradient_difference(case, dropout=False)
        yield rows


def _memory_table(cases: Sequence[Case], quick: bool, progress: Progress) -> Iterator[list[Row]]:
    work = [(name, mode) for mode in CHECKPOINTING for name in IN_MEMORY]
    bar = progress.add_task("memory", total=len(cases) * len(work))
    # The tensors of a tiny model drown in a process: none is started for them.
    measure = measure_memory if quick else memory_in_a_process
    for case in cases:

        def measured(one: tuple[str, str], case: Case = case) -> Row:
            row = measure(case, *one)
            progress.advance(bar)
            return row

        if quick:
            yield [measured(one) for one in work]
            continue
        with ThreadPoolExecutor(THREADS) as pool:
            yield list(pool.map(measured, work))


def _allocations_table(
    cases: Sequence[Case], quick: bool, progress: Progress
) -> Iterator[list[Row]]:
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    bar = progress.add_task("allocations", total=len(dtypes))
    for dtype in dtypes:
        yield measure_allocations(dtype, quick)
        progress.advance(bar)


def _curves_table(cases: Sequence[Case], quick: bool, progress: Progress) -> Iterator[list[Row]]:
    dtypes = list(dict.fromkeys(case.dtype for case in cases))
    axes = list(AXES)[:2] if quick else list(AXES)
    bar = progress.add_task("curves", total=len(dtypes) * len(axes))
    for dtype in dtypes:
        for axis in axes:
            progress.update(bar, description=f"curves: {axis} {dtype}")
            yield measure_curves(axis, dtype, 1 if quick else 5, quick)
            progress.advance(bar)


_MEASURES = {
    "time": _time_table,
    "memory": _memory_table,
    "allocations": _allocations_table,
    "curves": _curves_table,
}
# Columns of what is measured, and written, at once.
_IDENTITY = {
    "time": ("setup", "batch", "dtype"),
    "memory": ("setup", "batch", "dtype"),
    "allocations": ("dtype",),
    "curves": ("axis", "dtype"),
}
_DRAWS = {"time": draw_time, "curves": draw_curves}


def _read_numbers(path: Path) -> list[Row]:
    """Return the rows of a CSV, numbers as such."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    with path.open(encoding="utf-8", newline="") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write CSVs and pictures, print the claims; exit status 1 where one is not met.

    Args:
        arguments: of the command line, without the program's name; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", choices=[*TABLES, "all"], default="all", help="what to measure")
    parser.add_argument(
        "--only",
        default="",
        metavar="WORDS",
        help="cases that have all of these words, such as lora,bf16 or full,4x96",
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny random models, for trying the script: seconds"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of CSVs and pictures")
    parser.add_argument("--measure-memory", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure_memory:
        setup, batch, dtype, name, checkpointing = options.measure_memory
        case = Case(setup, batch, dtype, options.quick)
        print(json.dumps(measure_memory(case, name, checkpointing)))
        return 0

    wanted = set(options.only.split(",")) - {""}
    cases = [
        Case(setup, batch, dtype, options.quick)
        for setup in SETUPS
        for batch in BATCHES
        for dtype in DTYPES
        if wanted <= {setup, batch, dtype}
    ]
    if not cases:
        parser.error(f"--only {options.only}: no case has these words; see --help")
    names = TABLES if options.table == "all" else (options.table,)
    tables = {}
    console = Console(width=120)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for name in names:
            tables[name] = []
            for rows in _MEASURES[name](cases, options.quick, progress):
                tables[name] += rows
                path = replace_rows(f"step_{name}.csv", rows, _IDENTITY[name], options.output)
                measured = " ".join(str(rows[0][column]) for column in _IDENTITY[name])
                console.print(f"Wrote {name} of {measured} to {path}")
                if name in _DRAWS:
                    _DRAWS[name](_read_numbers(path), path.with_suffix(".png"))

    found = claims(tables)
    report = Table("claim", "where", "figure", "target", "met", title="The claims")
    for claim in found:
        target = f"{claim.relation} {claim.target:g}"
        met = "yes" if claim.met else "no"
        report.add_row(claim.claim, claim.where, f"{claim.value:.3g}", target, met)
    console.print(report)
    # The figures of tiny models mean nothing.
    return 0 if options.quick or all(claim.met for claim in found) else 1


if __name__ == "__main__":
    sys.exit(main())
