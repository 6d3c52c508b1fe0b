// Lists of tensors as they travel to the device, and which block finds which chunk in them.
//
// Addresses go in the arguments of a kernel: no copy to the device, no memory whose lifetime
// matters, and a CUDA graph keeps them. Arguments hold 4 KB, and 32,764 bytes from CUDA 12.1 and
// compute capability 7.0 on; longer lists take several launches.
#pragma once

#include <stdint.h>

#include "../math.h"
#include "../multi_tensor.h"
#include "kernels.h"

namespace sap_fast::cuda {

constexpr int kSmallArguments = 4096;
constexpr int kLargeArguments = 32764;
// Left for what a kernel takes besides the table.
constexpr int kOtherArguments = 192;

// Elements of a block. 4096×4096 elements make 1,024 of them, about one for each that an H100 has
// room for at a time; a LoRA matrix of 8×4096 makes two.
constexpr int32_t kChunkSize = 16384;

// Blocks that a grid holds along x.
constexpr int64_t kMaxBlocks = 2147483647;

inline int64_t chunks_of(int64_t size) { return (size + kChunkSize - 1) / kChunkSize; }

template <int kOperands, int kArguments>
struct TensorTable {
  static constexpr int kBytesOfTensor = 8 * kOperands + 8 + 4;
  static constexpr int kCapacity = (kArguments - kOtherArguments - 24) / kBytesOfTensor;

  void* addresses[kOperands][kCapacity];
  int64_t sizes[kCapacity];
  int64_t tensors_before;  // those of earlier tables, and their chunks
  int64_t chunks_before;
  int32_t first_chunks[kCapacity];  // of each tensor, counted from the start of the table
  int32_t tensors;
  int32_t chunks;

  // Takes tensors of `lists` from index `first` on, as many as fit; `chunks_before` is the number
  // of chunks of those before. Takes none if the next one has more chunks than a grid has blocks.
  void fill(const TensorLists<kOperands>& lists, int64_t first, int64_t chunks_of_earlier) {
    tensors_before = first;
    chunks_before = chunks_of_earlier;
    tensors = 0;
    int64_t count = 0;
    for (; tensors < kCapacity && first + tensors < lists.tensors; ++tensors) {
      const int64_t size = lists.sizes[first + tensors];
      if (count + chunks_of(size) > kMaxBlocks) break;
      for (int operand = 0; operand < kOperands; ++operand) {
        addresses[operand][tensors] = lists.addresses[operand][first + tensors];
      }
      sizes[tensors] = size;
      first_chunks[tensors] = static_cast<int32_t>(count);
      count += chunks_of(size);
    }
    chunks = static_cast<int32_t>(count);
  }

  // The chunk with this index in the table; its tensor counts from the start of the table.
  SAP_HOST_DEVICE Chunk find(int32_t index) const {
    // The last tensor that begins at or before it: an empty one begins where the next one does.
    int32_t tensor = 0;
    for (int32_t end = tensors; end - tensor > 1;) {
      const int32_t middle = tensor + (end - tensor) / 2;
      if (first_chunks[middle] <= index) {
        tensor = middle;
      } else {
        end = middle;
      }
    }
    const int64_t offset = static_cast<int64_t>(index - first_chunks[tensor]) * kChunkSize;
    const int64_t left = sizes[tensor] - offset;
    return {tensor, left < kChunkSize ? static_cast<int32_t>(left) : kChunkSize, offset};
  }
};

// Calls body(table) for table after table until `lists` has been through. `body` returns an error
// code; the first that is not cudaSuccess ends it. `done`, if it is given, counts the tensors of
// those tables that went well.
template <int kArguments, int kOperands, class Body>
cudaError_t for_each_table(const TensorLists<kOperands>& lists, const Body& body,
                           int64_t* done = nullptr) {
  TensorTable<kOperands, kArguments> table;
  int64_t chunks = 0;
  for (int64_t first = 0; first < lists.tensors; first += table.tensors) {
    table.fill(lists, first, chunks);
    if (table.tensors == 0) return cudaErrorInvalidValue;
    const cudaError_t error = body(table);
    if (error != cudaSuccess) return error;
    chunks += table.chunks;
    if (done != nullptr) *done += table.tensors;
  }
  return cudaSuccess;
}

}  // namespace sap_fast::cuda
