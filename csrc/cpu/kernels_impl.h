// The kernels of kernels.h for one instruction set; see vector.h. Defines `kKernels`.
#include "kernels.h"
#include "vector.h"

namespace sap_fast {
namespace {

#define SAP_INLINE_LAMBDA __attribute__((always_inline))

template <class S>
void perturb_swap(void* params, void* buffers, int64_t size, float scale) {
  S* const p = static_cast<S*>(params);
  S* const b = static_cast<S*>(buffers);
  const Vec scales = broadcast(scale);
  for_each_vector(size, [=](int64_t i, auto lanes) SAP_INLINE_LAMBDA {
    const Stored<S> parameter = fetch(p + i, lanes);
    const Vec gradient = load(b + i, lanes);
    put(b + i, parameter, lanes);
    store(p + i, perturb(widen(parameter), gradient, scales), lanes);
  });
}

template <class S>
void reflect(void* params, const void* buffers, int64_t size) {
  S* const p = static_cast<S*>(params);
  const S* const b = static_cast<const S*>(buffers);
  for_each_vector(size, [=](int64_t i, auto lanes) SAP_INLINE_LAMBDA {
    store(p + i, reflect(load(p + i, lanes), load(b + i, lanes)), lanes);
  });
}

template <class S>
void restore_swap(void* params, void* buffers, int64_t size, float inverse_scale) {
  S* const p = static_cast<S*>(params);
  S* const b = static_cast<S*>(buffers);
  const Vec scales = broadcast(inverse_scale);
  for_each_vector(size, [=](int64_t i, auto lanes) SAP_INLINE_LAMBDA {
    const Vec perturbed = load(p + i, lanes);
    const Stored<S> parameter = fetch(b + i, lanes);
    put(p + i, parameter, lanes);
    store(b + i, recover_gradient(perturbed, widen(parameter), scales), lanes);
  });
}

// With or without directions, a template so that the loop of plain AdamW loads nothing for them.
template <class S, bool kBlend>
void adamw_blend_loop(S* p, const S* g, float* m, float* v, const S* d, int64_t size,
                      const GradientCoefficients& gradient, const AdamWCoefficients& adamw_step) {
  const GradientCoefficients c = gradient;
  const AdamWCoefficients step = adamw_step;
  for_each_vector(size, [=](int64_t i, auto lanes) SAP_INLINE_LAMBDA {
    Vec value = c.sign * load(g + i, lanes);
    if (kBlend) value = blend_gradient(value, load(d + i, lanes), broadcast(c.blend));
    value = c.scale * value;
    Vec parameter = load(p + i, lanes);
    Vec exp_avg = load(m + i, lanes);
    Vec exp_avg_sq = load(v + i, lanes);
    adamw(parameter, value, exp_avg, exp_avg_sq, step);
    store(p + i, parameter, lanes);
    store(m + i, exp_avg, lanes);
    store(v + i, exp_avg_sq, lanes);
  });
}

template <class S>
void adamw_blend(void* params, const void* grads, float* exp_avgs, float* exp_avg_sqs,
                 const void* directions, int64_t size, const GradientCoefficients& gradient,
                 const AdamWCoefficients& step) {
  S* const p = static_cast<S*>(params);
  const S* const g = static_cast<const S*>(grads);
  const S* const d = static_cast<const S*>(directions);
  if (d == nullptr) {
    adamw_blend_loop<S, false>(p, g, exp_avgs, exp_avg_sqs, d, size, gradient, step);
  } else {
    adamw_blend_loop<S, true>(p, g, exp_avgs, exp_avg_sqs, d, size, gradient, step);
  }
}

// Sums of 64 interleaved subsequences, whatever the width of a register: in fp32 over blocks of
// kBlock elements, 16 in each lane, and in double over the blocks.
struct LaneSums {
  static constexpr int kWidth = 64;
  static constexpr int kBlock = 16 * kWidth;
  static constexpr int kVectors = kWidth / kLanes;
  double totals[kWidth] = {};

  // Adds term(index, lanes) of every register of an array.
  template <class Term>
  SAP_HOST_DEVICE void add(int64_t size, const Term& term) {
    for (int64_t first = 0; first < size; first += kBlock) {
      const int64_t end = first + kBlock < size ? first + kBlock : size;
      Vec vectors[kVectors] = {};
      int64_t index = first;
      for (; index + kWidth <= end; index += kWidth) {
        for (int k = 0; k < kVectors; ++k) vectors[k] += term(index + k * kLanes, AllLanes{});
      }
      for (int k = 0; index < end; ++k, index += kLanes) {
        const int64_t left = end - index;
        vectors[k] += term(index, FirstLanes{left < kLanes ? left : kLanes});
      }
      float lanes[kWidth];
      memcpy(lanes, vectors, sizeof lanes);
      for (int k = 0; k < kWidth; ++k) totals[k] += lanes[k];
    }
  }

  SAP_HOST_DEVICE double total() {
    for (int half = kWidth / 2; half > 0; half /= 2) {
      for (int k = 0; k < half; ++k) totals[k] += totals[k + half];
    }
    return totals[0];
  }
};

template <class S>
double dot(const void* left, const void* right, int64_t size) {
  const S* const a = static_cast<const S*>(left);
  const S* const b = static_cast<const S*>(right);
  LaneSums sums;
  if (a == b) {
    sums.add(size, [=](int64_t i, auto lanes) SAP_INLINE_LAMBDA {
      const Vec value = load(a + i, lanes);
      return value * value;
    });
  } else {
    sums.add(size, [=](int64_t i, auto lanes)
                       SAP_INLINE_LAMBDA { return load(a + i, lanes) * load(b + i, lanes); });
  }
  return sums.total();
}

template <class S>
void probe_add(void* out, const void* hidden, const float* offset, int64_t size) {
  S* const o = static_cast<S*>(out);
  const S* const x = static_cast<const S*>(hidden);
  for_each_vector(size, [=](int64_t i, auto lanes) SAP_INLINE_LAMBDA {
    store(o + i, load(x + i, lanes) + load(offset + i, lanes), lanes);
  });
}

// Rows are summed in fp32 by blocks of kRows, and the blocks in double: the error does not grow
// with the number of tokens. A block is kWays sums that are added by pairs: one after the other, 32
// rows had 1.26 times the error (rms) of PyTorch's sum.
template <class S>
void probe_project(float* buffer, const void* gradient, int64_t rows, int64_t stride,
                   int64_t columns, float sign) {
  constexpr int64_t kRows = 32;
  constexpr int kWays = 4;
  const S* const g = static_cast<const S*>(gradient);
  for_each_vector(columns, [=](int64_t i, auto lanes) SAP_INLINE_LAMBDA {
    double totals[kLanes] = {};
    for (int64_t first = 0; first < rows; first += kRows) {
      const int64_t end = first + kRows < rows ? first + kRows : rows;
      Vec parts[kWays] = {};
      int64_t row = first;
      for (; row + kWays <= end; row += kWays) {
        for (int k = 0; k < kWays; ++k) parts[k] += load(g + (row + k) * stride + i, lanes);
      }
      for (int k = 0; row < end; ++row, ++k) parts[k] += load(g + row * stride + i, lanes);
      const Vec block = (parts[0] + parts[1]) + (parts[2] + parts[3]);
      for (int lane = 0; lane < kLanes; ++lane) totals[lane] += block[lane];
    }
    Vec sum = {};
    for (int lane = 0; lane < kLanes; ++lane) sum[lane] = (float)totals[lane];
    store(buffer + i, load(buffer + i, lanes) + sign * sum, lanes);
  });
}

float largest(const float* h, int64_t size, bool* finite) {
  Vec largest_seen = {};
  Mask all_finite = ~Mask{};
  for_each_vector(size, [&](int64_t i, auto lanes) SAP_INLINE_LAMBDA {
    const Vec value = load(h + i, lanes);
    largest_seen = maximum(absolute(value), largest_seen);
    all_finite &= is_finite(value);
  });
  float result = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    result = maximum(result, largest_seen[lane]);
    if (!all_finite[lane]) *finite = false;
  }
  return result;
}

double sum_unit_squares(const float* h, int64_t size, float largest_value) {
  LaneSums sums;
  sums.add(size, [=](int64_t i, auto lanes) SAP_INLINE_LAMBDA {
    const Vec unit = load(h + i, lanes) / largest_value;
    return unit * unit;
  });
  return sums.total();
}

void probe_rule(float* h, int64_t size, const RuleCoefficients& coefficients) {
  const RuleCoefficients c = coefficients;
  for_each_vector(size, [=](int64_t i, auto lanes) SAP_INLINE_LAMBDA {
    const Vec value = load(h + i, lanes);
    Vec probe;
    switch (c.rule) {
      case kGradient:
        probe = gradient_rule(value, c.perturbation_norm, c.probe_size);
        break;
      case kNormalized:
        probe = normalized_rule(value, c.largest, c.norm, c.radius, c.probe_size);
        break;
      default:
        probe = adam_rule(value, c.perturbation_norm, c.probe_size);
    }
    store(h + i, probe, lanes);
  });
}

#define SAP_FOR_EACH_STORAGE(kernel) {kernel<float>, kernel<BFloat16>, kernel<Float16>}

const Kernels kKernels = {
#if defined(SAP_FAST_AVX512)
    "avx512",
#elif defined(SAP_FAST_AVX2)
    "avx2",
#else
    "baseline",
#endif
    SAP_FOR_EACH_STORAGE(dot),
    SAP_FOR_EACH_STORAGE(perturb_swap),
    SAP_FOR_EACH_STORAGE(reflect),
    SAP_FOR_EACH_STORAGE(restore_swap),
    SAP_FOR_EACH_STORAGE(adamw_blend),
    SAP_FOR_EACH_STORAGE(probe_add),
    SAP_FOR_EACH_STORAGE(probe_project),
    largest,
    sum_unit_squares,
    probe_rule,
};

}  // namespace
}  // namespace sap_fast
