"""The Triton kernels in the layout of the kernel hub: laid out, loaded, and taken by `ops`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hub.build import VARIANT, build, relative
from sap_fast import ops
from sap_fast.ops import triton

pytest.importorskip("kernels", reason="needs the package kernels")

# In a process of its own: Triton asks for the interpreter when a kernel is defined. The reference
# says what must come out.
RUN = """
import torch
from sap_fast import ops
from sap_fast.ops import triton

def update(backend):
    params, buffers = [torch.arange(5.0), torch.ones(3)], [torch.ones(5), torch.ones(3)]
    ops.perturb_swap_(params, buffers, torch.tensor(0.5), backend=backend)
    return [*params, *buffers, ops.dot(params, buffers, backend=backend)]

for left, right in zip(update("triton"), update("reference"), strict=True):
    assert torch.equal(left, right)
print(triton._implementation("dot").__module__)
print(triton.describe())
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    assert build(folder) == folder / "build" / VARIANT
    return folder


def test_build_toml_is_one_of_the_hub(repository: Path) -> None:
    from kernels._rust import Build

    backends = Build.open(repository).general.backends
    assert [str(backend).lower() for backend in backends] == ["cuda", "rocm"]


def test_kernels_of_a_folder_run_in_place_of_the_packages_own(repository: Path) -> None:
    variables = os.environ | {"TRITON_INTERPRET": "1", "SAP_FAST_KERNELS": str(repository)}
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=variables, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    module, description = done.stdout.splitlines()
    assert module.startswith("_sap_fast_") and not module.startswith("sap_fast.")
    assert description.endswith(f"in its interpreter, kernels from {repository}")


def test_kernels_of_other_operations_are_refused(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton.schema, "digest", lambda: "another")
    with pytest.raises(ValueError, match=r"operations of another version.*hub/build\.py"):
        ops.use_kernels(repository)
    assert triton._source is None


def test_what_cannot_be_loaded_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ImportError, match=rf"kernels='{tmp_path}' cannot be loaded: "):
        ops.use_kernels(tmp_path)
    with pytest.raises(ImportError, match="a version of the repository is needed, such as 1"):
        ops.use_kernels("owner/name")
    monkeypatch.setenv("SAP_FAST_KERNELS", "owner/name")
    with pytest.raises(ValueError, match=r"SAP_FAST_KERNELS='owner/name' is no folder; give one"):
        triton._from_environment()
    monkeypatch.setenv("SAP_FAST_KERNELS", "owner/name@3")
    assert triton._from_environment() == ("owner/name", 3)


def test_kernels_of_the_hub_import_nothing_of_the_package() -> None:
    with pytest.raises(ValueError, match=r"'from sap_fast.losses import head'"):
        relative("from sap_fast.losses import head\n")
