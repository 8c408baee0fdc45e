// The product of packed rows of x with panels of quantized weights; the equations are in quant_linear.h. Compiled once per ISA.
// Every regime runs the same tiles over the same segments: how many rows there are changes no bit of a row.
#include <math.h>

#include "core/simd/gemm.h"
#include "core/simd/rows.h"
#include "quant_linear/quant_linear_decode.h"
#include "quant_linear/quant_linear_dot.h"
#include "quant_linear/quant_linear_epilogue.h"
#include "quant_linear/quant_linear_kernels.h"

namespace mlcore::MLC_ISA {
namespace {

// Panels an item takes: four of 16 columns fill AVX-512's registers with 6 rows of accumulators; a single row takes eight, as
// four accumulators don't hide the latency of its chain.
#if defined(MLC_ISA_AVX512)
constexpr int kPanels = 4, kPanelsOfOne = 8;
#elif defined(MLC_ISA_AVX2)
constexpr int kPanels = 1, kPanelsOfOne = 4;
#else
constexpr int kPanels = 1, kPanelsOfOne = 1;
#endif

// body(Dot{}): the product that serves the problem.
template <class F>
inline auto with_dot(const QuantLinear& p, F&& body) {
  if (!p.int8) return body(FloatDot{});
#if defined(MLC_ISA_AVX512) && !defined(MLC_EMULATE_AVX512)
  if (p.vnni) return body(VnniDot{});
#endif
  if (p.w.bits < 8 && !p.w.codebook8) return body(NarrowDot{});
  return body(WideDot{});
}

int tile_rows(const QuantLinear& p) {
  return with_dot(p, [](auto dot) { return decltype(dot)::kRows; });
}
int panels(const QuantLinear& p) { return p.M == 1 ? kPanelsOfOne : kPanels; }

int64_t pack_scratch(const QuantLinear& p) { return p.w.K + p.w.K_padded / 4 + 64; }

int64_t chunk_of(const QuantLinear& p) { return p.int8 ? kIntChunk : kFloatChunk; }

// Decoded weights, bytes of one panel, sums of a run, sums over groups, factors of columns.
int64_t run_scratch(const QuantLinear& p, int64_t rows) {
  const int64_t columns = panels(p) * kPanelRows, chunk = chunk_of(p);
  return columns * chunk / (p.int8 ? 4 : 1) + chunk * 4 + columns * (2 * rows + 1);
}

// to[g * group_padded + i] = from(g * group_size + i), zeros between: copy(to, k, n) copies n elements from k on.
template <class T, class F>
inline void spread_groups(const QuantWeight& w, T* to, F&& copy) {
  const bool dense = w.group_size == w.group_padded || w.groups == 1;
  const int64_t step = dense ? w.K : w.group_size, padded = dense ? w.K_padded : w.group_padded;
  for (int64_t k = 0, at = 0; k < w.K; k += step, at += padded) {
    const int64_t n = min(step, w.K - k), end = min(at + padded, w.K_padded);
    copy(to + at, k, n);
    for (int64_t i = at + n; i < end; ++i) to[i] = 0;
  }
}

// A row in 127ths of its largest element. Infinite and NaN rows get a NaN scale and so a NaN result, like no other row.
void quantize_row(const QuantLinear& p, const float* x, int64_t r, int8_t* q) {
  const int64_t K = p.w.K;
  Vec peak = Vec::zero(), suspect = Vec::zero();
  for_row(K, [&](int64_t k, int n) {
    const Vec v = load_some(x + k, n);
    peak = max(peak, magnitude(v));
    suspect = fma(v, Vec::zero(), suspect);
  });
  const float amax = hmax(peak);
  const bool finite = sum(suspect) == 0.0f, usable = finite && amax > 1e-35f;  // below, 127 / amax overflows: a row of zeros
  const float inverse = usable ? 127.0f / amax : 0.0f;
  p.row_scale[r] = finite ? (usable ? amax / 127.0f : 0.0f) : NAN;
  spread_groups(p.w, q, [&](int8_t* to, int64_t k, int64_t n) {
    constexpr float kMagic = 12582912.0f;  // 3 * 2^22: adding it rounds to whole numbers, half to even
    if (!usable) {
      memset(to, 0, static_cast<size_t>(n));
      return;
    }
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<int8_t>(bits_of(x[k + i] * inverse + kMagic));
  });
}

template <class T>
void pack_tile(const QuantLinear& p, int64_t t, float* scratch) {
  const QuantWeight& w = p.w;
  const int64_t first = t * p.tile, rows = min(p.tile, p.rows - first);
  int8_t* q = reinterpret_cast<int8_t*>(scratch + w.K);
  uint32_t* a = reinterpret_cast<uint32_t*>(p.a) + first * (p.int8 ? w.K_padded / 4 : w.K_padded);
  for (int64_t i = 0; i < rows; ++i) {
    const T* x = row<T>(p.x, p.row0 + first + i);
    for_row(w.K, [&](int64_t k, int n) { load_some(x + k, n).store_n(scratch + k, n); });
    if (!p.int8) {
      for (int64_t g = 0, at = 0; at < w.K_padded; ++g, at += w.group_padded) {
        const int64_t k0 = g * w.group_size, n = min(w.group_size, w.K - k0), end = min(w.group_padded, w.K_padded - at);
        for (int64_t k = 0; k < n; ++k) a[(at + k) * rows + i] = bits_of(scratch[k0 + k]);
        for (int64_t k = n; k < end; ++k) a[(at + k) * rows + i] = 0;
      }
      continue;
    }
    quantize_row(p, scratch, first + i, q);
    int32_t* sums = p.sums + first * p.runs + i;
    for (int64_t s = 0; s < p.segment_count; ++s) {
      const QuantSegment& part = p.segments[s];
      int32_t total = 0;
      for (int64_t k = part.k; k < part.k + part.length; ++k) total += q[k];
      int32_t& out = sums[part.run * rows];
      out = part.first ? total : out + total;
    }
    for (int64_t u = 0; u < w.K_padded / 4; ++u) memcpy(a + u * rows + i, q + 4 * u, 4);
  }
}

void pack(const QuantLinear& p, int64_t t, float* scratch) {
  with_type(p.dtype, [&](auto type) { pack_tile<decltype(type)>(p, t, scratch); });
}

// The weights of segments [s, e) for panels [begin, end) as units: where they are, and how far panels are apart.
template <class Dot>
const char* decode(const QuantLinear& p, int64_t s, int64_t e, int64_t begin, int64_t end, char* units, uint8_t* bytes,
                   int64_t* stride) {
  const QuantWeight& w = p.w;
  const int64_t k = p.segments[s].k, length = p.segments[e - 1].k + p.segments[e - 1].length - k;
  if (Dot::kInteger && w.bits == 8 && !w.codebook8) {
    *stride = w.panel_bytes;
    return reinterpret_cast<const char*>(w.panel(begin)) + k * kPanelRows;
  }
  *stride = length * (Dot::kInteger ? kPanelRows : kUnit);
  for (int64_t panel = begin; panel < end; ++panel) {
    char* out = units + (panel - begin) * *stride;
    if constexpr (Dot::kInteger) {
      decode_bytes(w, panel, k, length, reinterpret_cast<uint8_t*>(out));
    } else {
      for (int64_t i = s; i < e; ++i) {
        const QuantSegment& part = p.segments[i];
        decode_floats(w, panel, part.k, part.length, part.group, bytes, reinterpret_cast<float*>(out + (part.k - k) * kUnit));
      }
    }
  }
  return units;
}

template <class Dot>
void multiply(int rows, int64_t panels, const Tile& t) {
  if (panels == kPanels) return any_tile<Dot, kPanels>(rows, t);
  if (rows == 1 && panels == kPanelsOfOne) return tile<Dot, 1, kPanelsOfOne>(t);
  Tile one = t;
  for (int64_t n = 0; n < panels; ++n) {
    any_tile<Dot, 1>(rows, one);
    one.b += t.b_stride, one.c += kPanelRows, one.partial += kPanelRows, one.scales += t.scale_stride;
    if (t.zeros) one.zeros += t.scale_stride;
  }
}

template <class Dot>
void run_item(const QuantLinear& p, int64_t panel_begin, int64_t panel_end, int64_t tile_begin, int64_t tile_end,
              float* scratch) {
  const QuantWeight& w = p.w;
  const int64_t count = panel_end - panel_begin, columns = count * kPanelRows, chunk = chunk_of(p);
  const int64_t row_begin = tile_begin * p.tile, row_end = min(tile_end * p.tile, p.rows);
  char* units = reinterpret_cast<char*>(scratch);
  scratch += panels(p) * kPanelRows * chunk / (p.int8 ? 4 : 1);
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch);
  scratch += chunk * 4;
  float* c = scratch;  // (rows, columns)
  int32_t* partial = reinterpret_cast<int32_t*>(c + (row_end - row_begin) * columns);
  float* factor = c + 2 * (row_end - row_begin) * columns;  // (columns)
  memset(c, 0, sizeof(float) * static_cast<size_t>((row_end - row_begin) * columns));
  for (int64_t s = 0, e; s < p.segment_count; s = e) {
    const int64_t k = p.segments[s].k;
    for (e = s + 1; e < p.segment_count && p.segments[e].k + p.segments[e].length - k <= chunk;) ++e;
    int64_t stride;
    const char* b = decode<Dot>(p, s, e, panel_begin, panel_end, units, bytes, &stride);
    for (int64_t t = tile_begin; t < tile_end; ++t) {
      const int64_t first = t * p.tile, rows = min(p.tile, p.rows - first);
      const char* a = p.a + first * (Dot::kInteger ? w.K_padded : 4 * w.K_padded);
      for (int64_t i = s; i < e; ++i) {
        const QuantSegment& part = p.segments[i];
        constexpr int64_t kPer = Dot::kInteger ? 4 : 1;  // codes a unit has
        const int64_t at = (panel_begin * w.groups + part.group) * kPanelRows, c_at = (first - row_begin) * columns;
        multiply<Dot>(static_cast<int>(rows), count,
                      {a + part.k / kPer * rows * 4, b + (part.k - k) / kPer * kUnit, stride, part.length / kPer, c + c_at,
                       partial + c_at, columns, w.scales + at, w.zeros ? w.zeros + at : nullptr, w.groups * kPanelRows,
                       w.offset, p.sums + first * p.runs + part.run * rows, part.first, part.last});
      }
    }
  }
  if (p.table_scale && p.int8)
    for (int64_t i = 0; i < columns; ++i) factor[i] = p.table_scale[w.table(panel_begin * kPanelRows + i) >> w.bits];
  const int64_t n0 = panel_begin * kPanelRows, width = min(columns, w.N - n0);
  with_type(p.dtype, [&](auto type) {
    for (int64_t r = row_begin; r < row_end; ++r)
      finish_row<decltype(type)>(p, p.row0 + r, n0, width, c + (r - row_begin) * columns,
                                 p.table_scale && p.int8 ? factor : nullptr);
  });
}

void run(const QuantLinear& p, int64_t panel_begin, int64_t panel_end, int64_t tile_begin, int64_t tile_end, float* scratch) {
  with_dot(p, [&](auto dot) { run_item<decltype(dot)>(p, panel_begin, panel_end, tile_begin, tile_end, scratch); });
}

void dequantize(const QuantLinear& p, int64_t panel, float* scratch) {
  const QuantWeight& w = p.w;
  float* values = scratch;  // (kFloatChunk, 16)
  uint8_t* bytes = reinterpret_cast<uint8_t*>(scratch + kFloatChunk * kPanelRows);
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t s = 0; s < p.segment_count; ++s) {
      const QuantSegment& part = p.segments[s];
      decode_floats(w, panel, part.k, part.length, part.group, bytes, values);
      const float* scales = w.scales + (panel * w.groups + part.group) * kPanelRows;
      const int64_t inside = part.k - part.group * w.group_padded, k = part.group * w.group_size + inside;
      const int64_t length = min(part.length, min(w.group_size - inside, w.K - k));  // the rest is padding
      for (int64_t n = 0; n < min<int64_t>(kPanelRows, w.N - panel * kPanelRows); ++n) {
        T* out = row<T>(p.y, panel * kPanelRows + n) + k;
        for (int64_t i = 0; i < length; ++i) out[i] = from_float<T>(values[i * kPanelRows + n] * scales[n]);
      }
    }
  });
}

}  // namespace

extern const QuantLinearKernels quant_linear_kernels = {tile_rows, panels, pack_scratch, run_scratch, pack, run, dequantize};

}  // namespace mlcore::MLC_ISA
