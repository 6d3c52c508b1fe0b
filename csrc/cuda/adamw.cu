// adamw_blend: a kernel that counts the steps and one that streams.
#include "launch.cuh"

namespace sap_fast::cuda {
namespace {

// ---- counters and coefficients, one thread per tensor ----

template <int kArguments>
struct StepTable {
  static constexpr int kCapacity = (kArguments - kOtherArguments - 16) / 8;

  float* steps[kCapacity];
  int64_t tensors_before;
  int64_t tensors;
};

struct CoefficientOptions {
  Scalar lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
};

template <class Table>
__global__ void __launch_bounds__(kThreads)
    count_steps(const __grid_constant__ Table table,
                const __grid_constant__ CoefficientOptions options,
                AdamWCoefficients* __restrict__ coefficients) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= table.tensors) return;
  const float step = *table.steps[index] + 1.0f;
  *table.steps[index] = step;
  const double rate = read(options.lr);
  const double bias1 = 1.0 - pow(options.beta1, static_cast<double>(step));
  const double bias2 = 1.0 - pow(options.beta2, static_cast<double>(step));
  AdamWCoefficients& result = coefficients[table.tensors_before + index];
  result.decay = static_cast<float>(1.0 - rate * options.weight_decay);
  result.gradient_weight = static_cast<float>(1.0 - options.beta1);
  result.beta2 = static_cast<float>(options.beta2);
  result.square_weight = static_cast<float>(1.0 - options.beta2);
  result.negative_step = static_cast<float>(-(rate / bias1));
  result.root_correction = static_cast<float>(sqrt(bias2));
  result.eps = static_cast<float>(options.eps);
}

template <int kArguments>
cudaError_t launch_count_steps(int64_t tensors, void* const* steps,
                               const CoefficientOptions& options, AdamWCoefficients* coefficients,
                               cudaStream_t stream, int64_t* written) {
  using Table = StepTable<kArguments>;
  static_assert(kFits<Table, CoefficientOptions, AdamWCoefficients*>);
  Table table;
  for (int64_t first = 0; first < tensors; first += table.tensors) {
    table.tensors_before = first;
    table.tensors = 0;
    for (; table.tensors < Table::kCapacity && first + table.tensors < tensors; ++table.tensors) {
      table.steps[table.tensors] = static_cast<float*>(steps[first + table.tensors]);
    }
    const auto blocks = static_cast<unsigned>((table.tensors + kThreads - 1) / kThreads);
    const cudaError_t error = launch(&count_steps<Table>, dim3(blocks), dim3(kThreads), stream,
                                     table, options, coefficients);
    if (error != cudaSuccess) return error;
    *written += table.tensors;
  }
  return cudaSuccess;
}

// ---- the update ----

template <class Stored, bool kBlend>
struct AdamW {
  using Set = std::conditional_t<kBlend, Operands<Stored, const Stored, float, float, const Stored>,
                                 Operands<Stored, const Stored, float, float>>;
  // Four or five operands, two of them fp32: one pack of each is enough on the way.
  static constexpr int kUnroll = 1;

  struct Element {
    GradientCoefficients gradient;
    AdamWCoefficients step;

    __device__ __forceinline__ void operator()(Stored& parameter, const Stored& grad,
                                               float& exp_avg, float& exp_avg_sq) const {
      update(parameter, gradient.sign * widen(grad), exp_avg, exp_avg_sq);
    }

    __device__ __forceinline__ void operator()(Stored& parameter, const Stored& grad,
                                               float& exp_avg, float& exp_avg_sq,
                                               const Stored& direction) const {
      const float value = gradient.sign * widen(grad);
      update(parameter, blend_gradient(value, widen(direction), gradient.blend), exp_avg,
             exp_avg_sq);
    }

   private:
    __device__ __forceinline__ void update(Stored& parameter, float value, float& exp_avg,
                                           float& exp_avg_sq) const {
      float wide = widen(parameter);
      adamw(wide, gradient.scale * value, exp_avg, exp_avg_sq, step);
      narrow(wide, parameter);
    }
  };

  const AdamWCoefficients* coefficients;
  float sign;
  Scalar blend;
  Scalar gradient_scale;

  __device__ __forceinline__ Element prepare(int64_t tensor) const {
    return {{sign, kBlend ? read_float(blend) : 0.0f, read_float(gradient_scale)},
            coefficients[tensor]};
  }
};

template <bool kBlend, int kOperands>
cudaError_t run(Storage storage, const TensorLists<kOperands>& operands, void* const* steps,
                const AdamWOptions& options, void* scratch, cudaStream_t stream,
                AdamWWritten* written) {
  auto* const coefficients = static_cast<AdamWCoefficients*>(scratch);
  const CoefficientOptions of_step{options.lr, options.beta1, options.beta2, options.eps,
                                   options.weight_decay};
  bool large = false;
  if (operands.tensors > StepTable<kSmallArguments>::kCapacity) {
    const cudaError_t error = takes_large_arguments(&large);
    if (error != cudaSuccess) return error;
  }
  const auto count =
      large ? launch_count_steps<kLargeArguments> : launch_count_steps<kSmallArguments>;
  const cudaError_t error =
      count(operands.tensors, steps, of_step, coefficients, stream, &written->steps);
  if (error != cudaSuccess) return error;
  return with_storage(storage, [&](auto element) {
    const AdamW<decltype(element), kBlend> operation{coefficients, options.maximize ? -1.0f : 1.0f,
                                                     options.blend, options.gradient_scale};
    return launch_transform(operands, operation, stream, &written->params);
  });
}

}  // namespace

int64_t adamw_blend_scratch(int64_t tensors) {
  return tensors * static_cast<int64_t>(sizeof(AdamWCoefficients));
}

cudaError_t adamw_blend(Storage storage, const TensorLists<4>& operands, void* const* steps,
                        const AdamWOptions& options, void* scratch, cudaStream_t stream,
                        AdamWWritten* written) {
  return run<false>(storage, operands, steps, options, scratch, stream, written);
}

cudaError_t adamw_blend(Storage storage, const TensorLists<5>& operands, void* const* steps,
                        const AdamWOptions& options, void* scratch, cudaStream_t stream,
                        AdamWWritten* written) {
  return run<true>(storage, operands, steps, options, scratch, stream, written);
}

}  // namespace sap_fast::cuda
