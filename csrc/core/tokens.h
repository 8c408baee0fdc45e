// An operand with a row a token, (B, H, T, cols), or with one number a token, (B, H, T), as kernels take it.
#pragma once
#include "core/tensor.h"

namespace mlcore {

// Strides in elements; the last dimension of a row is contiguous.
struct Tokens {
  void* data = nullptr;
  int64_t sb = 0, sh = 0, st = 0;
  Dtype dtype = Dtype::f32;
};

inline Tokens tokens(const Tensor& x) {
  if (x.rank() == 4) x.last_dim_contiguous();
  return {x.raw(), x.stride(0), x.stride(1), x.stride(2), x.dtype()};
}

}  // namespace mlcore
