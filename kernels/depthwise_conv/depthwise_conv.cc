// Validates and shares planes or rows out to threads. The contract is depthwise_conv.h, the arithmetic in
// depthwise_conv_cpu.inl (planes) and depthwise_conv_pixels_cpu.inl.
#include "depthwise_conv/depthwise_conv.h"

#include <algorithm>

#include "core/pages.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "depthwise_conv/depthwise_conv_kernels.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "depthwise_conv";
constexpr const char* kInput = "(N, C, D, H, W), or without D";
constexpr const char* kOutput = "(N, C*M, Do, Ho, Wo), or without Do as x";
constexpr int64_t kGrain = 1 << 16;   // multiplications a thread should have at least
thread_local Scratch shared_scratch;  // of the calling thread; its workers get slices

// x first: the others are measured by it.
struct Problem {
  DepthwiseConv p{};
  int64_t x_shape[5], y_shape[5];
  int rank;  // 5, or 4 where D is left out

  Problem(const Tensor& x, const Tensor& weight, const Tensor& out, const char* out_name, const int64_t (&stride)[3],
          const int64_t (&dilation)[3], const int64_t (&pad)[3]) {
    x.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16});
    rank = x.rank_at_least(4).rank();
    if (rank != 4) x.rank_is(5, kInput);
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
    p.planar = !(p.C > 1 && x.stride(1) == 1 && (x.size(-1) <= 1 || x.stride(-1) != 1));
    out.rank_is(rank, kOutput);
    for (int i = 0; i < rank; ++i) x_shape[i] = x.size(i), y_shape[i] = out.size(i);
    y_shape[0] = p.N, y_shape[1] = Cm;
    p.x = volume(x, "x", x_shape, kInput);
    (void)volume(out, out_name, y_shape, kOutput);
  }

  Volume volume(const Tensor& t, const char* name, const int64_t (&shape)[5], const char* layout) const {
    t.on(kDLCPU).dtype_in({p.dtype});
    if (rank == 4) {
      t.shape_is({shape[0], shape[1], shape[2], shape[3]}, layout);
    } else {
      t.shape_is({shape[0], shape[1], shape[2], shape[3], shape[4]}, layout);
    }
    const int inner = p.planar ? rank - 1 : 1;
    require(t.numel() == 0 || t.size(inner) == 1 || t.stride(inner) == 1, kOp, ": ", name, " must be contiguous in ",
            p.planar ? "W" : "C", "; got stride ", t.stride(inner));
    Volume v{t.raw(), t.stride(0), t.stride(1), {}, {1, 1, 1}};
    for (int d = 5 - rank; d < 3; ++d) v.s[d] = t.stride(d + rank - 3), v.size[d] = t.size(d + rank - 3);
    return v;
  }

  // body(item, scratch), where a thread takes the next item when it is done with one; behind `shared` floats for all of them.
  template <class F>
  void for_items(int64_t items, int64_t floats, int64_t shared, F&& body) {
    if (items <= 0) return;
    floats = (floats + 15) / 16 * 16, shared = (shared + 15) / 16 * 16;
    const int threads = static_cast<int>(std::min<int64_t>(num_threads(), items));
    float* scratch = shared_scratch.floats(static_cast<size_t>(shared + threads * floats)) + shared;
    parallel_near(items, threads, [&](int64_t i, int thread) { body(i, scratch + thread * floats); });
  }
};

// What is contiguous in C: weights are sorted by taps once a call.
struct Pixels {
  const DepthwiseConv& p;
  Problem& problem;
  const DepthwisePixels& kernels = depthwise_pixels_now();
  int64_t floats = kernels.scratch(p), shared = kernels.shared(p);

  void prepare() { kernels.prepare(p, weights()); }
  float* weights() const {
    const int64_t all = (shared + 15) / 16 * 16 + num_threads() * ((floats + 15) / 16 * 16);
    return shared_scratch.floats(static_cast<size_t>(all));
  }
  // Strips of rows in parallel, and groups of channels where strips are few.
  void rows(bool backward) {
    const Volume& out = backward ? p.dx : p.y;
    const int64_t strip = kernels.strip(p, backward), channels = backward ? p.C : p.channels_out();
    const int64_t strips = p.N * out.size[0] * ((out.size[1] + strip - 1) / strip);
    const int64_t work = std::max<int64_t>(out.size[2] * strip * p.taps, 1);
    const int64_t group = strips >= 16 ? channels : std::min(channels, std::max<int64_t>(channels * strips / 16 / 64, 1) * 64);
    const int64_t groups = (channels + group - 1) / group;
    const int64_t block = std::clamp<int64_t>(kGrain / (work * group), 1, std::max<int64_t>(strips, 1));
    const int64_t blocks = (strips + block - 1) / block;
    const float* sorted = weights();
    problem.for_items(blocks * groups, floats, shared, [&](int64_t i, float* scratch) {
      const int64_t first = i / groups * block, c = i % groups * group;
      kernels.rows(p, backward, first, std::min(first + block, strips), c, std::min(group, channels - c), sorted, scratch);
    });
  }
  void dweight() {
    const int64_t channels = p.channels_out(), group = std::min<int64_t>(channels, p.blocks >= 8 ? 512 : 64);
    const int64_t groups = (channels + group - 1) / group;
    const float* sorted = weights();
    problem.for_items(p.blocks * groups, floats, shared, [&](int64_t i, float* scratch) {
      const int64_t c = i % groups * group;
      kernels.dweight(p, i / groups, c, std::min(group, channels - c), sorted, scratch);
    });
  }
};

void fwd(const DLTensor* x_, const DLTensor* weight_, const DLTensor* bias_, const int64_t (&stride)[3],
         const int64_t (&dilation)[3], const int64_t (&pad)[3], DLTensor* y_) {
  const Tensor x(x_, kOp, "x"), weight(weight_, kOp, "weight"), bias(bias_, kOp, "bias"), y(y_, kOp, "y");
  Problem problem(x, weight, y, "y", stride, dilation, pad);
  DepthwiseConv& p = problem.p;
  p.y = problem.volume(y, "y", problem.y_shape, kOutput);
  if (bias.present()) {
    bias.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({p.channels_out()}, "(C*M)").contiguous();
    p.bias = bias.data<float>();
  }
  if (y.numel() == 0) return;
  prefer_huge_pages(y.raw(), static_cast<size_t>(y.numel()) * (p.dtype == Dtype::f32 ? 4 : 2));
  if (p.planar) {
    const DepthwisePlanes& kernels = direct(p) ? depthwise_direct_now() : depthwise_planes_now();
    const int64_t planes = p.N * p.C, work = std::max<int64_t>(p.y.volume() * p.M * p.taps, 1);
    const int64_t some = std::clamp<int64_t>(kGrain / work, 1, planes);
    problem.for_items((planes + some - 1) / some, kernels.scratch(p), 0,
                      [&](int64_t i, float* scratch) { kernels.fwd(p, i * some, std::min((i + 1) * some, planes), scratch); });
  } else {
    Pixels pixels{p, problem};
    pixels.prepare();
    pixels.rows(false);
  }
  shared_scratch.release_if_large();
}

void bwd(const DLTensor* dy_, const DLTensor* x_, const DLTensor* weight_, const int64_t (&stride)[3],
         const int64_t (&dilation)[3], const int64_t (&pad)[3], DLTensor* dx_, DLTensor* dweight_, DLTensor* dbias_,
         DLTensor* partial_) {
  const Tensor dy(dy_, kOp, "dy"), x(x_, kOp, "x"), weight(weight_, kOp, "weight"), dx(dx_, kOp, "dx"),
      dweight(dweight_, kOp, "dweight"), dbias(dbias_, kOp, "dbias"), partial(partial_, kOp, "partial");
  Problem problem(x, weight, dy, "dy", stride, dilation, pad);
  DepthwiseConv& p = problem.p;
  p.dy = problem.volume(dy, "dy", problem.y_shape, kOutput);
  if (dx.present()) p.dx = problem.volume(dx, "dx", problem.x_shape, kInput);
  require(dweight.present() == dbias.present(), kOp, ": dweight and dbias must be given together");
  p.blocks = std::clamp<int64_t>(p.N * p.dy.volume() / 256, 1, 16);
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
  if (want_dx) prefer_huge_pages(dx.raw(), static_cast<size_t>(dx.numel()) * (p.dtype == Dtype::f32 ? 4 : 2));
  if (!want_dx) p.dx = {};
  if (!want_dx && !p.partial) return;
  if (p.planar) {
    const DepthwisePlanes& kernels = direct(p) ? depthwise_direct_now() : depthwise_planes_now();
    // Channels in groups: what a task knows of the taps beforehand took longer than a plane of 7 x 7.
    const int64_t work = std::max<int64_t>(p.N * p.x.volume() / p.blocks * p.M * p.taps * 2, 1);
    const int64_t some = std::clamp<int64_t>(kGrain / work, 1, std::max<int64_t>(p.C, 1)), groups = (p.C + some - 1) / some;
    problem.for_items(p.blocks * groups, kernels.scratch(p), 0, [&](int64_t i, float* scratch) {
      const int64_t c = i % groups * some;
      kernels.bwd(p, i / groups, c, std::min(c + some, p.C), scratch);
    });
  } else {
    Pixels pixels{p, problem};
    pixels.prepare();
    if (want_dx) pixels.rows(true);
    if (p.partial) pixels.dweight();
  }
  shared_scratch.release_if_large();
  if (p.partial)
    parallel_for(p.channels_out(), std::max<int64_t>(8192 / (p.taps * p.blocks), 1),
                 [&](int64_t begin, int64_t end) { depthwise_pixels_now().reduce(p, begin, end); });
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
