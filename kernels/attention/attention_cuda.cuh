// What attention's CUDA passes share: the problem, tiles in shared memory, the two tile products, one pair's score.
// A warp owns 16 rows of a tile: queries in the forward and for dq, keys for dk and dv. Products are mma.sync: float16 and
// bfloat16 as they are; float32 as three tf32 products of high and low parts, which loses 2^-22 of each term.
#pragma once
#include <algorithm>

#include "attention/attention.h"
#include "attention/attention_dropout.h"
#include "core/tensor.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/reduce.cuh"
#include "cuda/tf32.cuh"

namespace mlcore::cuda {

constexpr int kTile = 64;  // of the schedule, as attention_schedule.h
constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f, kLowest = -3.4028234e38f;

// A (B, H, T, D) operand, strides in elements.
struct Rows {
  void* data;
  int64_t sb, sh, st;
};

struct AttentionArgs {
  Rows q, k, v, o, d_o, dq, dk, dv;
  int B, H, group, Tq, Tk, D, Dv;
  int left, right, offset;
  const int64_t* row_ptr;  // null: the band alone; else by query tiles and then by key tiles (_attention_device.py)
  const int32_t *cols, *ids;
  const uint64_t* bits;
  int64_t sets, set_sb, set_sh;
  float scale, score_scale, cap;  // score_scale: of products, to log2 units, or to tanh's argument with cap > 0
  uint32_t drop_below;            // 0: no dropout
  float keep_scale;
  uint64_t seed;
  const void* bias;  // null: none
  Dtype bias_dtype;
  int64_t bias_sb, bias_sh, bias_sq, bias_sk;
  const float* relative;  // of (i, j) at j - i + Tq - 1; null: none
  int64_t relative_sb, relative_sh;
  const float* sinks;
  float *lse, *delta;  // lse: (2, B, H, Tq)
  const float* d_lse;
  bool aligned;  // every row of every operand can be copied by 16 bytes

  MLC_DEVICE bool plain() const { return bias == nullptr && relative == nullptr && cap == 0.0f; }
  MLC_DEVICE int64_t rows() const { return static_cast<int64_t>(B) * H * Tq; }
};

// Tile sizes of an instance for head dims up to kDim: kRows rows stay, kCols rows of the other side come by. Two blocks or more
// fit in 163 KiB, except for the longest rows and for the backward of the second longest. Not measured.
template <class T, int kDim_>
struct Shape {
  static constexpr int kDim = kDim_, kRowBytes = kDim * static_cast<int>(sizeof(T));
  static constexpr int kWarps = kRowBytes >= 1024 ? 2 : 4, kRows = 16 * kWarps, kThreads = 32 * kWarps;
  static constexpr int kCols = kRowBytes >= 512 ? 16 : kRowBytes >= 256 ? 32 : 64, kPieces = kTile / kCols;
  static constexpr int kLd = kDim + 16 / static_cast<int>(sizeof(T));  // padded: rows begin in different banks
};

// Copies rows [first, first + kCount) of x (limit, D) to a tile; what lies beyond is zero. Commit and wait are the caller's.
template <class S, int kCount, class T>
MLC_DEVICE void load_tile(T* tile, const Rows& x, int64_t b, int64_t h, int first, int limit, int D, bool aligned) {
  constexpr int kPer = 16 / static_cast<int>(sizeof(T)), kChunks = S::kDim / kPer;
  const T* from = static_cast<const T*>(x.data) + b * x.sb + h * x.sh;
  for (int c = threadIdx.x; c < kCount * kChunks; c += S::kThreads) {
    const int row = c / kChunks, d = c % kChunks * kPer;
    const bool inside = first + row < limit && d < D;
    const T* source = from + (inside ? (first + row) * x.st + d : 0);
    T* to = tile + row * S::kLd + d;
    if (aligned) {
      cp_async<16>(to, source, inside ? 16 : 0);
    } else {
#pragma unroll
      for (int e = 0; e < kPer; ++e) to[e] = inside && d + e < D ? source[e] : from_float<T>(0.0f);
    }
  }
}

// c (16, kCols) += A (16, D) B (kCols, D)^T, both tiles in shared memory; a points to the warp's rows.
template <class S, class T>
MLC_DEVICE void product_nt(float (&c)[S::kCols / 8][4], const T* a, const T* b, int D) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (sizeof(T) == 2) {
#pragma unroll 2
    for (int k = 0; k < D; k += 16) {
      uint32_t fa[4];
      ldmatrix(fa, a + lane % 16 * S::kLd + k + lane / 16 * 8);
#pragma unroll
      for (int n = 0; n < S::kCols; n += 16) {
        uint32_t fb[4];
        ldmatrix(fb, b + (n + lane / 16 * 8 + lane % 8) * S::kLd + k + lane / 8 % 2 * 8);
        mma_m16n8k16<T>(c[n / 8], fa, {fb[0], fb[1]}, c[n / 8]);
        mma_m16n8k16<T>(c[n / 8 + 1], fa, {fb[2], fb[3]}, c[n / 8 + 1]);
      }
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < D; k += 8) {
      SplitFragment<4> fa;
#pragma unroll
      for (int i = 0; i < 4; ++i) fa.set(i, a[(g + i % 2 * 8) * S::kLd + k + t + i / 2 * 4]);
#pragma unroll
      for (int n = 0; n < S::kCols; n += 8) {
        SplitFragment<2> fb;
        fb.set(0, b[(n + g) * S::kLd + k + t]);
        fb.set(1, b[(n + g) * S::kLd + k + t + 4]);
        mma_3xtf32(c[n / 8], fa, fb);
      }
    }
  }
}

// How a careful product reads what B holds: infinities and NaN as 0, or coded so that sums count them.
enum class Read { as_is, finite, codes };
constexpr float kPlusInf = 1.0f, kMinusInf = 128.0f, kNan = 16384.0f;  // at most 64 of each in a tile

template <Read kRead>
MLC_DEVICE float read_as(float x) {
  const bool finite = fabsf(x) < INFINITY;
  if constexpr (kRead == Read::finite) return finite ? x : 0.0f;
  if constexpr (kRead == Read::codes) return finite ? 0.0f : x != x ? kNan : x > 0.0f ? kPlusInf : kMinusInf;
  return x;
}
template <Read kRead, class T>
MLC_DEVICE uint32_t read_pair(uint32_t pair) {
  if constexpr (kRead == Read::as_is) return pair;
  T both[2];
  memcpy(both, &pair, sizeof pair);
  return pack2<T>(read_as<kRead>(to_float(both[0])), read_as<kRead>(to_float(both[1])));
}

// Columns [d, d + 8) of acc (16, D) += P (16, kCols) B (kCols, D), P being the fragments of a product_nt. With float32 the keys
// of a step are permuted, 2t before 2t + 1, the same way in P and in B, so that no value changes lanes.
template <class S, Read kRead, class T>
MLC_DEVICE void product_column(float (&acc)[4], const float (&p)[S::kCols / 8][4], const T* b, int d) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int n = 0; n < S::kCols; n += 16) {
      const float (&x)[4] = p[n / 8], (&y)[4] = p[n / 8 + 1];
      const uint32_t fp[4] = {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(y[0], y[1]), pack2<T>(y[2], y[3])};
      uint32_t fb[2];
      ldmatrix<true>(fb, b + (n + lane % 16) * S::kLd + d);
      mma_m16n8k16<T>(acc, fp, {read_pair<kRead, T>(fb[0]), read_pair<kRead, T>(fb[1])}, acc);
    }
  } else {
#pragma unroll
    for (int n = 0; n < S::kCols; n += 8) {
      SplitFragment<4> fp;
      fp.set(0, p[n / 8][0]), fp.set(1, p[n / 8][2]), fp.set(2, p[n / 8][1]), fp.set(3, p[n / 8][3]);
      SplitFragment<2> fb;
      fb.set(0, read_as<kRead>(b[(n + 2 * t) * S::kLd + d + g]));
      fb.set(1, read_as<kRead>(b[(n + 2 * t + 1) * S::kLd + d + g]));
      mma_3xtf32(acc, fp, fb);
    }
  }
}

// acc (16, D) += P B over the columns below D.
template <class S, Read kRead = Read::as_is, class T>
MLC_DEVICE void product_nn(float (&acc)[S::kDim / 8][4], const float (&p)[S::kCols / 8][4], const T* b, int D) {
#pragma unroll
  for (int d = 0; d < S::kDim; d += 8)
    if (d < D) product_column<S, kRead>(acc[d / 8], p, b, d);
}

// The sum of positive weights with the infinities and NaN that a codes' sum counted.
MLC_DEVICE float decode(float codes) {
  const int count = static_cast<int>(codes), plus = count % 128, minus = count % 16384 / 128;
  if (count >= 16384 || (plus > 0 && minus > 0)) return NAN;
  return plus > 0 ? INFINITY : minus > 0 ? -INFINITY : 0.0f;
}

// product_nn for tiles that hold infinities or NaN: seen says (16, kCols) which pairs may meet, bit 4 n + e of fragment n.
template <class S, class T>
MLC_DEVICE void careful_product(float (&acc)[S::kDim / 8][4], const float (&p)[S::kCols / 8][4], uint32_t seen, const T* b,
                                int D) {
  float met[S::kCols / 8][4];
#pragma unroll
  for (int n = 0; n < S::kCols / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) met[n][e] = seen >> (4 * n + e) & 1 ? 1.0f : 0.0f;
#pragma unroll
  for (int d = 0; d < S::kDim; d += 8) {
    if (d >= D) continue;
    float codes[4] = {};
    product_column<S, Read::codes>(codes, met, b, d);
    product_column<S, Read::finite>(acc[d / 8], p, b, d);
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[d / 8][e] += decode(codes[e]);
  }
}

// The running softmax of a warp's rows g and g + 8.
struct RowState {
  float m[2] = {-INFINITY, -INFINITY}, l[2] = {};
};

// s (16, kCols) of a warp's rows becomes the weights that V meets; acc is rescaled where a maximum moved.
template <class S>
MLC_DEVICE void softmax_step(RowState& state, float (&s)[S::kCols / 8][4], float (&acc)[S::kDim / 8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float top = -INFINITY;
#pragma unroll
    for (int n = 0; n < S::kCols / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    top = fmaxf(state.m[r], warp_max<4>(top));
    const float shift = fmaxf(top, kLowest), alpha = exp2f(state.m[r] - shift);
    float total = 0.0f;
#pragma unroll
    for (int n = 0; n < S::kCols / 8; ++n)
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e) total += s[n][e] = exp2f(s[n][e] - shift);
    state.l[r] = state.l[r] * alpha + warp_sum<4>(total);
    state.m[r] = top;
#pragma unroll
    for (int n = 0; n < S::kDim / 8; ++n) acc[n][2 * r] *= alpha, acc[n][2 * r + 1] *= alpha;
  }
}

// Whether all of kCols rows of a tile are finite. All threads of the block must call; flags: an int a warp.
template <class S, class T>
MLC_DEVICE bool tile_is_finite(const T* tile, int D, int* flags) {
  bool finite = true;
  for (int c = threadIdx.x; c < S::kCols * D; c += S::kThreads)
    finite = finite && fabsf(to_float(tile[c / D * S::kLd + c % D])) < INFINITY;
  const int warp_finite = __all_sync(kFullWarp, finite);
  if (threadIdx.x % 32 == 0) flags[threadIdx.x / 32] = warp_finite;
  __syncthreads();
  for (int w = 0; w < S::kWarps; ++w) finite = w == 0 ? flags[0] != 0 : finite && flags[w] != 0;
  return finite;
}

MLC_DEVICE int64_t floor_tile(int64_t x) { return x <= 0 ? 0 : x / kTile; }

// The tiles that a block visits: of keys for a query tile (keys = true), of queries for a key tile.
struct Visits {
  int64_t begin, end;
  const int32_t *cols, *ids;

  MLC_DEVICE Visits(const AttentionArgs& p, int64_t b, int64_t h, int tile, bool of_queries) : cols(nullptr), ids(nullptr) {
    const int64_t first = int64_t{tile} * kTile, left = p.left, right = p.right, offset = p.offset, zero = 0;
    const int64_t Tq = p.Tq, Tk = p.Tk;
    if (p.row_ptr) {
      const int64_t q_tiles = (Tq + kTile - 1) / kTile, k_tiles = (Tk + kTile - 1) / kTile, set = b * p.set_sb + h * p.set_sh;
      const int64_t row = of_queries ? set * q_tiles + tile : p.sets * q_tiles + set * k_tiles + tile;
      begin = p.row_ptr[row], end = p.row_ptr[row + 1];
      cols = p.cols, ids = p.ids;
    } else if (of_queries) {
      begin = floor_tile(first + offset - left);
      end = floor_tile(min(max(min(first + kTile, Tq) + offset + right, zero), Tk) + kTile - 1);
    } else {
      begin = floor_tile(first - offset - right);
      end = floor_tile(min(max(min(first + kTile, Tk) - offset + left, zero), Tq) + kTile - 1);
    }
  }
  MLC_DEVICE int tile(int64_t n) const { return cols ? cols[n] : static_cast<int>(n); }
  MLC_DEVICE int mask(int64_t n) const { return ids ? ids[n] : -1; }
};

// Whether some query of [i0, i0 + ni) doesn't see some key of [j0, j0 + nj), or the lengths end there.
MLC_DEVICE bool is_masked(const AttentionArgs& p, int i0, int ni, int j0, int nj, int mask) {
  const int ahead = j0 - i0 - p.offset;
  return mask >= 0 || ahead - (ni - 1) < -p.left || ahead + (nj - 1) > p.right || i0 + ni > p.Tq || j0 + nj > p.Tk;
}
// Whether no query of [i0, i0 + ni) sees a key of [j0, j0 + nj): what a warp leaves out of a masked tile.
MLC_DEVICE bool is_hidden(const AttentionArgs& p, int i0, int ni, int j0, int nj, int mask) {
  const int ahead = j0 - i0 - p.offset;
  if (ahead + (nj - 1) < -p.left || ahead - (ni - 1) > p.right) return true;
  if (mask < 0) return false;
  bool any = false;
  const uint64_t queries = (~uint64_t{0} >> (kTile - ni)) << (i0 % kTile);
  for (int c = threadIdx.x % 32; c < nj; c += 32)
    any = any || (p.bits[static_cast<int64_t>(mask) * kTile + (j0 + c) % kTile] & queries) != 0;
  return !__any_sync(kFullWarp, any);
}

// What scores of one head take besides products.
struct Head {
  int64_t b, h;
  const void* bias;
  const float* relative;
  uint32_t drop_head;

  MLC_DEVICE Head(const AttentionArgs& p, int64_t b, int64_t h)
      : b(b), h(h), bias(nullptr), relative(nullptr), drop_head(static_cast<uint32_t>(b * p.H + h)) {
    if (p.bias) {
      const int64_t at = b * p.bias_sb + h * p.bias_sh;
      bias = p.bias_dtype == Dtype::f32 ? static_cast<const void*>(static_cast<const float*>(p.bias) + at)
                                        : static_cast<const void*>(static_cast<const uint16_t*>(p.bias) + at);
    }
    if (p.relative) relative = p.relative + b * p.relative_sb + h * p.relative_sh + p.Tq - 1;
  }
};

MLC_DEVICE float load_bias(const AttentionArgs& p, const Head& head, int i, int j) {
  const int64_t at = i * p.bias_sq + j * p.bias_sk;
  if (p.bias_dtype == Dtype::f32) return static_cast<const float*>(head.bias)[at];
  if (p.bias_dtype == Dtype::bf16) return to_float(static_cast<const bf16*>(head.bias)[at]);
  return to_float(static_cast<const f16*>(head.bias)[at]);
}

// The score of pair (i, j), both in range, in log2 units; *cap_gradient gets d score / d product of the softcap, per scale.
MLC_DEVICE float score(const AttentionArgs& p, const Head& head, float product, int i, int j, float* cap_gradient = nullptr) {
  float s = product * p.score_scale;
  if (p.cap > 0.0f) {
    const float t = tanhf(s);
    if (cap_gradient) *cap_gradient = 1.0f - t * t;
    s = t * p.cap;
  }
  if (head.bias) {
    const float bias = load_bias(p, head, i, j);
    s = bias == -INFINITY ? -INFINITY : s + bias * kLog2e;
  }
  if (head.relative) s += head.relative[j - i] * kLog2e;
  return s;
}

MLC_DEVICE bool sees(const AttentionArgs& p, int i, int j, int mask) {
  const int ahead = j - i - p.offset;
  if (ahead < -p.left || ahead > p.right) return false;
  return mask < 0 || (p.bits[static_cast<int64_t>(mask) * kTile + j % kTile] >> (i % kTile) & 1);
}

MLC_DEVICE bool kept(const AttentionArgs& p, const Head& head, int i, int j) {
  return dropout_hash(dropout_row_key(p.seed, head.drop_head, static_cast<uint32_t>(i)) ^ static_cast<uint32_t>(j)) >=
         p.drop_below;
}

// Rows [first, first + 16) of a warp's acc * factor[row half] to x (limit, D).
template <class S, class T>
MLC_DEVICE void store_rows(const Rows& x, int64_t b, int64_t h, int first, int limit, int D, const float (&acc)[S::kDim / 8][4],
                           const float (&factor)[2]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  T* to = static_cast<T*>(x.data) + b * x.sb + h * x.sh;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    const int row = first + g + e / 2 * 8;
    if (row >= limit) continue;
#pragma unroll
    for (int n = 0; n < S::kDim / 8; ++n) {
      const int d = 8 * n + 2 * t + e % 2;
      if (d < D) to[row * x.st + d] = from_float<T>(factor[e / 2] == 0.0f ? 0.0f : acc[n][e] * factor[e / 2]);
    }
  }
}

// The checked problem of attention.cu and attention_bwd.cu.
struct HostArgs {
  const DLTensor *q, *k, *v, *bias, *relative, *sinks;
  int64_t left, right, offset;
  const DLTensor *row_ptr, *cols, *ids, *bits;
  int64_t set_b, set_h;
  double scale, softcap, dropout_p;
  int64_t seed;
};

inline Rows checked_rows(AttentionArgs& p, const Tensor& t) {
  t.last_dim_contiguous();
  Rows x{t.raw(), t.stride(0), t.stride(1), t.stride(2)};
  const int64_t size = t.dtype() == Dtype::f32 ? 4 : 2;
  for (const int64_t bytes : {reinterpret_cast<int64_t>(x.data), x.sb * size, x.sh * size, x.st * size, t.size(3) * size})
    p.aligned = p.aligned && bytes % 16 == 0;
  return x;
}

inline void set_bias(AttentionArgs& p, const Tensor& bias, const char* op) {
  if (!bias.present()) return;
  bias.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B|1, H|1, Tq|1, Tk|1)");
  const int64_t full[] = {p.B, p.H, p.Tq, p.Tk};
  int64_t strides[4];
  for (int i = 0; i < 4; ++i) {
    require(bias.size(i) == full[i] || bias.size(i) == 1, op, ": bias must be (B|1, H|1, Tq|1, Tk|1) with (B, H, Tq, Tk) = (",
            p.B, ", ", p.H, ", ", p.Tq, ", ", p.Tk, "); got ", bias.shape_text());
    strides[i] = bias.size(i) == 1 ? 0 : bias.stride(i);
  }
  p.bias = bias.raw(), p.bias_dtype = bias.dtype();
  p.bias_sb = strides[0], p.bias_sh = strides[1], p.bias_sq = strides[2], p.bias_sk = strides[3];
}

inline void set_schedule(AttentionArgs& p, const HostArgs& a, const char* op) {
  constexpr int64_t kFar = int64_t{1} << 30;
  const auto limit = [](int64_t x) { return static_cast<int>(x < 0 || x > 2 * kFar - 1 ? 2 * kFar - 1 : x); };
  p.left = limit(a.left), p.right = limit(a.right);
  p.offset = static_cast<int>(std::max(-kFar, std::min(kFar, a.offset)));
  const Tensor row_ptr(a.row_ptr, op, "row_ptr"), cols(a.cols, op, "cols"), ids(a.ids, op, "ids"), bits(a.bits, op, "bits");
  if (!row_ptr.present()) return;
  require((a.set_b == 1 || a.set_b == p.B) && (a.set_h == 1 || a.set_h == p.H), op, ": set_b, set_h must be 1 or B, H = ", p.B,
          ", ", p.H, "; got ", a.set_b, ", ", a.set_h);
  p.sets = a.set_b * a.set_h;
  const int64_t tiles = (p.Tq + kTile - 1) / kTile + (p.Tk + kTile - 1) / kTile;
  row_ptr.on(kDLCUDA).dtype_in({Dtype::i64}).shape_is({p.sets * tiles + 1}, "(sets * (q_tiles + k_tiles) + 1)").contiguous();
  cols.on(kDLCUDA).dtype_in({Dtype::i32}).rank_is(1, "(listed tiles)").contiguous();
  ids.on(kDLCUDA).dtype_in({Dtype::i32}).shape_like(cols).contiguous();
  bits.on(kDLCUDA).dtype_in({Dtype::i64}).rank_is(2, "(n, 64)").contiguous();
  require(bits.size(1) == kTile, op, ": bits must be (n, 64); got ", bits.shape_text());
  p.row_ptr = row_ptr.data<int64_t>(), p.cols = cols.data<int32_t>(), p.ids = ids.data<int32_t>();
  p.bits = bits.data<uint64_t>();
  p.set_sh = a.set_h == 1 ? 0 : 1, p.set_sb = a.set_b == 1 ? 0 : a.set_h;
}

// Checks all but the outputs; dtype gets that of q.
inline AttentionArgs checked_args(const HostArgs& a, const char* op, Dtype& dtype) {
  const Tensor q(a.q, op, "q"), k(a.k, op, "k"), v(a.v, op, "v"), relative(a.relative, op, "relative"),
      sinks(a.sinks, op, "sinks");
  q.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B, H, Tq, D)");
  dtype = q.dtype();
  k.on(kDLCUDA).dtype_in({dtype}).rank_is(4, "(B, Hkv, Tk, D)");
  v.on(kDLCUDA).dtype_in({dtype}).rank_is(4, "(B, Hkv, Tk, Dv)");
  for (const int64_t n : {q.size(0), q.size(1), q.size(2), k.size(2)})
    require(n < int64_t{1} << 29, op, ": lengths must be below 2^29; got ", n);
  AttentionArgs p{};
  const int64_t Hkv = k.size(1);
  p.B = static_cast<int>(q.size(0)), p.H = static_cast<int>(q.size(1)), p.Tq = static_cast<int>(q.size(2));
  p.Tk = static_cast<int>(k.size(2)), p.D = static_cast<int>(q.size(3)), p.Dv = static_cast<int>(v.size(3));
  k.shape_is({p.B, Hkv, p.Tk, p.D}, "(B, Hkv, Tk, D)");
  v.shape_is({p.B, Hkv, p.Tk, p.Dv}, "(B, Hkv, Tk, Dv)");
  require(p.D >= 1 && p.D <= 256 && p.Dv >= 1 && p.Dv <= 256, op, ": head dims must be 1 to 256; got D ", p.D, ", Dv ", p.Dv);
  require(Hkv > 0 ? p.H % Hkv == 0 : p.H == 0, op, ": k has ", Hkv, " heads, which must divide q's ", p.H);
  require(a.scale - a.scale == 0, op, ": scale must be finite; got ", a.scale);
  require(a.softcap >= 0 && a.softcap - a.softcap == 0, op, ": softcap must be positive, or 0 for none; got ", a.softcap);
  require(a.dropout_p >= 0 && a.dropout_p <= 1, op, ": dropout_p must be in [0, 1]; got ", a.dropout_p);
  p.group = Hkv > 0 ? static_cast<int>(p.H / Hkv) : 1;
  p.aligned = true;
  p.q = checked_rows(p, q), p.k = checked_rows(p, k), p.v = checked_rows(p, v);
  p.scale = static_cast<float>(a.scale);
  p.score_scale = a.softcap > 0 ? static_cast<float>(a.scale / a.softcap) : p.scale * kLog2e;
  p.cap = static_cast<float>(a.softcap) * kLog2e;
  p.drop_below = static_cast<uint32_t>(std::min(a.dropout_p * 4294967296.0, 4294967295.0));
  p.keep_scale = a.dropout_p == 1.0 ? 0.0f : static_cast<float>(1.0 / (1.0 - a.dropout_p));
  p.seed = static_cast<uint64_t>(a.seed);
  set_bias(p, Tensor(a.bias, op, "bias"), op);
  if (relative.present()) {
    const int64_t length = std::max(p.Tq + p.Tk - 1, 0), sets_b = relative.on(kDLCUDA).rank_is(3, "(B|1, H|1, L)").size(0);
    relative.dtype_in({Dtype::f32}).last_dim_contiguous();
    const int64_t sets_h = relative.size(1);
    require((sets_b == 1 || sets_b == p.B) && (sets_h == 1 || sets_h == p.H) && relative.size(2) == length, op,
            ": relative must be (B|1, H|1, Tq + Tk - 1); got ", relative.shape_text());
    p.relative = relative.data<float>();
    p.relative_sb = sets_b == 1 ? 0 : relative.stride(0), p.relative_sh = sets_h == 1 ? 0 : relative.stride(1);
  }
  if (sinks.present()) p.sinks = sinks.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({p.H}, "(H)").contiguous().data<float>();
  set_schedule(p, a, op);
  return p;
}

// body(T{}, width) for the problem's dtype and the narrowest instance that holds both head dims.
template <class F>
void with_instance(Dtype dtype, int widest, F&& body) {
  const auto with_width = [&](auto t) {
    if (widest <= 64) return body(t, std::integral_constant<int, 64>{});
    if (widest <= 128) return body(t, std::integral_constant<int, 128>{});
    body(t, std::integral_constant<int, 256>{});
  };
  if (dtype == Dtype::f32) return with_width(float{});
  if (dtype == Dtype::bf16) return with_width(bf16{});
  with_width(f16{});
}

}  // namespace mlcore::cuda
