"""What only the compiled extension has: instruction sets, where it runs, and its chunk planner.

What its operations compute is in `test_ops.py`.
"""

from __future__ import annotations

import itertools
import logging
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from sap_fast import ops
from sap_fast.ops import native
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
        ops.call("probe_project_", "native", buffer, random_tensor((99, 577), torch.float16), -1.0)
        results.append([*sums, *h, buffer])
    assert len(results) >= 1
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize(
    ("capabilities", "reason"),
    [
        ([], "no CUDA device"),
        ([(9, 0), (7, 5)], "a GPU of 7.5; build them with TORCH_CUDA_ARCH_LIST=7.5"),
        ([(8, 6), (12, 0)], None),
    ],
)
def test_cuda_kernels_run_where_they_were_built_for(
    monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]], reason: str | None
) -> None:
    information = {"cuda": "13.0", "cuda_architectures": "8.0 9.0 10.0+PTX"}
    extension = SimpleNamespace(build_info=lambda: information)
    monkeypatch.setattr(native, "extension", extension)
    monkeypatch.setattr(native, "cuda_problem", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])
    found = native._why_not_cuda.__wrapped__()
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ("cuda", "torch_cuda", "library", "reason"),
    [
        ("", "13.0", None, "built without CUDA: nvcc is ill; to build it, run"),
        ("13.0", None, None, "is no CUDA build"),
        ("13.0", "13.0", None, "_cuda.so: "),
        ("13.0", "13.0", b"no library", "_cuda.so: "),
    ],
    ids=["not built", "torch without CUDA", "no file", "no library"],
)
def test_why_there_are_no_cuda_kernels_is_told_and_the_cpu_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cuda: str,
    torch_cuda: str | None,
    library: bytes | None,
    reason: str,
) -> None:
    information = {"cuda": cuda, "cuda_problem": "nvcc is ill"}
    module = SimpleNamespace(build_info=lambda: information, __file__=str(tmp_path / "_C.so"))
    if library is not None:
        (tmp_path / "_cuda.so").write_bytes(library)
    monkeypatch.setattr(native, "extension", module)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    found = native._load_cuda()
    assert found is not None and reason in found
    monkeypatch.setattr(native, "cuda_problem", found)
    assert native._why_not_cuda.__wrapped__() == found
    assert native.why_not("cpu") == native.problem


def test_an_instruction_set_that_did_not_compile_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    information = {"compiler": "c++ 1", "left_out": "AVX512"}
    module = SimpleNamespace(build_info=lambda: information, cpu_capability=lambda: "avx2")
    monkeypatch.setattr(native, "extension", module)
    wanted = "C++ kernels for avx2, built with c++ 1, which could not compile those for AVX512"
    assert native.describe("cpu") == wanted


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.extension is None:
        pytest.skip(native.problem or "")
    monkeypatch.setenv("SAP_FAST_CPU_CAPABILITY", "avx1024")
    with pytest.raises(RuntimeError, match=r"SAP_FAST_CPU_CAPABILITY=avx1024.*baseline"):
        ops.sum_squares([torch.ones(3)], backend="native")


@pytest.mark.parametrize("failed", [True, False])
def test_the_first_use_says_why_a_gpu_is_not_on_native_kernels(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failed: bool
) -> None:
    monkeypatch.setattr(ops, "_said", set())
    monkeypatch.setattr(ops, "choose_backend", lambda backend, device_type: "triton")
    monkeypatch.setattr(ops.triton, "why_not", lambda device_type: None)
    monkeypatch.setattr(ops.triton, "describe", lambda: "Triton 9")
    monkeypatch.setattr(native, "why_not", lambda device_type: "nvcc is ill")
    monkeypatch.setattr(native, "cuda_failed", failed)
    with caplog.at_level(logging.INFO, logger="sap_fast.ops"):
        for _ in range(2):
            ops.check_backend("auto", ["cuda"])
    (record,) = caplog.records
    said = "sap_fast: cuda runs on triton: Triton 9; not on native: nvcc is ill"
    assert record.getMessage() == said
    assert record.levelno == (logging.WARNING if failed else logging.INFO)


# ---- what the stable ABI leaves to Python ----


def test_an_interrupt_waits_until_the_versions_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.extension is None:
        pytest.skip(native.problem or "")
    params, buffers = [torch.ones(3)], [torch.full((3,), 2.0)]

    def interrupted(tensors: list[torch.Tensor]) -> None:
        signal.raise_signal(signal.SIGINT)
        torch.autograd.graph.increment_version(tensors)

    monkeypatch.setattr(native, "increment_version", interrupted)
    # A shell that runs the tests in the background has them ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            ops.reflect_(params, buffers, backend="native")
    finally:
        signal.signal(signal.SIGINT, before)
    assert params[0].tolist() == [3.0] * 3 and params[0]._version == 1


class Passing(TorchDispatchMode):
    """Runs every operation below autograd, and changes nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_versions_are_counted_once_under_a_dispatch_mode_and_in_inference_mode() -> None:
    if native.extension is None:
        pytest.skip(native.problem or "")
    buffer, gradient = torch.zeros(4), torch.ones(2, 4)
    params = [torch.ones(3)]
    with Passing():
        ops.call("probe_project_", "native", buffer, gradient, 1.0)
        ops.reflect_(params, [torch.ones(3)], backend="native")
    assert buffer._version == 1 and params[0]._version == 1
    with torch.inference_mode():
        buffer, params = torch.zeros(4), [torch.ones(3)]
        ops.call("probe_project_", "native", buffer, gradient, 1.0)
        ops.reflect_(params, [torch.zeros(3)], backend="native")
        assert buffer.tolist() == [2.0] * 4 and params[0].tolist() == [-1.0] * 3


def test_an_error_after_some_were_written_counts_their_versions_and_no_other() -> None:
    def partly(*_: Any) -> None:
        raise RuntimeError("PartlyWritten: 0,2; sap_fast::perturb_swap_ could not be launched")

    params, buffers = ([torch.ones(1) for _ in range(3)] for _ in range(2))
    with pytest.raises(RuntimeError, match=r"^sap_fast::perturb_swap_ could not be launched$"):
        native.run("perturb_swap_", partly, (params, buffers, torch.tensor(1.0)), {})
    assert [tensor._version for tensor in params + buffers] == [1, 0, 1, 0, 0, 0]


def test_what_a_cpu_kernel_refuses_at_the_last_tensor_it_says_before_the_first_is_written() -> None:
    if native.extension is None:
        pytest.skip(native.problem or "")
    params, buffers = ([torch.ones(3), torch.ones(3, dtype=torch.float64)] for _ in range(2))
    with pytest.raises(NotImplementedError, match=r"params\[1\] has dtype torch.float64"):
        ops.perturb_swap_(params, buffers, torch.tensor(0.1), backend="native")
    assert all(tensor._version == 0 and (tensor == 1).all() for tensor in params + buffers)


def test_other_errors_are_no_word_of_what_is_not_supported() -> None:
    if native.extension is None:
        pytest.skip(native.problem or "")
    with pytest.raises(RuntimeError, match=r"^params has 1 tensors, buffers has 2$") as caught:
        ops.reflect_([torch.ones(1)], [torch.ones(1)] * 2, backend="native")
    assert not isinstance(caught.value, NotImplementedError)


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
