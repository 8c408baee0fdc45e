// The CUDA kernel of linear_attention's step and its launcher; the equations are in linear_attention.h. Longer sequences are
// Triton's. The same text runs on the CPU in tests/native.
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

Tokens tokens(const Tensor& t) { return {t.raw(), t.stride(0), t.stride(1), 0, t.dtype()}; }

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
  p.q = tokens(q), p.k = tokens(k), p.v = tokens(v), p.o = tokens(o);
  if (gate.present()) {
    gate.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16});
    p.gated = gate.rank() == 2 ? Gate::scalar : Gate::vector;
    if (gate.rank() == 2)
      gate.shape_is({B, H}, "(B, H)");
    else
      gate.shape_is({B, H, D}, "(B, H) or (B, H, D)").last_dim_contiguous();
    p.gate = tokens(gate);
  }
  if (beta.present()) {
    require(!p.normalize, kOp, ": beta needs normalize = 0");
    beta.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).shape_is({B, H}, "(B, H)");
    p.beta = tokens(beta);
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

MLC_API int mlc_cuda_linear_attention_step(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* gate,
                                           const DLTensor* beta, const DLTensor* state, int64_t feature_map, int64_t normalize,
                                           DLTensor* o, DLTensor* new_state, void* stream) {
  return mlcore::guard([&] { mlcore::cuda::step(q, k, v, gate, beta, state, feature_map, normalize, o, new_state, stream); });
}
