// The backward over chunks: gradients of states and values on the way back, then those of queries, keys, gates and beta, which
// need the states from both sides. The derivation is in README.md.
#include "linear_attention/linear_attention_chunk.h"

namespace mlcore::MLC_ISA {

void linear_attention_reverse(const LinearAttentionProblem& p, const Item& item, int64_t t, float* slot, float* d_state,
                              int64_t c0, int64_t c1, float* scratch) {
  const Slot s(p, slot, true);
  const Work w(p, scratch);
  const int64_t Dp = padded(p.D), Vp = padded(p.Dv), N = c1 - c0;
  const int n = chunk_rows(item.q_length, t);
  for (int64_t d = 0; d < p.D; ++d)
    for (int64_t c = c0; c < c1; c += Vec::W) Vec::load(d_state + d * Vp + c).store(s.d_state + d * Vp + c);
  float* du = s.du + c0;
  product<A::rows, Take::from_row>(n, N, n, s.st, C, s.d_o + c0, Vp, du, Vp, Into::store);
  product<A::rows, Take::all>(n, N, p.D, s.kd, Dp, d_state + c0, Vp, du, Vp, Into::add);
  product<A::columns, Take::all>(p.D, N, n, s.qd, Dp, s.d_o + c0, Vp, d_state + c0, Vp, s.carry ? Into::decay_add : Into::add,
                                 s.carry);
  // Backward substitution; minus_de is what v's negative gets.
  float *minus_de = w.o2 + c0, *dv = w.o + c0;
  constexpr int kBlock = 8;
  for (int end = n; end > 0; end = (end - 1) / kBlock * kBlock) {
    const int i0 = (end - 1) / kBlock * kBlock;
    if (end < n)
      product<A::rows, Take::all>(end - i0, N, n - end, s.wt + i0 * C + end, C, minus_de + end * Vp, Vp, du + i0 * Vp, Vp,
                                  Into::add);
    for (int i = end - 1; i >= i0; --i) {
      for (int m = i + 1; m < end; ++m)
        for (int64_t c = 0; c < N; c += Vec::W)
          fma(Vec::set1(s.wt[i * C + m]), Vec::load(minus_de + m * Vp + c), Vec::load(du + i * Vp + c)).store(du + i * Vp + c);
      for (int64_t c = 0; c < N; c += Vec::W) {
        const Vec de = Vec::load(du + i * Vp + c) * Vec::set1(s.beta[i]);
        de.store(dv + i * Vp + c);
        (Vec::zero() - de).store(minus_de + i * Vp + c);
      }
    }
  }
  product<A::columns, Take::all>(p.D, N, n, s.kb, Dp, minus_de, Vp, d_state + c0, Vp, Into::add);
  store_rows(p.dv, item, t, n, c0, min(c1, p.Dv), w.o, Vp);
}

namespace {

// Multiplies the rows of dq (from: exp(b)) or dk (to the end: exp(b[last] - b)) of a chunk by their gate's factors.
void apply_factors(const LinearAttentionProblem& p, int n, const Slot& s, bool from_start, float* x) {
  const int64_t Dp = padded(p.D);
  if (p.gated == Gate::scalar) scale_rows(0, n, Dp, x, from_start ? s.fq : s.fk, x);
  if (p.gated == Gate::vector)
    for (int I = 0; I * kSub < n; ++I)
      multiply_rows(I * kSub, min(n, (I + 1) * kSub), Dp, x, from_start ? s.lq : s.lk, (from_start ? s.pre : s.suf) + I * Dp,
                    x);
}

// The pairs' part of the gradients: pairs[j, i] is that of the score of key j and query i, before its decay; 0 where masked.
//   dq[i] += sum_j pairs[j, i] k[j] exp(b[i] - b[j]),  dk[j] += sum_i pairs[j, i] q[i] exp(b[i] - b[j])
void add_pair_gradients(const LinearAttentionProblem& p, int n, const Slot& s, const float* q, const float* pairs, float* dq,
                        float* dk, const Work& w) {
  const int64_t Dp = padded(p.D);
  if (p.gated != Gate::vector) {
    product<A::columns, Take::up_to_row>(n, Dp, n, pairs, C, s.k, Dp, dq, Dp, Into::add);
    product<A::rows, Take::from_row>(n, Dp, n, pairs, C, q, Dp, dk, Dp, Into::add);
    return;
  }
  float *keys = w.x, *local = w.turned;  // turned has the room of (C, D)
  for (int I = 0; I * kSub < n; ++I) {
    const int i0 = I * kSub, m = min(kSub, n - i0);
    if (I > 0) {
      decay_to_sub(p, s, I, s.k, keys, w.row);
      product<A::columns, Take::all>(m, Dp, i0, pairs + i0, C, keys, Dp, local, Dp, Into::store);
      for (int i = 0; i < m; ++i)
        for (int64_t c = 0; c < Dp; c += Vec::W) {
          float* out = dq + (i0 + i) * Dp + c;
          fma(Vec::load(local + i * Dp + c), Vec::load(s.lq + (i0 + i) * Dp + c), Vec::load(out)).store(out);
        }
      for (int i = 0; i < m; ++i)
        for (int64_t c = 0; c < Dp; c += Vec::W)
          (Vec::load(q + (i0 + i) * Dp + c) * Vec::load(s.lq + (i0 + i) * Dp + c)).store(local + i * Dp + c);
      decay_to_sub(p, s, I, nullptr, keys, w.row);  // the keys' factors
      float* sums = local + kSub * Dp;              // (kSub, D)
      for (int j = 0; j < i0; j += kSub) {
        product<A::rows, Take::all>(kSub, Dp, m, pairs + j * C + i0, C, local, Dp, sums, Dp, Into::store);
        for (int64_t c = 0; c < kSub * Dp; c += Vec::W) {
          float* out = dk + j * Dp + c;
          fma(Vec::load(sums + c), Vec::load(keys + j * Dp + c), Vec::load(out)).store(out);
        }
      }
    }
    for (int j = 0; j < m; ++j)
      for (int64_t c = 0; c < Dp; c += Vec::W) {
        const Vec key = Vec::load(s.k + (i0 + j) * Dp + c);
        Vec factor = Vec::set1(1.0f), total = Vec::zero();
        for (int i = j; i < m; ++i) {
          if (i > j) factor = factor * Vec::load(s.a + (i0 + i) * Dp + c);
          const Vec x = factor * Vec::set1(pairs[(i0 + j) * C + i0 + i]);
          float* out = dq + (i0 + i) * Dp + c;
          fma(x, key, Vec::load(out)).store(out);
          total = fma(x, Vec::load(q + (i0 + i) * Dp + c), total);
        }
        float* out = dk + (i0 + j) * Dp + c;
        (Vec::load(out) + total).store(out);
      }
  }
}

// out[r, :] = x[r, :] (rows, cols) S^T (cols, D), through the turned state.
void times_state_turned(const LinearAttentionProblem& p, int n, const float* x, const float* state, float* out, const Work& w,
                        Into into) {
  const int64_t Dp = padded(p.D), Vp = padded(p.Dv);
  turn(state, Vp, static_cast<int>(p.D), p.Dv, Dp, w.state_turned);
  product<A::rows, Take::all>(n, Dp, p.Dv, x, Vp, w.state_turned, Dp, out, Dp, into);
}

void add_row_products(int n, int64_t Dp, const float* per_row, const float* row, float* out) {
  for (int i = 0; i < n; ++i)
    for (int64_t c = 0; c < Dp; c += Vec::W)
      fma(Vec::set1(per_row ? per_row[i] : 1.0f), Vec::load(row + c), Vec::load(out + i * Dp + c)).store(out + i * Dp + c);
}

// dgate of the chunk. What a gate decays is everything that passes it: sums from the end, over the tokens behind it, of
// q dq - k dk, plus what leaves the chunk, S dS. dkq: the gradient of k as a query (delta), or null.
void gate_gradients(const LinearAttentionProblem& p, const Item& item, int64_t t, int n, const Slot& s, const float* next_state,
                    const float* dq, const float* dk, const float* dkq, float* row) {
  const int64_t Dp = padded(p.D), Vp = padded(p.Dv);
  const float *z = next_state + p.D * Vp, *dz = s.d_state + p.D * Vp;
  for (int64_t d = 0; d < p.D; ++d) {
    row[d] =
        sum_row(Vp, [&](int64_t c, int) { return Vec::load(next_state + d * Vp + c) * Vec::load(s.d_state + d * Vp + c); });
    if (p.normalize) row[d] += z[d] * dz[d];
  }
  const int64_t first = (item.b * p.H + item.h) * p.Tq + item.start + t;
  const auto term = [&](int i, int64_t c) {
    const int64_t at = i * Dp + c;
    Vec x = Vec::load(s.q + at) * Vec::load(dq + at) - Vec::load(s.k + at) * Vec::load(dk + at);
    return dkq ? fma(Vec::load(s.k + at), Vec::load(dkq + at), x) : x;
  };
  if (p.gated == Gate::scalar) {
    float gate[C];
    load_numbers(p.gate, item, t, n, gate);
    double total = 0;
    for (int64_t d = 0; d < p.D; ++d) total += row[d];
    for (int i = n - 1; i >= 0; --i) {
      total += sum_row(Dp, [&](int64_t c, int) { return term(i, c); });
      p.dgate[first + i] = gate[i] * kLog2e < kLowest ? 0.0f : static_cast<float>(total);
    }
    return;
  }
  for (int64_t d = p.D; d < Dp; ++d) row[d] = 0;
  for (int i = n - 1; i >= 0; --i)
    for_row(p.D, [&](int64_t c, int m) {
      const Vec total = Vec::load(row + c) + term(i, c);
      total.store(row + c);
      const Vec open = select(less(Vec::zero(), Vec::load(s.a + i * Dp + c)), total, Vec::zero());
      store_some(p.dgate + (first + i) * p.D + c, open, m);
    });
}

}  // namespace

void linear_attention_gradients(const LinearAttentionProblem& p, const Item& item, int64_t t, float* slot, float* next_slot,
                                const float* state, float* scratch) {
  const Slot s(p, slot, true);
  const float* next_state = next_slot ? Slot(p, next_slot, true).state : state;
  const Work w(p, scratch);
  const int64_t Dp = padded(p.D), Vp = padded(p.Dv);
  const int n = chunk_rows(item.q_length, t);
  const float* values = s.values(p);
  times_state_turned(p, n, s.d_o, s.state, w.dq, w, Into::store);
  times_state_turned(p, n, values, s.d_state, w.dk, w, Into::store);
  if (p.normalize) {
    add_row_products(n, Dp, s.dden, s.state + p.D * Vp, w.dq);
    add_row_products(n, Dp, nullptr, s.d_state + p.D * Vp, w.dk);
  }
  apply_factors(p, n, s, true, w.dq);
  apply_factors(p, n, s, false, w.dk);

  turn(s.d_o, Vp, n, p.Dv, C, w.turned);
  pair_products(n, p.Dv, values, Vp, w.turned, w.pairs);
  if (p.normalize)
    for (int j = 0; j < n; ++j)
      for (int i = j / Vec::W * Vec::W; i < n; i += Vec::W)
        (Vec::load(w.pairs + j * C + i) + load_some(s.dden + i, min(n - i, Vec::W))).store(w.pairs + j * C + i);
  mask_pairs(n, false, s.decay, w.pairs);
  add_pair_gradients(p, n, s, s.q, w.pairs, w.dq, w.dk, w);

  if (!p.delta()) {  // else reverse() has stored it
    product<A::rows, Take::from_row>(n, Vp, n, s.st, C, s.d_o, Vp, w.o, Vp, Into::store);
    product<A::rows, Take::all>(n, Vp, p.D, s.kd, Dp, s.d_state, Vp, w.o, Vp, Into::add);
    store_rows(p.dv, item, t, n, 0, p.Dv, w.o, Vp);
  }
  float* dkq = nullptr;
  if (p.delta()) {  // k reads the state before its token, with values u and the gradient -de
    dkq = w.dk2;
    float* minus_de = w.o;
    for (int i = 0; i < n; ++i) {
      float dot = 0;
      for (int64_t c = 0; c < Vp; c += Vec::W)
        (Vec::load(s.du + i * Vp + c) * Vec::set1(-s.beta[i])).store(minus_de + i * Vp + c);
      dot = sum_row(Vp, [&](int64_t c, int) { return Vec::load(s.du + i * Vp + c) * Vec::load(s.e + i * Vp + c); });
      if (p.dbeta) p.dbeta[(item.b * p.H + item.h) * p.Tq + item.start + t + i] = dot;
    }
    times_state_turned(p, n, minus_de, s.state, dkq, w, Into::store);
    apply_factors(p, n, s, true, dkq);
    turn(minus_de, Vp, n, p.Dv, C, w.turned);
    pair_products(n, p.Dv, values, Vp, w.turned, w.pairs);
    mask_pairs(n, true, s.decay, w.pairs);
    add_pair_gradients(p, n, s, s.k, w.pairs, dkq, w.dk, w);
  }
  if (p.dgate) gate_gradients(p, item, t, n, s, next_state, w.dq, w.dk, dkq, w.row);
  if (dkq)
    for (int64_t c = 0; c < n * Dp; c += Vec::W) (Vec::load(w.dk + c) + Vec::load(dkq + c)).store(w.dk + c);
  map_gradient(p.map, n, p.D, s.q, w.dq);
  map_gradient(p.map, n, p.D, s.k, w.dk);
  store_rows(p.dq, item, t, n, 0, p.D, w.dq, Dp);
  store_rows(p.dk, item, t, n, 0, p.D, w.dk, Dp);
}

// Not causal.

void linear_attention_gather_queries(const LinearAttentionProblem& p, const Item& item, int64_t t, float* d_state, int64_t c0,
                                     int64_t c1, float* scratch) {
  const Work w(p, scratch);
  const int64_t Dp = padded(p.D), Vp = padded(p.Dv);
  const int n = chunk_rows(item.q_length, t);
  load_rows(p.q, item, t, n, p.D, w.x);
  apply_map(p.map, n, p.D, w.x);
  float* dden = w.row;
  load_output_gradient(p, item, t, n, w.o, dden, w.o2);
  product<A::columns, Take::all>(p.D, c1 - c0, n, w.x, Dp, w.o + c0, Vp, d_state + c0, Vp, Into::add);
  if (p.normalize && c0 == 0) {
    float* dz = d_state + p.D * Vp;
    for (int64_t c = 0; c < Dp; c += Vec::W) {
      Vec total = Vec::zero();
      for (int i = 0; i < n; ++i) total = fma(Vec::set1(dden[i]), Vec::load(w.x + i * Dp + c), total);
      (Vec::load(dz + c) + total).store(dz + c);
    }
  }
}

void linear_attention_query_gradients(const LinearAttentionProblem& p, const Item& item, int64_t t, const float* state,
                                      float* scratch) {
  const Work w(p, scratch);
  const int64_t Dp = padded(p.D), Vp = padded(p.Dv);
  const int n = chunk_rows(item.q_length, t);
  load_rows(p.q, item, t, n, p.D, w.x);
  apply_map(p.map, n, p.D, w.x);
  load_output_gradient(p, item, t, n, w.o, w.row, w.o2);
  times_state_turned(p, n, w.o, state, w.dq, w, Into::store);
  if (p.normalize) add_row_products(n, Dp, w.row, state + p.D * Vp, w.dq);
  map_gradient(p.map, n, p.D, w.x, w.dq);
  store_rows(p.dq, item, t, n, 0, p.D, w.dq, Dp);
}

void linear_attention_key_gradients(const LinearAttentionProblem& p, const Item& item, int64_t t, const float* d_state,
                                    float* scratch) {
  const Work w(p, scratch);
  const int64_t Dp = padded(p.D), Vp = padded(p.Dv);
  const int n = chunk_rows(item.k_length, t);
  load_rows(p.k, item, t, n, p.D, w.x);
  apply_map(p.map, n, p.D, w.x);
  load_rows(p.v, item, t, n, p.Dv, w.o);
  times_state_turned(p, n, w.o, d_state, w.dk, w, Into::store);
  if (p.normalize) add_row_products(n, Dp, nullptr, d_state + p.D * Vp, w.dk);
  product<A::rows, Take::all>(n, Vp, p.D, w.x, Dp, d_state, Vp, w.o2, Vp, Into::store);
  map_gradient(p.map, n, p.D, w.x, w.dk);
  store_rows(p.dk, item, t, n, 0, p.D, w.dk, Dp);
  store_rows(p.dv, item, t, n, 0, p.Dv, w.o2, Vp);
}

}  // namespace mlcore::MLC_ISA
