// The forward over chunks, the forms without causality, and one step. The equations are in linear_attention.h.
#include "linear_attention/linear_attention_chunk.h"

namespace mlcore::MLC_ISA {
namespace {

int64_t slot_floats(const LinearAttentionProblem& p, bool backward) { return Slot(p, nullptr, backward).size; }
int64_t scratch_floats(const LinearAttentionProblem& p) { return Work(p, nullptr).size; }

void load_state(const LinearAttentionProblem& p, const float* rows, float* state) {
  const int64_t Vp = padded(p.Dv), cols = p.state_cols();
  float* z = state + p.D * Vp;
  memset(state, 0, sizeof(float) * static_cast<size_t>(state_size(p)));
  if (!rows) return;
  for (int64_t d = 0; d < p.D; ++d) {
    for_row(p.Dv, [&](int64_t c, int m) { load_some(rows + d * cols + c, m).store(state + d * Vp + c); });
    if (p.normalize) z[d] = rows[d * cols + p.Dv];
  }
}

void store_state(const LinearAttentionProblem& p, const float* state, float* rows) {
  const int64_t Vp = padded(p.Dv), cols = p.state_cols();
  const float* z = state + p.D * Vp;
  for (int64_t d = 0; d < p.D; ++d) {
    for_row(p.Dv, [&](int64_t c, int m) { store_some(rows + d * cols + c, Vec::load(state + d * Vp + c), m); });
    if (p.normalize) rows[d * cols + p.Dv] = z[d];
  }
}

void prepare(const LinearAttentionProblem& p, const Item& item, int64_t t, float* slot, float* scratch, bool backward) {
  const Slot s(p, slot, backward);
  const Work w(p, scratch);
  const int64_t Dp = padded(p.D);
  const int n = chunk_rows(item.q_length, t);
  load_rows(p.q, item, t, n, p.D, s.q);
  load_rows(p.k, item, t, n, p.D, s.k);
  load_rows(p.v, item, t, n, p.Dv, s.v);
  apply_map(p.map, n, p.D, s.q);
  apply_map(p.map, n, p.D, s.k);
  if (p.gated == Gate::scalar) scalar_decay(p, item, t, n, s);
  if (p.gated == Gate::vector) vector_decay(p, item, t, n, s);
  scores(p, n, s, s.q, false, s.st, w);
  if (p.delta()) {
    load_numbers(p.beta, item, t, n, s.beta);
    scores(p, n, s, s.k, true, s.wt, w);
  }
  if (p.normalize) {
    for (int i = 0; i < n; i += Vec::W) {
      Vec total = Vec::zero();
      for (int j = 0; j < min(n, i + Vec::W); ++j) total = total + Vec::load(s.st + j * C + i);
      total.store(s.rowsum + i);
    }
    for (int64_t c = 0; c < Dp; c += Vec::W) {
      Vec total = Vec::zero();
      for (int j = 0; j < n; ++j) total = total + Vec::load(s.kd + j * Dp + c);
      total.store(s.ksum + c);
    }
  }
  if (backward) load_output_gradient(p, item, t, n, s.d_o, s.dden, w.o);
}

// state = carry * state + more, for the rows [d0, d1) of S and of z; what stood there is left in kept.
void scan_rows(const LinearAttentionProblem& p, const float* carry, const float* more, const float* more_z, float* state,
               float* kept, int64_t d0, int64_t d1) {
  const int64_t Vp = padded(p.Dv);
  float *z = state + p.D * Vp, *kept_z = kept + p.D * Vp;
  for (int64_t d = d0; d < d1; ++d) {
    const Vec factor = Vec::set1(carry ? carry[d] : 1.0f);
    for (int64_t c = d * Vp; c < (d + 1) * Vp; c += Vec::W) {
      const Vec before = Vec::load(state + c), added = Vec::load(more + c);
      before.store(kept + c);
      fma(factor, before, added).store(state + c);
    }
    if (!p.normalize) continue;
    const float before = z[d];
    z[d] = (carry ? carry[d] * before : before) + more_z[d];
    kept_z[d] = before;
  }
}

void scan(const LinearAttentionProblem& p, float* slot, float* state, int64_t d0, int64_t d1, bool backward) {
  const Slot s(p, slot, backward);
  scan_rows(p, s.carry, s.state, s.ksum, state, s.state, d0, d1);
}

void reverse_scan(const LinearAttentionProblem& p, float* slot, float* d_state, int64_t d0, int64_t d1) {
  const Slot s(p, slot, true);
  scan_rows(p, s.carry, s.d_state, s.dksum, d_state, s.d_state, d0, d1);
}

// What the chunk adds to the state, and in backward to the state's gradient.
void local_states(const LinearAttentionProblem& p, const Item& item, int64_t t, float* slot, bool backward) {
  const Slot s(p, slot, backward);
  const int64_t Dp = padded(p.D), Vp = padded(p.Dv);
  const int n = chunk_rows(item.q_length, t);
  product<A::columns, Take::all>(p.D, Vp, n, s.kd, Dp, s.v, Vp, s.state, Vp, Into::store);
  if (!backward) return;
  product<A::columns, Take::all>(p.D, Vp, n, s.qd, Dp, s.d_o, Vp, s.d_state, Vp, Into::store);
  if (!p.normalize) return;
  for (int64_t c = 0; c < Dp; c += Vec::W) {
    Vec total = Vec::zero();
    for (int i = 0; i < n; ++i) total = fma(Vec::set1(s.dden[i]), Vec::load(s.qd + i * Dp + c), total);
    total.store(s.dksum + c);
  }
}

// One row of n columns: y += x * a.
inline void add_scaled(int64_t n, float a, const float* x, float* y) {
  for (int64_t c = 0; c < n; c += Vec::W) fma(Vec::set1(a), Vec::load(x + c), Vec::load(y + c)).store(y + c);
}

// u of the chunk, by forward substitution, in columns [c0, c1); e, where wanted, is u before beta.
void delta_values(const LinearAttentionProblem& p, int n, const Slot& s, const float* state, int64_t c0, int64_t c1) {
  const int64_t Dp = padded(p.D), Vp = padded(p.Dv), N = c1 - c0;
  float* e = (s.e ? s.e : s.u) + c0;
  float* u = s.u + c0;
  for (int i = 0; i < n; ++i)
    for (int64_t c = 0; c < N; c += Vec::W) Vec::load(s.v + i * Vp + c0 + c).store(e + i * Vp + c);
  product<A::rows, Take::all>(n, N, p.D, s.kb, Dp, state + c0, Vp, e, Vp, Into::subtract);
  constexpr int kBlock = 8;
  for (int i0 = 0; i0 < n; i0 += kBlock) {
    const int end = min(n, i0 + kBlock);
    if (i0 > 0) product<A::columns, Take::all>(end - i0, N, i0, s.wt + i0, C, u, Vp, e + i0 * Vp, Vp, Into::subtract);
    for (int i = i0; i < end; ++i) {
      for (int j = i0; j < i; ++j) add_scaled(N, -s.wt[j * C + i], u + j * Vp, e + i * Vp);
      for (int64_t c = 0; c < N; c += Vec::W) (Vec::load(e + i * Vp + c) * Vec::set1(s.beta[i])).store(u + i * Vp + c);
    }
  }
}

void add_to_state(const LinearAttentionProblem& p, int n, const Slot& s, float* state, int64_t c0, int64_t c1) {
  const int64_t Vp = padded(p.Dv);
  product<A::columns, Take::all>(p.D, c1 - c0, n, s.kd, padded(p.D), s.values(p) + c0, Vp, state + c0, Vp,
                                 s.carry ? Into::decay_add : Into::add, s.carry);
}

void store_output(const LinearAttentionProblem& p, const Item& item, int64_t t, int n, const float* den, int64_t c0, int64_t c1,
                  float* o) {
  const int64_t Vp = padded(p.Dv);
  if (p.normalize)
    for (int i = 0; i < n; ++i) {
      const Vec inverse = Vec::set1(1.0f / den[i]);
      for (int64_t c = c0; c < c1; c += Vec::W)
        (den[i] == 0.0f ? Vec::zero() : Vec::load(o + i * Vp + c) * inverse).store(o + i * Vp + c);
    }
  store_rows(p.o, item, t, n, c0, min(c1, p.Dv), o, Vp);
}

// den of the rows, from the denominators' state z.
float* denominators(const LinearAttentionProblem& p, const Item& item, int64_t t, int n, const float* q, const float* rowsum,
                    const float* z) {
  if (!p.normalize) return nullptr;
  const int64_t Dp = padded(p.D);
  float* den = p.den + (item.b * p.H + item.h) * p.Tq + item.start + t;
  for (int i = 0; i < n; ++i)
    den[i] = (rowsum ? rowsum[i] : 0.0f) +
             sum_row(p.D, [&](int64_t c, int m) { return Vec::load(q + i * Dp + c) * load_some(z + c, m); });
  return den;
}

void chunk_output(const LinearAttentionProblem& p, const Item& item, int64_t t, int n, const Slot& s, const float* state,
                  int64_t c0, int64_t c1, const Work& w) {
  const int64_t Dp = padded(p.D), Vp = padded(p.Dv), N = c1 - c0;
  const float* den = denominators(p, item, t, n, s.qd, s.rowsum, state + p.D * Vp);
  product<A::columns, Take::up_to_row>(n, N, n, s.st, C, s.values(p) + c0, Vp, w.o + c0, Vp, Into::store);
  product<A::rows, Take::all>(n, N, p.D, s.qd, Dp, state + c0, Vp, w.o + c0, Vp, Into::add);
  store_output(p, item, t, n, den, c0, c1, w.o);
}

void outputs(const LinearAttentionProblem& p, const Item& item, int64_t t, float* slot, float* kept, float* scratch) {
  const Slot s(p, slot, false);
  if (kept) store_state(p, s.state, kept);
  chunk_output(p, item, t, chunk_rows(item.q_length, t), s, s.state, 0, padded(p.Dv), Work(p, scratch));
}

void advance(const LinearAttentionProblem& p, const Item& item, int64_t t, float* slot, float* state, int64_t c0, int64_t c1,
             float* scratch) {
  const Slot s(p, slot, false);
  const int n = chunk_rows(item.q_length, t);
  if (p.delta()) delta_values(p, n, s, state, c0, c1);
  chunk_output(p, item, t, n, s, state, c0, c1, Work(p, scratch));
  add_to_state(p, n, s, state, c0, c1);
  if (!p.normalize) return;
  float* z = state + p.D * padded(p.Dv);
  for (int64_t d = 0; d < p.D; ++d) z[d] = (s.carry ? s.carry[d] * z[d] : z[d]) + s.ksum[d];
}

void restate(const LinearAttentionProblem& p, const Item& item, int64_t t, float* slot, float* state, int64_t c0, int64_t c1,
             float*) {
  const Slot s(p, slot, true);
  const int64_t Vp = padded(p.Dv);
  const int n = chunk_rows(item.q_length, t);
  for (int64_t d = 0; d < p.D; ++d)
    for (int64_t c = c0; c < c1; c += Vec::W) Vec::load(state + d * Vp + c).store(s.state + d * Vp + c);
  delta_values(p, n, s, state, c0, c1);
  add_to_state(p, n, s, state, c0, c1);
}

// Not causal.

void gather_keys(const LinearAttentionProblem& p, const Item& item, int64_t t, float* state, int64_t c0, int64_t c1,
                 float* scratch) {
  const Work w(p, scratch);
  const int64_t Dp = padded(p.D), Vp = padded(p.Dv);
  const int n = chunk_rows(item.k_length, t);
  load_rows(p.k, item, t, n, p.D, w.x);
  apply_map(p.map, n, p.D, w.x);
  load_rows(p.v, item, t, n, p.Dv, w.o);
  product<A::columns, Take::all>(p.D, c1 - c0, n, w.x, Dp, w.o + c0, Vp, state + c0, Vp, Into::add);
  if (p.normalize && c0 == 0) {
    float* z = state + p.D * Vp;
    for (int64_t c = 0; c < Dp; c += Vec::W) {
      Vec total = Vec::zero();
      for (int j = 0; j < n; ++j) total = total + Vec::load(w.x + j * Dp + c);
      (Vec::load(z + c) + total).store(z + c);
    }
  }
}

void read_queries(const LinearAttentionProblem& p, const Item& item, int64_t t, const float* state, float* scratch) {
  const Work w(p, scratch);
  const int64_t Dp = padded(p.D), Vp = padded(p.Dv);
  const int n = chunk_rows(item.q_length, t);
  load_rows(p.q, item, t, n, p.D, w.x);
  apply_map(p.map, n, p.D, w.x);
  product<A::rows, Take::all>(n, Vp, p.D, w.x, Dp, state, Vp, w.o, Vp, Into::store);
  store_output(p, item, t, n, denominators(p, item, t, n, w.x, nullptr, state + p.D * Vp), 0, Vp, w.o);
}

void step(const LinearAttentionStep& p, int64_t row_begin, int64_t row_end, float* scratch) {
  const int64_t cols = p.Dv + (p.normalize ? 1 : 0), Dp = padded(p.D), Cp = padded(cols);
  float *q = scratch, *k = q + Dp, *f = k + Dp, *u = f + Dp, *o = u + Cp + 16;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const Item item{0, r / p.H, r % p.H, 0, 1, 1, 0};
    load_rows(p.q, item, 0, 1, p.D, q);
    load_rows(p.k, item, 0, 1, p.D, k);
    apply_map(p.map, 1, p.D, q);
    apply_map(p.map, 1, p.D, k);
    load_rows(p.v, item, 0, 1, p.Dv, u);
    if (p.normalize) u[p.Dv] = 1.0f;
    if (p.gated == Gate::vector) {
      load_rows(p.gate, item, 0, 1, p.D, f);
    } else if (p.gated == Gate::scalar) {
      load_numbers(p.gate, item, 0, 1, f);
      for (int64_t d = 1; d < p.D; ++d) f[d] = f[0];
    }
    for (int64_t d = 0; d < Dp; d += Vec::W)
      (p.gated == Gate::none ? Vec::set1(1.0f) : power(Vec::load(f + d) * Vec::set1(static_cast<float>(kLog2e)))).store(f + d);
    const float* before = p.state + r * p.D * cols;
    float* after = p.new_state + r * p.D * cols;
    if (p.beta.data) {
      float beta;
      load_numbers(p.beta, item, 0, 1, &beta);
      for (int64_t c = 0; c < Cp; c += Vec::W) Vec::zero().store(o + c);
      for (int64_t d = 0; d < p.D; ++d) {
        const Vec x = Vec::set1(k[d] * f[d]);
        for_row(cols, [&](int64_t c, int m) { fma(x, load_some(before + d * cols + c, m), Vec::load(o + c)).store(o + c); });
      }
      for (int64_t c = 0; c < Cp; c += Vec::W) ((Vec::load(u + c) - Vec::load(o + c)) * Vec::set1(beta)).store(u + c);
    }
    for (int64_t c = 0; c < Cp; c += Vec::W) Vec::zero().store(o + c);
    for (int64_t d = 0; d < p.D; ++d) {
      const Vec x = Vec::set1(k[d]), y = Vec::set1(q[d]), factor = Vec::set1(f[d]);
      for_row(cols, [&](int64_t c, int m) {
        const Vec s = fma(x, Vec::load(u + c), factor * load_some(before + d * cols + c, m));
        store_some(after + d * cols + c, s, m);
        fma(y, s, Vec::load(o + c)).store(o + c);
      });
    }
    if (p.normalize) {
      const float den = o[p.Dv];
      for (int64_t c = 0; c < Cp; c += Vec::W)
        (den == 0.0f ? Vec::zero() : Vec::load(o + c) * Vec::set1(1.0f / den)).store(o + c);
    }
    store_rows(p.o, item, 0, 1, 0, p.Dv, o, Cp);
  }
}

}  // namespace

// Defined in linear_attention_bwd_cpu.inl.
void linear_attention_reverse(const LinearAttentionProblem& p, const Item& item, int64_t t, float* slot, float* d_state,
                              int64_t c0, int64_t c1, float* scratch);
void linear_attention_gradients(const LinearAttentionProblem& p, const Item& item, int64_t t, float* slot, float* next_slot,
                                const float* state, float* scratch);
void linear_attention_gather_queries(const LinearAttentionProblem& p, const Item& item, int64_t t, float* d_state, int64_t c0,
                                     int64_t c1, float* scratch);
void linear_attention_query_gradients(const LinearAttentionProblem& p, const Item& item, int64_t t, const float* state,
                                      float* scratch);
void linear_attention_key_gradients(const LinearAttentionProblem& p, const Item& item, int64_t t, const float* d_state,
                                    float* scratch);

extern const LinearAttentionKernels linear_attention_kernels = {
    Vec::W,
    state_size,
    slot_floats,
    scratch_floats,
    load_state,
    store_state,
    prepare,
    advance,
    local_states,
    scan,
    outputs,
    reverse_scan,
    restate,
    linear_attention_reverse,
    linear_attention_gradients,
    gather_keys,
    read_queries,
    linear_attention_gather_queries,
    linear_attention_query_gradients,
    linear_attention_key_gradients,
    step,
};

}  // namespace mlcore::MLC_ISA
