"""What only the compiled extension has: instruction sets, where it runs, and its chunk planner.

What its operations compute is in `test_ops.py`.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sap_fast import ops
from sap_fast.ops import native
from sap_fast.ops.schema import overload
from tests.ops.tensors import assert_same_bits, mixed, random_tensor

# ---- where it runs ----


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


@pytest.mark.parametrize(
    ("cuda", "capabilities", "reason"),
    [
        ("", [(9, 0)], "without CUDA"),
        ("13.0", [], "no CUDA device"),
        ("13.0", [(9, 0), (7, 5)], "a GPU of 7.5; build them with TORCH_CUDA_ARCH_LIST=7.5"),
        ("13.0", [(8, 6), (12, 0)], None),
    ],
)
def test_cuda_kernels_run_where_they_were_built_for(
    monkeypatch: pytest.MonkeyPatch,
    cuda: str,
    capabilities: list[tuple[int, int]],
    reason: str | None,
) -> None:
    information = {"cuda": cuda, "cuda_architectures": "8.0 9.0 10.0+PTX"}
    extension = SimpleNamespace(build_info=lambda: information)
    monkeypatch.setattr(native, "extension", extension)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    found = native._why_not_cuda.__wrapped__()
    assert found is None if reason is None else reason in found


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.extension is None:
        pytest.skip(native.problem or "")
    monkeypatch.setenv("SAP_FAST_CPU_CAPABILITY", "avx1024")
    with pytest.raises(RuntimeError, match=r"SAP_FAST_CPU_CAPABILITY=avx1024.*baseline"):
        ops.sum_squares([torch.ones(3)], backend="native")


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
