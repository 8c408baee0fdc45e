// What depthwise_conv.cc hands to the per-ISA kernels: plain pointers, checked sizes. Planes are in depthwise_conv_cpu.inl,
// pixels in depthwise_conv_pixels_cpu.inl.
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

  int64_t volume() const { return size[0] * size[1] * size[2]; }
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
  const Volume& results() const { return y.data ? y : dy; }
};

// W contiguous.
struct DepthwisePlanes {
  int64_t (*scratch)(const DepthwiseConv&);                                       // floats a thread needs
  void (*fwd)(const DepthwiseConv&, int64_t begin, int64_t end, float* scratch);  // planes [begin, end) of the N * C
  // Channels [begin, end) of a block of the batch: dx, and their partial sums.
  void (*bwd)(const DepthwiseConv&, int64_t block, int64_t begin, int64_t end, float* scratch);
};
MLC_KERNEL_TABLE(DepthwisePlanes, depthwise_planes)
MLC_KERNEL_TABLE(DepthwisePlanes, depthwise_direct)  // the same where direct(p)

// Planes that are read where they lie: float32, several lines, and strides and dilations that lines of a tile share inputs at.
inline bool direct(const DepthwiseConv& p) {
  const int64_t s = p.stride[1];
  const bool strided = s == 2 && p.dilation[1] == 1 && p.dilation[2] == 1;
  return p.dtype == Dtype::f32 && p.stride[2] == s && (s == 1 || strided) && p.results().size[1] >= 4;
}

// C contiguous. Rows come in strips of strip(p, backward), which share the lines that they read.
struct DepthwisePixels {
  int64_t (*scratch)(const DepthwiseConv&);       // floats a thread needs
  int64_t (*shared)(const DepthwiseConv&);        // floats that all threads read: weights by taps, a pixel of zeros
  void (*prepare)(const DepthwiseConv&, float*);  // writes them
  int64_t (*strip)(const DepthwiseConv&, bool backward);
  // Strips [begin, end) of the N * D planes' of y, or of dx, and channels [c, c + channels).
  void (*rows)(const DepthwiseConv&, bool backward, int64_t begin, int64_t end, int64_t c, int64_t channels,
               const float* shared, float* scratch);
  // Partial sums of a block.
  void (*dweight)(const DepthwiseConv&, int64_t block, int64_t c, int64_t channels, const float* shared, float* scratch);
  void (*reduce)(const DepthwiseConv&, int64_t begin, int64_t end);  // partial sums of channels to dweight and dbias
};
MLC_KERNEL_TABLE(DepthwisePixels, depthwise_pixels)

}  // namespace mlcore
