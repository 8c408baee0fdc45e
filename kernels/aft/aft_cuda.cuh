// What aft's CUDA kernels are made of; the equations are in aft.h, the kernels in aft.cu. A thread has one feature of four
// sinks; forward and the gradients of keys are one sum: sources are keys or queries, sinks the other.
#pragma once
#include "core/tokens.h"
#include "cuda/reduce.cuh"
#include "cuda/types.h"

namespace mlcore::cuda {
namespace {

constexpr int kTile = 32, kWarps = 8, kThreads = kTile * kWarps, kEach = kTile / kWarps;  // tokens; a warp's rows of a tile
constexpr int kMaxParts = 32;                                                             // of sums over queries
constexpr float kFloor = -1e38f;  // below every exponent; finite, so that differences of maxima are numbers
constexpr float kReach = 40.0f;   // exponents of e that may lie between a tile's sum and its scale: e^-40 keeps all bits

struct Aft {
  Tokens q, k, v, o, d_o, dq, dk, dv;
  const float* bias;
  int64_t bias_sh, bias_st;
  float *y, *den, *peak, *dbias, *ahead, *behind, *partial;  // ahead, behind: (B H, groups + 1, 3, D)
  int B, H, T, S, D, window, columns, bias_heads, sources, sinks, groups, chunks, parts;
  bool causal, banded;
};

template <class T>
MLC_DEVICE float read(const Tokens& x, int64_t b, int64_t h, int t, int d) {
  return to_float(static_cast<const T*>(x.data)[b * x.sb + h * x.sh + t * x.st + d]);
}
template <class T>
MLC_DEVICE void write(const Tokens& x, int64_t b, int64_t h, int t, int d, float v) {
  static_cast<T*>(x.data)[b * x.sb + h * x.sh + t * x.st + d] = from_float<T>(v);
}

MLC_DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// w[h,t,j]; -inf where the pair doesn't exist.
MLC_DEVICE float weight(const Aft& p, int h, int t, int j) {
  if (t < 0 || t >= p.T || j < 0 || j >= p.S || (p.causal && j > t)) return -INFINITY;
  if (p.bias == nullptr) return 0.0f;
  const float* row = p.bias + (p.bias_heads == 1 ? 0 : h) * p.bias_sh + t * p.bias_st;
  if (!p.banded) return row[j];
  const int c = j - t + p.window - 1;
  return c >= 0 && c < p.columns ? row[c] : 0.0f;
}

// One feature of a source: its exponent and payloads. Keys: (k, v, 1), where hidden keys have the value 0; queries:
// (-peak, dy / den, y dy / den).
struct Source {
  float z = -INFINITY, p1 = 0.0f, p2 = 0.0f;
};
template <class T, bool Backward>
MLC_DEVICE Source load_source(const Aft& p, int64_t item, int i, int d) {
  Source s;
  const int64_t b = item / p.H, h = item % p.H;
  if (!Backward) {
    s.z = read<T>(p.k, b, h, i, d), s.p1 = s.z < kFloor ? 0.0f : read<T>(p.v, b, h, i, d), s.p2 = 1.0f;
    return s;
  }
  const int64_t at = (item * p.T + i) * p.D + d;
  const float dy = read<T>(p.d_o, b, h, i, d) * sigmoid(read<T>(p.q, b, h, i, d)), den = p.den[at];
  s.z = -p.peak[at], s.p1 = den > 0.0f ? dy / den : dy * (den * 0.0f), s.p2 = s.p1 * p.y[at];
  return s;
}

// a + b + c for exponents: where the sum is small beside its terms, it keeps what a + b loses. So a pair weighs the same in
// forward and backward, in products and alone, however large k and w are.
MLC_DEVICE float add3(float a, float b, float c) {
  const float s = a + b, t = s - a, lost = (a - (s - t)) + (b - t);
  return fabsf(s) < INFINITY ? (s + c) + lost : s + c;
}

// A running sum of e^z p1 and e^z p2, relative to e^peak.
struct RunningSum {
  float peak = kFloor, n1 = 0.0f, n2 = 0.0f;
  MLC_DEVICE void scale_to(float z) {  // a NaN z leaves peak
    const float top = fmaxf(z, peak), old = expf(peak - top);
    n1 *= old, n2 *= old, peak = top;
  }
  MLC_DEVICE void add(const RunningSum& s) {
    scale_to(s.peak);
    const float f = expf(s.peak - peak);
    n1 += f * s.n1, n2 += f * s.n2;
  }
};
MLC_DEVICE RunningSum load_sum(const Aft& p, const float* sums, int64_t item, int64_t group, int d) {
  const float* at = sums + (item * (p.groups + 1) + group) * 3 * p.D + d;
  RunningSum s;
  s.peak = at[0], s.n1 = at[p.D], s.n2 = at[2 * p.D];
  return s;
}
MLC_DEVICE void store_sum(const Aft& p, float* sums, int64_t item, int64_t group, int d, const RunningSum& s) {
  float* at = sums + (item * (p.groups + 1) + group) * 3 * p.D + d;
  at[0] = s.peak, at[p.D] = s.n1, at[2 * p.D] = s.n2;
}

// Sources [begin, end) whose weights for the sinks [x, x + kTile) are not all exp(z); multiples of kTile, but for the last.
template <bool Backward>
MLC_DEVICE void near_range(const Aft& p, int x, int& begin, int& end) {
  const int most = p.groups * kTile, n = p.sources;
  const bool ahead_only = p.causal && Backward, behind_only = p.causal && !Backward;
  if (p.bias != nullptr && !p.banded) {
    begin = ahead_only ? x : 0, end = behind_only ? x + kTile : n;
  } else if (p.bias == nullptr && !p.causal) {
    begin = end = most;
  } else {
    const int first = max(x - p.window + 1, 0), last = x + kTile - 1 + p.window + kTile - 1;
    begin = ahead_only ? x : first / kTile * kTile, end = behind_only ? x + kTile : last / kTile * kTile;
  }
  begin = min(begin, most), end = max(begin, min(end, n));
}

// Tiles of sources by features, and of weights by queries and keys; what their largest and smallest numbers are, by warps.
struct Near {
  float z[kTile][kTile], p1[kTile][kTile], p2[kTile][kTile];
  alignas(16) float w[kTile][kTile + 4];
  float high[2][kWarps][kTile], low[2][kWarps][kTile];  // of z by features; Backward: of w by sinks
  float reach[kWarps], top[kTile];                      // forward: the distance within a row of w; the largest w of a sink
  bool wrong[kWarps];                                   // NaN or an infinity that isn't a hidden key's or pair's
};

// The largest of a column and, in `reach`, how far it is from the smallest in the worst column. All threads of a warp call.
MLC_DEVICE float column_top(const float (*high)[kTile], const float (*low)[kTile], float& reach) {
  float top = -INFINITY, least = INFINITY;
  for (int v = 0; v < kWarps; ++v) {
    top = fmaxf(top, high[v][threadIdx.x % kTile]);
    least = fminf(least, low[v][threadIdx.x % kTile]);
  }
  reach = warp_max(top > kFloor ? top - least : 0.0f);
  return fmaxf(top, kFloor);
}

// Loads the tile of the sources from `first` on and the sinks from x on. True where its sums may be products of exponentials,
// which then stand in p1, p2 and w, relative to e^z and e^top: where k or w lie near each other, no sum is far below its scale,
// and nothing must be kept from a pair of weight 0.
template <class T, bool Backward>
MLC_DEVICE bool load_near(const Aft& p, int64_t item, int x, int first, int d, Near& near) {
  const int lane = threadIdx.x % kTile, warp = threadIdx.x / kTile, row = warp * kEach;
  Source source[kEach];
  float w[kEach], top[kEach], high[2] = {-INFINITY, -INFINITY}, low[2] = {INFINITY, INFINITY}, reach = 0.0f;
  bool wrong = false;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int m = row + i, t = Backward ? first + m : x + m, j = Backward ? x + lane : first + lane;
    if (first + m < p.sources && d < p.D) {
      source[i] = load_source<T, Backward>(p, item, first + m, d);
      high[0] = fmaxf(high[0], source[i].z), low[0] = fminf(low[0], source[i].z);
      wrong = wrong || !(source[i].z < INFINITY && fabsf(source[i].p1) < INFINITY && fabsf(source[i].p2) < INFINITY);
    }
    w[i] = weight(p, static_cast<int>(item % p.H), t, j);
    const bool there = t < p.T && j < p.S;
    wrong = wrong || (there && !(w[i] < INFINITY));
    if (Backward) {
      if (there) high[1] = fmaxf(high[1], w[i]), low[1] = fminf(low[1], w[i]);
    } else {
      top[i] = warp_max(w[i]);
      if (top[i] > kFloor) reach = fmaxf(reach, top[i] + warp_max(there ? -w[i] : -INFINITY));
      top[i] = fmaxf(top[i], kFloor);
      if (lane == 0) near.top[m] = top[i];
    }
  }
  near.high[0][warp][lane] = high[0], near.low[0][warp][lane] = low[0];
  if (Backward) near.high[1][warp][lane] = high[1], near.low[1][warp][lane] = low[1];
  wrong = __any_sync(kFullWarp, wrong);
  if (lane == 0) near.reach[warp] = reach, near.wrong[warp] = wrong;
  __syncthreads();
  float z_reach, w_reach = 0.0f, sink_top = kFloor;
  const float z_top = column_top(near.high[0], near.low[0], z_reach);
  if (Backward) sink_top = column_top(near.high[1], near.low[1], w_reach);
  for (int v = 0; v < kWarps; ++v) w_reach = fmaxf(w_reach, near.reach[v]), wrong = wrong || near.wrong[v];
  const bool products = !wrong && (z_reach <= kReach || w_reach <= kReach);
  if (Backward && warp == 0) near.top[lane] = sink_top;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int m = row + i;
    const float e = products ? expf(source[i].z - z_top) : 1.0f;
    near.z[m][lane] = products ? z_top : source[i].z;
    near.p1[m][lane] = e * source[i].p1, near.p2[m][lane] = e * source[i].p2;
    near.w[m][lane] = products ? expf(w[i] - (Backward ? sink_top : top[i])) : w[i];
  }
  __syncthreads();
  return products;
}

// Adds a tile of products to the warp's sinks.
template <bool Backward>
MLC_DEVICE void add_products(const Near& near, RunningSum (&s)[kEach]) {
  const int lane = threadIdx.x % kTile, row = threadIdx.x / kTile * kEach;
  float n1[kEach] = {}, n2[kEach] = {};
#pragma unroll 2
  for (int first = 0; first < kTile; first += 4) {
    Pack<float, 4> w[kEach];  // of a sink; Backward: of a source
#pragma unroll
    for (int i = 0; i < kEach; ++i) w[i] = load_pack<4>(Backward ? &near.w[first + i][row] : &near.w[row + i][first]);
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const float p1 = near.p1[first + m][lane], p2 = near.p2[first + m][lane];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float e = Backward ? w[m].v[i] : w[i].v[m];
        n1[i] += e * p1, n2[i] += e * p2;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const float top = near.top[row + i], z = near.z[row][lane];
    if (top <= kFloor) continue;  // sees nothing of the tile
    if (!Backward) s[i].scale_to(z + top);
    const float f = expf(Backward ? add3(s[i].peak, top, z) : add3(z, top, -s[i].peak));
    s[i].n1 += f * n1[i], s[i].n2 += f * n2[i];
  }
}

// Adds a tile to the warp's sinks, an exponential a pair. Backward: s.peak is the sink's own exponent, and sums are whole.
template <bool Backward>
MLC_DEVICE void add_tile(const Near& near, RunningSum (&s)[kEach]) {
  const int lane = threadIdx.x % kTile, row = threadIdx.x / kTile * kEach;
  const auto of = [&](int i, int m) { return Backward ? near.w[m][row + i] : near.w[row + i][m]; };
  if (!Backward)
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      float top = kFloor;
      for (int m = 0; m < kTile; ++m)
        if (of(i, m) != -INFINITY) top = fmaxf(near.z[m][lane] + of(i, m), top);
      s[i].scale_to(top);
    }
  float n1[kEach] = {}, n2[kEach] = {};
  for (int m = 0; m < kTile; ++m) {
    const float z = near.z[m][lane], p1 = near.p1[m][lane], p2 = near.p2[m][lane];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float w = of(i, m);
      if (w == -INFINITY) continue;
      const float e = expf(Backward ? add3(s[i].peak, w, z) : add3(z, w, -s[i].peak));
      n1[i] += e * p1, n2[i] += e * p2;
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) s[i].n1 += n1[i], s[i].n2 += n2[i];
}

// o of a query, and what backward needs of it.
template <class T>
MLC_DEVICE void finish_query(const Aft& p, int64_t item, int t, int d, const RunningSum& s) {
  const int64_t b = item / p.H, h = item % p.H, at = (item * p.T + t) * p.D + d;
  const float y = s.n2 > 0.0f ? s.n1 / s.n2 : s.n2 * 0.0f;
  write<T>(p.o, b, h, t, d, sigmoid(read<T>(p.q, b, h, t, d)) * y);
  if (p.y == nullptr) return;
  p.y[at] = y, p.den[at] = s.n2, p.peak[at] = s.n2 > 0.0f ? s.peak : INFINITY;  // what sees nothing weighs 0
}

template <class T>
MLC_DEVICE void finish_key(const Aft& p, int64_t item, int j, int d, const RunningSum& s) {
  const int64_t b = item / p.H, h = item % p.H;
  const Source key = load_source<T, false>(p, item, j, d);
  // A key that no query sees gets 0 whatever its value is.
  const float none = s.n1 * 0.0f + s.n2 * 0.0f;
  const bool seen = (s.n1 > 0.0f || s.n1 < 0.0f || s.n2 > 0.0f || s.n2 < 0.0f) && !(key.z < kFloor);
  write<T>(p.dv, b, h, j, d, seen ? s.n1 : none);
  write<T>(p.dk, b, h, j, d, seen ? fmaf(key.p1, s.n1, -s.n2) : none);
}

}  // namespace
}  // namespace mlcore::cuda
