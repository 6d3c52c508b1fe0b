"""The Triton backend: found, and registered for the devices that it runs on.

One file per family: `perturb`, `probe`, `adamw`; `table` puts lists of tensors where kernels can
read them, `ahead_of_time` compiles every kernel without a GPU. The package triton is imported when
an operation first runs on this backend, or when `why_not` is asked about a GPU.

With `TRITON_INTERPRET=1` in the environment, Triton's interpreter runs the kernels on the CPU, one
program after the other: to test them, not to train.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from sap_fast.ops import schema

#: The files of this folder that implement operations, each by a function of the same name.
_FAMILIES = ("perturb", "probe", "adamw")

#: Whether the kernels run in Triton's interpreter. Triton asks when a kernel is defined.
interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def _import_problem() -> str | None:
    try:
        importlib.import_module("triton")
    except Exception as error:  # A broken installation raises more than ImportError.
        return f"the package triton cannot be imported ({error}); `pip install triton`"
    return None


def why_not(device_type: str) -> str | None:
    """Return why the Triton backend cannot run on devices of this type; None if it can."""
    if device_type == "cuda" or (device_type == "cpu" and interpreted):
        return _import_problem()
    if device_type == "cpu":
        return "Triton compiles for GPUs; TRITON_INTERPRET=1 runs its kernels on the CPU, to test"
    return f"the Triton kernels are not made for {device_type}"


def describe() -> str:
    """Return in a line what the Triton backend runs with."""
    version = importlib.import_module("triton").__version__
    source = _source or _from_environment()
    kernels = "" if source is None else f", kernels from {source[0]}"
    return f"Triton {version}{' in its interpreter' if interpreted else ''}{kernels}"


#: Where the kernels come from: a folder or a repository of the kernel hub; None for this package.
_source: tuple[str, int | None] | None = None


def use_kernels(source: str | os.PathLike[str] | None, version: int | None = None) -> None:
    """Take the kernels from the kernel hub, or from a folder in its layout.

    Args:
        source: a folder that holds `build/torch-universal`, as hub/build.py writes it, or the name
            of a repository, "owner/name"; its publisher has to be one that the package `kernels`
            trusts. None: those of this package again.
        version: of a repository; a folder has none.

    Raises:
        ImportError: if the package kernels is not there, or cannot load them.
        ValueError: if they are kernels of operations that are not those of this version.
    """
    global _source
    wanted = None if source is None else (os.fspath(source), version)
    if wanted is not None:
        _from_hub(*wanted)
    _source = wanted
    _implementation.cache_clear()


@functools.cache
def _from_hub(source: str, version: int | None) -> ModuleType:
    """Return the module of a kernel, loaded and looked at."""
    try:
        kernels = importlib.import_module("kernels")
    except ImportError as error:
        raise ImportError(
            f"kernels={source!r} needs the package kernels; `pip install kernels`"
        ) from error
    try:
        if os.path.isdir(source):
            found = kernels.get_local_kernel(Path(source).resolve())
        elif version is None:
            raise ValueError("a version of the repository is needed, such as 1")
        else:
            found = kernels.get_kernel(source, version=version)
    except Exception as error:  # whatever the hub, a broken folder or Triton raises
        raise ImportError(f"kernels={source!r} cannot be loaded: {error}") from error
    if getattr(found, "DIGEST", None) != schema.digest():
        raise ValueError(
            f"kernels={source!r} are for operations of another version of sap_fast; build those of "
            "this one with `python hub/build.py`"
        )
    return found


def _from_environment() -> tuple[str, int | None] | None:
    """Return what SAP_FAST_KERNELS names: a folder, or owner/name@version."""
    source = os.environ.get("SAP_FAST_KERNELS", "")
    if not source or os.path.isdir(source):
        return (source, None) if source else None
    name, separator, version = source.rpartition("@")
    if not separator or not version.isdecimal():
        raise ValueError(
            f"SAP_FAST_KERNELS={source!r} is no folder; give one, or a repository and its version, "
            "such as owner/name@1"
        )
    return name, int(version)


@functools.cache
def _implementation(name: str) -> Callable[..., Any]:
    """Return the function that implements an operation; imports triton."""
    source = _source or _from_environment()
    if source is not None:
        return getattr(_from_hub(*source), name)
    modules = [importlib.import_module(f"{__name__}.{family}") for family in _FAMILIES]
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def _register(name: str) -> None:
    def run(*arguments: Any, **options: Any) -> Any:
        return _implementation(name)(*arguments, **options)

    # AMD's devices go by the name of CUDA as well.
    for key in ("CUDA", "CPU") if interpreted else ("CUDA",):
        schema.library.impl(f"{name}.triton", run, key)


for _name in schema.SCHEMAS:
    _register(_name)
