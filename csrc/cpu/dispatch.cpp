// Which kernels this machine runs.
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#include "kernels.h"

namespace sap_fast {
namespace {

bool machine_has(const char* capability) {
#if defined(__x86_64__)
  if (strcmp(capability, "avx512") == 0) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2");
  }
  // Every CPU with AVX2 has F16C.
  if (strcmp(capability, "avx2") == 0) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return strcmp(capability, "baseline") == 0;
}

const Kernels* kernels_named(const char* capability) {
  if (strcmp(capability, "avx512") == 0) return avx512_kernels();
  if (strcmp(capability, "avx2") == 0) return avx2_kernels();
  if (strcmp(capability, "baseline") == 0) return baseline_kernels();
  return nullptr;
}

}  // namespace

const char* best_cpu_capability() {
  for (const char* capability : {"avx512", "avx2"}) {
    if (kernels_named(capability) != nullptr && machine_has(capability)) return capability;
  }
  return "baseline";
}

const Kernels* cpu_kernels(const char** problem) {
  const char* wanted = getenv("SAP_FAST_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') {
    static const Kernels* const best = kernels_named(best_cpu_capability());
    return best;
  }
  const Kernels* const kernels = kernels_named(wanted);
  if (kernels == nullptr) {
    *problem = "is not known here; choose baseline, avx2 or avx512";
  } else if (!machine_has(wanted)) {
    *problem = "is an instruction set that this machine lacks";
    return nullptr;
  }
  return kernels;
}

}  // namespace sap_fast
