// What attention_decode.cc hands to the per-ISA kernels: a checked problem over a key-value cache, and room for split keys.
#pragma once
#include "attention/attention_kernels.h"

namespace mlcore {

// A cache (pages, Hkv, P, D): position t of sequence b is row t % P of page table[b][t / P]; without a table of page b.
// scale: what the rows of an int8 cache are multiplied with, null for other dtypes.
struct Cache {
  Operand rows;
  const float* scale;
  int64_t scale_sb, scale_sh, scale_st;
};

struct DecodeProblem {
  int64_t B, H, Hkv, Tq, D, Dv;
  Dtype dtype, cache_dtype;  // of q and o, of the caches: the same, or int8
  Operand q, o;
  Cache k, v;
  int64_t pages, page_size, room;  // room: positions of a sequence
  const int64_t* table;            // null: page b
  int64_t table_sb;
  const int64_t *lengths, *starts;  // (B): the keys of sequence b are positions starts[b] .. lengths[b] - 1; null: from 0
  int64_t left, right;              // Schedule::kUnlimited is no limit
  float scale, softcap;             // softcap 0: none
  const float* slopes;              // ALiBi's, null: none
  int64_t slopes_sb;
  const float* sinks;  // (H), null: none
  float* lse;          // (B, H, Tq), null: not wanted

  int64_t group() const { return H / Hkv; }
  int64_t rows() const { return group() * Tq; }  // of a (b, key head): row g * Tq + t is query t of its g-th head
  int64_t page_of(int64_t b, int64_t t) const { return table ? table[b * table_sb + t / page_size] : b; }
  // The keys [lo, hi) that query t of sequence b sees.
  void seen(int64_t b, int64_t t, int64_t& lo, int64_t& hi) const {
    const int64_t position = lengths[b] - Tq + t, first = starts ? starts[b] : 0;
    lo = position - left > first ? position - left : first;
    hi = position + right + 1 < lengths[b] ? position + right + 1 : lengths[b];
    if (hi < lo) hi = lo;
  }
  // The end of the keys that some query of sequence b sees, and the first of them.
  int64_t end_seen(int64_t b) const {
    int64_t lo, hi;
    seen(b, Tq - 1, lo, hi);
    return hi;
  }
  int64_t first_seen(int64_t b) const {
    int64_t lo, hi;
    for (int64_t t = 0; t < Tq; ++t) {
      seen(b, t, lo, hi);
      if (lo < hi) return lo;
    }
    return lengths[b];
  }
  // The tiles [begin, end) of the keys that sequence b's queries see.
  void tiles(int64_t b, int64_t& begin, int64_t& end) const {
    const int64_t first = first_seen(b), last = end_seen(b);
    begin = first / kTile;
    end = first < last ? (last + kTile - 1) / kTile : begin;
  }
};

// What the tiles of one (b, key head) leave for each other when threads share them: entry n is of its n-th tile.
struct SplitKeys {
  int64_t first;         // the tile that entry 0 is of
  float* scores;         // [tile][row][kTile]
  float* top;            // [tile][row] the tile's largest score
  float *total, *alpha;  // [tile][row] sum of its weights, and what earlier sums are multiplied with
  float* sum;            // [tile][row][Dv padded] weights times values
};

struct AttentionDecodeKernels {
  int width;  // lanes of a Vec: SplitKeys::sum is padded to multiples of it

  int64_t (*scratch)(const DecodeProblem&);  // floats
  // All queries of (b, hkv) over tiles [begin, end), to the output.
  void (*whole)(const DecodeProblem&, int64_t b, int64_t hkv, int64_t begin, int64_t end, float* scratch);
  // The same in three steps: scores of some tiles; then, with the scores of all tiles there, their weights and sums; then, for
  // each row, the sums of the first n tiles in order.
  void (*scores)(const DecodeProblem&, int64_t b, int64_t hkv, int64_t begin, int64_t end, const SplitKeys&, float* scratch);
  void (*sums)(const DecodeProblem&, int64_t b, int64_t hkv, int64_t begin, int64_t end, const SplitKeys&, float* scratch);
  void (*merge)(const DecodeProblem&, int64_t b, int64_t hkv, int64_t row, int64_t n, const SplitKeys&, float* scratch);
  // One row of n elements into a cache's; of an int8 cache also its scale.
  void (*append)(Dtype from_dtype, const void* from, Dtype to_dtype, void* to, float* scale, int64_t n);
};
MLC_KERNEL_TABLE(AttentionDecodeKernels, attention_decode_kernels)

}  // namespace mlcore
