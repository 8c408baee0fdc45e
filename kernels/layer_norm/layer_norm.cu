// The CUDA kernels of layer_norm and their launchers; the equations are in layer_norm.h. One block works on one row or on
// several short ones, in the backward pass on one row block after another. The same text runs on the CPU in tests/native.
#include "cuda/rows.cuh"
#include "layer_norm/layer_norm.h"
#include "layer_norm/layer_norm_kernels.h"

namespace mlcore::cuda {
namespace {

constexpr const char* kOp = "layer_norm";
constexpr int kFwdThreads = 128, kBwdThreads = 512;  // of a block over short rows
constexpr int kFwdPacks = 4, kBwdPacks = 2;          // kept by a thread

// The statistics are those of the CPU kernel: a mean, then sums over the centred row, which also correct the mean
// (Chan, Golub & LeVeque 1983, the corrected two-pass algorithm).
template <class T, int N, int V>
__global__ void __launch_bounds__(kMaxRowThreads, 1) layer_norm_fwd(LayerNormFwd p, int64_t rows) {
  __shared__ float scratch[32];
  const int64_t r = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const bool live = r < rows;
  const int cols = static_cast<int>(p.cols), warps = blockDim.x / 32;
  const float n_cols = static_cast<float>(cols);
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
      for (int i = 0; i < V; ++i) total += to_float(s.v[i]);
    });
  }
  const float first = group_reduce<Sum>(total, warps, scratch) / n_cols;
  float rest = 0.0f, squares = 0.0f;
  if (live) {
    for_packs<N, V>(cols, [&](int k, int c) {
      const Pack<T, V> s = kept.get(k, s_row + c);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float d = to_float(s.v[i]) - first;
        rest += d;
        squares += d * d;
      }
    });
  }
  const float left = group_reduce<Sum>(rest, warps, scratch) / n_cols;
  squares = group_reduce<Sum>(squares, warps, scratch);
  if (!live) return;
  const float mean = first + left, variance = squares / n_cols - left * left;
  const float rstd = 1.0f / sqrtf((variance < 0.0f ? 0.0f : variance) + p.eps);
  if (p.mean && threadIdx.x == 0) p.mean[r] = mean;
  if (p.rstd && threadIdx.x == 0) p.rstd[r] = rstd;
  for_packs<N, V>(cols, [&](int k, int c) {
    const Pack<T, V> s = kept.get(k, s_row + c);
    Pack<T, V> out;
    float weight[V], bias[V];
    load_vector<T>(p.weight, c, 1.0f, weight);
    load_vector<T>(p.bias, c, 0.0f, bias);
#pragma unroll
    for (int i = 0; i < V; ++i) out.v[i] = from_float<T>((to_float(s.v[i]) - mean) * rstd * weight[i] + bias[i]);
    store_pack(y + c, out);
  });
}

template <class T, int N, int V>
__global__ void __launch_bounds__(kMaxRowThreads, 1) layer_norm_bwd(LayerNormBwd p, int64_t rows) {
  __shared__ float scratch[32];
  const RowRange range(rows);
  const int cols = static_cast<int>(p.cols), warps = blockDim.x / 32;
  const float n_cols = static_cast<float>(cols);
  ColumnSum<N, V> dweight(p.weight_partial ? p.weight_partial + p.cols * blockIdx.x : nullptr);  // (C)
  ColumnSum<N, V> dbias(p.bias_partial ? p.bias_partial + p.cols * blockIdx.x : nullptr);        // (C)
  for (int64_t first = range.begin; first < range.end; first += blockDim.y) {
    const int64_t r = first + threadIdx.y;
    const bool live = r < range.end;
    const T *dy = row_of<T>(p.dy, r), *s = row_of<T>(p.s, r), *ds = row_of<T>(p.ds, r);  // (C)
    T* dx = row_of<T>(p.dx, r);                                                          // (C)
    const float mean = live ? p.mean[r] : 0.0f, rstd = live ? p.rstd[r] : 0.0f;
    Kept<T, N, V> kept_dy, kept_s;
    float total_g = 0.0f, total_gx = 0.0f;
    if (live) {
      for_packs<N, V>(cols, [&](int k, int c) {
        const Pack<T, V> d = load_pack<V>(dy + c), v = load_pack<V>(s + c);
        kept_dy.put(k, d);
        kept_s.put(k, v);
        float weight[V];
        load_vector<T>(p.weight, c, 1.0f, weight);
#pragma unroll
        for (int i = 0; i < V; ++i) {
          const float g = to_float(d.v[i]) * weight[i];
          total_g += g;
          total_gx += g * ((to_float(v.v[i]) - mean) * rstd);
        }
      });
    }
    const float mean_g = group_reduce<Sum>(total_g, warps, scratch) / n_cols;
    const float mean_gx = group_reduce<Sum>(total_gx, warps, scratch) / n_cols;
    if (!live) continue;
    for_packs<N, V>(cols, [&](int k, int c) {
      const Pack<T, V> d = kept_dy.get(k, dy + c), v = kept_s.get(k, s + c);
      float weight[V], dy_terms[V], weight_terms[V];
      load_vector<T>(p.weight, c, 1.0f, weight);
      Pack<T, V> out, more = {};
      if (ds) more = load_pack<V>(ds + c);
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float xhat = (to_float(v.v[i]) - mean) * rstd;
        float value = (to_float(d.v[i]) * weight[i] - mean_g - xhat * mean_gx) * rstd;
        if (ds) value += to_float(more.v[i]);
        out.v[i] = from_float<T>(value);
        dy_terms[i] = to_float(d.v[i]);
        weight_terms[i] = dy_terms[i] * xhat;
      }
      store_pack(dx + c, out);
      dweight.add(k, c, first == range.begin, weight_terms);
      dbias.add(k, c, first == range.begin, dy_terms);
    });
  }
  dweight.finish(cols);
  dbias.finish(cols);
}

void fwd(const DLTensor* x_, const DLTensor* residual_, const DLTensor* weight_, const DLTensor* bias_, double eps,
         DLTensor* y_, DLTensor* s_, DLTensor* mean_, DLTensor* rstd_, void* stream) {
  const Tensor x(x_, kOp, "x"), residual(residual_, kOp, "residual"), weight(weight_, kOp, "weight"), bias(bias_, kOp, "bias"),
      y(y_, kOp, "y"), s(s_, kOp, "s"), mean(mean_, kOp, "mean"), rstd(rstd_, kOp, "rstd");
  const RowArgs args(x, kDLCUDA);
  check_row_shape(kOp, args);
  LayerNormFwd p{};
  p.x = args.required(x), p.y = args.required(y);
  p.residual = args.optional(residual);
  if (residual.present()) p.s = args.required(s);
  p.weight = args.vector(weight), p.bias = args.vector(bias);
  p.mean = args.optional_statistic(mean), p.rstd = args.optional_statistic(rstd);
  require(eps >= 0, kOp, ": eps must not be negative; got ", eps);
  p.cols = args.cols, p.dtype = args.dtype, p.eps = static_cast<float>(eps);
  if (args.rows == 0) return;
  const DeviceGuard device(x_->device.device_id);
  const auto packable = [&](auto t) {
    return can_be_packed<decltype(t)>(p.cols, {p.x, p.residual, p.y, p.s}, {p.weight.data, p.bias.data});
  };
  with_type_and_width(p.dtype, packable, [&](auto t, auto width) {
    const dim3 block = row_block(p.cols, width, kFwdPacks, kFwdThreads);
    const dim3 grid(static_cast<unsigned>((args.rows + block.y - 1) / block.y));
    MLC_LAUNCH((layer_norm_fwd<decltype(t), kFwdPacks, width>), grid, block, 0, stream, p, args.rows);
  });
}

void bwd(const DLTensor* dy_, const DLTensor* ds_, const DLTensor* s_, const DLTensor* weight_, const DLTensor* mean_,
         const DLTensor* rstd_, DLTensor* dx_, DLTensor* dweight_, DLTensor* dbias_, DLTensor* partial_, void* stream) {
  const Tensor dy(dy_, kOp, "dy"), ds(ds_, kOp, "ds"), s(s_, kOp, "s"), weight(weight_, kOp, "weight"),
      mean(mean_, kOp, "mean"), rstd(rstd_, kOp, "rstd"), dx(dx_, kOp, "dx"), dweight(dweight_, kOp, "dweight"),
      dbias(dbias_, kOp, "dbias"), partial(partial_, kOp, "partial");
  const RowArgs args(s, kDLCUDA);
  check_row_shape(kOp, args);
  LayerNormBwd p{};
  p.s = args.required(s), p.dy = args.required(dy), p.dx = args.required(dx), p.ds = args.optional(ds);
  p.weight = args.vector(weight), p.dweight = args.vector(dweight), p.dbias = args.vector(dbias);
  p.mean = args.statistic(mean), p.rstd = args.statistic(rstd);
  if (dweight.present()) {
    require(weight.present(), kOp, ": dweight needs weight");
    dweight.dtype_in({weight.dtype()});
  }
  const bool sums = dweight.present() || dbias.present();
  int64_t blocks = 0;  // without them one block a row, or as many rows as lie side by side
  if (sums) {
    require(partial.present(), kOp, ": partial must be given where dweight or dbias is");
    blocks = row_blocks_of(kOp, partial, args);
    partial.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({2, blocks, args.cols}, "(2, P, C)").contiguous();
    if (dweight.present()) p.weight_partial = partial.data<float>();
    if (dbias.present()) p.bias_partial = partial.data<float>() + blocks * args.cols;
  }
  p.cols = args.cols, p.dtype = args.dtype;
  const DeviceGuard device(s_->device.device_id);
  const auto packable = [&](auto t) {
    return can_be_packed<decltype(t)>(p.cols, {p.dy, p.ds, p.s, p.dx}, {p.weight.data, p.weight_partial, p.bias_partial});
  };
  with_type_and_width(p.dtype, packable, [&](auto t, auto width) {
    if (args.rows == 0) return;
    const dim3 block = row_block(p.cols, width, kBwdPacks, sums ? kBwdThreads : kFwdThreads);
    const dim3 grid(static_cast<unsigned>(sums ? blocks : (args.rows + block.y - 1) / block.y));
    MLC_LAUNCH((layer_norm_bwd<decltype(t), kBwdPacks, width>), grid, block, 0, stream, p, args.rows);
  });
  launch_sum_partials(p.weight_partial, blocks, p.cols, p.dweight, stream);
  launch_sum_partials(p.bias_partial, blocks, p.cols, p.dbias, stream);
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_layer_norm_fwd(const DLTensor* x, const DLTensor* residual, const DLTensor* weight, const DLTensor* bias,
                                    double eps, DLTensor* y, DLTensor* s, DLTensor* mean, DLTensor* rstd, void* stream) {
  return mlcore::guard([&] { mlcore::cuda::fwd(x, residual, weight, bias, eps, y, s, mean, rstd, stream); });
}

MLC_API int mlc_cuda_layer_norm_bwd(const DLTensor* dy, const DLTensor* ds, const DLTensor* s, const DLTensor* weight,
                                    const DLTensor* mean, const DLTensor* rstd, DLTensor* dx, DLTensor* dweight,
                                    DLTensor* dbias, DLTensor* partial, void* stream) {
  return mlcore::guard([&] { mlcore::cuda::bwd(dy, ds, s, weight, mean, rstd, dx, dweight, dbias, partial, stream); });
}
