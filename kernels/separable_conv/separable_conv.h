// A depthwise and a pointwise convolution as one op, in two dimensions; of the filtered x only a strip ever exists:
//   h[n,c,o] = sum_k depthwise[c,k] * x[n, c, o * stride + k * dilation - pad]        o, k over (H, W); x without depthwise
//   a[n,c,o] = f(scale[c] * h[n,c,o] + shift[c])
//   y[n,j,o] = g(bias[j] + sum_c pointwise[j,c] * a[n,c,o]) + residual[n,j,o]
// x : (N, C, H, W) float32, bfloat16 or float16, contiguous in C, other strides free
// y, residual : (N, J, Ho, Wo) of x's dtype, contiguous in C
// depthwise : (C, KH, KW)      scale, shift : (C)      bias : (J)      float32, contiguous; NULL: none
// pointwise : (ceil(J/64), ceil(C/64), 64, 64) float32: element (c, j) at [j / 64, c / 64, c % 64, j % 64], 0 beyond C and J;
//   or (J, C), which is brought into these blocks in every call
// activation f and g: 0 none, 1 relu, 2 relu6, 3 silu. pad stands before the first element; y's size says what stands behind.
#ifndef MLCORE_SEPARABLE_CONV_H_
#define MLCORE_SEPARABLE_CONV_H_

#include "mlcore/api.h"

//
// With patch_h and patch_w, which are 0 else, y is a dense convolution: h has C * patch_h * patch_w channels,
//   h[n,(k,c),o] = x[n, c, o * stride + k * dilation - pad]        k over (patch_h, patch_w); x has any strides, no depthwise
// With `moments` y's moments over n and o are taken while it is made: (2, J) float32, mean and biased variance. partial:
// (N * Ho, 3, J) float32 of working memory, given with moments and only then.
MLC_API int mlc_separable_conv_fwd(const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale, const DLTensor* shift,
                                   const DLTensor* pointwise, const DLTensor* bias, const DLTensor* residual, int64_t stride_h,
                                   int64_t stride_w, int64_t dilation_h, int64_t dilation_w, int64_t pad_h, int64_t pad_w,
                                   int64_t patch_h, int64_t patch_w, int64_t f, int64_t g, DLTensor* y, DLTensor* partial,
                                   DLTensor* moments);

// A chain of layers in one call, for inference: each is one of the above with everything folded, and takes what the one before
// made. x (N, C, H, W) and y (N, J, Ho, Wo) are float32, dense in channels_last; x has any strides where patches come first.
// weights : (floats) float32, all layers'        layers : (L, 20) int64, a row a layer:
//   0 kind: 0 patches (the first layer alone), 1 pointwise, 2 separable, 3 the mean over H and W
//   1 C, 2 J, 3 KH, 4 KW, 5 stride_h, 6 stride_w, 7 dilation_h, 8 dilation_w, 9 pad_h, 10 pad_w before, 11, 12 behind
//   13 f, 14 g, 15 the earlier layer whose y is added as the residual, or -1
//   16 to 19: where in weights, multiples of 16, its parts begin: depthwise by taps (KH * KW, C), shift (C); pointwise, for
//   every 64 columns of y one after the other (C, the columns, padded to a multiple of 16), C by taps where patches are taken;
//   bias (J, padded to a multiple of 64)
MLC_API int mlc_separable_conv_chain(const DLTensor* x, const DLTensor* weights, const DLTensor* layers, DLTensor* y);
// Asks for huge pages where weights will be packed, before anything is written there.
MLC_API int mlc_separable_conv_reserve(DLTensor* weights);

// Without the product: a + residual, of x's dtype and (N, C, Ho, Wo); or, where `a` is left out, the moments of h, (2, C)
// float32, with working memory partial, (ceil(N * Ho / 16), 3, C) float32.
MLC_API int mlc_separable_conv_hidden(const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale,
                                      const DLTensor* shift, const DLTensor* residual, int64_t stride_h, int64_t stride_w,
                                      int64_t dilation_h, int64_t dilation_w, int64_t pad_h, int64_t pad_w, int64_t f,
                                      int64_t out_h, int64_t out_w, DLTensor* a, DLTensor* partial, DLTensor* moments);

// The gradient d of h from da, both (N, C, Ho, Wo) of x's dtype and contiguous in C, maybe the same memory; h is computed
// again.
//   e = da * f'(scale * h + shift)
//   sums[0] = rstd * sum(e * (h - mean)), sums[1] = sum(e)                     sums : (4, C) float32, of which two are left
//   over d = scale * (e - (sums[1] + (h - mean) * rstd * sums[0]) / (N * Ho * Wo))   with the batch's moments : (2, C), mean
//   and rstd d = scale * e                                                              without; then mean is 0 and rstd 1
//   partial : (ceil(N * Ho / 16), 3, C) float32, working memory; without it the sums are given and d alone is made
// Without d the sums alone are taken.
MLC_API int mlc_separable_conv_bwd(const DLTensor* da, const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale,
                                   const DLTensor* shift, const DLTensor* moments, int64_t stride_h, int64_t stride_w,
                                   int64_t dilation_h, int64_t dilation_w, int64_t pad_h, int64_t pad_w, int64_t f, DLTensor* d,
                                   DLTensor* sums, DLTensor* partial);

// The same from dy, the gradient of y = g(z_scale * z + z_shift), through the product as well; z_sums are `sums` of bwd over dy
// and z, whose last two rows are read. Without z, and then without z_scale, z_shift and z_sums: z is y.
//   dz = z_scale * dy * g'(z_scale * z + z_shift) + z_sums[2] * z + z_sums[3]        dpointwise[j,c] = sum(dz[j] * a[c])
//   da[c] = sum_j pointwise[j,c] * dz[j]        with it `sums`, and in d: e with moments, d without
//   pointwise, dpointwise : (J, C) float32      partial : (N * Ho, 3, C), dpartial : (parts, J, C rounded up to 32) float32,
//   working memory; sums are cut into that many parts
MLC_API int mlc_separable_conv_bwd_product(const DLTensor* dy, const DLTensor* z, const DLTensor* z_scale,
                                           const DLTensor* z_shift, const DLTensor* z_sums, const DLTensor* x,
                                           const DLTensor* depthwise, const DLTensor* scale, const DLTensor* shift,
                                           const DLTensor* moments, const DLTensor* pointwise, int64_t stride_h,
                                           int64_t stride_w, int64_t dilation_h, int64_t dilation_w, int64_t pad_h,
                                           int64_t pad_w, int64_t f, int64_t g, DLTensor* d, DLTensor* sums,
                                           DLTensor* dpointwise, DLTensor* partial, DLTensor* dpartial);

// What a norm by the batch's moments does with them, taken = (mean, biased variance) : (2, C), of `count` values a channel:
//   used = (mean, rstd), rstd = (variance + eps)^-1/2 : (2, C)      scale = weight * rstd, shift = bias - mean * scale : (C)
//   running_mean += momentum * (mean + conv_bias - running_mean), running_var likewise by the variance * count / (count - 1)
// all float32; weight, bias, conv_bias, running_mean and running_var, (C), may be NULL.
MLC_API int mlc_separable_conv_norm(const DLTensor* taken, const DLTensor* weight, const DLTensor* bias,
                                    const DLTensor* conv_bias, double momentum, double eps, int64_t count,
                                    DLTensor* running_mean, DLTensor* running_var, DLTensor* used, DLTensor* scale,
                                    DLTensor* shift);

#endif  // MLCORE_SEPARABLE_CONV_H_
