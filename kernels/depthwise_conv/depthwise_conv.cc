// Validates and shares planes or rows out to threads. The contract is depthwise_conv.h, the arithmetic depthwise_conv_cpu.inl.
#include "depthwise_conv/depthwise_conv.h"

#include <algorithm>

#include "core/parallel.h"
#include "core/scratch.h"
#include "depthwise_conv/depthwise_conv_kernels.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "depthwise_conv";
constexpr int64_t kGrain = 1 << 16;   // multiplications a thread should have at least
thread_local Scratch shared_scratch;  // of the calling thread; its workers get slices

// x first: the others are measured by it.
struct Problem {
  DepthwiseConv p{};
  int64_t x_shape[5], y_shape[5];

  Problem(const Tensor& x, const Tensor& weight, const Tensor& out, const char* out_name, const int64_t (&stride)[3],
          const int64_t (&dilation)[3], const int64_t (&pad)[3]) {
    x.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(5, "(N, C, D, H, W)");
    p.N = x.size(0), p.C = x.size(1), p.dtype = x.dtype();
    weight.on(kDLCPU).dtype_in({Dtype::f32}).rank_is(4, "(C*M, KD, KH, KW)").contiguous();
    const int64_t Cm = weight.size(0);
    require(p.C > 0 ? Cm % p.C == 0 && Cm > 0 : Cm == 0, kOp, ": weight must have a multiple of x's C = ", p.C,
            " filters; got ", weight.shape_text());
    p.M = p.C > 0 ? Cm / p.C : 1;
    p.taps = 1;
    for (int d = 0; d < 3; ++d) {
      p.K[d] = weight.size(d + 1), p.stride[d] = stride[d], p.dilation[d] = dilation[d], p.pad[d] = pad[d];
      require(p.K[d] >= 1, kOp, ": weight must have at least one tap in every dimension; got ", weight.shape_text());
      require(stride[d] >= 1, kOp, ": stride must be at least 1; got ", stride[d]);
      require(dilation[d] >= 1, kOp, ": dilation must be at least 1; got ", dilation[d]);
      require(pad[d] >= 0, kOp, ": pad must not be negative; got ", pad[d]);
      p.taps *= p.K[d];
    }
    p.weight = weight.data<float>();
    p.planar = !(p.C > 1 && x.stride(1) == 1 && (x.size(4) <= 1 || x.stride(4) != 1));
    for (int i = 0; i < 5; ++i) x_shape[i] = x.size(i), y_shape[i] = i < 2 ? 0 : out.rank() == 5 ? out.size(i) : 0;
    y_shape[0] = p.N, y_shape[1] = Cm;
    p.x = volume(x, "x", x_shape, "(N, C, D, H, W)");
    (void)volume(out, out_name, y_shape, "(N, C*M, Do, Ho, Wo)");
  }

  Volume volume(const Tensor& t, const char* name, const int64_t (&shape)[5], const char* layout) const {
    t.on(kDLCPU).dtype_in({p.dtype}).shape_is({shape[0], shape[1], shape[2], shape[3], shape[4]}, layout);
    const int inner = p.planar ? 4 : 1;
    require(t.numel() == 0 || t.size(inner) == 1 || t.stride(inner) == 1, kOp, ": ", name, " must be contiguous in ",
            p.planar ? "W" : "C", "; got stride ", t.stride(inner));
    Volume v{t.raw(), t.stride(0), t.stride(1), {}, {}};
    for (int d = 0; d < 3; ++d) v.s[d] = t.stride(d + 2), v.size[d] = t.size(d + 2);
    return v;
  }

  // body(first, last, channel, channels, scratch): rows in parallel, and groups of channels where rows are few.
  template <class F>
  void share_rows(const DepthwiseConvKernels& kernels, int64_t rows, int64_t pixels, int64_t channels, F&& body) {
    const int64_t work = std::max<int64_t>(pixels * p.taps, 1);
    const int64_t group = rows >= 16 ? channels : std::min<int64_t>(channels, 256), groups = (channels + group - 1) / group;
    const int64_t block = std::clamp<int64_t>(kGrain / (work * group), 1, std::max<int64_t>(rows, 1));
    const int64_t blocks = (rows + block - 1) / block;
    for_items(kernels, blocks * groups, [&](int64_t i, float* scratch) {
      const int64_t first = i / groups * block, c = i % groups * group;
      body(first, std::min(first + block, rows), c, std::min(group, channels - c), scratch);
    });
  }
  // body(item, scratch), where a thread takes the next item when it is done with one.
  template <class F>
  void for_items(const DepthwiseConvKernels& kernels, int64_t items, F&& body) {
    if (items <= 0) return;
    const int64_t floats = (kernels.scratch(p) + 15) / 16 * 16;
    const int threads = static_cast<int>(std::min<int64_t>(num_threads(), items));
    float* scratch = shared_scratch.floats(static_cast<size_t>(threads * floats));
    parallel_claim(items, threads, [&](int64_t i, int thread) { body(i, scratch + thread * floats); });
    shared_scratch.release_if_large();
  }
};

int64_t volume_of(const Volume& v) { return v.size[0] * v.size[1] * v.size[2]; }

void fwd(const DLTensor* x_, const DLTensor* weight_, const DLTensor* bias_, const int64_t (&stride)[3],
         const int64_t (&dilation)[3], const int64_t (&pad)[3], DLTensor* y_) {
  const Tensor x(x_, kOp, "x"), weight(weight_, kOp, "weight"), bias(bias_, kOp, "bias"), y(y_, kOp, "y");
  y.rank_is(5, "(N, C*M, Do, Ho, Wo)");
  Problem problem(x, weight, y, "y", stride, dilation, pad);
  DepthwiseConv& p = problem.p;
  p.y = problem.volume(y, "y", problem.y_shape, "(N, C*M, Do, Ho, Wo)");
  if (bias.present()) {
    bias.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.channels_out()}, "(C*M)").contiguous();
    p.bias = bias.data<float>();
  }
  if (y.numel() == 0) return;
  const DepthwiseConvKernels& kernels = depthwise_conv_kernels_now();
  if (p.planar) {
    const int64_t planes = p.N * p.C, work = std::max<int64_t>(volume_of(p.y) * p.M * p.taps, 1);
    const int64_t some = std::clamp<int64_t>(kGrain / work, 1, planes);
    problem.for_items(kernels, (planes + some - 1) / some, [&](int64_t i, float* scratch) {
      kernels.fwd_planes(p, i * some, std::min((i + 1) * some, planes), scratch);
    });
  } else {
    problem.share_rows(kernels, p.N * p.y.size[0] * p.y.size[1], p.y.size[2], p.channels_out(),
                       [&](int64_t first, int64_t last, int64_t c, int64_t channels, float* scratch) {
                         kernels.fwd_rows(p, first, last, c, channels, scratch);
                       });
  }
}

void bwd(const DLTensor* dy_, const DLTensor* x_, const DLTensor* weight_, const int64_t (&stride)[3],
         const int64_t (&dilation)[3], const int64_t (&pad)[3], DLTensor* dx_, DLTensor* dweight_, DLTensor* dbias_,
         DLTensor* partial_) {
  const Tensor dy(dy_, kOp, "dy"), x(x_, kOp, "x"), weight(weight_, kOp, "weight"), dx(dx_, kOp, "dx"),
      dweight(dweight_, kOp, "dweight"), dbias(dbias_, kOp, "dbias"), partial(partial_, kOp, "partial");
  dy.rank_is(5, "(N, C*M, Do, Ho, Wo)");
  Problem problem(x, weight, dy, "dy", stride, dilation, pad);
  DepthwiseConv& p = problem.p;
  p.dy = problem.volume(dy, "dy", problem.y_shape, "(N, C*M, Do, Ho, Wo)");
  if (dx.present()) p.dx = problem.volume(dx, "dx", problem.x_shape, "(N, C, D, H, W)");
  require(dweight.present() == dbias.present(), kOp, ": dweight and dbias must be given together");
  p.blocks = std::clamp<int64_t>(p.N * volume_of(p.dy) / 256, 1, 16);
  if (dweight.present()) {
    dweight.on(kDLCPU)
        .dtype_in({Dtype::f32})
        .shape_is({p.channels_out(), p.K[0], p.K[1], p.K[2]}, "(C*M, KD, KH, KW)")
        .contiguous();
    dbias.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.channels_out()}, "(C*M)").contiguous();
    partial.on(kDLCPU)
        .dtype_in({Dtype::f32})
        .shape_is({p.blocks, p.taps + 1, p.channels_out()}, "(min(max(N*Do*Ho*Wo / 256, 1), 16), taps + 1, C*M)")
        .contiguous();
    p.dweight = dweight.data<float>(), p.dbias = dbias.data<float>(), p.partial = partial.data<float>();
  }
  const bool want_dx = dx.present() && dx.numel() > 0;
  if (!want_dx) p.dx = {};
  if (!want_dx && !p.partial) return;
  const DepthwiseConvKernels& kernels = depthwise_conv_kernels_now();
  if (p.planar) {
    problem.for_items(kernels, p.blocks * p.C,
                      [&](int64_t i, float* scratch) { kernels.bwd_planes(p, i / p.C, i % p.C, scratch); });
  } else {
    if (want_dx)
      problem.share_rows(kernels, p.N * p.x.size[0] * p.x.size[1], p.x.size[2], p.C,
                         [&](int64_t first, int64_t last, int64_t c, int64_t channels, float* scratch) {
                           kernels.dx_rows(p, first, last, c, channels, scratch);
                         });
    if (p.partial) {
      const int64_t group = std::min<int64_t>(p.channels_out(), p.blocks >= 8 ? 512 : 64);
      const int64_t groups = (p.channels_out() + group - 1) / group;
      problem.for_items(kernels, p.blocks * groups, [&](int64_t i, float* scratch) {
        const int64_t c = i % groups * group;
        kernels.dweight_rows(p, i / groups, c, std::min(group, p.channels_out() - c), scratch);
      });
    }
  }
  if (p.partial)
    parallel_for(p.channels_out(), std::max<int64_t>(8192 / (p.taps * p.blocks), 1),
                 [&](int64_t begin, int64_t end) { kernels.reduce(p, begin, end); });
}

}  // namespace
}  // namespace mlcore

int mlc_depthwise_conv_fwd(const DLTensor* x, const DLTensor* weight, const DLTensor* bias, int64_t stride_d, int64_t stride_h,
                           int64_t stride_w, int64_t dilation_d, int64_t dilation_h, int64_t dilation_w, int64_t pad_d,
                           int64_t pad_h, int64_t pad_w, DLTensor* y) {
  return mlcore::guard([&] {
    mlcore::fwd(x, weight, bias, {stride_d, stride_h, stride_w}, {dilation_d, dilation_h, dilation_w}, {pad_d, pad_h, pad_w},
                y);
  });
}

int mlc_depthwise_conv_bwd(const DLTensor* dy, const DLTensor* x, const DLTensor* weight, int64_t stride_d, int64_t stride_h,
                           int64_t stride_w, int64_t dilation_d, int64_t dilation_h, int64_t dilation_w, int64_t pad_d,
                           int64_t pad_h, int64_t pad_w, DLTensor* dx, DLTensor* dweight, DLTensor* dbias, DLTensor* partial) {
  return mlcore::guard([&] {
    mlcore::bwd(dy, x, weight, {stride_d, stride_h, stride_w}, {dilation_d, dilation_h, dilation_w}, {pad_d, pad_h, pad_w}, dx,
                dweight, dbias, partial);
  });
}
