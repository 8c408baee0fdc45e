// What ops over (B, H, T, cols) operands share: rows of tokens in and out of fp32 tiles, whose rows are padded to whole
// vectors, and pieces of a thread's memory.
#pragma once
#include "core/simd/gemm.h"
#include "core/simd/rows.h"
#include "core/tokens.h"

namespace mlcore::MLC_ISA {

constexpr double kLog2e = 1.4426950408889634;

inline int64_t padded(int64_t cols) { return round_up<int64_t>(cols, Vec::W); }

// 2^x for any x: saturates above.
inline Vec power(Vec x) { return exp2(min(Vec::set1(127.0f), x)); }

// Hands out pieces of a block; with a null block it only counts.
class Arena {
 public:
  explicit Arena(float* base) : base_(base) {}
  float* take(int64_t floats) {
    float* at = base_ ? base_ + used : nullptr;
    used += round_up<int64_t>(floats, 16);
    return at;
  }
  int64_t used = 0;

 private:
  float* base_;
};

template <class T>
T* token(const Tokens& x, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(x.data) + b * x.sb + h * x.sh + t * x.st;
}

// Rows [t, t + n); columns from cols to padded(cols) become 0.
inline void load_rows(const Tokens& x, int64_t b, int64_t h, int64_t t, int n, int64_t cols, float* dst, int64_t ld) {
  with_type(x.dtype, [&](auto tag) {
    for (int i = 0; i < n; ++i) {
      const auto* src = token<decltype(tag)>(x, b, h, t + i);
      for_row(cols, [&](int64_t c, int m) { load_some(src + c, m).store(dst + i * ld + c); });
    }
  });
}

// Columns [c0, c1) of rows [t, t + n).
inline void store_rows(const Tokens& x, int64_t b, int64_t h, int64_t t, int n, int64_t c0, int64_t c1, const float* src,
                       int64_t ld) {
  with_type(x.dtype, [&](auto tag) {
    for (int i = 0; i < n; ++i) {
      auto* out = token<decltype(tag)>(x, b, h, t + i);
      for_row(c1 - c0, [&](int64_t c, int m) { store_some(out + c0 + c, Vec::load(src + i * ld + c0 + c), m); });
    }
  });
}

// dst (cols, ld_out) is the transpose of src (rows, cols), rows up to the next whole vector filled with zeros.
inline void turn(const float* src, int64_t ld, int rows, int64_t cols, int64_t ld_out, float* dst) {
  pack_transposed(src, ld, rows, cols, OneScale{1.0f}, ld_out, ld_out, dst);
}

}  // namespace mlcore::MLC_ISA
