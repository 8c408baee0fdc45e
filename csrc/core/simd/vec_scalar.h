// Vec in plain C++: four lanes that any compiler turns into what the machine has. The level that always works.
#pragma once
#include <math.h>

namespace mlcore::MLC_ISA {

struct Vec {
  static constexpr int W = 4;
  float v[W];

  static Vec zero() { return set1(0.0f); }
  static Vec set1(float x) { return {{x, x, x, x}}; }
  template <class T>
  static Vec load(const T* p) {
    return {{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}};
  }
  // Lanes whose bit is not set are 0 and their memory is not touched.
  static Vec load_lanes(const float* p, uint32_t lanes) {
    Vec r = zero();
    for (int i = 0; i < W; ++i)
      if ((lanes >> i) & 1u) r.v[i] = p[i];
    return r;
  }
  template <class T>
  static Vec load_n(const T* p, int n) {  // lanes >= n are 0 and their memory is not touched
    Vec r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = to_float(p[i]);
    return r;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < W; ++i) p[i] = from_float<T>(v[i]);
  }
  template <class T>
  void store_n(T* p, int n) const {
    for (int i = 0; i < n; ++i) p[i] = from_float<T>(v[i]);
  }
};

#define MLC_LANES(expr)                             \
  Vec r;                                            \
  for (int i = 0; i < Vec::W; ++i) r.v[i] = (expr); \
  return r
inline Vec operator+(Vec a, Vec b) { MLC_LANES(a.v[i] + b.v[i]); }
inline Vec operator-(Vec a, Vec b) { MLC_LANES(a.v[i] - b.v[i]); }
inline Vec operator*(Vec a, Vec b) { MLC_LANES(a.v[i] * b.v[i]); }
inline Vec operator/(Vec a, Vec b) { MLC_LANES(a.v[i] / b.v[i]); }
inline Vec fma(Vec a, Vec b, Vec c) { MLC_LANES(a.v[i] * b.v[i] + c.v[i]); }
// As the x86 instructions: the second operand where either is NaN.
inline Vec max(Vec a, Vec b) { MLC_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Vec min(Vec a, Vec b) { MLC_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Vec round(Vec a) { MLC_LANES(nearbyintf(a.v[i])); }
inline Vec scale_by_power(Vec p, Vec n) {  // p * 2^n for p near 1, n a whole number in [-127, 127]
  MLC_LANES(float_of(bits_of(p.v[i]) + (bits_of(n.v[i] + 12582912.0f) << 23)));  // 3 * 2^22: n in the low bits
}
// Lane i of a where bit i is set, else of b.
inline Vec select(uint32_t bits, Vec a, Vec b) { MLC_LANES((bits >> i) & 1u ? a.v[i] : b.v[i]); }
// Bit i set where lane i of a is less than b's.
inline uint32_t less(Vec a, Vec b) {
  uint32_t bits = 0;
  for (int i = 0; i < Vec::W; ++i) bits |= static_cast<uint32_t>(a.v[i] < b.v[i]) << i;
  return bits;
}
#undef MLC_LANES

// The lanes of even numbers of a, then of b.
inline Vec even_lanes(Vec a, Vec b) { return {{a.v[0], a.v[2], b.v[0], b.v[2]}}; }
// a0 b0 a1 b1 ... in two vectors, low and high.
inline void interleave(Vec a, Vec b, Vec& low, Vec& high) {
  low = {{a.v[0], b.v[0], a.v[1], b.v[1]}}, high = {{a.v[2], b.v[2], a.v[3], b.v[3]}};
}

inline float sum(Vec a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
inline float hmax(Vec a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2], y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}

// r[i] lane j becomes r[j] lane i.
inline void transpose(Vec (&r)[Vec::W]) {
  for (int i = 0; i < Vec::W; ++i)
    for (int j = 0; j < i; ++j) {
      const float t = r[i].v[j];
      r[i].v[j] = r[j].v[i];
      r[j].v[i] = t;
    }
}

}  // namespace mlcore::MLC_ISA
