// Products of float32 on tensor cores: three tf32 products of high and low parts, which lose 2^-22 of each term.
#pragma once
#include "cuda/ptx.h"

namespace mlcore::cuda {

// tf32's high part of x and what it leaves.
struct Split {
  uint32_t hi, lo;
  MLC_DEVICE explicit Split(float x) {  // not in an initialiser list: nvcc leaves that to the host's compiler
    hi = to_tf32(x);
    lo = fabsf(x) < INFINITY ? to_tf32(x - __uint_as_float(hi)) : 0;
  }
};
template <int N>
struct SplitFragment {
  uint32_t hi[N], lo[N];
  MLC_DEVICE void set(int i, float x) {
    const Split s(x);
    hi[i] = s.hi, lo[i] = s.lo;
  }
};
MLC_DEVICE void mma_3xtf32(float (&c)[4], const SplitFragment<4>& a, const SplitFragment<2>& b) {
  mma_m16n8k8_tf32(c, a.lo, b.hi, c);  // small terms first
  mma_m16n8k8_tf32(c, a.hi, b.lo, c);
  mma_m16n8k8_tf32(c, a.hi, b.hi, c);
}

}  // namespace mlcore::cuda
