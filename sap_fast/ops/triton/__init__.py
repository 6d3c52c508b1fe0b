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
    return f"Triton {version}{' in its interpreter' if interpreted else ''}"


@functools.cache
def _implementation(name: str) -> Callable[..., Any]:
    """Return the function that implements an operation; imports triton."""
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
