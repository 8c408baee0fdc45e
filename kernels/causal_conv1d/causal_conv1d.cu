// Launchers of the CUDA kernels of causal_conv1d: checks, the cut into blocks. The equations are in causal_conv1d.h, the
// kernels in causal_conv1d.cuh. The same text runs on the CPU in tests/native.
#include "causal_conv1d/causal_conv1d.h"
#include "causal_conv1d/causal_conv1d_states.cuh"

namespace mlcore::cuda {
namespace {

constexpr const char* kOp = "causal_conv1d";

Signal signal_of(const Tensor& t) { return t.present() ? Signal{t.raw(), t.stride(0), t.stride(1), t.stride(2)} : Signal{}; }

struct Parameters {
  const float *weight, *bias;
  int C, width;
  Activation activation;
};
Parameters parameters(const Tensor& weight, const Tensor& bias, int64_t channels, int64_t activation) {
  weight.on(kDLCUDA).dtype_in({Dtype::f32}).rank_is(2, "(C, w)").contiguous();
  require(weight.size(1) >= 1, kOp, ": weight must have at least one tap; got ", weight.shape_text());
  weight.shape_is({channels, weight.size(1)}, "(C, w)");
  if (bias.present()) bias.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({channels}, "(C)").contiguous();
  require(activation >= 0 && activation <= 2, kOp, ": activation must be 0, 1 or 2; got ", activation);
  return {weight.data<float>(), bias.present() ? bias.data<float>() : nullptr, checked_int(kOp, "C", channels),
          checked_int(kOp, "width", weight.size(1)), static_cast<Activation>(activation)};
}

struct Problem {
  Conv p{};
  Dtype dtype;
  int device;
  bool in_time;

  Problem(const DLTensor* x_, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& initial,
          const Tensor& seq_idx, const Tensor& cu_seqlens, int64_t activation) {
    x.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(3, "(B, C, T)");
    dtype = x.dtype(), device = x_->device.device_id;
    const Parameters given = parameters(weight, bias, x.size(1), activation);
    p.weight = given.weight, p.bias = given.bias, p.C = given.C, p.width = given.width, p.activation = given.activation;
    p.B = x.size(0), p.T = checked_int(kOp, "T", x.size(2)), p.N = p.B;
    in_time = p.T <= 1 ? x.stride(1) != 1 : x.stride(2) == 1;
    p.packed = true;
    p.x = signal(x, "x");
    if (cu_seqlens.present()) {
      require(p.B == 1, kOp, ": cu_seqlens needs x with B = 1; got ", x.shape_text());
      cu_seqlens.on(kDLCUDA).dtype_in({Dtype::i32}).rank_is(1, "(N+1)").contiguous();
      p.N = cu_seqlens.size(0) - 1;
      require(p.N >= (p.T > 0 ? 1 : 0), kOp, ": cu_seqlens must rise from 0 to T = ", p.T);
      p.cu = cu_seqlens.data<int32_t>();
    }
    if (seq_idx.present()) {
      seq_idx.on(kDLCUDA).dtype_in({Dtype::i32}).shape_is({p.B, p.T}, "(B, T)").contiguous();
      p.ids = seq_idx.data<int32_t>();
    }
    p.initial = states(initial);
  }

  Signal signal(const Tensor& t, const char* name) {
    t.on(kDLCUDA).dtype_in({dtype}).shape_is({p.B, p.C, p.T}, "(B, C, T)");
    const bool contiguous = in_time ? p.T <= 1 || t.stride(2) == 1 : p.C <= 1 || t.stride(1) == 1;
    require(t.numel() == 0 || contiguous, kOp, ": ", name, " must be contiguous in ", in_time ? "T" : "C", "; got strides (",
            t.stride(0), ", ", t.stride(1), ", ", t.stride(2), ")");
    const int64_t pack = in_time ? 4 : 2, bytes = pack * (dtype == Dtype::f32 ? 4 : 2);
    const int64_t other = in_time ? t.stride(1) : t.stride(2);
    const bool aligned = reinterpret_cast<uintptr_t>(t.raw()) % bytes == 0 && t.stride(0) % pack == 0 && other % pack == 0;
    p.packed = p.packed && aligned;
    return signal_of(t);
  }
  Signal states(const Tensor& t) const {
    if (t.present()) t.on(kDLCUDA).dtype_in({dtype}).shape_is({p.N, p.C, p.width - 1}, "(N, C, w-1)");
    return signal_of(t);
  }

  // body(T{}, in_time, cuts) with compile-time booleans.
  template <class Body>
  void with_variant(Body&& body) const {
    with_type(dtype, [&](auto t) {
      const auto with_layout = [&](auto layout) {
        if (p.ids != nullptr || p.cu != nullptr)
          body(t, layout, std::true_type{});
        else
          body(t, layout, std::false_type{});
      };
      if (in_time)
        with_layout(std::true_type{});
      else
        with_layout(std::false_type{});
    });
  }
  // The threads of a block, with the tiles and channel groups that follow.
  template <class L>
  int cut_tiles() {
    int threads = kThreads;
    while (L::InTime && threads > 32 && threads / 2 * L::NT >= p.T) threads /= 2;
    const int tokens = threads / L::X * L::NT;
    p.row_tiles = (p.T + tokens - 1) / tokens;
    p.groups = (p.C + L::kChannels - 1) / L::kChannels;
    return threads;
  }
};

void fwd(const DLTensor* x_, const DLTensor* weight_, const DLTensor* bias_, const DLTensor* initial_, const DLTensor* seq_idx_,
         const DLTensor* cu_, int64_t activation, DLTensor* y_, DLTensor* final_, void* stream) {
  const Tensor x(x_, kOp, "x"), weight(weight_, kOp, "weight"), bias(bias_, kOp, "bias"), initial(initial_, kOp, "initial"),
      seq_idx(seq_idx_, kOp, "seq_idx"), cu(cu_, kOp, "cu_seqlens"), y(y_, kOp, "y"), final(final_, kOp, "final");
  Problem problem(x_, x, weight, bias, initial, seq_idx, cu, activation);
  Conv& p = problem.p;
  p.y = problem.signal(y, "y"), p.final = problem.states(final);
  const DeviceGuard device(problem.device);
  if (x.numel() > 0)
    problem.with_variant([&](auto t, auto in_time, auto cuts) {
      using T = decltype(t);
      const int threads = problem.cut_tiles<Layout<T, in_time>>();
      MLC_LAUNCH((causal_conv1d_fwd<T, in_time, cuts>), grid_of(kOp, p.B * p.row_tiles * p.groups), dim3(threads), 0, stream,
                 p);
    });
  if (final.present() && final.numel() > 0)
    with_type(problem.dtype, [&](auto t) {
      MLC_LAUNCH(causal_conv1d_final<decltype(t)>, grid_of(kOp, final.numel(), kThreads), dim3(kThreads), 0, stream, p);
    });
}

void bwd(const DLTensor* dy_, const DLTensor* dfinal_, const DLTensor* x_, const DLTensor* weight_, const DLTensor* bias_,
         const DLTensor* initial_, const DLTensor* seq_idx_, const DLTensor* cu_, int64_t activation, DLTensor* dx_,
         DLTensor* dweight_, DLTensor* dbias_, DLTensor* dinitial_, DLTensor* partial_, void* stream) {
  const Tensor dy(dy_, kOp, "dy"), dfinal(dfinal_, kOp, "dfinal"), x(x_, kOp, "x"), weight(weight_, kOp, "weight"),
      bias(bias_, kOp, "bias"), initial(initial_, kOp, "initial"), seq_idx(seq_idx_, kOp, "seq_idx"),
      cu(cu_, kOp, "cu_seqlens"), dx(dx_, kOp, "dx"), dweight(dweight_, kOp, "dweight"), dbias(dbias_, kOp, "dbias"),
      dinitial(dinitial_, kOp, "dinitial"), partial(partial_, kOp, "partial");
  Problem problem(x_, x, weight, bias, initial, seq_idx, cu, activation);
  Conv& p = problem.p;
  p.dy = problem.signal(dy, "dy"), p.dx = problem.signal(dx, "dx");
  p.dfinal = problem.states(dfinal), p.dinitial = problem.states(dinitial);
  const int64_t parts = p.B * p.T <= 512 ? 1 : p.B * p.T >= 16 * 512 ? 16 : (p.B * p.T + 511) / 512;
  if (dweight.present()) {
    dweight.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({p.C, p.width}, "(C, w)").contiguous();
    dbias.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({p.C}, "(C)").contiguous();
    partial.on(kDLCUDA)
        .dtype_in({Dtype::f32})
        .shape_is({parts, p.width + 1, p.C}, "(min(max(ceil(B*T/512), 1), 16), w+1, C)")
        .contiguous();
    p.partial = partial.data<float>();
  }
  if (p.C == 0) return;
  const DeviceGuard device(problem.device);
  if (x.numel() > 0 || p.partial != nullptr)
    problem.with_variant([&](auto t, auto in_time, auto cuts) {
      using T = decltype(t);
      const int threads = problem.cut_tiles<Layout<T, in_time, true>>();
      p.blocks = p.partial != nullptr ? parts : p.B * p.row_tiles;
      MLC_LAUNCH((causal_conv1d_bwd<T, in_time, cuts>), grid_of(kOp, p.blocks * p.groups), dim3(threads), 0, stream, p);
    });
  if (p.partial != nullptr)
    launch_sum_taps(kOp, p.partial, p.blocks, p.width, p.C, dweight.data<float>(), dbias.data<float>(), stream);
  if (dinitial.present() && dinitial.numel() > 0)
    with_type(problem.dtype, [&](auto t) {
      MLC_LAUNCH(causal_conv1d_dinitial<decltype(t)>, grid_of(kOp, p.N * p.C), dim3(32), 0, stream, p);
    });
}

void update(const DLTensor* x_, DLTensor* state_, const DLTensor* weight_, const DLTensor* bias_, const DLTensor* position_,
            const DLTensor* slots_, int64_t activation, DLTensor* y_, void* stream) {
  const Tensor x(x_, kOp, "x"), state(state_, kOp, "state"), weight(weight_, kOp, "weight"), bias(bias_, kOp, "bias"),
      position(position_, kOp, "position"), slots(slots_, kOp, "slots"), y(y_, kOp, "y");
  x.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(3, "(B, C, T)");
  const Parameters given = parameters(weight, bias, x.size(1), activation);
  Update p{};
  p.weight = given.weight, p.bias = given.bias, p.C = given.C, p.width = given.width, p.activation = given.activation;
  p.B = x.size(0), p.T = checked_int(kOp, "T", x.size(2));
  y.on(kDLCUDA).dtype_in({x.dtype()}).shape_is({p.B, p.C, p.T}, "(B, C, T)");
  state.on(kDLCUDA).dtype_in({x.dtype()}).rank_is(3, "(slots, C, S)");
  p.S = checked_int(kOp, "S", state.size(2)), p.rows = state.size(0);
  state.shape_is({slots.present() ? p.rows : p.B, p.C, p.S}, "(slots, C, S)");
  require(p.S >= p.width - 1 && p.S >= 1, kOp, ": state must hold at least w-1 = ", p.width - 1, " inputs, and one; got ", p.S);
  for (const Tensor* t : {&position, &slots})
    if (t->present()) t->on(kDLCUDA).dtype_in({Dtype::i32}).shape_is({p.B}, "(B)").contiguous();
  p.position = position.present() ? position.data<int32_t>() : nullptr;
  p.slots = slots.present() ? slots.data<int32_t>() : nullptr;
  p.x = signal_of(x), p.y = signal_of(y), p.state = signal_of(state);
  if (p.B * p.C == 0) return;
  const DeviceGuard device(x_->device.device_id);
  with_type(x.dtype(), [&](auto t) {
    MLC_LAUNCH(causal_conv1d_update<decltype(t)>, grid_of(kOp, p.B * p.C, kThreads), dim3(kThreads), 0, stream, p);
  });
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_causal_conv1d_fwd(const DLTensor* x, const DLTensor* weight, const DLTensor* bias, const DLTensor* initial,
                                       const DLTensor* seq_idx, const DLTensor* cu_seqlens, int64_t activation, DLTensor* y,
                                       DLTensor* final, void* stream) {
  return mlcore::guard([&] { mlcore::cuda::fwd(x, weight, bias, initial, seq_idx, cu_seqlens, activation, y, final, stream); });
}

MLC_API int mlc_cuda_causal_conv1d_bwd(const DLTensor* dy, const DLTensor* dfinal, const DLTensor* x, const DLTensor* weight,
                                       const DLTensor* bias, const DLTensor* initial, const DLTensor* seq_idx,
                                       const DLTensor* cu_seqlens, int64_t activation, DLTensor* dx, DLTensor* dweight,
                                       DLTensor* dbias, DLTensor* dinitial, DLTensor* partial, void* stream) {
  return mlcore::guard([&] {
    mlcore::cuda::bwd(dy, dfinal, x, weight, bias, initial, seq_idx, cu_seqlens, activation, dx, dweight, dbias, dinitial,
                      partial, stream);
  });
}

MLC_API int mlc_cuda_causal_conv1d_update(const DLTensor* x, DLTensor* state, const DLTensor* weight, const DLTensor* bias,
                                          const DLTensor* position, const DLTensor* slots, int64_t activation, DLTensor* y,
                                          void* stream) {
  return mlcore::guard([&] { mlcore::cuda::update(x, state, weight, bias, position, slots, activation, y, stream); });
}
