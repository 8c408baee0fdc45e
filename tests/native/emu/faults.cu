// Kernels that are wrong on purpose: the emulator must say so. Never run on a GPU.
#include "core/status.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"

using namespace mlcore;
using namespace mlcore::cuda;

namespace {

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void barrier_against_shuffle(int* out) {
  if (threadIdx.x % 2)
    __syncthreads();
  else
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 2);
}

__global__ void divergent_warp(int* out) {
  out[threadIdx.x] = threadIdx.x % 2 ? __any_sync(~0u, 1) : static_cast<int>(__ballot_sync(~0u, 1));
}

__global__ void shuffle_from_outside(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1, 16);
}

__global__ void mask_without_self(int* out) { out[threadIdx.x] = __any_sync(1, 1); }

__global__ void partial_mma(int* out) {
  if (threadIdx.x == 0) return;
  float d[4], c[4] = {};
  uint32_t a[4] = {}, b[2] = {};
  mma_m16n8k16<bf16>(d, a, b, c);
  out[threadIdx.x] = static_cast<int>(d[0]);
}

__global__ void static_bounds(int* out) {
  __shared__ int tile[2][8];
  tile[1][threadIdx.x] = 1;
  out[0] = tile[1][0];
}

__global__ void dynamic_bounds(int* out) {
  MLC_DYNAMIC_SMEM(int, tile);
  tile[threadIdx.x + 1] = 1;
  out[0] = tile[1];
}

__global__ void misaligned(int* out) {
  const float4 v = *reinterpret_cast<const float4*>(out + threadIdx.x + 1);
  out[0] = static_cast<int>(v.x);
}

__global__ void copy_to_global(int* out) { cp_async<4>(out, out); }

__global__ void trap(int*) { __trap(); }

// Reads shared memory that nobody wrote: out becomes 0xff bytes.
__global__ void uninitialised(int* out) {
  __shared__ int here;
  MLC_DYNAMIC_SMEM(int, there);
  out[threadIdx.x] = threadIdx.x % 2 ? here : there[threadIdx.x];
  __syncthreads();
  here = there[threadIdx.x] = 0;  // must not be seen by the next block
}

__global__ void out_of_bounds_write(int* out) { out[32] = 1; }

// Fine: the others have returned.
__global__ void barrier_after_return(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  if (threadIdx.x < 32) out[threadIdx.x] = 1;
}

// A missing barrier: thread 0 alone fills what all read.
__global__ void race(int* out) {
  __shared__ int value;
  if (threadIdx.x == 0) value = 7;
  out[threadIdx.x] = value;
}

using Kernel = void (*)(int*);
struct Case {
  const char* name;
  Kernel kernel;
  unsigned grid, block;
  size_t smem;
};
#define CASE(kernel, ...) {#kernel, kernel, __VA_ARGS__}
constexpr Case kCases[] = {CASE(divergent_barrier, 1, 64, 0),
                           CASE(barrier_against_shuffle, 1, 32, 0),
                           CASE(divergent_warp, 1, 32, 0),
                           CASE(shuffle_from_outside, 1, 32, 0),
                           CASE(mask_without_self, 1, 32, 0),
                           CASE(partial_mma, 1, 32, 0),
                           CASE(static_bounds, 1, 32, 0),
                           CASE(dynamic_bounds, 1, 32, 128),
                           CASE(misaligned, 1, 1, 0),
                           CASE(copy_to_global, 1, 1, 0),
                           CASE(trap, 1, 1, 0),
                           CASE(uninitialised, 2, 32, 128),
                           CASE(out_of_bounds_write, 1, 1, 0),
                           CASE(barrier_after_return, 1, 64, 0),
                           CASE(race, 1, 32, 0),
                           {"empty_grid", trap, 0, 32, 0},
                           {"large_block", trap, 1, 1025, 0},
                           {"much_shared", trap, 1, 32, 300 << 10}};

}  // namespace

// out: (32) int32
MLC_API int test_case(const char* name, DLTensor* out) {
  return guard([&] {
    for (const Case& c : kCases)
      if (std::string(name) == c.name)
        return launch(c.name, c.kernel, c.grid, c.block, c.smem, nullptr, static_cast<int*>(out->data));
    fail(MLC_INVALID_ARGUMENT, "no case ", name);
  });
}
