// Attention over a key-value cache for a few queries, and appending to the cache. The contract is attention.h, the arithmetic
// attention_decode_cpu.inl: here arguments are checked and the work is shared out.
#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/attention.h"
#include "attention/attention_decode_kernels.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "attention_with_kvcache";
thread_local Scratch decode_scratch;  // of the calling thread; its workers get slices

struct CacheArgs {
  const DLTensor *k_cache, *v_cache, *k_scale, *v_scale, *page_table, *lengths;
};

// The caches and where sequences lie in them; B, Hkv, D, Dv are set. Returns the number of pages.
int64_t set_caches(DecodeProblem& p, const CacheArgs& a) {
  const Tensor k(a.k_cache, kOp, "k_cache"), v(a.v_cache, kOp, "v_cache"), table(a.page_table, kOp, "page_table"),
      lengths(a.lengths, kOp, "lengths");
  k.on(kDLCPU).dtype_in({p.dtype, Dtype::i8}).rank_is(4, "(pages, Hkv, P, D)").last_dim_contiguous();
  const int64_t pages = k.size(0);
  p.page_size = k.size(2), p.cache_dtype = k.dtype();
  k.shape_is({pages, p.Hkv, p.page_size, p.D}, "(pages, Hkv, P, D)");
  v.on(kDLCPU)
      .dtype_in({p.cache_dtype})
      .shape_is({pages, p.Hkv, p.page_size, p.Dv}, "(pages, Hkv, P, Dv)")
      .last_dim_contiguous();
  const auto cache = [&](const Tensor& rows, const DLTensor* scale_, const char* name) {
    Cache c{{rows.raw(), rows.stride(0), rows.stride(1), rows.stride(2)}, nullptr, 0, 0, 0};
    const Tensor scale(scale_, kOp, name);
    require(scale.present() == (p.cache_dtype == Dtype::i8), kOp, ": ", name, " must be given with int8 caches, and only then");
    if (!scale.present()) return c;
    scale.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({pages, p.Hkv, p.page_size}, "(pages, Hkv, P)");
    c.scale = scale.data<float>(), c.scale_sb = scale.stride(0), c.scale_sh = scale.stride(1), c.scale_st = scale.stride(2);
    return c;
  };
  p.k = cache(k, a.k_scale, "k_scale"), p.v = cache(v, a.v_scale, "v_scale");
  p.lengths = lengths.on(kDLCPU).dtype_in({Dtype::i64}).shape_is({p.B}, "(B)").contiguous().data<int64_t>();
  int64_t room = p.page_size;
  if (table.present()) {
    table.on(kDLCPU).dtype_in({Dtype::i64}).rank_is(2, "(B, n)").last_dim_contiguous();
    require(table.size(0) == p.B, kOp, ": page_table must be (B, n) with B = ", p.B, "; got ", table.shape_text());
    p.table = table.data<int64_t>(), p.table_sb = table.stride(0);
    room *= table.size(1);
  } else {
    require(pages == p.B, kOp, ": k_cache must be for B = ", p.B, " sequences; got ", pages);
  }
  for (int64_t b = 0; b < p.B; ++b)
    require(p.lengths[b] >= 0 && p.lengths[b] <= room, kOp, ": the cache has room for ", room, " keys; sequence ", b, " needs ",
            p.lengths[b]);
  return pages;
}

void check_pages(const DecodeProblem& p, int64_t b, int64_t begin, int64_t end, int64_t pages) {
  if (p.table == nullptr || begin >= end) return;
  for (int64_t n = begin / p.page_size; n <= (end - 1) / p.page_size; ++n) {
    const int64_t page = p.table[b * p.table_sb + n];
    require(page >= 0 && page < pages, kOp, ": page_table must name pages below ", pages, "; got ", page, " at (", b, ", ", n,
            ")");
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

void decode(const DLTensor* q_, const CacheArgs& caches, const DLTensor* starts_, const DLTensor* slopes_,
            const DLTensor* sinks_, int64_t left, int64_t right, double scale, double softcap, const DLTensor* o_,
            const DLTensor* lse_) {
  const Tensor q(q_, kOp, "q"), k(caches.k_cache, kOp, "k_cache"), v(caches.v_cache, kOp, "v_cache"),
      starts(starts_, kOp, "starts"), slopes(slopes_, kOp, "slopes"), sinks(sinks_, kOp, "sinks"), o(o_, kOp, "o"),
      lse(lse_, kOp, "lse");
  q.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B, H, Tq, D)").last_dim_contiguous();
  DecodeProblem p{};
  p.dtype = q.dtype();
  p.B = q.size(0), p.H = q.size(1), p.Tq = q.size(2), p.D = q.size(3);
  p.Hkv = k.rank_is(4, "(pages, Hkv, P, D)").size(1), p.Dv = v.rank_is(4, "(pages, Hkv, P, Dv)").size(3);
  require(p.D >= 1 && p.D <= 256 && p.Dv >= 1 && p.Dv <= 256, kOp, ": head dims must be 1 to 256; got D ", p.D, ", Dv ", p.Dv);
  require(p.Hkv > 0 ? p.H % p.Hkv == 0 : p.H == 0, kOp, ": k_cache has ", p.Hkv, " heads, which must divide q's ", p.H);
  require(std::isfinite(scale), kOp, ": scale must be finite; got ", scale);
  require(std::isfinite(softcap) && softcap >= 0, kOp, ": softcap must be positive, or 0 for none; got ", softcap);
  const int64_t pages = set_caches(p, caches);
  if (starts.present()) p.starts = starts.on(kDLCPU).dtype_in({Dtype::i64}).shape_is({p.B}, "(B)").contiguous().data<int64_t>();
  p.left = left < 0 ? Schedule::kUnlimited : left, p.right = right < 0 ? Schedule::kUnlimited : right;
  p.scale = static_cast<float>(scale), p.softcap = static_cast<float>(softcap);
  if (slopes.present()) {
    slopes.on(kDLCPU).dtype_in({Dtype::f32}).rank_is(2, "(B|1, H)").contiguous();
    require(slopes.size(1) == p.H && (slopes.size(0) == 1 || slopes.size(0) == p.B), kOp, ": slopes must be (B|1, H) of (", p.B,
            ", ", p.H, "); got ", slopes.shape_text());
    p.slopes = slopes.data<float>(), p.slopes_sb = slopes.size(0) == 1 ? 0 : p.H;
  }
  if (sinks.present()) p.sinks = sinks.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.H}, "(H)").contiguous().data<float>();
  o.on(kDLCPU).dtype_in({p.dtype}).shape_is({p.B, p.H, p.Tq, p.Dv}, "(B, H, Tq, Dv)").last_dim_contiguous();
  if (lse.present())
    p.lse = lse.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.B, p.H, p.Tq}, "(B, H, Tq)").contiguous().data<float>();
  p.q = {q.raw(), q.stride(0), q.stride(1), q.stride(2)}, p.o = {o.raw(), o.stride(0), o.stride(1), o.stride(2)};
  if (o.numel() == 0) return;
  for (int64_t b = 0; b < p.B; ++b) {
    require(p.starts == nullptr || p.starts[b] >= 0, kOp, ": starts must not be negative; got ", p.starts ? p.starts[b] : 0);
    check_pages(p, b, p.first_seen(b), p.lengths[b], pages);
  }
  run(p);
}

void append(const DLTensor* k_, const DLTensor* v_, const CacheArgs& caches) {
  const Tensor k(k_, kOp, "k"), v(v_, kOp, "v");
  k.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B, Hkv, Tnew, D)").last_dim_contiguous();
  v.on(kDLCPU).dtype_in({k.dtype()}).rank_is(4, "(B, Hkv, Tnew, Dv)").last_dim_contiguous();
  DecodeProblem p{};
  p.dtype = k.dtype();
  p.B = k.size(0), p.Hkv = k.size(1), p.Tq = k.size(2), p.D = k.size(3), p.Dv = v.size(3);
  v.shape_is({p.B, p.Hkv, p.Tq, p.Dv}, "(B, Hkv, Tnew, Dv)");
  const int64_t pages = set_caches(p, caches);  // lengths include the new keys
  for (int64_t b = 0; b < p.B; ++b) {
    require(p.lengths[b] >= p.Tq, kOp, ": lengths must include the ", p.Tq, " new keys; got ", p.lengths[b]);
    check_pages(p, b, p.lengths[b] - p.Tq, p.lengths[b], pages);
  }
  const AttentionDecodeKernels& kernels = attention_decode_kernels_now();
  const int64_t bytes = p.dtype == Dtype::f32 ? 4 : 2, cache_bytes = p.cache_dtype == Dtype::i8 ? 1 : bytes;
  const auto write = [&](const Tensor& from, const Cache& cache, int64_t size, int64_t b, int64_t hkv, int64_t t) {
    const int64_t position = p.lengths[b] - p.Tq + t, page = p.page_of(b, position), row = position % p.page_size;
    const char* src = from.data<char>() + (b * from.stride(0) + hkv * from.stride(1) + t * from.stride(2)) * bytes;
    char* dst =
        static_cast<char*>(cache.rows.data) + (page * cache.rows.sb + hkv * cache.rows.sh + row * cache.rows.st) * cache_bytes;
    float* scale = const_cast<float*>(cache.scale);
    if (scale) scale += page * cache.scale_sb + hkv * cache.scale_sh + row * cache.scale_st;
    kernels.append(p.dtype, src, p.cache_dtype, dst, scale, size);
  };
  parallel_for(p.B * p.Hkv * p.Tq, 512, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t b = n / (p.Hkv * p.Tq), hkv = n / p.Tq % p.Hkv, t = n % p.Tq;
      write(k, p.k, p.D, b, hkv, t);
      write(v, p.v, p.Dv, b, hkv, t);
    }
  });
}

}  // namespace
}  // namespace mlcore

int mlc_attention_decode(const DLTensor* q, const DLTensor* k_cache, const DLTensor* v_cache, const DLTensor* k_scale,
                         const DLTensor* v_scale, const DLTensor* page_table, const DLTensor* lengths, const DLTensor* starts,
                         const DLTensor* slopes, const DLTensor* sinks, int64_t left, int64_t right, double scale,
                         double softcap, DLTensor* o, DLTensor* lse) {
  return mlcore::guard([&] {
    mlcore::decode(q, {k_cache, v_cache, k_scale, v_scale, page_table, lengths}, starts, slopes, sinks, left, right, scale,
                   softcap, o, lse);
  });
}

int mlc_attention_append(const DLTensor* k, const DLTensor* v, const DLTensor* page_table, const DLTensor* lengths,
                         DLTensor* k_cache, DLTensor* v_cache, DLTensor* k_scale, DLTensor* v_scale) {
  return mlcore::guard([&] { mlcore::append(k, v, {k_cache, v_cache, k_scale, v_scale, page_table, lengths}); });
}
