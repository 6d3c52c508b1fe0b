"""Schema and fake implementation of every operation, once for all backends.

Each backend's implementation is an overload of one operator: `sap_fast::perturb_swap_.native` has
the schema and the fake of `sap_fast::perturb_swap_.reference`. Symbols are those of `reference`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sap_fast.ops import reference

#: Backends in the order in which `backend="auto"` prefers them.
IMPLEMENTATIONS = ("native", "triton", "reference")

#: Arguments and results; `(a!)` marks what is written.
SCHEMAS = {
    "sum_squares": "(Tensor[] tensors) -> Tensor",
    "dot": "(Tensor[] left, Tensor[] right) -> Tensor",
    "perturb_swap_": "(Tensor(a!)[] params, Tensor(b!)[] buffers, Tensor scale) -> ()",
    "reflect_": "(Tensor(a!)[] params, Tensor[] buffers) -> ()",
    "restore_swap_": ("(Tensor(a!)[] params, Tensor(b!)[] buffers, Tensor inverse_scale) -> ()"),
    "probe_add": "(Tensor hidden, Tensor offset) -> Tensor",
    "probe_project_": "(Tensor(a!) buffer, Tensor gradient, float sign) -> ()",
    "probe_rule_": (
        "(Tensor(a!)[] buffers, str rule, float probe_size, Tensor perturbation_norm, "
        "Tensor[] radii) -> Tensor"
    ),
    "adamw_blend_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] steps, Tensor?[] directions, *, Tensor lr, float beta1, float beta2, "
        "float eps, float weight_decay, bool maximize, Tensor? blend, "
        "Tensor? gradient_scale) -> ()"
    ),
}


def digest() -> str:
    """Return what tells these schemas from other ones; setup.py finds the same without torch."""
    return hashlib.sha256(repr(SCHEMAS).encode()).hexdigest()[:16]


def _scalar_like(tensor: Tensor) -> Tensor:
    return tensor.new_empty((), dtype=reference.accumulation_dtype(tensor.dtype))


#: What each operation returns, from shapes and dtypes alone.
FAKES: dict[str, Callable[..., Any]] = {
    "sum_squares": lambda tensors: _scalar_like(tensors[0]),
    "dot": lambda left, right: _scalar_like(left[0]),
    "probe_add": lambda hidden, offset: torch.empty_like(hidden),
    "probe_rule_": lambda buffers, *_: buffers[0].new_empty((), dtype=torch.bool),
}


def _probe_add_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
    shape = ctx.offset_shape
    return gradient, None if shape is None else gradient.float().sum_to_size(shape)


def _probe_add_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    # V is no parameter: its own gradient is taken by probe_project_. Whoever asks for it gets it.
    ctx.offset_shape = inputs[1].shape if inputs[1].requires_grad else None


def _nothing(*arguments: Any, **options: Any) -> None:
    """Return what an operation that only writes returns."""


# Kept for the life of the process: an operator ends with the library that defined it.
library = torch.library.Library("sap_fast", "DEF")

for _name, _schema in SCHEMAS.items():
    for _backend in IMPLEMENTATIONS:
        library.define(f"{_name}.{_backend}{_schema}")
        torch.library.register_fake(
            f"sap_fast::{_name}.{_backend}", FAKES.get(_name, _nothing), lib=library
        )
        if _name == "probe_add":
            torch.library.register_autograd(
                f"sap_fast::{_name}.{_backend}",
                _probe_add_backward,
                setup_context=_probe_add_setup,
                lib=library,
            )
    library.impl(f"{_name}.reference", getattr(reference, _name), "CompositeExplicitAutograd")


def overload(name: str, backend: str) -> torch._ops.OpOverload:
    """Return the operator that runs operation `name` on `backend`."""
    return getattr(getattr(torch.ops.sap_fast, name), backend)


#: Positions of what each operation writes: lists of tensors, or one tensor.
WRITTEN = {
    name: tuple(
        position
        for position, argument in enumerate(overload(name, "reference")._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    for name in SCHEMAS
}
