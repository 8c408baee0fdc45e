// Sums and maxima over a warp and over a block, in an order fixed by the launch shape: the same bits every run.
#pragma once
#include "cuda/device.h"

namespace mlcore::cuda {

constexpr unsigned kFullWarp = 0xffffffffu;

struct Sum {
  static MLC_DEVICE float identity() { return 0.0f; }
  static MLC_DEVICE float apply(float a, float b) { return a + b; }
};
struct Max {
  static MLC_DEVICE float identity() { return -INFINITY; }
  static MLC_DEVICE float apply(float a, float b) { return fmaxf(a, b); }
};

// Over Width neighbouring lanes (a power of two); every lane gets the result. All 32 lanes must call.
template <class Op, int Width = 32>
MLC_DEVICE float warp_reduce(float v) {
#pragma unroll
  for (int offset = Width / 2; offset > 0; offset /= 2) v = Op::apply(v, __shfl_xor_sync(kFullWarp, v, offset));
  return v;
}
template <int Width = 32>
MLC_DEVICE float warp_sum(float v) {
  return warp_reduce<Sum, Width>(v);
}
template <int Width = 32>
MLC_DEVICE float warp_max(float v) {
  return warp_reduce<Max, Width>(v);
}

// Over groups of `warps` neighbouring warps, which divide the block; every thread gets its group's result. All threads of the
// block must call. scratch: 32 floats of shared memory, free to reuse after the next barrier.
template <class Op>
MLC_DEVICE float group_reduce(float v, int warps, float* scratch) {
  v = warp_reduce<Op>(v);
  if (warps == 1) return v;
  const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int warp = thread / 32, lane = thread % 32;
  __syncthreads();  // the last result has been read
  if (lane == 0) scratch[warp] = v;
  __syncthreads();
  return warp_reduce<Op>(lane < warps ? scratch[warp / warps * warps + lane] : Op::identity());
}

// Over the whole block.
template <class Op>
MLC_DEVICE float block_reduce(float v, float* scratch) {
  return group_reduce<Op>(v, static_cast<int>(blockDim.x * blockDim.y * blockDim.z + 31) / 32, scratch);
}
MLC_DEVICE float block_sum(float v, float* scratch) { return block_reduce<Sum>(v, scratch); }
MLC_DEVICE float block_max(float v, float* scratch) { return block_reduce<Max>(v, scratch); }

}  // namespace mlcore::cuda
