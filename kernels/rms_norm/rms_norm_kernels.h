// What rms_norm.cc hands to the per-ISA kernels of rms_norm_cpu.inl: plain pointers, checked sizes.
#pragma once
#include "core/cpu_features.h"
#include "core/row_args.h"

namespace mlcore {

struct RmsNormFwd {
  Rows x, residual, y, s;  // residual and s are left out together
  RowVector weight;        // may be left out
  float* rstd;
  int64_t cols;
  Dtype dtype;
  float eps;
};

struct RmsNormBwd {
  Rows dy, ds, s, dx;         // ds may be left out
  RowVector weight, dweight;  // each may be left out
  const float* rstd;
  float* partial;  // (blocks, cols), null without dweight
  int64_t cols;
  Dtype dtype;
};

struct RmsNormKernels {
  void (*fwd)(const RmsNormFwd&, int64_t row_begin, int64_t row_end);
  void (*bwd)(const RmsNormBwd&, int64_t block, int64_t row_begin, int64_t row_end);
  void (*reduce)(const RmsNormBwd&, int64_t blocks, int64_t col_begin, int64_t col_end);  // partial sums to dweight
};
MLC_KERNEL_TABLE(RmsNormKernels, rms_norm_kernels)

}  // namespace mlcore
