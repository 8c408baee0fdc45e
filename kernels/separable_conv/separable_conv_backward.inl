// The backward of the product over strips of rows, a part of separable_conv_cpu.inl: dz, a and da exist for one strip alone.

struct BackwardScratch {
  float *table, *dz, *h, *a, *da;  // dz: (ceil(J/64), pixels, 64), the others (pixels, 64)
};
int64_t backward_scratch(const SeparableBackward& b) {
  return table_floats(b.conv) + b.conv.strip * b.conv.Wo * (round_up(b.conv.J, kBlock) + 3 * kBlock);
}
BackwardScratch cut_backward(const SeparableBackward& b, float* scratch) {
  const int64_t floats = b.conv.strip * b.conv.Wo * kBlock;
  float* dz = scratch + table_floats(b.conv);
  float* h = dz + floats * ceil_div(b.conv.J, kBlock);
  return {scratch, dz, h, h + floats, h + 2 * floats};
}

// c (M, width) += A b for `width` columns, a multiple of 32; both b and, by RS and KS, A have blocks of 64 floats a row.
template <int RS, int KS>
void add_product(int64_t M, int64_t K, const float* a, const float* b, int64_t width, float* c, int64_t ldc) {
  int64_t n = 0;
  for (; n + kPanel <= width; n += kPanel)
    gemm_panel<kPanelVecs, RS, KS, true>(static_cast<int>(M), K, a, b + n, kBlock, c + n, ldc);
  if constexpr (kPanel > 32)
    if (n < width) gemm_panel<kPanelVecs / 2, RS, KS, true>(static_cast<int>(M), K, a, b + n, kBlock, c + n, ldc);
}

template <class T>
T* pixel_of(const Pixels& t, int64_t n, int64_t row, int64_t column) {
  return static_cast<T*>(t.data) + n * t.n + row * t.h + column * t.w;
}

template <class T>
void make_dz(const SeparableBackward& b, int64_t n, int64_t oh, int64_t pixels, float* dz) {
  const SeparableConv& p = b.conv;
  with_activation(b.conv.g, [&](auto g) {
    for (int64_t i = 0; i < pixels; ++i) {
      const T* dy = pixel_of<const T>(b.dy, n, oh + i / p.Wo, i % p.Wo);
      const T* z = b.z.data ? pixel_of<const T>(b.z, n, oh + i / p.Wo, i % p.Wo) : nullptr;
      for_row(p.J, [&](int64_t j, int m) {
        Vec d = load_some(dy + j, m);
        if (z) {
          const auto vector = [&](const float* v) { return load_some(v + j, m); };
          const Vec x = load_some(z + j, m), scale = vector(b.scale);
          d = fma(scale, g.through(d, fma(scale, x, vector(b.shift))), fma(vector(b.by_z), x, vector(b.constant)));
        }
        store_some(dz + (j / kBlock * pixels + i) * kBlock + j % kBlock, d, m);
      });
    }
  });
}

// h of channels [c, c + channels), and a in `a`; returns where a is: h itself where it is the same.
template <class T>
const float* make_a(const SeparableConv& p, int64_t n, int64_t oh, int64_t rows, int64_t c, int64_t channels,
                    const float* shared, const BackwardScratch& s) {
  const int64_t pixels = rows * p.Wo;
  if (in_place(p)) {
    for (int64_t i = 0; i < pixels; ++i) {
      const T* x = pixel_of<const T>(p.x, n, oh + i / p.Wo, i % p.Wo) + c;
      for_row(channels, [&](int64_t j, int m) { store_some(s.h + i * kBlock + j, load_some(x + j, m), m); });
    }
  } else {
    make_hidden<T, kBlock>(p, rows, c, channels, shared, s.table, nullptr, s.h);
  }
  if (channels % 32)  // columns that are multiplied as well
    for (int64_t i = 0; i < pixels; ++i)
      for (int64_t j = channels; j < round_up<int64_t>(channels, 32); ++j) s.h[i * kBlock + j] = s.a[i * kBlock + j] = 0.0f;
  if (!p.scale && !p.shift && p.f == Activation::none) return s.h;
  with_activation(p.f, [&](auto f) {
    for_row(channels, [&](int64_t j, int m) {
      const Affine affine(p, c + j, m);
      for (int64_t i = 0; i < pixels; ++i) store_some(s.a + i * kBlock + j, f(affine(load_some(s.h + i * kBlock + j, m))), m);
    });
  });
  return s.a;
}

// e, or d without a norm, of V vectors of channels from c on (m lanes where V is 1), and the strip's sums; h and da point to
// channel c.
template <class T, int V, class F>
void finish_strip(const SeparableBackward& b, F f, int64_t n, int64_t oh, int64_t pixels, int64_t c, int m, const float* h,
                  const float* da, float* partial) {
  const SeparableConv& p = b.conv;
  Vec scale[V], shift[V], mean[V], first[V], second[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const Affine affine(p, c + v * kW, m);
    scale[v] = affine.scale, shift[v] = affine.shift, first[v] = second[v] = Vec::zero();
    mean[v] = p.mean ? load_some(p.mean + c + v * kW, m) : Vec::zero();
  }
  for (int64_t i = 0; i < pixels; ++i) {
    T* to = pixel_of<T>(p.a, n, oh + i / p.Wo, i % p.Wo) + c;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const Vec x = Vec::load(h + i * kBlock + v * kW);
      const Vec e = f.through(Vec::load(da + i * kBlock + v * kW), fma(scale[v], x, shift[v]));
      first[v] = first[v] + e, second[v] = fma(e, x - mean[v], second[v]);
      store_some(to + v * kW, b.writes_e ? e : scale[v] * e, m);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store_some(partial + v * kW, first[v], m), store_some(partial + p.C + v * kW, second[v], m);
}

template <class T>
void backward_strip(const SeparableBackward& b, int64_t strip, const float* shared, const BackwardScratch& s, float* dw) {
  const SeparableConv& p = b.conv;
  const int64_t n = strip / p.strips(), oh = strip % p.strips() * p.strip, rows = min(p.strip, p.Ho - oh);
  const int64_t pixels = rows * p.Wo, columns = b.columns();
  make_dz<T>(b, n, oh, pixels, s.dz);
  if (!in_place(p)) point_to_strip<T>(p, n, oh, rows, shared, s.table);
  for (int64_t c = 0; c < p.C; c += kBlock) {
    const int64_t channels = min(kBlock, p.C - c), width = min(kBlock, columns - c);
    const float* a = make_a<T>(p, n, oh, rows, c, channels, shared, s);
    memset(s.da, 0, sizeof(float) * static_cast<size_t>(pixels * kBlock));
    for (int64_t j = 0; j < p.J; j += kBlock) {
      const int64_t depth = min(kBlock, p.J - j);
      const float* dz = s.dz + j * pixels;
      add_product<1, kBlock>(depth, pixels, dz, a, width, dw + j * columns + c, columns);
      add_product<kBlock, 1>(pixels, depth, dz, b.weights + (c / kBlock * p.J + j) * kBlock, width, s.da, kBlock);
    }
    with_activation(p.f, [&](auto f) {
      float* partial = p.partial + strip * 3 * p.C + c;
      int64_t j = 0;
      if constexpr (sizeof(T) == 4)
        for (; kTiles && j + kPanel <= channels; j += kPanel)
          finish_strip<T, kVecs>(b, f, n, oh, pixels, c + j, kW, s.h + j, s.da + j, partial + j);
      for_row(channels - j, [&](int64_t k, int m) {
        finish_strip<T, 1>(b, f, n, oh, pixels, c + j + k, m, s.h + j + k, s.da + j + k, partial + j + k);
      });
    });
  }
}

void run_backward(const SeparableBackward& b, int64_t part, const float* shared, float* scratch) {
  const int64_t strips = b.conv.N * b.conv.strips();
  const BackwardScratch s = cut_backward(b, scratch);
  float* dw = b.partial + part * b.conv.J * b.columns();
  memset(dw, 0, sizeof(float) * static_cast<size_t>(b.conv.J * b.columns()));
  for (int64_t i = strips * part / b.parts; i < strips * (part + 1) / b.parts; ++i)
    with_type(b.conv.dtype, [&](auto t) { backward_strip<decltype(t)>(b, i, shared, s, dw); });
}

void pack_blocks(const float* matrix, int64_t C, int64_t begin, int64_t end, float* blocks) {
  for (int64_t j = begin; j < end; j += kBlock)
    pack_transposed(matrix + j * C, C, static_cast<int>(min(kBlock, end - j)), C, OneScale{1.0f}, kBlock, kBlock,
                    blocks + j * round_up(C, kBlock));
}
