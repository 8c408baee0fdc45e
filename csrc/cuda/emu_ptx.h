// The CPU bodies of ptx.h: fragments are gathered into matrices, computed in fp32 (or int32), and dealt out again.
#pragma once
#include "cuda/types.h"

namespace mlcore::emu {

template <class E>
struct MmaLane {
  const uint32_t *a, *b;
  const E* c;
  E d[4];
};

// Element A[row, k] and B[k, column] of the fragments come from at(register bits, index in the register).
// kPer is the number of elements a register, K = 8 kPer.
template <class E, int kPer, E (*at)(uint32_t, int)>
void complete_mma(MmaLane<E>* const (&p)[32], unsigned lanes) {
  if (lanes != ~0u) fault("mma needs all 32 lanes; got 0x%08x", lanes);
  constexpr int K = 8 * kPer;
  E a[16][K], b[8][K];  // b is transposed
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < kPer; ++i) {
      for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][(t + r / 2 * 4) * kPer + i] = at(p[lane]->a[r], i);
      for (int r = 0; r < 2; ++r) b[g][(t + r * 4) * kPer + i] = at(p[lane]->b[r], i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      E total = p[lane]->c[r];
      for (int k = 0; k < K; ++k) total += a[row][k] * b[column][k];
      p[lane]->d[r] = total;
    }
  }
}

template <class E, int kPer, E (*at)(uint32_t, int)>
void mma(const char* name, E (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const E (&c)[4]) {
  MmaLane<E> payload{a, b, c, {}};
  warp_meet<MmaLane<E>, complete_mma<E, kPer, at>>(name, ~0u, payload, {__builtin_FILE(), __builtin_LINE()});
  std::memcpy(d, payload.d, sizeof d);
}

template <class T>
float element16(uint32_t bits, int i) {
  const float2 pair = cuda::unpack2<T>(bits);
  return i == 0 ? pair.x : pair.y;
}
inline float element_tf32(uint32_t bits, int) { return __uint_as_float(bits & 0xffffe000u); }
inline int element_s8(uint32_t bits, int i) { return static_cast<int8_t>(bits >> 8 * i); }

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  mma<float, 2, element16<T>>("mma_m16n8k16", d, a, b, c);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  mma<float, 1, element_tf32>("mma_m16n8k8_tf32", d, a, b, c);
}
inline void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&c)[4]) {
  mma<int, 4, element_s8>("mma_m16n8k32_s8", d, a, b, c);
}

inline void complete_mma_and(MmaLane<int>* const (&p)[32], unsigned lanes) {
  if (lanes != ~0u) fault("mma needs all 32 lanes; got 0x%08x", lanes);
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r) {
      const int g = lane / 4, column = lane % 4 * 2 + r % 2;
      int total = p[lane]->c[r];
      for (int t = 0; t < 4; ++t)
        for (int half = 0; half < 2; ++half) total += __popc(p[g * 4 + t]->a[2 * half + r / 2] & p[column * 4 + t]->b[half]);
      p[lane]->d[r] = total;
    }
}
inline void mma_m16n8k256_and(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&c)[4]) {
  MmaLane<int> payload{a, b, c, {}};
  warp_meet<MmaLane<int>, complete_mma_and>("mma_m16n8k256_and", ~0u, payload, {__builtin_FILE(), __builtin_LINE()});
  std::memcpy(d, payload.d, sizeof d);
}

inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x - x != 0 ? bits & 0xffffe000u : (bits + 0x1000u) & 0xffffe000u;
}

template <int N>
struct LdmatrixLane {
  const void* row;
  uint32_t r[N];
};
template <bool Trans, int N>
void complete_ldmatrix(LdmatrixLane<N>* const (&p)[32], unsigned lanes) {
  if (lanes != ~0u) fault("ldmatrix needs all 32 lanes; got 0x%08x", lanes);
  for (int i = 0; i < N; ++i) {
    uint16_t m[8][8];
    for (int j = 0; j < 8; ++j) {
      check_shared("ldmatrix", p[8 * i + j]->row, 16, 16);
      std::memcpy(m[j], p[8 * i + j]->row, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      p[lane]->r[i] = Trans ? m[t][g] | uint32_t{m[t + 1][g]} << 16 : m[g][t] | uint32_t{m[g][t + 1]} << 16;
    }
  }
}
template <bool Trans, int N>
void ldmatrix(uint32_t (&r)[N], const void* row) {
  LdmatrixLane<N> payload{row, {}};
  warp_meet<LdmatrixLane<N>, complete_ldmatrix<Trans, N>>("ldmatrix", ~0u, payload, {__builtin_FILE(), __builtin_LINE()});
  std::memcpy(r, payload.r, sizeof r);
}

}  // namespace mlcore::emu
