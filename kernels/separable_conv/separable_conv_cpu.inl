// The algorithm of separable_conv over Vec; the equations are in separable_conv.h, the reasons in README.md. Compiled once per
// ISA. Rows of h are made 64 channels at a time in cache-resident scratch, which is at once the A operand of the product.
#include <math.h>

#include "core/simd/gemm.h"
#include "core/simd/pixel_taps.h"
#include "separable_conv/separable_chain.h"
#include "separable_conv/separable_conv_backward.h"
#include "separable_conv/separable_conv_kernels.h"

namespace mlcore::MLC_ISA {
namespace {

constexpr int kW = Vec::W;
constexpr int kVecs = kTiles ? kPanelVecs : 1;  // of channels that passes over pixels take at once

// Floats: the table of pointers of one row pair, a block of channels of a strip, and the strip of y.
struct Scratch {
  float *table, *a, *y;
};
int64_t line_width(const SeparableConv& p) { return (p.Wo + 8) * p.stride[1] + p.K[1] * p.dilation[1]; }
int64_t rows_of(const SeparableConv& p) { return max(p.strip, kPartialRows); }
int64_t table_floats(const SeparableConv& p) {  // for every row of a strip
  return rows_of(p) * round_up<int64_t>(2 * (p.K[0] + 1) * line_width(p), 16);
}
int64_t a_floats(const SeparableConv& p) {
  return round_up<int64_t>(max(p.strip * p.Wo * kDepth, kPartialRows * p.Wo * kBlock), 16);
}
int64_t scratch_floats(const SeparableConv& p, int64_t columns) {
  return table_floats(p) + a_floats(p) + p.strip * p.Wo * round_up<int64_t>(columns, 16);
}
Scratch cut_scratch(const SeparableConv& p, float* scratch) {
  float* a = scratch + table_floats(p);
  return {scratch, a, a + a_floats(p)};
}

// Shared: depthwise weights by taps, (taps, C), and a pixel of zeros.
int64_t shared_floats(const SeparableConv& p) { return (p.K[0] * p.K[1] + 1) * p.C; }
void prepare(const SeparableConv& p, float* shared) {
  const int64_t taps = p.K[0] * p.K[1];
  memset(shared + taps * p.C, 0, sizeof(float) * static_cast<size_t>(p.C));
  for (int64_t c = 0; c < p.C; ++c)
    for (int64_t t = 0; t < taps; ++t) shared[t * p.C + c] = p.depthwise ? p.depthwise[c * taps + t] : 1.0f;
}

// Results of a row that are `apart` from each other read pixels of a line that stand dilation * step apart.
struct Columns {
  int64_t apart, step;
  explicit Columns(const SeparableConv& p) {
    int64_t a = p.dilation[1], b = p.stride[1];
    while (b) {
      const int64_t rest = a % b;
      a = b, b = rest;
    }
    apart = p.dilation[1] / a, step = p.stride[1] / a;
  }
};

// Whether rows oh and oh + 1 can share lines of x; float32 alone, since tiles of two rows take long to compile.
bool pairs_of(const SeparableConv& p) {
  return kTiles && p.dtype == Dtype::f32 && p.stride[0] == 1 && p.dilation[0] == 1 && p.stride[1] == 1 && p.dilation[1] == 1;
}

template <class T>
const T* line_of(const SeparableConv& p, int64_t n, int64_t oh, int64_t l) {
  const int64_t y = oh * p.stride[0] + l * p.dilation[0] - p.pad[0];
  return y >= 0 && y < p.H ? static_cast<const T*>(p.x.data) + n * p.x.n + y * p.x.h : nullptr;
}

// Tables of `rows` rows from oh on of image n.
template <class T>
void point_to_strip(const SeparableConv& p, int64_t n, int64_t oh, int64_t rows, const float* shared, float* table) {
  const int64_t ld = line_width(p), pair = pairs_of(p) ? 2 : 1, size = round_up<int64_t>(2 * (p.K[0] + 1) * ld, 16);
  const T* zeros = reinterpret_cast<const T*>(shared + p.K[0] * p.K[1] * p.C);
  const Columns columns(p);
  for (int64_t r = 0; r < rows; r += pair) {
    const T** out = reinterpret_cast<const T**>(table + r * size);
    for (int64_t l = 0; l < p.K[0] + pair - 1; ++l, out += ld)
      for (int64_t v = 0, at = 0; v < columns.apart; ++v) {
        const int64_t count = (ceil_div(p.Wo - v, columns.apart) - 1) * columns.step + p.K[1];
        if (v >= p.Wo) break;
        point_to_pixels(line_of<T>(p, n, oh + r, l), p.x.w, p.W, v * p.stride[1] - p.pad[1], p.dilation[1], count, zeros,
                        out + at);
        at += count;
      }
  }
}

// h of these rows for channels [c, c + channels), pixel by pixel of kLd floats; start: (channels), where h begins.
template <class T, int64_t kLd>
void make_hidden(const SeparableConv& p, int64_t rows, int64_t c, int64_t channels, const float* shared, const float* table,
                 const float* start, float* h) {
  const int64_t ld = line_width(p), pair = pairs_of(p) ? 2 : 1, size = round_up<int64_t>(2 * (p.K[0] + 1) * ld, 16);
  const Columns columns(p);
  const PixelTaps taps{1, p.K[0], p.K[1], 0, p.K[1] * p.C, p.C, ld, columns.step};
  const float* weight = shared + c;
  for (int64_t r = 0; r < rows; r += pair) {
    const T* const* from = reinterpret_cast<const T* const*>(table + r * size);
    float* row = h + r * p.Wo * kLd;
    for (int64_t v = 0, at = 0; v < min(columns.apart, p.Wo); ++v) {
      const int64_t count = ceil_div(p.Wo - v, columns.apart);
      sum_pixels<T, float>(taps, min(pair, rows - r), count, from + at, c, channels, weight, start, row + v * kLd,
                           columns.apart * kLd, p.Wo * kLd);
      at += (count - 1) * columns.step + p.K[1];
    }
  }
}

inline Vec sigmoid(Vec x) {
  return Vec::set1(1.0f) / (Vec::set1(1.0f) + exp2(min(x * Vec::set1(-1.44269504f), Vec::set1(126.0f))));
}

// An activation and its derivative. relu and relu6 differ in numbers alone: what compiles once for both compiles faster.
enum class Form { none, clamp, silu };
template <Form kForm>
struct ActivationOf {
  Vec top, below;  // clamp: the largest result, and the largest x where the derivative is 1
  explicit ActivationOf(Activation f)
      : top(Vec::set1(f == Activation::relu6 ? 6.0f : INFINITY)),
        below(Vec::set1(f == Activation::relu6 ? 0x1.7ffffep2f : INFINITY)) {}
  Vec operator()(Vec x) const {
    if constexpr (kForm == Form::clamp) return min(top, max(Vec::zero(), x));  // the second operand where either is NaN
    if constexpr (kForm == Form::silu) return x * sigmoid(x);
    return x;
  }
  // d * f'(x); at the corners of relu and relu6 the derivative is 0, as torch has it.
  Vec through(Vec d, Vec x) const {
    if constexpr (kForm == Form::clamp) return select(less(Vec::zero(), x) & ~less(below, x), d, Vec::zero());
    if constexpr (kForm == Form::silu) {
      const Vec s = sigmoid(x), one = Vec::set1(1.0f);
      return d * (s * fma(x, one - s, one));
    }
    return d;
  }
};
template <class F>
void with_activation(Activation f, F&& body) {
  switch (f) {
    case Activation::relu:
    case Activation::relu6: return body(ActivationOf<Form::clamp>(f));
    case Activation::silu: return body(ActivationOf<Form::silu>(f));
    default: return body(ActivationOf<Form::none>(f));
  }
}

// scale * h + shift, either of which may be missing.
struct Affine {
  Vec scale, shift;
  Affine(const SeparableConv& p, int64_t c, int n)
      : scale(p.scale ? load_some(p.scale + c, n) : Vec::set1(1.0f)),
        shift(p.shift ? load_some(p.shift + c, n) : Vec::zero()) {}
  Vec operator()(Vec h) const { return fma(scale, h, shift); }
};

// a = f(scale * h + shift) in place, or f(h), for channels [c, c + channels) of `pixels` pixels.
void finish_hidden(const SeparableConv& p, int64_t pixels, int64_t c, int64_t channels, bool affinely, float* h) {
  with_activation(p.f, [&](auto f) {
    for_row(channels, [&](int64_t j, int n) {
      const Affine affine(p, c + j, n);
      for (int64_t i = 0; i < pixels; ++i) {
        float* at = h + i * kDepth + j;
        const Vec x = load_some(at, n);
        store_some(at, f(affinely ? affine(x) : x), n);
      }
    });
  });
}

// Columns [begin, end) of y's strip: c += a * pointwise for channels [k, k + depth) of the pointwise weights.
template <bool kAccumulate>
void multiply(const SeparableConv& p, int pixels, int64_t k, int64_t depth, int64_t begin, int64_t end, const float* a,
              float* y, int64_t ld) {
  const int64_t rows = round_up(p.C, kBlock);
  for (int64_t j = begin; j < end; j += kPanel) {
    const float* b = p.pointwise + (j / kBlock * rows + k) * kBlock + j % kBlock;
    float* to = y + (j - begin);
    switch (min<int64_t>(kPanelVecs, ceil_div<int64_t>(end - j, kW))) {
      case 1: gemm_panel<1, kDepth, 1, kAccumulate>(pixels, depth, a, b, kBlock, to, ld); break;
      case 2: gemm_panel<2, kDepth, 1, kAccumulate>(pixels, depth, a, b, kBlock, to, ld); break;
#if defined(MLC_ISA_AVX512)
      case 3: gemm_panel<3, kDepth, 1, kAccumulate>(pixels, depth, a, b, kBlock, to, ld); break;
      case 4: gemm_panel<4, kDepth, 1, kAccumulate>(pixels, depth, a, b, kBlock, to, ld); break;
#endif
    }
  }
}

// The rows of `a` where the first convolution is dense: channel (kh * KW + kw) * Cx + i of a pixel is channel i of the pixel
// that its tap meets. Channels [c, c + channels) of these rows of image n.
template <class T>
void gather_patches(const SeparableConv& p, int64_t n, int64_t oh, int64_t rows, int64_t c, int64_t channels, float* a) {
  for (int64_t tap = c / p.Cx; tap * p.Cx < c + channels; ++tap) {
    const int64_t first = max(tap * p.Cx, c), last = min((tap + 1) * p.Cx, c + channels);
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t y = (oh + r) * p.stride[0] + tap / p.K[1] * p.dilation[0] - p.pad[0];
      const T* line = static_cast<const T*>(p.x.data) + n * p.x.n + y * p.x.h;
      float* to = a + r * p.Wo * kDepth - c;
      for (int64_t i = 0; i < p.Wo; ++i, to += kDepth) {
        const int64_t x = i * p.stride[1] + tap % p.K[1] * p.dilation[1] - p.pad[1];
        const bool inside = y >= 0 && y < p.H && x >= 0 && x < p.W;
        for (int64_t k = first; k < last; ++k) to[k] = inside ? to_float(line[x * p.x.w + (k - tap * p.Cx) * p.x.c]) : 0.0f;
      }
    }
  }
}

// Of V vectors of columns (n lanes where V is 1): sums of v - v0 and of (v - v0)^2 over `count` rows, and v0, the first row.
template <int V>
void column_moments(int64_t count, int n, const float* from, int64_t by, float* out, int64_t ld) {
  Vec zero[V], first[V], second[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) zero[v] = load_some(from + v * kW, n), first[v] = second[v] = Vec::zero();
  for (int64_t i = 0; i < count; ++i, from += by)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec x = load_some(from + v * kW, n) - zero[v];
      first[v] = first[v] + x, second[v] = fma(x, x, second[v]);
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v, out += kW)
    store_some(out, first[v], n), store_some(out + ld, second[v], n), store_some(out + 2 * ld, zero[v], n);
}

template <class T>
void fwd_of(const SeparableConv& p, int64_t strip, int64_t begin, int64_t end, const float* shared, float* scratch) {
  const int64_t n = strip / p.strips(), oh = strip % p.strips() * p.strip, rows = min(p.strip, p.Ho - oh);
  const int64_t pixels = rows * p.Wo, ld = round_up<int64_t>(end - begin, 16);
  const Scratch s = cut_scratch(p, scratch);
  if (!p.patches) point_to_strip<T>(p, n, oh, rows, shared, s.table);
  for (int64_t c = 0; c < p.C; c += kDepth) {
    const int64_t channels = min(kDepth, p.C - c);
    const bool plain = !p.scale;  // then h begins with the shift, and one pass over a is saved
    p.patches ? gather_patches<T>(p, n, oh, rows, c, channels, s.a)
              : make_hidden<T, kDepth>(p, rows, c, channels, shared, s.table, plain && p.shift ? p.shift + c : nullptr, s.a);
    if (!plain || p.f != Activation::none) finish_hidden(p, pixels, c, channels, !plain, s.a);
    c == 0 ? multiply<false>(p, static_cast<int>(pixels), c, channels, begin, end, s.a, s.y, ld)
           : multiply<true>(p, static_cast<int>(pixels), c, channels, begin, end, s.a, s.y, ld);
  }
  if (p.partial) {
    float* to = p.partial + strip * 3 * p.J + begin;
    int64_t j = 0;
    for (; kTiles && j + kPanel <= end - begin; j += kPanel) column_moments<kVecs>(pixels, kW, s.y + j, ld, to + j, p.J);
    for_row(end - begin - j, [&](int64_t k, int m) { column_moments<1>(pixels, m, s.y + j + k, ld, to + j + k, p.J); });
  }
  with_activation(p.g, [&](auto g) {
    for (int64_t i = 0; i < pixels; ++i) {
      const auto pixel = [&](const Pixels& t) {
        return static_cast<T*>(t.data) + n * t.n + (oh + i / p.Wo) * t.h + i % p.Wo * t.w + begin;
      };
      T* y = pixel(p.y);
      const T* residual = p.residual.data ? pixel(p.residual) : nullptr;
      for_row(end - begin, [&](int64_t j, int m) {
        Vec v = load_some(s.y + i * ld + j, m);
        if (p.bias) v = v + load_some(p.bias + begin + j, m);
        v = g(v);
        store_some(y + j, residual ? v + load_some(residual + j, m) : v, m);
      });
    }
  });
}

// One pass over h of rows [first, last), V vectors of channels from c on (n lanes where V is 1). kInPlace: h is x where it
// lies, else h points to its channel c of the first pixel, kBlock floats a pixel. partial: of this block, at channel c.
template <class T, int V, bool kInPlace, class F>
void hidden_columns(const SeparableConv& p, F f, int64_t first, int64_t last, int64_t c, int n, const float* h,
                    float* partial) {
  const auto load = [&](const auto* from) { return V > 1 ? Vec::load(from) : load_some(from, n); };
  const auto store = [&](auto* to, Vec v) { V > 1 ? v.store(to) : store_some(to, v, n); };
  const auto channels = [&](const float* from, int v, float other) {
    return from ? load(from + c + v * kW) : Vec::set1(other);
  };
  // body(v, h, pixel), where pixel(t) is the same pixel and vector of another tensor.
  const auto each = [&](auto&& body) __attribute__((always_inline)) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t image = row / p.Ho, oh = row % p.Ho;
      const T* x = static_cast<const T*>(p.x.data) + image * p.x.n + oh * p.x.h + c;
      const float* made = kInPlace ? nullptr : h + (row - first) * p.Wo * kBlock;
      for (int64_t i = 0; i < p.Wo; ++i)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const auto pixel = [&](const Pixels& t) __attribute__((always_inline)) {
            return static_cast<T*>(t.data) + image * t.n + oh * t.h + i * t.w + c + v * kW;
          };
          if constexpr (kInPlace) body(v, load(x + i * p.x.w + v * kW), pixel);
          if constexpr (!kInPlace) body(v, load(made + i * kBlock + v * kW), pixel);
        }
    }
  };
  Vec scale[V], shift[V], a[V], b[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    scale[v] = channels(p.scale, v, 1.0f), shift[v] = channels(p.shift, v, 0.0f), a[v] = b[v] = Vec::zero();
  }
  if (p.pass == HiddenPass::apply) {
    each([&](int v, Vec x, auto&& pixel) {
      Vec y = f(fma(scale[v], x, shift[v]));
      if (p.residual.data) y = y + load(pixel(p.residual));
      store(pixel(p.a), y);
    });
    return;
  }
  if (p.pass == HiddenPass::norm) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) a[v] = channels(p.by_h, v, 0.0f), b[v] = channels(p.constant, v, 0.0f);
    each([&](int v, Vec x, auto&& pixel) {
      const Vec e = f.through(load(pixel(p.da)), fma(scale[v], x, shift[v]));
      store(pixel(p.a), fma(scale[v], e, fma(a[v], x, b[v])));
    });
    return;
  }
  Vec about[V];  // what sums are taken about
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const T* x = static_cast<const T*>(p.x.data) + first / p.Ho * p.x.n + first % p.Ho * p.x.h + c + v * kW;
    about[v] = p.pass != HiddenPass::moments ? channels(p.mean, v, 0.0f) : kInPlace ? load(x) : load(h + v * kW);
  }
  if (p.pass == HiddenPass::moments) {
    each([&](int v, Vec x, auto&&) { a[v] = a[v] + (x - about[v]), b[v] = fma(x - about[v], x - about[v], b[v]); });
  } else {
    const bool write = p.pass == HiddenPass::gradient;
    each([&](int v, Vec x, auto&& pixel) {
      const Vec e = f.through(load(pixel(p.da)), fma(scale[v], x, shift[v]));
      a[v] = a[v] + e, b[v] = fma(e, x - about[v], b[v]);
      if (write) store(pixel(p.a), scale[v] * e);
    });
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v)
    store(partial + v * kW, a[v]), store(partial + p.C + v * kW, b[v]), store(partial + 2 * p.C + v * kW, about[v]);
}

// h is x where nothing is filtered, skipped or padded.
bool in_place(const SeparableConv& p) {
  return !p.depthwise && p.stride[0] == 1 && p.stride[1] == 1 && p.pad[0] == 0 && p.pad[1] == 0 && p.H == p.Ho && p.W == p.Wo;
}

template <class T>
void hidden_of(const SeparableConv& p, int64_t block, int64_t begin, int64_t end, const float* shared, float* scratch) {
  const Scratch s = cut_scratch(p, scratch);
  const int64_t total = p.N * p.Ho, first = block * kPartialRows, last = min(first + kPartialRows, total);
  const bool there = in_place(p);
  for (int64_t c = begin; c < end; c += kBlock) {
    const int64_t channels = min(kBlock, end - c);
    for (int64_t row = first; row < last && !there;) {  // the rows may be of several images
      const int64_t n = row / p.Ho, oh = row % p.Ho, rows = min(last - row, p.Ho - oh);
      point_to_strip<T>(p, n, oh, rows, shared, s.table);
      make_hidden<T, kBlock>(p, rows, c, channels, shared, s.table, nullptr, s.a + (row - first) * p.Wo * kBlock);
      row += rows;
    }
    const auto columns = [&]<int V>(int64_t j, int n) {
      with_activation(p.f, [&](auto f) {
        float* partial = p.partial ? p.partial + block * 3 * p.C + c + j : nullptr;
        there ? hidden_columns<T, V, true>(p, f, first, last, c + j, n, nullptr, partial)
              : hidden_columns<T, V, false>(p, f, first, last, c + j, n, s.a + j, partial);
      });
    };
    int64_t j = 0;
    if constexpr (sizeof(T) == 4)
      for (; kTiles && j + kPanel <= channels; j += kPanel) columns.template operator()<kVecs>(j, kW);
    for_row(channels - j, [&](int64_t k, int n) { columns.template operator()<1>(j + k, n); });
  }
}

void fwd(const SeparableConv& p, int64_t strip, int64_t begin, int64_t end, const float* shared, float* scratch) {
  with_type(p.dtype, [&](auto t) { fwd_of<decltype(t)>(p, strip, begin, end, shared, scratch); });
}
void hidden(const SeparableConv& p, int64_t block, int64_t begin, int64_t end, const float* shared, float* scratch) {
  with_type(p.dtype, [&](auto t) { hidden_of<decltype(t)>(p, block, begin, end, shared, scratch); });
}

#include "separable_conv/separable_chain.inl"
#include "separable_conv/separable_conv_backward.inl"

}  // namespace

extern const SeparableConvKernels separable_conv_kernels = {shared_floats, prepare, scratch_floats, fwd, hidden};
extern const SeparableBackwardKernels separable_backward_kernels = {backward_scratch, run_backward, pack_blocks};
extern const SeparableChainKernels separable_chain_kernels = {chain_scratch, chain_run};

}  // namespace mlcore::MLC_ISA
