// What binary_conv2d.cc hands to the per-ISA kernels of binary_conv2d_cpu.inl: plain pointers and checked sizes.
#pragma once
#include "binary_conv2d/binary_conv2d_args.h"
#include "core/cpu_features.h"

namespace mlcore {

// Pixels of y that an item takes at most: their words, their 64 columns of y and four panels of a usual weight (256 channels, 3
// x 3) fill the L1.
constexpr int64_t kConvPixels = 48;

struct BinaryConvKernels {
  void (*pack)(const BinaryConvPack&, int64_t image, int64_t pixel_begin, int64_t pixel_end);
  void (*count_taps)(const BinaryConv&, int64_t panel);
  // At most kConvPixels pixels of an image, times panels [panel_begin, panel_end); scratch: kConvPixels * w.words words.
  void (*run)(const BinaryConv&, int64_t image, int64_t pixel_begin, int64_t pixel_end, int64_t panel_begin, int64_t panel_end,
              uint32_t* scratch);
};
MLC_KERNEL_TABLE(BinaryConvKernels, binary_conv2d_kernels)

}  // namespace mlcore
