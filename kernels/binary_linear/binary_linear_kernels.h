// What binary_linear.cc hands to the per-ISA kernels of binary_linear_cpu.inl: plain pointers and checked sizes.
#pragma once
#include "binary_linear/binary_linear_args.h"
#include "core/cpu_features.h"

namespace mlcore {

struct BinaryLinearKernels {
  void (*pack)(const BinaryPack&, int64_t row_begin, int64_t row_end);
  void (*run)(const BinaryLinear&, int64_t row_begin, int64_t row_end, int64_t panel);  // four panels
};
MLC_KERNEL_TABLE(BinaryLinearKernels, binary_linear_kernels)

}  // namespace mlcore
