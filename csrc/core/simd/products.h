// Products of row-major fp32 matrices with leading dimensions known at run time, also triangular ones, which core/simd/gemm.h,
// with its packed panels, doesn't offer: C (M, N) from A (M, K) and B (K, N), N a multiple of W.
// An element is one chain of fused multiply-adds from 0 in order of k, and meets C last: bits don't depend on the blocking.
#pragma once
#include "core/simd/vec.h"

namespace mlcore::MLC_ISA {

// A's memory: rows (M, K) or columns (K, M). Which k an element of row i takes: all, k <= i or k >= i (then M = K).
enum class A { rows, columns };
enum class Take { all, up_to_row, from_row };
enum class Into { store, add, subtract, decay_add };  // decay_add: C[i,:] = factors[i] * C[i,:] + product

// Registers: rows * vectors accumulators, the vectors of B and one broadcast fit, and eight accumulators hide the latency.
#if defined(MLC_ISA_AVX512)
constexpr int kWideVecs = 4;
constexpr int tile_rows_of(int vecs) { return vecs == 4 ? 6 : 8; }
#elif defined(MLC_ISA_AVX2)
constexpr int kWideVecs = 2;
constexpr int tile_rows_of(int vecs) { return vecs == 2 ? 6 : 8; }
#else
constexpr int kWideVecs = 2;
constexpr int tile_rows_of(int) { return 4; }
#endif

struct Target {
  float* c;
  int64_t ldc;
  Into into;
  const float* factors;
};

// Rows [i0, i0 + M) of C, N = NV vectors; a is at row i0, k = 0; b and c at row 0 and i0.
template <int M, int NV, A kA, Take kTake>
__attribute__((noinline)) void tile_product(int64_t i0, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb,
                                            const Target& t) {
  Vec acc[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[i][n] = Vec::zero();
  const auto element = [&](int i, int64_t k) { return Vec::set1(kA == A::rows ? a[i * lda + k] : a[k * lda + i]); };
  const auto some_rows = [&](int64_t k, int first, int last) {
    Vec row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) row[n] = Vec::load(b + k * ldb + n * Vec::W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i)
      if (i >= first && i < last) {
        const Vec x = element(i, k);
#pragma GCC unroll 4
        for (int n = 0; n < NV; ++n) acc[i][n] = fma(x, row[n], acc[i][n]);
      }
  };
  int64_t k = kTake == Take::from_row ? i0 : 0;
  if constexpr (kTake == Take::from_row) {
#pragma GCC unroll 16
    for (int s = 0; s < M; ++s) some_rows(k + s, 0, s + 1);
    k += M;
  }
  const int64_t end = kTake == Take::up_to_row ? i0 : K;
#pragma GCC unroll 1
  for (; k < end; ++k) some_rows(k, 0, M);
  if constexpr (kTake == Take::up_to_row) {
#pragma GCC unroll 16
    for (int s = 0; s < M; ++s) some_rows(k + s, s, M);
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      float* out = t.c + i * t.ldc + n * Vec::W;
      Vec x = acc[i][n];
      switch (t.into) {
        case Into::store: break;
        case Into::add: x = Vec::load(out) + x; break;
        case Into::subtract: x = Vec::load(out) - x; break;
        case Into::decay_add: x = fma(Vec::set1(t.factors[i]), Vec::load(out), x); break;
      }
      x.store(out);
    }
}

template <int M, int NV, A kA, Take kTake>
inline void rows_product(int64_t i, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, const Target& t) {
  const Target at{t.c + i * t.ldc, t.ldc, t.into, t.factors ? t.factors + i : nullptr};
  tile_product<M, NV, kA, kTake>(i, K, kA == A::rows ? a + i * lda : a + i, lda, b, ldb, at);
}

template <int NV, A kA, Take kTake>
inline void panel_product(int64_t M, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, const Target& t) {
  constexpr int MR = tile_rows_of(NV);
  int64_t i = 0;
  for (; i + MR <= M; i += MR) rows_product<MR, NV, kA, kTake>(i, K, a, lda, b, ldb, t);
  if (M - i >= 4) rows_product<4, NV, kA, kTake>(i, K, a, lda, b, ldb, t), i += 4;
  if (M - i >= 2) rows_product<2, NV, kA, kTake>(i, K, a, lda, b, ldb, t), i += 2;
  if (M - i >= 1) rows_product<1, NV, kA, kTake>(i, K, a, lda, b, ldb, t);
}

template <A kA, Take kTake>
void product(int64_t M, int64_t N, int64_t K, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
             Into into, const float* factors = nullptr) {
  constexpr int64_t kWide = kWideVecs * Vec::W;
  for (int64_t n = 0; n < N; n += kWide) {
    const Target t{c + n, ldc, into, factors};
    switch (min<int64_t>(kWide, N - n) / Vec::W) {
      case 1: panel_product<1, kA, kTake>(M, K, a, lda, b + n, ldb, t); break;
      case 2: panel_product<2, kA, kTake>(M, K, a, lda, b + n, ldb, t); break;
#if defined(MLC_ISA_AVX512)
      case 3: panel_product<3, kA, kTake>(M, K, a, lda, b + n, ldb, t); break;
      case 4: panel_product<4, kA, kTake>(M, K, a, lda, b + n, ldb, t); break;
#endif
    }
  }
}

}  // namespace mlcore::MLC_ISA
