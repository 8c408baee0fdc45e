// What attention.cc hands to the per-ISA kernels: a checked problem, packed panels, scratch.
#pragma once
#include "attention/attention_schedule.h"
#include "core/cpu_features.h"
#include "core/tensor.h"

namespace mlcore {

// A (B, H, T, D) operand: element (b, h, t, d) at data + b * sb + h * sh + t * st + d, counted in elements.
struct Operand {
  void* data = nullptr;
  int64_t sb = 0, sh = 0, st = 0;
};

struct AttentionProblem {
  int64_t B, H, Hkv, Tq, Tk, D, Dv;
  Dtype dtype;
  Operand q, k, v, o;
  float *lse, *lse_factor;  // null: not wanted; (B, H, Tq) each: exp(s - lse) * lse_factor is p to full precision
  float scale, softcap;     // softcap 0: none
  uint32_t drop_below;      // a hash below this drops the element; 0: no dropout
  bool drop_all;            // dropout_p = 1
  float keep_scale;         // 1 / (1 - dropout_p)
  uint64_t seed;
  const void* bias;  // null: none
  Dtype bias_dtype;
  int64_t bias_sb, bias_sh, bias_sq, bias_sk;  // 0 where broadcast
  const float* relative;                       // null: none; of (i, j) at Tk - 1 - j + i, in log2 units, kTile readable beyond
  int64_t relative_sb, relative_sh;
  const float* sinks;  // (H), null: none
  Schedule schedule;
  // Backward only.
  Operand d_o, dq, dk, dv;
  const float* delta;  // (B, H, Tq): <o, d_o> - d_lse
  Operand dq_sum;      // (B, H, Tq, D padded) fp32: dq itself where it is fp32 and needs no padding
  float* dbias;        // (B|1, H|1, Tq|1, Tk) contiguous, null: not wanted
  int64_t dbias_sb, dbias_sh, dbias_sq;
  float* drelative;  // (B, H, Tq + Tk - 1), of (i, j) at Tk - 1 - j + i; null: not wanted

  int64_t group() const { return H / Hkv; }
};

// Keys and values of one (b, hkv), packed tile by tile: kt holds the transposed keys (D, 64) of each tile, v its values as
// panels (64, Dv padded). v_finite[tile] is 0 where a value is infinite or NaN.
struct KeyValuePanels {
  float *k, *v;
  uint8_t* v_finite;
  int64_t first = 0;  // the key tile that they begin with
};

// Called around the update of one query tile's dq by one block of key tiles: enter() returns when it is this block's turn.
struct DqOrder {
  void* self;
  void (*enter)(void* self, int64_t h, int64_t qt);
  void (*leave)(void* self, int64_t h, int64_t qt);
};

struct AttentionKernels {
  int width;  // lanes of a Vec: head dims are padded to multiples of it

  int64_t (*fwd_scratch)(const AttentionProblem&);  // floats
  int64_t (*bwd_scratch)(const AttentionProblem&, int64_t tiles);
  void (*pack)(const AttentionProblem&, int64_t b, int64_t hkv, int64_t kt, const KeyValuePanels&);
  // Query tile qt of (b, h). Where panels.k is null the tiles are packed on the way.
  void (*fwd)(const AttentionProblem&, int64_t b, int64_t h, int64_t qt, const KeyValuePanels& panels, float* scratch);
  void (*delta)(const AttentionProblem&, const float* d_lse, int64_t row_begin, int64_t row_end,
                float* delta);  // rows of (B, H, Tq)
  // dk and dv of key block `block`, tiles [kt_begin, kt_end) of (b, hkv), and their part of dq and dbias.
  void (*bwd)(const AttentionProblem&, int64_t b, int64_t hkv, int64_t block, int64_t kt_begin, int64_t kt_end, const DqOrder&,
              float* scratch);
  void (*zero_dq_sum)(const AttentionProblem&, int64_t row_begin, int64_t row_end);  // rows of (B, H, Tq)
  void (*store_dq)(const AttentionProblem&, int64_t row_begin, int64_t row_end);
};
MLC_KERNEL_TABLE(AttentionKernels, attention_kernels)

}  // namespace mlcore
