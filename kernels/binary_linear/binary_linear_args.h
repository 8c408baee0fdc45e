// The arguments of binary_linear's functions as plain pointers and sizes, checked alike for every device.
#pragma once
#include "core/row_args.h"
#include "core/sign_panels.h"

namespace mlcore {

struct BinaryPack {
  Rows x;
  Dtype dtype;
  int64_t M, K, words;
  uint32_t* to;      // (M, words)
  float* row_scale;  // (M) or null
};

struct BinaryLinear {
  SignPanels w;
  const uint32_t* a;       // (M, w.words)
  const float* row_scale;  // (M) or null
  int64_t M, K;
  Rows y;
  Dtype dtype;  // of y; i32: words of signs
};

inline BinaryPack checked_binary_linear_pack(const char* op, const DLTensor* x_, DLTensor* words_, DLTensor* row_scale_,
                                             DLDeviceType device) {
  const Tensor x(x_, op, "x"), words(words_, op, "words"), row_scale(row_scale_, op, "row_scale");
  x.on(device).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(2, "(M, K)").last_dim_contiguous();
  const int64_t M = x.size(0), K = x.size(1);
  words.on(device).dtype_in({Dtype::i32}).shape_is({M, (K + 31) / 32}, "(M, ceil(K / 32))").contiguous();
  if (row_scale.present()) row_scale.on(device).dtype_in({Dtype::f32}).shape_is({M}, "(M)").contiguous();
  float* const scale = row_scale.present() ? row_scale.data<float>() : nullptr;
  return {{x.raw(), x.stride(0)}, x.dtype(), M, K, words.size(1), words.data<uint32_t>(), scale};
}

inline BinaryLinear checked_binary_linear(const char* op, const DLTensor* words_, const DLTensor* codes, const DLTensor* scales,
                                          const DLTensor* row_scale_, const DLTensor* bias, int64_t N, int64_t K, DLTensor* y_,
                                          DLDeviceType device) {
  const Tensor words(words_, op, "words"), row_scale(row_scale_, op, "row_scale"), y(y_, op, "y");
  const SignPanels w(op, codes, scales, bias, N, 1, K, device);
  words.on(device).dtype_in({Dtype::i32}).rank_is(2, "(M, ceil(K / 32))");
  const int64_t M = words.size(0);
  words.shape_is({M, w.words}, "(M, ceil(K / 32))").contiguous();
  y.on(device).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::i32});
  y.dtype() == Dtype::i32 ? y.shape_is({M, (N + 31) / 32}, "(M, ceil(N / 32))") : y.shape_is({M, N}, "(M, N)");
  y.last_dim_contiguous();
  if (row_scale.present()) row_scale.on(device).dtype_in({Dtype::f32}).shape_is({M}, "(M)").contiguous();
  const float* const scale = row_scale.present() ? row_scale.data<float>() : nullptr;
  return {w, words.data<uint32_t>(), scale, M, K, {y.raw(), y.stride(0)}, y.dtype()};
}

}  // namespace mlcore
