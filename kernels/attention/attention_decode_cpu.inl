// Attention of a few queries to a cache: keys and values are read once, where they lie, and never packed. Element by element
// this is attention_cpu.inl's arithmetic: a score is one chain over the channels, a weight is exp2(score - running maximum),
// sums go through four chains a tile and one step a tile. So a row's bits are those of a prefill.
#include <math.h>

#include "attention/attention_decode_kernels.h"
#include "attention/attention_tile.h"

namespace mlcore::MLC_ISA {
namespace {

constexpr int W = Vec::W;

// W values of a cache as floats.
template <class T>
Vec widen(const T* p) {
  return Vec::load(p);
}
Vec widen(const int8_t* p) {
#if defined(MLC_ISA_AVX512) && !defined(MLC_EMULATE_AVX512)
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
#elif defined(MLC_ISA_AVX2)
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
#else
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = static_cast<float>(p[i]);
  return Vec::load(lanes);
#endif
}
template <class T>
Vec widen_n(const T* p, int n) {
  return Vec::load_n(p, n);
}
Vec widen_n(const int8_t* p, int n) {
  int8_t t[W] = {};
  memcpy(t, p, static_cast<size_t>(n));
  return widen(t);
}

// body(Count<n>, r): all rows r .. r + n - 1, in stretches of 8, 4, 2 and 1.
template <int N>
struct Count {
  static constexpr int n = N;
};
template <class F>
void for_rows(int64_t rows, F&& body) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) body(Count<8>{}, r);
  if (r + 4 <= rows) body(Count<4>{}, r), r += 4;
  if (r + 2 <= rows) body(Count<2>{}, r), r += 2;
  if (r < rows) body(Count<1>{}, r);
}

// One thread's working set for the rows of a (b, key head).
struct DecodeScratch {
  float *q, *scores, *o, *top, *l, *alpha, *total;
  int64_t total_floats = 0;

  DecodeScratch(const DecodeProblem& p, float* base) {
    const auto take = [&](int64_t floats) {
      float* at = base ? base + total_floats : nullptr;
      total_floats += round_up<int64_t>(floats, 16);
      return at;
    };
    const int64_t rows = p.rows();
    q = take(p.D * rows);           // [row stretch][channel][row of the stretch], scaled
    scores = take(rows * kTile);    // [row][key]; then weights
    o = take(rows * padded(p.Dv));  // [row][channel]
    top = take(rows), l = take(rows), alpha = take(rows), total = take(rows);
  }
};

// The keys of a tile up to the last that some query sees.
int tile_keys(const DecodeProblem& p, int64_t b, int64_t tile) {
  return static_cast<int>(min<int64_t>(kTile, p.end_seen(b) - tile * kTile));
}

// Where the rows of a tile lie, and what they are multiplied with.
template <class T>
struct TileRows {
  static constexpr int kAhead = 32;  // rows of the next tile, to be prefetched
  const T* at[kTile + kAhead];
  float scale[kTile];  // of an int8 cache
  int count;

  // What no query sees is never addressed: the nearest key that some query sees stands in for it.
  TileRows(const DecodeProblem& p, const Cache& cache, int64_t b, int64_t hkv, int64_t tile) {
    const int64_t first = tile * kTile;
    const int begin = static_cast<int>(max<int64_t>(0, p.first_seen(b) - first));
    count = tile_keys(p, b, tile);
    const int more = static_cast<int>(min<int64_t>(kTile + kAhead, p.end_seen(b) - first));
    for (int j = begin; j < more;) {  // stretches within a page
      const int64_t t = first + j, page = p.page_of(b, t), row = t % p.page_size;
      const T* rows = static_cast<const T*>(cache.rows.data) + page * cache.rows.sb + hkv * cache.rows.sh;
      const int end = static_cast<int>(min<int64_t>(more, j + p.page_size - row));
      for (int i = j; i < end; ++i) at[i] = rows + (row + i - j) * cache.rows.st;
      if (cache.scale) {
        const float* scales = cache.scale + page * cache.scale_sb + hkv * cache.scale_sh;
        for (int i = j; i < min(end, count); ++i) scale[i] = scales[(row + i - j) * cache.scale_st];
      }
      j = end;
    }
    for (int i = 0; i < begin; ++i) at[i] = at[begin], scale[i] = 0;
    for (int i = more; i < kTile + kAhead; ++i) at[i] = at[more - 1];
    for (int i = count; i < kTile; ++i) scale[i] = 0;
  }
};

// q (rows, D) of (b, hkv), scaled, in stretches as for_rows() takes them.
template <class T>
void load_queries(const DecodeProblem& p, int64_t b, int64_t hkv, float* out) {
  const float scale = p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e;
  for_rows(p.rows(), [&](auto stretch, int64_t first) {
    constexpr int R = decltype(stretch)::n;
    for (int r = 0; r < R; ++r) {
      const T* q = row_of<T>(p.q, b, hkv * p.group() + (first + r) / p.Tq, (first + r) % p.Tq);
      for (int64_t c = 0; c < p.D; ++c) out[first * p.D + c * R + r] = to_float(q[c]) * scale;
    }
  });
}

// Neighbours of bfloat16 as they lie in memory, W pairs, and the two channels that they are of. Half the shuffles of a
// transpose of widened keys, which are what a single query's products cost: bfloat16 (8,16,1,64) over 16k keys: see README.md.
#if defined(MLC_ISA_AVX512)
constexpr bool kHavePairs = true;
Vec even_of(Vec pairs) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pairs.v), 16))}; }
Vec odd_of(Vec pairs) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(pairs.v), _mm512_set1_epi32(-65536)))};
}
#elif defined(MLC_ISA_AVX2)
constexpr bool kHavePairs = true;
Vec even_of(Vec pairs) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pairs.v), 16))}; }
Vec odd_of(Vec pairs) {
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_castps_si256(pairs.v), _mm256_set1_epi32(-65536)))};
}
#else
constexpr bool kHavePairs = false;
Vec even_of(Vec pairs) { return pairs; }
Vec odd_of(Vec pairs) { return pairs; }
#endif
constexpr bool in_pairs(const bf16*) { return kHavePairs; }
template <class T>
constexpr bool in_pairs(const T*) {
  return false;
}

template <int R>
inline void add_product(Vec key, const float* x, Vec (&sums)[R]) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r] = fma(key, Vec::set1(x[r]), sums[r]);
}

// scores (R, keys) = Q Kᵀ, keys in lanes: W rows of K are transposed in registers, a stretch of W channels at a time.
template <int R, class T>
void key_products(const TileRows<T>& keys, int64_t D, const float* q, float* scores) {
  for (int j = 0; j < keys.count; j += W) {
    Vec sums[R], block[W];
    for (int r = 0; r < R; ++r) sums[r] = Vec::zero();
    int64_t c = 0;
    const auto prefetch = [&] {
      for (int i = 0; i < W; ++i) __builtin_prefetch(keys.at[j + TileRows<T>::kAhead + i] + c);
    };
    if constexpr (in_pairs(static_cast<const T*>(nullptr))) {
      for (; c + 2 * W <= D; c += 2 * W) {
        prefetch();
        for (int i = 0; i < W; ++i) memcpy(&block[i], keys.at[j + i] + c, sizeof(Vec));
        transpose(block);
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) {
          add_product(even_of(block[i]), q + (c + 2 * i) * R, sums);
          add_product(odd_of(block[i]), q + (c + 2 * i + 1) * R, sums);
        }
      }
    }
    for (; c < D; c += W) {
      const int n = static_cast<int>(min<int64_t>(W, D - c));
      prefetch();
      for (int i = 0; i < W; ++i) block[i] = n == W ? widen(keys.at[j + i] + c) : widen_n(keys.at[j + i] + c, n);
      transpose(block);
      if constexpr (sizeof(T) == 1) {
        const Vec scale = Vec::load(keys.scale + j);
        for (int i = 0; i < W; ++i) block[i] = block[i] * scale;
      }
      if (n == W) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) add_product(block[i], q + (c + i) * R, sums);
      } else {
        for (int i = 0; i < n; ++i) add_product(block[i], q + (c + i) * R, sums);
      }
    }
    for (int r = 0; r < R; ++r) sums[r].store(scores + r * kTile + j);
  }
}

// out (R, NV vectors) (+)= weights (R, keys from .. to - 1) V, from channel c on.
template <int R, int NV, class T>
void value_products(const TileRows<T>& values, const float* weights, int from, int to, int64_t c, int n, bool accumulate,
                    float* out, int64_t ld) {
  Vec sums[R][NV];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int x = 0; x < NV; ++x) sums[r][x] = Vec::zero();
  for (int j = from; j < to; ++j) {
    Vec v[NV];
#pragma GCC unroll 4
    for (int x = 0; x < NV; ++x) {
      const T* at = values.at[j] + c + x * W;
      __builtin_prefetch(values.at[j + TileRows<T>::kAhead] + c + x * W);
      v[x] = n == W ? widen(at) : widen_n(at, n);
      if constexpr (sizeof(T) == 1) v[x] = v[x] * Vec::set1(values.scale[j]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec weight = Vec::set1(weights[r * kTile + j]);
#pragma GCC unroll 4
      for (int x = 0; x < NV; ++x) sums[r][x] = fma(weight, v[x], sums[r][x]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int x = 0; x < NV; ++x) {
      float* at = out + r * ld + c + x * W;
      (accumulate ? Vec::load(at) + sums[r][x] : sums[r][x]).store(at);
    }
}

template <int R, class T>
void value_rows(const TileRows<T>& values, const float* weights, int from, int to, int64_t Dv, bool accumulate, float* out,
                int64_t ld) {
  constexpr int NV = R == 8 ? 2 : 4;
  int64_t c = 0;
  for (; c + NV * W <= Dv; c += NV * W) value_products<R, NV>(values, weights, from, to, c, W, accumulate, out, ld);
  for (; c < Dv; c += W)
    value_products<R, 1>(values, weights, from, to, c, static_cast<int>(min<int64_t>(W, Dv - c)), accumulate, out, ld);
}

// The keys [from, to) of a tile that a row sees.
struct Seen {
  int from, to;
  static Seen of(const DecodeProblem& p, int64_t b, int64_t row, int64_t tile) {
    int64_t lo, hi;
    p.seen(b, row % p.Tq, lo, hi);
    const auto within = [&](int64_t j) { return static_cast<int>(max<int64_t>(0, min<int64_t>(kTile, j - tile * kTile))); };
    const Seen s{within(lo), within(hi)};
    return s.from < s.to ? s : Seen{0, 0};
  }
  bool operator==(const Seen& other) const { return from == other.from && to == other.to; }
};

// Scores of one tile, those of unseen keys -inf, and each row's largest.
template <class T>
void score_tile(const DecodeProblem& p, int64_t b, int64_t hkv, int64_t tile, const float* q, float* scores, float* top) {
  const TileRows<T> keys(p, p.k, b, hkv, tile);
  for_rows(p.rows(), [&](auto stretch, int64_t first) {
    key_products<decltype(stretch)::n>(keys, p.D, q + first * p.D, scores + first * kTile);
  });
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = static_cast<float>(i);
  const Vec lane = Vec::load(lanes), none = Vec::set1(-INFINITY);
  for (int64_t row = 0; row < p.rows(); ++row) {
    const Seen seen = Seen::of(p, b, row, tile);
    const uint64_t below = seen.to >= kTile ? ~uint64_t{0} : (uint64_t{1} << seen.to) - 1;
    const uint64_t bits = seen.from >= kTile ? 0 : below & (~uint64_t{0} << seen.from);
    float* at = scores + row * kTile;
    const int64_t h = hkv * p.group() + row / p.Tq;
    const float slope = p.slopes ? -p.slopes[b * p.slopes_sb + h] : 0.0f;
    const float distance = static_cast<float>(tile * kTile - (p.lengths[b] - p.Tq + row % p.Tq));
    Vec most = none;
    for (int j = 0; j < keys.count; j += W) {
      Vec s = Vec::load(at + j);
      if (p.softcap > 0) s = tanh(s) * Vec::set1(p.softcap * kLog2e);
      if (p.slopes) {
        const Vec d = lane + Vec::set1(distance + static_cast<float>(j));
        s = s + Vec::set1(slope) * max(d, Vec::zero() - d) * Vec::set1(kLog2e);
      }
      s = select(static_cast<uint32_t>(bits >> j), s, none);
      s.store(at + j);
      most = max(most, s);
    }
    top[row] = hmax(most);
  }
}

// Scores become weights under each row's running maximum m, which moves on; alpha rescales what was summed before, total is
// the sum of the weights.
void weigh_tile(const DecodeProblem& p, int count, const float* top, float* scores, float* m, float* alpha, float* total) {
  for (int64_t row = 0; row < p.rows(); ++row) {
    float* at = scores + row * kTile;
    const float before = m[row], now = max(before, top[row]), safe = max(-3.4028234e38f, now);
    float scaled[W];
    exp2(Vec::set1(before - safe)).store(scaled);
    m[row] = now, alpha[row] = scaled[0];
    for (int j = 0; j < count; j += W) exp2(Vec::load(at + j) - Vec::set1(safe)).store(at + j);
    float sums[4] = {0, 0, 0, 0};
    int j = 0;
    for (; j + 4 <= count; j += 4)
#pragma GCC unroll 4
      for (int x = 0; x < 4; ++x) sums[x] += at[j + x];
    for (int x = 0; j + x < count; ++x) sums[x] += at[j + x];
    total[row] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

// out (rows, Dv) (+)= weights V, each row over the keys that it sees.
template <class T>
void value_tile(const DecodeProblem& p, int64_t b, int64_t hkv, int64_t tile, const float* weights, bool accumulate,
                float* out) {
  const TileRows<T> values(p, p.v, b, hkv, tile);
  const int64_t ld = padded(p.Dv);
  const Seen first_seen = Seen::of(p, b, 0, tile);
  bool same = true;
  for (int64_t row = 1; row < p.Tq; ++row) same = same && Seen::of(p, b, row, tile) == first_seen;
  for_rows(p.rows(), [&](auto stretch, int64_t first) {
    constexpr int R = decltype(stretch)::n;
    if (same) {
      value_rows<R>(values, weights + first * kTile, first_seen.from, first_seen.to, p.Dv, accumulate, out + first * ld, ld);
    } else {
      for (int64_t row = first; row < first + R; ++row) {
        const Seen seen = Seen::of(p, b, row, tile);
        value_rows<1>(values, weights + row * kTile, seen.from, seen.to, p.Dv, accumulate, out + row * ld, ld);
      }
    }
  });
}

// As a lane of Vec's: without an FMA unit it rounds twice.
float fma(float a, float b, float c) {
  float lanes[W];
  fma(Vec::set1(a), Vec::set1(b), Vec::set1(c)).store(lanes);
  return lanes[0];
}

void scale_row(float* o, int64_t ld, float alpha) {
  if (alpha == 1.0f) return;
  for (int64_t c = 0; c < ld; c += W) (Vec::load(o + c) * Vec::set1(alpha)).store(o + c);
}

// One row's output from its sums: any is false where no tile was visited.
void finish_row(const DecodeProblem& p, int64_t b, int64_t hkv, int64_t row, bool any, float m, float l, const float* sums) {
  const int64_t h = hkv * p.group() + row / p.Tq, t = row % p.Tq;
  if (!any) l = 0.0f;
  if (l == 0.0f) m = -INFINITY;
  float o_scale = 1.0f;
  if (p.sinks) {
    const float sink = p.sinks[h] * kLog2e, top = max(m, sink);
    o_scale = exp2f(m - top);
    l = (l == 0.0f ? 0.0f : l * o_scale) + exp2f(sink - top);
    m = top;
  }
  const bool empty = l == 0.0f;
  const float inverse = empty ? 0.0f : o_scale / l;
  if (p.lse) p.lse[(b * p.H + h) * p.Tq + t] = empty ? -INFINITY : (m + log2f(l)) * kLn2;
  with_type(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    T* out = const_cast<T*>(row_of<T>(p.o, b, h, t));
    for_row(p.Dv, [&](int64_t c, int n) {
      store_some(out + c, inverse == 0.0f ? Vec::zero() : Vec::load(sums + c) * Vec::set1(inverse), n);
    });
  });
}

// body(T{}) with the element type of the caches.
template <class F>
void with_cache_type(const DecodeProblem& p, F&& body) {
  if (p.cache_dtype == Dtype::i8) return body(int8_t{});
  with_type(p.cache_dtype, body);
}

int64_t decode_scratch(const DecodeProblem& p) { return DecodeScratch(p, nullptr).total_floats; }

void start(const DecodeProblem& p, int64_t b, int64_t hkv, DecodeScratch& w) {
  with_type(p.dtype, [&](auto tag) { load_queries<decltype(tag)>(p, b, hkv, w.q); });
  for (int64_t row = 0; row < p.rows(); ++row) w.top[row] = -INFINITY;
}

void whole(const DecodeProblem& p, int64_t b, int64_t hkv, int64_t begin, int64_t end, float* scratch) {
  DecodeScratch w(p, scratch);
  const int64_t ld = padded(p.Dv), rows = p.rows();
  start(p, b, hkv, w);
  with_cache_type(p, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t tile = begin; tile < end; ++tile) {
      const bool first = tile == begin;
      score_tile<T>(p, b, hkv, tile, w.q, w.scores, w.total);  // total: the largest scores until the next line
      weigh_tile(p, tile_keys(p, b, tile), w.total, w.scores, w.top, w.alpha, w.total);
      for (int64_t row = 0; row < rows; ++row) {
        w.l[row] = first ? w.total[row] : fma(w.l[row], w.alpha[row], w.total[row]);
        if (!first) scale_row(w.o + row * ld, ld, w.alpha[row]);
      }
      value_tile<T>(p, b, hkv, tile, w.scores, !first, w.o);
    }
  });
  for (int64_t row = 0; row < rows; ++row) finish_row(p, b, hkv, row, begin < end, w.top[row], w.l[row], w.o + row * ld);
}

void split_scores(const DecodeProblem& p, int64_t b, int64_t hkv, int64_t begin, int64_t end, const SplitKeys& split,
                  float* scratch) {
  DecodeScratch w(p, scratch);
  start(p, b, hkv, w);
  with_cache_type(p, [&](auto tag) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t n = (tile - split.first) * p.rows();
      score_tile<decltype(tag)>(p, b, hkv, tile, w.q, split.scores + n * kTile, split.top + n);
    }
  });
}

void split_sums(const DecodeProblem& p, int64_t b, int64_t hkv, int64_t begin, int64_t end, const SplitKeys& split,
                float* scratch) {
  DecodeScratch w(p, scratch);
  const int64_t ld = padded(p.Dv), rows = p.rows();
  for (int64_t row = 0; row < rows; ++row) {
    w.top[row] = -INFINITY;
    for (int64_t n = 0; n < begin - split.first; ++n) w.top[row] = max(w.top[row], split.top[n * rows + row]);
  }
  with_cache_type(p, [&](auto tag) {
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t n = (tile - split.first) * rows;
      float* weights = split.scores + n * kTile;
      weigh_tile(p, tile_keys(p, b, tile), split.top + n, weights, w.top, split.alpha + n, split.total + n);
      value_tile<decltype(tag)>(p, b, hkv, tile, weights, false, split.sum + n * ld);
    }
  });
}

void split_merge(const DecodeProblem& p, int64_t b, int64_t hkv, int64_t row, int64_t n, const SplitKeys& split,
                 float* scratch) {
  const int64_t ld = padded(p.Dv), rows = p.rows();
  float m = -INFINITY, l = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = i * rows + row;
    const float alpha = split.alpha[at], *sum = split.sum + at * ld;
    m = max(m, split.top[at]);
    l = i == 0 ? split.total[at] : fma(l, alpha, split.total[at]);
    if (i > 0) scale_row(scratch, ld, alpha);
    for (int64_t c = 0; c < ld; c += W)
      (i == 0 ? Vec::load(sum + c) : Vec::load(scratch + c) + Vec::load(sum + c)).store(scratch + c);
  }
  finish_row(p, b, hkv, row, n > 0, m, l, scratch);
}

// int8: the scale is the largest magnitude / 127, and 0 for a row of zeros; values are rounded to the nearest, ties to even.
template <class T>
void quantise(const T* from, int8_t* to, float* scale, int64_t n) {
  float most = 0;
  for (int64_t c = 0; c < n; ++c) most = max(most, fabsf(to_float(from[c])));
  *scale = most / 127.0f;
  for (int64_t c = 0; c < n; ++c) {
    const float x = most > 0 ? nearbyintf(to_float(from[c]) / *scale) : 0.0f;
    to[c] = static_cast<int8_t>(max(-127.0f, min(127.0f, x)));
  }
}

void append(Dtype from_dtype, const void* from, Dtype to_dtype, void* to, float* scale, int64_t n) {
  with_type(from_dtype, [&](auto tag) {
    using T = decltype(tag);
    if (to_dtype == Dtype::i8) return quantise(static_cast<const T*>(from), static_cast<int8_t*>(to), scale, n);
    memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  });
}

}  // namespace

extern const AttentionDecodeKernels attention_decode_kernels = {W,          decode_scratch, whole, split_scores,
                                                                split_sums, split_merge,    append};

}  // namespace mlcore::MLC_ISA
