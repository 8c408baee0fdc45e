// Packing rows of x to signs, and the product of such rows with panels of signs. The counting is core/simd/xnor.h's; the
// equations are in binary_linear.h. Compiled once per ISA.
#include "binary_linear/binary_linear_kernels.h"
#include "core/simd/xnor.h"

namespace mlcore::MLC_ISA {
namespace {

void pack(const BinaryPack& p, int64_t row_begin, int64_t row_end) {
  with_type(p.dtype, [&](auto type) {
    for (int64_t r = row_begin; r < row_end; ++r) {
      const auto* x = row<decltype(type)>(p.x, r);
      sign_words(x, p.K, p.to + r * p.words);
      if (p.row_scale) p.row_scale[r] = mean_magnitude(x, p.K);
    }
  });
}

void run(const BinaryLinear& p, int64_t row_begin, int64_t row_end, int64_t panel) {
  const int64_t n0 = panel * 16, width = min<int64_t>(kSignColumns, p.w.N - n0);
  for_counted_rows(p.w, p.a + row_begin * p.w.words, p.w.words, row_end - row_begin, panel,
                   [&](int64_t i, const int32_t* counts) {
                     const int64_t r = row_begin + i;
                     float y[kSignColumns];
                     scale_counts(p.w, n0, width, p.K, counts, p.row_scale ? p.row_scale + r : nullptr, y);
                     if (p.dtype == Dtype::i32) {
                       sign_words(y, width, row<uint32_t>(p.y, r) + n0 / 32);
                       return;
                     }
                     with_type(p.dtype, [&](auto type) {
                       auto* to = row<decltype(type)>(p.y, r) + n0;
                       for_row(width, [&](int64_t c, int n) { store_some(to + c, load_some(y + c, n), n); });
                     });
                   });
}

}  // namespace

extern const BinaryLinearKernels binary_linear_kernels = {pack, run};

}  // namespace mlcore::MLC_ISA
