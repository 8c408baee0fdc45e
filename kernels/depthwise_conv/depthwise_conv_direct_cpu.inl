// depthwise_conv of float32 planes (W contiguous) that are read where they lie: lanes outside of a line are masked, so nothing
// is copied. The equations are in depthwise_conv.h, the reasons in README.md; what direct() refuses is
// depthwise_conv_cpu.inl's.
#include "core/simd/pixel_taps.h"
#include "depthwise_conv/depthwise_conv_kernels.h"

namespace mlcore::MLC_ISA {
namespace {

constexpr int kW = Vec::W;
constexpr int kRows = kTiles ? 8 : 2;     // lines of results that a tile holds
constexpr int kStrided = kTiles ? 4 : 2;  // the same at stride 2

// A plane and how results read it: tap (k, l) of result (h, w) is element (row + h * S + k * row_gap, col + w * S + l *
// col_gap), 0 outside of the plane, and has weight k * by_row + l * by_col.
struct Reads {
  const float* plane;
  int64_t ld, lines, cols;
  int64_t rows_of_taps, taps, by_row, by_col;
  int64_t row, col, row_gap, col_gap;
};

// The lanes of a vector from column c on that are inside of [0, cols).
inline uint32_t inside(int64_t c, int64_t cols) {
  const int lo = static_cast<int>(min<int64_t>(max<int64_t>(-c, 0), kW)), hi = static_cast<int>(min<int64_t>(cols - c, kW));
  return hi <= lo ? 0u : ((1u << hi) - 1u) & ~((1u << lo) - 1u);
}

// For each column of taps: the inputs of `L` lines from line number `first` of the tile whose results begin at (h, w), as
// body(column, line, vector), after begin(column); end(column).
template <int L, int S, class Begin, class Body, class End>
MLC_INLINE void for_inputs(const Reads& in, int64_t h, int64_t w, int64_t first, Begin&& begin, Body&& body, End&& end) {
  const float* line[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) {
    const int64_t y = in.row + h * S + (first + i) * in.row_gap;
    line[i] = y >= 0 && y < in.lines ? in.plane + y * in.ld : nullptr;
  }
  for (int64_t k = 0; k < in.taps; ++k) {
    const int64_t x = in.col + w * S + k * in.col_gap;
    const uint32_t lanes = inside(x, in.cols), more = S == 2 ? inside(x + kW, in.cols) : 0u;
    if (!(lanes | more)) continue;
    begin(k);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
      if (line[i]) {
        Vec v = Vec::load_lanes(line[i] + x, lanes);
        if constexpr (S == 2) v = even_lanes(v, Vec::load_lanes(line[i] + x + kW, more));
        body(i, v);
      }
    end(k);
  }
}

// acc[r] += the taps of kernel lines [first, first + K) of result line h + r * row_gap (r at stride 2), columns from w on.
template <int R, int K, int S>
void add_lines(const Reads& in, int64_t h, int64_t w, int64_t first, const float* weight, Vec (&acc)[R]) {
  Vec taps[K], sums[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r] = acc[r];
  for_inputs<(R - 1) * S + K, S>(
      in, h, w, first,
      [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 7
        for (int j = 0; j < K; ++j) taps[j] = Vec::set1(weight[(first + j) * in.by_row + k * in.by_col]);
      },
      [&](int i, Vec v) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          if (i - r * S >= 0 && i - r * S < K) sums[r] = fma(taps[i - r * S], v, sums[r]);
      },
      [](int64_t) {});
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r] = sums[r];
}
template <int R, int S>
void add_taps(const Reads& in, int64_t h, int64_t w, const float* weight, Vec (&acc)[R]) {
  for_runs(in.rows_of_taps,
           [&](int64_t first, auto run) { add_lines<R, decltype(run)::kTaps, S>(in, h, w, first, weight, acc); });
}

// sums[(first + j) * taps + k] += dy[r] times what tap (first + j, k) reads for it.
template <int R, int K, int S>
void add_weight_lines(const Reads& in, int64_t h, int64_t w, int64_t first, const Vec (&dy)[R], float* sums) {
  Vec acc[K];
  const auto at = [&](int j, int64_t k) { return sums + ((first + j) * in.taps + k) * kW; };
  for_inputs<(R - 1) * S + K, S>(
      in, h, w, first,
      [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 7
        for (int j = 0; j < K; ++j) acc[j] = Vec::load(at(j, k));
      },
      [&](int i, Vec v) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r)
          if (i - r * S >= 0 && i - r * S < K) acc[i - r * S] = fma(dy[r], v, acc[i - r * S]);
      },
      [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 7
        for (int j = 0; j < K; ++j) acc[j].store(at(j, k));
      });
}

float* plane_of(const Volume& v, int64_t n, int64_t c) { return static_cast<float*>(v.data) + n * v.n + c * v.c; }

// What y reads of a plane of x.
Reads forward_reads(const DepthwiseConv& p) {
  return {nullptr, p.x.s[1], p.x.size[1], p.x.size[2], p.K[1],        p.K[2],
          p.K[2],  1,        -p.pad[1],   -p.pad[2],   p.dilation[1], p.dilation[2]};
}

// The taps of one dimension that reach dx's coordinates q, q + stride, ...: `taps` from weight number `weight` on, `step`
// apart; the first reads dy's coordinate `first` for q, the others `gap` further each.
struct Phase {
  int64_t taps, weight, step, first, gap;
};
Phase phase_of(const DepthwiseConv& p, int d, int64_t q) {
  const int64_t s = p.stride[d], K = p.K[d], reach = (K - 1) * p.dilation[d];
  if (s == 1) return {K, K - 1, -1, p.pad[d] - reach, p.dilation[d]};
  const int64_t e = (q + p.pad[d]) % s, taps = K > e ? (K - e + s - 1) / s : 0;
  return {taps, e + (taps - 1) * s, -s, (q + p.pad[d] - e) / s - (taps - 1), 1};
}

// Calls body(kd, z) for the taps in depth that meet a plane z of the other side inside of [0, depth).
template <class F>
void for_depth(const DepthwiseConv& p, bool backward, int64_t at, int64_t depth, F&& body) {
  for (int64_t kd = 0; kd < p.K[0]; ++kd) {
    const int64_t to = backward ? at + p.pad[0] - kd * p.dilation[0] : at * p.stride[0] + kd * p.dilation[0] - p.pad[0];
    const int64_t z = backward ? to / p.stride[0] : to;
    if (to < 0 || z >= depth || (backward && z * p.stride[0] != to)) continue;
    body(kd, z);
  }
}

// Calls body(h, lines, w, lanes): tiles of R result lines `gap` apart by a vector of columns.
template <int R, class F>
void for_tiles(int64_t lines, int64_t cols, int64_t gap, F&& body) {
  for (int64_t base = 0; base < min(gap, lines); ++base)
    for (int64_t h = base; h < lines; h += R * gap)
      for (int64_t w = 0; w < cols; w += kW)
        body(h, static_cast<int>(min<int64_t>(R, ceil_div(lines - h, gap))), w, static_cast<int>(min<int64_t>(kW, cols - w)));
}

template <int R, int S>
void fwd_plane(const DepthwiseConv& p, int64_t n, int64_t co) {
  Reads in = forward_reads(p);
  const float *x = plane_of(p.x, n, co / p.M), *weight = p.weight + co * p.taps;
  float* y = plane_of(p.y, n, co);
  const int64_t gap = p.dilation[1];
  for (int64_t od = 0; od < p.y.size[0]; ++od, y += p.y.s[0])
    for_tiles<R>(p.y.size[1], p.y.size[2], gap, [&](int64_t h, int lines, int64_t w, int lanes) {
      Vec acc[R];
      for (int r = 0; r < R; ++r) acc[r] = Vec::set1(p.bias ? p.bias[co] : 0.0f);
      for_depth(p, false, od, p.x.size[0], [&](int64_t kd, int64_t z) {
        in.plane = x + z * p.x.s[0];
        add_taps<R, S>(in, h, w, weight + kd * p.K[1] * p.K[2], acc);
      });
      for (int r = 0; r < lines; ++r) store_some(y + (h + r * gap) * p.y.s[1] + w, acc[r], lanes);
    });
}

template <int S>
void dx_plane(const DepthwiseConv& p, int64_t n, int64_t c) {
  constexpr int R = kRows;
  float* dx = plane_of(p.dx, n, c);
  const int64_t gap = S == 1 ? p.dilation[1] : 1;
  for (int64_t z = 0; z < p.dx.size[0]; ++z, dx += p.dx.s[0])
    for (int64_t q = 0; q < min<int64_t>(S, p.dx.size[1]); ++q) {
      const Phase rows = phase_of(p, 1, q);
      const auto add = [&](int64_t phase, int64_t h, int64_t w, Vec(&acc)[R]) {
        const Phase cols = phase_of(p, 2, phase);
        for (int r = 0; r < R; ++r) acc[r] = Vec::zero();
        Reads in{nullptr,   p.dy.s[1],  p.dy.size[1], p.dy.size[2], rows.taps, cols.taps, rows.step * p.K[2],
                 cols.step, rows.first, cols.first,   rows.gap,     cols.gap};
        for_depth(p, true, z, p.dy.size[0], [&](int64_t kd, int64_t zo) {
          for (int64_t co = c * p.M; co < (c + 1) * p.M; ++co) {
            in.plane = plane_of(p.dy, n, co) + zo * p.dy.s[0];
            const int64_t first = (kd * p.K[1] + rows.weight) * p.K[2] + cols.weight;
            add_taps<R, 1>(in, h, w, p.weight + co * p.taps + first, acc);
          }
        });
      };
      const int64_t cols = ceil_div<int64_t>(p.dx.size[2], S);
      for_tiles<R>(ceil_div<int64_t>(p.dx.size[1] - q, S), cols, gap, [&](int64_t h, int lines, int64_t w, int lanes) {
        Vec even[R], odd[R];
        add(0, h, w, even);
        if constexpr (S == 2) add(1, h, w, odd);
        for (int r = 0; r < lines; ++r) {
          float* to = dx + (q + (h + r * gap) * S) * p.dx.s[1] + w * S;
          if constexpr (S == 1) {
            store_some(to, even[r], lanes);
          } else {
            Vec low, high;
            interleave(even[r], odd[r], low, high);
            const int left = static_cast<int>(min<int64_t>(2 * kW, p.dx.size[2] - 2 * w));
            store_some(to, low, min(left, kW));
            if (left > kW) store_some(to + kW, high, left - kW);
          }
        }
      });
    }
}

// sums: (taps + 1, kW), the last of dy alone.
template <int R, int S>
void dweight_plane(const DepthwiseConv& p, int64_t n, int64_t co, float* sums) {
  Reads in = forward_reads(p);
  const float* x = plane_of(p.x, n, co / p.M);
  const int64_t gap = p.dilation[1];
  for (int64_t od = 0; od < p.dy.size[0]; ++od) {
    const float* from = plane_of(p.dy, n, co) + od * p.dy.s[0];
    for_tiles<R>(p.dy.size[1], p.dy.size[2], gap, [&](int64_t h, int lines, int64_t w, int lanes) {
      Vec dy[R], total = Vec::load(sums + p.taps * kW);
      for (int r = 0; r < R; ++r) {
        dy[r] = r < lines ? load_some(from + (h + r * gap) * p.dy.s[1] + w, lanes) : Vec::zero();
        total = total + dy[r];
      }
      total.store(sums + p.taps * kW);
      for_depth(p, false, od, p.x.size[0], [&](int64_t kd, int64_t z) {
        in.plane = x + z * p.x.s[0];
        float* to = sums + kd * p.K[1] * p.K[2] * kW;
        for_runs(p.K[1],
                 [&](int64_t first, auto run) { add_weight_lines<R, decltype(run)::kTaps, S>(in, h, w, first, dy, to); });
      });
    });
  }
}

int64_t scratch_floats(const DepthwiseConv& p) { return (p.taps + 1) * kW; }

void fwd(const DepthwiseConv& p, int64_t begin, int64_t end, float*) {
  for (int64_t plane = begin * p.M; plane < end * p.M; ++plane) {
    const int64_t n = plane / p.channels_out(), co = plane % p.channels_out();
    p.stride[1] == 1 ? fwd_plane<kRows, 1>(p, n, co) : fwd_plane<kStrided, 2>(p, n, co);
  }
}

void bwd(const DepthwiseConv& p, int64_t block, int64_t begin, int64_t end, float* sums) {
  const int64_t first = p.N * block / p.blocks, last = p.N * (block + 1) / p.blocks, Cm = p.channels_out();
  for (int64_t c = begin; c < end; ++c) {
    for (int64_t n = first; n < last && p.dx.data; ++n) p.stride[1] == 1 ? dx_plane<1>(p, n, c) : dx_plane<2>(p, n, c);
    for (int64_t co = c * p.M; co < (c + 1) * p.M && p.partial; ++co) {
      memset(sums, 0, sizeof(float) * static_cast<size_t>(scratch_floats(p)));
      for (int64_t n = first; n < last; ++n)
        p.stride[1] == 1 ? dweight_plane<kRows, 1>(p, n, co, sums) : dweight_plane<kStrided, 2>(p, n, co, sums);
      for (int64_t t = 0; t <= p.taps; ++t) p.partial[(block * (p.taps + 1) + t) * Cm + co] = sum(Vec::load(sums + t * kW));
    }
  }
}

}  // namespace

extern const DepthwisePlanes depthwise_direct = {scratch_floats, fwd, bwd};

}  // namespace mlcore::MLC_ISA
