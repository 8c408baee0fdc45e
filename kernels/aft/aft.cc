// Validates, finds out what the scales of the sums are, and shares spans of tokens out to threads. The contract is aft.h, the
// arithmetic the *_cpu.inl files.
#include "aft/aft.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "aft/aft_kernels.h"
#include "core/parallel.h"
#include "core/row_blocks.h"
#include "core/scratch.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "aft";
thread_local Scratch shared_scratch;  // of the calling thread; its workers get slices

void refuse_work(const DLTensor* work) { require(work == nullptr, kOp, ": work must be left out: the CPU has its own"); }

const Tensor& like_rows(const Tensor& x, Dtype dtype, const AftProblem& p, bool keys) {
  return x.on(kDLCPU).dtype_in({dtype}).shape_is({p.B, p.H, keys ? p.S : p.T, p.D}, keys ? "(B, H, S, D)" : "(B, H, T, D)");
}

void check_bias_shape(const AftProblem& p, const Tensor& bias) {
  const int64_t G = p.bias_heads;
  if (!p.banded) {
    bias.shape_is({G, p.T, p.S}, "(1 or H, T, S)");
  } else if (bias.rank() == 2) {
    bias.shape_is({G, p.columns}, p.causal ? "(1 or H, window)" : "(1 or H, 2 * window - 1)");
  } else {
    bias.shape_is({G, p.T, p.columns}, p.causal ? "(1 or H, T, window)" : "(1 or H, T, 2 * window - 1)");
  }
}

AftProblem make_problem(const DLTensor* q_, const DLTensor* k_, const DLTensor* v_, const DLTensor* bias_, int64_t window,
                        int64_t causal) {
  const Tensor q(q_, kOp, "q"), k(k_, kOp, "k"), v(v_, kOp, "v"), bias(bias_, kOp, "bias");
  q.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B, H, T, D)");
  AftProblem p{};
  p.B = q.size(0), p.H = q.size(1), p.T = q.size(2), p.D = q.size(3);
  require(p.D >= 1, kOp, ": D must be at least 1; got ", p.D);
  k.rank_is(4, "(B, H, S, D)");
  p.S = k.size(2), p.causal = causal != 0;
  like_rows(k, q.dtype(), p, true), like_rows(v, q.dtype(), p, true);
  require(!p.causal || p.S == p.T, kOp, ": causal needs as many keys as queries; got ", p.S, " and ", p.T);
  require(window >= 0, kOp, ": window must not be negative; got ", window);
  require(window == 0 || bias.present(), kOp, ": window needs bias");
  p.q = tokens(q), p.k = tokens(k), p.v = tokens(v);
  p.window = window, p.biased = bias.present(), p.banded = window > 0 || !p.biased;
  p.columns = window == 0 ? 0 : p.causal ? window : 2 * window - 1;
  p.masked = p.causal;
  p.group = p.biased && (window == 0 || window > 64) ? 64 : !p.biased && !p.causal ? 64 : 16;
  if (!p.biased) return p;
  bias.on(kDLCPU).dtype_in({Dtype::f32}).rank_at_least(2).contiguous();
  p.bias_heads = bias.size(0);
  require(p.bias_heads == 1 || p.bias_heads == p.H, kOp, ": bias must be for 1 or H = ", p.H, " heads; got ", p.bias_heads);
  check_bias_shape(p, bias);
  p.bias = bias.data<float>();
  p.bias_sh = bias.stride(0), p.bias_st = bias.rank() == 3 ? bias.stride(1) : 0;
  return p;
}

// Memory and phases of one call.
class Run {
 public:
  Run(AftProblem& p, bool backward) : p_(p), kernels_(aft_kernels_now()), items_(p.B * p.H) {
    p.backward = backward;
    const double reach = p.near_only() ? static_cast<double>(p.S) : static_cast<double>(2 * p.window + 32);
    const double work = static_cast<double>(items_) * static_cast<double>((p.T + p.S) * p.D) * reach;
    threads_ = static_cast<int>(std::clamp(work / 4e6, 1.0, static_cast<double>(num_threads())));  // about 20 us a thread
    const int64_t Dp = ceil_div(p.D, kernels_.width) * kernels_.width, G = p.groups();
    size_t used = 0;
    const auto take = [&](int64_t floats) {
      const size_t at = used;
      used += static_cast<size_t>(ceil_div(floats, 16) * 16);
      return at;
    };
    scratch_floats_ = ceil_div(kernels_.scratch_floats(p), 16) * 16;
    const size_t scratch = take(threads_ * scratch_floats_), rows = take(p.bias_heads * p.T), top = take(items_ * Dp);
    const size_t stats = take(items_ * p.key_blocks() * (2 * Dp + 16));
    const size_t ahead = take(p.needs_ahead() ? items_ * (G + 1) * 3 * Dp : 0);
    const size_t behind = take(p.needs_behind() ? items_ * (G + 1) * 3 * Dp : 0);
    const size_t partial = take(p.dbias && p.window && p.bias_st == 0 ? p.bias_heads * RowBlocks(p.T).count * p.columns : 0);
    ways_.resize(static_cast<size_t>(items_)), leaks_.resize(static_cast<size_t>(items_ * p.query_blocks()));
    float* base = shared_scratch.floats(used);
    scratch_ = base + scratch, row_top_ = base + rows, p.row_top = row_top_, p.top = base + top, p.stats = base + stats;
    p.ahead = p.needs_ahead() ? base + ahead : nullptr, p.behind = p.needs_behind() ? base + behind : nullptr;
    partial_ = base + partial;
    p.ways = ways_.data(), p.leaks = leaks_.data();
  }
  ~Run() { shared_scratch.release_if_large(); }

  void find_scales() {
    if (p_.biased) read_bias();
    blocks(p_.key_blocks(), [&](int64_t item, int64_t block, float* s) { kernels_.key_block(p_, item, block, s); });
    blocks(1, [&](int64_t item, int64_t, float*) {
      kernels_.gather_stats(p_, item);
      if (!p_.backward && (p_.ahead || p_.behind)) kernels_.scan(p_, item);
    });
  }

  // phase(item, first sink, last sink, scratch) for spans of up to kAftSpan; the causal ones with most sources first.
  template <class F>
  void spans(F&& phase) {
    const int64_t n = p_.sinks(), count = ceil_div(n, kAftSpan);
    blocks(count, [&](int64_t item, int64_t i, float* s) {
      const int64_t x = (p_.backward ? i : count - 1 - i) * kAftSpan;
      phase(item, x, std::min<int64_t>(n, x + kAftSpan), s);
    });
  }

  void bias_gradients() {
    const int64_t T = p_.T, C = p_.columns;
    if (p_.window == 0 || p_.bias_st != 0) {
      const int64_t count = ceil_div(T, kAftTile), st = p_.bias_st;
      parallel_claim(p_.bias_heads * count, threads_, [&](int64_t n, int thread) {
        const int64_t h = n / count, t = n % count * kAftTile;
        float* out = p_.dbias + h * p_.bias_sh + t * st;
        kernels_.bias_gradients(p_, h, t, std::min(T, t + kAftTile), out, st, scratch_ + thread * scratch_floats_);
      });
      return;
    }
    const RowBlocks cut(ceil_div(T, p_.group));  // of groups, so that a block's sum doesn't know the threads
    parallel_claim(p_.bias_heads * cut.count, threads_, [&](int64_t n, int thread) {
      const int64_t h = n / cut.count, block = n % cut.count;
      const int64_t t0 = cut.begin(block) * p_.group, t1 = std::min(T, cut.begin(block + 1) * p_.group);
      kernels_.bias_gradients(p_, h, t0, t1, partial_ + n * C, 0, scratch_ + thread * scratch_floats_);
    });
    for (int64_t h = 0; h < p_.bias_heads; ++h)
      for (int64_t c = 0; c < C; ++c) {
        float total = 0;
        for (int64_t block = 0; block < cut.count; ++block) total += partial_[(h * cut.count + block) * C + c];
        p_.dbias[h * p_.bias_sh + c] = total;
      }
  }

  // body(item, i, scratch) for every item and i < count
  template <class F>
  void blocks(int64_t count, F&& body) {
    if (count == 0) return;
    parallel_claim(items_ * count, threads_,
                   [&](int64_t n, int thread) { body(n / count, n % count, scratch_ + thread * scratch_floats_); });
  }

  const AftKernels& kernels() const { return kernels_; }

 private:
  void read_bias() {
    const int64_t T = p_.T, count = ceil_div(T, kAftTile);
    std::vector<float> ranges(static_cast<size_t>(p_.bias_heads * count), 0.0f);
    std::vector<char> masked(ranges.size(), 0);
    parallel_claim(p_.bias_heads * count, threads_, [&](int64_t n, int) {
      const int64_t h = n / count, t = n % count * kAftTile;
      bool hides = false;
      kernels_.bias_rows(p_, h, t, std::min(T, t + kAftTile), row_top_ + h * T, &ranges[static_cast<size_t>(n)], &hides);
      masked[static_cast<size_t>(n)] = hides;
    });
    for (size_t n = 0; n < ranges.size(); ++n) {
      p_.bias_range = std::max(p_.bias_range, ranges[n]);
      p_.masked = p_.masked || masked[n];
    }
  }

  AftProblem& p_;
  const AftKernels& kernels_;
  int64_t items_, scratch_floats_ = 0;
  int threads_ = 1;
  float *scratch_ = nullptr, *row_top_ = nullptr, *partial_ = nullptr;
  std::vector<int> ways_, leaks_;
};

float* statistic(const AftProblem& p, const Tensor& x) {
  return x.present()
             ? x.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.B, p.H, p.T, p.D}, "(B, H, T, D)").contiguous().data<float>()
             : nullptr;
}

void fwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias, int64_t window, int64_t causal,
         const DLTensor* o_, const DLTensor* y_, const DLTensor* den_, const DLTensor* peak_) {
  AftProblem p = make_problem(q, k, v, bias, window, causal);
  const Tensor o(o_, kOp, "o"), y(y_, kOp, "y"), den(den_, kOp, "den"), peak(peak_, kOp, "peak");
  p.o = tokens(like_rows(o, p.q.dtype, p, false));
  p.y = statistic(p, y), p.den = statistic(p, den), p.peak = statistic(p, peak);
  require(y.present() == den.present() && y.present() == peak.present(), kOp, ": y, den and peak go together");
  if (p.B * p.H * p.T == 0) return;
  Run run(p, false);
  run.find_scales();
  run.spans([&](int64_t item, int64_t t0, int64_t t1, float* s) { run.kernels().outputs(p, item, t0, t1, s); });
}

void bwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias, int64_t window, int64_t causal,
         const DLTensor* y_, const DLTensor* den_, const DLTensor* peak_, const DLTensor* d_o_, const DLTensor* dq_,
         const DLTensor* dk_, const DLTensor* dv_, const DLTensor* dbias_) {
  AftProblem p = make_problem(q, k, v, bias, window, causal);
  const Tensor y(y_, kOp, "y"), den(den_, kOp, "den"), peak(peak_, kOp, "peak"), d_o(d_o_, kOp, "d_o"), dq(dq_, kOp, "dq"),
      dk(dk_, kOp, "dk"), dv(dv_, kOp, "dv"), dbias(dbias_, kOp, "dbias");
  p.d_o = tokens(like_rows(d_o, p.q.dtype, p, false)), p.dq = tokens(like_rows(dq, p.q.dtype, p, false));
  p.dk = tokens(like_rows(dk, p.q.dtype, p, true)), p.dv = tokens(like_rows(dv, p.q.dtype, p, true));
  require(y.present() && den.present() && peak.present(), kOp, ": y, den and peak must be given");
  p.y = statistic(p, y), p.den = statistic(p, den), p.peak = statistic(p, peak);
  if (dbias.present()) {
    require(p.biased, kOp, ": dbias needs bias");
    check_bias_shape(p, dbias.on(kDLCPU).dtype_in({Dtype::f32}).contiguous());
    p.dbias = dbias.data<float>();
  }
  if (p.B * p.H * (p.T + p.S) == 0) {
    if (p.dbias) std::fill_n(p.dbias, dbias.numel(), 0.0f);
    return;
  }
  Run run(p, true);
  run.find_scales();
  run.blocks(p.query_blocks(), [&](int64_t item, int64_t i, float* s) { run.kernels().query_block(p, item, i, s); });
  if (p.ahead || p.behind) run.blocks(1, [&](int64_t item, int64_t, float*) { run.kernels().scan(p, item); });
  run.spans([&](int64_t item, int64_t j0, int64_t j1, float* s) { run.kernels().key_gradients(p, item, j0, j1, s); });
  if (p.dbias) run.bias_gradients();
}

}  // namespace
}  // namespace mlcore

int mlc_aft_fwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias, int64_t window, int64_t causal,
                DLTensor* o, DLTensor* y, DLTensor* den, DLTensor* peak, DLTensor* work) {
  return mlcore::guard([&] {
    mlcore::refuse_work(work);
    mlcore::fwd(q, k, v, bias, window, causal, o, y, den, peak);
  });
}

int mlc_aft_bwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias, int64_t window, int64_t causal,
                const DLTensor* y, const DLTensor* den, const DLTensor* peak, const DLTensor* d_o, DLTensor* dq, DLTensor* dk,
                DLTensor* dv, DLTensor* dbias, DLTensor* work) {
  return mlcore::guard([&] {
    mlcore::refuse_work(work);
    mlcore::bwd(q, k, v, bias, window, causal, y, den, peak, d_o, dq, dk, dv, dbias);
  });
}
