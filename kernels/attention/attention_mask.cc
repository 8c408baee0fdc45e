// A dense boolean mask as a tile list: 64 x 64 tiles that are empty are dropped, full ones lose their mask, the rest keep
// 64 words of bits.
#include <algorithm>

#include "attention/attention.h"
#include "attention/attention_schedule.h"
#include "core/parallel.h"
#include "core/tensor.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "attention";
constexpr int32_t kSkip = -2, kPartial = 0;

struct DenseMask {
  const uint8_t* data;
  int64_t sets_b, sets_h, Tq, Tk, q_tiles, k_tiles;
  int64_t sb, sh, sq, sk;

  explicit DenseMask(const DLTensor* mask_) {
    const Tensor mask(mask_, kOp, "mask");
    mask.on(kDLCPU).dtype_in({Dtype::boolean}).rank_is(4, "(B|1, H|1, Tq|1, Tk)");
    data = mask.data<uint8_t>();
    sets_b = mask.size(0), sets_h = mask.size(1), Tq = mask.size(2), Tk = mask.size(3);
    q_tiles = (Tq + kTile - 1) / kTile, k_tiles = (Tk + kTile - 1) / kTile;
    sb = mask.stride(0), sh = mask.stride(1), sq = mask.stride(2), sk = mask.stride(3);
  }
  int64_t rows() const { return sets_b * sets_h * q_tiles; }
  const uint8_t* tile(int64_t row, int64_t kt, int64_t& nq, int64_t& nk) const {
    const int64_t set = row / q_tiles, qt = row % q_tiles;
    nq = std::min<int64_t>(kTile, Tq - qt * kTile), nk = std::min<int64_t>(kTile, Tk - kt * kTile);
    return data + set / sets_h * sb + set % sets_h * sh + qt * kTile * sq + kt * kTile * sk;
  }
};

void codes(const DLTensor* mask_, const DLTensor* codes_, const DLTensor* counts_) {
  const DenseMask m(mask_);
  const Tensor codes(codes_, kOp, "codes"), counts(counts_, kOp, "counts");
  codes.on(kDLCPU).dtype_in({Dtype::i32}).shape_is({m.rows(), m.k_tiles}, "(sets * q_tiles, k_tiles)").contiguous();
  counts.on(kDLCPU).dtype_in({Dtype::i64}).shape_is({2}, "(2)").contiguous();
  int32_t* out = codes.data<int32_t>();
  parallel_for(m.rows() * m.k_tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      int64_t nq, nk, seen = 0;
      const uint8_t* tile = m.tile(n / m.k_tiles, n % m.k_tiles, nq, nk);
      for (int64_t i = 0; i < nq; ++i)
        for (int64_t j = 0; j < nk; ++j) seen += tile[i * m.sq + j * m.sk] != 0;
      out[n] = seen == 0 ? kSkip : seen == nq * nk ? Schedule::kFull : kPartial;
    }
  });
  int64_t listed = 0, partial = 0;
  for (int64_t n = 0; n < m.rows() * m.k_tiles; ++n) {
    listed += out[n] != kSkip;
    if (out[n] == kPartial) out[n] = static_cast<int32_t>(partial++);
  }
  counts.data<int64_t>()[0] = listed;
  counts.data<int64_t>()[1] = partial;
}

void tiles(const DLTensor* mask_, const DLTensor* codes_, const DLTensor* row_ptr_, const DLTensor* cols_, const DLTensor* ids_,
           const DLTensor* bits_) {
  const DenseMask m(mask_);
  const Tensor codes(codes_, kOp, "codes"), row_ptr(row_ptr_, kOp, "row_ptr"), cols(cols_, kOp, "cols"), ids(ids_, kOp, "ids"),
      bits(bits_, kOp, "bits");
  codes.on(kDLCPU).dtype_in({Dtype::i32}).shape_is({m.rows(), m.k_tiles}, "(sets * q_tiles, k_tiles)").contiguous();
  row_ptr.on(kDLCPU).dtype_in({Dtype::i64}).shape_is({m.rows() + 1}, "(sets * q_tiles + 1)").contiguous();
  const int32_t* code = codes.data<int32_t>();
  int64_t listed = 0, partial = 0;
  for (int64_t n = 0; n < m.rows() * m.k_tiles; ++n) {
    listed += code[n] != kSkip;
    partial += code[n] >= 0;
  }
  cols.on(kDLCPU).dtype_in({Dtype::i32}).shape_is({listed}, "(listed tiles)").contiguous();
  ids.on(kDLCPU).dtype_in({Dtype::i32}).shape_is({listed}, "(listed tiles)").contiguous();
  bits.on(kDLCPU).dtype_in({Dtype::i64}).shape_is({partial, kTile}, "(partial tiles, 64)").contiguous();
  int64_t e = 0;
  for (int64_t row = 0; row < m.rows(); ++row) {
    row_ptr.data<int64_t>()[row] = e;
    for (int64_t kt = 0; kt < m.k_tiles; ++kt) {
      const int32_t c = code[row * m.k_tiles + kt];
      if (c == kSkip) continue;
      cols.data<int32_t>()[e] = static_cast<int32_t>(kt);
      ids.data<int32_t>()[e++] = c;
    }
  }
  row_ptr.data<int64_t>()[m.rows()] = e;
  uint64_t* words = bits.data<uint64_t>();
  parallel_for(m.rows() * m.k_tiles, 8, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      if (code[n] < 0) continue;
      int64_t nq, nk;
      const uint8_t* tile = m.tile(n / m.k_tiles, n % m.k_tiles, nq, nk);
      uint64_t* out = words + static_cast<int64_t>(code[n]) * kTile;
      for (int64_t j = 0; j < kTile; ++j) {
        uint64_t word = 0;
        if (j < nk && m.Tq == 1) word = tile[j * m.sk] ? ~uint64_t{0} : 0;  // the same for all queries
        if (j < nk && m.Tq != 1)
          for (int64_t i = 0; i < nq; ++i) word |= static_cast<uint64_t>(tile[i * m.sq + j * m.sk] != 0) << i;
        out[j] = word;
      }
    }
  });
}

}  // namespace
}  // namespace mlcore

int mlc_attention_mask_codes(const DLTensor* mask, DLTensor* codes, DLTensor* counts) {
  return mlcore::guard([&] { mlcore::codes(mask, codes, counts); });
}

int mlc_attention_mask_tiles(const DLTensor* mask, const DLTensor* codes, DLTensor* row_ptr, DLTensor* cols, DLTensor* ids,
                             DLTensor* bits) {
  return mlcore::guard([&] { mlcore::tiles(mask, codes, row_ptr, cols, ids, bits); });
}
