// csrc/cuda/ops.cpp for tensors of the CPU: its kernels on the host, and the little of CUDA and of
// PyTorch's CUDA library that it asks for. Tables are those of the device, each is a launch, and a
// launch can be made to fail.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>

// Devices of CUDA are the CPU.
#define aoti_torch_device_type_cuda aoti_torch_device_type_cpu
#define CUDA CPU

#include "../../csrc/cuda/ops.cpp"
#include "../../csrc/cuda/tensor_table.h"

namespace {

int64_t launches_left = -1;  // before one fails; below zero none does
int64_t failures_left = 0;
int64_t launched = 0;

cudaError_t launch() {
  if (launches_left == 0) {
    if (--failures_left == 0) launches_left = -1;
    return cudaErrorMemoryAllocation;
  }
  --launches_left;
  ++launched;
  return cudaSuccess;
}

}  // namespace

extern "C" {

// Lets `count` launches succeed and the next `failures` fail; returns how many there were since the
// last call.
int64_t sap_fast_fail_after(int64_t count, int64_t failures) {
  const int64_t before = launched;
  launches_left = count;
  failures_left = failures;
  launched = 0;
  return before;
}

const char* cudaGetErrorName(cudaError_t) { return "cudaErrorMemoryAllocation"; }
const char* cudaGetErrorString(cudaError_t) { return "out of memory"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }

AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return 0; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

}  // extern "C"

namespace sap_fast::cuda {
namespace {

float value_of(const Scalar& scalar) { return static_cast<float>(scalar.value); }

struct BFloat16 {
  uint16_t bits;
};

float widen(float value) { return value; }
float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float wide;
  memcpy(&wide, &bits, sizeof wide);
  return wide;
}

void narrow(float value, float* stored) { *stored = value; }
void narrow(float value, BFloat16* stored) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  stored->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Calls body(parameter, buffer) for every element of every table whose launch succeeds.
template <class Stored, class Body>
cudaError_t for_each_pair(const TensorLists<2>& lists, int64_t* written, const Body& body) {
  const auto launch_table = [&](const auto& table) {
    const cudaError_t error = launch();
    if (error != cudaSuccess) return error;
    for (int32_t index = 0; index < table.chunks; ++index) {
      const Chunk chunk = table.find(index);
      auto* const params = static_cast<Stored*>(table.addresses[0][chunk.tensor]) + chunk.offset;
      auto* const buffers = static_cast<Stored*>(table.addresses[1][chunk.tensor]) + chunk.offset;
      for (int32_t i = 0; i < chunk.size; ++i) body(params[i], buffers[i]);
    }
    return cudaSuccess;
  };
  return for_each_table<kSmallArguments>(lists, launch_table, written);
}

template <class Body>
cudaError_t with_storage(Storage storage, const TensorLists<2>& lists, int64_t* written,
                         const Body& body) {
  return storage == Storage::kFloat32    ? for_each_pair<float>(lists, written, body)
         : storage == Storage::kBFloat16 ? for_each_pair<BFloat16>(lists, written, body)
                                         : cudaErrorNotSupported;
}

// Counts the steps in one launch, and lowers every parameter by lr in one for each table.
template <int kOperands>
cudaError_t update(const TensorLists<kOperands>& operands, void* const* steps,
                   const AdamWOptions& options, AdamWWritten* written) {
  cudaError_t error = launch();
  if (error != cudaSuccess) return error;
  for (int64_t index = 0; index < operands.tensors; ++index)
    *static_cast<float*>(steps[index]) += 1;
  written->steps += operands.tensors;
  const TensorLists<2> pairs{
      operands.tensors, operands.sizes, {operands.addresses[0], operands.addresses[1]}};
  return for_each_pair<float>(pairs, &written->params,
                              [&](float& parameter, float&) { parameter -= value_of(options.lr); });
}

}  // namespace

cudaError_t perturb_swap(Storage storage, const TensorLists<2>& lists, Scalar scale, cudaStream_t,
                         int64_t* written) {
  return with_storage(storage, lists, written, [&](auto& parameter, auto& buffer) {
    const auto old = parameter;
    narrow(perturb(widen(old), widen(buffer), value_of(scale)), &parameter);
    buffer = old;
  });
}

cudaError_t reflect(Storage storage, const TensorLists<2>& lists, cudaStream_t, int64_t* written) {
  return with_storage(storage, lists, written, [&](auto& parameter, auto& buffer) {
    narrow(sap_fast::reflect(widen(parameter), widen(buffer)), &parameter);
  });
}

cudaError_t restore_swap(Storage storage, const TensorLists<2>& lists, Scalar inverse_scale,
                         cudaStream_t, int64_t* written) {
  return with_storage(storage, lists, written, [&](auto& parameter, auto& buffer) {
    const auto old = buffer;
    narrow(recover_gradient(widen(parameter), widen(old), value_of(inverse_scale)), &buffer);
    parameter = old;
  });
}

int64_t adamw_blend_scratch(int64_t) { return 0; }

cudaError_t adamw_blend(Storage, const TensorLists<4>& operands, void* const* steps,
                        const AdamWOptions& options, void*, cudaStream_t, AdamWWritten* written) {
  return update(operands, steps, options, written);
}

cudaError_t adamw_blend(Storage, const TensorLists<5>& operands, void* const* steps,
                        const AdamWOptions& options, void*, cudaStream_t, AdamWWritten* written) {
  return update(operands, steps, options, written);
}

int64_t probe_project_scratch(int64_t, int64_t) { return 0; }

cudaError_t probe_project(Storage, float*, const void*, int64_t, int64_t, float, void*,
                          cudaStream_t) {
  return launch();
}

// What the test does not run.
int64_t count_chunks(int64_t, const int64_t*) { return 0; }
cudaError_t dot(Storage, const TensorLists<2>&, float*, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t sum_squares(Storage, const TensorLists<1>&, float*, cudaStream_t) {
  return cudaErrorNotSupported;
}
cudaError_t add_up(const float*, int64_t, float*, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t probe_add(Storage, void*, const void*, const float*, int64_t, int64_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
int64_t probe_rule_scratch(int64_t, const int64_t*) { return 0; }
cudaError_t probe_rule(const TensorLists<2>&, Rule, float, Scalar, bool*, void*, cudaStream_t,
                       int64_t*) {
  return cudaErrorNotSupported;
}

}  // namespace sap_fast::cuda
