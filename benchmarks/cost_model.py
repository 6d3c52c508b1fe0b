"""A cost model of a training step: FLOPs, bytes, seconds and peak memory, pass by pass.

    python -m benchmarks.cost_model      checks it against step_time.csv, step_memory.csv and
                                         gpu_step.csv, predicts Llama-3 on H100s, writes
                                         cost_model.csv

It counts the work of Llama-like decoders as transformers runs them in eager mode. Matrix products
and attention are counted exactly (`torch.utils.flop_counter` agrees); bytes operation by operation,
each reading its inputs from memory and writing its output. Then

    seconds = FLOPs / rate + bytes / bandwidth

a sum and not a maximum, because eager kernels run one after the other: while a matrix product
computes, no elementwise operation uses the bandwidth. Rate and bandwidth, one pair per dtype, are
all that is fitted, by least squares of the relative error over `step_time.csv`. Memory has no
constant to fit. On an H100, `benchmarks.gpu_step` measured steps of models of Llama's shapes; those
predictions are compared, too. Their bandwidth is the data sheet's, and their rate a round number
that fits the largest model.

Left out: the time to launch kernels and of Python, which a GPU with small batches waits for; random
numbers of dropout; caches, which small tensors live in; the S×S mask's traffic; fragments of the
allocator and the CUDA context; stragglers, and data loading. For several GPUs the batch is the same
on each, and communication hides behind computation as far as it is shorter.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.provenance import RESULTS, write_rows
from sap_fast.losses.head import CHUNK_BYTES
from sap_fast.optimizer import PRESETS
from sap_fast.probes import LAYER_RANGES

Row = dict[str, Any]
Pass = Literal["safety", "probe", "task"]
TOLERANCE = 0.2


@dataclasses.dataclass(frozen=True)
class Model:
    """The shapes of a Llama-like model."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    tied: bool
    head_width: int | None = None

    @property
    def query_width(self) -> int:
        """Elements of a token's queries."""
        return self.heads * (self.head_width or self.hidden // self.heads)

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's linear modules."""
        hidden, queries, inner = self.hidden, self.query_width, self.intermediate
        keys = queries * self.kv_heads // self.heads
        return {
            "q_proj": (hidden, queries),
            "k_proj": (hidden, keys),
            "v_proj": (hidden, keys),
            "o_proj": (queries, hidden),
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


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters; `None` in the place of one means that everything is trained."""

    rank: int
    targets: tuple[str, ...]
    dropout: bool = True


@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a pass runs on. Padded or packed batches differ in nothing else.

    Attributes:
        tokens: positions, padding included.
        squares: Σ S² over the rows.
        scored: positions whose prediction is scored.
    """

    tokens: float
    squares: float
    scored: float


@dataclasses.dataclass(frozen=True)
class Job:
    """A configuration to be priced.

    Attributes:
        model: what is trained.
        lora: how; None: all parameters.
        batches: the batch of each pass that runs; without `"safety"` the step is plain AdamW.
        direction_every: steps from one safety pass to the next.
        probe_every: steps from one pair of probe passes to the next.
        lowest_probed: index of the lowest probed layer; default: that of `ProbeSet`, 1 of 32.
        full_logits: the loss of transformers, and of the naive step, instead of ours.
        naive: probe passes with everything that a task pass computes.
        torch_adamw: the update of `torch.optim.AdamW` without `fused`, as `adamw_torch` runs it.
        checkpointing: `"none"` or `"layers"`.
        dtype: `"fp32"`; `"bf16"`: autocast, and bf16 weights below LoRA.
        flash_backward: attention's backward computes the scores again, as fused kernels do.
        device: `"cpu"` or `"cuda"`, on which the chunks of the logits have other sizes.
    """

    model: Model
    lora: Lora | None
    batches: Mapping[Pass, Tokens]
    direction_every: int = 1
    probe_every: int = 1
    lowest_probed: int | None = None
    full_logits: bool = False
    naive: bool = False
    torch_adamw: bool = False
    checkpointing: str = "none"
    dtype: str = "fp32"
    flash_backward: bool = True
    device: str = "cpu"

    @property
    def trained(self) -> int:
        """Elements of the trained parameters."""
        if self.lora is None:
            return self.model.parameters
        shapes = self.model.projections
        width = sum(sum(shapes[target]) for target in self.lora.targets)
        return self.model.layers * self.lora.rank * width

    @property
    def keeps_direction(self) -> bool:
        """Whether steps without a safety pass use the direction of an earlier one."""
        return self.direction_every > self.probe_every

    @property
    def kept_bytes(self) -> int:
        """Of the moments, and of a kept direction."""
        return (8 + 4 * self.keeps_direction) * self.trained

    @property
    def above_probe(self) -> int:
        """Layers above the lowest probed one."""
        lowest = self.lowest_probed
        if lowest is None:
            lowest = lowest_layer("early", self.model)
        return self.model.layers - 1 - lowest

    @property
    def weight_bytes(self) -> int:
        """Of an element of the weights as they are stored; adapters, fp32, aside."""
        return 2 if self.dtype == "bf16" and self.lora is not None else 4

    @property
    def compute_bytes(self) -> int:
        """Of an element of what linear modules read and write."""
        return 2 if self.dtype == "bf16" else 4

    @property
    def casts_weights(self) -> bool:
        """Whether autocast casts fp32 weights in every pass."""
        return self.weight_bytes != self.compute_bytes

    def frozen(self, kind: Pass) -> bool:
        """Whether parameters take no gradient in a pass."""
        return kind == "probe" and not self.naive

    def differentiated(self, kind: Pass) -> int:
        """Layers that backward goes through."""
        return self.above_probe if self.frozen(kind) else self.model.layers

    def chunks(self, tokens: Tokens) -> int:
        """How many pieces the logits of a pass are computed in."""
        if self.full_logits:
            return 1
        chunk = CHUNK_BYTES[self.device] // (4 * self.model.vocabulary)
        return math.ceil(tokens.scored / max(1, chunk))

    def recomputes_head(self, kind: Pass) -> bool:
        """Whether a pass runs a trained head again: a loss of pairs, which weighs its rows."""
        trained = self.lora is None and not self.frozen(kind)
        return trained and kind == "safety" and not self.full_logits

    def head_positions(self, tokens: Tokens) -> float:
        """Positions that logits are computed for."""
        return tokens.tokens if self.full_logits else tokens.scored


def lowest_layer(layers: str, model: Model) -> int:
    """Return the index of the lowest layer that `ProbeSet(layers=…)` probes."""
    return round(LAYER_RANGES[layers][0] * model.layers)


@dataclasses.dataclass(frozen=True)
class Cost:
    """Work of a pass, or of a step."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, factor: float) -> Cost:
        return Cost(factor * self.flops, factor * self.bytes)


# ---- FLOPs ----


def pass_flops(job: Job, kind: Pass) -> float:
    """Return the FLOPs of matrix products and attention in a pass, forward and backward."""
    model, batch = job.model, job.batches[kind]
    shapes = model.projections
    base = 2 * model.layer_weights * batch.tokens
    adapters = 0.0
    if job.lora is not None:
        width = sum(sum(shapes[target]) for target in job.lora.targets)
        adapters = 2 * job.lora.rank * width * batch.tokens
    # Scores and their products with the values, over the full square: the mask saves no work.
    attention = 4 * batch.squares * model.query_width
    total = model.layers * (base + adapters + attention)

    layers = job.differentiated(kind)
    # The gradients of q, k, v and the scores; five products where the scores are computed again.
    total += layers * (base + adapters + attention * (2.5 if job.flash_backward else 2.0))
    if not job.frozen(kind):
        total += model.layers * (base if job.lora is None else adapters)
        if job.lora is not None:
            # What enters the first layer is not differentiated.
            first = ("q_proj", "k_proj", "v_proj")
            total -= 2 * batch.tokens * sum(math.prod(shapes[name]) for name in first)
            lora_inputs = sum(shapes[t][0] for t in job.lora.targets if t in first)
            total -= 2 * batch.tokens * job.lora.rank * lora_inputs
    if job.checkpointing == "layers":
        # The layer is not run to its end: once all that it saves is there, it stops before its last
        # product, that of down_proj.
        last = 2 * math.prod(shapes["down_proj"]) * batch.tokens
        total += layers * (base + adapters + attention - last)

    head = 2 * model.head_weights * job.head_positions(batch)
    products = 2  # logits, and the gradient of what enters
    if job.lora is None and not job.frozen(kind):
        products += 1 + job.recomputes_head(kind)  # the gradient of its weights
    return total + products * head


# ---- bytes moved ----


def pass_bytes(job: Job, kind: Pass) -> float:
    """Return the bytes that a pass reads and writes."""
    model, batch, frozen = job.model, job.batches[kind], job.frozen(kind)
    layers, compute = job.differentiated(kind), job.compute_bytes
    forward = layer_traffic(job) * batch.tokens
    recomputed = layers if job.checkpointing == "layers" else 0
    # Backward reads what forward read and wrote, and writes as much again.
    total = forward * (model.layers + recomputed + 2 * layers)

    weights = model.layer_weights * compute
    total += weights * (model.layers + recomputed + layers)
    if job.casts_weights:
        total += model.layers * model.layer_weights * (4 + compute)
    if job.lora is None and not frozen:
        total += 4 * model.layers * model.layer_weights  # their gradients
    return total + _head_bytes(job, kind)


def layer_traffic(job: Job) -> float:
    """Return the bytes that a layer's forward reads and writes per token, weights aside."""
    model, compute = job.model, job.compute_bytes
    stream = job.weight_bytes  # autocast leaves embeddings and sums in the dtype of the weights
    hidden, queries = model.hidden, model.query_width
    keys = model.projections["k_proj"][1]
    # transformers' RMSNorm: square (r w), mean (r), scale (r w), weight (r w), and casts, in fp32.
    norms = 2 * (7 * 4 * hidden + (2 * (4 + stream) * hidden if stream == 2 else 0))
    sums = 2 * 3 * stream * hidden
    linear = compute * sum(sum(shape) for shape in model.projections.values())
    if stream != compute:
        linear += 5 * (stream + compute) * hidden  # each of q, k, v, gate, up casts its input
    # x·cos + rotate(x)·sin: a negation, a concatenation, two products and a sum.
    rotary = compute * (1 + 2 + 2 + 2 + 3) * (queries + keys)
    attention = compute * (4 * queries + 2 * (queries + keys))  # with keys and values repeated
    activation = compute * 5 * model.intermediate  # silu (r w) and product (r r w)
    adapters = 0.0
    if job.lora is not None:
        for target in job.lora.targets:
            inputs, outputs = model.projections[target]
            dropout = 4 * 6 * inputs if job.lora.dropout else 0  # noise (w, r w), product (r r w)
            cast = (compute + 4) * inputs if compute == 2 else 0
            adapters += dropout + cast + compute * inputs
            adapters += (2 * 4 + 3 * compute) * outputs  # scaled and added
    return norms + sums + linear + rotary + attention + activation + adapters


def _head_bytes(job: Job, kind: Pass) -> float:
    model, batch = job.model, job.batches[kind]
    compute, chunks = job.compute_bytes, job.chunks(batch)
    trained = job.lora is None and not job.frozen(kind)
    again = job.recomputes_head(kind)
    # Written by the product, log-softmax (r w), the gradients of both losses (w; r r w), read by
    # the product of backward; in bf16 with a cast each way.
    per_logit = 4 + 8 + 4 + 12 + 4 + (12 if compute == 2 else 0)
    per_logit += 12 + 4 if again else 4 * trained
    if job.full_logits and job.dtype == "bf16":
        per_logit += 6  # accelerate casts outputs to fp32
    total = per_logit * model.vocabulary * job.head_positions(batch)
    reads = 2 + again
    total += reads * chunks * model.head_weights * compute
    if job.casts_weights:
        total += reads * (chunks if trained else 1) * model.head_weights * (4 + compute)
    if trained:
        # Each chunk writes a gradient of the head's weights, and all but the first are added to it;
        # with tied embeddings those of the embeddings as well.
        gradients = chunks + model.tied
        total += model.head_weights * (4 * gradients + 12 * (gradients - 1))
    return total


def update_bytes(job: Job) -> float:
    """Return the bytes that clipping and AdamW move in a step."""
    # The fused kernel reads w, g, m, v and writes w, m, v. PyTorch's loop: w·(1 − λ) (r w), lerp of
    # m (r r w), v·β₂ (r w), addcmul (r r w), sqrt, division, eps (3 × r w), addcdiv (r r r w).
    adamw = 4 * (20 if job.torch_adamw else 7)
    clipping = 0 if job.naive else 4 * 3
    return (adamw + clipping) * job.trained


def perturbation_bytes(job: Job) -> float:
    """Return the bytes that the probe passes move beside forward and backward."""
    # Two norms; perturb (r r w w), reflect (r r w), restore (r r w w), see benchmarks/ops.py. A
    # direction that is kept is copied first.
    return 4 * (2 + 4 + 3 + 4 + 2 * job.keeps_direction) * job.trained


def pass_cost(job: Job, kind: Pass) -> Cost:
    """Return the work of one pass."""
    return Cost(pass_flops(job, kind), pass_bytes(job, kind))


def step_cost(job: Job) -> Cost:
    """Return the mean work of a step."""
    cost = pass_cost(job, "task") + Cost(bytes=update_bytes(job))
    if "safety" in job.batches:
        probes = pass_cost(job, "probe") * 2 + Cost(bytes=perturbation_bytes(job))
        cost += pass_cost(job, "safety") * (1 / job.direction_every)
        cost += probes * (1 / job.probe_every)
    return cost


# ---- memory ----


def saved_bytes(job: Job, kind: Pass) -> float:
    """Return the bytes that a layer keeps for backward, per token."""
    model, compute, frozen = job.model, job.compute_bytes, job.frozen(kind)
    hidden = model.hidden
    saved = 2 * 4 * hidden  # the fp32 inputs of both norms
    saved += compute * 4 * model.query_width + 4 * model.heads  # q, k, v (repeated), output
    saved += compute * 3 * model.intermediate  # gate, silu(gate), up
    if job.lora is None and not frozen:
        saved += 2 * 4 * hidden  # what the norms' weights are multiplied with
        # The inputs of q, k, v and of gate, up; autocast casts for each of them anew.
        saved += compute * hidden * (5 if job.casts_weights else 2)
        saved += compute * model.intermediate
    if job.lora is not None:
        for target in job.lora.targets:
            inputs = model.projections[target][0]
            saved += 4 * inputs * job.lora.dropout  # noise, as a factor per element
            saved += 0 if frozen else compute * (inputs + job.lora.rank)
    return saved


def activation_bytes(job: Job, kind: Pass) -> float:
    """Return the bytes of activations that are alive when the head's backward starts."""
    model, batch = job.model, job.batches[kind]
    layers = job.differentiated(kind)
    stream = job.weight_bytes * model.hidden
    if job.checkpointing == "layers":
        alive = layers * stream * batch.tokens
    else:
        alive = layers * saved_bytes(job, kind) * batch.tokens
        if job.casts_weights:
            alive += layers * model.layer_weights * job.compute_bytes  # backward reads the casts
    trained = job.lora is None and not job.frozen(kind)
    # Embeddings, the final norm's input and what its weight is multiplied with.
    alive += (stream + 4 * model.hidden * (1 + trained)) * batch.tokens
    return alive + (1 + job.compute_bytes) * batch.squares  # the mask, and sdpa's own


def head_bytes(job: Job, kind: Pass) -> float:
    """Return the bytes that the head's backward allocates."""
    model, batch = job.model, job.batches[kind]
    # Log-softmax, its gradient and that of the logits, which are released by then.
    rows = math.ceil(job.head_positions(batch) / job.chunks(batch))
    total: float = 12 * model.vocabulary * rows
    if not job.full_logits:
        # The hidden states of the scored positions, and their gradient.
        total += 2 * job.compute_bytes * model.hidden * batch.scored
    if job.casts_weights:
        total += job.compute_bytes * model.head_weights
    if job.lora is None and not job.frozen(kind):
        # The gradient so far and that of this chunk.
        total += 4 * model.head_weights * (1 if job.chunks(batch) == 1 else 2)
    return total


def layer_peak_bytes(job: Job, kind: Pass) -> float:
    """Return the bytes of activations in the highest layer's backward, where most are alive."""
    tokens = job.batches[kind].tokens
    total = activation_bytes(job, kind) + _making_bytes(job, tokens)
    if job.checkpointing == "layers":
        total += saved_bytes(job, kind) * tokens  # computed again
    return total


def _making_bytes(job: Job, tokens: float) -> float:
    """Return the bytes of gradients on their way through a layer: three of its largest width."""
    return 3 * job.compute_bytes * job.model.intermediate * tokens


def pass_memory(job: Job, kind: Pass) -> float:
    """Return the peak of a pass in bytes, gradients included, on top of what it starts with."""
    tokens = job.batches[kind].tokens
    at_the_head = activation_bytes(job, kind) + head_bytes(job, kind)
    # In the lowest layer all parameters have their gradients.
    at_the_bottom = saved_bytes(job, kind) * tokens + _making_bytes(job, tokens)
    if not job.frozen(kind):
        at_the_bottom += 4 * job.trained
        if job.lora is None and job.model.tied:
            # The embeddings' share of their gradient, before it is added.
            at_the_bottom += 4 * job.model.head_weights
    return max(at_the_head, layer_peak_bytes(job, kind), at_the_bottom)


def step_memory(job: Job) -> float:
    """Return the peak of a step in bytes on top of the loaded model."""
    peaks = [pass_memory(job, "task")]
    largest = 4 * (job.model.head_weights if job.lora is None else 0)
    # PyTorch's loop holds a root and a quotient of one parameter at a time.
    peaks.append(4 * job.trained + (2 * largest if job.torch_adamw else 0))
    if "safety" in job.batches:
        peaks.append(pass_memory(job, "safety"))
        # The direction, later W, lies in the buffers of the safety gradient.
        peaks.append(4 * job.trained + pass_memory(job, "probe"))
    return job.kept_bytes + max(peaks)


# ---- fit and check ----


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a machine does per second."""

    flops: float
    bandwidth: float

    def seconds(self, cost: Cost) -> float:
        """Return the time of some work."""
        return cost.flops / self.flops + cost.bytes / self.bandwidth


def fit(costs: Sequence[Cost], seconds: Sequence[float]) -> Speed:
    """Return the rate and the bandwidth that explain measured times, by least relative squares."""
    # a·FLOPs/s + b·bytes/s = 1 in every row, solved for a = 1/rate and b = 1/bandwidth.
    x = [cost.flops / second for cost, second in zip(costs, seconds, strict=True)]
    y = [cost.bytes / second for cost, second in zip(costs, seconds, strict=True)]
    xx, yy = math.fsum(v * v for v in x), math.fsum(v * v for v in y)
    xy = math.fsum(v * w for v, w in zip(x, y, strict=True))
    sx, sy = math.fsum(x), math.fsum(y)
    determinant = xx * yy - xy * xy
    if determinant > 1e-9 * xx * yy:
        a, b = (sx * yy - sy * xy) / determinant, (sy * xx - sx * xy) / determinant
        if a > 0 and b > 0:
            return Speed(1 / a, 1 / b)
    # One of the two explains nothing here, so that it costs nothing: the other alone.
    alone = [Speed(xx / sx, math.inf), Speed(math.inf, yy / sy)]

    def error(speed: Speed) -> float:
        pairs = zip(costs, seconds, strict=True)
        return math.fsum((speed.seconds(cost) / second - 1) ** 2 for cost, second in pairs)

    return min(alone, key=error)


SMOLLM2 = Model("SmolLM2-135M", 576, 30, 9, 3, 1536, 49152, tied=True)  # its config.json
MEASURED = {
    "lora": (SMOLLM2, Lora(8, ("q_proj", "v_proj"))),
    "full": (dataclasses.replace(SMOLLM2, name="random Llama", layers=4), None),
}


def measured_job(row: Mapping[str, str]) -> Job:
    """Return the job that a row of `step_time.csv` or `step_memory.csv` measured."""
    name = row["configuration"]
    preset = PRESETS.get(name, PRESETS["paper"])
    model, lora = MEASURED[row["setup"]]
    batches: dict[Pass, Tokens] = {}
    kinds: tuple[Pass, ...] = ("safety", "probe", "task")
    for kind in kinds:
        if row.get(f"{kind}_tokens"):
            columns = (f"{kind}_{what}" for what in ("tokens", "squares", "scored"))
            batches[kind] = Tokens(*(float(row[column]) for column in columns))
    return Job(
        model,
        lora,
        batches,
        direction_every=preset.direction_every,
        probe_every=preset.probe_every,
        lowest_probed=lowest_layer("middle", model) if name == "paper_middle" else None,
        full_logits=name in ("hf_adamw", "naive"),
        naive=name == "naive",
        torch_adamw=name in ("hf_adamw", "floor", "naive"),
        checkpointing=row.get("checkpointing") or "none",
        dtype=row["dtype"],
    )


def read(path: Path, column: str) -> list[dict[str, str]]:
    """Return the rows of a CSV that have a value in a column."""
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row.get(column)]


def check_time(rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return predicted beside measured seconds, after fitting rate and bandwidth per dtype."""
    table = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        costs = [step_cost(measured_job(row)) for row in of_dtype]
        speed = fit(costs, [float(row["median_s"]) for row in of_dtype])
        for row, cost in zip(of_dtype, costs, strict=True):
            facts = _compared(row, "seconds", speed.seconds(cost), float(row["median_s"]))
            facts |= {"gflop": round(cost.flops / 1e9, 1), "gbyte": round(cost.bytes / 1e9, 2)}
            facts |= {"gflop_per_s": round(speed.flops / 1e9, 1)}
            table.append(facts | {"gbyte_per_s": round(speed.bandwidth / 1e9, 1)})
    return table


def check_memory(rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return predicted beside counted peaks of tensor bytes, in MB."""
    return [
        _compared(row, "peak MB", step_memory(measured_job(row)) / 1e6, float(row["tensors_mb"]))
        for row in rows
    ]


def check_gpu(rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """Return predicted beside measured seconds and peaks of the rows of `gpu_step.csv` that fit."""
    shapes = {model.name: model for model in (LLAMA_1B, LLAMA_8B, LLAMA_70B)}
    table = []
    for row in rows:
        if row["fits"] == "no":
            continue
        way, mode = WAYS[row["trained"]], row["checkpointing"]
        job = predicted_job(shapes[row["model"]], way, row["configuration"], mode)
        facts = row | {"setup": f"{row['model']}, {row['trained']}", "dtype": job.dtype}
        seconds, peak = H100.seconds(step_cost(job)), memory_per_rank(job, 1) / 1e9
        table.append(_compared(facts, "seconds on a GPU", seconds, float(row["median_s"])))
        table.append(_compared(facts, "peak GB on a GPU", peak, float(row["peak_gb"])))
    return table


def _compared(row: Mapping[str, str], what: str, predicted: float, measured: float) -> Row:
    names = ("setup", "batch", "dtype", "configuration", "checkpointing")
    ratio = predicted / measured
    return {"kind": "checked", "what": what} | {
        **{name: row.get(name) or "" for name in names},
        "predicted": round(predicted, 4),
        "measured": round(measured, 4),
        "ratio": round(ratio, 3),
        "met": "yes" if abs(ratio - 1) <= TOLERANCE else "no",
    }


# ---- predictions ----

# config.json of meta-llama/Meta-Llama-3-8B and -70B, and of Llama-3.2-1B.
LLAMA_1B = Model("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256, tied=True)
LLAMA_8B = Model("Llama-3-8B", 4096, 32, 32, 8, 14336, 128256, tied=False)
LLAMA_70B = Model("Llama-3-70B", 8192, 80, 64, 8, 28672, 128256, tied=False)

# NVIDIA H100 SXM5 data sheet: 989 TFLOP/s dense in bf16, 3.35 TB/s, 80 GB, and NVLink's 900 GB/s,
# of which each direction has half.
PEAK_FLOPS = 989e12
H100_BANDWIDTH = 3.35e12
H100_MEMORY = 80e9
NVLINK = 450e9
#: Share of the peak that matrix products reach while they run: with it the times of the 8B model
#: that `benchmarks.gpu_step` measured come out within 3 %.
UTILISATION = 0.8
H100 = Speed(UTILISATION * PEAK_FLOPS, H100_BANDWIDTH)
#: PCIe 5.0 x16 carries 64 GB/s each way; what copies to pinned memory reach of it.
PCIE = 55e9

ALL_LINEAR = tuple(LLAMA_8B.projections)
WAYS: dict[str, Lora | None] = {
    "LoRA r=16 q,v": Lora(16, ("q_proj", "v_proj")),
    "LoRA r=16 all linear": Lora(16, ALL_LINEAR),
    "full": None,
}
#: Per GPU: 4 rows of 2,048 tokens of which half are scored, and 4 pairs of a prompt of 64 tokens
#: with two answers of 64, packed into one row.
TASK = Tokens(4 * 2048, 4 * 2048**2, 4 * 1024)
SAFETY = Tokens(4 * 192, (4 * 192) ** 2, 8 * 64)
OPTIMIZERS = ("AdamW", *PRESETS)


def predicted_job(model: Model, lora: Lora | None, optimizer: str, checkpointing: str) -> Job:
    """Return a job of the predicted table."""
    preset = PRESETS.get(optimizer, PRESETS["paper"])
    batches: dict[Pass, Tokens] = {"task": TASK}
    if optimizer in PRESETS:
        probe = Tokens(*(preset.probe_fraction * value for value in dataclasses.astuple(TASK)))
        batches |= {"safety": SAFETY, "probe": probe}
    return Job(
        model,
        lora,
        batches,
        direction_every=preset.direction_every,
        probe_every=preset.probe_every,
        full_logits=optimizer == "hf_adamw",
        checkpointing=checkpointing,
        dtype="bf16",
        device="cuda",
    )


def communication_bytes(job: Job, ranks: int) -> float:
    """Return what FSDP2 sends to each rank in a step: weights gathered, gradients scattered."""
    model, share = job.model, (ranks - 1) / ranks
    gathered = 2 * model.parameters  # in bf16
    # Resharded after forward, so gathered again for backward. LoRA's gradients are next to nothing.
    passes = {
        kind: gathered * (1 + job.differentiated(kind) / model.layers) for kind in job.batches
    }
    scattered = 2 * job.trained
    total = passes["task"] + scattered
    if "safety" in passes:
        total += (passes["safety"] + scattered) / job.direction_every
        total += 2 * passes["probe"] / job.probe_every
    return share * total


def memory_per_rank(job: Job, ranks: int) -> float:
    """Return the peak on each GPU: weights, and what a step adds."""
    model = job.model
    weights = job.weight_bytes * model.parameters + (4 * job.trained if job.lora else 0)
    # Gradients, or the buffers of the perturbation, beside what stays.
    sharded = weights + job.kept_bytes + 4 * job.trained
    # The rest of a pass is each rank's own, the head's gradient too until it is scattered.
    own = max(activation_bytes(job, kind) + head_bytes(job, kind) for kind in job.batches)
    layer = max(layer_peak_bytes(job, kind) for kind in job.batches)
    # Two layers are whole at a time: the one that runs and the next, prefetched; and the head.
    whole = 2 * (2 * model.layer_weights + model.head_weights) if ranks > 1 else 0
    return sharded / ranks + max(own, layer) + whole


def predict() -> list[Row]:
    """Return the predicted table: Llama-3 on one and eight H100."""
    table = []
    for model in (LLAMA_8B, LLAMA_70B):
        for way, lora in WAYS.items():
            for ranks in (1, 8):
                adamw = 0.0
                for optimizer in OPTIMIZERS:
                    modes = ("none", "layers")
                    jobs = [predicted_job(model, lora, optimizer, mode) for mode in modes]
                    # Checkpointing only where it is needed to fit.
                    plain, checkpointed = jobs
                    fits = memory_per_rank(plain, ranks) <= H100_MEMORY
                    job = plain if fits else checkpointed
                    peak = memory_per_rank(job, ranks)
                    transfer = communication_bytes(job, ranks) / NVLINK if ranks > 1 else 0.0
                    computation = H100.seconds(step_cost(job))
                    seconds = max(computation, transfer)
                    adamw = adamw or seconds
                    table.append(
                        {
                            "kind": "predicted",
                            "model": model.name,
                            "trained": way,
                            "gpus": ranks,
                            "configuration": optimizer,
                            "checkpointing": job.checkpointing,
                            "step_s": round(seconds, 3),
                            "communication_s": round(transfer, 3),
                            "tokens_per_s": round(ranks * TASK.tokens / seconds),
                            "peak_gb_per_gpu": round(peak / 1e9, 1),
                            "fits": "yes" if peak <= H100_MEMORY else "no",
                            "times_adamw": round(seconds / adamw, 2),
                        }
                    )
    return table


def offloading() -> list[Row]:
    """Return, per model, what moving activations to the host costs beside computing them again."""
    table = []
    for model in (LLAMA_8B, LLAMA_70B):
        job = predicted_job(model, WAYS["LoRA r=16 all linear"], "AdamW", "layers")
        plain = dataclasses.replace(job, checkpointing="none")
        layers = model.layers
        # Per token and layer: out during forward, back during backward, beside computation.
        computing = H100.seconds(pass_cost(plain, "task")) / layers / TASK.tokens
        again = H100.seconds(pass_cost(job, "task")) / layers / TASK.tokens - computing
        inputs = job.weight_bytes * model.hidden
        for what, size in (("saved tensors", saved_bytes(plain, "task")), ("layer inputs", inputs)):
            table.append(
                {
                    "kind": "predicted",
                    "what": f"offload of {what}",
                    "model": model.name,
                    "moving_us": round(1e6 * 2 * size / PCIE, 3),
                    "computing_us": round(1e6 * computing, 3),
                    "recomputing_us": round(1e6 * again, 3),
                    "freed_gb": round(size * layers * TASK.tokens / 1e9, 1),
                }
            )
    return table


def verdict(row: Row) -> str:
    """Return in words whether an offload pays."""
    moving, computing, again = row["moving_us"], row["computing_us"], row["recomputing_us"]
    exposed = max(0.0, moving - computing)
    if row["what"].endswith("layer inputs"):
        said = "hidden behind computation" if exposed == 0 else "longer than computation"
        return f"{said}: frees {row['freed_gb']} GB where checkpointing alone does not fit"
    if moving > computing or exposed > again:
        return f"no: {moving:.1f} µs a token and layer, where recomputing takes {again:.1f} µs"
    return f"yes: {moving:.1f} µs, hidden behind {computing:.1f} µs of computation"


def markdown(table: Sequence[Row]) -> str:
    """Return the predicted table for the README."""
    columns = ("model", "trained", "gpus", "checkpointing", *OPTIMIZERS)
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for start in range(0, len(table), len(OPTIMIZERS)):
        rows = table[start : start + len(OPTIMIZERS)]
        cells = [str(rows[0][column]) for column in columns[:3]]
        cells.append(", ".join(dict.fromkeys(row["checkpointing"] for row in rows)))
        for row in rows:
            if row["fits"] == "no":
                cells.append(f"{row['peak_gb_per_gpu']:.0f} GB: does not fit")
            else:
                speed = f"{row['tokens_per_s']:,} tokens/s, {row['peak_gb_per_gpu']:.0f} GB"
                cells.append(f"{speed} (× {row['times_adamw']:.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- the command ----


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and predict; exit status 1 where a prediction is off by more than 20 %.

    Args:
        arguments: of the command line, without the program's name; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="folder of the CSVs that are read and written"
    )
    folder = parser.parse_args(arguments).results
    # Rows of single passes name no task batch.
    checked = check_time(read(folder / "step_time.csv", "task_tokens"))
    checked += check_memory(read(folder / "step_memory.csv", "task_tokens"))
    if (folder / "gpu_step.csv").exists():
        checked += check_gpu(read(folder / "gpu_step.csv", "fits"))
    predicted, moved = predict(), offloading()
    path = write_rows("cost_model.csv", checked + predicted + moved, folder)

    console = Console(width=120)
    columns = ("what", "setup", "batch", "dtype", "configuration", "checkpointing")
    figures = ("predicted", "measured", "ratio", "met")
    report = Table(*columns, *figures, title="Predicted beside measured")
    for row in checked:
        report.add_row(*(str(row[column]) for column in (*columns, *figures)))
    console.print(report)
    for dtype in dict.fromkeys(row["dtype"] for row in checked):
        row = next(row for row in checked if row["dtype"] == dtype and "gflop_per_s" in row)
        print(f"{dtype}: {row['gflop_per_s']} GFLOP/s and {row['gbyte_per_s']} GB/s fitted")
    missed = sum(row["met"] == "no" for row in checked)
    print(f"{missed} of {len(checked)} predictions are off by more than {TOLERANCE:.0%}\n")
    print(markdown(predicted))
    print("\nDoes offloading to the host pay on an H100?")
    for row in moved:
        print(f"{row['what']}, {row['model']}: {verdict(row)}")
    print(f"Wrote {path}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
