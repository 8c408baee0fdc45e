// The algorithm of layer_norm over Vec; the equations are in layer_norm.h. Compiled once per ISA.
#include <math.h>

#include "core/simd/rows.h"
#include "layer_norm/layer_norm_kernels.h"

namespace mlcore::MLC_ISA {
namespace {

struct Moments {
  float mean, variance;
};

// Two passes: the second is over the centred row, so that a large mean cancels nothing. What rounding left out of the first
// mean is the mean of the centred row (Chan, Golub & LeVeque 1983, the corrected two-pass algorithm).
template <class T>
Moments moments_of(const T* s, int64_t cols) {
  const float n_cols = static_cast<float>(cols);
  const float first = sum_row(cols, [&](int64_t c, int n) { return load_some(s + c, n); }) / n_cols;
  const Vec shift = Vec::set1(first);
  const auto [rest, squares] = sum_row(cols, [&](int64_t c, int n) {
    const Vec d = keep_some(load_some(s + c, n) - shift, n);
    return VecPair{d, d * d};
  });
  const float left = rest / n_cols, variance = squares / n_cols - left * left;
  return {first + left, variance < 0.0f ? 0.0f : variance};
}

template <class T, class TW, class TB>
void fwd_rows(const LayerNormFwd& p, int64_t row_begin, int64_t row_end) {
  const TW* weight = static_cast<const TW*>(p.weight.data);
  const TB* bias = static_cast<const TB*>(p.bias.data);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* s = p.residual.data ? add_rows<T>(p.cols, p.x, p.residual, p.s, r) : row<T>(p.x, r);  // (C)
    T* y = row<T>(p.y, r);                                                                         // (C)
    const Moments m = moments_of(s, p.cols);
    const float scale = 1.0f / sqrtf(m.variance + p.eps);
    if (p.mean) p.mean[r] = m.mean;
    if (p.rstd) p.rstd[r] = scale;
    const Vec mean = Vec::set1(m.mean), rstd = Vec::set1(scale);
    for_row(p.cols, [&](int64_t c, int n) {
      Vec v = (load_some(s + c, n) - mean) * rstd;
      if (weight) v = v * load_some(weight + c, n);
      if (bias) v = v + load_some(bias + c, n);
      store_some(y + c, v, n);
    });
  }
}

// Rows [r, r + N). Their terms of dweight and dbias are added before they meet the partial sums: a quarter of the traffic, and
// a shorter chain of additions over many rows.
template <class T, class TW, int N>
void bwd_group(const LayerNormBwd& p, int64_t r, float* dweight, float* dbias) {
  const TW* weight = static_cast<const TW*>(p.weight.data);
  const T *dy[N], *s[N], *ds[N];  // (N, C)
  T* dx[N];                       // (N, C)
  Vec mean[N], rstd[N], mean_g[N], mean_gx[N];
  const auto xhat = [&](int i, int64_t c, int n) { return (load_some(s[i] + c, n) - mean[i]) * rstd[i]; };
  const auto times_weight = [&](Vec d, int64_t c, int n) { return weight ? d * load_some(weight + c, n) : d; };
  for (int i = 0; i < N; ++i) {
    dy[i] = row<T>(p.dy, r + i), s[i] = row<T>(p.s, r + i), ds[i] = row<T>(p.ds, r + i), dx[i] = row<T>(p.dx, r + i);
    mean[i] = Vec::set1(p.mean[r + i]), rstd[i] = Vec::set1(p.rstd[r + i]);
    const auto [g, gx] = sum_row(p.cols, [&](int64_t c, int n) {
      const Vec v = times_weight(load_some(dy[i] + c, n), c, n);
      return VecPair{v, v * xhat(i, c, n)};
    });
    mean_g[i] = Vec::set1(g / static_cast<float>(p.cols));
    mean_gx[i] = Vec::set1(gx / static_cast<float>(p.cols));
  }
  for_row(p.cols, [&](int64_t c, int n) {
    Vec weight_terms[N], bias_terms[N];
    for (int i = 0; i < N; ++i) {
      const Vec d = load_some(dy[i] + c, n), x = xhat(i, c, n);
      Vec v = (times_weight(d, c, n) - mean_g[i] - x * mean_gx[i]) * rstd[i];
      if (ds[i]) v = v + load_some(ds[i] + c, n);
      store_some(dx[i] + c, v, n);
      weight_terms[i] = d * x, bias_terms[i] = d;
    }
    if (dweight) store_some(dweight + c, load_some(dweight + c, n) + tree_sum(weight_terms), n);
    if (dbias) store_some(dbias + c, load_some(dbias + c, n) + tree_sum(bias_terms), n);
  });
}

template <class T, class TW>
void bwd_rows(const LayerNormBwd& p, int64_t block, int64_t row_begin, int64_t row_end) {
  float* dweight = zero_partial(p.weight_partial, block, p.cols);  // (C)
  float* dbias = zero_partial(p.bias_partial, block, p.cols);      // (C)
  int64_t r = row_begin;
  for (; r + 4 <= row_end; r += 4) bwd_group<T, TW, 4>(p, r, dweight, dbias);
  for (; r < row_end; ++r) bwd_group<T, TW, 1>(p, r, dweight, dbias);
}

void fwd(const LayerNormFwd& p, int64_t row_begin, int64_t row_end) {
  with_types(p.dtype, p.weight.dtype, [&](auto t, auto w) {
    using T = decltype(t);
    using TW = decltype(w);
    if (p.bias.dtype == Dtype::f32) return fwd_rows<T, TW, float>(p, row_begin, row_end);
    fwd_rows<T, TW, T>(p, row_begin, row_end);
  });
}

void bwd(const LayerNormBwd& p, int64_t block, int64_t row_begin, int64_t row_end) {
  with_types(p.dtype, p.weight.dtype,
             [&](auto t, auto w) { bwd_rows<decltype(t), decltype(w)>(p, block, row_begin, row_end); });
}

void reduce(const LayerNormBwd& p, int64_t blocks, int64_t col_begin, int64_t col_end) {
  add_partials(p.weight_partial, blocks, p.cols, col_begin, col_end, p.dweight);
  add_partials(p.bias_partial, blocks, p.cols, col_begin, col_end, p.dbias);
}

}  // namespace

extern const LayerNormKernels layer_norm_kernels = {fwd, bwd, reduce};

}  // namespace mlcore::MLC_ISA
