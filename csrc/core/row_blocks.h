// Sums over rows whose bits don't depend on the thread count: rows are cut into at most kMaxRowBlocks blocks by their number
// alone, each block is summed in order into its own partial row, and partial rows are added in order.
#pragma once
#include "core/parallel.h"

namespace mlcore {

constexpr int64_t kMaxRowBlocks = 64;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct RowBlocks {
  int64_t rows, count;

  explicit RowBlocks(int64_t rows) : rows(rows), count(rows < kMaxRowBlocks ? rows : kMaxRowBlocks) {}
  int64_t begin(int64_t block) const { return rows * block / count; }
  int64_t end(int64_t block) const { return begin(block + 1); }
};

// Columns per thread of the sum over partial rows: 32 cache lines of float32.
constexpr int64_t kColumnGrain = 512;

// Rows per thread below which a parallel loop over rows of `cols` elements costs more than it gains (about 16k elements).
inline int64_t row_grain(int64_t cols) { return cols >= 16384 ? 1 : 16384 / (cols > 0 ? cols : 1); }

// body(block, row_begin, row_end) for every block of rows of `cols` elements.
template <class F>
void for_row_blocks(const RowBlocks& blocks, int64_t cols, F&& body) {
  const int64_t grain = ceil_div(row_grain(cols) * blocks.count, blocks.rows > 0 ? blocks.rows : 1);
  parallel_for(blocks.count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) body(b, blocks.begin(b), blocks.end(b));
  });
}

}  // namespace mlcore
