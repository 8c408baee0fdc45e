// Depthwise convolution in one, two or three dimensions (absent ones have size 1), with M filters a channel:
//   y[n,co,o] = bias[co] + sum_k weight[co,k] * x[n, co / M, o * stride + k * dilation - pad]     o, k over (D, H, W)
//   x : (N, C, D, H, W), or without D, float32, bfloat16 or float16, 0 outside; contiguous in W or in C, other strides free
//   y : (N, C*M, Do, Ho, Wo) of x's dtype, contiguous in the same dimension
//   weight : (C*M, KD, KH, KW) float32, contiguous      bias : (C*M) float32 or NULL (zeros)
// pad is what stands before the first element; what stands behind the last one follows from y's size, so the two may differ.
// Gradients:
//   dx[n,c,i]   = sum over co of channel c and (o, k) with o * stride + k * dilation - pad = i of weight[co,k] * dy[n,co,o]
//   dweight[co,k] = sum_{n,o} dy[n,co,o] * x[n, co / M, o * stride + k * dilation - pad]       dbias[co] = sum_{n,o} dy[n,co,o]
#ifndef MLCORE_DEPTHWISE_CONV_H_
#define MLCORE_DEPTHWISE_CONV_H_

#include "mlcore/api.h"

MLC_API int mlc_depthwise_conv_fwd(const DLTensor* x, const DLTensor* weight, const DLTensor* bias, int64_t stride_d,
                                   int64_t stride_h, int64_t stride_w, int64_t dilation_d, int64_t dilation_h,
                                   int64_t dilation_w, int64_t pad_d, int64_t pad_h, int64_t pad_w, DLTensor* y);

// dy and dx lie as x does. dx may be NULL; dweight and dbias (float32, shapes of weight and bias) come together or not at all.
// partial is their scratch: (P, KD*KH*KW + 1, C*M) float32 with P = min(max(N*Do*Ho*Wo / 256, 1), 16).
MLC_API int mlc_depthwise_conv_bwd(const DLTensor* dy, const DLTensor* x, const DLTensor* weight, int64_t stride_d,
                                   int64_t stride_h, int64_t stride_w, int64_t dilation_d, int64_t dilation_h,
                                   int64_t dilation_w, int64_t pad_d, int64_t pad_h, int64_t pad_w, DLTensor* dx,
                                   DLTensor* dweight, DLTensor* dbias, DLTensor* partial);

#endif  // MLCORE_DEPTHWISE_CONV_H_
