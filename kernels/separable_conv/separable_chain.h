// What separable_chain.cc hands to the per-ISA kernels of separable_chain.inl: one layer of a chain with its weights packed.
// Activations are float32 (images, H, W, channels), a pixel `ld` floats from the next; the x of patches has strides of its own.
#pragma once
#include "separable_conv/separable_conv_kernels.h"

namespace mlcore {

// Floats from a pixel of so many channels to the next, within the chain: pixels a multiple of a KiB apart share so few sets of
// the L1 cache that the window of a filter doesn't fit in.
inline int64_t chain_ld(int64_t channels) { return channels % 256 == 0 ? channels + 16 : channels; }

enum class ChainKind : int64_t { patches, pointwise, separable, mean };

// A step of the chain over some images. A part of it is a run of rows of y: within one image, or whole images. Pointwise
// layers see their pixels as one image with rows of one pixel.
struct ChainStep {
  SeparableConv conv;  // sizes; x: of patches alone. C: channels of the product, Cx: of x
  ChainKind kind;
  const float *in, *residual;
  float* out;
  int64_t in_ld, out_ld, residual_ld;
  const float *depthwise, *shift;  // (taps, C), (C): h begins with the shift
  const float *weights, *bias;    // panels of 64 columns of (C, J), each (C, width), width a multiple of 16; bias: padded to 64
  const float* zeros;             // a pixel of x
  const ChainStep* expand;        // a pointwise step whose y, what a part needs of it, is x of this one; or null
  int64_t images, rows, columns;  // of a part: images is 1 where rows isn't Ho
  int64_t row_parts, column_parts;

  int64_t parts() const { return (conv.N + images - 1) / images * row_parts * column_parts; }
};

struct SeparableChainKernels {
  int64_t (*scratch)(const ChainStep&);  // floats a thread needs
  void (*run)(const ChainStep&, int64_t part, float* scratch);
};
MLC_KERNEL_TABLE(SeparableChainKernels, separable_chain_kernels)

}  // namespace mlcore
