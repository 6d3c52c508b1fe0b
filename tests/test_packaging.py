"""Distributions: what is in them, what the build does where it cannot compile, and that they run.

Everything is built in copies of the source tree, without a network, by the setuptools of this
environment, and installed into virtual environments that see its other packages but not its
sap_fast.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
import setuptools
import torch

import sap_fast
from sap_fast.ops import schema

ROOT = Path(__file__).resolve().parents[1]
NATIVE = ("sap_fast/_C.so", "sap_fast/_ops.so")
CURE = "pip install --no-build-isolation"

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="the paths of virtual environments are those of POSIX"
)
needs_compiler = pytest.mark.skipif(
    shutil.which((shlex.split(os.environ.get("CXX", "")) or ["c++"])[0]) is None,
    reason="there is no C++ compiler",
)

# One step of an installed package: what was imported, what it runs on, and that it trained.
STEP = """
import sap_fast, torch
from torch import nn
from sap_fast import FusedSAP, ProbeSet, ops

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
x, y = torch.randn(2, 3, 4)
before = [parameter.clone() for parameter in model.parameters()]

def backward(target):
    loss = (model(x) - target).square().mean()
    loss.backward()
    return loss.detach()

probes = ProbeSet(model, layers=[model[0]], rho=1e-2)
optimizer = FusedSAP(model.parameters(), probes, lr=1e-2)
optimizer.step(lambda: backward(y), lambda: backward(-y))
assert probes.estimates[0].norm() > 0
assert all(not torch.equal(*pair) for pair in zip(before, model.parameters()))
print(sap_fast.__file__)
print(sap_fast.__version__)
print(ops.choose_backend("auto", "cpu"))
print(ops.why_not("native", "cpu"))
"""


class Step(NamedTuple):
    """What `STEP` printed."""

    file: Path
    version: str
    backend: str
    why_not_native: str
    errors: str


class Environment(NamedTuple):
    """A virtual environment with the packages of this one, without its editable installs."""

    root: Path

    @property
    def packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.root / "lib" / version / "site-packages"

    def python(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return run(str(self.root / "bin" / "python"), *arguments, cwd=self.root, **variables)

    def install(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        pip = [sys.executable, "-m", "pip", "--python", str(self.root / "bin" / "python")]
        options = ["--no-index", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-v"]
        return run(*pip, "install", *options, *arguments, cwd=self.root, **variables)

    def step(self, preamble: str = "") -> Step:
        # -I: neither the current directory nor PYTHONPATH can stand in for the installation.
        done = succeed(self.python("-I", "-c", preamble + STEP))
        file, version, backend, why_not_native = done.stdout.splitlines()[-4:]
        return Step(Path(file), version, backend, why_not_native, done.stderr)


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a program with nothing in its environment that changes what is built or imported."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SAP_FAST_", "PYTHON", "LD_PRELOAD"))
    }
    # ninja lies beside the interpreter.
    kept["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    return subprocess.run(
        command, cwd=cwd, env=kept | variables, capture_output=True, text=True, timeout=600
    )


def succeed(done: subprocess.CompletedProcess[str]) -> subprocess.CompletedProcess[str]:
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def source_tree(folder: Path) -> Path:
    """Copy what a fresh clone has."""
    tree = folder / "sap_fast-source"
    generated = shutil.ignore_patterns("*.so", "__pycache__")
    tree.mkdir(parents=True)
    for name in ("sap_fast", "csrc", "tests"):
        shutil.copytree(ROOT / name, tree / name, ignore=generated)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copy(ROOT / "CHANGELOG.md", tree)
    return tree


def virtual_environment(root: Path) -> Environment:
    venv.create(root, symlinks=True)
    made = Environment(root)
    # Packages on the path of a .pth file are found; .pth files in that folder are not read.
    (made.packages / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return made


def build_wheel(
    python: str, tree: Path, **variables: str
) -> tuple[Path | None, subprocess.CompletedProcess[str]]:
    """Build a wheel as pip does; return it, if there is one, and what was printed."""
    code = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    done = run(python, "-c", code, cwd=tree, **variables)
    return next(iter((tree / "dist").glob("*.whl")), None), done


def members(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return source_tree(tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def sdist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = [sys.executable, "-m", "build", "--no-isolation", "--sdist"]
    succeed(run(*build, "--outdir", str(folder), str(tree), cwd=tree, SAP_FAST_BUILD="0"))
    (archive,) = folder.iterdir()
    return archive


@pytest.fixture(scope="module")
def compiled(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel with kernels, compiled from nothing but the sdist."""
    folder = tmp_path_factory.mktemp("compiled")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (unpacked,) = folder.iterdir()
    build = [sys.executable, "-m", "build", "--no-isolation", "--wheel"]
    command = [*build, "--outdir", str(folder / "dist"), str(unpacked)]
    succeed(run(*command, cwd=folder, SAP_FAST_BUILD="cpu"))
    (wheel,) = (folder / "dist").iterdir()
    return wheel


@pytest.fixture(scope="module")
def pure(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment into which the sdist was installed without kernels."""
    made = virtual_environment(tmp_path_factory.mktemp("pure") / "venv")
    succeed(made.install(str(sdist), SAP_FAST_BUILD="0"))
    return made


# ---- what is in the distributions ----


def test_sdist_has_every_source_and_no_tests(tree: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    files = {str(path.relative_to(tree)) for path in tree.rglob("*") if path.is_file()}
    sources = {name for name in files if name.startswith(("sap_fast/", "csrc/"))}
    assert {Path(name).suffix for name in sources} >= {".py", ".typed", ".j2", ".h", ".cpp"}
    documents = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "setup.py"}
    assert found >= sources | documents
    assert not [name for name in found if name.startswith("tests")]


@needs_compiler
def test_wheel_has_kernels_and_data_and_nothing_else(tree: Path, compiled: Path) -> None:
    found = members(compiled)
    sources = {str(path.relative_to(tree)) for path in (tree / "sap_fast").rglob("*.py")}
    pages = {f"sap_fast/reports/{name}.html.j2" for name in ("landscape", "page", "report")}
    data = {"sap_fast/py.typed", "sap_fast/data/builtin_requests.jsonl", *pages}
    tasks = ("refusals", "over_refusals", "safety")
    data |= {f"sap_fast/evaluation/lm_eval_tasks/sap_fast_{task}.yaml" for task in tasks}
    package = {name for name in found if ".dist-info/" not in name}
    assert package == sources | data | set(NATIVE)
    assert not compiled.name.endswith("-any.whl")
    assert [name for name in found if name.endswith(".dist-info/licenses/LICENSE")]


# ---- that they run ----


@needs_compiler
def test_installed_wheel_runs_on_its_kernels(compiled: Path, tmp_path: Path) -> None:
    made = virtual_environment(tmp_path / "venv")
    succeed(made.install(str(compiled)))
    step = made.step()
    assert step.file == made.packages / "sap_fast" / "__init__.py"
    assert step.backend == "native"
    # The same files under another torch: one that is later, and one before there was a stable ABI.
    assert made.step("import torch\ntorch.__version__ = '9.9'\n").backend == "native"
    step = made.step("import torch\ntorch.__version__ = '2.9.1'\n")
    check_refused(step, "it needs torch 2.10 or later, this is 2.9.1")


def test_installed_sdist_runs_without_kernels(pure: Environment) -> None:
    step = pure.step()
    assert step.file == pure.packages / "sap_fast" / "__init__.py"
    assert step.version == sap_fast.__version__
    metadata = next(pure.packages.glob("sap_fast-*.dist-info")) / "METADATA"
    assert f"\nVersion: {sap_fast.__version__}\n" in metadata.read_text()
    assert step.backend == "reference"
    assert "not there" in step.why_not_native and CURE in step.why_not_native
    assert step.errors.count("cpu runs on the reference backend") == 1
    assert not [name for name in NATIVE if (pure.packages / name).exists()]
    (wheel,) = pure.packages.glob("sap_fast-*.dist-info/WHEEL")
    assert "Tag: py3-none-any" in wheel.read_text()


def test_doctor_says_how_to_get_the_kernels(pure: Environment) -> None:
    doctor = run(str(pure.root / "bin" / "sap-fast"), "doctor", cwd=pure.root, COLUMNS="1000")
    # Tables are for people, and on standard error.
    (row,) = [line for line in succeed(doctor).stderr.splitlines() if "│ native" in line]
    assert "cannot run" in row and CURE in row


@pytest.mark.slow  # `compiled` too comes from the sdist; this one asks pip, and asks for nothing
@needs_compiler
def test_installed_sdist_compiles_where_it_can(sdist: Path, tmp_path: Path) -> None:
    made = virtual_environment(tmp_path / "venv")
    succeed(made.install(str(sdist)))
    step = made.step()
    assert step.file == made.packages / "sap_fast" / "__init__.py"
    assert step.backend == "native"


# ---- an extension that does not fit ----

DIGEST = schema.digest()


FOR_A_LATER_TORCH = ("99.1", DIGEST, f"it needs torch 99.1 or later, this is {torch.__version__}")
OF_OTHER_OPERATIONS = ("2.10", "0", "it was built for operations of another version")
THAT_DOES_NOT_LOAD = ("2.10", DIGEST, "_ops.so: ")  # the linker's own words


@pytest.mark.parametrize(
    ("oldest_torch", "schemas", "reason", "operators"),
    [
        pytest.param(*FOR_A_LATER_TORCH, None, id="a later torch"),
        pytest.param(*OF_OTHER_OPERATIONS, b"no library", id="other operations"),
        pytest.param(*THAT_DOES_NOT_LOAD, None, id="no file"),
        # A file that cannot be loaded is refused below, too, of the other part.
        pytest.param(*THAT_DOES_NOT_LOAD, b"no library", id="no library", marks=pytest.mark.slow),
        # What it was built for is looked at before the file is.
        pytest.param(*FOR_A_LATER_TORCH, b"no library", id="torch, file", marks=pytest.mark.slow),
        pytest.param(*OF_OTHER_OPERATIONS, None, id="operations, no file", marks=pytest.mark.slow),
    ],
)
def test_extension_that_does_not_fit_is_refused(
    pure: Environment,
    tmp_path: Path,
    oldest_torch: str,
    schemas: str,
    reason: str,
    operators: bytes | None,
) -> None:
    made = copy_of(pure, tmp_path)
    package = made.packages / "sap_fast"
    information = {"oldest_torch": oldest_torch, "schemas": schemas}
    (package / "_C.py").write_text(f"build_info = lambda: {information}\n")
    if operators is not None:
        (package / "_ops.so").write_bytes(operators)
    check_refused(made.step(), reason)


def test_module_that_cannot_be_loaded_is_refused(pure: Environment, tmp_path: Path) -> None:
    made = copy_of(pure, tmp_path)
    (made.packages / "sap_fast" / "_C.so").write_bytes(b"no library")
    check_refused(made.step(), "_C.so: ")


def copy_of(made: Environment, folder: Path) -> Environment:
    copy = Environment(folder / "venv")
    shutil.copytree(made.root, copy.root, symlinks=True)
    return copy


def check_refused(step: Step, reason: str) -> None:
    assert step.backend == "reference"
    assert reason in step.why_not_native and CURE in step.why_not_native
    assert step.errors.count("the compiled extension is refused") == 1


# ---- what the build does where it cannot compile ----


def test_isolated_build_is_pure(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", symlinks=True)
    isolated = Environment(tmp_path / "venv")
    installed = Path(setuptools.__file__).parents[1]
    for path in [installed / "_distutils_hack", *installed.glob("setuptools*")]:
        (isolated.packages / path.name).symlink_to(path)
    python = str(isolated.root / "bin" / "python")
    tree = source_tree(tmp_path)
    wheel, done = build_wheel(python, tree)
    assert wheel is not None and wheel.name.endswith("-py3-none-any.whl"), done.stderr
    assert not members(wheel) & set(NATIVE)
    assert "building no kernels (torch is not there" in done.stderr and CURE in done.stderr
    wheel.unlink()
    wheel, done = build_wheel(python, tree, SAP_FAST_BUILD="cpu")
    assert wheel is None and done.returncode != 0
    assert "SAP_FAST_BUILD=cpu cannot be done: torch is not there" in done.stderr


def test_without_compiler_auto_is_pure_and_cpu_an_error(tmp_path: Path) -> None:
    tree = source_tree(tmp_path)
    wheel, done = build_wheel(sys.executable, tree, CXX="no-such-compiler")
    assert wheel is not None and wheel.name.endswith("-py3-none-any.whl"), done.stderr
    assert "building no kernels (there is no C++ compiler" in done.stderr
    wheel.unlink()
    wheel, done = build_wheel(sys.executable, tree, CXX="no-such-compiler", SAP_FAST_BUILD="cpu")
    assert wheel is None and done.returncode != 0
    assert "SAP_FAST_BUILD=cpu cannot be done: there is no C++ compiler" in done.stderr


def test_unknown_choice_is_an_error(tree: Path) -> None:
    done = run(sys.executable, "setup.py", "--name", cwd=tree, SAP_FAST_BUILD="CPU")
    assert done.returncode != 0
    assert "SAP_FAST_BUILD='CPU' is not known; choose auto, cpu, cuda, 0" in done.stderr


class FakeNvcc(NamedTuple):
    """An nvcc of a version, which prints `says` when it compiles and fails if `fails`."""

    version: str
    says: str = ""
    fails: bool = True


NO_HEADERS = FakeNvcc("13.0", "trial.cu:1:10: fatal error: cuda_runtime.h: No such file")
NO_COMPILER = FakeNvcc("13.0", "warning: odd\n#error -- unsupported GNU version! gcc versions")
WITHOUT_CUDA = [
    pytest.param(None, FakeNvcc("13.0"), "torch 2.99 is no CUDA build", id="CPU torch"),
    pytest.param("13.0", None, "there is no nvcc", id="no nvcc"),
    pytest.param(
        "13.0",
        FakeNvcc("12.8"),
        "nvcc is that of CUDA 12.8, torch is built for CUDA 13.0",
        id="another nvcc",
    ),
    pytest.param(
        "13.0",
        NO_HEADERS,
        "nvcc cannot compile an empty kernel: trial.cu:1:10: fatal error: cuda_runtime.h",
        id="no headers",
    ),
    pytest.param("13.0", NO_COMPILER, "#error -- unsupported GNU version", id="another c++"),
    pytest.param("13.0", FakeNvcc("13.0"), "empty kernel: it said nothing", id="nvcc fails"),
]


def cuda_machine(folder: Path, torch_cuda: str | None, nvcc: FakeNvcc | None) -> dict[str, str]:
    """Return the variables of a machine with this nvcc and a torch 2.99 for this CUDA."""
    toolkit = folder / "cuda"
    (toolkit / "bin").mkdir(parents=True)
    if nvcc is not None:
        program = toolkit / "bin" / "nvcc"
        program.write_text(
            f"""#!/bin/sh
if [ "$1" = --version ]; then
    echo Cuda compilation tools, release {nvcc.version}, V{nvcc.version}.1
    exit 0
fi
cat >&2 <<'END'
{nvcc.says}
END
exit {int(nvcc.fails)}
"""
        )
        program.chmod(0o755)
    # What setup.py reads of torch, and the headers of the torch of this environment.
    package = folder / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('this torch cannot be imported')\n")
    (package / "version.py").write_text(f"__version__ = '2.99'\ncuda = {torch_cuda!r}\n")
    for name in ("include", "lib"):
        (package / name).symlink_to(Path(torch.__file__).parent / name)
    return {"PYTHONPATH": str(folder), "CUDA_HOME": str(toolkit)}


@needs_compiler
@pytest.mark.parametrize(("torch_cuda", "nvcc", "reason"), WITHOUT_CUDA)
def test_cuda_is_an_error_where_it_cannot_be_built(
    tree: Path, tmp_path: Path, torch_cuda: str | None, nvcc: FakeNvcc | None, reason: str
) -> None:
    variables = cuda_machine(tmp_path, torch_cuda, nvcc) | {"SAP_FAST_BUILD": "cuda"}
    done = run(sys.executable, "setup.py", "--name", cwd=tree, **variables)
    assert done.returncode != 0
    assert "SAP_FAST_BUILD=cuda cannot be done: " in done.stderr and reason in done.stderr


#: A module that says nothing but what setup.py told it.
MODULE = """
extern "C" const char* text() {
  return "problem=" SAP_FAST_CUDA_PROBLEM " failed=" SAP_FAST_CUDA_FAILED
         " left out=" SAP_FAST_LEFT_OUT " cuda=" SAP_FAST_CUDA_VERSION;
}
"""


@needs_compiler
@pytest.mark.parametrize(("torch_cuda", "nvcc", "reason"), WITHOUT_CUDA)
def test_without_cuda_the_cpu_kernels_are_built_and_say_why(
    tmp_path: Path, torch_cuda: str | None, nvcc: FakeNvcc | None, reason: str
) -> None:
    tree = small_tree(tmp_path, "")
    (tree / "csrc" / "module.cpp").write_text(MODULE)
    done = succeed(build_in_place(tree, **cuda_machine(tmp_path, torch_cuda, nvcc)))
    assert reason in done.stderr
    module = (tree / "sap_fast" / "_C.so").read_bytes().decode(errors="replace")
    assert reason in module.replace("\0", "")
    assert ("failed=yes" in module) == (torch_cuda is not None and nvcc is not None)
    assert (tree / "sap_fast" / "_ops.so").exists()


@needs_compiler
def test_cuda_kernels_that_do_not_compile_leave_those_of_the_cpu(tmp_path: Path) -> None:
    # The trial succeeds; then the torch of this machine cannot even be imported.
    tree = small_tree(tmp_path, "")
    (tree / "csrc" / "module.cpp").write_text(MODULE)
    variables = cuda_machine(tmp_path, "13.0", FakeNvcc("13.0", fails=False))
    (tree / "sap_fast" / "_cuda.so").write_bytes(b"of an earlier build")
    done = succeed(build_in_place(tree, **variables))
    problem = "the CUDA kernels do not compile: this torch cannot be imported"
    assert f"sap_fast: built without CUDA kernels: {problem}" in done.stderr
    module = (tree / "sap_fast" / "_C.so").read_bytes()
    assert f"problem={problem} failed=yes".encode() in module
    assert not (tree / "sap_fast" / "_cuda.so").exists()
    done = build_in_place(tree, **variables, SAP_FAST_BUILD="cuda")
    assert done.returncode != 0 and "this torch cannot be imported" in done.stderr


@pytest.mark.slow  # imports torch in the build, as only that of CUDA does
@pytest.mark.skipif(
    torch.version.cuda is None, reason="a CPU build of torch links nothing for CUDA"
)
@needs_compiler
def test_cuda_kernels_are_a_library_of_their_own(tmp_path: Path) -> None:
    tree = small_tree(tmp_path, "")
    (tree / "csrc" / "module.cpp").write_text(MODULE)
    for path in (tree / "csrc" / "cuda").iterdir():
        path.write_text("")
    variables = cuda_machine(tmp_path, "13.0", FakeNvcc("13.0", fails=False))
    toolkit = Path(variables["CUDA_HOME"])
    # It makes objects of nothing, and what is linked against is there.
    program = (toolkit / "bin" / "nvcc").read_text()
    makes = """
while [ $# -gt 0 ]; do
    if [ "$1" = -o ]; then out=$2; fi
    shift
done
exec c++ -x c++ -fPIC -c /dev/null -o "$out"
"""
    (toolkit / "bin" / "nvcc").write_text(program.rpartition("cat >&2")[0] + makes)
    (toolkit / "lib64").mkdir()
    for name in ("cudart", "c10_cuda", "torch_cuda"):
        library = str(toolkit / "lib64" / f"lib{name}.so")
        command = ["c++", "-shared", "-x", "c++", "/dev/null", "-o", library]
        succeed(run(*command, cwd=tmp_path))
    # The torch of this environment builds for the CUDA of another.
    del variables["PYTHONPATH"]
    variables["SAP_FAST_TORCH"] = str(tmp_path / "torch")
    done = succeed(build_in_place(tree, SAP_FAST_BUILD="cuda", **variables))
    assert "building cuda kernels" in done.stderr
    assert all((tree / "sap_fast" / name).exists() for name in ("_C.so", "_ops.so", "_cuda.so"))
    module = (tree / "sap_fast" / "_C.so").read_bytes()
    assert b"problem= failed= left out= cuda=13.0" in module


@needs_compiler
def test_an_instruction_set_that_does_not_compile_is_left_out(tmp_path: Path) -> None:
    tree = small_tree(tmp_path, "")
    (tree / "csrc" / "module.cpp").write_text(MODULE)
    for name in ("AVX512", "AVX2"):
        source = tree / "csrc" / "cpu" / f"kernels_{name.lower()}.cpp"
        kept = (ROOT / source.relative_to(tree)).read_text()
        assert f"!defined(SAP_FAST_WITHOUT_{name})" in kept
        source.write_text(f"#ifndef SAP_FAST_WITHOUT_{name}\n#error old compiler\n#endif\n")
    done = succeed(build_in_place(tree))
    assert "sap_fast: built without AVX512 kernels: " in done.stderr
    assert b"left out=AVX2 AVX512" in (tree / "sap_fast" / "_C.so").read_bytes()
    done = build_in_place(tree, SAP_FAST_BUILD="cpu")
    assert done.returncode != 0 and not (tree / "sap_fast" / "_C.so").exists()


def build_in_place(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=tree, **variables)


def small_tree(folder: Path, operators: str) -> Path:
    """A tree whose kernels compile at once, with `operators` in the place of ops.cpp."""
    tree = source_tree(folder)
    for path in (tree / "csrc" / "cpu").glob("*.cpp"):
        path.write_text("")
    (tree / "csrc" / "module.cpp").write_text('extern "C" void* PyInit__C() { return nullptr; }\n')
    (tree / "csrc" / "ops.cpp").write_text(operators)
    return tree


BROKEN = "#error this cannot be compiled\n"


@needs_compiler
def test_wheel_is_pure_if_compiling_fails(tmp_path: Path) -> None:
    tree = small_tree(tmp_path, BROKEN)
    wheel, done = build_wheel(sys.executable, tree)
    assert "sap_fast: built without kernels: " in done.stderr
    assert wheel is not None and wheel.name.endswith("-py3-none-any.whl"), done.stderr
    assert not members(wheel) & set(NATIVE)
    assert "sap_fast/__init__.py" in members(wheel)  # not in a folder for platforms
    made = virtual_environment(tmp_path / "venv")
    succeed(made.install(str(wheel)))
    assert made.step().backend == "reference"
    wheel.unlink()
    wheel, done = build_wheel(sys.executable, tree, SAP_FAST_BUILD="cpu")
    assert wheel is None and done.returncode != 0


@needs_compiler
@pytest.mark.parametrize("choice", ["auto", "0"])
def test_editable_install_without_kernels_keeps_no_old_ones(tmp_path: Path, choice: str) -> None:
    tree = small_tree(tmp_path, BROKEN)
    for name in NATIVE:
        (tree / name).write_bytes(b"of an earlier installation")
    made = virtual_environment(tmp_path / "venv")
    done = succeed(made.install("--editable", str(tree), SAP_FAST_BUILD=choice))
    printed = done.stdout + done.stderr
    assert ("built without kernels" in printed) == (choice == "auto")
    step = made.step()
    assert step.file == tree / "sap_fast" / "__init__.py"
    assert step.backend == "reference" and "not there" in step.why_not_native


@needs_compiler
def test_everything_is_compiled_again(tmp_path: Path) -> None:
    tree = small_tree(
        tmp_path, '#include "check.h"\nextern "C" const char* text() { return TEXT; }'
    )
    for text in ("of one torch", "of another"):
        (tree / "csrc" / "check.h").write_text(f'#define TEXT "{text}"\n')
        succeed(build_in_place(tree, SAP_FAST_BUILD="cpu"))
        assert text.encode() in (tree / "sap_fast" / "_ops.so").read_bytes()
