// How the kernels move memory: 128 bits per access where all operands of a tensor are aligned,
// element by element for the rest. What they compute is elsewhere.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <string.h>

#include <type_traits>
#include <utility>

#include "tensor_table.h"

namespace sap_fast::cuda {

constexpr int kThreads = 256;
constexpr int kAccessBytes = 16;

// ---- storage types ----

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }

// To the nearest value, ties to even.
__device__ __forceinline__ void narrow(float value, float& stored) { stored = value; }
__device__ __forceinline__ void narrow(float value, __nv_bfloat16& stored) {
  stored = __float2bfloat16_rn(value);
}
__device__ __forceinline__ void narrow(float value, __half& stored) {
  stored = __float2half_rn(value);
}

// ---- scalars ----

__device__ __forceinline__ double read(const Scalar& scalar) {
  if (scalar.address == nullptr) return scalar.value;
  if (scalar.is_double) return *static_cast<const double*>(scalar.address);
  return *static_cast<const float*>(scalar.address);
}

__device__ __forceinline__ float read_float(const Scalar& scalar) {
  return static_cast<float>(read(scalar));
}

// ---- packs: neighbouring elements of one operand, in registers ----

template <class Stored, int kWidth>
struct Pack {
  Stored values[kWidth];

  __device__ __forceinline__ void load(const Stored* from) {
    if constexpr (kWidth == 1) {
      values[0] = *from;
    } else {
      static_assert(sizeof values % kAccessBytes == 0);
      uint4 words[sizeof values / kAccessBytes];
#pragma unroll
      for (size_t i = 0; i < sizeof values / kAccessBytes; ++i) {
        words[i] = reinterpret_cast<const uint4*>(from)[i];
      }
      memcpy(values, words, sizeof values);
    }
  }

  __device__ __forceinline__ void store(Stored* to) const {
    if constexpr (kWidth == 1) {
      *to = values[0];
    } else {
      uint4 words[sizeof values / kAccessBytes];
      memcpy(words, values, sizeof values);
#pragma unroll
      for (size_t i = 0; i < sizeof values / kAccessBytes; ++i) {
        reinterpret_cast<uint4*>(to)[i] = words[i];
      }
    }
  }
};

// ---- operands: what an operation reads, and writes where the type is not const ----

template <int kIndex, class Stored>
struct Operand {
  Stored* address;
};

template <int kIndex, class Stored, int kWidth>
struct OperandPack {
  Pack<std::remove_const_t<Stored>, kWidth> pack;
};

template <class Indices, class... Stored>
struct OperandSet;

template <class... Stored>
using Operands = OperandSet<std::make_integer_sequence<int, sizeof...(Stored)>, Stored...>;

// One chunk of each operand.
template <int... kIndices, class... Stored>
struct OperandSet<std::integer_sequence<int, kIndices...>, Stored...>
    : Operand<kIndices, Stored>... {
  // Elements that are moved together: 128 bits of the narrowest operand.
  static constexpr int kWidth = ((sizeof(Stored) == 2) || ...) ? 8 : 4;

  template <int kPackWidth>
  struct Packs : OperandPack<kIndices, Stored, kPackWidth>... {};

  template <class Table>
  __device__ __forceinline__ OperandSet(const Table& table, const Chunk& chunk)
      : Operand<kIndices, Stored>{static_cast<Stored*>(table.addresses[kIndices][chunk.tensor]) +
                                  chunk.offset}... {}

  __device__ __forceinline__ bool aligned() const {
    const uintptr_t bits = (reinterpret_cast<uintptr_t>(Operand<kIndices, Stored>::address) | ...);
    return bits % kAccessBytes == 0;
  }

  template <int kPackWidth>
  __device__ __forceinline__ void load(Packs<kPackWidth>& packs, int32_t index) const {
    (static_cast<OperandPack<kIndices, Stored, kPackWidth>&>(packs).pack.load(
         Operand<kIndices, Stored>::address + index),
     ...);
  }

  // Stores what is not const.
  template <int kPackWidth>
  __device__ __forceinline__ void store(const Packs<kPackWidth>& packs, int32_t index) const {
    (store_one<kIndices, Stored>(packs, index), ...);
  }

  // Calls body with the element in this place of every pack.
  template <int kPackWidth, class Body>
  static __device__ __forceinline__ void apply(Packs<kPackWidth>& packs, int place,
                                               const Body& body) {
    body(static_cast<OperandPack<kIndices, Stored, kPackWidth>&>(packs).pack.values[place]...);
  }

 private:
  template <int kIndex, class Type, int kPackWidth>
  __device__ __forceinline__ void store_one(const Packs<kPackWidth>& packs, int32_t index) const {
    if constexpr (!std::is_const_v<Type>) {
      static_cast<const OperandPack<kIndex, Type, kPackWidth>&>(packs).pack.store(
          Operand<kIndex, Type>::address + index);
    }
  }
};

// ---- chunks ----

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls body(width, count, index) so that the threads of a block see every element of a chunk once:
// `count` packs of `width` elements, kThreads packs apart, the first at `index`. Packs of whole
// tiles come without a bounds check, so that their loads are under way together.
template <int kWidth, int kUnroll, class Body>
__device__ __forceinline__ void for_each_pack(int32_t size, bool aligned, const Body& body) {
  const auto thread = static_cast<int32_t>(threadIdx.x);
  int32_t done = 0;
  if (aligned) {
    if constexpr (kUnroll > 1) {
      constexpr int32_t kTile = kThreads * kWidth * kUnroll;
      for (; done + kTile <= size; done += kTile) {
        body(Constant<kWidth>{}, Constant<kUnroll>{}, done + thread * kWidth);
      }
    }
    for (int32_t i = done + thread * kWidth; i + kWidth <= size; i += kThreads * kWidth) {
      body(Constant<kWidth>{}, Constant<1>{}, i);
    }
    done = size - size % kWidth;
  }
  for (int32_t i = done + thread; i < size; i += kThreads) {
    body(Constant<1>{}, Constant<1>{}, i);
  }
}

// Runs an operation on each element, a chunk per block. An operation has
//   Set      the Operands, kUnroll  packs of each that a thread loads before it computes,
//   Element  a functor of one element of each operand, and
//   prepare  which makes it for a tensor of the list.
template <class Operation, class Table>
__global__ void __launch_bounds__(kThreads)
    transform(const __grid_constant__ Table table, const __grid_constant__ Operation operation) {
  using Set = typename Operation::Set;
  const Chunk chunk = table.find(static_cast<int32_t>(blockIdx.x));
  const auto element = operation.prepare(table.tensors_before + chunk.tensor);
  const Set set(table, chunk);
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
          for (int place = 0; place < kWidth; ++place) Set::apply(packs[i], place, element);
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) set.store(packs[i], index + i * kThreads * kWidth);
      });
}

}  // namespace sap_fast::cuda
