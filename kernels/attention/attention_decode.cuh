// What decoding's CUDA kernels know about a problem: who sees which keys, where they lie, how they come to shared memory.
// A block takes 16 rows of a (b, key head), which are queries of its grouped heads, and a part of kPart keys; each of its warps
// takes every kWarps-th stretch of 16 keys, loads it for itself and keeps a softmax of its own.
#pragma once
#include "attention/attention_cuda.cuh"
#include "attention/attention_decode_check.h"

namespace mlcore::cuda {

constexpr int kPart = 256;  // keys are cut at its multiples, whatever the lengths: a row has the same bits in any batch

struct DecodeProblem {
  mlcore::DecodeProblem p;
  int group, rows, row_tiles;  // rows of a (b, key head): row g * Tq + t is query t of its g-th head
  int left, right;
  float score_scale, cap;  // as AttentionArgs'
  float *sums, *tops;      // of parts: (B, H, Tq, parts, Dv) and (B, H, Tq, parts, 2), a maximum and a sum of weights
  int parts;
  bool q_aligned, k_aligned, v_aligned;  // rows can be copied by 16 bytes
};

// A sequence: its keys are positions start .. length - 1.
struct Sequence {
  int length, start;

  MLC_DEVICE Sequence(const DecodeProblem& d, int64_t b) {
    const int64_t room = d.p.room, zero = 0;
    length = static_cast<int>(max(min(d.p.lengths[b], room), zero));
    start = d.p.starts ? static_cast<int>(max(min(d.p.starts[b], room), zero)) : 0;
  }
  MLC_DEVICE int position(const DecodeProblem& d, int t) const { return length - static_cast<int>(d.p.Tq) + t; }
  // Query t sees keys [lo, hi); both rise with t.
  MLC_DEVICE int lo(const DecodeProblem& d, int t) const { return max(position(d, t) - d.left, start); }
  MLC_DEVICE int hi(const DecodeProblem& d, int t) const { return min(position(d, t) + d.right + 1, length); }
};

// The keys [lo, hi) that some query of a sequence sees, and the parts [first, last] that they lie in: at least one.
struct Seen {
  int lo, hi, first, last;

  MLC_DEVICE Seen(const DecodeProblem& d, const Sequence& s) : lo(s.lo(d, 0)), hi(s.hi(d, static_cast<int>(d.p.Tq) - 1)) {
    hi = max(hi, lo);
    first = lo / kPart;
    last = hi > lo ? min((hi - 1) / kPart, first + d.parts - 1) : first;
  }
};

// Where a key and its value lie, counted in elements from the caches' beginning; -1: nowhere, or nobody sees it.
struct KeyRow {
  int64_t k = -1, v = -1;
  float k_scale = 1.0f, v_scale = 1.0f;  // of an int8 cache

  MLC_DEVICE KeyRow() {}
  MLC_DEVICE KeyRow(const DecodeProblem& d, int64_t b, int64_t hkv, int position) {
    int64_t page = b, row = position;
    if (d.p.table) {
      const int size = static_cast<int>(d.p.page_size);
      page = d.p.table[b * d.p.table_sb + position / size], row = position % size;
      if (page < 0 || page >= d.p.pages) return;
    }
    const Cache &keys = d.p.k, &values = d.p.v;
    k = page * keys.rows.sb + hkv * keys.rows.sh + row * keys.rows.st;
    v = page * values.rows.sb + hkv * values.rows.sh + row * values.rows.st;
    if (keys.scale) k_scale = keys.scale[page * keys.scale_sb + hkv * keys.scale_sh + row * keys.scale_st];
    if (values.scale) v_scale = values.scale[page * values.scale_sb + hkv * values.scale_sh + row * values.scale_st];
  }
};

// An instance for head dims up to kDim_: products in T, over caches of T, or with kInt8_ of int8. Not measured.
template <class T, int kDim_, bool kInt8_>
struct DecodeShape {
  using Raw = std::conditional_t<kInt8_, int8_t, T>;  // what caches hold
  static constexpr bool kInt8 = kInt8_;
  static constexpr int kDim = kDim_, kRows = 16, kCols = 16;
  static constexpr int kRowBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kWarps = kRowBytes >= 1024 ? 1 : kRowBytes >= 512 ? 2 : 4, kThreads = 32 * kWarps;
  static constexpr int kLd = kDim + 16 / static_cast<int>(sizeof(T));  // of a tile of T: rows begin in different banks
  static constexpr int kRawLd = kDim + 16 / static_cast<int>(sizeof(Raw));
  static constexpr int kStage = kCols * kRawLd;  // keys or values of a warp's step
  static constexpr int kQBytes = kRows * kLd * static_cast<int>(sizeof(T));
  // A warp has two stages of keys and values; of int8 ones also a tile of T.
  static constexpr int kWarpBytes =
      4 * kStage * static_cast<int>(sizeof(Raw)) + (kInt8 ? kCols * kLd * static_cast<int>(sizeof(T)) : 0);
  static constexpr int kSmem = kQBytes + kWarps * kWarpBytes;
  static_assert(kWarpBytes >= kRows * kDim * 4, "a warp's sums fit in its stages");
  static_assert(kSmem <= 99 << 10, "a block fits on every device from sm_80 on");
};

// 16 rows at base + offset of the lane with the row's number, to a tile: what lies beyond D, or nowhere, is 0. Commit and wait
// are the caller's. All lanes must call.
template <class S, int kLd, class T>
MLC_DEVICE void load_16_rows(T* tile, const void* base, int64_t offset, int D, bool aligned) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T)), kChunks = S::kDim / kPer;
  const T* from = static_cast<const T*>(base);
#pragma unroll 4
  for (int c = threadIdx.x % 32; c < 16 * kChunks; c += 32) {
    const int row = c / kChunks, d = c % kChunks * kPer;
    const int64_t at = __shfl_sync(kFullWarp, offset, row);
    const bool inside = at >= 0 && d < D;
    T* to = tile + row * kLd + d;
    if (aligned) {
      cp_async<16>(to, from + (inside ? at + d : 0), inside ? 16 : 0);
    } else {
#pragma unroll
      for (int e = 0; e < kPer; ++e) to[e] = inside && d + e < D ? from[at + d + e] : T{};
    }
  }
}

// 16 int8 rows as rows of T, times the scale of the lane with the row's number. All lanes must call.
template <class S, class T>
MLC_DEVICE void widen_16_rows(T* tile, const int8_t* raw, float scale) {
  constexpr int kChunks = S::kDim / 16;
#pragma unroll 1
  for (int c = threadIdx.x % 32; c < 16 * kChunks; c += 32) {
    const int row = c / kChunks, d = c % kChunks * 16;
    const float factor = __shfl_sync(kFullWarp, scale, row);
    const Pack<int8_t, 16> from = load_pack<16>(raw + row * S::kRawLd + d);
    Pack<T, 16> to;
#pragma unroll
    for (int e = 0; e < 16; ++e) to.v[e] = from_float<T>(static_cast<float>(from.v[e]) * factor);
    store_pack(tile + row * S::kLd + d, to);
  }
}

// Whether 16 rows of a tile are finite. All lanes must call.
template <class S, class T>
MLC_DEVICE bool are_16_rows_finite(const T* tile, int D) {
  bool finite = true;
  for (int c = threadIdx.x % 32; c < 16 * D; c += 32)
    finite = finite && fabsf(to_float(tile[c / D * S::kLd + c % D])) < INFINITY;
  return __all_sync(kFullWarp, finite);
}

// A row's maximum m and sum of weights l, with the sink: what its sum of weighted values is multiplied with, and its lse.
MLC_DEVICE float finish_row(const DecodeProblem& d, int64_t h, float m, float l, float& lse) {
  float rescale = 1.0f;
  if (l == 0.0f) m = -INFINITY;
  if (d.p.sinks) {  // one more score, that has no value
    const float sink = d.p.sinks[h] * kLog2e, top = fmaxf(m, sink);
    rescale = exp2f(m - top);
    l = l * rescale + exp2f(sink - top);
    m = top;
  }
  lse = l == 0.0f ? -INFINITY : (m + log2f(l)) * kLn2;
  return l == 0.0f ? 0.0f : rescale / l;
}

}  // namespace mlcore::cuda
