// probe_rule: h of all layers to V, in five launches (three unless the rule is `normalized`).
#include "reduction.cuh"

namespace sap_fast::cuda {
namespace {

// What is known of each layer on the way; lies in scratch.
struct Layers {
  float* largest;  // max |h|; infinite if an h is not finite
  float* norms;    // ‖h / largest‖
  float* radii;
  float* values;  // of chunks: the largest |h|, later the sum of squares

  static int64_t bytes(int64_t layers, int64_t chunks) {
    return (3 * layers + chunks) * static_cast<int64_t>(sizeof(float));
  }

  Layers(void* scratch, int64_t layers)
      : largest(static_cast<float*>(scratch)),
        norms(largest + layers),
        radii(norms + layers),
        values(radii + layers) {}
};

// A warp per layer in the kernels that combine the values of chunks.
constexpr int kWarps = kThreads / kWarpSize;

// ---- max |h| ----

struct LargestOfChunk {
  using Set = Operands<const float>;
  using Combination = Largest;
  static constexpr int kUnroll = 4;

  struct Element {
    __device__ __forceinline__ float add(float largest, const float& h) const {
      return maximum(is_finite(h) ? absolute(h) : INFINITY, largest);
    }
  };

  __device__ __forceinline__ Element prepare(int64_t) const { return {}; }
};

// The first chunk of a table's layer, among all, and the one after its last.
template <class Table>
__device__ __forceinline__ int64_t first_value(const Table& table, int layer) {
  return table.chunks_before + (layer < table.tensors ? table.first_chunks[layer] : table.chunks);
}

// One block, for one table of layers: the largest |h| of each, and whether all is finite.
template <class Table>
__global__ void __launch_bounds__(kThreads)
    find_largest(const __grid_constant__ Table table, Layers layers, bool* finite) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  bool all_finite = true;
  for (int layer = warp; layer < table.tensors; layer += kWarps) {
    const int64_t end = first_value(table, layer + 1);
    float largest = 0.0f;
    for (int64_t i = first_value(table, layer) + lane; i < end; i += kWarpSize) {
      largest = maximum(layers.values[i], largest);
    }
    largest = reduce_warp<Largest>(largest);
    if (lane == 0) {
      layers.largest[table.tensors_before + layer] = largest;
      const float radius = *static_cast<const float*>(table.addresses[1][layer]);
      layers.radii[table.tensors_before + layer] = radius;
      all_finite = all_finite && is_finite(largest) && is_finite(radius);
    }
  }
  const int table_is_finite = __syncthreads_and(all_finite ? 1 : 0);
  if (threadIdx.x == 0) {
    // Tables go one after the other.
    *finite = table_is_finite != 0 && (table.tensors_before == 0 || *finite);
  }
}

// ---- ‖h / max |h|‖ ----

struct UnitSquares {
  using Set = Operands<const float>;
  using Combination = Sum;
  static constexpr int kUnroll = 4;

  struct Element {
    float largest;

    __device__ __forceinline__ float add(float sum, const float& h) const {
      const float unit = h / largest;
      return multiply_add(unit, unit, sum);
    }
  };

  const float* largest;

  // NaN where all of h is zero: 0 / 0.
  __device__ __forceinline__ Element prepare(int64_t layer) const { return {largest[layer]}; }
};

template <class Table>
__global__ void __launch_bounds__(kThreads)
    find_norms(const __grid_constant__ Table table, Layers layers) {
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  for (int layer = warp; layer < table.tensors; layer += kWarps) {
    const int64_t end = first_value(table, layer + 1);
    double sum = 0.0;
    for (int64_t i = first_value(table, layer) + lane; i < end; i += kWarpSize) {
      sum += layers.values[i];
    }
    sum = reduce_warp<Sum>(sum);
    if (lane == 0) layers.norms[table.tensors_before + layer] = static_cast<float>(sqrt(sum));
  }
}

// ---- V ----

template <Rule kRule>
struct ApplyRule {
  using Set = Operands<float>;
  static constexpr int kUnroll = 2;

  struct Element {
    bool zero;
    float probe_size;
    float perturbation_norm;
    float largest;
    float norm;
    float radius;

    __device__ __forceinline__ void operator()(float& h) const {
      float probe;
      if constexpr (kRule == Rule::kNormalized) {
        probe = normalized_rule(h, largest, norm, radius, probe_size);
      } else if constexpr (kRule == Rule::kGradient) {
        probe = gradient_rule(h, perturbation_norm, probe_size);
      } else {
        probe = adam_rule(h, perturbation_norm, probe_size);
      }
      h = select(zero, 0.0f, probe);
    }
  };

  Layers layers;
  const bool* finite;
  float probe_size;
  Scalar perturbation_norm;

  __device__ __forceinline__ Element prepare(int64_t layer) const {
    Element element{!*finite, probe_size, 0.0f, 0.0f, 0.0f, 0.0f};
    if constexpr (kRule == Rule::kNormalized) {
      element.largest = layers.largest[layer];
      element.norm = layers.norms[layer];
      element.radius = layers.radii[layer];
      // Without a size there is nothing to normalize, and the norm may be NaN.
      element.zero = element.zero || !(element.norm > 0.0f);
    } else {
      element.perturbation_norm = read_float(perturbation_norm);
    }
    return element;
  }
};

// ---- launches ----

cudaError_t launch_find_largest(const TensorLists<2>& lists, const Layers& layers, bool* finite,
                                cudaStream_t stream) {
  return with_tables(lists, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    static_assert(kFits<Table, Layers, bool*>);
    return launch(&find_largest<Table>, dim3(1), dim3(kThreads), stream, table, layers, finite);
  });
}

cudaError_t launch_find_norms(const TensorLists<2>& lists, const Layers& layers,
                              cudaStream_t stream) {
  return with_tables(lists, [&](const auto& table) {
    using Table = std::decay_t<decltype(table)>;
    return launch(&find_norms<Table>, dim3(1), dim3(kThreads), stream, table, layers);
  });
}

template <Rule kRule>
cudaError_t launch_rule(const TensorLists<2>& lists, const Layers& layers, const bool* finite,
                        float probe_size, Scalar perturbation_norm, cudaStream_t stream,
                        int64_t* written) {
  return launch_transform(lists, ApplyRule<kRule>{layers, finite, probe_size, perturbation_norm},
                          stream, written);
}

}  // namespace

int64_t probe_rule_scratch(int64_t layers, const int64_t* sizes) {
  return Layers::bytes(layers, count_chunks(layers, sizes));
}

cudaError_t probe_rule(const TensorLists<2>& buffers_radii, Rule rule, float probe_size,
                       Scalar perturbation_norm, bool* finite, void* scratch, cudaStream_t stream,
                       int64_t* written) {
  const Layers layers(scratch, buffers_radii.tensors);
  cudaError_t error = launch_reduction(buffers_radii, LargestOfChunk{}, layers.values, stream);
  if (error != cudaSuccess) return error;
  error = launch_find_largest(buffers_radii, layers, finite, stream);
  if (error != cudaSuccess) return error;
  if (rule == Rule::kNormalized) {
    error = launch_reduction(buffers_radii, UnitSquares{layers.largest}, layers.values, stream);
    if (error != cudaSuccess) return error;
    error = launch_find_norms(buffers_radii, layers, stream);
    if (error != cudaSuccess) return error;
  }
  const auto run = rule == Rule::kNormalized ? launch_rule<Rule::kNormalized>
                   : rule == Rule::kGradient ? launch_rule<Rule::kGradient>
                                             : launch_rule<Rule::kAdam>;
  return run(buffers_radii, layers, finite, probe_size, perturbation_norm, stream, written);
}

}  // namespace sap_fast::cuda
