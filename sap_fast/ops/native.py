"""The compiled extension: found, checked against this PyTorch, and loaded if it fits.

It has two parts. `sap_fast._C` (csrc/module.cpp) does not touch PyTorch and says how the other,
`_ops` (csrc/ops.cpp), was built; `_ops` registers the operators of `schema` for the CPU and, if it
was built with CUDA, for CUDA devices.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from pathlib import Path
from typing import Any

import torch

from sap_fast.ops import schema

logger = logging.getLogger(__name__)

_HOW_TO_BUILD = (
    "to build it, run `SAP_FAST_BUILD=cpu pip install --no-build-isolation --no-deps .` in the "
    "source folder of sap_fast (`-e .` in a clone that you edit), where torch, setuptools, "
    "pybind11, ninja and a C++ compiler are installed; with nvcc, SAP_FAST_BUILD=cuda builds the "
    "CUDA kernels too"
)


def _load() -> tuple[Any, str | None, bool]:
    if importlib.util.find_spec("sap_fast._C") is None:
        return None, f"the compiled extension is not there; {_HOW_TO_BUILD}", False
    try:
        module = importlib.import_module("sap_fast._C")
        built_for = module.build_info()
        if built_for["torch"] != str(torch.__version__):
            raise ImportError(
                f"it was built for torch {built_for['torch']}, this is {torch.__version__}"
            )
        # PyTorch ends the process if an operator is registered for another schema than its own.
        if built_for["schemas"] != schema.digest():
            raise ImportError("it was built for operations of another version of sap_fast")
        torch.ops.load_library(Path(module.__file__ or "").with_name("_ops.so"))
    except (ImportError, OSError) as error:
        # load_library puts what the linker says behind its own message.
        reason = f"the compiled extension is refused: {error.__cause__ or error}; {_HOW_TO_BUILD}"
        logger.warning("sap_fast: %s", reason)
        return None, reason, True
    return module, None, False


#: The module `_C`, or None.
extension: Any
#: Why nothing native can run, or None.
problem: str | None
#: Whether there is an extension that does not fit; `problem` was logged then.
refused: bool
extension, problem, refused = _load()


def why_not(device_type: str) -> str | None:
    """Return why the native backend cannot run on devices of this type; None if it can."""
    if device_type != "cpu" and (device_type != "cuda" or torch.version.hip is not None):
        return f"there are no native kernels for {device_type}"
    return problem if problem is not None or device_type == "cpu" else _why_not_cuda()


@functools.cache
def _why_not_cuda() -> str | None:
    info = extension.build_info()
    if not info["cuda"]:
        return f"the compiled extension was built without CUDA; {_HOW_TO_BUILD}"
    oldest = min(
        tuple(int(part) for part in name.removesuffix("+PTX").rstrip("af").split("."))
        for name in re.split(r"[ ;]+", info["cuda_architectures"].strip())
    )
    devices = range(torch.cuda.device_count())
    if not devices:
        return "there is no CUDA device"
    found = min(torch.cuda.get_device_capability(device) for device in devices)
    if found < oldest:
        return (
            f"the CUDA kernels were built for compute capability {info['cuda_architectures']}, "
            f"there is a GPU of {found[0]}.{found[1]}; build them with TORCH_CUDA_ARCH_LIST="
            f"{found[0]}.{found[1]}"
        )
    return None


def describe(device_type: str) -> str:
    """Return in a line what the native backend runs with on a device where it can run."""
    info = extension.build_info()
    if device_type == "cpu":
        return f"C++ kernels for {extension.cpu_capability()}, built with {info['compiler']}"
    return f"CUDA {info['cuda']} kernels for {info['cuda_architectures']}"
