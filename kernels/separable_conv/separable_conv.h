// A depthwise and a pointwise convolution as one op, in two dimensions; of the filtered x only a strip ever exists:
//   h[n,c,o] = sum_k depthwise[c,k] * x[n, c, o * stride + k * dilation - pad]           o, k over (H, W); h = x without
//   depthwise a[n,c,o] = f(scale[c] * h[n,c,o] + shift[c]) y[n,j,o] = g(bias[j] + sum_c pointwise[j,c] * a[n,c,o]) +
//   residual[n,j,o] x : (N, C, H, W) float32, bfloat16 or float16, contiguous in C, other strides free y, residual : (N, J, Ho,
//   Wo) of x's dtype, contiguous in C depthwise : (C, KH, KW)      scale, shift : (C)      bias : (J)      float32, contiguous;
//   NULL: none pointwise : (ceil(C/64), ceil(J/64), 64, 64) float32: element (c, j) at [c / 64, j / 64, c % 64, j % 64], 0
//   beyond C and J
// activation f and g: 0 none, 1 relu, 2 relu6, 3 silu. pad stands before the first element; y's size says what stands behind.
#ifndef MLCORE_SEPARABLE_CONV_H_
#define MLCORE_SEPARABLE_CONV_H_

#include "mlcore/api.h"

MLC_API int mlc_separable_conv_fwd(const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale, const DLTensor* shift,
                                   const DLTensor* pointwise, const DLTensor* bias, const DLTensor* residual, int64_t stride_h,
                                   int64_t stride_w, int64_t dilation_h, int64_t dilation_w, int64_t pad_h, int64_t pad_w,
                                   int64_t f, int64_t g, DLTensor* y);

// a alone, of x's dtype, and the sums over n and o that a norm of h needs. Both are optional.
//   partial : (P, 2, C) float32, P = ceil(N * Ho / 16): sums over 16 rows of h - h0 and of (h - h0)^2, where h0 is h of the
//   first pixel of the rows; origin : (P, C) that h0
MLC_API int mlc_separable_conv_hidden(const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale,
                                      const DLTensor* shift, int64_t stride_h, int64_t stride_w, int64_t dilation_h,
                                      int64_t dilation_w, int64_t pad_h, int64_t pad_w, int64_t f, int64_t out_h, int64_t out_w,
                                      DLTensor* a, DLTensor* partial, DLTensor* origin);

// Back through f and the affine map, with h computed again; d is (N, C, Ho, Wo) of x's dtype, contiguous in C, in place.
//   first pass (by_h and constant NULL): d = da * f'(scale * h + shift), partial[p] = the sums of d and of d * h
//   second pass (partial NULL):          d = scale * d + by_h * h + constant              by_h, constant : (C) float32
MLC_API int mlc_separable_conv_bwd(DLTensor* d, const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale,
                                   const DLTensor* shift, const DLTensor* by_h, const DLTensor* constant, int64_t stride_h,
                                   int64_t stride_w, int64_t dilation_h, int64_t dilation_w, int64_t pad_h, int64_t pad_w,
                                   int64_t f, DLTensor* partial);

#endif  // MLCORE_SEPARABLE_CONV_H_
