// The steps of a chain of packed layers over Vec, included by separable_conv_cpu.inl, whose tables, activations and columns it
// uses. Strips of `a` are made as there; the product reads x in place where nothing is filtered, adds in y itself and finishes
// an element when its last product is in.

// Rows of weights that are multiplied at once: with panels of 64 columns 32 KiB of the L1 cache. Tiles of 14 rows by two
// vectors with 256 rows of weights were as fast alone (169 to 180 GFLOP/s a core), but made MobileNets take a third longer.
constexpr int kChainDepth = 128;

struct ChainProduct {
  const float* a;  // element (i, k) at a[i * by_row + k * by_depth]
  int64_t by_row, by_depth;
  const float *bias, *residual;
  float* y;
  int64_t ld, residual_ld;
  float low, high;  // the clamp of finished elements
  bool add, finish;
  int lanes;  // of a tile's last vector
};

// M rows by NV vectors of y over `depth` rows of b. ahead: where the same rows of the next block of b are, from b on; a line of
// each is asked for while this one is multiplied, since weights come from beyond the caches of this core.
template <int M, int NV>
__attribute__((noinline)) void chain_tile(const ChainProduct& p, int64_t depth, const float* a, const float* b, int64_t ldb,
                                          int64_t ahead, int64_t row) {
  constexpr int kGroups = (M + 2) / 3;  // three rows are in reach of a pointer and a stride
  Vec acc[M][NV];
  const float* rows[kGroups];
  const int64_t by_row = p.by_row, by_depth = p.by_depth;
#pragma GCC unroll 16
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) acc[i][n] = Vec::zero();
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) rows[g] = a + 3 * g * by_row;
#pragma GCC unroll 1
  for (int64_t k = 0; k < depth; ++k) {
    Vec w[NV];
#pragma GCC unroll 4
    for (int n = 0; n < NV; ++n) w[n] = Vec::load(b + n * kW);
    if constexpr (M > 2) __builtin_prefetch(b + ahead, 0, 2);
    if constexpr (M <= 2) {  // nothing but weights: far enough ahead for all of them
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) __builtin_prefetch(b + 48 * ldb + n * kW, 0, 3);
    }
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      const Vec x = Vec::set1(rows[i / 3][i % 3 * by_row]);
#pragma GCC unroll 4
      for (int n = 0; n < NV; ++n) acc[i][n] = fma(x, w[n], acc[i][n]);
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) rows[g] += by_depth;
    b += ldb;
  }
  const Vec low = Vec::set1(p.low), high = Vec::set1(p.high);
#pragma GCC unroll 4
  for (int n = 0; n < NV; ++n) {
    const int lanes = n == NV - 1 ? p.lanes : kW;
    const Vec bias = p.finish ? Vec::load(p.bias + n * kW) : Vec::zero();
#pragma GCC unroll 16
    for (int i = 0; i < M; ++i) {
      float* y = p.y + (row + i) * p.ld + n * kW;
      Vec v = acc[i][n];
      if (p.add) v = v + load_some(y, lanes);
      if (p.finish) v = min(high, max(low, v + bias));  // the second operand where either is NaN
      if (p.residual) v = v + load_some(p.residual + (row + i) * p.residual_ld + n * kW, lanes);
      store_some(y, v, lanes);
    }
  }
}

template <int M, int NV>
inline void chain_last_rows(int rows, const ChainProduct& p, int64_t depth, const float* a, const float* b, int64_t ldb,
                            int64_t ahead, int64_t row) {
  if constexpr (M > 0) {
    if (rows == M) return chain_tile<M, NV>(p, depth, a, b, ldb, ahead, row);
    chain_last_rows<M - 1, NV>(rows, p, depth, a, b, ldb, ahead, row);
  }
}

template <int NV>
void chain_panel(const ChainProduct& p, int64_t pixels, int64_t depth, const float* b, int64_t ldb, int64_t ahead) {
  constexpr int kRows = micro_rows(NV), kLine = 16;
  int64_t i = 0;
  for (int64_t tile = 0; i + kRows <= pixels; i += kRows, ++tile) {
    const int64_t line = tile * kLine < kPanel ? ahead + tile * kLine : 0;  // each tile asks for one column of lines
    chain_tile<kRows, NV>(p, depth, p.a + i * p.by_row, b, ldb, line, i);
  }
  chain_last_rows<kRows - 1, NV>(static_cast<int>(pixels - i), p, depth, p.a + i * p.by_row, b, ldb, 0, i);
}

// Columns [begin, end) of `pixels` pixels of y = g(a * weights + bias) + residual; p.y and p.residual point to the first pixel.
void chain_product(const ChainStep& s, ChainProduct p, int64_t pixels, int64_t begin, int64_t end) {
  const int64_t K = s.conv.C, J = s.conv.J, chunks = ceil_div<int64_t>(K, kChainDepth), depth = ceil_div(K, chunks);
  const auto width = [&](int64_t j) { return min(kBlock, round_up<int64_t>(J - j / kBlock * kBlock, 16)); };
  const auto block = [&](int64_t k, int64_t j) { return s.weights + j / kBlock * kBlock * K + k * width(j) + j % kBlock; };
  const ChainProduct whole = p;
  for (int64_t k = 0; k < K; k += depth)
    for (int64_t j = begin; j < end; j += kPanel) {
      const int64_t columns = min<int64_t>(kPanel, end - j), vecs = ceil_div<int64_t>(columns, kW), rest = min(depth, K - k);
      const float* b = block(k, j);
      const int64_t ahead = (j + kPanel < end ? block(k, j + kPanel) : k + depth < K ? block(k + depth, begin) : b) - b;
      p.a = whole.a + k * p.by_depth, p.y = whole.y + j, p.bias = s.bias + j;
      p.add = k > 0, p.finish = k + depth >= K;
      p.residual = p.finish && whole.residual ? whole.residual + j : nullptr;
      p.lanes = static_cast<int>(columns - (vecs - 1) * kW);
      switch (vecs) {
        case 1: chain_panel<1>(p, pixels, rest, b, width(j), ahead); break;
        case 2: chain_panel<2>(p, pixels, rest, b, width(j), ahead); break;
#if defined(MLC_ISA_AVX512)
        case 3: chain_panel<3>(p, pixels, rest, b, width(j), ahead); break;
        case 4: chain_panel<4>(p, pixels, rest, b, width(j), ahead); break;
#endif
      }
    }
}

// v = f(v) + residual in place, for `columns` columns of `pixels` rows.
void chain_activate(Activation activation, int64_t pixels, int64_t columns, float* v, int64_t ld,
                    const float* residual = nullptr, int64_t residual_ld = 0) {
  with_activation(activation, [&](auto f) {
    for (int64_t i = 0; i < pixels; ++i)
      for_row(columns, [&](int64_t j, int n) {
        Vec x = f(load_some(v + i * ld + j, n));
        if (residual) x = x + load_some(residual + i * residual_ld + j, n);
        store_some(v + i * ld + j, x, n);
      });
  });
}

// Lines of x that rows of h share where the dilation lets them: line l of row r is by_row * r + l of the table.
struct ChainTable {
  int64_t by_row, lines, ld;
  ChainTable(const SeparableConv& p, int64_t rows)
      : by_row(p.dilation[0] == 1 ? p.stride[0] : p.K[0]), lines((rows - 1) * by_row + p.K[0]), ld(line_width(p)) {}
  int64_t floats() const { return round_up<int64_t>(2 * lines * ld, 16); }
};

// `a` of rows [oh, oh + rows) of an image x, chain_ld(C) floats a pixel: a little of it at a time, so that f finds it in the L1
// cache.
void chain_hidden(const ChainStep& s, const float* x, int64_t x_ld, int64_t oh, int64_t rows, float* scratch, float* a) {
  constexpr int64_t kFloats = 4096;
  const SeparableConv& p = s.conv;
  const Columns columns(p);
  const float** table = reinterpret_cast<const float**>(scratch);
  const int64_t ld = chain_ld(p.C);
  const ChainTable t(p, rows);
  for (int64_t l = 0; l < t.lines; ++l) {
    const int64_t y = p.dilation[0] == 1 ? oh * p.stride[0] + l - p.pad[0]
                                         : (oh + l / p.K[0]) * p.stride[0] + l % p.K[0] * p.dilation[0] - p.pad[0];
    const float* line = y >= 0 && y < p.H ? x + y * p.W * x_ld : nullptr;
    for (int64_t v = 0, at = 0; v < min(columns.apart, p.Wo); ++v) {
      const int64_t count = (ceil_div(p.Wo - v, columns.apart) - 1) * columns.step + p.K[1];
      point_to_pixels(line, x_ld, p.W, v * p.stride[1] - p.pad[1], p.dilation[1], count, s.zeros, table + l * t.ld + at);
      at += count;
    }
  }
  const PixelTaps taps{1, p.K[0], p.K[1], 0, p.K[1] * p.C, p.C, t.ld, columns.step, t.by_row};
  const int64_t few = max<int64_t>(min(rows, kFloats / kBlock / p.Wo), 1);
  for (int64_t r = 0; r < rows; r += few)
    for (int64_t c = 0, next; c < p.C; c = next) {
      next = p.C - c < kBlock + kW ? p.C : c + kBlock;
      const int64_t count = min(few, rows - r);
      float* to = a + r * p.Wo * ld + c;
      for (int64_t v = 0, at = 0; v < min(columns.apart, p.Wo); ++v) {
        const int64_t results = ceil_div(p.Wo - v, columns.apart);
        sum_pixels<float, float>(taps, count, results, table + r * t.by_row * t.ld + at, c, next - c, s.depthwise + c,
                                 s.shift + c, to + v * ld, columns.apart * ld, p.Wo * ld);
        at += (results - 1) * columns.step + p.K[1];
      }
      if (p.f != Activation::none) chain_activate(p.f, count * p.Wo, next - c, to, ld);
    }
}

// Channel k = (kh * KW + kw) * Cx + i of the patches of rows [oh, oh + rows) of image n, one line of `ld` pixels a channel.
void chain_patches(const ChainStep& s, int64_t n, int64_t oh, int64_t rows, int64_t ld, float* a) {
  const SeparableConv& p = s.conv;
  const float* image = static_cast<const float*>(p.x.data) + n * p.x.n;
  const int64_t step = p.stride[1] * p.x.w;
  for (int64_t k = 0; k < p.C; ++k, a += ld)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t tap = k / p.Cx, y = (oh + r) * p.stride[0] + tap / p.K[1] * p.dilation[0] - p.pad[0];
      const int64_t x = tap % p.K[1] * p.dilation[1] - p.pad[1];
      const bool inside = y >= 0 && y < p.H;
      const int64_t lo = inside ? min(p.Wo, x >= 0 ? 0 : ceil_div(-x, p.stride[1])) : p.Wo;
      const int64_t hi = inside && x < p.W ? max(lo, min(p.Wo, ceil_div(p.W - x, p.stride[1]))) : lo;
      const float* from = image + y * p.x.h + x * p.x.w + k % p.Cx * p.x.c;
      float* to = a + r * p.Wo;
      int64_t i = lo;
      for (int64_t j = 0; j < lo; ++j) to[j] = 0.0f;
      if (step == 1)
        for (; i + kW <= hi; i += kW) Vec::load(from + i).store(to + i);
      if (step == 2)
        for (; i + kW < hi; i += kW) even_lanes(Vec::load(from + 2 * i), Vec::load(from + 2 * i + kW)).store(to + i);
      for (; i < hi; ++i) to[i] = from[i * step];
      for (int64_t j = hi; j < p.Wo; ++j) to[j] = 0.0f;
    }
}

// The mean over each of images [n, n + count): rows of pixels first, so that no sum is long.
void chain_mean(const ChainStep& s, int64_t n, int64_t count) {
  const SeparableConv& p = s.conv;
  for (; count > 0; --count, ++n)
    for_row(p.C, [&](int64_t c, int lanes) {
      const float* from = s.in + n * p.H * p.W * s.in_ld + c;
      Vec total = Vec::zero();
      for (int64_t y = 0; y < p.H; ++y) {
        Vec row = Vec::zero();
        for (int64_t x = 0; x < p.W; ++x, from += s.in_ld) row = row + load_some(from, lanes);
        total = total + row;
      }
      store_some(s.out + n * s.out_ld + c, total / Vec::set1(static_cast<float>(p.H * p.W)), lanes);
    });
}

// Rows that are filtered and multiplied together.
int64_t chain_strip(const ChainStep& s) { return s.expand ? min(s.rows, max<int64_t>(112 / s.conv.Wo, 1)) : s.rows; }

int64_t chain_scratch(const ChainStep& s) {
  if (s.kind == ChainKind::pointwise || s.kind == ChainKind::mean) return 0;
  const int64_t ld = chain_ld(s.conv.C), pixels = round_up<int64_t>(s.images * chain_strip(s) * s.conv.Wo, 16);
  if (s.kind == ChainKind::patches) return pixels * ld;
  const int64_t lines = (s.rows - 1) * s.conv.stride[0] + (s.conv.K[0] - 1) * s.conv.dilation[0] + 1;  // of x, for a part
  return ChainTable(s.conv, chain_strip(s)).floats() + pixels * ld + (s.expand ? lines * s.conv.W * ld : 0);
}

// Columns [begin, end) of `pixels` pixels of y, which with the residual points to the first one's column 0.
void chain_multiply(const ChainStep& s, const float* a, int64_t by_row, int64_t by_depth, int64_t pixels, int64_t begin,
                    int64_t end, float* y, int64_t ld, const float* residual) {
  const Activation g = s.conv.g;
  const bool after = g == Activation::silu, clamp = g == Activation::relu || g == Activation::relu6;
  const float low = clamp ? 0.0f : -INFINITY, high = g == Activation::relu6 ? 6.0f : INFINITY;
  chain_product(s, {a, by_row, by_depth, nullptr, after ? nullptr : residual, y, ld, s.residual_ld, low, high, false, false, 0},
                pixels, begin, end);
  if (after) chain_activate(g, pixels, end - begin, y + begin, ld, residual ? residual + begin : nullptr, s.residual_ld);
}

void chain_run(const ChainStep& s, int64_t part, float* scratch) {
  const SeparableConv& p = s.conv;
  const int64_t begin = part % s.column_parts * s.columns, end = min(begin + s.columns, p.J), strip = part / s.column_parts;
  const int64_t n = strip / s.row_parts * s.images, images = min(s.images, p.N - n);
  if (s.kind == ChainKind::mean) return chain_mean(s, n, images);
  const int64_t oh = strip % s.row_parts * s.rows, rows = min(s.rows, p.Ho - oh), ld = chain_ld(p.C);
  const int64_t first = (n * p.Ho + oh) * p.Wo, pixels = images * rows * p.Wo;
  float* y = s.out + first * s.out_ld;
  const float* residual = s.residual ? s.residual + first * s.residual_ld : nullptr;
  if (s.kind == ChainKind::pointwise)
    return chain_multiply(s, s.in + first * s.in_ld, s.in_ld, 1, pixels, begin, end, y, s.out_ld, residual);
  if (s.kind == ChainKind::patches) {
    const int64_t line = round_up<int64_t>(pixels, 16);
    for (int64_t i = 0; i < images; ++i) chain_patches(s, n + i, oh, rows, line, scratch + i * rows * p.Wo);
    return chain_multiply(s, scratch, 1, line, pixels, begin, end, y, s.out_ld, residual);
  }
  float* a = scratch + ChainTable(p, chain_strip(s)).floats();
  if (!s.expand) {
    for (int64_t i = 0; i < images; ++i)
      chain_hidden(s, s.in + (n + i) * p.H * p.W * s.in_ld, s.in_ld, oh, rows, scratch, a + i * rows * p.Wo * ld);
    return chain_multiply(s, a, ld, 1, pixels, begin, end, y, s.out_ld, residual);
  }
  // The lines of the expanded x that these rows see exist here alone.
  const ChainStep& e = *s.expand;
  const int64_t above = max<int64_t>(oh * p.stride[0] - p.pad[0], 0);
  const int64_t below = min((oh + rows - 1) * p.stride[0] - p.pad[0] + (p.K[0] - 1) * p.dilation[0] + 1, p.H);
  float* expanded = a + round_up<int64_t>(chain_strip(s) * p.Wo, 16) * ld;
  if (above < below)
    chain_multiply(e, e.in + (n * p.H + above) * p.W * e.in_ld, e.in_ld, 1, (below - above) * p.W, 0, p.C, expanded, ld,
                   nullptr);
  for (int64_t r = 0; r < rows; r += chain_strip(s)) {
    const int64_t count = min(chain_strip(s), rows - r);
    chain_hidden(s, expanded - above * p.W * ld, ld, oh + r, count, scratch, a);
    chain_multiply(s, a, ld, 1, count * p.Wo, 0, p.J, y + r * p.Wo * s.out_ld, s.out_ld,
                   residual ? residual + r * p.Wo * s.residual_ld : nullptr);
  }
}
