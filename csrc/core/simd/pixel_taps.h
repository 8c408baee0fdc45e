// Weighted sums of pixels, where the channels of a pixel are contiguous: the microkernels of depthwise convolutions.
//   out[r][i][c] = start[c] + sum over taps (d, l, t) of weight[d,l,t][c] * pixel(d, l + r, i * S + t)[c]
// Pixels are found through a table of pointers, (depth, lines + R - 1, ld): padding is a pointer to zeros, and strides and
// dilations are the table's alone. A loaded pixel serves every tap and result of the tile that it meets.
// Each result is one chain of fused multiply-adds in the order of the taps: bits don't depend on the tile.
#pragma once
#include "core/simd/rows.h"

#define MLC_INLINE inline __attribute__((always_inline))

namespace mlcore::MLC_ISA {

struct PixelTaps {
  int64_t depth, lines, taps;         // of the kernel
  int64_t by_depth, by_line, by_tap;  // steps of the weights, in floats; negative where the kernel is reversed
  int64_t ld;                         // pointers a line of the table
  int64_t step;                       // pixels between neighbouring results, in the table
};

// The scalar level has the smallest tile alone: unrolled vectors of plain C++ take a minute to compile.
constexpr bool kTiles = Vec::W >= 8;

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

// A tile of R lines by P results by V vectors of channels, of which n lanes where not kAll (V is 1 then). S is the step where
// neighbours share pixels (1 or 2), or 0: any step, every tap loads its own.
template <class T, int R, int P, int V, int S, bool kAll>
struct PixelTile {
  Vec acc[R][P][V];
  int lanes;

  template <class U>
  MLC_INLINE Vec load(const U* p) const {
    if constexpr (kAll) return Vec::load(p);
    return load_some(p, lanes);
  }

  // One line of pixels for the lines [kFirst, kLast) of results; weight is the line's for result line 0, back floats further
  // the one for line 1.
  template <int kFirst, int kLast>
  MLC_INLINE void add_line(const PixelTaps& p, const T* const* line, int64_t c, const float* weight, int64_t back) {
    for_runs(p.taps, [&](int64_t t, auto run) __attribute__((always_inline)) {
      constexpr int K = decltype(run)::kTaps;
      Vec w[R][K][V];
#pragma GCC unroll 2
      for (int r = kFirst; r < kLast; ++r)
#pragma GCC unroll 7
        for (int k = 0; k < K; ++k)
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) w[r][k][v] = load(weight - r * back + (t + k) * p.by_tap + v * Vec::W);
      if constexpr (S == 0) {
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i)
#pragma GCC unroll 7
          for (int k = 0; k < K; ++k)
#pragma GCC unroll 2
            for (int v = 0; v < V; ++v) {
              const Vec x = load(line[i * p.step + t + k] + c + v * Vec::W);
#pragma GCC unroll 2
              for (int r = kFirst; r < kLast; ++r) acc[r][i][v] = fma(w[r][k][v], x, acc[r][i][v]);
            }
      } else {
#pragma GCC unroll 16
        for (int j = 0; j < (P - 1) * S + K; ++j) {
          const T* pixel = line[t + j] + c;
#pragma GCC unroll 2
          for (int v = 0; v < V; ++v) {
            const Vec x = load(pixel + v * Vec::W);
#pragma GCC unroll 8
            for (int i = 0; i < P; ++i)
#pragma GCC unroll 2
              for (int r = kFirst; r < kLast; ++r)
                if (j - i * S >= 0 && j - i * S < K) acc[r][i][v] = fma(w[r][j - i * S][v], x, acc[r][i][v]);
          }
        }
      }
    });
  }

  // table points to the first pixel of the tile; weight and start to channel 0 of this tile, c is its channel of the pixels.
  MLC_INLINE void sum(const PixelTaps& p, const T* const* table, int64_t c, const float* weight, const float* start) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Vec first = start ? load(start + v * Vec::W) : Vec::zero();
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i) acc[r][i][v] = first;
    }
    for (int64_t d = 0; d < p.depth; ++d, weight += p.by_depth) {
      const float* w = weight;
      if constexpr (R == 1) {
        for (int64_t l = 0; l < p.lines; ++l, table += p.ld, w += p.by_line) add_line<0, 1>(p, table, c, w, 0);
      } else if (p.lines > 0) {
        add_line<0, 1>(p, table, c, w, 0), table += p.ld, w += p.by_line;
        for (int64_t l = 1; l < p.lines; ++l, table += p.ld, w += p.by_line) add_line<0, 2>(p, table, c, w, p.by_line);
        add_line<1, 2>(p, table, c, w, p.by_line), table += p.ld;
      }
    }
  }

  // Result i of line r at out[r] + i * by + v * W.
  template <class U>
  MLC_INLINE void store(U* const* out, int64_t by) const {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < P; ++i)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          U* to = out[r] + i * by + v * Vec::W;
          if constexpr (kAll) acc[r][i][v].store(to);
          if constexpr (!kAll) store_some(to, acc[r][i][v], lanes);
        }
  }
};

template <class T, class U, int R, int P, int V, int S, bool kAll>
void pixel_tile(const PixelTaps& p, int lanes, const T* const* table, int64_t c, const float* weight, const float* start,
                U* const* out, int64_t by) {
  PixelTile<T, R, P, V, S, kAll> tile;
  tile.lanes = lanes;
  tile.sum(p, table, c, weight, start);
  tile.store(out, by);
}

// Results [0, count) of R lines (two where step is 1 only); out[r] + i * by is channel c of result i. Channels [c, c +
// channels) of the pixels, with the weights and starts of these channels at weight and start.
template <int R, class T, class U>
void sum_pixels(const PixelTaps& p, int64_t count, const T* const* table, int64_t c, int64_t channels, const float* weight,
                const float* start, U* const (&out)[R], int64_t by) {
  static_assert(R == 1 || kTiles);
  constexpr int W = Vec::W, P = kTiles ? 4 : 1;
  for (int64_t i = 0; i < count;) {
    // The last tile of a line reaches back over results that are there: they get the same bits again.
    const bool tile = count >= P;
    if (tile && i + P > count) i = count - P;
    const T* const* from = table + i * p.step;
    for (int64_t j = 0; j < channels;) {
      const float* first = start ? start + j : nullptr;
      U* to[R];
      if (channels < W) {
        for (int r = 0; r < R; ++r) to[r] = out[r] + i * by;
        const int n = static_cast<int>(channels);
        tile ? pixel_tile<T, U, R, P, 1, 0, false>(p, n, from, c, weight, first, to, by)
             : pixel_tile<T, U, R, 1, 1, 0, false>(p, n, from, c, weight, first, to, by);
        break;
      }
      const bool two = R == 1 && kTiles && tile && channels >= 2 * W;
      const int64_t wide = two ? 2 * W : W, at = min(j, channels - wide);  // the last vector reaches back likewise
      for (int r = 0; r < R; ++r) to[r] = out[r] + i * by + at;
      if (start) first = start + at;
      j = at + wide;
      const auto run = [&](auto kernel) { kernel(p, W, from, c + at, weight + at, first, to, by); };
      if (!kTiles || !tile) {
        run(pixel_tile<T, U, R, 1, 1, 0, true>);
      } else if constexpr (!kTiles) {
      } else if constexpr (R == 2) {
        run(pixel_tile<T, U, R, P, 1, 1, true>);
      } else if (!two) {
        run(pixel_tile<T, U, R, P, 1, 0, true>);
      } else {
        p.step == 1   ? run(pixel_tile<T, U, R, P, 2, 1, true>)
        : p.step == 2 ? run(pixel_tile<T, U, R, P, 2, 2, true>)
                      : run(pixel_tile<T, U, R, P, 2, 0, true>);
      }
    }
    i += tile ? P : 1;
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
  for (int64_t j = lo; j < hi; ++j) out[j] = line + (first + j * gap) * by;
  for (int64_t j = hi; j < count; ++j) out[j] = zeros;
}

}  // namespace mlcore::MLC_ISA
