// Validates, fills the problem, and shares the work out. The contract is attention.h, the arithmetic the *_cpu.inl files.
#include "attention/attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <thread>
#include <vector>

#include "attention/attention_kernels.h"
#include "attention/attention_plan.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "attention";
thread_local Scratch shared_scratch;  // of the calling thread; its workers get slices

Operand operand(const Tensor& t) {
  t.last_dim_contiguous();
  return {t.raw(), t.stride(0), t.stride(1), t.stride(2)};
}

struct Args {
  const DLTensor *q, *k, *v, *bias, *relative, *sinks, *row_ptr, *cols, *ids, *bits;
  int64_t left, right, offset, set_b, set_h;
  double scale, softcap, dropout_p;
  int64_t seed;
};

Schedule make_schedule(const Args& a, int64_t B, int64_t H, int64_t Tq, int64_t Tk) {
  Schedule s{};
  s.Tq = Tq, s.Tk = Tk;
  s.q_tiles = (Tq + kTile - 1) / kTile, s.k_tiles = (Tk + kTile - 1) / kTile;
  s.left = a.left < 0 ? Schedule::kUnlimited : a.left;
  s.right = a.right < 0 ? Schedule::kUnlimited : a.right;
  s.offset = a.offset;
  const Tensor row_ptr(a.row_ptr, kOp, "row_ptr"), cols(a.cols, kOp, "cols"), ids(a.ids, kOp, "ids"), bits(a.bits, kOp, "bits");
  if (!row_ptr.present()) return s;
  require(cols.present() && ids.present() && bits.present(), kOp, ": row_ptr needs cols, ids and bits");
  require((a.set_b == 1 || a.set_b == B) && (a.set_h == 1 || a.set_h == H), kOp, ": set_b, set_h must be 1 or B, H = ", B, ", ",
          H, "; got ", a.set_b, ", ", a.set_h);
  row_ptr.on(kDLCPU).dtype_in({Dtype::i64}).rank_is(1, "(sets * q_tiles + 1)").contiguous();
  const int64_t sets = a.set_b * a.set_h, listed = row_ptr.numel() - 1;
  require(listed == sets * s.q_tiles || listed == sets, kOp, ": row_ptr must have ", sets * s.q_tiles + 1, " or ", sets + 1,
          " elements; got ", row_ptr.numel());
  s.row_ptr = row_ptr.data<int64_t>();
  s.same_for_all_queries = listed == sets && s.q_tiles != 1;
  const int64_t entries = s.row_ptr[listed];
  cols.on(kDLCPU).dtype_in({Dtype::i32}).shape_is({entries}, "(listed tiles)").contiguous();
  ids.on(kDLCPU).dtype_in({Dtype::i32}).shape_is({entries}, "(listed tiles)").contiguous();
  bits.on(kDLCPU).dtype_in({Dtype::i64}).rank_is(2, "(n, 64)").contiguous();
  require(bits.size(1) == kTile, kOp, ": bits must be (n, 64); got ", bits.shape_text());
  s.cols = cols.data<int32_t>(), s.ids = ids.data<int32_t>();
  s.bits = bits.data<uint64_t>();
  require(s.row_ptr[0] == 0, kOp, ": row_ptr must begin with 0");
  for (int64_t r = 0; r < listed; ++r) {
    require(s.row_ptr[r] <= s.row_ptr[r + 1] && s.row_ptr[r + 1] <= entries, kOp, ": row_ptr must not fall; it does at ", r);
    for (int64_t e = s.row_ptr[r]; e < s.row_ptr[r + 1]; ++e) {
      require(s.cols[e] >= 0 && s.cols[e] < s.k_tiles && (e == s.row_ptr[r] || s.cols[e] > s.cols[e - 1]), kOp,
              ": cols must rise within a row and stay below ", s.k_tiles, "; got ", s.cols[e]);
      require(s.ids[e] >= -1 && s.ids[e] < bits.size(0), kOp, ": ids must be -1 or a row of bits; got ", s.ids[e]);
    }
  }
  s.set_stride_h = a.set_h == 1 ? 0 : 1;
  s.set_stride_b = a.set_b == 1 ? 0 : a.set_h;
  return s;
}

AttentionProblem make_problem(const Args& a) {
  const Tensor q(a.q, kOp, "q"), k(a.k, kOp, "k"), v(a.v, kOp, "v"), bias(a.bias, kOp, "bias");
  q.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B, H, Tq, D)");
  AttentionProblem p{};
  p.dtype = q.dtype();
  p.B = q.size(0), p.H = q.size(1), p.Tq = q.size(2), p.D = q.size(3);
  k.on(kDLCPU).dtype_in({p.dtype}).rank_is(4, "(B, Hkv, Tk, D)");
  p.Hkv = k.size(1), p.Tk = k.size(2);
  k.shape_is({p.B, p.Hkv, p.Tk, p.D}, "(B, Hkv, Tk, D)");
  v.on(kDLCPU).dtype_in({p.dtype}).rank_is(4, "(B, Hkv, Tk, Dv)");
  p.Dv = v.size(3);
  v.shape_is({p.B, p.Hkv, p.Tk, p.Dv}, "(B, Hkv, Tk, Dv)");
  require(p.D >= 1 && p.D <= 256 && p.Dv >= 1 && p.Dv <= 256, kOp, ": head dims must be 1 to 256; got D ", p.D, ", Dv ", p.Dv);
  require(p.Hkv > 0 ? p.H % p.Hkv == 0 : p.H == 0, kOp, ": k has ", p.Hkv, " heads, which must divide q's ", p.H);
  require(std::isfinite(a.scale), kOp, ": scale must be finite; got ", a.scale);
  require(std::isfinite(a.softcap) && a.softcap >= 0, kOp, ": softcap must be positive, or 0 for none; got ", a.softcap);
  require(a.dropout_p >= 0 && a.dropout_p <= 1, kOp, ": dropout_p must be in [0, 1]; got ", a.dropout_p);
  p.q = operand(q), p.k = operand(k), p.v = operand(v);
  p.scale = static_cast<float>(a.scale), p.softcap = static_cast<float>(a.softcap);
  p.drop_all = a.dropout_p == 1.0;
  p.drop_below = static_cast<uint32_t>(std::min(a.dropout_p * 4294967296.0, 4294967295.0));
  p.keep_scale = p.drop_all ? 0.0f : static_cast<float>(1.0 / (1.0 - a.dropout_p));
  p.seed = static_cast<uint64_t>(a.seed);
  if (bias.present()) {
    bias.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B|1, H|1, Tq|1, Tk|1)");
    const int64_t full[] = {p.B, p.H, p.Tq, p.Tk};
    int64_t strides[4];
    for (int i = 0; i < 4; ++i) {
      require(bias.size(i) == full[i] || bias.size(i) == 1, kOp,
              ": bias must be (B|1, H|1, Tq|1, Tk|1) with (B, H, Tq, Tk) = (", p.B, ", ", p.H, ", ", p.Tq, ", ", p.Tk,
              "); got ", bias.shape_text());
      strides[i] = bias.size(i) == 1 ? 0 : bias.stride(i);
    }
    require(bias.size(3) == 1 || strides[3] == 1 || strides[3] == 0, kOp,
            ": bias must be contiguous or expanded in its last dimension; got stride ", strides[3]);
    p.bias = bias.raw(), p.bias_dtype = bias.dtype();
    p.bias_sb = strides[0], p.bias_sh = strides[1], p.bias_sq = strides[2], p.bias_sk = strides[3];
  }
  const Tensor sinks(a.sinks, kOp, "sinks");
  if (sinks.present()) p.sinks = sinks.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.H}, "(H)").contiguous().data<float>();
  p.schedule = make_schedule(a, p.B, p.H, p.Tq, p.Tk);
  return p;
}

// relative as the kernels read it: backwards, in log2 units, and with kTile readable floats behind each row.
std::vector<float> set_relative(const Args& a, AttentionProblem& p) {
  const Tensor relative(a.relative, kOp, "relative");
  if (!relative.present() || p.Tq + p.Tk == 0) return {};
  relative.on(kDLCPU).dtype_in({Dtype::f32}).rank_is(3, "(B|1, H|1, Tq + Tk - 1)").last_dim_contiguous();
  const int64_t length = p.Tq + p.Tk - 1, sets_b = relative.size(0), sets_h = relative.size(1);
  require((sets_b == 1 || sets_b == p.B) && (sets_h == 1 || sets_h == p.H) && relative.size(2) == length, kOp,
          ": relative must be (B|1, H|1, Tq + Tk - 1) with (B, H, Tq + Tk - 1) = (", p.B, ", ", p.H, ", ", length, "); got ",
          relative.shape_text());
  const int64_t row = length + 2 * kTile;
  std::vector<float> reversed(sets_b * sets_h * row, 0.0f);
  for (int64_t n = 0; n < sets_b * sets_h; ++n) {
    const float* from = relative.data<float>() + n / sets_h * relative.stride(0) + n % sets_h * relative.stride(1);
    float* to = reversed.data() + n * row + kTile;
    for (int64_t x = 0; x < length; ++x) to[x] = from[length - 1 - x] * 1.44269504088896341f;
  }
  p.relative = reversed.data() + kTile;
  p.relative_sh = sets_h == 1 ? 0 : row;
  p.relative_sb = sets_b == 1 ? 0 : sets_h * row;
  return reversed;
}

void set_lse(AttentionProblem& p, const Tensor& lse) {
  lse.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({2, p.B, p.H, p.Tq}, "(2, B, H, Tq)").contiguous();
  p.lse = lse.data<float>();
  p.lse_factor = p.lse + p.B * p.H * p.Tq;
}

template <class T>
void wait_until(const std::atomic<T>& counter, T value) {
  for (int spins = 0; counter.load(std::memory_order_acquire) != value; ++spins)
    if (spins > 64) std::this_thread::yield();
}

// For every pair pack(pair, slot, key tile), then serve(pair, slot, tile of its group's queries, thread). Pairs go in rounds:
// the few panels of a round stay in the L2 caches, and two rounds have slots, so that who is done with one begins the next.
// Items are claimed in rising order, so what an item waits for is always running or done.
template <class Pack, class Serve>
void in_rounds(const AttentionProblem& p, const FwdPlan& plan, Pack&& pack, Serve&& serve) {
  const int64_t pairs = p.B * p.Hkv, k_tiles = p.schedule.k_tiles, q_tiles = p.group() * p.schedule.q_tiles;
  const int64_t rounds = (pairs + plan.pairs_at_once - 1) / plan.pairs_at_once;
  const auto pairs_in = [&](int64_t round) { return std::min(plan.pairs_at_once, pairs - round * plan.pairs_at_once); };
  std::unique_ptr<std::atomic<int64_t>[]> packed(new std::atomic<int64_t>[rounds]), served(new std::atomic<int64_t>[rounds]);
  for (int64_t r = 0; r < rounds; ++r) packed[r].store(0), served[r].store(0);
  parallel_claim(pairs * (k_tiles + q_tiles), plan.threads, [&](int64_t item, int thread) {
    const int64_t round = item / (plan.pairs_at_once * (k_tiles + q_tiles)), count = pairs_in(round);
    const int64_t first = round * plan.pairs_at_once, slots = round % 2 * plan.pairs_at_once;
    int64_t n = item - first * (k_tiles + q_tiles);
    if (n < count * k_tiles) {
      if (round >= 2) wait_until(served[round - 2], pairs_in(round - 2) * q_tiles);
      pack(first + n / k_tiles, slots + n / k_tiles, n % k_tiles);
      packed[round].fetch_add(1, std::memory_order_release);
    } else {
      n -= count * k_tiles;
      wait_until(packed[round], count * k_tiles);
      serve(first + n / q_tiles, slots + n / q_tiles, n % q_tiles, thread);
      served[round].fetch_add(1, std::memory_order_release);
    }
  });
}

void fwd(const Args& a, const DLTensor* o_, const DLTensor* lse_) {
  AttentionProblem p = make_problem(a);
  const std::vector<float> relative = set_relative(a, p);
  const Tensor o(o_, kOp, "o"), lse(lse_, kOp, "lse");
  o.on(kDLCPU).dtype_in({p.dtype}).shape_is({p.B, p.H, p.Tq, p.Dv}, "(B, H, Tq, Dv)");
  if (lse.present()) set_lse(p, lse);
  p.o = operand(o);
  if (o.numel() == 0 && (!lse.present() || lse.numel() == 0)) return;

  const AttentionKernels& kernels = attention_kernels_now();
  const Schedule& s = p.schedule;
  const int64_t pairs = p.B * p.Hkv;
  const FwdPlan plan(p, kernels.width, num_threads(), a.set_b * a.set_h);
  const int64_t scratch_floats = kernels.fwd_scratch(p);
  float* shared = shared_scratch.floats(plan.shared_floats + plan.threads * (plan.own_floats + scratch_floats));
  float* own = shared + plan.shared_floats;
  const auto panels_of = [&](float* base, int64_t first, int64_t tiles) {
    KeyValuePanels panels{base, base + tiles * plan.k_tile_floats, nullptr, first};
    panels.v_finite = reinterpret_cast<uint8_t*>(panels.v + tiles * plan.v_tile_floats);
    return panels;
  };
  const auto panels_at = [&](float* base) { return panels_of(base, 0, s.k_tiles); };
  // Head after head, so that a head's panels stay in the L2 cache; long query tiles first, so that no thread is left with one
  // at the end.
  const auto query_tile = [&](int64_t n) { return s.q_tiles - 1 - n; };

  switch (plan.mode) {
    case FwdPlan::Mode::per_pair:  // a thread packs a (b, hkv) and serves all its queries
      parallel_claim(pairs, plan.threads, [&](int64_t pair, int thread) {
        float* mine = own + thread * (plan.own_floats + scratch_floats);
        const KeyValuePanels panels = panels_at(mine);
        const int64_t b = pair / p.Hkv, hkv = pair % p.Hkv;
        for (int64_t kt = 0; kt < s.k_tiles; ++kt) kernels.pack(p, b, hkv, kt, panels);
        for (int64_t g = 0; g < p.group(); ++g)
          for (int64_t qt = 0; qt < s.q_tiles; ++qt) kernels.fwd(p, b, hkv * p.group() + g, qt, panels, mine + plan.own_floats);
      });
      break;
    case FwdPlan::Mode::local: {  // a thread packs the few keys that a chunk of queries needs
      const int64_t chunks = (s.q_tiles + plan.chunk_tiles - 1) / plan.chunk_tiles;
      parallel_claim(pairs * chunks, plan.threads, [&](int64_t n, int thread) {
        float* mine = own + thread * (plan.own_floats + scratch_floats);
        const int64_t pair = n / chunks, b = pair / p.Hkv, hkv = pair % p.Hkv, begin = n % chunks * plan.chunk_tiles;
        const int64_t end = std::min(begin + plan.chunk_tiles, s.q_tiles);
        int64_t first, last;
        s.visited_range(a.set_b * a.set_h, begin, end, first, last);
        const KeyValuePanels panels = panels_of(mine, first, std::max<int64_t>(last - first + 1, 0));
        for (int64_t kt = first; kt <= last; ++kt) kernels.pack(p, b, hkv, kt, panels);
        for (int64_t g = 0; g < p.group(); ++g)
          for (int64_t qt = begin; qt < end; ++qt) kernels.fwd(p, b, hkv * p.group() + g, qt, panels, mine + plan.own_floats);
      });
      break;
    }
    case FwdPlan::Mode::on_the_way:  // too few queries to pay for packing: each query tile packs what it visits
      parallel_claim(p.B * p.H * s.q_tiles, plan.threads, [&](int64_t n, int thread) {
        const int64_t head = n / s.q_tiles;
        kernels.fwd(p, head / p.H, head % p.H, query_tile(n % s.q_tiles), KeyValuePanels{}, own + thread * scratch_floats);
      });
      break;
    case FwdPlan::Mode::shared:  // all pack a round of pairs together, then share its query tiles out
      in_rounds(
          p, plan,
          [&](int64_t pair, int64_t slot, int64_t kt) {
            kernels.pack(p, pair / p.Hkv, pair % p.Hkv, kt, panels_at(shared + slot * plan.pair_floats));
          },
          [&](int64_t pair, int64_t slot, int64_t n, int thread) {
            kernels.fwd(p, pair / p.Hkv, pair % p.Hkv * p.group() + n / s.q_tiles, query_tile(n % s.q_tiles),
                        panels_at(shared + slot * plan.pair_floats), own + thread * scratch_floats);
          });
      break;
  }
  shared_scratch.release_if_large();
}

// Turns of the key blocks at each query tile's dq: a block waits for the previous block that visits the tile. Blocks are
// claimed in rising order, so the one waited for is always running or done.
class Turns {
 public:
  Turns(const AttentionProblem& p, int64_t block_tiles)
      : p_(p), block_tiles_(block_tiles), tiles_(p.schedule.q_tiles), done_(new std::atomic<int32_t>[p.B * p.H * tiles_]) {
    for (int64_t i = 0; i < p.B * p.H * tiles_; ++i) done_[i].store(-1, std::memory_order_relaxed);
  }
  struct Block {
    Turns* turns;
    int64_t b, block;
  };
  static void enter(void* self, int64_t h, int64_t qt) {
    const Block& x = *static_cast<Block*>(self);
    Turns& t = *x.turns;
    const int64_t kt = t.p_.schedule.previous_key_tile(t.p_.schedule.set_of(x.b, h), qt, x.block * t.block_tiles_);
    const int32_t wanted = kt < 0 ? -1 : static_cast<int32_t>(kt / t.block_tiles_);
    wait_until(t.done_[(x.b * t.p_.H + h) * t.tiles_ + qt], wanted);
  }
  static void leave(void* self, int64_t h, int64_t qt) {
    const Block& x = *static_cast<Block*>(self);
    x.turns->done_[(x.b * x.turns->p_.H + h) * x.turns->tiles_ + qt].store(static_cast<int32_t>(x.block),
                                                                           std::memory_order_release);
  }

 private:
  const AttentionProblem& p_;
  const int64_t block_tiles_, tiles_;
  std::unique_ptr<std::atomic<int32_t>[]> done_;
};

// The tile list by key blocks: which query tiles visit each block. One pass counts, one fills.
struct Visits {
  std::vector<int64_t> ptr;
  std::vector<int32_t> tiles;

  Visits(Schedule& s, int64_t sets, int64_t block_tiles) {
    if (s.row_ptr == nullptr || s.same_for_all_queries) return;
    const int64_t blocks = (s.k_tiles + block_tiles - 1) / block_tiles;
    const auto for_visits = [&](auto&& body) {
      for (int64_t set = 0; set < sets; ++set)
        for (int64_t qt = 0; qt < s.q_tiles; ++qt) {
          int64_t last = -1;
          for (int64_t e = s.row_ptr[set * s.q_tiles + qt]; e < s.row_ptr[set * s.q_tiles + qt + 1]; ++e) {
            const int64_t block = s.cols[e] / block_tiles;
            if (block != last) body(set * blocks + block, qt);
            last = block;
          }
        }
    };
    ptr.assign(sets * blocks + 1, 0);
    for_visits([&](int64_t block, int64_t) { ++ptr[block + 1]; });
    for (size_t i = 1; i < ptr.size(); ++i) ptr[i] += ptr[i - 1];
    tiles.resize(ptr.back());
    std::vector<int64_t> at(ptr.begin(), ptr.end() - 1);
    for_visits([&](int64_t block, int64_t qt) { tiles[at[block]++] = static_cast<int32_t>(qt); });
    s.visit_ptr = ptr.data(), s.visits = tiles.data(), s.blocks = blocks;
  }
};

void bwd(const Args& a, const DLTensor* o_, const DLTensor* lse_, const DLTensor* d_o_, const DLTensor* d_lse_,
         const DLTensor* dq_, const DLTensor* dk_, const DLTensor* dv_, const DLTensor* dbias_, const DLTensor* drelative_,
         const DLTensor* delta_) {
  AttentionProblem p = make_problem(a);
  const std::vector<float> relative = set_relative(a, p);
  const Tensor o(o_, kOp, "o"), lse(lse_, kOp, "lse"), d_o(d_o_, kOp, "d_o"), d_lse(d_lse_, kOp, "d_lse"), dq(dq_, kOp, "dq"),
      dk(dk_, kOp, "dk"), dv(dv_, kOp, "dv"), dbias(dbias_, kOp, "dbias"), drelative(drelative_, kOp, "drelative"),
      own_delta(delta_, kOp, "delta");
  o.on(kDLCPU).dtype_in({p.dtype}).shape_is({p.B, p.H, p.Tq, p.Dv}, "(B, H, Tq, Dv)");
  d_o.on(kDLCPU).dtype_in({p.dtype}).shape_is({p.B, p.H, p.Tq, p.Dv}, "(B, H, Tq, Dv)");
  set_lse(p, lse);
  if (d_lse.present()) d_lse.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.B, p.H, p.Tq}, "(B, H, Tq)").contiguous();
  dq.on(kDLCPU).dtype_in({p.dtype}).shape_is({p.B, p.H, p.Tq, p.D}, "(B, H, Tq, D)");
  dk.on(kDLCPU).dtype_in({p.dtype}).shape_is({p.B, p.Hkv, p.Tk, p.D}, "(B, Hkv, Tk, D)");
  dv.on(kDLCPU).dtype_in({p.dtype}).shape_is({p.B, p.Hkv, p.Tk, p.Dv}, "(B, Hkv, Tk, Dv)");
  p.o = operand(o), p.d_o = operand(d_o);
  p.dq = operand(dq), p.dk = operand(dk), p.dv = operand(dv);
  bool bias_shared_b = false, bias_shared_h = false;
  if (dbias.present()) {
    require(p.bias != nullptr, kOp, ": dbias needs bias");
    const Tensor bias(a.bias, kOp, "bias");
    dbias.on(kDLCPU)
        .dtype_in({Dtype::f32})
        .shape_is({bias.size(0), bias.size(1), bias.size(2), p.Tk}, "(B|1, H|1, Tq|1, Tk)")
        .contiguous();
    p.dbias = dbias.data<float>();
    bias_shared_b = bias.size(0) == 1 && p.B > 1, bias_shared_h = bias.size(1) == 1 && p.H > 1;
    p.dbias_sq = bias.size(2) == 1 ? 0 : p.Tk;
    p.dbias_sh = bias.size(1) == 1 ? 0 : bias.size(2) * p.Tk;
    p.dbias_sb = bias.size(0) == 1 ? 0 : bias.size(1) * bias.size(2) * p.Tk;
  }

  if (drelative.present()) {
    drelative.on(kDLCPU).dtype_in({Dtype::f32}).rank_is(3, "(B, H, Tq + Tk - 1)").contiguous();
    require(p.relative != nullptr, kOp, ": drelative needs relative");
    drelative.shape_is({p.B, p.H, p.Tq + p.Tk - 1}, "(B, H, Tq + Tk - 1)");
    p.drelative = drelative.data<float>();
  }

  const AttentionKernels& kernels = attention_kernels_now();
  Schedule& s = p.schedule;
  const int64_t rows = p.B * p.H * p.Tq;
  // Key blocks of all pairs that add to the same part of dbias are one unit: its pairs take their turn inside the block.
  const int64_t b_in_unit = bias_shared_b ? p.B : 1, hkv_in_unit = bias_shared_h ? p.Hkv : 1;
  const int64_t units_b = p.B / std::max<int64_t>(b_in_unit, 1), units_h = p.Hkv / std::max<int64_t>(hkv_in_unit, 1),
                units = units_b * units_h;
  const BwdPlan plan(p, kernels.width, num_threads(), units);
  const Visits visits(s, a.set_b * a.set_h, plan.block_tiles);
  const int64_t scratch_floats = kernels.bwd_scratch(p, plan.block_tiles);
  const bool in_place = p.dtype == Dtype::f32 && p.D % kernels.width == 0;
  const int64_t padded_D = round_up_to(p.D, kernels.width);
  const int64_t delta_floats = round_up_to(rows, 16), sum_floats = in_place ? 0 : round_up_to(rows * padded_D, 16);
  float* delta = shared_scratch.floats(delta_floats + sum_floats + plan.threads * scratch_floats);
  float *dq_sums = delta + delta_floats, *own = dq_sums + sum_floats;
  if (own_delta.present())
    delta = own_delta.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.B, p.H, p.Tq}, "(B, H, Tq)").contiguous().data<float>();
  p.delta = delta;
  p.dq_sum = in_place ? p.dq : Operand{dq_sums, p.H * p.Tq * padded_D, p.Tq * padded_D, padded_D};

  parallel_for(rows, 256, [&](int64_t begin, int64_t end) {
    kernels.delta(p, d_lse.present() ? d_lse.data<float>() : nullptr, begin, end, delta);
    kernels.zero_dq_sum(p, begin, end);
  });
  Turns turns(p, plan.block_tiles);
  const int64_t blocks = (s.k_tiles + plan.block_tiles - 1) / plan.block_tiles;
  const auto one_block = [&](int64_t block, int64_t unit, int thread) {
    const int64_t begin = block * plan.block_tiles, end = std::min(begin + plan.block_tiles, s.k_tiles);
    for (int64_t b = unit / units_h * b_in_unit; b < (unit / units_h + 1) * b_in_unit; ++b)
      for (int64_t hkv = unit % units_h * hkv_in_unit; hkv < (unit % units_h + 1) * hkv_in_unit; ++hkv) {
        Turns::Block turn{&turns, b, block};
        kernels.bwd(p, b, hkv, block, begin, end, DqOrder{&turn, Turns::enter, Turns::leave}, own + thread * scratch_floats);
      }
  };
  if (p.drelative) {  // its diagonals run through all blocks: a unit is one thread's, so that they are summed in order
    parallel_claim(units, plan.threads, [&](int64_t unit, int thread) {
      for (int64_t block = 0; block < blocks; ++block) one_block(block, unit, thread);
    });
    for (int64_t n = 0; n < p.B * p.H; ++n) {
      float* row = p.drelative + n * (p.Tq + p.Tk - 1);
      std::reverse(row, row + p.Tq + p.Tk - 1);
    }
  } else {
    parallel_claim(blocks * units, plan.threads, [&](int64_t n, int thread) { one_block(n / units, n % units, thread); });
  }
  if (!in_place) parallel_for(rows, 256, [&](int64_t begin, int64_t end) { kernels.store_dq(p, begin, end); });
  shared_scratch.release_if_large();
}

}  // namespace
}  // namespace mlcore

int mlc_attention_fwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias, const DLTensor* relative,
                      const DLTensor* sinks, int64_t left, int64_t right, int64_t offset, const DLTensor* row_ptr,
                      const DLTensor* cols, const DLTensor* ids, const DLTensor* bits, int64_t set_b, int64_t set_h,
                      double scale, double softcap, double dropout_p, int64_t seed, DLTensor* o, DLTensor* lse) {
  return mlcore::guard([&] {
    mlcore::fwd({q, k, v, bias, relative, sinks, row_ptr, cols, ids, bits, left, right, offset, set_b, set_h, scale, softcap,
                 dropout_p, seed},
                o, lse);
  });
}

int mlc_attention_bwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias, const DLTensor* relative,
                      const DLTensor* sinks, int64_t left, int64_t right, int64_t offset, const DLTensor* row_ptr,
                      const DLTensor* cols, const DLTensor* ids, const DLTensor* bits, int64_t set_b, int64_t set_h,
                      double scale, double softcap, double dropout_p, int64_t seed, const DLTensor* o, const DLTensor* lse,
                      const DLTensor* d_o, const DLTensor* d_lse, DLTensor* dq, DLTensor* dk, DLTensor* dv, DLTensor* dbias,
                      DLTensor* drelative, DLTensor* delta) {
  return mlcore::guard([&] {
    mlcore::bwd({q, k, v, bias, relative, sinks, row_ptr, cols, ids, bits, left, right, offset, set_b, set_h, scale, softcap,
                 dropout_p, seed},
                o, lse, d_o, d_lse, dq, dk, dv, dbias, drelative, delta);
  });
}
