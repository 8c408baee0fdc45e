// The CUDA forward of attention: one block a tile of queries, K and V by cp.async into two buffers, online softmax in
// registers. The equations are in attention.h, what the passes share in attention_cuda.cuh. The same text runs on the CPU in
// tests.
#include "attention/attention_cuda.cuh"

namespace mlcore::cuda {
namespace {

constexpr const char* kOp = "attention";

// Scores of a piece (16, kCols) of keys from their products; -inf where unseen. Bit 4 n + e: seen.
template <class S>
MLC_DEVICE uint32_t finish_scores(const AttentionArgs& p, const Head& head, float (&s)[S::kCols / 8][4], int i0, int j0,
                                  bool masked, int mask) {
  const int lane = threadIdx.x % 32;
  uint32_t seen = ~0u;
#pragma unroll
  for (int n = 0; n < S::kCols / 8; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = i0 + lane / 4 + e / 2 * 8, j = j0 + 8 * n + lane % 4 * 2 + e % 2;
      if (masked && (i >= p.Tq || j >= p.Tk || !sees(p, i, j, mask))) {
        s[n][e] = -INFINITY;
      } else if (p.plain()) {
        s[n][e] *= p.score_scale;
      } else {
        s[n][e] = score(p, head, s[n][e], i, j);
      }
      if (s[n][e] == -INFINITY) seen &= ~(1u << (4 * n + e));
    }
  }
  return seen;
}

// Dropout of the weights of a piece.
template <class S>
MLC_DEVICE void drop_weights(const AttentionArgs& p, const Head& head, float (&s)[S::kCols / 8][4], int i0, int j0) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < S::kCols / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int i = i0 + lane / 4 + e / 2 * 8, j = j0 + 8 * n + lane % 4 * 2 + e % 2;
      s[n][e] = kept(p, head, i, j) ? s[n][e] * p.keep_scale : 0.0f;
    }
}

// The end of a warp's rows: sinks, o, lse.
template <class S, class T>
MLC_DEVICE void finish_rows(const AttentionArgs& p, const Head& head, const RowState& state, const float (&acc)[S::kDim / 8][4],
                            int i0) {
  const int lane = threadIdx.x % 32;
  float factor[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float l = state.l[r], m = l == 0.0f ? -INFINITY : state.m[r], rescale = 1.0f;
    if (p.sinks) {  // one more score, that has no value
      const float sink = p.sinks[head.h] * kLog2e, top = fmaxf(m, sink);
      rescale = exp2f(m - top);
      l = l * rescale + exp2f(sink - top);
      m = top;
    }
    factor[r] = l == 0.0f ? 0.0f : rescale / l;
    const int i = i0 + lane / 4 + 8 * r;
    if (p.lse && lane % 4 == 0 && i < p.Tq) {
      const float log = l == 0.0f ? -INFINITY : (m + log2f(l)) * kLn2;
      const int64_t row = (head.b * p.H + head.h) * p.Tq + i;
      p.lse[row] = log;
      p.lse[p.rows() + row] = l == 0.0f ? 1.0f : exp2f(__fmul_rn(log, kLog2e) - m) / l;
    }
  }
  store_rows<S, T>(p.o, head.b, head.h, i0, p.Tq, p.Dv, acc, factor);
}

template <class T, int kDim>
__global__ void __launch_bounds__(Shape<T, kDim>::kThreads, 2) attention_fwd(AttentionArgs p) {
  using S = Shape<T, kDim>;
  constexpr int kStep = S::kCols * S::kLd;
  MLC_DYNAMIC_SMEM(T, tiles);
  __shared__ int flags[S::kWarps];
  T *const q_tile = tiles, *const k_tiles = q_tile + S::kRows * S::kLd, *const v_tiles = k_tiles + 2 * kStep;
  const int blocks = (p.Tq + S::kRows - 1) / S::kRows, warp = threadIdx.x / 32;
  const int row0 = (blocks - 1 - static_cast<int>(blockIdx.x % blocks)) * S::kRows, i0 = row0 + 16 * warp;
  const int64_t bh = blockIdx.x / blocks, b = bh / p.H, h = bh % p.H, hkv = h / p.group;
  const Head head(p, b, h);
  const Visits visits(p, b, h, row0 / kTile, true);
  const int64_t pieces = visits.end > visits.begin ? (visits.end - visits.begin) * S::kPieces : 0;
  const auto first_key = [&](int64_t n) {
    return visits.tile(visits.begin + n / S::kPieces) * kTile + static_cast<int>(n % S::kPieces) * S::kCols;
  };
  const auto load_piece = [&](int64_t n) {
    const int j0 = first_key(n);
    load_tile<S, S::kCols>(k_tiles + n % 2 * kStep, p.k, b, hkv, j0, p.Tk, p.D, p.aligned);
    load_tile<S, S::kCols>(v_tiles + n % 2 * kStep, p.v, b, hkv, j0, p.Tk, p.Dv, p.aligned);
  };

  load_tile<S, S::kRows>(q_tile, p.q, b, h, row0, p.Tq, p.D, p.aligned);
  if (pieces > 0) load_piece(0);
  cp_async_commit();
  float acc[kDim / 8][4] = {};  // (16, Dv) of this warp
  RowState state;
  for (int64_t n = 0; n < pieces; ++n) {
    if (n + 1 < pieces) load_piece(n + 1);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const int j0 = first_key(n), mask = visits.mask(visits.begin + n / S::kPieces);
    const T *k_tile = k_tiles + n % 2 * kStep, *v_tile = v_tiles + n % 2 * kStep;
    const bool masked = is_masked(p, row0, S::kRows, j0, S::kCols, mask);
    const bool finite = !(masked || p.bias) || tile_is_finite<S>(v_tile, p.Dv, flags);
    if (!masked || !is_hidden(p, i0, 16, j0, S::kCols, mask)) {
      float s[S::kCols / 8][4] = {};  // (16, kCols)
      product_nt<S>(s, q_tile + 16 * warp * S::kLd, k_tile, p.D);
      const uint32_t seen = finish_scores<S>(p, head, s, i0, j0, masked, mask);
      softmax_step<S>(state, s, acc);
      if (p.drop_below != 0) drop_weights<S>(p, head, s, i0, j0);
      if (finite) {
        product_nn<S>(acc, s, v_tile, p.Dv);
      } else {
        careful_product<S>(acc, s, seen, v_tile, p.Dv);
      }
    }
    __syncthreads();
  }
  finish_rows<S, T>(p, head, state, acc, i0);
}

void fwd(const HostArgs& a, const DLTensor* o_, const DLTensor* lse_, void* stream) {
  Dtype dtype;
  AttentionArgs p = checked_args(a, kOp, dtype);
  const Tensor o(o_, kOp, "o"), lse(lse_, kOp, "lse");
  o.on(kDLCUDA).dtype_in({dtype}).shape_is({p.B, p.H, p.Tq, p.Dv}, "(B, H, Tq, Dv)").last_dim_contiguous();
  p.o = {o.raw(), o.stride(0), o.stride(1), o.stride(2)};
  if (lse.present())
    p.lse = lse.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({2, p.B, p.H, p.Tq}, "(2, B, H, Tq)").contiguous().data<float>();
  const DeviceGuard device(a.q->device.device_id);
  with_instance(dtype, std::max(p.D, p.Dv), [&](auto t, auto width) {
    using S = Shape<decltype(t), width>;
    const int64_t blocks = (p.Tq + S::kRows - 1) / S::kRows * int64_t{p.B} * p.H;
    require(blocks < int64_t{1} << 31, kOp, ": B * H * Tq must be below 2^31 tiles; got ", blocks);
    if (blocks == 0) return;
    const size_t smem = sizeof(decltype(t)) * S::kLd * (S::kRows + 4 * S::kCols);
    MLC_LAUNCH((attention_fwd<decltype(t), width>), dim3(static_cast<unsigned>(blocks)), S::kThreads, smem, stream, p);
  });
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_attention_fwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias,
                                   const DLTensor* relative, const DLTensor* sinks, int64_t left, int64_t right, int64_t offset,
                                   const DLTensor* row_ptr, const DLTensor* cols, const DLTensor* ids, const DLTensor* bits,
                                   int64_t set_b, int64_t set_h, double scale, double softcap, double dropout_p, int64_t seed,
                                   DLTensor* o, DLTensor* lse, void* stream) {
  return mlcore::guard([&] {
    mlcore::cuda::fwd({q, k, v, bias, relative, sinks, left, right, offset, row_ptr, cols, ids, bits, set_b, set_h, scale,
                       softcap, dropout_p, seed},
                      o, lse, stream);
  });
}
