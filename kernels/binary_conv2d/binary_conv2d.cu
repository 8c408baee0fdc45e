// The CUDA kernels of binary_conv2d and their launchers: packing of planes, and which words lie under a pixel of y. The
// counting is cuda/signs.cuh's, rows being pixels; the equations are in binary_conv2d.h. The same text runs on the CPU in
// tests.
#include "binary_conv2d/binary_conv2d.h"
#include "binary_conv2d/binary_conv2d_args.h"
#include "cuda/signs.cuh"

namespace mlcore::cuda {
namespace {

constexpr const char* kOp = "binary_conv2d";

struct ConvWords {
  static constexpr bool kPadded = true;
  struct Row {
    int64_t image;  // its first word; -1: no such pixel
    int top, left;
  };
  const uint32_t* x;
  int C, H, W, Ho, Wo, kh, kw, sh, sw, dh, dw, ph, pw, channel_words;
  uint32_t tail;
  MLC_DEVICE Row row(int m, int M) const {
    if (m >= M) return {-1, 0, 0};
    const int pixel = m % (Ho * Wo);
    return {int64_t{m / (Ho * Wo)} * H * W * channel_words, pixel / Wo * sh - ph, pixel % Wo * sw - pw};
  }
  // Of `taps` that start at `first`, those in [0, size).
  MLC_DEVICE static int inside(int first, int step, int taps, int size) {
    const int begin = first >= 0 ? 0 : min((step - 1 - first) / step, taps);
    const int end = first >= size ? 0 : min((size - first + step - 1) / step, taps);
    return max(end - begin, 0);
  }
  MLC_DEVICE int terms(const Row& row) const { return inside(row.top, dh, kh, H) * inside(row.left, dw, kw, W) * C; }
  MLC_DEVICE const uint32_t* word(const Row& row, int k) const {
    const int tap = k / channel_words, h = row.top + tap / kw * dh, w = row.left + tap % kw * dw;
    if (row.image < 0 || h < 0 || h >= H || w < 0 || w >= W) return nullptr;
    return x + row.image + (int64_t{h} * W + w) * channel_words + k % channel_words;
  }
  MLC_DEVICE uint32_t valid(int k) const { return k % channel_words == channel_words - 1 ? tail : ~0u; }
};

// A pixel of contiguous planes a thread: its words, and the mean of its magnitudes.
template <class T>
__global__ void __launch_bounds__(kSignThreads)
    binary_pack_planes(const T* x, int64_t pixels, int64_t plane, int C, uint32_t* words, float* scale) {
  const int64_t at = int64_t{blockIdx.x} * kSignThreads + threadIdx.x;
  if (at >= pixels) return;
  const T* from = x + at / plane * C * plane + at % plane;
  const int count = (C + 31) / 32;
  float total = 0.0f;
  for (int w = 0; w < count; ++w) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int c = 32 * w + i;
      if (c >= C) break;
      const float v = to_float(from[c * plane]);
      total += fabsf(v);
      if (!(v < 0.0f)) word |= 1u << (8 * (i % 4) + i / 4);
    }
    words[at * count + w] = word;
  }
  if (scale != nullptr) scale[at] = total / static_cast<float>(max(C, 1));
}

void pack(const DLTensor* x, DLTensor* words, DLTensor* scale, void* stream) {
  const BinaryConvPack p = checked_binary_conv_pack(kOp, x, words, scale, kDLCUDA);
  const int64_t pixels = p.B * p.HW;
  if (pixels == 0) return;
  const DeviceGuard device(x->device.device_id);
  if (p.channels_last) return launch_pack_rows(kOp, p.x, p.dtype, p.C, pixels, p.C, p.to, p.scale, stream);
  const dim3 grid = grid_of(kOp, pixels, kSignThreads);
  const int C = checked_int(kOp, "C", p.C);
  with_type(p.dtype, [&](auto element) {
    using T = decltype(element);
    MLC_LAUNCH((binary_pack_planes<T>), grid, dim3(kSignThreads), 0, stream, static_cast<const T*>(p.x), pixels, p.HW, C, p.to,
               p.scale);
  });
}

void fwd(const DLTensor* words, const DLTensor* codes, const DLTensor* scales, const DLTensor* pixel_scale,
         const DLTensor* bias, int64_t O, int64_t C, int64_t kh, int64_t kw, int64_t sh, int64_t sw, int64_t dh, int64_t dw,
         int64_t ph, int64_t pw, DLTensor* y, void* stream) {
  const BinaryConv b =
      checked_binary_conv(kOp, words, codes, scales, pixel_scale, bias, O, C, kh, kw, sh, sw, dh, dw, ph, pw, y, kDLCUDA);
  const int64_t plane = b.Ho * b.Wo;
  if (b.B * plane == 0 || O == 0) return;
  SignProduct p = product_of(kOp, b.w, b.B * plane, b.pixel_scale, b.x, b.channel_words);
  p.y = b.y, p.dtype = b.dtype, p.pixels = static_cast<int>(plane), p.image = O * plane;
  p.pixel = b.channels_last ? O : 1, p.column = b.channels_last ? 1 : plane;
  const auto sized = [](const char* name, int64_t n) { return checked_int(kOp, name, n); };
  // Positions of taps are sums of these.
  const int64_t reach = std::max({b.H + b.Ho * sh + kh * dh + ph, b.W + b.Wo * sw + kw * dw + pw, b.H * b.W});
  sized("the extent of the image with its padding", reach);
  const auto n = [](int64_t value) { return static_cast<int>(value); };
  const ConvWords source{b.x,         n(C),  n(b.H), n(b.W), n(b.Ho),
                         n(b.Wo),     n(kh), n(kw),  n(sh),  n(sw),
                         n(dh),       n(dw), n(ph),  n(pw),  n(b.channel_words),
                         sign_tail(C)};
  const DeviceGuard device(words->device.device_id);
  launch_product(kOp, p, source, stream);
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_binary_conv2d_pack(const DLTensor* x, DLTensor* words, DLTensor* scale, void* stream) {
  return mlcore::guard([&] { mlcore::cuda::pack(x, words, scale, stream); });
}

MLC_API int mlc_cuda_binary_conv2d_fwd(const DLTensor* words, const DLTensor* codes, const DLTensor* scales,
                                       const DLTensor* pixel_scale, const DLTensor* bias, int64_t O, int64_t C, int64_t kh,
                                       int64_t kw, int64_t sh, int64_t sw, int64_t dh, int64_t dw, int64_t ph, int64_t pw,
                                       DLTensor* y, void* stream) {
  return mlcore::guard(
      [&] { mlcore::cuda::fwd(words, codes, scales, pixel_scale, bias, O, C, kh, kw, sh, sw, dh, dw, ph, pw, y, stream); });
}
