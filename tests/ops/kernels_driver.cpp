// Runs the CPU kernels without PyTorch and prints what they computed, for one machine's to be
// compared with another's. A line per kernel, storage and size, for every instruction set there is.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <vector>

#include "../../csrc/cpu/kernels.h"

using namespace sap_fast;

namespace {

constexpr const char* kStorageNames[kStorages] = {"float32", "bfloat16", "float16"};

uint64_t state;

uint32_t next_bits() {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(state >> 32);
}

uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Numbers as they are in a model; every 61st one is of any bits: tiny, huge, infinite or NaN.
float next_float(bool any) {
  if (any && next_bits() % 61 == 0) return float_of(next_bits());
  return ((float)(int32_t)next_bits() / 1073741824.0f) * 0.5f;
}

// Elements of one storage, in memory that starts one element after an aligned address.
struct Elements {
  Storage storage;
  int64_t size;
  std::vector<uint32_t> wide;
  std::vector<uint16_t> narrow;

  Elements(Storage storage, int64_t size, bool any) : storage(storage), size(size) {
    if (storage == kFloat32) {
      wide.resize(size + 1);
    } else {
      narrow.resize(size + 1);
    }
    for (int64_t k = 1; k <= size; ++k) {
      if (storage == kFloat32) {
        wide[k] = bits_of(next_float(any));
      } else if (storage == kBFloat16) {
        narrow[k] = (uint16_t)(bits_of(next_float(any)) >> 16);
      } else {
        // From 2⁻¹⁴ to 2, and for some whatever the bits say.
        const uint32_t bits = next_bits();
        narrow[k] = (uint16_t)((any && bits % 61 == 0) ? bits >> 16 : (bits >> 16) % 0x4000u);
      }
    }
  }

  void* data() { return storage == kFloat32 ? (void*)&wide[1] : (void*)&narrow[1]; }

  // The bits of an element, those of one NaN for any: its payload is the processor's choice.
  uint32_t element(int64_t k) const {
    if (storage == kFloat32) return (wide[k] & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : wide[k];
    const uint16_t infinite = storage == kBFloat16 ? 0x7f80 : 0x7c00;
    return (narrow[k] & 0x7fff) > infinite ? 0x7fffu : narrow[k];
  }
};

uint64_t digest(const Elements& elements) {
  uint64_t hash = 14695981039346656037u;
  for (int64_t k = 1; k <= elements.size; ++k) {
    hash = (hash ^ elements.element(k)) * 1099511628211u;
  }
  return hash;
}

void print(const char* kernel, Storage storage, int64_t size, const Elements& elements) {
  printf("%s %s %lld %016llx\n", kernel, kStorageNames[storage], (long long)size,
         (unsigned long long)digest(elements));
}

void print_double(const char* kernel, Storage storage, int64_t size, double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  printf("%s %s %lld %016llx\n", kernel, kStorageNames[storage], (long long)size,
         (unsigned long long)(value == value ? bits : 0));
}

void run(const Kernels& kernels, Storage storage, int64_t size, bool any) {
  state = 1000 * size + storage;
  Elements p(storage, size, any), b(storage, size, any), g(storage, size, any);
  Elements m(kFloat32, size, false), v(kFloat32, size, false);
  for (int64_t k = 1; k <= size; ++k) v.wide[k] &= 0x7fffffffu;

  // Sums over elements of any bits are not finite, and say nothing.
  Elements x(storage, size, false), y(storage, size, false);
  print_double("dot", storage, size, kernels.dot[storage](x.data(), y.data(), size));
  print_double("square", storage, size, kernels.dot[storage](x.data(), x.data(), size));

  kernels.perturb_swap[storage](p.data(), b.data(), size, 0.37f);
  print("perturb_swap", storage, size, p);
  print("perturb_swap buffer", storage, size, b);
  kernels.reflect[storage](p.data(), b.data(), size);
  print("reflect", storage, size, p);
  kernels.restore_swap[storage](p.data(), b.data(), size, -2.7f);
  print("restore_swap", storage, size, p);
  print("restore_swap buffer", storage, size, b);

  const AdamWCoefficients adamw = {0.999f, 0.1f, 0.999f, 0.001f, -0.01f, 0.3f, 1e-8f};
  const GradientCoefficients gradient = {-1.0f, 0.3f, 0.7f};
  for (const void* directions : {(const void*)nullptr, (const void*)b.data()}) {
    kernels.adamw_blend[storage](p.data(), g.data(), (float*)m.data(), (float*)v.data(), directions,
                                 size, gradient, adamw);
    print("adamw_blend", storage, size, p);
    print("adamw_blend exp_avgs", storage, size, m);
    print("adamw_blend exp_avg_sqs", storage, size, v);
  }

  Elements offset(kFloat32, size, any), out(storage, size, false);
  kernels.probe_add[storage](out.data(), g.data(), (const float*)offset.data(), size);
  print("probe_add", storage, size, out);

  constexpr int64_t kRows = 71;
  Elements rows(storage, kRows * size, false), sum(kFloat32, size, false);
  kernels.probe_project[storage]((float*)sum.data(), rows.data(), kRows, size, size, -1.0f);
  print("probe_project", storage, size, sum);
}

void run_rules(const Kernels& kernels, int64_t size) {
  state = size;
  const Elements start(kFloat32, size, false);
  bool finite = true;
  Elements h = start;
  const float largest = kernels.largest((const float*)h.data(), size, &finite);
  print_double("largest", kFloat32, size, finite ? largest : -1.0);
  const double squares = kernels.sum_unit_squares((const float*)h.data(), size, largest);
  print_double("sum_unit_squares", kFloat32, size, squares);
  for (const Rule rule : {kGradient, kNormalized, kAdam}) {
    h = start;
    kernels.probe_rule((float*)h.data(), size, {rule, 0.003f, 0.2f, largest, (float)squares, 3.5f});
    print("probe_rule", kFloat32, size, h);
  }
  h.wide[size] = 0x7f800000u;
  kernels.largest((const float*)h.data(), size, &finite);
  printf("finite %d\n", finite);
}

}  // namespace

int main() {
  for (const char* capability : {"baseline", "avx2", "avx512"}) {
    setenv("SAP_FAST_CPU_CAPABILITY", capability, 1);
    const char* problem = nullptr;
    const Kernels* const kernels = cpu_kernels(&problem);
    if (kernels == nullptr) continue;
    printf("[%s]\n", capability);
    for (const int64_t size : {1, 3, 4, 7, 15, 16, 63, 64, 65, 577, 1024, 3001}) {
      for (int storage = 0; storage < kStorages; ++storage) {
        for (const bool any : {false, true}) run(*kernels, (Storage)storage, size, any);
      }
      run_rules(*kernels, size);
    }
  }
  return 0;
}
