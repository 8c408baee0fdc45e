// PTX instructions as functions, each with a CPU body that follows the fragment layouts of the PTX ISA manual:
// mma (bf16, f16, tf32, s8, b1), ldmatrix, cp.async. Everything here needs sm_80 or later.
// Not here yet: wgmma, TMA (cp.async.bulk.tensor) and mbarrier of sm_90a; a kernel that uses them brings them with a CPU body.
#pragma once
#include <type_traits>

#include "cuda/types.h"
#ifndef __CUDACC__
#include "cuda/emu_ptx.h"
#endif

namespace mlcore::cuda {

// Layouts, with g = lane / 4 and t = lane % 4; a register of 32 bits holds neighbours in k, the first in its low bits:
//   A (16 x k): registers alternate rows g, g + 8, then the halves of k     B (k x 8): column g, registers step through k
//   C, D (16 x 8): d[0], d[1] are row g, columns 2t, 2t + 1; d[2], d[3] are row g + 8

// d = a b + c with T = bf16 or f16, fp32 sums. a: (16, 16) row-major, b: (16, 8) column-major.
//   a[0] row g, k 2t..2t+1    a[1] row g + 8    a[2] row g, k 2t+8..2t+9    a[3] row g + 8    b[i] k 2t+8i..2t+8i+1
template <class T>
MLC_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                   "f"(c[3]));
  } else {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                   "f"(c[3]));
  }
#else
  emu::mma_m16n8k16<T>(d, a, b, c);
#endif
}

// tf32: a register holds one float of which the low 13 bits are dropped; round with to_tf32 first.
//   a[0] row g, k t    a[1] row g + 8    a[2] row g, k t+4    a[3] row g + 8    b[i] k t+4i
MLC_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
#ifdef __CUDACC__
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
#else
  emu::mma_m16n8k8_tf32(d, a, b, c);
#endif
}

// The nearest tf32 value (ties away from zero) in a float's bits.
MLC_DEVICE uint32_t to_tf32(float x) {
#ifdef __CUDACC__
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return emu::to_tf32(x);
#endif
}

// Signed bytes, four a register, int32 sums.
//   a[0] row g, k 4t..4t+3    a[1] row g + 8    a[2] row g, k 4t+16..4t+19    a[3] row g + 8    b[i] k 4t+16i..4t+16i+3
MLC_DEVICE void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&c)[4]) {
#ifdef __CUDACC__
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
  emu::mma_m16n8k32_s8(d, a, b, c);
#endif
}

// Single bits, 32 a register: d = c + the number of k at which both a and b are set.
//   a[0] row g, k 32t..32t+31    a[1] row g + 8    a[2] row g, k 128+32t..128+32t+31    a[3] row g + 8    b[i] k 128i+32t..
// One instruction (BMMA) on sm_80 to sm_90; for sm_100 the compiler makes it of products of bytes. Its sibling that counts
// differing bits (xor) is one only up to sm_89.
MLC_DEVICE void mma_m16n8k256_and(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const int (&c)[4]) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
#else
  emu::mma_m16n8k256_and(d, a, b, c);
#endif
}

#ifdef __CUDACC__
MLC_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
#endif

// Loads N (1, 2 or 4) 8x8 matrices of 16-bit elements from shared memory. Lane 8 i + j gives the 16-byte aligned address of
// row j of matrix i; r[i] gets row g, columns 2t and 2t + 1 of matrix i, or with Trans rows 2t and 2t + 1 of column g.
template <bool Trans = false, int N>
MLC_DEVICE void ldmatrix(uint32_t (&r)[N], const void* row) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef __CUDACC__
  const uint32_t address = shared_address(row);
  if constexpr (N == 1 && !Trans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (N == 1) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(address) : "memory");
  } else if constexpr (N == 2 && !Trans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(address)
                 : "memory");
  } else if constexpr (!Trans) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
  }
#else
  emu::ldmatrix<Trans, N>(r, row);
#endif
}

// Starts a copy of Bytes (4, 8 or 16) from global to shared memory, both aligned to Bytes. Only the first global_bytes are
// read, the rest is zero: 0 is how a tile's edge is filled. Visible to this thread after cp_async_wait, to others after a
// barrier.
template <int Bytes>
MLC_DEVICE void cp_async(void* shared, const void* global, int global_bytes = Bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef __CUDACC__
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(global_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global), "n"(Bytes),
                 "r"(global_bytes)
                 : "memory");
  }
#else
  emu::copy_async(shared, global, Bytes, global_bytes);
#endif
}

// Closes the group of the copies that this thread has started since the last commit.
MLC_DEVICE void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::copy_async_commit();
#endif
}

// Waits until at most N of this thread's latest groups are unfinished.
template <int N>
MLC_DEVICE void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  emu::copy_async_wait(N);
#endif
}

}  // namespace mlcore::cuda
