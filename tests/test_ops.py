"""Every operation on every backend, against the reference and against fp64.

The same tests run for the native kernels of each instruction set, for Triton's interpreter (in a
process of its own, which test_triton.py starts), and on GPUs.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sap_fast import ops
from sap_fast.ops import native, reference
from sap_fast.ops.schema import IMPLEMENTATIONS, SCHEMAS, overload

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Nothing, one element, around the widths of registers (4, 8, 16), of unrolled sums (64) and of
# chunks (16384), and more than one chunk.
SIZES = [0, 1, 3, 4, 5, 15, 16, 17, 31, 33, 63, 64, 65, 257, 16383, 16384, 16385, 40_000]


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


def random_tensor(size: int | tuple[int, ...], dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(size)).to(dtype)


def mixed(dtype: torch.dtype | None, scale: float = 1.0) -> list[Tensor]:
    """One tensor of every size, an unaligned one, a transposed one; of `dtype`, or of all."""
    tensors = []
    for index, size in enumerate(SIZES):
        tensors.append(random_tensor(size, dtype or DTYPES[index % 3], scale))
    kind = dtype or torch.bfloat16
    tensors.append(random_tensor(1001, kind, scale)[1:])
    tensors.append(random_tensor((33, 7), kind, scale).t())
    tensors.append(random_tensor((3, 5, 7), dtype or torch.float32, scale).permute(2, 0, 1))
    return tensors


def like(
    tensors: list[Tensor], scale: float = 1.0, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Random tensors of the same shapes and strides."""
    made = []
    for tensor in tensors:
        fresh = torch.empty_like(tensor, dtype=dtype)
        made.append(fresh.copy_(scale * torch.randn(tensor.shape)))
    return made


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def poison(tensors: list[Tensor]) -> None:
    """Put NaN and infinities at the ends and in the middle of the larger tensors."""
    for tensor in tensors:
        if tensor.is_contiguous() and tensor.numel() > 3:
            flat = tensor.view(-1)
            flat[0], flat[tensor.numel() // 2], flat[-1] = math.nan, math.inf, -math.inf


def assert_same_bits(left: list[Tensor], right: list[Tensor]) -> None:
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        assert a.dtype == b.dtype and a.shape == b.shape, index
        same = (a == b) & (a.signbit() == b.signbit()) | (a.isnan() & b.isnan())
        assert same.all(), (index, tuple(a.shape), a[~same][:4], b[~same][:4])


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


def of_every_dtype(test: Callable[..., None]) -> Callable[..., None]:
    """Run with a list of each dtype, and with one of all dtypes."""
    names = ["float32", "bfloat16", "float16", "mixed"]
    return pytest.mark.parametrize("dtype", [*DTYPES, None], ids=names)(test)


# ---- the perturbation ----


@of_every_dtype
@pytest.mark.parametrize("scale", [0.3, -2e-3, 0.0])
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
    inverse = torch.tensor(-1 / scale if scale else 0.0, dtype=torch.float64)
    for name, *arguments in (["perturb_swap_", factor], ["reflect_"], ["restore_swap_", inverse]):
        getattr(ops, name)(*theirs, *arguments, backend="reference")
        getattr(ops, name)(*ours, *arguments, backend=target.backend)
        assert_same_bits(ours[0], theirs[0])
        assert_same_bits(ours[1], theirs[1])
    assert_same_bits(ours[0], params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_single_tensor_of_any_size(target: Target, dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(size)
    # The neighbours in memory must stay as they are.
    memory = [random_tensor(size + 2, dtype) for _ in range(2)]
    theirs, ours = clones(memory), clones(memory)
    inside = lambda tensors: [[tensor[1 : 1 + size]] for tensor in tensors]  # noqa: E731
    factor = torch.tensor(0.25)
    ops.perturb_swap_(*inside(theirs), factor, backend="reference")
    ops.perturb_swap_(*inside(ours), factor, backend=target.backend)
    assert_same_bits(ours, theirs)
    found = ops.sum_squares(inside(ours)[0], backend=target.backend)
    exact = inside(ours)[0][0].double().square().sum()
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0.0)


# ---- reductions ----


@of_every_dtype
def test_reductions_are_no_worse_than_the_reference(
    target: Target, dtype: torch.dtype | None
) -> None:
    torch.manual_seed(1)
    left = mixed(dtype)
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


def test_reductions_do_not_depend_on_the_number_of_threads(target: Target) -> None:
    torch.manual_seed(2)
    tensors = [random_tensor(size, torch.float32) for size in [100_003, *SIZES, 70_000]]
    buffer_sums = []
    threads = torch.get_num_threads()
    gradient = random_tensor((500, 200), torch.bfloat16)
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            buffer = torch.zeros(200)
            overload("probe_project_", target.backend)(buffer, gradient, 1.0)
            found = ops.sum_squares(tensors, backend=target.backend)
            buffer_sums.append(torch.cat([found.reshape(1), buffer]))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(buffer_sums[1:], buffer_sums[:1] * 3)


def test_every_instruction_set_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = ops.why_not("native", "cpu")
    if reason is not None:
        pytest.skip(reason)
    results = []
    for capability in ("baseline", "avx2", "avx512"):
        monkeypatch.setenv("SAP_FAST_CPU_CAPABILITY", capability)
        try:
            native.extension.cpu_capability()
        except ValueError:
            continue
        torch.manual_seed(3)
        tensors = mixed(None)
        h = [random_tensor(577, torch.float32) for _ in range(3)]
        sums = [ops.sum_squares(tensors, backend="native"), ops.dot(h, h[::-1], backend="native")]
        radii = [torch.tensor(2.0)] * 3
        norm = torch.tensor(0.1)
        ops.probe_rule_(h, "normalized", 0.5, perturbation_norm=norm, radii=radii, backend="native")
        buffer = torch.zeros(577)
        overload("probe_project_", "native")(buffer, random_tensor((99, 577), torch.float16), -1.0)
        results.append([*sums, *h, buffer])
    assert len(results) >= 1
    for other in results[1:]:
        assert_same_bits(results[0], other)


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


@of_every_dtype
@pytest.mark.parametrize("options", ["plain", "maximize", "blended", "all"])
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
        extra |= {"gradient_scale": torch.tensor(0.7), "found_inf": torch.tensor(0.0)}
        extra["lr"] = torch.tensor(3e-3)
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


def test_adamw_has_the_bits_of_torch_fused(target: Target) -> None:
    if target.capability == "baseline" or target.device != "cpu":
        pytest.skip("PyTorch's own kernels fuse multiply and add on AVX2 and AVX-512 CPUs only")
    torch.manual_seed(5)
    # Multiples of a register: PyTorch's loop over what is left rounds once less.
    params = [random_tensor(size, torch.float32) for size in (16, 64, 4096, 100_000)]
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


def test_a_blend_of_zero_ignores_a_direction_of_nan(target: Target) -> None:
    torch.manual_seed(6)
    ours = adamw_state(mixed(None))
    plain = ours.copy()
    nan = [torch.full_like(p, math.nan) for p in ours.params]
    ops.adamw_blend_(*ours, nan, **ADAMW, blend=torch.tensor(0.0), backend=target.backend)
    ops.adamw_blend_(*plain, **ADAMW, backend=target.backend)
    for left, right in zip(ours, plain, strict=True):
        assert_same_bits(left, right)


def test_an_overflow_updates_and_counts_nothing(target: Target) -> None:
    torch.manual_seed(7)
    ours = adamw_state(mixed(None))
    before = ours.copy()
    options = ADAMW | {"found_inf": torch.tensor(1.0)}
    ops.adamw_blend_(*ours, **options, backend=target.backend)
    for left, right in zip(ours, before, strict=True):
        assert_same_bits(left, right)


# ---- the probe ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 64, 577])
def test_probe_add_has_the_bits_of_the_reference(
    target: Target, dtype: torch.dtype, width: int
) -> None:
    torch.manual_seed(8)
    hidden, offset = random_tensor((2, 5, width), dtype), random_tensor(width, torch.float32)
    run = overload("probe_add", target.backend)
    assert_same_bits([run(hidden, offset)], [reference.probe_add(hidden, offset)])
    per_token = random_tensor((2, 5, width), torch.float32)
    assert_same_bits([run(hidden, per_token)], [reference.probe_add(hidden, per_token)])
    transposed = random_tensor((5, 2, width), dtype).transpose(0, 1)
    found = run(transposed, offset)
    assert_same_bits([found], [reference.probe_add(transposed, offset)])
    assert found.stride() == torch.empty_like(transposed).stride()


def test_probe_add_passes_the_gradient_on(target: Target) -> None:
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    offset = torch.randn(8, requires_grad=True)
    ops.probe_inject(hidden, offset, backend=target.backend).backward(torch.full((2, 3, 8), 2.0))
    assert torch.equal(hidden.grad, torch.full((2, 3, 8), 2.0))
    assert torch.equal(offset.grad, torch.full((8,), 12.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 1000])
@pytest.mark.parametrize("width", [1, 65, 576])
def test_probe_project_is_no_worse_than_the_reference(
    target: Target, dtype: torch.dtype, rows: int, width: int
) -> None:
    torch.manual_seed(9)
    gradient = random_tensor((rows, width), dtype)
    start = random_tensor(width, torch.float32)
    ours, theirs = start.clone(), start.clone()
    overload("probe_project_", target.backend)(ours, gradient, -1.0)
    reference.probe_project_(theirs, gradient, -1.0)
    exact = start.double() - gradient.double().sum(0)
    size = start.abs().double() + gradient.double().abs().sum(0)
    error = (ours.double() - exact).abs()
    assert (error <= (theirs.double() - exact).abs() + 2**-23 * size).all()


def test_probe_project_of_views_and_of_single_tokens(target: Target) -> None:
    torch.manual_seed(10)
    run = overload("probe_project_", target.backend)
    gradient = random_tensor((4, 3, 2), torch.float32)
    for view in (gradient.transpose(0, 1), gradient[..., :1], torch.ones(()).expand(3, 5)):
        ours, theirs = torch.zeros(view.shape[-1]), torch.zeros(view.shape[-1])
        run(ours, view, 1.0)
        reference.probe_project_(theirs, view, 1.0)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    per_token = torch.ones(4, 3, 2)
    run(per_token, gradient, -1.0)
    assert_same_bits([per_token], [1 - gradient])


RULES = ["gradient", "normalized", "adam"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1e-35, 1e-3, 2e37])
def test_probe_rules_are_no_worse_than_the_reference(
    target: Target, rule: str, size: float
) -> None:
    torch.manual_seed(11)
    h = [size * torch.randn(n) for n in (1, 7, 576, 20_000)] + [torch.zeros(9), torch.empty(0)]
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


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_h_that_is_not_finite_switches_every_probe_off(
    target: Target, rule: str, value: float
) -> None:
    run = lambda h, radii: ops.probe_rule_(  # noqa: E731
        h, rule, 0.5, perturbation_norm=torch.tensor(1.0), radii=radii, backend=target.backend
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
    good = lambda: torch.ones(5)  # noqa: E731
    gaps = torch.ones(5, 4)[:, ::2]
    cases = [
        (r"params\[1\].*float64", [good(), good().double()], [good(), good().double()]),
        (r"params\[1\].*int64", [good(), good().long()], [good(), good().long()]),
        (r"buffers\[1\].*bfloat16", [good(), good()], [good(), good().bfloat16()]),
        (r"params\[1\].*strides", [good(), gaps], [good(), gaps.clone()]),
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


def test_nonsense_is_refused(target: Target) -> None:
    memory = torch.ones(20)
    error = (ValueError, RuntimeError)
    cases = [
        ("2 tensors", [memory[:4], memory[4:8]], [memory[8:12]]),
        ("shape", [memory[:4]], [memory[8:13]]),
        ("memory", [memory[:4], memory[:4]], [memory[8:12], memory[12:16]]),
        ("memory", [memory[:4], memory[3:7]], [memory[8:12], memory[12:16]]),
        ("memory", [memory[:4], memory[4:8]], [memory[8:12], memory[:4]]),
        ("memory", [memory[:10], memory[4:8]], [torch.ones(10), torch.ones(4)]),
    ]
    for message, params, buffers in cases:
        with pytest.raises(error, match=message):
            swap(target, params, buffers)
    assert torch.equal(memory, torch.ones(20))
    # What is only read may be given twice.
    assert ops.sum_squares([memory, memory], backend=target.backend) == 40
    with pytest.raises(error, match="scale"):
        ops.perturb_swap_([memory[:4]], [memory[4:8]], torch.ones(2), backend=target.backend)
    with pytest.raises(error, match="fit"):
        overload("probe_project_", target.backend)(torch.ones(3), torch.ones(2, 4), 1.0)
    with pytest.raises(error, match="fit"):
        overload("probe_add", target.backend)(torch.ones(2, 4), torch.ones(3))
    with pytest.raises(error, match=r"rule='?cubic"):
        ops.probe_rule_(
            [torch.ones(3)],
            "cubic",
            0.5,
            perturbation_norm=torch.tensor(1.0),
            radii=[torch.tensor(1.0)],
            backend=target.backend,
        )


def test_what_is_written_gets_a_new_version(target: Target) -> None:
    params, buffers = [torch.ones(3)], [torch.ones(3)]
    swap(target, params, buffers)
    assert params[0]._version == 1 and buffers[0]._version == 1
    ops.reflect_(params, buffers, backend=target.backend)
    assert params[0]._version == 2 and buffers[0]._version == 1


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


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.extension is None:
        pytest.skip(native.problem or "")
    monkeypatch.setenv("SAP_FAST_CPU_CAPABILITY", "avx1024")
    with pytest.raises(RuntimeError, match=r"SAP_FAST_CPU_CAPABILITY=avx1024.*baseline"):
        ops.sum_squares([torch.ones(3)], backend="native")


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
            return (torch.randn(2, 3, 4, requires_grad=True), torch.randn(4)), {}
        if name == "probe_project_":
            return (torch.randn(4), torch.randn(2, 3, 4), -1.0), {}
        if name == "probe_rule_":
            return (pair[0], "normalized", 0.5, one, [one.clone(), one.clone()]), {}
        state = adamw_state(pair[0])
        keywords = ADAMW | {"lr": torch.tensor(1e-3, dtype=torch.float64), "maximize": False}
        optional = {"blend": one, "gradient_scale": one.clone(), "found_inf": None}
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


@settings(max_examples=60, deadline=None)
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


# ---- the chunk plan ----


@pytest.fixture
def planner() -> Any:
    if native.extension is None:
        pytest.skip(native.problem or "")
    return native.extension


def test_the_plan_goes_beyond_two_to_the_31(planner: Any) -> None:
    huge, chunk = 2**33 + 5, 2**30
    chunks = planner.plan_chunks([7, huge, 0, 2**31], chunk)
    assert chunks[0] == (0, 0, 7)
    assert [offset for tensor, offset, _ in chunks if tensor == 1] == [k * chunk for k in range(9)]
    assert sum(size for tensor, _, size in chunks if tensor == 1) == huge
    assert chunks[-1] == (3, chunk, chunk)
    # As many chunks as a tensor of 2³³ elements has at the size that the kernels use.
    starts = planner.share_chunks([2**33], 16384, 3)
    assert starts == [0, 174763, 349526, 524288]


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 3000), max_size=40),
    chunk=st.integers(1, 700),
    workers=st.integers(1, 9),
)
def test_a_plan_covers_every_element_once_and_shares_evenly(
    sizes: list[int], chunk: int, workers: int
) -> None:
    if native.extension is None:
        pytest.skip(native.problem or "")
    chunks = native.extension.plan_chunks(sizes, chunk)
    covered = [(tensor, offset + k) for tensor, offset, size in chunks for k in range(size)]
    assert covered == [(tensor, k) for tensor, size in enumerate(sizes) for k in range(size)]
    assert all(offset % chunk == 0 and 0 < size <= chunk for _, offset, size in chunks)
    starts = native.extension.share_chunks(sizes, chunk, workers)
    assert starts[0] == 0 and starts[-1] == len(chunks) and starts == sorted(starts)
    assert len(starts) == workers + 1
    shares = [
        sum(size for _, _, size in chunks[first:last]) for first, last in itertools.pairwise(starts)
    ]
    assert all(share <= sum(sizes) / workers + chunk for share in shares)


def test_the_planner_names_bad_arguments(planner: Any) -> None:
    with pytest.raises(ValueError, match="chunk_size=0"):
        planner.plan_chunks([3], 0)
    with pytest.raises(ValueError, match="workers"):
        planner.share_chunks([3], 1, 0)
