// IVec: W lanes of int32 beside Vec. Included by quant_linear_cpu.inl only.
#pragma once
#include "core/simd/vec.h"

namespace mlcore::MLC_ISA {
namespace {

// W lanes of int32, with the arithmetic of int32 that wraps.
struct IVec {
#if defined(MLC_ISA_AVX512)
  __m512i v;
  static IVec load(const void* p) { return {_mm512_loadu_si512(p)}; }
  static IVec set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static IVec widen(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
  IVec times(IVec o) const { return {_mm512_mullo_epi32(v, o.v)}; }
  IVec minus(IVec o) const { return {_mm512_sub_epi32(v, o.v)}; }
  IVec plus(IVec o) const { return {_mm512_add_epi32(v, o.v)}; }
  // Pairs of 16-bit numbers, two to a lane: the even and the odd bytes as such, with and without sign; sums of products.
  IVec even() const { return {_mm512_and_si512(v, _mm512_set1_epi16(255))}; }
  IVec odd() const { return {_mm512_srli_epi16(v, 8)}; }
  IVec signed_even() const { return {_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8)}; }
  IVec signed_odd() const { return {_mm512_srai_epi16(v, 8)}; }
  IVec madd(IVec o) const { return {_mm512_madd_epi16(v, o.v)}; }
  IVec maddubs(IVec o) const { return {_mm512_maddubs_epi16(v, o.v)}; }  // of unsigned bytes with signed ones, saturating
  template <int kShift>
  IVec byte() const {  // bits [kShift, kShift + 8) of each lane
    return {_mm512_and_si512(_mm512_srli_epi32(v, kShift), _mm512_set1_epi32(255))};
  }
  Vec to_float() const { return {_mm512_cvtepi32_ps(v)}; }
#elif defined(MLC_ISA_AVX2)
  __m256i v;
  static IVec load(const void* p) { return {_mm256_loadu_si256(static_cast<const __m256i*>(p))}; }
  static IVec set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static IVec widen(const uint8_t* p) { return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))}; }
  void store(int32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  IVec times(IVec o) const { return {_mm256_mullo_epi32(v, o.v)}; }
  IVec minus(IVec o) const { return {_mm256_sub_epi32(v, o.v)}; }
  IVec plus(IVec o) const { return {_mm256_add_epi32(v, o.v)}; }
  IVec even() const { return {_mm256_and_si256(v, _mm256_set1_epi16(255))}; }
  IVec odd() const { return {_mm256_srli_epi16(v, 8)}; }
  IVec signed_even() const { return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8)}; }
  IVec signed_odd() const { return {_mm256_srai_epi16(v, 8)}; }
  IVec madd(IVec o) const { return {_mm256_madd_epi16(v, o.v)}; }
  IVec maddubs(IVec o) const { return {_mm256_maddubs_epi16(v, o.v)}; }
  template <int kShift>
  IVec byte() const {
    return {_mm256_and_si256(_mm256_srli_epi32(v, kShift), _mm256_set1_epi32(255))};
  }
  Vec to_float() const { return {_mm256_cvtepi32_ps(v)}; }
#else
  uint32_t v[Vec::W];
  template <class F>
  static IVec each(F&& f) {
    IVec r;
    for (int i = 0; i < Vec::W; ++i) r.v[i] = static_cast<uint32_t>(f(i));
    return r;
  }
  static IVec load(const void* p) {
    IVec r;
    memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static IVec set1(int32_t x) {
    return each([&](int) { return x; });
  }
  static IVec widen(const uint8_t* p) {
    return each([&](int i) { return p[i]; });
  }
  void store(int32_t* p) const { memcpy(p, v, sizeof v); }
  IVec times(IVec o) const {
    return each([&](int i) { return v[i] * o.v[i]; });
  }
  IVec minus(IVec o) const {
    return each([&](int i) { return v[i] - o.v[i]; });
  }
  template <int kShift>
  IVec byte() const {
    return each([&](int i) { return (v[i] >> kShift) & 255u; });
  }
  Vec to_float() const {
    Vec r;
    for (int i = 0; i < Vec::W; ++i) r.v[i] = static_cast<float>(static_cast<int32_t>(v[i]));
    return r;
  }
#endif
};

}  // namespace
}  // namespace mlcore::MLC_ISA
