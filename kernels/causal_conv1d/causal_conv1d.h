// Depthwise causal convolution over time, with an activation after it.
//   pre[b,c,t] = bias[c] + sum_k weight[c,k] * h[b,c,t-(w-1)+k],   k = 0 .. w-1
//   y[b,c,t]   = act(pre[b,c,t])
//   x, y : (B, C, T) float32, bfloat16 or float16, contiguous in T or in C, other strides free
//   weight : (C, w) float32, w >= 1      bias : (C) float32 or NULL (zeros)
// h is x within t's sequence. Before the sequence's first token it is the sequence's initial state, or 0:
//   without cu_seqlens row b is sequence n = b, with cu_seqlens (N+1) int32, B = 1 and [cu[n], cu[n+1]) is sequence n;
//   initial, final : (N, C, w-1) of x's dtype, any strides: the w-1 inputs before the first token, and after the last one.
// seq_idx : (B, T) int32 cuts sequences further: where it changes, a run with an empty history begins. The initial state
// belongs to the first run of its sequence, the final state to the last. A run of negative seq_idx is padding: y = 0 there.
// Gradients, with dpre = dy * act'(pre):
//   dx[b,c,t]   = sum_k weight[c,k] * dpre[b,c,t+(w-1)-k]   (within t's run)   + dfinal where t is in the final state
//   dweight[c,k] = sum_{b,t} dpre[b,c,t] * h[b,c,t-(w-1)+k]      dbias[c] = sum_{b,t} dpre[b,c,t]
//   dinitial[n,c,:] is dx continued to the w-1 positions before the first token
#ifndef MLCORE_CAUSAL_CONV1D_H_
#define MLCORE_CAUSAL_CONV1D_H_

#include "mlcore/api.h"

// activation: 0 none, 1 SiLU, 2 GELU (exact). initial, seq_idx, cu_seqlens and final may be NULL.
MLC_API int mlc_causal_conv1d_fwd(const DLTensor* x, const DLTensor* weight, const DLTensor* bias, const DLTensor* initial,
                                  const DLTensor* seq_idx, const DLTensor* cu_seqlens, int64_t activation, DLTensor* y,
                                  DLTensor* final);

// dy and dx have x's layout. dinitial is wanted where given. dfinal may be NULL. dweight (C, w) and dbias (C) are float32 and
// come together or not at all; partial is their scratch: (P, w+1, C) float32 with P = min(max(ceil(B*T/512), 1), 16).
MLC_API int mlc_causal_conv1d_bwd(const DLTensor* dy, const DLTensor* dfinal, const DLTensor* x, const DLTensor* weight,
                                  const DLTensor* bias, const DLTensor* initial, const DLTensor* seq_idx,
                                  const DLTensor* cu_seqlens, int64_t activation, DLTensor* dx, DLTensor* dweight,
                                  DLTensor* dbias, DLTensor* dinitial, DLTensor* partial);

// Decoding: x (B, C, T) follows state (slots, C, S), S >= w-1, which is updated in place; y as above, any strides everywhere.
//   slots[b] : (B) int32 row of state that b uses, NULL is b itself; a negative one is padding: y[b] = 0, nothing is updated.
//   position NULL: state holds the last S inputs in order and is shifted by T.
//   position (B) int32: state is a ring, token t of b is written at (position[b] + t) mod S.
MLC_API int mlc_causal_conv1d_update(const DLTensor* x, DLTensor* state, const DLTensor* weight, const DLTensor* bias,
                                     const DLTensor* position, const DLTensor* slots, int64_t activation, DLTensor* y);

#endif  // MLCORE_CAUSAL_CONV1D_H_
