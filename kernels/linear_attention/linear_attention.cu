// The CUDA kernels of linear_attention's step and of short sequences, forward alone, and their launchers; the equations are in
// linear_attention.h. Both are the recurrence itself. The same text runs on the CPU in tests/native.
#include <climits>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/types.h"
#include "linear_attention/linear_attention.h"
#include "linear_attention/linear_attention_kernels.h"

namespace mlcore::cuda {
namespace {

constexpr const char* kOp = "linear_attention";
constexpr int kColumns = 32, kRows = 8;  // of the state that a block has side by side

MLC_DEVICE float value(const Tokens& t, int64_t offset) {
  switch (t.dtype) {
    case Dtype::bf16: return to_float(static_cast<const bf16*>(t.data)[offset]);
    case Dtype::f16: return to_float(static_cast<const f16*>(t.data)[offset]);
    default: return static_cast<const float*>(t.data)[offset];
  }
}
MLC_DEVICE void set(const Tokens& t, int64_t offset, float v) {
  switch (t.dtype) {
    case Dtype::bf16: static_cast<bf16*>(t.data)[offset] = from_float<bf16>(v); break;
    case Dtype::f16: static_cast<f16*>(t.data)[offset] = from_float<f16>(v); break;
    default: static_cast<float*>(t.data)[offset] = v;
  }
}

// line[0 .. D) = phi(line). All threads of the block must call.
MLC_DEVICE void map_features(FeatureMap map, float* line, int D, float* scratch) {
  const int thread = threadIdx.x + threadIdx.y * kColumns;
  float peak = -INFINITY, total = 0.0f;
  if (map == FeatureMap::softmax) {
    for (int d = thread; d < D; d += kColumns * kRows) peak = fmaxf(peak, line[d]);
    peak = block_max(peak, scratch);
  }
  for (int d = thread; d < D; d += kColumns * kRows) {
    float x = line[d];
    if (map == FeatureMap::elu) x = x > 0 ? x + 1.0f : expf(x);
    if (map == FeatureMap::relu) x = x < 0 ? 0.0f : x;
    if (map == FeatureMap::softmax) x = expf(x - peak), total += x;
    line[d] = x;
  }
  if (map == FeatureMap::softmax) {
    total = block_sum(total, scratch);
    for (int d = thread; d < D; d += kColumns * kRows) line[d] /= total;
  }
}

// The sum of v over the block's rows, for each of its columns. All threads of the block must call.
MLC_DEVICE float sum_of_rows(float v, float (&sums)[kRows][kColumns]) {
  __syncthreads();
  sums[threadIdx.y][threadIdx.x] = v;
  __syncthreads();
  float total = 0.0f;
  for (int row = 0; row < kRows; ++row) total += sums[row][threadIdx.x];
  return total;
}

// One head a blockIdx.x; blocks along y share its columns, of which the last is the denominators' with normalize.
__global__ void __launch_bounds__(kColumns* kRows) linear_attention_step(LinearAttentionStep p) {
  MLC_DYNAMIC_SMEM(float, lines);
  __shared__ float scratch[32], sums[kRows][kColumns];
  const int D = static_cast<int>(p.D), thread = threadIdx.x + threadIdx.y * kColumns;
  const int64_t item = blockIdx.x, b = item / p.H, h = item % p.H, width = p.Dv + p.normalize;
  const float* state = p.state + item * p.D * width;  // (D, width)
  float* new_state = p.new_state + item * p.D * width;
  float *q = lines, *k = lines + D, *keep = lines + 2 * D;  // (D) each
  for (int d = thread; d < D; d += kColumns * kRows) {
    q[d] = value(p.q, b * p.q.sb + h * p.q.sh + d);
    k[d] = value(p.k, b * p.k.sb + h * p.k.sh + d);
    const int64_t gate = b * p.gate.sb + h * p.gate.sh + (p.gated == Gate::vector ? d : 0);
    keep[d] = p.gated == Gate::none ? 1.0f : expf(value(p.gate, gate));
  }
  map_features(p.map, q, D, scratch);
  map_features(p.map, k, D, scratch);
  __syncthreads();
  float den = 1.0f;
  if (p.normalize) {
    float total = 0.0f;
    for (int d = thread; d < D; d += kColumns * kRows) total += q[d] * (keep[d] * state[d * width + p.Dv] + k[d]);
    den = block_sum(total, scratch);
    __syncthreads();  // where both states are one, all have read before one writes
  }
  const float strength = p.beta.data ? value(p.beta, b * p.beta.sb + h * p.beta.sh) : 0.0f;
  for (int64_t first = blockIdx.y * kColumns; first < width; first += int64_t{gridDim.y} * kColumns) {
    const int64_t c = first + threadIdx.x;
    const bool live = c < width;
    float u = !live ? 0.0f : c < p.Dv ? value(p.v, b * p.v.sb + h * p.v.sh + c) : 1.0f;
    if (p.beta.data) {
      float read = 0.0f;
      for (int d = threadIdx.y; live && d < D; d += kRows) read += k[d] * (keep[d] * state[d * width + c]);
      u = strength * (u - sum_of_rows(read, sums));
    }
    float out = 0.0f;
    for (int d = threadIdx.y; live && d < D; d += kRows) {
      const float s = keep[d] * state[d * width + c] + k[d] * u;
      new_state[d * width + c] = s;
      out += q[d] * s;
    }
    out = sum_of_rows(out, sums);
    if (c < p.Dv && threadIdx.y == 0) set(p.o, item * p.Dv + c, den == 0.0f ? 0.0f : out / den);
  }
}

// Lines of token t for a head: phi(q) and phi(k), where wanted, and the decay. All threads of the block must call.
MLC_DEVICE void load_lines(const LinearAttentionProblem& p, int64_t b, int64_t h, int64_t t, bool read, bool write, float* q,
                           float* k, float* keep, float* scratch) {
  const int D = static_cast<int>(p.D);
  __syncthreads();  // the last token's lines have been read
  for (int d = threadIdx.x + threadIdx.y * kColumns; d < D; d += kColumns * kRows) {
    if (read) q[d] = value(p.q, b * p.q.sb + h * p.q.sh + t * p.q.st + d);
    if (!write) continue;
    k[d] = value(p.k, b * p.k.sb + h * p.k.sh + t * p.k.st + d);
    const int64_t gate = b * p.gate.sb + h * p.gate.sh + t * p.gate.st + (p.gated == Gate::vector ? d : 0);
    keep[d] = p.gated == Gate::none ? 1.0f : expf(value(p.gate, gate));
  }
  if (read) map_features(p.map, q, D, scratch);
  if (write) map_features(p.map, k, D, scratch);
  __syncthreads();
}

// A whole sequence of one head a blockIdx.x, token by token; kColumns columns of the values a blockIdx.y, whose part of the
// state is in shared memory, as is that of the denominators.
__global__ void __launch_bounds__(kColumns* kRows) linear_attention_short(LinearAttentionProblem p) {
  MLC_DYNAMIC_SMEM(float, state);  // (D, kColumns), then lines of D
  __shared__ float scratch[32], sums[kRows][kColumns];
  const int D = static_cast<int>(p.D), thread = threadIdx.x + threadIdx.y * kColumns;
  float *z = state + D * kColumns, *q = z + D, *k = q + D, *keep = k + D;
  const int64_t item = blockIdx.x, n = item / p.H, h = item % p.H, width = p.Dv + p.normalize;
  const int64_t c = int64_t{blockIdx.y} * kColumns + threadIdx.x, b = p.cu_seqlens ? 0 : n;
  const bool live = c < p.Dv;
  int64_t begin = 0, q_end = p.Tq, k_end = p.Tk;
  if (p.cu_seqlens) {
    begin = min(max(p.cu_seqlens[n], int64_t{0}), p.Tq);
    q_end = k_end = min(max(p.cu_seqlens[n + 1], begin), p.Tq);
  }
  const float* from = p.initial_state ? p.initial_state + item * p.D * width : nullptr;  // (D, width)
  for (int d = threadIdx.y; d < D; d += kRows) state[d * kColumns + threadIdx.x] = from && live ? from[d * width + c] : 0.0f;
  for (int d = thread; d < D; d += kColumns * kRows) z[d] = from && p.normalize ? from[d * width + p.Dv] : 0.0f;

  // out[t] = phi(q[t]) S, divided by phi(q[t]) z; S is updated with token t before where `write` is set.
  const auto pass = [&](int64_t t, bool read, bool write) {
    load_lines(p, b, h, t, read, write, q, k, keep, scratch);
    float u = live && write ? value(p.v, b * p.v.sb + h * p.v.sh + t * p.v.st + c) : 0.0f;
    if (write && p.delta_rule) {
      float seen = 0.0f;
      for (int d = threadIdx.y; d < D; d += kRows) seen += k[d] * (keep[d] * state[d * kColumns + threadIdx.x]);
      u = value(p.beta, b * p.beta.sb + h * p.beta.sh + t * p.beta.st) * (u - sum_of_rows(seen, sums));
    }
    float out = 0.0f, den = 0.0f;
    for (int d = threadIdx.y; d < D; d += kRows) {
      float& s = state[d * kColumns + threadIdx.x];
      if (write) s = keep[d] * s + k[d] * u;
      if (read) out += q[d] * s;
    }
    for (int d = thread; p.normalize && d < D; d += kColumns * kRows) {
      if (write) z[d] = keep[d] * z[d] + k[d];
      if (read) den += q[d] * z[d];
    }
    if (!read) return;
    out = sum_of_rows(out, sums);
    if (p.normalize) {
      den = block_sum(den, scratch);
      out = den == 0.0f ? 0.0f : out / den;
      if (thread == 0 && blockIdx.y == 0) p.den[(b * p.H + h) * p.Tq + t] = den;
    }
    if (live && threadIdx.y == 0) set(p.o, b * p.o.sb + h * p.o.sh + t * p.o.st + c, out);
  };
  for (int64_t t = begin; t < k_end; ++t) pass(t, p.causal, true);
  for (int64_t t = begin; !p.causal && t < q_end; ++t) pass(t, true, false);

  __syncthreads();
  float* to = p.final_state + item * p.D * width;  // (D, width)
  for (int d = threadIdx.y; live && d < D; d += kRows) to[d * width + c] = state[d * kColumns + threadIdx.x];
  if (p.normalize && blockIdx.y == 0)
    for (int d = thread; d < D; d += kColumns * kRows) to[d * width + p.Dv] = z[d];
}

Tokens operand_of(const Tensor& t) { return {t.raw(), t.stride(0), t.stride(1), t.rank() > 2 ? t.stride(2) : 0, t.dtype()}; }

constexpr int64_t kMaxShortHeadDim = 512;  // 73 KB of shared memory

void fwd(const DLTensor* q_, const DLTensor* k_, const DLTensor* v_, const DLTensor* gate_, const DLTensor* beta_,
         const DLTensor* initial_, const DLTensor* cu_, int64_t feature_map, int64_t normalize, int64_t causal, DLTensor* o_,
         DLTensor* den_, DLTensor* final_, DLTensor* states_, void* stream) {
  const Tensor q(q_, kOp, "q"), k(k_, kOp, "k"), v(v_, kOp, "v"), gate(gate_, kOp, "gate"), beta(beta_, kOp, "beta"),
      initial(initial_, kOp, "initial_state"), cu(cu_, kOp, "cu_seqlens"), o(o_, kOp, "o"), den(den_, kOp, "den"),
      final(final_, kOp, "final_state"), states(states_, kOp, "states");
  q.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B, H, Tq, D)").last_dim_contiguous();
  LinearAttentionProblem p{};
  p.B = q.size(0), p.H = q.size(1), p.Tq = q.size(2), p.D = q.size(3);
  p.causal = causal != 0, p.normalize = normalize != 0;
  k.on(kDLCUDA).dtype_in({q.dtype()}).rank_is(4, "(B, H, Tk, D)").last_dim_contiguous();
  p.Tk = k.size(2);
  k.shape_is({p.B, p.H, p.Tk, p.D}, "(B, H, Tk, D)");
  require(!p.causal || p.Tk == p.Tq, kOp, ": causal attention needs as many keys as queries; got ", p.Tk, " and ", p.Tq);
  v.on(kDLCUDA).dtype_in({q.dtype()}).rank_is(4, "(B, H, Tk, Dv)").last_dim_contiguous();
  p.Dv = v.size(3);
  v.shape_is({p.B, p.H, p.Tk, p.Dv}, "(B, H, Tk, Dv)");
  o.on(kDLCUDA).dtype_in({q.dtype()}).shape_is({p.B, p.H, p.Tq, p.Dv}, "(B, H, Tq, Dv)").last_dim_contiguous();
  require(p.D >= 1 && p.Dv >= 1, kOp, ": head dims must be at least 1; got D ", p.D, ", Dv ", p.Dv);
  require(p.D <= kMaxShortHeadDim, kOp, ": head dim D is ", p.D, "; the CUDA kernel takes at most ", kMaxShortHeadDim);
  require(!states.present(), kOp, ": the CUDA kernels keep no states for a backward pass");
  require(feature_map >= 0 && feature_map <= 3, kOp, ": feature_map must be 0 to 3; got ", feature_map);
  p.map = static_cast<FeatureMap>(feature_map);
  p.q = operand_of(q), p.k = operand_of(k), p.v = operand_of(v), p.o = operand_of(o);
  require(p.causal || (!gate.present() && !beta.present()), kOp, ": gate and beta need causal attention");
  if (gate.present()) {
    gate.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16});
    p.gated = gate.rank() == 3 ? Gate::scalar : Gate::vector;
    if (gate.rank() == 3)
      gate.shape_is({p.B, p.H, p.Tq}, "(B, H, T)");
    else
      gate.shape_is({p.B, p.H, p.Tq, p.D}, "(B, H, T) or (B, H, T, D)").last_dim_contiguous();
    p.gate = operand_of(gate);
  }
  if (beta.present()) {
    require(!p.normalize, kOp, ": beta needs normalize = 0");
    beta.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).shape_is({p.B, p.H, p.Tq}, "(B, H, T)");
    p.beta = operand_of(beta), p.delta_rule = true;
  }
  p.sequences = p.B;
  if (cu.present()) {
    require(p.B == 1 && p.Tk == p.Tq, kOp, ": cu_seqlens needs a batch of 1 and as many keys as queries");
    cu.on(kDLCUDA).dtype_in({Dtype::i64}).rank_is(1, "(N + 1)").contiguous();
    require(cu.numel() >= 1, kOp, ": cu_seqlens must have at least one element");
    p.sequences = cu.numel() - 1, p.cu_seqlens = cu.data<int64_t>();
  }
  require(den.present() == p.normalize, kOp, ": den goes with normalize");
  if (p.normalize) {
    den.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({p.B, p.H, p.Tq}, "(B, H, Tq)").contiguous();
    p.den = den.data<float>();
  }
  for (const Tensor* t : {&initial, &final})
    if (t == &final || t->present())
      t->on(kDLCUDA)
          .dtype_in({Dtype::f32})
          .shape_is({p.sequences, p.H, p.D, p.state_cols()}, "(N, H, D, Dv + normalize)")
          .contiguous();
  p.initial_state = initial.present() ? initial.data<float>() : nullptr, p.final_state = final.data<float>();
  const int64_t items = p.sequences * p.H, groups = (p.Dv + kColumns - 1) / kColumns;
  if (items == 0) return;
  require(items <= INT_MAX && groups <= 65535, kOp, ": too many heads or columns for one launch");
  const DeviceGuard device(q_->device.device_id);
  const dim3 grid(static_cast<unsigned>(items), static_cast<unsigned>(groups));
  MLC_LAUNCH(linear_attention_short, grid, dim3(kColumns, kRows), static_cast<size_t>(p.D * (kColumns + 4)) * sizeof(float),
             stream, p);
}

void step(const DLTensor* q_, const DLTensor* k_, const DLTensor* v_, const DLTensor* gate_, const DLTensor* beta_,
          const DLTensor* state_, int64_t feature_map, int64_t normalize, DLTensor* o_, DLTensor* new_state_, void* stream) {
  const Tensor q(q_, kOp, "q"), k(k_, kOp, "k"), v(v_, kOp, "v"), gate(gate_, kOp, "gate"), beta(beta_, kOp, "beta"),
      state(state_, kOp, "state"), o(o_, kOp, "o"), new_state(new_state_, kOp, "new_state");
  q.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(3, "(B, H, D)").last_dim_contiguous();
  const int64_t B = q.size(0), H = q.size(1), D = q.size(2);
  k.on(kDLCUDA).dtype_in({q.dtype()}).shape_is({B, H, D}, "(B, H, D)").last_dim_contiguous();
  v.on(kDLCUDA).dtype_in({q.dtype()}).rank_is(3, "(B, H, Dv)").last_dim_contiguous();
  const int64_t Dv = v.size(2), width = Dv + (normalize != 0);
  v.shape_is({B, H, Dv}, "(B, H, Dv)");
  o.on(kDLCUDA).dtype_in({q.dtype()}).shape_is({B, H, Dv}, "(B, H, Dv)").contiguous();
  require(D >= 1 && Dv >= 1, kOp, ": head dims must be at least 1; got D ", D, ", Dv ", Dv);
  require(D <= 16384, kOp, ": head dim D is ", D, "; the CUDA kernel takes at most 16384");
  require(feature_map >= 0 && feature_map <= 3, kOp, ": feature_map must be 0 to 3; got ", feature_map);
  LinearAttentionStep p{};
  p.rows = B * H, p.D = D, p.Dv = Dv, p.H = H;
  p.map = static_cast<FeatureMap>(feature_map), p.normalize = normalize != 0;
  p.q = operand_of(q), p.k = operand_of(k), p.v = operand_of(v), p.o = operand_of(o);
  if (gate.present()) {
    gate.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16});
    p.gated = gate.rank() == 2 ? Gate::scalar : Gate::vector;
    if (gate.rank() == 2)
      gate.shape_is({B, H}, "(B, H)");
    else
      gate.shape_is({B, H, D}, "(B, H) or (B, H, D)").last_dim_contiguous();
    p.gate = operand_of(gate);
  }
  if (beta.present()) {
    require(!p.normalize, kOp, ": beta needs normalize = 0");
    beta.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).shape_is({B, H}, "(B, H)");
    p.beta = operand_of(beta);
  }
  for (const Tensor* t : {&state, &new_state})
    t->on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({B, H, D, width}, "(B, H, D, Dv + normalize)").contiguous();
  p.state = state.data<float>(), p.new_state = new_state.data<float>();
  if (p.rows == 0) return;
  require(p.rows <= INT_MAX, kOp, ": ", p.rows, " heads; the CUDA kernel takes at most ", INT_MAX);
  const bool in_place = p.normalize && p.state == p.new_state;  // then one block reads the denominators' state, and writes it
  const int64_t groups = in_place ? 1 : (width + kColumns - 1) / kColumns;
  const dim3 grid(static_cast<unsigned>(p.rows), static_cast<unsigned>(groups < 65535 ? groups : 65535));
  const DeviceGuard device(q_->device.device_id);
  MLC_LAUNCH(linear_attention_step, grid, dim3(kColumns, kRows), static_cast<size_t>(3 * D) * sizeof(float), stream, p);
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_linear_attention_fwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* gate,
                                          const DLTensor* beta, const DLTensor* initial_state, const DLTensor* cu_seqlens,
                                          int64_t feature_map, int64_t normalize, int64_t causal, int64_t /*span*/, DLTensor* o,
                                          DLTensor* den, DLTensor* final_state, DLTensor* states, void* stream) {
  return mlcore::guard([&] {
    mlcore::cuda::fwd(q, k, v, gate, beta, initial_state, cu_seqlens, feature_map, normalize, causal, o, den, final_state,
                      states, stream);
  });
}

MLC_API int mlc_cuda_linear_attention_step(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* gate,
                                           const DLTensor* beta, const DLTensor* state, int64_t feature_map, int64_t normalize,
                                           DLTensor* o, DLTensor* new_state, void* stream) {
  return mlcore::guard([&] { mlcore::cuda::step(q, k, v, gate, beta, state, feature_map, normalize, o, new_state, stream); });
}
