// The product of packed rows of x with panels of quantized weights; the equations are in quant_linear.h. Compiled once per ISA.
// Every regime runs the same tiles over the same segments: how many rows there are changes no bit of a row.
#include <math.h>

#include "core/simd/gemm.h"
#include "core/simd/rows.h"
#include "quant_linear/quant_linear_decode.h"
#include "quant_linear/quant_linear_dot.h"
#include "quant_linear/quant_linear_epilogue.h"
#include "quant_linear/quant_linear_few.h"
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

// True where few_tile() serves the problem: few rows, codes of 2 or 4 bits, one codebook at most.
template <class Dot>
bool in_registers([[maybe_unused]] const QuantLinear& p) {
#if MLC_IN_REGISTERS
  if (Dot::kPairs || p.M > kMostFew || (p.w.bits != 2 && p.w.bits != 4)) return false;
  return Dot::kInteger ? !p.w.codebook8 : p.w.table_rows >= p.w.N;
#else
  return false;
#endif
}

int tile_rows(const QuantLinear& p) {
  return with_dot(p, [&](auto dot) { return in_registers<decltype(dot)>(p) ? kFewRows : decltype(dot)::kRows; });
}
int panels(const QuantLinear& p) { return p.M == 1 ? kPanelsOfOne : kPanels; }

int64_t pack_scratch(const QuantLinear& p) { return p.w.K; }

// Decoded weights, bytes of one panel, sums of a run, sums over groups, factors of columns.
int64_t run_scratch(const QuantLinear& p, int64_t rows) {
  const int64_t columns = panels(p) * kPanelRows, decoded = p.int8 && p.w.ready() ? 0 : p.chunk;
  if (one_pass(p)) rows = min(rows, p.tile);
  return decoded * (p.int8 ? columns / 4 : columns + 4) + columns * (2 * rows + 1);
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

// The largest magnitude of a row, and 0, or NaN where an element is infinite or NaN.
struct PeakPair {
  Vec a, b;
  static PeakPair zero() { return {Vec::zero(), Vec::zero()}; }
};
inline PeakPair operator+(PeakPair x, PeakPair y) { return {max(x.a, y.a), x.b + y.b}; }
inline FloatPair sum(PeakPair v) { return {hmax(v.a), sum(v.b)}; }

// A row in 127ths of its largest element. Infinite and NaN rows get a NaN scale and so a NaN result, like no other row.
void quantize_row(const QuantLinear& p, const float* x, int64_t r, int8_t* q) {
  const int64_t next = p.dtype == Dtype::f32 ? p.x.stride : 0;  // x is asked for a row ahead
  const FloatPair peak = sum_row(p.w.K, [&](int64_t k, int n) {
    const Vec v = load_some(x + k, n);
    __builtin_prefetch(x + k + next, 0, 3);
    return PeakPair{magnitude(v), v * Vec::zero()};
  });
  const float amax = peak.a;
  const bool finite = peak.b == 0.0f, usable = finite && amax > 1e-35f;  // below, 127 / amax overflows: a row of zeros
  const float inverse = usable ? 127.0f / amax : 0.0f;
  p.row_scale[r] = finite ? (usable ? amax / 127.0f : 0.0f) : NAN;
  spread_groups(p.w, q, [&](int8_t* to, int64_t k, int64_t n) {
    constexpr float kMagic = 12582912.0f;  // 3 * 2^22: adding it rounds to whole numbers, half to even
    if (!usable) {
      memset(to, 0, static_cast<size_t>(n));
      return;
    }
    int64_t i = 0;
#if defined(MLC_ISA_AVX512) && !defined(MLC_EMULATE_AVX512)
    for (; i + 16 <= n; i += 16) {  // the conversion rounds likewise
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k + i), _mm512_set1_ps(inverse)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(whole));
    }
#endif
    for (; i < n; ++i) to[i] = static_cast<int8_t>(bits_of(x[k + i] * inverse + kMagic));
  });
}

// The sum of n bytes, n a multiple of 4. Zeros: at least 64 of them stand behind the bytes.
inline int32_t sum_bytes(const int8_t* q, int64_t n, [[maybe_unused]] bool zeros) {
  int64_t k = 0;
  int32_t total = 0;
#if defined(MLC_ISA_AVX512) || defined(MLC_ISA_AVX2)
  constexpr int64_t kBytes = 4 * Vec::W;
  IVec sums = IVec::set1(0);
  for (const int64_t end = zeros ? n : n - kBytes + 1; k < end; k += kBytes)
    sums = sums.plus(IVec::set1(0x01010101).maddubs(IVec::load(q + k)).madd(IVec::set1(0x00010001)));
  alignas(64) int32_t lanes[Vec::W];
  sums.store(lanes);
  for (int i = 0; i < Vec::W; ++i) total += lanes[i];
#endif
  for (; k < n; ++k) total += q[k];
  return total;
}

inline const float* as_floats(const float* x, int64_t, float*) { return x; }
template <class T>
const float* as_floats(const T* x, int64_t n, float* scratch) {
  for_row(n, [&](int64_t k, int some) { store_some(scratch + k, load_some(x + k, some), some); });
  return scratch;
}

template <class T>
void pack_tile(const QuantLinear& p, int64_t t, float* scratch) {
  const QuantWeight& w = p.w;
  const int64_t first = t * p.tile, rows = min(p.tile, p.rows - first), stride = row_bytes(p);
  for (int64_t i = 0; i < rows; ++i) {
    const float* x = as_floats(row<T>(p.x, p.row0 + first + i), w.K, scratch);
    if (!p.int8) {
      float* a = reinterpret_cast<float*>(p.a + first * stride) + i;
      for (int64_t g = 0, at = 0; at < w.K_padded; ++g, at += w.group_padded) {
        const int64_t k0 = g * w.group_size, n = min(w.group_size, w.K - k0), end = min(w.group_padded, w.K_padded - at);
        for (int64_t k = 0; k < n; ++k) a[(at + k) * rows] = x[k0 + k];
        for (int64_t k = n; k < end; ++k) a[(at + k) * rows] = 0;
      }
      continue;
    }
    int8_t* q = reinterpret_cast<int8_t*>(p.a + (first + i) * stride);
    quantize_row(p, x, first + i, q);
    memset(q + w.K_padded, 0, static_cast<size_t>(stride - w.K_padded));
    int32_t* sums = p.sums + first * p.runs + i;
    for (int64_t s = 0; s < p.segment_count; ++s) {
      const QuantSegment& part = p.segments[s];
      const int32_t total = sum_bytes(q + part.k, part.length, part.k + part.length == w.K_padded);
      int32_t& out = sums[part.run * rows];
      out = part.first ? total : out + total;
    }
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

// What an item works with: its rows and panels, and memory of its thread.
struct Item {
  int64_t panel_begin, panel_end, tile_begin, tile_end, columns;
  int64_t c_step;  // from a tile's sums to the next one's: 0 where one pass finishes them
  char* units = nullptr;
  uint8_t* bytes = nullptr;
  float* c = nullptr;          // (rows, columns)
  int32_t* partial = nullptr;  // (rows, columns)
  float* factor = nullptr;     // (columns), or null

  int64_t sums_of(int64_t tile) const { return (tile - tile_begin) * c_step; }
};

// Where the segments' weights stand for the rows of tile t, but for b.
template <class Dot>
Tile tile_of(const QuantLinear& p, const Item& item, const QuantSegment& part, int64_t t) {
  const QuantWeight& w = p.w;
  const int64_t first = t * p.tile, rows = min(p.tile, p.rows - first), stride = row_bytes(p);
  const int64_t at = (item.panel_begin * w.groups + part.group) * kPanelRows, c = item.sums_of(t);
  constexpr int64_t kPer = Dot::kInteger ? 4 : 1;  // codes a unit has
  const bool fresh = Dot::kInteger ? part.run == 0 : part.k == 0;
  Tile tile{};
  tile.a = p.a + first * stride + part.k * (Dot::kInteger ? 1 : 4 * rows), tile.a_stride = stride;
  tile.units = part.length / kPer;
  tile.c = item.c + c, tile.partial = item.partial + c, tile.ldc = item.columns;
  tile.scales = w.scales + at, tile.zeros = w.zeros ? w.zeros + at : nullptr, tile.scale_stride = w.groups * kPanelRows;
  tile.offset = w.offset, tile.sums = p.sums + first * p.runs + part.run * rows;
  tile.first = part.first, tile.last = part.last, tile.fresh = fresh;
  return tile;
}

// y of tile t's rows.
void finish_tile(const QuantLinear& p, const Item& item, int64_t t) {
  const int64_t n0 = item.panel_begin * kPanelRows, width = min(item.columns, p.w.N - n0), end = min((t + 1) * p.tile, p.rows);
  const float* c = item.c + item.sums_of(t);
  with_type(p.dtype, [&](auto type) {
    for (int64_t r = t * p.tile; r < end; ++r, c += item.columns)
      finish_row<decltype(type)>(p, p.row0 + r, n0, width, c, item.factor);
  });
}

#if MLC_IN_REGISTERS
template <class Dot>
void run_few(const QuantLinear& p, const Item& item) {
  const QuantWeight& w = p.w;
  const __m512 table = value_table(w, 0);
  const int64_t panels = item.panel_end - item.panel_begin;
  for (int64_t i = item.tile_begin; i < item.tile_end; ++i) {
    for (int64_t s = 0; s < p.segment_count; ++s) {
      const QuantSegment& part = p.segments[s];
      const int rows = static_cast<int>(min(p.tile, p.rows - i * p.tile));
      Tile t = tile_of<Dot>(p, item, part, i);
      t.b = reinterpret_cast<const char*>(w.panel(item.panel_begin)) + part.k * 2 * w.bits, t.b_stride = w.panel_bytes;
      t.units = part.length / 4;
      w.bits == 4 ? any_few_tile<Dot, 2>(rows, panels, t, table) : any_few_tile<Dot, 4>(rows, panels, t, table);
    }
    finish_tile(p, item, i);
  }
}
#endif

// Lines that are asked for while something else is multiplied: a few before each tile.
struct Ahead {
  const uint8_t* codes;  // of the first panel, at the next chunk
  int64_t stride, panels, lines, each;

  Ahead(const QuantWeight& w, const Item& item, int64_t k, int64_t length) : stride(w.panel_bytes) {
    const int64_t next = k + length < w.K_padded ? k + length : 0;
    const int64_t panel = next ? item.panel_begin : item.panel_end;  // the next chunk, or the next panels
    panels = min(item.panel_end - item.panel_begin, w.panels - panel);
    codes = w.panel(panel) + next * 2 * w.bits, lines = min(length, w.K_padded - next) * 2 * w.bits / kUnit;
    each = ceil_div(lines, item.tile_end - item.tile_begin);
  }
  void fetch(int64_t tile) const {
    const int64_t end = min((tile + 1) * each, lines);
    for (int64_t j = 0; j < panels; ++j)
      for (int64_t line = tile * each; line < end; ++line) __builtin_prefetch(codes + j * stride + line * kUnit, 0, 2);
  }
};

template <class Dot>
void run_many(const QuantLinear& p, const Item& item) {
  const int64_t count = item.panel_end - item.panel_begin, chunk = p.chunk;
  const bool decoded = !Dot::kInteger || !p.w.ready();  // else the cores' own prefetching does better: 5 to 10 %
  for (int64_t s = 0, e; s < p.segment_count; s = e) {
    const int64_t k = p.segments[s].k;
    for (e = s + 1; e < p.segment_count && p.segments[e].k + p.segments[e].length - k <= chunk;) ++e;
    const int64_t length = p.segments[e - 1].k + p.segments[e - 1].length - k;
    int64_t stride;
    const char* b = decode<Dot>(p, s, e, item.panel_begin, item.panel_end, item.units, item.bytes, &stride);
    const Ahead ahead(p.w, item, k, length);
    for (int64_t t = item.tile_begin; t < item.tile_end; ++t) {
      if (decoded) ahead.fetch(t - item.tile_begin);
      if (decoded && t + 1 < item.tile_end) {  // its part of x begins a new stretch of memory
        const char* a = tile_of<Dot>(p, item, p.segments[s], t + 1).a;
        const int64_t bytes = length * min(p.tile, p.rows - (t + 1) * p.tile) * (Dot::kInteger ? 1 : 4);
        for (int64_t line = 0; line < bytes; line += kUnit) __builtin_prefetch(a + line, 0, 3);
      }
      for (int64_t i = s; i < e; ++i) {
        Tile part = tile_of<Dot>(p, item, p.segments[i], t);
        part.b = b + (p.segments[i].k - k) / (Dot::kInteger ? 4 : 1) * kUnit, part.b_stride = stride;
        multiply<Dot>(static_cast<int>(min(p.tile, p.rows - t * p.tile)), count, part);
      }
      if (e == p.segment_count) finish_tile(p, item, t);
    }
  }
}

template <class Dot>
void run_panels(const QuantLinear& p, const Item& item) {
#if MLC_IN_REGISTERS
  if constexpr (!Dot::kPairs)
    if (in_registers<Dot>(p)) return run_few<Dot>(p, item);
#endif
  run_many<Dot>(p, item);
}

template <class Dot>
void run_item(const QuantLinear& p, int64_t panel_begin, int64_t panel_end, int64_t tile_begin, int64_t tile_end,
              float* scratch) {
  const QuantWeight& w = p.w;
  const int64_t own = min(tile_end * p.tile, p.rows) - tile_begin * p.tile, rows = one_pass(p) ? min(own, p.tile) : own;
  Item item{panel_begin, panel_end, tile_begin, tile_end, (panel_end - panel_begin) * kPanelRows, 0};
  if (!one_pass(p)) item.c_step = p.tile * item.columns;
  item.c = scratch, item.partial = reinterpret_cast<int32_t*>(item.c + rows * item.columns);
  scratch = item.c + 2 * rows * item.columns;
  if (p.table_scale) {
    item.factor = scratch, scratch += item.columns;
    for (int64_t i = 0; i < item.columns; ++i) item.factor[i] = p.table_scale[w.table(panel_begin * kPanelRows + i) >> w.bits];
  }
  item.bytes = reinterpret_cast<uint8_t*>(scratch);
  item.units = reinterpret_cast<char*>(scratch + (p.int8 ? 0 : 4 * p.chunk));
  if (p.segment_count > 0) return run_panels<Dot>(p, item);
  memset(item.c, 0, sizeof(float) * static_cast<size_t>(rows * item.columns));
  for (int64_t t = tile_begin; t < tile_end; ++t) finish_tile(p, item, t);
}

// Panels in turn, `panels(p)` at a time.
void run(const QuantLinear& p, int64_t panel_begin, int64_t panel_end, int64_t tile_begin, int64_t tile_end, float* scratch) {
  const int64_t step = panels(p);
  with_dot(p, [&](auto dot) {
    for (int64_t panel = panel_begin; panel < panel_end; panel += step)
      run_item<decltype(dot)>(p, panel, min(panel + step, panel_end), tile_begin, tile_end, scratch);
  });
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
