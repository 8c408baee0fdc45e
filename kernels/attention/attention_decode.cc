// Attention over a key-value cache for a few queries, and appending to the cache. The contract is attention.h, the arithmetic
// attention_decode_cpu.inl: here values are checked and the work is shared out.
#include <algorithm>
#include <vector>

#include "attention/attention.h"
#include "attention/attention_decode_check.h"
#include "attention/attention_decode_kernels.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace mlcore {
namespace {

constexpr const char* kOp = kDecodeOp;
thread_local Scratch decode_scratch;  // of the calling thread; its workers get slices

void check_lengths(const DecodeProblem& p) {
  for (int64_t b = 0; b < p.B; ++b)
    require(p.lengths[b] >= 0 && p.lengths[b] <= p.room, kOp, ": the cache has room for ", p.room, " keys; sequence ", b,
            " needs ", p.lengths[b]);
}

void check_pages(const DecodeProblem& p, int64_t b, int64_t begin, int64_t end) {
  if (p.table == nullptr || begin >= end) return;
  for (int64_t n = begin / p.page_size; n <= (end - 1) / p.page_size; ++n) {
    const int64_t page = p.table[b * p.table_sb + n];
    require(page >= 0 && page < p.pages, kOp, ": page_table must name pages below ", p.pages, "; got ", page, " at (", b, ", ",
            n, ")");
  }
}

struct Item {
  int64_t b, hkv, begin, end;  // tiles
  int64_t split;               // which of the split pairs; -1: the pair is not split
};

struct Pair {
  int64_t b, hkv;
  SplitKeys keys;
  int64_t tiles;
};

// Long pairs are cut into items of `most` tiles, so that all threads have work: nothing of the results depends on where.
void cut(const DecodeProblem& p, int threads, std::vector<Item>& items, std::vector<Pair>& pairs) {
  int64_t all = 0, begin, end;
  for (int64_t b = 0; b < p.B; ++b) {
    p.tiles(b, begin, end);
    all += (end - begin) * p.Hkv;
  }
  constexpr int64_t kLeast = 8;  // tiles an item is worth its keep for
  const int64_t most = threads == 1 ? all : std::max(kLeast, (all + 4 * threads - 1) / (4 * threads));
  for (int64_t b = 0; b < p.B; ++b) {
    p.tiles(b, begin, end);
    for (int64_t hkv = 0; hkv < p.Hkv; ++hkv) {
      if (end - begin <= most) {
        items.push_back({b, hkv, begin, end, -1});
        continue;
      }
      for (int64_t tile = begin; tile < end; tile += most)
        items.push_back({b, hkv, tile, std::min(tile + most, end), static_cast<int64_t>(pairs.size())});
      pairs.push_back({b, hkv, {begin, nullptr, nullptr, nullptr, nullptr, nullptr}, end - begin});
    }
  }
}

void run(const DecodeProblem& p) {
  const AttentionDecodeKernels& kernels = attention_decode_kernels_now();
  const int threads = num_threads();
  std::vector<Item> items;
  std::vector<Pair> pairs;
  cut(p, threads, items, pairs);
  const int64_t rows = p.rows(), ld = (p.Dv + kernels.width - 1) / kernels.width * kernels.width;
  const auto rounded = [](int64_t floats) { return (floats + 15) / 16 * 16; };
  const int64_t own = rounded(std::max(kernels.scratch(p), ld));
  int64_t shared = 0;
  for (const Pair& x : pairs) shared += x.tiles * (rows * (kTile + ld) + 3 * rounded(rows));
  float* scratch = decode_scratch.floats(threads * own + shared);
  float* at = scratch + threads * own;
  for (Pair& x : pairs) {
    const auto take = [&](int64_t floats) { return std::exchange(at, at + x.tiles * floats); };
    x.keys.scores = take(rows * kTile), x.keys.sum = take(rows * ld);
    x.keys.top = take(rounded(rows)), x.keys.total = take(rounded(rows)), x.keys.alpha = take(rounded(rows));
  }
  const int64_t n = static_cast<int64_t>(items.size());
  parallel_claim(n, threads, [&](int64_t i, int thread) {
    const Item& x = items[i];
    float* mine = scratch + thread * own;
    if (x.split < 0) return kernels.whole(p, x.b, x.hkv, x.begin, x.end, mine);
    kernels.scores(p, x.b, x.hkv, x.begin, x.end, pairs[x.split].keys, mine);
  });
  if (!pairs.empty()) {
    parallel_claim(n, threads, [&](int64_t i, int thread) {
      const Item& x = items[i];
      if (x.split >= 0) kernels.sums(p, x.b, x.hkv, x.begin, x.end, pairs[x.split].keys, scratch + thread * own);
    });
    parallel_claim(static_cast<int64_t>(pairs.size()) * rows, threads, [&](int64_t i, int thread) {
      const Pair& x = pairs[i / rows];
      kernels.merge(p, x.b, x.hkv, i % rows, x.tiles, x.keys, scratch + thread * own);
    });
  }
  decode_scratch.release_if_large();
}

void decode(const DecodeArgs& args) {
  const DecodeProblem p = checked_decode(args, kDLCPU);
  check_lengths(p);
  if (p.B * p.H * p.Tq == 0) return;
  for (int64_t b = 0; b < p.B; ++b) {
    require(p.starts == nullptr || p.starts[b] >= 0, kOp, ": starts must not be negative; got ", p.starts ? p.starts[b] : 0);
    check_pages(p, b, p.first_seen(b), p.lengths[b]);
  }
  run(p);
}

void append(const DLTensor* k, const DLTensor* v, const CacheArgs& caches) {
  const AppendProblem a = checked_append(k, v, caches, kDLCPU);
  const DecodeProblem& p = a.caches;
  check_lengths(p);
  for (int64_t b = 0; b < p.B; ++b) {
    require(p.lengths[b] >= p.Tq, kOp, ": lengths must include the ", p.Tq, " new keys; got ", p.lengths[b]);
    check_pages(p, b, p.lengths[b] - p.Tq, p.lengths[b]);
  }
  const AttentionDecodeKernels& kernels = attention_decode_kernels_now();
  const int64_t bytes = p.dtype == Dtype::f32 ? 4 : 2, cache_bytes = p.cache_dtype == Dtype::i8 ? 1 : bytes;
  const auto write = [&](const Operand& from, const Cache& cache, int64_t size, int64_t b, int64_t hkv, int64_t t) {
    const int64_t position = p.lengths[b] - p.Tq + t, page = p.page_of(b, position), row = position % p.page_size;
    const char* src = static_cast<const char*>(from.data) + (b * from.sb + hkv * from.sh + t * from.st) * bytes;
    char* dst =
        static_cast<char*>(cache.rows.data) + (page * cache.rows.sb + hkv * cache.rows.sh + row * cache.rows.st) * cache_bytes;
    float* scale = const_cast<float*>(cache.scale);
    if (scale) scale += page * cache.scale_sb + hkv * cache.scale_sh + row * cache.scale_st;
    kernels.append(p.dtype, src, p.cache_dtype, dst, scale, size);
  };
  parallel_for(p.B * p.Hkv * p.Tq, 512, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / (p.Hkv * p.Tq), hkv = n / p.Tq % p.Hkv, t = n % p.Tq;
      write(a.k, p.k, p.D, b, hkv, t);
      write(a.v, p.v, p.Dv, b, hkv, t);
    }
  });
}

}  // namespace
}  // namespace mlcore

int mlc_attention_decode(const DLTensor* q, const DLTensor* k_cache, const DLTensor* v_cache, const DLTensor* k_scale,
                         const DLTensor* v_scale, const DLTensor* page_table, const DLTensor* lengths, const DLTensor* starts,
                         const DLTensor* slopes, const DLTensor* sinks, int64_t left, int64_t right, double scale,
                         double softcap, DLTensor* o, DLTensor* lse, DLTensor*) {
  const mlcore::CacheArgs caches{k_cache, v_cache, k_scale, v_scale, page_table, lengths};
  return mlcore::guard([&] { mlcore::decode({q, caches, starts, slopes, sinks, left, right, scale, softcap, o, lse}); });
}

int mlc_attention_append(const DLTensor* k, const DLTensor* v, const DLTensor* page_table, const DLTensor* lengths,
                         DLTensor* k_cache, DLTensor* v_cache, DLTensor* k_scale, DLTensor* v_scale) {
  return mlcore::guard([&] { mlcore::append(k, v, {k_cache, v_cache, k_scale, v_scale, page_table, lengths}); });
}
