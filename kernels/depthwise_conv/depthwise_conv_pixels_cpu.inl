// depthwise_conv where channels are contiguous (channels_last); the equations are in depthwise_conv.h, the reasons in
// README.md. Nothing is copied: tables of pointers lead the microkernels of core/simd/pixel_taps.h to the pixels of each tap.
#include "core/simd/pixel_taps.h"
#include "depthwise_conv/depthwise_conv_kernels.h"

namespace mlcore::MLC_ISA {
namespace {

constexpr int kW = Vec::W;
constexpr int kPixels = kW == 16 ? 8 : 4;  // pixels of dy that a tile of weight gradients holds

int64_t common_divisor(int64_t a, int64_t b) {
  while (b) {
    const int64_t rest = a % b;
    a = b, b = rest;
  }
  return a;
}

// The taps that reach one coordinate of the results, in the order of the coordinates that they read: tap t has the weight
// weight + t * weight_step and reads first + t * gap.
struct Reach {
  int64_t taps, weight, weight_step, first, gap;
};

// Of y: all taps. Of dx: those with (o + pad - k * dilation) % stride = 0, the highest first.
Reach reach_of(const DepthwiseConv& p, bool backward, int d, int64_t o) {
  const int64_t s = p.stride[d], gap = p.dilation[d], K = p.K[d];
  if (!backward) return {K, 0, 1, o * s - p.pad[d], gap};
  const int64_t every = s / common_divisor(s, gap), at = o + p.pad[d];
  int64_t k = 0;
  while (k < every && (at - k * gap) % s != 0) ++k;
  if (k >= every || k >= K) return {0, 0, 0, 0, 1};
  const int64_t n = (K - 1 - k) / every + 1, last = k + (n - 1) * every;
  return {n, last, -every, (at - last * gap) / s, every * gap / s};
}

// Rows that share lines: `distance` apart, each reads its lines `lines` further than the one before. A strip is kRows of them
// beside each other.
constexpr int64_t kRows = 7;
struct SharedRows {
  int64_t distance, lines, count;

  SharedRows(const DepthwiseConv& p, bool backward) {
    const int64_t s = p.stride[1], d = p.dilation[1], both = common_divisor(s, d);
    distance = backward ? s / both * d : d / both, lines = backward ? 1 : s / both;
    count = lines < p.K[1] && p.M == 1 ? kRows : 1;
  }
};
int64_t strip_of(const DepthwiseConv& p, bool backward) {
  const SharedRows rows(p, backward);
  return rows.distance * rows.count;
}

int64_t table_width(const DepthwiseConv& p) {  // pointers that a line of the table may have, with slack for whole tiles
  const int64_t forward = (max<int64_t>(p.results().size[2], 1) - 1) * p.stride[2] + (p.K[2] - 1) * p.dilation[2] + 1;
  return max(forward, p.x.size[2] + p.K[2]) + kPixels * p.stride[2];
}
int64_t table_lines(const DepthwiseConv& p) { return p.K[0] * (p.K[1] + (kRows - 1) * min(p.stride[1], p.K[1])); }
int64_t scratch_floats(const DepthwiseConv& p) { return 2 * round_up<int64_t>(table_lines(p) * table_width(p), 16); }

// Shared: weights (M, taps, C) for dx with several filters a channel, else (taps, C*M); the pixel of zeros.
int64_t shared_floats(const DepthwiseConv& p) { return (p.taps + 1) * p.channels_out(); }
const float* zeros_of(const DepthwiseConv& p, const float* shared) { return shared + p.taps * p.channels_out(); }
void prepare(const DepthwiseConv& p, float* shared) {
  const int64_t Cm = p.channels_out(), M = p.dx.data ? p.M : 1, C = Cm / M;
  memset(shared + p.taps * Cm, 0, sizeof(float) * static_cast<size_t>(Cm));
  for (int64_t m = 0; m < M; ++m)
    for (int64_t c = 0; c < C; c += kW)
      for (int64_t t = 0; t < p.taps; t += kW) {
        const int rows = static_cast<int>(min<int64_t>(kW, C - c)), cols = static_cast<int>(min<int64_t>(kW, p.taps - t));
        Vec block[kW];
        for (int i = 0; i < kW; ++i)
          block[i] = i < rows ? load_some(p.weight + ((c + i) * M + m) * p.taps + t, cols) : Vec::zero();
        transpose(block);
        for (int i = 0; i < cols; ++i) store_some(shared + (m * p.taps + t + i) * C + c, block[i], rows);
      }
}

template <class T>
T* line_of(const Volume& v, int64_t n, int64_t d, int64_t h) {
  return static_cast<T*>(v.data) + n * v.n + d * v.s[0] + h * v.s[1];
}

// `lines` lines of `in` from the first that a row of results reaches: `count` pixels from column `first`, `gap` apart. Lines
// outside are `outside` all along.
template <class T>
void fill_table(const Volume& in, int64_t n, const Reach& rd, const Reach& rh, int64_t lines, int64_t first, int64_t gap,
                int64_t count, int64_t ld, const T* zeros, const T* outside, const T** out) {
  for (int64_t d = 0; d < rd.taps; ++d)
    for (int64_t l = 0; l < lines; ++l, out += ld) {
      const int64_t z = rd.first + d * rd.gap, y = rh.first + l * rh.gap;
      const bool inside = z >= 0 && z < in.size[0] && y >= 0 && y < in.size[1];
      const T* line = inside ? line_of<const T>(in, n, z, y) : nullptr;
      point_to_pixels(line, in.s[2], in.size[2], first, gap, count, inside ? zeros : outside, out);
    }
}

// Sums with several filters a channel, a lane at a time: y[c] reads channel c / M, dx[c] reads channels c * M + m.
template <class T>
void sum_many(const DepthwiseConv& p, bool backward, const PixelTaps& taps, const T* const* table, int64_t c, int64_t channels,
              const float* weight, T* out) {
  const int64_t count = backward ? p.M : 1;
  for_row(channels, [&](int64_t j, int lanes) {
    float start[kW] = {};
    for (int i = 0; i < lanes && !backward && p.bias; ++i) start[i] = p.bias[c + j + i];
    Vec acc = Vec::load(start);
    for (int64_t m = 0; m < count; ++m) {
      const T* const* line = table;
      for (int64_t d = 0; d < taps.depth; ++d)
        for (int64_t l = 0; l < taps.lines; ++l, line += taps.ld)
          for (int64_t t = 0; t < taps.taps && line[0]; ++t) {
            float x[kW] = {};
            for (int i = 0; i < lanes; ++i) x[i] = to_float(line[t][backward ? (c + j + i) * p.M + m : (c + j + i) / p.M]);
            const float* w = weight + m * p.taps * p.C + d * taps.by_depth + l * taps.by_line + t * taps.by_tap + j;
            acc = fma(load_some(w, lanes), Vec::load(x), acc);
          }
    }
    store_some(out + c + j, acc, lanes);
  });
}

// Results of 16 MiB and more find no place in the caches; a store that reads its line first moves half as many bytes again. At
// (8,256,56,56) streaming takes 1.5 to 1.9 ms where storing takes 2.1.
constexpr int64_t kStreamBytes = int64_t{16} << 20;
template <class T>
bool streams(const DepthwiseConv& p, const Volume& out, int64_t c, int64_t channels) {
  if (!kStreams || sizeof(T) != 4 || p.M != 1 || p.N * out.volume() * p.C < kStreamBytes / 4) return false;
  const int64_t steps = out.n | out.s[0] | out.s[1] | out.s[2] | c | channels;
  return steps % kW == 0 && reinterpret_cast<uintptr_t>(out.data) % (kW * sizeof(float)) == 0;
}

// The `rows` rows h, h + distance, ... of plane (n, d), which share lines.
template <class T>
void sum_rows(const DepthwiseConv& p, bool backward, int64_t n, int64_t d, int64_t h, const SharedRows& near, int64_t rows,
              int64_t c, int64_t channels, const float* shared, const T** table) {
  const Volume &in = backward ? p.dy : p.x, &out = backward ? p.dx : p.y;
  const int64_t Cw = backward ? p.C : p.channels_out();
  const Reach rd = reach_of(p, backward, 0, d), rh = reach_of(p, backward, 1, h);
  const int64_t groups = backward ? min(p.stride[2], out.size[2]) : 1;  // columns whose taps are the same
  for (int64_t q = 0; q < groups; ++q) {
    const Reach rw = reach_of(p, backward, 2, q);
    const int64_t results = ceil_div(out.size[2] - q, groups), step = backward ? 1 : p.stride[2];
    // Results `apart` from each other read pixels rw.gap * taps.step apart.
    const int64_t apart = rw.gap / common_divisor(rw.gap, step);
    PixelTaps taps{rd.taps,
                   rh.taps,
                   rw.taps,
                   rd.weight_step * p.K[1] * p.K[2] * Cw,
                   rh.weight_step * p.K[2] * Cw,
                   rw.weight_step * Cw,
                   table_width(p),
                   apart * step / rw.gap,
                   near.lines,
                   streams<T>(p, out, c, channels)};
    const float* weight = shared + ((rd.weight * p.K[1] + rh.weight) * p.K[2] + rw.weight) * Cw + c;
    for (int64_t v = 0; v < min(apart, results); ++v) {
      const int64_t count = ceil_div(results - v, apart), lines = rh.taps > 0 ? rh.taps + (rows - 1) * near.lines : 0;
      fill_table<T>(in, n, rd, rh, lines, rw.first + v * step, rw.gap, (count - 1) * taps.step + rw.taps, taps.ld,
                    reinterpret_cast<const T*>(zeros_of(p, shared)), nullptr, table);
      const int64_t by = out.s[2] * groups * apart;
      T* to = line_of<T>(out, n, d, h) + (q + v * groups) * out.s[2];
      if (p.M == 1) {
        const float* bias = !backward && p.bias ? p.bias + c : nullptr;
        sum_pixels<T, T>(taps, rows, count, table, c, channels, weight, bias, to + c, by, near.distance * out.s[1]);
      } else {
        for (int64_t i = 0; i < count; ++i)
          sum_many<T>(p, backward, taps, table + i * taps.step, c, channels, weight, to + i * by);
      }
    }
  }
}

template <class T>
void rows_of(const DepthwiseConv& p, bool backward, int64_t begin, int64_t end, int64_t c, int64_t channels,
             const float* shared, float* scratch) {
  const Volume& out = backward ? p.dx : p.y;
  const SharedRows near(p, backward);
  const int64_t strip = near.distance * near.count, strips = ceil_div(out.size[1], strip);
  const T** table = reinterpret_cast<const T**>(scratch);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t h0 = i % strips * strip, d = i / strips % out.size[0], n = i / strips / out.size[0];
    const int64_t last = min(h0 + strip, out.size[1]);
    for (int64_t h = h0; h < min(h0 + near.distance, last); ++h)
      sum_rows<T>(p, backward, n, d, h, near, ceil_div(last - h, near.distance), c, channels, shared, table);
  }
  end_stream();
}

// Weight gradients: a tile of kPixels pixels of dy, by L lines of K taps of x. partial[l][k] += sum_i dy[i] * pixel(l, i * S +
// k).
template <class T, int K, int L, int S>
void weight_tile(int lanes, const T* const* table, int64_t ld, int64_t step, int64_t c, const T* dy, int64_t by, int pixels,
                 float* partial, int64_t by_tap, int64_t by_line) {
  Vec v[kPixels], acc[L][K];
#pragma GCC unroll 8
  for (int i = 0; i < kPixels; ++i) v[i] = i < pixels ? load_some(dy + i * by, lanes) : Vec::zero();
#pragma GCC unroll 3
  for (int l = 0; l < L; ++l) {
#pragma GCC unroll 7
    for (int k = 0; k < K; ++k) acc[l][k] = load_some(partial + l * by_line + k * by_tap, lanes);
    const T* const* line = table + l * ld;
    if constexpr (S == 0) {
#pragma GCC unroll 8
      for (int i = 0; i < kPixels; ++i)
#pragma GCC unroll 7
        for (int k = 0; k < K; ++k) acc[l][k] = fma(v[i], load_some(line[i * step + k] + c, lanes), acc[l][k]);
    } else {
#pragma GCC unroll 32
      for (int j = 0; j < (kPixels - 1) * S + K; ++j) {
        const Vec x = load_some(line[j] + c, lanes);
#pragma GCC unroll 8
        for (int i = 0; i < kPixels; ++i)
          if (j - i * S >= 0 && j - i * S < K) acc[l][j - i * S] = fma(v[i], x, acc[l][j - i * S]);
      }
    }
#pragma GCC unroll 7
    for (int k = 0; k < K; ++k) store_some(partial + l * by_line + k * by_tap, acc[l][k], lanes);
  }
}

// All taps of a tile for channels [c, c + channels); dy and partial are at these channels.
template <class T>
void weight_sums(const PixelTaps& p, const T* const* table, int64_t c, int64_t channels, const T* dy, int64_t by, int pixels,
                 float* partial) {
  for (int64_t l = 0; l < p.depth * p.lines;) {
    const int64_t left = p.depth * p.lines - l;
    const bool three = kTiles && left >= 3 && p.taps == 3 && p.step <= 2;
    const T* const* line = table + l * p.ld;
    for_runs(p.taps, [&](int64_t t, auto run) {
      constexpr int K = decltype(run)::kTaps;
      for_row(channels, [&](int64_t j, int lanes) {
        const auto call = [&](auto kernel) {
          kernel(lanes, line + t, p.ld, p.step, c + j, dy + j, by, pixels, partial + l * p.by_line + t * p.by_tap + j, p.by_tap,
                 p.by_line);
        };
        if constexpr (K == 3 && kTiles) {
          if (three) return p.step == 1 ? call(weight_tile<T, 3, 3, 1>) : call(weight_tile<T, 3, 3, 2>);
        }
        if constexpr (kTiles) {
          if (p.step == 1) return call(weight_tile<T, K, 1, 1>);
        }
        call(weight_tile<T, K, 1, 0>);
      });
    });
    l += three ? 3 : 1;
  }
}

// The same with several filters a channel.
template <class T>
void weight_sums_many(const PixelTaps& p, int64_t M, const T* const* table, int64_t c, int64_t channels, const T* dy,
                      int64_t by, int pixels, float* partial) {
  for (int64_t l = 0; l < p.depth * p.lines; ++l)
    for (int64_t t = 0; t < p.taps; ++t)
      for (int64_t j = 0; j < channels; ++j) {
        float a = partial[l * p.by_line + t * p.by_tap + j];
        for (int i = 0; i < pixels; ++i)
          a += to_float(dy[i * by + j]) * to_float(table[l * p.ld + i * p.step + t][(c + j) / M]);
        partial[l * p.by_line + t * p.by_tap + j] = a;
      }
}

template <class T>
void dweight_of(const DepthwiseConv& p, int64_t block, int64_t c, int64_t channels, const float* shared, float* scratch) {
  const int64_t Cm = p.channels_out(), rows = p.N * p.dy.size[0] * p.dy.size[1], Wo = p.dy.size[2];
  float* partial = p.partial + block * (p.taps + 1) * Cm + c;
  for (int64_t t = 0; t <= p.taps; ++t) memset(partial + t * Cm, 0, sizeof(float) * static_cast<size_t>(channels));
  const T* zeros = reinterpret_cast<const T*>(zeros_of(p, shared));
  const T** table = reinterpret_cast<const T**>(scratch);
  const int64_t apart = p.dilation[2] / common_divisor(p.dilation[2], p.stride[2]);
  const PixelTaps taps{p.K[0],      p.K[1], p.K[2],         p.K[1] * p.K[2] * Cm,
                       p.K[2] * Cm, Cm,     table_width(p), apart * p.stride[2] / p.dilation[2]};
  for (int64_t row = rows * block / p.blocks; row < rows * (block + 1) / p.blocks; ++row) {
    const int64_t oh = row % p.dy.size[1], od = row / p.dy.size[1] % p.dy.size[0], n = row / p.dy.size[1] / p.dy.size[0];
    const Reach rd = reach_of(p, false, 0, od), rh = reach_of(p, false, 1, oh), rw = reach_of(p, false, 2, 0);
    const T* dy = line_of<T>(p.dy, n, od, oh) + c;
    for (int64_t v = 0; v < min(apart, Wo); ++v) {
      const int64_t count = ceil_div(Wo - v, apart), by = apart * p.dy.s[2];
      fill_table<T>(p.x, n, rd, rh, rh.taps, rw.first + v * p.stride[2], rw.gap,
                    (round_up<int64_t>(count, kPixels) - 1) * taps.step + rw.taps, taps.ld, zeros, zeros, table);
      for (int64_t i = 0; i < count; i += kPixels) {
        const int pixels = static_cast<int>(min<int64_t>(kPixels, count - i));
        const T* from = dy + v * p.dy.s[2] + i * by;
        p.M == 1 ? weight_sums<T>(taps, table + i * taps.step, c, channels, from, by, pixels, partial)
                 : weight_sums_many<T>(taps, p.M, table + i * taps.step, c, channels, from, by, pixels, partial);
        float* sums = partial + p.taps * Cm;
        for_row(channels, [&](int64_t j, int lanes) {
          Vec a = load_some(sums + j, lanes);
          for (int k = 0; k < pixels; ++k) a = a + load_some(from + k * by + j, lanes);
          store_some(sums + j, a, lanes);
        });
      }
    }
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
void rows(const DepthwiseConv& p, bool backward, int64_t begin, int64_t end, int64_t c, int64_t channels, const float* shared,
          float* scratch) {
  with_type(p.dtype, [&](auto t) { rows_of<decltype(t)>(p, backward, begin, end, c, channels, shared, scratch); });
}
void dweight(const DepthwiseConv& p, int64_t block, int64_t c, int64_t channels, const float* shared, float* scratch) {
  with_type(p.dtype, [&](auto t) { dweight_of<decltype(t)>(p, block, c, channels, shared, scratch); });
}

}  // namespace

extern const DepthwisePixels depthwise_pixels = {scratch_floats, shared_floats, prepare, strip_of, rows, dweight, reduce};

}  // namespace mlcore::MLC_ISA
