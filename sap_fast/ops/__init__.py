"""The arithmetic of a SAP step: every operation, on the backend that is asked for.

What each operation computes is written in `reference`, in plain PyTorch; its schema is in `schema`.
Other backends are held to the reference:

========== ============================================ ================================
backend    runs on                                      needs
========== ============================================ ================================
reference  every device                                 nothing
native     CPU; CUDA                                    the compiled extension (`native`)
triton     GPUs                                         the package triton (`triton`)
========== ============================================ ================================

`backend="auto"` takes, for the device that the tensors are on, the first of native, triton and
reference that can run there, and the reference for what that one does not support (fp64, tensors
with gaps). It says so once: as information, or as a warning where it has to be the reference. The
environment variable `SAP_FAST_BACKEND` takes the place of "auto". A backend that is named and
cannot run raises. `use_kernels`, or the environment variable `SAP_FAST_KERNELS`, takes the Triton
kernels from the kernel hub.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from sap_fast.distributed import add_over_ranks_, any_dtensor, by_shard_group, local_shards
from sap_fast.ops import native, reference, triton
from sap_fast.ops.schema import IMPLEMENTATIONS, SCHEMAS, overload
from sap_fast.ops.triton import use_kernels as use_kernels

logger = logging.getLogger(__name__)

#: Names that `backend=` accepts.
BACKENDS = ("auto", *IMPLEMENTATIONS)

#: What each operation does, by name.
OPERATIONS = {
    "sum_squares": "sum of squares over a list of tensors",
    "dot": "inner product of two lists of tensors",
    "perturb_swap_": "W becomes W + ΔW; the buffer of ΔW keeps W",
    "reflect_": "W + ΔW becomes W − ΔW",
    "restore_swap_": "W comes back bit for bit; the buffer becomes the safety gradient again",
    "probe_add": "x + v: the probe in the hidden states",
    "probe_project_": "the sum over tokens of the gradient of x, on the way back",
    "probe_rule_": "the probe gradient h becomes the probe V",
    "adamw_blend_": "gradient blending, unscaling, clipping and AdamW",
}
assert OPERATIONS.keys() == SCHEMAS.keys()

_said: set[str] = set()


# ---- which backend ----


def why_not(backend: str, device_type: str) -> str | None:
    """Return why `backend` cannot run on devices of this type; None if it can."""
    if backend == "native":
        return native.why_not(device_type)
    if backend == "triton":
        return triton.why_not(device_type)
    return None


def is_auto(backend: str) -> bool:
    """Return whether neither the argument nor the environment names a backend."""
    return backend == "auto" and os.environ.get("SAP_FAST_BACKEND", "auto") in ("", "auto")


def choose_backend(backend: str, device_type: str) -> str:
    """Return the name of the backend that runs operations on tensors of a device.

    Args:
        backend: one of `BACKENDS`.
        device_type: `tensor.device.type`.

    Raises:
        ValueError: if `backend`, or the value of `SAP_FAST_BACKEND`, is not one of `BACKENDS`.
        RuntimeError: if the backend that is named cannot run on that device.
    """
    source = "backend"
    if backend == "auto" and not is_auto(backend):
        source, backend = "SAP_FAST_BACKEND", os.environ["SAP_FAST_BACKEND"]
    if backend not in BACKENDS:
        raise ValueError(f"{source}={backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return next(name for name in IMPLEMENTATIONS if why_not(name, device_type) is None)
    reason = why_not(backend, device_type)
    if reason is not None:
        raise RuntimeError(f"{source}={backend!r} cannot run on {device_type}: {reason}")
    return backend


def check_backend(backend: str, device_types: Iterable[str]) -> None:
    """Check that a backend can run on devices of these types, and say once which one does.

    Raises:
        ValueError: if the name is not known.
        RuntimeError: if that backend cannot run on one of the devices, with the reason.
    """
    for device_type in sorted(set(device_types)):
        chosen = choose_backend(backend, device_type)
        if not is_auto(backend):
            continue
        if chosen == "reference":
            faster = "triton" if device_type == "cuda" else "native"
            reason = describe(faster, device_type)
            level = logging.INFO if faster == "native" and native.refused else logging.WARNING
            _say_once(f"sap_fast: {device_type} runs on the reference backend: {reason}", level)
        else:
            reason, level = describe(chosen, device_type), logging.INFO
            if chosen == "triton":
                reason = f"{reason}; not on native: {native.why_not(device_type)}"
                level = logging.WARNING if native.cuda_failed else logging.INFO
            _say_once(f"sap_fast: {device_type} runs on {chosen}: {reason}", level)


def describe(backend: str, device_type: str) -> str:
    """Return what a backend that can run on a device is there, or why it cannot run."""
    reason = why_not(backend, device_type)
    if reason is not None:
        return reason
    if backend == "native":
        return native.describe(device_type)
    return triton.describe() if backend == "triton" else "plain PyTorch, on every device"


def _say_once(message: str, level: int = logging.WARNING) -> None:
    if message not in _said:
        _said.add(message)
        logger.log(level, message)


def call(name: str, backend: str, *arguments: Any, **options: Any) -> Any:
    """Run an operation on this backend and no other; arguments are those of its schema."""
    if backend == "reference":
        return getattr(reference, name)(*arguments, **options)
    operator = overload(name, backend)
    # A graph holds the operator itself, and counts versions by what the schema says is written.
    if backend == "native" and not torch.compiler.is_compiling():
        return native.run(name, operator, arguments, options)
    return operator(*arguments, **options)


def _run(name: str, backend: str, device: torch.device, *arguments: Any, **options: Any) -> Any:
    """Run an operation on the backend that `choose_backend` takes for `device`."""
    chosen = choose_backend(backend, device.type)
    try:
        return call(name, chosen, *arguments, **options)
    except NotImplementedError as error:
        # What the kernels do not support, said before anything was written.
        if chosen == "reference" or not is_auto(backend):
            raise
        _say_once(f"sap_fast: {name} runs on the reference backend: {error}")
        return call(name, "reference", *arguments, **options)


def _run_lists(
    name: str, backend: str, lists: Sequence[Sequence[Any]], *arguments: Any, **options: Any
) -> list[Any]:
    """Run an operation on lists of tensors, once for each device; return what it returns there."""
    if not lists[0]:
        return []
    if any_dtensor(lists[0]):
        lists = [local_shards(items) for items in lists]
    chosen = choose_backend(backend, lists[0][0].device.type)
    try:
        return [call(name, chosen, *lists, *arguments, **options)]
    except NotImplementedError:
        # Said before anything was written. Kernels look at the device of every tensor anyway:
        # asking for all of them here too, each time, would cost a fifth of what is left to do
        # beside the kernel. If devices are not the reason, `_run` meets it again.
        groups = _by_device(*lists)
    results = []
    for group in groups:
        device = group[0][0].device
        beside = [_beside(value, device) for value in arguments]
        named = {key: _beside(value, device) for key, value in options.items()}
        results.append(_run(name, backend, device, *group, *beside, **named))
    return results


def _beside(value: Any, device: torch.device) -> Any:
    """Return an argument as kernels of `device` can read it: not from another accelerator."""
    if isinstance(value, Tensor) and value.device.type != "cpu" and value.device != device:
        return value.to(device)
    return value


def _by_device(first: Sequence[Tensor], *others: Sequence[Any]) -> list[list[list[Any]]]:
    """Split lists of equal length by the device of the first one's tensors."""
    groups: dict[torch.device, list[list[Any]]] = {}
    for row in zip(first, *others, strict=True):
        group = groups.setdefault(row[0].device, [[] for _ in row])
        for items, item in zip(group, row, strict=True):
            items.append(item)
    return list(groups.values())


# ---- operations ----


def sum_squares(tensors: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Return the sum of squares over a list of tensors; see `reference.sum_squares`."""
    return _sum("sum_squares", backend, [tensors])


def dot(left: Sequence[Tensor], right: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    """Return the inner product of two lists of tensors; see `reference.dot`."""
    return _sum("dot", backend, [left, right])


def _sum(name: str, backend: str, lists: Sequence[Sequence[Tensor]]) -> Tensor:
    """Run a sum over lists of tensors, on all devices and over the shards of all ranks."""
    if not lists[0]:
        raise ValueError("there are no tensors to sum over; give at least one")
    return _add(
        [
            add_over_ranks_(_add(_run_lists(name, backend, part)), group)
            for group, part in by_shard_group(lists)
        ]
    )


def _add(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum()


def perturb_swap_(
    params: Sequence[Tensor], buffers: Sequence[Tensor], scale: Tensor, *, backend: str = "auto"
) -> None:
    """Set p, b ← p + scale·b, p; see `reference.perturb_swap_`."""
    _run_lists("perturb_swap_", backend, [params, buffers], scale)


def reflect_(params: Sequence[Tensor], buffers: Sequence[Tensor], *, backend: str = "auto") -> None:
    """Set p ← 2·b − p; see `reference.reflect_`."""
    _run_lists("reflect_", backend, [params, buffers])


def restore_swap_(
    params: Sequence[Tensor],
    buffers: Sequence[Tensor],
    inverse_scale: Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Set p, b ← b, (p − b)·inverse_scale; see `reference.restore_swap_`."""
    _run_lists("restore_swap_", backend, [params, buffers], inverse_scale)


def adamw_blend_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    directions: Sequence[Tensor | None] = (),
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    blend: Tensor | None = None,
    gradient_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Blend, unscale, clip and update with AdamW; see `reference.adamw_blend_`."""
    lists = [params, grads, exp_avgs, exp_avg_sqs, steps]
    _run_lists(
        "adamw_blend_",
        backend,
        [*lists, directions] if directions else lists,
        *([] if directions else [[]]),
        # Doubles hold a Python float exactly; the kernels round once, where they use it.
        lr=lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
        blend=blend,
        gradient_scale=gradient_scale,
    )


def probe_rule_(
    buffers: Sequence[Tensor],
    rule: str,
    probe_size: float,
    *,
    perturbation_norm: Tensor,
    radii: Sequence[Tensor],
    backend: str = "auto",
) -> Tensor:
    """Turn the probe gradients h into the probes V; see `reference.probe_rule_`."""
    found = []
    groups = _by_device(buffers, radii)
    for group, of_group in groups:
        device = group[0].device
        norm = _beside(perturbation_norm, device)
        beside = [_beside(radius, device) for radius in of_group]
        found.append(_run("probe_rule_", backend, device, group, rule, probe_size, norm, beside))
    if len(found) == 1:
        return found[0]
    # One h that is not finite zeroes the probes of every device.
    finite = torch.stack([one.to(found[0].device) for one in found]).all()
    for group, _ in groups:
        gone = finite.logical_not().to(group[0].device)
        for buffer in group:
            buffer.masked_fill_(gone, 0.0)
    return finite


def probe_project_(buffer: Tensor, gradient: Tensor, sign: float, *, backend: str = "auto") -> None:
    """Add sign·Σ_tokens of a gradient (…, H) to a buffer (H,); see `reference.probe_project_`."""
    backend = _for_dtype(backend, gradient.dtype)
    _run("probe_project_", backend, gradient.device, buffer, gradient, sign)


def _for_dtype(backend: str, dtype: torch.dtype) -> str:
    # Compiled graphs choose when they are traced, before an operation could refuse fp64.
    return "reference" if dtype == torch.float64 and is_auto(backend) else backend


def _probe_add(hidden: Tensor, offset: Tensor, backend: str) -> Tensor:
    backend = _for_dtype(backend, hidden.dtype)
    return _run("probe_add", backend, hidden.device, hidden, offset)


class _ProbeInject(torch.autograd.Function):
    """x + v forward; backward adds sign·Σ_tokens ∂L/∂x to a buffer and passes the gradient on."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        anchor: Tensor,
        offset: Tensor | None,
        buffer: Tensor,
        sign: float,
        backend: str,
    ) -> Tensor:
        ctx.buffer, ctx.sign, ctx.backend = buffer, sign, backend
        return hidden.view_as(hidden) if offset is None else _probe_add(hidden, offset, backend)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        probe_project_(ctx.buffer, gradient, ctx.sign, backend=ctx.backend)
        return (gradient if ctx.needs_input_grad[0] else None), None, None, None, None, None


def probe_inject(
    hidden: Tensor,
    offset: Tensor | None,
    buffer: Tensor | None = None,
    sign: float = 1.0,
    *,
    anchor: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return hidden + offset, and project the gradient into `buffer` on the way back.

    Args:
        hidden: hidden states, (…, H).
        offset: the probe V in fp32, (H,); None stands for zero. The sum is rounded to the dtype of
            `hidden`.
        buffer: where the backward pass adds sign·∂L/∂V, in fp32, (H,). None: nothing is collected.
        sign: +1 or −1, the sign of this pass in the finite difference.
        anchor: an empty tensor that requires grad. It makes the result differentiable where nothing
            below it is, and takes no gradient. Made here unless given; `torch.compile` needs it
            given.
        backend: one of `BACKENDS`.

    Returns:
        Hidden states that require grad if `buffer` is given, also where every parameter is frozen.
    """
    if buffer is None:
        return hidden if offset is None else _probe_add(hidden, offset, backend)
    if anchor is None:
        anchor = torch.empty(0, requires_grad=True)
    return _ProbeInject.apply(hidden, anchor, offset, buffer, sign, backend)
