"""How close a direction that is kept in int8 is to the exact one, and what it takes.

    python -m benchmarks.blockwise

Takes ∇L_safe of SmolLM2-135M-Instruct with respect to every parameter, on four pairs, in fp32 and
under bf16 autocast, and random tensors with tails from light to heavy. Writes `blockwise.csv`:
cosine, error and bytes of what `sap_fast.ops.blockwise` makes of them.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import assets
from benchmarks.alignment import write_rows as write_jsonl
from benchmarks.provenance import RESULTS, write_rows
from benchmarks.workloads import SAFETY_PAIRS, Row
from sap_fast import contrastive_loss
from sap_fast.data import (
    SafetyCollator,
    build_safety_pair,
    load_safety_dataset,
    padding_token_id,
)
from sap_fast.ops.blockwise import Quantized, dequantize, is_worth_it, quantize

#: What a kept direction has to reach.
COSINE = 0.999
#: Degrees of freedom of Student's t: ∞ is the normal distribution, and 1 has no variance.
TAILS = (math.inf, 3, 2, 1)
#: Of a tensor of each.
SHAPE = (1024, 1536)


def real_gradients(bf16: bool) -> list[Tensor]:
    """Return ∇L_safe of SmolLM2-135M-Instruct, by parameter."""
    folder = assets.smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    pairs = [
        build_safety_pair(r, k) for k, r in enumerate(assets.harmful_requests()[:SAFETY_PAIRS])
    ]
    with tempfile.TemporaryDirectory() as place:
        file = write_jsonl(Path(place) / "pairs.jsonl", pairs)
        rows = load_safety_dataset(file, tokenizer, 128)
    batch = SafetyCollator(padding_token_id(tokenizer))([rows[k] for k in range(len(pairs))])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = contrastive_loss(model, batch["chosen"], batch["rejected"])
    loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def heavy_tailed(degrees: float, shape: tuple[int, int] = SHAPE) -> Tensor:
    """Return independent draws of Student's t."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if degrees < math.inf:
        squares = torch.randn((int(degrees), *shape), generator=generator, dtype=torch.float64)
        normal /= squares.square().mean(0).sqrt()
    return normal.float()


def compare(what: str, tensors: Sequence[Tensor]) -> Row:
    """Return how close the kept form of some tensors is, of all together and of the worst one."""
    products, squares, found_squares, errors = 0.0, 0.0, 0.0, 0.0
    worst, taken, elements, quantized = 1.0, 0, 0, 0
    for tensor in tensors:
        kept = quantize(tensor) if is_worth_it(tensor) else tensor
        stored = list(kept) if isinstance(kept, Quantized) else [kept]
        taken += sum(part.numel() * part.element_size() for part in stored)
        elements += tensor.numel()
        found = dequantize(kept, tensor.dtype) if isinstance(kept, Quantized) else kept
        exact, found = tensor.double(), found.double()
        product, square, other = (x.sum().item() for x in (exact * found, exact**2, found**2))
        if isinstance(kept, Quantized):
            quantized += tensor.numel()
            worst = min(worst, product / math.sqrt(square * other))
        products, squares, found_squares = (
            products + product,
            squares + square,
            found_squares + other,
        )
        errors += (exact - found).square().sum().item()
    cosine = products / math.sqrt(squares * found_squares)
    return {
        "what": what,
        "tensors": len(tensors),
        "elements": elements,
        "quantized": round(quantized / elements, 4),
        "cosine": round(cosine, 7),
        "worst_cosine": round(worst, 7),
        "relative_error": round(math.sqrt(errors / squares), 6),
        "bytes_per_element": round(taken / elements, 4),
        "met": "yes" if min(cosine, worst) >= COSINE else "no",
    }


def measure() -> Iterator[Row]:
    """Yield a row for every kind of direction."""
    for dtype, bf16 in (("fp32", False), ("bf16 autocast", True)):
        yield compare(f"SmolLM2-135M, safety gradient, {dtype}", real_gradients(bf16))
    for degrees in TAILS:
        name = "normal" if degrees == math.inf else f"Student's t, {degrees} degrees"
        yield compare(name, [heavy_tailed(degrees)])
    rows = heavy_tailed(1)
    rows *= torch.logspace(0, -8, len(rows)).unsqueeze(-1)
    yield compare("Student's t, 1 degree, rows of sizes 1 to 1e-8", [rows])
    yield compare("Student's t, 1 degree, bf16", [heavy_tailed(1).bfloat16()])


def show(rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    table = Table("", "cosine", "worst tensor", "relative error", "bytes per element", "met")
    for row in rows:
        figures = ("cosine", "worst_cosine", "relative_error", "bytes_per_element", "met")
        table.add_row(row["what"], *(str(row[name]) for name in figures))
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """Compare, write the CSV and print it; 1 if a cosine is below 0.999."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the CSV goes")
    options = parser.parse_args(arguments)
    rows = list(measure())
    write_rows("blockwise.csv", rows, options.folder)
    show(rows)
    return int(any(row["met"] == "no" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
