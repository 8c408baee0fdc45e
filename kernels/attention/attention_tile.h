// What forward and backward share about one 64 x 64 tile. Scores are kept transposed, st[j][i] (key, query): the softmax then
// runs down the keys with one query a lane, without horizontal sums, and st is the K-major A operand of the product with V.
// Scores are in units of log2, so that exp2 is all that is needed.
#pragma once
#include <math.h>

#include "attention/attention_dropout.h"
#include "attention/attention_kernels.h"
#include "core/simd/gemm.h"
#include "core/simd/rows.h"

namespace mlcore::MLC_ISA {

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

inline int64_t padded(int64_t cols) { return round_up<int64_t>(cols, Vec::W); }
inline int tile_rows(int64_t length, int64_t tile) { return static_cast<int>(min<int64_t>(kTile, length - tile * kTile)); }

template <class T>
const T* row_of(const Operand& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<const T*>(x.data) + b * x.sb + h * x.sh + t * x.st;
}

// What q is multiplied with so that the product with k is a score in log2 units, or, with a softcap, its argument.
inline float query_scale(const AttentionProblem& p) { return p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e; }

// tanh to 2 ulp: an odd polynomial (Cephes' tanhf coefficients) near 0, else by exp2.
inline Vec tanh(Vec x) {
  const Vec z = x * x, big = Vec::set1(9.02f);
  Vec poly = Vec::set1(-5.70498872745e-3f);
  poly = fma(poly, z, Vec::set1(2.06390887954e-2f));
  poly = fma(poly, z, Vec::set1(-5.37397155531e-2f));
  poly = fma(poly, z, Vec::set1(1.33314422036e-1f));
  poly = fma(poly, z, Vec::set1(-3.33332819422e-1f));
  const Vec near = fma(poly * z, x, x);
  const Vec clamped = max(Vec::zero() - big, min(big, x));
  const Vec e = exp2(clamped * Vec::set1(2.0f * kLog2e));
  const Vec far = Vec::set1(1.0f) - Vec::set1(2.0f) / (e + Vec::set1(1.0f));
  return select(less(z, Vec::set1(0.625f * 0.625f)), near, far);
}

// One tile's deviations from plain scores. All of them are rare next to the products, so they share one slow loop.
struct TileExtras {
  const uint64_t* words = nullptr;  // [key] bit i: query i sees the key; null: all do
  const float* bias = nullptr;      // [key][kTile] in log2 units
  const float* relative = nullptr;  // of (key j, query i) at i - j
  float softcap = 0;
  const uint32_t* drop_keys = nullptr;  // [query] dropout_row_key; null: no dropout
  uint32_t drop_below = 0;
  bool drop_all = false;
  int64_t first_key = 0;

  bool plain() const { return words == nullptr && bias == nullptr && relative == nullptr && softcap == 0; }

  // The score of lanes i .. i+W-1 against key j from the raw product; *cap_grad gets d score / d product of the softcap.
  Vec score(Vec product, int j, int i, Vec* cap_grad = nullptr) const {
    Vec s = product;
    if (softcap > 0) {
      const Vec t = tanh(product);
      if (cap_grad) *cap_grad = Vec::set1(1.0f) - t * t;
      s = t * Vec::set1(softcap * kLog2e);
    }
    if (bias) s = s + Vec::load(bias + j * kTile + i);
    if (relative) s = s + Vec::load(relative + i - j);
    return s;
  }
  // For tiles that hold infinities or NaN: is there a pair that must not meet, and does query i see key j.
  bool sees_all() const { return words == nullptr && bias == nullptr; }
  bool sees(int j, int i) const {
    return (words == nullptr || ((words[j] >> i) & 1u)) && (bias == nullptr || bias[j * kTile + i] != -INFINITY);
  }
  uint32_t seen(int j, int i) const { return words ? static_cast<uint32_t>(words[j] >> i) : ~0u; }

  // Bit i: the element (key j, query i) survives dropout.
  uint64_t kept(int j, int queries) const {
    if (drop_all) return 0;
    uint32_t hash[kTile];
    const uint32_t column = static_cast<uint32_t>(first_key + j);
    for (int i = 0; i < queries; ++i) hash[i] = dropout_hash(drop_keys[i] ^ column);
    uint64_t word = 0;
    for (int i = 0; i < queries; ++i) word |= static_cast<uint64_t>(hash[i] >= drop_below) << i;
    return word;
  }
};

// Queries in stretches of kGroup, and of kSub for the scores: what a masked tile can leave out.
constexpr int kGroup = 16, kGroups = kTile / kGroup, kSub = kPanel > 32 ? 32 : kPanel;
static_assert(kTile % kGroup == 0 && kGroup % Vec::W == 0 && (kSub % kGroup == 0 || kSub < kGroup));

// The keys [lo, hi) that some query of a group sees, and the queries [q_lo, q_hi) that see some key of a group. Multiples of 4:
// the softmax then sums in the same chains as over the whole tile, so what is left out changes no bit.
struct TileRanges {
  int lo[kGroups], hi[kGroups], q_lo[kGroups], q_hi[kGroups];

  static TileRanges of(const uint64_t* words, int nk, int nq) {
    TileRanges r;
    for (int g = 0; g < kGroups; ++g) r.lo[g] = r.q_lo[g] = 0, r.hi[g] = nk, r.q_hi[g] = nq;
    if (words == nullptr) return r;
    for (int g = 0; g < kGroups; ++g) {
      const uint64_t lanes = uint64_t{0xffff} << (g * kGroup);
      int first = 0, last = nk;
      while (first < nk && !(words[first] & lanes)) ++first;
      while (last > first && !(words[last - 1] & lanes)) --last;
      r.lo[g] = first == last ? 0 : first / 4 * 4;
      r.hi[g] = first == last ? 0 : min(nk, (last + 3) / 4 * 4);
      uint64_t any = 0;
      for (int j = g * kGroup; j < min(nk, (g + 1) * kGroup); ++j) any |= words[j];
      if (nq < kTile) any &= (uint64_t{1} << nq) - 1;
      r.q_lo[g] = any ? __builtin_ctzll(any) / 4 * 4 : 0;
      r.q_hi[g] = any ? min(nq, (64 - __builtin_clzll(any) + 3) / 4 * 4) : 0;
    }
    return r;
  }
};

// st (keys, queries) = A (keys, depth) B (depth, queries); of a masked tile only the keys that some query of a stretch of kSub
// sees. a is K-major, b in panels. (Panels of kSub queries would do for both, but 12 x 2 vectors a microkernel are 10 to 15 %
// slower than 6 x 4.)
inline void scores(const TileRanges& r, bool masked, int nk, int nq_padded, int64_t depth, const float* a, const float* b,
                   float* st) {
  if (!masked) return gemm<1, kTile, false>(nk, nq_padded, depth, a, b, st, kTile);
  for (int c = 0; c < nq_padded; c += kSub) {
    const int end = min(c + kSub, nq_padded);
    int lo = kTile, hi = 0;
    for (int g = c / kGroup; g * kGroup < end; ++g)
      if (r.hi[g] > r.lo[g]) lo = min(lo, r.lo[g]), hi = max(hi, r.hi[g]);
    if (lo < hi) gemm_columns<1, kTile, false>(hi - lo, c, end, nq_padded, depth, a + lo, b, st + lo * kTile, kTile);
  }
}

// out (rows, cols) (+)= A B over the depth [lo, hi) that each group of rows needs; A is kTile x kTile with strides RS, KS, b in
// panels of `depth` rows.
template <int RS, int KS, bool kAccumulate>
void grouped_product(const int* lo, const int* hi, int rows, int64_t cols, int64_t depth, const float* a, const float* b,
                     float* out, int64_t ld) {
  bool whole = true;
  for (int g = 0; g * kGroup < rows; ++g) whole = whole && lo[g] == 0 && hi[g] == depth;
  if (whole) return gemm<RS, KS, kAccumulate>(rows, cols, depth, a, b, out, ld);
  for (int g = 0; g * kGroup < rows; ++g) {
    const int r = g * kGroup;
    if (kAccumulate && lo[g] == hi[g]) continue;
    for (int64_t n = 0; n < cols; n += kPanel) {
      const int64_t width = min<int64_t>(kPanel, cols - n);
      gemm<RS, KS, kAccumulate>(min(kGroup, rows - r), width, hi[g] - lo[g], a + r * RS + lo[g] * KS,
                                b + n * depth + lo[g] * width, out + r * ld + n, ld);
    }
  }
}

// What TileExtras::relative is for tile (qt, kt): the scores of a tile need only its 127 diagonals.
inline const float* relative_of(const AttentionProblem& p, int64_t b, int64_t h, int64_t qt, int64_t kt) {
  if (p.relative == nullptr) return nullptr;
  return p.relative + b * p.relative_sb + h * p.relative_sh + p.Tk - 1 + (qt - kt) * kTile;
}

// The tile (qt, kt) of the bias, transposed to [key][kTile], in log2 units. raw is scratch of kTile * kTile floats.
inline void load_bias(const AttentionProblem& p, int64_t b, int64_t h, int64_t qt, int64_t kt, float* raw, float* out) {
  const int nq = tile_rows(p.schedule.Tq, qt), nk = tile_rows(p.schedule.Tk, kt);
  const int64_t start = b * p.bias_sb + h * p.bias_sh + qt * kTile * p.bias_sq + kt * kTile * p.bias_sk;
  with_type(p.bias_dtype, [&](auto tag) {
    using T = decltype(tag);
    const T* src = static_cast<const T*>(p.bias) + start;
    if (p.bias_sk == 1) return pack_transposed(src, p.bias_sq, nq, nk, OneScale{kLog2e}, kTile, kTile, out);
    for (int i = 0; i < nq; ++i)  // the same for all keys
      for (int j = 0; j < nk; ++j) raw[i * kTile + j] = to_float(src[i * p.bias_sq]);
    pack_transposed(raw, kTile, nq, nk, OneScale{kLog2e}, kTile, kTile, out);
  });
}

// The product c[i, :] (+)= sum_k w(i, k) * b[k, :] for tiles that hold infinities or NaN where some query must not see them:
// over the k that use(i, k) names, in gemm's order, so with gemm's bits. b is in panels as gemm takes it, with K = depth.
template <bool kAccumulate, class Use, class Weight>
void careful_product(int rows, int64_t cols, int depth, const float* b, float* c, int64_t ldc, Use&& use, Weight&& weight) {
  const int64_t padded_cols = padded(cols);
  for (int i = 0; i < rows; ++i)
    for (int64_t n = 0; n < padded_cols; n += Vec::W) {
      const int64_t panel = n / kPanel * kPanel, width = min<int64_t>(kPanel, padded_cols - panel);
      const float* column = b + panel * depth + (n - panel);
      Vec total = Vec::zero();
      for (int k = 0; k < depth; ++k)
        if (use(i, k)) total = fma(Vec::set1(weight(i, k)), Vec::load(column + k * width), total);
      float* out = c + i * ldc + n;
      (kAccumulate ? Vec::load(out) + total : total).store(out);
    }
}

}  // namespace mlcore::MLC_ISA
