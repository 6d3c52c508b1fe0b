"""Builds the compiled extension where it can be built; everything else is in pyproject.toml.

The environment variable SAP_FAST_BUILD chooses what is compiled:

    auto   (default) the CPU kernels if torch, pybind11 and a C++ compiler are there, and the CUDA
           kernels if nvcc and a CUDA build of torch are there too; else a pure Python package,
           which runs on the reference and Triton backends
    cpu    the CPU kernels, or an error
    cuda   both, or an error
    0      nothing

A build that pip isolates has no torch: use `pip install --no-build-isolation`. TORCH_CUDA_ARCH_LIST
chooses the GPUs, by default 8.0, 9.0 and 10.0. SAP_FAST_SANITIZE=1 builds with the address and
undefined-behaviour sanitizers, for `make sanitize`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

CHOICES = ("auto", "cpu", "cuda", "0")
CPU_KERNELS = [
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/kernels_baseline.cpp",
    "csrc/cpu/kernels_avx2.cpp",
    "csrc/cpu/kernels_avx512.cpp",
]
# Products and sums stay apart unless math.h fuses them: all instruction sets give the same bits.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]
CUDA_FLAGS = ["-std=c++20", "-O3", "--fmad=false"]
DEFAULT_CUDA_ARCHITECTURES = "8.0 9.0 10.0+PTX"


def what_to_build(choice: str) -> tuple[str, str]:
    """Return "0", "cpu" or "cuda", and why no more than that."""
    if choice not in CHOICES:
        raise SystemExit(f"SAP_FAST_BUILD={choice!r} is not known; choose {', '.join(CHOICES)}")
    if choice == "0":
        return "0", "SAP_FAST_BUILD=0"
    for module in ("torch", "pybind11"):
        try:
            __import__(module)
        except ImportError as error:
            return "0", f"{module} is not there at build time ({error})"
    if shutil.which(compiler()) is None:
        return "0", f"there is no C++ compiler {compiler()!r}"
    if choice == "cpu":
        return "cpu", "SAP_FAST_BUILD=cpu"

    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return "cpu", f"torch {torch.__version__} is no CUDA build"
    if CUDA_HOME is None:
        return "cpu", "there is no nvcc"
    return "cuda", ""


def compiler() -> str:
    """Return the C++ compiler that extensions are built with."""
    return os.environ.get("CXX", "c++").split()[0]


def compiler_version() -> str:
    """Return what the compiler says of itself."""
    command = [compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def extensions(build: str) -> dict[str, Any]:
    """Return the arguments of `setup` that build the extension."""
    import pybind11
    import torch
    from setuptools import Extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sanitize = os.environ.get("SAP_FAST_SANITIZE", "0") == "1"
    flags = [*FLAGS, *WARNINGS]
    link_flags: list[str] = []
    if "Free Software Foundation" in compiler_version():
        # GCC 12 warns of variables in its own avx512fintrin.h that are uninitialized on purpose.
        flags.append("-Wno-maybe-uninitialized")
    if sanitize:
        link_flags = ["-fsanitize=address,undefined"]
        flags += [*link_flags, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
    else:
        flags.append("-g0")  # Python's own flags ask for debug information: 4 MB of it
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHITECTURES)
    with_cuda = build == "cuda"

    def text(value: str) -> str:
        escaped = value.replace('"', r"\"")
        return f'"{escaped}"'

    information = {
        "SAP_FAST_TORCH_VERSION": torch.__version__,
        "SAP_FAST_COMPILER": re.sub(r"[^\w.+ -]", "", compiler_version().splitlines()[0]),
        "SAP_FAST_FLAGS": " ".join(flags),
        "SAP_FAST_CUDA_VERSION": str(torch.version.cuda) if with_cuda else "",
        "SAP_FAST_CUDA_ARCHITECTURES": os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda else "",
    }
    module = Extension(
        "sap_fast._C",
        ["csrc/module.cpp", *CPU_KERNELS],
        include_dirs=[pybind11.get_include()],
        define_macros=[(name, text(value)) for name, value in information.items()],
        extra_compile_args=flags,
        extra_link_args=link_flags,
        language="c++",
    )
    arguments: dict[str, Any] = {
        "name": "sap_fast._ops",
        "sources": ["csrc/ops.cpp", *CPU_KERNELS],
        # at::parallel_for is a template of OpenMP loops: they run in the pool of PyTorch's threads.
        "extra_compile_args": [*flags, "-fopenmp"],
        "extra_link_args": [*link_flags, "-fopenmp"],
    }
    if with_cuda:
        arguments["sources"] += [str(path) for path in sorted(Path("csrc/cuda").glob("*.c*"))]
        arguments["extra_compile_args"] = {"cxx": [*flags, "-fopenmp"], "nvcc": CUDA_FLAGS}
    operators = (CUDAExtension if with_cuda else CppExtension)(**arguments)

    class Build(BuildExtension):
        """Leaves the extension out, instead of failing, if nobody asked for it."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if choice != "auto":
                    raise
                print(f"sap_fast: built without compiled kernels: {error}", file=sys.stderr)
                self.extensions = []

        def copy_extensions_to_source(self) -> None:
            if self.extensions:
                super().copy_extensions_to_source()

    return {
        "ext_modules": [module, operators],
        "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)},
    }


choice = os.environ.get("SAP_FAST_BUILD", "auto")
build, reason = what_to_build(choice)
if choice in ("cpu", "cuda") and build != choice:
    raise SystemExit(f"SAP_FAST_BUILD={choice} cannot be done: {reason}")
print(f"sap_fast: building {build if build != '0' else 'no'} kernels {reason and f'({reason})'}")
setup(**(extensions(build) if build != "0" else {}))
