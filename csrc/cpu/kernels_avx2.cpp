// Kernels for AVX2, FMA and F16C: Haswell, Zen and later.
#include "system.h"

#if defined(__x86_64__) && !defined(SAP_FAST_WITHOUT_AVX2)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

#define SAP_FAST_FMA
#define SAP_FAST_AVX2
#include "kernels_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace sap_fast {
const Kernels* avx2_kernels() { return &kKernels; }
}  // namespace sap_fast

#else

#include "kernels.h"

namespace sap_fast {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace sap_fast

#endif
