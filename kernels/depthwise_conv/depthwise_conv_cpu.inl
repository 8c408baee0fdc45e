// depthwise_conv where W is contiguous; the equations are in depthwise_conv.h, the reasons in README.md. Compiled once per ISA.
// Neither the number of dimensions, the kernel size, the stride nor the dilation is known here but as numbers: taps are offsets
// into a padded copy of a block (depthwise_conv_blocks.h).
#include "depthwise_conv/depthwise_conv_blocks.h"

namespace mlcore::MLC_ISA {
namespace {

// One tap: where it reads for the first result, and which weight it has.
struct Tap {
  int64_t first, weight;
};

// Up to three taps that read the same line of inputs, each one input further than the one before: a loaded input serves all.
struct TapGroup {
  int64_t first, count;
  int64_t weight[3];
};

// Groups of taps; `step` is the distance of the inputs of neighbouring results. Neighbours are looked for among the `window`
// taps before and behind. Taps are used up.
int64_t group_taps(Tap* taps, int64_t count, int64_t step, int64_t window, TapGroup* groups) {
  int64_t n = 0;
  for (int64_t t = 0; t < count; ++t) {
    const int64_t lo = max<int64_t>(t - window, 0), hi = min(t + window + 1, count);
    const auto find = [&](int64_t first) {
      for (int64_t i = lo; i < hi; ++i)
        if (taps[i].weight >= 0 && taps[i].first == first) return i;
      return int64_t{-1};
    };
    int64_t next = taps[t].weight >= 0 ? t : -1;
    while (next >= 0) {  // a chain begins where no tap stands before
      const int64_t before = find(taps[next].first - step);
      if (before < 0) break;
      next = before;
    }
    while (next >= 0) {
      TapGroup& g = groups[n++];
      g = {taps[next].first, 0, {0, 0, 0}};
      while (next >= 0 && g.count < 3) {
        g.weight[g.count++] = taps[next].weight;
        taps[next].weight = -1;
        next = find(g.first + g.count * step);
      }
    }
  }
  return n;
}

// acc[r][v] += sum over the T taps of a group, for R results in a row; load(i, v) is the group's input of result i.
template <int T, int R, int V, class Load>
inline void add_group(Vec (&acc)[R][V], const Vec (&weight)[3][V], Load&& load) {
#pragma GCC unroll 16
  for (int i = 0; i < R + T - 1; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec x = load(i, v);
#pragma GCC unroll 3
      for (int t = 0; t < T; ++t)
        if (i - t >= 0 && i - t < R) acc[i - t][v] = fma(weight[t][v], x, acc[i - t][v]);
    }
}

// weight(w, v) of weight number w, and load(first, i, v) of a group's input for result i.
template <int R, int V, class Weight, class Load>
inline void add_groups(Vec (&acc)[R][V], int64_t count, const TapGroup* groups, Weight&& weight, Load&& load) {
  for (int64_t n = 0; n < count; ++n) {
    const TapGroup& g = groups[n];
    const auto from = [&](int i, int v) { return load(g.first, i, v); };
    Vec w[3][V];
    for (int v = 0; v < V; ++v) w[0][v] = weight(g.weight[0], v);
    if (g.count == 1) {
      add_group<1>(acc, w, from);
      continue;
    }
    for (int v = 0; v < V; ++v) w[1][v] = weight(g.weight[1], v);
    if (g.count == 2) {
      add_group<2>(acc, w, from);
      continue;
    }
    for (int v = 0; v < V; ++v) w[2][v] = weight(g.weight[2], v);
    add_group<3>(acc, w, from);
  }
}

// out[i] = start + sum_t weight[t] * in[offset[t] + i] for i < n, and some results behind them: buffers have slack.
// kTaps is taps where it is known, so that the weights stay in registers; 0 is any number.
template <int kTaps, int kVecs>
void convolve_flat(int64_t n, bool add, float start, int64_t taps, const float* weight, const int64_t* offset, const float* in,
                   float* out) {
  const int64_t count = kTaps ? kTaps : taps;
  for (int64_t i = 0; i < n; i += kVecs * kW) {
    Vec acc[kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kVecs; ++r) acc[r] = add ? Vec::load(out + i + r * kW) : Vec::set1(start);
#pragma GCC unroll 9
    for (int64_t t = 0; t < count; ++t) {
      const Vec w = Vec::set1(weight[t]);
      const float* v = in + offset[t] + i;
#pragma GCC unroll 8
      for (int r = 0; r < kVecs; ++r) acc[r] = fma(w, Vec::load(v + r * kW), acc[r]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kVecs; ++r) acc[r].store(out + i + r * kW);
  }
}
void convolve(int64_t n, bool add, float start, int64_t taps, const float* weight, const int64_t* offset, const float* in,
              float* out) {
  if (n <= 2 * kW) return convolve_flat<0, 2>(n, add, start, taps, weight, offset, in, out);
  if (taps == 9) return convolve_flat<9, 4>(n, add, start, taps, weight, offset, in, out);
  convolve_flat<0, kUnroll>(n, add, start, taps, weight, offset, in, out);
}

// Results of a block by tiles: R lines `gap` apart, one vector of columns; each input line serves up to three taps. Results
// are handed to store(line, column, vector, lanes).
template <class Store>
void convolve_lines(int64_t lines, int64_t cols, int64_t gap, int64_t ld, float start, int64_t count, const TapGroup* groups,
                    const float* weight, const float* in, Store&& store) {
  const int64_t unit = gap * ld;
  const auto tile = [&]<int R>(int64_t line, int64_t c) {
    Vec acc[R][1];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) acc[r][0] = Vec::set1(start);
    const float* from = in + line * ld + c;
    add_groups(
        acc, count, groups, [&](int64_t w, int) { return Vec::set1(weight[w]); },
        [&](int64_t first, int i, int) { return Vec::load(from + first + i * unit); });
    const int n = static_cast<int>(min<int64_t>(kW, cols - c));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) store(line + r * gap, c, acc[r][0], n);
  };
  for (int64_t base = 0; base < min(gap, lines); ++base)
    for (int64_t line = base; line < lines;) {
      const int64_t left = (lines - line + gap - 1) / gap, done = left >= kLines ? kLines : left >= 4 ? 4 : left >= 2 ? 2 : 1;
      for (int64_t c = 0; c < cols; c += kW) {
        if (done == kLines) {
          tile.template operator()<kLines>(line, c);
        } else if (done == 4) {
          tile.template operator()<4>(line, c);
        } else if (done == 2) {
          tile.template operator()<2>(line, c);
        } else {
          tile.template operator()<1>(line, c);
        }
      }
      line += done * gap;
    }
}

// Lines serve best where there are several and vectors are nearly full; else a block is one long line.
bool by_lines(const Cut& c) { return c.block[1] > 1 && round_up<int64_t>(c.block[2], kW) * 3 <= c.block[2] * 4; }
int64_t line_gap(const DepthwiseConv& p) { return p.stride[1] == 1 ? p.dilation[1] : 1; }

// What a task knows of the taps before it meets a plane. Forward: where each reads, and their groups. dx: the same for each
// remainder q of the coordinates by the stride, taps [begin[q], begin[q + 1]), groups [group_begin[q], group_begin[q + 1]).
struct PlaneScratch {
  int64_t* offset;
  TapGroup* groups;
  int64_t *dx_begin, *dx_group_begin, *dx_offset, *dx_weight;
  TapGroup* dx_groups;
  Tap* taps;  // being grouped
  float *weight, *in, *out, *dy;
};
struct PlaneSizes {
  int64_t taps, phases, in, out;
  explicit PlaneSizes(const DepthwiseConv& p) {
    const Cut f = forward_cut(p);
    taps = round_up<int64_t>(p.taps, 16), phases = 16, in = f.buffer(), out = f.results();
    if (!p.dy.data) return;
    const Cut b = backward_cut(p);
    phases = round_up<int64_t>(p.stride[0] * p.stride[1] * p.stride[2] + 1, 16), in = max(in, b.buffer()),
    out = max(out, b.results());
  }
};
int64_t plane_floats(const DepthwiseConv& p) {
  const PlaneSizes n(p);
  return 31 * n.taps + 4 * n.phases + n.in + 2 * n.out;
}
PlaneScratch cut_scratch(const DepthwiseConv& p, float* scratch) {
  const PlaneSizes n(p);
  PlaneScratch s;
  const auto take = [&](auto*& to, int64_t floats) { to = reinterpret_cast<decltype(to + 0)>(scratch), scratch += floats; };
  take(s.offset, 2 * n.taps), take(s.groups, 10 * n.taps), take(s.dx_begin, 2 * n.phases), take(s.dx_group_begin, 2 * n.phases);
  take(s.dx_offset, 2 * n.taps), take(s.dx_weight, 2 * n.taps), take(s.dx_groups, 10 * n.taps), take(s.taps, 4 * n.taps);
  take(s.weight, n.taps), take(s.in, n.in), take(s.out, n.out), take(s.dy, n.out);
  return s;
}

// Where each tap reads in the padded, sorted block.
void forward_offsets(const DepthwiseConv& p, const Cut& c, int64_t* offset) {
  int64_t t = 0;
  for (int64_t kd = 0; kd < p.K[0]; ++kd)
    for (int64_t kh = 0; kh < p.K[1]; ++kh)
      for (int64_t kw = 0; kw < p.K[2]; ++kw) {
        const int64_t at[3] = {kd * p.dilation[0], kh * p.dilation[1], kw * p.dilation[2]};
        int64_t phase = 0, index = 0;
        for (int d = 0; d < 3; ++d)
          phase = phase * c.phases[d] + at[d] % c.phases[d], index = index * c.extent[d] + at[d] / c.phases[d];
        offset[t++] = phase * c.phase_volume() + index;
      }
}

template <class T>
T* plane_of(const Volume& v, int64_t n, int64_t c) {
  return static_cast<T*>(v.data) + n * v.n + c * v.c;
}
Index3 sizes(const Volume& v) { return {{v.size[0], v.size[1], v.size[2]}}; }

template <class T>
void load_x(const DepthwiseConv& p, const Cut& c, const T* plane, Index3 begin, float* in) {
  Index3 start;
  for (int d = 0; d < 3; ++d) start[d] = begin[d] * p.stride[d] - p.pad[d];
  load_block(plane, p.x.s, sizes(p.x), start, c.phases, c.extent, in);
}

// Groups of `taps` taps, the number of the weight being the tap's.
int64_t group_planes(const DepthwiseConv& p, const Cut& c, int64_t taps, const int64_t* offset, Tap* scratch,
                     TapGroup* groups) {
  for (int64_t t = 0; t < taps; ++t) scratch[t] = {offset[t], t};
  return group_taps(scratch, taps, line_gap(p) * c.extent[2], p.K[1] * p.K[2], groups);
}

template <class T>
void fwd_planes(const DepthwiseConv& p, int64_t first, int64_t last, float* scratch) {
  const Cut cut = forward_cut(p);
  const PlaneScratch s = cut_scratch(p, scratch);
  forward_offsets(p, cut, s.offset);
  const bool lines = by_lines(cut);
  const int64_t groups = lines ? group_planes(p, cut, p.taps, s.offset, s.taps, s.groups) : 0;
  for (int64_t plane = first; plane < last; ++plane) {
    const int64_t n = plane / p.C, c = plane % p.C;
    for_blocks(cut, [&](Index3 begin, Index3 end) {
      load_x(p, cut, plane_of<T>(p.x, n, c), begin, s.in);
      for (int64_t m = 0; m < p.M; ++m) {
        const int64_t co = c * p.M + m;
        T* y = plane_of<T>(p.y, n, co);
        const float bias = p.bias ? p.bias[co] : 0.0f;
        const float* weight = p.weight + co * p.taps;
        if (lines) {
          for (int64_t d = begin[0]; d < end[0]; ++d) {
            T* out = y + d * p.y.s[0] + begin[1] * p.y.s[1] + begin[2];
            convolve_lines(end[1] - begin[1], end[2] - begin[2], line_gap(p), cut.extent[2], bias, groups, s.groups, weight,
                           s.in + (d - begin[0]) * cut.extent[1] * cut.extent[2],
                           [&](int64_t h, int64_t i, Vec v, int k) { store_some(out + h * p.y.s[1] + i, v, k); });
          }
          continue;
        }
        convolve(flat_size(cut, begin, end), false, bias, p.taps, weight, s.offset, s.in, s.out);
        const float* from = s.out;
        for (int64_t d = begin[0]; d < end[0]; ++d)
          for (int64_t h = begin[1]; h < end[1]; ++h) {
            const float* line = from + ((d - begin[0]) * cut.extent[1] + h - begin[1]) * cut.extent[2];
            T* out = y + d * p.y.s[0] + h * p.y.s[1] + begin[2];
            for_row(end[2] - begin[2], [&](int64_t i, int k) { store_some(out + i, load_some(line + i, k), k); });
          }
      }
    });
  }
}

template <class T>
void store_strided(const float* from, int64_t n, int64_t stride, T* out) {
  if (stride == 1) return for_row(n, [&](int64_t i, int k) { store_some(out + i, load_some(from + i, k), k); });
  if (stride == 2) {
    for (int64_t i = 0; i < n; ++i) out[2 * i] = from_float<T>(from[i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) out[i * stride] = from_float<T>(from[i]);
}

bool dx_by_lines(const DepthwiseConv& p, const Cut& cut) { return p.M == 1 && by_lines(cut); }

// The taps that can reach each remainder of the padded coordinate by the stride.
void plan_dx(const DepthwiseConv& p, const Cut& cut, const PlaneScratch& s) {
  int64_t q = 0, taps = 0, groups = 0;
  for (int64_t qd = 0; qd < p.stride[0]; ++qd)
    for (int64_t qh = 0; qh < p.stride[1]; ++qh)
      for (int64_t qw = 0; qw < p.stride[2]; ++qw, ++q) {
        s.dx_begin[q] = taps, s.dx_group_begin[q] = groups;
        for (int64_t t = 0; t < p.taps; ++t) {
          const int64_t k[3] = {t / (p.K[1] * p.K[2]), t / p.K[2] % p.K[1], t % p.K[2]}, want[3] = {qd, qh, qw};
          int64_t index = 0;
          bool reaches = true;
          for (int d = 0; d < 3; ++d) {
            const int64_t at = k[d] * p.dilation[d];
            reaches = reaches && at % p.stride[d] == want[d];
            index = index * cut.extent[d] + cut.halo[d] - at / p.stride[d];
          }
          if (reaches) s.dx_offset[taps] = index, s.dx_weight[taps++] = t;
        }
        const int64_t first = s.dx_begin[q];
        if (dx_by_lines(p, cut))
          groups += group_planes(p, cut, taps - first, s.dx_offset + first, s.taps, s.dx_groups + groups);
      }
  s.dx_begin[q] = taps, s.dx_group_begin[q] = groups;
}

// dx of one plane.
template <class T>
void dx_plane(const DepthwiseConv& p, const Cut& cut, int64_t n, int64_t c, const PlaneScratch& s) {
  T* dx = plane_of<T>(p.dx, n, c);
  Index3 first;
  for (int d = 0; d < 3; ++d) first[d] = p.pad[d] / p.stride[d];
  const Index3 one{{1, 1, 1}};
  const bool lines = dx_by_lines(p, cut);
  for_blocks(cut, [&](Index3 begin, Index3 end) {
    Index3 start;
    for (int d = 0; d < 3; ++d) start[d] = first[d] + begin[d] - cut.halo[d];
    if (p.M == 1) load_block(plane_of<T>(p.dy, n, c), p.dy.s, sizes(p.dy), start, one, cut.extent, s.in);
    const int64_t flat = flat_size(cut, begin, end);
    int64_t q = 0;
    for (int64_t qd = 0; qd < p.stride[0]; ++qd)
      for (int64_t qh = 0; qh < p.stride[1]; ++qh)
        for (int64_t qw = 0; qw < p.stride[2]; ++qw, ++q) {
          const int64_t tap = s.dx_begin[q], taps = s.dx_begin[q + 1] - tap;
          for (int64_t m = 0; m < p.M; ++m) {
            const int64_t co = c * p.M + m;
            if (p.M > 1) load_block(plane_of<T>(p.dy, n, co), p.dy.s, sizes(p.dy), start, one, cut.extent, s.in);
            for (int64_t t = 0; t < taps; ++t) s.weight[t] = p.weight[co * p.taps + s.dx_weight[tap + t]];
            if (lines) {
              const TapGroup* groups = s.dx_groups + s.dx_group_begin[q];
              for (int64_t d = 0; d < end[0] - begin[0]; ++d) {
                float* out = s.out + d * cut.extent[1] * cut.extent[2];
                convolve_lines(end[1] - begin[1], end[2] - begin[2], line_gap(p), cut.extent[2], 0.0f,
                               s.dx_group_begin[q + 1] - s.dx_group_begin[q], groups, s.weight,
                               s.in + d * cut.extent[1] * cut.extent[2],
                               [&](int64_t h, int64_t i, Vec v, int k) { store_some(out + h * cut.extent[2] + i, v, k); });
              }
              continue;
            }
            convolve(flat, m > 0, 0.0f, taps, s.weight, s.dx_offset + tap, s.in, s.out);
          }
          // Columns of this remainder that are inside: i * stride + q - pad in [0, size).
          const auto coordinate = [&](int d, int64_t i, int64_t q) { return (first[d] + i) * p.stride[d] + q - p.pad[d]; };
          int64_t lo = begin[2], hi = end[2];
          while (lo < hi && coordinate(2, lo, qw) < 0) ++lo;
          while (hi > lo && coordinate(2, hi - 1, qw) >= p.x.size[2]) --hi;
          for (int64_t d = begin[0]; d < end[0]; ++d)
            for (int64_t h = begin[1]; h < end[1]; ++h) {
              const int64_t z = coordinate(0, d, qd), y = coordinate(1, h, qh);
              if (z < 0 || z >= p.x.size[0] || y < 0 || y >= p.x.size[1]) continue;
              const float* line = s.out + ((d - begin[0]) * cut.extent[1] + h - begin[1]) * cut.extent[2] + lo - begin[2];
              store_strided(line, hi - lo, p.stride[2], dx + z * p.dx.s[0] + y * p.dx.s[1] + coordinate(2, lo, qw));
            }
        }
  });
}

// sums[t] += sum_i d[i] * in[offset[t] + i] for N taps.
template <int N>
void sum_taps_flat(int64_t n, const float* d, const int64_t* offset, const float* in, float* sums, int64_t stride) {
  Vec acc[N];
#pragma GCC unroll 9
  for (int t = 0; t < N; ++t) acc[t] = Vec::zero();
  for_row(n, [&](int64_t i, int m) {
    const Vec v = load_some(d + i, m);
#pragma GCC unroll 9
    for (int t = 0; t < N; ++t) acc[t] = fma(v, load_some(in + offset[t] + i, m), acc[t]);
  });
  for (int t = 0; t < N; ++t) sums[t * stride] += sum(acc[t]);
}

// sums[weight] += sum over the block of dy times the inputs of each tap, for G groups of T taps: a line of dy meets the T input
// lines of a group while it is in registers, an input line the T lines of dy.
template <int G, int T>
void sum_groups(int64_t lines, int64_t cols, int64_t gap, int64_t ld, const float* dy, const TapGroup* groups, const float* in,
                float* sums, int64_t stride) {
  Vec acc[G][T];
#pragma GCC unroll 3
  for (int g = 0; g < G; ++g)
#pragma GCC unroll 3
    for (int t = 0; t < T; ++t) acc[g][t] = Vec::zero();
  for_row(cols, [&](int64_t c, int n) {
    for (int64_t base = 0; base < min(gap, lines); ++base) {
      const int64_t count = (lines - base + gap - 1) / gap;  // lines of dy; T - 1 more of the inputs
      Vec window[T];                                         // dy of lines i, i - 1, ...
#pragma GCC unroll 3
      for (int t = 0; t < T; ++t) window[t] = Vec::zero();
      for (int64_t i = 0; i < count + T - 1; ++i) {
#pragma GCC unroll 3
        for (int t = T - 1; t > 0; --t) window[t] = window[t - 1];
        const int64_t at = (base + i * gap) * ld + c;
        window[0] = i < count ? load_some(dy + at, n) : Vec::zero();
#pragma GCC unroll 3
        for (int g = 0; g < G; ++g) {
          const Vec x = load_some(in + groups[g].first + at, n);
#pragma GCC unroll 3
          for (int t = 0; t < T; ++t) acc[g][t] = fma(window[t], x, acc[g][t]);
        }
      }
    }
  });
  for (int g = 0; g < G; ++g)
    for (int t = 0; t < T; ++t) sums[groups[g].weight[t] * stride] += sum(acc[g][t]);
}

// The same for all groups, which come sorted by their numbers of taps.
void sum_lines(int64_t lines, int64_t cols, int64_t gap, int64_t ld, const float* dy, int64_t count, const TapGroup* groups,
               const float* in, float* sums, int64_t stride) {
  for (int64_t g = 0; g < count;) {
    const TapGroup* at = groups + g;
    const bool three = g + 3 <= count && at[2].count == at[0].count;
    const auto run = [&](auto three_groups, auto one_group) {
      three ? three_groups(lines, cols, gap, ld, dy, at, in, sums, stride)
            : one_group(lines, cols, gap, ld, dy, at, in, sums, stride);
    };
    if (at->count == 3) run(sum_groups<3, 3>, sum_groups<1, 3>);
    if (at->count == 2) run(sum_groups<3, 2>, sum_groups<1, 2>);
    if (at->count == 1) run(sum_groups<3, 1>, sum_groups<1, 1>);
    g += three ? 3 : 1;
  }
}

void sort_groups(TapGroup* groups, int64_t count) {
  for (int64_t i = 1; i < count; ++i)
    for (int64_t j = i; j > 0 && groups[j - 1].count < groups[j].count; --j) {
      const TapGroup swapped = groups[j];
      groups[j] = groups[j - 1], groups[j - 1] = swapped;
    }
}

template <class T>
void dweight_plane(const DepthwiseConv& p, const Cut& cut, int64_t n, int64_t c, int64_t groups, const PlaneScratch& s,
                   float* partial) {
  const Index3 one{{1, 1, 1}};
  const int64_t Cm = p.channels_out();
  const bool lines = by_lines(cut);
  for_blocks(cut, [&](Index3 begin, Index3 end) {
    load_x(p, cut, plane_of<T>(p.x, n, c), begin, s.in);
    Index3 extent = cut.extent;
    extent[0] = end[0] - begin[0];
    for (int64_t m = 0; m < p.M; ++m) {
      const int64_t co = c * p.M + m, flat = flat_size(cut, begin, end);
      load_block(plane_of<T>(p.dy, n, co), p.dy.s, end, begin, one, extent, s.dy);  // 0 between its lines
      if (lines) {
        const int64_t slice = cut.extent[1] * cut.extent[2];
        for (int64_t d = 0; d < end[0] - begin[0]; ++d)
          sum_lines(end[1] - begin[1], end[2] - begin[2], line_gap(p), cut.extent[2], s.dy + d * slice, groups, s.groups,
                    s.in + d * slice, partial + co, Cm);
        partial[p.taps * Cm + co] += sum_row(flat, [&](int64_t i, int k) { return load_some(s.dy + i, k); });
        continue;
      }
      int64_t t = 0;
      for (; t + 9 <= p.taps; t += 9) sum_taps_flat<9>(flat, s.dy, s.offset + t, s.in, partial + t * Cm + co, Cm);
      for (; t + 3 <= p.taps; t += 3) sum_taps_flat<3>(flat, s.dy, s.offset + t, s.in, partial + t * Cm + co, Cm);
      for (; t < p.taps; ++t) sum_taps_flat<1>(flat, s.dy, s.offset + t, s.in, partial + t * Cm + co, Cm);
      partial[p.taps * Cm + co] += sum_row(flat, [&](int64_t i, int k) { return load_some(s.dy + i, k); });
    }
  });
}

template <class T>
void bwd_planes(const DepthwiseConv& p, int64_t block, int64_t first, int64_t last, float* scratch) {
  const Cut forward = forward_cut(p), backward = backward_cut(p);
  const PlaneScratch s = cut_scratch(p, scratch);
  float* partial = p.partial ? p.partial + block * (p.taps + 1) * p.channels_out() : nullptr;
  int64_t groups = 0;
  if (partial) {
    forward_offsets(p, forward, s.offset);
    if (by_lines(forward)) groups = group_planes(p, forward, p.taps, s.offset, s.taps, s.groups);
    sort_groups(s.groups, groups);
    for (int64_t t = 0; t <= p.taps; ++t)
      for (int64_t co = first * p.M; co < last * p.M; ++co) partial[t * p.channels_out() + co] = 0.0f;
  }
  if (p.dx.data) plan_dx(p, backward, s);
  for (int64_t c = first; c < last; ++c)
    for (int64_t n = p.N * block / p.blocks; n < p.N * (block + 1) / p.blocks; ++n) {
      if (p.dx.data) dx_plane<T>(p, backward, n, c, s);
      if (partial) dweight_plane<T>(p, forward, n, c, groups, s, partial);
    }
}

void fwd(const DepthwiseConv& p, int64_t begin, int64_t end, float* scratch) {
  with_type(p.dtype, [&](auto t) { fwd_planes<decltype(t)>(p, begin, end, scratch); });
}
void bwd(const DepthwiseConv& p, int64_t block, int64_t begin, int64_t end, float* scratch) {
  with_type(p.dtype, [&](auto t) { bwd_planes<decltype(t)>(p, block, begin, end, scratch); });
}

}  // namespace

extern const DepthwisePlanes depthwise_planes = {plane_floats, fwd, bwd};

}  // namespace mlcore::MLC_ISA
