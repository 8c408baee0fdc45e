// The lowering of a program's patterns to a tile list: which tiles are full, which need bits, and each row of bits once.
#include <algorithm>
#include <cstring>
#include <memory>
#include <unordered_map>
#include <vector>

#include "attention/attention.h"
#include "attention/attention_pattern.h"
#include "core/tensor.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "attention";

// Rows of 64 words, each kept once.
class UniqueBits {
 public:
  int32_t id_of(const uint64_t* words) {
    if (count_ > 0 && same(last_, words)) return last_;
    uint64_t hash = 0xCBF29CE484222325u;
    for (int j = 0; j < kTile; ++j) hash = (hash ^ words[j]) * 0x9E3779B97F4A7C15u, hash ^= hash >> 29;
    const auto [begin, end] = ids_.equal_range(hash);
    for (auto it = begin; it != end; ++it)
      if (same(it->second, words)) return last_ = it->second;
    rows_.insert(rows_.end(), words, words + kTile);
    ids_.emplace(hash, count_);
    return last_ = count_++;
  }
  int64_t size() const { return count_; }
  const uint64_t* data() const { return rows_.data(); }

 private:
  bool same(int32_t id, const uint64_t* words) const {
    return std::memcmp(rows_.data() + static_cast<int64_t>(id) * kTile, words, sizeof(uint64_t) * kTile) == 0;
  }
  std::vector<uint64_t> rows_;
  std::unordered_multimap<uint64_t, int32_t> ids_;
  int32_t count_ = 0, last_ = 0;
};

void lower(const DLTensor* program_, int64_t Tq, int64_t Tk, const DLTensor* row_ptr_, const DLTensor* cols_,
           const DLTensor* ids_, const DLTensor* bits_, const DLTensor* counts_) {
  const Tensor program(program_, kOp, "program"), row_ptr(row_ptr_, kOp, "row_ptr"), cols(cols_, kOp, "cols"),
      ids(ids_, kOp, "ids"), bits(bits_, kOp, "bits"), counts(counts_, kOp, "counts");
  program.on(kDLCPU).dtype_in({Dtype::i64}).rank_is(1, "(words)").contiguous();
  require(Tq >= 0 && Tk >= 0 && Tk < int64_t{1} << 36, kOp, ": lengths must not be negative; got ", Tq, ", ", Tk);
  const int64_t *words = program.data<int64_t>(), size = program.numel();
  require(size >= 1 && words[0] >= 1 && words[0] < size, kOp, ": program must begin with the number of sets");
  const int64_t sets = words[0], q_tiles = (Tq + kTile - 1) / kTile;
  row_ptr.on(kDLCPU).dtype_in({Dtype::i64}).shape_is({sets * q_tiles + 1}, "(sets * q_tiles + 1)").contiguous();
  cols.on(kDLCPU).dtype_in({Dtype::i32}).rank_is(1, "(room)").contiguous();
  ids.on(kDLCPU).dtype_in({Dtype::i32}).shape_is({cols.numel()}, "(room)").contiguous();
  bits.on(kDLCPU).dtype_in({Dtype::i64}).rank_is(2, "(room, 64)").contiguous();
  require(bits.size(1) == kTile, kOp, ": bits must be (room, 64); got ", bits.shape_text());
  counts.on(kDLCPU).dtype_in({Dtype::i64}).shape_is({2}, "(2)").contiguous();

  const Frame whole{Tq, Tk};
  UniqueBits unique;
  std::vector<int32_t> listed_cols, listed_ids;
  std::vector<int64_t> starts{0};
  for (int64_t set = 0; set < sets; ++set) {
    require(words[1 + set] > sets && words[1 + set] < size, kOp, ": program has no set ", set);
    const std::unique_ptr<Pattern> pattern = read_pattern(words, size, words[1 + set], whole);
    for (int64_t qt = 0; qt < q_tiles; ++qt) {
      const int64_t i0 = qt * kTile, i1 = std::min(i0 + kTile, Tq);
      const uint64_t rows = bit_range(0, i1 - i0);
      Spans some, all;
      pattern->spans(whole, i0, i1, some, all);
      size_t full = 0;
      int64_t next = 0;  // the first key tile not yet decided
      for (const auto& [from, to] : some) {
        for (int64_t kt = std::max(from / kTile, next); kt * kTile < std::min(to, Tk); ++kt) {
          next = kt + 1;
          const int64_t j0 = kt * kTile, j1 = std::min(j0 + kTile, Tk);
          while (full < all.size() && all[full].second < j1) ++full;
          int32_t id = Schedule::kFull;
          if (full == all.size() || all[full].first > j0) {
            uint64_t tile[kTile] = {};
            const int nk = static_cast<int>(j1 - j0);
            pattern->words(whole, i0, static_cast<int>(i1 - i0), j0, nk, tile);
            uint64_t any = 0, every = rows;
            for (int j = 0; j < nk; ++j) tile[j] &= rows, any |= tile[j], every &= tile[j];
            if (any == 0) continue;
            if (every != rows) id = unique.id_of(tile);
          }
          listed_cols.push_back(static_cast<int32_t>(kt));
          listed_ids.push_back(id);
        }
      }
      starts.push_back(static_cast<int64_t>(listed_cols.size()));
    }
  }
  const int64_t listed = static_cast<int64_t>(listed_cols.size());
  counts.data<int64_t>()[0] = listed, counts.data<int64_t>()[1] = unique.size();
  if (listed > cols.numel() || unique.size() > bits.size(0)) return;
  std::copy(starts.begin(), starts.end(), row_ptr.data<int64_t>());
  std::copy(listed_cols.begin(), listed_cols.end(), cols.data<int32_t>());
  std::copy(listed_ids.begin(), listed_ids.end(), ids.data<int32_t>());
  std::copy(unique.data(), unique.data() + unique.size() * kTile, bits.data<uint64_t>());
}

}  // namespace
}  // namespace mlcore

int mlc_attention_lower(const DLTensor* program, int64_t Tq, int64_t Tk, DLTensor* row_ptr, DLTensor* cols, DLTensor* ids,
                        DLTensor* bits, DLTensor* counts) {
  return mlcore::guard([&] { mlcore::lower(program, Tq, Tk, row_ptr, cols, ids, bits, counts); });
}
