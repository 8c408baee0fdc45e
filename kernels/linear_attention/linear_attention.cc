// Lists the (sequence, head) pairs and shares the phases of their chunks out to threads. The contract is linear_attention.h,
// its checks linear_attention_args.h, the arithmetic the *_cpu.inl files.
#include "linear_attention/linear_attention.h"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "core/parallel.h"
#include "core/scratch.h"
#include "linear_attention/linear_attention_args.h"

namespace mlcore {
namespace {

constexpr const char* kOp = kLinearAttention;
constexpr int64_t kCachedFloats = 1 << 18;  // of a thread's slots: 1 MiB, half an L2 cache
thread_local Scratch shared_scratch;        // of the calling thread; its workers get slices

std::vector<Item> items_of(const LinearAttentionProblem& p) {
  std::vector<Item> items;
  items.reserve(static_cast<size_t>(p.sequences * p.H));
  for (int64_t n = 0; n < p.sequences; ++n)
    for (int64_t h = 0; h < p.H; ++h) {
      const int64_t b = p.cu_seqlens ? 0 : n, start = p.cu_seqlens ? p.cu_seqlens[n] : 0;
      const int64_t length = p.cu_seqlens ? p.cu_seqlens[n + 1] - start : p.Tq;
      items.push_back({n, b, h, start, length, p.cu_seqlens ? length : p.Tk,
                       (b * p.H + h) * p.slots + (p.cu_seqlens ? start / p.span + n : 0)});
    }
  return items;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the work is shared. Where items keep all threads busy, each is one thread's from its first token to its last, and its
// operands stay in that thread's cache (walk). Else, where items have many spans of tokens, threads take these one after the
// other and hand the state on (relay). Else all threads work on the same group of chunks: phases that need no state cut by
// chunks, those that do by the state's rows or, with the delta rule, by columns of the values. No cut changes a bit.
struct Plan {
  int threads;
  bool walk, relay;
  int64_t tiles, tile_cols;  // of the values' padded columns

  // Below this many multiplications a second thread costs more than it brings (about 20 us).
  static constexpr double kWorthAThread = 2e6;

  Plan(const LinearAttentionProblem& p, int64_t items, int width) {
    const double work = static_cast<double>(p.B * p.H) * static_cast<double>(p.Tq + p.Tk) *
                        static_cast<double>((p.D + kChunk) * (p.Dv + kChunk)) / 4;
    threads = static_cast<int>(std::max(1.0, std::min<double>(num_threads(), work / kWorthAThread)));
    walk = threads == 1 || items % threads == 0 || items >= 4 * threads;
    relay = !walk && p.causal && !p.delta() && items * ceil_div(p.Tq, p.span) >= 2 * threads;
    const int64_t cols = ceil_div(p.Dv, width) * width;
    const int64_t wanted = walk ? 1 : ceil_div(threads, std::max<int64_t>(items, 1));
    tile_cols = ceil_div(ceil_div(cols, std::min<int64_t>(wanted, cols / width)), width) * width;
    tiles = ceil_div(cols, tile_cols);
  }
  int64_t tile_end(int64_t tile, int64_t cols) const { return std::min((tile + 1) * tile_cols, cols); }
};

// Items [first, first + count) of the problem with their states and slots: all of one thread's (me), or shared by all threads.
class Crew {
 public:
  const LinearAttentionProblem& p;
  const LinearAttentionKernels& kernels;
  const Plan& plan;
  const Item* items;
  int64_t count, group;  // chunks that have slots at once
  bool backward;
  float *base, *scratch;  // base: of the items' memory; scratch: of all threads
  int me = 0;

  static int64_t item_floats(const LinearAttentionProblem& p, const LinearAttentionKernels& k, int64_t group, bool backward) {
    return 2 * rounded(k.state_floats(p)) + group * k.slot_floats(p, backward);
  }
  float* state(int64_t i) const { return base + i * item_floats(p, kernels, group, backward); }
  float* d_state(int64_t i) const { return state(i) + rounded(kernels.state_floats(p)); }
  float* slot(int64_t i, int64_t c) const {
    return state(i) + 2 * rounded(kernels.state_floats(p)) + c * kernels.slot_floats(p, backward);
  }
  float* work(int thread) const { return scratch + thread * kernels.scratch_floats(p); }
  int64_t cols() const { return ceil_div(p.Dv, kernels.width) * kernels.width; }
  int64_t chunks(int64_t i) const { return ceil_div(items[i].q_length, kChunk); }
  int64_t most_chunks() const {
    int64_t most = 0;
    for (int64_t i = 0; i < count; ++i) most = std::max(most, chunks(i));
    return most;
  }

  // body(n, thread) for n < total
  template <class F>
  void run(int64_t total, F&& body) const {
    if (plan.walk) {
      for (int64_t n = 0; n < total; ++n) body(n, me);
    } else {
      parallel_claim(total, plan.threads, body);
    }
  }
  // body(part, parts, thread): the same part by the same thread in every phase, in whose cache its slots then are.
  template <class F>
  void each_part(F&& body) const {
    if (plan.walk) return body(int64_t{0}, int64_t{1}, me);
    const int64_t parts = plan.threads;
    parallel_for(parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) body(part, parts, static_cast<int>(part));
    });
  }
  // body(item, chunk within the group, thread) for chunks from g on that exist
  template <class F>
  void each_chunk(int64_t g, F&& body) const {
    each_part([&](int64_t part, int64_t parts, int thread) {
      for (int64_t n = count * group * part / parts; n < count * group * (part + 1) / parts; ++n)
        if (g + n % group < chunks(n / group)) body(n / group, n % group, thread);
    });
  }
  // body(item, chunks of the group, c0, c1, thread)
  template <class F>
  void each_tile(int64_t g, F&& body) const {
    run(count * plan.tiles, [&](int64_t n, int thread) {
      const int64_t i = n / plan.tiles, tile = n % plan.tiles, here = std::min(group, chunks(i) - g);
      if (here > 0) body(i, here, tile * plan.tile_cols, plan.tile_end(tile, cols()), thread);
    });
  }
  // body(item, chunks of the group, d0, d1)
  template <class F>
  void each_row_part(int64_t g, F&& body) const {
    each_part([&](int64_t part, int64_t parts, int) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t here = std::min(group, chunks(i) - g);
        if (here > 0) body(i, here, p.D * part / parts, p.D * (part + 1) / parts);
      }
    });
  }

 private:
  static int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }
};

int64_t state_rows(const LinearAttentionProblem& p) { return p.D * p.state_cols(); }
float* rows_of(const LinearAttentionProblem& p, float* states, const Item& item) {
  return states ? states + (item.sequence * p.H + item.h) * state_rows(p) : nullptr;
}
const float* rows_of(const LinearAttentionProblem& p, const float* states, const Item& item) {
  return states ? states + (item.sequence * p.H + item.h) * state_rows(p) : nullptr;
}

void fwd_causal(const Crew& x) {
  const LinearAttentionProblem& p = x.p;
  const LinearAttentionKernels& k = x.kernels;
  x.run(x.count, [&](int64_t i, int) { k.load_state(p, rows_of(p, p.initial_state, x.items[i]), x.state(i)); });
  const bool local = !x.plan.walk && !p.delta();
  for (int64_t g = 0; g < x.most_chunks(); g += x.group) {
    const auto t = [&](int64_t c) { return (g + c) * kChunk; };
    if (p.states && !local && t(0) % p.span == 0)
      x.run(x.count, [&](int64_t i, int) {
        if (g < x.chunks(i)) k.store_state(p, x.state(i), p.states + (x.items[i].first_slot + t(0) / p.span) * state_rows(p));
      });
    x.each_chunk(g, [&](int64_t i, int64_t c, int thread) {
      k.prepare(p, x.items[i], t(c), x.slot(i, c), x.work(thread), false);
      if (local) k.local_states(p, x.items[i], t(c), x.slot(i, c), false);
    });
    if (local) {
      x.each_row_part(g, [&](int64_t i, int64_t here, int64_t d0, int64_t d1) {
        for (int64_t c = 0; c < here; ++c) k.scan(p, x.slot(i, c), x.state(i), d0, d1, false);
      });
      x.each_chunk(g, [&](int64_t i, int64_t c, int thread) {
        float* kept =
            p.states && t(c) % p.span == 0 ? p.states + (x.items[i].first_slot + t(c) / p.span) * state_rows(p) : nullptr;
        k.outputs(p, x.items[i], t(c), x.slot(i, c), kept, x.work(thread));
      });
    } else {
      x.each_tile(g, [&](int64_t i, int64_t here, int64_t c0, int64_t c1, int thread) {
        for (int64_t c = 0; c < here; ++c) k.advance(p, x.items[i], t(c), x.slot(i, c), x.state(i), c0, c1, x.work(thread));
      });
    }
  }
  if (p.final_state)
    x.run(x.count, [&](int64_t i, int) { k.store_state(p, x.state(i), rows_of(p, p.final_state, x.items[i])); });
}

void bwd_causal(const Crew& x) {
  const LinearAttentionProblem& p = x.p;
  const LinearAttentionKernels& k = x.kernels;
  x.run(x.count, [&](int64_t i, int) { k.load_state(p, rows_of(p, p.d_final_state, x.items[i]), x.d_state(i)); });
  const int64_t last = (ceil_div(x.most_chunks(), x.group) - 1) * x.group;
  for (int64_t g = last; g >= 0; g -= x.group) {
    const auto t = [&](int64_t c) { return (g + c) * kChunk; };
    x.run(x.count, [&](int64_t i, int) {
      if (g < x.chunks(i)) k.load_state(p, p.states + (x.items[i].first_slot + t(0) / p.span) * state_rows(p), x.state(i));
    });
    x.each_chunk(g, [&](int64_t i, int64_t c, int thread) {
      k.prepare(p, x.items[i], t(c), x.slot(i, c), x.work(thread), true);
      if (!p.delta()) k.local_states(p, x.items[i], t(c), x.slot(i, c), true);
    });
    if (p.delta()) {
      x.each_tile(g, [&](int64_t i, int64_t here, int64_t c0, int64_t c1, int thread) {
        float* w = x.work(thread);
        for (int64_t c = 0; c < here; ++c) k.restate(p, x.items[i], t(c), x.slot(i, c), x.state(i), c0, c1, w);
        for (int64_t c = here - 1; c >= 0; --c) k.reverse(p, x.items[i], t(c), x.slot(i, c), x.d_state(i), c0, c1, w);
      });
    } else {
      x.each_row_part(g, [&](int64_t i, int64_t here, int64_t d0, int64_t d1) {
        for (int64_t c = 0; c < here; ++c) k.scan(p, x.slot(i, c), x.state(i), d0, d1, true);
        for (int64_t c = here - 1; c >= 0; --c) k.reverse_scan(p, x.slot(i, c), x.d_state(i), d0, d1);
      });
    }
    x.each_chunk(g, [&](int64_t i, int64_t c, int thread) {
      const bool inside = c + 1 < std::min(x.group, x.chunks(i) - g);
      k.gradients(p, x.items[i], t(c), x.slot(i, c), inside ? x.slot(i, c + 1) : nullptr, x.state(i), x.work(thread));
    });
  }
  if (p.d_initial_state)
    x.run(x.count, [&](int64_t i, int) { k.store_state(p, x.d_state(i), rows_of(p, p.d_initial_state, x.items[i])); });
}

// Causal without the delta rule, spans of every item shared by all threads. A thread makes what its span adds to the state,
// waits for the state that the span before leaves (in backward: for the gradient from behind), hands on its own, and only then
// computes outputs: nobody waits but for the few additions of those before. Spans are claimed in the order of the waiting.
class Relay {
 public:
  Relay(const LinearAttentionProblem& p, const std::vector<Item>& items, const Plan& plan, bool backward)
      : p_(p),
        k_(linear_attention_kernels_now()),
        items_(items),
        threads_(plan.threads),
        backward_(backward),
        per_span_(p.span / kChunk),
        state_((k_.state_floats(p) + 15) / 16 * 16),
        slot_(k_.slot_floats(p, backward)),
        own_(state_ + per_span_ * slot_ + k_.scratch_floats(p)),
        done_(items.size()) {
    base_ = shared_scratch.floats(static_cast<size_t>(count() * state_ + threads_ * own_));
  }

  void run() {
    const float* start = backward_ ? p_.d_final_state : p_.initial_state;
    float* end = backward_ ? p_.d_initial_state : p_.final_state;
    int64_t most = 0;
    for (int64_t i = 0; i < count(); ++i) {
      k_.load_state(p_, rows_of(p_, start, item(i)), state(i));
      most = std::max(most, spans(i));
    }
    parallel_claim(count() * most, threads_, [&](int64_t n, int thread) {
      const int64_t i = n % count(), turn = n / count();
      if (turn < spans(i)) span(i, turn, base_ + count() * state_ + thread * own_);
    });
    for (int64_t i = 0; end && i < count(); ++i) k_.store_state(p_, state(i), rows_of(p_, end, item(i)));
  }

 private:
  int64_t count() const { return static_cast<int64_t>(items_.size()); }
  const Item& item(int64_t i) const { return items_[static_cast<size_t>(i)]; }
  float* state(int64_t i) const { return base_ + i * state_; }
  int64_t spans(int64_t i) const { return ceil_div(item(i).q_length, p_.span); }

  void span(int64_t i, int64_t turn, float* own) {
    const int64_t number = backward_ ? spans(i) - 1 - turn : turn, t0 = number * p_.span;
    const int64_t chunks = std::min(per_span_, ceil_div(item(i).q_length - t0, kChunk));
    float *after = own, *work = own + state_ + per_span_ * slot_;
    float* kept = p_.states ? p_.states + (item(i).first_slot + number) * state_rows(p_) : nullptr;
    const auto slot = [&](int64_t c) { return own + state_ + c * slot_; };
    for (int64_t c = 0; c < chunks; ++c) {
      k_.prepare(p_, item(i), t0 + c * kChunk, slot(c), work, backward_);
      k_.local_states(p_, item(i), t0 + c * kChunk, slot(c), backward_);
    }
    if (backward_) {
      k_.load_state(p_, kept, after);
      for (int64_t c = 0; c < chunks; ++c) k_.scan(p_, slot(c), after, 0, p_.D, true);
    }
    std::atomic<int64_t>& done = done_[static_cast<size_t>(i)];
    for (int tries = 0; done.load(std::memory_order_acquire) != turn; ++tries)
      if (tries > 1000) std::this_thread::yield();
    for (int64_t c = 0; c < chunks; ++c)
      backward_ ? k_.reverse_scan(p_, slot(chunks - 1 - c), state(i), 0, p_.D) : k_.scan(p_, slot(c), state(i), 0, p_.D, false);
    done.store(turn + 1, std::memory_order_release);
    for (int64_t c = 0; c < chunks; ++c) {
      const int64_t t = t0 + c * kChunk;
      if (backward_) {
        k_.gradients(p_, item(i), t, slot(c), c + 1 < chunks ? slot(c + 1) : nullptr, after, work);
      } else {
        k_.outputs(p_, item(i), t, slot(c), c == 0 ? kept : nullptr, work);
      }
    }
  }

  const LinearAttentionProblem& p_;
  const LinearAttentionKernels& k_;
  const std::vector<Item>& items_;
  int threads_;
  bool backward_;
  int64_t per_span_, state_, slot_, own_;
  std::vector<std::atomic<int64_t>> done_;  // spans of an item whose states have been handed on
  float* base_ = nullptr;
};

void fwd_whole(const Crew& x) {
  const LinearAttentionProblem& p = x.p;
  const LinearAttentionKernels& k = x.kernels;
  x.run(x.count, [&](int64_t i, int) { k.load_state(p, rows_of(p, p.initial_state, x.items[i]), x.state(i)); });
  x.run(x.count * x.plan.tiles, [&](int64_t n, int thread) {
    const int64_t i = n / x.plan.tiles, c0 = n % x.plan.tiles * x.plan.tile_cols;
    for (int64_t t = 0; t < x.items[i].k_length; t += kChunk)
      k.gather_keys(p, x.items[i], t, x.state(i), c0, x.plan.tile_end(n % x.plan.tiles, x.cols()), x.work(thread));
  });
  if (p.final_state)
    x.run(x.count, [&](int64_t i, int) { k.store_state(p, x.state(i), rows_of(p, p.final_state, x.items[i])); });
  const int64_t most = x.most_chunks();
  x.run(x.count * most, [&](int64_t n, int thread) {
    const int64_t i = n / most, t = n % most * kChunk;
    if (t < x.items[i].q_length) k.read_queries(p, x.items[i], t, x.state(i), x.work(thread));
  });
}

void bwd_whole(const Crew& x) {
  const LinearAttentionProblem& p = x.p;
  const LinearAttentionKernels& k = x.kernels;
  x.run(x.count, [&](int64_t i, int) {
    k.load_state(p, rows_of(p, p.states, x.items[i]), x.state(i));
    k.load_state(p, rows_of(p, p.d_final_state, x.items[i]), x.d_state(i));
  });
  x.run(x.count * x.plan.tiles, [&](int64_t n, int thread) {
    const int64_t i = n / x.plan.tiles, c0 = n % x.plan.tiles * x.plan.tile_cols;
    for (int64_t t = 0; t < x.items[i].q_length; t += kChunk)
      k.gather_queries(p, x.items[i], t, x.d_state(i), c0, x.plan.tile_end(n % x.plan.tiles, x.cols()), x.work(thread));
  });
  if (p.d_initial_state)
    x.run(x.count, [&](int64_t i, int) { k.store_state(p, x.d_state(i), rows_of(p, p.d_initial_state, x.items[i])); });
  int64_t most = x.most_chunks();
  for (int64_t i = 0; i < x.count; ++i) most = std::max(most, ceil_div(x.items[i].k_length, kChunk));
  x.run(x.count * most, [&](int64_t n, int thread) {
    const int64_t i = n / most, t = n % most * kChunk;
    if (t < x.items[i].q_length) k.query_gradients(p, x.items[i], t, x.state(i), x.work(thread));
    if (t < x.items[i].k_length) k.key_gradients(p, x.items[i], t, x.d_state(i), x.work(thread));
  });
}

void perform(const LinearAttentionProblem& p, bool backward, void (*pass)(const Crew&)) {
  const LinearAttentionKernels& kernels = linear_attention_kernels_now();
  const std::vector<Item> items = items_of(p);
  const int64_t count = static_cast<int64_t>(items.size());
  if (count == 0) return;
  const Plan plan(p, count, kernels.width);
  if (plan.relay) {
    Relay(p, items, plan, backward).run();
    return shared_scratch.release_if_large();
  }
  // Walking forward, a chunk's operands are used at once; elsewhere the chunks of a span have slots at the same time, and with
  // the forward of all threads, to which every phase of a group costs a barrier, as many as fit the caches.
  int64_t group = !p.causal ? 0 : plan.walk && !backward ? 1 : p.span / kChunk;
  if (!plan.walk && !backward && !p.delta() && p.causal) {
    const int64_t fit = kCachedFloats * plan.threads / (count * kernels.slot_floats(p, false));
    group *= std::clamp<int64_t>(fit / group, 1, 8);
  }
  const int64_t own = Crew::item_floats(p, kernels, group, backward), crews = plan.walk ? plan.threads : count;
  float* base = shared_scratch.floats(static_cast<size_t>(crews * own + plan.threads * kernels.scratch_floats(p)));
  float* scratch = base + crews * own;
  if (plan.walk) {
    parallel_claim(count, plan.threads, [&](int64_t i, int thread) {
      pass({p, kernels, plan, &items[static_cast<size_t>(i)], 1, group, backward, base + thread * own, scratch, thread});
    });
  } else {
    pass({p, kernels, plan, items.data(), count, group, backward, base, scratch});
  }
  shared_scratch.release_if_large();
}

void fwd(const LinearAttentionArgs& a, const DLTensor* initial_state_, const DLTensor* o_, const DLTensor* den_,
         const DLTensor* final_state_, const DLTensor* states_) {
  LinearAttentionProblem p = make_problem(a);
  const Tensor o(o_, kOp, "o"), states(states_, kOp, "states");
  o.on(kDLCPU).dtype_in({p.q.dtype}).shape_is({p.B, p.H, p.Tq, p.Dv}, "(B, H, Tq, Dv)");
  p.o = tokens(o);
  p.initial_state = state_of(p, initial_state_, "initial_state");
  p.final_state = state_of(p, final_state_, "final_state");
  set_den(p, den_);
  if (states.present() && p.causal) set_states(p, states);
  perform(p, false, p.causal ? fwd_causal : fwd_whole);
}

void bwd(const LinearAttentionArgs& a, const DLTensor* o_, const DLTensor* den_, const DLTensor* states_, const DLTensor* d_o_,
         const DLTensor* d_final_state_, const DLTensor* dq_, const DLTensor* dk_, const DLTensor* dv_, const DLTensor* dgate_,
         const DLTensor* dbeta_, const DLTensor* d_initial_state_) {
  LinearAttentionProblem p = make_problem(a);
  const Tensor o(o_, kOp, "o"), states(states_, kOp, "states"), d_o(d_o_, kOp, "d_o"), dq(dq_, kOp, "dq"), dk(dk_, kOp, "dk"),
      dv(dv_, kOp, "dv"), dgate(dgate_, kOp, "dgate"), dbeta(dbeta_, kOp, "dbeta");
  o.on(kDLCPU).dtype_in({p.q.dtype}).shape_is({p.B, p.H, p.Tq, p.Dv}, "(B, H, Tq, Dv)");
  d_o.on(kDLCPU).dtype_in({p.q.dtype}).shape_is({p.B, p.H, p.Tq, p.Dv}, "(B, H, Tq, Dv)");
  dq.on(kDLCPU).dtype_in({p.q.dtype}).shape_is({p.B, p.H, p.Tq, p.D}, "(B, H, Tq, D)");
  dk.on(kDLCPU).dtype_in({p.q.dtype}).shape_is({p.B, p.H, p.Tk, p.D}, "(B, H, Tk, D)");
  dv.on(kDLCPU).dtype_in({p.q.dtype}).shape_is({p.B, p.H, p.Tk, p.Dv}, "(B, H, Tk, Dv)");
  p.o = tokens(o), p.d_o = tokens(d_o), p.dq = tokens(dq), p.dk = tokens(dk), p.dv = tokens(dv);
  set_den(p, den_);
  if (dgate.present()) {
    require(p.gated != Gate::none, kOp, ": dgate needs gate");
    dgate.on(kDLCPU).dtype_in({Dtype::f32});
    p.gated == Gate::scalar ? dgate.shape_is({p.B, p.H, p.Tq}, "(B, H, T)")
                            : dgate.shape_is({p.B, p.H, p.Tq, p.D}, "(B, H, T, D)");
    p.dgate = dgate.contiguous().data<float>();
  }
  if (dbeta.present()) {
    require(p.delta(), kOp, ": dbeta needs beta");
    p.dbeta = dbeta.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.B, p.H, p.Tq}, "(B, H, T)").contiguous().data<float>();
  }
  if (p.causal) {
    set_states(p, states);
  } else {
    p.states = state_of(p, states_, "states");
    require(p.states != nullptr || p.sequences * p.H == 0, kOp, ": states must be given");
  }
  p.d_final_state = state_of(p, d_final_state_, "d_final_state");
  p.d_initial_state = state_of(p, d_initial_state_, "d_initial_state");
  perform(p, true, p.causal ? bwd_causal : bwd_whole);
}

Tokens one_token(const Tensor& x) {
  if (x.rank() == 3) x.last_dim_contiguous();
  return {x.raw(), x.stride(0), x.stride(1), 0, x.dtype()};
}

void step(const DLTensor* q_, const DLTensor* k_, const DLTensor* v_, const DLTensor* gate_, const DLTensor* beta_,
          const DLTensor* state_, int64_t feature_map, int64_t normalize, const DLTensor* o_, const DLTensor* new_state_) {
  const Tensor q(q_, kOp, "q"), k(k_, kOp, "k"), v(v_, kOp, "v"), gate(gate_, kOp, "gate"), beta(beta_, kOp, "beta"),
      state(state_, kOp, "state"), o(o_, kOp, "o"), new_state(new_state_, kOp, "new_state");
  q.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(3, "(B, H, D)");
  LinearAttentionStep p{};
  const int64_t B = q.size(0);
  p.H = q.size(1), p.D = q.size(2), p.rows = B * p.H;
  k.on(kDLCPU).dtype_in({q.dtype()}).shape_is({B, p.H, p.D}, "(B, H, D)");
  v.on(kDLCPU).dtype_in({q.dtype()}).rank_is(3, "(B, H, Dv)");
  p.Dv = v.size(2);
  v.shape_is({B, p.H, p.Dv}, "(B, H, Dv)");
  require(p.D >= 1 && p.Dv >= 1, kOp, ": head dims must be at least 1; got D ", p.D, ", Dv ", p.Dv);
  o.on(kDLCPU).dtype_in({q.dtype()}).shape_is({B, p.H, p.Dv}, "(B, H, Dv)");
  p.map = feature_map_of(feature_map), p.normalize = normalize != 0;
  p.q = one_token(q), p.k = one_token(k), p.v = one_token(v), p.o = one_token(o);
  if (gate.present()) {
    gate.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16});
    gate.rank() == 2 ? gate.shape_is({B, p.H}, "(B, H)") : gate.shape_is({B, p.H, p.D}, "(B, H) or (B, H, D)");
    p.gated = gate.rank() == 2 ? Gate::scalar : Gate::vector;
    p.gate = one_token(gate);
  }
  if (beta.present()) {
    require(!p.normalize, kOp, ": beta needs normalize = 0");
    beta.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).shape_is({B, p.H}, "(B, H)");
    p.beta = one_token(beta);
  }
  const int64_t cols = p.Dv + (p.normalize ? 1 : 0);
  p.state = state.on(kDLCPU)
                .dtype_in({Dtype::f32})
                .shape_is({B, p.H, p.D, cols}, "(B, H, D, Dv + normalize)")
                .contiguous()
                .data<float>();
  p.new_state = new_state.on(kDLCPU)
                    .dtype_in({Dtype::f32})
                    .shape_is({B, p.H, p.D, cols}, "(B, H, D, Dv + normalize)")
                    .contiguous()
                    .data<float>();
  const LinearAttentionKernels& kernels = linear_attention_kernels_now();
  const auto up = [&](int64_t n) { return ceil_div(n, 16) * 16 + 16; };
  const int64_t own = 3 * up(p.D) + 2 * up(cols);
  // A thread for every 2^17 numbers of state, half a megabyte: below, waking one takes longer than the work.
  const int64_t parts =
      std::clamp<int64_t>(p.rows * p.D * cols >> 17, 1, std::min<int64_t>(num_threads(), std::max<int64_t>(p.rows, 1)));
  float* scratch = shared_scratch.floats(static_cast<size_t>(parts * own));
  parallel_claim(parts, static_cast<int>(parts), [&](int64_t n, int thread) {
    kernels.step(p, p.rows * n / parts, p.rows * (n + 1) / parts, scratch + thread * own);
  });
}

}  // namespace
}  // namespace mlcore

int mlc_linear_attention_fwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* gate,
                             const DLTensor* beta, const DLTensor* initial_state, const DLTensor* cu_seqlens,
                             int64_t feature_map, int64_t normalize, int64_t causal, int64_t span, DLTensor* o, DLTensor* den,
                             DLTensor* final_state, DLTensor* states) {
  return mlcore::guard([&] {
    mlcore::fwd({q, k, v, gate, beta, cu_seqlens, feature_map, normalize, causal, span}, initial_state, o, den, final_state,
                states);
  });
}

int mlc_linear_attention_bwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* gate,
                             const DLTensor* beta, const DLTensor* cu_seqlens, int64_t feature_map, int64_t normalize,
                             int64_t causal, int64_t span, const DLTensor* o, const DLTensor* den, const DLTensor* states,
                             const DLTensor* d_o, const DLTensor* d_final_state, DLTensor* dq, DLTensor* dk, DLTensor* dv,
                             DLTensor* dgate, DLTensor* dbeta, DLTensor* d_initial_state) {
  return mlcore::guard([&] {
    mlcore::bwd({q, k, v, gate, beta, cu_seqlens, feature_map, normalize, causal, span}, o, den, states, d_o, d_final_state, dq,
                dk, dv, dgate, dbeta, d_initial_state);
  });
}

int mlc_linear_attention_step(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* gate,
                              const DLTensor* beta, const DLTensor* state, int64_t feature_map, int64_t normalize, DLTensor* o,
                              DLTensor* new_state) {
  return mlcore::guard([&] { mlcore::step(q, k, v, gate, beta, state, feature_map, normalize, o, new_state); });
}
