// What binary_linear.cc hands to the per-ISA kernels of binary_linear_cpu.inl: plain pointers and checked sizes.
#pragma once
#include "core/row_args.h"
#include "core/sign_panels.h"

namespace mlcore {

struct BinaryPack {
  Rows x;
  Dtype dtype;
  int64_t K, words;
  uint32_t* to;      // (M, words)
  float* row_scale;  // (M) or null
};

struct BinaryLinear {
  SignPanels w;
  const uint32_t* a;       // (M, w.words)
  const float* row_scale;  // (M) or null
  int64_t K;
  Rows y;
  Dtype dtype;  // of y; i32: words of signs
};

struct BinaryLinearKernels {
  void (*pack)(const BinaryPack&, int64_t row_begin, int64_t row_end);
  void (*run)(const BinaryLinear&, int64_t row_begin, int64_t row_end, int64_t panel);  // four panels
};
MLC_KERNEL_TABLE(BinaryLinearKernels, binary_linear_kernels)

}  // namespace mlcore
