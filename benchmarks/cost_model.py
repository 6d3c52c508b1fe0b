"""A cost model of a training step: FLOPs, bytes, seconds and peak memory, pass by pass.

It counts the work of Llama-like decoders as transformers runs them in eager mode. Matrix products
and attention are counted exactly (`torch.utils.flop_counter` agrees); bytes operation by operation,
each reading its inputs from memory and writing its output. Then

    seconds = FLOPs / rate + bytes / bandwidth

a sum and not a maximum, because eager kernels run one after the other: while a matrix product
computes, no elementwise operation uses the bandwidth. Memory has no constant to fit.

Left out: the time to launch kernels and of Python, which a GPU with small batches waits for; random
numbers of dropout; caches, which small tensors live in; the S×S mask's traffic; fragments of the
allocator and the CUDA context.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from benchmarks.workloads import Lora, Shape
from sap_fast.losses.head import CHUNK_BYTES
from sap_fast.model.layers import LAYER_RANGES
from sap_fast.ops.blockwise import BLOCK

Pass = Literal["safety", "probe", "task"]

#: Bytes per weight of a quantized linear layer: NF4 with a constant of one byte for 64 weights, and
#: one of four bytes for 256 of those (double quantization); LLM.int8 without its constant per row.
STORED_BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}


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
        direction_bytes: of an element of a direction that is kept; None: what is stored in int8
            (`sap_fast.ops.blockwise`), of full parameters, or 4, of adapters.
        lowest_probed: index of the lowest probed layer; default: that of `ProbeSet`, 1 of 32.
        full_logits: the loss of transformers, and of the published step, instead of ours.
        probe_passes: how many there are.
        freezes: probe passes compute no gradients of weights.
        clips: the gradient is clipped.
        torch_adamw: the update of `torch.optim.AdamW` without `fused`, as `adamw_torch` runs it.
        checkpointing: `"none"` or `"layers"`.
        dtype: `"fp32"`; `"bf16"`: autocast, and bf16 weights below LoRA.
        flash_backward: attention's backward computes the scores again, as fused kernels do.
        device: `"cpu"` or `"cuda"`, on which the chunks of the logits have other sizes.
        base: a key of `STORED_BYTES`: how the linear layers below LoRA are quantized; None: they
            are not.
    """

    model: Shape
    lora: Lora | None
    batches: Mapping[Pass, Tokens]
    direction_every: int = 1
    direction_bytes: float | None = None
    lowest_probed: int | None = None
    full_logits: bool = False
    probe_passes: int = 2
    freezes: bool = True
    clips: bool = True
    torch_adamw: bool = False
    checkpointing: str = "none"
    dtype: str = "fp32"
    flash_backward: bool = True
    device: str = "cpu"
    base: str | None = None

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
        return self.direction_every > 1

    @property
    def blends(self) -> bool:
        """Whether the direction is there until the update, in which it is blended."""
        return "safety" in self.batches and "probe" not in self.batches

    @property
    def kept_element(self) -> float:
        """Bytes of an element of a kept direction; 0 where none is kept."""
        if not self.keeps_direction:
            return 0
        stored = 1 + 4 / BLOCK if self.lora is None else 4
        return stored if self.direction_bytes is None else self.direction_bytes

    @property
    def kept_bytes(self) -> float:
        """Of the moments, and of a kept direction."""
        return (8 + self.kept_element) * self.trained

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
    def loaded_bytes(self) -> float:
        """Of the loaded model: its weights, and adapters in fp32."""
        model = self.model
        linear = model.layers * model.layer_weights
        stored = self.weight_bytes if self.base is None else STORED_BYTES[self.base]
        adapters = 4 * self.trained if self.lora is not None else 0
        return stored * linear + self.weight_bytes * (model.parameters - linear) + adapters

    @property
    def dequantized_bytes(self) -> int:
        """Of the largest quantized weight as it is computed with: one is there at a time."""
        if self.base is None:
            return 0
        return self.compute_bytes * max(map(math.prod, self.model.projections.values()))

    @property
    def casts_weights(self) -> bool:
        """Whether autocast casts fp32 weights in every pass."""
        return self.weight_bytes != self.compute_bytes

    def frozen(self, kind: Pass) -> bool:
        """Whether parameters take no gradient in a pass."""
        return kind == "probe" and self.freezes

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


def lowest_layer(layers: str, model: Shape) -> int:
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
    attention = 4 * batch.squares * model.hidden
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
    if job.base is not None:
        # Dequantized for each use: read as they are stored, and written.
        uses = model.layers + recomputed + layers
        total += uses * model.layer_weights * (STORED_BYTES[job.base] + compute)
    if job.lora is None and not frozen:
        total += 4 * model.layers * model.layer_weights  # their gradients
    return total + _head_bytes(job, kind)


def layer_traffic(job: Job) -> float:
    """Return the bytes that a layer's forward reads and writes per token, weights aside."""
    model, compute = job.model, job.compute_bytes
    stream = job.weight_bytes  # autocast leaves embeddings and sums in the dtype of the weights
    hidden = queries = model.hidden
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
    clipping = 4 * 3 if job.clips else 0
    # Two norms and a product of gradient and direction (4 r), which the update reads, too.
    blending: float = 4 * 5 if job.blends else 0
    if job.blends and 0 < job.kept_element < 4:
        blending += 2 * (job.kept_element + 4)  # made of what is stored, for each (r, w)
    return (adamw + clipping + blending) * job.trained


def perturbation_bytes(job: Job) -> float:
    """Return the bytes that the probe passes move beside forward and backward."""
    # Two norms; perturb (r r w w), reflect (r r w), restore (r r w w), see benchmarks/ops.py. A
    # direction that is kept is copied first, or made of what is stored (r, w).
    copied = job.kept_element + 4 if job.keeps_direction else 0
    return (4 * (2 + 4 + 3 + 4) + copied) * job.trained


def pass_cost(job: Job, kind: Pass) -> Cost:
    """Return the work of one pass."""
    return Cost(pass_flops(job, kind), pass_bytes(job, kind))


def step_cost(job: Job) -> Cost:
    """Return the mean work of a step."""
    cost = pass_cost(job, "task") + Cost(bytes=update_bytes(job))
    if "safety" in job.batches:
        cost += pass_cost(job, "safety") * (1 / job.direction_every)
    if "probe" in job.batches:
        cost += pass_cost(job, "probe") * job.probe_passes + Cost(bytes=perturbation_bytes(job))
    return cost


# ---- memory ----


def saved_bytes(job: Job, kind: Pass) -> float:
    """Return the bytes that a layer keeps for backward, per token."""
    model, compute, frozen = job.model, job.compute_bytes, job.frozen(kind)
    hidden = model.hidden
    saved = 2 * 4 * hidden  # the fp32 inputs of both norms
    saved += compute * 4 * model.hidden + 4 * model.heads  # q, k, v (repeated), output
    saved += compute * 3 * model.intermediate  # gate, silu(gate), up
    if job.lora is None and not frozen:
        saved += 2 * 4 * hidden  # what the norms' weights are multiplied with
        # The inputs of q, k, v and of gate, up; autocast casts for each of them anew.
        saved += compute * hidden * (5 if job.casts_weights else 2)
        saved += compute * model.intermediate
    if job.lora is not None:
        for target in job.lora.targets:
            inputs = model.projections[target][0]
            saved += 4 * inputs * bool(job.lora.dropout)  # noise, as a factor per element
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
    return 3 * job.compute_bytes * job.model.intermediate * tokens + job.dequantized_bytes


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
    if "probe" in job.batches:
        # The direction, later W, lies in the buffers of the safety gradient.
        peaks.append(4 * job.trained + pass_memory(job, "probe"))
    if job.blends:
        peaks.append(4 * job.trained + pass_memory(job, "task"))
    return job.kept_bytes + max(peaks)
