// The backward over a block of key tiles: five products a tile, scores recomputed from lse. Each block owns its dk and dv;
// dq is added to tile by tile in rising order of keys (DqOrder), so its bits don't depend on who computes what when.
//   p = exp(s - lse) * factor    dp = v do^T    ds = p * (dp - delta)    dv += p do    dk += scale * ds q    dq += scale * ds k
#include <math.h>

#include "attention/attention_tile.h"

namespace mlcore::MLC_ISA {
namespace {

struct BwdScratch {
  float *kt, *k, *vt, *dk, *dv;                      // per key tile of the block
  float *qt, *q, *dot, *d_o, *lse, *factor, *delta;  // one query tile
  float *pt, *dst, *bias, *raw;                      // one tile
  uint32_t* drop_keys;
  uint8_t* k_finite;
  int64_t total;

  static int64_t size(const AttentionProblem& p, int64_t tiles) { return BwdScratch(p, tiles, nullptr).total; }

  BwdScratch(const AttentionProblem& p, int64_t tiles, float* base) {
    int64_t used = 0;
    const auto take = [&](int64_t floats) {
      float* at = base ? base + used : nullptr;
      used += round_up<int64_t>(floats, 16);
      return at;
    };
    const int64_t D = padded(p.D), Dv = padded(p.Dv);
    kt = take(tiles * p.D * kTile), k = take(tiles * kTile * D), vt = take(tiles * p.Dv * kTile);
    dk = take(tiles * kTile * D), dv = take(tiles * kTile * Dv);
    qt = take(p.D * kTile), q = take(kTile * D), dot = take(p.Dv * kTile), d_o = take(kTile * Dv);
    lse = take(kTile), factor = take(kTile), delta = take(kTile);
    pt = take(kTile * kTile), dst = take(kTile * kTile), bias = take(kTile * kTile), raw = take(kTile * kTile);
    drop_keys = reinterpret_cast<uint32_t*>(take(kTile));
    k_finite = reinterpret_cast<uint8_t*>(take(tiles));
    total = used;
  }
};

// pt: products -> probabilities, dst: dp -> ds. Queries in lanes.
template <bool kPlain>
void gradient_tile(const TileExtras& x, const TileRanges& ranges, int nk, int nq, int nq_padded, float keep_scale,
                   const BwdScratch& w) {
  const bool drops = x.drop_keys != nullptr;
  for (int j = 0; j < nk; ++j) {
    const uint64_t kept = drops ? x.kept(j, nq) : 0;
    for (int i = 0; i < nq_padded; i += Vec::W) {
      float *pt = w.pt + j * kTile + i, *dst = w.dst + j * kTile + i;
      if (!kPlain && (j < ranges.lo[i / kGroup] || j >= ranges.hi[i / kGroup])) {  // no score was computed here
        Vec::zero().store(pt);
        Vec::zero().store(dst);
        if (x.softcap > 0) Vec::zero().store(w.raw + j * kTile + i);
        continue;
      }
      const Vec lse = Vec::load(w.lse + i), delta = Vec::load(w.delta + i);
      if constexpr (kPlain) {
        const Vec p = exp2(Vec::load(pt) - lse);
        p.store(pt);
        (p * (Vec::load(dst) - delta)).store(dst);
      } else {
        const uint32_t seen = x.seen(j, i);
        Vec cap_grad = Vec::set1(1.0f);
        const Vec p = select(seen, exp2(x.score(Vec::load(pt), j, i, &cap_grad) - lse), Vec::zero());
        Vec dp = Vec::load(dst), used = p;
        if (drops) {
          const uint32_t lanes = static_cast<uint32_t>(kept >> i);
          const Vec scale = Vec::set1(keep_scale);
          used = select(lanes, p * scale, Vec::zero());
          dp = select(lanes, dp * scale, Vec::zero());
        }
        used.store(pt);
        select(seen, p * (dp - delta), Vec::zero()).store(dst);
        if (x.softcap > 0) cap_grad.store(w.raw + j * kTile + i);
      }
    }
  }
}

void apply_cap_gradient(int nk, int nq_padded, const BwdScratch& w) {
  for (int j = 0; j < nk; ++j)
    for (int i = 0; i < nq_padded; i += Vec::W) {
      float* dst = w.dst + j * kTile + i;
      (Vec::load(dst) * Vec::load(w.raw + j * kTile + i)).store(dst);
    }
}

// dbias of the tile += ds (keys, queries).
void add_dbias(const AttentionProblem& p, int64_t b, int64_t h, int64_t qt, int64_t kt, int nq, int nk, const float* dst) {
  float* out = p.dbias + b * p.dbias_sb + h * p.dbias_sh + qt * kTile * p.dbias_sq + kt * kTile;
  constexpr int W = Vec::W;
  for (int i = 0; i < nq; i += W)
    for (int j = 0; j < nk; j += W) {
      const int n = min(W, nk - j);
      Vec block[W];
      for (int x = 0; x < W; ++x) block[x] = x < n ? Vec::load(dst + (j + x) * kTile + i) : Vec::zero();
      transpose(block);
      for (int x = 0; x < W && i + x < nq; ++x) {
        float* row = out + (i + x) * p.dbias_sq + j;
        store_some(row, load_some(row, n) + block[x], n);
      }
    }
}

// The tile's diagonals of ds, summed down the keys and added up: x is query - key + kTile - 1 within the tile.
void add_drelative(const AttentionProblem& p, int64_t b, int64_t h, int64_t qt, int64_t kt, int nq_padded, int nk,
                   const float* dst) {
  float sums[2 * kTile] = {};
  for (int j = 0; j < nk; ++j)
    for (int i = 0; i < nq_padded; i += Vec::W) {
      float* at = sums + i - j + kTile - 1;
      (Vec::load(at) + Vec::load(dst + j * kTile + i)).store(at);
    }
  const int64_t length = p.Tq + p.Tk - 1, begin = p.Tk - 1 + (qt - kt) * kTile - (kTile - 1);
  float* out = p.drelative + (b * p.H + h) * length;
  for (int64_t x = max<int64_t>(0, -begin); x < min<int64_t>(2 * kTile, length - begin); ++x) out[begin + x] += sums[x];
}

// What a query tile brings: q and do in both orders, lse in log2 units and delta. The factor that p lacks is in do and delta,
// where it costs nothing. Lanes beyond the last query give p = 0.
template <class T>
void load_queries(const AttentionProblem& p, int64_t b, int64_t h, int64_t qt, const BwdScratch& w) {
  const int nq = tile_rows(p.Tq, qt), nq_padded = static_cast<int>(padded(nq));
  const int64_t first = (b * p.H + h) * p.Tq + qt * kTile;
  for (int i = 0; i < nq_padded; ++i) {
    const float lse = i < nq ? p.lse[first + i] : INFINITY;
    w.lse[i] = lse == -INFINITY ? 0.0f : lse * kLog2e;
    w.factor[i] = i < nq ? p.lse_factor[first + i] : 0.0f;
    w.delta[i] = i < nq ? p.delta[first + i] * w.factor[i] : 0.0f;
  }
  const T *q = row_of<T>(p.q, b, h, qt * kTile), *d_o = row_of<T>(p.d_o, b, h, qt * kTile);
  pack_transposed(q, p.q.st, nq, p.D, OneScale{query_scale(p)}, nq_padded, kPanel, w.qt);
  pack_rows(q, p.q.st, nq, p.D, OneScale{1.0f}, w.q);
  pack_transposed(d_o, p.d_o.st, nq, p.Dv, RowScale{w.factor}, nq_padded, kPanel, w.dot);
  pack_rows(d_o, p.d_o.st, nq, p.Dv, RowScale{w.factor}, w.d_o);
  if (p.drop_below || p.drop_all)
    for (int i = 0; i < nq; ++i)
      w.drop_keys[i] = dropout_row_key(p.seed, static_cast<uint32_t>(b * p.H + h), static_cast<uint32_t>(qt * kTile + i));
}

template <class T>
void store_rows(const Operand& out, int64_t b, int64_t hkv, int64_t t, int rows, int64_t cols, float scale, const float* src) {
  const Vec factor = Vec::set1(scale);
  for (int r = 0; r < rows; ++r) {
    T* to = const_cast<T*>(row_of<T>(out, b, hkv, t + r));
    for_row(cols, [&](int64_t c, int n) { store_some(to + c, Vec::load(src + r * padded(cols) + c) * factor, n); });
  }
}

template <class T>
void bwd_block(const AttentionProblem& p, int64_t b, int64_t hkv, int64_t block, int64_t kt_begin, int64_t kt_end,
               const DqOrder& order, float* scratch) {
  const int64_t tiles = kt_end - kt_begin, D = padded(p.D), Dv = padded(p.Dv);
  const BwdScratch w(p, tiles, scratch);
  for (int64_t c = 0; c < tiles; ++c) {
    const int nk = tile_rows(p.Tk, kt_begin + c);
    const T *k = row_of<T>(p.k, b, hkv, (kt_begin + c) * kTile), *v = row_of<T>(p.v, b, hkv, (kt_begin + c) * kTile);
    pack_transposed(k, p.k.st, nk, p.D, OneScale{1.0f}, kTile, kTile, w.kt + c * p.D * kTile);
    w.k_finite[c] = pack_rows(k, p.k.st, nk, p.D, OneScale{p.scale}, w.k + c * kTile * D);
    pack_transposed(v, p.v.st, nk, p.Dv, OneScale{1.0f}, kTile, kTile, w.vt + c * p.Dv * kTile);
  }
  memset(w.dk, 0, sizeof(float) * static_cast<size_t>(tiles * kTile * D));
  memset(w.dv, 0, sizeof(float) * static_cast<size_t>(tiles * kTile * Dv));

  TileExtras extras;
  extras.softcap = p.softcap;
  extras.drop_below = p.drop_below, extras.drop_all = p.drop_all;
  if (p.drop_below || p.drop_all) extras.drop_keys = w.drop_keys;
  uint64_t words[kTile];

  const auto one_tile = [&](int64_t h, int64_t qt, int64_t kt, int id) {
    const int64_t c = kt - kt_begin;
    const int nq = tile_rows(p.Tq, qt), nq_padded = static_cast<int>(padded(nq)), nk = tile_rows(p.Tk, kt);
    extras.words = p.schedule.tile_words(qt, kt, id, words) ? words : nullptr;
    const TileRanges ranges = TileRanges::of(extras.words, nk, nq);
    scores(ranges, extras.words != nullptr, nk, nq_padded, p.D, w.kt + c * p.D * kTile, w.qt, w.pt);
    scores(ranges, extras.words != nullptr, nk, nq_padded, p.Dv, w.vt + c * p.Dv * kTile, w.dot, w.dst);  // dp (keys, queries)
    extras.first_key = kt * kTile;
    extras.relative = relative_of(p, b, h, qt, kt);
    if (p.bias) {
      load_bias(p, b, h, qt, kt, w.raw, w.bias);
      extras.bias = w.bias;
    }
    if (extras.plain() && !extras.drop_keys) {
      gradient_tile<true>(extras, ranges, nk, nq, nq_padded, 1.0f, w);
    } else {
      gradient_tile<false>(extras, ranges, nk, nq, nq_padded, p.keep_scale, w);
    }
    if (p.dbias) add_dbias(p, b, h, qt, kt, nq, nk, w.dst);
    if (p.drelative) add_drelative(p, b, h, qt, kt, nq_padded, nk, w.dst);
    if (p.softcap > 0) apply_cap_gradient(nk, nq_padded, w);
    grouped_product<kTile, 1, true>(ranges.q_lo, ranges.q_hi, nk, Dv, nq, w.pt, w.d_o, w.dv + c * kTile * Dv, Dv);
    grouped_product<kTile, 1, true>(ranges.q_lo, ranges.q_hi, nk, D, nq, w.dst, w.q, w.dk + c * kTile * D, D);
    float* dq = const_cast<float*>(row_of<float>(p.dq_sum, b, h, qt * kTile));
    if (w.k_finite[c] || extras.sees_all()) {
      grouped_product<1, kTile, true>(ranges.lo, ranges.hi, nq, D, nk, w.dst, w.k + c * kTile * D, dq, p.dq_sum.st);
    } else {
      careful_product<true>(
          nq, p.D, nk, w.k + c * kTile * D, dq, p.dq_sum.st, [&](int i, int j) { return extras.sees(j, i); },
          [&](int i, int j) { return w.dst[j * kTile + i]; });
    }
  };

  for (int64_t g = 0; g < p.group(); ++g) {
    const int64_t h = hkv * p.group() + g, set = p.schedule.set_of(b, h);
    p.schedule.for_query_tiles(set, block, kt_begin, kt_end, [&](int64_t qt) {
      bool entered = false;
      p.schedule.for_key_tiles(set, qt, kt_begin, kt_end, [&](int64_t kt, int id) {
        if (!entered) {
          load_queries<T>(p, b, h, qt, w);
          order.enter(order.self, h, qt);
          entered = true;
        }
        one_tile(h, qt, kt, id);
      });
      if (entered) order.leave(order.self, h, qt);
    });
  }
  for (int64_t c = 0; c < tiles; ++c) {
    const int nk = tile_rows(p.Tk, kt_begin + c);
    store_rows<T>(p.dk, b, hkv, (kt_begin + c) * kTile, nk, p.D, p.scale, w.dk + c * kTile * D);
    store_rows<T>(p.dv, b, hkv, (kt_begin + c) * kTile, nk, p.Dv, 1.0f, w.dv + c * kTile * Dv);
  }
}

}  // namespace

int64_t attention_bwd_scratch(const AttentionProblem& p, int64_t tiles) { return BwdScratch::size(p, tiles); }

// body(b, h, t) for rows of (B, H, Tq).
template <class F>
void for_query_rows(const AttentionProblem& p, int64_t row_begin, int64_t row_end, F&& body) {
  for (int64_t row = row_begin; row < row_end; ++row) body(row / p.Tq / p.H, row / p.Tq % p.H, row % p.Tq);
}

void attention_delta(const AttentionProblem& p, const float* d_lse, int64_t row_begin, int64_t row_end, float* delta) {
  with_type(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_query_rows(p, row_begin, row_end, [&](int64_t b, int64_t h, int64_t t) {
      const int64_t row = (b * p.H + h) * p.Tq + t;
      const T *o = row_of<T>(p.o, b, h, t), *d_o = row_of<T>(p.d_o, b, h, t);
      const float dot = sum_row(p.Dv, [&](int64_t c, int n) { return load_some(o + c, n) * load_some(d_o + c, n); });
      delta[row] = d_lse && p.lse[row] != -INFINITY ? dot - d_lse[row] : dot;
    });
  });
}

void attention_bwd(const AttentionProblem& p, int64_t b, int64_t hkv, int64_t block, int64_t kt_begin, int64_t kt_end,
                   const DqOrder& order, float* scratch) {
  with_type(p.dtype, [&](auto t) { bwd_block<decltype(t)>(p, b, hkv, block, kt_begin, kt_end, order, scratch); });
}

void attention_zero_dq_sum(const AttentionProblem& p, int64_t row_begin, int64_t row_end) {
  for_query_rows(p, row_begin, row_end, [&](int64_t b, int64_t h, int64_t t) {
    float* to = const_cast<float*>(row_of<float>(p.dq_sum, b, h, t));
    for (int64_t c = 0; c < padded(p.D); c += Vec::W) Vec::zero().store(to + c);
  });
}

// dq (..., D) from its padded fp32 sums.
void attention_store_dq(const AttentionProblem& p, int64_t row_begin, int64_t row_end) {
  with_type(p.dtype, [&](auto tag) {
    using T = decltype(tag);
    for_query_rows(p, row_begin, row_end, [&](int64_t b, int64_t h, int64_t t) {
      const float* from = row_of<float>(p.dq_sum, b, h, t);
      T* to = const_cast<T*>(row_of<T>(p.dq, b, h, t));
      for_row(p.D, [&](int64_t c, int n) { store_some(to + c, Vec::load(from + c), n); });
    });
  });
}

}  // namespace mlcore::MLC_ISA
