// Every system header that kernels use. Included before an instruction set is switched on: inline
// functions compiled for it would otherwise be shared with the rest of the program by the linker.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
