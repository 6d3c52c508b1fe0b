// A register of floats, and how it is read from and written to fp32, bf16 and fp16 memory.
//
// Included by kernels_impl.h once per instruction set, which the including file has switched on:
// SAP_FAST_AVX512, SAP_FAST_AVX2, or neither for what every x86-64 or arm64 has. Everything has
// internal linkage, so that no code for one instruction set is linked into another's path.
#pragma once

#if !defined(SAP_HOST_DEVICE)
#define SAP_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace sap_fast {
namespace {

#if defined(SAP_FAST_AVX512)
constexpr int kLanes = 16;
#elif defined(SAP_FAST_AVX2)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Vectors of the compiler: operators work lane by lane, and a float beside a vector stands for all
// lanes.
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Mask __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// What math.h asks of a type.
SAP_HOST_DEVICE Vec select(Mask condition, Vec a, Vec b);
SAP_HOST_DEVICE Vec square_root(Vec a);
SAP_HOST_DEVICE Vec multiply_add(Vec a, Vec b, Vec c);
SAP_HOST_DEVICE Vec multiply_add(float a, Vec b, Vec c);
SAP_HOST_DEVICE Vec absolute(Vec a);
SAP_HOST_DEVICE Vec maximum(Vec a, Vec b);
SAP_HOST_DEVICE Mask is_finite(Vec a);

}  // namespace
}  // namespace sap_fast

#include "../math.h"

namespace sap_fast {
namespace {

// ---- arithmetic ----

// Minus zero, which keeps the sign of a zero; plus zero would not.
SAP_HOST_DEVICE Vec broadcast(float value) { return value - Vec{}; }

SAP_HOST_DEVICE Vec select(Mask condition, Vec a, Vec b) { return condition ? a : b; }

SAP_HOST_DEVICE Vec absolute(Vec a) { return (Vec)((Bits)a & 0x7fffffffu); }

SAP_HOST_DEVICE Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

SAP_HOST_DEVICE Mask is_finite(Vec a) { return absolute(a) <= 3.402823466e+38f; }

#if defined(SAP_FAST_AVX512)
SAP_HOST_DEVICE Vec square_root(Vec a) { return (Vec)_mm512_sqrt_ps((__m512)a); }
SAP_HOST_DEVICE Vec multiply_add(Vec a, Vec b, Vec c) {
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
#elif defined(SAP_FAST_AVX2)
SAP_HOST_DEVICE Vec square_root(Vec a) { return (Vec)_mm256_sqrt_ps((__m256)a); }
SAP_HOST_DEVICE Vec multiply_add(Vec a, Vec b, Vec c) {
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
SAP_HOST_DEVICE Vec square_root(Vec a) {
  for (int lane = 0; lane < kLanes; ++lane) a[lane] = sqrtf(a[lane]);
  return a;
}
SAP_HOST_DEVICE Vec multiply_add(Vec a, Vec b, Vec c) {
  for (int lane = 0; lane < kLanes; ++lane) c[lane] = multiply_add(a[lane], b[lane], c[lane]);
  return c;
}
#endif

SAP_HOST_DEVICE Vec multiply_add(float a, Vec b, Vec c) { return multiply_add(broadcast(a), b, c); }

// ---- memory ----

// kLanes elements as they are stored: to be copied bit for bit, or widened to floats.
template <class S>
struct Stored;

template <>
struct Stored<float> {
  Vec elements;
};

template <>
struct Stored<BFloat16> {
  Halves elements;
};

template <>
struct Stored<Float16> {
  Halves elements;
};

#if defined(SAP_FAST_AVX512)
SAP_HOST_DEVICE Bits widen_bits(Halves halves) {
  return (Bits)_mm512_cvtepu16_epi32((__m256i)halves);
}
SAP_HOST_DEVICE Halves narrow_bits(Bits bits) {
  return (Halves)_mm512_cvtepi32_epi16((__m512i)bits);
}
SAP_HOST_DEVICE Vec widen(Stored<Float16> value) {
  return (Vec)_mm512_cvtph_ps((__m256i)value.elements);
}
SAP_HOST_DEVICE void round_to(Stored<Float16>& to, Vec value) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  to.elements = (Halves)_mm512_cvtps_ph((__m512)value, kNearest);
}
#elif defined(SAP_FAST_AVX2)
SAP_HOST_DEVICE Bits widen_bits(Halves halves) {
  return (Bits)_mm256_cvtepu16_epi32((__m128i)halves);
}
// Of numbers below 2^16.
SAP_HOST_DEVICE Halves narrow_bits(Bits bits) {
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)bits),
                                  _mm256_extracti128_si256((__m256i)bits, 1));
}
SAP_HOST_DEVICE Vec widen(Stored<Float16> value) {
  return (Vec)_mm256_cvtph_ps((__m128i)value.elements);
}
SAP_HOST_DEVICE void round_to(Stored<Float16>& to, Vec value) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  to.elements = (Halves)_mm256_cvtps_ph((__m256)value, kNearest);
}
#else
SAP_HOST_DEVICE Bits widen_bits(Halves halves) { return __builtin_convertvector(halves, Bits); }
SAP_HOST_DEVICE Halves narrow_bits(Bits bits) { return __builtin_convertvector(bits, Halves); }

// No conversion instruction can be relied on: bit by bit.
SAP_HOST_DEVICE float half_to_float(uint16_t half) {
  const uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t fraction = half & 0x3ffu;
  uint32_t bits;
  if (exponent == 0x1f) {
    bits = sign | 0x7f800000u | (fraction << 13) | (fraction ? 0x400000u : 0u);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  } else {
    // Subnormal: the fraction counts units of 2^-24.
    const float magnitude = (float)fraction * 0x1p-24f;
    return sign ? -magnitude : magnitude;
  }
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}

SAP_HOST_DEVICE uint16_t float_to_half(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((magnitude >> 13) & 0x3ffu));
  if (magnitude >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves units of 2^-24 in the last place, rounded to the nearest even.
    float absolute_value;
    memcpy(&absolute_value, &magnitude, sizeof absolute_value);
    const float shifted = absolute_value + 0.5f;
    memcpy(&bits, &shifted, sizeof bits);
    return (uint16_t)(sign | (bits - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return (uint16_t)(sign | ((rounded - 0x38000000u) >> 13));
}

SAP_HOST_DEVICE Vec widen(Stored<Float16> value) {
  Vec result;
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = half_to_float(value.elements[lane]);
  return result;
}
SAP_HOST_DEVICE void round_to(Stored<Float16>& to, Vec value) {
  for (int lane = 0; lane < kLanes; ++lane) to.elements[lane] = float_to_half(value[lane]);
}
#endif

SAP_HOST_DEVICE Vec widen(Stored<BFloat16> value) {
  return (Vec)(widen_bits(value.elements) << 16);
}

// To the nearest, ties to even; every NaN becomes the quiet one that PyTorch writes.
SAP_HOST_DEVICE void round_to(Stored<BFloat16>& to, Vec value) {
  const Bits bits = (Bits)value;
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.elements = narrow_bits(value == value ? rounded : Bits{} + 0x7fc0u);
}

SAP_HOST_DEVICE Vec widen(Stored<float> value) { return value.elements; }
SAP_HOST_DEVICE void round_to(Stored<float>& to, Vec value) { to.elements = value; }

// The lanes of a register that lie inside of an array. What is outside reads as zero and is not
// written, so that the last elements go through the same arithmetic as all others.
struct AllLanes {};
struct FirstLanes {
  int64_t count;
};

template <class S>
SAP_HOST_DEVICE Stored<S> fetch(const S* from, AllLanes) {
  __builtin_prefetch(reinterpret_cast<const char*>(from) + kPrefetchDistance);
  Stored<S> value;
  memcpy(&value, from, sizeof value);
  return value;
}
template <class S>
SAP_HOST_DEVICE void put(S* to, Stored<S> value, AllLanes) {
  memcpy(to, &value, sizeof value);
}

#if defined(SAP_FAST_AVX512)
SAP_HOST_DEVICE __mmask16 mask_of(FirstLanes lanes) {
  return (__mmask16)((1u << lanes.count) - 1u);
}
SAP_HOST_DEVICE Stored<float> fetch(const float* from, FirstLanes lanes) {
  return {(Vec)_mm512_maskz_loadu_ps(mask_of(lanes), from)};
}
SAP_HOST_DEVICE void put(float* to, Stored<float> value, FirstLanes lanes) {
  _mm512_mask_storeu_ps(to, mask_of(lanes), (__m512)value.elements);
}
// bf16 and fp16.
template <class S>
SAP_HOST_DEVICE Stored<S> fetch(const S* from, FirstLanes lanes) {
  return {(Halves)_mm256_maskz_loadu_epi16(mask_of(lanes), from)};
}
template <class S>
SAP_HOST_DEVICE void put(S* to, Stored<S> value, FirstLanes lanes) {
  _mm256_mask_storeu_epi16(to, mask_of(lanes), (__m256i)value.elements);
}
#else
template <class S>
SAP_HOST_DEVICE Stored<S> fetch(const S* from, FirstLanes lanes) {
  Stored<S> value = {};
  memcpy(&value, from, (size_t)lanes.count * sizeof(S));
  return value;
}
template <class S>
SAP_HOST_DEVICE void put(S* to, Stored<S> value, FirstLanes lanes) {
  memcpy(to, &value, (size_t)lanes.count * sizeof(S));
}
#endif

template <class S, class Lanes>
SAP_HOST_DEVICE Vec load(const S* from, Lanes lanes) {
  return widen(fetch(from, lanes));
}
template <class S, class Lanes>
SAP_HOST_DEVICE void store(S* to, Vec value, Lanes lanes) {
  Stored<S> rounded;
  round_to(rounded, value);
  put(to, rounded, lanes);
}

// Calls body(index, lanes) for every register of an array of `size` elements.
template <class Body>
SAP_HOST_DEVICE void for_each_vector(int64_t size, const Body& body) {
  int64_t index = 0;
  for (; index + kLanes <= size; index += kLanes) body(index, AllLanes{});
  if (index < size) body(index, FirstLanes{size - index});
}

}  // namespace
}  // namespace sap_fast
