// The CPU kernels: each works on one contiguous piece of memory, on the calling thread.
#pragma once

#include <stdint.h>

#include "../coefficients.h"

namespace sap_fast {

// How far ahead of the loops memory is asked for, in bytes. The hardware prefetcher stops at the
// end of every page of 4 KB and follows few streams at a time; AdamW has five.
constexpr int64_t kPrefetchDistance = 2048;

// What elements are stored as. Arithmetic is in fp32 for all of them.
enum Storage { kFloat32, kBFloat16, kFloat16, kStorages };

enum Rule { kGradient, kNormalized, kAdam };

struct RuleCoefficients {
  Rule rule;
  float probe_size;
  float perturbation_norm;
  float largest;  // max |h| of the layer
  float norm;     // ‖h / largest‖ of the layer
  float radius;
};

// One set of kernels for one instruction set. Arrays are indexed by Storage.
struct Kernels {
  const char* name;

  // Sums lane k over the elements congruent to k mod 64 and then the lanes by halves, in double but
  // for runs of 16 terms: the same bits for every instruction set.
  double (*dot[kStorages])(const void* left, const void* right, int64_t size);
  void (*perturb_swap[kStorages])(void* params, void* buffers, int64_t size, float scale);
  void (*reflect[kStorages])(void* params, const void* buffers, int64_t size);
  void (*restore_swap[kStorages])(void* params, void* buffers, int64_t size, float inverse_scale);
  // `directions` may be null.
  void (*adamw_blend[kStorages])(void* params, const void* grads, float* exp_avgs,
                                 float* exp_avg_sqs, const void* directions, int64_t size,
                                 const GradientCoefficients& gradient,
                                 const AdamWCoefficients& adamw);
  // out = hidden + offset.
  void (*probe_add[kStorages])(void* out, const void* hidden, const float* offset, int64_t size);
  // buffer[0:columns] += sign · Σ_rows gradient, rows `stride` elements apart.
  void (*probe_project[kStorages])(float* buffer, const void* gradient, int64_t rows,
                                   int64_t stride, int64_t columns, float sign);
  // max |h|, ignoring NaN; `finite` is set to false if an element is not finite.
  float (*largest)(const float* h, int64_t size, bool* finite);
  // Σ (h / largest)², as `dot` sums.
  double (*sum_unit_squares)(const float* h, int64_t size, float largest);
  void (*probe_rule)(float* h, int64_t size, const RuleCoefficients& coefficients);
};

// Null where the compiler cannot build them.
const Kernels* baseline_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The name of the best instruction set of this machine that there are kernels for: "baseline",
// "avx2" or "avx512".
const char* best_cpu_capability();

// The kernels for this machine, or for the lesser instruction set that the environment variable
// SAP_FAST_CPU_CAPABILITY names (for tests, and to compare). Null, with `problem` set, if it names
// one that is unknown or that this machine lacks.
const Kernels* cpu_kernels(const char** problem);

}  // namespace sap_fast
