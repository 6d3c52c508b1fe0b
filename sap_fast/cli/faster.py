"""What makes a model's forward and backward faster: compiled layers, and Liger's kernels."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from sap_fast.cli.console import UserError
from sap_fast.cli.models import default_device
from sap_fast.model.layers import find_decoder_layers


def compile_layers(model: nn.Module, backend: str) -> None:
    """Has every decoder layer compiled by itself, in place, when it first runs.

    The layers are alike, so one is compiled and serves all. The rest of the model stays as it is:
    the head is applied in chunks, which compiling the whole model would prevent.

    Args:
        model: A causal language model, possibly with an adapter.
        backend: Of `torch.compile`.

    Raises:
        UserError: The backend does not work on this machine, or the model's layers are not known.
    """
    try:
        # What is missing, such as a C++ compiler, shows here rather than in the first step.
        torch.compile(_sum_of_squares, backend=backend)(torch.ones(8, device=default_device()))
    # Compilers raise errors of many types; each means that the backend cannot be used.
    except Exception as error:
        why = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"--compile {backend}: does not work on this machine: {why}") from error
    try:
        layers, _ = find_decoder_layers(model)
    except ValueError as error:
        raise UserError(f"--compile {backend}: {error}") from error
    for layer in layers:
        layer.compile(backend=backend)


def _sum_of_squares(values: torch.Tensor) -> torch.Tensor:
    return values.square().sum()


def apply_liger(model: nn.Module) -> None:
    """Puts Liger's kernels in the place of a model's norms, MLPs and rotary embeddings.

    Its fused loss stays off: the losses are this package's own, and apply the head themselves.

    Args:
        model: A causal language model, possibly with an adapter.

    Raises:
        UserError: liger-kernel is not installed, cannot run here, or does not know the model.
    """
    if find_spec("liger_kernel") is None:
        raise UserError("--liger: needs liger-kernel: pip install liger-kernel")
    kind = default_device().type
    if kind not in ("cuda", "xpu"):
        raise UserError(
            f"--liger: its kernels run on GPUs, and this device is {kind}; leave it out"
        )
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    get_base_model: Any = getattr(model, "get_base_model", None)
    plain: Any = model if get_base_model is None else get_base_model()
    model_type = plain.config.model_type
    # It would say so where nobody looks, and do nothing.
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise UserError(
            f"--liger: has no kernels for models of type {model_type}; it has for {known}"
        )
    _apply_liger_kernel_to_instance(
        model=plain, fused_linear_cross_entropy=False, cross_entropy=False
    )
