// A list of tensors cut into chunks, so that work is shared out by elements and not by tensors.
#pragma once

#include <stdint.h>

#include <vector>

namespace sap_fast {

// Part of one tensor. Offsets are multiples of the chunk size: a chunk is aligned as its tensor is.
struct Chunk {
  int32_t tensor;
  int32_t size;  // elements, at most the chunk size
  int64_t offset;
};

// The chunks of tensors of `sizes` elements, in order; an empty tensor has none. They depend on
// nothing but the arguments, so neither does the order of a sum that goes chunk by chunk.
inline std::vector<Chunk> plan_chunks(const int64_t* sizes, int64_t tensors, int32_t chunk_size) {
  int64_t count = 0;
  for (int64_t index = 0; index < tensors; ++index) {
    count += (sizes[index] + chunk_size - 1) / chunk_size;
  }
  std::vector<Chunk> chunks;
  chunks.reserve(static_cast<size_t>(count));
  for (int64_t index = 0; index < tensors; ++index) {
    for (int64_t offset = 0; offset < sizes[index]; offset += chunk_size) {
      const int64_t left = sizes[index] - offset;
      const int32_t size = left < chunk_size ? static_cast<int32_t>(left) : chunk_size;
      chunks.push_back({static_cast<int32_t>(index), size, offset});
    }
  }
  return chunks;
}

// Where each of `workers` begins in the list of chunks (and, last, where the list ends), so that
// all have the same number of elements to within one chunk.
inline std::vector<int64_t> share_chunks(const std::vector<Chunk>& chunks, int64_t workers) {
  int64_t total = 0;
  for (const Chunk& chunk : chunks) total += chunk.size;
  std::vector<int64_t> starts{0};
  starts.reserve(static_cast<size_t>(workers) + 1);
  int64_t seen = 0;
  for (int64_t index = 0; index < static_cast<int64_t>(chunks.size()); ++index) {
    // Worker k begins where k/workers of all elements lie behind; the product fits in 128 bits.
    while (static_cast<int64_t>(starts.size()) < workers &&
           static_cast<__int128>(seen) * workers >=
               static_cast<__int128>(total) * static_cast<int64_t>(starts.size())) {
      starts.push_back(index);
    }
    seen += chunks[static_cast<size_t>(index)].size;
  }
  while (static_cast<int64_t>(starts.size()) <= workers) {
    starts.push_back(static_cast<int64_t>(chunks.size()));
  }
  return starts;
}

}  // namespace sap_fast
