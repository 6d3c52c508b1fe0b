"""Every operation on every backend, against the reference and against fp64.

The same tests run for the native kernels of each instruction set, for Triton's interpreter (in a
process of its own, which triton/test_triton.py starts), and on GPUs.
"""

from __future__ import annotations

import functools
import logging
import math
import platform
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from sap_fast import ops
from sap_fast.ops import native, reference
from sap_fast.ops.schema import IMPLEMENTATIONS, SCHEMAS, overload
from tests.ops.tensors import (
    DTYPES,
    INTERPRETED,
    SIZES,
    assert_same_bits,
    clones,
    like,
    mixed,
    random_tensor,
)


class Target(NamedTuple):
    """A backend, where it runs, and for the CPU on which instruction set."""

    backend: str
    device: str
    capability: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in self if part)


def targets() -> list[Any]:
    if INTERPRETED:
        return [pytest.param(Target("triton", "cpu"), id="triton-interpreted")]
    listed = [Target("native", "cpu", isa) for isa in ("baseline", "avx2", "avx512")]
    gpu = [Target("native", "cuda"), Target("triton", "cuda")]
    return [
        *(pytest.param(target, id=str(target)) for target in listed),
        *(pytest.param(target, id=str(target), marks=pytest.mark.gpu) for target in gpu),
    ]


@pytest.fixture(params=targets())
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Target]:
    wanted: Target = request.param
    if wanted.device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: none here")
    reason = ops.why_not(wanted.backend, wanted.device)
    if reason is not None:
        pytest.skip(reason)
    if wanted.capability:
        monkeypatch.setenv("SAP_FAST_CPU_CAPABILITY", wanted.capability)
        try:
            native.extension.cpu_capability()
        except ValueError as error:
            pytest.skip(str(error))
    # Fresh memory is NaN: an element that is not written shows.
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device(wanted.device):
            yield wanted
    finally:
        torch.use_deterministic_algorithms(False)


def poison(tensors: list[Tensor]) -> None:
    """Put NaN and infinities at the ends and in the middle of the larger tensors."""
    for tensor in tensors:
        if tensor.is_contiguous() and tensor.numel() > 3:
            flat = tensor.view(-1)
            flat[0], flat[tensor.numel() // 2], flat[-1] = math.nan, math.inf, -math.inf


def assert_no_worse(found: Tensor, reference_value: Tensor, exact: Tensor, ulps: float = 2) -> None:
    """|found − exact| ≤ |reference − exact| + a few units in the last place of what is stored."""
    unit = torch.finfo(found.dtype).eps * exact.abs() + torch.finfo(found.dtype).tiny
    error = (found.double() - exact).abs()
    allowed = (reference_value.double() - exact).abs() + ulps * unit
    worse = ~(error <= allowed)
    assert not worse.any(), (found[worse][:4], reference_value[worse][:4], exact[worse][:4])


def assert_within(
    found: Tensor, reference_value: Tensor, exact: Tensor, slack: float | Tensor
) -> None:
    """|found − exact| ≤ |reference − exact| + slack."""
    error = (found.double() - exact).abs()
    allowed = (reference_value.double() - exact).abs() + slack
    assert (error <= allowed).all(), (error - allowed).max()


def slowly(*values: Any, when: bool = INTERPRETED, **options: Any) -> Any:
    """Parameters that others nearly repeat: slow where the interpreter takes its time."""
    return pytest.param(*values, marks=[pytest.mark.slow] if when else [], **options)


#: A list of each dtype, and one of all dtypes.
LISTS = {"float32": DTYPES[0], "bfloat16": DTYPES[1], "float16": DTYPES[2], "mixed": None}


def of_every_dtype(test: Callable[..., None]) -> Callable[..., None]:
    """Run with every one of LISTS."""
    return pytest.mark.parametrize("dtype", LISTS.values(), ids=LISTS)(test)


def of_every_dtype_and(name: str, values: list[Any], repeated: list[Any]) -> Any:
    """Run with every one of LISTS and every value; `repeated` values slowly but for mixed lists."""
    return pytest.mark.parametrize(
        ("dtype", name),
        [
            slowly(dtype, value, when=INTERPRETED and slow, id=f"{label}-{value}")
            for label, dtype in LISTS.items()
            for value in values
            for slow in [dtype is not None and str(value) in map(str, repeated)]
        ],
    )


# ---- the perturbation ----


@of_every_dtype_and("scale", [0.3, -2e-3, 0.0, -0.0], repeated=[-2e-3, -0.0])
@pytest.mark.parametrize("poisoned", [False, True], ids=["finite", "poisoned"])
def test_swaps_have_the_bits_of_the_reference(
    target: Target, dtype: torch.dtype | None, scale: float, poisoned: bool
) -> None:
    torch.manual_seed(0)
    params = mixed(dtype)
    buffers = like(params, 1e-2)
    if poisoned:
        poison(buffers)
        poison(params[::2])
    theirs, ours = (clones(params), clones(buffers)), (clones(params), clones(buffers))
    factor = torch.tensor(scale)
    inverse = torch.tensor(-1 / scale if scale else scale, dtype=torch.float64)
    for name, *arguments in (["perturb_swap_", factor], ["reflect_"], ["restore_swap_", inverse]):
        getattr(ops, name)(*theirs, *arguments, backend="reference")
        getattr(ops, name)(*ours, *arguments, backend=target.backend)
        assert_same_bits(ours[0], theirs[0])
        assert_same_bits(ours[1], theirs[1])
    assert_same_bits(ours[0], params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_swaps_of_subnormal_and_largest_numbers_have_the_bits_of_the_reference(
    target: Target, dtype: torch.dtype
) -> None:
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    signed = [1.0, smallest, smallest / 4, largest, math.inf]
    odd = torch.tensor([0.0, -0.0, math.nan, *signed, *(-x for x in signed)], dtype=torch.float64)
    pairs = torch.cartesian_prod(odd, odd).to(dtype)
    for name, *arguments in (
        ["perturb_swap_", torch.tensor(0.37)],
        ["reflect_"],
        ["restore_swap_", torch.tensor(1 / 0.37, dtype=torch.float64)],
    ):
        theirs, ours = ([[part.clone()] for part in pairs.unbind(1)] for _ in range(2))
        getattr(ops, name)(*theirs, *arguments, backend="reference")
        getattr(ops, name)(*ours, *arguments, backend=target.backend)
        for left, right in zip(ours, theirs, strict=True):
            assert_same_bits(left, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_single_tensor_of_any_size(target: Target, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    # The neighbours in memory must stay as they are.
    memory = [random_tensor(size + 2, dtype) for _ in range(2)]
    theirs, ours = clones(memory), clones(memory)

    def inside(tensors: list[Tensor]) -> list[list[Tensor]]:
        return [[tensor[1 : 1 + size]] for tensor in tensors]

    factor = torch.tensor(0.25)
    ops.perturb_swap_(*inside(theirs), factor, backend="reference")
    ops.perturb_swap_(*inside(ours), factor, backend=target.backend)
    assert_same_bits(ours, theirs)
    found = ops.sum_squares(inside(ours)[0], backend=target.backend)
    exact = inside(ours)[0][0].double().square().sum()
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0.0)


# ---- storage ----


def every_value(dtype: torch.dtype) -> Tensor:
    """All 65,536 bit patterns of a 16-bit dtype, NaNs of every payload among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_bit_pattern_comes_back(target: Target, dtype: torch.dtype) -> None:
    params, buffers = [every_value(dtype)], [torch.ones(2**16, dtype=dtype)]
    scale = torch.tensor(0.5)
    ops.perturb_swap_(params, buffers, scale, backend=target.backend)
    assert torch.equal(buffers[0].view(torch.int16), every_value(dtype).view(torch.int16))
    ops.restore_swap_(params, buffers, 1 / scale, backend=target.backend)
    assert torch.equal(params[0].view(torch.int16), every_value(dtype).view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("operation", ["adamw_blend_", slowly("probe_project_")])
def test_every_value_is_widened_exactly(target: Target, operation: str, dtype: torch.dtype) -> None:
    values, found = every_value(dtype), torch.zeros(2**16)
    if operation == "adamw_blend_":
        # With β₁ = 0 the first moment is the gradient.
        state = ([values.clone()], [values], [found], [found.clone()], [torch.tensor(0.0)])
        ops.adamw_blend_(*state, **ADAMW | {"beta1": 0.0}, backend=target.backend)
    else:
        ops.call("probe_project_", target.backend, found, values, 1.0)
    assert torch.equal(found.nan_to_num(7.0, 8.0, 9.0), values.float().nan_to_num(7.0, 8.0, 9.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp32_is_rounded_as_pytorch_rounds(target: Target, dtype: torch.dtype) -> None:
    values = every_value(dtype).float()
    # Every value that can be stored, the middle to the next one, and the neighbours of both.
    middle = (values + values.roll(1)) / 2
    exact = torch.cat([values, middle])
    exact = torch.cat([exact.nextafter(torch.tensor(way)) for way in (-math.inf, math.inf)])
    exact = torch.cat([exact, values, middle])
    zeros = torch.zeros(len(exact), dtype=dtype)
    found = ops.call("probe_add", target.backend, zeros, exact)
    assert_same_bits([found], [(exact + 0.0).to(dtype)])


# ---- reductions ----


@of_every_dtype
def test_reductions_are_no_worse_than_the_reference(
    target: Target, dtype: torch.dtype | None
) -> None:
    torch.manual_seed(1)
    # Triton's partial sums are of 32768 elements.
    left = [*mixed(dtype), random_tensor(70_001, dtype or torch.bfloat16)]
    right = like(left)
    exact = torch.stack([t.double().square().sum() for t in left]).sum()
    found = ops.sum_squares(left, backend=target.backend)
    assert found.dtype == torch.float32 and found.shape == () and found.device == left[0].device
    assert_no_worse(found, reference.sum_squares(left), exact)
    products = [a.double() * b.double() for a, b in zip(left, right, strict=True)]
    exact = torch.stack([p.sum() for p in products]).sum()
    # Products of both signs cancel: what is lost is relative to their sizes.
    size = torch.stack([p.abs().sum() for p in products]).sum()
    found = ops.dot(left, right, backend=target.backend)
    allowed = (reference.dot(left, right).double() - exact).abs() + 2**-24 * size
    assert (found.double() - exact).abs() <= allowed


def test_reductions_of_nothing_and_of_what_is_not_finite(target: Target) -> None:
    assert ops.sum_squares([torch.empty(0), torch.empty(3, 0)], backend=target.backend) == 0
    for value in (math.nan, math.inf, -math.inf):
        tensors = [torch.ones(70), torch.ones(20_000)]
        tensors[1][19_999] = value
        found = ops.sum_squares(tensors, backend=target.backend)
        assert found.isnan() if math.isnan(value) else found == math.inf
        assert ops.dot(tensors, clones(tensors), backend=target.backend).isfinite().logical_not()


def test_reductions_add_up_in_fp32(target: Target) -> None:
    for dtype in DTYPES:
        ones = [torch.ones(100_000, dtype=dtype), torch.ones(70_001, dtype=dtype)]
        assert ops.sum_squares(ones, backend=target.backend) == 170_001
        assert ops.dot(ones, clones(ones), backend=target.backend) == 170_001


def test_reductions_do_not_depend_on_threads_or_addresses(target: Target) -> None:
    torch.manual_seed(2)
    tensors = [random_tensor(size, torch.float32) for size in [100_003, *SIZES, 70_000]]
    buffer_sums = []
    threads = torch.get_num_threads()
    gradient = random_tensor((500, 200), torch.bfloat16)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            buffer = torch.zeros(200)
            ops.call("probe_project_", target.backend, buffer, gradient, 1.0)
            found = ops.sum_squares(clones(tensors), backend=target.backend)
            buffer_sums.append(torch.cat([found.reshape(1), buffer]))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(buffer_sums[1:], buffer_sums[:1] * 3)


# ---- AdamW ----

ADAMW: dict[str, Any] = {"lr": 3e-3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1}


class AdamWState(NamedTuple):
    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]

    def copy(self) -> AdamWState:
        return AdamWState(*(clones(tensors) for tensors in self))

    def double(self) -> AdamWState:
        return AdamWState(*([tensor.double() for tensor in tensors] for tensors in self))


def adamw_state(params: list[Tensor]) -> AdamWState:
    """As it is in the middle of a run; the first parameter has had no update yet."""
    moments = like(params, 1e-1, torch.float32)
    squares = [0.5 * t.square() for t in like(params, 1e-1, torch.float32)]
    steps = [torch.tensor(float(index % 4)) for index in range(len(params))]
    return AdamWState(params, like(params, 0.1), moments, squares, steps)


@of_every_dtype_and("options", ["plain", "maximize", "blended", "all"], ["maximize", "blended"])
def test_adamw_is_no_worse_than_the_reference(
    target: Target, dtype: torch.dtype | None, options: str
) -> None:
    torch.manual_seed(4)
    start = adamw_state(mixed(dtype))
    directions: list[Tensor | None] = []
    extra: dict[str, Any] = {}
    if options in ("maximize", "all"):
        extra["maximize"] = True
    if options in ("blended", "all"):
        extra["blend"] = torch.tensor(0.3)
        # Every third parameter has no direction.
        made = like(start.params)
        directions = [d if index % 3 else None for index, d in enumerate(made)]
    if options == "all":
        extra |= {"gradient_scale": torch.tensor(0.7), "lr": torch.tensor(3e-3)}
    ours, theirs, exact = start.copy(), start.copy(), start.double()
    wide = [None if d is None else d.double() for d in directions]
    settings_ = ADAMW | extra
    for _ in range(3):
        # Each step from the reference's state, so that errors do not add up.
        ours, exact = theirs.copy(), theirs.double()
        ops.adamw_blend_(*ours, directions, **settings_, backend=target.backend)
        ops.adamw_blend_(*theirs, directions, **settings_, backend="reference")
        ops.adamw_blend_(*exact, wide, **settings_, backend="reference")
        assert_same_bits(ours.grads, start.grads)
        assert_same_bits(ours.steps, theirs.steps)
        for index, parameter in enumerate(ours.params):
            # Differences cancel: units are those of what goes in, and all of that is below 4.
            unit = 8 * torch.finfo(torch.float32).eps
            if parameter.dtype != torch.float32:
                # An error of fp32 may round to the next value that can be stored.
                unit = unit + torch.finfo(parameter.dtype).eps * exact.params[index].abs()
            assert_within(parameter, theirs.params[index], exact.params[index], unit)
            for found, spec, wanted in zip(ours[2:4], theirs[2:4], exact[2:4], strict=True):
                assert_within(found[index], spec[index], wanted[index], 2**-22)


def on_x86() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


def test_adamw_has_the_bits_of_torch_fused(target: Target) -> None:
    # Both round product and sum at once where the instructions of the CPU do.
    torch_fuses = not on_x86() or torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    fuses = not on_x86() or target.capability != "baseline"
    if fuses != torch_fuses or target.device != "cpu":
        pytest.skip(f"PyTorch's own kernels {'fuse' if torch_fuses else 'do not fuse'} here")
    torch.manual_seed(5)
    # Multiples of a register: PyTorch's loop over what is left rounds once less.
    sizes = (16, 64, 4096, 16 if INTERPRETED else 100_000)
    params = [random_tensor(size, torch.float32) for size in sizes]
    theirs = [torch.nn.Parameter(p.clone()) for p in params]
    optimizer = torch.optim.AdamW(
        theirs, lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1, fused=True
    )
    state = AdamWState(
        params,
        [],
        [torch.zeros_like(p) for p in params],
        [torch.zeros_like(p) for p in params],
        [torch.tensor(0.0) for _ in params],
    )
    for _ in range(10):
        grads = like(params)
        ops.adamw_blend_(*state._replace(grads=grads), **ADAMW, backend=target.backend)
        for parameter, gradient in zip(theirs, grads, strict=True):
            parameter.grad = gradient
        optimizer.step()
        assert_same_bits(params, [p.detach() for p in theirs])


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("coefficient", [0.3, -0.7, slowly(-250.0), 0.0, slowly(-0.0)])
def test_the_blended_gradient_is_g_plus_c_d_for_any_c(
    target: Target, coefficient: float, maximize: bool
) -> None:
    # Rules give negative coefficients too; `maximize` turns g alone: −g + c·d.
    torch.manual_seed(7)
    start = adamw_state(mixed(torch.float32))
    directions = like(start.params)
    blended = [
        (-g if maximize else g) + coefficient * d
        for g, d in zip(start.grads, directions, strict=True)
    ]
    for backend in (target.backend, "reference"):
        ours, wanted = start.copy(), start.copy()._replace(grads=blended)
        options = ADAMW | {"maximize": maximize, "blend": torch.tensor(coefficient)}
        ops.adamw_blend_(*ours, directions, **options, backend=backend)
        ops.adamw_blend_(*wanted, **ADAMW, backend=backend)
        for left, right in zip(ours._replace(grads=blended), wanted, strict=True):
            assert_same_bits(left, right)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("coefficient", [0.0, slowly(-0.0)])
def test_a_blend_of_zero_ignores_a_direction_of_nan(
    target: Target, coefficient: float, maximize: bool
) -> None:
    torch.manual_seed(6)
    ours = adamw_state(mixed(None))
    plain = ours.copy()
    nan = [torch.full_like(p, math.nan) for p in ours.params]
    options = ADAMW | {"maximize": maximize}
    blend = torch.tensor(coefficient)
    ops.adamw_blend_(*ours, nan, **options, blend=blend, backend=target.backend)
    ops.adamw_blend_(*plain, **options, backend=target.backend)
    for left, right in zip(ours, plain, strict=True):
        assert_same_bits(left, right)


def test_the_first_step_is_exact_where_a_beta_is_near_one(target: Target) -> None:
    # 1 − β₂ᵗ found in fp32 would be off by 1e-4 of itself here; by 5e-5 of the step.
    gradient = torch.randn(9)
    state = AdamWState([torch.zeros(9)], [gradient], [torch.zeros(9)], [torch.zeros(9)], [])
    options = ADAMW | {"beta2": 0.9999999, "weight_decay": 0.0, "eps": 0.0}
    ops.adamw_blend_(*state._replace(steps=[torch.tensor(0.0)]), **options, backend=target.backend)
    torch.testing.assert_close(state.params[0], -3e-3 * gradient.sign(), rtol=1e-6, atol=0.0)


def test_a_gradient_that_is_not_finite_shows_where_it_is_and_nowhere_else(target: Target) -> None:
    state = adamw_state([torch.randn(257), torch.randn(257)])
    state.grads[1][100] = math.nan
    ops.adamw_blend_(*state, **ADAMW, backend=target.backend)
    assert torch.stack(state.params).isnan().nonzero().tolist() == [[1, 100]]


# ---- the probe ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(2, 5, 1), (2, 5, 7), (2, 5, 64), (2, 5, 577), (48,), (0, 4, 16), (2, 0)], ids=str
)
def test_probe_add_has_the_bits_of_the_reference(
    target: Target, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(8)
    hidden = random_tensor(shape, dtype)
    views = [hidden, random_tensor(hidden.numel() + 1, dtype)[1:].view(shape)]
    if len(shape) > 1:
        views.append(random_tensor((shape[1], shape[0], *shape[2:]), dtype).transpose(0, 1))
        views.append(random_tensor((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2])
    offset = random_tensor(shape[-1:], torch.float32)
    for view in views:
        found = ops.call("probe_add", target.backend, view, offset)
        assert_same_bits([found], [reference.probe_add(view, offset)])
        assert found.stride() == torch.empty_like(view).stride()


def test_probe_inject_collects_on_the_way_back(target: Target) -> None:
    hidden, upstream = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)
    buffer = torch.zeros(8)
    out = ops.probe_inject(hidden, torch.randn(8), buffer, -1.0, backend=target.backend)
    out.backward(upstream)
    assert torch.equal(hidden.grad, upstream)
    torch.testing.assert_close(buffer, -upstream.sum((0, 1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000])
def test_a_nan_of_any_payload_is_stored_as_nan(
    target: Target, dtype: torch.dtype, bits: int
) -> None:
    # Rounding up would carry into the sign and leave −0.
    nan = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
    hidden = torch.ones(3, 1, dtype=dtype)
    assert ops.call("probe_add", target.backend, hidden, nan).isnan().all()


def test_probe_add_passes_the_gradient_on(target: Target) -> None:
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    offset = torch.randn(8, requires_grad=True)
    ops.probe_inject(hidden, offset, backend=target.backend).backward(torch.full((2, 3, 8), 2.0))
    assert torch.equal(hidden.grad, torch.full((2, 3, 8), 2.0))
    assert torch.equal(offset.grad, torch.full((8,), 12.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 127, 128, 1000])
@pytest.mark.parametrize("width", [0, 1, 65, 128, 576])
def test_probe_project_is_no_worse_than_the_reference(
    target: Target, dtype: torch.dtype, rows: int, width: int
) -> None:
    torch.manual_seed(9)
    gradient = random_tensor((rows, width), dtype)
    start = random_tensor(width, torch.float32)
    ours, theirs = start.clone(), start.clone()
    ops.call("probe_project_", target.backend, ours, gradient, -1.0)
    reference.probe_project_(theirs, gradient, -1.0)
    exact = start.double() - gradient.double().sum(0)
    size = start.abs().double() + gradient.double().abs().sum(0)
    error = (ours.double() - exact).abs()
    assert (error <= (theirs.double() - exact).abs() + 2**-23 * size).all()


@pytest.mark.parametrize("tokens", [20_000, slowly(200_000)])
def test_probe_project_does_not_lose_precision_with_the_number_of_tokens(
    target: Target, tokens: int
) -> None:
    gradient = torch.full((tokens, 1), 0.1)
    buffer = torch.zeros(1)
    ops.call("probe_project_", target.backend, buffer, gradient, 1.0)
    assert abs(buffer.item() / (tokens * gradient[0].double().item()) - 1) < 2e-6


def test_probe_project_of_views_and_of_a_single_token(target: Target) -> None:
    torch.manual_seed(10)
    run = functools.partial(ops.call, "probe_project_", target.backend)
    gradient = random_tensor((4, 3, 2), torch.float32)
    views = [gradient.transpose(0, 1), gradient[..., :1], torch.ones(()).expand(3, 5)]
    for view in (*views, gradient[0, 0]):
        ours, theirs = torch.zeros(view.shape[-1]), torch.zeros(view.shape[-1])
        run(ours, view, 1.0)
        reference.probe_project_(theirs, view, 1.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


RULES = ["gradient", "normalized", "adam"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1e-35, 1e-3, 2e37])
def test_probe_rules_are_no_worse_than_the_reference(
    target: Target, rule: str, size: float
) -> None:
    torch.manual_seed(11)
    h = [size * torch.randn(n) for n in (1, 7, 576, 20_000)] + [torch.zeros(9), torch.empty(0)]
    # Chunks of one layer may differ by more than the range of a square.
    h[3][16_384:] *= 1e-30
    # ρ‖W‖ for which the gradient rule stays in range.
    norm = torch.tensor(0.01 / size if size > 1 else 2.0)
    radii = [torch.tensor(2.0 + index) for index in range(len(h))]
    ours, theirs, exact = clones(h), clones(h), [t.double() for t in h]
    for tensors, backend in ((ours, target.backend), (theirs, "reference"), (exact, "reference")):
        finite = ops.probe_rule_(
            tensors, rule, 0.5, perturbation_norm=norm, radii=radii, backend=backend
        )
        assert finite.dtype == torch.bool and finite.shape == () and finite
    for found, spec, wanted in zip(ours, theirs, exact, strict=True):
        assert_no_worse(found, spec, wanted, ulps=4)
    if rule != "normalized":
        assert_same_bits(ours, theirs)


def test_a_probe_is_normalized_by_the_largest_element_wherever_it_is(target: Target) -> None:
    h = torch.full((20_000,), 1e-30)
    # The square overflows; so does what is divided by an element of another chunk.
    h[-1] = 1e20
    one = torch.tensor(1.0)
    ops.probe_rule_(
        [h], "normalized", 0.1, perturbation_norm=one, radii=[one], backend=target.backend
    )
    assert h[-1].item() == pytest.approx(0.1, rel=1e-6) and not h[:-1].any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_h_that_is_not_finite_switches_every_probe_off(
    target: Target, rule: str, value: float
) -> None:

    def run(h: list[Tensor], radii: list[Tensor]) -> Tensor:
        norm = torch.tensor(1.0)
        return ops.probe_rule_(
            h, rule, 0.5, perturbation_norm=norm, radii=radii, backend=target.backend
        )

    h = [torch.ones(3), torch.ones(20_000)]
    h[1][19_999] = value
    assert not run(h, [torch.tensor(1.0)] * 2)
    assert_same_bits(h, [torch.zeros(3), torch.zeros(20_000)])
    h = [torch.ones(3), torch.ones(4)]
    assert not run(h, [torch.tensor(1.0), torch.tensor(value)])
    assert_same_bits(h, [torch.zeros(3), torch.zeros(4)])


# ---- what is refused ----


def swap(target: Target, params: list[Tensor], buffers: list[Tensor]) -> None:
    ops.perturb_swap_(params, buffers, torch.tensor(0.1), backend=target.backend)


def test_unsupported_tensors_are_named_and_nothing_is_written(target: Target) -> None:
    def good() -> Tensor:
        return torch.ones(5)

    gaps = [torch.ones(5, 4)[:, ::2] for _ in range(2)]
    cases = [
        (r"params\[1\].*float64", [good(), good().double()], [good(), good().double()]),
        (r"params\[1\].*int64", [good(), good().long()], [good(), good().long()]),
        (r"buffers\[1\].*bfloat16", [good(), good()], [good(), good().bfloat16()]),
        (r"params\[1\].*strides", [good(), gaps[0]], [good(), gaps[1]]),
        (
            r"buffers\[1\].*strides",
            [good(), torch.ones(5, 4)],
            [good(), torch.ones(4, 5).t()],
        ),
    ]
    for message, params, buffers in cases:
        before = clones(params + buffers)
        versions = [tensor._version for tensor in params + buffers]
        with pytest.raises(NotImplementedError, match=message):
            swap(target, params, buffers)
        assert_same_bits(params + buffers, before)
        assert versions == [tensor._version for tensor in params + buffers]


def test_unsupported_state_is_named_and_nothing_is_written(target: Target) -> None:
    cases = [("exp_avgs", torch.bfloat16), ("exp_avg_sqs", torch.float16), ("steps", torch.float64)]
    for name, dtype in cases:
        state = adamw_state([torch.ones(3).bfloat16(), torch.ones(4).bfloat16()])
        getattr(state, name)[1] = getattr(state, name)[1].to(dtype)
        before = state.copy()
        with pytest.raises(NotImplementedError, match=rf"{name}\[1\].*{dtype}"):
            ops.adamw_blend_(*state, **ADAMW, backend=target.backend)
        for left, right in zip(state, before, strict=True):
            assert_same_bits(left, right)
    with pytest.raises(NotImplementedError, match=r"buffer.*float64"):
        ops.call("probe_project_", target.backend, torch.ones(4).double(), torch.ones(2, 4), 1.0)
    with pytest.raises(NotImplementedError, match=r"gradient.*float64"):
        ops.call("probe_project_", target.backend, torch.ones(4), torch.ones(2, 4).double(), 1.0)
    with pytest.raises(NotImplementedError, match=r"hidden.*float64"):
        ops.call("probe_add", target.backend, torch.ones(2, 4).double(), torch.ones(4))


def test_nonsense_is_refused(target: Target) -> None:
    memory = torch.ones(20)
    error = (ValueError, RuntimeError)
    shared = r"(params|buffers)\[\d\] shares memory with (params|buffers)\[\d\]"
    cases = [
        ("params has 2 tensors, buffers has 1", [memory[:4], memory[4:8]], [memory[8:12]]),
        ("shape", [memory[:4]], [memory[8:13]]),
        ("shape", [memory[:4]], [memory[8:12].view(2, 2)]),
        (shared, [memory[:4], memory[:4]], [memory[8:12], memory[12:16]]),
        (shared, [memory[:4], memory[3:7]], [memory[8:12], memory[12:16]]),
        (shared, [memory[:4], memory[4:8]], [memory[8:12], memory[:4]]),
        (shared, [memory[:10], memory[4:8]], [torch.ones(10), torch.ones(4)]),
    ]
    for message, params, buffers in cases:
        with pytest.raises(error, match=message):
            swap(target, params, buffers)
    # Read and written, with what is only read in between; and a counter that counts for two.
    around = [[torch.ones(20), torch.ones(2), memory[10:12]], [memory, memory[2:4], torch.ones(2)]]
    with pytest.raises(error, match=r"params\[2\] shares memory with buffers\[0\]"):
        ops.reflect_(*around, backend=target.backend)
    state = adamw_state([torch.ones(3), torch.ones(4)])
    state.steps[1] = state.steps[0]
    with pytest.raises(error, match=r"steps\[\d\] shares memory with steps\[\d\]"):
        ops.adamw_blend_(*state, **ADAMW, backend=target.backend)
    assert torch.equal(memory, torch.ones(20))
    # Between two that are read, behind the end of the shorter.
    written = [torch.ones(16), torch.ones(2), memory[10:12]]
    with pytest.raises(error, match="memory"):
        ops.reflect_(written, [memory[:16], memory[2:4], torch.ones(2)], backend=target.backend)
    # What is only read may be given twice.
    assert ops.sum_squares([memory, memory], backend=target.backend) == 40
    ops.reflect_([torch.ones(4), torch.ones(4)], [memory[:4], memory[:4]], backend=target.backend)
    with pytest.raises(error, match="scale"):
        ops.perturb_swap_([memory[:4]], [memory[4:8]], torch.ones(2), backend=target.backend)
    with pytest.raises(error, match=r"rule='?cubic"):
        ops.probe_rule_(
            [torch.ones(3)],
            "cubic",
            0.5,
            perturbation_norm=torch.tensor(1.0),
            radii=[torch.tensor(1.0)],
            backend=target.backend,
        )


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 4), (1, 4), ()], ids=str)
def test_a_probe_of_another_shape_than_one_token_is_refused(
    target: Target, shape: tuple[int, ...]
) -> None:
    hidden, other = torch.ones(2, 4), torch.ones(shape)
    numbers = ", ".join(map(str, shape))
    one = torch.tensor(1.0)
    for backend in (target.backend, "reference"):
        refused = functools.partial(pytest.raises, (ValueError, RuntimeError))
        with refused(match=rf"offset has shape [\[(]{numbers},?[\])], hidden has [\[(]2, 4[\])]"):
            ops.call("probe_add", backend, hidden, other)
        with refused(match=rf"buffer has shape [\[(]{numbers},?[\])], gradient has [\[(]2, 4[\])]"):
            ops.call("probe_project_", backend, other, hidden, 1.0)
        if len(shape) != 1:
            h = [torch.ones(3), other]
            with refused(match=rf"buffers\[1\] has shape [\[(]{numbers},?[\])]; one dimension"):
                ops.call("probe_rule_", backend, h, "adam", 0.1, one, [one, one.clone()])
    assert (hidden == 1).all() and (other == 1).all()


def test_what_is_written_gets_a_new_version(target: Target) -> None:
    params, buffers = [torch.ones(3)], [torch.ones(3)]
    swap(target, params, buffers)
    assert params[0]._version == 1 and buffers[0]._version == 1
    ops.reflect_(params, buffers, backend=target.backend)
    assert params[0]._version == 2 and buffers[0]._version == 1
    state = adamw_state([torch.ones(3), torch.ones(4).bfloat16()])
    before = [[tensor._version for tensor in tensors] for tensors in state]
    ops.adamw_blend_(*state, **ADAMW, backend=target.backend)
    for name, tensors, old in zip(AdamWState._fields, state, before, strict=True):
        new = [tensor._version - version for tensor, version in zip(tensors, old, strict=True)]
        assert new == ([0, 0] if name == "grads" else [1, 1]), name
    buffer, gradient = torch.zeros(8), torch.ones(4, 8)
    ops.call("probe_project_", target.backend, buffer, gradient, 1.0)
    assert buffer._version == 1 and gradient._version == 0
    h, one = torch.ones(8), torch.tensor(1.0)
    ops.probe_rule_([h], "adam", 0.1, perturbation_norm=one, radii=[one], backend=target.backend)
    assert h._version == 1


def test_lists_on_several_devices_are_split_and_put_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # One device stands for two: every tensor is a group of its own.
    def split(*lists: list[Any]) -> list[list[list[Any]]]:
        return [[[item] for item in row] for row in zip(*lists, strict=True)]

    torch.manual_seed(12)
    made = [torch.randn(size) for size in (3, 40, 7)]
    scale = torch.tensor(0.5)

    def run() -> list[Tensor]:
        params, buffers = clones(made), clones(made)
        state = adamw_state(params)._replace(grads=clones(buffers))
        sums = [ops.sum_squares(params), ops.dot(params, [2 * buffer for buffer in buffers])]
        ops.perturb_swap_(params, buffers, scale)
        ops.reflect_(params, buffers)
        ops.restore_swap_(params, buffers, -1 / scale)
        ops.adamw_blend_(*state, buffers, blend=scale, **ADAMW)
        ops.adamw_blend_(*state, **ADAMW)
        radii = [torch.tensor(1.0), torch.tensor(math.inf), torch.tensor(1.0)]
        probes = clones(made)
        ops.probe_rule_(probes, "gradient", 0.5, perturbation_norm=scale, radii=radii)
        return [*sums, *params, *buffers, *state.steps, *probes]

    torch.manual_seed(13)
    together = run()
    operators = ops.overload

    def one_device_only(name: str, backend: str) -> Callable[..., Any]:
        def run(first: list[Tensor], *arguments: Any, **options: Any) -> Any:
            if len(first) > 1 and name != "probe_rule_":
                raise NotImplementedError("the second tensor is on another device")
            return operators(name, backend)(first, *arguments, **options)

        return run

    monkeypatch.setattr(ops, "overload", one_device_only)
    monkeypatch.setattr(ops, "_by_device", split)
    torch.manual_seed(13)
    apart = run()
    for left, right in zip(together, apart, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)


def test_each_device_gets_its_own_kernels_and_has_the_numbers_brought_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a model over two GPUs has it: norms, scales and coefficients lie on the first of them."""
    ran: list[tuple[str, str, int]] = []

    def one_device_only(name: str, backend: str, *arguments: Any, **options: Any) -> Any:
        tensors = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
        devices = {x.device for x in tensors if x.device.type != "cpu"}
        if len(devices) > 1:
            raise NotImplementedError("one CUDA device for all tensors is supported")
        (device,) = devices
        ran.append((name, backend, device.index))
        return torch.ones((), dtype=torch.bool if "rule" in name else None, device=device)

    monkeypatch.setattr(ops, "call", one_device_only)
    monkeypatch.setattr(ops, "choose_backend", lambda backend, device_type: "native")
    with FakeTensorMode():
        params, buffers = (
            [torch.ones(3, device=f"cuda:{index}") for index in (0, 1, 0)] for _ in range(2)
        )
        one = torch.ones((), device="cuda:0")
        assert ops.dot(params, buffers).device.index == 0
        ops.perturb_swap_(params, buffers, one)
        ops.restore_swap_(params, buffers, one)
        numbers = [torch.ones((), device=parameter.device) for parameter in params]
        state = [params, buffers, params, buffers, numbers]
        settings = ADAMW | {"lr": one, "blend": one, "gradient_scale": one}
        ops.adamw_blend_(*state, buffers, **settings)
        finite = ops.probe_rule_(buffers, "adam", 0.1, perturbation_norm=one, radii=numbers)
        assert finite.device.index == 0
        # What lies on the CPU every kernel reads.
        ops.perturb_swap_(params, buffers, torch.ones(()))
    names = ["dot", "perturb_swap_", "restore_swap_", "adamw_blend_", "probe_rule_"]
    wanted = [(name, "native", index) for name in [*names, "perturb_swap_"] for index in (0, 1)]
    assert ran == wanted


# ---- choosing ----


def test_auto_falls_back_to_the_reference_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ops.choose_backend("auto", "cpu") == "reference":
        pytest.skip("there is no other backend here")
    monkeypatch.setattr(ops, "_said", set())
    params, buffers = [torch.ones(3, dtype=torch.float64)], [torch.ones(3, dtype=torch.float64)]
    with caplog.at_level(logging.INFO, logger="sap_fast.ops"):
        for _ in range(3):
            ops.perturb_swap_(params, buffers, torch.tensor(0.5, dtype=torch.float64))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and "float64" in said[0] and "reference" in said[0]
    assert params[0][0] != 1


def test_the_environment_takes_the_place_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAP_FAST_BACKEND", "reference")
    assert ops.choose_backend("auto", "cpu") == "reference"
    monkeypatch.setenv("SAP_FAST_BACKEND", "")
    assert ops.why_not(ops.choose_backend("auto", "cpu"), "cpu") is None
    monkeypatch.setenv("SAP_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"SAP_FAST_BACKEND='fast'.*native, triton, reference"):
        ops.choose_backend("auto", "cpu")
    # An argument that names a backend goes before it.
    assert ops.choose_backend("reference", "cpu") == "reference"


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs Triton's kernels on the CPU")
def test_a_backend_that_cannot_run_raises_when_it_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run on cpu"):
        ops.choose_backend("triton", "cpu")


def test_lists_without_tensors() -> None:
    ops.perturb_swap_([], [], torch.tensor(1.0))
    ops.adamw_blend_([], [], [], [], [], **ADAMW)
    with pytest.raises(ValueError, match="no tensors"):
        ops.sum_squares([])


# ---- registration ----


def sample_arguments(name: str, device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Small valid arguments of an operation."""
    with torch.device(device):
        one = torch.tensor(0.5)
        pair = [[torch.randn(5), torch.randn(3, 2)] for _ in range(2)]
        if name == "sum_squares":
            return (pair[0],), {}
        if name in ("dot", "reflect_"):
            return (*pair,), {}
        if name in ("perturb_swap_", "restore_swap_"):
            return (*pair, one), {}
        if name == "probe_add":
            hidden = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
            return (hidden, torch.randn(4)), {}
        if name == "probe_project_":
            return (torch.randn(4), torch.randn(2, 3, 4), -1.0), {}
        if name == "probe_rule_":
            h = [torch.randn(5), torch.randn(3)]
            return (h, "normalized", 0.5, one, [one.clone(), one.clone()]), {}
        state = adamw_state(pair[0])
        keywords = ADAMW | {"lr": torch.tensor(1e-3, dtype=torch.float64), "maximize": False}
        optional = {"blend": one, "gradient_scale": one.clone()}
        return (*state, [pair[1][0], None]), keywords | optional


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_registration(target: Target, name: str) -> None:
    arguments, keywords = sample_arguments(name, target.device)
    torch.library.opcheck(overload(name, target.backend), arguments, keywords)


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_registration_of_the_reference(name: str) -> None:
    arguments, keywords = sample_arguments(name, "cpu")
    torch.library.opcheck(overload(name, "reference"), arguments, keywords)


def test_every_operation_has_a_description_and_a_reference() -> None:
    assert ops.OPERATIONS.keys() == SCHEMAS.keys()
    assert all(callable(getattr(reference, name)) for name in SCHEMAS)
    assert {"native", "triton", "reference"} == set(IMPLEMENTATIONS)


# ---- properties ----


@settings(max_examples=15 if INTERPRETED else 60, deadline=None)
@given(
    shapes=st.lists(
        st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple), min_size=1, max_size=12
    ),
    kinds=st.lists(st.sampled_from(DTYPES), min_size=12, max_size=12),
    offsets=st.lists(st.integers(0, 3), min_size=12, max_size=12),
    scale=st.floats(-4, 4, width=32),
    seed=st.integers(0, 2**31),
)
def test_any_list_of_tensors_is_treated_as_by_the_reference(
    shapes: list[tuple[int, ...]],
    kinds: list[torch.dtype],
    offsets: list[int],
    scale: float,
    seed: int,
) -> None:
    backend = "triton" if INTERPRETED else "native"
    if ops.why_not(backend, "cpu") is not None:
        pytest.skip(ops.why_not(backend, "cpu") or "")
    torch.manual_seed(seed)

    def make() -> list[Tensor]:
        return [
            random_tensor(math.prod(shape) + offset, kind)[offset:].view(shape)
            for shape, kind, offset in zip(shapes, kinds, offsets, strict=False)
        ]

    params, buffers = make(), make()
    theirs, ours = (clones(params), clones(buffers)), (clones(params), clones(buffers))
    factor = torch.tensor(scale)
    for name, *arguments in (["perturb_swap_", factor], ["reflect_"], ["restore_swap_", factor]):
        getattr(ops, name)(*theirs, *arguments, backend="reference")
        getattr(ops, name)(*ours, *arguments, backend=backend)
        assert_same_bits(ours[0] + ours[1], theirs[0] + theirs[1])
    exact = torch.stack([t.double().square().sum() for t in params]).sum()
    found = ops.sum_squares(params, backend=backend)
    assert_no_worse(found, reference.sum_squares(params), exact)
