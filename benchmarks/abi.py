"""What PyTorch's stable ABI costs an operation that takes lists of tensors, in instructions.

Builds one operation three times: against PyTorch's C++ classes; against the classes of its stable
ABI, which ask PyTorch anew for everything; and with csrc/stable.h, which asks each tensor once. It
takes the five lists of AdamW, 2,000 tensors each, and does what every operation here does before
its kernel: three looks at shapes, dtypes, devices and layouts, and the addresses. Versions are
counted as each can: in C++, and from Python.

Counts instructions rather than time, with `valgrind --tool=callgrind`: other work on the machine
does not change them.

    python -m benchmarks.abi
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import load

from benchmarks.provenance import ROOT, write_rows

TENSORS, LISTS, LOOKS = 2_000, 5, 3

_NAMES = [f"list{index}" for index in range(LISTS)]
_SCHEMA = f"({', '.join(f'Tensor[] {name}' for name in _NAMES)}) -> int"
_LOOK = f"""
template <class Tensor>
int64_t look(const Tensor& tensor) {{
  int64_t sum = 0;
  for (int look = 0; look < {LOOKS}; ++look) {{
    for (const int64_t size : tensor.sizes()) sum += size;
    for (const int64_t stride : tensor.strides()) sum += stride;
    sum += tensor.numel() + static_cast<int64_t>(tensor.CONTIGUOUS()) +
           static_cast<int64_t>(tensor.DTYPE()) + static_cast<int64_t>(tensor.layout()) +
           static_cast<int64_t>(tensor.device().is_cuda());
  }}
  return sum + (reinterpret_cast<int64_t>(tensor.ADDRESS()) & 1);
}}
"""


def _look(dtype: str, address: str) -> str:
    names = {"CONTIGUOUS": "is_contiguous", "DTYPE": dtype, "ADDRESS": address}
    return re.sub("|".join(names), lambda found: names[found[0]], _LOOK)


_BODY = """
int64_t looks(%(parameters)s) {
  int64_t sum = 0;
  for (const auto* list : {%(pointers)s}) {
    for (const auto& tensor : *list) {
      sum += look(tensor);
      %(count)s
    }
  }
  return sum;
}
"""


def _body(list_type: str, count: str = "") -> str:
    return _BODY % {
        "parameters": ", ".join(f"{list_type} {name}" for name in _NAMES),
        "pointers": ", ".join(f"&{name}" for name in _NAMES),
        "count": count,
    }


_VECTOR = "const std::vector<torch::stable::Tensor>&"
_BUMP = "tensor.unsafeGetTensorImpl()->bump_version();"
SOURCES = {
    "ordinary": f"""
#include <ATen/core/Tensor.h>
#include <torch/library.h>
{_look("scalar_type", "const_data_ptr")}{_body("at::TensorList", _BUMP)}
TORCH_LIBRARY(abi_ordinary, m) {{ m.def("looks{_SCHEMA}", &looks); }}
""",
    "stable, its classes": f"""
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
{_look("scalar_type", "const_data_ptr")}{_body(_VECTOR)}
STABLE_TORCH_LIBRARY(abi_classes, m) {{ m.def("looks{_SCHEMA}"); }}
STABLE_TORCH_LIBRARY_IMPL(abi_classes, CPU, m) {{ m.impl("looks", TORCH_BOX(&looks)); }}
""",
    "stable, csrc/stable.h": f"""
#include "stable.h"
{_look("dtype", "const_data")}
void looks(StableIValue* stack, uint64_t, uint64_t) {{
  sap_fast::Arguments arguments(stack);
  std::vector<std::vector<sap_fast::Tensor>> lists;
  for (int list = 0; list < {LISTS}; ++list) lists.push_back(arguments.tensors());
  int64_t sum = 0;
  for (const auto& list : lists) {{
    for (const auto& tensor : list) sum += look(tensor);
  }}
  std::memcpy(stack, &sum, sizeof(sum));
}}
STABLE_TORCH_LIBRARY(abi_table, m) {{ m.def("looks{_SCHEMA}"); }}
STABLE_TORCH_LIBRARY_IMPL(abi_table, CPU, m) {{ m.impl("looks", &looks); }}
""",
}
NAMESPACES = {
    "ordinary": "abi_ordinary",
    "stable, its classes": "abi_classes",
    "stable, csrc/stable.h": "abi_table",
}

#: One call between two marks, in a process under callgrind.
_CALL = f"""
import os, subprocess, sys, torch
library, namespace, counts = sys.argv[1], sys.argv[2], sys.argv[3] == "python"
torch.set_num_threads(1)
torch.ops.load_library(library)
operation = getattr(torch.ops, namespace).looks.default
lists = [[torch.zeros(8) for _ in range({TENSORS})] for _ in range({LISTS})]

def call():
    operation(*lists)
    if counts:
        for tensors in lists:
            torch.autograd.graph.increment_version(tensors)

def control(*arguments):
    subprocess.run(["callgrind_control", *arguments, str(os.getpid())], stdout=subprocess.DEVNULL)

call()
control("-i", "on")
call()
control("-i", "off")
control("-d")
"""


def build(name: str, folder: Path) -> Path:
    """Compile one of the libraries and return it."""
    library = NAMESPACES[name]
    source = folder / f"{library}.cpp"
    source.write_text(SOURCES[name])
    flags = ["-O2", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags = flags[:2] if name == "ordinary" else flags
    load(
        library,
        [str(source)],
        extra_cflags=flags,
        extra_include_paths=[str(ROOT / "csrc")],
        build_directory=str(folder),
        is_python_module=False,
    )
    return folder / f"{library}.so"


def instructions(library: Path, namespace: str, counts: str, folder: Path) -> int:
    """Return the instructions of one call; `counts` "python" adds counting the versions there."""
    out = folder / f"{namespace}-{counts}.out"
    valgrind = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
    command = [*valgrind, sys.executable, "-c", _CALL, str(library), namespace, counts]
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    dumped = out.with_name(f"{out.name}.1")
    found = re.search(r"^totals: (\d+)", dumped.read_text(), re.M) if dumped.exists() else None
    if done.returncode != 0 or found is None:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return int(found[1])


def main() -> None:
    """Build, count, print and write the CSV."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for abi, namespace in NAMESPACES.items():
            library = build(abi, folder)
            places = ["C++"] if abi == "ordinary" else ["nowhere", "python"]
            for place in places:
                count = instructions(library, namespace, place, folder)
                rows.append(
                    {
                        "abi": abi,
                        "versions": place,
                        "lists": LISTS,
                        "tensors": TENSORS,
                        "instructions": count,
                        "per_tensor": round(count / (LISTS * TENSORS)),
                        "ratio": round(count / (rows[0]["instructions"] if rows else count), 2),
                    }
                )
                print(rows[-1])
    write_rows("abi.csv", rows)


if __name__ == "__main__":
    main()
