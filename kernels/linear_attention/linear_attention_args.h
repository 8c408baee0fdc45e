// The checked problem from the arguments of linear_attention's passes: everything that linear_attention.h promises to refuse.
#pragma once
#include "core/tensor.h"
#include "linear_attention/linear_attention_kernels.h"

namespace mlcore {

constexpr const char* kLinearAttention = "linear_attention";

struct LinearAttentionArgs {
  const DLTensor *q, *k, *v, *gate, *beta, *cu_seqlens;
  int64_t feature_map, normalize, causal, span;
};

inline FeatureMap feature_map_of(int64_t number) {
  require(number >= 0 && number <= 3, kLinearAttention, ": feature_map must be 0 to 3; got ", number);
  return static_cast<FeatureMap>(number);
}

inline LinearAttentionProblem make_problem(const LinearAttentionArgs& a) {
  const Tensor q(a.q, kLinearAttention, "q"), k(a.k, kLinearAttention, "k"), v(a.v, kLinearAttention, "v"),
      gate(a.gate, kLinearAttention, "gate"), beta(a.beta, kLinearAttention, "beta"),
      cu(a.cu_seqlens, kLinearAttention, "cu_seqlens");
  q.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B, H, Tq, D)");
  LinearAttentionProblem p{};
  p.B = q.size(0), p.H = q.size(1), p.Tq = q.size(2), p.D = q.size(3);
  p.causal = a.causal != 0, p.normalize = a.normalize != 0;
  k.on(kDLCPU).dtype_in({q.dtype()}).rank_is(4, "(B, H, Tk, D)");
  p.Tk = k.size(2);
  k.shape_is({p.B, p.H, p.Tk, p.D}, "(B, H, Tk, D)");
  require(!p.causal || p.Tk == p.Tq, kLinearAttention, ": causal attention needs as many keys as queries; got ", p.Tk, " and ",
          p.Tq);
  v.on(kDLCPU).dtype_in({q.dtype()}).rank_is(4, "(B, H, Tk, Dv)");
  p.Dv = v.size(3);
  v.shape_is({p.B, p.H, p.Tk, p.Dv}, "(B, H, Tk, Dv)");
  require(p.D >= 1 && p.Dv >= 1, kLinearAttention, ": head dims must be at least 1; got D ", p.D, ", Dv ", p.Dv);
  p.map = feature_map_of(a.feature_map);
  p.q = tokens(q), p.k = tokens(k), p.v = tokens(v);
  if (gate.present()) {
    require(p.causal, kLinearAttention, ": gate needs causal attention");
    gate.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16});
    if (gate.rank() == 3) {
      gate.shape_is({p.B, p.H, p.Tq}, "(B, H, T)");
    } else {
      gate.shape_is({p.B, p.H, p.Tq, p.D}, "(B, H, T) or (B, H, T, D)");
    }
    p.gated = gate.rank() == 3 ? Gate::scalar : Gate::vector;
    p.gate = tokens(gate);
  }
  if (beta.present()) {
    require(p.causal && !p.normalize, kLinearAttention, ": beta needs causal attention without normalize");
    beta.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).shape_is({p.B, p.H, p.Tq}, "(B, H, T)");
    p.beta = tokens(beta), p.delta_rule = true;
  }
  p.sequences = p.B;
  if (cu.present()) {
    require(p.B == 1, kLinearAttention, ": cu_seqlens needs a batch of 1; got ", p.B);
    cu.on(kDLCPU).dtype_in({Dtype::i64}).rank_is(1, "(N + 1)").contiguous();
    require(cu.numel() >= 1, kLinearAttention, ": cu_seqlens must have at least one element");
    p.sequences = cu.numel() - 1;
    p.cu_seqlens = cu.data<int64_t>();
    require(p.cu_seqlens[0] == 0 && p.cu_seqlens[p.sequences] == p.Tk && p.Tk == p.Tq, kLinearAttention,
            ": cu_seqlens must go from 0 to the number of tokens, ", p.Tk, "; it goes from ", p.cu_seqlens[0], " to ",
            p.cu_seqlens[p.sequences]);
    for (int64_t n = 0; n < p.sequences; ++n)
      require(p.cu_seqlens[n] <= p.cu_seqlens[n + 1], kLinearAttention, ": cu_seqlens must not fall; it does at ", n + 1);
  }
  require(a.span > 0 && a.span % kChunk == 0, kLinearAttention, ": span must be a positive multiple of ", kChunk, "; got ",
          a.span);
  p.span = a.span;
  p.slots = p.Tq / p.span + (p.cu_seqlens ? p.sequences : 1);
  return p;
}

inline float* state_of(const LinearAttentionProblem& p, const DLTensor* t, const char* name) {
  const Tensor state(t, kLinearAttention, name);
  if (!state.present()) return nullptr;
  state.on(kDLCPU)
      .dtype_in({Dtype::f32})
      .shape_is({p.sequences, p.H, p.D, p.state_cols()}, "(N, H, D, Dv + normalize)")
      .contiguous();
  return state.data<float>();
}

inline void set_den(LinearAttentionProblem& p, const DLTensor* den_) {
  const Tensor den(den_, kLinearAttention, "den");
  require(den.present() == p.normalize, kLinearAttention, ": den goes with normalize");
  if (!p.normalize) return;
  den.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.B, p.H, p.Tq}, "(B, H, Tq)").contiguous();
  p.den = den.data<float>();
}

inline void set_states(LinearAttentionProblem& p, const Tensor& states) {
  states.on(kDLCPU)
      .dtype_in({Dtype::f32})
      .shape_is({p.B, p.H, p.slots, p.D, p.state_cols()}, "(B, H, Tq / span + N / B, D, Dv + normalize)")
      .contiguous();
  p.states = states.data<float>();
}

}  // namespace mlcore
