// What depthwise_conv.cc hands to the per-ISA kernels of depthwise_conv_cpu.inl: plain pointers, checked sizes.
#pragma once
#include "core/cpu_features.h"
#include "core/tensor.h"

namespace mlcore {

// (N, C, D, H, W) with its strides. data is null where the argument was left out.
struct Volume {
  void* data = nullptr;
  int64_t n = 0, c = 0;
  int64_t s[3] = {};     // strides of D, H, W
  int64_t size[3] = {};  // D, H, W
};

struct DepthwiseConv {
  Volume x, y;                 // forward
  Volume dx, dy;               // backward
  const float *weight, *bias;  // (C*M, taps), (C*M)
  float *dweight, *dbias;
  float* partial;  // (blocks, taps + 1, C*M)
  int64_t N, C, M, taps, blocks;
  int64_t K[3], stride[3], dilation[3], pad[3];
  Dtype dtype;
  bool planar;  // contiguous in W, else in C

  int64_t channels_out() const { return C * M; }
};

struct DepthwiseConvKernels {
  int64_t (*scratch)(const DepthwiseConv&);  // floats a thread needs
  // Planes [begin, end) of the N * C (W contiguous), or channels [c, c + channels) of output rows [begin, end) of the
  // N * Do * Ho (C contiguous).
  void (*fwd_planes)(const DepthwiseConv&, int64_t begin, int64_t end, float* scratch);
  void (*fwd_rows)(const DepthwiseConv&, int64_t begin, int64_t end, int64_t c, int64_t channels, float* scratch);
  // Block p of channel c, dx and the partial sums; dx of rows of the N * D * H; partial sums of block p.
  void (*bwd_planes)(const DepthwiseConv&, int64_t p, int64_t c, float* scratch);
  void (*dx_rows)(const DepthwiseConv&, int64_t begin, int64_t end, int64_t c, int64_t channels, float* scratch);
  void (*dweight_rows)(const DepthwiseConv&, int64_t p, int64_t c, int64_t channels, float* scratch);
  void (*reduce)(const DepthwiseConv&, int64_t begin, int64_t end);  // partial sums to dweight and dbias
};
MLC_KERNEL_TABLE(DepthwiseConvKernels, depthwise_conv_kernels)

}  // namespace mlcore
