// The algorithm of rms_norm over Vec; the equations are in rms_norm.h. Compiled once per ISA.
#include <math.h>

#include "core/simd/rows.h"
#include "rms_norm/rms_norm_kernels.h"

namespace mlcore::MLC_ISA {
namespace {

template <class T, class TW>
void fwd_rows(const RmsNormFwd& p, int64_t row_begin, int64_t row_end) {
  const TW* weight = static_cast<const TW*>(p.weight.data);
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* s = p.residual.data ? add_rows<T>(p.cols, p.x, p.residual, p.s, r) : row<T>(p.x, r);  // (C)
    T* y = row<T>(p.y, r);                                                                         // (C)
    const float total = sum_row(p.cols, [&](int64_t c, int n) {
      const Vec v = load_some(s + c, n);
      return v * v;
    });
    const float scale = 1.0f / sqrtf(total / static_cast<float>(p.cols) + p.eps);
    if (p.rstd) p.rstd[r] = scale;
    const Vec rstd = Vec::set1(scale);
    for_row(p.cols, [&](int64_t c, int n) {
      const Vec xhat = load_some(s + c, n) * rstd;
      store_some(y + c, weight ? xhat * load_some(weight + c, n) : xhat, n);
    });
  }
}

// Rows [r, r + N). Their terms of dweight are added before they meet the partial sum: a quarter of the traffic, and a shorter
// chain of additions over many rows.
template <class T, class TW, int N>
void bwd_group(const RmsNormBwd& p, int64_t r, float* dweight) {
  const TW* weight = static_cast<const TW*>(p.weight.data);
  const T *dy[N], *s[N], *ds[N];  // (N, C)
  T* dx[N];                       // (N, C)
  Vec rstd[N], mean_gx[N];
  const auto xhat = [&](int i, int64_t c, int n) { return load_some(s[i] + c, n) * rstd[i]; };
  const auto times_weight = [&](Vec d, int64_t c, int n) { return weight ? d * load_some(weight + c, n) : d; };
  for (int i = 0; i < N; ++i) {
    dy[i] = row<T>(p.dy, r + i), s[i] = row<T>(p.s, r + i), ds[i] = row<T>(p.ds, r + i), dx[i] = row<T>(p.dx, r + i);
    rstd[i] = Vec::set1(p.rstd[r + i]);
    const float gx =
        sum_row(p.cols, [&](int64_t c, int n) { return times_weight(load_some(dy[i] + c, n), c, n) * xhat(i, c, n); });
    mean_gx[i] = Vec::set1(gx / static_cast<float>(p.cols));
  }
  for_row(p.cols, [&](int64_t c, int n) {
    Vec weight_terms[N];
    for (int i = 0; i < N; ++i) {
      const Vec d = load_some(dy[i] + c, n), x = xhat(i, c, n);
      Vec v = (times_weight(d, c, n) - x * mean_gx[i]) * rstd[i];
      if (ds[i]) v = v + load_some(ds[i] + c, n);
      store_some(dx[i] + c, v, n);
      weight_terms[i] = d * x;
    }
    if (dweight) store_some(dweight + c, load_some(dweight + c, n) + tree_sum(weight_terms), n);
  });
}

template <class T, class TW>
void bwd_rows(const RmsNormBwd& p, int64_t block, int64_t row_begin, int64_t row_end) {
  float* dweight = zero_partial(p.partial, block, p.cols);  // (C)
  int64_t r = row_begin;
  for (; r + 4 <= row_end; r += 4) bwd_group<T, TW, 4>(p, r, dweight);
  for (; r < row_end; ++r) bwd_group<T, TW, 1>(p, r, dweight);
}

void fwd(const RmsNormFwd& p, int64_t row_begin, int64_t row_end) {
  with_types(p.dtype, p.weight.dtype, [&](auto t, auto w) { fwd_rows<decltype(t), decltype(w)>(p, row_begin, row_end); });
}

void bwd(const RmsNormBwd& p, int64_t block, int64_t row_begin, int64_t row_end) {
  with_types(p.dtype, p.weight.dtype,
             [&](auto t, auto w) { bwd_rows<decltype(t), decltype(w)>(p, block, row_begin, row_end); });
}

void reduce(const RmsNormBwd& p, int64_t blocks, int64_t col_begin, int64_t col_end) {
  add_partials(p.partial, blocks, p.cols, col_begin, col_end, p.dweight);
}

}  // namespace

extern const RmsNormKernels rms_norm_kernels = {fwd, bwd, reduce};

}  // namespace mlcore::MLC_ISA
