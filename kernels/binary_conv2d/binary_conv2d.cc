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

// True where t (B, C, H, W) lies with C last; contiguous where both hold. Anything else is refused.
bool last_channels(const Tensor& t) {
  const int64_t C = t.size(1), H = t.size(2), W = t.size(3);
  const auto is = [&](int i, int64_t stride) { return t.size(i) == 1 || t.stride(i) == stride; };
  if (t.numel() == 0 || (is(0, C * H * W) && is(1, H * W) && is(2, W) && is(3, 1))) return false;
  if (is(0, C * H * W) && is(1, 1) && is(2, W * C) && is(3, C)) return true;
  fail(MLC_INVALID_ARGUMENT, kOp, ": x and y must be contiguous or channels_last; got shape ", t.shape_text());
}

void pack(const DLTensor* x_, DLTensor* words_, DLTensor* scale_) {
  const Tensor x(x_, kOp, "x"), words(words_, kOp, "words"), scale(scale_, kOp, "scale");
  x.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B, C, H, W)");
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  words.on(kDLCPU).dtype_in({Dtype::i32}).shape_is({B, H, W, ceil_div(C, 32)}, "(B, H, W, ceil(C / 32))").contiguous();
  if (scale.present()) scale.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({B, H, W}, "(B, H, W)").contiguous();
  const BinaryConvPack p{x.raw(),
                         x.dtype(),
                         C,
                         H * W,
                         words.size(3),
                         last_channels(x),
                         words.data<uint32_t>(),
                         scale.present() ? scale.data<float>() : nullptr};
  const BinaryConvKernels& kernels = binary_conv2d_kernels_now();
  const int64_t parts = ceil_div(p.HW, kPackPixels);
  parallel_claim(B * parts, num_threads(), [&](int64_t i, int) {
    const int64_t begin = i % parts * kPackPixels;
    kernels.pack(p, i / parts, begin, std::min(begin + kPackPixels, p.HW));
  });
}

void fwd(const DLTensor* words_, const DLTensor* codes, const DLTensor* scales, const DLTensor* pixel_scale_,
         const DLTensor* bias, int64_t O, int64_t C, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t dh, int64_t dw,
         int64_t ph, int64_t pw, DLTensor* y_) {
  const Tensor words(words_, kOp, "words"), pixel_scale(pixel_scale_, kOp, "pixel_scale"), y(y_, kOp, "y");
  words.on(kDLCPU).dtype_in({Dtype::i32}).rank_is(4, "(B, H, W, ceil(C / 32))");
  y.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::i32}).rank_is(4, "of rank 4");
  require(std::min(kh, kw) >= 1 && std::max(kh, kw) < (1 << 15), kOp, ": kernel must be 1 to 32767; got ", kh, ", ", kw);
  require(std::min({sh, sw, dh, dw}) >= 1, kOp, ": stride and dilation must be at least 1; got ", sh, ", ", sw, "; ", dh, ", ",
          dw);
  require(std::min(ph, pw) >= 0, kOp, ": padding must be at least 0; got ", ph, ", ", pw);
  BinaryConv p{};
  p.w = SignPanels(kOp, codes, scales, bias, O, kh * kw, C);
  const int64_t B = words.size(0);
  p.C = C, p.H = words.size(1), p.W = words.size(2), p.channel_words = ceil_div(C, 32);
  words.shape_is({B, p.H, p.W, p.channel_words}, "(B, H, W, ceil(C / 32))").contiguous();
  p.dtype = y.dtype(), p.y = y.raw();
  const bool bits = p.dtype == Dtype::i32;
  p.Ho = y.size(bits ? 1 : 2), p.Wo = y.size(bits ? 2 : 3);
  if (bits) {
    y.shape_is({B, p.Ho, p.Wo, ceil_div(O, 32)}, "(B, Ho, Wo, ceil(O / 32))").contiguous();
  } else {
    y.shape_is({B, O, p.Ho, p.Wo}, "(B, O, Ho, Wo)");
    p.channels_last = last_channels(y);
  }
  if (pixel_scale.present()) {
    pixel_scale.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({B, p.Ho, p.Wo}, "(B, Ho, Wo)").contiguous();
    p.pixel_scale = pixel_scale.data<float>();
  }
  p.kh = kh, p.kw = kw, p.sh = sh, p.sw = sw, p.dh = dh, p.dw = dw, p.ph = ph, p.pw = pw, p.x = words.data<uint32_t>();
  const int64_t pixels = p.Ho * p.Wo, threads = num_threads();
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
