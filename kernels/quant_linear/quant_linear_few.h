// Few rows of x: codes of 2 or 4 bits are decoded in registers and used at once, by up to four rows; the decoded weights
// never touch memory. Same products in the same order as tile(). AVX-512 only, and not emulated: its many variants take a
// minute to compile there. Included by quant_linear_cpu.inl only.
#pragma once
#include "quant_linear/quant_linear_dot.h"

#if defined(MLC_ISA_AVX512) && !defined(MLC_EMULATE_AVX512)
#define MLC_IN_REGISTERS 1
#else
#define MLC_IN_REGISTERS 0
#endif

namespace mlcore::MLC_ISA {
namespace {

constexpr int kFewRows = 4;  // at a time
// 4096 x 4096 codes of 4 bits: two passes take 1.5 ms where decoding to memory takes 2.3; three 2.6 against 2.0 to 2.4.
constexpr int64_t kMostFew = 8;

#if MLC_IN_REGISTERS
constexpr int kAhead = 1024;  // bytes of a panel's codes asked for before they are used

// kPer units a vector of codes. Integers: the shifted codes are the factor. Floats: looked up in table, minus zero.
template <class Dot, int kPer, int M, int NP, bool kZeros>
__attribute__((noinline)) void few_tile(const Tile& from, __m512 table) {
  const Tile t = from;
  typename Dot::Acc acc[M][NP];
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < NP; ++n) acc[i][n] = begin_sum<Dot>(t, i, n);
  const char *a = t.a, *b = t.b;
  const int64_t a_stride = Dot::kInteger ? t.a_stride : 4, b_stride = t.b_stride;
#pragma GCC unroll 1
  for (int64_t u = 0; u < t.units; u += kPer) {
#pragma GCC unroll 8
    for (int j = 0; j < kPer; ++j)
#pragma GCC unroll 4
      for (int k = 0; k < (Dot::kInteger ? 1 : 4); ++k) {
#pragma GCC unroll 8
        for (int n = 0; n < NP; ++n) {
          const __m512i word = _mm512_loadu_si512(b + n * b_stride);
          const __m512i shifted = _mm512_srli_epi32(word, static_cast<unsigned>(8 / kPer * j + 8 * k));
          if constexpr (Dot::kInteger) {
            const __m512i q = _mm512_and_si512(shifted, _mm512_set1_epi8((1 << (8 / kPer)) - 1));
#pragma GCC unroll 4
            for (int i = 0; i < M; ++i) acc[i][n] = Dot::step(acc[i][n], Dot::broadcast(a + i * a_stride), {q});
          } else {
            Vec w{_mm512_permutexvar_ps(shifted, table)};
            if constexpr (kZeros) w = w - IVec::widen(t.zeros + n * t.scale_stride).to_float();
#pragma GCC unroll 4
            for (int i = 0; i < M; ++i) acc[i][n] = Dot::step(acc[i][n], Dot::broadcast(a + i * a_stride), w);
          }
        }
        a += Dot::kInteger ? 4 : 4 * M;
      }
#pragma GCC unroll 8
    for (int n = 0; n < NP; ++n) __builtin_prefetch(b + n * b_stride + kAhead, 0, 3);
    b += 64;
  }
  end_sums<Dot>(t, acc);
}

template <class Dot, int kPer, int NP, int M = kFewRows>
inline void any_few_rows(int rows, const Tile& t, __m512 table) {
  if constexpr (M > 0) {
    if (rows != M) return any_few_rows<Dot, kPer, NP, M - 1>(rows, t, table);
    if constexpr (!Dot::kInteger)
      if (t.zeros) return few_tile<Dot, kPer, M, NP, true>(t, table);
    few_tile<Dot, kPer, M, NP, false>(t, table);
  }
}

template <class Dot, int kPer>
inline void any_few_tile(int rows, int64_t panels, const Tile& t, __m512 table) {
  if (rows == 1 && panels == 8 && (Dot::kInteger || !t.zeros)) return few_tile<Dot, kPer, 1, 8, false>(t, table);
  Tile part = t;
  for (int64_t n = 0, step; n < panels; n += step) {
    step = panels - n >= 4 ? 4 : 1;
    step == 4 ? any_few_rows<Dot, kPer, 4>(rows, part, table) : any_few_rows<Dot, kPer, 1>(rows, part, table);
    part.b += step * t.b_stride, part.c += step * 16, part.partial += step * 16, part.scales += step * t.scale_stride;
    if (t.zeros) part.zeros += step * t.scale_stride;
  }
}
#endif

}  // namespace
}  // namespace mlcore::MLC_ISA
