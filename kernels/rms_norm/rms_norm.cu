// The CUDA kernels of rms_norm and their launchers; the equations are in rms_norm.h. One block works on one row or on several
// short ones, in the backward pass on one row block after another. The same text runs on the CPU in tests/native.
#include "cuda/rows.cuh"
#include "rms_norm/rms_norm.h"
#include "rms_norm/rms_norm_kernels.h"

namespace mlcore::cuda {
namespace {

constexpr const char* kOp = "rms_norm";
constexpr int kFwdThreads = 128, kBwdThreads = 512;  // of a block over short rows
constexpr int kFwdPacks = 4, kBwdPacks = 2;          // kept by a thread

template <class T, int N, int V>
__global__ void __launch_bounds__(kMaxRowThreads, 1) rms_norm_fwd(RmsNormFwd p, int64_t rows) {
  __shared__ float scratch[32];
  const int64_t r = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool live = r < rows;
  const int cols = static_cast<int>(p.cols);
  const T *x = row_of<T>(p.x, r), *residual = row_of<T>(p.residual, r);  // (C)
  T *s_out = row_of<T>(p.s, r), *y = row_of<T>(p.y, r);                  // (C)
  const T* s_row = residual ? s_out : x;                                 // (C)
  Kept<T, N, V> kept;
  float total = 0.0f;
  if (live) {
    for_packs<N, V>(cols, [&](int k, int c) {
      const Pack<T, V> s = load_sum<V>(x, residual, s_out, c);
      kept.put(k, s);
#pragma unroll
      for (int i = 0; i < V; ++i) total += to_float(s.v[i]) * to_float(s.v[i]);
    });
  }
  total = group_reduce<Sum>(total, blockDim.x / 32, scratch);
  if (!live) return;
  const float rstd = 1.0f / sqrtf(total / static_cast<float>(cols) + p.eps);
  if (p.rstd && threadIdx.x == 0) p.rstd[r] = rstd;
  for_packs<N, V>(cols, [&](int k, int c) {
    const Pack<T, V> s = kept.get(k, s_row + c);
    Pack<T, V> out;
    float weight[V];
    load_vector<T>(p.weight, c, 1.0f, weight);
#pragma unroll
    for (int i = 0; i < V; ++i) out.v[i] = from_float<T>(to_float(s.v[i]) * rstd * weight[i]);
    store_pack(y + c, out);
  });
}

template <class T, int N, int V>
__global__ void __launch_bounds__(kMaxRowThreads, 1) rms_norm_bwd(RmsNormBwd p, int64_t rows) {
  __shared__ float scratch[32];
  const RowRange range(rows);
  const int cols = static_cast<int>(p.cols);
  ColumnSum<N, V> dweight(p.partial ? p.partial + p.cols * blockIdx.x : nullptr);  // (C)
  for (int64_t first = range.begin; first < range.end; first += blockDim.y) {
    const int64_t r = first + threadIdx.y;
    const bool live = r < range.end;
    const T *dy = row_of<T>(p.dy, r), *s = row_of<T>(p.s, r), *ds = row_of<T>(p.ds, r);  // (C)
    T* dx = row_of<T>(p.dx, r);                                                          // (C)
    const float rstd = live ? p.rstd[r] : 0.0f;
    Kept<T, N, V> kept_dy, kept_s;
    float dot = 0.0f;
    if (live) {
      for_packs<N, V>(cols, [&](int k, int c) {
        const Pack<T, V> d = load_pack<V>(dy + c), v = load_pack<V>(s + c);
        kept_dy.put(k, d);
        kept_s.put(k, v);
        float weight[V];
        load_vector<T>(p.weight, c, 1.0f, weight);
#pragma unroll
        for (int i = 0; i < V; ++i) dot += to_float(d.v[i]) * weight[i] * (to_float(v.v[i]) * rstd);
      });
    }
    const float mean = group_reduce<Sum>(dot, blockDim.x / 32, scratch) / static_cast<float>(cols);
    if (!live) continue;
    for_packs<N, V>(cols, [&](int k, int c) {
      const Pack<T, V> d = kept_dy.get(k, dy + c), v = kept_s.get(k, s + c);
      float weight[V], terms[V];
      load_vector<T>(p.weight, c, 1.0f, weight);
      Pack<T, V> out, more = {};
      if (ds) more = load_pack<V>(ds + c);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float xhat = to_float(v.v[i]) * rstd;
        float value = (to_float(d.v[i]) * weight[i] - xhat * mean) * rstd;
        if (ds) value += to_float(more.v[i]);
        out.v[i] = from_float<T>(value);
        terms[i] = to_float(d.v[i]) * xhat;
      }
      store_pack(dx + c, out);
      dweight.add(k, c, first == range.begin, terms);
    });
  }
  dweight.finish(cols);
}

void fwd(const DLTensor* x_, const DLTensor* residual_, const DLTensor* weight_, double eps, DLTensor* y_, DLTensor* s_,
         DLTensor* rstd_, void* stream) {
  const Tensor x(x_, kOp, "x"), residual(residual_, kOp, "residual"), weight(weight_, kOp, "weight"), y(y_, kOp, "y"),
      s(s_, kOp, "s"), rstd(rstd_, kOp, "rstd");
  const RowArgs args(x, kDLCUDA);
  check_row_shape(kOp, args);
  RmsNormFwd p{};
  p.x = args.required(x), p.y = args.required(y);
  p.residual = args.optional(residual);
  if (residual.present()) p.s = args.required(s);
  p.weight = args.vector(weight);
  p.rstd = args.optional_statistic(rstd);
  require(eps >= 0, kOp, ": eps must not be negative; got ", eps);
  p.cols = args.cols, p.dtype = args.dtype, p.eps = static_cast<float>(eps);
  if (args.rows == 0) return;
  const DeviceGuard device(x_->device.device_id);
  const auto packable = [&](auto t) {
    return can_be_packed<decltype(t)>(p.cols, {p.x, p.residual, p.y, p.s}, {p.weight.data});
  };
  with_type_and_width(p.dtype, packable, [&](auto t, auto width) {
    const dim3 block = row_block(p.cols, width, kFwdPacks, kFwdThreads);
    const dim3 grid(static_cast<unsigned>((args.rows + block.y - 1) / block.y));
    MLC_LAUNCH((rms_norm_fwd<decltype(t), kFwdPacks, width>), grid, block, 0, stream, p, args.rows);
  });
}

void bwd(const DLTensor* dy_, const DLTensor* ds_, const DLTensor* s_, const DLTensor* weight_, const DLTensor* rstd_,
         DLTensor* dx_, DLTensor* dweight_, DLTensor* partial_, void* stream) {
  const Tensor dy(dy_, kOp, "dy"), ds(ds_, kOp, "ds"), s(s_, kOp, "s"), weight(weight_, kOp, "weight"),
      rstd(rstd_, kOp, "rstd"), dx(dx_, kOp, "dx"), dweight(dweight_, kOp, "dweight"), partial(partial_, kOp, "partial");
  const RowArgs args(s, kDLCUDA);
  check_row_shape(kOp, args);
  RmsNormBwd p{};
  p.s = args.required(s), p.dy = args.required(dy), p.dx = args.required(dx), p.ds = args.optional(ds);
  p.weight = args.vector(weight), p.dweight = args.vector(dweight);
  p.rstd = args.statistic(rstd);
  int64_t blocks = 0;  // without dweight one block a row, or as many rows as lie side by side
  if (dweight.present()) {
    require(weight.present(), kOp, ": dweight needs weight");
    dweight.dtype_in({weight.dtype()});
    require(partial.present(), kOp, ": partial must be given where dweight is");
    blocks = row_blocks_of(kOp, partial, args);
    partial.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({blocks, args.cols}, "(P, C)").contiguous();
    p.partial = partial.data<float>();
  }
  p.cols = args.cols, p.dtype = args.dtype;
  const DeviceGuard device(s_->device.device_id);
  const auto packable = [&](auto t) {
    return can_be_packed<decltype(t)>(p.cols, {p.dy, p.ds, p.s, p.dx}, {p.weight.data, p.partial});
  };
  with_type_and_width(p.dtype, packable, [&](auto t, auto width) {
    if (args.rows == 0) return;
    const dim3 block = row_block(p.cols, width, kBwdPacks, p.partial ? kBwdThreads : kFwdThreads);
    const dim3 grid(static_cast<unsigned>(p.partial ? blocks : (args.rows + block.y - 1) / block.y));
    MLC_LAUNCH((rms_norm_bwd<decltype(t), kBwdPacks, width>), grid, block, 0, stream, p, args.rows);
  });
  launch_sum_partials(p.partial, blocks, p.cols, p.dweight, stream);
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_rms_norm_fwd(const DLTensor* x, const DLTensor* residual, const DLTensor* weight, double eps, DLTensor* y,
                                  DLTensor* s, DLTensor* rstd, void* stream) {
  return mlcore::guard([&] { mlcore::cuda::fwd(x, residual, weight, eps, y, s, rstd, stream); });
}

MLC_API int mlc_cuda_rms_norm_bwd(const DLTensor* dy, const DLTensor* ds, const DLTensor* s, const DLTensor* weight,
                                  const DLTensor* rstd, DLTensor* dx, DLTensor* dweight, DLTensor* partial, void* stream) {
  return mlcore::guard([&] { mlcore::cuda::bwd(dy, ds, s, weight, rstd, dx, dweight, partial, stream); });
}
