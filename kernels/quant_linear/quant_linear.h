// Linear layer with quantized weights: codes q of 1 to 8 bits with a scale for each group of weights along K.
//   w[n,k] = (q[n,k] - z[n,g]) * scale[n,g]             or codebook[t(n), q[n,k]] * scale[n,g],    g = k / group_size
//   y[m,n] = act(sum_k x[m,k] * w[n,k] + bias[n]) + residual[m,n]
// int8 != 0 first rounds each row of x: a = round(127 x / max_k |x|), s = max_k |x| / 127 (a codebook to 127 steps likewise);
// then sum_k a[m,k] * (q - z) is an exact integer within a group and y is summed over groups from these, in fp32.
//   x, residual, y : (M, K), (M, N), (M, N) float32, bfloat16 or float16, contiguous rows, any row stride     bias : (N)
//   float32 z : zeros, or the number `offset` where zeros is NULL      t(n) = n / ceil(N / T)
// Storage (layout "panel16"), with P = ceil(N / 16) panels of 16 rows of W, G = ceil(K / group_size):
//   scales : (P, G, 16) float32     zeros : (P, G, 16) uint8 or NULL     codebook : (T, 2^bits) float32 or NULL
//   codes : (P, panel bytes) uint8. Each group is padded to a multiple of KB codes along K; a panel is a sequence of blocks of
//   KB codes for 16 rows. Within a block, `unit` u is 64 bytes: 4 consecutive k for 16 rows, k fastest. bits is a sum of powers
//   of two, largest first (7 = 4 + 2 + 1), lowest bits first; each power p is a plane of vectors of 64 bytes, vector v of which
//   holds units v * 8/p ... of the block, the first one in the lowest p bits of each byte. KB = 32 / (the smallest power).
// mlc_cuda_quant_linear_fwd takes bits 4 or 8, no codebook, x of 16 bits (y may be float32), and codes in the order of
// quant_linear_cuda.cuh: (P, ceil(G * ceil(group_size / 32) * 32 / 64) * bits * 128) uint8.
#ifndef MLCORE_QUANT_LINEAR_H_
#define MLCORE_QUANT_LINEAR_H_

#include "mlcore/api.h"

// activation: 0 none, 1 relu, 2 gelu, 3 gelu with tanh, 4 silu, 5 relu6. bias and residual may be NULL.
MLC_API int mlc_quant_linear_fwd(const DLTensor* x, const DLTensor* codes, const DLTensor* scales, const DLTensor* zeros,
                                 const DLTensor* codebook, const DLTensor* bias, const DLTensor* residual, int64_t bits,
                                 int64_t offset, int64_t group_size, int64_t activation, int64_t int8, DLTensor* y);

// w : (N, K) of x's dtypes, the weights themselves: what a gradient needs.
MLC_API int mlc_quant_linear_dequantize(const DLTensor* codes, const DLTensor* scales, const DLTensor* zeros,
                                        const DLTensor* codebook, int64_t bits, int64_t offset, int64_t group_size,
                                        DLTensor* w);

#endif  // MLCORE_QUANT_LINEAR_H_
