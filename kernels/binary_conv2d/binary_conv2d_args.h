// The arguments of binary_conv2d's functions as plain pointers and sizes, checked alike for every device.
#pragma once
#include <algorithm>

#include "core/sign_panels.h"

namespace mlcore {

struct BinaryConvPack {
  const void* x;
  Dtype dtype;
  int64_t B, C, HW, words;
  bool channels_last;
  uint32_t* to;  // (B * HW, words)
  float* scale;  // (B * HW) or null
};

struct BinaryConv {
  SignPanels w;
  const uint32_t* x;         // (B, H, W, channel_words)
  const float* pixel_scale;  // (B * Ho * Wo) or null
  int64_t B, C, H, W, Ho, Wo, kh, kw, sh, sw, dh, dw, ph, pw, channel_words;
  int32_t* tap_counts;  // CPU: (panels, kh * kw, 16): bits that are set; what a tap of zeros differs in
  void* y;
  Dtype dtype;  // of y; i32: words of signs
  bool channels_last;
};

// True where t (B, C, H, W) lies with C last; contiguous where both hold. Anything else is refused.
inline bool binary_conv_channels_last(const char* op, const Tensor& t) {
  const int64_t C = t.size(1), H = t.size(2), W = t.size(3);
  const auto is = [&](int i, int64_t stride) { return t.size(i) == 1 || t.stride(i) == stride; };
  if (t.numel() == 0 || (is(0, C * H * W) && is(1, H * W) && is(2, W) && is(3, 1))) return false;
  if (is(0, C * H * W) && is(1, 1) && is(2, W * C) && is(3, C)) return true;
  fail(MLC_INVALID_ARGUMENT, op, ": x and y must be contiguous or channels_last; got shape ", t.shape_text());
}

inline BinaryConvPack checked_binary_conv_pack(const char* op, const DLTensor* x_, DLTensor* words_, DLTensor* scale_,
                                               DLDeviceType device) {
  const Tensor x(x_, op, "x"), words(words_, op, "words"), scale(scale_, op, "scale");
  x.on(device).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B, C, H, W)");
  const int64_t B = x.size(0), C = x.size(1), H = x.size(2), W = x.size(3);
  words.on(device).dtype_in({Dtype::i32}).shape_is({B, H, W, (C + 31) / 32}, "(B, H, W, ceil(C / 32))").contiguous();
  if (scale.present()) scale.on(device).dtype_in({Dtype::f32}).shape_is({B, H, W}, "(B, H, W)").contiguous();
  return {x.raw(),
          x.dtype(),
          B,
          C,
          H * W,
          words.size(3),
          binary_conv_channels_last(op, x),
          words.data<uint32_t>(),
          scale.present() ? scale.data<float>() : nullptr};
}

inline BinaryConv checked_binary_conv(const char* op, const DLTensor* words_, const DLTensor* codes, const DLTensor* scales,
                                      const DLTensor* pixel_scale_, const DLTensor* bias, int64_t O, int64_t C, int64_t kh,
                                      int64_t kw, int64_t sh, int64_t sw, int64_t dh, int64_t dw, int64_t ph, int64_t pw,
                                      DLTensor* y_, DLDeviceType device) {
  const Tensor words(words_, op, "words"), pixel_scale(pixel_scale_, op, "pixel_scale"), y(y_, op, "y");
  words.on(device).dtype_in({Dtype::i32}).rank_is(4, "(B, H, W, ceil(C / 32))");
  y.on(device).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::i32}).rank_is(4, "of rank 4");
  require(std::min(kh, kw) >= 1 && std::max(kh, kw) < (1 << 15), op, ": kernel must be 1 to 32767; got ", kh, ", ", kw);
  require(std::min({sh, sw, dh, dw}) >= 1, op, ": stride and dilation must be at least 1; got ", sh, ", ", sw, "; ", dh, ", ",
          dw);
  require(std::min(ph, pw) >= 0, op, ": padding must be at least 0; got ", ph, ", ", pw);
  BinaryConv p{};
  p.w = SignPanels(op, codes, scales, bias, O, kh * kw, C, device);
  const int64_t B = words.size(0);
  p.B = B, p.C = C, p.H = words.size(1), p.W = words.size(2), p.channel_words = (C + 31) / 32;
  words.shape_is({B, p.H, p.W, p.channel_words}, "(B, H, W, ceil(C / 32))").contiguous();
  p.dtype = y.dtype(), p.y = y.raw();
  const bool bits = p.dtype == Dtype::i32;
  p.Ho = y.size(bits ? 1 : 2), p.Wo = y.size(bits ? 2 : 3);
  if (bits) {
    y.shape_is({B, p.Ho, p.Wo, (O + 31) / 32}, "(B, Ho, Wo, ceil(O / 32))").contiguous();
  } else {
    y.shape_is({B, O, p.Ho, p.Wo}, "(B, O, Ho, Wo)");
    p.channels_last = binary_conv_channels_last(op, y);
  }
  if (pixel_scale.present()) {
    pixel_scale.on(device).dtype_in({Dtype::f32}).shape_is({B, p.Ho, p.Wo}, "(B, Ho, Wo)").contiguous();
    p.pixel_scale = pixel_scale.data<float>();
  }
  p.kh = kh, p.kw = kw, p.sh = sh, p.sw = sw, p.dh = dh, p.dw = dw, p.ph = ph, p.pw = pw, p.x = words.data<uint32_t>();
  return p;
}

}  // namespace mlcore
