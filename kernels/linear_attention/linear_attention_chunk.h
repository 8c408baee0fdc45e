// What forward and backward share about one chunk: its operands in fp32 (Slot), a thread's temporaries (Work), decay factors
// and the scores of all pairs. Matrices are row-major; rows are tokens, or head dimensions for states.
#pragma once
#include <math.h>

#include "core/simd/gemm.h"
#include "core/simd/products.h"
#include "core/simd/token_rows.h"
#include "linear_attention/linear_attention_kernels.h"

namespace mlcore::MLC_ISA {

constexpr int C = kChunk;
constexpr int kSub = 16, kSubs = C / kSub;  // tokens that share a base of vector gates
constexpr float kLowest = -200.0f;          // of a gate in log2: 0 in fp32, and small enough that sums of a chunk stay exact

inline int64_t state_size(const LinearAttentionProblem& p) { return p.D * padded(p.Dv) + padded(p.D); }

// q, k: after the feature map. With a gate of log-sums b (inclusive, within the chunk): qd = q exp(b), kb = k exp(b),
// kd = k exp(b[last] - b), carry = exp(b[last]); without they are q, k, k and ones.
struct Slot {
  int64_t size;
  float *q, *k, *qd, *kd, *kb;            // (C, D)
  float* v;                               // (C, Dv)
  float *st, *wt;                         // (keys, queries): scores of q, and of k as queries (delta)
  float *u, *beta;                        // delta: (C, Dv), (C)
  float *decay, *fq, *fk;                 // scalar gate: (keys, queries) exp(b[i] - b[j]), (C) exp(b), (C) exp(b[last] - b)
  float *a, *lq, *lk, *logs, *pre, *suf;  // vector gate: see vector_decay
  float* carry;                           // (D)
  float *rowsum, *ksum;                   // (C), (D): sums of st over keys, of kd over tokens
  float* state;                           // before the chunk; until scan() what the chunk adds
  float *d_o, *dden, *e, *du;             // backward: (C, Dv), (C), (C, Dv), (C, Dv)
  float *d_state, *dksum;                 // backward: the gradient that arrives behind the chunk, as state; sum of dden qd (D)

  Slot(const LinearAttentionProblem& p, float* base, bool backward) {
    Arena arena(base);
    const int64_t Dp = padded(p.D), Vp = padded(p.Dv);
    const auto some = [&](bool wanted, int64_t floats) { return wanted ? arena.take(floats) : nullptr; };
    const bool gated = p.gated != Gate::none, scalar = p.gated == Gate::scalar, vector = p.gated == Gate::vector;
    q = arena.take(C * Dp), k = arena.take(C * Dp), v = arena.take(C * Vp), st = arena.take(C * C);
    qd = gated ? arena.take(C * Dp) : q, kd = gated ? arena.take(C * Dp) : k;
    kb = gated && p.delta() ? arena.take(C * Dp) : k;
    wt = some(p.delta(), C * C), u = some(p.delta(), C * Vp), beta = some(p.delta(), C);
    decay = some(scalar, C * C), fq = some(scalar, C), fk = some(scalar, C);
    a = some(vector, C * Dp), lq = some(vector, C * Dp), lk = some(vector, C * Dp);
    logs = some(vector, kSubs * Dp), pre = some(vector, kSubs * Dp), suf = some(vector, kSubs * Dp);
    carry = some(gated, Dp);
    rowsum = arena.take(C), ksum = arena.take(Dp);
    state = arena.take(state_size(p));
    d_o = some(backward, C * Vp), dden = some(backward, C);
    e = some(backward && p.delta(), C * Vp), du = some(backward && p.delta(), C * Vp);
    d_state = some(backward, state_size(p)), dksum = some(backward, Dp);
    size = arena.used;
  }
  const float* values(const LinearAttentionProblem& p) const { return p.delta() ? u : v; }
};

struct Work {
  int64_t size;
  float *turned, *o, *o2;       // (max(D, Dv), C), (C, Dv), (C, Dv)
  float *x, *dq, *dk, *dk2;     // (C, D)
  float *pairs, *state_turned;  // (C, C), (Dv, D)
  float* row;                   // (max(D, Dv, C))

  Work(const LinearAttentionProblem& p, float* base) {
    Arena arena(base);
    const int64_t Dp = padded(p.D), Vp = padded(p.Dv), most = max(Dp, Vp);
    turned = arena.take(most * C), o = arena.take(C * Vp), o2 = arena.take(C * Vp);
    x = arena.take(C * Dp), dq = arena.take(C * Dp), dk = arena.take(C * Dp), dk2 = arena.take(C * Dp);
    pairs = arena.take(C * C), state_turned = arena.take(Vp * Dp), row = arena.take(max<int64_t>(most, C) + 16);
    size = arena.used;
  }
};

inline void load_rows(const Tokens& x, const Item& item, int64_t t, int n, int64_t cols, float* dst) {
  load_rows(x, item.b, item.h, item.start + t, n, cols, dst, padded(cols));
}
inline void store_rows(const Tokens& x, const Item& item, int64_t t, int n, int64_t c0, int64_t c1, const float* src,
                       int64_t ld) {
  store_rows(x, item.b, item.h, item.start + t, n, c0, c1, src, ld);
}

inline void load_numbers(const Tokens& x, const Item& item, int64_t t, int n, float* dst) {
  with_type(x.dtype, [&](auto tag) {
    for (int i = 0; i < n; ++i) dst[i] = to_float(*token<decltype(tag)>(x, item.b, item.h, item.start + t + i));
  });
}

// phi in place, on rows of cols (padded: the padding stays 0).
inline void apply_map(FeatureMap map, int n, int64_t cols, float* x) {
  const int64_t ld = padded(cols);
  if (map == FeatureMap::none) return;
  for (int i = 0; i < n; ++i) {
    float* row = x + i * ld;
    if (map == FeatureMap::elu) {
      for_row(cols, [&](int64_t c, int m) {
        const Vec y = Vec::load(row + c);
        const Vec below = exp2(min(Vec::zero(), y) * Vec::set1(static_cast<float>(kLog2e)));
        keep_some(select(less(Vec::zero(), y), y + Vec::set1(1.0f), below), m).store(row + c);
      });
    } else if (map == FeatureMap::relu) {
      for_row(cols, [&](int64_t c, int) { max(Vec::zero(), Vec::load(row + c)).store(row + c); });
    } else {
      Vec top = Vec::set1(-INFINITY);
      for_row(cols, [&](int64_t c, int m) {
        const Vec y = Vec::load(row + c);
        top = max(top, m == Vec::W ? y : select((1u << m) - 1u, y, Vec::set1(-INFINITY)));
      });
      const Vec peak = Vec::set1(hmax(top));
      const float total = sum_row(cols, [&](int64_t c, int m) {
        const Vec y = keep_some(exp2((Vec::load(row + c) - peak) * Vec::set1(static_cast<float>(kLog2e))), m);
        y.store(row + c);
        return y;
      });
      for_row(cols, [&](int64_t c, int) { (Vec::load(row + c) * Vec::set1(1.0f / total)).store(row + c); });
    }
  }
}

// dx from dy, in place, where y = phi(x): both are functions of y.
inline void map_gradient(FeatureMap map, int n, int64_t cols, const float* y, float* dy) {
  const int64_t ld = padded(cols);
  if (map == FeatureMap::none) return;
  for (int i = 0; i < n; ++i) {
    const float* phi = y + i * ld;
    float* d = dy + i * ld;
    if (map == FeatureMap::softmax) {
      const Vec mean = Vec::set1(sum_row(cols, [&](int64_t c, int) { return Vec::load(phi + c) * Vec::load(d + c); }));
      for_row(cols, [&](int64_t c, int) { ((Vec::load(d + c) - mean) * Vec::load(phi + c)).store(d + c); });
    } else {
      for_row(cols, [&](int64_t c, int) {
        const Vec f = Vec::load(phi + c), g = Vec::load(d + c);
        const Vec out = map == FeatureMap::elu ? g * min(Vec::set1(1.0f), f) : select(less(Vec::zero(), f), g, Vec::zero());
        out.store(d + c);
      });
    }
  }
}

// out[r, :] = x[r, :] * factors, for the rows of one sub-chunk or any other range.
inline void scale_rows(int64_t begin, int64_t end, int64_t ld, const float* x, const float* per_row, float* out) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t c = 0; c < ld; c += Vec::W) (Vec::load(x + i * ld + c) * Vec::set1(per_row[i])).store(out + i * ld + c);
}
inline void multiply_rows(int64_t begin, int64_t end, int64_t ld, const float* x, const float* rows, const float* per_column,
                          float* out) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t c = 0; c < ld; c += Vec::W) {
      Vec y = Vec::load(x + i * ld + c) * Vec::load(rows + i * ld + c);
      if (per_column) y = y * Vec::load(per_column + c);
      y.store(out + i * ld + c);
    }
}

// Sums of gates in double, split into two floats: their differences are then exact to the last bits also behind a gate of -200.
inline void scalar_decay(const LinearAttentionProblem& p, const Item& item, int64_t t, int n, const Slot& s) {
  float gate[C], high[C], low[C], to_end[C];
  load_numbers(p.gate, item, t, n, gate);
  double b = 0, sums[C];
  for (int i = 0; i < C; ++i) {
    if (i < n) {
      const double x = gate[i] * kLog2e;
      b += x < kLowest ? kLowest : x;
    }
    sums[i] = b;
    high[i] = static_cast<float>(b), low[i] = static_cast<float>(b - high[i]);
  }
  for (int i = 0; i < C; ++i) to_end[i] = static_cast<float>(b - sums[i]);
  for (int i = 0; i < C; i += Vec::W) {
    power(Vec::load(high + i)).store(s.fq + i);
    power(Vec::load(to_end + i)).store(s.fk + i);
  }
  for (int64_t c = 0; c < padded(p.D); ++c) s.carry[c] = s.fq[n - 1];
  for (int j = 0; j < n; ++j) {
    const Vec hj = Vec::set1(high[j]), lj = Vec::set1(low[j]);
    for (int i = j / Vec::W * Vec::W; i < n; i += Vec::W)
      power((Vec::load(high + i) - hj) + (Vec::load(low + i) - lj)).store(s.decay + j * C + i);
  }
  const int64_t Dp = padded(p.D);
  scale_rows(0, n, Dp, s.q, s.fq, s.qd);
  scale_rows(0, n, Dp, s.k, s.fk, s.kd);
  if (p.delta()) scale_rows(0, n, Dp, s.k, s.fq, s.kb);
}

// Vector gates, per sub-chunk of kSub tokens: a = exp(g) of each token, lq = exp(sum from the sub-chunk's start up to and with
// the token), lk = exp(sum behind the token to the sub-chunk's end), logs the whole sum; pre and suf = exp(sums of the
// sub-chunks before and behind). All of them sums of few terms: nothing is subtracted, so nothing cancels behind a large gate.
inline void vector_decay(const LinearAttentionProblem& p, const Item& item, int64_t t, int n, const Slot& s) {
  const int64_t Dp = padded(p.D);
  load_rows(p.gate, item, t, n, p.D, s.a);
  const int subs = ceil_div(n, kSub);
  for (int64_t c = 0; c < Dp; c += Vec::W) {
    Vec total = Vec::zero();
    for (int I = 0; I < subs; ++I) {
      const int begin = I * kSub, end = min(n, begin + kSub);
      Vec sum = Vec::zero();
      for (int i = begin; i < end; ++i) {
        const Vec g = max(Vec::set1(kLowest), Vec::load(s.a + i * Dp + c) * Vec::set1(static_cast<float>(kLog2e)));
        sum = sum + g;
        power(sum).store(s.lq + i * Dp + c);
        g.store(s.a + i * Dp + c);
      }
      sum.store(s.logs + I * Dp + c);
      power(total).store(s.pre + I * Dp + c);
      total = total + sum;
      Vec behind = Vec::zero();
      for (int i = end - 1; i >= begin; --i) {
        power(behind).store(s.lk + i * Dp + c);
        const Vec g = Vec::load(s.a + i * Dp + c);
        behind = behind + g;
        power(g).store(s.a + i * Dp + c);
      }
    }
    power(total).store(s.carry + c);
    Vec behind = Vec::zero();
    for (int I = subs - 1; I >= 0; --I) {
      power(behind).store(s.suf + I * Dp + c);
      behind = behind + Vec::load(s.logs + I * Dp + c);
    }
  }
  for (int I = 0; I < subs; ++I) {
    const int begin = I * kSub, end = min(n, begin + kSub);
    multiply_rows(begin, end, Dp, s.q, s.lq, s.pre + I * Dp, s.qd);
    multiply_rows(begin, end, Dp, s.k, s.lk, s.suf + I * Dp, s.kd);
    if (p.delta()) multiply_rows(begin, end, Dp, s.k, s.lq, s.pre + I * Dp, s.kb);
  }
}

// Keys (or with x = nullptr the factors alone) of the sub-chunks before I, decayed up to I's first token: (kSub * I, D).
inline void decay_to_sub(const LinearAttentionProblem& p, const Slot& s, int I, const float* x, float* out, float* row) {
  const int64_t Dp = padded(p.D);
  for (int64_t c = 0; c < Dp; c += Vec::W) Vec::zero().store(row + c);  // sum of the sub-chunks between
  for (int J = I - 1; J >= 0; --J) {
    for (int64_t c = 0; c < Dp; c += Vec::W) {
      const Vec between = power(Vec::load(row + c));
      for (int j = J * kSub; j < (J + 1) * kSub; ++j) {
        const Vec f = Vec::load(s.lk + j * Dp + c) * between;
        (x ? f * Vec::load(x + j * Dp + c) : f).store(out + j * Dp + c);
      }
      (Vec::load(row + c) + Vec::load(s.logs + J * Dp + c)).store(row + c);
    }
  }
}

// Zeros where query i comes before key j (strict: or is it), decays elsewhere.
inline void mask_pairs(int n, bool strict, const float* decay, float* pairs) {
  for (int j = 0; j < n; ++j) {
    const int own = j / Vec::W * Vec::W;
    for (int i = own; i < n; i += Vec::W) {
      Vec x = Vec::load(pairs + j * C + i);
      if (decay) x = x * Vec::load(decay + j * C + i);
      if (i == own) x = select(~0u << (j - own + (strict ? 1 : 0)), x, Vec::zero());
      x.store(pairs + j * C + i);
    }
  }
}

// out[j, i] (M rows j, queries from the first one that any of the rows j may meet) = <x[j, :], turned[:, i]>, in steps of 16
// rows.
inline void pair_products(int n, int64_t depth, const float* x, int64_t ldx, const float* turned, float* out) {
  for (int j = 0; j < n; j += kSub)
    product<A::rows, Take::all>(min(kSub, n - j), padded(n - j), depth, x + j * ldx, ldx, turned + j, C, out + j * C + j, C,
                                Into::store);
}

// out[j, i] = sum_d q[i, d] k[j, d] exp(b[i, d] - b[j, d]) for j <= i (strict: j < i), else 0; q the queries, s.k the keys.
inline void scores(const LinearAttentionProblem& p, int n, const Slot& s, const float* q, bool strict, float* out,
                   const Work& w) {
  const int64_t Dp = padded(p.D);
  if (p.gated != Gate::vector) {
    turn(q, Dp, n, p.D, C, w.turned);
    pair_products(n, p.D, s.k, Dp, w.turned, out);
    return mask_pairs(n, strict, s.decay, out);
  }
  for (int I = 0; I * kSub < n; ++I) {
    const int i0 = I * kSub, m = min(kSub, n - i0);
    if (I > 0) {
      multiply_rows(i0, i0 + m, Dp, q, s.lq, nullptr, w.dq);
      turn(w.dq + i0 * Dp, Dp, m, p.D, kSub, w.turned);
      decay_to_sub(p, s, I, s.k, w.x, w.row);
      product<A::rows, Take::all>(i0, padded(m), p.D, w.x, Dp, w.turned, kSub, out + i0, C, Into::store);
    }
    for (int j = 0; j < m; ++j) {
      Vec acc[kSub];
      for (int i = j; i < m; ++i) acc[i] = Vec::zero();
      for (int64_t c = 0; c < Dp; c += Vec::W) {
        Vec x = Vec::load(s.k + (i0 + j) * Dp + c);
        for (int i = j; i < m; ++i) {
          if (i > j) x = x * Vec::load(s.a + (i0 + i) * Dp + c);
          acc[i] = fma(Vec::load(q + (i0 + i) * Dp + c), x, acc[i]);
        }
      }
      for (int i = j; i < m; ++i) out[(i0 + j) * C + i0 + i] = sum(acc[i]);
    }
  }
  mask_pairs(n, strict, nullptr, out);
}

inline int chunk_rows(int64_t length, int64_t t) { return static_cast<int>(min<int64_t>(C, length - t)); }

// The rows of d_o, divided by the denominators, and the gradient of those, in dst and dden.
inline void load_output_gradient(const LinearAttentionProblem& p, const Item& item, int64_t t, int n, float* dst, float* dden,
                                 float* o) {
  const int64_t Vp = padded(p.Dv);
  load_rows(p.d_o, item, t, n, p.Dv, dst);
  if (!p.normalize) return;
  load_rows(p.o, item, t, n, p.Dv, o);
  const float* den = p.den + (item.b * p.H + item.h) * p.Tq + item.start + t;
  for (int i = 0; i < n; ++i) {
    const float inverse = den[i] == 0.0f ? 0.0f : 1.0f / den[i];
    float* d = dst + i * Vp;
    const float dot = sum_row(p.Dv, [&](int64_t c, int) { return Vec::load(d + c) * Vec::load(o + i * Vp + c); });
    dden[i] = den[i] == 0.0f ? 0.0f : -dot * inverse;
    for_row(p.Dv, [&](int64_t c, int) { (den[i] == 0.0f ? Vec::zero() : Vec::load(d + c) * Vec::set1(inverse)).store(d + c); });
  }
}

}  // namespace mlcore::MLC_ISA
