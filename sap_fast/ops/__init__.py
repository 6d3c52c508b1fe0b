"""The arithmetic of a SAP step, one function per operation, one module per backend.

`reference` is the specification: plain PyTorch that runs on every device. Every other backend
implements the same names and is held to it. `resolve_backend` picks the module that an optimizer
uses; `backend_report` says what can run here and why, for `sap-fast doctor`.
"""

from __future__ import annotations

import logging
from types import ModuleType

from sap_fast.ops import reference

logger = logging.getLogger(__name__)

#: Names that `backend=` accepts.
BACKENDS = ("auto", "reference")

#: What each operation does, by name; every backend module has a function of this name.
OPERATIONS = {
    "sum_squares": "sum of squares over a list of tensors",
    "dot": "inner product of two lists of tensors",
    "perturb_swap_": "W becomes W + ΔW; the buffer of ΔW keeps W",
    "reflect_": "W + ΔW becomes W − ΔW",
    "restore_swap_": "W comes back bit for bit; the buffer becomes the direction again",
    "probe_inject": "x + v, and the sum over tokens of the gradient on the way back",
    "probe_rule_": "the probe gradient h becomes the probe V_safe",
    "adamw_blend_": "gradient blending, clipping and AdamW",
}

_announced: set[str] = set()


def resolve_backend(name: str) -> ModuleType:
    """Return the module that implements the operations.

    Args:
        name: `"auto"` (the fastest backend that can run here) or a backend's name.

    Raises:
        ValueError: if `name` is not one of `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend={name!r} is not known; choose one of {', '.join(BACKENDS)}")
    if name == "auto" and "auto" not in _announced:
        _announced.add("auto")
        logger.info("sap_fast runs on the reference backend: %s", backend_report()[0][2])
    return reference


def backend_report() -> list[tuple[str, bool, str]]:
    """List the backends as (name, can run here, reason)."""
    return [("reference", True, "plain PyTorch, the only backend of this version, on every device")]
