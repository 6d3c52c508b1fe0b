"""Fine-tune aligned language models without losing their safety.

Two optimizers for PyTorch: `BlendedAdamW` blends a safety gradient into AdamW's, and `FusedSAP` is
Safety-Aware Probing (Wu et al., arXiv:2505.16737).

`SAPTrainer` and `SAPTrainerMixin` need transformers, and import it only when they are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sap_fast.losses import (
    contrastive_loss,
    difference_loss,
    joint_loss,
    kl_loss,
    refusal_loss,
    task_loss,
)
from sap_fast.model.probes import ProbeSet
from sap_fast.optimizer import BlendedAdamW
from sap_fast.sap import FusedSAP
from sap_fast.step.metrics import SAPMetrics
from sap_fast.step.passes import SafetyPasses

if TYPE_CHECKING:
    from sap_fast.integrations.trainer import SAPTrainer, SAPTrainerMixin

__version__ = "0.2.0"

__all__ = [
    "BlendedAdamW",
    "FusedSAP",
    "ProbeSet",
    "SAPMetrics",
    "SAPTrainer",
    "SAPTrainerMixin",
    "SafetyPasses",
    "contrastive_loss",
    "difference_loss",
    "joint_loss",
    "kl_loss",
    "refusal_loss",
    "task_loss",
]


def __getattr__(name: str) -> Any:
    if name in ("SAPTrainer", "SAPTrainerMixin"):
        return getattr(import_module("sap_fast.integrations.trainer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
