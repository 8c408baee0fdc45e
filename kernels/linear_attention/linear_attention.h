// Linear attention: a state S that every token updates and reads. With phi the feature map, for one (b, h), t = 1, 2, ...
//   q~ = phi(q), k~ = phi(k)       phi: 0 x, 1 elu(x) + 1, 2 relu(x), 3 softmax over D
//   S~[d,:] = exp(g[t,d]) * S[t-1][d,:]                               (g: gate, the same for all d, or 0 without a gate)
//   u[t,:]  = v[t,:], or with beta the delta rule: beta[t] * (v[t,:] - k~[t,:] S~)
//   S[t]    = S~ + k~[t,:]^T u[t,:]
//   o[t,:]  = q~[t,:] S[t];  not causal: q~[t,:] S[last]
// normalize: o[t,:] is divided by den[t], what o would be with all values 1; where den is 0, o is 0. The state then has one
// more column, z = S for values 1. Not with beta.
//   q, k : (B, H, Tq, D), (B, H, Tk, D)    v, o : (B, H, Tk, Dv), (B, H, Tq, Dv); Tq = Tk where causal
//   gate : (B, H, T) or (B, H, T, D) natural logarithms, not above 0;   beta : (B, H, T);   both only where causal
//   q, k, v, o share one of float32, bfloat16, float16; gate and beta may be any of them; the last dimension of 4-D tensors is
//   contiguous, other strides are free. den : (B, H, Tq) fp32, NULL without normalize.
//   initial_state, final_state : (N, H, D, Dv + normalize) fp32, contiguous; N sequences. initial_state NULL is zeros.
// cu_seqlens NULL: N = B sequences. Else B = 1 and sequence n is the tokens [cu_seqlens[n], cu_seqlens[n + 1]), (N + 1) int64,
// 0, ..., T, not falling; sequences may be empty.
// states : what backward needs, fp32, contiguous, NULL where it isn't wanted. Causal: the state before every span tokens (span
// a multiple of 64): (B, H, T / span + N / B, D, Dv + normalize), sequence n's at slots start / span + n (without cu_seqlens:
// from slot 0 of its b). Not causal: ignored, backward takes final_state there.
#ifndef MLCORE_LINEAR_ATTENTION_H_
#define MLCORE_LINEAR_ATTENTION_H_

#include "mlcore/api.h"

MLC_API int mlc_linear_attention_fwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* gate,
                                     const DLTensor* beta, const DLTensor* initial_state, const DLTensor* cu_seqlens,
                                     int64_t feature_map, int64_t normalize, int64_t causal, int64_t span, DLTensor* o,
                                     DLTensor* den, DLTensor* final_state, DLTensor* states);

// Gradients of sum(o * d_o) + sum(final_state * d_final_state); d_final_state may be NULL. dq, dk, dv: dtypes and shapes of q,
// k, v. dgate, dbeta, d_initial_state: fp32, contiguous, shapes of gate, beta, initial_state; each may be NULL.
MLC_API int mlc_linear_attention_bwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* gate,
                                     const DLTensor* beta, const DLTensor* cu_seqlens, int64_t feature_map, int64_t normalize,
                                     int64_t causal, int64_t span, const DLTensor* o, const DLTensor* den,
                                     const DLTensor* states, const DLTensor* d_o, const DLTensor* d_final_state, DLTensor* dq,
                                     DLTensor* dk, DLTensor* dv, DLTensor* dgate, DLTensor* dbeta, DLTensor* d_initial_state);

// One token of every sequence: q, k (B, H, D), v, o (B, H, Dv), gate (B, H) or (B, H, D), beta (B, H), state and new_state
// (B, H, D, Dv + normalize) fp32, which may be the same memory.
MLC_API int mlc_linear_attention_step(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* gate,
                                      const DLTensor* beta, const DLTensor* state, int64_t feature_map, int64_t normalize,
                                      DLTensor* o, DLTensor* new_state);

#endif  // MLCORE_LINEAR_ATTENTION_H_
