// Matrix products of cache-resident fp32 tiles: C (M, N) = or += A (M, K) * B (K, N).
//   A: element (i, k) at a[i * RS + k * KS], RS and KS known at compile time: broadcasts with constant offsets.
//   B: panels of kPanel columns, each panel (K, width) contiguous; the last one may be narrower. N is a multiple of W.
//   C: row-major with leading dimension ldc.
// Every element is one chain of fused multiply-adds from 0 in order of k, then added to C: bits don't depend on the blocking,
// and sums over many tiles lose no more than their number of tiles.
#pragma once
#include "core/simd/vec.h"

namespace mlcore::MLC_ISA {

// Vectors a panel has, and rows of C a microkernel holds: rows * vectors accumulators, the vectors of B and one broadcast
// must fit the registers (16 at AVX2, 32 at AVX-512), and at least 8 accumulators hide the latency of two FMA pipes.
#if defined(MLC_ISA_AVX512)
constexpr int kPanelVecs = 4;
constexpr int micro_rows(int vecs) { return vecs == 4 ? 6 : vecs == 3 ? 8 : 12; }
#elif defined(MLC_ISA_AVX2)
constexpr int kPanelVecs = 2;
constexpr int micro_rows(int vecs) { return vecs == 2 ? 6 : 8; }
#else
constexpr int kPanelVecs = 2;
constexpr int micro_rows(int) { return 4; }
#endif
constexpr int kPanel = kPanelVecs * Vec::W;

template <int M, int NV, int RS, int KS, bool kAccumulate>
__attribute__((noinline)) void microkernel(int64_t K, const float* a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  Vec acc[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[i][n] = Vec::zero();
#pragma GCC unroll 1
  for (int64_t k = 0; k < K; ++k) {
    Vec row[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) row[n] = Vec::load(b + n * Vec::W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec x = Vec::set1(a[i * RS]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[i][n] = fma(x, row[n], acc[i][n]);
    }
    a += KS;
    b += ldb;
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) {
      float* out = c + i * ldc + n * Vec::W;
      (kAccumulate ? Vec::load(out) + acc[i][n] : acc[i][n]).store(out);
    }
}

template <int M, int NV, int RS, int KS, bool kAccumulate>
inline void last_rows(int rows, int64_t K, const float* a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  if constexpr (M > 0) {
    if (rows == M) return microkernel<M, NV, RS, KS, kAccumulate>(K, a, b, ldb, c, ldc);
    last_rows<M - 1, NV, RS, KS, kAccumulate>(rows, K, a, b, ldb, c, ldc);
  }
}

template <int NV, int RS, int KS, bool kAccumulate>
inline void gemm_panel(int M, int64_t K, const float* a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  constexpr int MR = micro_rows(NV);
  int i = 0;
  for (; i + MR <= M; i += MR) microkernel<MR, NV, RS, KS, kAccumulate>(K, a + i * RS, b, ldb, c + i * ldc, ldc);
  last_rows<MR - 1, NV, RS, KS, kAccumulate>(M - i, K, a + i * RS, b, ldb, c + i * ldc, ldc);
}

// Columns [n_begin, n_end) of C, multiples of W.
template <int RS, int KS, bool kAccumulate>
void gemm_columns(int M, int64_t n_begin, int64_t n_end, int64_t N, int64_t K, const float* a, const float* b, float* c,
                  int64_t ldc) {
  for (int64_t panel = n_begin / kPanel * kPanel; panel < n_end; panel += kPanel) {
    const int64_t ldb = min<int64_t>(kPanel, N - panel), n = max(panel, n_begin), width = min(panel + ldb, n_end) - n;
    const float* from = b + panel * K + (n - panel);
    switch (width / Vec::W) {
      case 1: gemm_panel<1, RS, KS, kAccumulate>(M, K, a, from, ldb, c + n, ldc); break;
      case 2: gemm_panel<2, RS, KS, kAccumulate>(M, K, a, from, ldb, c + n, ldc); break;
#if defined(MLC_ISA_AVX512)
      case 3: gemm_panel<3, RS, KS, kAccumulate>(M, K, a, from, ldb, c + n, ldc); break;
      case 4: gemm_panel<4, RS, KS, kAccumulate>(M, K, a, from, ldb, c + n, ldc); break;
#endif
    }
  }
}

template <int RS, int KS, bool kAccumulate>
void gemm(int M, int64_t N, int64_t K, const float* a, const float* b, float* c, int64_t ldc) {
  gemm_columns<RS, KS, kAccumulate>(M, 0, N, N, K, a, b, c, ldc);
}

// What packing multiplies an operand with: one number, or one a row.
struct OneScale {
  float value;
  Vec row(int) const { return Vec::set1(value); }
  Vec lanes(int) const { return Vec::set1(value); }
};
struct RowScale {
  const float* values;  // readable up to the row count rounded up to W
  Vec row(int r) const { return Vec::set1(values[r]); }
  Vec lanes(int r) const { return Vec::load(values + r); }
};

// The rows of src (rows, cols), scaled, as a B operand: K = rows, N = cols rounded up to W with zeros.
// Returns false when some element is infinite or NaN.
template <class T, class Scale>
bool pack_rows(const T* src, int64_t row_stride, int rows, int64_t cols, Scale scale, float* dst) {
  Vec suspect = Vec::zero();  // stays 0 while everything is finite
  const int64_t padded = round_up<int64_t>(cols, Vec::W);
  for (int64_t n = 0; n < padded; n += kPanel) {
    const int64_t width = min<int64_t>(kPanel, padded - n);
    float* panel = dst + n * rows;
    for (int r = 0; r < rows; ++r) {
      const Vec factor = scale.row(r);
      for (int64_t c = n; c < n + width; c += Vec::W) {
        const T* p = src + r * row_stride + c;
        const Vec x = c + Vec::W <= cols ? Vec::load(p) : Vec::load_n(p, static_cast<int>(cols - c));
        suspect = fma(x, Vec::zero(), suspect);
        (x * factor).store(panel + r * width + (c - n));
      }
    }
  }
  return sum(suspect) == 0.0f;
}

// The transpose of src (rows, cols), scaled: element (c, r) at dst[panel of r][c][r within the panel], panels `width` wide.
// Rows up to round_up(rows, W) are written, the padding as zeros; with width = kPanel it is a B operand with K = cols and
// N = round_up(rows, W), with one panel a K-major A operand.
template <class T, class Scale>
void pack_transposed(const T* src, int64_t row_stride, int rows, int64_t cols, Scale scale, int64_t total, int64_t width,
                     float* dst) {
  constexpr int W = Vec::W;
  for (int r = 0; r < rows; r += W) {
    const int64_t panel = r / width, ld = min<int64_t>(width, total - panel * width);
    float* out = dst + panel * width * cols + (r - panel * width);
    const Vec factor = scale.lanes(r);
    for (int64_t c = 0; c < cols; c += W) {
      const int n = static_cast<int>(min<int64_t>(W, cols - c));
      Vec block[W];
      for (int i = 0; i < W; ++i) {
        const T* p = src + (r + i) * row_stride + c;
        block[i] = r + i >= rows ? Vec::zero() : n == W ? Vec::load(p) : Vec::load_n(p, n);
      }
      transpose(block);
      for (int i = 0; i < n; ++i) (block[i] * factor).store(out + (c + i) * ld);
    }
  }
}

}  // namespace mlcore::MLC_ISA
