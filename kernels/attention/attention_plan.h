// How attention's work is cut, as pure functions of the problem: nothing here changes a bit of the results.
#pragma once
#include <algorithm>

#include "attention/attention_kernels.h"

namespace mlcore {

constexpr int64_t round_up_to(int64_t n, int64_t m) { return (n + m - 1) / m * m; }

struct FwdPlan {
  enum class Mode { per_pair, shared, local, on_the_way } mode;
  int threads;
  int64_t k_tile_floats, v_tile_floats, pair_floats;  // of packed keys, values, and both of one (b, hkv) with flags
  int64_t own_floats = 0, shared_floats = 0;          // panels a thread has for itself, panels that all share
  int64_t pairs_at_once = 1;                          // shared: pairs of a round; two rounds have panels
  int64_t chunk_tiles = 0, chunk_keys = 0;            // local: query tiles of a chunk, key tiles that one needs at most

  FwdPlan(const AttentionProblem& p, int width, int max_threads, int64_t sets) : threads(max_threads) {
    const Schedule& s = p.schedule;
    k_tile_floats = kTile * p.D, v_tile_floats = kTile * round_up_to(p.Dv, width);
    pair_floats = round_up_to(s.k_tiles * (k_tile_floats + v_tile_floats) + (s.k_tiles + 3) / 4, 16);
    const int64_t pairs = p.B * p.Hkv, tiles_per_pair = p.group() * s.q_tiles;
    constexpr int64_t kPairInL2 = 96 * 1024;  // floats; what a thread can keep near while it serves a pair alone
    constexpr int64_t kTilesPerThread = 8;    // shared: query tiles of a round, so that its panels serve all threads' L2
    if (tiles_per_pair <= 1) {
      mode = Mode::on_the_way;
    } else if (pair_floats <= kPairInL2 && (max_threads == 1 || pairs >= 4 * max_threads)) {
      mode = Mode::per_pair;
      own_floats = pair_floats;
    } else if (narrow(s, sets, pairs)) {
      mode = Mode::local;
      own_floats = round_up_to(chunk_keys * (k_tile_floats + v_tile_floats) + (chunk_keys + 3) / 4, 16);
    } else {
      mode = Mode::shared;
      pairs_at_once = std::clamp<int64_t>(kTilesPerThread * max_threads / tiles_per_pair, 1, std::max<int64_t>(pairs, 1));
      shared_floats = std::min<int64_t>(2, (pairs + pairs_at_once - 1) / pairs_at_once) * pairs_at_once * pair_floats;
    }
  }

 private:
  // Whether chunks of query tiles each need so few neighbouring keys that a thread packs them for itself, in its L2: windows
  // and short documents. (1,8,4096,64), window 256, two threads: see README.md.
  bool narrow(const Schedule& s, int64_t sets, int64_t pairs) {
    constexpr int64_t kChunkInL2 = 192 * 1024;  // floats
    for (int64_t size : {16, 8}) {
      chunk_tiles = size, chunk_keys = 0;
      int64_t packed = 0;
      for (int64_t qt = 0; qt < s.q_tiles; qt += size) {
        int64_t first, last;
        s.visited_range(sets, qt, std::min(qt + size, s.q_tiles), first, last);
        chunk_keys = std::max(chunk_keys, last - first + 1);
        packed += std::max<int64_t>(last - first + 1, 0);
        if (chunk_keys * (k_tile_floats + v_tile_floats) > kChunkInL2) break;
      }
      const int64_t chunks = (s.q_tiles + size - 1) / size;
      if (chunk_keys * (k_tile_floats + v_tile_floats) <= kChunkInL2 && 2 * packed <= 3 * s.k_tiles &&
          (threads == 1 || chunks * pairs >= 4 * threads))
        return true;
    }
    return false;
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
