// Attention free of queries that meet keys: every feature of a token is a weighted mean of that feature's values.
//   o[b,h,t,d] = sigmoid(q[b,h,t,d]) * y[b,h,t,d]
//   y[b,h,t,d] = sum_j a[j] v[b,h,j,d] / sum_j a[j],   a[j] = exp(k[b,h,j,d] + w[h,t,j])
// over j < S, where causal (T = S) over j <= t; where all a[j] are 0, y is 0. The position biases w:
//   bias NULL                        w = 0                                            AFT-simple
//   window = 0, bias (G, T, S)       w[h,t,j] = bias[h,t,j]                           AFT-full
//   window = s, bias (G, T, C)       w[h,t,j] = bias[h,t, j-t+s-1] where |t-j| < s, else 0: AFT-local
//   window = s, bias (G, C)          w[h,t,j] = bias[h, j-t+s-1] where |t-j| < s, else 0: AFT-conv
// G is 1 (all heads share w) or H; C = 2s-1, where causal C = s.
//   q, o : (B, H, T, D)    k, v : (B, H, S, D)    of one of float32, bfloat16, float16; D contiguous, other strides free
//   bias : float32, contiguous; -inf hides a key from a query.    y, den, peak : (B, H, T, D) float32, contiguous: what
//   backward needs; NULL where it isn't wanted. den is the denominator, relative to the kernel's scale or, where
//   k and w are far apart, to e^peak.
//   work : float32, contiguous, memory that GPU kernels ask for; NULL for the CPU's, which have their own:
//   max((B, H, G + 1, 3, D) once or twice with a band or no bias, where G = ceil(sources / 32) of the S keys or, in backward,
//   the T queries; min(32, ceil(T / 32)) times dbias (G, C), at least once)
#ifndef MLCORE_AFT_H_
#define MLCORE_AFT_H_

#include "mlcore/api.h"

MLC_API int mlc_aft_fwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias, int64_t window,
                        int64_t causal, DLTensor* o, DLTensor* y, DLTensor* den, DLTensor* peak, DLTensor* work);

// Gradients of sum(o * d_o): dq, dk, dv as q, k, v; dbias as bias, NULL where it isn't wanted.
MLC_API int mlc_aft_bwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias, int64_t window,
                        int64_t causal, const DLTensor* y, const DLTensor* den, const DLTensor* peak, const DLTensor* d_o,
                        DLTensor* dq, DLTensor* dk, DLTensor* dv, DLTensor* dbias, DLTensor* work);

#endif  // MLCORE_AFT_H_
