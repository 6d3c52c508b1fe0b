"""Builds the compiled extension where it can be built; everything else is in pyproject.toml.

The environment variable SAP_FAST_BUILD chooses what is compiled:

    auto   (default) the CPU kernels if torch, pybind11 and a C++ compiler are there, and the CUDA
           kernels if nvcc and a CUDA build of torch are there too; else, and if the compiler fails,
           a pure Python package, which runs on the reference and Triton backends
    cpu    the CPU kernels, or an error
    cuda   both, or an error
    0      nothing

A build that pip isolates has no torch: use `pip install --no-build-isolation`. TORCH_CUDA_ARCH_LIST
chooses the GPUs, by default 8.0, 9.0 and, from CUDA 12.8 on, 10.0. SAP_FAST_SANITIZE=1 builds with
the address and undefined-behaviour sanitizers, for `make sanitize`.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

CHOICES = ("auto", "cpu", "cuda", "0")
CPU_KERNELS = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
# Products and sums stay apart unless math.h fuses them: all instruction sets give the same bits.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]
CUDA_FLAGS = ["-std=c++20", "-O3", "--fmad=false"]


def what_to_build(choice: str) -> tuple[str, str]:
    """Return "0", "cpu" or "cuda", and why no more than that."""
    if choice not in CHOICES:
        raise SystemExit(f"SAP_FAST_BUILD={choice!r} is not known; choose {', '.join(CHOICES)}")
    if choice == "0":
        return "0", "SAP_FAST_BUILD=0"
    for module in ("torch", "pybind11"):
        try:
            __import__(module)
        except Exception as error:  # whatever a broken installation raises
            return "0", (
                f"{module} is not there at build time ({error}); install it, and use "
                "`pip install --no-build-isolation`"
            )
    if version_of(*compiler()) is None:
        return "0", f"there is no C++ compiler: `{shlex.join(compiler())} --version` fails"
    if choice == "cpu":
        return "cpu", "SAP_FAST_BUILD=cpu"

    import torch

    if torch.version.cuda is None:
        return "cpu", f"torch {torch.__version__} is no CUDA build"
    cuda = nvcc_version()
    if cuda is None:
        return "cpu", "there is no nvcc, in CUDA_HOME or on the PATH"
    if cuda[0] != int(torch.version.cuda.split(".")[0]):
        found = ".".join(map(str, cuda))
        return "cpu", f"nvcc is that of CUDA {found}, torch is built for CUDA {torch.version.cuda}"
    return "cuda", "SAP_FAST_BUILD=cuda" if choice == "cuda" else "nvcc and torch fit"


def schemas_digest() -> str:
    """Return what tells the operations' schemas from other ones, as `schema.digest`."""
    for node in ast.parse(Path("sap_fast/ops/schema.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "SCHEMAS":
            return hashlib.sha256(repr(ast.literal_eval(node.value)).encode()).hexdigest()[:16]
    raise SystemExit("sap_fast/ops/schema.py has no SCHEMAS")


def compiler() -> list[str]:
    """Return the command of the C++ compiler that extensions are built with."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def version_of(*command: str) -> str | None:
    """Return what a program says of its version; None if it does not run."""
    try:
        run = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout


def nvcc_version() -> tuple[int, int] | None:
    """Return the CUDA version of the nvcc that extensions are built with, if there is one."""
    from torch.utils.cpp_extension import CUDA_HOME

    text = version_of(str(Path(CUDA_HOME, "bin", "nvcc"))) if CUDA_HOME else None
    found = re.search(r"release (\d+)\.(\d+)", text or "")
    return (int(found[1]), int(found[2])) if found else None


def extensions(build: str, choice: str) -> dict[str, Any]:
    """Return the arguments of `setup` that build the extension."""
    import pybind11
    import torch
    from setuptools import Extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    compiler_version = version_of(*compiler()) or ""
    flags = [*FLAGS, *WARNINGS]
    link_flags: list[str] = []
    if "Free Software Foundation" in compiler_version:
        # GCC 12 warns of variables in its own avx512fintrin.h that are uninitialized on purpose.
        flags.append("-Wno-maybe-uninitialized")
    if os.environ.get("SAP_FAST_SANITIZE", "0") == "1":
        link_flags = ["-fsanitize=address,undefined"]
        flags += [*link_flags, "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
    else:
        flags.append("-g0")  # Python's own flags ask for debug information: 4 MB of it
    with_cuda = build == "cuda"
    if with_cuda:
        # nvcc knows 10.0 from CUDA 12.8 on.
        newest = "9.0 10.0+PTX" if (nvcc_version() or (0, 0)) >= (12, 8) else "9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0 {newest}")

    def text(value: str) -> str:
        escaped = value.replace('"', r"\"")
        return f'"{escaped}"'

    information = {
        "SAP_FAST_TORCH_VERSION": torch.__version__,
        "SAP_FAST_SCHEMAS": schemas_digest(),
        "SAP_FAST_COMPILER": re.sub(r"[^\w.+ -]", "", compiler_version.partition("\n")[0]),
        "SAP_FAST_FLAGS": " ".join(flags),
        "SAP_FAST_CUDA_VERSION": str(torch.version.cuda) if with_cuda else "",
        "SAP_FAST_CUDA_ARCHITECTURES": os.environ["TORCH_CUDA_ARCH_LIST"] if with_cuda else "",
    }
    # In every command line, so that ninja compiles everything again for another torch.
    macros = [(name, text(value)) for name, value in information.items()]
    module = Extension(
        "sap_fast._C",
        ["csrc/module.cpp", *CPU_KERNELS],
        include_dirs=[pybind11.get_include()],
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=link_flags,
        language="c++",
    )
    arguments: dict[str, Any] = {
        "name": "sap_fast._ops",
        "sources": ["csrc/ops.cpp", *CPU_KERNELS],
        "define_macros": macros,
        # at::parallel_for is a template of OpenMP loops: they run in the pool of PyTorch's threads.
        "extra_compile_args": [*flags, "-fopenmp"],
        "extra_link_args": [*link_flags, "-fopenmp"],
    }
    if with_cuda:
        cuda_sources = [*Path("csrc/cuda").glob("*.cpp"), *Path("csrc/cuda").glob("*.cu")]
        arguments["sources"] += sorted(map(str, cuda_sources))
        arguments["extra_compile_args"] = {"cxx": [*flags, "-fopenmp"], "nvcc": CUDA_FLAGS}
    operators = (CUDAExtension if with_cuda else CppExtension)(**arguments)

    class Build(BuildExtension):
        """Leaves the whole extension out, instead of failing, if nobody asked for it."""

        def run(self) -> None:
            # Without ninja, distutils looks at the dates of .cpp files alone: not at headers,
            # flags and torch.
            self.force = True
            folders = [self.build_lib, "."] if self.inplace else [self.build_lib]
            try:
                super().run()
            except Exception as error:
                if choice != "auto":
                    raise
                say(
                    f"built without kernels: {error}. SAP_FAST_BUILD=cpu makes this an error, and "
                    "leaves CUDA out"
                )
                for folder in folders:
                    remove_kernels(folder)
                # What is left is a pure package: the wheel is named and laid out as one.
                self.extensions = self.distribution.ext_modules = []
                self.distribution.get_command_obj("bdist_wheel").root_is_pure = True

    return {
        "ext_modules": [module, operators],
        "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)},
    }


class Editable(editable_wheel):
    """Without kernels, takes away those that an earlier installation left in the clone."""

    def run(self) -> None:
        """Build the wheel that points to the clone."""
        if not self.distribution.has_ext_modules():
            remove_kernels(".")
        super().run()


def remove_kernels(folder: str) -> None:
    """Delete both parts of the extension, which work only together."""
    for name in ("_C.so", "_ops.so"):
        Path(folder, "sap_fast", name).unlink(missing_ok=True)


def say(message: str) -> None:
    """Print what the build decided; pip shows it with -v."""
    print(f"sap_fast: {message}", file=sys.stderr)


choice = os.environ.get("SAP_FAST_BUILD") or "auto"
build, reason = what_to_build(choice)
if choice in ("cpu", "cuda") and build != choice:
    raise SystemExit(f"SAP_FAST_BUILD={choice} cannot be done: {reason}")
say(f"building {'no' if build == '0' else build} kernels ({reason})")
arguments = extensions(build, choice) if build != "0" else {}
setup(cmdclass={"editable_wheel": Editable, **arguments.pop("cmdclass", {})}, **arguments)
