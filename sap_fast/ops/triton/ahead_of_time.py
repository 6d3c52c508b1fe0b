"""Every kernel as it is launched, compiled for a device that is not there.

The tests read what `compile_all` returns (wide loads and stores, no fp64, no fused additions), and
`benchmarks.kernel_report` tabulates it. No GPU or driver is needed; the package triton brings the
assembler for NVIDIA's.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sap_fast.ops.triton import adamw, perturb, probe
from sap_fast.ops.triton.table import OPTIONS

#: The devices that the kernels are checked for.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_NAMES = {tl.float32: "fp32", tl.bfloat16: "bf16", tl.float16: "fp16"}


class Kernel(NamedTuple):
    """A kernel, and how it is launched."""

    function: Any
    #: Triton's name of the type of every argument; pointers ("*…") are aligned to 16 bytes.
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    #: Integers that are multiples of 16 on the main path, where Triton compiles for that.
    multiples_of_16: tuple[str, ...] = ()


class Resources(NamedTuple):
    """What a kernel takes on an NVIDIA device, as `cuobjdump` reads it from the binary."""

    registers: int
    #: Bytes of local memory per thread: spilled registers, there being no arrays.
    stack: int
    local: int
    #: Bytes per program.
    shared: int


@dataclass
class Compiled:
    """A kernel compiled for one target."""

    kernel: Kernel
    target: GPUTarget
    binary: Any

    @property
    def ptx(self) -> str:
        """The intermediate assembly of an NVIDIA target."""
        return self.binary.asm["ptx"]

    def resources(self) -> Resources:
        """Return registers and memory per thread and program, on an NVIDIA target."""
        text = self._disassemble("--dump-resource-usage")
        line = next(line for line in text.splitlines() if "REG:" in line)
        found = dict(item.split(":")[:2] for item in line.split() if item.count(":") == 1)
        # The binary knows only of shared memory of fixed size; Triton's is set at the launch.
        shared = self.binary.metadata.shared
        return Resources(int(found["REG"]), int(found["STACK"]), int(found["LOCAL"]), shared)

    def sass(self) -> str:
        """Return the assembly of an NVIDIA device."""
        return self._disassemble("--dump-sass")

    def _disassemble(self, option: str) -> str:
        tool = triton.knobs.nvidia.cuobjdump.path
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "kernel.cubin")
            file.write_bytes(self.binary.asm["cubin"])
            return subprocess.run(
                [tool, option, str(file)], check=True, capture_output=True, text=True
            ).stdout


def _table(*rest: tuple[str, str]) -> dict[str, str]:
    return {"addresses": "*i64", "chunks": "*i64", **dict(rest)}


def _kernels() -> dict[str, Kernel]:
    found: dict[str, Kernel] = {}
    for dtype, name in _NAMES.items():
        constants = {"DTYPES": (dtype, dtype), "BLOCK": perturb.BLOCK}
        stored = f"*{name}"
        found[f"perturb_swap_{name}"] = Kernel(
            perturb.perturb_swap_kernel, _table(("scale", "*fp32")), constants
        )
        found[f"reflect_{name}"] = Kernel(perturb.reflect_kernel, _table(), constants)
        found[f"restore_swap_{name}"] = Kernel(
            perturb.restore_swap_kernel, _table(("inverse_scale", "*fp32")), constants
        )
        for operation, operands in (("sum_squares", 1), ("dot", 2)):
            found[f"{operation}_{name}"] = Kernel(
                perturb.sum_products_kernel,
                _table(("partials", "*fp32")),
                {
                    "DTYPES": (dtype,) * operands,
                    "CHUNK": perturb.SUM_CHUNK,
                    "BLOCK": perturb.SUM_BLOCK,
                },
            )
        numbers = ("sign", "gradient_weight", "beta2", "square_weight", "eps")
        every = ("blend", "gradient_scale")
        for variant, given in (("adamw", ()), ("adamw_blend", every)):
            found[f"{variant}_{name}"] = Kernel(
                adamw.adamw_blend_kernel,
                _table(
                    ("coefficients", "*fp32"),
                    *((scalar, "*fp32") for scalar in given),
                    *((number, "fp32") for number in numbers),
                ),
                {
                    "DTYPES": (dtype, tl.float32, tl.float32) + (dtype,) * (2 if given else 1),
                    "BLOCK": adamw.BLOCK,
                    **{scalar: None for scalar in every if scalar not in given},
                },
            )
        found[f"probe_add_{name}"] = Kernel(
            probe.add_kernel,
            {
                "hidden": stored,
                "offset": "*fp32",
                "result": stored,
                "count": "i32",
                "width": "i32",
            },
            {"BLOCK": probe.BLOCK},
            ("count", "width"),
        )
        found[f"probe_column_sums_{name}"] = Kernel(
            probe.column_sums_kernel,
            {"gradient": stored, "partials": "*fp32", "rows": "i32", "width": "i32"},
            {
                "ROWS": probe.ROWS,
                "ROW_BLOCK": probe.ROW_BLOCK,
                "COLUMN_BLOCK": probe.COLUMN_BLOCK,
            },
            ("rows", "width"),
        )
    found["probe_project"] = Kernel(
        probe.project_kernel,
        {
            "partials": "*fp32",
            "buffer": "*fp32",
            "parts": "i32",
            "width": "i32",
            "sign": "fp32",
        },
        {"BLOCK": probe.COLUMN_BLOCK},
        ("width",),
    )
    found["fold"] = Kernel(
        perturb.fold_kernel,
        {"partials": "*fp32", "result": "*fp32", "count": "i32"},
        {"BLOCK": perturb.FOLD_BLOCK},
    )
    found["count_steps"] = Kernel(
        adamw.count_steps_kernel,
        {"addresses": "*i64", "counts": "*fp32", "tensors": "i32"},
        {"BLOCK": adamw.STEP_BLOCK},
    )
    block = {"BLOCK": probe.RULE_BLOCK}
    found["rule_extent"] = Kernel(
        probe.extent_kernel, _table(("largest", "*fp32"), ("finite", "*i32")), block
    )
    found["rule_layer_extent"] = Kernel(
        probe.layer_extent_kernel,
        {
            "starts": "*i64",
            "radii": "*i64",
            "largest": "*fp32",
            "finite": "*i32",
            "layer_largest": "*fp32",
            "layer_finite": "*i32",
        },
        block,
    )
    found["rule_all_finite"] = Kernel(
        probe.all_finite_kernel,
        {"layer_finite": "*i32", "result": "*u8", "layers": "i32"},
        block,
    )
    found["rule_unit_squares"] = Kernel(
        probe.unit_squares_kernel,
        _table(("layer_largest", "*fp32"), ("partials", "*fp32")),
        block,
    )
    found["rule_layer_norm"] = Kernel(
        probe.layer_norm_kernel,
        {"starts": "*i64", "partials": "*fp32", "norms": "*fp32"},
        block,
    )
    for rule in probe.RULES:
        found[f"rule_{rule}"] = Kernel(
            probe.rule_kernel,
            _table(
                ("radii", "*i64"),
                ("perturbation_norm", "*fp32"),
                ("layer_largest", "*fp32"),
                ("norms", "*fp32"),
                ("finite", "*u8"),
                ("probe_lr", "fp32"),
            ),
            {"DTYPES": (tl.float32,), "RULE": rule, **block},
        )
    return found


#: Every kernel by operation, variant and the dtype that is stored.
KERNELS = _kernels()


def compile_kernel(kernel: Kernel, target: GPUTarget) -> Compiled:
    """Compile one kernel for a target."""
    parameters = kernel.function.params
    signature = {p.name: kernel.signature.get(p.name, "constexpr") for p in parameters}
    # What a launch finds out from its arguments, where the kernel wants it to.
    aligned = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in parameters
        if (signature[parameter.name].startswith("*") or parameter.name in kernel.multiples_of_16)
        and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    }
    source = ASTSource(kernel.function, signature, dict(kernel.constants), aligned)
    return Compiled(kernel, target, triton.compile(source, target=target, options=OPTIONS))


def compile_all(target: GPUTarget) -> dict[str, Compiled]:
    """Compile every kernel for a target, as `TARGETS` has them."""
    return {name: compile_kernel(kernel, target) for name, kernel in KERNELS.items()}
