"""Task loss and safety losses over response tokens."""

from sap_fast.losses.scoring import (
    IGNORE_INDEX,
    Batch,
    Reduction,
    contrastive_loss,
    difference_loss,
    joint_loss,
    refusal_loss,
    response_log_probs,
    task_loss,
)

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "Reduction",
    "contrastive_loss",
    "difference_loss",
    "joint_loss",
    "refusal_loss",
    "response_log_probs",
    "task_loss",
]
