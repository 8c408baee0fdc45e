// Decoding on a GPU: a few queries over a key-value cache that is read where it lies, and appending to it. The equations are in
// attention.h. Keys are cut into parts at fixed positions; where a sequence has more than one, a second kernel adds them up.
// The same text runs on the CPU in tests.
#include "attention/attention_decode.cuh"

namespace mlcore::cuda {
namespace {

constexpr int kMergeWarps = 8;        // each adds every 8th part
constexpr int kMostBlocks = 1 << 14;  // beyond, blocks take several parts in turns. Not measured

// The queries of a lane's rows g and g + 8 of a tile. Rows beyond the last see what the last sees, so that none of them makes a
// stretch of keys look masked.
struct LaneRows {
  int lo[2], hi[2];
  float position[2], slope[2];  // slope in log2 units

  MLC_DEVICE LaneRows(const DecodeProblem& d, const Sequence& s, int64_t b, int64_t hkv, int row0) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = min(row0 + static_cast<int>(threadIdx.x) % 32 / 4 + 8 * r, d.rows - 1), Tq = static_cast<int>(d.p.Tq);
      lo[r] = s.lo(d, row % Tq), hi[r] = s.hi(d, row % Tq);
      position[r] = static_cast<float>(s.position(d, row % Tq));
      slope[r] = d.p.slopes ? -d.p.slopes[b * d.p.slopes_sb + hkv * d.group + row / Tq] * kLog2e : 0.0f;
    }
  }
};

// Products of 16 keys from j0 become scores, -inf where unseen. there: bit c where key c was loaded. Returns bit 4 n + e: seen.
template <class S>
MLC_DEVICE uint32_t finish_scores(const DecodeProblem& d, const LaneRows& rows, float (&s)[2][4], int j0, unsigned there,
                                  float k_scale) {
  const int column = threadIdx.x % 4 * 2;
  uint32_t seen = 0;
#pragma unroll
  for (int n = 0; n < 2; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int c = 8 * n + column + e, j = j0 + c;
      const float scale = S::kInt8 ? __shfl_sync(kFullWarp, k_scale, c) * d.score_scale : d.score_scale;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& x = s[n][2 * r + e];
        x *= scale;
        if (d.cap > 0.0f) x = tanhf(x) * d.cap;
        if (d.p.slopes) x += rows.slope[r] * fabsf(static_cast<float>(j) - rows.position[r]);
        if ((there >> c & 1) != 0 && j >= rows.lo[r] && j < rows.hi[r]) {
          seen |= 1u << (4 * n + 2 * r + e);
        } else {
          x = -INFINITY;
        }
      }
    }
  }
  return seen;
}

// One warp's way through its stretches of 16 keys of [begin, end): state and acc start empty.
template <class S, class T>
MLC_DEVICE void attend_part(const DecodeProblem& d, int64_t b, int64_t hkv, const LaneRows& rows, int begin, int end,
                            const T* q_tile, unsigned char* mine, RowState& state, float (&acc)[S::kDim / 8][4]) {
  using Raw = typename S::Raw;
  constexpr int kStep = S::kCols * S::kWarps;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = static_cast<int>(d.p.D), Dv = static_cast<int>(d.p.Dv);
  Raw* const stages = reinterpret_cast<Raw*>(mine);
  T* const wide = reinterpret_cast<T*>(stages + 4 * S::kStage);
  const int first = begin / kStep, steps = begin < end ? (end - 1) / kStep + 1 - first : 0;
  const auto key_of = [&](int n) { return (first + n) * kStep + warp * S::kCols; };
  const auto find = [&](int n) {
    const int j = key_of(n) + lane % 16;
    return n < steps && j >= begin && j < end ? KeyRow(d, b, hkv, j) : KeyRow();
  };
  const auto load = [&](int n, const KeyRow& row) {
    Raw* const stage = stages + n % 2 * 2 * S::kStage;
    load_16_rows<S, S::kRawLd>(stage, d.p.k.rows.data, row.k, D, d.k_aligned);
    load_16_rows<S, S::kRawLd>(stage + S::kStage, d.p.v.rows.data, row.v, Dv, d.v_aligned);
  };
  KeyRow now = find(0), next = find(1);  // pages are looked up a step before their rows are asked for
  if (steps > 0) load(0, now);
  cp_async_commit();
  for (int n = 0; n < steps; ++n) {
    const KeyRow here = now;
    if (n + 1 < steps) load(n + 1, next);
    cp_async_commit();
    now = next, next = find(n + 2);
    cp_async_wait<1>();
    if (n == 0) {
      __syncthreads();  // all have loaded their part of q
    } else {
      __syncwarp();
    }
    const unsigned there = __ballot_sync(kFullWarp, here.k >= 0) & 0xffffu;
    if (there == 0) continue;
    const Raw *k_raw = stages + n % 2 * 2 * S::kStage, *v_raw = k_raw + S::kStage;
    const T *k_tile, *v_tile;
    if constexpr (S::kInt8) {
      widen_16_rows<S>(wide, k_raw, 1.0f);  // exact: its scale goes to the scores
      __syncwarp();
      k_tile = v_tile = wide;
    } else {
      k_tile = k_raw, v_tile = v_raw;
    }
    float s[2][4] = {};
    product_nt<S>(s, q_tile, k_tile, D);
    const uint32_t seen = finish_scores<S>(d, rows, s, key_of(n), there, here.k_scale);
    softmax_step<S>(state, s, acc);
    if constexpr (S::kInt8) {
      __syncwarp();
      widen_16_rows<S>(wide, v_raw, here.v_scale);
      __syncwarp();
    }
    // What one query sees and another doesn't must not reach the other, not even as 0 * inf. What was not loaded is 0.
    uint32_t loaded = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) loaded |= (there >> (i / 4 * 8 + lane % 4 * 2 + i % 2) & 1) << i;
    if (!__any_sync(kFullWarp, seen != loaded) || are_16_rows_finite<S>(v_tile, Dv)) {
      product_nn<S>(acc, s, v_tile, Dv);
    } else {
      careful_product<S>(acc, s, seen, v_tile, Dv);
    }
    __syncwarp();  // the stage has been read
  }
  cp_async_wait<0>();
}

template <class T, int kDim, bool kInt8>
__global__ void __launch_bounds__(DecodeShape<T, kDim, kInt8>::kThreads, 2) attention_decode(DecodeProblem d) {
  using S = DecodeShape<T, kDim, kInt8>;
  MLC_DYNAMIC_SMEM(unsigned char, smem);
  __shared__ float top[S::kWarps][S::kRows], total[S::kWarps][S::kRows], factor[S::kWarps][S::kRows];
  T* const q_tile = reinterpret_cast<T*>(smem);
  unsigned char* const stages = smem + S::kQBytes;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, Tq = static_cast<int>(d.p.Tq), Dv = static_cast<int>(d.p.Dv);
  const int row0 = static_cast<int>(blockIdx.x % d.row_tiles) * S::kRows, rows_here = min(d.rows - row0, S::kRows);
  const int64_t pair = blockIdx.x / d.row_tiles, b = pair / d.p.Hkv, hkv = pair % d.p.Hkv;
  if (warp == 0) {
    const int row = row0 + lane % 16;
    const int64_t h = hkv * d.group + row / Tq;
    const int64_t offset = row < d.rows ? b * d.p.q.sb + h * d.p.q.sh + row % Tq * d.p.q.st : -1;
    load_16_rows<S, S::kLd>(q_tile, d.p.q.data, offset, static_cast<int>(d.p.D), d.q_aligned);
  }
  const Sequence sequence(d, b);
  const Seen seen(d, sequence);
  const LaneRows rows(d, sequence, b, hkv, row0);
  for (int n = blockIdx.y; n <= seen.last - seen.first; n += static_cast<int>(gridDim.y)) {
    const int part = seen.first + n;
    RowState state;
    float acc[kDim / 8][4] = {};  // (16, Dv) of this warp's keys
    attend_part<S, T>(d, b, hkv, rows, max(seen.lo, part * kPart), min(seen.hi, (part + 1) * kPart), q_tile,
                      stages + warp * S::kWarpBytes, state, acc);
    __syncthreads();
    float* const sums = reinterpret_cast<float*>(stages);  // [warp][row][channel]
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = lane / 4 + 8 * r;
      if (row >= rows_here) continue;
      if (lane % 4 == 0) top[warp][row] = state.m[r], total[warp][row] = state.l[r];
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) sums[(warp * S::kRows + row) * kDim + 8 * i + lane % 4 * 2 + e] = acc[i][2 * r + e];
    }
    __syncthreads();
    const bool alone = seen.first == seen.last;
    if (static_cast<int>(threadIdx.x) < rows_here) {
      const int row = threadIdx.x;
      const int64_t h = hkv * d.group + (row0 + row) / Tq, at = (b * d.p.H + h) * Tq + (row0 + row) % Tq;
      float m = -INFINITY, l = 0.0f, lse, last = 1.0f;
#pragma unroll
      for (int w = 0; w < S::kWarps; ++w) m = fmaxf(m, top[w][row]);
#pragma unroll
      for (int w = 0; w < S::kWarps; ++w) {
        factor[w][row] = exp2f(top[w][row] - fmaxf(m, kLowest));
        l += factor[w][row] * total[w][row];
      }
      if (alone) {
        last = finish_row(d, h, m, l, lse);
        if (d.p.lse) d.p.lse[at] = lse;
      } else {
        d.tops[(at * d.parts + n) * 2] = m, d.tops[(at * d.parts + n) * 2 + 1] = l;
      }
      top[0][row] = last;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < rows_here * Dv; i += S::kThreads) {
      const int row = i / Dv, c = i % Dv, t = (row0 + row) % Tq;
      const int64_t h = hkv * d.group + (row0 + row) / Tq;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < S::kWarps; ++w) sum += factor[w][row] * sums[(w * S::kRows + row) * kDim + c];
      if (alone) {
        const float x = top[0][row] == 0.0f ? 0.0f : sum * top[0][row];
        static_cast<T*>(d.p.o.data)[b * d.p.o.sb + h * d.p.o.sh + t * d.p.o.st + c] = from_float<T>(x);
      } else {
        d.sums[(((b * d.p.H + h) * Tq + t) * d.parts + n) * Dv + c] = sum;
      }
    }
    __syncthreads();
  }
}

// One row of (B, H, Tq) a block: the sum of its parts. Which warp adds a part follows from the part's own number.
template <class T>
__global__ void __launch_bounds__(32 * kMergeWarps) attention_decode_merge(DecodeProblem d) {
  __shared__ float scratch[32], sums[kMergeWarps][256], total[kMergeWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, Dv = static_cast<int>(d.p.Dv);
  const int64_t row = blockIdx.x, t = row % d.p.Tq, h = row / d.p.Tq % d.p.H, b = row / d.p.Tq / d.p.H;
  const Seen seen(d, Sequence(d, b));
  const int n = seen.last - seen.first + 1;
  if (n == 1) return;
  const float *tops = d.tops + row * d.parts * 2, *parts = d.sums + row * d.parts * Dv;
  float m = -INFINITY;
  for (int i = threadIdx.x; i < n; i += 32 * kMergeWarps) m = fmaxf(m, tops[2 * i]);
  m = block_max(m, scratch);
  const float shift = fmaxf(m, kLowest);
  float l = 0.0f, acc[8] = {};
#pragma unroll 4
  for (int i = (warp - seen.first % kMergeWarps + kMergeWarps) % kMergeWarps; i < n; i += kMergeWarps) {
    const float weight = exp2f(tops[2 * i] - shift);
    l += weight * tops[2 * i + 1];
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (lane + 32 * c < Dv) acc[c] += weight * parts[static_cast<int64_t>(i) * Dv + lane + 32 * c];
  }
  if (lane == 0) total[warp] = l;
#pragma unroll
  for (int c = 0; c < 8; ++c)
    if (lane + 32 * c < Dv) sums[warp][lane + 32 * c] = acc[c];
  __syncthreads();
  const int c = threadIdx.x;
  if (c >= Dv) return;
  l = 0.0f;
  float sum = 0.0f, lse;
#pragma unroll
  for (int w = 0; w < kMergeWarps; ++w) l += total[w], sum += sums[w][c];
  const float factor = finish_row(d, h, m, l, lse);
  if (c == 0 && d.p.lse) d.p.lse[row] = lse;
  static_cast<T*>(d.p.o.data)[b * d.p.o.sb + h * d.p.o.sh + t * d.p.o.st + c] =
      from_float<T>(factor == 0.0f ? 0.0f : sum * factor);
}

// Whether rows of n elements of `size` bytes can be copied by 16 bytes.
bool is_aligned(const Operand& x, int64_t n, int64_t size) {
  for (const int64_t bytes : {reinterpret_cast<int64_t>(x.data), x.sb * size, x.sh * size, x.st * size, n * size})
    if (bytes % 16 != 0) return false;
  return true;
}

void run_decode(const DecodeArgs& args, const DLTensor* scratch_, void* stream) {
  DecodeProblem d{};
  d.p = checked_decode(args, kDLCUDA);
  const mlcore::DecodeProblem& p = d.p;
  for (const int64_t n : {p.B, p.H, p.Tq, p.room})
    require(n < int64_t{1} << 29, kDecodeOp, ": lengths must be below 2^29; got ", n);
  if (p.B * p.H * p.Tq == 0) return;
  constexpr int64_t kFar = int64_t{1} << 30;
  d.left = static_cast<int>(std::min(p.left, kFar)), d.right = static_cast<int>(std::min(p.right, kFar));
  d.group = static_cast<int>(p.H / p.Hkv);
  require(d.group * p.Tq < kFar, kDecodeOp, ": H / Hkv * Tq must be below 2^30; got ", d.group * p.Tq);
  d.rows = static_cast<int>(d.group * p.Tq), d.row_tiles = (d.rows + 15) / 16;
  d.score_scale = args.softcap > 0 ? static_cast<float>(args.scale / args.softcap) : p.scale * kLog2e;
  d.cap = p.softcap * kLog2e;
  d.parts = 1;
  const Tensor scratch(scratch_, kDecodeOp, "scratch");
  if (scratch.present()) {
    scratch.on(kDLCUDA).dtype_in({Dtype::f32}).rank_is(5, "(B, H, Tq, n, Dv + 2)").contiguous();
    const int64_t n = scratch.size(3);
    scratch.shape_is({p.B, p.H, p.Tq, n, p.Dv + 2}, "(B, H, Tq, n, Dv + 2)");
    require(n >= 1 && n < kFar / kPart, kDecodeOp, ": scratch must be of 1 to 2^22 parts; got ", n);
    d.parts = static_cast<int>(n);
    d.sums = scratch.data<float>(), d.tops = d.sums + p.B * p.H * p.Tq * n * p.Dv;
  }
  const int64_t size = p.dtype == Dtype::f32 ? 4 : 2, cache_size = p.cache_dtype == Dtype::i8 ? 1 : size;
  d.q_aligned = is_aligned(p.q, p.D, size);
  d.k_aligned = is_aligned(p.k.rows, p.D, cache_size), d.v_aligned = is_aligned(p.v.rows, p.Dv, cache_size);
  const int64_t blocks = p.B * p.Hkv * d.row_tiles;
  require(blocks < int64_t{1} << 31 && p.B * p.H * p.Tq < int64_t{1} << 31, kDecodeOp, ": B * H * Tq must be below 2^31; got ",
          p.B * p.H * p.Tq);
  const int64_t turns = std::min<int64_t>(d.parts, std::max<int64_t>(1, std::min<int64_t>(65535, kMostBlocks / blocks)));
  const DeviceGuard device(args.q->device.device_id);
  with_instance(p.dtype, static_cast<int>(std::max(p.D, p.Dv)), [&](auto t, auto width) {
    using T = decltype(t);
    const auto launch = [&](auto int8) {
      using S = DecodeShape<T, width, int8>;
      MLC_LAUNCH((attention_decode<T, width, int8>), dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(turns)),
                 S::kThreads, S::kSmem, stream, d);
    };
    if (p.cache_dtype == Dtype::i8) {
      launch(std::true_type{});
    } else {
      launch(std::false_type{});
    }
    if (d.parts > 1)
      MLC_LAUNCH((attention_decode_merge<T>), dim3(static_cast<unsigned>(p.B * p.H * p.Tq)), 32 * kMergeWarps, 0, stream, d);
  });
}

constexpr int kAppendWarps = 4;

// One new row a warp: keys first, then values. T: their type; of an int8 cache rows are quantised.
template <class T>
__global__ void __launch_bounds__(32 * kAppendWarps) attention_append(AppendProblem a) {
  const mlcore::DecodeProblem& p = a.caches;
  const int64_t all = p.B * p.Hkv * p.Tq;
  int64_t n = static_cast<int64_t>(blockIdx.x) * kAppendWarps + threadIdx.x / 32;
  if (n >= 2 * all) return;
  const bool is_key = n < all;
  n = is_key ? n : n - all;
  const int64_t t = n % p.Tq, hkv = n / p.Tq % p.Hkv, b = n / p.Tq / p.Hkv;
  const int64_t position = p.lengths[b] - p.Tq + t;
  if (position < 0 || position >= p.room) return;
  int64_t page = b, row = position;
  if (p.table) page = p.table[b * p.table_sb + position / p.page_size], row = position % p.page_size;
  if (page < 0 || page >= p.pages) return;
  const Operand& from_rows = is_key ? a.k : a.v;
  const Cache& cache = is_key ? p.k : p.v;
  const int size = static_cast<int>(is_key ? p.D : p.Dv), lane = threadIdx.x % 32;
  const T* from = static_cast<const T*>(from_rows.data) + b * from_rows.sb + hkv * from_rows.sh + t * from_rows.st;
  const int64_t to = page * cache.rows.sb + hkv * cache.rows.sh + row * cache.rows.st;
  if (cache.scale == nullptr) {
    for (int c = lane; c < size; c += 32) static_cast<T*>(cache.rows.data)[to + c] = from[c];
    return;
  }
  float most = 0.0f;
  for (int c = lane; c < size; c += 32) most = fmaxf(most, fabsf(to_float(from[c])));
  most = warp_max(most);
  const float scale = most / 127.0f;
  for (int c = lane; c < size; c += 32) {
    const float x = most > 0.0f ? fmaxf(-127.0f, fminf(127.0f, to_float(from[c]) / scale)) : 0.0f;
    static_cast<int8_t*>(cache.rows.data)[to + c] = static_cast<int8_t>(__float2int_rn(x));
  }
  if (lane == 0) const_cast<float*>(cache.scale)[page * cache.scale_sb + hkv * cache.scale_sh + row * cache.scale_st] = scale;
}

void run_append(const DLTensor* k, const DLTensor* v, const CacheArgs& caches, void* stream) {
  const AppendProblem a = checked_append(k, v, caches, kDLCUDA);
  const int64_t rows = 2 * a.caches.B * a.caches.Hkv * a.caches.Tq, blocks = (rows + kAppendWarps - 1) / kAppendWarps;
  require(blocks < int64_t{1} << 31, kDecodeOp, ": B * Hkv * Tnew must be below 2^32; got ", rows / 2);
  if (blocks == 0) return;
  const DeviceGuard device(k->device.device_id);
  const auto launch = [&](auto t) {
    MLC_LAUNCH((attention_append<decltype(t)>), dim3(static_cast<unsigned>(blocks)), 32 * kAppendWarps, 0, stream, a);
  };
  if (a.caches.dtype == Dtype::f32) return launch(float{});
  if (a.caches.dtype == Dtype::bf16) return launch(bf16{});
  launch(f16{});
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_attention_decode(const DLTensor* q, const DLTensor* k_cache, const DLTensor* v_cache,
                                      const DLTensor* k_scale, const DLTensor* v_scale, const DLTensor* page_table,
                                      const DLTensor* lengths, const DLTensor* starts, const DLTensor* slopes,
                                      const DLTensor* sinks, int64_t left, int64_t right, double scale, double softcap,
                                      DLTensor* o, DLTensor* lse, DLTensor* scratch, void* stream) {
  const mlcore::CacheArgs caches{k_cache, v_cache, k_scale, v_scale, page_table, lengths};
  return mlcore::guard([&] {
    mlcore::cuda::run_decode({q, caches, starts, slopes, sinks, left, right, scale, softcap, o, lse}, scratch, stream);
  });
}

MLC_API int mlc_cuda_attention_append(const DLTensor* k, const DLTensor* v, const DLTensor* page_table, const DLTensor* lengths,
                                      DLTensor* k_cache, DLTensor* v_cache, DLTensor* k_scale, DLTensor* v_scale,
                                      void* stream) {
  return mlcore::guard(
      [&] { mlcore::cuda::run_append(k, v, {k_cache, v_cache, k_scale, v_scale, page_table, lengths}, stream); });
}
