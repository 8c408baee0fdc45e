// What the depthwise convolutions' launchers share: dispatch on the element type, checked sizes, and the second pass of a
// weight's gradient. The first pass is each op's own.
#pragma once
#include <climits>

#include "core/tensor.h"
#include "cuda/launch.h"
#include "cuda/types.h"

namespace mlcore::cuda {

// body(T{}) with the element type that dtype names.
template <class Body>
void with_type(Dtype dtype, Body&& body) {
  switch (dtype) {
    case Dtype::bf16: return body(bf16{});
    case Dtype::f16: return body(f16{});
    default: return body(float{});
  }
}

// n as an int that can be added to others of its kind.
inline int checked_int(const char* op, const char* name, int64_t n) {
  require(n <= INT_MAX / 4, op, ": ", name, " is ", n, "; the CUDA kernels take at most ", INT_MAX / 4);
  return static_cast<int>(n);
}

// A grid of one block for every `each` of `count`.
inline dim3 grid_of(const char* op, int64_t count, int64_t each = 1) {
  const int64_t blocks = (count + each - 1) / each;
  require(blocks <= INT_MAX, op, ": x has too many elements for one launch");
  return dim3(static_cast<unsigned>(blocks));
}

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
