"""The CPU kernels on arm64, by emulation, and on every instruction set of this machine.

`kernels_driver.cpp` runs each kernel without PyTorch, on numbers of every kind.
"""

from __future__ import annotations

import ast
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CROSS_COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        platform.machine() not in ("x86_64", "aarch64") or shutil.which("c++") is None,
        reason="needs a C++ compiler on x86-64 or arm64",
    ),
]


def flags() -> list[str]:
    """The flags that the extension is built with."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLAGS":
            return ast.literal_eval(node.value)
    raise AssertionError("setup.py has no FLAGS")


def computed(
    folder: Path, compiler: str, *more: str, emulator: str | None = None
) -> dict[str, list[str]]:
    """What the driver printed, lines by instruction set."""
    program = folder / f"driver-{compiler}"
    sources = [
        ROOT / "tests" / "ops" / "kernels_driver.cpp",
        *(ROOT / "csrc" / "cpu").glob("*.cpp"),
    ]
    subprocess.run(
        [compiler, *flags(), *more, "-o", str(program), *sorted(map(str, sources))], check=True
    )
    command = [str(program)] if emulator is None else [emulator, str(program)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = [section.partition("]\n") for section in printed.split("[")[1:]]
    return {name: lines.splitlines() for name, _, lines in sections}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return computed(tmp_path_factory.mktemp("here"), "c++")


def test_kernels_of_every_instruction_set_here_have_the_same_bits_but_for_adamw(
    here: dict[str, list[str]],
) -> None:
    if len(here) == 1:
        pytest.skip("this machine has one instruction set")
    assert len({len(lines) for lines in here.values()}) == 1 and len(here["baseline"]) > 1000
    # Where the hardware has it, AdamW rounds product and sum at once, as PyTorch's does.
    fused = [lines for name, lines in here.items() if name != "baseline"]
    assert all(lines == fused[0] for lines in fused)
    pairs = zip(here["baseline"], fused[0], strict=True)
    assert {line.split()[0] for line, other in pairs if line != other} == {"adamw_blend"}


def test_kernels_on_arm64_have_the_bits_of_avx2(here: dict[str, list[str]], tmp_path: Path) -> None:
    for program in (CROSS_COMPILER, EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not there (Debian: g++-aarch64-linux-gnu, qemu-user)")
    if "avx2" not in here:
        pytest.skip("this machine has no AVX2 to compare with")
    there = computed(tmp_path, CROSS_COMPILER, "-static", emulator=EMULATOR)
    assert list(there) == ["baseline"]
    assert there["baseline"] == here["avx2"]
