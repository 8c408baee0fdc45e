// Validates, lowers sequences to runs and tiles, shares them out. The contract is causal_conv1d.h, the arithmetic
// causal_conv1d_cpu.inl.
#include "causal_conv1d/causal_conv1d.h"

#include <algorithm>
#include <vector>

#include "causal_conv1d/causal_conv1d_kernels.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "core/scratch.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "causal_conv1d";
thread_local Scratch shared_scratch;  // of the calling thread; its workers get slices

// Blocks of tiles for the partial sums, by the sizes alone.
int64_t partial_blocks(int64_t B, int64_t T) { return std::clamp<int64_t>((B * T + 511) / 512, 1, 16); }

struct Problem {
  CausalConv1d p{};
  int64_t B, T, N;
  std::vector<Run> runs;
  std::vector<Tile> tiles;

  Problem(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& initial, const Tensor& seq_idx,
          const Tensor& cu_seqlens, int64_t activation) {
    x.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(3, "(B, C, T)");
    B = x.size(0), p.C = x.size(1), T = x.size(2), p.dtype = x.dtype();
    weight.on(kDLCPU).dtype_in({Dtype::f32}).rank_is(2, "(C, w)").contiguous();
    p.width = weight.size(1);
    require(p.width >= 1, kOp, ": weight must have at least one tap; got ", weight.shape_text());
    weight.shape_is({p.C, p.width}, "(C, w)");
    if (bias.present()) bias.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.C}, "(C)").contiguous();
    require(activation >= 0 && activation <= 2, kOp, ": activation must be 0, 1 or 2; got ", activation);
    p.weight = weight.data<float>(), p.bias = bias.present() ? bias.data<float>() : nullptr;
    p.activation = static_cast<Activation>(activation);
    p.in_time = T <= 1 ? x.stride(1) != 1 : x.stride(2) == 1;
    p.x = signal(x, "x");
    N = B;
    const int32_t* cu = nullptr;
    if (cu_seqlens.present()) {
      require(B == 1, kOp, ": cu_seqlens needs x with B = 1; got ", x.shape_text());
      cu_seqlens.on(kDLCPU).dtype_in({Dtype::i32}).rank_is(1, "(N+1)").contiguous();
      N = cu_seqlens.size(0) - 1, cu = cu_seqlens.data<int32_t>();
      require(N >= 0 && cu[0] == 0 && cu[N] == T && std::is_sorted(cu, cu + N + 1), kOp,
              ": cu_seqlens must rise from 0 to T = ", T);
    }
    const int32_t* ids = nullptr;
    if (seq_idx.present()) {
      seq_idx.on(kDLCPU).dtype_in({Dtype::i32}).shape_is({B, T}, "(B, T)").contiguous();
      ids = seq_idx.data<int32_t>();
    }
    p.initial = states(initial, "initial");
    for (int64_t n = 0; n < N; ++n) cut_sequence(n, cu ? 0 : n, cu ? cu[n] : 0, cu ? cu[n + 1] : T, ids, initial.present());
  }

  // Of x's shape and dtype, contiguous in the same dimension.
  Signal signal(const Tensor& t, const char* name) const {
    t.on(kDLCPU).dtype_in({p.dtype}).shape_is({B, p.C, T}, "(B, C, T)");
    const bool empty = t.numel() == 0, contiguous = p.in_time ? T <= 1 || t.stride(2) == 1 : p.C <= 1 || t.stride(1) == 1;
    require(empty || contiguous, kOp, ": ", name, " must be contiguous in ", p.in_time ? "T" : "C", "; got strides (",
            t.stride(0), ", ", t.stride(1), ", ", t.stride(2), ")");
    return {t.raw(), t.stride(0), t.stride(1), t.stride(2)};
  }
  Signal states(const Tensor& t, const char*) const {
    if (!t.present()) return {};
    t.on(kDLCPU).dtype_in({p.dtype}).shape_is({N, p.C, p.width - 1}, "(N, C, w-1)");
    return {t.raw(), t.stride(0), t.stride(1), t.stride(2)};
  }

  void cut_sequence(int64_t n, int64_t b, int64_t begin, int64_t end, const int32_t* ids, bool has_initial) {
    const int32_t* row = ids ? ids + b * T : nullptr;
    int64_t first = begin;
    do {
      int64_t last = end;
      if (row && first < end) last = std::find_if(row + first, row + end, [&](int32_t i) { return i != row[first]; }) - row;
      Run run{b, first, last};
      run.padding = row && first < end && row[first] < 0;
      if (has_initial && first == begin) run.initial = n;
      if (last == end) run.final = n;
      runs.push_back(run);
      first = last;
    } while (first < end);
  }

  void cut_tiles(const CausalConv1dKernels& kernels) {
    const int64_t most = p.in_time ? kernels.time_tile : kernels.token_tile;
    for (int64_t r = 0; r < static_cast<int64_t>(runs.size()); ++r) {
      int64_t t = runs[r].begin;
      do {
        const int64_t end = std::min(t + most, runs[r].end);
        tiles.push_back({r, t, end});
        t = end;
      } while (t < runs[r].end);
    }
    p.runs = runs.data(), p.tiles = tiles.data(), p.tile_count = static_cast<int64_t>(tiles.size());
    p.blocks = partial_blocks(B, T);
  }

  // A result that is written as a whole: its memory is often handed out for the first time.
  void fresh(const Tensor& t) const {
    prefer_huge_pages(t.raw(), static_cast<size_t>(t.numel()) * (p.dtype == Dtype::f32 ? 4 : 2));
  }

  // body(p, block, channel begin, end, scratch) for every block and channel, in parallel.
  void share_out(const CausalConv1dKernels& kernels, bool backward,
                 void (*body)(const CausalConv1d&, int64_t, int64_t, int64_t, float*)) {
    if (p.C == 0) return;
    // About 16k numbers an item: a channel's block of tiles, or as many channels as it takes.
    const int64_t tokens = std::max<int64_t>(B * T / p.blocks, 1);
    int64_t channels = std::clamp<int64_t>(16384 / tokens, 1, p.C);
    if (!p.in_time) channels = std::max(channels / kernels.channel_tile, p.blocks >= 8 ? p.C : 1) * kernels.channel_tile;
    const int64_t groups = (p.C + channels - 1) / channels, items = p.blocks * groups;
    const int64_t floats = (kernels.scratch(p, backward) + 15) / 16 * 16;
    const int threads = static_cast<int>(std::min<int64_t>(num_threads(), items));
    float* scratch = shared_scratch.floats(static_cast<size_t>(threads * floats));
    parallel_claim(items, threads, [&](int64_t i, int thread) {
      const int64_t begin = i % groups * channels;
      body(p, i / groups, begin, std::min(begin + channels, p.C), scratch + thread * floats);
    });
    shared_scratch.release_if_large();
  }
};

void fwd(const DLTensor* x_, const DLTensor* weight_, const DLTensor* bias_, const DLTensor* initial_, const DLTensor* seq_idx_,
         const DLTensor* cu_seqlens_, int64_t activation, DLTensor* y_, DLTensor* final_) {
  const Tensor x(x_, kOp, "x"), weight(weight_, kOp, "weight"), bias(bias_, kOp, "bias"), initial(initial_, kOp, "initial"),
      seq_idx(seq_idx_, kOp, "seq_idx"), cu_seqlens(cu_seqlens_, kOp, "cu_seqlens"), y(y_, kOp, "y"),
      final(final_, kOp, "final");
  Problem problem(x, weight, bias, initial, seq_idx, cu_seqlens, activation);
  problem.p.y = problem.signal(y, "y");
  problem.p.final = problem.states(final, "final");
  problem.fresh(y);
  const CausalConv1dKernels& kernels = causal_conv1d_kernels_now();
  problem.cut_tiles(kernels);
  problem.share_out(kernels, false, kernels.fwd);
}

void bwd(const DLTensor* dy_, const DLTensor* dfinal_, const DLTensor* x_, const DLTensor* weight_, const DLTensor* bias_,
         const DLTensor* initial_, const DLTensor* seq_idx_, const DLTensor* cu_seqlens_, int64_t activation, DLTensor* dx_,
         DLTensor* dweight_, DLTensor* dbias_, DLTensor* dinitial_, DLTensor* partial_) {
  const Tensor dy(dy_, kOp, "dy"), dfinal(dfinal_, kOp, "dfinal"), x(x_, kOp, "x"), weight(weight_, kOp, "weight"),
      bias(bias_, kOp, "bias"), initial(initial_, kOp, "initial"), seq_idx(seq_idx_, kOp, "seq_idx"),
      cu_seqlens(cu_seqlens_, kOp, "cu_seqlens"), dx(dx_, kOp, "dx"), dweight(dweight_, kOp, "dweight"),
      dbias(dbias_, kOp, "dbias"), dinitial(dinitial_, kOp, "dinitial"), partial(partial_, kOp, "partial");
  Problem problem(x, weight, bias, initial, seq_idx, cu_seqlens, activation);
  CausalConv1d& p = problem.p;
  p.dy = problem.signal(dy, "dy"), p.dx = problem.signal(dx, "dx");
  p.dfinal = problem.states(dfinal, "dfinal"), p.dinitial = problem.states(dinitial, "dinitial");
  require(!dinitial.present() || initial.present(), kOp, ": dinitial needs initial");
  require(dweight.present() == dbias.present(), kOp, ": dweight and dbias must be given together");
  if (dweight.present()) {
    dweight.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.C, p.width}, "(C, w)").contiguous();
    dbias.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.C}, "(C)").contiguous();
    partial.on(kDLCPU)
        .dtype_in({Dtype::f32})
        .shape_is({partial_blocks(problem.B, problem.T), p.width + 1, p.C}, "(min(max(ceil(B*T/512), 1), 16), w+1, C)")
        .contiguous();
    p.dweight = dweight.data<float>(), p.dbias = dbias.data<float>(), p.partial = partial.data<float>();
  }
  problem.fresh(dx);
  const CausalConv1dKernels& kernels = causal_conv1d_kernels_now();
  problem.cut_tiles(kernels);
  problem.share_out(kernels, true, kernels.bwd);
  if (p.partial)
    parallel_for(p.C, std::max<int64_t>(4096 / (p.width * p.blocks), 1),
                 [&](int64_t begin, int64_t end) { kernels.reduce(p, begin, end); });
}

void update(const DLTensor* x_, DLTensor* state_, const DLTensor* weight_, const DLTensor* bias_, const DLTensor* position_,
            const DLTensor* slots_, int64_t activation, DLTensor* y_) {
  const Tensor x(x_, kOp, "x"), state(state_, kOp, "state"), weight(weight_, kOp, "weight"), bias(bias_, kOp, "bias"),
      position(position_, kOp, "position"), slots(slots_, kOp, "slots"), y(y_, kOp, "y");
  CausalConv1dUpdate p{};
  x.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(3, "(B, C, T)");
  const int64_t B = x.size(0);
  p.C = x.size(1), p.T = x.size(2), p.dtype = x.dtype();
  y.on(kDLCPU).dtype_in({p.dtype}).shape_is({B, p.C, p.T}, "(B, C, T)");
  weight.on(kDLCPU).dtype_in({Dtype::f32}).rank_is(2, "(C, w)").contiguous();
  p.width = weight.size(1);
  require(p.width >= 1, kOp, ": weight must have at least one tap; got ", weight.shape_text());
  weight.shape_is({p.C, p.width}, "(C, w)");
  if (bias.present()) bias.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.C}, "(C)").contiguous();
  require(activation >= 0 && activation <= 2, kOp, ": activation must be 0, 1 or 2; got ", activation);
  state.on(kDLCPU).dtype_in({p.dtype}).rank_is(3, "(slots, C, S)");
  p.S = state.size(2);
  state.shape_is({slots.present() ? state.size(0) : B, p.C, p.S}, "(slots, C, S)");
  require(p.S >= p.width - 1 && p.S >= 1, kOp, ": state must hold at least w-1 = ", p.width - 1, " inputs, and one; got ", p.S);
  for (const Tensor* t : {&position, &slots})
    if (t->present()) t->on(kDLCPU).dtype_in({Dtype::i32}).shape_is({B}, "(B)").contiguous();
  if (slots.present()) {
    p.slots = slots.data<int32_t>();
    std::vector<bool> used(static_cast<size_t>(state.size(0)));
    for (int64_t b = 0; b < B; ++b) {
      const int32_t s = p.slots[b];
      require(s < state.size(0), kOp, ": slots must be below ", state.size(0), ", the slots of state; got ", s);
      require(s < 0 || !used[s], kOp, ": slots must differ, or be negative; got ", s, " twice");
      if (s >= 0) used[s] = true;
    }
  }
  p.position = position.present() ? position.data<int32_t>() : nullptr;
  p.x = {x.raw(), x.stride(0), x.stride(1), x.stride(2)};
  p.y = {y.raw(), y.stride(0), y.stride(1), y.stride(2)};
  p.state = {state.raw(), state.stride(0), state.stride(1), state.stride(2)};
  p.weight = weight.data<float>(), p.bias = bias.present() ? bias.data<float>() : nullptr;
  p.activation = static_cast<Activation>(activation);
  const CausalConv1dKernels& kernels = causal_conv1d_kernels_now();
  const int64_t group = std::clamp<int64_t>(8192 / (p.width * std::max<int64_t>(p.T, 1)), 64, 1024) / 64 * 64;
  const int64_t groups = (p.C + group - 1) / group;
  parallel_for(B * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.update(p, i / groups, i % groups * group, std::min((i % groups + 1) * group, p.C));
  });
}

}  // namespace
}  // namespace mlcore

int mlc_causal_conv1d_fwd(const DLTensor* x, const DLTensor* weight, const DLTensor* bias, const DLTensor* initial,
                          const DLTensor* seq_idx, const DLTensor* cu_seqlens, int64_t activation, DLTensor* y,
                          DLTensor* final) {
  return mlcore::guard([&] { mlcore::fwd(x, weight, bias, initial, seq_idx, cu_seqlens, activation, y, final); });
}

int mlc_causal_conv1d_bwd(const DLTensor* dy, const DLTensor* dfinal, const DLTensor* x, const DLTensor* weight,
                          const DLTensor* bias, const DLTensor* initial, const DLTensor* seq_idx, const DLTensor* cu_seqlens,
                          int64_t activation, DLTensor* dx, DLTensor* dweight, DLTensor* dbias, DLTensor* dinitial,
                          DLTensor* partial) {
  return mlcore::guard([&] {
    mlcore::bwd(dy, dfinal, x, weight, bias, initial, seq_idx, cu_seqlens, activation, dx, dweight, dbias, dinitial, partial);
  });
}

int mlc_causal_conv1d_update(const DLTensor* x, DLTensor* state, const DLTensor* weight, const DLTensor* bias,
                             const DLTensor* position, const DLTensor* slots, int64_t activation, DLTensor* y) {
  return mlcore::guard([&] { mlcore::update(x, state, weight, bias, position, slots, activation, y); });
}
