// float16 and bfloat16 under one name on the GPU and in the emulator, and packs of elements that move as one access.
#pragma once
#include "cuda/device.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mlcore::cuda {

#ifdef __CUDACC__

using bf16 = __nv_bfloat16;
using f16 = __half;

MLC_DEVICE float to_float(float x) { return x; }
MLC_DEVICE float to_float(bf16 x) { return __bfloat162float(x); }
MLC_DEVICE float to_float(f16 x) { return __half2float(x); }

template <class T>
MLC_DEVICE T from_float(float x);
template <>
MLC_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
MLC_DEVICE bf16 from_float<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
MLC_DEVICE f16 from_float<f16>(float x) {
  return __float2half_rn(x);
}

// Two elements as the 32-bit register of an mma fragment; lo is the lower half.
template <class T>
MLC_DEVICE uint32_t pack2(float lo, float hi);
template <>
MLC_DEVICE uint32_t pack2<bf16>(float lo, float hi) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(pair);
}
template <>
MLC_DEVICE uint32_t pack2<f16>(float lo, float hi) {
  const __half2 pair = __floats2half2_rn(lo, hi);
  return reinterpret_cast<const uint32_t&>(pair);
}

#else

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16, exponent = x.bits >> 10 & 31, mantissa = x.bits & 0x3ffu;
  if (exponent == 0) return std::copysign(std::ldexp(static_cast<float>(mantissa), -24), __uint_as_float(sign));
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | mantissa << 13);
  return __uint_as_float(sign | (exponent + 112) << 23 | mantissa << 13);
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
template <>
inline f16 from_float<f16>(float x) {
  const uint16_t sign = __float_as_uint(x) >> 16 & 0x8000u;
  if (x != x) return {0x7fff};
  x = std::fabs(x);
  if (x >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (x < 0x1p-14f) return {static_cast<uint16_t>(sign | static_cast<int>(std::nearbyint(x * 0x1p24f)))};  // subnormal
  uint32_t bits = __float_as_uint(x);
  bits += 0xfffu + (bits >> 13 & 1);
  return {static_cast<uint16_t>(sign | (bits - (112u << 23)) >> 13)};
}

template <class T>
uint32_t pack2(float lo, float hi) {
  return from_float<T>(lo).bits | static_cast<uint32_t>(from_float<T>(hi).bits) << 16;
}

// The two elements of a fragment register, for the CPU bodies of ptx.h.
template <class T>
float2 unpack2(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

#endif

// N elements that are loaded and stored by accesses of up to 16 bytes, to which their address must be aligned.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

template <int N, class T>
MLC_DEVICE Pack<T, N> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}
template <int N, class T>
MLC_DEVICE void store_pack(T* p, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(p) = pack;
}

}  // namespace mlcore::cuda
