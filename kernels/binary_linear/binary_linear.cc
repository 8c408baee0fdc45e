// Validates and shares rows and columns out to threads. The contract is binary_linear.h, the arithmetic binary_linear_cpu.inl.
#include "binary_linear/binary_linear.h"

#include <algorithm>

#include "binary_linear/binary_linear_kernels.h"
#include "core/parallel.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "binary_linear";
constexpr int64_t kPackGrain = 1 << 15;  // elements of x a thread should have at least
constexpr int64_t kPanels = 4;           // of an item
constexpr int64_t kRowGrain = 24;        // rows of an item: weights come from the L1 cache again for each six

void pack(const DLTensor* x_, DLTensor* words_, DLTensor* row_scale_) {
  const Tensor x(x_, kOp, "x"), words(words_, kOp, "words"), row_scale(row_scale_, kOp, "row_scale");
  x.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(2, "(M, K)").last_dim_contiguous();
  const int64_t M = x.size(0), K = x.size(1);
  words.on(kDLCPU).dtype_in({Dtype::i32}).shape_is({M, (K + 31) / 32}, "(M, ceil(K / 32))").contiguous();
  if (row_scale.present()) row_scale.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({M}, "(M)").contiguous();
  const BinaryPack p{{x.raw(), x.stride(0)},
                     x.dtype(),
                     K,
                     words.size(1),
                     words.data<uint32_t>(),
                     row_scale.present() ? row_scale.data<float>() : nullptr};
  const BinaryLinearKernels& kernels = binary_linear_kernels_now();
  parallel_for(M, std::max<int64_t>(kPackGrain / std::max<int64_t>(K, 1), 1),
               [&](int64_t begin, int64_t end) { kernels.pack(p, begin, end); });
}

void fwd(const DLTensor* words_, const DLTensor* codes, const DLTensor* scales, const DLTensor* row_scale_,
         const DLTensor* bias, int64_t N, int64_t K, DLTensor* y_) {
  const Tensor words(words_, kOp, "words"), row_scale(row_scale_, kOp, "row_scale"), y(y_, kOp, "y");
  const SignPanels w(kOp, codes, scales, bias, N, 1, K);
  words.on(kDLCPU).dtype_in({Dtype::i32}).rank_is(2, "(M, ceil(K / 32))");
  const int64_t M = words.size(0);
  words.shape_is({M, w.words}, "(M, ceil(K / 32))").contiguous();
  y.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16, Dtype::i32});
  y.dtype() == Dtype::i32 ? y.shape_is({M, (N + 31) / 32}, "(M, ceil(N / 32))") : y.shape_is({M, N}, "(M, N)");
  y.last_dim_contiguous();
  if (row_scale.present()) row_scale.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({M}, "(M)").contiguous();
  if (M == 0 || N == 0) return;
  const BinaryLinear p{w, words.data<uint32_t>(), row_scale.present() ? row_scale.data<float>() : nullptr,
                       K, {y.raw(), y.stride(0)}, y.dtype()};
  const BinaryLinearKernels& kernels = binary_linear_kernels_now();
  // Columns first: an item's weights are read once. Rows are cut too where columns alone don't keep the threads busy.
  const int64_t blocks = (w.panels + kPanels - 1) / kPanels, threads = num_threads();
  const int64_t wanted = blocks >= 4 * threads ? 1 : (4 * threads + blocks - 1) / blocks;
  const int64_t parts = std::clamp<int64_t>(wanted, 1, (M + kRowGrain - 1) / kRowGrain);
  const int64_t part = ((M + parts - 1) / parts + 5) / 6 * 6;
  parallel_claim(blocks * parts, static_cast<int>(threads), [&](int64_t i, int) {
    const int64_t begin = i % parts * part;
    if (begin < M) kernels.run(p, begin, std::min(begin + part, M), i / parts * kPanels);
  });
}

}  // namespace
}  // namespace mlcore

int mlc_binary_linear_pack(const DLTensor* x, DLTensor* words, DLTensor* row_scale) {
  return mlcore::guard([&] { mlcore::pack(x, words, row_scale); });
}

int mlc_binary_linear_fwd(const DLTensor* words, const DLTensor* codes, const DLTensor* scales, const DLTensor* row_scale,
                          const DLTensor* bias, int64_t N, int64_t K, DLTensor* y) {
  return mlcore::guard([&] { mlcore::fwd(words, codes, scales, row_scale, bias, N, K, y); });
}
