// The algorithm of depthwise_conv over Vec; the equations are in depthwise_conv.h, the reasons in README.md. Compiled once per
// ISA. Two halves: planes (W contiguous) and rows of pixels (C contiguous). Neither knows the number of dimensions, the kernel
// size, the stride or the dilation but as numbers: taps are offsets into a padded copy, or pointers to pixels.
#include "core/simd/rows.h"
#include "depthwise_conv/depthwise_conv_kernels.h"

namespace mlcore::MLC_ISA {
namespace {

constexpr int kW = Vec::W;

struct Index3 {
  int64_t v[3];
  int64_t& operator[](int i) { return v[i]; }
  int64_t operator[](int i) const { return v[i]; }
  int64_t volume() const { return v[0] * v[1] * v[2]; }
};

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

// Planes.

// Floats that a padded block of a plane may have: with its results it stays in the L1 cache.
constexpr int64_t kBlockFloats = 5120;
constexpr int64_t kLineOutputs = 1024;          // of a long line
constexpr int kUnroll = 8;                      // vectors of a long line at once
constexpr int kLines = 8;                       // lines of a tile
constexpr int64_t kSlack = (kUnroll + 1) * kW;  // floats behind a buffer that a full step may read or write

// How the planes of one side are cut: blocks of `block` results, each from `extent` inputs of every phase.
struct Cut {
  Index3 size;    // results of a plane
  Index3 block;   // of a block at most
  Index3 phases;  // the stride: inputs are sorted by their remainder, so that taps are contiguous
  Index3 halo;    // inputs of a phase that a block has beyond its results
  Index3 extent;  // block + halo
  Index3 count;   // blocks

  int64_t phase_volume() const { return extent.volume(); }
  int64_t buffer() const { return round_up<int64_t>(phases.volume() * extent.volume() + kSlack, 16); }
  int64_t results() const { return round_up<int64_t>(extent.volume() + kSlack, 16); }
};

Cut make_cut(Index3 size, Index3 phases, Index3 halo) {
  Cut c{size, size, phases, halo, {}, {}};
  const int64_t copies = phases.volume();
  c.block[2] = min<int64_t>(size[2], max<int64_t>(kLineOutputs / phases[2], 1));
  const auto extent = [&](int d) { return c.block[d] + halo[d]; };
  // As many lines as fit, but no fewer than the halo: else most of what is copied would be copied again.
  for (int d = 1; d >= 0; --d) {
    const int64_t below = extent(2) * (d == 0 ? extent(1) : 1) * copies;
    const int64_t fit = kBlockFloats / max<int64_t>(below, 1) - halo[d];
    c.block[d] = min(size[d], max(max<int64_t>(fit, 2 * halo[d]), int64_t{1}));
  }
  for (int d = 0; d < 3; ++d) c.extent[d] = extent(d), c.count[d] = c.block[d] ? ceil_div(size[d], c.block[d]) : 0;
  return c;
}

// Forward: results are y, inputs x.
Cut forward_cut(const DepthwiseConv& p) {
  Index3 size, phases, halo;
  for (int d = 0; d < 3; ++d) {
    size[d] = (p.y.data ? p.y : p.dy).size[d];
    phases[d] = p.stride[d];
    halo[d] = (p.K[d] - 1) * p.dilation[d] / p.stride[d];
  }
  return make_cut(size, phases, halo);
}

// Backward: the results are dx by quotients of the padded coordinate and the stride, one set a remainder; the inputs are dy.
Cut backward_cut(const DepthwiseConv& p) {
  Index3 size, phases{{1, 1, 1}}, halo;
  for (int d = 0; d < 3; ++d) {
    const int64_t first = p.pad[d] / p.stride[d], last = (p.pad[d] + p.x.size[d] - 1) / p.stride[d];
    size[d] = p.x.size[d] > 0 ? last - first + 1 : 0;
    halo[d] = (p.K[d] - 1) * p.dilation[d] / p.stride[d];
  }
  return make_cut(size, phases, halo);
}

template <class T>
void copy_line(const T* src, int64_t stride, int64_t n, float* out) {
  if (stride == 1) return for_row(n, [&](int64_t i, int m) { store_some(out + i, load_some(src + i, m), m); });
  if (stride == 2) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(src[2 * i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(src[i * stride]);
}

// buffer[phase][index] = plane[start + index * phases + phase], 0 outside of [0, limit).
template <class T>
void load_block(const T* plane, const int64_t* strides, Index3 limit, Index3 start, Index3 phases, Index3 extent, float* out) {
  for (int64_t pd = 0; pd < phases[0]; ++pd)
    for (int64_t ph = 0; ph < phases[1]; ++ph)
      for (int64_t pw = 0; pw < phases[2]; ++pw) {
        const int64_t s = phases[2], first = start[2] + pw;  // columns first + j * s
        const int64_t lo = first >= 0 ? 0 : min(extent[2], ceil_div(-first, s));
        const int64_t hi = first >= limit[2] ? lo : max(lo, min(extent[2], (limit[2] - first + s - 1) / s));
        for (int64_t d = 0; d < extent[0]; ++d)
          for (int64_t h = 0; h < extent[1]; ++h, out += extent[2]) {
            const int64_t z = start[0] + d * phases[0] + pd, y = start[1] + h * phases[1] + ph;
            if (z < 0 || z >= limit[0] || y < 0 || y >= limit[1]) {
              memset(out, 0, sizeof(float) * static_cast<size_t>(extent[2]));
              continue;
            }
            if (s == 1 && lo < kW) {  // whole vectors: what they write behind the line is 0, or is written next
              Vec::zero().store(out);
              for (int64_t j = lo; j < hi; j += kW)
                load_some(plane + z * strides[0] + y * strides[1] + first + j, static_cast<int>(min<int64_t>(kW, hi - j)))
                    .store(out + j);
              for (int64_t j = lo + round_up<int64_t>(hi - lo, kW); j < extent[2]; j += kW) Vec::zero().store(out + j);
              continue;
            }
            for (int64_t j = 0; j < lo; ++j) out[j] = 0.0f;
            copy_line(plane + z * strides[0] + y * strides[1] + (first + lo * s), s, hi - lo, out + lo);
            for (int64_t j = hi; j < extent[2]; ++j) out[j] = 0.0f;
          }
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

// Calls body(begin, end) with the bounds of every block of a cut.
template <class F>
void for_blocks(const Cut& c, F&& body) {
  Index3 begin, end;
  for (int64_t a = 0; a < c.count[0]; ++a)
    for (int64_t b = 0; b < c.count[1]; ++b)
      for (int64_t e = 0; e < c.count[2]; ++e) {
        const int64_t at[3] = {a, b, e};
        for (int d = 0; d < 3; ++d) begin[d] = at[d] * c.block[d], end[d] = min(begin[d] + c.block[d], c.size[d]);
        body(begin, end);
      }
}

// Results of a block that are wanted lie in its flat results up to here.
int64_t flat_size(const Cut& c, Index3 begin, Index3 end) {
  return ((end[0] - begin[0] - 1) * c.extent[1] + end[1] - begin[1] - 1) * c.extent[2] + end[2] - begin[2];
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

// A thread's scratch: offsets of the taps, the padded block, its results, and dy of a block.
struct PlaneScratch {
  int64_t* offset;
  Tap* taps;
  TapGroup* groups;
  float *weight, *in, *out, *dy;
};
int64_t plane_floats(const DepthwiseConv& p) {
  const Cut f = forward_cut(p);
  int64_t in = f.buffer(), out = f.results();
  if (p.dy.data) {
    const Cut b = backward_cut(p);
    in = max(in, b.buffer()), out = max(out, b.results());
  }
  return 17 * round_up<int64_t>(p.taps, 16) + in + 2 * out;
}
PlaneScratch cut_scratch(const DepthwiseConv& p, float* scratch) {
  const int64_t taps = round_up<int64_t>(p.taps, 16);
  const Cut f = forward_cut(p);
  int64_t in = f.buffer(), out = f.results();
  if (p.dy.data) {
    const Cut b = backward_cut(p);
    in = max(in, b.buffer()), out = max(out, b.results());
  }
  float* floats = scratch + 16 * taps;  // of 2, 4 and 10 floats each
  return {reinterpret_cast<int64_t*>(scratch),
          reinterpret_cast<Tap*>(scratch + 2 * taps),
          reinterpret_cast<TapGroup*>(scratch + 6 * taps),
          floats,
          floats + taps,
          floats + taps + in,
          floats + taps + in + out};
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

// Groups of the taps at s.offset, the number of the weight being the tap's.
int64_t group_planes(const DepthwiseConv& p, const Cut& c, int64_t taps, const PlaneScratch& s) {
  for (int64_t t = 0; t < taps; ++t) s.taps[t] = {s.offset[t], t};
  return group_taps(s.taps, taps, line_gap(p) * c.extent[2], p.K[1] * p.K[2], s.groups);
}

template <class T>
void fwd_planes(const DepthwiseConv& p, int64_t first, int64_t last, float* scratch) {
  const Cut cut = forward_cut(p);
  const PlaneScratch s = cut_scratch(p, scratch);
  forward_offsets(p, cut, s.offset);
  const bool lines = by_lines(cut);
  const int64_t groups = lines ? group_planes(p, cut, p.taps, s) : 0;
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

// dx of one plane: for each remainder of the padded coordinate by the stride, the taps that can reach it.
template <class T>
void dx_plane(const DepthwiseConv& p, const Cut& cut, int64_t n, int64_t c, const PlaneScratch& s) {
  T* dx = plane_of<T>(p.dx, n, c);
  Index3 first;
  for (int d = 0; d < 3; ++d) first[d] = p.pad[d] / p.stride[d];
  const Index3 one{{1, 1, 1}};
  const bool lines = p.M == 1 && by_lines(cut);
  for_blocks(cut, [&](Index3 begin, Index3 end) {
    Index3 start;
    for (int d = 0; d < 3; ++d) start[d] = first[d] + begin[d] - cut.halo[d];
    if (p.M == 1) load_block(plane_of<T>(p.dy, n, c), p.dy.s, sizes(p.dy), start, one, cut.extent, s.in);
    const int64_t flat = flat_size(cut, begin, end);
    for (int64_t qd = 0; qd < p.stride[0]; ++qd)
      for (int64_t qh = 0; qh < p.stride[1]; ++qh)
        for (int64_t qw = 0; qw < p.stride[2]; ++qw) {
          for (int64_t m = 0; m < p.M; ++m) {
            const int64_t co = c * p.M + m;
            if (p.M > 1) load_block(plane_of<T>(p.dy, n, co), p.dy.s, sizes(p.dy), start, one, cut.extent, s.in);
            int64_t taps = 0;
            for (int64_t kd = 0; kd < p.K[0]; ++kd)
              for (int64_t kh = 0; kh < p.K[1]; ++kh)
                for (int64_t kw = 0; kw < p.K[2]; ++kw) {
                  const int64_t at[3] = {kd * p.dilation[0], kh * p.dilation[1], kw * p.dilation[2]};
                  if (at[0] % p.stride[0] != qd || at[1] % p.stride[1] != qh || at[2] % p.stride[2] != qw) continue;
                  int64_t index = 0;
                  for (int d = 0; d < 3; ++d) index = index * cut.extent[d] + cut.halo[d] - at[d] / p.stride[d];
                  s.offset[taps] = index;
                  s.weight[taps++] = p.weight[co * p.taps + (kd * p.K[1] + kh) * p.K[2] + kw];
                }
            if (lines) {
              const int64_t groups = group_planes(p, cut, taps, s);
              for (int64_t d = 0; d < end[0] - begin[0]; ++d) {
                float* out = s.out + d * cut.extent[1] * cut.extent[2];
                convolve_lines(end[1] - begin[1], end[2] - begin[2], line_gap(p), cut.extent[2], 0.0f, groups, s.groups,
                               s.weight, s.in + d * cut.extent[1] * cut.extent[2],
                               [&](int64_t h, int64_t i, Vec v, int k) { store_some(out + h * cut.extent[2] + i, v, k); });
              }
              continue;
            }
            convolve(flat, m > 0, 0.0f, taps, s.weight, s.offset, s.in, s.out);
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
void dweight_plane(const DepthwiseConv& p, const Cut& cut, int64_t n, int64_t c, const PlaneScratch& s, float* partial) {
  const Index3 one{{1, 1, 1}};
  const int64_t Cm = p.channels_out();
  const bool lines = by_lines(cut);
  const int64_t groups = lines ? group_planes(p, cut, p.taps, s) : 0;
  sort_groups(s.groups, groups);
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
void bwd_planes(const DepthwiseConv& p, int64_t block, int64_t c, float* scratch) {
  const Cut forward = forward_cut(p), backward = backward_cut(p);
  const PlaneScratch s = cut_scratch(p, scratch);
  float* partial = p.partial ? p.partial + block * (p.taps + 1) * p.channels_out() : nullptr;
  if (partial)
    for (int64_t t = 0; t <= p.taps; ++t)
      for (int64_t m = 0; m < p.M; ++m) partial[t * p.channels_out() + c * p.M + m] = 0.0f;
  for (int64_t n = p.N * block / p.blocks; n < p.N * (block + 1) / p.blocks; ++n) {
    if (p.dx.data) dx_plane<T>(p, backward, n, c, s);
    if (partial) {
      forward_offsets(p, forward, s.offset);
      dweight_plane<T>(p, forward, n, c, s, partial);
    }
  }
}

// Rows of pixels.

constexpr int kPixels = 4, kVecs = 2;  // of a microkernel

// Channels [c, c + n) of y at the pixel of x: lane j is channel (c + j) / M.
template <class T>
inline Vec load_channels(const T* pixel, int64_t c, int n, int64_t M) {
  if (M == 1) return load_some(pixel + c, n);
  float lane[kW] = {};
  for (int j = 0; j < n; ++j) lane[j] = to_float(pixel[(c + j) / M]);
  return Vec::load(lane);
}

// out[i][c] = start[c] + sum_t weight[t][c] * pixel[t, i][c], for R results and channels [c, c + V * W), of which n where not
// all. A tap's pixel of result i is pixels[first + i * step].
template <class T, int R, int V, bool kAll>
inline void pixel_tile(int n, int64_t M, int64_t count, const TapGroup* groups, const T* const* pixels, int64_t step,
                       const float* start, const float* weight, int64_t ld_weight, int64_t c, T* const* out) {
  const auto load = [&](const auto* v) { return kAll ? Vec::load(v) : load_some(v, n); };
  Vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] = start ? load(start + v * kW) : Vec::zero();
  const auto weights = [&](int64_t w, int v) { return load(weight + w * ld_weight + v * kW); };
  if (M == 1) {
    add_groups(acc, count, groups, weights,
               [&](int64_t first, int i, int v) { return load(pixels[first + i * step] + c + v * kW); });
  } else {
    add_groups(acc, count, groups, weights,
               [&](int64_t first, int i, int v) { return load_channels(pixels[first + i * step], c + v * kW, n, M); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      T* to = out[r] + c + v * kW;
      kAll ? acc[r][v].store(to) : store_some(to, acc[r][v], n);
    }
}

// Results [0, count) of a row; out(i) is the pixel of result i, all channels.
template <class T, class F>
void convolve_pixels(int64_t count, int64_t c, int64_t channels, int64_t M, int64_t group_count, const TapGroup* groups,
                     const T* const* pixels, int64_t step, const float* start, const float* weight, F&& out) {
  const auto some = [&]<int R>(int64_t i) {
    T* to[R];
    for (int r = 0; r < R; ++r) to[r] = out(i + r);
    const T* const* at = pixels + i * step;
    int64_t k = 0;
    for (; k + kVecs * kW <= channels; k += kVecs * kW)
      pixel_tile<T, R, kVecs, true>(kW, M, group_count, groups, at, step, start ? start + k : nullptr, weight + k, channels,
                                    c + k, to);
    for (; k < channels; k += kW)
      pixel_tile<T, R, 1, false>(static_cast<int>(min<int64_t>(kW, channels - k)), M, group_count, groups, at, step,
                                 start ? start + k : nullptr, weight + k, channels, c + k, to);
  };
  int64_t i = 0;
  for (; i + kPixels <= count; i += kPixels) some.template operator()<kPixels>(i);
  for (; i + 2 <= count; i += 2) some.template operator()<2>(i);
  if (i < count) some.template operator()<1>(i);
}

// A thread's scratch: weights of its channels by taps, bias, a pixel of zeros, the table of pixels, the taps.
struct RowScratch {
  float *weight, *bias, *zeros;
  const void** pixels;
  Tap* taps;
  TapGroup* groups;
};
int64_t table_width(const DepthwiseConv& p) {  // forward: the padded line of x; backward: dy with a halo on both sides
  const int64_t Ow = (p.y.data ? p.y : p.dy).size[2];
  const int64_t forward = (max<int64_t>(Ow, 1) - 1) * p.stride[2] + (p.K[2] - 1) * p.dilation[2] + 1;
  const int64_t halo = (p.K[2] - 1) * p.dilation[2] / p.stride[2];
  const int64_t backward = (p.pad[2] + p.x.size[2]) / p.stride[2] + 1 + halo;
  return max(forward, backward) + kPixels * p.stride[2];
}
int64_t row_floats(const DepthwiseConv& p) {
  const int64_t Cm = round_up<int64_t>(p.channels_out(), 16);
  return Cm * (p.taps + 2) + 2 * round_up<int64_t>(p.K[0] * p.K[1] * table_width(p), 16) + 14 * round_up<int64_t>(p.taps, 16);
}
RowScratch cut_rows(const DepthwiseConv& p, float* scratch) {
  const int64_t Cm = round_up<int64_t>(p.channels_out(), 16), table = round_up<int64_t>(p.K[0] * p.K[1] * table_width(p), 16);
  float* tables = scratch + Cm * (p.taps + 2);
  return {scratch,
          scratch + Cm * p.taps,
          scratch + Cm * (p.taps + 1),
          reinterpret_cast<const void**>(tables),
          reinterpret_cast<Tap*>(tables + 2 * table),
          reinterpret_cast<TapGroup*>(tables + 2 * table + 4 * round_up<int64_t>(p.taps, 16))};
}
void load_weights(const DepthwiseConv& p, int64_t c, int64_t channels, const RowScratch& s) {
  for (int64_t j = 0; j < channels; ++j) {
    for (int64_t t = 0; t < p.taps; ++t) s.weight[t * channels + j] = p.weight[(c + j) * p.taps + t];
    s.bias[j] = p.bias ? p.bias[c + j] : 0.0f;
  }
  memset(s.zeros, 0, sizeof(float) * static_cast<size_t>(p.channels_out()));
}

// The pixels under output row (n, od, oh): one line of the table for each (kd, kh), the padded line of x.
template <class T>
void forward_pixels(const DepthwiseConv& p, int64_t n, int64_t od, int64_t oh, const RowScratch& s) {
  const T** out = reinterpret_cast<const T**>(s.pixels);
  const T* zeros = reinterpret_cast<const T*>(s.zeros);
  const int64_t width = table_width(p), W = p.x.size[2];
  for (int64_t kd = 0; kd < p.K[0]; ++kd)
    for (int64_t kh = 0; kh < p.K[1]; ++kh, out += width) {
      const int64_t z = od * p.stride[0] + kd * p.dilation[0] - p.pad[0];
      const int64_t y = oh * p.stride[1] + kh * p.dilation[1] - p.pad[1];
      const bool inside = z >= 0 && z < p.x.size[0] && y >= 0 && y < p.x.size[1];
      const T* line = inside ? static_cast<const T*>(p.x.data) + n * p.x.n + z * p.x.s[0] + y * p.x.s[1] : nullptr;
      for (int64_t j = 0; j < width; ++j) {
        const int64_t w = j - p.pad[2];
        out[j] = inside && w >= 0 && w < W ? line + w * p.x.s[2] : zeros;
      }
    }
}
void forward_taps(const DepthwiseConv& p, Tap* taps) {
  const int64_t width = table_width(p);
  int64_t t = 0;
  for (int64_t line = 0; line < p.K[0] * p.K[1]; ++line)
    for (int64_t kw = 0; kw < p.K[2]; ++kw, ++t) taps[t] = {line * width + kw * p.dilation[2], t};
}

template <class T>
T* line_of(const Volume& v, int64_t n, int64_t d, int64_t h) {
  return static_cast<T*>(v.data) + n * v.n + d * v.s[0] + h * v.s[1];
}

template <class T>
void fwd_rows(const DepthwiseConv& p, int64_t begin, int64_t end, int64_t c, int64_t channels, float* scratch) {
  const RowScratch s = cut_rows(p, scratch);
  load_weights(p, c, channels, s);
  forward_taps(p, s.taps);
  const int64_t groups = group_taps(s.taps, p.taps, p.stride[2], p.K[2], s.groups);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t oh = row % p.y.size[1], od = row / p.y.size[1] % p.y.size[0], n = row / p.y.size[1] / p.y.size[0];
    forward_pixels<T>(p, n, od, oh, s);
    T* y = line_of<T>(p.y, n, od, oh);
    convolve_pixels<T>(p.y.size[2], c, channels, p.M, groups, s.groups, reinterpret_cast<const T* const*>(s.pixels),
                       p.stride[2], p.bias ? s.bias : nullptr, s.weight, [&](int64_t i) { return y + i * p.y.s[2]; });
  }
}

// Sums over the M filters of each channel, where there are several: scalar, with the pixels' pointers as they are.
template <class T>
void dx_pixel_of_many(const DepthwiseConv& p, int64_t c, int64_t channels, int64_t count, const Tap* taps,
                      const T* const* pixels, T* out) {
  for (int64_t j = 0; j < channels; ++j) {
    float a = 0.0f;
    for (int64_t t = 0; t < count; ++t)
      for (int64_t m = 0; m < p.M; ++m)
        a += p.weight[((c + j) * p.M + m) * p.taps + taps[t].weight] * to_float(pixels[taps[t].first][(c + j) * p.M + m]);
    out[c + j] = from_float<T>(a);
  }
}

template <class T>
void dx_rows(const DepthwiseConv& p, int64_t begin, int64_t end, int64_t c, int64_t channels, float* scratch) {
  const RowScratch s = cut_rows(p, scratch);
  if (p.M == 1) load_weights(p, c, channels, s);
  memset(s.zeros, 0, sizeof(float) * static_cast<size_t>(p.channels_out()));
  const int64_t width = table_width(p), halo = (p.K[2] - 1) * p.dilation[2] / p.stride[2], sw = p.stride[2];
  const int64_t first = p.pad[2] / sw;  // the table's line begins with dy's column first - halo
  for (int64_t row = begin; row < end; ++row) {
    const int64_t h = row % p.x.size[1], d = row / p.x.size[1] % p.x.size[0], n = row / p.x.size[1] / p.x.size[0];
    T* dx = line_of<T>(p.dx, n, d, h);
    // The lines of dy that reach this row.
    const T** pixels = reinterpret_cast<const T**>(s.pixels);
    int64_t lines = 0;
    Tap* line_taps = s.taps;
    int64_t count = 0;
    for (int64_t kd = 0; kd < p.K[0]; ++kd)
      for (int64_t kh = 0; kh < p.K[1]; ++kh) {
        const int64_t z = d + p.pad[0] - kd * p.dilation[0], y = h + p.pad[1] - kh * p.dilation[1];
        if (z < 0 || y < 0 || z % p.stride[0] || y % p.stride[1]) continue;
        if (z / p.stride[0] >= p.dy.size[0] || y / p.stride[1] >= p.dy.size[1]) continue;
        const T* line = line_of<T>(p.dy, n, z / p.stride[0], y / p.stride[1]);
        const T** out = pixels + lines * width;
        for (int64_t j = 0; j < width; ++j) {
          const int64_t o = first - halo + j;
          out[j] = o >= 0 && o < p.dy.size[2] ? line + o * p.dy.s[2] : reinterpret_cast<const T*>(s.zeros);
        }
        for (int64_t kw = 0; kw < p.K[2]; ++kw)
          line_taps[count++] = {lines * width + halo - kw * p.dilation[2] / sw, (kd * p.K[1] + kh) * p.K[2] + kw};
        ++lines;
      }
    // Columns by the remainder of their padded coordinate: each has its own taps, which are moved behind those of the columns
    // before.
    int64_t used = 0;
    for (int64_t q = 0; q < sw; ++q) {
      Tap* mine = line_taps + used;
      int64_t taps = 0;
      for (int64_t t = 0; used + t < count; ++t)
        if (mine[t].weight % p.K[2] * p.dilation[2] % sw == q) {
          const Tap swapped = mine[t];
          mine[t] = mine[taps], mine[taps++] = swapped;
        }
      used += taps;
      int64_t i = 0;  // column (first + i) * sw + q - pad
      while ((first + i) * sw + q < p.pad[2]) ++i;
      const int64_t w = (first + i) * sw + q - p.pad[2];
      if (w >= p.x.size[2]) continue;
      const int64_t results = (p.x.size[2] - w + sw - 1) / sw;
      T* to = dx + w * p.dx.s[2];
      const int64_t step = sw * p.dx.s[2];
      if (p.M == 1) {
        const int64_t groups = group_taps(mine, taps, 1, 2 * p.K[2], s.groups);
        convolve_pixels<T>(results, c, channels, 1, groups, s.groups, pixels + i, 1, nullptr, s.weight,
                           [&](int64_t r) { return to + r * step; });
      } else {
        for (int64_t r = 0; r < results; ++r) dx_pixel_of_many<T>(p, c, channels, taps, mine, pixels + i + r, to + r * step);
      }
    }
  }
}

// partial[t][c] += sum_i dy[i][c] * pixel[t, i][c] for N taps and a vector of channels.
template <class T, int N>
void sum_taps_pixels(int64_t count, int64_t c, int n, int64_t M, const T* dy, int64_t ld, const Tap* taps,
                     const T* const* pixels, int64_t step, float* partial, int64_t ld_partial) {
  Vec acc[N];
#pragma GCC unroll 9
  for (int t = 0; t < N; ++t) acc[t] = load_some(partial + t * ld_partial, n);
  for (int64_t i = 0; i < count; ++i) {
    const Vec v = load_some(dy + i * ld + c, n);
#pragma GCC unroll 9
    for (int t = 0; t < N; ++t) acc[t] = fma(v, load_channels(pixels[taps[t].first + i * step], c, n, M), acc[t]);
  }
#pragma GCC unroll 9
  for (int t = 0; t < N; ++t) store_some(partial + t * ld_partial, acc[t], n);
}

template <class T>
void dweight_rows(const DepthwiseConv& p, int64_t block, int64_t c, int64_t channels, float* scratch) {
  const RowScratch s = cut_rows(p, scratch);
  memset(s.zeros, 0, sizeof(float) * static_cast<size_t>(p.channels_out()));
  forward_taps(p, s.taps);
  const int64_t Cm = p.channels_out(), rows = p.N * p.dy.size[0] * p.dy.size[1];
  float* partial = p.partial + block * (p.taps + 1) * Cm + c;
  for (int64_t t = 0; t <= p.taps; ++t) memset(partial + t * Cm, 0, sizeof(float) * static_cast<size_t>(channels));
  const T* const* pixels = reinterpret_cast<const T* const*>(s.pixels);
  const int64_t count = p.dy.size[2], ld = p.dy.s[2], step = p.stride[2];
  for (int64_t row = rows * block / p.blocks; row < rows * (block + 1) / p.blocks; ++row) {
    const int64_t oh = row % p.dy.size[1], od = row / p.dy.size[1] % p.dy.size[0], n = row / p.dy.size[1] / p.dy.size[0];
    forward_pixels<T>(p, n, od, oh, s);
    const T* dy = line_of<T>(p.dy, n, od, oh);
    for_row(channels, [&](int64_t j, int m) {
      float* sums = partial + j;
      int64_t t = 0;
      for (; t + 9 <= p.taps; t += 9)
        sum_taps_pixels<T, 9>(count, c + j, m, p.M, dy, ld, s.taps + t, pixels, step, sums + t * Cm, Cm);
      for (; t + 3 <= p.taps; t += 3)
        sum_taps_pixels<T, 3>(count, c + j, m, p.M, dy, ld, s.taps + t, pixels, step, sums + t * Cm, Cm);
      for (; t < p.taps; ++t) sum_taps_pixels<T, 1>(count, c + j, m, p.M, dy, ld, s.taps + t, pixels, step, sums + t * Cm, Cm);
      Vec a = load_some(sums + p.taps * Cm, m);
      for (int64_t i = 0; i < count; ++i) a = a + load_some(dy + i * ld + c + j, m);
      store_some(sums + p.taps * Cm, a, m);
    });
  }
}

void reduce(const DepthwiseConv& p, int64_t begin, int64_t end) {
  const int64_t Cm = p.channels_out();
  for (int64_t c = begin; c < end; ++c)
    for (int64_t t = 0; t <= p.taps; ++t) {
      float a = 0.0f;
      for (int64_t block = 0; block < p.blocks; ++block) a += p.partial[(block * (p.taps + 1) + t) * Cm + c];
      (t == p.taps ? p.dbias[c] : p.dweight[c * p.taps + t]) = a;
    }
}

// The entries of the table: the dtype is taken apart here.
void fwd_planes_of(const DepthwiseConv& p, int64_t begin, int64_t end, float* scratch) {
  with_type(p.dtype, [&](auto t) { fwd_planes<decltype(t)>(p, begin, end, scratch); });
}
void fwd_rows_of(const DepthwiseConv& p, int64_t begin, int64_t end, int64_t c, int64_t channels, float* scratch) {
  with_type(p.dtype, [&](auto t) { fwd_rows<decltype(t)>(p, begin, end, c, channels, scratch); });
}
void bwd_planes_of(const DepthwiseConv& p, int64_t block, int64_t c, float* scratch) {
  with_type(p.dtype, [&](auto t) { bwd_planes<decltype(t)>(p, block, c, scratch); });
}
void dx_rows_of(const DepthwiseConv& p, int64_t begin, int64_t end, int64_t c, int64_t channels, float* scratch) {
  with_type(p.dtype, [&](auto t) { dx_rows<decltype(t)>(p, begin, end, c, channels, scratch); });
}
void dweight_rows_of(const DepthwiseConv& p, int64_t block, int64_t c, int64_t channels, float* scratch) {
  with_type(p.dtype, [&](auto t) { dweight_rows<decltype(t)>(p, block, c, channels, scratch); });
}
int64_t scratch_floats(const DepthwiseConv& p) { return p.planar ? plane_floats(p) : row_floats(p); }

}  // namespace

extern const DepthwiseConvKernels depthwise_conv_kernels = {scratch_floats, fwd_planes_of,   fwd_rows_of, bwd_planes_of,
                                                            dx_rows_of,     dweight_rows_of, reduce};

}  // namespace mlcore::MLC_ISA
