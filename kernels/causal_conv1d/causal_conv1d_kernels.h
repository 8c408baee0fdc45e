// What causal_conv1d.cc hands to the per-ISA kernels of causal_conv1d_cpu.inl: plain pointers, checked sizes, and the
// sequences lowered to runs and tiles.
#pragma once
#include "core/cpu_features.h"
#include "core/tensor.h"

namespace mlcore {

enum class Activation { none = 0, silu = 1, gelu = 2 };

// (B, C, T) or (N, C, w-1). data is null where the argument was left out.
struct Signal {
  void* data = nullptr;
  int64_t b = 0, c = 0, t = 0;  // strides
};

// Tokens [begin, end) of row b that share a history.
struct Run {
  int64_t b, begin, end;
  int64_t initial = -1, final = -1;  // rows of the state tensors; -1: empty history, no final state
  bool padding = false;
};

// Tokens [begin, end) of a run: what is computed at once for one channel (contiguous in T) or a block of them (in C).
struct Tile {
  int64_t run, begin, end;
};

struct CausalConv1d {
  Signal x, y, initial, final;      // forward
  Signal dy, dx, dfinal, dinitial;  // backward
  const float *weight, *bias;       // (C, w), (C)
  float *dweight, *dbias, *partial;
  const Run* runs;
  const Tile* tiles;
  int64_t C, width;
  int64_t blocks;  // of tiles; block p owns partial row p
  int64_t tile_count;
  Dtype dtype;
  Activation activation;
  bool in_time;  // contiguous in T, else in C

  int64_t block_begin(int64_t p) const { return tile_count * p / blocks; }
};

struct CausalConv1dUpdate {
  Signal x, y, state;
  const float *weight, *bias;
  const int32_t *position, *slots;
  int64_t C, T, S, width;
  Dtype dtype;
  Activation activation;
};

struct CausalConv1dKernels {
  int64_t time_tile;                                       // tokens of a tile where T is contiguous
  int64_t channel_tile;                                    // channels that a tile has at once where C is contiguous
  int64_t token_tile;                                      // and its tokens
  int64_t (*scratch)(const CausalConv1d&, bool backward);  // floats a thread needs
  // Channels [begin, end) of the tiles of block p.
  void (*fwd)(const CausalConv1d&, int64_t p, int64_t begin, int64_t end, float* scratch);
  void (*bwd)(const CausalConv1d&, int64_t p, int64_t begin, int64_t end, float* scratch);
  void (*reduce)(const CausalConv1d&, int64_t begin, int64_t end);  // partial sums to dweight and dbias
  void (*update)(const CausalConv1dUpdate&, int64_t b, int64_t begin, int64_t end);
};
MLC_KERNEL_TABLE(CausalConv1dKernels, causal_conv1d_kernels)

}  // namespace mlcore
