// The algorithm of causal_conv1d over Vec; the equations are in causal_conv1d.h. Compiled once per ISA.
// A tile is computed in fp32: its inputs with their history are read where they lie (float32, inside a run) or widened into
// scratch; one convolution and one activation serve every dtype. Vectors run along T or along C, whichever is contiguous.
#include "causal_conv1d/causal_conv1d_kernels.h"
#include "core/simd/rows.h"

namespace mlcore::MLC_ISA {
namespace {

constexpr int kW = Vec::W;
constexpr int64_t kTimeTile = 2048;  // x, y and the two buffers of backward: 32 KiB
constexpr int64_t kChannelTile = 256, kTokenTile = 32;

inline Vec abs(Vec x) { return max(x, Vec::zero() - x); }

// erf to 1.4e-7: an odd polynomial below 1, 1 - 2^p(|z|) above, both fitted at Chebyshev nodes.
inline Vec erf(Vec z) {
  const Vec a = abs(z), u = z * z, t = min(Vec::set1(4.0f), a);
  Vec s = Vec::set1(-9.673591193859465e-06f);
  s = fma(s, u, Vec::set1(0.00011268253729213029f));
  s = fma(s, u, Vec::set1(-0.0008484396385028958f));
  s = fma(s, u, Vec::set1(0.005221053492277861f));
  s = fma(s, u, Vec::set1(-0.026865437626838684f));
  s = fma(s, u, Vec::set1(0.11283782869577408f));
  s = fma(s, u, Vec::set1(-0.37612637877464294f));
  s = fma(s, u, Vec::set1(1.128379225730896f));
  Vec p = Vec::set1(-7.194329043613834e-08f);
  p = fma(p, t, Vec::set1(3.932554136554245e-06f));
  p = fma(p, t, Vec::set1(-8.129145135171711e-05f));
  p = fma(p, t, Vec::set1(0.0009405457531102002f));
  p = fma(p, t, Vec::set1(-0.007132360711693764f));
  p = fma(p, t, Vec::set1(0.03869035840034485f));
  p = fma(p, t, Vec::set1(-0.15960681438446045f));
  p = fma(p, t, Vec::set1(-0.9108486175537109f));
  p = fma(p, t, Vec::set1(-1.6309125423431396f));
  p = fma(p, t, Vec::set1(0.0005301138153299689f));
  const Vec r = Vec::set1(1.0f) - exp2(p), zero = Vec::zero();
  return select(less(a, Vec::set1(1.0f)), s * z, select(less(z, zero), zero - r, r));
}

constexpr float kLog2e = 1.44269504f;

inline Vec sigmoid(Vec x) {
  const Vec one = Vec::set1(1.0f);
  return one / (one + exp2(min(Vec::set1(127.0f), x * Vec::set1(-kLog2e))));
}
inline Vec normal_cdf(Vec x) { return fma(Vec::set1(0.5f), erf(x * Vec::set1(0.70710678f)), Vec::set1(0.5f)); }

struct Silu {
  static Vec value(Vec x) { return x * sigmoid(x); }
  static Vec slope(Vec x) {
    const Vec s = sigmoid(x), one = Vec::set1(1.0f);
    return s * fma(x, one - s, one);
  }
};
struct Gelu {
  static Vec value(Vec x) { return x * normal_cdf(x); }
  static Vec slope(Vec x) {
    const Vec density = Vec::set1(0.39894228f) * exp2(x * x * Vec::set1(-0.5f * kLog2e));
    return fma(x, density, normal_cdf(x));
  }
};

// A (rows, cols) matrix of floats; contiguous in cols.
struct Panel {
  float* data;
  int64_t ld;
};

template <class A>
void activate_panel(Panel m, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r)
    for_row(cols, [&](int64_t c, int n) {
      float* v = m.data + r * m.ld + c;
      store_some(v, A::value(load_some(v, n)), n);
    });
}
void activate(Activation a, Panel m, int64_t rows, int64_t cols) {
  if (a == Activation::silu) activate_panel<Silu>(m, rows, cols);
  if (a == Activation::gelu) activate_panel<Gelu>(m, rows, cols);
}

// d *= act'(pre)
template <class A>
void multiply_slope_panel(Panel d, Panel pre, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r)
    for_row(cols, [&](int64_t c, int n) {
      float* v = d.data + r * d.ld + c;
      store_some(v, load_some(v, n) * A::slope(load_some(pre.data + r * pre.ld + c, n)), n);
    });
}
void multiply_slope(Activation a, Panel d, Panel pre, int64_t rows, int64_t cols) {
  if (a == Activation::silu) multiply_slope_panel<Silu>(d, pre, rows, cols);
  if (a == Activation::gelu) multiply_slope_panel<Gelu>(d, pre, rows, cols);
}

// out[i] = bias + sum_k weight[k] * in[i + k], i < n
void convolve_time(int64_t n, int64_t width, float bias, const float* weight, const float* in, float* out) {
  const Vec b = Vec::set1(bias);
  int64_t i = 0;
  for (; i + 4 * kW <= n; i += 4 * kW) {
    Vec a0 = b, a1 = b, a2 = b, a3 = b;
    for (int64_t k = 0; k < width; ++k) {
      const Vec w = Vec::set1(weight[k]);
      const float* v = in + i + k;
      a0 = fma(w, Vec::load(v), a0), a1 = fma(w, Vec::load(v + kW), a1);
      a2 = fma(w, Vec::load(v + 2 * kW), a2), a3 = fma(w, Vec::load(v + 3 * kW), a3);
    }
    a0.store(out + i), a1.store(out + i + kW), a2.store(out + i + 2 * kW), a3.store(out + i + 3 * kW);
  }
  for_row(n - i, [&](int64_t j, int m) {
    Vec a = b;
    for (int64_t k = 0; k < width; ++k) a = fma(Vec::set1(weight[k]), load_some(in + i + j + k, m), a);
    store_some(out + i + j, a, m);
  });
}

// out[t][c] = bias[c] + sum_k weight[k][c] * in[t + k][c]; bias null is 0, flip takes the taps in reverse.
template <int R>
inline void convolve_rows(int m, int64_t width, const float* bias, const float* weight, int64_t step, const float* in,
                          int64_t ld_in, float* out, int64_t ld_out) {
  Vec acc[R];
  for (int r = 0; r < R; ++r) acc[r] = bias ? load_some(bias, m) : Vec::zero();
  for (int64_t k = 0; k < width; ++k) {
    const Vec w = load_some(weight + k * step, m);
    for (int r = 0; r < R; ++r) acc[r] = fma(w, load_some(in + (r + k) * ld_in, m), acc[r]);
  }
  for (int r = 0; r < R; ++r) store_some(out + r * ld_out, acc[r], m);
}
void convolve_channels(int64_t tokens, int64_t cols, int64_t width, const float* bias, const float* weight, int64_t ld_weight,
                       bool flip, Panel in, Panel out) {
  const float* first = flip ? weight + (width - 1) * ld_weight : weight;
  const int64_t step = flip ? -ld_weight : ld_weight;
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4)
    for_row(cols, [&](int64_t c, int m) {
      convolve_rows<4>(m, width, bias ? bias + c : nullptr, first + c, step, in.data + t * in.ld + c, in.ld,
                       out.data + t * out.ld + c, out.ld);
    });
  for (; t < tokens; ++t)
    for_row(cols, [&](int64_t c, int m) {
      convolve_rows<1>(m, width, bias ? bias + c : nullptr, first + c, step, in.data + t * in.ld + c, in.ld,
                       out.data + t * out.ld + c, out.ld);
    });
}

template <class T>
inline T* at(const Signal& s, int64_t b, int64_t c, int64_t t) {
  return static_cast<T*>(s.data) + b * s.b + c * s.c + t * s.t;
}

// Reads and writes of a tile as a panel: rows are tokens and columns channels where C is contiguous, else one row of tokens.
template <class T>
struct Tiles {
  const CausalConv1d& p;
  const Tile& tile;
  const Run& run;
  int64_t c, channels;  // [c, c + channels), 1 channel where T is contiguous

  int64_t panel_rows(int64_t tokens) const { return p.in_time ? 1 : tokens; }
  int64_t panel_cols(int64_t tokens) const { return p.in_time ? tokens : channels; }
  float& element(Panel m, int64_t token, int64_t channel) const {
    return p.in_time ? m.data[token] : m.data[token * m.ld + channel];
  }
  Panel from_token(Panel m, int64_t token) const { return {m.data + (p.in_time ? token : token * m.ld), m.ld}; }

  // Tokens [begin, end) of s, widened into m.
  void load(const Signal& s, int64_t begin, int64_t end, Panel m) const {
    const int64_t cols = panel_cols(end - begin);
    for (int64_t r = 0; r < panel_rows(end - begin); ++r) {
      const T* v = at<T>(s, run.b, c, begin + r);
      for_row(cols, [&](int64_t j, int n) { store_some(m.data + r * m.ld + j, load_some(v + j, n), n); });
    }
  }
  void store(Panel m, int64_t tokens, const Signal& s) const {
    const int64_t cols = panel_cols(tokens);
    for (int64_t r = 0; r < panel_rows(tokens); ++r) {
      T* v = at<T>(s, run.b, c, tile.begin + r);
      for_row(cols, [&](int64_t j, int n) { store_some(v + j, load_some(m.data + r * m.ld + j, n), n); });
    }
  }
  void zero(Panel m, int64_t tokens) const {
    for (int64_t r = 0; r < panel_rows(tokens); ++r)
      memset(m.data + r * m.ld, 0, sizeof(float) * static_cast<size_t>(panel_cols(tokens)));
  }

  // h of tokens [tile.begin - (width - 1), end): where it lies if it can be taken from there, else in scratch.
  Panel history(int64_t end, Panel scratch) const {
    const int64_t back = p.width - 1, first = tile.begin - back;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (first >= run.begin) return {at<float>(p.x, run.b, c, first), p.x.t};
    }
    const int64_t inside = max(first, run.begin);
    load(p.x, inside, end, from_token(scratch, inside - first));
    for (int64_t t = first; t < run.begin; ++t)
      for (int64_t j = 0; j < channels; ++j)
        element(scratch, t - first, j) =
            run.initial >= 0 ? to_float(*at<T>(p.initial, run.initial, c + j, t - run.begin + back)) : 0.0f;
    return scratch;
  }
};

// Parts of a thread's scratch: weight and bias by taps (C contiguous), then two panels for x and dpre, then one for sums.
struct Scratches {
  float* taps;  // (width + 1, kChannelTile)
  Panel x, d, out;
};
int64_t panel_tokens(const CausalConv1d& p, bool backward) {
  return (p.in_time ? kTimeTile : kTokenTile) + (backward ? 2 : 1) * (p.width - 1);
}
int64_t panel_floats(const CausalConv1d& p, bool backward) {
  return round_up<int64_t>(panel_tokens(p, backward) * (p.in_time ? 1 : kChannelTile), 16);
}
int64_t taps_floats(const CausalConv1d& p) { return round_up<int64_t>((p.width + 1) * (p.in_time ? 1 : kChannelTile), 16); }
int64_t scratch_floats(const CausalConv1d& p, bool backward) { return taps_floats(p) + 3 * panel_floats(p, backward); }

Scratches cut(const CausalConv1d& p, bool backward, float* scratch) {
  const int64_t panel = panel_floats(p, backward), ld = p.in_time ? 0 : kChannelTile;
  float* panels = scratch + taps_floats(p);
  return {scratch, {panels, ld}, {panels + panel, ld}, {panels + 2 * panel, ld}};
}

// taps[k][j] = weight[c + j][k], and the bias in the last row.
void load_taps(const CausalConv1d& p, int64_t c, int64_t channels, float* taps) {
  for (int64_t k = 0; k < p.width; ++k)
    for (int64_t j = 0; j < channels; ++j) taps[k * kChannelTile + j] = p.weight[(c + j) * p.width + k];
  for (int64_t j = 0; j < channels; ++j) taps[p.width * kChannelTile + j] = p.bias ? p.bias[c + j] : 0.0f;
}

template <class T>
void fwd_tile(const Tiles<T>& t, const Scratches& s) {
  const CausalConv1d& p = t.p;
  const int64_t n = t.tile.end - t.tile.begin;
  if (n == 0) return;
  Panel out = s.out;
  if constexpr (sizeof(T) == sizeof(float)) out = {at<float>(p.y, t.run.b, t.c, t.tile.begin), p.y.t};
  if (t.run.padding) {
    t.zero(out, n);
  } else {
    const Panel x = t.history(t.tile.end, s.x);
    if (p.in_time)
      convolve_time(n, p.width, p.bias ? p.bias[t.c] : 0.0f, p.weight + t.c * p.width, x.data, out.data);
    else
      convolve_channels(n, t.channels, p.width, s.taps + p.width * kChannelTile, s.taps, kChannelTile, false, x, out);
    activate(p.activation, out, t.panel_rows(n), t.panel_cols(n));
  }
  if constexpr (sizeof(T) != sizeof(float)) t.store(out, n, p.y);
}

template <class T>
void final_states(const CausalConv1d& p, const Run& run, int64_t c, int64_t channels) {
  const int64_t back = p.width - 1;
  for (int64_t j = c; j < c + channels; ++j)
    for (int64_t i = 0; i < back; ++i) {
      const int64_t t = run.end - back + i;
      T* out = at<T>(p.final, run.final, j, i);
      if (t >= run.begin)
        *out = *at<T>(p.x, run.b, j, t);
      else
        *out = run.initial >= 0 ? *at<T>(p.initial, run.initial, j, t - run.begin + back) : from_float<T>(0.0f);
    }
}

template <class T>
void fwd_block(const CausalConv1d& p, int64_t block, int64_t c, int64_t channels, const Scratches& s) {
  for (int64_t i = p.block_begin(block); i < p.block_begin(block + 1); ++i) {
    const Tiles<T> t{p, p.tiles[i], p.runs[p.tiles[i].run], c, channels};
    fwd_tile(t, s);
    if (t.run.final >= 0 && p.final.data && t.tile.end == t.run.end) final_states<T>(p, t.run, c, channels);
  }
}

void fwd(const CausalConv1d& p, int64_t block, int64_t begin, int64_t end, float* scratch) {
  const Scratches s = cut(p, false, scratch);
  with_type(p.dtype, [&](auto t) {
    const int64_t step = p.in_time ? 1 : kChannelTile;
    for (int64_t c = begin; c < end; c += step) {
      const int64_t channels = min(step, end - c);
      if (!p.in_time) load_taps(p, c, channels, s.taps);
      fwd_block<decltype(t)>(p, block, c, channels, s);
    }
  });
}

// sums[k] += sum_i d[i] * h[i + k]; the last one sums d alone.
void sum_taps_time(int64_t n, int64_t width, const float* d, const float* h, float* sums) {
  int64_t k = 0;
  for (; k + 4 <= width; k += 4) {
    Vec a0 = Vec::zero(), a1 = a0, a2 = a0, a3 = a0;
    for_row(n, [&](int64_t i, int m) {
      const Vec v = load_some(d + i, m);
      const float* x = h + i + k;
      a0 = fma(v, load_some(x, m), a0), a1 = fma(v, load_some(x + 1, m), a1);
      a2 = fma(v, load_some(x + 2, m), a2), a3 = fma(v, load_some(x + 3, m), a3);
    });
    sums[k] += sum(a0), sums[k + 1] += sum(a1), sums[k + 2] += sum(a2), sums[k + 3] += sum(a3);
  }
  for (; k < width; ++k) sums[k] += sum_row(n, [&](int64_t i, int m) { return load_some(d + i, m) * load_some(h + i + k, m); });
  sums[width] += sum_row(n, [&](int64_t i, int m) { return load_some(d + i, m); });
}

// partial[k][c] += sum_t d[t][c] * h[t + k][c]; the last row sums d alone.
void sum_taps_channels(int64_t tokens, int64_t cols, int64_t width, Panel d, Panel h, float* partial, int64_t ld) {
  for_row(cols, [&](int64_t c, int m) {
    int64_t k = 0;
    for (; k + 4 <= width; k += 4) {
      Vec a0 = Vec::zero(), a1 = a0, a2 = a0, a3 = a0;
      for (int64_t t = 0; t < tokens; ++t) {
        const Vec v = load_some(d.data + t * d.ld + c, m);
        const float* x = h.data + (t + k) * h.ld + c;
        a0 = fma(v, load_some(x, m), a0), a1 = fma(v, load_some(x + h.ld, m), a1);
        a2 = fma(v, load_some(x + 2 * h.ld, m), a2), a3 = fma(v, load_some(x + 3 * h.ld, m), a3);
      }
      const Vec terms[4] = {a0, a1, a2, a3};
      for (int i = 0; i < 4; ++i) {
        float* out = partial + (k + i) * ld + c;
        store_some(out, load_some(out, m) + terms[i], m);
      }
    }
    for (; k <= width; ++k) {
      Vec a = Vec::zero();
      for (int64_t t = 0; t < tokens; ++t) {
        const Vec v = load_some(d.data + t * d.ld + c, m);
        a = k == width ? a + v : fma(v, load_some(h.data + (t + k) * h.ld + c, m), a);
      }
      float* out = partial + k * ld + c;
      store_some(out, load_some(out, m) + a, m);
    }
  });
}

// dinitial of the run's first tile: dx continued to the positions before it, from dpre d of tokens [0, tokens).
template <class T>
void initial_gradient(const Tiles<T>& t, Panel d, int64_t tokens) {
  const CausalConv1d& p = t.p;
  const int64_t back = p.width - 1, length = t.run.end - t.run.begin;
  for (int64_t j = 0; j < t.channels; ++j) {
    const float* weight = p.weight + (t.c + j) * p.width;
    for (int64_t i = 0; i < back; ++i) {  // position i - back of the run
      float a = 0.0f;
      for (int64_t k = 0; k <= i; ++k)
        if (i - k < tokens) a += weight[k] * t.element(d, i - k, j);
      if (t.run.final >= 0 && p.dfinal.data && i >= length) a += to_float(*at<T>(p.dfinal, t.run.final, t.c + j, i - length));
      *at<T>(p.dinitial, t.run.initial, t.c + j, i) = from_float<T>(a);
    }
  }
}

template <class T>
void bwd_tile(const Tiles<T>& t, const Scratches& s, float* sums) {
  const CausalConv1d& p = t.p;
  const int64_t n = t.tile.end - t.tile.begin, back = p.width - 1;
  const int64_t end = min(t.tile.end + back, t.run.end), seen = t.run.padding ? 0 : end - t.tile.begin;
  if (seen > 0) {
    const Panel x = t.history(end, s.x);
    t.load(p.dy, t.tile.begin, end, s.d);
    if (p.activation != Activation::none) {
      if (p.in_time)
        convolve_time(seen, p.width, p.bias ? p.bias[t.c] : 0.0f, p.weight + t.c * p.width, x.data, s.out.data);
      else
        convolve_channels(seen, t.channels, p.width, s.taps + p.width * kChannelTile, s.taps, kChannelTile, false, x, s.out);
      multiply_slope(p.activation, s.d, s.out, t.panel_rows(seen), t.panel_cols(seen));
    }
    if (sums && p.in_time) sum_taps_time(n, p.width, s.d.data, x.data, sums);
    if (sums && !p.in_time) sum_taps_channels(n, t.channels, p.width, s.d, x, sums, p.C);
  }
  t.zero(t.from_token(s.d, seen), n + back - seen);
  if (n > 0) {
    const bool to_final = t.run.final >= 0 && p.dfinal.data && t.tile.end > t.run.end - back;
    Panel out = s.out;
    if constexpr (sizeof(T) == sizeof(float)) out = {at<float>(p.dx, t.run.b, t.c, t.tile.begin), p.dx.t};
    if (p.in_time) {
      float* flipped = s.taps;
      for (int64_t k = 0; k < p.width; ++k) flipped[k] = p.weight[t.c * p.width + back - k];
      convolve_time(n, p.width, 0.0f, flipped, s.d.data, out.data);
    } else {
      convolve_channels(n, t.channels, p.width, nullptr, s.taps, kChannelTile, true, s.d, out);
    }
    if (to_final)
      for (int64_t token = max(t.tile.begin, t.run.end - back); token < t.tile.end; ++token)
        for (int64_t j = 0; j < t.channels; ++j)
          t.element(out, token - t.tile.begin, j) +=
              to_float(*at<T>(p.dfinal, t.run.final, t.c + j, token - (t.run.end - back)));
    if constexpr (sizeof(T) != sizeof(float)) t.store(out, n, p.dx);
  }
  if (p.dinitial.data && t.run.initial >= 0 && t.tile.begin == t.run.begin) initial_gradient(t, s.d, seen);
}

template <class T>
void bwd_block(const CausalConv1d& p, int64_t block, int64_t c, int64_t channels, const Scratches& s) {
  float* partial = p.partial ? p.partial + block * (p.width + 1) * p.C + c : nullptr;
  float* sums = partial;
  if (partial && p.in_time) {  // a channel's sums lie together while they grow
    sums = s.out.data + panel_floats(p, true);
    memset(sums, 0, sizeof(float) * static_cast<size_t>(p.width + 1));
  } else if (partial) {
    for (int64_t k = 0; k <= p.width; ++k) memset(partial + k * p.C, 0, sizeof(float) * static_cast<size_t>(channels));
  }
  for (int64_t i = p.block_begin(block); i < p.block_begin(block + 1); ++i)
    bwd_tile(Tiles<T>{p, p.tiles[i], p.runs[p.tiles[i].run], c, channels}, s, sums);
  if (partial && p.in_time)
    for (int64_t k = 0; k <= p.width; ++k) partial[k * p.C] = sums[k];
}

void bwd(const CausalConv1d& p, int64_t block, int64_t begin, int64_t end, float* scratch) {
  const Scratches s = cut(p, true, scratch);
  with_type(p.dtype, [&](auto t) {
    const int64_t step = p.in_time ? 1 : kChannelTile;
    for (int64_t c = begin; c < end; c += step) {
      const int64_t channels = min(step, end - c);
      if (!p.in_time) load_taps(p, c, channels, s.taps);
      bwd_block<decltype(t)>(p, block, c, channels, s);
    }
  });
}

void reduce(const CausalConv1d& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c)
    for (int64_t k = 0; k <= p.width; ++k) {
      float a = 0.0f;
      for (int64_t block = 0; block < p.blocks; ++block) a += p.partial[(block * (p.width + 1) + k) * p.C + c];
      (k == p.width ? p.dbias[c] : p.dweight[c * p.width + k]) = a;
    }
}

template <class T>
void update_lanes(const CausalConv1dUpdate& p, int64_t b, int64_t c, int n) {
  const int64_t back = p.width - 1, slot = p.slots ? p.slots[b] : b;
  const auto each = [&](auto&& body) {
    for (int j = 0; j < n; ++j) body(c + j, j);
  };
  if (slot < 0) {
    for (int64_t t = 0; t < p.T; ++t) each([&](int64_t ch, int) { *at<T>(p.y, b, ch, t) = from_float<T>(0.0f); });
    return;
  }
  const int64_t start = p.position ? p.position[b] : 0;
  const auto ring = [&](int64_t t) { return ((start + t) % p.S + p.S) % p.S; };
  float lane[kW] = {}, out[kW];
  for (int64_t t = 0; t < p.T; ++t) {
    each([&](int64_t ch, int j) { lane[j] = p.bias ? p.bias[ch] : 0.0f; });
    Vec a = Vec::load(lane);
    for (int64_t k = 0; k < p.width; ++k) {
      const int64_t from = t - back + k;  // the token; negative ones are in the state
      each([&](int64_t ch, int j) {
        lane[j] =
            to_float(from >= 0 ? *at<T>(p.x, b, ch, from) : *at<T>(p.state, slot, ch, p.position ? ring(from) : p.S + from));
      });
      const Vec v = Vec::load(lane);
      each([&](int64_t ch, int j) { lane[j] = p.weight[ch * p.width + k]; });
      a = fma(Vec::load(lane), v, a);
    }
    if (p.activation == Activation::silu) a = Silu::value(a);
    if (p.activation == Activation::gelu) a = Gelu::value(a);
    a.store(out);
    each([&](int64_t ch, int j) { *at<T>(p.y, b, ch, t) = from_float<T>(out[j]); });
  }
  each([&](int64_t ch, int) {
    if (p.position) {
      for (int64_t t = max<int64_t>(0, p.T - p.S); t < p.T; ++t) *at<T>(p.state, slot, ch, ring(t)) = *at<T>(p.x, b, ch, t);
      return;
    }
    for (int64_t i = 0; i < p.S; ++i) {
      const int64_t from = i + p.T - p.S;  // as above
      *at<T>(p.state, slot, ch, i) = from >= 0 ? *at<T>(p.x, b, ch, from) : *at<T>(p.state, slot, ch, p.S + from);
    }
  });
}

void update(const CausalConv1dUpdate& p, int64_t b, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto t) {
    for (int64_t c = begin; c < end; c += kW) update_lanes<decltype(t)>(p, b, c, static_cast<int>(min<int64_t>(kW, end - c)));
  });
}

int64_t scratch_with_sums(const CausalConv1d& p, bool backward) {
  return scratch_floats(p, backward) + round_up<int64_t>(p.width + 1, 16);
}

}  // namespace

extern const CausalConv1dKernels causal_conv1d_kernels = {kTimeTile, kChannelTile, kTokenTile, scratch_with_sums,
                                                          fwd,       bwd,          reduce,     update};

}  // namespace mlcore::MLC_ISA
