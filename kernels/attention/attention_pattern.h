// A pattern as what its lowering asks of it: which keys a stretch of queries may see and surely sees, as stretches of keys, and
// the exact bits of one tile. The first are combined along rows without looking at tiles, so a row costs what its stretches
// cost; the second is asked only where a tile is neither surely unseen nor surely seen.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "attention/attention_schedule.h"

namespace mlcore {

// Sorted, disjoint, non-empty stretches [first, second) of keys.
using Spans = std::vector<std::pair<int64_t, int64_t>>;

struct Frame {
  int64_t Tq, Tk;
};

class Pattern {
 public:
  virtual ~Pattern() = default;
  // some: no key outside is seen by a query of [i0, i1). all: each key inside is seen by every one of them. Both may lie; some
  // only by naming too much, all by naming too little.
  virtual void spans(const Frame& f, int64_t i0, int64_t i1, Spans& some, Spans& all) const = 0;
  // Bit i of out[j], exact for i < nq and j < nk: query i0 + i sees key j0 + j. nq, nk <= 64.
  virtual void words(const Frame& f, int64_t i0, int nq, int64_t j0, int nk, uint64_t* out) const = 0;
};

// Bits lo .. hi - 1.
inline uint64_t bit_range(int64_t lo, int64_t hi) {
  lo = std::max<int64_t>(lo, 0), hi = std::min<int64_t>(hi, 64);
  if (lo >= hi) return 0;
  return (hi == 64 ? ~uint64_t{0} : (uint64_t{1} << hi) - 1) & (~uint64_t{0} << lo);
}

// The tree that begins at word `at` of a program (attention.h), which is not read beyond its end. whole: the lengths of the
// call.
std::unique_ptr<Pattern> read_pattern(const int64_t* program, int64_t size, int64_t at, const Frame& whole);

}  // namespace mlcore
