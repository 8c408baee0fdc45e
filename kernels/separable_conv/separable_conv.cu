// The CUDA kernels of separable_conv and their launchers; the equations are in separable_conv.h, the parts of the kernels in
// separable_conv_cuda.cuh. The same text runs on the CPU in tests.
#include <algorithm>

#include "cuda/dispatch.h"
#include "separable_conv/separable_conv.h"
#include "separable_conv/separable_conv_cuda.cuh"

namespace mlcore::cuda {
namespace {

constexpr const char* kOp = "separable_conv";
constexpr int kMaxParts = 1024, kPartialRows = 16;  // of sums over pixels; rows of h that a partial sum covers at least

// A block owns kColumns columns of y and the tiles of a part of its pixels: one, where no moments are taken.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) separable_conv_product(const SeparableConv p) {
  MLC_DYNAMIC_SMEM(unsigned char, smem);
  __shared__ float halves[2][kThreads];
  auto& tile = *reinterpret_cast<Tile<T>*>(smem);
  auto* sums = reinterpret_cast<float*>(smem);  // (kRows, kSumPitch), once the products are made
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n0 = blockIdx.y * kColumns;
  const int begin = part_begin(p.pixels, p.unit, p.parts, blockIdx.x);
  const int end = part_begin(p.pixels, p.unit, p.parts, blockIdx.x + 1);
  ColumnMoments moments;
  for (int m0 = begin; m0 < end; m0 += kRows) {
    float acc[2][4][4] = {};
    multiply_tile<T>(p, tile, m0, n0, acc);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int row = warp % 2 * 32 + 16 * i + lane / 4 + e / 2 * 8, column = warp / 2 * 32 + 8 * j + lane % 4 * 2 + e % 2;
          sums[row * kSumPitch + column] = acc[i][j][e];
        }
    __syncthreads();
    if (m0 == begin) moments.origin = sums[threadIdx.x % kColumns];
    write_tile<T>(p, sums, m0, n0, moments);
    __syncthreads();
  }
  if (p.partial == nullptr) return;
  halves[0][threadIdx.x] = moments.first, halves[1][threadIdx.x] = moments.second;
  __syncthreads();
  const int j = n0 + threadIdx.x;
  if (threadIdx.x >= kColumns || j >= p.J) return;
  float* to = p.partial + int64_t{blockIdx.x} * 3 * p.J + j;
  to[0] = moments.first + halves[0][threadIdx.x + kColumns];
  to[p.J] = moments.second + halves[1][threadIdx.x + kColumns];
  to[2 * p.J] = moments.origin;
}

// A pass over h of a part of its pixels and a slice of channels.
template <class T>
__global__ void __launch_bounds__(kThreads) separable_conv_hidden(const SeparableConv p) {
  using S = Slice<T>;
  constexpr int kVec = S::kVec;
  __shared__ __align__(16) float taps[kTaps * S::kTapPitch];
  const int c0 = blockIdx.y * S::kChannels, inner = threadIdx.x % kVecs * kVec, c = c0 + inner, count = p.C - c;
  const int begin = part_begin(p.pixels, p.unit, p.parts, blockIdx.x);
  const int end = part_begin(p.pixels, p.unit, p.parts, blockIdx.x + 1);
  load_taps<T>(p, c0, taps);
  __syncthreads();
  float first[kVec] = {}, second[kVec] = {}, about[kVec] = {};
  if (count > 0 && p.pass == Pass::moments && begin < end) make_hidden<T>(p, Place(p, begin), taps, c, count, inner, about);
  if (p.mean != nullptr)
#pragma unroll
    for (int i = 0; i < kVec; ++i) about[i] = i < count ? p.mean[c + i] : 0.0f;
  for (int m = begin + threadIdx.x / kVecs; m < end && count > 0; m += kThreads / kVecs) {
    const Place at(p, m);
    float h[kVec];
    make_hidden<T>(p, at, taps, c, count, inner, h);
    if (p.pass == Pass::moments) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) first[i] += h[i] - about[i], second[i] += (h[i] - about[i]) * (h[i] - about[i]);
      continue;
    }
    const Pixels& other = p.pass == Pass::apply ? p.residual : p.da;
    Pack<T, kVec> given{};
    if (other.data != nullptr) given = load_channels<T>(other, at.in(other) + c, count);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      if (i >= count) break;
      const float v = affine(p, c + i, h[i]), scale = p.scale != nullptr ? p.scale[c + i] : 1.0f;
      if (p.pass == Pass::apply) {
        h[i] = activate(p.f, v);
        if (other.data != nullptr) h[i] += to_float(given.v[i]);
        continue;
      }
      const float e = through(p.f, to_float(given.v[i]), v);
      if (p.pass == Pass::norm) {
        h[i] = scale * e + (p.by_h[c + i] * h[i] + p.constant[c + i]);
      } else {
        first[i] += e, second[i] += e * (h[i] - about[i]);
        h[i] = scale * e;
      }
    }
    if (p.pass != Pass::sums) store_channels<T>(p.a, at.in(p.a) + c, count, h);
  }
  if (p.partial == nullptr) return;
  float* to = p.partial + int64_t{blockIdx.x} * 3 * p.C + c0;
  sum_pixels(first, taps, p.C - c0, to);
  sum_pixels(second, taps, p.C - c0, to + p.C);
  if (threadIdx.x < kVecs)
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (i < count) to[2 * p.C + inner + i] = about[i];
}

// Sums over parts are taken in double: 32 channels a block, its eight warps share the parts.
constexpr int kLanes = 32, kWarps = kThreads / kLanes;

// Over the block's warps in order; all threads of a channel get it.
MLC_DEVICE double sum_warps(double v, double (*scratch)[kLanes]) {
  const int lane = threadIdx.x % kLanes;
  __syncthreads();  // the last result has been read
  scratch[threadIdx.x / kLanes][lane] = v;
  __syncthreads();
  double total = 0.0;
  for (int i = 0; i < kWarps; ++i) total += scratch[i][lane];
  return total;
}

// Mean and biased variance (2, C) from the parts' sums of v - v0 and (v - v0)^2 with v0.
__global__ void __launch_bounds__(kThreads)
    separable_conv_moments(const float* partial, int pixels, int unit, int parts, int C, float* moments) {
  __shared__ double scratch[kWarps][kLanes];
  const int c = blockIdx.x * kLanes + threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const auto each = [&](auto&& body) {
    for (int b = warp; b < parts && c < C; b += kWarps) {
      const int size = part_begin(pixels, unit, parts, b + 1) - part_begin(pixels, unit, parts, b);
      const float* at = partial + int64_t{b} * 3 * C + c;
      body(double(size), double(at[0]), double(at[C]), double(at[2 * C]));
    }
  };
  double mean = 0.0, squares = 0.0;
  each([&](double size, double first, double, double origin) { mean += (origin * size + first) / pixels; });
  mean = sum_warps(mean, scratch);
  each([&](double size, double first, double second, double origin) {
    const double off = origin - mean;
    squares += second + off * (2.0 * first + off * size);
  });
  squares = sum_warps(squares, scratch);
  if (warp > 0 || c >= C) return;
  const float variance = static_cast<float>(squares / pixels);
  moments[c] = static_cast<float>(mean);
  moments[C + c] = variance < 0.0f ? 0.0f : variance;  // NaN stays
}

// sums (4, C) of mlc_separable_conv_bwd from the parts' sums of e and e (h - mean).
__global__ void __launch_bounds__(kThreads) separable_conv_sums(const SeparableConv p, const float* moments, float* sums) {
  __shared__ double scratch[kWarps][kLanes];
  const int c = blockIdx.x * kLanes + threadIdx.x % kLanes, warp = threadIdx.x / kLanes, C = p.C;
  double by_shift = 0.0, by_scale = 0.0;
  for (int b = warp; b < p.parts && c < C; b += kWarps) {
    const float* at = p.partial + int64_t{b} * 3 * C + c;
    by_shift += at[0], by_scale += at[C];
  }
  by_shift = sum_warps(by_shift, scratch);
  by_scale = sum_warps(by_scale, scratch);
  if (warp > 0 || c >= C) return;
  const double mean = moments != nullptr ? moments[c] : 0.0, rstd = moments != nullptr ? moments[C + c] : 1.0;
  const double factor = (p.scale != nullptr ? p.scale[c] : 1.0) / max(p.pixels, 1), scaled = rstd * by_scale;
  const double by_h = -factor * rstd * scaled;
  sums[c] = static_cast<float>(scaled), sums[C + c] = static_cast<float>(by_shift);
  sums[2 * C + c] = static_cast<float>(by_h), sums[3 * C + c] = static_cast<float>(-factor * by_shift - by_h * mean);
}

struct Problem {
  SeparableConv p{};
  Dtype dtype;
  int64_t N;

  Problem(const Tensor& x, const Tensor& depthwise, const Tensor& scale, const Tensor& shift, const int64_t (&stride)[2],
          const int64_t (&dilation)[2], const int64_t (&pad)[2], int64_t f, int64_t patch_h = 0, int64_t patch_w = 0)
      : dtype(x.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(N, C, H, W)").dtype()), N(x.size(0)) {
    require((patch_h == 0) == (patch_w == 0) && patch_h >= 0 && patch_w >= 0, kOp,
            ": patch_h and patch_w must both be positive, or 0; got ", patch_h, " and ", patch_w);
    p.patches = patch_h > 0;
    require(!p.patches || !depthwise.present(), kOp, ": depthwise must be left out where patches are taken");
    p.Cx = checked_int(kOp, "C", x.size(1)), p.H = checked_int(kOp, "H", x.size(2)), p.W = checked_int(kOp, "W", x.size(3));
    p.x = p.patches ? Pixels{x.raw(), x.stride(0), x.stride(2), x.stride(3), x.stride(1), false} : pixels(x, "x", x);
    int64_t K[2] = {1, 1}, channels = x.size(1);
    if (p.patches) K[0] = patch_h, K[1] = patch_w, channels *= patch_h * patch_w;
    p.C = checked_int(kOp, "the number of channels", channels);
    if (depthwise.present()) {
      depthwise.on(kDLCUDA).dtype_in({Dtype::f32}).rank_is(3, "(C, KH, KW)");
      depthwise.shape_is({p.C, depthwise.size(1), depthwise.size(2)}, "(C, KH, KW)").contiguous();
      p.depthwise = depthwise.data<float>(), K[0] = depthwise.size(1), K[1] = depthwise.size(2);
    }
    for (int d = 0; d < 2; ++d) {
      require(K[d] >= 1, kOp, ": depthwise must have at least one tap in every dimension; got ", K[d]);
      require(stride[d] >= 1, kOp, ": stride must be at least 1; got ", stride[d]);
      require(dilation[d] >= 1, kOp, ": dilation must be at least 1; got ", dilation[d]);
      require(pad[d] >= 0, kOp, ": pad must not be negative; got ", pad[d]);
      p.K[d] = checked_int(kOp, "kernel size", K[d]), p.stride[d] = checked_int(kOp, "stride", stride[d]);
      p.dilation[d] = checked_int(kOp, "dilation", dilation[d]), p.pad[d] = checked_int(kOp, "pad", pad[d]);
    }
    checked_int(kOp, "the number of taps", K[0] * K[1]);
    p.scale = floats(scale, {p.C}, "(C)"), p.shift = floats(shift, {p.C}, "(C)"), p.f = activation(f, "f");
  }

  static int activation(int64_t code, const char* name) {
    require(code >= 0 && code <= 3, kOp, ": ", name, " must be 0 (none), 1 (relu), 2 (relu6) or 3 (silu); got ", code);
    return static_cast<int>(code);
  }

  static float* floats(const Tensor& t, std::initializer_list<int64_t> shape, const char* layout) {
    return t.present() ? t.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is(shape, layout).contiguous().data<float>() : nullptr;
  }

  // t, where it is given, shaped like `like`.
  Pixels pixels(const Tensor& t, const char* name, const Tensor& like) const {
    if (!t.present()) return {};
    t.on(kDLCUDA).dtype_in({dtype}).shape_like(like);
    require(t.numel() == 0 || t.size(1) == 1 || t.stride(1) == 1, kOp, ": ", name, " must be contiguous in C; got stride ",
            t.stride(1));
    const int64_t vec = dtype == Dtype::f32 ? 4 : 8;
    bool aligned = reinterpret_cast<uintptr_t>(t.raw()) % 16 == 0;
    for (int d : {0, 2, 3}) aligned = aligned && (t.size(d) <= 1 || t.stride(d) % vec == 0);
    return {t.raw(), t.stride(0), t.stride(2), t.stride(3), 1, aligned};
  }

  void size(int64_t Ho, int64_t Wo) {
    p.Ho = checked_int(kOp, "Ho", Ho), p.Wo = checked_int(kOp, "Wo", Wo);
    p.pixels = checked_int(kOp, "the number of pixels", N * Ho * Wo);
    // Positions of taps are sums of these.
    checked_int(kOp, "the extent of x along H", p.H + Ho * p.stride[0] + int64_t{p.K[0]} * p.dilation[0] + p.pad[0]);
    checked_int(kOp, "the extent of x along W", p.W + Wo * p.stride[1] + int64_t{p.K[1]} * p.dilation[1] + p.pad[1]);
  }

  int64_t hidden_blocks() const { return (N * p.Ho + kPartialRows - 1) / kPartialRows; }

  void launch_hidden(Pass pass, void* stream) {
    p.pass = pass, p.unit = 1;
    const int64_t pieces = (int64_t{p.pixels} + 127) / 128;  // four pixels a thread
    p.parts = static_cast<int>(p.partial ? std::min<int64_t>({hidden_blocks(), pieces, kMaxParts}) : pieces);
    with_type(dtype, [&](auto t) {
      using T = decltype(t);
      constexpr int kChannels = Slice<T>::kChannels;
      const dim3 grid(p.parts, (p.C + kChannels - 1) / kChannels);
      require(grid.y <= 65535, kOp, ": x must have at most ", 65535 * kChannels, " channels");
      MLC_LAUNCH((separable_conv_hidden<T>), grid, dim3(kThreads), 0, stream, p);
    });
  }

  void launch_moments(int channels, float* moments, void* stream) const {
    MLC_LAUNCH(separable_conv_moments, grid_of(kOp, channels, kLanes), dim3(kThreads), 0, stream, p.partial, p.pixels, p.unit,
               p.parts, channels, moments);
  }
};

void fwd(const DLTensor* x_, const DLTensor* depthwise_, const DLTensor* scale_, const DLTensor* shift_,
         const DLTensor* pointwise_, const DLTensor* bias_, const DLTensor* residual_, const int64_t (&stride)[2],
         const int64_t (&dilation)[2], const int64_t (&pad)[2], const int64_t (&patch)[2], int64_t f, int64_t g, DLTensor* y_,
         DLTensor* partial_, DLTensor* moments_, void* stream) {
  const Tensor x(x_, kOp, "x"), depthwise(depthwise_, kOp, "depthwise"), scale(scale_, kOp, "scale"),
      shift(shift_, kOp, "shift"), pointwise(pointwise_, kOp, "pointwise"), bias(bias_, kOp, "bias"),
      residual(residual_, kOp, "residual"), y(y_, kOp, "y"), partial(partial_, kOp, "partial"),
      moments(moments_, kOp, "moments");
  Problem problem(x, depthwise, scale, shift, stride, dilation, pad, f, patch[0], patch[1]);
  SeparableConv& p = problem.p;
  y.rank_is(4, "(N, J, Ho, Wo)").shape_is({problem.N, y.size(1), y.size(2), y.size(3)}, "(N, J, Ho, Wo)");
  p.J = checked_int(kOp, "J", y.size(1)), problem.size(y.size(2), y.size(3));
  p.y = problem.pixels(y, "y", y), p.residual = problem.pixels(residual, "residual", y);
  const int64_t blocks[2] = {(y.size(1) + kBlock - 1) / kBlock, (int64_t{p.C} + kBlock - 1) / kBlock};
  pointwise.on(kDLCUDA);
  p.pointwise = Problem::floats(pointwise, {blocks[0], blocks[1], kBlock, kBlock}, "(ceil(J/64), ceil(C/64), 64, 64)");
  require(reinterpret_cast<uintptr_t>(p.pointwise) % 16 == 0, kOp, ": pointwise must be aligned to 16 bytes");
  p.bias = Problem::floats(bias, {p.J}, "(J)"), p.g = Problem::activation(g, "g");
  require(p.C >= 1, kOp, ": x must have channels");
  require(partial.present() == moments.present(), kOp, ": partial and moments must be given together");
  p.partial = Problem::floats(partial, {problem.N * p.Ho, 3, p.J}, "(N*Ho, 3, J)");
  float* taken = Problem::floats(moments, {2, p.J}, "(2, J)");
  if (y.numel() == 0) return;
  const int64_t tiles = (int64_t{p.pixels} + kRows - 1) / kRows;
  p.unit = kRows, p.parts = static_cast<int>(taken ? std::min<int64_t>({tiles, problem.N * p.Ho, kMaxParts}) : tiles);
  const dim3 grid(p.parts, (p.J + kColumns - 1) / kColumns);
  require(grid.y <= 65535, kOp, ": y must have at most ", 65535 * kColumns, " channels; got ", p.J);
  const DeviceGuard device(x_->device.device_id);
  with_type(problem.dtype, [&](auto t) {
    using T = decltype(t);
    constexpr size_t kBytes = std::max(sizeof(Tile<T>), sizeof(float) * kRows * kSumPitch);
    MLC_LAUNCH((separable_conv_product<T>), grid, dim3(kThreads), kBytes, stream, p);
  });
  if (taken) problem.launch_moments(p.J, taken, stream);
}

void hidden(const DLTensor* x_, const DLTensor* depthwise_, const DLTensor* scale_, const DLTensor* shift_,
            const DLTensor* residual_, const int64_t (&stride)[2], const int64_t (&dilation)[2], const int64_t (&pad)[2],
            int64_t f, int64_t out_h, int64_t out_w, DLTensor* a_, DLTensor* partial_, DLTensor* moments_, void* stream) {
  const Tensor x(x_, kOp, "x"), depthwise(depthwise_, kOp, "depthwise"), scale(scale_, kOp, "scale"),
      shift(shift_, kOp, "shift"), residual(residual_, kOp, "residual"), a(a_, kOp, "a"), partial(partial_, kOp, "partial"),
      moments(moments_, kOp, "moments");
  Problem problem(x, depthwise, scale, shift, stride, dilation, pad, f);
  SeparableConv& p = problem.p;
  require(out_h >= 0 && out_w >= 0, kOp, ": the size of h must not be negative; got ", out_h, " x ", out_w);
  require(a.present() != moments.present(), kOp, ": either a or moments must be given");
  require(partial.present() == moments.present(), kOp, ": partial and moments must be given together");
  require(a.present() || !residual.present(), kOp, ": residual must be left out where moments are taken");
  problem.size(out_h, out_w);
  if (a.present()) a.shape_is({problem.N, p.C, out_h, out_w}, "(N, C, Ho, Wo)");
  p.a = problem.pixels(a, "a", a), p.residual = problem.pixels(residual, "residual", a);
  p.partial = Problem::floats(partial, {problem.hidden_blocks(), 3, p.C}, "(ceil(N*Ho/16), 3, C)");
  float* taken = Problem::floats(moments, {2, p.C}, "(2, C)");
  if (p.pixels == 0 || p.C == 0) return;
  const DeviceGuard device(x_->device.device_id);
  problem.launch_hidden(taken ? Pass::moments : Pass::apply, stream);
  if (taken) problem.launch_moments(p.C, taken, stream);
}

void bwd(const DLTensor* da_, const DLTensor* x_, const DLTensor* depthwise_, const DLTensor* scale_, const DLTensor* shift_,
         const DLTensor* moments_, const int64_t (&stride)[2], const int64_t (&dilation)[2], const int64_t (&pad)[2], int64_t f,
         DLTensor* d_, DLTensor* sums_, DLTensor* partial_, void* stream) {
  const Tensor da(da_, kOp, "da"), x(x_, kOp, "x"), depthwise(depthwise_, kOp, "depthwise"), scale(scale_, kOp, "scale"),
      shift(shift_, kOp, "shift"), moments(moments_, kOp, "moments"), d(d_, kOp, "d"), sums(sums_, kOp, "sums"),
      partial(partial_, kOp, "partial");
  Problem problem(x, depthwise, scale, shift, stride, dilation, pad, f);
  SeparableConv& p = problem.p;
  d.rank_is(4, "(N, C, Ho, Wo)").shape_is({problem.N, p.C, d.size(2), d.size(3)}, "(N, C, Ho, Wo)");
  problem.size(d.size(2), d.size(3));
  da.on(kDLCUDA), sums.on(kDLCUDA), partial.on(kDLCUDA);
  p.a = problem.pixels(d, "d", d), p.da = problem.pixels(da, "da", d);
  p.partial = Problem::floats(partial, {problem.hidden_blocks(), 3, p.C}, "(ceil(N*Ho/16), 3, C)");
  float* out = Problem::floats(sums, {4, p.C}, "(4, C)");
  const float* given = Problem::floats(moments, {2, p.C}, "(2, C)");
  if (p.C == 0) return;
  p.mean = given;
  const DeviceGuard device(x_->device.device_id);
  if (p.pixels > 0) problem.launch_hidden(given ? Pass::sums : Pass::gradient, stream);
  MLC_LAUNCH(separable_conv_sums, grid_of(kOp, p.C, kLanes), dim3(kThreads), 0, stream, p, given, out);
  if (!given || p.pixels == 0) return;
  p.by_h = out + 2 * int64_t{p.C}, p.constant = out + 3 * int64_t{p.C}, p.partial = nullptr;
  problem.launch_hidden(Pass::norm, stream);
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_separable_conv_fwd(const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale,
                                        const DLTensor* shift, const DLTensor* pointwise, const DLTensor* bias,
                                        const DLTensor* residual, int64_t stride_h, int64_t stride_w, int64_t dilation_h,
                                        int64_t dilation_w, int64_t pad_h, int64_t pad_w, int64_t patch_h, int64_t patch_w,
                                        int64_t f, int64_t g, DLTensor* y, DLTensor* partial, DLTensor* moments, void* stream) {
  return mlcore::guard([&] {
    mlcore::cuda::fwd(x, depthwise, scale, shift, pointwise, bias, residual, {stride_h, stride_w}, {dilation_h, dilation_w},
                      {pad_h, pad_w}, {patch_h, patch_w}, f, g, y, partial, moments, stream);
  });
}

MLC_API int mlc_cuda_separable_conv_hidden(const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale,
                                           const DLTensor* shift, const DLTensor* residual, int64_t stride_h, int64_t stride_w,
                                           int64_t dilation_h, int64_t dilation_w, int64_t pad_h, int64_t pad_w, int64_t f,
                                           int64_t out_h, int64_t out_w, DLTensor* a, DLTensor* partial, DLTensor* moments,
                                           void* stream) {
  return mlcore::guard([&] {
    mlcore::cuda::hidden(x, depthwise, scale, shift, residual, {stride_h, stride_w}, {dilation_h, dilation_w}, {pad_h, pad_w},
                         f, out_h, out_w, a, partial, moments, stream);
  });
}

MLC_API int mlc_cuda_separable_conv_bwd(const DLTensor* da, const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale,
                                        const DLTensor* shift, const DLTensor* moments, int64_t stride_h, int64_t stride_w,
                                        int64_t dilation_h, int64_t dilation_w, int64_t pad_h, int64_t pad_w, int64_t f,
                                        DLTensor* d, DLTensor* sums, DLTensor* partial, void* stream) {
  return mlcore::guard([&] {
    mlcore::cuda::bwd(da, x, depthwise, scale, shift, moments, {stride_h, stride_w}, {dilation_h, dilation_w}, {pad_h, pad_w},
                      f, d, sums, partial, stream);
  });
}
