// The arithmetic of every operation, one element at a time. Memory movement is elsewhere.
//
// `T` is float in the CUDA kernels and in the plain loops, and a vector of floats in the CPU's. The
// specification is sap_fast/ops/reference.py; each function below rounds where that does. A type
// used for T brings, besides + - * /, the functions select(condition, a, b), square_root(a),
// multiply_add(a, b, c), absolute(a), maximum(a, b) and is_finite(a), declared before this file is
// included; those of float are here.
#pragma once

#include <math.h>
#include <stdint.h>

#include "coefficients.h"

#if defined(__CUDACC__)
#define SAP_HOST_DEVICE __host__ __device__ __forceinline__
#elif !defined(SAP_HOST_DEVICE)
#define SAP_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace sap_fast {
// Inlined into translation units that are compiled for different instruction sets: nothing here may
// be shared between them by the linker.
namespace {

SAP_HOST_DEVICE float select(bool condition, float a, float b) { return condition ? a : b; }

SAP_HOST_DEVICE float square_root(float a) { return sqrtf(a); }

// a·b + c in one rounding where the hardware has it, in two where it has not, as PyTorch does.
SAP_HOST_DEVICE float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__) || defined(SAP_FAST_FMA) || defined(__FMA__) || defined(__aarch64__)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

SAP_HOST_DEVICE float absolute(float a) { return fabsf(a); }

// NaN is dropped; whoever has to know asks is_finite.
SAP_HOST_DEVICE float maximum(float a, float b) { return a > b ? a : b; }

SAP_HOST_DEVICE bool is_finite(float a) { return fabsf(a) <= 3.402823466e+38f; }

// W + scale·d. At scale zero W as it is, whatever d holds.
template <class T>
SAP_HOST_DEVICE T perturb(T parameter, T gradient, T scale) {
  return select(scale == 0.0f, parameter, parameter + scale * gradient);
}

// W + ΔW becomes W − ΔW.
template <class T>
SAP_HOST_DEVICE T reflect(T perturbed, T parameter) {
  return 2.0f * parameter - perturbed;
}

// The safety gradient d, to rounding, from W + ΔW and W.
template <class T>
SAP_HOST_DEVICE T recover_gradient(T perturbed, T parameter, T inverse_scale) {
  return (perturbed - parameter) * inverse_scale;
}

// g + c·d. At c = 0 g as it is, whatever d holds.
template <class T>
SAP_HOST_DEVICE T blend_gradient(T gradient, T direction, T blend) {
  return select(blend == 0.0f, gradient, gradient + blend * direction);
}

// One step of AdamW with the roundings of torch.optim.AdamW(fused=True) on the CPU.
template <class T>
SAP_HOST_DEVICE void adamw(T& parameter, T gradient, T& exp_avg, T& exp_avg_sq,
                           const AdamWCoefficients& c) {
  exp_avg = multiply_add(c.gradient_weight, gradient - exp_avg, exp_avg);
  exp_avg_sq = multiply_add(c.square_weight * gradient, gradient, exp_avg_sq * c.beta2);
  const T denominator = square_root(exp_avg_sq) / c.root_correction + c.eps;
  parameter = parameter * c.decay + (c.negative_step * exp_avg) / denominator;
}

// The probe rules: h of one element to V of it.
// β·r·h/‖h‖ with `largest` = max|h| and `norm` = ‖h/largest‖.
template <class T>
SAP_HOST_DEVICE T normalized_rule(T h, float largest, float norm, float radius, float probe_size) {
  return probe_size * (((h / largest) / norm) * radius);
}

template <class T>
SAP_HOST_DEVICE T gradient_rule(T h, float perturbation_norm, float probe_size) {
  return probe_size * (h * perturbation_norm);
}

template <class T>
SAP_HOST_DEVICE T adam_rule(T h, float perturbation_norm, float probe_size) {
  const T g = h * perturbation_norm;
  return probe_size * (g / (absolute(g) + 1e-8f));
}

}  // namespace
}  // namespace sap_fast
