// Queueing kernels.
#pragma once

#include <cuda_runtime.h>

#include "memory.cuh"

namespace sap_fast::cuda {

// Returns the error of this launch, not of an earlier one.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Whether the current device takes kLargeArguments.
inline cudaError_t takes_large_arguments(bool* result) {
  *result = false;
#if CUDART_VERSION >= 12010
  int driver = 0;
  cudaError_t error = cudaDriverGetVersion(&driver);
  if (error != cudaSuccess) return error;
  int device = 0;
  error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  int major = 0;
  error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error != cudaSuccess) return error;
  *result = driver >= 12010 && major >= 7;
#endif
  return cudaSuccess;
}

// Calls body(table) for tables of `lists`, of the smallest size that needs the fewest launches.
// `done`: see for_each_table.
template <int kOperands, class Body>
cudaError_t with_tables(const TensorLists<kOperands>& lists, const Body& body,
                        int64_t* done = nullptr) {
#if CUDART_VERSION >= 12010
  if (lists.tensors > TensorTable<kOperands, kSmallArguments>::kCapacity) {
    bool large = false;
    const cudaError_t error = takes_large_arguments(&large);
    if (error != cudaSuccess) return error;
    if (large) return for_each_table<kLargeArguments>(lists, body, done);
  }
#endif
  return for_each_table<kSmallArguments>(lists, body, done);
}

template <class Table, class... Others>
constexpr bool kFits = sizeof(Table) + kOtherArguments <=
                           (sizeof(Table) <= kSmallArguments ? kSmallArguments : kLargeArguments) &&
                       (sizeof(Others) + ... + 0) <= kOtherArguments;

template <class Operation, int kOperands>
cudaError_t launch_transform(const TensorLists<kOperands>& lists, const Operation& operation,
                             cudaStream_t stream, int64_t* written) {
  const auto launch_table = [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    static_assert(kFits<Table, Operation>);
    if (table.chunks == 0) return cudaSuccess;
    return launch(&transform<Operation, Table>, dim3(static_cast<unsigned>(table.chunks)),
                  dim3(kThreads), stream, table, operation);
  };
  return with_tables(lists, launch_table, written);
}

// Calls body(element), a value of the type that `storage` names.
template <class Body>
cudaError_t with_storage(Storage storage, const Body& body) {
  switch (storage) {
    case Storage::kFloat32:
      return body(float{});
    case Storage::kBFloat16:
      return body(__nv_bfloat16{});
    case Storage::kFloat16:
      return body(__half{});
  }
  return cudaErrorInvalidValue;
}

}  // namespace sap_fast::cuda
