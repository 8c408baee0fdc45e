// AVX-512 intrinsics on machines without AVX-512, for tests: SIMDe's, and here the ones that its releases lack. Needs AVX2.
// An intrinsic that a kernel uses and the compiler refuses ("target specific option mismatch") is added at the end.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <string.h>

namespace mlcore::MLC_ISA::emulated {

// Part i of x, counted in parts of Part's size.
template <class Part, class Whole>
inline Part part(const Whole& x, int i) {
  Part p;
  memcpy(&p, reinterpret_cast<const char*>(&x) + i * sizeof(Part), sizeof p);
  return p;
}
template <class Whole, class Part>
inline Whole join(Part low, Part high) {
  static_assert(sizeof(Whole) == 2 * sizeof(Part));
  Whole x;
  memcpy(&x, &low, sizeof low);
  memcpy(reinterpret_cast<char*>(&x) + sizeof low, &high, sizeof high);
  return x;
}

inline __m512 maskz_loadu_ps(__mmask16 lanes, const float* p) {  // memory of other lanes is not touched
  float x[16] = {};
  for (int i = 0; i < 16; ++i)
    if ((lanes >> i) & 1) x[i] = p[i];
  return _mm512_loadu_ps(x);
}
inline void mask_storeu_ps(float* p, __mmask16 lanes, __m512 v) {
  float x[16];
  memcpy(x, &v, sizeof x);
  for (int i = 0; i < 16; ++i)
    if ((lanes >> i) & 1) p[i] = x[i];
}
inline __m512i cvtepu16_epi32(__m256i v) {
  return join<__m512i>(_mm256_cvtepu16_epi32(part<__m128i>(v, 0)), _mm256_cvtepu16_epi32(part<__m128i>(v, 1)));
}
inline __m256i cvtepi32_epi16(__m512i v) {  // truncates
  const __m256i low = _mm256_set1_epi32(0xffff);
  const __m256i a = _mm256_and_si256(part<__m256i>(v, 0), low), b = _mm256_and_si256(part<__m256i>(v, 1), low);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
}
inline __m512i cvtps_epi32(__m512 v) {
  return join<__m512i>(_mm256_cvtps_epi32(part<__m256>(v, 0)), _mm256_cvtps_epi32(part<__m256>(v, 1)));
}
inline __m512 cvtph_ps(__m256i v) {
  return join<__m512>(_mm256_cvtph_ps(part<__m128i>(v, 0)), _mm256_cvtph_ps(part<__m128i>(v, 1)));
}
template <int kRounding>
inline __m256i cvtps_ph(__m512 v) {
  static_assert((kRounding & 7) == _MM_FROUND_TO_NEAREST_INT);
  return join<__m256i>(_mm256_cvtps_ph(part<__m256>(v, 0), _MM_FROUND_TO_NEAREST_INT),
                       _mm256_cvtps_ph(part<__m256>(v, 1), _MM_FROUND_TO_NEAREST_INT));
}
inline __m512i cvtepu8_epi32(__m128i v) {
  return join<__m512i>(_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)));
}
inline __m512 cvtepi32_ps(__m512i v) {
  return join<__m512>(_mm256_cvtepi32_ps(part<__m256i>(v, 0)), _mm256_cvtepi32_ps(part<__m256i>(v, 1)));
}
inline __m512i madd_epi16(__m512i a, __m512i b) {
  return join<__m512i>(_mm256_madd_epi16(part<__m256i>(a, 0), part<__m256i>(b, 0)),
                       _mm256_madd_epi16(part<__m256i>(a, 1), part<__m256i>(b, 1)));
}
inline __m512 shuffle_f32x4(__m512 a, __m512 b, int pick) {
  return join<__m512>(join<__m256>(part<__m128>(a, pick & 3), part<__m128>(a, (pick >> 2) & 3)),
                      join<__m256>(part<__m128>(b, (pick >> 4) & 3), part<__m128>(b, (pick >> 6) & 3)));
}
template <int kRounding>
inline __m512 reduce_ps(__m512 v) {  // v - floor(v)
  static_assert((kRounding & 0xf7) == _MM_FROUND_TO_NEG_INF);
  float x[16];
  memcpy(x, &v, sizeof x);
  for (float& a : x) a = __builtin_isinf(a) ? 0.0f : a - __builtin_floorf(a);
  return _mm512_loadu_ps(x);
}
inline __m512 maskz_scalef_ps(__mmask16 lanes, __m512 v, __m512 power) {
  float x[16], n[16];
  memcpy(x, &v, sizeof x);
  memcpy(n, &power, sizeof n);
  for (int i = 0; i < 16; ++i) {
    const float whole = __builtin_floorf(n[i]);
    if (!((lanes >> i) & 1)) {
      x[i] = 0.0f;
    } else if (whole != whole) {
      x[i] = whole;
    } else {
      x[i] = __builtin_ldexpf(x[i], whole > 300.0f ? 300 : whole < -300.0f ? -300 : static_cast<int>(whole));
    }
  }
  return _mm512_loadu_ps(x);
}

}  // namespace mlcore::MLC_ISA::emulated

// Later releases of SIMDe have some of these: theirs stay.
#if !defined(_mm512_maskz_loadu_ps)
#define _mm512_maskz_loadu_ps(lanes, p) emulated::maskz_loadu_ps(lanes, p)
#endif
#if !defined(_mm512_mask_storeu_ps)
#define _mm512_mask_storeu_ps(p, lanes, v) emulated::mask_storeu_ps(p, lanes, v)
#endif
#if !defined(_mm512_cvtepu16_epi32)
#define _mm512_cvtepu16_epi32(v) emulated::cvtepu16_epi32(v)
#endif
#if !defined(_mm512_cvtepi32_epi16)
#define _mm512_cvtepi32_epi16(v) emulated::cvtepi32_epi16(v)
#endif
#if !defined(_mm512_cvtps_epi32)
#define _mm512_cvtps_epi32(v) emulated::cvtps_epi32(v)
#endif
#if !defined(_mm512_cvtph_ps)
#define _mm512_cvtph_ps(v) emulated::cvtph_ps(v)
#endif
#if !defined(_mm512_cvtps_ph)
#define _mm512_cvtps_ph(v, rounding) emulated::cvtps_ph<rounding>(v)
#endif
#if !defined(_mm512_reduce_ps)
#define _mm512_reduce_ps(v, rounding) emulated::reduce_ps<rounding>(v)
#endif
#if !defined(_mm512_maskz_scalef_ps)
#define _mm512_maskz_scalef_ps(lanes, v, power) emulated::maskz_scalef_ps(lanes, v, power)
#endif
#if !defined(_mm512_extractf32x8_ps)
#define _mm512_extractf32x8_ps(v, i) (emulated::part<__m256>(v, i))
#endif
#if !defined(_mm512_shuffle_f32x4)
#define _mm512_shuffle_f32x4(a, b, pick) emulated::shuffle_f32x4(a, b, pick)
#endif
#if !defined(_mm512_cvtepi32_ps)
#define _mm512_cvtepi32_ps(v) emulated::cvtepi32_ps(v)
#endif
#if !defined(_mm512_cvtepu8_epi32)
#define _mm512_cvtepu8_epi32(v) emulated::cvtepu8_epi32(v)
#endif

#undef _mm512_madd_epi16  // SIMDe 0.7 gives this name to the masked form
#define _mm512_madd_epi16(a, b) emulated::madd_epi16(a, b)
