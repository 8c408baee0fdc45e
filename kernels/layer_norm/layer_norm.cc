// Validates, chooses the ISA, cuts rows into parallel work. The contract is layer_norm.h, the arithmetic layer_norm_cpu.inl.
#include "layer_norm/layer_norm.h"

#include "core/row_blocks.h"
#include "layer_norm/layer_norm_kernels.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "layer_norm";

void fwd(const DLTensor* x_, const DLTensor* residual_, const DLTensor* weight_, const DLTensor* bias_, double eps,
         DLTensor* y_, DLTensor* s_, DLTensor* mean_, DLTensor* rstd_) {
  const Tensor x(x_, kOp, "x"), residual(residual_, kOp, "residual"), weight(weight_, kOp, "weight"), bias(bias_, kOp, "bias"),
      y(y_, kOp, "y"), s(s_, kOp, "s"), mean(mean_, kOp, "mean"), rstd(rstd_, kOp, "rstd");
  const RowArgs args(x);
  LayerNormFwd p{};
  p.x = args.required(x), p.y = args.required(y);
  p.residual = args.optional(residual);
  if (residual.present()) p.s = args.required(s);
  p.weight = args.vector(weight), p.bias = args.vector(bias);
  p.mean = args.optional_statistic(mean), p.rstd = args.optional_statistic(rstd);
  require(eps >= 0, kOp, ": eps must not be negative; got ", eps);
  p.cols = args.cols, p.dtype = args.dtype, p.eps = static_cast<float>(eps);
  const LayerNormKernels& kernels = layer_norm_kernels_now();
  parallel_for(args.rows, row_grain(p.cols), [&](int64_t begin, int64_t end) { kernels.fwd(p, begin, end); });
}

void bwd(const DLTensor* dy_, const DLTensor* ds_, const DLTensor* s_, const DLTensor* weight_, const DLTensor* mean_,
         const DLTensor* rstd_, DLTensor* dx_, DLTensor* dweight_, DLTensor* dbias_, DLTensor* partial_) {
  const Tensor dy(dy_, kOp, "dy"), ds(ds_, kOp, "ds"), s(s_, kOp, "s"), weight(weight_, kOp, "weight"),
      mean(mean_, kOp, "mean"), rstd(rstd_, kOp, "rstd"), dx(dx_, kOp, "dx"), dweight(dweight_, kOp, "dweight"),
      dbias(dbias_, kOp, "dbias"), partial(partial_, kOp, "partial");
  const RowArgs args(s);
  const RowBlocks blocks(args.rows);
  LayerNormBwd p{};
  p.s = args.required(s), p.dy = args.required(dy), p.dx = args.required(dx), p.ds = args.optional(ds);
  p.weight = args.vector(weight), p.dweight = args.vector(dweight), p.dbias = args.vector(dbias);
  p.mean = args.statistic(mean), p.rstd = args.statistic(rstd);
  if (dweight.present()) {
    require(weight.present(), kOp, ": dweight needs weight");
    dweight.dtype_in({weight.dtype()});
  }
  if (dweight.present() || dbias.present()) {
    partial.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({2, blocks.count, args.cols}, "(2, min(R, 64), C)").contiguous();
    if (dweight.present()) p.weight_partial = partial.data<float>();
    if (dbias.present()) p.bias_partial = partial.data<float>() + blocks.count * args.cols;
  }
  p.cols = args.cols, p.dtype = args.dtype;
  const LayerNormKernels& kernels = layer_norm_kernels_now();
  for_row_blocks(blocks, p.cols, [&](int64_t block, int64_t begin, int64_t end) { kernels.bwd(p, block, begin, end); });
  if (!p.dweight.data && !p.dbias.data) return;
  parallel_for(p.cols, kColumnGrain, [&](int64_t begin, int64_t end) { kernels.reduce(p, blocks.count, begin, end); });
}

}  // namespace
}  // namespace mlcore

int mlc_layer_norm_fwd(const DLTensor* x, const DLTensor* residual, const DLTensor* weight, const DLTensor* bias, double eps,
                       DLTensor* y, DLTensor* s, DLTensor* mean, DLTensor* rstd) {
  return mlcore::guard([&] { mlcore::fwd(x, residual, weight, bias, eps, y, s, mean, rstd); });
}

int mlc_layer_norm_bwd(const DLTensor* dy, const DLTensor* ds, const DLTensor* s, const DLTensor* weight, const DLTensor* mean,
                       const DLTensor* rstd, DLTensor* dx, DLTensor* dweight, DLTensor* dbias, DLTensor* partial) {
  return mlcore::guard([&] { mlcore::bwd(dy, ds, s, weight, mean, rstd, dx, dweight, dbias, partial); });
}
