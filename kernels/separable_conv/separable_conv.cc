// Validates and shares strips and blocks of rows out to threads. The contract is separable_conv.h, the arithmetic
// separable_conv_cpu.inl.
#include "separable_conv/separable_conv.h"

#include <algorithm>
#include <cmath>

#include "core/pages.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "separable_conv/separable_conv_backward.h"
#include "separable_conv/separable_conv_kernels.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "separable_conv";
constexpr int64_t kStripPixels = 112;  // with 64 channels 28 KiB: a strip of a stays in the L1 cache beside a panel of weights
constexpr int64_t kLeastPixels = 24, kItems = 8;  // MobileNetV2's 7 x 7 and 14 x 14 layers left a thread without work
thread_local Scratch shared_scratch;              // of the calling thread; its workers get slices
thread_local Scratch packed_scratch;              // of weights that aren't packed beforehand

int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }

// body(c, n) for channels [c, c + n), at most 64: sums over blocks are taken in double, in order, n channels at once.
template <class F>
void for_channels(int64_t channels, int64_t blocks, F&& body) {
  const int64_t groups = (channels + kBlock - 1) / kBlock;
  parallel_for(groups, std::max<int64_t>((1 << 14) / (kBlock * std::max<int64_t>(blocks, 1)), 1),
               [&](int64_t begin, int64_t end) {
                 for (int64_t g = begin; g < end; ++g) body(g * kBlock, std::min(kBlock, channels - g * kBlock));
               });
}

// moments[0] and [1]: mean and biased variance from the partial sums of `blocks` blocks; count(b) values are in block b.
template <class F>
void put_together(const float* partial, int64_t blocks, int64_t channels, F&& count, float* moments) {
  for_channels(channels, blocks, [&](int64_t c, int64_t n) {
    double mean[kBlock] = {}, squares[kBlock] = {}, total = 0.0;
    for (int64_t b = 0; b < blocks; ++b) total += static_cast<double>(count(b));
    for (int64_t b = 0; b < blocks; ++b) {
      const float *first = partial + b * 3 * channels + c, *origin = first + 2 * channels;
      const double share = static_cast<double>(count(b)) / total;
      for (int64_t i = 0; i < n; ++i) mean[i] += double{origin[i]} * share + double{first[i]} / total;
    }
    for (int64_t b = 0; b < blocks; ++b) {
      const float *first = partial + b * 3 * channels + c, *second = first + channels, *origin = second + channels;
      const double size = static_cast<double>(count(b));
      for (int64_t i = 0; i < n; ++i) {  // about v0, moved to the mean
        const double off = double{origin[i]} - mean[i];
        squares[i] += double{second[i]} + off * (2.0 * double{first[i]} + off * size);
      }
    }
    for (int64_t i = 0; i < n; ++i) {
      moments[c + i] = static_cast<float>(mean[i]);
      moments[channels + c + i] = static_cast<float>(std::max(squares[i] / total, squares[i] - squares[i]));  // NaN stays
    }
  });
}

const float* packed_blocks(const float* matrix, int64_t J, int64_t C) {
  const int64_t blocks = (J + kBlock - 1) / kBlock, rows = (C + kBlock - 1) / kBlock * kBlock;
  float* to = packed_scratch.floats(static_cast<size_t>(blocks * kBlock * rows));
  parallel_for(blocks, std::max<int64_t>((1 << 15) / (rows * kBlock), 1), [&](int64_t begin, int64_t end) {
    separable_backward_kernels_now().pack(matrix, C, begin * kBlock, std::min(end * kBlock, J), to);
  });
  return to;
}

struct Problem {
  SeparableConv p{};

  Problem(const Tensor& x, const Tensor& depthwise, const Tensor& scale, const Tensor& shift, const int64_t (&stride)[2],
          const int64_t (&dilation)[2], const int64_t (&pad)[2], int64_t f, int64_t patch_h = 0, int64_t patch_w = 0) {
    x.on(kDLCPU).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(N, C, H, W)");
    p.N = x.size(0), p.C = x.size(1), p.H = x.size(2), p.W = x.size(3), p.dtype = x.dtype();
    require((patch_h == 0) == (patch_w == 0) && patch_h >= 0 && patch_w >= 0, kOp,
            ": patch_h and patch_w must both be positive, or 0; got ", patch_h, " and ", patch_w);
    p.patches = patch_h > 0, p.Cx = p.C;
    p.x = {x.raw(), x.stride(0), x.stride(2), x.stride(3), x.stride(1)};
    if (!p.patches) p.x = pixels(x, "x", {p.N, p.C, p.H, p.W}, "(N, C, H, W)");
    p.K[0] = p.K[1] = 1;
    if (p.patches) {
      require(!depthwise.present(), kOp, ": depthwise must be left out where patches are taken");
      p.K[0] = patch_h, p.K[1] = patch_w, p.C *= patch_h * patch_w;
    }
    if (depthwise.present()) {
      depthwise.on(kDLCPU).dtype_in({Dtype::f32}).rank_is(3, "(C, KH, KW)");
      depthwise.shape_is({p.C, depthwise.size(1), depthwise.size(2)}, "(C, KH, KW)").contiguous();
      p.depthwise = depthwise.data<float>(), p.K[0] = depthwise.size(1), p.K[1] = depthwise.size(2);
    }
    for (int d = 0; d < 2; ++d) {
      p.stride[d] = stride[d], p.dilation[d] = dilation[d], p.pad[d] = pad[d];
      require(p.K[d] >= 1, kOp, ": depthwise must have at least one tap in every dimension; got ", p.K[d]);
      require(stride[d] >= 1, kOp, ": stride must be at least 1; got ", stride[d]);
      require(dilation[d] >= 1, kOp, ": dilation must be at least 1; got ", dilation[d]);
      require(pad[d] >= 0, kOp, ": pad must not be negative; got ", pad[d]);
    }
    p.scale = channels(scale, p.C, "(C)"), p.shift = channels(shift, p.C, "(C)");
    p.f = activation(f, "f");
  }

  static Activation activation(int64_t code, const char* name) {
    require(code >= 0 && code <= 3, kOp, ": ", name, " must be 0 (none), 1 (relu), 2 (relu6) or 3 (silu); got ", code);
    return static_cast<Activation>(code);
  }
  static const float* channels(const Tensor& t, int64_t size, const char* layout) {
    if (!t.present()) return nullptr;
    t.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({size}, layout).contiguous();
    return t.data<float>();
  }
  static float* sums(const Tensor& t, std::initializer_list<int64_t> shape, const char* layout) {
    if (!t.present()) return nullptr;
    t.on(kDLCPU).dtype_in({Dtype::f32}).shape_is(shape, layout).contiguous();
    return t.data<float>();
  }
  Pixels pixels(const Tensor& t, const char* name, std::initializer_list<int64_t> shape, const char* layout) const {
    if (!t.present()) return {};
    t.on(kDLCPU).dtype_in({p.dtype}).shape_is(shape, layout);
    require(t.numel() == 0 || t.size(1) == 1 || t.stride(1) == 1, kOp, ": ", name, " must be contiguous in C; got stride ",
            t.stride(1));
    return {t.raw(), t.stride(0), t.stride(2), t.stride(3)};
  }

  size_t bytes(const Tensor& t) const { return static_cast<size_t>(t.numel()) * (p.dtype == Dtype::f32 ? 4 : 2); }

  // body(item, shared, scratch): threads take the next item when they are done with one.
  template <class F>
  void share(int64_t items, int64_t columns, F&& body) {
    if (items <= 0) return;
    const SeparableConvKernels& kernels = separable_conv_kernels_now();
    const int64_t shared = rounded(kernels.shared(p)), floats = rounded(kernels.scratch(p, columns));
    const int threads = static_cast<int>(std::min<int64_t>(num_threads(), items));
    float* scratch = shared_scratch.floats(static_cast<size_t>(shared + threads * floats));
    kernels.prepare(p, scratch);
    parallel_near(items, threads,
                  [&](int64_t i, int thread) { body(kernels, i, scratch, scratch + shared + thread * floats); });
    shared_scratch.release_if_large();
  }

  // The hidden passes: blocks of rows, and of channels where rows are few.
  void hidden(HiddenPass pass) {
    p.pass = pass, p.strip = 1;
    const int64_t blocks = (p.N * p.Ho + kPartialRows - 1) / kPartialRows, group = blocks >= 16 ? p.C : kBlock;
    const int64_t groups = group > 0 ? (p.C + group - 1) / group : 0;
    share(blocks * groups, 0, [&](const SeparableConvKernels& kernels, int64_t i, const float* shared, float* scratch) {
      const int64_t c = i % groups * group;
      kernels.hidden(p, i / groups, c, std::min(c + group, p.C), shared, scratch);
    });
  }
};

void fwd(const DLTensor* x_, const DLTensor* depthwise_, const DLTensor* scale_, const DLTensor* shift_,
         const DLTensor* pointwise_, const DLTensor* bias_, const DLTensor* residual_, const int64_t (&stride)[2],
         const int64_t (&dilation)[2], const int64_t (&pad)[2], int64_t patch_h, int64_t patch_w, int64_t f, int64_t g,
         DLTensor* y_, DLTensor* partial_, DLTensor* moments_) {
  const Tensor x(x_, kOp, "x"), depthwise(depthwise_, kOp, "depthwise"), scale(scale_, kOp, "scale"),
      shift(shift_, kOp, "shift"), pointwise(pointwise_, kOp, "pointwise"), bias(bias_, kOp, "bias"),
      residual(residual_, kOp, "residual"), y(y_, kOp, "y"), partial(partial_, kOp, "partial"),
      moments(moments_, kOp, "moments");
  Problem problem(x, depthwise, scale, shift, stride, dilation, pad, f, patch_h, patch_w);
  SeparableConv& p = problem.p;
  y.rank_is(4, "(N, J, Ho, Wo)");
  p.J = y.size(1), p.Ho = y.size(2), p.Wo = y.size(3);
  p.y = problem.pixels(y, "y", {p.N, p.J, p.Ho, p.Wo}, "(N, J, Ho, Wo)");
  p.residual = problem.pixels(residual, "residual", {p.N, p.J, p.Ho, p.Wo}, "(N, J, Ho, Wo)");
  const bool packed = pointwise.on(kDLCPU).dtype_in({Dtype::f32}).rank() == 4;
  if (packed) {
    pointwise.shape_is({(p.J + kBlock - 1) / kBlock, (p.C + kBlock - 1) / kBlock, kBlock, kBlock},
                       "(ceil(J/64), ceil(C/64), 64, 64)");
  } else {
    pointwise.shape_is({p.J, p.C}, "(J, C), or in blocks of 64 by 64");
  }
  pointwise.contiguous();
  p.pointwise = pointwise.data<float>(), p.bias = Problem::channels(bias, p.J, "(J)"), p.g = Problem::activation(g, "g");
  require(p.C >= 1, kOp, ": x must have channels");
  require(partial.present() == moments.present(), kOp, ": partial and moments must be given together");
  p.partial = Problem::sums(partial, {p.N * p.Ho, 3, p.J}, "(N*Ho, 3, J)");
  float* taken = Problem::sums(moments, {2, p.J}, "(2, J)");
  if (y.numel() == 0) return;
  prefer_huge_pages(y.raw(), problem.bytes(y));
  if (!packed) p.pointwise = packed_blocks(p.pointwise, p.J, p.C);
  // Items of work are strips by blocks of columns. Few items: strips are cut first, then columns, each of which makes its own
  // a.
  const int64_t blocks = (p.J + kBlock - 1) / kBlock, least = std::clamp<int64_t>((kLeastPixels + p.Wo - 1) / p.Wo, 1, p.Ho);
  p.strip = std::clamp<int64_t>(kStripPixels / p.Wo, 1, p.Ho);
  while (p.N * p.strips() * blocks < kItems && p.strip > least) p.strip = std::max(p.strip / 2, least);
  p.strip = (p.Ho + p.strips() - 1) / p.strips();  // even ones
  const int64_t strips = p.N * p.strips();
  const int64_t groups = std::min(blocks, std::max<int64_t>(kItems / strips, 1));
  const int64_t group = (blocks + groups - 1) / groups * kBlock;
  const int64_t cuts = (p.J + group - 1) / group;
  problem.share(strips * cuts, std::min(group, p.J),
                [&](const SeparableConvKernels& kernels, int64_t i, const float* shared, float* scratch) {
                  const int64_t begin = i % cuts * group;
                  kernels.fwd(p, i / cuts, begin, std::min(begin + group, p.J), shared, scratch);
                });
  packed_scratch.release_if_large();
  if (!taken) return;
  const auto count = [&](int64_t b) { return std::min(p.strip, p.Ho - b % p.strips() * p.strip) * p.Wo; };
  put_together(p.partial, strips, p.J, count, taken);
}

void hidden(const DLTensor* x_, const DLTensor* depthwise_, const DLTensor* scale_, const DLTensor* shift_,
            const DLTensor* residual_, const int64_t (&stride)[2], const int64_t (&dilation)[2], const int64_t (&pad)[2],
            int64_t f, int64_t out_h, int64_t out_w, DLTensor* a_, DLTensor* partial_, DLTensor* moments_) {
  const Tensor x(x_, kOp, "x"), depthwise(depthwise_, kOp, "depthwise"), scale(scale_, kOp, "scale"),
      shift(shift_, kOp, "shift"), residual(residual_, kOp, "residual"), a(a_, kOp, "a"), partial(partial_, kOp, "partial"),
      moments(moments_, kOp, "moments");
  Problem problem(x, depthwise, scale, shift, stride, dilation, pad, f);
  SeparableConv& p = problem.p;
  require(out_h >= 0 && out_w >= 0, kOp, ": the size of h must not be negative; got ", out_h, " x ", out_w);
  require(a.present() != moments.present(), kOp, ": either a or moments must be given");
  require(partial.present() == moments.present(), kOp, ": partial and moments must be given together");
  p.Ho = out_h, p.Wo = out_w;
  p.a = problem.pixels(a, "a", {p.N, p.C, p.Ho, p.Wo}, "(N, C, Ho, Wo)");
  p.residual = problem.pixels(residual, "residual", {p.N, p.C, p.Ho, p.Wo}, "(N, C, Ho, Wo)");
  const int64_t rows = p.N * p.Ho, blocks = (rows + kPartialRows - 1) / kPartialRows;
  p.partial = Problem::sums(partial, {blocks, 3, p.C}, "(ceil(N*Ho/16), 3, C)");
  float* taken = Problem::sums(moments, {2, p.C}, "(2, C)");
  if (rows * p.Wo * p.C == 0) return;
  if (a.present()) {
    prefer_huge_pages(a.raw(), problem.bytes(a));
    return problem.hidden(HiddenPass::apply);
  }
  problem.hidden(HiddenPass::moments);
  const auto count = [&](int64_t b) { return std::min(kPartialRows, rows - b * kPartialRows) * p.Wo; };
  put_together(p.partial, blocks, p.C, count, taken);
}

// Of a norm's gradient, from the partial sums of `blocks` blocks of e and e (h - mean): the four rows of sums.
void finish_sums(const SeparableConv& p, int64_t blocks, const float* given, float* out) {
  for_channels(p.C, blocks, [&](int64_t c, int64_t n) {
    double by_shift[kBlock] = {}, by_scale[kBlock] = {};
    for (int64_t b = 0; b < blocks; ++b) {
      const float *e = p.partial + b * 3 * p.C + c, *eh = e + p.C;
      for (int64_t i = 0; i < n; ++i) by_shift[i] += double{e[i]}, by_scale[i] += double{eh[i]};
    }
    const double count = static_cast<double>(p.N * p.Ho * p.Wo);
    for (int64_t i = c; i < c + n; ++i) {
      const double mean = given ? double{given[i]} : 0.0, rstd = given ? double{given[p.C + i]} : 1.0;
      const double factor = p.scale ? double{p.scale[i]} / count : 1.0 / count, scaled = rstd * by_scale[i - c];
      const double by_h = -factor * rstd * scaled;
      out[i] = static_cast<float>(scaled), out[p.C + i] = static_cast<float>(by_shift[i - c]);
      out[2 * p.C + i] = static_cast<float>(by_h);
      out[3 * p.C + i] = static_cast<float>(-factor * by_shift[i - c] - by_h * mean);
    }
  });
}

void bwd(const DLTensor* da_, const DLTensor* x_, const DLTensor* depthwise_, const DLTensor* scale_, const DLTensor* shift_,
         const DLTensor* moments_, const int64_t (&stride)[2], const int64_t (&dilation)[2], const int64_t (&pad)[2], int64_t f,
         DLTensor* d_, DLTensor* sums_, DLTensor* partial_) {
  const Tensor da(da_, kOp, "da"), x(x_, kOp, "x"), depthwise(depthwise_, kOp, "depthwise"), scale(scale_, kOp, "scale"),
      shift(shift_, kOp, "shift"), moments(moments_, kOp, "moments"), d(d_, kOp, "d"), sums(sums_, kOp, "sums"),
      partial(partial_, kOp, "partial");
  Problem problem(x, depthwise, scale, shift, stride, dilation, pad, f);
  SeparableConv& p = problem.p;
  da.rank_is(4, "(N, C, Ho, Wo)");
  p.Ho = da.size(2), p.Wo = da.size(3);
  p.a = problem.pixels(d, "d", {p.N, p.C, p.Ho, p.Wo}, "(N, C, Ho, Wo)");
  p.da = problem.pixels(da, "da", {p.N, p.C, p.Ho, p.Wo}, "(N, C, Ho, Wo)");
  require(d.present() || partial.present(), kOp, ": d or partial must be given");
  require(moments.present() || (d.present() && partial.present()), kOp, ": without moments d and partial must be given");
  const int64_t blocks = (p.N * p.Ho + kPartialRows - 1) / kPartialRows;
  sums.on(kDLCPU);
  p.partial = Problem::sums(partial, {blocks, 3, p.C}, "(ceil(N*Ho/16), 3, C)");
  float* out = Problem::sums(sums, {4, p.C}, "(4, C)");
  const float* given = Problem::sums(moments, {2, p.C}, "(2, C)");
  p.mean = given;
  if (da.numel() == 0) return std::fill_n(out, 4 * p.C, 0.0f), void();
  if (d.present()) prefer_huge_pages(d.raw(), problem.bytes(d));
  if (partial.present()) {
    problem.hidden(given ? HiddenPass::sums : HiddenPass::gradient);
    finish_sums(p, blocks, given, out);
  }
  if (!given || !d.present()) return;
  p.by_h = out + 2 * p.C, p.constant = out + 3 * p.C;
  problem.hidden(HiddenPass::norm);
}

// (J, C) in panels of 64 columns, (ceil(C/64), J, 64), 0 beyond C.
void pack_panels(const float* pointwise, int64_t J, int64_t C, float* to) {
  for (int64_t c = 0; c < C; c += kBlock)
    for (int64_t j = 0; j < J; ++j, to += kBlock) {
      const int64_t n = std::min(kBlock, C - c);
      std::copy_n(pointwise + j * C + c, n, to);
      std::fill_n(to + n, kBlock - n, 0.0f);
    }
}

void add_parts(const SeparableBackward& b, float* dpointwise) {
  const int64_t J = b.conv.J, C = b.conv.C, ld = b.columns();
  parallel_for(J, std::max<int64_t>((1 << 15) / std::max<int64_t>(C * b.parts, 1), 1), [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      float* to = dpointwise + j * C;
      std::copy_n(b.partial + j * ld, C, to);
      for (int64_t part = 1; part < b.parts; ++part) {
        const float* from = b.partial + (part * J + j) * ld;
        for (int64_t c = 0; c < C; ++c) to[c] += from[c];
      }
    }
  });
}

// Strips of about kStripPixels pixels, all of an image nearly the same.
int64_t even_strip(int64_t rows, int64_t columns) {
  const int64_t most = std::clamp<int64_t>(kStripPixels / columns, 1, rows), strips = (rows + most - 1) / most;
  return (rows + strips - 1) / strips;
}

void bwd_product(const DLTensor* dy_, const DLTensor* z_, const DLTensor* z_scale_, const DLTensor* z_shift_,
                 const DLTensor* z_sums_, const DLTensor* x_, const DLTensor* depthwise_, const DLTensor* scale_,
                 const DLTensor* shift_, const DLTensor* moments_, const DLTensor* pointwise_, const int64_t (&stride)[2],
                 const int64_t (&dilation)[2], const int64_t (&pad)[2], int64_t f, int64_t g, DLTensor* d_, DLTensor* sums_,
                 DLTensor* dpointwise_, DLTensor* partial_, DLTensor* dpartial_) {
  const Tensor dy(dy_, kOp, "dy"), z(z_, kOp, "z"), z_scale(z_scale_, kOp, "z_scale"), z_shift(z_shift_, kOp, "z_shift"),
      z_sums(z_sums_, kOp, "z_sums"), x(x_, kOp, "x"), depthwise(depthwise_, kOp, "depthwise"), scale(scale_, kOp, "scale"),
      shift(shift_, kOp, "shift"), moments(moments_, kOp, "moments"), pointwise(pointwise_, kOp, "pointwise"), d(d_, kOp, "d"),
      sums(sums_, kOp, "sums"), dpointwise(dpointwise_, kOp, "dpointwise"), partial(partial_, kOp, "partial"),
      dpartial(dpartial_, kOp, "dpartial");
  Problem problem(x, depthwise, scale, shift, stride, dilation, pad, f);
  SeparableBackward b{problem.p, {}, {}, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, 0, moments.present()};
  SeparableConv& p = b.conv;
  dy.rank_is(4, "(N, J, Ho, Wo)");
  p.J = dy.size(1), p.Ho = dy.size(2), p.Wo = dy.size(3), p.g = Problem::activation(g, "g");
  b.dy = problem.pixels(dy, "dy", {p.N, p.J, p.Ho, p.Wo}, "(N, J, Ho, Wo)");
  b.z = problem.pixels(z, "z", {p.N, p.J, p.Ho, p.Wo}, "(N, J, Ho, Wo)");
  for (const Tensor* t : {&z_scale, &z_shift, &z_sums})
    require(t->present() == z.present(), kOp, ": z, z_scale, z_shift and z_sums must be given together");
  require(z.present() || p.g == Activation::none, kOp, ": g must be 0 (none) without z; got ", g);
  b.scale = Problem::channels(z_scale, p.J, "(J)"), b.shift = Problem::channels(z_shift, p.J, "(J)");
  if (z.present()) b.by_z = Problem::sums(z_sums, {4, p.J}, "(4, J)") + 2 * p.J, b.constant = b.by_z + p.J;
  p.a = problem.pixels(d, "d", {p.N, p.C, p.Ho, p.Wo}, "(N, C, Ho, Wo)");
  const Tensor* needed[] = {&d, &sums, &pointwise, &dpointwise, &partial, &dpartial};
  for (const Tensor* t : needed) t->on(kDLCPU);
  float* out = Problem::sums(sums, {4, p.C}, "(4, C)");
  const float* matrix = Problem::sums(pointwise, {p.J, p.C}, "(J, C)");
  float* dmatrix = Problem::sums(dpointwise, {p.J, p.C}, "(J, C)");
  p.partial = Problem::sums(partial, {p.N * p.Ho, 3, p.C}, "(N*Ho, 3, C)");
  dpartial.rank_is(3, "(parts, J, C rounded up to 32)");
  b.parts = dpartial.size(0);
  b.partial = Problem::sums(dpartial, {b.parts, p.J, b.columns()}, "(parts, J, C rounded up to 32)");
  require(b.parts >= 1, kOp, ": dpartial must have parts; got ", b.parts);
  p.mean = Problem::sums(moments, {2, p.C}, "(2, C)");
  if (dy.numel() == 0 || d.numel() == 0) {
    return std::fill_n(out, 4 * p.C, 0.0f), std::fill_n(dmatrix, p.J * p.C, 0.0f), void();
  }
  prefer_huge_pages(d.raw(), problem.bytes(d));
  p.strip = even_strip(p.Ho, p.Wo);
  const SeparableConvKernels& kernels = separable_conv_kernels_now();
  const SeparableBackwardKernels& backward = separable_backward_kernels_now();
  const int64_t shared = rounded(kernels.shared(p)), panels = (p.C + kBlock - 1) / kBlock * p.J * kBlock;
  const int64_t floats = rounded(backward.scratch(b));
  const int threads = static_cast<int>(std::min<int64_t>(num_threads(), b.parts));
  float *scratch = shared_scratch.floats(static_cast<size_t>(shared + panels + threads * floats)),
        *own = scratch + shared + panels;
  kernels.prepare(p, scratch);
  pack_panels(matrix, p.J, p.C, scratch + shared);
  b.weights = scratch + shared;
  parallel_near(b.parts, threads, [&](int64_t part, int thread) { backward.run(b, part, scratch, own + thread * floats); });
  shared_scratch.release_if_large();
  add_parts(b, dmatrix);
  finish_sums(p, p.N * p.strips(), p.mean, out);
}

void norm(const DLTensor* taken_, const DLTensor* weight_, const DLTensor* bias_, const DLTensor* conv_bias_, double momentum,
          double eps, int64_t count, DLTensor* running_mean_, DLTensor* running_var_, DLTensor* used_, DLTensor* scale_,
          DLTensor* shift_) {
  const Tensor taken(taken_, kOp, "taken"), weight(weight_, kOp, "weight"), bias(bias_, kOp, "bias"),
      conv_bias(conv_bias_, kOp, "conv_bias"), running_mean(running_mean_, kOp, "running_mean"),
      running_var(running_var_, kOp, "running_var"), used(used_, kOp, "used"), scale(scale_, kOp, "scale"),
      shift(shift_, kOp, "shift");
  taken.on(kDLCPU).rank_is(2, "(2, C)"), used.on(kDLCPU), scale.on(kDLCPU), shift.on(kDLCPU);
  require(count >= 2, kOp, ": count must be at least 2; got ", count);
  const int64_t C = taken.size(1);
  const auto vector = [C](const Tensor& t) { return Problem::sums(t, {C}, "(C)"); };
  const float *from = Problem::sums(taken, {2, C}, "(2, C)"), *factor = vector(weight), *offset = vector(bias);
  const float* moved = vector(conv_bias);
  float *mean = vector(running_mean), *variance = vector(running_var), *out = Problem::sums(used, {2, C}, "(2, C)");
  float *by = vector(scale), *start = vector(shift);
  const float unbiased = static_cast<float>(static_cast<double>(count) / static_cast<double>(count - 1));
  const float part = static_cast<float>(momentum);
  for (int64_t c = 0; c < C; ++c) {
    const double rstd = 1.0 / std::sqrt(double{from[C + c]} + eps), s = factor ? double{factor[c]} * rstd : rstd;
    if (mean) mean[c] += part * (from[c] + (moved ? moved[c] : 0.0f) - mean[c]);
    if (variance) variance[c] += part * (from[C + c] * unbiased - variance[c]);
    out[c] = from[c], out[C + c] = static_cast<float>(rstd), by[c] = static_cast<float>(s);
    start[c] = static_cast<float>((offset ? double{offset[c]} : 0.0) - double{from[c]} * s);
  }
}

}  // namespace
}  // namespace mlcore

int mlc_separable_conv_fwd(const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale, const DLTensor* shift,
                           const DLTensor* pointwise, const DLTensor* bias, const DLTensor* residual, int64_t stride_h,
                           int64_t stride_w, int64_t dilation_h, int64_t dilation_w, int64_t pad_h, int64_t pad_w,
                           int64_t patch_h, int64_t patch_w, int64_t f, int64_t g, DLTensor* y, DLTensor* partial,
                           DLTensor* moments) {
  return mlcore::guard([&] {
    mlcore::fwd(x, depthwise, scale, shift, pointwise, bias, residual, {stride_h, stride_w}, {dilation_h, dilation_w},
                {pad_h, pad_w}, patch_h, patch_w, f, g, y, partial, moments);
  });
}

int mlc_separable_conv_hidden(const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale, const DLTensor* shift,
                              const DLTensor* residual, int64_t stride_h, int64_t stride_w, int64_t dilation_h,
                              int64_t dilation_w, int64_t pad_h, int64_t pad_w, int64_t f, int64_t out_h, int64_t out_w,
                              DLTensor* a, DLTensor* partial, DLTensor* moments) {
  return mlcore::guard([&] {
    mlcore::hidden(x, depthwise, scale, shift, residual, {stride_h, stride_w}, {dilation_h, dilation_w}, {pad_h, pad_w}, f,
                   out_h, out_w, a, partial, moments);
  });
}

int mlc_separable_conv_bwd(const DLTensor* da, const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale,
                           const DLTensor* shift, const DLTensor* moments, int64_t stride_h, int64_t stride_w,
                           int64_t dilation_h, int64_t dilation_w, int64_t pad_h, int64_t pad_w, int64_t f, DLTensor* d,
                           DLTensor* sums, DLTensor* partial) {
  return mlcore::guard([&] {
    mlcore::bwd(da, x, depthwise, scale, shift, moments, {stride_h, stride_w}, {dilation_h, dilation_w}, {pad_h, pad_w}, f, d,
                sums, partial);
  });
}

int mlc_separable_conv_bwd_product(const DLTensor* dy, const DLTensor* z, const DLTensor* z_scale, const DLTensor* z_shift,
                                   const DLTensor* z_sums, const DLTensor* x, const DLTensor* depthwise, const DLTensor* scale,
                                   const DLTensor* shift, const DLTensor* moments, const DLTensor* pointwise, int64_t stride_h,
                                   int64_t stride_w, int64_t dilation_h, int64_t dilation_w, int64_t pad_h, int64_t pad_w,
                                   int64_t f, int64_t g, DLTensor* d, DLTensor* sums, DLTensor* dpointwise, DLTensor* partial,
                                   DLTensor* dpartial) {
  return mlcore::guard([&] {
    mlcore::bwd_product(dy, z, z_scale, z_shift, z_sums, x, depthwise, scale, shift, moments, pointwise, {stride_h, stride_w},
                        {dilation_h, dilation_w}, {pad_h, pad_w}, f, g, d, sums, dpointwise, partial, dpartial);
  });
}

int mlc_separable_conv_norm(const DLTensor* taken, const DLTensor* weight, const DLTensor* bias, const DLTensor* conv_bias,
                            double momentum, double eps, int64_t count, DLTensor* running_mean, DLTensor* running_var,
                            DLTensor* used, DLTensor* scale, DLTensor* shift) {
  return mlcore::guard([&] {
    mlcore::norm(taken, weight, bias, conv_bias, momentum, eps, count, running_mean, running_var, used, scale, shift);
  });
}
