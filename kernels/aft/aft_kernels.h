// What aft.cc hands to the per-ISA kernels: a checked problem, what its first phases find out about it, and the phases.
#pragma once
#include "core/cpu_features.h"
#include "core/tokens.h"

namespace mlcore {

constexpr int kAftTile = 64;        // tokens of a source tile
constexpr int kAftSpan = 256;       // tokens that one call of a phase works on at most; a multiple of kAftTile
constexpr int kAftBlock = 1024;     // tokens of a call of key_block and query_block; a multiple of kAftTile
constexpr int kAftItems = 16;       // (b, h) whose gradients of a bias tile are summed at once
constexpr float kAftReach = 56.0f;  // README.md: what may lie between a sum's scale and its largest term, as exponents of e

struct AftProblem {
  int64_t B, H, T, S, D;
  int64_t window, bias_heads, columns;  // columns: of the band, 0 without
  bool causal, biased, banded;          // banded: w is 0 but near the diagonal (AFT-simple: everywhere)
  bool backward;
  Tokens q, k, v, o, d_o, dq, dk, dv;
  const float* bias;
  int64_t bias_sh, bias_st;  // strides of heads and tokens
  float *y, *den, *peak, *dbias;

  // Rows that share a range of sources, and the distance of the sums over everything outside of it. A band costs its width
  // and up to two groups, a product needs rows: 16 are best for narrow bands, 64 for wide ones.
  int64_t group;

  // Of the bias's rows (none without a bias): the largest number, which all others are taken relative to.
  const float* row_top;  // (bias_heads, T)
  float bias_range;      // the largest distance from a row's top to a finite number of it
  bool masked;           // some pair's weight is 0: by causality or a bias of -inf

  // Of item n = b * H + h.
  float* top;    // (B * H, Dp): the largest k
  float* stats;  // (B * H, key blocks, 2 * Dp + 16)
  int* ways;     // (B * H): Way
  int* leaks;    // (B * H, query blocks): NaN or infinities among what backward adds up

  // Sums over everything before (ahead) and from (behind) a group on: (B * H, groups + 1, 3 * Dp); null where not needed.
  float *ahead, *behind;

  // README.md: How. scaled: products of scaled exponentials; logarithmic: every pair's own exponential, and den relative to
  // e^peak.
  enum Way { scaled, logarithmic };

  int64_t sources() const { return backward ? T : S; }
  int64_t sinks() const { return backward ? S : T; }
  int64_t groups() const { return (sources() + group - 1) / group; }
  int64_t key_blocks() const { return (S + kAftBlock - 1) / kAftBlock; }
  int64_t query_blocks() const { return (T + kAftBlock - 1) / kAftBlock; }
  bool near_only() const { return biased && window == 0; }  // no sums over what is outside
  bool needs_ahead() const { return !near_only() && !(causal && backward); }
  bool needs_behind() const { return !near_only() && (causal ? backward : window > 0); }
};

struct AftKernels {
  int width;
  int64_t (*scratch_floats)(const AftProblem&);  // of a thread
  // row_top of rows [t0, t1) of head h of the bias; raises range and masked.
  void (*bias_rows)(const AftProblem&, int64_t h, int64_t t0, int64_t t1, float* row_top, float* range, bool* masked);
  void (*key_block)(const AftProblem&, int64_t item, int64_t block, float* scratch);
  void (*query_block)(const AftProblem&, int64_t item, int64_t block, float* scratch);  // backward: dq, and sums
  void (*gather_stats)(const AftProblem&, int64_t item);                                // top and ways
  void (*scan)(const AftProblem&, int64_t item);                                        // ahead and behind
  // Sinks [x0, x1), at most kAftSpan, x0 a multiple of it: o in forward, dk and dv in backward.
  void (*outputs)(const AftProblem&, int64_t item, int64_t x0, int64_t x1, float* scratch);
  void (*key_gradients)(const AftProblem&, int64_t item, int64_t x0, int64_t x1, float* scratch);
  // The gradient of rows [t0, t1) of the bias's head h, of all items that share it: dbias rows st apart, 0: they add up in one.
  void (*bias_gradients)(const AftProblem&, int64_t h, int64_t t0, int64_t t1, float* dbias, int64_t st, float* scratch);
};
MLC_KERNEL_TABLE(AftKernels, aft_kernels)

}  // namespace mlcore
