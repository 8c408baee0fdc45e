// How attention's work is cut, as pure functions of the problem: nothing here changes a bit of the results.
#pragma once
#include <algorithm>

#include "attention/attention_kernels.h"

namespace mlcore {

constexpr int64_t round_up_to(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

struct FwdPlan {
  enum class Mode { per_pair, shared, on_the_way } mode;
  int threads;
  int64_t k_tile_floats, v_tile_floats, pair_floats;  // of packed keys, values, and both of one (b, hkv) with flags
  int64_t own_floats = 0, shared_floats = 0;          // panels a thread has for itself, panels that all share
  int64_t pairs_at_once = 1;

  FwdPlan(const AttentionProblem& p, int width, int max_threads) : threads(max_threads) {
    const Schedule& s = p.schedule;
    k_tile_floats = kTile * p.D, v_tile_floats = kTile * round_up_to(p.Dv, width);
    pair_floats = round_up_to(s.k_tiles * (k_tile_floats + v_tile_floats) + (s.k_tiles + 3) / 4, 16);
    const int64_t pairs = p.B * p.Hkv, tiles_per_pair = p.group() * s.q_tiles;
    constexpr int64_t kPairInL2 = 96 * 1024;             // floats; what a thread can keep near while it serves a pair alone
    constexpr int64_t kSharedAtOnce = 16 * 1024 * 1024;  // floats: 64 MiB of panels alive at most, but never less than one pair
    if (tiles_per_pair <= 1) {
      mode = Mode::on_the_way;
    } else if (pair_floats <= kPairInL2 && (max_threads == 1 || pairs >= 4 * max_threads)) {
      mode = Mode::per_pair;
      own_floats = pair_floats;
    } else {
      mode = Mode::shared;
      pairs_at_once = std::clamp<int64_t>(kSharedAtOnce / std::max<int64_t>(pair_floats, 1), 1, std::max<int64_t>(pairs, 1));
      shared_floats = pairs_at_once * pair_floats;
    }
  }
};

struct BwdPlan {
  int threads;
  int64_t block_tiles;  // key tiles a block owns: more of them reuse a packed query tile, fewer keep all threads busy

  BwdPlan(const AttentionProblem& p, int width, int max_threads, int64_t units) : threads(max_threads) {
    const int64_t D = round_up_to(p.D, width), Dv = round_up_to(p.Dv, width);
    constexpr int64_t kBlockInL2 = 80 * 1024;  // floats of packed keys, values and their gradients
    const int64_t tile_floats = kTile * (p.D + 2 * D + p.Dv + Dv);
    const int64_t by_cache = std::max<int64_t>(1, kBlockInL2 / tile_floats);
    const int64_t by_threads = std::max<int64_t>(1, p.schedule.k_tiles * units / (4 * max_threads));
    block_tiles = std::min({by_cache, by_threads, int64_t{8}});
  }
};

}  // namespace mlcore
