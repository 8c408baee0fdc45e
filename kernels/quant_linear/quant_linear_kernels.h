// What quant_linear.cc hands to the per-ISA kernels of quant_linear_cpu.inl: plain pointers, checked sizes, the cut of K.
#pragma once
#include "core/cpu_features.h"
#include "core/row_args.h"

namespace mlcore {

constexpr int kPanelRows = 16;  // rows of W (columns of y) that share a 64-byte unit
// Codes along K that a pass over the rows of x takes: 64 rows of W decoded to this many fill two thirds of a 48 KiB L1 (32
// KiB). The exact mode's chain of fused multiply-adds has at most this length, the integer mode's chunks don't show in the
// result.
// Codes that are used where they lie come from the L2 at the rate of the product: their chunk is kReadyChunk.
constexpr int64_t kFloatChunk = 128, kIntChunk = 512, kReadyChunk = 4096;
// An int32 sum of |a| <= 127 times |q - z| <= 255 is exact up to 66 000 terms: longer groups become several runs.
constexpr int64_t kRun = 1 << 16;

// Codes [k, k + length) of the padded K: within a group, within a chunk.
struct QuantSegment {
  int64_t k, length, group, run;
  bool first, last;  // of its run, the codes that one integer sum takes
};

struct QuantWeight {
  const uint8_t *codes, *zeros;  // zeros may be null
  const float *scales, *codebook;
  const uint8_t* codebook8;  // (T, 2^bits): codebook in 127ths of its largest entry, plus 128
  int64_t N, K, group_size, groups, group_padded, K_padded, panels, panel_bytes, table_rows;
  int bits, offset, block;  // block: KB

  bool ready() const { return bits == 8 && !codebook8; }  // as integers: used where they lie
  const uint8_t* panel(int64_t p) const { return codes + p * panel_bytes; }
  int64_t table(int64_t n) const {
    return (n < N ? n : N - 1) / table_rows * (int64_t{1} << bits);
  }  // where n's codebook starts
};

struct QuantLinear {
  QuantWeight w;
  Rows x, residual, y;
  Dtype dtype;
  const float* bias;
  const float* table_scale;           // (T): what codebook8 is multiplied by; null without
  int64_t M, activation, row0, rows;  // rows of x that a holds: [row0, row0 + rows)
  bool int8, vnni;
  const QuantSegment* segments;
  int64_t segment_count, runs, chunk;
  // Row tiles of `tile` rows (the last one of fewer), each (K, rows) float32; or rows of int8, row_bytes apart, at least 64
  // zeros behind each, with sums (runs, rows) a tile.
  char* a;
  float* row_scale;  // (rows)
  int32_t* sums;
  int64_t tile;
};

// All of K is one pass over the rows of x: a tile's sums are finished as soon as they are there.
inline bool one_pass(const QuantLinear& p) { return p.w.K_padded <= p.chunk; }

// Bytes that a packed row of x takes.
inline int64_t row_bytes(const QuantLinear& p) { return p.int8 ? (p.w.K_padded + 127) / 64 * 64 : 4 * p.w.K_padded; }

struct QuantLinearKernels {
  int (*tile_rows)(const QuantLinear&);
  int (*panels)(const QuantLinear&);                         // panels of W that an item should take
  int64_t (*pack_scratch)(const QuantLinear&);               // floats
  int64_t (*run_scratch)(const QuantLinear&, int64_t rows);  // floats
  void (*pack)(const QuantLinear&, int64_t tile, float* scratch);
  // Rows of tiles [tile_begin, tile_end) times panels [panel_begin, panel_end).
  void (*run)(const QuantLinear&, int64_t panel_begin, int64_t panel_end, int64_t tile_begin, int64_t tile_end, float* scratch);
  void (*dequantize)(const QuantLinear&, int64_t panel, float* scratch);  // into y's rows
};
MLC_KERNEL_TABLE(QuantLinearKernels, quant_linear_kernels)

}  // namespace mlcore
