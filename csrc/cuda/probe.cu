// probe_add and probe_project: a matrix of hidden states, a row per token, and a vector for all
// rows.
#include <algorithm>

#include "launch.cuh"

namespace sap_fast::cuda {
namespace {

// Blocks that a grid holds along y.
constexpr int64_t kMaxBlocksOfRows = 65535;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool is_aligned(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kAccessBytes == 0;
}

// Threads of a block lie in a rectangle, along the columns in x and along the rows in y: 32 to 256
// packs of a row, of up to 8 rows.
struct Grid {
  dim3 block;
  unsigned columns;  // blocks that cover a row

  Grid(int64_t rows, int64_t packs) {
    unsigned height = 1;
    while (height < 8 && height < rows) height *= 2;
    block = dim3(kThreads / height, height);
    columns = static_cast<unsigned>(divide_up(packs, block.x));
  }
};

// Rows that a thread loads before it computes.
constexpr int kUnroll = 4;

// Loads packs of `kCount` rows, `stride` elements apart.
template <int kCount, class Stored, int kWidth>
__device__ __forceinline__ void load_rows(Pack<Stored, kWidth> (&packs)[kCount], const Stored* from,
                                          int64_t stride) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) packs[i].load(from + i * stride);
}

// Calls body(count, row) for rows first, first + step, … below `end`: `count` of them, from `row`.
template <class Body>
__device__ __forceinline__ void for_each_row(int64_t first, int64_t end, int64_t step,
                                             const Body& body) {
  int64_t row = first;
  for (; row + (kUnroll - 1) * step < end; row += kUnroll * step) body(Constant<kUnroll>{}, row);
  for (; row < end; row += step) body(Constant<1>{}, row);
}

// ---- x + v ----

constexpr int64_t kRowsPerThread = 8;

template <class Stored, int kWidth>
__global__ void __launch_bounds__(kThreads)
    probe_add_kernel(Stored* __restrict__ out, const Stored* __restrict__ hidden,
                     const float* __restrict__ offset, int64_t rows, int64_t columns) {
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
  if (column >= columns) return;
  Pack<float, kWidth> offsets;
  offsets.load(offset + column);
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  for_each_row(first_row, rows, step, [&](auto count, int64_t row) {
    constexpr int kCount = decltype(count)::value;
    Pack<Stored, kWidth> packs[kCount];
    load_rows(packs, hidden + row * columns + column, step * columns);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        narrow(widen(packs[k].values[i]) + offsets.values[i], packs[k].values[i]);
      }
      packs[k].store(out + (row + k * step) * columns + column);
    }
  });
}

// ---- Σ over rows ----

// Rows of a block in the first stage, unless that makes more than kMaxSplits of them.
constexpr int64_t kRowsPerBlock = 256;
constexpr int64_t kMaxSplits = 256;

// A function of the shape alone, so that the order of the sum is one, too.
int64_t rows_of_split(int64_t rows) { return std::max(kRowsPerBlock, divide_up(rows, kMaxSplits)); }

int64_t splits_of(int64_t rows) { return divide_up(rows, rows_of_split(rows)); }

// Sums the rows of each split. With kDirect there is one split, and its sum goes to the buffer;
// else `out` has a row for each.
template <class Stored, int kWidth, bool kDirect>
__global__ void __launch_bounds__(kThreads)
    sum_rows(float* __restrict__ out, const Stored* __restrict__ gradient, int64_t rows,
             int64_t columns, int64_t rows_per_split, float sign) {
  // Of every thread, kWidth sums. A row of threads covers blockDim.x · kWidth columns.
  alignas(kAccessBytes) __shared__ float sums_of_threads[kThreads * kWidth];
  const int width = static_cast<int>(blockDim.x) * kWidth;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * width;
  const int64_t column = first_column + static_cast<int64_t>(threadIdx.x) * kWidth;
  Pack<float, kWidth> sums;
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums.values[i] = 0.0f;
  if (column < columns) {
    const int64_t first_row = static_cast<int64_t>(blockIdx.y) * rows_per_split;
    const int64_t end = min(rows, first_row + rows_per_split);
    for_each_row(first_row + threadIdx.y, end, blockDim.y, [&](auto count, int64_t row) {
      constexpr int kCount = decltype(count)::value;
      Pack<Stored, kWidth> packs[kCount];
      load_rows(packs, gradient + row * columns + column, blockDim.y * columns);
#pragma unroll
      for (int k = 0; k < kCount; ++k) {
#pragma unroll
        for (int i = 0; i < kWidth; ++i) sums.values[i] += widen(packs[k].values[i]);
      }
    });
  }
  sums.store(sums_of_threads + static_cast<int>(threadIdx.y) * width +
             static_cast<int>(threadIdx.x) * kWidth);
  __syncthreads();
  // From here on neighbouring threads have neighbouring columns.
  const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  for (int i = thread; i < width && first_column + i < columns; i += kThreads) {
    float sum = sums_of_threads[i];
    for (int y = 1; y < static_cast<int>(blockDim.y); ++y) sum += sums_of_threads[y * width + i];
    if (kDirect) {
      out[first_column + i] += sign * sum;
    } else {
      out[blockIdx.y * columns + first_column + i] = sum;
    }
  }
}

// In double, as the last stage of every sum here.
__global__ void __launch_bounds__(kThreads)
    add_splits(float* __restrict__ buffer, const float* __restrict__ sums_of_splits, int64_t splits,
               int64_t columns, float sign) {
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  double sum = 0.0;
#pragma unroll 8
  for (int64_t split = 0; split < splits; ++split) sum += sums_of_splits[split * columns + column];
  buffer[column] += sign * static_cast<float>(sum);
}

template <class Stored, int kWidth>
cudaError_t launch_probe_add(void* out, const void* hidden, const float* offset, int64_t rows,
                             int64_t columns, cudaStream_t stream) {
  const Grid grid(rows, columns / kWidth);
  const int64_t height = std::min(divide_up(rows, grid.block.y * kRowsPerThread), kMaxBlocksOfRows);
  return launch(&probe_add_kernel<Stored, kWidth>,
                dim3(grid.columns, static_cast<unsigned>(height)), grid.block, stream,
                static_cast<Stored*>(out), static_cast<const Stored*>(hidden), offset, rows,
                columns);
}

template <class Stored, int kWidth>
cudaError_t launch_probe_project(float* buffer, const void* gradient, int64_t rows, int64_t columns,
                                 float sign, float* scratch, cudaStream_t stream) {
  const Grid grid(rows, columns / kWidth);
  const auto* const from = static_cast<const Stored*>(gradient);
  const int64_t splits = splits_of(rows);
  if (splits == 1) {
    return launch(&sum_rows<Stored, kWidth, true>, dim3(grid.columns), grid.block, stream, buffer,
                  from, rows, columns, rows, sign);
  }
  const cudaError_t error =
      launch(&sum_rows<Stored, kWidth, false>, dim3(grid.columns, static_cast<unsigned>(splits)),
             grid.block, stream, scratch, from, rows, columns, rows_of_split(rows), sign);
  if (error != cudaSuccess) return error;
  return launch(&add_splits, dim3(static_cast<unsigned>(divide_up(columns, kThreads))),
                dim3(kThreads), stream, buffer, static_cast<const float*>(scratch), splits, columns,
                sign);
}

}  // namespace

cudaError_t probe_add(Storage storage, void* out, const void* hidden, const float* offset,
                      int64_t rows, int64_t columns, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  return with_storage(storage, [&](auto element) {
    using Stored = decltype(element);
    constexpr int kWidth = kAccessBytes / sizeof(Stored);
    // Then every row is aligned.
    const bool aligned =
        columns % kWidth == 0 && is_aligned(out) && is_aligned(hidden) && is_aligned(offset);
    const auto run = aligned ? launch_probe_add<Stored, kWidth> : launch_probe_add<Stored, 1>;
    return run(out, hidden, offset, rows, columns, stream);
  });
}

int64_t probe_project_scratch(int64_t rows, int64_t columns) {
  const int64_t splits = splits_of(rows);
  return splits > 1 ? splits * columns * static_cast<int64_t>(sizeof(float)) : 0;
}

cudaError_t probe_project(Storage storage, float* buffer, const void* gradient, int64_t rows,
                          int64_t columns, float sign, void* scratch, cudaStream_t stream) {
  if (rows == 0 || columns == 0) return cudaSuccess;
  return with_storage(storage, [&](auto element) {
    using Stored = decltype(element);
    constexpr int kWidth = kAccessBytes / sizeof(Stored);
    const bool aligned = columns % kWidth == 0 && is_aligned(gradient);
    const auto run =
        aligned ? launch_probe_project<Stored, kWidth> : launch_probe_project<Stored, 1>;
    return run(buffer, gradient, rows, columns, sign, static_cast<float*>(scratch), stream);
  });
}

}  // namespace sap_fast::cuda
