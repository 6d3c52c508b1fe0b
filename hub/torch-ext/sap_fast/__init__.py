"""The operations of a SAP step on GPUs, in Triton: weights, probes, and the update.

What each computes is written in `reference`, in plain PyTorch. The package sap-fast takes them from
here where `SAP_FAST_KERNELS` names this folder or its repository.
"""

from __future__ import annotations

import os

#: Whether the kernels run in Triton's interpreter. Triton asks when a kernel is defined.
interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

# They ask for `interpreted`.
from .adamw import adamw_blend_  # noqa: E402
from .perturb import (  # noqa: E402
    dot,
    perturb_swap_,
    reflect_,
    restore_swap_,
    sum_squares,
)
from .probe import probe_add, probe_project_, probe_rule_  # noqa: E402
from .schemas import DIGEST  # noqa: E402

__all__ = [
    "DIGEST",
    "adamw_blend_",
    "dot",
    "interpreted",
    "perturb_swap_",
    "probe_add",
    "probe_project_",
    "probe_rule_",
    "reflect_",
    "restore_swap_",
    "sum_squares",
]
