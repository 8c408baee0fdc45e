// Tiles of sources, which are keys in forward and queries in backward, of weights, and the sums over all sources: what
// aft_cpu.inl and aft_bwd_cpu.inl share. README.md says how the two directions are one.
#pragma once
#include <math.h>

#include "aft/aft_kernels.h"
#include "core/simd/products.h"
#include "core/simd/token_rows.h"

namespace mlcore::MLC_ISA {

constexpr int kRows = kAftTile;
constexpr float kFloor = -1e38f;  // below every exponent; finite, so that differences of maxima are numbers

// e^x for x that isn't above 0 by more than roundings. Exponents stay natural until they have been subtracted: what differs
// from the largest one by little then keeps all its bits, however large both are.
inline Vec exponential(Vec x) { return exp2(x * Vec::set1(static_cast<float>(kLog2e))); }

// A thread's memory. tile: payloads (p1 | p2) of kRows sources; acc: those of the sinks of a span, summed.
struct AftWork {
  int64_t size, Dp;
  float *z, *tile;         // (kRows, Dp), (kRows, 2 Dp)
  float* q;                // (kRows, Dp)
  float *acc, *peak;       // (kAftSpan, 2 Dp), (kAftSpan, Dp)
  float *weights, *pairs;  // (kRows queries, kRows keys); (kRows keys, kRows queries)
  float* turned;           // kAftItems of (2 Dp, kRows)
  float* row;              // kRows and padding on both sides

  AftWork(const AftProblem& p, float* base) : Dp(padded(p.D)) {
    Arena arena(base);
    z = arena.take(kRows * Dp), tile = arena.take(kRows * 2 * Dp);
    q = arena.take(kRows * Dp);
    acc = arena.take(kAftSpan * 2 * Dp), peak = arena.take(kAftSpan * Dp);
    weights = arena.take(kRows * kRows), pairs = arena.take(2 * kRows * kRows);
    turned = p.dbias ? arena.take(kAftItems * 2 * Dp * kRows) : nullptr;
    row = arena.take(kRows + 2 * Vec::W);
    size = arena.used;
  }
};

inline const float* top_of(const AftProblem& p, int64_t item) { return p.top + item * padded(p.D); }
inline int64_t bias_head(const AftProblem& p, int64_t item) { return p.bias_heads == 1 ? 0 : item % p.H; }

// True where x is neither 0 times something infinite nor NaN: 0 * x == 0 in all lanes.
inline bool all_finite(Vec zeros) { return sum(zeros * Vec::zero()) == 0.0f; }

// Keys [j, j + n): z = k, p1 = v (0 where the key is hidden), p2 = 1. Returns false where NaN or infinities stand.
inline bool load_keys(const AftProblem& p, int64_t item, int64_t j, int n, const AftWork& w) {
  const int64_t Dp = w.Dp;
  load_rows(p.k, item / p.H, item % p.H, j, n, p.D, w.z, Dp);
  load_rows(p.v, item / p.H, item % p.H, j, n, p.D, w.tile, 2 * Dp);
  Vec suspect = Vec::zero();
  for (int i = 0; i < n; ++i)
    for (int64_t c = 0; c < Dp; c += Vec::W) {
      const Vec z = Vec::load(w.z + i * Dp + c);
      float* payload = w.tile + i * 2 * Dp + c;
      const Vec v = select(less(z, Vec::set1(kFloor)), Vec::zero(), Vec::load(payload));
      v.store(payload), Vec::set1(1.0f).store(payload + Dp);
      suspect = fma(v, Vec::zero(), fma(max(Vec::set1(kFloor), z), Vec::zero(), suspect));
    }
  return all_finite(suspect);
}

// The tile of keys multiplied with exp(k - top).
inline void weigh_keys(const AftProblem& p, int64_t item, int n, const AftWork& w) {
  for (int i = 0; i < n; ++i)
    for (int64_t c = 0; c < w.Dp; c += Vec::W) {
      float* payload = w.tile + i * 2 * w.Dp + c;
      const Vec e = exponential(Vec::load(w.z + i * w.Dp + c) - Vec::load(top_of(p, item) + c));
      (e * Vec::load(payload)).store(payload), e.store(payload + w.Dp);
    }
}

inline Vec sigmoid(Vec x) { return Vec::set1(1.0f) / (Vec::set1(1.0f) + power(x * Vec::set1(-static_cast<float>(kLog2e)))); }

// Queries [t, t + n) as sources of backward: z = -peak where den is relative to e^peak, else 0; p1 = dy / den, p2 = y p1. The
// gradient of q is stored too where asked for. Returns false where NaN or infinities stand.
inline bool load_queries(const AftProblem& p, int64_t item, int64_t t, int n, bool with_dq, const AftWork& w) {
  const int64_t Dp = w.Dp, first = (item * p.T + t) * p.D;
  const bool logarithmic = p.ways[item] == AftProblem::logarithmic;
  load_rows(p.q, item / p.H, item % p.H, t, n, p.D, w.q, Dp);
  load_rows(p.d_o, item / p.H, item % p.H, t, n, p.D, w.tile, 2 * Dp);
  Vec suspect = Vec::zero();
  for (int i = 0; i < n; ++i)
    for_row(p.D, [&](int64_t c, int m) {
      const Vec gate = sigmoid(Vec::load(w.q + i * Dp + c));
      const int64_t at = first + i * p.D + c;
      const Vec y = load_some(p.y + at, m), den = load_some(p.den + at, m);
      float* payload = w.tile + i * 2 * Dp + c;
      const Vec dy = Vec::load(payload) * gate;
      (dy * y * (Vec::set1(1.0f) - gate)).store(w.q + i * Dp + c);
      const Vec p1 = keep_some(select(less(Vec::zero(), den), dy / den, dy * (den * Vec::zero())), m),
                p2 = keep_some(p1 * y, m);
      (logarithmic ? Vec::zero() - load_some(p.peak + at, m) : Vec::zero()).store(w.z + i * Dp + c);
      p1.store(payload), p2.store(payload + Dp);
      suspect = fma(p1, Vec::zero(), fma(p2, Vec::zero(), suspect));
    });
  if (with_dq) store_rows(p.dq, item / p.H, item % p.H, t, n, 0, p.D, w.q, Dp);
  return all_finite(suspect);
}

// What an item's weights of query t are taken relative to: the bias's largest number, or 0 where every pair has its own
// exponential, for whose exponent k and w are added before anything is subtracted.
inline float row_shift(const AftProblem& p, int64_t item, int64_t t) {
  return p.biased && p.ways[item] == AftProblem::scaled ? p.row_top[bias_head(p, item) * p.T + t] : 0.0f;
}

// The bias's row of query t less shift, keys [j, j + n): w[i] for i < n, then padding. -inf: hidden.
inline void bias_row(const AftProblem& p, int64_t h, int64_t t, int64_t j, int n, float shift, float* w) {
  int64_t begin = 0, end = 0;  // of the keys that have an entry, relative to j
  const float* entry = nullptr;
  if (p.biased) {
    const int64_t left = p.banded ? t - p.window + 1 : 0, right = p.banded ? left + p.columns : p.S;
    begin = min<int64_t>(max<int64_t>(left - j, 0), n), end = max(begin, min<int64_t>(right - j, n));
    entry = p.bias + h * p.bias_sh + t * p.bias_st - left + j;
  }
  const Vec above = Vec::set1(shift);
  for (int64_t i = 0; i < n; i += Vec::W) (Vec::zero() - above).store(w + i);
  for_row(end - begin, [&](int64_t i, int m) { store_some(w + begin + i, load_some(entry + begin + i, m) - above, m); });
  if (p.causal)
    for (int64_t i = max<int64_t>(t + 1 - j, 0); i < n; ++i) w[i] = -INFINITY;
}

// Weights of an item's queries [t, t + nt) and keys [j, j + nj) in w.weights, as exponentials or their logarithms; keys up to
// the next whole vector get weights that no product reads.
inline void pair_weights(const AftProblem& p, int64_t item, int64_t t, int nt, int64_t j, int nj, bool logs, const AftWork& w) {
  for (int i = 0; i < nt; ++i) {
    bias_row(p, bias_head(p, item), t + i, j, nj, row_shift(p, item, t + i), w.row);
    for (int c = 0; c < nj; c += Vec::W) {
      const Vec x = Vec::load(w.row + c);
      (logs ? x : exponential(x)).store(w.weights + i * kRows + c);
    }
  }
}

// A running sum of e^z p1 and e^z p2, relative to e^peak.
struct RunningSum {
  Vec peak, n1, n2;
  void add(Vec z, Vec p1, Vec p2) {
    const Vec top = max(z, peak), old = exponential(peak - top),
              fresh = exponential(z - top);  // a NaN z leaves top, and makes fresh NaN
    n1 = fma(fresh, p1, n1 * old), n2 = fma(fresh, p2, n2 * old), peak = top;
  }
};
inline RunningSum load_sum(const float* at, int64_t Dp) { return {Vec::load(at), Vec::load(at + Dp), Vec::load(at + 2 * Dp)}; }
inline void store_sum(const RunningSum& s, float* at, int64_t Dp) {
  s.peak.store(at), s.n1.store(at + Dp), s.n2.store(at + 2 * Dp);
}

// The sums over the groups of the n sources from y on that lie in w, each into its place for scan(). Sources outside of the
// band have the weight exp(0), which is relative to a query's top.
inline void group_sums(const AftProblem& p, int64_t item, int64_t y, int n, const AftWork& w) {
  const int64_t Dp = w.Dp;
  float* sums = p.ahead ? p.ahead + (item * (p.groups() + 1) + 1) * 3 * Dp : p.behind + item * (p.groups() + 1) * 3 * Dp;
  for (int i0 = 0; i0 < n; i0 += static_cast<int>(p.group)) {
    const int end = min(n, i0 + static_cast<int>(p.group));
    for (int64_t c = 0; c < Dp; c += Vec::W) {
      const auto exponent = [&](int i) {
        const Vec z = Vec::load(w.z + i * Dp + c);
        return p.backward ? z - Vec::set1(row_shift(p, item, y + i)) : z;
      };
      RunningSum s{Vec::set1(kFloor), Vec::zero(), Vec::zero()};
      for (int i = i0; i < end; ++i) s.peak = max(exponent(i), s.peak);
      for (int first = i0; first < end; first += 8) {  // sums of sums: a chain of 64 additions loses three bits
        Vec n1 = Vec::zero(), n2 = Vec::zero();
        for (int i = first; i < min(end, first + 8); ++i) {
          const Vec e = exponential(exponent(i) - s.peak);
          const float* payload = w.tile + i * 2 * Dp + c;
          n1 = fma(e, Vec::load(payload), n1), n2 = fma(e, Vec::load(payload + Dp), n2);
        }
        s.n1 = s.n1 + n1, s.n2 = s.n2 + n2;
      }
      store_sum(s, sums + (y + i0) / p.group * 3 * Dp + c, Dp);
    }
  }
}

// Products are possible: no NaN must be kept from a pair of weight 0, and no sum may lie far below its scale.
inline bool by_products(const AftProblem& p, int64_t item) {
  if (p.ways[item] == AftProblem::logarithmic) return false;
  if (p.backward && p.masked)
    for (int64_t b = 0; b < p.query_blocks(); ++b)
      if (p.leaks[item * p.query_blocks() + b]) return false;
  return true;
}

// The exponents of keys [j, j + n) as sinks, in w.peak.
inline void load_sinks(const AftProblem& p, int64_t item, int64_t j, int n, const AftWork& w) {
  load_rows(p.k, item / p.H, item % p.H, j, n, p.D, w.peak, w.Dp);
  if (p.ways[item] == AftProblem::logarithmic) return;
  for (int i = 0; i < n; ++i)
    for (int64_t c = 0; c < w.Dp; c += Vec::W)
      (Vec::load(w.peak + i * w.Dp + c) - Vec::load(top_of(p, item) + c)).store(w.peak + i * w.Dp + c);
}

// Adds the pairs of nx sinks, from row x of w.acc on, and ny sources, from row y of the tile on, one exponential each.
inline void add_each_pair(const AftProblem& p, int64_t x, int nx, int64_t y, int ny, const AftWork& w) {
  const int64_t Dp = w.Dp;
  for (int i = 0; i < nx; ++i)
    for (int64_t c = 0; c < Dp; c += Vec::W) {
      float *out = w.acc + (x + i) * 2 * Dp + c, *peak = w.peak + (x + i) * Dp + c;
      RunningSum s{Vec::load(peak), Vec::load(out), Vec::load(out + Dp)};
      for (int m = 0; m < ny; ++m) {
        const float weight = w.weights[p.backward ? m * kRows + i : i * kRows + m];
        if (weight == -INFINITY) continue;
        const float* payload = w.tile + (y + m) * 2 * Dp + c;
        const Vec z = Vec::load(w.z + (y + m) * Dp + c), p1 = Vec::load(payload), p2 = Vec::load(payload + Dp);
        if (p.backward) {  // first what forward has added first: their sum less its peak is then exact
          const Vec e = exponential((s.peak + Vec::set1(weight)) + z);
          s.n1 = fma(e, p1, s.n1), s.n2 = fma(e, p2, s.n2);
        } else {
          s.add(z + Vec::set1(weight), p1, p2);
        }
      }
      s.peak.store(peak), s.n1.store(out), s.n2.store(out + Dp);
    }
}

// Adds the sums over the sources that are near no sink of a group: sums (3, Dp).
inline void add_far(const AftProblem& p, int64_t item, int64_t x0, int64_t x, int nx, const float* sums, bool products,
                    const AftWork& w) {
  const int64_t Dp = w.Dp;
  for (int i = 0; i < nx; ++i) {
    const float shift = p.backward ? 0.0f : row_shift(p, item, x + i);
    for (int64_t c = 0; c < Dp; c += Vec::W) {
      const RunningSum far = load_sum(sums + c, Dp);
      float *out = w.acc + (x - x0 + i) * 2 * Dp + c, *peak = w.peak + (x - x0 + i) * Dp + c;
      RunningSum s{Vec::load(peak), Vec::load(out), Vec::load(out + Dp)};
      if (!products && !p.backward) {  // and then shift is 0
        s.add(far.peak, far.n1, far.n2);
      } else {
        const Vec near = p.backward ? far.peak : far.peak - Vec::load(top_of(p, item) + c);
        const Vec f = exponential(products ? near - Vec::set1(shift) : near + s.peak);
        s.n1 = fma(f, far.n1, s.n1), s.n2 = fma(f, far.n2, s.n2);
      }
      s.peak.store(peak), s.n1.store(out), s.n2.store(out + Dp);
    }
  }
}

// A tile of sources, for products multiplied with their exponentials.
inline void load_sources(const AftProblem& p, int64_t item, int64_t y, int n, bool products, const AftWork& w) {
  if (p.backward) {
    load_queries(p, item, y, n, false, w);
    return;
  }
  load_keys(p, item, y, n, w);
  if (products) weigh_keys(p, item, n, w);
}

struct Range {
  int64_t begin, end;
};

// The sources whose weights for sinks [x, x + group) are not all exp(k): [begin, end), begin a multiple of group.
inline Range near_range(const AftProblem& p, int64_t x) {
  const int64_t n = p.sources(), most = p.groups() * p.group, s = p.window;
  const auto down = [&](int64_t i) { return i <= 0 ? 0 : i / p.group * p.group; };
  const bool ahead_only = p.causal && p.backward, behind_only = p.causal && !p.backward;
  int64_t begin, end;
  if (p.near_only()) {
    begin = ahead_only ? x : 0, end = behind_only ? x + p.group : n;
  } else if (s == 0 && !p.causal) {
    begin = end = most;
  } else {
    begin = ahead_only ? x : down(x - s + 1);
    end = behind_only ? x + p.group : down(x + p.group - 1 + s + p.group - 1);
  }
  begin = min(begin, most), end = min(end, n);
  return {begin, max(begin, end)};
}

// Into w.acc the sums over all sources of e^(z + w) (p1 | p2) for the sinks [x0, x1). In forward relative to e^top by products,
// else to e^w.peak; in backward lacking the sinks' own exponentials by products, else whole.
inline void gather(const AftProblem& p, int64_t item, int64_t x0, int64_t x1, bool products, const AftWork& w) {
  const int64_t Dp = w.Dp, n_sources = p.sources();
  for (int64_t i = 0; i < (x1 - x0) * 2 * Dp; i += Vec::W) Vec::zero().store(w.acc + i);
  for (int64_t i = 0; i < (x1 - x0) * Dp; i += Vec::W) Vec::set1(kFloor).store(w.peak + i);
  if (p.backward && !products) load_sinks(p, item, x0, static_cast<int>(x1 - x0), w);
  // fn(first sink of a group, its number of sinks, its near sources)
  const auto each_group = [&](auto&& fn) {
    for (int64_t x = x0; x < x1; x += p.group) fn(x, static_cast<int>(min(p.group, x1 - x)), near_range(p, x));
  };
  int64_t begin = n_sources, end = 0;
  each_group([&](int64_t, int, Range near) {
    if (near.begin < near.end) begin = min(begin, near.begin), end = max(end, near.end);
  });
  for (int64_t y = begin / kRows * kRows; y < end; y += kRows) {
    const int n = static_cast<int>(min<int64_t>(kRows, n_sources - y));
    load_sources(p, item, y, n, products, w);
    each_group([&](int64_t x, int nx, Range near) {
      const int64_t a = max(near.begin, y), b = min(near.end, y + n);
      if (a >= b) return;
      const int ny = static_cast<int>(b - a);
      p.backward ? pair_weights(p, item, a, ny, x, nx, !products, w) : pair_weights(p, item, x, nx, a, ny, !products, w);
      if (!products) return add_each_pair(p, x - x0, nx, a - y, ny, w);
      const float* source = w.tile + (a - y) * 2 * Dp;
      float* acc = w.acc + (x - x0) * 2 * Dp;
      p.backward ? product<A::columns, Take::all>(nx, 2 * Dp, ny, w.weights, kRows, source, 2 * Dp, acc, 2 * Dp, Into::add)
                 : product<A::rows, Take::all>(nx, 2 * Dp, ny, w.weights, kRows, source, 2 * Dp, acc, 2 * Dp, Into::add);
    });
  }
  each_group([&](int64_t x, int nx, Range near) {
    const int64_t first = item * (p.groups() + 1);
    if (p.ahead) add_far(p, item, x0, x, nx, p.ahead + (first + near.begin / p.group) * 3 * Dp, products, w);
    if (p.behind) add_far(p, item, x0, x, nx, p.behind + (first + ceil_div(near.end, p.group)) * 3 * Dp, products, w);
  });
}

}  // namespace mlcore::MLC_ISA
