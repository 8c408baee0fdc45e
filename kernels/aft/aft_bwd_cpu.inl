// The backward of aft.h: gradients of keys and values by the same sums with queries as sources, and those of the bias.
#include "aft/aft_tile.h"

namespace mlcore::MLC_ISA {

void aft_query_block(const AftProblem& p, int64_t item, int64_t block, float* scratch) {
  const AftWork w(p, scratch);
  const int64_t end = min<int64_t>(p.T, (block + 1) * kAftBlock);
  bool finite = true;
  for (int64_t t = block * kAftBlock; t < end; t += kRows) {
    const int n = static_cast<int>(min<int64_t>(kRows, end - t));
    finite = load_queries(p, item, t, n, true, w) && finite;
    if (p.ahead || p.behind) group_sums(p, item, t, n, w);
  }
  p.leaks[item * p.query_blocks() + block] = !finite;
}

void aft_key_gradients(const AftProblem& p, int64_t item, int64_t j0, int64_t j1, float* scratch) {
  const AftWork w(p, scratch);
  const int64_t Dp = w.Dp, b = item / p.H, h = item % p.H;
  const bool products = by_products(p, item);
  gather(p, item, j0, j1, products, w);
  const float* top = top_of(p, item);
  for (int64_t j = j0; j < j1; j += kRows) {
    const int n = static_cast<int>(min<int64_t>(kRows, j1 - j));
    load_keys(p, item, j, n, w);
    for (int i = 0; i < n; ++i)
      for (int64_t c = 0; c < Dp; c += Vec::W) {
        const float* acc = w.acc + (j - j0 + i) * 2 * Dp + c;
        float* payload = w.tile + i * 2 * Dp + c;  // v and then dv, dk beside it
        const Vec z = Vec::load(w.z + i * Dp + c), v = Vec::load(payload);
        const Vec e = products ? exponential(z - Vec::load(top + c)) : Vec::set1(1.0f);
        const Vec dv = e * Vec::load(acc), dk = fma(v, dv, Vec::zero() - e * Vec::load(acc + Dp));
        // A key that no query sees gets 0 whatever its value is.
        const Vec none = Vec::load(acc) * Vec::zero() + Vec::load(acc + Dp) * Vec::zero();
        const uint32_t seen = (less(Vec::zero(), Vec::load(acc)) | less(Vec::load(acc), Vec::zero()) |
                               less(Vec::zero(), Vec::load(acc + Dp)) | less(Vec::load(acc + Dp), Vec::zero())) &
                              ~less(z, Vec::set1(kFloor));
        select(seen, dv, none).store(payload), select(seen, dk, none).store(payload + Dp);
      }
    store_rows(p.dv, b, h, j, n, 0, p.D, w.tile, 2 * Dp);
    store_rows(p.dk, b, h, j, n, 0, p.D, w.tile + Dp, 2 * Dp);
  }
}

namespace {

// Adds to out (keys j.. in rows of kRows queries) sum_d a (p1 v - p2) / exp(w) of one item, from its turned queries
// (p1 | -p2)^T: a's other factors are in the tile of keys.
void add_pair_products(const AftProblem& p, int64_t item, int64_t j, int nj, int nt, const float* turned, float* out,
                       const AftWork& w) {
  load_keys(p, item, j, nj, w);
  weigh_keys(p, item, nj, w);
  product<A::rows, Take::all>(nj, padded(nt), 2 * w.Dp, w.tile, 2 * w.Dp, turned, kRows, out, kRows, Into::add);
}

// The same where products won't do, with exp(w).
void add_pairs(const AftProblem& p, int64_t item, int64_t t, int nt, int64_t j, int nj, float* out, const AftWork& w) {
  const int64_t Dp = w.Dp;
  const bool logarithmic = p.ways[item] == AftProblem::logarithmic;
  float* queries = w.acc;  // (nt, 2 Dp) payloads, then (nt, Dp) exponents
  float* z = w.acc + kRows * 2 * Dp;
  pair_weights(p, item, t, nt, j, nj, true, w);
  load_queries(p, item, t, nt, false, w);
  for (int64_t c = 0; c < nt * 2 * Dp; c += Vec::W) Vec::load(w.tile + c).store(queries + c);
  for (int64_t c = 0; c < nt * Dp; c += Vec::W) Vec::load(w.z + c).store(z + c);
  load_keys(p, item, j, nj, w);
  for (int i = 0; i < nt; ++i)
    for (int m = 0; m < nj; ++m) {
      const float weight = w.weights[i * kRows + m];
      if (weight == -INFINITY) continue;
      out[m * kRows + i] += sum_row(p.D, [&](int64_t c, int lanes) {
        Vec x = Vec::load(w.z + m * Dp + c) + Vec::set1(weight);  // first what forward has added first
        x = logarithmic ? x + Vec::load(z + i * Dp + c) : x - Vec::load(top_of(p, item) + c);
        const float *query = queries + i * 2 * Dp + c, *key = w.tile + m * 2 * Dp + c;
        const Vec e = exponential(x), term = e * fma(Vec::load(query), Vec::load(key), Vec::zero() - Vec::load(query + Dp));
        return keep_some(select(less(Vec::zero(), e), term, e * Vec::zero()), lanes);
      });
    }
}

}  // namespace

void aft_bias_gradients(const AftProblem& p, int64_t h, int64_t t0, int64_t t1, float* dbias, int64_t st, float* scratch) {
  const AftWork w(p, scratch);
  const int64_t Dp = w.Dp, items = p.bias_heads == 1 ? p.B * p.H : p.B, columns = p.banded ? p.columns : p.S;
  const auto item_of = [&](int64_t n) { return p.bias_heads == 1 ? n : n * p.H + h; };
  for (int64_t t = t0; t < (st ? t1 : t0 + 1); ++t)
    for (int64_t c = 0; c < columns; ++c) dbias[(t - t0) * st + c] = 0.0f;
  float *scaled = w.pairs, *others = w.pairs + kRows * kRows;  // (keys, queries): before and with the weights
  for (int64_t t = t0; t < t1; t += p.group) {
    const int nt = static_cast<int>(min(p.group, t1 - t));
    const int64_t left = p.banded ? max<int64_t>(t - p.window + 1, 0) : 0;
    const int64_t right = min(p.S, p.causal ? t + nt : p.banded ? t + nt - 1 + p.window : p.S);
    for (int64_t first = 0; first < items; first += kAftItems) {
      const int count = static_cast<int>(min<int64_t>(kAftItems, items - first));
      for (int n = 0; n < count; ++n) {
        if (!by_products(p, item_of(first + n))) continue;
        load_queries(p, item_of(first + n), t, nt, false, w);
        for (int i = 0; i < nt; ++i)
          for (int64_t c = Dp; c < 2 * Dp; c += Vec::W)
            (Vec::zero() - Vec::load(w.tile + i * 2 * Dp + c)).store(w.tile + i * 2 * Dp + c);
        turn(w.tile, 2 * Dp, nt, 2 * Dp, kRows, w.turned + n * 2 * Dp * kRows);
      }
      for (int64_t j = left; j < right; j += kRows) {
        const int nj = static_cast<int>(min<int64_t>(kRows, right - j));
        for (int i = 0; i < 2 * kRows * kRows; i += Vec::W) Vec::zero().store(w.pairs + i);
        int64_t by_scale = -1;  // an item whose weights are relative to the rows' tops
        for (int n = 0; n < count; ++n) {
          const int64_t item = item_of(first + n);
          if (by_products(p, item)) {
            by_scale = item;
            add_pair_products(p, item, j, nj, nt, w.turned + n * 2 * Dp * kRows, scaled, w);
          } else {
            add_pairs(p, item, t, nt, j, nj, others, w);
          }
        }
        if (by_scale >= 0) pair_weights(p, by_scale, t, nt, j, nj, false, w);
        for (int i = 0; i < nt; ++i) {
          const int64_t shift = p.banded ? t + i - p.window + 1 : 0;
          float* out = dbias + (t + i - t0) * st - shift;
          const int64_t begin = max(j, shift), end = min(j + nj, shift + columns);
          for (int64_t m = begin; m < end; ++m)
            if (!p.causal || m <= t + i)
              out[m] += (by_scale < 0 ? 0.0f : w.weights[i * kRows + m - j] * scaled[(m - j) * kRows + i]) +
                        others[(m - j) * kRows + i];
        }
      }
    }
  }
}

}  // namespace mlcore::MLC_ISA
