"""What the benchmarks train, and how: shapes, models, adapters, rows, batches, recipes.

A model is SmolLM2-135M-Instruct, aligned, or a random Llama: a step takes as long and as much
memory on random weights and tokens as on real ones. Of `sap_fast` only what reads data is used to
build them, so that `benchmarks.before_after` can do so for another version of it.
"""

from __future__ import annotations

import dataclasses
import functools
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import sap_fast
from sap_fast.data import (
    SafetyCollator,
    TaskCollator,
    build_safety_pair,
    load_safety_dataset,
    load_task_dataset,
    padding_token_id,
)

Row = dict[str, Any]
Batch = dict[str, Tensor]
#: A `LlamaForCausalLM`, plain or in a `PeftModel`.
Model = Any

THREADS = 2
SAFETY_PAIRS = 4
#: What calibration finds for LoRA in bf16 (`benchmarks.fidelity`), so that it is not timed.
RHO = 1.25e-2


# ---- shapes ----


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shapes of a Llama-like model."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear modules."""
        hidden, inner = self.hidden, self.intermediate
        keys = hidden * self.kv_heads // self.heads
        return {
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (hidden, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's linear modules."""
        return sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def head_weights(self) -> int:
        """Elements of the head, or of the embeddings."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Elements of all parameters."""
        norms = (2 * self.layers + 1) * self.hidden
        return self.layers * self.layer_weights + norms + self.head_weights * (2 - self.tied)


SMOLLM2 = Shape("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, tied=True)  # its config.json
#: Small enough that a CPU trains every parameter of it.
SMOLLM2_SHORT = dataclasses.replace(SMOLLM2, name="random Llama", layers=4)
# config.json of meta-llama/Meta-Llama-3-8B and -70B, and of Llama-3.2-1B.
LLAMA_1B = Shape("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256, tied=True)
LLAMA_8B = Shape("Llama-3-8B", 4096, 32, 32, 8, 14336, 128256, tied=False)
LLAMA_70B = Shape("Llama-3-70B", 8192, 80, 64, 8, 28672, 128256, tied=False)
#: To try a benchmark in seconds.
TINY = Shape("tiny", 64, 4, 4, 2, 128, 512, tied=True)


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters; `None` in the place of one means that everything is trained."""

    rank: int = 8
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.05


# ---- models ----


def random_llama(
    shape: Shape, *, dtype: torch.dtype = torch.float32, device: str = "cpu", **settings: Any
) -> LlamaForCausalLM:
    """Return a random Llama, the same in every call.

    Args:
        shape: its shapes.
        dtype: of its parameters.
        device: where they are made.
        **settings: further ones of its configuration.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.tied,
        pad_token_id=0,
        **settings,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)


def add_lora(model: Model, lora: Lora | None = None, seed: int = 0) -> Model:
    """Put LoRA on `model`: α=16; adapters in fp32.

    Args:
        model: what they are put on.
        lora: rank, modules and dropout; by default 8 on q and v, 0.05.
        seed: of their first values.
    """
    lora = lora or Lora()
    torch.manual_seed(seed)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=16,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
    )
    return get_peft_model(model, config)


def trained_parameters(model: Model) -> list[torch.nn.Parameter]:
    """Return the parameters that require grad."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


# ---- rows ----


class Data(NamedTuple):
    """Encoded rows, as `sap_fast.data` loads them."""

    task: Sequence[Any]
    safety: Sequence[Any]
    padding: int

    def batch(self, rows: Sequence[Any]) -> Batch:
        """Return a task batch, padded to its longest row."""
        return TaskCollator(self.padding)(rows)

    def pairs(self, rows: Sequence[Any]) -> dict[str, Batch]:
        """Return a safety batch, likewise."""
        return SafetyCollator(self.padding)(rows)


def real_data(max_length: int) -> Data:
    """Alpaca rows 200 to 799 and pairs on AdvBench 0 to 199, none of them used for alignment."""
    # Imported here: other versions of the package have no use for them.
    from benchmarks import assets
    from benchmarks.alignment import aligned_smollm2, write_rows

    tokenizer = AutoTokenizer.from_pretrained(aligned_smollm2())
    requests = assets.harmful_requests()[:200]
    pairs = [build_safety_pair(request, index) for index, request in enumerate(requests)]
    with tempfile.TemporaryDirectory() as folder:
        task = write_rows(Path(folder) / "task.jsonl", list(assets.alpaca_rows()[200:800]))
        safety = write_rows(Path(folder) / "safety.jsonl", pairs)
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
    """Return the rows of `count` task batches, the same in every call."""
    order = list(range(len(data.task)))
    random.Random(0).shuffle(order)
    chosen = [order[place % len(order)] for place in range(rows * count)]
    return [[data.task[index] for index in chosen[rows * k : rows * (k + 1)]] for k in range(count)]


# ---- the cases of `make step` ----

SETUPS = ("lora", "full")
#: Rows × most tokens of a row.
BATCHES = {"4x96": (4, 96), "8x128": (8, 128)}
DTYPES = ("fp32", "bf16")


@dataclasses.dataclass(frozen=True)
class Case:
    """What is trained on what: a cell of the tables.

    Attributes:
        setup: `"lora"`: adapters of SmolLM2; `"full"`: every parameter of four layers like its.
        batch: a key of `BATCHES`.
        dtype: `"fp32"`; or `"bf16"`: autocast, for LoRA on bf16 weights.
        source: `"real"`: the aligned SmolLM2 below LoRA, real rows. `"random"`: a random model of
            the same shapes, random rows. `"tiny"`: the same of a tiny one, to try a benchmark.
    """

    setup: str
    batch: str
    dtype: str
    source: Literal["real", "random", "tiny"] = "real"

    @property
    def rows(self) -> int:
        """Rows of a task batch."""
        return BATCHES[self.batch][0]

    @property
    def max_length(self) -> int:
        """Tokens at which rows are cut."""
        return BATCHES[self.batch][1]

    @property
    def shape(self) -> Shape:
        """The shapes of the model."""
        if self.source == "tiny":
            return TINY
        return SMOLLM2 if self.setup == "lora" else SMOLLM2_SHORT

    def facts(self) -> Row:
        """Return the columns that name the case."""
        return {"setup": self.setup, "batch": self.batch, "dtype": self.dtype}

    def model(self) -> Model:
        """Return a model of its own for one configuration."""
        lora = self.setup == "lora"
        dtype = torch.bfloat16 if self.dtype == "bf16" and lora else torch.float32
        if self.source == "real" and lora:
            from benchmarks.alignment import aligned_smollm2

            return add_lora(AutoModelForCausalLM.from_pretrained(aligned_smollm2(), dtype=dtype))
        model = random_llama(self.shape, dtype=dtype)
        return add_lora(model) if lora else model

    def data(self) -> Data:
        """Return the rows, loaded once."""
        return _load_data(self.max_length, None if self.source == "real" else self.shape.vocabulary)


@functools.cache
def _load_data(max_length: int, vocabulary: int | None) -> Data:
    if vocabulary is None:
        return real_data(max_length)
    return random_data(max_length, vocabulary=vocabulary, rows=64)


# ---- ways to run a step ----


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How often a step does what.

    Attributes:
        method: `"sap"` or `"blend"`.
        direction_every: steps from one safety pass to the next.
        rows: the part of the task batch that the probe passes see.
        layers: as `ProbeSet(layers=…)`.
    """

    method: str = "sap"
    direction_every: int = 1
    rows: float = 1.0
    layers: str = "early"

    def optimizer(
        self,
        model: Model,
        *,
        rho: float,
        checkpointing: str = "none",
        **settings: Any,
    ) -> Any:
        """Return the optimizer of a model's trained parameters.

        Args:
            model: what is trained.
            rho: of the probe set; like the next one of no use to blending.
            checkpointing: of the probe set.
            **settings: further ones of the optimizer.
        """
        trained = trained_parameters(model)
        settings |= {"direction_every": self.direction_every}
        if self.method == "blend":
            return sap_fast.BlendedAdamW(trained, **settings)
        probes = sap_fast.ProbeSet(model, **self.probe, rho=rho, checkpointing=checkpointing)
        return sap_fast.FusedSAP(trained, probes, **settings)

    @property
    def probe(self) -> dict[str, Any]:
        """Keywords of `ProbeSet`."""
        return {"layers": self.layers, "rows": self.rows}


#: By the label in tables. The direction changes slowly and V belongs to its batch (`recipes.csv`
#: has the cosines): so what saves work saves directions first, and rows second.
RECIPES = {
    "blend": Recipe("blend"),
    "sap": Recipe(),
    "sap, middle layers": Recipe(layers="middle"),
    "sap, direction_every=5, rows=1/2": Recipe(direction_every=5, rows=0.5),
    "sap, direction_every=10, rows=1/4": Recipe(direction_every=10, rows=0.25),
}
#: Cheaper steps yet, beside what `make step` measures: a table of their own.
CHEAPER = {
    "blend, direction_every=10": Recipe("blend", direction_every=10),
    "sap, direction_every=10, rows=1/4": Recipe(direction_every=10, rows=0.25),
    "sap, direction_every=10, rows=1/8": Recipe(direction_every=10, rows=0.125),
}


def recipe_of(name: str) -> Recipe | None:
    """Return the recipe of a configuration, or None if it has none."""
    return (RECIPES | CHEAPER).get(name)


#: What older rows call them. Their `naive` is SAP as it is usually written, in four passes that all
#: compute gradients of weights.
FORMER_LABELS = {
    "paper": "sap",
    "paper_middle": "sap, middle layers",
    "balanced": "sap, direction_every=5, rows=1/2",
    "economical": "sap, direction_every=10, rows=1/4",
}


def label_of(name: str) -> str:
    """Return the label that a configuration has today."""
    return FORMER_LABELS.get(name, name)


def period_of(name: str) -> int:
    """Return after how many steps a configuration does the same passes again."""
    recipe = recipe_of(label_of(name))
    return 1 if recipe is None else recipe.direction_every
