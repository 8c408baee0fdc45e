// Layer normalisation of rows, with an optional residual added first.
//   s[r,:] = x[r,:] + residual[r,:]            (rounded to x's dtype; s is x when residual is NULL)
//   mean[r] = mean_c s[r,c]     rstd[r] = 1 / sqrt(mean_c (s[r,c] - mean[r])^2 + eps)
//   y[r,:]  = (s[r,:] - mean[r]) * rstd[r] * weight[:] + bias[:]     (weight NULL is all ones, bias NULL all zeros)
//   x, residual, y, s : (R, C) float32, bfloat16 or float16, rows contiguous in C, any row stride; or contiguous (..., C)
//   weight, bias : (C) of x's dtype or float32, each by itself       mean, rstd : (R) float32
// Gradients, with g = dy * weight and xhat = (s - mean) * rstd:
//   dx[r,:] = rstd[r] * (g[r,:] - mean_c(g)[r] - xhat[r,:] * mean_c(g * xhat)[r]) + ds[r,:]     (also the residual's gradient)
//   dweight[:] = sum_r dy[r,:] * xhat[r,:]     dbias[:] = sum_r dy[r,:]
#ifndef MLCORE_LAYER_NORM_H_
#define MLCORE_LAYER_NORM_H_

#include "mlcore/api.h"

// s may be NULL when residual is NULL; mean and rstd may be NULL.
MLC_API int mlc_layer_norm_fwd(const DLTensor* x, const DLTensor* residual, const DLTensor* weight, const DLTensor* bias,
                               double eps, DLTensor* y, DLTensor* s, DLTensor* mean, DLTensor* rstd);

// s is the forward's s, or x where there was no residual. ds, the gradient that arrives at s itself, may be NULL, as may
// dweight (of weight's dtype) and dbias. partial is scratch for these two, NULL without both: (2, P, C) float32 with
// P = min(R, 64) row blocks.
MLC_API int mlc_layer_norm_bwd(const DLTensor* dy, const DLTensor* ds, const DLTensor* s, const DLTensor* weight,
                               const DLTensor* mean, const DLTensor* rstd, DLTensor* dx, DLTensor* dweight, DLTensor* dbias,
                               DLTensor* partial);

#endif  // MLCORE_LAYER_NORM_H_
