// What is found out about the operands, and the forward. The equations are in aft.h, the sums in aft_tile.h.
#include "aft/aft_tile.h"

namespace mlcore::MLC_ISA {
namespace {

int64_t scratch_floats(const AftProblem& p) { return AftWork(p, nullptr).size; }

void bias_rows(const AftProblem& p, int64_t h, int64_t t0, int64_t t1, float* row_top, float* range, bool* masked) {
  const Vec far = Vec::set1(INFINITY), floor = Vec::set1(kFloor);
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t seen = p.causal ? t + 1 : p.S, left = p.banded ? t - p.window + 1 : 0;
    const int64_t begin = max<int64_t>(left, 0), end = min(seen, left + (p.banded ? p.columns : p.S));
    const float* entry = p.bias + h * p.bias_sh + t * p.bias_st - left;
    const bool outside = max<int64_t>(end - begin, 0) < seen;  // of the band, where w is 0
    Vec top = Vec::set1(outside ? 0.0f : -INFINITY), low = Vec::set1(outside ? 0.0f : INFINITY), suspect = Vec::zero();
    if (begin < end)
      for_row(end - begin, [&](int64_t c, int m) {
        const Vec x = load_some(entry + begin + c, m);
        const Vec lanes = m == Vec::W ? x : select((1u << m) - 1u, x, Vec::set1(-INFINITY));
        top = max(lanes, top), low = min(select(less(floor, lanes), lanes, far), low);
        suspect = fma(x, Vec::zero(), suspect);
      });
    const float highest = hmax(top), lowest = -hmax(Vec::zero() - low);
    row_top[t] = highest > kFloor ? highest : 0.0f;
    if (highest > kFloor && highest - lowest > *range) *range = highest - lowest;
    *masked = *masked || !all_finite(suspect);
  }
}

// Per column the largest k and the smallest that isn't -inf; then whether some key is hidden, and whether there is a NaN.
void key_block(const AftProblem& p, int64_t item, int64_t block, float* scratch) {
  const AftWork w(p, scratch);
  const int64_t Dp = w.Dp, end = min<int64_t>(p.S, (block + 1) * kAftBlock);
  float* stats = p.stats + (item * p.key_blocks() + block) * (2 * Dp + 16);
  for (int64_t c = 0; c < Dp; c += Vec::W) Vec::set1(-INFINITY).store(stats + c), Vec::set1(INFINITY).store(stats + Dp + c);
  stats[2 * Dp] = stats[2 * Dp + 1] = 0;
  for (int64_t j = block * kAftBlock; j < end; j += kRows) {
    const int n = static_cast<int>(min<int64_t>(kRows, end - j));
    if (!load_keys(p, item, j, n, w)) stats[2 * Dp + 1] = 1;
    uint32_t hidden = 0;
    for (int64_t c = 0; c < Dp; c += Vec::W) {
      Vec top = Vec::load(stats + c), low = Vec::load(stats + Dp + c);
      for (int i = 0; i < n; ++i) {
        const Vec z = Vec::load(w.z + i * Dp + c);
        const uint32_t gone = less(z, Vec::set1(kFloor));
        hidden |= gone;
        top = max(z, top), low = min(select(gone, Vec::set1(INFINITY), z), low);
      }
      top.store(stats + c), low.store(stats + Dp + c);
    }
    if (hidden) stats[2 * Dp] = 1;
    if (!p.backward && p.ahead) group_sums(p, item, j, n, w);
  }
}

void gather_stats(const AftProblem& p, int64_t item) {
  const int64_t Dp = padded(p.D), stride = 2 * Dp + 16;
  const float* stats = p.stats + item * p.key_blocks() * stride;
  float* tops = p.top + item * Dp;
  float range = 0, hidden = 0, leak = 0;
  for (int64_t b = 0; b < p.key_blocks(); ++b) {
    hidden = max(hidden, stats[b * stride + 2 * Dp]);
    leak = max(leak, stats[b * stride + 2 * Dp + 1]);
  }
  for (int64_t c = 0; c < Dp; ++c) {
    float top = -INFINITY, low = INFINITY;
    for (int64_t b = 0; b < p.key_blocks(); ++b) {
      top = max(top, stats[b * stride + c]);
      low = min(low, stats[b * stride + Dp + c]);
    }
    tops[c] = top > kFloor ? top : 0.0f;
    if (top > kFloor && top - low > range) range = top - low;
  }
  const bool reached =
      (hidden == 0 && range <= kAftReach) || (!p.masked && p.bias_range <= kAftReach) || range + p.bias_range <= kAftReach;
  p.ways[item] = reached && !(leak != 0 && p.masked) ? AftProblem::scaled : AftProblem::logarithmic;
}

// Sums over groups become sums over all groups before (in ahead) and from a group on (in behind).
void scan(const AftProblem& p, int64_t item) {
  const int64_t Dp = padded(p.D), G = p.groups(), stride = 3 * Dp;
  float* ahead = p.ahead ? p.ahead + item * (G + 1) * stride : nullptr;
  float* behind = p.behind ? p.behind + item * (G + 1) * stride : nullptr;
  for (int64_t c = 0; c < Dp; c += Vec::W) {
    const RunningSum none{Vec::set1(kFloor), Vec::zero(), Vec::zero()};
    RunningSum s = none;
    if (behind) store_sum(s, behind + G * stride + c, Dp);
    for (int64_t g = G - 1; behind && g >= 0; --g) {
      const RunningSum own = load_sum(ahead ? ahead + (g + 1) * stride + c : behind + g * stride + c, Dp);
      s.add(own.peak, own.n1, own.n2);
      store_sum(s, behind + g * stride + c, Dp);
    }
    if (!ahead) continue;
    s = none;
    store_sum(s, ahead + c, Dp);
    for (int64_t g = 1; g <= G; ++g) {
      const RunningSum own = load_sum(ahead + g * stride + c, Dp);
      s.add(own.peak, own.n1, own.n2);
      store_sum(s, ahead + g * stride + c, Dp);
    }
  }
}

void outputs(const AftProblem& p, int64_t item, int64_t t0, int64_t t1, float* scratch) {
  const AftWork w(p, scratch);
  const int64_t Dp = w.Dp, b = item / p.H, h = item % p.H;
  const bool products = by_products(p, item);
  gather(p, item, t0, t1, products, w);
  for (int64_t t = t0; t < t1; t += kRows) {
    const int n = static_cast<int>(min<int64_t>(kRows, t1 - t));
    load_rows(p.q, b, h, t, n, p.D, w.q, Dp);
    for (int i = 0; i < n; ++i) {
      const float *acc = w.acc + (t - t0 + i) * 2 * Dp, *peak = w.peak + (t - t0 + i) * Dp;
      const int64_t at = (item * p.T + t + i) * p.D;
      for_row(p.D, [&](int64_t c, int m) {
        const Vec num = Vec::load(acc + c), den = Vec::load(acc + Dp + c);
        const Vec y = select(less(Vec::zero(), den), num / den, den * Vec::zero());
        (sigmoid(Vec::load(w.q + i * Dp + c)) * y).store(w.q + i * Dp + c);
        if (p.y) store_some(p.y + at + c, y, m), store_some(p.den + at + c, den, m);
        if (!p.y) return;
        const Vec own = select(less(Vec::zero(), den), Vec::load(peak + c), Vec::set1(INFINITY));  // what sees nothing weighs 0
        store_some(p.peak + at + c, products ? Vec::zero() : own, m);
      });
    }
    store_rows(p.o, b, h, t, n, 0, p.D, w.q, Dp);
  }
}

}  // namespace

// Defined in aft_bwd_cpu.inl.
void aft_query_block(const AftProblem& p, int64_t item, int64_t block, float* scratch);
void aft_key_gradients(const AftProblem& p, int64_t item, int64_t j0, int64_t j1, float* scratch);
void aft_bias_gradients(const AftProblem& p, int64_t h, int64_t t0, int64_t t1, float* dbias, int64_t st, float* scratch);

extern const AftKernels aft_kernels = {
    Vec::W,       scratch_floats, bias_rows, key_block,         aft_query_block,
    gather_stats, scan,           outputs,   aft_key_gradients, aft_bias_gradients,
};

}  // namespace mlcore::MLC_ISA
