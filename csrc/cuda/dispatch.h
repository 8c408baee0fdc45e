// What launchers share: dispatch on the element type, sizes that fit, grids.
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

}  // namespace mlcore::cuda
