"""What can be known of the CUDA kernels without a GPU: that they compile, to what, and the indices.

Their arithmetic is csrc/math.h, which the tests of the CPU kernels run.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from benchmarks import kernel_report
from benchmarks.kernel_report import FLOORS, ROOT, Kernel
from sap_fast.ops.schema import SCHEMAS

HERE = Path(__file__).parent
CUDA = ROOT / "csrc" / "cuda"

needs_nvcc = pytest.mark.skipif(
    kernel_report.nvcc() is None, reason="needs nvcc: not on PATH nor in CUDA_HOME"
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++: not on PATH")

#: Fused multiply-adds per element where math.h asks for them; nowhere else are there any.
FUSED = {
    "SumSquares": 1,
    "Dot": 1,
    "AdamW": 2,
    "AdamW with direction": 2,
    "UnitSquares": 1,
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((90,), id="sm_90"),
        # Half a minute more for what differs in nothing that the tests look at, so far.
        pytest.param(kernel_report.ARCHITECTURES, id="all", marks=pytest.mark.slow),
    ],
)
def kernels(request: pytest.FixtureRequest) -> list[Kernel]:
    """Every kernel for sm_90, or for sm_80 and sm_100 too; a warning of a compiler is an error."""
    return kernel_report.compile_sources(request.param)


def label(kernel: Kernel) -> str:
    variant = f", {kernel.variant}" if kernel.variant else ""
    return f"{kernel.name} ({kernel.dtype}{variant}) for sm_{kernel.architecture}"


def streaming(kernels: list[Kernel]) -> list[Kernel]:
    """Those with a main path of wide accesses; packs of 1 are what unaligned matrices take."""
    return [k for k in kernels if k.name in FLOORS and "packs of 1" not in k.variant]


@needs_nvcc
def test_every_kernel_compiles_for_every_architecture_without_spills(kernels: list[Kernel]) -> None:
    found: dict[int, set[tuple[str, ...]]] = {}
    for kernel in kernels:
        kinds = found.setdefault(kernel.architecture, set())
        kinds.add((kernel.name, kernel.dtype, kernel.variant))
    assert found.keys() in ({90}, set(kernel_report.ARCHITECTURES))
    assert all(kinds == found[90] for kinds in found.values())
    names = {kernel.name for kernel in kernels}
    assert names == FLOORS.keys() | kernel_report.OPERATIONS.keys()
    for name in ("PerturbSwap", "Reflect", "RestoreSwap", "AdamW", "Dot", "sum_rows"):
        assert {k.dtype for k in kernels if k.name == name} == {"fp32", "bf16", "fp16"}
    assert [label(kernel) for kernel in kernels if kernel.spills] == []
    # 64 registers still let four of these blocks of 256 run on a multiprocessor.
    assert [label(kernel) for kernel in kernels if kernel.registers > 64] == []


@needs_nvcc
def test_list_kernels_come_with_both_sizes_of_arguments(kernels: list[Kernel]) -> None:
    sizes: dict[tuple[str, str, int], set[int]] = {}
    for kernel in kernels:
        arguments = re.findall(r"\.param [^\[\n]*?\.[bfus](\d+) \w+(?:\[(\d+)\])?", kernel.ptx)
        total = sum(int(bits) // 8 * int(count or 1) for bits, count in arguments)
        if "arguments" in kernel.variant:
            limit = 4096 if "4096" in kernel.variant else 32764
            assert 0.97 * limit - 192 < total <= limit, label(kernel)
            key = (kernel.name + kernel.variant.split("bytes")[1], kernel.dtype)
            sizes.setdefault((*key, kernel.architecture), set()).add(limit)
        else:
            assert total < 200, label(kernel)
    assert set(map(frozenset, sizes.values())) == {frozenset({4096, 32764})}


@needs_nvcc
def test_the_main_path_moves_128_bits_at_a_time_and_nothing_twice(kernels: list[Kernel]) -> None:
    for kernel in streaming(kernels):
        loop = kernel_report.main_loop(kernel.ptx)
        assert {access.bytes for access in loop.accesses} == {16}, label(kernel)
        floor = FLOORS[kernel.name][1 if kernel.dtype == "fp32" else 2]
        assert kernel_report.bytes_per_element(kernel) == floor, label(kernel)


@needs_nvcc
def test_products_and_sums_are_fused_only_by_multiply_add(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        fused = len(re.findall(r"\bfma\.\w+\.f32\b", kernel.ptx))
        if kernel.name not in FUSED:
            assert fused == 0, label(kernel)
            continue
        loop = kernel_report.main_loop(kernel.ptx)
        moved = kernel_report.bytes_per_element(kernel)
        assert moved is not None, label(kernel)
        elements = sum(access.bytes for access in loop.accesses) / moved
        fused_in_loop = len(re.findall(r"\bfma\.rn\.f32\b", loop.text))
        assert fused_in_loop == FUSED[kernel.name] * elements, label(kernel)


@needs_nvcc
def test_arithmetic_is_rounded_as_ieee_and_order_is_fixed(kernels: list[Kernel]) -> None:
    for kernel in kernels:
        assert not re.search(r"\.(approx|full|ftz)[\w.]*\.f32\b", kernel.ptx), label(kernel)
        assert not re.search(r"(?<![\w.])(atom|red)\.", kernel.ptx), label(kernel)
        if kernel.name.startswith("AdamW"):
            assert "div.rn.f32" in kernel.ptx and "sqrt.rn.f32" in kernel.ptx, label(kernel)


# ---- sources ----


def test_kernels_include_no_header_of_torch() -> None:
    files = [path for path in CUDA.iterdir() if path.suffix in (".cu", ".cuh", ".h")]
    # check.h and stable.h are for the bindings.
    bindings = {"check.h", "stable.h"}
    shared = [path for path in (ROOT / "csrc").glob("*.h") if path.name not in bindings]
    assert len(files) >= 9 and len(shared) >= 3
    for path in files + shared:
        included = re.findall(r'#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"))
        assert not [name for name in included if re.match(r"(\.\./)*(torch|ATen|c10)\b", name)]
        assert not {Path(name).name for name in included} & bindings, path


def test_bindings_include_no_header_of_torch_but_those_of_its_stable_abi() -> None:
    found: set[str] = set()
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        found |= set(re.findall(r"#\s*include\s*<((?:torch|ATen|c10)/[^>]+)>", text))
    assert found == {
        "torch/csrc/inductor/aoti_torch/c/shim.h",
        "torch/csrc/stable/library.h",
    }


def test_the_binding_has_every_operation() -> None:
    text = (CUDA / "ops.cpp").read_text(encoding="utf-8")
    assert "STABLE_TORCH_LIBRARY_IMPL(sap_fast, CUDA, m)" in text
    assert sorted(re.findall(r'm\.impl\("(\w+)\.native"', text)) == sorted(SCHEMAS)


def cuda_include() -> Path:
    """Where nvcc finds the headers of the CUDA runtime."""
    compiler = kernel_report.nvcc()
    assert compiler is not None
    done = subprocess.run(
        [compiler, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"],
        capture_output=True,
        text=True,
    )
    top = re.search(r"^#\$ TOP=(.*)$", done.stderr, re.M)
    folder = Path(top[1].strip(), "include") if top else Path(compiler).parent.parent / "include"
    if not (folder / "cuda_runtime_api.h").exists():
        pytest.skip(f"needs cuda_runtime_api.h: not in {folder}")
    return folder


def compile_host(*arguments: str) -> None:
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


@needs_nvcc
@needs_compiler
def test_a_launch_that_fails_after_others_leaves_weights_and_versions_true(tmp_path: Path) -> None:
    """The binding, compiled, with its kernels on the host and its tensors on the CPU."""
    library = tmp_path / "emulated.so"
    folders = [*cpp_extension.include_paths(), str(cuda_include())]
    options = [argument for folder in folders for argument in ("-isystem", folder)]
    options += ["-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wshadow", "-Werror"]
    # As setup.py: functions of CUDA, and none that torch 2.10 lacks.
    options += ["-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={2 << 56 | 10 << 48:#x}"]
    torch_library = [*(f"-L{folder}" for folder in cpp_extension.library_paths()), "-ltorch_cpu"]
    compile_host(*options, str(HERE / "emulated_cuda.cpp"), *torch_library, "-o", str(library))
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.failing_launches", str(library)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "no launch fails unnoticed\n"), done.stderr


# ---- index arithmetic ----

TABLES = r"""
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "tensor_table.h"

using namespace sap_fast;
using namespace sap_fast::cuda;

#define CHECK(condition) \
  if (!(condition)) { std::printf("line %d: %s\n", __LINE__, #condition); std::exit(1); }

void* address(int operand, int64_t tensor) {
  return reinterpret_cast<void*>(static_cast<uintptr_t>(16 + 16 * tensor + operand));
}

// The tables of a list against the plan of the same list; returns their number.
template <int kArguments, int kOperands>
int compare(const std::vector<int64_t>& sizes) {
  using Table = TensorTable<kOperands, kArguments>;
  static_assert(sizeof(Table) + kOtherArguments <= kArguments);
  static_assert(sizeof(Table) + kOtherArguments + 2 * Table::kBytesOfTensor + 8 > kArguments);
  const auto tensors = static_cast<int64_t>(sizes.size());
  std::vector<void*> addresses[kOperands];
  TensorLists<kOperands> lists{tensors, sizes.data(), {}};
  for (int operand = 0; operand < kOperands; ++operand) {
    for (int64_t i = 0; i < tensors; ++i) addresses[operand].push_back(address(operand, i));
    lists.addresses[operand] = addresses[operand].data();
  }
  const std::vector<Chunk> plan = plan_chunks(sizes.data(), tensors, kChunkSize);
  size_t next = 0;
  int tables = 0;
  int64_t tensors_seen = 0;
  const cudaError_t error = for_each_table<kArguments>(lists, [&](const Table& table) {
    ++tables;
    CHECK(table.tensors_before == tensors_seen);
    CHECK(table.chunks_before == static_cast<int64_t>(next));
    tensors_seen += table.tensors;
    for (int32_t index = 0; index < table.chunks; ++index, ++next) {
      const Chunk chunk = table.find(index);
      CHECK(next < plan.size());
      CHECK(chunk.tensor >= 0 && chunk.tensor < table.tensors);
      CHECK(table.tensors_before + chunk.tensor == plan[next].tensor);
      CHECK(chunk.offset == plan[next].offset);
      CHECK(chunk.size == plan[next].size);
      for (int operand = 0; operand < kOperands; ++operand) {
        CHECK(table.addresses[operand][chunk.tensor] == address(operand, plan[next].tensor));
      }
    }
    return cudaSuccess;
  });
  CHECK(error == cudaSuccess);
  CHECK(next == plan.size());
  CHECK(tensors_seen == tensors);
  return tables;
}

void compare_all(const std::vector<int64_t>& sizes) {
  compare<kSmallArguments, 1>(sizes);
  compare<kSmallArguments, 2>(sizes);
  compare<kSmallArguments, 5>(sizes);
  compare<kLargeArguments, 1>(sizes);
  compare<kLargeArguments, 2>(sizes);
  compare<kLargeArguments, 5>(sizes);
}

int main() {
  const int64_t two31 = int64_t{1} << 31;
  compare_all({});
  compare_all({0, 0, 0});
  compare_all({1});
  compare_all({0, kChunkSize - 1, 0, 0, kChunkSize, kChunkSize + 1, 0});
  // 137 billion elements.
  compare_all({3, two31 - 1, two31 + 5, 0, 64 * two31 + kChunkSize, 1});
  std::vector<int64_t> many;
  for (int64_t i = 0; i < 5000; ++i) many.push_back(i * 7919 % 50000 * (i % 11 != 0));
  compare_all(many);
  // 2,000 tensors of a LoRA take few launches.
  const std::vector<int64_t> lora(2000, 8 * 4096);
  CHECK((compare<kLargeArguments, 2>(lora) == 2));
  CHECK((compare<kLargeArguments, 4>(lora) == 3));
  CHECK((compare<kSmallArguments, 2>(lora) < 17));

  // As many chunks as a grid has blocks, and no more; nothing is skipped silently.
  const int64_t half = int64_t{1} << 30;
  const std::vector<int64_t> huge{half * kChunkSize, (half - 1) * kChunkSize, 1,
                                  kMaxBlocks * kChunkSize};
  void* const pointers[4] = {};
  int64_t chunks[3] = {}, tensors[3] = {};
  int tables = 0;
  TensorLists<1> lists{4, huge.data(), {pointers}};
  CHECK(for_each_table<kSmallArguments>(lists, [&](const auto& table) {
    CHECK(tables < 3);
    const Chunk last = table.find(table.chunks - 1);
    CHECK(last.offset + last.size == table.sizes[last.tensor]);
    chunks[tables] = table.chunks;
    tensors[tables++] = table.tensors;
    return cudaSuccess;
  }) == cudaSuccess);
  CHECK(tables == 3 && tensors[0] == 2 && tensors[1] == 1 && tensors[2] == 1);
  CHECK(chunks[0] == kMaxBlocks && chunks[1] == 1 && chunks[2] == kMaxBlocks);
  const std::vector<int64_t> beyond{1, kMaxBlocks * kChunkSize + 1};
  lists = {2, beyond.data(), {pointers}};
  CHECK(for_each_table<kSmallArguments>(lists, [](const auto&) { return cudaSuccess; }) ==
        cudaErrorInvalidValue);
  // The first error ends it; what went before is counted.
  int calls = 0;
  const auto fail = [&](const auto&) { return ++calls == 2 ? cudaErrorUnknown : cudaSuccess; };
  lists = {4, huge.data(), {pointers}};
  int64_t done = 5;
  CHECK(for_each_table<kSmallArguments>(lists, fail, &done) == cudaErrorUnknown);
  CHECK(calls == 2 && done == 5 + 2);
  std::puts("all tables are right");
}
"""


@needs_nvcc
@needs_compiler
def test_blocks_find_every_chunk_of_the_plan_once(tmp_path: Path) -> None:
    source, program = tmp_path / "tables.cpp", tmp_path / "tables"
    source.write_text(TABLES)
    options = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fsanitize=undefined"]
    options += ["-fno-sanitize-recover=all", f"-I{CUDA}", "-isystem", str(cuda_include())]
    compile_host(*options, str(source), "-o", str(program))
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all tables are right\n"), done.stderr
