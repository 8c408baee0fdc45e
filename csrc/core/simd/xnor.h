// Products of rows of signs by counting the bits in which they differ: sum_k a_k w_k = K - 2 |{k : a_k != w_k}|.
// A word holds 32 signs, the one of k in bit 8 (k % 4) + k / 4, set for +1: the order of a 1-bit PackedWeight ("panel16"),
// whose panels are (words, 16 columns). Bits of padding are 0 on both sides and so never differ.
#pragma once
#include "core/sign_panels.h"
#include "core/simd/rows.h"

namespace mlcore::MLC_ISA {

// Bit k of m to bit 8 (k % 4) + k / 4: four exchanges of two bits of k's number.
inline uint32_t order_signs(uint32_t m) {
  const auto exchange = [&](uint32_t mask, int shift) {
    const uint32_t t = (m ^ (m >> shift)) & mask;
    m ^= t ^ (t << shift);
  };
  exchange(0x0000ccccu, 14), exchange(0x00aa00aau, 7), exchange(0x0c0c0c0cu, 2), exchange(0x22222222u, 1);
  return m;
}

inline Vec absolute(Vec v) { return max(v, Vec::zero() - v); }  // NaN stays

inline void order_words(uint32_t* words, int64_t n) {
  for (int64_t w = 0; w < n; ++w) words[w] = order_signs(words[w]);
}

// Signs of x[0:n] to words in the order of x, +1 but where x < 0: order_words() is to follow.
template <class T>
inline void sign_bits(const T* x, int64_t n, uint32_t* words) {
  for (int64_t w = 0; w * 32 < n; ++w) {
    uint32_t m = 0;
    for (int i = 0; i < 32 && w * 32 + i < n; i += Vec::W) {
      const int some = static_cast<int>(min<int64_t>(Vec::W, n - w * 32 - i));
      m |= (~less(load_some(x + w * 32 + i, some), Vec::zero()) & ((1u << some) - 1u)) << i;
    }
    words[w] = m;
  }
}

template <class T>
inline void sign_words(const T* x, int64_t n, uint32_t* words) {
  sign_bits(x, n, words);
  order_words(words, ceil_div<int64_t>(n, 32));
}

template <class T>
inline float mean_magnitude(const T* x, int64_t n) {
  const float total = sum_row(n, [&](int64_t c, int some) { return absolute(load_some(x + c, some)); });
  return total / static_cast<float>(max<int64_t>(n, 1));
}

// Words of W pixels side by side, a channel at a time.
struct SignWords {
#if defined(MLC_ISA_AVX512) && !defined(MLC_EMULATE_AVX512)
  __m512i v = _mm512_setzero_si512();
  void mark(Vec x, uint32_t bit) {
    const __mmask16 at = _mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NLT_UQ);
    v = _mm512_mask_or_epi32(v, at, v, _mm512_set1_epi32(static_cast<int>(bit)));
  }
#elif defined(MLC_ISA_AVX2)
  __m256i v = _mm256_setzero_si256();
  void mark(Vec x, uint32_t bit) {
    const __m256i at = _mm256_castps_si256(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NLT_UQ));
    v = _mm256_or_si256(v, _mm256_and_si256(at, _mm256_set1_epi32(static_cast<int>(bit))));
  }
#else
  uint32_t v[Vec::W] = {};
  void mark(Vec x, uint32_t bit) {
    const uint32_t negative = less(x, Vec::zero());
    for (int i = 0; i < Vec::W; ++i) v[i] |= (negative >> i) & 1u ? 0u : bit;
  }
#endif
  void store(uint32_t* to, int64_t stride, int n) const {
    uint32_t words[Vec::W];
    memcpy(words, &v, sizeof words);
    for (int i = 0; i < n; ++i) to[i * stride] = words[i];
  }
};

// Counters of differing bits, one 32-bit lane a column: kVecs vectors a panel. Counters of bytes overflow after kBlock words.
#if defined(MLC_ISA_AVX512) && !defined(MLC_EMULATE_AVX512)
struct WideSigns {
  struct V {
    __m512i v;
  };
  static constexpr int kVecs = 1, kRows = 6, kPanels = 4;  // 24 counters, 4 vectors of w, one word of a
  static V zero() { return {_mm512_setzero_si512()}; }
  static V load(const char* p) { return {_mm512_loadu_si512(p)}; }
  static V set1(uint32_t a) { return {_mm512_set1_epi32(static_cast<int>(a))}; }
  static V add(V a, V b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static void store(int32_t* p, V v) { _mm512_storeu_si512(p, v.v); }
};
struct PopcountSigns : WideSigns {
  static constexpr int64_t kBlock = int64_t{1} << 40;
  static V step(V count, V a, V w) {  // asm: the file is compiled for machines without VPOPCNTDQ too, and chosen at run time
    __m512i x = _mm512_xor_si512(a.v, w.v);
    __asm__("vpopcntd %0, %0" : "+v"(x));
    return {_mm512_add_epi32(count.v, x)};
  }
  static V fold(V count) { return count; }
};
struct NibbleSigns : WideSigns {
  static constexpr int64_t kBlock = 31;  // 8 bits a byte and word
  static V step(V count, V a, V w) {
    const __m512i x = _mm512_xor_si512(a.v, w.v), low = _mm512_set1_epi8(15);
    const __m512i bits = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    const __m512i sum = _mm512_add_epi8(count.v, _mm512_shuffle_epi8(bits, _mm512_and_si512(x, low)));
    return {_mm512_add_epi8(sum, _mm512_shuffle_epi8(bits, _mm512_and_si512(_mm512_srli_epi16(x, 4), low)))};
  }
  static V fold(V count) {
    return {_mm512_madd_epi16(_mm512_maddubs_epi16(count.v, _mm512_set1_epi8(1)), _mm512_set1_epi16(1))};
  }
};
#elif defined(MLC_ISA_AVX2)
struct NibbleSigns {
  using V = __m256i;
  static constexpr int kVecs = 2, kRows = 4, kPanels = 1;  // 8 counters, 2 vectors of w, the table and its mask
  static constexpr int64_t kBlock = 31;
  static V zero() { return _mm256_setzero_si256(); }
  static V load(const char* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static V set1(uint32_t a) { return _mm256_set1_epi32(static_cast<int>(a)); }
  static V add(V a, V b) { return _mm256_add_epi32(a, b); }
  static void store(int32_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  static V step(V count, V a, V w) {
    const V x = _mm256_xor_si256(a, w), low = _mm256_set1_epi8(15);
    const V bits = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4));
    count = _mm256_add_epi8(count, _mm256_shuffle_epi8(bits, _mm256_and_si256(x, low)));
    return _mm256_add_epi8(count, _mm256_shuffle_epi8(bits, _mm256_and_si256(_mm256_srli_epi16(x, 4), low)));
  }
  static V fold(V count) { return _mm256_madd_epi16(_mm256_maddubs_epi16(count, _mm256_set1_epi8(1)), _mm256_set1_epi16(1)); }
};
#else
struct NibbleSigns {
  struct V {
    uint32_t lane[4];
  };
  static constexpr int kVecs = 4, kRows = 2, kPanels = 1;
  static constexpr int64_t kBlock = int64_t{1} << 40;
  static V zero() { return {}; }
  static V load(const char* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static V set1(uint32_t a) { return {{a, a, a, a}}; }
  static V add(V a, V b) {
    for (int i = 0; i < 4; ++i) a.lane[i] += b.lane[i];
    return a;
  }
  static void store(int32_t* p, V v) { memcpy(p, &v, sizeof v); }
  static V step(V count, V a, V w) {
    for (int i = 0; i < 4; ++i) {
      uint32_t x = a.lane[i] ^ w.lane[i];
      x -= (x >> 1) & 0x55555555u;
      x = (x & 0x33333333u) + ((x >> 2) & 0x33333333u);
      count.lane[i] += (((x + (x >> 4)) & 0x0f0f0f0fu) * 0x01010101u) >> 24;
    }
    return count;
  }
  static V fold(V count) { return count; }
};
#endif

constexpr int kSignColumns = 64;  // columns that are counted together: four panels, two words of a packed result

// counts[r][n] (rows kSignColumns apart), or what is added to it: bits in which words [0, words) of R rows of a differ from
// those of P panels' columns. At most Signs::kBlock words.
template <class Signs, int R, int P>
__attribute__((noinline)) void count_block(const uint32_t* a, int64_t lda, const char* w, int64_t panel_bytes, int64_t words,
                                           bool first, int32_t* counts) {
  constexpr int kPer = Signs::kVecs, Q = P * kPer, kBytes = 64 / kPer;
  typename Signs::V count[R][Q];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) count[r][q] = Signs::zero();
#pragma GCC unroll 1
  for (int64_t k = 0; k < words; ++k) {
    typename Signs::V b[Q];
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) b[q] = Signs::load(w + q / kPer * panel_bytes + k * 64 + q % kPer * kBytes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename Signs::V x = Signs::set1(a[r * lda + k]);
#pragma GCC unroll 16
      for (int q = 0; q < Q; ++q) count[r][q] = Signs::step(count[r][q], x, b[q]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q) {
      int32_t* to = counts + r * kSignColumns + q * (16 / kPer);
      const typename Signs::V folded = Signs::fold(count[r][q]);
      Signs::store(to, first ? folded : Signs::add(folded, Signs::load(reinterpret_cast<const char*>(to))));
    }
}

template <class Signs, int R, int P>
inline void count_tile(const uint32_t* a, int64_t lda, const char* w, int64_t panel_bytes, int64_t words, int32_t* counts) {
  for (int64_t k = 0; k == 0 || k < words; k += Signs::kBlock)
    count_block<Signs, R, P>(a + k, lda, w + k * 64, panel_bytes, min(Signs::kBlock, words - k), k == 0, counts);
}

template <class Signs, int P, int R = Signs::kRows>
inline void count_some_rows(int rows, const uint32_t* a, int64_t lda, const char* w, int64_t panel_bytes, int64_t words,
                            int32_t* counts) {
  if constexpr (R > 1) {
    if (rows < R) return count_some_rows<Signs, P, R - 1>(rows, a, lda, w, panel_bytes, words, counts);
  }
  count_tile<Signs, R, P>(a, lda, w, panel_bytes, words, counts);
}

template <class Signs>
inline void count_rows(int rows, int64_t panels, const uint32_t* a, int64_t lda, const char* w, int64_t panel_bytes,
                       int64_t words, int32_t* counts) {
  if (Signs::kPanels > 1 && panels == Signs::kPanels)
    return count_some_rows<Signs, Signs::kPanels>(rows, a, lda, w, panel_bytes, words, counts);
  for (int64_t p = 0; p < panels; ++p)
    count_some_rows<Signs, 1>(rows, a, lda, w + p * panel_bytes, panel_bytes, words, counts + p * 16);
}

template <class F>
inline auto with_signs([[maybe_unused]] bool popcount, F&& body) {
#if defined(MLC_ISA_AVX512) && !defined(MLC_EMULATE_AVX512)
  if (popcount) return body(PopcountSigns{});
#endif
  return body(NibbleSigns{});
}

// finish(r, counts): the counts of row r of a for kSignColumns columns from panel `panel` on (fewer where the panels end).
template <class F>
inline void for_counted_rows(const SignPanels& w, const uint32_t* a, int64_t lda, int64_t rows, int64_t panel, F&& finish) {
  const int64_t panels = min<int64_t>(kSignColumns / 16, w.panels - panel);
  const char* codes = reinterpret_cast<const char*>(w.codes) + panel * w.panel_bytes;
  with_signs(w.popcount, [&](auto signs) {
    using Signs = decltype(signs);
    alignas(64) int32_t counts[Signs::kRows * kSignColumns];
    for (int64_t r = 0; r < rows; r += Signs::kRows) {
      const int some = static_cast<int>(min<int64_t>(Signs::kRows, rows - r));
      count_rows<Signs>(some, panels, a + r * lda, lda, codes, w.panel_bytes, w.words, counts);
      for (int i = 0; i < some; ++i) finish(r + i, counts + i * kSignColumns);
    }
  });
}

// y[0:width] = ((terms - 2 counts) scale[n] row_scale) + bias[n], rounded after each step as torch does.
inline void scale_counts(const SignPanels& w, int64_t n0, int64_t width, int64_t terms, const int32_t* counts,
                         const float* row_scale, float* y) {
  float whole[kSignColumns];
  for (int i = 0; i < round_up<int>(static_cast<int>(width), 16); ++i)
    whole[i] = static_cast<float>(static_cast<int32_t>(terms) - 2 * counts[i]);
  for_row(width, [&](int64_t c, int n) {
    Vec v = Vec::load(whole + c) * Vec::load(w.scales + n0 + c);  // both are padded to whole panels
    if (row_scale) v = v * Vec::set1(*row_scale);
    if (w.bias) v = v + load_some(w.bias + n0 + c, n);
    store_some(y + c, v, n);
  });
}

}  // namespace mlcore::MLC_ISA
