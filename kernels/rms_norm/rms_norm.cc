// Validates, chooses the ISA, cuts rows into parallel work. The contract is rms_norm.h, the arithmetic rms_norm_cpu.inl.
#include "rms_norm/rms_norm.h"

#include "core/row_blocks.h"
#include "rms_norm/rms_norm_kernels.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "rms_norm";

void fwd(const DLTensor* x_, const DLTensor* residual_, const DLTensor* weight_, double eps, DLTensor* y_, DLTensor* s_,
         DLTensor* rstd_) {
  const Tensor x(x_, kOp, "x"), residual(residual_, kOp, "residual"), weight(weight_, kOp, "weight"), y(y_, kOp, "y"),
      s(s_, kOp, "s"), rstd(rstd_, kOp, "rstd");
  const RowArgs args(x);
  RmsNormFwd p{};
  p.x = args.required(x), p.y = args.required(y);
  p.residual = args.optional(residual);
  if (residual.present()) p.s = args.required(s);
  p.weight = args.vector(weight);
  p.rstd = args.optional_statistic(rstd);
  require(eps >= 0, kOp, ": eps must not be negative; got ", eps);
  p.cols = args.cols, p.dtype = args.dtype, p.eps = static_cast<float>(eps);
  const RmsNormKernels& kernels = rms_norm_kernels_now();
  parallel_for(args.rows, row_grain(p.cols), [&](int64_t begin, int64_t end) { kernels.fwd(p, begin, end); });
}

void bwd(const DLTensor* dy_, const DLTensor* ds_, const DLTensor* s_, const DLTensor* weight_, const DLTensor* rstd_,
         DLTensor* dx_, DLTensor* dweight_, DLTensor* partial_) {
  const Tensor dy(dy_, kOp, "dy"), ds(ds_, kOp, "ds"), s(s_, kOp, "s"), weight(weight_, kOp, "weight"),
      rstd(rstd_, kOp, "rstd"), dx(dx_, kOp, "dx"), dweight(dweight_, kOp, "dweight"), partial(partial_, kOp, "partial");
  const RowArgs args(s);
  const RowBlocks blocks(args.rows);
  RmsNormBwd p{};
  p.s = args.required(s), p.dy = args.required(dy), p.dx = args.required(dx), p.ds = args.optional(ds);
  p.weight = args.vector(weight), p.dweight = args.vector(dweight);
  p.rstd = args.statistic(rstd);
  if (dweight.present()) {
    require(weight.present(), kOp, ": dweight needs weight");
    dweight.dtype_in({weight.dtype()});
    partial.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({blocks.count, args.cols}, "(min(R, 64), C)").contiguous();
    p.partial = partial.data<float>();
  }
  p.cols = args.cols, p.dtype = args.dtype;
  const RmsNormKernels& kernels = rms_norm_kernels_now();
  for_row_blocks(blocks, p.cols, [&](int64_t block, int64_t begin, int64_t end) { kernels.bwd(p, block, begin, end); });
  if (!p.dweight.data) return;
  parallel_for(p.cols, kColumnGrain, [&](int64_t begin, int64_t end) { kernels.reduce(p, blocks.count, begin, end); });
}

}  // namespace
}  // namespace mlcore

int mlc_rms_norm_fwd(const DLTensor* x, const DLTensor* residual, const DLTensor* weight, double eps, DLTensor* y, DLTensor* s,
                     DLTensor* rstd) {
  return mlcore::guard([&] { mlcore::fwd(x, residual, weight, eps, y, s, rstd); });
}

int mlc_rms_norm_bwd(const DLTensor* dy, const DLTensor* ds, const DLTensor* s, const DLTensor* weight, const DLTensor* rstd,
                     DLTensor* dx, DLTensor* dweight, DLTensor* partial) {
  return mlcore::guard([&] { mlcore::bwd(dy, ds, s, weight, rstd, dx, dweight, partial); });
}
