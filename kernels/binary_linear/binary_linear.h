// Linear layer of signs: both sides are +1 or -1, and products are counted in bits.
//   b[m,k] = -1 where x[m,k] < 0, else +1      s[m] = mean_k |x[m,k]|                                       pack
//   y[m,n] = (sum_k b[m,k] w[n,k]) * scale[n] * s[m] + bias[n]                                              fwd
// The sum is an exact integer; what follows is rounded to float32 after each step, then to y's dtype.
//   x : (M, K) float32, bfloat16 or float16, contiguous rows, any row stride      row_scale (s) : (M) float32, or NULL: 1
//   words : (M, ceil(K / 32)) int32, contiguous: 32 signs a word, the one of k in bit 8 (k % 4) + k / 4, set for +1; the rest 0
//   codes, scales : a 1-bit weight of quant_linear.h's layout with one group: (P, ceil(K / 32) * 64) uint8, code 1 for w = +1,
//                   0 in the padding of K; (P, 1, 16) float32; P = ceil(N / 16)
//   bias : (N) float32 or NULL
//   y : (M, N) float32, bfloat16 or float16, contiguous rows; or words (M, ceil(N / 32)) of its signs
#ifndef MLCORE_BINARY_LINEAR_H_
#define MLCORE_BINARY_LINEAR_H_

#include "mlcore/api.h"

MLC_API int mlc_binary_linear_pack(const DLTensor* x, DLTensor* words, DLTensor* row_scale);

MLC_API int mlc_binary_linear_fwd(const DLTensor* words, const DLTensor* codes, const DLTensor* scales,
                                  const DLTensor* row_scale, const DLTensor* bias, int64_t N, int64_t K, DLTensor* y);

#endif  // MLCORE_BINARY_LINEAR_H_
