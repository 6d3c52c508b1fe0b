// The module sap_fast._C: how the extension was built, what this CPU has, and the chunk planner.
// It does not touch PyTorch, so that it can be asked before the operators are loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/kernels.h"
#include "multi_tensor.h"

namespace py = pybind11;

namespace {

// The macros are set by setup.py.
py::dict build_info() {
  py::dict info;
  info["torch"] = SAP_FAST_TORCH_VERSION;
  info["oldest_torch"] = SAP_FAST_OLDEST_TORCH;
  info["schemas"] = SAP_FAST_SCHEMAS;
  info["compiler"] = SAP_FAST_COMPILER;
  info["flags"] = SAP_FAST_FLAGS;
  info["left_out"] = SAP_FAST_LEFT_OUT;
  info["cuda"] = SAP_FAST_CUDA_VERSION;
  info["cuda_architectures"] = SAP_FAST_CUDA_ARCHITECTURES;
  info["cuda_problem"] = SAP_FAST_CUDA_PROBLEM;
  info["cuda_failed"] = SAP_FAST_CUDA_FAILED;
  return info;
}

std::string cpu_capability() {
  const char* problem = nullptr;
  const sap_fast::Kernels* const kernels = sap_fast::cpu_kernels(&problem);
  if (kernels == nullptr) {
    throw std::invalid_argument(std::string("SAP_FAST_CPU_CAPABILITY ") + problem);
  }
  return kernels->name;
}

std::vector<std::tuple<int64_t, int64_t, int64_t>> plan_chunks(const std::vector<int64_t>& sizes,
                                                               int32_t chunk_size) {
  if (chunk_size < 1) {
    throw std::invalid_argument("chunk_size=" + std::to_string(chunk_size) + "; give at least 1");
  }
  std::vector<std::tuple<int64_t, int64_t, int64_t>> result;
  const auto count = static_cast<int64_t>(sizes.size());
  for (const auto& chunk : sap_fast::plan_chunks(sizes.data(), count, chunk_size)) {
    result.emplace_back(chunk.tensor, chunk.offset, chunk.size);
  }
  return result;
}

std::vector<int64_t> share_chunks(const std::vector<int64_t>& sizes, int32_t chunk_size,
                                  int64_t workers) {
  if (chunk_size < 1 || workers < 1) {
    throw std::invalid_argument("chunk_size and workers must be at least 1");
  }
  const auto count = static_cast<int64_t>(sizes.size());
  return sap_fast::share_chunks(sap_fast::plan_chunks(sizes.data(), count, chunk_size), workers);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build information, CPU capability and chunk planner of sap_fast's kernels.";
  module.def("build_info", &build_info,
             "What the extension was built with: torch, oldest_torch (that it runs with), schemas "
             "(their digest), compiler, flags, left_out (instruction sets that did not compile), "
             "cuda (empty: without), cuda_architectures, cuda_problem (why without), cuda_failed "
             "(not empty: nvcc was there, and it did not work).");
  module.def("cpu_capability", &cpu_capability,
             "The instruction set whose kernels run: baseline, avx2 or avx512. Raises ValueError "
             "if SAP_FAST_CPU_CAPABILITY asks for one that cannot run.");
  module.def("plan_chunks", &plan_chunks, py::arg("sizes"), py::arg("chunk_size"),
             "Cut tensors of these numbers of elements into chunks (tensor, offset, size).");
  module.def("share_chunks", &share_chunks, py::arg("sizes"), py::arg("chunk_size"),
             py::arg("workers"), "The first chunk of each worker, and the number of chunks.");
}
