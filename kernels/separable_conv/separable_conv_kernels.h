// What separable_conv.cc hands to the per-ISA kernels of separable_conv_cpu.inl: plain pointers, checked sizes.
#pragma once
#include "core/cpu_features.h"
#include "core/tensor.h"

namespace mlcore {

// (N, C, H, W) with C contiguous, but for the x of patches. data is null where the argument was left out.
struct Pixels {
  void* data = nullptr;
  int64_t n = 0, h = 0, w = 0, c = 1;  // strides
};

enum class Activation : int64_t { none, relu, relu6, silu };
// What is done with h: a is written, or its moments are taken; e and its sums, then d through the norm; d and the sums at once.
enum class HiddenPass { apply, moments, sums, norm, gradient };

constexpr int64_t kBlock = 64;        // channels of a block of the pointwise weights
constexpr int64_t kDepth = 128;       // channels of `a` that are made and multiplied at once
constexpr int64_t kPartialRows = 16;  // rows of h that a partial sum covers

struct SeparableConv {
  Pixels x, y, residual, a, da;  // a: or d, the gradient of h
  const float *depthwise, *scale, *shift, *pointwise, *bias, *mean, *by_h, *constant;
  float*
      partial;  // (blocks or strips, 3, channels): sums of v - v0 and (v - v0)^2, v0 the first value; or of e and e (h - mean)
  int64_t N, C, J, H, W, Ho, Wo;
  int64_t K[2], stride[2], dilation[2], pad[2];
  int64_t strip;  // rows of y that are computed together
  bool patches;   // the first convolution is dense: C is KH * KW * Cx
  int64_t Cx;     // channels of x
  Activation f, g;
  HiddenPass pass;
  Dtype dtype;

  int64_t strips() const { return (Ho + strip - 1) / strip; }  // of an image
};

struct SeparableConvKernels {
  int64_t (*shared)(const SeparableConv&);  // floats that all threads read, and their contents
  void (*prepare)(const SeparableConv&, float*);
  int64_t (*scratch)(const SeparableConv&, int64_t columns);  // floats a thread needs
  // Columns [begin, end) of y, multiples of kBlock but the last, of strip `strip` of the N * strips().
  void (*fwd)(const SeparableConv&, int64_t strip, int64_t begin, int64_t end, const float* shared, float* scratch);
  // Channels [begin, end), likewise, of rows [block, block + 1) * kPartialRows of the N * Ho.
  void (*hidden)(const SeparableConv&, int64_t block, int64_t begin, int64_t end, const float* shared, float* scratch);
};
MLC_KERNEL_TABLE(SeparableConvKernels, separable_conv_kernels)

}  // namespace mlcore
