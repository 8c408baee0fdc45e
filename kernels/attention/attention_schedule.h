// Which tiles of the score matrix are computed, and which of those need a mask: a band, a tile list, or both.
// Everything that loops over tiles asks here; the kernels know only full and masked tiles.
#pragma once
#include <cstdint>

namespace mlcore {

constexpr int kTile = 64;

struct Schedule {
  static constexpr int kFull = -1;

  int64_t Tq, Tk;            // lengths
  int64_t q_tiles, k_tiles;  // ceil(T / kTile)
  int64_t left, right;       // query i sees keys i + offset - left .. i + offset + right; kUnlimited is no limit
  int64_t offset;
  const int64_t* row_ptr;  // null: no list, the band alone decides
  const int32_t *cols, *ids;
  const uint64_t* bits;
  int64_t set_stride_b, set_stride_h;
  bool same_for_all_queries;  // row_ptr has one query tile a set
  // The list by key blocks, for backward: visits[visit_ptr[set * blocks + n] ...] are the query tiles with an entry in block n,
  // rising. Null: every query tile of the band is asked.
  const int64_t* visit_ptr;
  const int32_t* visits;
  int64_t blocks;

  static constexpr int64_t kUnlimited = int64_t{1} << 60;

  int64_t set_of(int64_t b, int64_t h) const { return b * set_stride_b + h * set_stride_h; }

  // Key tiles [first, last] that the band lets query tile qt see.
  void key_range(int64_t qt, int64_t& first, int64_t& last) const {
    const int64_t i0 = qt * kTile, i1 = (i0 + kTile < Tq ? i0 + kTile : Tq) - 1;
    const int64_t lo = i0 + offset - left, hi = i1 + offset + right;
    first = lo <= 0 ? 0 : lo / kTile;
    last = hi < 0 ? -1 : (hi >= Tk ? k_tiles - 1 : hi / kTile);
  }
  // Query tiles [first, last] that the band lets see some key of tiles [kt_begin, kt_end).
  void query_range(int64_t kt_begin, int64_t kt_end, int64_t& first, int64_t& last) const {
    const int64_t j0 = kt_begin * kTile, j1 = (kt_end * kTile < Tk ? kt_end * kTile : Tk) - 1;
    const int64_t lo = j0 - offset - right, hi = j1 - offset + left;
    first = lo <= 0 ? 0 : lo / kTile;
    last = hi < 0 ? -1 : (hi >= Tq ? q_tiles - 1 : hi / kTile);
  }
  // Key tiles [first, last] that query tiles [qt_begin, qt_end) visit, and what lies between; last < first: none. sets: of the
  // list.
  void visited_range(int64_t sets, int64_t qt_begin, int64_t qt_end, int64_t& first, int64_t& last) const {
    first = k_tiles, last = -1;
    for (int64_t qt = qt_begin; qt < qt_end; ++qt) {
      int64_t from, to;
      key_range(qt, from, to);
      for (int64_t set = 0; set < (row_ptr ? sets : 1); ++set) {
        int64_t a = from, b = to;
        if (row_ptr) {
          const int64_t begin = row_ptr[list_row(set, qt)], end = row_ptr[list_row(set, qt) + 1];
          if (begin == end) continue;
          a = cols[begin] > from ? cols[begin] : from, b = cols[end - 1] < to ? cols[end - 1] : to;
        }
        if (a > b) continue;
        if (a < first) first = a;
        if (b > last) last = b;
      }
    }
  }
  int64_t list_row(int64_t set, int64_t qt) const { return same_for_all_queries ? set : set * q_tiles + qt; }

  // The first list entry of the row whose key tile is not below kt.
  int64_t entry_from(int64_t row, int64_t kt) const {
    int64_t lo = row_ptr[row], hi = row_ptr[row + 1];
    while (lo < hi) {
      const int64_t mid = (lo + hi) / 2;
      if (cols[mid] < kt) {
        lo = mid + 1;
      } else {
        hi = mid;
      }
    }
    return lo;
  }

  // body(kt, id) for the key tiles in [kt_begin, kt_end) that query tile qt visits, rising.
  template <class F>
  void for_key_tiles(int64_t set, int64_t qt, int64_t kt_begin, int64_t kt_end, F&& body) const {
    int64_t first, last;
    key_range(qt, first, last);
    if (first < kt_begin) first = kt_begin;
    if (last >= kt_end) last = kt_end - 1;
    if (row_ptr == nullptr) {
      for (int64_t kt = first; kt <= last; ++kt) body(kt, kFull);
      return;
    }
    const int64_t row = list_row(set, qt);
    for (int64_t e = entry_from(row, first); e < row_ptr[row + 1] && cols[e] <= last; ++e) body(cols[e], ids[e]);
  }

  // body(qt) for the query tiles that may visit key tiles [kt_begin, kt_end), which are block n of the key blocks, rising.
  template <class F>
  void for_query_tiles(int64_t set, int64_t n, int64_t kt_begin, int64_t kt_end, F&& body) const {
    int64_t first, last;
    query_range(kt_begin, kt_end, first, last);
    if (visit_ptr == nullptr) {
      for (int64_t qt = first; qt <= last; ++qt) body(qt);
      return;
    }
    for (int64_t e = visit_ptr[set * blocks + n]; e < visit_ptr[set * blocks + n + 1]; ++e)
      if (visits[e] >= first && visits[e] <= last) body(visits[e]);
  }

  // The largest key tile below kt that query tile qt visits, or -1.
  int64_t previous_key_tile(int64_t set, int64_t qt, int64_t kt) const {
    int64_t first, last;
    key_range(qt, first, last);
    if (row_ptr == nullptr) return kt > first ? (kt - 1 < last ? kt - 1 : last) : -1;
    const int64_t row = list_row(set, qt), e = entry_from(row, kt < last + 1 ? kt : last + 1);
    return e > row_ptr[row] && cols[e - 1] >= first ? cols[e - 1] : -1;
  }

  // The words of a tile, one a key, bit i for query i of the tile; false (and nothing written) when every query sees every key.
  bool tile_words(int64_t qt, int64_t kt, int id, uint64_t* words) const {
    const int64_t i0 = qt * kTile, j0 = kt * kTile;
    const int64_t nq = Tq - i0 < kTile ? Tq - i0 : kTile, nk = Tk - j0 < kTile ? Tk - j0 : kTile;
    const bool band_full = j0 >= (i0 + nq - 1) + offset - left && j0 + nk - 1 <= i0 + offset + right;
    if (band_full && id == kFull) return false;
    const uint64_t* stored = id == kFull ? nullptr : bits + static_cast<int64_t>(id) * kTile;
    for (int64_t j = 0; j < nk; ++j) {
      uint64_t word = ~uint64_t{0};
      if (!band_full) {
        const int64_t lo = j0 + j - offset - right - i0, hi = j0 + j - offset + left - i0;  // queries lo .. hi see the key
        const uint64_t from = lo <= 0 ? ~uint64_t{0} : lo >= kTile ? 0 : ~uint64_t{0} << lo;
        const uint64_t upto = hi < 0 ? 0 : hi >= kTile - 1 ? ~uint64_t{0} : ~(~uint64_t{0} << (hi + 1));
        word = from & upto;
      }
      words[j] = stored ? word & stored[j] : word;
    }
    return true;
  }
};

}  // namespace mlcore
