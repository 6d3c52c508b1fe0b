"""The compiled extension: found, checked against this PyTorch, and loaded if it fits.

It has two parts. `sap_fast._C` (csrc/module.cpp) does not touch PyTorch and says how the other,
`_ops` (csrc/ops.cpp), was built; `_ops` registers the operators of `schema` for the CPU and, if it
was built with CUDA, for CUDA devices.
"""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

_HOW_TO_BUILD = (
    "build it with `pip install --no-build-isolation --force-reinstall --no-deps sap-fast` (from a "
    "clone: `pip install --no-build-isolation -e .`) where torch, pybind11, ninja and a C++ "
    "compiler are installed"
)

#: The module `_C`, or None; why nothing native can run, or None.
extension: ModuleType | None = None
problem: str | None = None


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        from sap_fast import _C
    except ImportError as error:
        if "_C" in str(error) and "cannot import name" in str(error):
            return None, f"the compiled extension is not there; {_HOW_TO_BUILD}"
        return None, f"the compiled extension cannot be loaded ({error}); {_HOW_TO_BUILD}"
    built_for = _C.build_info()["torch"]
    if built_for != torch.__version__:
        return None, (
            f"the compiled extension was built for torch {built_for}, this is torch "
            f"{torch.__version__}; {_HOW_TO_BUILD}"
        )
    library = Path(_C.__file__).with_name("_ops.so")
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return None, f"{library.name} cannot be loaded ({error}); {_HOW_TO_BUILD}"
    return _C, None


extension, problem = _load()
if problem is not None and "is not there" not in problem:
    logger.warning("sap_fast: %s", problem)


def why_not(device_type: str) -> str | None:
    """Return why the native backend cannot run on devices of this type; None if it can."""
    if extension is None:
        return problem
    if device_type == "cpu":
        return None
    if device_type == "cuda" and torch.version.hip is None:
        if extension.build_info()["cuda"]:
            return None
        return (
            "the compiled extension was built without CUDA; build it where nvcc and a CUDA build "
            "of torch are, with SAP_FAST_BUILD=cuda"
        )
    return f"there are no native kernels for {device_type}"


def describe(device_type: str) -> str:
    """Return in a line what the native backend runs with on a device."""
    assert extension is not None
    info = extension.build_info()
    if device_type == "cpu":
        return f"C++ kernels for {extension.cpu_capability()}, built with {info['compiler']}"
    return f"CUDA {info['cuda']} kernels for {info['cuda_architectures']}"
