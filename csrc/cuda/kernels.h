// What the CUDA kernels offer to a binding: raw pointers and a stream in, an error code out.
//
// Every function queues its kernels and returns: it neither allocates, nor waits for the device,
// nor copies from it, so that a CUDA graph can capture it. What it needs between two kernels lies
// in `scratch`, which the caller allocates and may free as soon as the stream allows. Arguments are
// taken as checked: operands of one tensor are equally large and lie apart.
//
// A list may take several launches, and one of them may fail. `*written` grows by the number of
// tensors, from the first on, that kernels are queued to write: all of them, unless there is an
// error.
#pragma once

#include <cuda_runtime_api.h>
#include <stdint.h>

#include "../coefficients.h"

namespace sap_fast::cuda {

// What elements are stored as. Arithmetic is in fp32 for all of them.
enum class Storage { kFloat32, kBFloat16, kFloat16 };

enum class Rule { kGradient, kNormalized, kAdam };

// A number that the host knows, or one that the device will know when the kernel runs.
struct Scalar {
  const void* address = nullptr;  // of a float or a double on the device; null: `value`
  bool is_double = false;         // what `address` points to
  double value = 0;
};

// Tensors of one storage type: `sizes` holds numbers of elements, `addresses` one array of device
// addresses for each operand. The arrays lie on the host and are read before the call returns.
template <int kOperands>
struct TensorLists {
  int64_t tensors;
  const int64_t* sizes;
  void* const* addresses[kOperands];
};

// ---- reductions ----
//
// The partial sums of lists of several storage types go side by side into one array of floats, one
// for each chunk; then `add_up` sums that array.

int64_t count_chunks(int64_t tensors, const int64_t* sizes);

cudaError_t dot(Storage storage, const TensorLists<2>& left_right, float* partial_sums,
                cudaStream_t stream);

cudaError_t sum_squares(Storage storage, const TensorLists<1>& tensors, float* partial_sums,
                        cudaStream_t stream);

cudaError_t add_up(const float* partial_sums, int64_t count, float* out, cudaStream_t stream);

// ---- the perturbation ----

cudaError_t perturb_swap(Storage storage, const TensorLists<2>& params_buffers, Scalar scale,
                         cudaStream_t stream, int64_t* written);

cudaError_t reflect(Storage storage, const TensorLists<2>& params_buffers, cudaStream_t stream,
                    int64_t* written);

cudaError_t restore_swap(Storage storage, const TensorLists<2>& params_buffers,
                         Scalar inverse_scale, cudaStream_t stream, int64_t* written);

// ---- the update ----

struct AdamWOptions {
  Scalar lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  bool maximize;
  Scalar blend;           // not read without directions
  Scalar gradient_scale;  // 1: leaves the gradient
};

// Bytes of scratch for `tensors` tensors.
int64_t adamw_blend_scratch(int64_t tensors);

// What adamw_blend is queued to write: counters go first, all other operands after them.
struct AdamWWritten {
  int64_t steps;
  int64_t params;
};

// `steps` holds the addresses of the counters. Operands: params, grads, exp_avgs, exp_avg_sqs.
cudaError_t adamw_blend(Storage storage, const TensorLists<4>& operands, void* const* steps,
                        const AdamWOptions& options, void* scratch, cudaStream_t stream,
                        AdamWWritten* written);

// The same, and `directions` as the fifth operand.
cudaError_t adamw_blend(Storage storage, const TensorLists<5>& operands, void* const* steps,
                        const AdamWOptions& options, void* scratch, cudaStream_t stream,
                        AdamWWritten* written);

// ---- the probe ----

// out = hidden + offset for each of `rows` rows.
cudaError_t probe_add(Storage storage, void* out, const void* hidden, const float* offset,
                      int64_t rows, int64_t columns, cudaStream_t stream);

// Bytes of scratch; may be zero.
int64_t probe_project_scratch(int64_t rows, int64_t columns);

// buffer += sign · Σ_rows gradient.
cudaError_t probe_project(Storage storage, float* buffer, const void* gradient, int64_t rows,
                          int64_t columns, float sign, void* scratch, cudaStream_t stream);

// Bytes of scratch for layers of these sizes.
int64_t probe_rule_scratch(int64_t layers, const int64_t* sizes);

// Operands: the buffers, and the radii (one float each), all fp32. `finite` takes the result.
cudaError_t probe_rule(const TensorLists<2>& buffers_radii, Rule rule, float probe_size,
                       Scalar perturbation_norm, bool* finite, void* scratch, cudaStream_t stream,
                       int64_t* written);

}  // namespace sap_fast::cuda
