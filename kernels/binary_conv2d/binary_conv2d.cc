// Validates and shares pixels and columns out to threads. The contract is binary_conv2d.h, the arithmetic
// binary_conv2d_cpu.inl.
#include "binary_conv2d/binary_conv2d.h"

#include <algorithm>

#include "binary_conv2d/binary_conv2d_kernels.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "binary_conv2d";
constexpr int64_t kPackPixels = 256;  // an item's: each channel's part of a plane is then several cache lines
constexpr int64_t kPanels = 4;        // that are counted together
thread_local Scratch shared_scratch;  // of the calling thread; its workers get slices

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void pack(const DLTensor* x, DLTensor* words, DLTensor* scale) {
  const BinaryConvPack p = checked_binary_conv_pack(kOp, x, words, scale, kDLCPU);
  const BinaryConvKernels& kernels = binary_conv2d_kernels_now();
  const int64_t parts = ceil_div(p.HW, kPackPixels);
  parallel_claim(p.B * parts, num_threads(), [&](int64_t i, int) {
    const int64_t begin = i % parts * kPackPixels;
    kernels.pack(p, i / parts, begin, std::min(begin + kPackPixels, p.HW));
  });
}

void fwd(const DLTensor* words, const DLTensor* codes, const DLTensor* scales, const DLTensor* pixel_scale,
         const DLTensor* bias, int64_t O, int64_t C, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t dh, int64_t dw,
         int64_t ph, int64_t pw, DLTensor* y) {
  BinaryConv p =
      checked_binary_conv(kOp, words, codes, scales, pixel_scale, bias, O, C, kh, kw, sh, sw, dh, dw, ph, pw, y, kDLCPU);
  p.w.popcount = has(Extension::vpopcntdq);
  const int64_t B = p.B, pixels = p.Ho * p.Wo, threads = num_threads();
  if (B * pixels == 0 || O == 0) return;
  // An image's pixels in even parts of whole tiles of six; columns are cut too where pixels alone don't keep the threads busy.
  const int64_t wanted = ceil_div(pixels, kConvPixels), part = std::min(ceil_div(ceil_div(pixels, wanted), 6) * 6, kConvPixels);
  const int64_t parts = ceil_div(pixels, part), blocks = ceil_div(p.w.panels, kPanels);
  const int64_t cuts = std::clamp<int64_t>(ceil_div(8 * threads, B * parts), 1, blocks), cut = ceil_div(blocks, cuts) * kPanels;
  const int64_t per_thread = ceil_div(kConvPixels * p.w.words, 16) * 16, taps = p.w.panels * kh * kw * 16;
  float* scratch = shared_scratch.floats(static_cast<size_t>(taps + threads * per_thread));
  p.tap_counts = reinterpret_cast<int32_t*>(scratch);
  uint32_t* own = reinterpret_cast<uint32_t*>(scratch + taps);
  const BinaryConvKernels& kernels = binary_conv2d_kernels_now();
  parallel_for(p.w.panels, 16, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) kernels.count_taps(p, panel);
  });
  parallel_claim(B * parts * cuts, static_cast<int>(threads), [&](int64_t i, int thread) {
    const int64_t panel = i % cuts * cut, begin = i / cuts % parts * part;
    if (panel < p.w.panels)
      kernels.run(p, i / cuts / parts, begin, std::min(begin + part, pixels), panel, std::min(panel + cut, p.w.panels),
                  own + thread * per_thread);
  });
  shared_scratch.release_if_large();
}

}  // namespace
}  // namespace mlcore

int mlc_binary_conv2d_pack(const DLTensor* x, DLTensor* words, DLTensor* scale) {
  return mlcore::guard([&] { mlcore::pack(x, words, scale); });
}

int mlc_binary_conv2d_fwd(const DLTensor* words, const DLTensor* codes, const DLTensor* scales, const DLTensor* pixel_scale,
                          const DLTensor* bias, int64_t O, int64_t C, int64_t kh, int64_t kw, int64_t sh, int64_t sw,
                          int64_t dh, int64_t dw, int64_t ph, int64_t pw, DLTensor* y) {
  return mlcore::guard([&] { mlcore::fwd(words, codes, scales, pixel_scale, bias, O, C, kh, kw, sh, sw, dh, dw, ph, pw, y); });
}
