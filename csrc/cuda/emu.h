// CPU stand-in for the CUDA subset of kernels/*.cu: one fiber per CUDA thread, blocks one after another, both in an order drawn
// from a seed (MLCORE_EMU_SEED). Shared memory is NaN at the start of every block. Divergent barriers and warp calls, indices
// outside shared arrays and misaligned accesses become errors. The scheduler is emu.cc; tests/native/emulator.py compiles it.
// Not emulated: blocks that wait for one another, and a switch of threads between two synchronisation points.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

#define MLC_EMU_VECTOR(T, name)                                      \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                 \
  struct name##3 { T x, y, z; };                                     \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };           \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
MLC_EMU_VECTOR(float, float)
MLC_EMU_VECTOR(int, int)
MLC_EMU_VECTOR(unsigned, uint)
#undef MLC_EMU_VECTOR

#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)
// A library of emulated kernels has no other thread-local variable: emu.cc finds all of its shared arrays in its TLS block.
#define __shared__ static thread_local
#define MLC_DYNAMIC_SMEM(type, name) type* const name = static_cast<type*>(::mlcore::emu::now.dynamic_smem)

#define threadIdx (::mlcore::emu::now.thread_idx)
#define blockIdx (::mlcore::emu::now.block_idx)
#define blockDim (::mlcore::emu::now.block_dim)
#define gridDim (::mlcore::emu::now.grid_dim)

namespace mlcore::emu {

// What the running thread sees of its launch.
struct Now {
  uint3 thread_idx, block_idx;
  dim3 block_dim, grid_dim;
  unsigned lane;
  void* dynamic_smem;
};
extern Now now;

struct Where {
  const char* file;
  int line;
};
#define MLC_EMU_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

// Ends the launch with an error that names the kernel, the block and the running thread.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

uint64_t random_bits();

// All threads that haven't returned must arrive at the same line.
void block_barrier(Where where);

// The threads of a warp that mask names meet here; the last one calls complete(), which reads and writes their payloads
// (payload[lane] is null for a lane outside `lanes`). Warp functions are this with a payload of arguments and results.
using Complete = void (*)(void* const payload[32], unsigned lanes);
void warp_meet(const char* name, unsigned mask, void* payload, Complete complete, Where where);

// cp.async: the copy happens at a random moment between its issue and the wait that covers it, or never without a wait.
void copy_async(void* shared, const void* global, int bytes, int global_bytes);
void copy_async_commit();
void copy_async_wait(int groups_left);

// Faults unless [p, p + bytes) is the block's shared memory and p is a multiple of alignment.
void check_shared(const char* what, const void* p, size_t bytes, size_t alignment);

// anchor: a thread-local variable of the library that holds the kernel. Throws mlcore::Error on a fault.
void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_smem, const void* anchor, void (*body)(void*),
            void* context);

template <class Payload, void (*kComplete)(Payload* const (&)[32], unsigned)>
void warp_meet(const char* name, unsigned mask, Payload& payload, Where where) {
  warp_meet(
      name, mask, &payload,
      [](void* const erased[32], unsigned lanes) {
        Payload* typed[32];
        for (int i = 0; i < 32; ++i) typed[i] = static_cast<Payload*>(erased[i]);
        kComplete(typed, lanes);
      },
      where);
}

template <class T>
struct Shuffle {
  T value, result;
  unsigned source;
};
template <class T>
void complete_shuffle(Shuffle<T>* const (&p)[32], unsigned lanes) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const unsigned source = p[lane]->source;
    if (!(lanes >> source & 1)) fault("lane %u shuffles from lane %u, which takes no part", lane, source);
    p[lane]->result = p[source]->value;
  }
}
template <class T>
T shuffle(const char* name, unsigned mask, T value, unsigned source, Where where) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles values of 2, 4 or 8 bytes");
  Shuffle<T> payload{value, value, source};
  warp_meet<Shuffle<T>, complete_shuffle<T>>(name, mask, payload, where);
  return payload.result;
}

// Bits of the lanes that take part, and their values reduced by Op.
struct Vote {
  bool predicate;
  unsigned ballot, lanes;
};
void complete_vote(Vote* const (&p)[32], unsigned lanes);

template <class T>
struct Reduction {
  T value, result;
};
template <class T, T (*kOp)(T, T)>
void complete_reduction(Reduction<T>* const (&p)[32], unsigned lanes) {
  T total{};
  bool first = true;
  for (int lane = 0; lane < 32; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    total = first ? p[lane]->value : kOp(total, p[lane]->value);
    first = false;
  }
  for (int lane = 0; lane < 32; ++lane)
    if (lanes >> lane & 1) p[lane]->result = total;
}
template <class T, T (*kOp)(T, T)>
T reduction(const char* name, unsigned mask, T value, Where where) {
  Reduction<T> payload{value, value};
  warp_meet<Reduction<T>, complete_reduction<T, kOp>>(name, mask, payload, where);
  return payload.result;
}
template <class T>
T op_add(T a, T b) {
  return a + b;
}
template <class T>
T op_min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T op_max(T a, T b) {
  return a < b ? b : a;
}
template <class T>
T op_and(T a, T b) {
  return a & b;
}
template <class T>
T op_or(T a, T b) {
  return a | b;
}

}  // namespace mlcore::emu

inline void __syncthreads(MLC_EMU_HERE) { mlcore::emu::block_barrier({file, line}); }

inline mlcore::emu::Vote mlc_emu_vote(const char* name, unsigned mask, bool predicate, mlcore::emu::Where where) {
  mlcore::emu::Vote payload{predicate, 0, 0};
  mlcore::emu::warp_meet<mlcore::emu::Vote, mlcore::emu::complete_vote>(name, mask, payload, where);
  return payload;
}
inline void __syncwarp(unsigned mask = ~0u, MLC_EMU_HERE) { mlc_emu_vote("__syncwarp", mask, false, {file, line}); }
inline unsigned __ballot_sync(unsigned mask, int predicate, MLC_EMU_HERE) {
  return mlc_emu_vote("__ballot_sync", mask, predicate != 0, {file, line}).ballot;
}
inline int __any_sync(unsigned mask, int predicate, MLC_EMU_HERE) {
  return mlc_emu_vote("__any_sync", mask, predicate != 0, {file, line}).ballot != 0;
}
inline int __all_sync(unsigned mask, int predicate, MLC_EMU_HERE) {
  const mlcore::emu::Vote v = mlc_emu_vote("__all_sync", mask, predicate != 0, {file, line});
  return v.ballot == v.lanes;
}

// The source lane of a shuffle is its own lane where the wanted one lies outside its group of `width` lanes.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, MLC_EMU_HERE) {
  const unsigned lane = mlcore::emu::now.lane, group = lane & ~(width - 1u);
  return mlcore::emu::shuffle("__shfl_sync", mask, value, group | (source & (width - 1u)), {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, MLC_EMU_HERE) {
  const unsigned lane = mlcore::emu::now.lane, last = lane | (width - 1u), source = lane ^ lane_mask;
  return mlcore::emu::shuffle("__shfl_xor_sync", mask, value, source <= last ? source : lane, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, MLC_EMU_HERE) {
  const unsigned lane = mlcore::emu::now.lane, last = lane | (width - 1u), source = lane + delta;
  return mlcore::emu::shuffle("__shfl_down_sync", mask, value, source <= last ? source : lane, {file, line});
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, MLC_EMU_HERE) {
  const unsigned lane = mlcore::emu::now.lane, first = lane & ~(width - 1u);
  return mlcore::emu::shuffle("__shfl_up_sync", mask, value, lane >= first + delta ? lane - delta : lane, {file, line});
}

#define MLC_EMU_REDUCE(function, type, op)                                                            \
  inline type function(unsigned mask, type value, MLC_EMU_HERE) {                                     \
    return mlcore::emu::reduction<type, mlcore::emu::op<type>>(#function, mask, value, {file, line}); \
  }
MLC_EMU_REDUCE(__reduce_add_sync, int, op_add)
MLC_EMU_REDUCE(__reduce_add_sync, unsigned, op_add)
MLC_EMU_REDUCE(__reduce_min_sync, int, op_min)
MLC_EMU_REDUCE(__reduce_min_sync, unsigned, op_min)
MLC_EMU_REDUCE(__reduce_max_sync, int, op_max)
MLC_EMU_REDUCE(__reduce_max_sync, unsigned, op_max)
MLC_EMU_REDUCE(__reduce_and_sync, unsigned, op_and)
MLC_EMU_REDUCE(__reduce_or_sync, unsigned, op_or)
#undef MLC_EMU_REDUCE

#include "cuda/emu_math.h"
