"""What each GPU kernel takes: registers, spills, shared memory and bytes moved per element.

Compiles the CUDA C++ kernels with nvcc and the Triton kernels with their own compiler, for devices
that need not be there, and reads registers and memory from the binaries. Bytes per element are
those of the global loads and stores on the main path of the PTX, divided by the elements that a
thread handles there; beside them stands the floor, every operand moved once. What one element per
tensor, row or column costs is not counted.

    python -m benchmarks.kernel_report
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.provenance import ROOT, write_rows

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100)

DTYPES = {"float": "fp32", "__nv_bfloat16": "bf16", "__half": "fp16"}
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}

#: Operation, bytes per element that any implementation must move (fp32, 16-bit) of each kernel that
#: streams; the other kernels handle one number per tensor, chunk or column.
FLOORS = {
    "SumSquares": ("sum_squares", 4, 2),
    "Dot": ("dot", 8, 4),
    "PerturbSwap": ("perturb_swap_", 16, 8),
    "Reflect": ("reflect_", 12, 6),
    "RestoreSwap": ("restore_swap_", 16, 8),
    "AdamW": ("adamw_blend_", 28, 22),
    "AdamW with direction": ("adamw_blend_", 32, 24),
    "probe_add_kernel": ("probe_add", 8, 4),
    "sum_rows": ("probe_project_", 4, 2),
    "LargestOfChunk": ("probe_rule_", 4, 4),
    "UnitSquares": ("probe_rule_", 4, 4),
    "ApplyRule": ("probe_rule_", 8, 8),
}
#: The other kernels' operations.
OPERATIONS = {
    "add_up_kernel": "sum_squares, dot",
    "count_steps": "adamw_blend_",
    "add_splits": "probe_project_",
    "find_largest": "probe_rule_",
    "find_norms": "probe_rule_",
}
#: The same bytes for the Triton kernels that stream, by operation, kernel and, where it matters,
#: variant.
TRITON_FLOORS = {
    ("sum_squares", "sum_products"): (4, 2),
    ("dot", "sum_products"): (8, 4),
    ("perturb_swap_", "perturb_swap"): (16, 8),
    ("reflect_", "reflect"): (12, 6),
    ("restore_swap_", "restore_swap"): (16, 8),
    ("adamw_blend_", "adamw_blend"): (28, 22),
    ("adamw_blend_", "adamw_blend", "blended"): (32, 24),
    ("probe_add", "add"): (8, 4),
    ("probe_project_", "column_sums"): (4, 2),
    ("probe_rule_", "extent"): (4, 4),
    ("probe_rule_", "unit_squares"): (4, 4),
    ("probe_rule_", "rule"): (8, 8),
}
#: `sap_fast::cuda::Rule`.
RULES = ("gradient", "normalized", "adam")


@dataclass(frozen=True)
class Kernel:
    """A kernel of csrc/cuda, compiled for one architecture."""

    symbol: str  # demangled
    architecture: int
    registers: int
    spills: int  # bytes stored, loaded, and of stack
    shared: int  # bytes
    ptx: str

    @property
    def name(self) -> str:
        """The operation's type, or the function where it is a kernel of its own."""
        generic = re.search(r"cuda::(?:transform|reduce_chunks)<[^,<]*::(\w+)", self.symbol)
        found = generic or re.search(r"::(\w+)(?:<[^()]*(?:\(anonymous.*)?)?\(", self.symbol)
        assert found is not None, self.symbol
        return found[1] + (" with direction" if re.search(r"AdamW<\w+, true>", self.symbol) else "")

    @property
    def dtype(self) -> str:
        """What elements are stored as."""
        head = self.symbol.split(">(")[0]
        return next((DTYPES[name] for name in DTYPES if re.search(rf"[<]{name}\b", head)), "fp32")

    @property
    def variant(self) -> str:
        """What else tells it from the other kernels of the same name."""
        parts = []
        if found := re.search(r"Table<(?:\d+, )?(\d+)>", self.symbol):
            parts.append(f"arguments of {found[1]} bytes")
        if found := re.search(r"ApplyRule<\(sap_fast::cuda::Rule\)(\d)>", self.symbol):
            parts.append(RULES[int(found[1])])
        if found := re.search(r"(?:sum_rows|probe_add_kernel)<\w+, (\d)(?:, (\w+))?>", self.symbol):
            parts.append(f"packs of {found[1]}")
            if found[2] == "true":
                parts.append("few rows")
        return ", ".join(parts)


# ---- CUDA C++ ----


def nvcc() -> str | None:
    """Return the CUDA compiler, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


def flags() -> list[str]:
    """Return the flags with which setup.py compiles the kernels."""
    found = re.search(
        r"^CUDA_FLAGS = (\[.*?\])", (ROOT / "setup.py").read_text(encoding="utf-8"), re.M | re.S
    )
    assert found is not None, "setup.py has no CUDA_FLAGS"
    return list(ast.literal_eval(found[1]))


def nvcc_version() -> str:
    """Return the version of the CUDA compiler."""
    compiler = nvcc()
    assert compiler is not None, "nvcc is not there"
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"\bV([\d.]+)", done.stdout)
    assert found is not None, done.stdout
    return found[1]


def compile_source(source: Path, architectures: Sequence[int] = ARCHITECTURES) -> list[Kernel]:
    """Compile one source for several architectures and return its kernels.

    Raises:
        RuntimeError: if it does not compile without warnings; the message is the compiler's.
    """
    compiler = nvcc()
    assert compiler is not None, "nvcc is not there"
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, *flags(), "-Xptxas", "-v", "-Werror", "all-warnings"]
        # The host code is GCC's to check: what a binding would link, with its warnings.
        command += ["-Xcompiler", "-Wall,-Wextra,-Werror", "--keep", "--keep-dir", folder]
        for arch in architectures:
            command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command += ["-c", str(source), "-o", str(Path(folder, "kernels.o"))]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        log = done.stdout + done.stderr
        if done.returncode != 0 or re.search(r"\bwarning\b", log, re.I):
            raise RuntimeError(f"{source.name} does not compile without warnings:\n{log}")
        kernels = []
        for arch in architectures:
            path = Path(folder, f"{source.stem}.compute_{arch}.ptx")
            if not path.exists():  # with one architecture
                path = path.with_name(f"{source.stem}.ptx")
            bodies = entries(path.read_text(encoding="utf-8"))
            for symbol, usage in resources(log, arch).items():
                kernels.append(Kernel(demangle(symbol), arch, *usage, ptx=bodies[symbol]))
    return kernels


def compile_sources(architectures: Sequence[int] = ARCHITECTURES) -> list[Kernel]:
    """Compile every source of csrc/cuda, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(partial(compile_source, architectures=architectures), SOURCES)
        return [kernel for kernels in compiled for kernel in kernels]


def demangle(symbol: str) -> str:
    """Return a C++ symbol as it is written."""
    return subprocess.run(
        ["c++filt", symbol], capture_output=True, text=True, check=True
    ).stdout.strip()


def resources(log: str, architecture: int) -> dict[str, tuple[int, int, int]]:
    """Return registers, spilled and shared bytes of every kernel in what `ptxas -v` printed."""
    found: dict[str, tuple[int, int, int]] = {}
    symbol, spills = None, 0
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for 'sm_(\d+)'", line):
            symbol, spills = (match[1] if int(match[2]) == architecture else None), 0
        elif symbol is None:
            continue
        elif "bytes spill stores" in line:
            # One line for the kernel and one for each function that it calls.
            spills += sum(int(number) for number in re.findall(r"(\d+) bytes", line))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            found[symbol] = (int(match[1]), spills, int(shared[1]) if shared else 0)
    return found


# ---- PTX ----


def entries(ptx: str) -> dict[str, str]:
    """Return the body of every kernel of a PTX module, by its symbol."""
    return {
        match[1]: match[0] for match in re.finditer(r"\.entry\s+([\w$]+)\(.*?^\}", ptx, re.M | re.S)
    }


@dataclass(frozen=True)
class Access:
    """A load from global memory, or a store to it."""

    load: bool
    bytes: int
    register: str  # that holds the address


def accesses(ptx: str) -> Iterator[Access]:
    """Yield the accesses to global memory."""
    pattern = r"\b(ld|st)\.global([\w.:]*)\s+[^\[;]*\[\s*(%\w+)"
    for match in re.finditer(pattern, ptx):
        types = match[2].split(".")
        count = next((int(part[1]) for part in types if re.fullmatch(r"v\d", part)), 1)
        yield Access(match[1] == "ld", count * int(types[-1][1:]) // 8, match[3])


def operands(ptx: str) -> dict[str, str]:
    """Return, for every register that an address is computed in, that of the pointer it is from.

    Pointers are arguments, or read from arguments, and turned into addresses of global memory once.
    """
    sources: dict[str, set[str]] = {}
    found: dict[str, str] = {}
    for match in re.finditer(r"^\s*([\w.]+)\s+(%rd\d+), (.*);", ptx, re.M):
        opcode, target, rest = match.groups()
        if opcode.startswith("cvta.to.global"):
            found[target] = rest
        elif opcode.split(".")[0] in ("add", "mov"):
            sources.setdefault(target, set()).update(re.findall(r"%rd\d+", rest))
    while True:
        new = {
            target: found[source]
            for target, registers in sources.items()
            for source in registers
            if target not in found and source in found
        }
        if not new:
            return found
        found |= new


class Piece(NamedTuple):
    """Part of a kernel, and its accesses to global memory."""

    text: str
    accesses: list[Access]

    @property
    def wide(self) -> int:
        """The number of accesses of 128 bits."""
        return sum(access.bytes == 16 for access in self.accesses)


def main_loop(ptx: str) -> Piece:
    """Return the innermost loop that moves most by accesses of 128 bits."""
    labels = {match[1]: match.start() for match in re.finditer(r"^(\$?\w+):", ptx, re.M)}
    loops: list[tuple[int, int]] = []
    for match in re.finditer(r"\bbra(?:\.uni)?\s+(\$?\w+)", ptx):
        start = labels[match[1]]
        # Jumps back end loops; they come in the order of their ends, inner ones first.
        if start < match.start() and not any(start <= inner for inner, _ in loops):
            loops.append((start, match.start()))
    pieces = [Piece(ptx[start:end], list(accesses(ptx[start:end]))) for start, end in loops]
    return max(pieces, key=lambda piece: piece.wide, default=Piece("", []))


def main_block(ptx: str) -> Piece:
    """Return the basic block that moves most by accesses of 128 bits."""
    blocks = re.split(r"^\$L__BB\w+:|\bbra\b", ptx, flags=re.M)
    pieces = [Piece(block, list(accesses(block))) for block in blocks]
    return max(pieces, key=lambda piece: piece.wide)


def bytes_per_element(kernel: Kernel) -> float | None:
    """Return what the main loop of a CUDA kernel moves per element, None where nothing streams."""
    if kernel.name not in FLOORS:
        return None
    loop = main_loop(kernel.ptx).accesses
    if not any(access.bytes == 16 for access in loop):
        return None
    pointers = operands(kernel.ptx)
    loads: Counter[str] = Counter()
    for access in loop:
        if access.load:
            loads[pointers[access.register]] += access.bytes
    # Of the narrowest operand, which is of the dtype that the kernel is for.
    elements = min(loads.values()) / SIZES[kernel.dtype]
    return sum(access.bytes for access in loop) / elements


def cuda_rows(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
    """Return a row of the report for each kernel of csrc/cuda."""
    rows = []
    version = nvcc_version()
    for kernel in kernels:
        operation, *floors = FLOORS.get(kernel.name, (OPERATIONS.get(kernel.name, ""), "", ""))
        moved = bytes_per_element(kernel)
        rows.append(
            {
                "operation": operation,
                "kernel": kernel.name,
                "variant": kernel.variant,
                "backend": "cuda",
                "compiler": f"nvcc {version}",
                "target": f"sm_{kernel.architecture}",
                "dtype": kernel.dtype,
                "registers": kernel.registers,
                "spill_bytes": kernel.spills,
                "shared_bytes": kernel.shared,
                "bytes_per_element": "" if moved is None else f"{moved:g}",
                "floor": "" if moved is None else floors[kernel.dtype != "fp32"],
            }
        )
    return rows


# ---- Triton ----


def triton_rows() -> list[dict[str, Any]]:
    """Return a row of the report for each Triton kernel and target."""
    from sap_fast.ops.triton import ahead_of_time

    return [
        triton_row(name, target, compiled)
        for target, device in ahead_of_time.TARGETS.items()
        for name, compiled in ahead_of_time.compile_all(device).items()
    ]


def triton_row(name: Any, target: str, compiled: Any) -> dict[str, Any]:
    """Return the row of one compiled Triton kernel."""
    key = (name.operation, name.kernel)
    floors = TRITON_FLOORS.get((*key, name.variant)) or TRITON_FLOORS.get(key)
    moved = ""
    if target.startswith("sm_"):
        registers, stack, local, shared = compiled.resources()
        spills = stack + local
        if floors is not None:
            constants = compiled.constants
            tile = constants.get("BLOCK") or constants["ROW_BLOCK"] * constants["COLUMN_BLOCK"]
            elements = tile / (32 * compiled.binary.metadata.num_warps)
            moved = f"{16 * main_block(compiled.ptx).wide / elements:g}"
    else:
        # The metadata at the end of AMD's assembly.
        found = dict(re.findall(r"^\s*\.(\w+):\s*(\d+)$", compiled.binary.asm["amdgcn"], re.M))
        registers = int(found["vgpr_count"])
        spills = 4 * (int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"]))
        shared = compiled.binary.metadata.shared
    return {
        "operation": name.operation,
        "kernel": name.kernel,
        "variant": name.variant,
        "backend": "triton",
        "compiler": f"triton {metadata.version('triton')}",
        "target": target,
        "dtype": name.dtype,
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": shared,
        "bytes_per_element": moved,
        "floor": floors[name.dtype != "fp32"] if moved and floors is not None else "",
    }


# ---- the report ----


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the rows as they are printed."""
    printed = Table(title="GPU kernels, as compiled")
    for column in rows[0]:
        numbers = column.endswith(("registers", "bytes", "element", "floor"))
        printed.add_column(column, justify="right" if numbers else "left")
    for row in rows:
        above = row["floor"] != "" and float(row["bytes_per_element"]) > row["floor"]
        style = "bold red" if row["spill_bytes"] else "yellow" if above else None
        printed.add_row(*[str(value) for value in row.values()], style=style)
    return printed


def main() -> None:
    """Compile, print the table and write kernel_report.csv."""
    if nvcc() is None:
        raise SystemExit("nvcc is not there: neither on PATH nor in CUDA_HOME")
    rows = cuda_rows(compile_sources()) + triton_rows()
    Console(width=None if sys.stdout.isatty() else 160).print(table(rows))
    print(f"written to {write_rows('kernel_report.csv', rows)}")


if __name__ == "__main__":
    main()
