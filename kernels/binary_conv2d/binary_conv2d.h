// Two-dimensional convolution of signs, counted in bits; padding contributes nothing to a sum.
//   b[n,h,w,c] = -1 where x[n,c,h,w] < 0, else +1      s[n,h,w] = mean_c |x[n,c,h,w]|                       pack
//   y[n,o,i,j] = (sum_{u,v,c} b[n, i*sh - ph + u*dh, j*sw - pw + v*dw, c] f[o,u,v,c]) * scale[o] * t[n,i,j] + bias[o]    fwd
// where taps (u, v) outside of the image are left out. The sum is an exact integer; what follows is rounded to float32 after
// each step, then to y's dtype.
//   x : (B, C, H, W) float32, bfloat16 or float16, contiguous, or contiguous with C last (channels_last)
//   words : (B, H, W, ceil(C / 32)) int32, contiguous: 32 signs a word, the one of c in bit 8 (c % 4) + c / 4; the rest 0
//   codes, scales : a 1-bit weight (O, kh * kw * C) of quant_linear.h's layout in groups of C, code 1 for f = +1, 0 in the
//                   padding: (P, kh * kw * ceil(C / 32) * 64) uint8, (P, 1, 16) float32; P = ceil(O / 16)
//   pixel_scale (t) : (B, Ho, Wo) float32 or NULL: 1     bias : (O) float32 or NULL
//   y : (B, O, Ho, Wo) float32, bfloat16 or float16, contiguous or with O last; or words (B, Ho, Wo, ceil(O / 32)) of its signs
// Ho and Wo are y's: what is missing at the lower and right ends is padding as well.
#ifndef MLCORE_BINARY_CONV2D_H_
#define MLCORE_BINARY_CONV2D_H_

#include "mlcore/api.h"

MLC_API int mlc_binary_conv2d_pack(const DLTensor* x, DLTensor* words, DLTensor* scale);

MLC_API int mlc_binary_conv2d_fwd(const DLTensor* words, const DLTensor* codes, const DLTensor* scales,
                                  const DLTensor* pixel_scale, const DLTensor* bias, int64_t O, int64_t C, int64_t kh,
                                  int64_t kw, int64_t sh, int64_t sw, int64_t dh, int64_t dw, int64_t ph, int64_t pw,
                                  DLTensor* y);

#endif  // MLCORE_BINARY_CONV2D_H_
