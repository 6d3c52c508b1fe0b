"""Every kernel as it is launched, compiled for a device that is not there.

The tests read what `compile_all` returns (wide loads and stores, no fp64, no fused additions), and
`benchmarks.kernel_report` tabulates it. No GPU or driver is needed; the package triton brings the
assembler for NVIDIA's.

Which kernels there are, and for what types, alignments and constants Triton compiles each, is not
listed here: the operations run on small tensors of the CPU, and what they launch is compiled.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from sap_fast.ops.triton import adamw, perturb, probe, table
from sap_fast.ops.triton.table import OPTIONS

#: The devices that the kernels are checked for.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Name(NamedTuple):
    """What tells one compiled kernel from all others."""

    operation: str
    #: What else the operation has to be asked for: "blended", or a probe rule; mostly nothing.
    variant: str
    #: Without `_kernel`.
    kernel: str
    #: "fp32", "bf16" or "fp16": what the operation's tensors store.
    dtype: str


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

    function: Any
    #: What it was launched with by keyword: block sizes and dtypes.
    constants: Mapping[str, Any]
    binary: Any

    @property
    def ptx(self) -> str:
        """The intermediate assembly of an NVIDIA target."""
        return self.binary.asm["ptx"]

    @property
    def specialisation(self) -> tuple[str, ...]:
        """What Triton compiled it for: types, constants, and which arguments are aligned."""
        source = self.binary.src
        aligned = sorted(key for key, value in source.attrs.items() if value)
        constants = sorted(source.constants.items(), key=str)
        return self.function.__name__, str(source.signature), str(constants), str(aligned)

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


# ---- launches ----


class _AbsentDevice:
    """As much of a GPU's driver as Triton needs to compile for a launch."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels per device: none that is there has this name.
        return f"absent {self._target}"

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self._target


@contextmanager
def compiled_launches(target: GPUTarget) -> Iterator[list[Compiled]]:
    """Compile every launch for `target` instead of running it; yields what was launched."""
    launched: list[Compiled] = []

    def compile_launch(kernel: Any, grid: tuple[int, ...], arguments: Any, constants: Any) -> None:
        binary = kernel.warmup(*arguments, grid=grid, **constants, **OPTIONS)
        launched.append(Compiled(kernel, constants, binary))

    config = triton.runtime.driver
    launcher, driver = table.launcher, config._active
    table.launcher = compile_launch
    config.set_active(_AbsentDevice(target))
    try:
        yield launched
    finally:
        table.launcher = launcher
        config.set_active(driver)


def _calls(dtype: torch.dtype) -> dict[tuple[str, str], Callable[[], object]]:
    """Return, by operation and variant, calls that take the main path."""

    def some(stored: torch.dtype = dtype) -> list[Tensor]:
        return [torch.ones(32, 64, dtype=stored)]

    def row() -> Tensor:
        return torch.ones(64)

    def update(blend: Tensor | None, gradient_scale: Tensor | None) -> None:
        adamw.adamw_blend_(
            some(),
            some(),
            some(torch.float32),
            some(torch.float32),
            [torch.tensor(0.0)],
            some(),
            lr=one,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.1,
            maximize=False,
            blend=blend,
            gradient_scale=gradient_scale,
        )

    one = torch.tensor(1.0)
    calls: dict[tuple[str, str], Callable[[], object]] = {
        ("sum_squares", ""): lambda: perturb.sum_squares(some()),
        ("dot", ""): lambda: perturb.dot(some(), some()),
        ("perturb_swap_", ""): lambda: perturb.perturb_swap_(some(), some(), one),
        ("reflect_", ""): lambda: perturb.reflect_(some(), some()),
        ("restore_swap_", ""): lambda: perturb.restore_swap_(some(), some(), one),
        ("adamw_blend_", ""): lambda: update(None, None),
        ("adamw_blend_", "blended"): lambda: update(one, one.clone()),
        ("probe_add", ""): lambda: probe.probe_add(some()[0], row()),
        ("probe_project_", ""): lambda: probe.probe_project_(row(), some()[0], 1.0),
    }
    for rule in probe.RULES:
        calls["probe_rule_", rule] = partial(probe.probe_rule_, [row()], rule, 0.1, one, [one])
    return calls


def compile_all(target: GPUTarget) -> dict[Name, Compiled]:
    """Compile every kernel for a target, as `TARGETS` has them; once if several calls share it."""
    found: dict[tuple[str, ...], tuple[Name, Compiled]] = {}
    for dtype, stored in table.DTYPES.items():
        for (operation, variant), call in _calls(dtype).items():
            with compiled_launches(target) as launched:
                call()
            for kernel in launched:
                short = kernel.function.__name__.removesuffix("_kernel")
                name = Name(operation, variant, short, str(stored))
                known, _ = found.setdefault(kernel.specialisation, (name, kernel))
                if known.operation == operation and known.variant != variant:
                    found[kernel.specialisation] = (known._replace(variant=""), kernel)
    return dict(found.values())
