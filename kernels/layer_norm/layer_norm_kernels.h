// What layer_norm.cc hands to the per-ISA kernels of layer_norm_cpu.inl: plain pointers, checked sizes.
#pragma once
#include "core/cpu_features.h"
#include "core/row_args.h"

namespace mlcore {

struct LayerNormFwd {
  Rows x, residual, y, s;  // residual and s are left out together
  RowVector weight, bias;  // each may be left out
  float *mean, *rstd;
  int64_t cols;
  Dtype dtype;
  float eps;
};

struct LayerNormBwd {
  Rows dy, ds, s, dx;  // ds may be left out
  RowVector weight, dweight, dbias;
  const float *mean, *rstd;
  float *weight_partial, *bias_partial;  // (blocks, cols) each, null without dweight or dbias
  int64_t cols;
  Dtype dtype;
};

struct LayerNormKernels {
  void (*fwd)(const LayerNormFwd&, int64_t row_begin, int64_t row_end);
  void (*bwd)(const LayerNormBwd&, int64_t block, int64_t row_begin, int64_t row_end);
  void (*reduce)(const LayerNormBwd&, int64_t blocks, int64_t col_begin, int64_t col_end);  // partial sums to dweight, dbias
};
MLC_KERNEL_TABLE(LayerNormKernels, layer_norm_kernels)

}  // namespace mlcore
