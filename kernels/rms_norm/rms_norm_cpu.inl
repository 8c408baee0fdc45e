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
    p.rstd[r] = 1.0f / sqrtf(total / static_cast<float>(p.cols) + p.eps);
    const Vec rstd = Vec::set1(p.rstd[r]);
    for_row(p.cols, [&](int64_t c, int n) {
      const Vec xhat = load_some(s + c, n) * rstd;
      store_some(y + c, weight ? xhat * load_some(weight + c, n) : xhat, n);
    });
  }
}

template <class T, class TW>
void bwd_rows(const RmsNormBwd& p, int64_t block, int64_t row_begin, int64_t row_end) {
  const TW* weight = static_cast<const TW*>(p.weight.data);
  float* dweight = zero_partial(p.partial, block, p.cols);  // (C)
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T *dy = row<T>(p.dy, r), *s = row<T>(p.s, r), *ds = row<T>(p.ds, r);  // (C)
    T* dx = row<T>(p.dx, r);                                                    // (C)
    const Vec rstd = Vec::set1(p.rstd[r]);
    const auto xhat = [&](int64_t c, int n) { return load_some(s + c, n) * rstd; };
    const auto g = [&](int64_t c, int n) {
      const Vec d = load_some(dy + c, n);
      return weight ? d * load_some(weight + c, n) : d;
    };
    const float total = sum_row(p.cols, [&](int64_t c, int n) { return g(c, n) * xhat(c, n); });
    const Vec mean_gx = Vec::set1(total / static_cast<float>(p.cols));
    for_row(p.cols, [&](int64_t c, int n) {
      const Vec x = xhat(c, n);
      Vec v = (g(c, n) - x * mean_gx) * rstd;
      if (ds) v = v + load_some(ds + c, n);
      if (dweight) store_some(dweight + c, fma(load_some(dy + c, n), x, load_some(dweight + c, n)), n);
      store_some(dx + c, v, n);
    });
  }
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
