"""What the Triton kernels compile to, read from the assembly; no GPU is needed."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sap_fast.ops import triton as backend
from sap_fast.ops.schema import SCHEMAS

pytest.importorskip("triton")
if backend.interpreted:
    pytest.skip("needs compiled kernels, not TRITON_INTERPRET=1", allow_module_level=True)

import triton

from sap_fast.ops.triton import adamw, ahead_of_time, perturb, probe, table

THREADS = 32 * table.OPTIONS["num_warps"]
NVIDIA = [name for name, target in ahead_of_time.TARGETS.items() if target.backend == "cuda"]
SIZES = {"fp32": 4, "bf16": 2, "fp16": 2}


@functools.cache
def compiled(target: str) -> dict[ahead_of_time.Name, ahead_of_time.Compiled]:
    return ahead_of_time.compile_all(ahead_of_time.TARGETS[target])


def count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.MULTILINE))


def streams(size: int) -> dict[tuple[str, str, str], tuple[int, int, int]]:
    """Per kernel: elements per program, and bytes read and written per element, of `size` bytes."""
    return {
        ("perturb_swap_", "", "perturb_swap"): (perturb.BLOCK, 2 * size, 2 * size),
        ("reflect_", "", "reflect"): (perturb.BLOCK, 2 * size, size),
        ("restore_swap_", "", "restore_swap"): (perturb.BLOCK, 2 * size, 2 * size),
        ("sum_squares", "", "sum_products"): (perturb.SUM_BLOCK, size, 0),
        ("dot", "", "sum_products"): (perturb.SUM_BLOCK, 2 * size, 0),
        ("adamw_blend_", "", "adamw_blend"): (adamw.BLOCK, 2 * size + 8, size + 8),
        ("adamw_blend_", "blended", "adamw_blend"): (adamw.BLOCK, 3 * size + 8, size + 8),
        ("probe_add", "", "add"): (probe.BLOCK, size + 4, size),
        ("probe_project_", "", "column_sums"): (probe.ROW_BLOCK * probe.COLUMN_BLOCK, size, 0),
    }


def test_every_kernel_is_compiled() -> None:
    written = {
        name
        for module in (adamw, perturb, probe)
        for name, value in vars(module).items()
        if name.endswith("_kernel") and isinstance(value, triton.JITFunction)
    }
    assert {kernel.function.__name__ for kernel in compiled("sm_90").values()} == written
    for dtype in SIZES:
        for key in streams(0):
            assert ahead_of_time.Name(*key, dtype) in compiled("sm_90")
    assert {name.operation for name in compiled("sm_90")} == SCHEMAS.keys()


@pytest.mark.parametrize("target", NVIDIA)
def test_the_main_path_moves_every_byte_once_128_bits_at_a_time(target: str) -> None:
    for dtype, size in SIZES.items():
        for key, (block, read, written) in streams(size).items():
            ptx = compiled(target)[ahead_of_time.Name(*key, dtype)].ptx
            for operation, wanted in (("ld", read), ("st", written)):
                wide = count(rf"\b{operation}\.global[.\w:]*\.v4\.b32", ptx)
                assert wide * 16 * THREADS == wanted * block, (key, dtype, operation, wide)
    for rule in probe.RULES:
        ptx = compiled(target)[ahead_of_time.Name("probe_rule_", rule, "rule", "fp32")].ptx
        assert count(r"\bld\.global[.\w:]*\.v4", ptx) == count(r"\bst\.global[.\w:]*\.v4", ptx) == 2


@pytest.mark.parametrize("target", NVIDIA)
def test_no_fp64_no_spills_and_no_inexact_arithmetic(target: str) -> None:
    for name, kernel in compiled(target).items():
        resources = kernel.resources()
        assert (resources.stack, resources.local) == (0, 0), (name, resources)
        # Four programs of 128 threads fit on a multiprocessor.
        assert resources.registers <= 128, (name, resources)
        for pattern in (r"\.f64", r"\.ftz", r"\.approx", r"div\.full", r"cvt\.rz"):
            assert not count(pattern, kernel.ptx), (name, pattern)
        assert not count(r"\b(?:atom|red)\.", kernel.ptx), name


@pytest.mark.parametrize("target", NVIDIA)
def test_products_are_fused_with_sums_in_adamw_alone(target: str) -> None:
    for name, kernel in compiled(target).items():
        # sm_100 computes two at a time.
        fused = count(r"\bfma\.rn\.f32", kernel.ptx) + count(r"\bfma\.rn\.f32x2", kernel.ptx)
        if name.kernel == "adamw_blend":
            # Two of each element, on the main path and on the masked one.
            assert fused * THREADS == 2 * (adamw.BLOCK + table.TAIL.value), name
        else:
            assert fused == 0, name
        if name.kernel in ("perturb_swap", "reflect", "restore_swap") and name.dtype == "fp32":
            assert not count("FFMA", kernel.sass()), name


@pytest.mark.parametrize("target", NVIDIA)
def test_results_are_rounded_to_nearest(target: str) -> None:
    for dtype, stored in (("bf16", "bf16"), ("fp16", "f16")):
        for operation, variant, kernel in streams(0):
            if operation not in ("sum_squares", "dot", "probe_project_"):
                name = ahead_of_time.Name(operation, variant, kernel, dtype)
                assert count(rf"cvt\.rn\.{stored}", compiled(target)[name].ptx), name
    ptx = compiled(target)[ahead_of_time.Name("adamw_blend_", "", "adamw_blend", "fp32")].ptx
    assert count(r"div\.rn\.f32", ptx) and count(r"sqrt\.rn\.f32", ptx)


def test_kernels_compile_for_amd() -> None:
    for name, kernel in compiled("gfx942").items():
        assembly = kernel.binary.asm["amdgcn"]
        assert count(r"\.vgpr_spill_count:\s+0$", assembly) == 1, name
        assert count(r"\.private_segment_fixed_size:\s+0$", assembly) == 1, name
        assert not count(r"_f64\b", assembly), name
        if (name.operation, name.variant, name.kernel) in streams(0):
            assert count(r"_load_dwordx4", assembly), name


def test_launches_are_of_the_kernels_that_are_compiled_ahead_of_time() -> None:
    known = {kernel.specialisation for kernel in compiled("sm_90").values()}
    one = torch.tensor(0.5)

    def some(dtype: torch.dtype) -> list[Tensor]:
        return [torch.randn(3, 5).to(dtype), torch.randn(7000).to(dtype)]

    # Tensors of several sizes, and scalars that may lie anywhere.
    calls: list[Callable[[torch.dtype], object]] = [
        lambda dtype: perturb.sum_squares(some(dtype)),
        lambda dtype: perturb.dot(some(dtype), some(dtype)),
        lambda dtype: perturb.perturb_swap_(some(dtype), some(dtype), torch.randn(3)[1]),
        lambda dtype: perturb.reflect_(some(dtype), some(dtype)),
        lambda dtype: perturb.restore_swap_(some(dtype), some(dtype), torch.randn(3)[1]),
        lambda dtype: probe.probe_add(torch.randn(4, 64).to(dtype), torch.randn(64)),
        lambda dtype: probe.probe_project_(torch.zeros(64), torch.randn(32, 64).to(dtype), -1.0),
        lambda dtype: probe.probe_project_(torch.zeros(64), torch.randn(1600, 64).to(dtype), 1.0),
    ]
    for rule in probe.RULES:
        calls.append(
            lambda _, rule=rule: probe.probe_rule_(
                [torch.randn(15), torch.randn(7000)], rule, 0.1, torch.randn(3)[1], [one, one]
            )
        )
    for blend, gradient_scale in ((None, None), torch.rand(2).unbind()):
        calls.append(
            lambda dtype, b=blend, g=gradient_scale: adamw.adamw_blend_(
                some(dtype),
                some(dtype),
                some(torch.float32),
                some(torch.float32),
                list(torch.zeros(2).unbind()),
                some(dtype),
                lr=one,
                beta1=0.9,
                beta2=0.999,
                eps=1e-8,
                weight_decay=0.1,
                maximize=True,
                blend=b,
                gradient_scale=g,
            )
        )
    with ahead_of_time.compiled_launches(ahead_of_time.TARGETS["sm_90"]) as launched:
        for call in calls:
            for dtype in table.DTYPES:
                call(dtype)
    found = {kernel.specialisation for kernel in launched}
    assert found == known, "\n".join(map(str, found ^ known))
