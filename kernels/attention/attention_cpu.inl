// The forward over one query tile: scores, online softmax, output. The equations are in attention.h, the plan in README.md.
#include <math.h>

#include "attention/attention_tile.h"

namespace mlcore::MLC_ISA {
namespace {

// One thread's working set for a query tile; every pointer is 64-byte aligned.
struct FwdScratch {
  float *qt, *st, *o, *m, *l, *alpha, *k, *v, *bias, *raw;
  uint32_t* drop_keys;

  static int64_t size(const AttentionProblem& p) { return FwdScratch(p, nullptr).total; }

  FwdScratch(const AttentionProblem& p, float* base) {
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* at = base ? base + used : nullptr;
      used += round_up<int64_t>(floats, 16);
      return at;
    };
    qt = take(p.D * kTile);          // (D, queries) panels, scaled
    st = take(kTile * kTile);        // (keys, queries)
    o = take(kTile * padded(p.Dv));  // (queries, Dv)
    m = take(kTile), l = take(kTile), alpha = take(kTile);
    k = take(p.D * kTile), v = take(kTile * padded(p.Dv));  // a tile packed on the way
    bias = take(kTile * kTile), raw = take(kTile * kTile);
    drop_keys = reinterpret_cast<uint32_t*>(take(kTile));
    total = used;
  }
  int64_t total;
};

// Online softmax of one tile, queries in lanes: st becomes p, m and l move on, alpha rescales what was summed before. Returns
// the queries whose alpha is not 1.
template <bool kPlain>
uint64_t softmax_tile(const TileExtras& x, const TileRanges& ranges, int nq_padded, bool first, FwdScratch& w) {
  const Vec lowest = Vec::set1(-3.4028234e38f);  // stands in for -inf where nothing was seen: exp2(-inf - lowest) is 0
  uint64_t moved = 0;
  for (int i = 0; i < nq_padded; i += Vec::W) {
    float* st = w.st + i;
    const int from = ranges.lo[i / kGroup], to = ranges.hi[i / kGroup];
    const Vec m_old = first ? Vec::set1(-INFINITY) : Vec::load(w.m + i);
    Vec m = m_old;
    for (int j = from; j < to; ++j) {
      Vec s = Vec::load(st + j * kTile);
      if constexpr (!kPlain) {
        s = select(x.seen(j, i), x.score(s, j, i), Vec::set1(-INFINITY));
        s.store(st + j * kTile);
      }
      m = max(m, s);
    }
    const Vec top = max(lowest, m), alpha = exp2(m_old - top);
    // Four sums, and one a tile: a single chain over all keys would lose more than the rest of the kernel together.
    Vec sums[4] = {Vec::zero(), Vec::zero(), Vec::zero(), Vec::zero()};
    const auto weight = [&](int j) {
      const Vec p = exp2(Vec::load(st + j * kTile) - top);
      p.store(st + j * kTile);
      return p;
    };
    int j = from;
    for (; j + 4 <= to; j += 4)
      for (int x = 0; x < 4; ++x) sums[x] = sums[x] + weight(j + x);
    for (int x = 0; x < 3; ++x)  // a key's chain is its position's: sums don't depend on how many keys follow
      if (j + x < to) sums[x] = sums[x] + weight(j + x);
    const Vec total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    m.store(w.m + i);
    (first ? total : fma(Vec::load(w.l + i), alpha, total)).store(w.l + i);
    alpha.store(w.alpha + i);
    moved |= uint64_t{less(alpha, Vec::set1(1.0f))} << i;
  }
  return moved;
}

void apply_dropout(const AttentionProblem& p, const TileExtras& x, int nk, int nq, int nq_padded, float* st) {
  const Vec scale = Vec::set1(p.keep_scale);
  for (int j = 0; j < nk; ++j) {
    const uint64_t kept = x.kept(j, nq);
    for (int i = 0; i < nq_padded; i += Vec::W) {
      float* at = st + j * kTile + i;
      select(static_cast<uint32_t>(kept >> i), Vec::load(at) * scale, Vec::zero()).store(at);
    }
  }
}

void rescale_rows(float* o, int64_t ld, uint64_t rows, const float* alpha) {
  for (; rows; rows &= rows - 1) {
    const int i = __builtin_ctzll(rows);
    const Vec a = Vec::set1(alpha[i]);
    for (int64_t c = 0; c < ld; c += Vec::W) (Vec::load(o + i * ld + c) * a).store(o + i * ld + c);
  }
}

template <class T>
void pack_tile(const AttentionProblem& p, int64_t b, int64_t hkv, int64_t kt, float* k, float* v, uint8_t* v_finite) {
  const int nk = tile_rows(p.schedule.Tk, kt);
  pack_transposed(row_of<T>(p.k, b, hkv, kt * kTile), p.k.st, nk, p.D, OneScale{1.0f}, kTile, kTile, k);
  *v_finite = pack_rows(row_of<T>(p.v, b, hkv, kt * kTile), p.v.st, nk, p.Dv, OneScale{1.0f}, v);
}

template <class T>
void store_output(const AttentionProblem& p, int64_t b, int64_t h, int64_t qt, int nq, bool any, const FwdScratch& w) {
  const int64_t ld = padded(p.Dv);
  for (int i = 0; i < nq; ++i) {
    const int64_t t = qt * kTile + i;
    float l = any ? w.l[i] : 0.0f, m = l == 0.0f ? -INFINITY : w.m[i], o_scale = 1.0f;
    if (p.sinks) {  // one more score, that has no value
      const float sink = p.sinks[h] * kLog2e, top = max(m, sink);
      o_scale = exp2f(m - top);
      l = (l == 0.0f ? 0.0f : l * o_scale) + exp2f(sink - top);
      m = top;
    }
    const bool empty = l == 0.0f;
    const float inverse = empty ? 0.0f : o_scale / l;
    if (p.lse) {
      const float lse = empty ? -INFINITY : (m + log2f(l)) * kLn2;
      const int64_t row = (b * p.H + h) * p.Tq + t;
      p.lse[row] = lse;
      p.lse_factor[row] = empty ? 1.0f : exp2f(lse * kLog2e - m) / l;
    }
    T* out = const_cast<T*>(row_of<T>(p.o, b, h, t));
    for_row(p.Dv, [&](int64_t c, int n) {
      store_some(out + c, inverse == 0.0f ? Vec::zero() : Vec::load(w.o + i * ld + c) * Vec::set1(inverse), n);
    });
  }
}

template <class T>
void fwd_tile(const AttentionProblem& p, int64_t b, int64_t h, int64_t qt, const KeyValuePanels& panels, float* scratch) {
  FwdScratch w(p, scratch);
  const int64_t ld = padded(p.Dv), hkv = h / p.group();
  const int nq = tile_rows(p.Tq, qt), nq_padded = static_cast<int>(padded(nq));
  pack_transposed(row_of<T>(p.q, b, h, qt * kTile), p.q.st, nq, p.D, OneScale{query_scale(p)}, nq_padded, kPanel, w.qt);
  TileExtras extras;
  extras.softcap = p.softcap;
  if (p.drop_below || p.drop_all) {
    for (int i = 0; i < nq; ++i)
      w.drop_keys[i] = dropout_row_key(p.seed, static_cast<uint32_t>(b * p.H + h), static_cast<uint32_t>(qt * kTile + i));
    extras.drop_keys = w.drop_keys, extras.drop_below = p.drop_below, extras.drop_all = p.drop_all;
  }
  uint64_t words[kTile];
  bool any = false;
  p.schedule.for_key_tiles(p.schedule.set_of(b, h), qt, 0, p.schedule.k_tiles, [&](int64_t kt, int id) {
    const int nk = tile_rows(p.Tk, kt);
    const float *k = w.k, *v = w.v;
    uint8_t v_finite;
    if (panels.k) {
      k = panels.k + (kt - panels.first) * kTile * p.D;
      v = panels.v + (kt - panels.first) * kTile * ld;
      v_finite = panels.v_finite[kt - panels.first];
    } else {
      pack_tile<T>(p, b, hkv, kt, w.k, w.v, &v_finite);
    }
    extras.words = p.schedule.tile_words(qt, kt, id, words) ? words : nullptr;
    const TileRanges ranges = TileRanges::of(extras.words, nk, nq);
    scores(ranges, extras.words != nullptr, nk, nq_padded, p.D, k, w.qt, w.st);
    extras.first_key = kt * kTile;
    extras.relative = relative_of(p, b, h, qt, kt);
    if (p.bias) {
      load_bias(p, b, h, qt, kt, w.raw, w.bias);
      extras.bias = w.bias;
    }
    const bool first = !any;
    const uint64_t moved = extras.plain() ? softmax_tile<true>(extras, ranges, nq_padded, first, w)
                                          : softmax_tile<false>(extras, ranges, nq_padded, first, w);
    if (extras.drop_keys) apply_dropout(p, extras, nk, nq, nq_padded, w.st);
    if (!first) rescale_rows(w.o, ld, moved & (~uint64_t{0} >> (kTile - nq)), w.alpha);
    any = true;
    if (!v_finite && !extras.sees_all()) {
      const auto sees = [&](int i, int j) { return extras.sees(j, i); };
      const auto weight = [&](int i, int j) { return w.st[j * kTile + i]; };
      if (first) {
        careful_product<false>(nq, p.Dv, nk, v, w.o, ld, sees, weight);
      } else {
        careful_product<true>(nq, p.Dv, nk, v, w.o, ld, sees, weight);
      }
    } else if (first) {
      grouped_product<1, kTile, false>(ranges.lo, ranges.hi, nq, ld, nk, w.st, v, w.o, ld);  // o (queries, Dv)
    } else {
      grouped_product<1, kTile, true>(ranges.lo, ranges.hi, nq, ld, nk, w.st, v, w.o, ld);
    }
  });
  store_output<T>(p, b, h, qt, nq, any, w);
}

void fwd(const AttentionProblem& p, int64_t b, int64_t h, int64_t qt, const KeyValuePanels& panels, float* scratch) {
  with_type(p.dtype, [&](auto t) { fwd_tile<decltype(t)>(p, b, h, qt, panels, scratch); });
}

void pack(const AttentionProblem& p, int64_t b, int64_t hkv, int64_t kt, const KeyValuePanels& panels) {
  const int64_t slot = kt - panels.first;
  with_type(p.dtype, [&](auto t) {
    pack_tile<decltype(t)>(p, b, hkv, kt, panels.k + slot * kTile * p.D, panels.v + slot * kTile * padded(p.Dv),
                           panels.v_finite + slot);
  });
}

}  // namespace

// Defined in attention_bwd_cpu.inl.
int64_t attention_bwd_scratch(const AttentionProblem& p, int64_t tiles);
void attention_delta(const AttentionProblem& p, const float* d_lse, int64_t row_begin, int64_t row_end, float* delta);
void attention_bwd(const AttentionProblem& p, int64_t b, int64_t hkv, int64_t block, int64_t kt_begin, int64_t kt_end,
                   const DqOrder& order, float* scratch);
void attention_zero_dq_sum(const AttentionProblem& p, int64_t row_begin, int64_t row_end);
void attention_store_dq(const AttentionProblem& p, int64_t row_begin, int64_t row_end);

extern const AttentionKernels attention_kernels = {
    Vec::W,        FwdScratch::size,      attention_bwd_scratch, pack, fwd, attention_delta,
    attention_bwd, attention_zero_dq_sum, attention_store_dq,
};

}  // namespace mlcore::MLC_ISA
