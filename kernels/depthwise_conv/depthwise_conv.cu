// The CUDA kernels of depthwise_conv and their launchers; the equations are in depthwise_conv.h. A thread computes four results
// along W of one channel; neighbouring threads lie along W, or along C where that is contiguous. Forward and backward-data are
// the same gather over taps. The same text runs on the CPU in tests/native.
#include "cuda/conv.cuh"
#include "depthwise_conv/depthwise_conv.h"
#include "depthwise_conv/depthwise_conv_kernels.h"

namespace mlcore::cuda {
namespace {

constexpr const char* kOp = "depthwise_conv";
constexpr int kThreads = 256, kOutputs = 4, kLanes = 32;  // kLanes: channels side by side where C is contiguous

struct Axis {
  int K, stride, dilation, pad;
};

struct Conv {
  Volume from, to;             // what is gathered, and into what: x and y, or dy and dx
  const float *weight, *bias;  // (C*M, taps), (C*M)
  float* partial;
  Axis axis[3];
  int N, C, M, taps, channels;  // channels: of `to`, or of dy for the weights' gradient
  int64_t blocks;
};

template <class T>
MLC_DEVICE float read(const Volume& v, int64_t offset) {
  return to_float(static_cast<const T*>(v.data)[offset]);
}

// The element of `from` that tap k of the result at `i` meets along an axis, or -1.
template <bool Transposed>
MLC_DEVICE int source(const Axis& a, int size, int i, int k) {
  int s = Transposed ? i + a.pad - k * a.dilation : i * a.stride + k * a.dilation - a.pad;
  if (Transposed && a.stride > 1) {
    if (s < 0 || s % a.stride != 0) return -1;
    s /= a.stride;
  }
  return s >= 0 && s < size ? s : -1;
}

// sums += one line of `from` at `line`, size elements `step` apart, with the KW taps at weight.
template <class T, bool Transposed>
MLC_DEVICE void add_line(const Volume& from, int64_t line, int64_t step, int size, const Axis& a, const float* weight,
                         int first, float (&sums)[kOutputs]) {
  if (a.stride > 1 || a.dilation > 1) {
    for (int k = 0; k < a.K; ++k) {
      const float w = weight[k];
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        const int s = source<Transposed>(a, size, first + i, k);
        if (s >= 0) sums[i] += w * read<T>(from, line + s * step);
      }
    }
    return;
  }
  // A window of four elements and the four behind, which moves by four taps.
  const int begin = first - (Transposed ? a.K - 1 - a.pad : a.pad);
  float window[2 * kOutputs];
  const auto load = [&](int i, int s) { window[i] = s >= 0 && s < size ? read<T>(from, line + s * step) : 0.0f; };
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) load(i, begin + i);
  for (int tap = 0; tap < a.K; tap += kOutputs) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      if (tap > 0) window[i] = window[kOutputs + i];
      if (i + 1 < kOutputs || tap + kOutputs < a.K) load(kOutputs + i, begin + tap + kOutputs + i);
    }
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      if (tap + k >= a.K) break;
      const float w = weight[Transposed ? a.K - 1 - tap - k : tap + k];
#pragma unroll
      for (int i = 0; i < kOutputs; ++i) {
        // An element outside has no product: a weight of infinity times 0 would be NaN.
        const int s = begin + i + tap + k;
        if (s >= 0 && s < size) sums[i] += w * window[i + k];
      }
    }
  }
}

// y, or with Transposed dx: kOutputs results a thread.
template <class T, bool Planar, bool Transposed>
__global__ void __launch_bounds__(kThreads) depthwise_conv_gather(Conv p) {
  const int D = static_cast<int>(p.to.size[0]), H = static_cast<int>(p.to.size[1]), W = static_cast<int>(p.to.size[2]);
  const int groups = (W + kOutputs - 1) / kOutputs;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  int64_t rest = index;
  int channel = 0, w = 0;
  if (Planar)
    w = static_cast<int>(rest % groups), rest /= groups;
  else
    channel = static_cast<int>(rest % p.channels), rest /= p.channels;
  if (!Planar) w = static_cast<int>(rest % groups), rest /= groups;
  const int h = static_cast<int>(rest % H);
  rest /= H;
  const int d = static_cast<int>(rest % D);
  rest /= D;
  if (Planar) channel = static_cast<int>(rest % p.channels), rest /= p.channels;
  const int64_t n = rest;
  if (n >= p.N) return;
  const Axis &ad = p.axis[0], &ah = p.axis[1], &aw = p.axis[2];
  const int size[3] = {static_cast<int>(p.from.size[0]), static_cast<int>(p.from.size[1]), static_cast<int>(p.from.size[2])};
  float sums[kOutputs];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) sums[i] = !Transposed && p.bias != nullptr ? p.bias[channel] : 0.0f;
  for (int m = 0; m < (Transposed ? p.M : 1); ++m) {
    const int filter = Transposed ? channel * p.M + m : channel, other = Transposed ? filter : channel / p.M;
    const float* weight = p.weight + int64_t{filter} * p.taps;
    const int64_t base = n * p.from.n + other * p.from.c;
    for (int kd = 0; kd < ad.K; ++kd) {
      const int sd = source<Transposed>(ad, size[0], d, kd);
      if (sd < 0) continue;
      for (int kh = 0; kh < ah.K; ++kh) {
        const int sh = source<Transposed>(ah, size[1], h, kh);
        if (sh < 0) continue;
        const int64_t line = base + sd * p.from.s[0] + sh * p.from.s[1];
        add_line<T, Transposed>(p.from, line, p.from.s[2], size[2], aw, weight + (kd * ah.K + kh) * aw.K, w * kOutputs, sums);
      }
    }
  }
  T* out = static_cast<T*>(p.to.data) + n * p.to.n + channel * p.to.c + d * p.to.s[0] + h * p.to.s[1];
#pragma unroll
  for (int i = 0; i < kOutputs; ++i)
    if (w * kOutputs + i < W) out[(w * kOutputs + i) * p.to.s[2]] = from_float<T>(sums[i]);
}

// partial[block, tap, co] for the taps of one (kd, kh) and a block of the pixels of dy; those of (0, 0) also sum dy for the
// bias. from is x, to is dy. A thread block has one channel where W is contiguous, else kLanes.
template <class T, bool Planar>
__global__ void __launch_bounds__(kThreads) depthwise_conv_dweight(Conv p) {
  __shared__ float scratch[kThreads];
  constexpr int kX = Planar ? 1 : kLanes, kRows = kThreads / kX;
  const int lines = p.axis[0].K * p.axis[1].K, groups = (p.channels + kX - 1) / kX;
  const int x = threadIdx.x % kX, row = threadIdx.x / kX;
  const int channel = static_cast<int>(blockIdx.x % groups) * kX + x, line = static_cast<int>(blockIdx.x / groups) % lines;
  const int64_t block = blockIdx.x / groups / lines;
  const bool live = channel < p.channels;
  const int D = static_cast<int>(p.to.size[0]), H = static_cast<int>(p.to.size[1]), W = static_cast<int>(p.to.size[2]);
  const int size[3] = {static_cast<int>(p.from.size[0]), static_cast<int>(p.from.size[1]), static_cast<int>(p.from.size[2])};
  const int64_t pixels = int64_t{p.N} * D * H * W;
  const int64_t begin = pixels * block / p.blocks, end = pixels * (block + 1) / p.blocks;
  const Axis& aw = p.axis[2];
  const auto finish = [&](int tap, float v) {
    __syncthreads();
    scratch[threadIdx.x] = v;
    __syncthreads();
    for (int half = kRows / 2; half > 0; half /= 2) {
      if (row < half) scratch[threadIdx.x] += scratch[threadIdx.x + half * kX];
      __syncthreads();
    }
    if (row == 0 && live) p.partial[(block * (p.taps + 1) + tap) * p.channels + channel] = scratch[x];
  };
  for (int tap = 0; tap < aw.K; tap += kOutputs) {
    float sums[kOutputs] = {}, bias = 0.0f;
    for (int64_t i = begin + row; live && i < end; i += kRows) {
      const int w = static_cast<int>(i % W), h = static_cast<int>(i / W % H), d = static_cast<int>(i / W / H % D);
      const int64_t n = i / W / H / D;
      const float dy = read<T>(p.to, n * p.to.n + channel * p.to.c + d * p.to.s[0] + h * p.to.s[1] + w * p.to.s[2]);
      bias += dy;
      const int sd = source<false>(p.axis[0], size[0], d, line / p.axis[1].K);
      const int sh = source<false>(p.axis[1], size[1], h, line % p.axis[1].K);
      if (sd < 0 || sh < 0) continue;
      const int64_t at = n * p.from.n + channel / p.M * p.from.c + sd * p.from.s[0] + sh * p.from.s[1];
#pragma unroll
      for (int k = 0; k < kOutputs; ++k) {
        const int s = tap + k < aw.K ? source<false>(aw, size[2], w, tap + k) : -1;
        if (s >= 0) sums[k] += dy * read<T>(p.from, at + s * p.from.s[2]);
      }
    }
#pragma unroll
    for (int k = 0; k < kOutputs; ++k)
      if (tap + k < aw.K) finish(line * aw.K + tap + k, sums[k]);
    if (tap == 0 && line == 0) finish(p.taps, bias);
  }
}

// x first: the others are measured by it.
struct Problem {
  Conv p{};
  Volume x, y;  // y or dy
  Dtype dtype;
  bool planar;

  Problem(const Tensor& x_, const Tensor& weight, const Tensor& out, const char* name, const int64_t (&stride)[3],
          const int64_t (&dilation)[3], const int64_t (&pad)[3]) {
    x_.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(5, "(N, C, D, H, W)");
    dtype = x_.dtype();
    p.N = checked_int(kOp, "N", x_.size(0)), p.C = checked_int(kOp, "C", x_.size(1));
    weight.on(kDLCUDA).dtype_in({Dtype::f32}).rank_is(4, "(C*M, KD, KH, KW)").contiguous();
    const int filters = checked_int(kOp, "C*M", weight.size(0));
    require(p.C > 0 ? filters % p.C == 0 && filters > 0 : filters == 0, kOp, ": weight must have a multiple of x's C = ", p.C,
            " filters; got ", weight.shape_text());
    p.M = p.C > 0 ? filters / p.C : 1;
    p.taps = 1;
    for (int d = 0; d < 3; ++d) {
      require(weight.size(d + 1) >= 1, kOp, ": weight must have at least one tap in every dimension; got ",
              weight.shape_text());
      require(stride[d] >= 1, kOp, ": stride must be at least 1; got ", stride[d]);
      require(dilation[d] >= 1, kOp, ": dilation must be at least 1; got ", dilation[d]);
      require(pad[d] >= 0, kOp, ": pad must not be negative; got ", pad[d]);
      p.axis[d] = {checked_int(kOp, "kernel size", weight.size(d + 1)), checked_int(kOp, "stride", stride[d]),
                   checked_int(kOp, "dilation", dilation[d]), checked_int(kOp, "pad", pad[d])};
      p.taps *= p.axis[d].K;
    }
    p.weight = weight.data<float>();
    planar = !(p.C > 1 && x_.stride(1) == 1 && (x_.size(4) <= 1 || x_.stride(4) != 1));
    x = volume(x_, "x", {x_.size(0), x_.size(1), x_.size(2), x_.size(3), x_.size(4)}, "(N, C, D, H, W)");
    out.rank_is(5, "(N, C*M, Do, Ho, Wo)");
    y = volume(out, name, {p.N, filters, out.size(2), out.size(3), out.size(4)}, "(N, C*M, Do, Ho, Wo)");
  }

  Volume volume(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, const char* layout) const {
    t.on(kDLCUDA).dtype_in({dtype}).shape_is(shape, layout);
    const int inner = planar ? 4 : 1;
    require(t.numel() == 0 || t.size(inner) == 1 || t.stride(inner) == 1, kOp, ": ", name, " must be contiguous in ",
            planar ? "W" : "C", "; got stride ", t.stride(inner));
    Volume v{t.raw(), t.stride(0), t.stride(1), {}, {}};
    for (int d = 0; d < 3; ++d) v.s[d] = t.stride(d + 2), v.size[d] = checked_int(kOp, name, t.size(d + 2));
    return v;
  }

  // body(T{}, planar) with a compile-time boolean.
  template <class Body>
  void with_variant(Body&& body) const {
    with_type(dtype, [&](auto t) {
      if (planar)
        body(t, std::true_type{});
      else
        body(t, std::false_type{});
    });
  }

  template <bool Transposed>
  void gather(void* stream) {
    p.from = Transposed ? y : x, p.to = Transposed ? p.to : y;
    p.channels = Transposed ? p.C : p.C * p.M;
    const int64_t threads =
        int64_t{p.N} * p.channels * p.to.size[0] * p.to.size[1] * ((p.to.size[2] + kOutputs - 1) / kOutputs);
    if (threads == 0) return;
    with_variant([&](auto t, auto is_planar) {
      MLC_LAUNCH((depthwise_conv_gather<decltype(t), is_planar, Transposed>), grid_of(kOp, threads, kThreads), dim3(kThreads),
                 0, stream, p);
    });
  }
};

void fwd(const DLTensor* x_, const DLTensor* weight_, const DLTensor* bias_, const int64_t (&stride)[3],
         const int64_t (&dilation)[3], const int64_t (&pad)[3], DLTensor* y_, void* stream) {
  const Tensor x(x_, kOp, "x"), weight(weight_, kOp, "weight"), bias(bias_, kOp, "bias"), y(y_, kOp, "y");
  Problem problem(x, weight, y, "y", stride, dilation, pad);
  if (bias.present()) {
    bias.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({weight.size(0)}, "(C*M)").contiguous();
    problem.p.bias = bias.data<float>();
  }
  const DeviceGuard device(x_->device.device_id);
  problem.gather<false>(stream);
}

void bwd(const DLTensor* dy_, const DLTensor* x_, const DLTensor* weight_, const int64_t (&stride)[3],
         const int64_t (&dilation)[3], const int64_t (&pad)[3], DLTensor* dx_, DLTensor* dweight_, DLTensor* dbias_,
         DLTensor* partial_, void* stream) {
  const Tensor dy(dy_, kOp, "dy"), x(x_, kOp, "x"), weight(weight_, kOp, "weight"), dx(dx_, kOp, "dx"),
      dweight(dweight_, kOp, "dweight"), dbias(dbias_, kOp, "dbias"), partial(partial_, kOp, "partial");
  Problem problem(x, weight, dy, "dy", stride, dilation, pad);
  Conv& p = problem.p;
  if (dx.present()) p.to = problem.volume(dx, "dx", {x.size(0), x.size(1), x.size(2), x.size(3), x.size(4)}, "(N, C, D, H, W)");
  const int64_t pixels = p.N * problem.y.size[0] * problem.y.size[1] * problem.y.size[2];
  if (dweight.present()) {
    p.blocks = pixels / 256 < 1 ? 1 : pixels / 256 > 16 ? 16 : pixels / 256;
    dweight.on(kDLCUDA)
        .dtype_in({Dtype::f32})
        .shape_is({weight.size(0), weight.size(1), weight.size(2), weight.size(3)}, "(C*M, KD, KH, KW)");
    dweight.contiguous();
    dbias.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({weight.size(0)}, "(C*M)").contiguous();
    partial.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({p.blocks, p.taps + 1, weight.size(0)}, "(P, KD*KH*KW + 1, C*M)");
    partial.contiguous();
    p.partial = partial.data<float>();
  }
  const DeviceGuard device(x_->device.device_id);
  if (dx.present()) problem.gather<true>(stream);
  if (!dweight.present() || weight.size(0) == 0) return;
  p.from = problem.x, p.to = problem.y, p.channels = p.C * p.M;
  const int lanes = problem.planar ? 1 : kLanes;
  const int64_t grid = p.blocks * p.axis[0].K * p.axis[1].K * ((p.channels + lanes - 1) / lanes);
  problem.with_variant([&](auto t, auto is_planar) {
    MLC_LAUNCH((depthwise_conv_dweight<decltype(t), is_planar>), grid_of(kOp, grid), dim3(kThreads), 0, stream, p);
  });
  launch_sum_taps(kOp, p.partial, p.blocks, p.taps, p.channels, dweight.data<float>(), dbias.data<float>(), stream);
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_depthwise_conv_fwd(const DLTensor* x, const DLTensor* weight, const DLTensor* bias, int64_t stride_d,
                                        int64_t stride_h, int64_t stride_w, int64_t dilation_d, int64_t dilation_h,
                                        int64_t dilation_w, int64_t pad_d, int64_t pad_h, int64_t pad_w, DLTensor* y,
                                        void* stream) {
  return mlcore::guard([&] {
    mlcore::cuda::fwd(x, weight, bias, {stride_d, stride_h, stride_w}, {dilation_d, dilation_h, dilation_w},
                      {pad_d, pad_h, pad_w}, y, stream);
  });
}

MLC_API int mlc_cuda_depthwise_conv_bwd(const DLTensor* dy, const DLTensor* x, const DLTensor* weight, int64_t stride_d,
                                        int64_t stride_h, int64_t stride_w, int64_t dilation_d, int64_t dilation_h,
                                        int64_t dilation_w, int64_t pad_d, int64_t pad_h, int64_t pad_w, DLTensor* dx,
                                        DLTensor* dweight, DLTensor* dbias, DLTensor* partial, void* stream) {
  return mlcore::guard([&] {
    mlcore::cuda::bwd(dy, x, weight, {stride_d, stride_h, stride_w}, {dilation_d, dilation_h, dilation_w},
                      {pad_d, pad_h, pad_w}, dx, dweight, dbias, partial, stream);
  });
}
