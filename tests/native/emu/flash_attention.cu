// o = softmax(q k^T * scale) v for q, k, v, o (H, T, 64) bfloat16: a small flash attention on mma, ldmatrix and cp.async that
// tests the emulator. kBreak leaves out one synchronisation, which the emulator must notice. The real op is kernels/attention.
#include "core/status.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/reduce.cuh"

using namespace mlcore;
using namespace mlcore::cuda;

namespace {

enum Break { kNothing, kBarrierAfterLoad, kBarrierBeforeRefill, kWait };

constexpr int D = 64, BM = 64, BN = 32, kWarps = BM / 16;
constexpr int kRow = D + 8;  // padded: the eight rows of an ldmatrix fall into different banks

template <int kRows>
__device__ void load_tile(bf16 (&tile)[kRows][kRow], const bf16* x, int first, int T) {
  constexpr int kChunks = D / 8;
  for (int i = threadIdx.x; i < kRows * kChunks; i += 32 * kWarps) {
    const int row = i / kChunks, column = i % kChunks * 8;
    const bool inside = first + row < T;
    cp_async<16>(&tile[row][column], x + (inside ? (first + row) * D + column : 0), inside ? 16 : 0);
  }
}

template <Break kBreak>
__global__ void __launch_bounds__(32 * kWarps)
    attention_fwd(const bf16* q, const bf16* k, const bf16* v, bf16* o, int T, float scale_log2) {
  __shared__ __align__(16) bf16 q_tile[BM][kRow], k_tile[2][BN][kRow], v_tile[2][BN][kRow];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int row0 = blockIdx.x * BM, tiles = (T + BN - 1) / BN;
  const size_t head = static_cast<size_t>(blockIdx.y) * T * D;
  q += head, k += head, v += head, o += head;

  load_tile(q_tile, q, row0, T);
  load_tile(k_tile[0], k, 0, T);
  load_tile(v_tile[0], v, 0, T);
  cp_async_commit();

  float acc[D / 8][4] = {};                        // (16, D) of this warp, the mma layout
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {};  // rows g and g + 8
  for (int n = 0; n < tiles; ++n) {
    const int now = n % 2;
    if (n + 1 < tiles) {
      load_tile(k_tile[1 - now], k, (n + 1) * BN, T);
      load_tile(v_tile[1 - now], v, (n + 1) * BN, T);
    }
    cp_async_commit();
    if constexpr (kBreak != kWait) cp_async_wait<1>();
    if constexpr (kBreak != kBarrierAfterLoad) __syncthreads();

    float s[BN / 8][4] = {};  // (16, BN)
    for (int kk = 0; kk < D; kk += 16) {
      uint32_t a[4];
      ldmatrix(a, &q_tile[16 * warp + lane % 16][kk + lane / 16 * 8]);
      for (int j = 0; j < BN; j += 16) {
        uint32_t b[4];
        ldmatrix(b, &k_tile[now][j + lane / 16 * 8 + lane % 8][kk + lane / 8 % 2 * 8]);
        mma_m16n8k16<bf16>(s[j / 8], a, {b[0], b[1]}, s[j / 8]);
        mma_m16n8k16<bf16>(s[j / 8 + 1], a, {b[2], b[3]}, s[j / 8 + 1]);
      }
    }
    for (int r = 0; r < 2; ++r) {
      float row_max = -INFINITY;
      for (int j = 0; j < BN / 8; ++j) {
        for (int e = 2 * r; e < 2 * r + 2; ++e) {
          const bool inside = n * BN + 8 * j + 2 * t + e % 2 < T;
          s[j][e] = inside ? s[j][e] * scale_log2 : -INFINITY;
          row_max = fmaxf(row_max, s[j][e]);
        }
      }
      const float m_new = fmaxf(m[r], warp_max<4>(row_max));
      const float alpha = exp2f(m[r] - m_new);  // rescales what was summed under the old maximum
      float row_sum = 0.0f;
      for (int j = 0; j < BN / 8; ++j)
        for (int e = 2 * r; e < 2 * r + 2; ++e) row_sum += s[j][e] = exp2f(s[j][e] - m_new);
      l[r] = l[r] * alpha + warp_sum<4>(row_sum);
      m[r] = m_new;
      for (int j = 0; j < D / 8; ++j) acc[j][2 * r] *= alpha, acc[j][2 * r + 1] *= alpha;
    }
    for (int j = 0; j < BN; j += 16) {
      const float (&lo)[4] = s[j / 8], (&hi)[4] = s[j / 8 + 1];
      const uint32_t p[4] = {pack2<bf16>(lo[0], lo[1]), pack2<bf16>(lo[2], lo[3]), pack2<bf16>(hi[0], hi[1]),
                             pack2<bf16>(hi[2], hi[3])};
      for (int d = 0; d < D; d += 16) {
        uint32_t b[4];
        ldmatrix<true>(b, &v_tile[now][j + lane % 16][d + lane / 16 * 8]);
        mma_m16n8k16<bf16>(acc[d / 8], p, {b[0], b[1]}, acc[d / 8]);
        mma_m16n8k16<bf16>(acc[d / 8 + 1], p, {b[2], b[3]}, acc[d / 8 + 1]);
      }
    }
    if constexpr (kBreak != kBarrierBeforeRefill) __syncthreads();
  }
  for (int r = 0; r < 2; ++r) {
    const int row = row0 + 16 * warp + g + 8 * r;
    if (row >= T) continue;
    for (int j = 0; j < D / 8; ++j)
      for (int e = 0; e < 2; ++e) o[row * D + 8 * j + 2 * t + e] = from_float<bf16>(acc[j][2 * r + e] / l[r]);
  }
}

}  // namespace

MLC_API int test_attention(const DLTensor* q, const DLTensor* k, const DLTensor* v, DLTensor* o, double scale, int64_t left_out,
                           void* stream) {
  return guard([&] {
    const int H = static_cast<int>(q->shape[0]), T = static_cast<int>(q->shape[1]);
    const auto run = [&](auto kernel) {
      const auto data = [](const DLTensor* t) { return static_cast<bf16*>(t->data); };
      MLC_LAUNCH(kernel, dim3((T + BM - 1) / BM, H), 32 * kWarps, 0, stream, data(q), data(k), data(v), data(o), T,
                 static_cast<float>(scale * 1.4426950408889634));
    };
    switch (left_out) {
      case kBarrierAfterLoad: return run(attention_fwd<kBarrierAfterLoad>);
      case kBarrierBeforeRefill: return run(attention_fwd<kBarrierBeforeRefill>);
      case kWait: return run(attention_fwd<kWait>);
      default: return run(attention_fwd<kNothing>);
    }
  });
}
