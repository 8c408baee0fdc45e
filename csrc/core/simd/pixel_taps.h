// Weighted sums of pixels, where the channels of a pixel are contiguous: the microkernels of depthwise convolutions.
//   out[r][i][c] = start[c] + sum over taps (d, l, t) of weight[d,l,t][c] * pixel(d, r * Q + l, i * S + t)[c]
// Pixels are found through a table of pointers, (depth, lines + (rows - 1) * Q, ld): padding is a pointer to zeros, or null in
// a line of which nothing exists, and strides and dilations are the table's alone. A loaded pixel serves every tap and result
// of the tile that it meets. Each result is one chain of fused multiply-adds in the order of the taps: bits don't depend on the
// tile.
#pragma once
#include "core/simd/rows.h"

#define MLC_INLINE inline __attribute__((always_inline))

namespace mlcore::MLC_ISA {

struct PixelTaps {
  int64_t depth, lines, taps;         // of the kernel
  int64_t by_depth, by_line, by_tap;  // steps of the weights, in floats; negative where the kernel is reversed
  int64_t ld;                         // pointers a line of the table
  int64_t step;                       // pixels between neighbouring results, in the table
  int64_t by_row = 1;                 // lines between neighbouring rows of results, in the table
  bool stream = false;                // results are aligned whole vectors that pass by the caches (kStreams alone)
};

#if defined(MLC_ISA_AVX512) && !defined(MLC_EMULATE_AVX512)
constexpr bool kStreams = true;
inline void stream(float* to, Vec v) { _mm512_stream_ps(to, v.v); }
inline void end_stream() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
inline void stream(float*, Vec) {}
inline void end_stream() {}
#endif

// The scalar level has the smallest tile alone: unrolled vectors of plain C++ take a minute to compile.
constexpr bool kTiles = Vec::W >= 8;
// Results a tile of a kernel whose size is known: as many as registers leave room for beside a line of seven weights. Maps of
// images have 7 * 2^n columns.
constexpr int kWide = Vec::W == 16 ? 14 : 7;

// Calls f(t, K) for runs of K = 7, 5, 3, 2 or 1 of n neighbouring taps, K a compile-time constant.
template <int K>
struct RunOf {
  static constexpr int kTaps = K;
};
template <class F>
MLC_INLINE void for_runs(int64_t n, F&& f) {
  for (int64_t t = 0; t < n;) {
    const int64_t left = n - t;
    if (left >= 7) {
      f(t, RunOf<7>{}), t += 7;
    } else if (left >= 5 && left != 6) {
      f(t, RunOf<5>{}), t += 5;
    } else if (left >= 3) {
      f(t, RunOf<3>{}), t += 3;
    } else if (left == 2) {
      f(t, RunOf<2>{}), t += 2;
    } else {
      f(t, RunOf<1>{}), t += 1;
    }
  }
}

// A tile of P results by one vector of channels, of which n lanes where not kAll. K is the number of taps a line, or 0: any. S
// is the step where neighbours share pixels (1 or 2), or 0: any step, every tap loads its own.
template <class T, int P, int K, int S, bool kAll>
struct PixelTile {
  Vec acc[P];
  int lanes;

  template <class U>
  MLC_INLINE Vec load(const U* p) const {
    if constexpr (kAll) return Vec::load(p);
    return load_some(p, lanes);
  }

  // kRun taps of a line of pixels from column t on.
  template <int kRun>
  MLC_INLINE void add_run(const PixelTaps& p, const T* const* line, int64_t t, int64_t c, const float* weight) {
    Vec w[kRun];
#pragma GCC unroll 7
    for (int k = 0; k < kRun; ++k) w[k] = load(weight + (t + k) * p.by_tap);
    if constexpr (S == 0) {
#pragma GCC unroll 8
      for (int i = 0; i < P; ++i)
#pragma GCC unroll 7
        for (int k = 0; k < kRun; ++k) acc[i] = fma(w[k], load(line[i * p.step + t + k] + c), acc[i]);
    } else {
#pragma GCC unroll 40
      for (int j = 0; j < (P - 1) * S + kRun; ++j) {
        const Vec x = load(line[t + j] + c);
#pragma GCC unroll 16
        for (int i = 0; i < P; ++i)
          if (j - i * S >= 0 && j - i * S < kRun) acc[i] = fma(w[j - i * S], x, acc[i]);
      }
    }
  }

  // table points to the first pixel of the tile, planes of it are `plane` pointers apart; weight and start to channel 0 of this
  // tile, c is its channel of the pixels.
  MLC_INLINE void sum(const PixelTaps& p, int64_t plane, const T* const* table, int64_t c, const float* weight,
                      const float* start) {
    const Vec first = start ? load(start) : Vec::zero();
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i) acc[i] = first;
    for (int64_t d = 0; d < p.depth; ++d, weight += p.by_depth, table += plane) {
      const T* const* line = table;
      const float* w = weight;
      for (int64_t l = 0; l < p.lines; ++l, line += p.ld, w += p.by_line) {
        if (!line[0]) continue;
        if constexpr (K > 0) {
          add_run<K>(p, line, 0, c, w);
        } else {
          for_runs(p.taps, [&](int64_t t, auto run)
                               __attribute__((always_inline)) { add_run<decltype(run)::kTaps>(p, line, t, c, w); });
        }
      }
    }
  }

  // Result i at out + i * by.
  template <class U>
  MLC_INLINE void store(U* out, int64_t by, [[maybe_unused]] bool past_caches) const {
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i) {
      if constexpr (kAll && kStreams && sizeof(U) == 4) {
        if (past_caches) {
          stream(out + i * by, acc[i]);
          continue;
        }
      }
      if constexpr (kAll) acc[i].store(out + i * by);
      if constexpr (!kAll) store_some(out + i * by, acc[i], lanes);
    }
  }
};

// Tiles side by side: all of `channels`, at least a vector where kAll. The last one reaches back over results that are there:
// they get the same bits again.
template <class T, class U, int P, int K, int S, bool kAll>
void pixel_tiles(const PixelTaps& p, int64_t plane, const T* const* table, int64_t c, int64_t channels, const float* weight,
                 const float* start, U* out, int64_t by) {
  for (int64_t j = 0; j < channels; j += Vec::W) {
    const int64_t at = kAll ? min(j, channels - Vec::W) : 0;
    PixelTile<T, P, K, S, kAll> tile;
    tile.lanes = kAll ? Vec::W : static_cast<int>(channels);
    tile.sum(p, plane, table, c + at, weight + at, start ? start + at : nullptr);
    tile.store(out + at, by, p.stream);
  }
}

// Calls f(kernel, its P) with the tiles that suit `left` results in a row of `count`. Of 16 bits tiles gain less and take as
// long to compile: fewer of them.
template <class T, class U, class F>
MLC_INLINE void with_tiles(const PixelTaps& p, int64_t count, int64_t left, bool all, F&& f) {
  constexpr bool kMore = sizeof(T) == 4;
  if constexpr (kTiles) {
    const bool wide = left >= kWide || (count >= kWide && left > 7);
    if (all && wide && p.step == 1) {
      if (p.taps == 3) return f(pixel_tiles<T, U, kWide, 3, 1, true>, kWide);
      if constexpr (kMore) {
        if (p.taps == 1) return f(pixel_tiles<T, U, kWide, 1, 1, true>, kWide);
        if (p.taps == 2) return f(pixel_tiles<T, U, kWide, 2, 1, true>, kWide);
        if (p.taps == 5) return f(pixel_tiles<T, U, kWide, 5, 1, true>, kWide);
        if (p.taps == 7) return f(pixel_tiles<T, U, kWide, 7, 1, true>, kWide);
      }
    }
    if (all && wide && p.step == 2) {
      if (p.taps == 3) return f(pixel_tiles<T, U, kWide, 3, 2, true>, kWide);
      if constexpr (kMore) {
        if (p.taps == 5) return f(pixel_tiles<T, U, kWide, 5, 2, true>, kWide);
      }
    }
    if (all && count >= 7) {
      if constexpr (kMore && kWide > 7) {
        if (p.step == 1 && p.taps == 3) return f(pixel_tiles<T, U, 7, 3, 1, true>, 7);
      }
      if (p.step == 1) return f(pixel_tiles<T, U, 7, 0, 1, true>, 7);
      if constexpr (kMore) {
        if (p.step == 2) return f(pixel_tiles<T, U, 7, 0, 2, true>, 7);
      }
      return f(pixel_tiles<T, U, 7, 0, 0, true>, 7);
    }
    if (!all && count >= 4) return f(pixel_tiles<T, U, 4, 0, 0, false>, 4);
  }
  all ? f(pixel_tiles<T, U, 1, 0, 0, true>, 1) : f(pixel_tiles<T, U, 1, 0, 0, false>, 1);
}

// Results [0, count) of `rows` rows; out + r * by_row + i * by is channel c of result i in row r. Channels [c, c + channels) of
// the pixels, with the weights and starts of these channels at weight and start. Rows of a tile's columns follow each other,
// for as many channels as the L1 cache holds the lines and weights of: a row finds the lines that it shares with the one
// before.
template <class T, class U>
void sum_pixels(const PixelTaps& p, int64_t rows, int64_t count, const T* const* table, int64_t c, int64_t channels,
                const float* weight, const float* start, U* out, int64_t by, int64_t by_row) {
  constexpr int64_t kFloats = 16384, W = Vec::W;
  const int64_t plane = (p.lines + (rows - 1) * p.by_row) * p.ld;
  const int64_t pixel = max<int64_t>(p.depth * p.lines * ((kWide - 1) * p.step + 2 * p.taps), 1);  // floats of a channel
  const int64_t group = max(W, kFloats / pixel / W * W);
  for (int64_t i = 0; i < count;) {
    with_tiles<T, U>(p, count, count - i, channels >= W, [&](auto kernel, int64_t P) {
      i = min(i, count - P);  // the last tile reaches back, too
      for (int64_t j = 0, next; j < channels; j = next) {
        next = channels - j < group + W ? channels : j + group;
        for (int64_t r = 0; r < rows; ++r)
          kernel(p, plane, table + r * p.by_row * p.ld + i * p.step, c + j, next - j, weight + j, start ? start + j : nullptr,
                 out + r * by_row + i * by + j, by);
      }
      i += P;
    });
  }
}

// out[j] for j < count: the pixel in column first + j * gap of a line of `size` columns, or zeros outside and where line is
// null. by: elements from a column to the next.
template <class T>
void point_to_pixels(const T* line, int64_t by, int64_t size, int64_t first, int64_t gap, int64_t count, const T* zeros,
                     const T** out) {
  const int64_t lo = !line ? count : first >= 0 ? 0 : min(count, ceil_div(-first, gap));
  const int64_t hi = !line || first >= size ? lo : max(lo, min(count, ceil_div(size - first, gap)));
  for (int64_t j = 0; j < lo; ++j) out[j] = zeros;
  const T* pixel = line + (lo < hi ? (first + lo * gap) * by : 0);
  for (int64_t j = lo, next = gap * by; j < hi; ++j, pixel += next) out[j] = pixel;
  for (int64_t j = hi; j < count; ++j) out[j] = zeros;
}

}  // namespace mlcore::MLC_ISA
