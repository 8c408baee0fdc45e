// Validates, cuts K into segments and the product into items. The contract is quant_linear.h, the arithmetic
// quant_linear_cpu.inl.
#include "quant_linear/quant_linear.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/pages.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "quant_linear/quant_linear_kernels.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "quant_linear";
// Bytes of x packed at a time, which every 64 columns read again: integers keep them in the L2 (from the L3, 4096 x 4096 by 512
// rows takes a quarter longer), floats do four times the work a byte and would decode too often.
constexpr int64_t kPackedFloats = 8 << 20, kPackedIntegers = 768 << 10;
constexpr int64_t kRowsAtOnce = 480;  // rows whose 64 columns of sums (123 KB) stay in the L2 beside the decoded weights
constexpr int64_t kGrain = 1 << 12;   // words of packed x that an item should make at least
// Strips of rows, each packed and multiplied by one thread (by_strips): where the weights stay in a thread's L2, and rows
// enough to read them from there 48 times.
constexpr int64_t kStripWeights = 1 << 20, kStripRows = 48;
thread_local Scratch shared_scratch;  // of the calling thread; its workers get slices

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Packed {
  QuantWeight w{};
  std::vector<uint8_t> codebook8;
  std::vector<float> table_scale;

  Packed(int64_t N, int64_t K, const DLTensor* codes_, const DLTensor* scales_, const DLTensor* zeros_,
         const DLTensor* codebook_, int64_t bits, int64_t offset, int64_t group_size) {
    const Tensor codes(codes_, kOp, "codes"), scales(scales_, kOp, "scales"), zeros(zeros_, kOp, "zeros"),
        codebook(codebook_, kOp, "codebook");
    require(bits >= 1 && bits <= 8, kOp, ": bits must be 1 to 8; got ", bits);
    require(offset >= 0 && offset <= 255, kOp, ": offset must be 0 to 255; got ", offset);
    require(group_size >= 1, kOp, ": group_size must be at least 1; got ", group_size);
    group_size = std::clamp<int64_t>(group_size, 1, std::max<int64_t>(K, 1));
    w.N = N, w.K = K, w.bits = static_cast<int>(bits), w.offset = static_cast<int>(offset), w.group_size = group_size;
    w.block = static_cast<int>(32 / (bits & -bits));
    w.groups = ceil_div(K, group_size), w.panels = ceil_div(N, kPanelRows);
    w.group_padded = ceil_div(group_size, w.block) * w.block;
    w.K_padded =
        w.groups == 0 ? 0 : (w.groups - 1) * w.group_padded + ceil_div(K - (w.groups - 1) * group_size, w.block) * w.block;
    w.panel_bytes = w.K_padded * kPanelRows * bits / 8;
    codes.on(kDLCPU).dtype_in({Dtype::u8}).shape_is({w.panels, w.panel_bytes}, "(P, panel bytes)").contiguous();
    scales.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({w.panels, w.groups, kPanelRows}, "(P, G, 16)").contiguous();
    w.codes = codes.data<uint8_t>(), w.scales = scales.data<float>();
    if (zeros.present()) {
      zeros.on(kDLCPU).dtype_in({Dtype::u8}).shape_is({w.panels, w.groups, kPanelRows}, "(P, G, 16)").contiguous();
      w.zeros = zeros.data<uint8_t>();
    }
    w.table_rows = std::max<int64_t>(N, 1);
    if (!codebook.present()) return;
    codebook.on(kDLCPU).dtype_in({Dtype::f32}).rank_is(2, "(T, 2^bits)");
    codebook.shape_is({codebook.size(0), int64_t{1} << bits}, "(T, 2^bits)").contiguous();
    const int64_t T = codebook.size(0);
    require(T >= 1 && T <= std::max<int64_t>(N, 1), kOp, ": codebook must have 1 to N tables; got ", T);
    require(!zeros.present(), kOp, ": zeros and codebook exclude each other");
    w.codebook = codebook.data<float>(), w.table_rows = ceil_div(std::max<int64_t>(N, 1), T);
  }

  // The codebooks of the integer mode.
  void round_codebook() {
    if (!w.codebook) return;
    const int64_t E = int64_t{1} << w.bits, T = ceil_div(std::max<int64_t>(w.N, 1), w.table_rows);
    codebook8.resize(T * E), table_scale.resize(T);
    for (int64_t t = 0; t < T; ++t) {
      const float* table = w.codebook + t * E;
      float peak = 0;
      for (int64_t e = 0; e < E; ++e) peak = std::max(peak, std::fabs(table[e]));
      table_scale[t] = peak / 127.0f;
      for (int64_t e = 0; e < E; ++e)
        codebook8[t * E + e] = static_cast<uint8_t>(128 + (peak > 0 ? std::lrint(table[e] / peak * 127.0f) : 0));
    }
    w.codebook8 = codebook8.data(), w.offset = 128;
  }
};

// K cut at groups, at runs within them, and at chunks, which stand at multiples of `chunk` codes of the run.
std::vector<QuantSegment> segments_of(const QuantWeight& w, int64_t chunk, bool int8, int64_t* runs) {
  std::vector<QuantSegment> segments;
  *runs = 0;
  for (int64_t g = 0; g < w.groups; ++g) {
    const int64_t begin = g * w.group_padded, end = std::min(begin + w.group_padded, w.K_padded);
    for (int64_t run = begin; run < end; run += kRun, ++*runs) {
      const int64_t run_end = std::min(run + kRun, end);
      for (int64_t k = run; k < run_end; k += chunk) {
        const int64_t length = std::min(chunk, run_end - k);
        segments.push_back({k, length, g, *runs, !int8 || k == run, !int8 || k + length == run_end});
      }
    }
  }
  return segments;
}

template <class F>
void for_items(int64_t items, int64_t floats, float* scratch, F&& body) {
  parallel_claim(items, num_threads(), [&](int64_t i, int thread) { body(i, scratch + thread * floats); });
}

int64_t aligned(int64_t floats) { return ceil_div(floats, 16) * 16; }

// Integer codes that lie ready in the L2: a thread packs a strip of x and multiplies it by all of W, without waiting for
// others.
bool takes_strips(const QuantLinear& p) {
  return p.int8 && p.w.ready() && p.w.panels * p.w.panel_bytes <= kStripWeights && p.M >= 2 * p.tile * num_threads();
}

void by_strips(const QuantLinear& p, const QuantLinearKernels& kernels, int64_t row_floats) {
  const int64_t threads = num_threads(), turns = ceil_div(p.M, threads * kStripRows);
  const int64_t rows = ceil_div(ceil_div(p.M, threads * turns), p.tile) * p.tile, tiles = rows / p.tile;
  const int64_t a_floats = aligned(rows * row_floats), sum_floats = aligned(rows * p.runs);
  const int64_t work = aligned(std::max(kernels.pack_scratch(p), kernels.run_scratch(p, rows)));
  const int64_t private_floats = a_floats + sum_floats + aligned(rows) + work;
  float* scratch = shared_scratch.floats(static_cast<size_t>(threads * private_floats));
  for_items(ceil_div(p.M, rows), private_floats, scratch, [&](int64_t i, float* s) {
    QuantLinear strip = p;
    strip.row0 = i * rows, strip.rows = std::min(rows, p.M - strip.row0);
    strip.a = reinterpret_cast<char*>(s), strip.sums = reinterpret_cast<int32_t*>(s + a_floats);
    strip.row_scale = s + a_floats + sum_floats;
    float* own = strip.row_scale + aligned(rows);
    const int64_t now = std::min(tiles, ceil_div(strip.rows, p.tile));
    for (int64_t t = 0; t < now; ++t) kernels.pack(strip, t, own);
    kernels.run(strip, 0, p.w.panels, 0, now, own);
  });
}

void fwd(const DLTensor* x_, const DLTensor* codes, const DLTensor* scales, const DLTensor* zeros, const DLTensor* codebook,
         const DLTensor* bias_, const DLTensor* residual_, int64_t bits, int64_t offset, int64_t group_size, int64_t activation,
         int64_t int8, DLTensor* y_) {
  const Tensor x(x_, kOp, "x"), bias(bias_, kOp, "bias"), residual(residual_, kOp, "residual"), y(y_, kOp, "y");
  x.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(2, "(M, K)").last_dim_contiguous();
  y.on(kDLCPU).dtype_in({x.dtype()}).rank_is(2, "(M, N)").last_dim_contiguous();
  const int64_t M = x.size(0), N = y.size(1);
  y.shape_is({M, N}, "(M, N)");
  Packed packed(N, x.size(1), codes, scales, zeros, codebook, bits, offset, group_size);
  require(activation >= 0 && activation <= 5, kOp, ": activation must be 0 to 5; got ", activation);
  QuantLinear p{};
  p.M = M, p.dtype = x.dtype(), p.activation = activation, p.int8 = int8 != 0, p.vnni = has(Extension::vnni);
  p.x = {x.raw(), x.stride(0)}, p.y = {y.raw(), y.stride(0)};
  if (residual.present()) {
    residual.on(kDLCPU).dtype_in({x.dtype()}).shape_is({M, N}, "(M, N)").last_dim_contiguous();
    p.residual = {residual.raw(), residual.stride(0)};
  }
  if (bias.present()) p.bias = bias.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({N}, "(N)").contiguous().data<float>();
  if (M == 0 || N == 0) return;
  if (p.int8) packed.round_codebook();
  p.w = packed.w;
  if (p.w.codebook8) p.table_scale = packed.table_scale.data();
  p.chunk = !p.int8 ? kFloatChunk : p.w.ready() ? kReadyChunk : kIntChunk;
  const std::vector<QuantSegment> segments = segments_of(p.w, p.chunk, p.int8, &p.runs);
  p.segments = segments.data(), p.segment_count = static_cast<int64_t>(segments.size());

  const QuantLinearKernels& kernels = quant_linear_kernels_now();
  p.tile = kernels.tile_rows(p);
  const int64_t row_floats = std::max<int64_t>(row_bytes(p) / 4, 1);
  if (takes_strips(p)) {
    if (p.y.stride == N) prefer_huge_pages(y.raw(), static_cast<size_t>(M * N) * (p.dtype == Dtype::f32 ? 4 : 2));
    by_strips(p, kernels, row_floats);
    return shared_scratch.release_if_large();
  }
  const int64_t fitting = std::min((p.int8 ? kPackedIntegers : kPackedFloats) / 4 / row_floats, one_pass(p) ? M : kRowsAtOnce);
  const int64_t passes = ceil_div(M, std::max(fitting, 16 * p.tile));
  const int64_t rows = std::min(M, ceil_div(ceil_div(M, passes), p.tile) * p.tile);
  const int64_t threads = num_threads(), panels = kernels.panels(p), blocks = ceil_div(p.w.panels, panels);
  const int64_t tiles = ceil_div(rows, p.tile);
  // Rows are only shared out where the columns alone don't keep the threads busy: weights are decoded once for each part.
  const int64_t parts = std::min(tiles, blocks >= 2 * threads ? 1 : ceil_div(2 * threads, blocks)),
                part = ceil_div(tiles, parts);
  const int64_t private_floats =
      aligned(std::max(kernels.pack_scratch(p), kernels.run_scratch(p, std::min(rows, part * p.tile))));
  const int64_t a_floats = aligned(rows * row_floats), sum_floats = aligned(rows * p.runs);
  float* scratch = shared_scratch.floats(static_cast<size_t>(a_floats + sum_floats + aligned(rows) + threads * private_floats));
  p.a = reinterpret_cast<char*>(scratch);
  p.sums = reinterpret_cast<int32_t*>(scratch + a_floats), p.row_scale = scratch + a_floats + sum_floats;
  float* const own = p.row_scale + aligned(rows);
  for (p.row0 = 0; p.row0 < M; p.row0 += rows) {
    p.rows = std::min(rows, M - p.row0);
    const int64_t now = ceil_div(p.rows, p.tile), pack_grain = std::max<int64_t>(kGrain / (p.tile * row_floats), 1);
    for_items(ceil_div(now, pack_grain), private_floats, own, [&](int64_t i, float* s) {
      for (int64_t t = i * pack_grain; t < std::min((i + 1) * pack_grain, now); ++t) kernels.pack(p, t, s);
    });
    const int64_t cuts = ceil_div(now, part);
    // Neighbouring blocks go to one thread, which asks for the next one's weights while it works; eight items a thread balance.
    const int64_t stretch = std::max<int64_t>(blocks * cuts / (8 * threads), 1), stretches = ceil_div(blocks, stretch);
    for_items(stretches * cuts, private_floats, own, [&](int64_t i, float* s) {
      const int64_t panel = i / cuts * stretch * panels, t = i % cuts * part;
      kernels.run(p, panel, std::min(panel + stretch * panels, p.w.panels), t, std::min(t + part, now), s);
    });
  }
  shared_scratch.release_if_large();
}

void dequantize(const DLTensor* codes, const DLTensor* scales, const DLTensor* zeros, const DLTensor* codebook, int64_t bits,
                int64_t offset, int64_t group_size, DLTensor* w_) {
  const Tensor w(w_, kOp, "w");
  w.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(2, "(N, K)").last_dim_contiguous();
  const Packed packed(w.size(0), w.size(1), codes, scales, zeros, codebook, bits, offset, group_size);
  if (w.numel() == 0) return;
  QuantLinear p{};
  p.w = packed.w, p.dtype = w.dtype(), p.y = {w.raw(), w.stride(0)};
  p.chunk = kFloatChunk;
  const std::vector<QuantSegment> segments = segments_of(p.w, p.chunk, false, &p.runs);
  p.segments = segments.data(), p.segment_count = static_cast<int64_t>(segments.size());
  const QuantLinearKernels& kernels = quant_linear_kernels_now();
  const int64_t private_floats = aligned(kernels.run_scratch(p, 1));
  float* scratch = shared_scratch.floats(static_cast<size_t>(num_threads() * private_floats));
  for_items(p.w.panels, private_floats, scratch, [&](int64_t i, float* s) { kernels.dequantize(p, i, s); });
  shared_scratch.release_if_large();
}

}  // namespace
}  // namespace mlcore

int mlc_quant_linear_fwd(const DLTensor* x, const DLTensor* codes, const DLTensor* scales, const DLTensor* zeros,
                         const DLTensor* codebook, const DLTensor* bias, const DLTensor* residual, int64_t bits, int64_t offset,
                         int64_t group_size, int64_t activation, int64_t int8, DLTensor* y) {
  return mlcore::guard(
      [&] { mlcore::fwd(x, codes, scales, zeros, codebook, bias, residual, bits, offset, group_size, activation, int8, y); });
}

int mlc_quant_linear_dequantize(const DLTensor* codes, const DLTensor* scales, const DLTensor* zeros, const DLTensor* codebook,
                                int64_t bits, int64_t offset, int64_t group_size, DLTensor* w) {
  return mlcore::guard([&] { mlcore::dequantize(codes, scales, zeros, codebook, bits, offset, group_size, w); });
}
