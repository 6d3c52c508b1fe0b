// perturb_swap, reflect and restore_swap.
#include "launch.cuh"

namespace sap_fast::cuda {
namespace {

template <class Stored>
struct PerturbSwap {
  using Set = Operands<Stored, Stored>;
  static constexpr int kUnroll = 2;

  struct Element {
    float scale;

    __device__ __forceinline__ void operator()(Stored& parameter, Stored& buffer) const {
      const Stored old = parameter;
      narrow(perturb(widen(old), widen(buffer), scale), parameter);
      buffer = old;
    }
  };

  Scalar scale;

  __device__ __forceinline__ Element prepare(int64_t) const { return {read_float(scale)}; }
};

template <class Stored>
struct Reflect {
  using Set = Operands<Stored, const Stored>;
  static constexpr int kUnroll = 2;

  struct Element {
    __device__ __forceinline__ void operator()(Stored& parameter, const Stored& buffer) const {
      narrow(sap_fast::reflect(widen(parameter), widen(buffer)), parameter);
    }
  };

  __device__ __forceinline__ Element prepare(int64_t) const { return {}; }
};

template <class Stored>
struct RestoreSwap {
  using Set = Operands<Stored, Stored>;
  static constexpr int kUnroll = 2;

  struct Element {
    float inverse_scale;

    __device__ __forceinline__ void operator()(Stored& parameter, Stored& buffer) const {
      const Stored old = buffer;
      narrow(recover_gradient(widen(parameter), widen(old), inverse_scale), buffer);
      parameter = old;
    }
  };

  Scalar inverse_scale;

  __device__ __forceinline__ Element prepare(int64_t) const { return {read_float(inverse_scale)}; }
};

}  // namespace

cudaError_t perturb_swap(Storage storage, const TensorLists<2>& params_buffers, Scalar scale,
                         cudaStream_t stream, int64_t* written) {
  return with_storage(storage, [&](auto element) {
    return launch_transform(params_buffers, PerturbSwap<decltype(element)>{scale}, stream, written);
  });
}

cudaError_t reflect(Storage storage, const TensorLists<2>& params_buffers, cudaStream_t stream,
                    int64_t* written) {
  return with_storage(storage, [&](auto element) {
    return launch_transform(params_buffers, Reflect<decltype(element)>{}, stream, written);
  });
}

cudaError_t restore_swap(Storage storage, const TensorLists<2>& params_buffers,
                         Scalar inverse_scale, cudaStream_t stream, int64_t* written) {
  return with_storage(storage, [&](auto element) {
    return launch_transform(params_buffers, RestoreSwap<decltype(element)>{inverse_scale}, stream,
                            written);
  });
}

}  // namespace sap_fast::cuda
