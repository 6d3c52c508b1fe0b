"""The compiled extension: found, checked against this PyTorch, and loaded if it fits.

It has three parts. `sap_fast._C` (csrc/module.cpp) does not touch PyTorch and says how the others
were built. `_ops` (csrc/ops.cpp) registers the operators of `schema` for the CPU, `_cuda`
(csrc/cuda/ops.cpp), which not every build has, those for CUDA devices. Both speak to PyTorch by its
stable ABI, so that one binary fits every version from the oldest that has all of it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from sap_fast.ops import schema
from sap_fast.ops.interrupts import interrupts_deferred

logger = logging.getLogger(__name__)

_HOW_TO_BUILD = (
    "to build it, run `SAP_FAST_BUILD=cpu pip install --no-build-isolation --no-deps .` in the "
    "source folder of sap_fast (`-e .` in a clone that you edit), where torch, setuptools, "
    "pybind11 and a C++ compiler are installed; with nvcc and ninja, SAP_FAST_BUILD=cuda builds "
    "the CUDA kernels too"
)


def _load() -> tuple[Any, str | None, bool]:
    if importlib.util.find_spec("sap_fast._C") is None:
        return None, f"the compiled extension is not there; {_HOW_TO_BUILD}", False
    try:
        module = importlib.import_module("sap_fast._C")
        information = module.build_info()
        oldest = information["oldest_torch"]
        if _numbers(torch.__version__) < _numbers(oldest):
            raise ImportError(f"it needs torch {oldest} or later, this is {torch.__version__}")
        # PyTorch ends the process if an operator is registered for another schema than its own.
        if information["schemas"] != schema.digest():
            raise ImportError("it was built for operations of another version of sap_fast")
        _load_library(module, "_ops.so")
    except (ImportError, OSError) as error:
        reason = f"the compiled extension is refused: {_said(error)}; {_HOW_TO_BUILD}"
        logger.warning("sap_fast: %s", reason)
        return None, reason, True
    return module, None, False


def _load_cuda() -> str | None:
    """Load the CUDA kernels and return None, or why there are none."""
    information = extension.build_info()
    if not information["cuda"]:
        return (
            f"the compiled extension was built without CUDA: {information['cuda_problem']}; "
            f"{_HOW_TO_BUILD}"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    try:
        _load_library(extension, "_cuda.so")
    except OSError as error:
        reason = f"the compiled CUDA kernels are refused: {_said(error)}; {_HOW_TO_BUILD}"
        logger.warning("sap_fast: %s", reason)
        return reason
    return None


def _load_library(module: Any, name: str) -> None:
    torch.ops.load_library(Path(module.__file__ or "").with_name(name))


def _said(error: BaseException) -> BaseException:
    # load_library puts what the linker says behind its own message.
    return error.__cause__ or error


def _numbers(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", str(version))[:2])


#: The module `_C`, or None.
extension: Any
#: Why nothing native can run, or None.
problem: str | None
#: Whether there is an extension that does not fit; `problem` was logged then.
refused: bool
extension, problem, refused = _load()
#: Why nothing native can run on CUDA devices, or None.
cuda_problem = problem if extension is None else _load_cuda()
#: Whether they were to be built, or are there, and something is wrong with them.
cuda_failed = extension is not None and (
    bool(extension.build_info()["cuda_failed"])
    or (bool(extension.build_info()["cuda"]) and cuda_problem is not None)
)


# ---- what the stable ABI leaves to Python ----

#: What begins the message of an error that is a NotImplementedError: kUnsupported of csrc/stable.h.
_UNSUPPORTED = "NotImplementedError: "
#: What begins that of one which came after some tensors were written: kPartlyWritten. Their indices
#: follow, list by list.
_PARTLY_WRITTEN = re.compile(r"PartlyWritten: ([\d,;]*) ")


def run(name: str, operator: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """Run an operator of the extension, and do what PyTorch's stable ABI cannot.

    The versions of what it wrote are counted up, so that autograd and the recovery from errors see
    it, also where a list takes several launches and one after the first fails; what its kernels do
    not support is a NotImplementedError.
    """
    written = schema.WRITTEN[name]
    if not written:
        return _call(operator, arguments, options)
    if isinstance(arguments[written[0]], Tensor):
        # Its kernel counts by itself, so that it does so in compiled graphs too, but is not heard
        # under a TorchDispatchMode.
        (tensor,) = (arguments[position] for position in written)
        before = None if tensor.is_inference() else tensor._version
        result = _call(operator, arguments, options)
        if before is not None and tensor._version == before:
            increment_version(tensor)
        return result
    with interrupts_deferred():
        result = _call(operator, arguments, options, [arguments[position] for position in written])
        for position in written:
            increment_version(arguments[position])
    return result


def _call(
    operator: Any,
    arguments: Sequence[Any],
    options: Mapping[str, Any],
    written: Sequence[Sequence[Tensor]] = (),
) -> Any:
    try:
        return operator(*arguments, **options)
    except RuntimeError as error:
        said = str(error)
        if said.startswith(_UNSUPPORTED):
            raise NotImplementedError(said.removeprefix(_UNSUPPORTED)) from None
        partly = _PARTLY_WRITTEN.match(said)
        if partly is None:
            raise
        for tensors, indices in zip(written, partly[1].split(";"), strict=True):
            increment_version([tensors[int(index)] for index in indices.split(",") if index])
        raise RuntimeError(said[partly.end() :]) from None


# ---- where it runs ----


def why_not(device_type: str) -> str | None:
    """Return why the native backend cannot run on devices of this type; None if it can."""
    if device_type != "cpu" and (device_type != "cuda" or torch.version.hip is not None):
        return f"there are no native kernels for {device_type}"
    return problem if problem is not None or device_type == "cpu" else _why_not_cuda()


@functools.cache
def _why_not_cuda() -> str | None:
    if cuda_problem is not None:
        return cuda_problem
    info = extension.build_info()
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
        kernels = f"C++ kernels for {extension.cpu_capability()}, built with {info['compiler']}"
        left_out = info["left_out"]
        return f"{kernels}, which could not compile those for {left_out}" if left_out else kernels
    return f"CUDA {info['cuda']} kernels for {info['cuda_architectures']}"
