"""The Triton kernels against the reference, in Triton's interpreter on the CPU.

Triton reads TRITON_INTERPRET when a kernel is defined, so this file has a process of its own:
`tests/test_triton.py` starts it, and pytest does not collect it by itself.
"""

from __future__ import annotations

import copy
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from sap_fast import ops
from sap_fast.ops import reference, schema
from sap_fast.ops import triton as backend

if not backend.interpreted:
    pytest.skip("needs TRITON_INTERPRET=1: see test_triton.py", allow_module_level=True)

from sap_fast.ops.triton import adamw, perturb, probe, table

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: Shapes of a list of tensors; "unaligned" and "transposed" change the layout of each.
LISTS: dict[str, list[tuple[int, ...]]] = {
    "empty": [(0,), (3, 0)],
    "one": [(1,)],
    "scalar": [()],
    "31": [(31,)],
    "257": [(257,)],
    "vector": [(7,), (8,), (9,)],
    "tail": [(511,), (512,), (513,)],
    "adamw chunk": [(adamw.BLOCK - 1,), (adamw.BLOCK,), (adamw.BLOCK + 1,)],
    "chunk": [(perturb.BLOCK - 1,), (perturb.BLOCK,), (2 * perturb.BLOCK + 1,)],
    "matrix": [(3, 7)],
    "transposed": [(3, 7), (64, 80)],
    "unaligned": [(5,), (perturb.BLOCK + 3,)],
    "mixed": [(0,), (1,), (3, 7), (257,), (perturb.BLOCK + 1,), (2, 3, 4), (0,)],
}

#: For reductions alone: elsewhere these are many chunks, and the interpreter takes its time.
LONG = {"sum chunk": [(perturb.SUM_CHUNK - 1,), (perturb.SUM_CHUNK,), (perturb.SUM_CHUNK + 1,)]}


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Fill what `torch.empty` returns with NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fresh_numbers(request: pytest.FixtureRequest) -> None:
    """Draw other numbers in every run; the seed is printed where a test fails."""
    print("seed", torch.seed())


def make(dtype: torch.dtype, name: str, size: float = 1.0) -> list[Tensor]:
    return [lay_out((size * torch.randn(shape)).to(dtype), name) for shape in (LISTS | LONG)[name]]


def lay_out(tensor: Tensor, name: str) -> Tensor:
    if name == "transposed":
        return tensor.t().contiguous().t()
    if name == "unaligned":
        moved = tensor.new_empty(tensor.numel() + 1)[1:].view(tensor.shape)
        return moved.copy_(tensor)
    return tensor


def clones(tensors: list[Tensor], name: str = "") -> list[Tensor]:
    return [lay_out(tensor.clone(), name) for tensor in tensors]


def assert_same_bits(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        # Signs of zero count; one NaN is as good as another.
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(a.signbit() & ~a.isnan(), b.signbit() & ~b.isnan())


def assert_no_worse(
    found: list[Tensor],
    reference_: list[Tensor],
    exact: list[Tensor],
    tolerance: float,
    size: float = 0.0,
) -> None:
    """|found − exact| ≤ |reference − exact| + tolerance·max|exact|, the largest of each tensor.

    Where terms cancel, `size` is how large they are, and takes the place of a smaller max|exact|.
    """
    for a, b, c in zip(found, reference_, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if c.numel():
            error, error_of_reference = ((x.double() - c).abs().max() for x in (a, b))
            assert error <= error_of_reference + tolerance * max(float(c.abs().max()), size)


# ---- perturb, reflect, restore ----

ELEMENTWISE: dict[str, tuple[Tensor, ...]] = {
    "perturb_swap_": (torch.tensor(0.37),),
    "reflect_": (),
    "restore_swap_": (torch.tensor(1 / 0.37, dtype=torch.float64),),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("case", LISTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_operations_have_the_bits_of_the_reference(
    name: str, case: str, dtype: torch.dtype
) -> None:
    params, buffers = make(dtype, case), make(dtype, case)
    if case == "scalar":
        params, buffers = [p.view(1) for p in params], [b.view(1) for b in buffers]
    wanted = clones(params), clones(buffers)
    getattr(reference, name)(*wanted, *ELEMENTWISE[name])
    getattr(ops, name)(params, buffers, *ELEMENTWISE[name], backend="triton")
    assert_same_bits(params, wanted[0])
    assert_same_bits(buffers, wanted[1])


@pytest.mark.parametrize("name", ELEMENTWISE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_operations_of_odd_numbers(name: str, dtype: torch.dtype) -> None:
    smallest, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    odd = [0.0, -0.0, 1.0, smallest, smallest / 4, largest, -largest]
    odd += [float("inf"), -float("inf"), float("nan")]
    pairs = torch.tensor(odd, dtype=torch.float64).to(dtype)
    params, buffers = [[x.flatten()] for x in torch.meshgrid(pairs, pairs, indexing="ij")]
    params, buffers = clones(params), clones(buffers)
    wanted = clones(params), clones(buffers)
    getattr(reference, name)(*wanted, *ELEMENTWISE[name])
    getattr(ops, name)(params, buffers, *ELEMENTWISE[name], backend="triton")
    assert_same_bits(params, wanted[0])
    assert_same_bits(buffers, wanted[1])


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_lists_of_mixed_dtypes(name: str) -> None:
    params = [torch.randn(70).to(dtype) for dtype in DTYPES * 2]
    buffers = [torch.randn(70).to(dtype) for dtype in DTYPES * 2]
    wanted = clones(params), clones(buffers)
    getattr(reference, name)(*wanted, *ELEMENTWISE[name])
    getattr(ops, name)(params, buffers, *ELEMENTWISE[name], backend="triton")
    assert_same_bits(params + buffers, wanted[0] + wanted[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_scale_of_zero_perturbs_nothing_whatever_the_direction_holds(poison: float) -> None:
    params = [torch.randn(perturb.BLOCK + 5)]
    old, buffers = clones(params), [torch.full_like(params[0], poison)]
    ops.perturb_swap_(params, buffers, torch.tensor(0.0), backend="triton")
    assert_same_bits(params, old)
    assert_same_bits(buffers, old)


# ---- reductions ----


@pytest.mark.parametrize("case", LISTS | LONG)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reductions_are_as_near_to_fp64_as_the_reference(case: str, dtype: torch.dtype) -> None:
    left, right = make(dtype, case), make(dtype, case)
    products = [a.double() * b.double() for a, b in zip(left, right, strict=True)]
    exact = torch.stack([product.sum() for product in products]).sum()
    size = torch.stack([product.abs().sum() for product in products]).sum()
    squares = torch.stack([a.double().square().sum() for a in left]).sum()
    found = ops.sum_squares(left, backend="triton")
    assert found.dtype == torch.float32 and found.shape == ()
    assert_no_worse([found], [reference.sum_squares(left)], [squares], 4e-7)
    error = (ops.dot(left, right, backend="triton").double() - exact).abs()
    of_reference = (reference.dot(left, right).double() - exact).abs()
    assert error <= of_reference + 2e-7 * size


def test_reductions_give_the_same_bits_wherever_the_tensors_lie() -> None:
    tensors = make(torch.float32, "mixed") + make(torch.float32, "sum chunk")
    first = ops.sum_squares(tensors, backend="triton")
    assert all(ops.sum_squares(clones(tensors), backend="triton") == first for _ in range(3))


def test_reductions_of_mixed_dtypes_and_of_nothing() -> None:
    tensors = [torch.randn(100).to(dtype) for dtype in DTYPES * 2]
    exact = sum(float(x.double().square().sum()) for x in tensors)
    assert float(ops.sum_squares(tensors, backend="triton")) == pytest.approx(exact, rel=1e-6)
    assert ops.sum_squares([torch.empty(0), torch.empty(0, 3)], backend="triton") == 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("position", [0, 256])
def test_reductions_show_what_is_not_finite(poison: float, position: int) -> None:
    tensor = torch.randn(257)
    tensor[position] = poison
    assert not ops.sum_squares([torch.randn(5), tensor], backend="triton").isfinite()


# ---- AdamW ----

SETTINGS: dict[str, Any] = {
    "lr": torch.tensor(3e-3, dtype=torch.float64),
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "maximize": False,
    "blend": None,
    "gradient_scale": None,
    "found_inf": None,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp32 lr": {"lr": torch.tensor(3e-3)},
    "maximize": {"maximize": True},
    "scaled": {"gradient_scale": torch.tensor(0.37)},
    "blended": {
        "blend": torch.tensor(0.63),
        "gradient_scale": torch.tensor(0.37),
        "found_inf": torch.tensor(0.0),
        "maximize": True,
    },
}


def adamw_lists(dtype: torch.dtype, case: str, *, step: float) -> list[list[Any]]:
    """Return params, grads, moments, steps and directions; every third direction is None."""
    params, grads, directions = (make(dtype, case) for _ in range(3))
    moments = [make(torch.float32, case, size=0.1) for _ in range(2)]
    if step == 0:
        moments = [[torch.zeros_like(x) for x in moment] for moment in moments]
    moments[1] = [x.square_() for x in moments[1]]
    steps = [torch.tensor(float(step)) for _ in params]
    sparse = [None if index % 3 == 2 else d for index, d in enumerate(directions)]
    return [params, grads, *moments, steps, sparse]


def in_double(lists: list[list[Any]]) -> list[list[Any]]:
    return [[None if x is None else x.double() for x in items] for items in lists]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", LISTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_adamw_is_as_near_to_fp64_as_the_reference(
    variant: str, case: str, dtype: torch.dtype
) -> None:
    settings = SETTINGS | VARIANTS[variant]
    for step in (0.0, 7.0):
        found = adamw_lists(dtype, case, step=step)
        wanted, exact = copy.deepcopy(found), in_double(found)
        gradients = clones(found[1])
        reference.adamw_blend_(*wanted, **settings)
        reference.adamw_blend_(*exact, **settings)
        ops.adamw_blend_(*found, **settings, backend="triton")
        for index, size in ((0, 0.1), (2, 0.1), (3, 0.0)):
            assert_no_worse(found[index], wanted[index], exact[index], 3e-7, size)
        assert_same_bits(found[4], wanted[4])
        assert_same_bits(found[1], gradients)


def test_adamw_of_mixed_dtypes_over_several_steps() -> None:
    found = [
        list(itertools.chain(*items))
        for items in zip(*(adamw_lists(dtype, "mixed", step=0) for dtype in DTYPES), strict=True)
    ]
    wanted = copy.deepcopy(found)
    for _ in range(4):
        for lists, run in ((found, ops.adamw_blend_), (wanted, reference.adamw_blend_)):
            options = {"backend": "triton"} if lists is found else {}
            run(*lists, **(SETTINGS | VARIANTS["blended"]), **options)
    assert all(step == 4 for step in found[4])
    for a, b in zip(found[0] + found[2] + found[3], wanted[0] + wanted[2] + wanted[3], strict=True):
        tolerance = 2 * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_first_step_with_a_beta_near_one_is_exact_to_fp32() -> None:
    # 1 − β₂ᵗ found in fp32 would be off by 1e-4 of itself here; by 5e-5 of the step.
    lists = [[torch.zeros(9)], [torch.randn(9)], [torch.zeros(9)], [torch.zeros(9)]]
    step = [torch.tensor(0.0)]
    settings = SETTINGS | {"beta2": 0.9999999, "weight_decay": 0.0, "eps": 0.0}
    ops.adamw_blend_(*lists, step, [], **settings, backend="triton")
    torch.testing.assert_close(lists[0][0], -3e-3 * lists[1][0].sign(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("poison", [1.0, float("nan"), float("inf")])
def test_found_inf_updates_and_counts_nothing(poison: float) -> None:
    lists = adamw_lists(torch.bfloat16, "mixed", step=3)
    before = copy.deepcopy(lists)
    options = SETTINGS | VARIANTS["blended"] | {"found_inf": torch.tensor(poison)}
    ops.adamw_blend_(*lists, **options, backend="triton")
    for items, old in zip(lists[:5], before[:5], strict=True):
        assert_same_bits(items, old)


def test_a_blend_of_zero_leaves_the_gradient_whatever_the_direction_holds() -> None:
    lists = adamw_lists(torch.float32, "257", step=3)
    plain = copy.deepcopy(lists)
    lists[5] = [torch.full((257,), float("nan"))]
    ops.adamw_blend_(*lists, **(SETTINGS | {"blend": torch.tensor(0.0)}), backend="triton")
    ops.adamw_blend_(*plain[:5], [], **SETTINGS, backend="triton")
    assert_same_bits(lists[0] + lists[2] + lists[3], plain[0] + plain[2] + plain[3])


def test_a_gradient_that_is_not_finite_shows_where_it_is_and_nowhere_else() -> None:
    lists = adamw_lists(torch.float32, "257", step=3)
    lists[1][0][100] = float("nan")
    ops.adamw_blend_(*lists, **SETTINGS, backend="triton")
    assert lists[0][0].isnan().nonzero().flatten().tolist() == [100]


# ---- probe: add and project ----

HIDDEN = [(1, 1, 1), (2, 5, 8), (3, 7, 31), (2, 3, 257), (0, 4, 16), (5, 640), (48,), (4, 0)]


@pytest.mark.parametrize("shape", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probe_add_has_the_bits_of_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    hidden = torch.randn(shape).to(dtype)
    unaligned = lay_out(hidden, "unaligned")
    for offset in (torch.randn(shape[-1:]), torch.randn(shape)):
        wanted = reference.probe_add(hidden, offset)
        for x in (hidden, unaligned):
            assert_same_bits([ops.probe_inject(x, offset, backend="triton")], [wanted])


def test_probe_add_keeps_the_layout() -> None:
    hidden, offset = torch.randn(6, 5, 4).permute(2, 0, 1), torch.randn(5)
    found = ops.probe_inject(hidden, offset, backend="triton")
    assert_same_bits([found], [hidden + offset])
    assert found.stride() == hidden.stride()
    gaps = torch.randn(6, 10)[:, ::2]
    assert_same_bits([ops.probe_inject(gaps, offset, backend="triton")], [gaps + offset])


GRADIENTS = [
    *HIDDEN,
    (probe.ROWS - 1, 3),
    (probe.ROWS, 128),
    (2, probe.ROWS, 129),
    (2 * probe.ROWS + 1, 16),
]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("shape", GRADIENTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_probe_project_is_as_near_to_fp64_as_the_reference(
    shape: tuple[int, ...], dtype: torch.dtype, sign: float
) -> None:
    gradient = torch.randn(shape).to(dtype)
    views = [gradient, lay_out(gradient, "unaligned")]
    if len(shape) == 3:
        views.append(gradient.transpose(0, 1).contiguous().transpose(0, 1))
    for like in (shape[-1:], shape):
        start = torch.randn(like)
        wanted, exact = start.clone(), start.double()
        reference.probe_project_(wanted, gradient, sign)
        reference.probe_project_(exact, gradient.double(), sign)
        # The terms of a sum, on the average over columns.
        size = float(gradient.double().abs().sum()) / max(wanted.numel(), 1) + 1
        for view in views:
            buffer = start.clone()
            torch.ops.sap_fast.probe_project_.triton(buffer, view, sign)
            assert_no_worse([buffer], [wanted], [exact], 1e-7, size)


def test_probe_project_of_an_expanded_gradient() -> None:
    buffer = torch.zeros(8)
    torch.ops.sap_fast.probe_project_.triton(buffer, torch.ones(()).expand(3, 5, 8), -1.0)
    assert torch.equal(buffer, torch.full((8,), -15.0))


def test_probe_inject_collects_on_the_way_back() -> None:
    hidden, upstream = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 8)
    buffer = torch.zeros(8)
    ops.probe_inject(hidden, torch.randn(8), buffer, -1.0, backend="triton").backward(upstream)
    assert hidden.grad is not None and torch.equal(hidden.grad, upstream)
    torch.testing.assert_close(buffer, -upstream.sum((0, 1)), rtol=1e-5, atol=1e-5)


# ---- probe rules ----

LAYERS = {
    "one": [(1,)],
    "hidden": [(576,), (576,), (576,)],
    "around the chunk": [(probe.RULE_BLOCK - 1,), (probe.RULE_BLOCK,), (probe.RULE_BLOCK + 1,)],
    "token": [(2, 300, 16), (2, 3, 7)],
}


@pytest.mark.parametrize("rule", probe.RULES)
@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("size", [1.0, 1e-30])
def test_probe_rules_are_as_near_to_fp64_as_the_reference(
    rule: str, case: str, size: float
) -> None:
    buffers = [size * torch.randn(shape) for shape in LAYERS[case]]
    radii = list(torch.rand(len(buffers)).unbind())
    norm = torch.tensor(0.3)
    wanted, exact = clones(buffers), [b.double() for b in buffers]
    reference.probe_rule_(wanted, rule, 0.1, norm, radii)
    reference.probe_rule_(exact, rule, 0.1, norm.double(), [r.double() for r in radii])
    finite = ops.probe_rule_(
        buffers, rule, 0.1, perturbation_norm=norm, radii=radii, backend="triton"
    )
    assert finite.dtype == torch.bool and finite.shape == () and finite
    assert_no_worse(buffers, wanted, exact, 5e-7)
    if rule != "normalized":
        assert_same_bits(buffers, wanted)


@pytest.mark.parametrize("rule", probe.RULES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["first", "last", "radius"])
def test_one_value_that_is_not_finite_makes_every_probe_zero(
    rule: str, poison: float, where: str
) -> None:
    buffers = [torch.randn(2 * probe.RULE_BLOCK + 3) for _ in range(3)]
    radii = [torch.tensor(1.0) for _ in range(3)]
    if where == "radius":
        radii[1] = torch.tensor(poison)
    else:
        buffers[0 if where == "first" else 2][0 if where == "first" else -1] = poison
    finite = ops.probe_rule_(
        buffers, rule, 0.1, perturbation_norm=torch.tensor(0.3), radii=radii, backend="triton"
    )
    assert not finite
    assert all(not b.any() for b in buffers)


def test_a_layer_is_normalized_by_the_largest_of_all_its_chunks() -> None:
    h = torch.full((2 * probe.RULE_BLOCK,), 1e-30)
    # Divided by an element of the first chunk this would overflow, and its square even undivided.
    h[-1] = 1e20
    one = torch.tensor(1.0)
    ops.probe_rule_([h], "normalized", 0.1, perturbation_norm=one, radii=[one], backend="triton")
    assert h[-1] == pytest.approx(0.1, rel=1e-6) and not h[:-1].any()


def test_a_probe_gradient_of_zero_gives_a_probe_of_zero() -> None:
    buffers = [torch.zeros(9), torch.randn(9)]
    radii = [torch.tensor(1.0)] * 2
    norm = torch.tensor(0.3)
    assert ops.probe_rule_(
        buffers, "normalized", 0.1, perturbation_norm=norm, radii=radii, backend="triton"
    )
    assert not buffers[0].any()
    assert buffers[1].norm() == pytest.approx(0.1, rel=1e-6)


# ---- what is rejected, before anything is written ----


def gaps() -> Tensor:
    return torch.randn(8, 2)[:, 0]


_shared = torch.randn(20)

REJECTED: dict[
    str, tuple[type[Exception], str, Callable[[], tuple[list[Tensor], list[Tensor]]]]
] = {
    "fp64": (
        NotImplementedError,
        r"params\[1\] has dtype torch.float64",
        lambda: ([torch.randn(3), torch.randn(3).double()], [torch.randn(3)] * 2),
    ),
    "other dtype": (
        NotImplementedError,
        r"buffers\[0\] has dtype torch.bfloat16",
        lambda: ([torch.randn(3)], [torch.randn(3).bfloat16()]),
    ),
    "gaps": (
        NotImplementedError,
        r"params\[0\] .*gaps",
        lambda: ([gaps()], [gaps()]),
    ),
    "other strides": (
        NotImplementedError,
        r"buffers\[0\] has strides",
        lambda: ([torch.randn(3, 4)], [torch.randn(4, 3).t()]),
    ),
    "read and written": (
        NotImplementedError,
        r"share memory",
        lambda: ([_shared[:10]], [_shared[5:15]]),
    ),
    "read around": (
        NotImplementedError,
        r"params\[2\] and buffers\[0\] share memory that is written",
        lambda: (
            [torch.randn(20), torch.randn(2), _shared[10:12]],
            [_shared, _shared[2:4], torch.randn(2)],
        ),
    ),
    "length": (
        ValueError,
        r"buffers has 1 tensors, params has 2",
        lambda: ([torch.randn(3), torch.randn(3)], [torch.randn(3)]),
    ),
    "shape": (
        ValueError,
        r"buffers\[1\] has shape \(4,\)",
        lambda: ([torch.randn(3), torch.randn(3)], [torch.randn(3), torch.randn(4)]),
    ),
    "overlap": (
        ValueError,
        r"params\[[01]\] and params\[[01]\] share memory",
        lambda: ([_shared[:10], _shared[9:19]], [torch.randn(10), torch.randn(10)]),
    ),
    "inside": (
        ValueError,
        r"params\[[01]\] and params\[[01]\] share memory",
        lambda: ([_shared, _shared[12:14]], [torch.randn(20), torch.randn(2)]),
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_what_is_not_supported_is_named_and_nothing_is_written(case: str) -> None:
    error, message, build = REJECTED[case]
    params, buffers = build()
    before = clones(params), clones(buffers)
    with pytest.raises(error, match=message):
        ops.reflect_(params, buffers, backend="triton")
    assert_same_bits(params + buffers, before[0] + before[1])


def test_other_rejections() -> None:
    same = torch.randn(3)
    with pytest.raises(ValueError, match=r"share memory, and both are written"):
        ops.perturb_swap_([same], [same], torch.tensor(1.0), backend="triton")
    lists = adamw_lists(torch.float32, "one", step=0)
    lists[4] = [torch.tensor(0.0, dtype=torch.float64)]
    with pytest.raises(NotImplementedError, match=r"steps\[0\] has dtype torch.float64"):
        ops.adamw_blend_(*lists, **SETTINGS, backend="triton")
    lists = adamw_lists(torch.bfloat16, "one", step=0)
    lists[2] = [lists[2][0].bfloat16()]
    with pytest.raises(NotImplementedError, match=r"exp_avgs\[0\] has dtype torch.bfloat16"):
        ops.adamw_blend_(*lists, **SETTINGS, backend="triton")
    lists = adamw_lists(torch.float32, "vector", step=0)
    lists[4] = lists[4][:1] * 3
    with pytest.raises(ValueError, match=r"steps\[\d\] and steps\[\d\] share memory"):
        ops.adamw_blend_(*lists, **SETTINGS, backend="triton")
    with pytest.raises(ValueError, match=r"offset has shape \(3,\)"):
        ops.probe_inject(torch.randn(2, 4), torch.randn(3), backend="triton")
    with pytest.raises(ValueError, match=r"buffer has shape \(3,\)"):
        torch.ops.sap_fast.probe_project_.triton(torch.zeros(3), torch.randn(2, 4), 1.0)
    with pytest.raises(NotImplementedError, match=r"buffer has dtype torch\.float64"):
        torch.ops.sap_fast.probe_project_.triton(torch.zeros(4).double(), torch.randn(2, 4), 1.0)
    with pytest.raises(NotImplementedError, match=r"hidden has dtype torch\.float64"):
        ops.probe_inject(torch.randn(2, 4).double(), torch.randn(4), backend="triton")
    with pytest.raises(ValueError, match="rule='other' is not known"):
        torch.ops.sap_fast.probe_rule_.triton(
            [torch.zeros(3)], "other", 0.1, torch.tensor(1.0), [torch.tensor(1.0)]
        )


# ---- addresses, launches, versions, interrupts ----


def test_memory_that_moved_is_seen() -> None:
    parameter = torch.nn.Parameter(torch.randn(40))
    buffer = torch.randn(40)
    for _ in range(3):
        parameter.data, buffer = torch.randn(40), torch.randn(40)
        wanted = [2 * buffer - parameter.data]
        with torch.no_grad():
            ops.reflect_([parameter], [buffer], backend="triton")
        assert_same_bits([parameter.data], wanted)


def test_tables_of_the_same_memory_are_made_once() -> None:
    params, buffers = make(torch.float32, "mixed"), make(torch.float32, "mixed")
    ops.reflect_(params, buffers, backend="triton")
    before = [cache.cache_info() for cache in (table._addresses, table._chunk_plan)]
    ops.reflect_(params, buffers, backend="triton")
    after = [cache.cache_info() for cache in (table._addresses, table._chunk_plan)]
    for old, new in zip(before, after, strict=True):
        assert (new.hits, new.misses) == (old.hits + 1, old.misses)


def launches(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> int:
    count = 0

    def counted(*arguments: Any, **options: Any) -> None:
        nonlocal count
        count += 1
        table.launch(*arguments, **options)

    with monkeypatch.context() as patch:
        for module in (adamw, perturb, probe):
            patch.setattr(module, "launch", counted)
        run()
    return count


@pytest.mark.parametrize("tensors", [2, 40])
def test_launches_do_not_grow_with_the_list(monkeypatch: pytest.MonkeyPatch, tensors: int) -> None:
    def some() -> list[Tensor]:
        return [torch.randn(5) for _ in range(tensors)]

    def count(run: Callable[[], object]) -> int:
        return launches(monkeypatch, run)

    one = torch.tensor(1.0)
    assert count(lambda: ops.sum_squares(some(), backend="triton")) == 2
    assert count(lambda: ops.perturb_swap_(some(), some(), one, backend="triton")) == 1
    steps = [torch.tensor(0.0) for _ in range(tensors)]
    lists = (some(), some(), some(), some(), steps)
    assert count(lambda: ops.adamw_blend_(*lists, [], **SETTINGS, backend="triton")) == 3
    rule = {"perturbation_norm": one, "radii": [one] * tensors, "backend": "triton"}
    assert count(lambda: ops.probe_rule_(some(), "normalized", 0.1, **rule)) == 6
    assert count(lambda: ops.probe_rule_(some(), "gradient", 0.1, **rule)) == 4


def test_what_is_written_counts_up_its_version() -> None:
    def versions(tensors: list[Tensor]) -> list[int]:
        return [tensor._version for tensor in tensors]

    params, buffers = make(torch.float32, "one"), make(torch.float32, "one")
    start = versions(params + buffers)
    ops.reflect_(params, buffers, backend="triton")
    assert versions(params)[0] > start[0] and versions(buffers)[0] == start[1]
    lists = adamw_lists(torch.float32, "one", step=0)
    before = [versions(items) for items in lists[:5]]
    ops.adamw_blend_(*lists, **SETTINGS, backend="triton")
    after = [versions(items) for items in lists[:5]]
    assert [a[0] > b[0] for a, b in zip(after, before, strict=True)] == [
        True,
        False,
        True,
        True,
        True,
    ]


def test_probes_count_up_their_versions() -> None:
    for like in ((8,), (4, 8)):
        buffer, gradient = torch.zeros(like), torch.randn(4, 8)
        before = buffer._version, gradient._version
        torch.ops.sap_fast.probe_project_.triton(buffer, gradient, 1.0)
        assert buffer._version > before[0] and gradient._version == before[1]
    buffer, one = torch.randn(8), torch.tensor(1.0)
    version = buffer._version
    ops.probe_rule_([buffer], "adam", 0.1, perturbation_norm=one, radii=[one], backend="triton")
    assert buffer._version > version


def test_an_interrupt_waits_until_the_version_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter, buffer = torch.randn(5), torch.randn(5)
    version, wanted = parameter._version, 2 * buffer - parameter

    def interrupted(tensors: list[Tensor]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        torch.autograd.graph.increment_version(tensors)

    monkeypatch.setattr(table, "increment_version", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ops.reflect_([parameter], [buffer], backend="triton")
    assert torch.equal(parameter, wanted) and parameter._version > version
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- registration ----


def samples() -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    def some() -> list[Tensor]:
        return [torch.randn(3, 4), torch.randn(7)]

    one = torch.tensor(0.5)
    return {
        "sum_squares": ((some(),), {}),
        "dot": ((some(), some()), {}),
        "perturb_swap_": ((some(), some(), one), {}),
        "reflect_": ((some(), some()), {}),
        "restore_swap_": ((some(), some(), one), {}),
        "probe_add": ((torch.randn(2, 3, 4), torch.randn(4)), {}),
        "probe_project_": ((torch.zeros(4), torch.randn(2, 3, 4), -1.0), {}),
        "probe_rule_": ((some(), "normalized", 0.1, one, [one, one.clone()]), {}),
        "adamw_blend_": (
            (some(), some(), some(), some(), [torch.tensor(0.0), torch.tensor(0.0)], some()),
            SETTINGS | VARIANTS["blended"],
        ),
    }


@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_opcheck(name: str) -> None:
    arguments, options = samples()[name]
    torch.library.opcheck(schema.overload(name, "triton"), arguments, options)
