"""Builds the compiled extension where it can be built; everything else is in pyproject.toml.

The environment variable SAP_FAST_BUILD chooses what is compiled:

    auto   (default) the CPU kernels if torch's headers, pybind11 and a C++ compiler are there, and
           the CUDA kernels if nvcc and a CUDA build of torch are there too. What fails to compile
           is left out, and the extension says why: the CUDA kernels, an instruction set of the CPU,
           or everything, which leaves a pure Python package on the reference and Triton backends
    cpu    all CPU kernels, or an error
    cuda   both, or an error
    0      nothing

The kernels meet PyTorch at its stable ABI: those compiled here run with every torch from 2.10 on,
whichever lies here. A build that pip isolates has no torch: use `pip install --no-build-isolation`,
or name a folder `torch` of another environment in SAP_FAST_TORCH; any Python's will do.
TORCH_CUDA_ARCH_LIST chooses the GPUs, by default 8.0, 9.0 and, from CUDA 12.8 on, 10.0.
SAP_FAST_SANITIZE=1 builds with the address and undefined-behaviour sanitizers, for `make sanitize`.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.editable_wheel import editable_wheel

CHOICES = ("auto", "cpu", "cuda", "0")
#: The first torch with all of the stable ABI that csrc/stable.h uses.
OLDEST_TORCH = (2, 10)
CPU_KERNELS = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
CUDA_SOURCES = sorted(
    str(path) for suffix in ("cpp", "cu") for path in Path("csrc/cuda").glob(f"*.{suffix}")
)
#: Which instruction set the kernels of a source are for, where a compiler may lack it.
INSTRUCTION_SETS = {"csrc/cpu/kernels_avx512.cpp": "AVX512", "csrc/cpu/kernels_avx2.cpp": "AVX2"}
# Products and sums stay apart unless math.h fuses them: all instruction sets give the same bits.
FLAGS = ["-std=c++20", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter"]
CUDA_FLAGS = ["-std=c++20", "-O3", "--fmad=false"]
#: What the package may hold; they work only together.
LIBRARIES = ("_C.so", "_ops.so", "_cuda.so")


class Torch(NamedTuple):
    """The torch whose headers are compiled against. It is found, not imported."""

    folder: Path
    version: str
    cuda: str | None


def find_torch() -> Torch:
    """Return the torch of SAP_FAST_TORCH or else of this environment; ImportError without one."""
    given = os.environ.get("SAP_FAST_TORCH")
    found = importlib.util.find_spec("torch") if not given else None
    if not given and (found is None or found.origin is None):
        raise ImportError("there is no module named torch")
    folder = Path(given) if given else Path(str(found and found.origin)).parent
    about = runpy.run_path(str(folder / "version.py"))
    return Torch(folder, str(about["__version__"]), about["cuda"])


class Plan(NamedTuple):
    """What is built, and why no more than that."""

    build: str  # "0", "cpu" or "cuda"
    reason: str
    torch: Torch | None = None


def what_to_build(choice: str) -> Plan:
    """Return what can be built of what SAP_FAST_BUILD asks for."""
    if choice not in CHOICES:
        raise SystemExit(f"SAP_FAST_BUILD={choice!r} is not known; choose {', '.join(CHOICES)}")
    if choice == "0":
        return Plan("0", "SAP_FAST_BUILD=0")
    try:
        torch = find_torch()
        __import__("pybind11")
    except Exception as error:  # whatever a broken installation raises
        missing = "pybind11" if "torch" in locals() else "torch"
        return Plan(
            "0",
            f"{missing} is not there at build time ({error}); install it, and use "
            "`pip install --no-build-isolation`",
        )
    if version_numbers(torch.version) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        return Plan("0", f"the kernels need torch {oldest} or later, this is {torch.version}")
    if version_of(*compiler()) is None:
        return Plan("0", f"there is no C++ compiler: `{shlex.join(compiler())} --version` fails")
    if choice == "cpu":
        return Plan("cpu", "SAP_FAST_BUILD=cpu", torch)
    problem = why_no_cuda(torch)
    if problem is not None:
        return Plan("cpu", problem, torch)
    return Plan("cuda", "SAP_FAST_BUILD=cuda" if choice == "cuda" else "nvcc and torch fit", torch)


def why_no_cuda(torch: Torch) -> str | None:
    """Return why the CUDA kernels cannot be built here, as far as can be told before trying."""
    if torch.cuda is None:
        return f"torch {torch.version} is no CUDA build"
    cuda = nvcc_version()
    if cuda is None:
        return "there is no nvcc, in CUDA_HOME or on the PATH"
    if cuda[0] != int(torch.cuda.split(".")[0]):
        found = ".".join(map(str, cuda))
        return f"nvcc is that of CUDA {found}, torch is built for CUDA {torch.cuda}"
    # It may lack headers, or a C++ compiler that it knows: seconds, where the kernels take minutes.
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "trial.cu")
        source.write_text("#include <cuda_runtime.h>\n__global__ void trial() {}\n")
        host = ["-ccbin", compiler()[-1]] if os.environ.get("CXX") else []
        command = [nvcc(), *host, "-std=c++20", "-c", source.name, "-o", "trial.o"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if run.returncode != 0:
        return f"nvcc cannot compile an empty kernel: {first_error(run.stdout + run.stderr)}"
    return None


def first_error(text: str) -> str:
    """Return the line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    wrong = [line for line in lines if re.search(r"\b(error|fatal)\b", line, re.I)]
    return (wrong or lines or ["it said nothing"])[0][:300]


def version_numbers(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


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


def nvcc() -> str:
    """Return the path of nvcc: of CUDA_HOME, or else of the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc") or "nvcc"


def nvcc_version() -> tuple[int, int] | None:
    """Return the CUDA version of the nvcc that is there, if there is one."""
    found = re.search(r"release (\d+)\.(\d+)", version_of(nvcc()) or "")
    return (int(found[1]), int(found[2])) if found else None


def cuda_architectures() -> str:
    """Return the GPUs that the CUDA kernels are for."""
    # nvcc knows 10.0 from CUDA 12.8 on.
    newest = "9.0 10.0+PTX" if (nvcc_version() or (0, 0)) >= (12, 8) else "9.0+PTX"
    return os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0 {newest}")


class Build(build_ext):
    """Compiles the CUDA kernels if they are wanted, then the rest, which says how that went."""

    plan: Plan
    choice: str

    def run(self) -> None:
        """Build; without an explicit choice, what cannot be built is left out."""
        # distutils looks at the dates of .cpp files alone: not at headers, flags and torch.
        self.force = True
        folders = [self.build_lib, "."] if self.inplace else [self.build_lib]
        for folder in folders:
            remove_kernels(folder)
        self.cuda_problem = "" if self.plan.build == "cuda" else self.plan.reason
        if self.plan.build == "cuda":
            try:
                self.build_cuda()
            # Compilers, ninja and setuptools fail with errors of many types; it is said, not lost.
            except Exception as error:
                if self.choice != "auto":
                    raise
                lines = str(error).splitlines() or [type(error).__name__]
                self.cuda_problem = f"the CUDA kernels do not compile: {lines[0][:300]}"
                say(f"built without CUDA kernels: {self.cuda_problem}")
        self.left_out: list[str] = []
        try:
            super().run()
        # Likewise.
        except Exception as error:
            if self.choice != "auto":
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

    def build_cuda(self) -> None:
        """Build sap_fast/_cuda.so; raise whatever nvcc, torch and ninja raise."""
        from torch.utils.cpp_extension import BuildExtension, CUDAExtension

        cuda_architectures()
        extension = CUDAExtension(
            "sap_fast._cuda",
            CUDA_SOURCES,
            define_macros=[*stable_abi(), ("USE_CUDA", None)],
            extra_compile_args={"cxx": [*flags(), *WARNINGS], "nvcc": CUDA_FLAGS},
            py_limited_api=True,  # which leaves out libtorch_python
        )
        # A command takes its extensions from the distribution, and adds to them what it links by.
        others, self.distribution.ext_modules = self.distribution.ext_modules, [extension]
        try:
            command = BuildExtension(self.distribution, no_python_abi_suffix=True)
            command.ensure_finalized()
        finally:
            self.distribution.ext_modules = others
        for name in ("build_lib", "build_temp", "inplace", "force", "compiler", "debug"):
            setattr(command, name, getattr(self, name))
        command.run()

    def build_extensions(self) -> None:
        """Compile every source once, on all cores, and link."""
        sources = sorted({source for e in self.extensions for source in e.sources})
        include = sorted({folder for e in self.extensions for folder in e.include_dirs})
        kernels = [source for source in sources if source != "csrc/module.cpp"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = list(pool.map(lambda source: self.compile_source(source, include), kernels))
        objects = dict(zip(kernels, built, strict=True))
        # The module says what became of the others.
        objects["csrc/module.cpp"] = self.compile_source("csrc/module.cpp", include)
        for extension in self.extensions:
            self.compiler.link_shared_object(
                [objects[source] for source in extension.sources],
                self.get_ext_fullpath(extension.name),
                libraries=extension.libraries,
                library_dirs=extension.library_dirs,
                extra_postargs=sanitizer(),
                target_lang="c++",
            )

    def compile_source(self, source: str, include: list[str]) -> str:
        """Compile a source and return its object; an instruction set may be left out of it."""
        options: dict[str, Any] = {
            "output_dir": self.build_temp,
            "include_dirs": include,
            "macros": stable_abi(),
            "extra_postargs": [*flags(), *WARNINGS],
        }
        if source == "csrc/module.cpp":
            options["macros"] = [*options["macros"], *self.information()]
        try:
            (found,) = self.compiler.compile([source], **options)
        # Likewise.
        except Exception as error:
            if self.choice != "auto" or source not in INSTRUCTION_SETS:
                raise
            left_out = INSTRUCTION_SETS[source]
            options["macros"] = [*options["macros"], (f"SAP_FAST_WITHOUT_{left_out}", None)]
            (found,) = self.compiler.compile([source], **options)
            say(f"built without {left_out} kernels: {error}")
            self.left_out.append(left_out)
        return str(found)

    def information(self) -> list[tuple[str, str]]:
        """Return the macros by which csrc/module.cpp says how it was built."""
        assert self.plan.torch is not None
        with_cuda = self.plan.build == "cuda" and not self.cuda_problem
        compiler_version = (version_of(*compiler()) or "").partition("\n")[0]
        found = {
            "TORCH_VERSION": self.plan.torch.version,
            "OLDEST_TORCH": ".".join(map(str, OLDEST_TORCH)),
            "SCHEMAS": schemas_digest(),
            "COMPILER": re.sub(r"[^\w.+ -]", "", compiler_version),
            "FLAGS": " ".join([*flags(), *WARNINGS]),
            "LEFT_OUT": " ".join(sorted(self.left_out)),
            "CUDA_VERSION": str(self.plan.torch.cuda) if with_cuda else "",
            "CUDA_ARCHITECTURES": cuda_architectures() if with_cuda else "",
            "CUDA_PROBLEM": self.cuda_problem,
            "CUDA_FAILED": "yes" if self.cuda_problem and self.cuda_was_meant() else "",
        }
        return [(f"SAP_FAST_{name}", c_string(value)) for name, value in found.items()]

    def cuda_was_meant(self) -> bool:
        """Return whether this machine looks as if the CUDA kernels should have been built."""
        torch = self.plan.torch
        return self.choice != "cpu" and torch is not None and bool(torch.cuda and nvcc_version())

    def get_ext_filename(self, fullname: str) -> str:
        """Return the path of a library in the package: its name says nothing of a Python."""
        return str(Path(*fullname.split("."))) + ".so"


def c_string(text: str) -> str:
    """Return a text as a literal of C."""
    escaped = text.replace("\\", "\\\\").replace('"', r"\"").replace("\n", " ")
    return f'"{escaped}"'


def stable_abi() -> list[tuple[str, str | None]]:
    """Return the macros that leave out whatever PyTorch added after OLDEST_TORCH."""
    major, minor = OLDEST_TORCH
    return [("TORCH_TARGET_VERSION", f"0x{major << 56 | minor << 48:016x}")]


def sanitizer() -> list[str]:
    """Return the flags of the sanitizers, for compiler and linker, if they are asked for."""
    on = os.environ.get("SAP_FAST_SANITIZE", "0") == "1"
    return ["-fsanitize=address,undefined"] if on else []


def flags() -> list[str]:
    """Return the flags of the C++ compiler."""
    found = list(FLAGS)
    if "Free Software Foundation" in (version_of(*compiler()) or ""):
        # GCC 12 warns of variables in its own avx512fintrin.h that are uninitialized on purpose.
        found.append("-Wno-maybe-uninitialized")
    if sanitizer():
        found += [*sanitizer(), "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        return [*found, "-g"]
    return [*found, "-g0"]  # Python's own flags ask for debug information: 4 MB of it


def extensions(torch: Torch) -> list[Extension]:
    """Return the two libraries that are compiled on every machine."""
    import pybind11

    include = [str(torch.folder / "include"), pybind11.get_include()]
    return [
        Extension(
            "sap_fast._C",
            ["csrc/module.cpp", *CPU_KERNELS],
            include_dirs=include,
            language="c++",
        ),
        Extension(
            "sap_fast._ops",
            ["csrc/ops.cpp", *CPU_KERNELS],
            include_dirs=include,
            # It is in every torch under this name, and in the process by then.
            libraries=["torch_cpu"],
            library_dirs=[str(torch.folder / "lib")],
            language="c++",
        ),
    ]


class Editable(editable_wheel):
    """Without kernels, takes away those that an earlier installation left in the clone."""

    def run(self) -> None:
        """Build the wheel that points to the clone."""
        if not self.distribution.has_ext_modules():
            remove_kernels(".")
        super().run()


def remove_kernels(folder: str) -> None:
    """Delete all parts of the extension."""
    for name in LIBRARIES:
        Path(folder, "sap_fast", name).unlink(missing_ok=True)


def say(message: str) -> None:
    """Print what the build decided; pip shows it with -v."""
    print(f"sap_fast: {message}", file=sys.stderr)


choice = os.environ.get("SAP_FAST_BUILD") or "auto"
plan = what_to_build(choice)
if choice in ("cpu", "cuda") and plan.build != choice:
    raise SystemExit(f"SAP_FAST_BUILD={choice} cannot be done: {plan.reason}")
say(f"building {'no' if plan.build == '0' else plan.build} kernels ({plan.reason})")
Build.plan, Build.choice = plan, choice
commands: dict[str, Any] = {"editable_wheel": Editable}
if plan.torch is not None:
    commands["build_ext"] = Build
setup(
    cmdclass=commands,
    ext_modules=[] if plan.torch is None else extensions(plan.torch),
)
