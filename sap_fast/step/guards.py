"""What is put back whatever happens: weights, gradients, `requires_grad`.

The state of the random number generators is put back by `sap_fast.random_state`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sap_fast import ops
from sap_fast.distributed import add_over_ranks_, by_shard_group, local_shards
from sap_fast.ops.reference import accumulation_dtype


class Perturbation:
    """W + ΔW in the place of W, for as long as the context lasts.

    An operation that fails half-way through the list has counted up the versions of what it wrote,
    and of nothing else: by them W is put back.

    Args:
        params: parameters W.
        buffers: the direction, one tensor per parameter and of its dtype; they hold W meanwhile,
            and the direction again afterwards, to rounding (`ops.restore_swap_`).
        scale: ρ‖W‖/‖direction‖, 0-d; zero perturbs nothing.
        backend: whose operations to use, see `sap_fast.ops`.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        buffers: Sequence[Tensor],
        scale: Tensor,
        *,
        backend: str = "auto",
    ) -> None:
        self._params, self._buffers, self._scale = params, buffers, scale
        #: What is written, and so has a version.
        self._written = local_shards(params)
        self._kept = local_shards(buffers)
        self._backend = backend
        self._reflected = False

    @torch.no_grad()
    def __enter__(self) -> Perturbation:
        before = [parameter._version for parameter in self._written]
        try:
            ops.perturb_swap_(self._params, self._buffers, self._scale, backend=self._backend)
        except BaseException:
            # A parameter that was written has its old value in its buffer; no other one has.
            for parameter, buffer, version in zip(self._written, self._kept, before, strict=True):
                if parameter._version != version:
                    parameter.copy_(buffer)
            raise
        return self

    @torch.no_grad()
    def reflect(self) -> None:
        """Go from W + ΔW to W − ΔW."""
        self._reflected = True
        ops.reflect_(self._params, self._buffers, backend=self._backend)

    @torch.no_grad()
    def of_both_signs(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return W + ΔW and W − ΔW, (2, …), of parameters; W twice of one that is not perturbed.

        The bits that `reflect` gives. To be called before it.
        """
        kept = {id(p): b for p, b in zip(self._params, self._kept, strict=True)}
        both = [parameter.new_empty((2, *parameter.shape)) for parameter in params]
        for half in range(2):
            torch._foreach_copy_([pair[half] for pair in both], list(params))
        perturbed = [place for place, p in enumerate(params) if id(p) in kept]
        ops.reflect_(
            [both[place][1] for place in perturbed],
            [kept[id(params[place])] for place in perturbed],
            backend=self._backend,
        )
        return both

    @torch.no_grad()
    def applied_norm(self, dtype: torch.dtype | None) -> Tensor:
        """Return the norm of the perturbation that is left once weights are rounded to `dtype`.

        None stands for the dtype that each is stored in.
        """
        wide = accumulation_dtype(self._params[0].dtype)

        def rounded(weight: Tensor) -> Tensor:
            return weight.to(dtype or weight.dtype).to(wide)

        squares = [
            ops.sum_squares([rounded(p) - rounded(b)], backend=self._backend)
            for p, b in zip(self._written, self._kept, strict=True)
        ]
        sums = [
            add_over_ranks_(torch.stack([s.to(part[0].device) for s in part]).sum(), group)
            for group, (_, part) in by_shard_group([self._params, squares])
        ]
        return torch.stack([total.to(sums[0].device) for total in sums]).sum().sqrt()

    @torch.no_grad()
    def __exit__(self, *exception: object) -> None:
        before = [parameter._version for parameter in self._written]
        try:
            inverse = torch.where(self._scale == 0, 0.0, 1 / self._scale)
            ops.restore_swap_(
                self._params,
                self._buffers,
                -inverse if self._reflected else inverse,
                backend=self._backend,
            )
        except BaseException:
            # A parameter that was written is back at W; its buffer may not hold W any more.
            for parameter, buffer, version in zip(self._written, self._kept, before, strict=True):
                if parameter._version == version:
                    parameter.copy_(buffer)
            raise


@contextmanager
def gradients_set_aside(params: Sequence[Tensor]) -> Iterator[None]:
    """Give every parameter an empty `.grad`; put the old ones back at the end, whatever happens."""
    saved = [parameter.grad for parameter in params]
    try:
        for parameter in params:
            parameter.grad = None
        yield
    finally:
        for parameter, gradient in zip(params, saved, strict=True):
            parameter.grad = gradient


@contextmanager
def gradients_restored_on_error(params: Sequence[Tensor]) -> Iterator[Callable[[], None]]:
    """Put gradients back if the body fails; binds the function that does, for the body to call.

    Costs a copy of the gradients that exist on entry: none, if they were cleared before the step;
    one parameter-sized buffer from the second micro-batch of an accumulated step on.
    """
    saved = [(p, p.grad, None if p.grad is None else p.grad.clone()) for p in params]

    @torch.no_grad()
    def put_back() -> None:
        for parameter, gradient, copy in saved:
            if gradient is not None and copy is not None:
                gradient.copy_(copy)
            parameter.grad = gradient

    try:
        yield put_back
    except BaseException:
        put_back()
        raise


@contextmanager
def frozen(params: Sequence[Tensor]) -> Iterator[None]:
    """Turn `requires_grad` off, and back on for those that had it."""
    trainable = [parameter for parameter in params if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def refuse_sparse(parameter: Tensor) -> None:
    """Raise if a parameter has a sparse gradient.

    Raises:
        RuntimeError: naming the parameter's shape and the cure.
    """
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise RuntimeError(
            f"sparse gradient in a parameter of shape {tuple(parameter.shape)}; expected a "
            "dense one: build the embedding with sparse=False"
        )


@torch.no_grad()
def report_overflow(parameters: Sequence[nn.Parameter], finite: Tensor) -> None:
    """Make a gradient NaN unless the 0-d bool holds.

    An inner pass may overflow where the task pass does not. Gradients are all that a
    `torch.amp.GradScaler` looks at, so this is how it hears of that: it skips the step, whose
    gradients are of no use, and lowers the scale.
    """
    gradients = local_shards([p.grad for p in parameters if p.grad is not None])
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if gradients:
        smallest = min(gradients, key=Tensor.numel)
        smallest.add_(torch.where(finite, 0.0, torch.nan).to(smallest))
