"""How many operations a pass hands to the device, with the probe passes as two and as one.

    python -m benchmarks.launches        or: make launches

A GPU that waits for its host runs as fast as the host launches. So this counts what PyTorch
dispatches in each pass of a step, forward and backward, on any machine: every operation that reads
or writes memory, without views and allocations, most of which are one launch each. The models have
the layers of Llama-3-8B and the widths of a toy, since a width changes no count; LoRA is on q and
v. On a 4-bit base (nf4, where bitsandbytes is installed) it also counts how often a weight is
dequantized. Writes `launches.csv`.
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.provenance import RESULTS, replace_rows
from benchmarks.workloads import (
    LLAMA_8B,
    THREADS,
    Data,
    Lora,
    Model,
    Row,
    Shape,
    add_lora,
    random_data,
    random_llama,
    trained_parameters,
)
from sap_fast import FusedSAP, ProbeSet, contrastive_loss, task_loss

#: Wide enough for a 4-bit base, whose blocks have 64 elements.
WIDTHS = {"hidden": 128, "heads": 4, "kv_heads": 2, "intermediate": 256, "vocabulary": 512}
SETUPS = ("full", "lora", "lora, 4-bit base")
#: By setup; what trains every parameter cannot be paired.
PASSES = {"full": ("two",), "lora": ("two", "paired"), "lora, 4-bit base": ("two", "paired")}
ROWS, LENGTH, PAIRS = 4, 32, 2

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}


class Operations(TorchDispatchMode):
    """Counts operations that read or write memory, and dequantizations among them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.dequantized = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and count it."""
        name = func._schema.name.partition("::")[2]
        if not func.is_view and name not in _ALLOCATIONS:
            self.count += 1
            self.dequantized += "dequantize" in name
        return func(*args, **(kwargs or {}))


def build(setup: str, layers: int) -> Model:
    """Return a model in training mode."""
    shape = Shape("toy", layers=layers, tied=False, **WIDTHS)
    if setup == "full":
        return random_llama(shape).train()
    model: Any = random_llama(shape)
    if setup == "lora, 4-bit base":
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    # Without dropout, whose masks are operations too: in both ways as many, for each adapter.
    return add_lora(model, Lora(dropout=0.0)).train()


def setups() -> Iterator[str]:
    """Yield the setups that this environment has."""
    for setup in SETUPS:
        if "4-bit" not in setup or importlib.util.find_spec("bitsandbytes") is not None:
            yield setup


def measure(setup: str, passes: str, layers: int) -> list[Row]:
    """Return a row per pass: its operations in the second step."""
    model = build(setup, layers)
    data = random_data(LENGTH, vocabulary=WIDTHS["vocabulary"], rows=ROWS + 1, equal=True)
    probes = ProbeSet(model, rho=1e-2, passes=passes)
    optimizer = FusedSAP(trained_parameters(model), probes)
    batch = data.batch(data.task[:ROWS])
    task, safety = partial(_task, model), partial(_safety, model, data)
    optimizer.step(task, safety, batch)  # finds out what the model is like
    counts: dict[str, Operations] = {}

    def counted(name: str, run: Callable[[], Any]) -> None:
        counts[name] = Operations()
        with counts[name]:
            run()

    optimizer.zero_grad()
    counted("safety", partial(optimizer.passes.safety_pass, safety))
    counted("probe", partial(optimizer.passes.probe_passes, task, batch))
    with optimizer.task_pass():
        counted("task", partial(task, batch))
    counted("update", optimizer.step)
    return [
        {
            "setup": setup,
            "layers": layers,
            "probe_passes": passes,
            "pass": name,
            "operations": found.count,
            "dequantizations": found.dequantized,
        }
        for name, found in counts.items()
    ]


def _task(model: Model, part: Any) -> Tensor:
    loss = task_loss(model, part)
    loss.backward()
    return loss.detach()


def _safety(model: Model, data: Data) -> Tensor:
    loss = contrastive_loss(model, **data.pairs(data.safety[:PAIRS]))
    loss.backward()
    return loss.detach()


def table(rows: Sequence[Row]) -> Table:
    """Return what is printed: a line per setup, a column per pass."""
    names = list(dict.fromkeys(row["pass"] for row in rows))
    shown = Table("setup", "probe passes", *names, "step", "dequantizations")
    cells: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        cells.setdefault((row["setup"], row["probe_passes"]), []).append(row)
    for (setup, passes), found in cells.items():
        counts = [row["operations"] for row in found]
        dequantized = sum(row["dequantizations"] for row in found)
        shown.add_row(setup, passes, *map(str, counts), str(sum(counts)), str(dequantized))
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, write the CSV, print the table.

    Args:
        arguments: of the command line; `sys.argv` by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--layers", type=int, default=LLAMA_8B.layers, help=f"of the models ({LLAMA_8B.layers})"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the CSV")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    rows = [
        row
        for setup in setups()
        for passes in PASSES[setup]
        for row in measure(setup, passes, options.layers)
    ]
    Console().print(table(rows))
    identity = ("setup", "layers", "probe_passes", "pass")
    print(f"Wrote {replace_rows('launches.csv', rows, identity, options.output)}")


if __name__ == "__main__":
    main()
