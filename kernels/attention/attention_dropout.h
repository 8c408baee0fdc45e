// The dropout mask as a pure function of (seed, b, h, i, j), the same on every backend:
//   keep = hash(hash(hash(seed_lo ^ (b * H + h)) ^ seed_hi ^ i) ^ j) >= dropout_p * 2^32
// with all words 32 bits. attention_ref.py states it in torch.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define MLC_HASH_FN __host__ __device__ __forceinline__
#else
#define MLC_HASH_FN inline
#endif

namespace mlcore {

MLC_HASH_FN uint32_t dropout_hash(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

MLC_HASH_FN uint32_t dropout_row_key(uint64_t seed, uint32_t head, uint32_t row) {
  return dropout_hash(dropout_hash(static_cast<uint32_t>(seed) ^ head) ^ static_cast<uint32_t>(seed >> 32) ^ row);
}

}  // namespace mlcore
