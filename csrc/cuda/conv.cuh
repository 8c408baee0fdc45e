// What the depthwise convolutions' launchers share: the second pass of a weight's gradient. The first pass is each op's own.
#pragma once
#include "cuda/dispatch.h"

namespace mlcore::cuda {

constexpr int kReduceThreads = 256;

// dweight (C, taps) and dbias (C) from partial (blocks, taps + 1, C), whose last tap is the bias: one element a thread.
static __global__ void __launch_bounds__(kReduceThreads)
    sum_taps(const float* partial, int64_t blocks, int taps, int C, float* dweight, float* dbias) {
  const int64_t index = int64_t{blockIdx.x} * kReduceThreads + threadIdx.x, each = int64_t{taps + 1} * C;
  if (index >= each) return;
  float total = 0.0f;
  for (int64_t block = 0; block < blocks; ++block) total += partial[block * each + index];
  const int64_t tap = index / C, c = index % C;
  if (tap < taps)
    dweight[c * taps + tap] = total;
  else
    dbias[c] = total;
}

static void launch_sum_taps(const char* op, const float* partial, int64_t blocks, int taps, int C, float* dweight, float* dbias,
                            void* stream) {
  const dim3 grid = grid_of(op, int64_t{C} * (taps + 1), kReduceThreads);
  MLC_LAUNCH(sum_taps, grid, dim3(kReduceThreads), 0, stream, partial, blocks, taps, C, dweight, dbias);
}

}  // namespace mlcore::cuda
