// What separable_conv.cc hands to the per-ISA kernels of separable_conv_backward.inl: the backward of a product in strips.
#pragma once
#include "separable_conv/separable_conv_kernels.h"

namespace mlcore {

struct SeparableBackward {
  SeparableConv conv;                            // a: e or d, the result; J, strip
  Pixels dy, z;                                  // z null: dy is dz
  const float *scale, *shift, *by_z, *constant;  // dz = scale * dy * g'(scale * z + shift) + by_z * z + constant
  const float* weights;                          // (ceil(C/64), J, 64): (J, C) in panels of columns, 0 beyond C
  float* partial;                                // (parts, J, columns()): dpointwise of each part's strips
  int64_t parts;
  bool writes_e;  // a norm's sums are wanted before d is known

  int64_t columns() const { return (conv.C + 31) / 32 * 32; }
};

struct SeparableBackwardKernels {
  int64_t (*scratch)(const SeparableBackward&);  // floats a thread needs
  void (*run)(const SeparableBackward&, int64_t part, const float* shared, float* scratch);
  // Rows [begin, end) of (J, C), multiples of kBlock but the last, as the forward's pointwise blocks.
  void (*pack)(const float* matrix, int64_t C, int64_t begin, int64_t end, float* blocks);
};
MLC_KERNEL_TABLE(SeparableBackwardKernels, separable_backward_kernels)

}  // namespace mlcore
