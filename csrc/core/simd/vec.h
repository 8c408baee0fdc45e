// Vec: W fp32 lanes of the ISA that this translation unit is compiled for, and the 16-bit float types it loads and stores.
// Everything lives in the ISA's own namespace (MLC_ISA), so that no AVX-512 copy of a template can serve an older CPU:
// for the same reason .inl files use no std:: algorithms. Widths: scalar 4 (plain C++), avx2 8, avx512 16.
#pragma once
#include <stdint.h>
#include <string.h>

#ifndef MLC_ISA
#error "compile through the per-ISA translation units that CMakeLists.txt writes"
#endif

namespace mlcore::MLC_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
inline T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
inline T round_up(T a, T b) {
  return ceil_div(a, b) * b;
}

inline float float_of(uint32_t bits) {
  float f;
  memcpy(&f, &bits, sizeof f);
  return f;
}
inline uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, sizeof bits);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16, body = h.bits & 0x7fffu;
  if (body >= 0x7c00u) return float_of(sign | 0x7f800000u | ((body & 0x3ffu) << 13) | (body > 0x7c00u ? 0x400000u : 0u));
  if (body >= 0x400u) return float_of(sign | ((body << 13) + (112u << 23)));
  const float magnitude = static_cast<float>(body) * float_of(103u << 23);  // subnormal: body * 2^-24
  return float_of(sign | bits_of(magnitude));
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t b = bits_of(x);
  if ((b & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((b >> 16) | 0x40u)};
  return {static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16)};
}
template <>
inline f16 from_float<f16>(float x) {
  const uint32_t b = bits_of(x), sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
  if (a > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u | ((a >> 13) & 0x3ffu))};
  if (a >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds beyond 65504
  if (a < 0x38800000u) {                                                 // subnormal: adding 2^-1 rounds to multiples of 2^-24
    return {static_cast<uint16_t>(sign | (bits_of(float_of(a) + 0.5f) - bits_of(0.5f)))};
  }
  return {static_cast<uint16_t>(sign | ((a - (112u << 23) + 0xfffu + ((a >> 13) & 1u)) >> 13))};
}

}  // namespace mlcore::MLC_ISA

#if defined(MLC_ISA_AVX512)
#include "core/simd/vec_avx512.h"
#elif defined(MLC_ISA_AVX2)
#include "core/simd/vec_avx2.h"
#else
#include "core/simd/vec_scalar.h"
#endif

namespace mlcore::MLC_ISA {

// 1 + f p(f) by Horner's rule, c from the highest degree down.
template <int N>
inline Vec one_plus_polynomial(Vec f, const float (&c)[N]) {
  Vec p = Vec::set1(c[0]);
#pragma GCC unroll 8
  for (int i = 1; i < N; ++i) p = fma(p, f, Vec::set1(c[i]));
  return fma(p, f, Vec::set1(1.0f));
}

// 2^x to 1.1 ulp for x in [-126, 127]; exactly 0 for x <= -127 (at AVX-512 below -126), and -inf gives 0. No input above 127 is
// expected. NaN stays NaN. Minimax polynomials of 2^f, relative error 2.0e-9 before rounding: AVX-512 has instructions for
// x - floor(x) and p * 2^floor(x), so f is in [0, 1) there (1.75 ns against 2.8 for sixteen), elsewhere in [-1/2, 1/2].
inline Vec exp2(Vec x) {
#if defined(MLC_ISA_AVX512)
  constexpr float c[] = {2.161291497e-4f, 1.246784645e-3f, 9.675451565e-3f, 5.548528062e-2f, 2.402293056e-1f, 6.931470444e-1f};
  return scale_by_floor_power(one_plus_polynomial(above_floor(x), c), x);
#else
  constexpr float c[] = {1.535341493e-4f, 1.33989008e-3f, 9.618437383e-3f, 5.55033241e-2f, 2.402264791e-1f, 6.931472029e-1f};
  x = max(Vec::set1(-127.0f), x);
  const Vec n = round(x);
  return scale_by_power(one_plus_polynomial(x - n, c), n);
#endif
}

}  // namespace mlcore::MLC_ISA
