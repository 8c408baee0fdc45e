// The algorithm of separable_conv over Vec; the equations are in separable_conv.h, the reasons in README.md. Compiled once per
// ISA. Rows of h are made 64 channels at a time in cache-resident scratch, which is at once the A operand of the product.
#include "core/simd/gemm.h"
#include "core/simd/pixel_taps.h"
#include "separable_conv/separable_conv_kernels.h"

namespace mlcore::MLC_ISA {
namespace {

constexpr int kW = Vec::W;

// Floats: the table of pointers of one row pair, a block of channels of a strip, and the strip of y.
struct Scratch {
  float *table, *a, *y;
};
int64_t line_width(const SeparableConv& p) { return (p.Wo + 8) * p.stride[1] + p.K[1] * p.dilation[1]; }
int64_t rows_of(const SeparableConv& p) { return max(p.strip, kPartialRows); }
int64_t table_floats(const SeparableConv& p) {  // for every row of a strip
  return rows_of(p) * round_up<int64_t>(2 * (p.K[0] + 1) * line_width(p), 16);
}
int64_t scratch_floats(const SeparableConv& p, int64_t columns) {
  return table_floats(p) + round_up<int64_t>(rows_of(p) * p.Wo * kBlock, 16) + p.strip * p.Wo * round_up<int64_t>(columns, 16);
}
Scratch cut_scratch(const SeparableConv& p, float* scratch) {
  float* a = scratch + table_floats(p);
  return {scratch, a, a + round_up<int64_t>(rows_of(p) * p.Wo * kBlock, 16)};
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

// Whether rows oh and oh + 1 can share lines of x.
bool pairs_of(const SeparableConv& p) {
  return kTiles && p.stride[0] == 1 && p.dilation[0] == 1 && p.stride[1] == 1 && p.dilation[1] == 1;
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

// h of these rows for channels [c, c + channels), pixel by pixel of kBlock floats; start: (channels), where h begins.
template <class T>
void make_hidden(const SeparableConv& p, int64_t rows, int64_t c, int64_t channels, const float* shared, const float* table,
                 const float* start, float* h) {
  const int64_t ld = line_width(p), pair = pairs_of(p) ? 2 : 1, size = round_up<int64_t>(2 * (p.K[0] + 1) * ld, 16);
  const Columns columns(p);
  const PixelTaps taps{1, p.K[0], p.K[1], 0, p.K[1] * p.C, p.C, ld, columns.step};
  const float* weight = shared + c;
  for (int64_t r = 0; r < rows; r += pair) {
    const T* const* from = reinterpret_cast<const T* const*>(table + r * size);
    float* row = h + r * p.Wo * kBlock;
    if constexpr (kTiles) {
      if (pair == 2 && r + 1 < rows) {
        sum_pixels<2, T, float>(taps, p.Wo, from, c, channels, weight, start, {row, row + p.Wo * kBlock}, kBlock);
        continue;
      }
    }
    for (int64_t v = 0, at = 0; v < min(columns.apart, p.Wo); ++v) {
      const int64_t count = ceil_div(p.Wo - v, columns.apart);
      sum_pixels<1, T, float>(taps, count, from + at, c, channels, weight, start, {row + v * kBlock}, columns.apart * kBlock);
      at += (count - 1) * columns.step + p.K[1];
    }
  }
}

inline Vec sigmoid(Vec x) {
  return Vec::set1(1.0f) / (Vec::set1(1.0f) + exp2(min(x * Vec::set1(-1.44269504f), Vec::set1(126.0f))));
}

template <Activation kF>
inline Vec activate(Vec x) {
  if constexpr (kF == Activation::relu) return max(Vec::zero(), x);  // the second operand where either is NaN
  if constexpr (kF == Activation::relu6) return min(Vec::set1(6.0f), max(Vec::zero(), x));
  if constexpr (kF == Activation::silu) return x * sigmoid(x);
  return x;
}
// d * f'(x); at the corners of relu and relu6 the derivative is 0, as torch has it.
template <Activation kF>
inline Vec through(Vec d, Vec x) {
  if constexpr (kF == Activation::relu) return select(less(Vec::zero(), x), d, Vec::zero());
  if constexpr (kF == Activation::relu6) return select(less(Vec::zero(), x) & less(x, Vec::set1(6.0f)), d, Vec::zero());
  if constexpr (kF == Activation::silu) {
    const Vec s = sigmoid(x), one = Vec::set1(1.0f);
    return d * (s * fma(x, one - s, one));
  }
  return d;
}
template <Activation kF>
struct ActivationOf {
  static constexpr Activation kValue = kF;
};
template <class F>
void with_activation(Activation f, F&& body) {
  switch (f) {
    case Activation::relu: return body(ActivationOf<Activation::relu>{});
    case Activation::relu6: return body(ActivationOf<Activation::relu6>{});
    case Activation::silu: return body(ActivationOf<Activation::silu>{});
    default: return body(ActivationOf<Activation::none>{});
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
    constexpr Activation kF = decltype(f)::kValue;
    for_row(channels, [&](int64_t j, int n) {
      const Affine affine(p, c + j, n);
      for (int64_t i = 0; i < pixels; ++i) {
        float* at = h + i * kBlock + j;
        const Vec x = load_some(at, n);
        store_some(at, affinely ? activate<kF>(affine(x)) : activate<kF>(x), n);
      }
    });
  });
}

// Columns [begin, end) of y's strip: c += a * pointwise for channels [k, k + depth), a block of the pointwise weights.
template <bool kAccumulate>
void multiply(const SeparableConv& p, int pixels, int64_t k, int64_t depth, int64_t begin, int64_t end, const float* a,
              float* y, int64_t ld) {
  const float* block = p.pointwise + k / kBlock * ceil_div(p.J, kBlock) * kBlock * kBlock;
  for (int64_t j = begin; j < end; j += kPanel) {
    const float* b = block + j / kBlock * kBlock * kBlock + j % kBlock;
    float* to = y + (j - begin);
    switch (min<int64_t>(kPanelVecs, ceil_div<int64_t>(end - j, kW))) {
      case 1: gemm_panel<1, kBlock, 1, kAccumulate>(pixels, depth, a, b, kBlock, to, ld); break;
      case 2: gemm_panel<2, kBlock, 1, kAccumulate>(pixels, depth, a, b, kBlock, to, ld); break;
#if defined(MLC_ISA_AVX512)
      case 3: gemm_panel<3, kBlock, 1, kAccumulate>(pixels, depth, a, b, kBlock, to, ld); break;
      case 4: gemm_panel<4, kBlock, 1, kAccumulate>(pixels, depth, a, b, kBlock, to, ld); break;
#endif
    }
  }
}

template <class T>
void fwd_of(const SeparableConv& p, int64_t strip, int64_t begin, int64_t end, const float* shared, float* scratch) {
  const int64_t n = strip / p.strips(), oh = strip % p.strips() * p.strip, rows = min(p.strip, p.Ho - oh);
  const int64_t pixels = rows * p.Wo, ld = round_up<int64_t>(end - begin, 16);
  const Scratch s = cut_scratch(p, scratch);
  point_to_strip<T>(p, n, oh, rows, shared, s.table);
  for (int64_t c = 0; c < p.C; c += kBlock) {
    const int64_t channels = min(kBlock, p.C - c);
    const bool plain = !p.scale;  // then h begins with the shift, and one pass over a is saved
    make_hidden<T>(p, rows, c, channels, shared, s.table, plain && p.shift ? p.shift + c : nullptr, s.a);
    if (!plain || p.f != Activation::none) finish_hidden(p, pixels, c, channels, !plain, s.a);
    c == 0 ? multiply<false>(p, static_cast<int>(pixels), c, channels, begin, end, s.a, s.y, ld)
           : multiply<true>(p, static_cast<int>(pixels), c, channels, begin, end, s.a, s.y, ld);
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
        v = activate<decltype(g)::kValue>(v);
        store_some(y + j, residual ? v + load_some(residual + j, m) : v, m);
      });
    }
  });
}

// What is done with h, a vector of channels of `pixels` pixels; pixel(i) is a's, or d's.
template <class T, Activation kF, class Pixel>
void hidden_columns(const SeparableConv& p, int64_t pixels, int64_t c, int n, const float* h, float* sums, float* origin,
                    Pixel&& pixel) {
  const Affine affine(p, c, n);
  Vec first = Vec::zero(), second = Vec::zero();
  if (p.pass == HiddenPass::affine) {
    const Vec by_h = load_some(p.by_h + c, n), constant = load_some(p.constant + c, n);
    for (int64_t i = 0; i < pixels; ++i) {
      T* d = pixel(i) + c;
      store_some(d, fma(affine.scale, load_some(d, n), fma(by_h, load_some(h + i * kBlock, n), constant)), n);
    }
    return;
  }
  const Vec zero = origin ? load_some(h, n) : Vec::zero();
  for (int64_t i = 0; i < pixels; ++i) {
    const Vec x = load_some(h + i * kBlock, n);
    if (p.pass == HiddenPass::gradient) {
      T* at = pixel(i) + c;
      const Vec d = through<kF>(load_some(at, n), affine(x));
      store_some(at, d, n);
      first = first + d, second = fma(d, x, second);
    } else {
      if (p.a.data) store_some(pixel(i) + c, activate<kF>(affine(x)), n);
      first = first + (x - zero), second = fma(x - zero, x - zero, second);
    }
  }
  if (origin) store_some(origin + c, zero, n);
  if (sums) store_some(sums + c, first, n), store_some(sums + p.C + c, second, n);
}

template <class T>
void hidden_of(const SeparableConv& p, int64_t block, int64_t begin, int64_t end, const float* shared, float* scratch) {
  const Scratch s = cut_scratch(p, scratch);
  const int64_t total = p.N * p.Ho, first = block * kPartialRows, last = min(first + kPartialRows, total);
  for (int64_t c = begin; c < end; c += kBlock) {
    const int64_t channels = min(kBlock, end - c);
    for (int64_t row = first; row < last;) {  // the rows may be of several images
      const int64_t n = row / p.Ho, oh = row % p.Ho, rows = min(last - row, p.Ho - oh);
      point_to_strip<T>(p, n, oh, rows, shared, s.table);
      make_hidden<T>(p, rows, c, channels, shared, s.table, nullptr, s.a + (row - first) * p.Wo * kBlock);
      row += rows;
    }
    const auto pixel = [&](int64_t i) {
      const int64_t row = first + i / p.Wo;
      return static_cast<T*>(p.a.data) + row / p.Ho * p.a.n + row % p.Ho * p.a.h + i % p.Wo * p.a.w;
    };
    with_activation(p.f, [&](auto f) {
      for_row(channels, [&](int64_t j, int n) {
        hidden_columns<T, decltype(f)::kValue>(p, (last - first) * p.Wo, c + j, n, s.a + j,
                                               p.partial ? p.partial + block * 2 * p.C : nullptr,
                                               p.origin ? p.origin + block * p.C : nullptr, pixel);
      });
    });
  }
}

void fwd(const SeparableConv& p, int64_t strip, int64_t begin, int64_t end, const float* shared, float* scratch) {
  with_type(p.dtype, [&](auto t) { fwd_of<decltype(t)>(p, strip, begin, end, shared, scratch); });
}
void hidden(const SeparableConv& p, int64_t block, int64_t begin, int64_t end, const float* shared, float* scratch) {
  with_type(p.dtype, [&](auto t) { hidden_of<decltype(t)>(p, block, begin, end, shared, scratch); });
}

}  // namespace

extern const SeparableConvKernels separable_conv_kernels = {shared_floats, prepare, scratch_floats, fwd, hidden};

}  // namespace mlcore::MLC_ISA
