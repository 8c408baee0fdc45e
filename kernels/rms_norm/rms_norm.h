// RMS normalisation of rows, with an optional residual added first.
//   s[r,:] = x[r,:] + residual[r,:]            (rounded to x's dtype; s is x when residual is NULL)
//   rstd[r] = 1 / sqrt(mean_c s[r,c]^2 + eps)
//   y[r,:]  = s[r,:] * rstd[r] * weight[:]     (weight NULL is all ones)
//   x, residual, y, s : (R, C) float32, bfloat16 or float16, rows contiguous in C, any row stride; or contiguous (..., C)
//   weight : (C) of x's dtype or float32       rstd : (R) float32
// Gradients, with g = dy * weight and xhat = s * rstd:
//   dx[r,:] = rstd[r] * (g[r,:] - xhat[r,:] * mean_c(g * xhat)[r]) + ds[r,:]     (also the residual's gradient)
//   dweight[:] = sum_r dy[r,:] * xhat[r,:]
#ifndef MLCORE_RMS_NORM_H_
#define MLCORE_RMS_NORM_H_

#include "mlcore/api.h"

// s may be NULL when residual is NULL; rstd may be NULL.
MLC_API int mlc_rms_norm_fwd(const DLTensor* x, const DLTensor* residual, const DLTensor* weight, double eps, DLTensor* y,
                             DLTensor* s, DLTensor* rstd);

// s is the forward's s, or x where there was no residual. ds, the gradient that arrives at s itself, may be NULL, as may
// dweight. partial is scratch for dweight: (P, C) float32 with P = min(R, 64) row blocks.
MLC_API int mlc_rms_norm_bwd(const DLTensor* dy, const DLTensor* ds, const DLTensor* s, const DLTensor* weight,
                             const DLTensor* rstd, DLTensor* dx, DLTensor* dweight, DLTensor* partial);

#endif  // MLCORE_RMS_NORM_H_
