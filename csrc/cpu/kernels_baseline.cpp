// Kernels for any x86-64 and any arm64.
#include "system.h"
#include "kernels_impl.h"

namespace sap_fast {

const Kernels* baseline_kernels() { return &kKernels; }

}  // namespace sap_fast
