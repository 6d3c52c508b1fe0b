// Reductions in a fixed order: a value per chunk, combined by the block that reads the chunk, and
// then those values by one block. No atomics, so two runs give the same bits.
#pragma once

#include "launch.cuh"

namespace sap_fast::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  template <class T>
  static __device__ __forceinline__ T combine(T a, T b) {
    return a + b;
  }
};

// Of values that are not negative and not NaN.
struct Largest {
  static __device__ __forceinline__ float combine(float a, float b) { return maximum(a, b); }
};

// Combines one value per lane. All lanes of the warp take part; lane 0 has the result.
template <class Combination, class T>
__device__ __forceinline__ T reduce_warp(T value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value = Combination::combine(value, __shfl_down_sync(kAllLanes, value, distance));
  }
  return value;
}

// Combines one value per thread; zero changes nothing. All kBlockThreads threads take part, once
// per kernel; thread 0 has the result.
template <class Combination, int kBlockThreads, class T>
__device__ __forceinline__ T reduce_block(T value) {
  constexpr int kWarps = kBlockThreads / kWarpSize;
  static_assert(kBlockThreads % kWarpSize == 0 && kWarps <= kWarpSize);
  __shared__ T of_warps[kWarps];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  value = reduce_warp<Combination>(value);
  if (lane == 0) of_warps[warp] = value;
  __syncthreads();
  if (warp != 0) return value;
  return reduce_warp<Combination>(lane < kWarps ? of_warps[lane] : T{});
}

// First stage: the value of each chunk of the list, in the order of plan_chunks. An operation has
//   Set, kUnroll, Element, prepare  as for `transform`,
//   Combination                     of values, and
//   Element::add(value, elements…)  which takes in one element of each operand.
template <class Operation, class Table>
__global__ void __launch_bounds__(kThreads)
    reduce_chunks(const __grid_constant__ Table table, const __grid_constant__ Operation operation,
                  float* __restrict__ values) {
  using Set = typename Operation::Set;
  using Combination = typename Operation::Combination;
  const Chunk chunk = table.find(static_cast<int32_t>(blockIdx.x));
  const auto element = operation.prepare(table.tensors_before + chunk.tensor);
  const Set set(table, chunk);
  // A chain of its own for each pack on the way: shorter sums round less.
  float chains[Operation::kUnroll] = {};
  for_each_pack<Set::kWidth, Operation::kUnroll>(
      chunk.size, set.aligned(), [&](auto width, auto count, int32_t index) {
        constexpr int kWidth = decltype(width)::value;
        constexpr int kCount = decltype(count)::value;
        typename Set::template Packs<kWidth> packs[kCount];
#pragma unroll
        for (int i = 0; i < kCount; ++i) set.load(packs[i], index + i * kThreads * kWidth);
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
#pragma unroll
          for (int place = 0; place < kWidth; ++place) {
            Set::apply(packs[i], place, [&](const auto&... values_of_element) {
              chains[i] = element.add(chains[i], values_of_element...);
            });
          }
        }
      });
  float result = chains[0];
#pragma unroll
  for (int i = 1; i < Operation::kUnroll; ++i) result = Combination::combine(result, chains[i]);
  result = reduce_block<Combination, kThreads>(result);
  if (threadIdx.x == 0) values[table.chunks_before + blockIdx.x] = result;
}

template <class Operation, int kOperands>
cudaError_t launch_reduction(const TensorLists<kOperands>& lists, const Operation& operation,
                             float* values, cudaStream_t stream) {
  return with_tables(lists, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    static_assert(kFits<Table, Operation, float*>);
    if (table.chunks == 0) return cudaSuccess;
    return launch(&reduce_chunks<Operation, Table>, dim3(static_cast<unsigned>(table.chunks)),
                  dim3(kThreads), stream, table, operation, values);
  });
}

}  // namespace sap_fast::cuda
