"""What PyTorch's stable ABI costs an operation that takes lists of tensors.

Builds the same operation twice, against the stable ABI and against the ordinary one, and times
calls on lists of 2,000 tensors, as AdamW makes them (five lists). The operation only reads the
addresses.

    python -m benchmarks.abi
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.cpp_extension import load

from benchmarks.provenance import write_rows

TENSORS, LISTS, CALLS, ROUNDS = 2_000, 5, 20, 15

_ARGUMENTS = ", ".join(f"Tensor[] list{index}" for index in range(LISTS))
_BODY = """
int64_t addresses(%(parameters)s) {
  int64_t sum = 0;
  for (const auto* list : {%(pointers)s})
    for (const auto& tensor : *list) sum += reinterpret_cast<int64_t>(tensor.data_ptr()) & 1;
  return sum;
}
"""
_ORDINARY = """
#include <ATen/core/Tensor.h>
#include <torch/library.h>
%(body)s
TORCH_LIBRARY(abi_ordinary, m) {
  m.def("addresses(%(arguments)s) -> int", &addresses);
}
"""
_STABLE = """
#define TORCH_TARGET_VERSION %(version)s
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
%(body)s
STABLE_TORCH_LIBRARY(abi_stable, m) { m.def("addresses(%(arguments)s) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(abi_stable, CPU, m) { m.impl("addresses", TORCH_BOX(&addresses)); }
"""


def build(name: str, template: str, list_type: str, folder: Path) -> None:
    """Compile and load one of the two libraries."""
    names = [f"list{index}" for index in range(LISTS)]
    body = _BODY % {
        "parameters": ", ".join(f"{list_type} {name}" for name in names),
        "pointers": ", ".join(f"&{name}" for name in names),
    }
    source = folder / f"{name}.cpp"
    values = {
        "body": body,
        "arguments": _ARGUMENTS,
        "version": f"0x{_torch_version():016x}",
    }
    source.write_text(template % values)
    load(name, [str(source)], extra_cflags=["-O2"], build_directory=folder, is_python_module=False)


def _torch_version() -> int:
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    return major << 56 | minor << 48


def main() -> None:
    """Build, time interleaved, print and write the CSV."""
    tensors = [torch.zeros(8) for _ in range(TENSORS)]
    with tempfile.TemporaryDirectory() as folder:
        build("abi_ordinary", _ORDINARY, "at::TensorList", Path(folder))
        build("abi_stable", _STABLE, "const std::vector<torch::stable::Tensor>&", Path(folder))
        operations = {
            "ordinary": torch.ops.abi_ordinary.addresses,
            "stable": torch.ops.abi_stable.addresses,
        }
        seconds: dict[str, list[float]] = {name: [] for name in operations}
        for _ in range(ROUNDS):
            for name, operation in operations.items():
                start = time.perf_counter()
                for _ in range(CALLS):
                    operation(*[tensors] * LISTS)
                seconds[name].append((time.perf_counter() - start) / CALLS)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        {
            "abi": name,
            "lists": LISTS,
            "tensors": TENSORS,
            "call_us": round(1e6 * value, 1),
            "ratio": round(value / medians["ordinary"], 2),
        }
        for name, value in medians.items()
    ]
    for row in rows:
        print(row)
    write_rows("abi.csv", rows)


if __name__ == "__main__":
    main()
