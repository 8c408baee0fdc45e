// The three products of a tile, each an accumulator type with the steps of one 64-byte unit of weights:
//   FloatDot   acc += a * w, fused, one k a unit
//   NarrowDot  acc += sum of 4 a * q for codes q <= 127: maddubs adds two products of at most 127 * 127, so 16 bits suffice
//   WideDot    the same for any code up to 255, in 16-bit factors: madd adds two products in 32 bits
//   VnniDot    the same with vpdpbusd
// Included by quant_linear_cpu.inl only.
#pragma once
#include "core/simd/gemm.h"
#include "quant_linear/quant_linear_ivec.h"

namespace mlcore::MLC_ISA {
namespace {

struct FloatDot {
  static constexpr bool kInteger = false, kPairs = false;
  static constexpr int kRows = micro_rows(kPanelVecs);
  using Acc = Vec;
  using B = Vec;
  using A = Vec;
  static B load(const char* p) { return Vec::load(reinterpret_cast<const float*>(p)); }
  static A broadcast(const char* p) { return Vec::set1(*reinterpret_cast<const float*>(p)); }
  static Acc step(Acc acc, A a, B b) { return fma(a, b, acc); }
};

#if defined(MLC_ISA_AVX512) && !defined(MLC_EMULATE_AVX512)
struct VnniDot {
  static constexpr bool kInteger = true, kPairs = false;
  static constexpr int kRows = micro_rows(kPanelVecs);
  using Acc = IVec;
  using B = IVec;
  using A = IVec;
  static B load(const char* p) { return IVec::load(p); }
  static A broadcast(const char* p) { return IVec::set1(*reinterpret_cast<const int32_t*>(p)); }
  static Acc step(Acc acc, A a, B b) {  // asm: the file is compiled for machines without VNNI too, and chosen at run time
    __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(b.v), "v"(a.v));
    return acc;
  }
};
#endif

#if defined(MLC_ISA_AVX512) || defined(MLC_ISA_AVX2)
struct WideDot {
  static constexpr bool kInteger = true, kPairs = true;
  static constexpr int kRows = 4;  // AVX-512: 16 accumulators, 8 factors of w and 2 of a; AVX2: 8, 4 and 2
  struct Pair {
    IVec even, odd;
  };
  using Acc = IVec;
  using B = Pair;
  using A = Pair;
  static B load(const char* p) { return {IVec::load(p).even(), IVec::load(p).odd()}; }
  static A broadcast(const char* p) {
    const IVec v = IVec::set1(*reinterpret_cast<const int32_t*>(p));
    return {v.signed_even(), v.signed_odd()};
  }
  static Acc step(Acc acc, A a, B b) { return acc.plus(a.even.madd(b.even).plus(a.odd.madd(b.odd))); }
};
struct NarrowDot {
  static constexpr bool kInteger = true, kPairs = false;
  static constexpr int kRows = micro_rows(kPanelVecs);
  using Acc = IVec;
  using B = IVec;
  using A = IVec;
  static B load(const char* p) { return IVec::load(p); }
  static A broadcast(const char* p) { return IVec::set1(*reinterpret_cast<const int32_t*>(p)); }
  static Acc step(Acc acc, A a, B b) { return acc.plus(b.maddubs(a).madd(IVec::set1(0x00010001))); }
};
#else
struct WideDot {
  static constexpr bool kInteger = true, kPairs = true;
  static constexpr int kRows = 4;
  using Acc = IVec;
  using B = IVec;
  using A = IVec;
  static B load(const char* p) { return IVec::load(p); }
  static A broadcast(const char* p) {
    int32_t quad;
    memcpy(&quad, p, sizeof quad);
    return IVec::set1(quad);
  }
  static Acc step(Acc acc, A a, B b) {
    return IVec::each([&](int i) {
      uint32_t s = acc.v[i];
      for (int j = 0; j < 32; j += 8)
        s += static_cast<uint32_t>(static_cast<int8_t>(a.v[i] >> j) * static_cast<int32_t>((b.v[i] >> j) & 255));
      return s;
    });
  }
};
using NarrowDot = WideDot;
#endif

constexpr int kVecs = 16 / Vec::W;  // vectors a panel has in a unit

// One segment of a tile of rows. Bytes: a and b stand at the segment's first unit.
struct Tile {
  const char *a, *b;
  int64_t a_stride;  // from row to row, integers only
  int64_t b_stride;  // from panel to panel
  int64_t units;
  float* c;          // sums over groups
  int32_t* partial;  // sums of a run that an earlier segment began
  int64_t ldc;
  const float* scales;
  const uint8_t* zeros;
  int64_t scale_stride;  // from panel to panel
  int32_t offset;
  const int32_t* sums;  // of a over the run, one a row
  bool first, last;
  bool fresh;  // the first group: c holds nothing yet
};

template <class Dot>
inline typename Dot::Acc begin_sum(const Tile& t, int i, int n) {
  if constexpr (Dot::kInteger) {
    if (!t.first) return IVec::load(t.partial + i * t.ldc + n * Vec::W);
    if (!t.zeros) return IVec::set1(-t.offset * t.sums[i]);
    const IVec z = IVec::widen(t.zeros + n / kVecs * t.scale_stride + n % kVecs * Vec::W);
    return z.times(IVec::set1(-t.sums[i]));
  } else {
    return Vec::zero();
  }
}

template <class Dot>
inline void end_sum(const Tile& t, int i, int n, Vec scale, typename Dot::Acc acc) {
  float* c = t.c + i * t.ldc + n * Vec::W;
  if constexpr (Dot::kInteger) {
    if (!t.last) return acc.store(t.partial + i * t.ldc + n * Vec::W);
    const Vec term = acc.to_float() * scale;
    (t.fresh ? term : Vec::load(c) + term).store(c);  // two roundings, as every level can
  } else {
    (t.fresh ? acc * scale : fma(acc, scale, Vec::load(c))).store(c);
  }
}

template <class Dot, int M, int NV>
inline void end_sums(const Tile& t, typename Dot::Acc (&acc)[M][NV]) {
#pragma GCC unroll 16
  for (int n = 0; n < NV; ++n) {
    const Vec scale = Vec::load(t.scales + n / kVecs * t.scale_stride + n % kVecs * Vec::W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) end_sum<Dot>(t, i, n, scale, acc[i][n]);
  }
}

template <class Dot, int M, int NP>
__attribute__((noinline)) void tile(const Tile& from) {
  const Tile t = from;  // in registers: stores can't change it
  constexpr int NV = NP * kVecs;
  typename Dot::Acc acc[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 16
    for (int n = 0; n < NV; ++n) acc[i][n] = begin_sum<Dot>(t, i, n);
  const char *a = t.a, *b = t.b;
  const int64_t a_stride = Dot::kInteger ? t.a_stride : 4, b_stride = t.b_stride;
#pragma GCC unroll 1
  for (int64_t u = 0; u < t.units; ++u) {
    typename Dot::B w[NV];
#pragma GCC unroll 16
    for (int n = 0; n < NV; ++n) w[n] = Dot::load(b + n / kVecs * b_stride + n % kVecs * 4 * Vec::W);
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const typename Dot::A x = Dot::broadcast(a + i * a_stride);
#pragma GCC unroll 16
      for (int n = 0; n < NV; ++n) acc[i][n] = Dot::step(acc[i][n], x, w[n]);
    }
    a += Dot::kInteger ? 4 : 4 * M;
    b += 64;
  }
  end_sums<Dot>(t, acc);
}

// tile() for a number of rows known at run time, at most Dot::kRows.
template <class Dot, int NP, int M = Dot::kRows>
inline void any_tile(int rows, const Tile& t) {
  if constexpr (M > 0) {
    if (rows == M) return tile<Dot, M, NP>(t);
    any_tile<Dot, NP, M - 1>(rows, t);
  }
}

}  // namespace
}  // namespace mlcore::MLC_ISA
