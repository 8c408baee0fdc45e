// Loops over one row of C elements, W at a time with one tail step, shared by the ops that work row by row.
#pragma once
#include "core/row_args.h"
#include "core/simd/vec.h"

namespace mlcore::MLC_ISA {

// step(c, n): handles elements [c, c + n); n is the full width but in the last step.
template <class F>
inline void for_row(int64_t cols, F&& step) {
  int64_t c = 0;
  for (; c + Vec::W <= cols; c += Vec::W) step(c, Vec::W);
  if (c < cols) step(c, static_cast<int>(cols - c));
}

template <class T>
inline Vec load_some(const T* p, int n) {
  return n == Vec::W ? Vec::load(p) : Vec::load_n(p, n);
}
template <class T>
inline void store_some(T* p, Vec v, int n) {
  n == Vec::W ? v.store(p) : v.store_n(p, n);
}

// v with lanes >= n set to 0.
inline Vec keep_some(Vec v, int n) { return n == Vec::W ? v : select((1u << n) - 1u, v, Vec::zero()); }

// Row r of a tensor of T; null where the tensor was left out.
template <class T>
inline T* row(const Rows& rows, int64_t r) {
  return rows.data ? static_cast<T*>(rows.data) + r * rows.stride : nullptr;
}

// Two sums that are taken in one pass over a row.
struct VecPair {
  Vec a, b;
  static VecPair zero() { return {Vec::zero(), Vec::zero()}; }
};
struct FloatPair {
  float a, b;
};
inline VecPair operator+(VecPair x, VecPair y) { return {x.a + y.a, x.b + y.b}; }
inline FloatPair sum(VecPair v) { return {sum(v.a), sum(v.b)}; }

// sum_c term(c, n), a float or, of a VecPair, a FloatPair: four chains hide the latency of the additions. Lanes >= n of a
// term must be 0. The order of the additions depends on cols alone.
template <class F>
inline auto sum_row(int64_t cols, F&& term) {
  using Sum = decltype(term(int64_t{}, int{}));
  Sum a = Sum::zero(), b = Sum::zero(), d = Sum::zero(), e = Sum::zero();
  constexpr int W = Vec::W;
  int64_t c = 0;
  for (; c + 4 * W <= cols; c += 4 * W) {
    a = a + term(c, W);
    b = b + term(c + W, W);
    d = d + term(c + 2 * W, W);
    e = e + term(c + 3 * W, W);
  }
  for (; c + W <= cols; c += W) a = a + term(c, W);
  if (c < cols) b = b + term(c, static_cast<int>(cols - c));
  return sum((a + b) + (d + e));
}

// out[r,:] = x[r,:] + residual[r,:], rounded to T; returns the row of out, which is what a gradient will see.
template <class T>
inline const T* add_rows(int64_t cols, const Rows& x, const Rows& residual, const Rows& out, int64_t r) {
  const T *a = row<T>(x, r), *b = row<T>(residual, r);
  T* s = row<T>(out, r);
  for_row(cols, [&](int64_t c, int n) { store_some(s + c, load_some(a + c, n) + load_some(b + c, n), n); });
  return s;
}

// The partial row of a block, set to 0; null where no partial sums are wanted.
inline float* zero_partial(float* partial, int64_t block, int64_t cols) {
  if (!partial) return nullptr;
  memset(partial + block * cols, 0, sizeof(float) * static_cast<size_t>(cols));
  return partial + block * cols;
}

// Calls body(T{}) with the element type that dtype names: float, bf16 or f16.
template <class F>
inline void with_type(Dtype dtype, F&& body) {
  switch (dtype) {
    case Dtype::bf16: return body(bf16{});
    case Dtype::f16: return body(f16{});
    default: return body(float{});
  }
}

// Calls body(T{}, TV{}): the element types of rows and of a vector beside them, which is dtype or float32.
template <class F>
inline void with_types(Dtype dtype, Dtype vector_dtype, F&& body) {
  with_type(dtype, [&](auto t) {
    if (vector_dtype == Dtype::f32) return body(t, float{});
    body(t, t);
  });
}

// The sum of N terms as a tree, in a fixed order.
template <int N>
inline Vec tree_sum(const Vec (&terms)[N]) {
  static_assert(N == 1 || N == 4);
  if constexpr (N == 4) return (terms[0] + terms[1]) + (terms[2] + terms[3]);
  return terms[0];
}

// out[:] = sum over p of partial[p, :] for columns [begin, end), in an order that depends on count alone: groups of eight, so
// that no chain of additions is longer than 16. Nothing where out was left out.
inline void add_partials(const float* partial, int64_t count, int64_t cols, int64_t begin, int64_t end, const RowVector& out) {
  if (!out.data) return;
  with_type(out.dtype, [&](auto t) {
    decltype(t)* o = static_cast<decltype(t)*>(out.data);
    for_row(end - begin, [&](int64_t c, int n) {
      Vec total = Vec::zero();
      for (int64_t first = 0; first < count; first += 8) {
        Vec group = Vec::zero();
        for (int64_t p = first; p < min<int64_t>(first + 8, count); ++p)
          group = group + load_some(partial + p * cols + begin + c, n);
        total = total + group;
      }
      store_some(o + begin + c, total, n);
    });
  });
}

}  // namespace mlcore::MLC_ISA
