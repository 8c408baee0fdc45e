// The launchers of binary_linear's CUDA kernels: where words of a row lie. The counting is cuda/signs.cuh's; the equations are
// in binary_linear.h. The same text runs on the CPU in tests.
#include "binary_linear/binary_linear.h"
#include "binary_linear/binary_linear_args.h"
#include "cuda/signs.cuh"

namespace mlcore::cuda {
namespace {

constexpr const char* kOp = "binary_linear";

struct LinearWords {
  static constexpr bool kPadded = false;  // every row has the same valid bits
  struct Row {
    int64_t first;  // -1: no such row
  };
  const uint32_t* x;
  int words, K;
  uint32_t tail;
  MLC_DEVICE Row row(int m, int M) const { return {m < M ? int64_t{m} * words : -1}; }
  MLC_DEVICE int terms(const Row&) const { return K; }
  MLC_DEVICE const uint32_t* word(const Row& row, int k) const { return row.first < 0 ? nullptr : x + row.first + k; }
  MLC_DEVICE uint32_t valid(int k) const { return k == words - 1 ? tail : ~0u; }
};

void pack(const DLTensor* x, DLTensor* words, DLTensor* row_scale, void* stream) {
  const BinaryPack p = checked_binary_linear_pack(kOp, x, words, row_scale, kDLCUDA);
  const DeviceGuard device(x->device.device_id);
  launch_pack_rows(kOp, p.x.data, p.dtype, p.x.stride, p.M, p.K, p.to, p.row_scale, stream);
}

void fwd(const DLTensor* words, const DLTensor* codes, const DLTensor* scales, const DLTensor* row_scale, const DLTensor* bias,
         int64_t N, int64_t K, DLTensor* y, void* stream) {
  const BinaryLinear b = checked_binary_linear(kOp, words, codes, scales, row_scale, bias, N, K, y, kDLCUDA);
  if (b.M == 0 || N == 0) return;
  SignProduct p = product_of(kOp, b.w, b.M, b.row_scale, b.a, b.w.words);
  p.y = b.y.data, p.pixel = b.y.stride, p.column = 1, p.dtype = b.dtype;
  const DeviceGuard device(words->device.device_id);
  launch_product(kOp, p, LinearWords{b.a, p.words, static_cast<int>(K), sign_tail(K)}, stream);
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_binary_linear_pack(const DLTensor* x, DLTensor* words, DLTensor* row_scale, void* stream) {
  return mlcore::guard([&] { mlcore::cuda::pack(x, words, row_scale, stream); });
}

MLC_API int mlc_cuda_binary_linear_fwd(const DLTensor* words, const DLTensor* codes, const DLTensor* scales,
                                       const DLTensor* row_scale, const DLTensor* bias, int64_t N, int64_t K, DLTensor* y,
                                       void* stream) {
  return mlcore::guard([&] { mlcore::cuda::fwd(words, codes, scales, row_scale, bias, N, K, y, stream); });
}
