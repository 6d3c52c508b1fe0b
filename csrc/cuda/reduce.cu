// dot and sum_squares.
#include "reduction.cuh"

namespace sap_fast::cuda {
namespace {

template <class Stored>
struct Dot {
  using Set = Operands<const Stored, const Stored>;
  using Combination = Sum;
  static constexpr int kUnroll = 2;

  struct Element {
    __device__ __forceinline__ float add(float sum, const Stored& left, const Stored& right) const {
      return multiply_add(widen(left), widen(right), sum);
    }
  };

  __device__ __forceinline__ Element prepare(int64_t) const { return {}; }
};

template <class Stored>
struct SumSquares {
  using Set = Operands<const Stored>;
  using Combination = Sum;
  static constexpr int kUnroll = 4;

  struct Element {
    __device__ __forceinline__ float add(float sum, const Stored& value) const {
      return multiply_add(widen(value), widen(value), sum);
    }
  };

  __device__ __forceinline__ Element prepare(int64_t) const { return {}; }
};

constexpr int kThreadsOfLastStage = 1024;

// In double: there may be hundreds of thousands of partial sums.
__global__ void __launch_bounds__(kThreadsOfLastStage)
    add_up_kernel(const float* __restrict__ partial_sums, int64_t count, float* __restrict__ out) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < count; i += kThreadsOfLastStage) sum += partial_sums[i];
  sum = reduce_block<Sum, kThreadsOfLastStage>(sum);
  if (threadIdx.x == 0) *out = static_cast<float>(sum);
}

}  // namespace

int64_t count_chunks(int64_t tensors, const int64_t* sizes) {
  int64_t count = 0;
  for (int64_t index = 0; index < tensors; ++index) count += chunks_of(sizes[index]);
  return count;
}

cudaError_t dot(Storage storage, const TensorLists<2>& left_right, float* partial_sums,
                cudaStream_t stream) {
  return with_storage(storage, [&](auto element) {
    return launch_reduction(left_right, Dot<decltype(element)>{}, partial_sums, stream);
  });
}

cudaError_t sum_squares(Storage storage, const TensorLists<1>& tensors, float* partial_sums,
                        cudaStream_t stream) {
  return with_storage(storage, [&](auto element) {
    return launch_reduction(tensors, SumSquares<decltype(element)>{}, partial_sums, stream);
  });
}

cudaError_t add_up(const float* partial_sums, int64_t count, float* out, cudaStream_t stream) {
  return launch(&add_up_kernel, dim3(1), dim3(kThreadsOfLastStage), stream, partial_sums, count,
                out);
}

}  // namespace sap_fast::cuda
