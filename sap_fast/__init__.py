"""Fine-tune aligned language models without losing their safety.

Safety-Aware Probing (SAP, Wu et al., arXiv:2505.16737) as a PyTorch optimizer:

    from sap_fast import FusedSAP, ProbeSet

`SAPTrainer` and `SAPTrainerMixin` need transformers, and import it only when they are asked for.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sap_fast.losses import (
    contrastive_loss,
    difference_loss,
    joint_loss,
    refusal_loss,
    task_loss,
)
from sap_fast.metrics import Calibration, SAPMetrics
from sap_fast.optimizer import FusedSAP
from sap_fast.probes import ProbeSet

if TYPE_CHECKING:
    from sap_fast.integrations.trainer import SAPTrainer, SAPTrainerMixin

__version__ = version("sap-fast")

__all__ = [
    "Calibration",
    "FusedSAP",
    "ProbeSet",
    "SAPMetrics",
    "SAPTrainer",
    "SAPTrainerMixin",
    "contrastive_loss",
    "difference_loss",
    "joint_loss",
    "refusal_loss",
    "task_loss",
]


def __getattr__(name: str) -> Any:
    if name in ("SAPTrainer", "SAPTrainerMixin"):
        return getattr(import_module("sap_fast.integrations.trainer"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
