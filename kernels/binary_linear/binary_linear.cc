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

void pack(const DLTensor* x, DLTensor* words, DLTensor* row_scale) {
  const BinaryPack p = checked_binary_linear_pack(kOp, x, words, row_scale, kDLCPU);
  const BinaryLinearKernels& kernels = binary_linear_kernels_now();
  parallel_for(p.M, std::max<int64_t>(kPackGrain / std::max<int64_t>(p.K, 1), 1),
               [&](int64_t begin, int64_t end) { kernels.pack(p, begin, end); });
}

void fwd(const DLTensor* words, const DLTensor* codes, const DLTensor* scales, const DLTensor* row_scale, const DLTensor* bias,
         int64_t N, int64_t K, DLTensor* y) {
  BinaryLinear p = checked_binary_linear(kOp, words, codes, scales, row_scale, bias, N, K, y, kDLCPU);
  p.w.popcount = has(Extension::vpopcntdq);
  const int64_t M = p.M;
  if (M == 0 || N == 0) return;
  const BinaryLinearKernels& kernels = binary_linear_kernels_now();
  // Columns first: an item's weights are read once. Rows are cut too where columns alone don't keep the threads busy.
  const int64_t blocks = (p.w.panels + kPanels - 1) / kPanels, threads = num_threads();
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
