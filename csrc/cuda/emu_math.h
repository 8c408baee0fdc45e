// The emulated device's arithmetic intrinsics and atomics: emu.h includes this, kernels don't.
// Fast-math intrinsics are exact here; their error on the GPU belongs into an op's tolerance.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using std::max;
using std::min;

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? std::min(x, 1.0f) : 0.0f; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float_as_int(float x) {
  int bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(__float_as_int(x)); }
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __uint_as_float(unsigned bits) { return __int_as_float(static_cast<int>(bits)); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
// Four signed bytes of a times four of b, added to c.
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}
// Byte i of the result is byte (selector nibble i) of the eight bytes b:a; nibbles above 7 replicate a sign and aren't
// emulated.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}

template <class T>
T __ldg(const T* p) {
  return *p;
}

// Only one fiber runs at a time, so a plain read-modify-write is atomic; the order of threads is still the scheduler's.
template <class T, class F>
T mlc_emu_atomic(T* p, F&& update) {
  const T old = *p;
  *p = update(old);
  return old;
}
template <class T>
T atomicAdd(T* p, T v) {
  return mlc_emu_atomic(p, [&](T old) { return old + v; });
}
template <class T>
T atomicMax(T* p, T v) {
  return mlc_emu_atomic(p, [&](T old) { return std::max(old, v); });
}
template <class T>
T atomicMin(T* p, T v) {
  return mlc_emu_atomic(p, [&](T old) { return std::min(old, v); });
}
template <class T>
T atomicOr(T* p, T v) {
  return mlc_emu_atomic(p, [&](T old) { return old | v; });
}
template <class T>
T atomicAnd(T* p, T v) {
  return mlc_emu_atomic(p, [&](T old) { return old & v; });
}
template <class T>
T atomicExch(T* p, T v) {
  return mlc_emu_atomic(p, [&](T) { return v; });
}
template <class T>
T atomicCAS(T* p, T expected, T v) {
  return mlc_emu_atomic(p, [&](T old) { return old == expected ? v : old; });
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { mlcore::emu::fault("__trap()"); }
