// A whole chain of packed layers in one call: checks its table, gives every activation a place in one arena that is kept
// between calls, and cuts each layer into parts. The contract is in separable_conv.h, the arithmetic in separable_chain.inl.
#include "separable_conv/separable_chain.h"

#include <algorithm>
#include <vector>

#include "core/pages.h"
#include "core/parallel.h"
#include "core/scratch.h"
#include "separable_conv/separable_conv.h"

namespace mlcore {
namespace {

constexpr const char* kOp = "separable_conv";
constexpr int64_t kFields = 20;                          // of a row of the table
constexpr int64_t kChunk = 16;                           // images that go through the chain together
constexpr int64_t kMostPixels = 224, kLeastPixels = 24;  // of a part
constexpr int64_t kFusedFloats = 1 << 16, kExpandedFloats = 1 << 18;
thread_local Scratch arena;  // of the calling thread; its workers get slices

int64_t rounded(int64_t floats) { return (floats + 15) / 16 * 16; }

struct Layer {
  ChainStep step{};
  int64_t in = 0, out = 0;  // floats of an image
  int64_t residual = -1, last_use = 0;
  bool fused = false;  // into the next one: its y is never whole

  int64_t weights() const { return step.conv.C * step.conv.J; }
};

// Rows of the table are (kind, C, J, KH, KW, stride, dilation, padding before and after along H and W, f, g, residual,
// offsets).
struct Chain {
  std::vector<Layer> layers;
  const float* data;
  int64_t floats;
  float* zeros = nullptr;

  Chain(const Tensor& x, const Tensor& weights, const Tensor& table) {
    weights.on(kDLCPU).dtype_in({Dtype::f32}).rank_is(1, "(floats)").contiguous();
    table.on(kDLCPU).dtype_in({Dtype::i64}).rank_is(2, "(layers, 20)").contiguous();
    require(table.size(1) == kFields && table.size(0) >= 1, kOp, ": layers must be (at least 1, 20); got ", table.shape_text());
    data = weights.data<float>(), floats = weights.numel();
    int64_t C = x.size(1), H = x.size(2), W = x.size(3);
    layers.resize(static_cast<size_t>(table.size(0)));
    for (int64_t i = 0; i < table.size(0); ++i) {
      Layer& layer = layers[static_cast<size_t>(i)];
      read(layer, i, table.data<int64_t>() + i * kFields, C, H, W);
      const SeparableConv& p = layer.step.conv;
      C = p.J, H = p.Ho, W = p.Wo;
    }
  }

  Layer& at(int64_t i) { return layers[static_cast<size_t>(i)]; }
  int64_t size() const { return static_cast<int64_t>(layers.size()); }

  const float* part(int64_t layer, const char* what, int64_t offset, int64_t size) const {
    require(offset >= 0 && offset % 16 == 0 && size <= floats && offset <= floats - size, kOp, ": layer ", layer, ": ", what,
            " must lie within the weights at a multiple of 16; got ", offset);
    return data + offset;
  }

  void read(Layer& layer, int64_t i, const int64_t* row, int64_t C, int64_t H, int64_t W) {
    constexpr int64_t kMost = int64_t{1} << 20;  // no product of sizes overflows
    ChainStep& s = layer.step;
    SeparableConv& p = s.conv;
    require(row[0] >= 0 && row[0] <= 3, kOp, ": layer ", i, ": the kind must be 0 to 3; got ", row[0]);
    s.kind = static_cast<ChainKind>(row[0]);
    require(row[1] == C && C >= 1 && C <= kMost, kOp, ": layer ", i, ": it takes ", row[1], " channels; got ", C);
    for (int f = 2; f < 13; ++f)
      require(row[f] >= (f < 9 ? 1 : 0) && row[f] <= kMost, kOp, ": layer ", i, ": sizes must be positive and paddings not ",
              "negative; got ", row[f]);
    p.Cx = C, p.J = row[2], p.H = H, p.W = W;
    require(row[3] * row[4] <= kMost, kOp, ": layer ", i, ": its kernel is too large; got ", row[3], " x ", row[4]);
    for (int d = 0; d < 2; ++d) {
      p.K[d] = row[3 + d], p.stride[d] = row[5 + d], p.dilation[d] = row[7 + d], p.pad[d] = row[9 + d];
      (d ? p.Wo : p.Ho) = ((d ? W : H) + row[9 + d] + row[11 + d] - (p.K[d] - 1) * p.dilation[d] - 1) / p.stride[d] + 1;
      require((d ? W : H) + row[9 + d] + row[11 + d] > (p.K[d] - 1) * p.dilation[d], kOp, ": layer ", i,
              ": its kernel is larger than its padded input; got ", H, " x ", W);
    }
    for (int f = 13; f < 15; ++f)
      require(row[f] >= 0 && row[f] <= 3, kOp, ": layer ", i, ": an activation must be 0 to 3; got ", row[f]);
    p.f = static_cast<Activation>(row[13]), p.g = static_cast<Activation>(row[14]);
    const bool patches = s.kind == ChainKind::patches;
    p.C = patches ? C * p.K[0] * p.K[1] : C;
    p.patches = patches;
    require(!patches || i == 0, kOp, ": layer ", i, ": patches are taken of x alone");
    if (s.kind == ChainKind::mean) {
      require(p.J == C, kOp, ": layer ", i, ": a mean keeps its channels; got ", p.J);
      p.Ho = p.Wo = 1;
    } else {
      s.weights = part(i, "pointwise", row[18], p.C * rounded(p.J)), s.bias = part(i, "bias", row[19], rounded(p.J));
    }
    if (s.kind == ChainKind::separable) {
      s.depthwise = part(i, "depthwise", row[16], p.K[0] * p.K[1] * C), s.shift = part(i, "shift", row[17], C);
    } else if (s.kind != ChainKind::patches) {
      require(s.kind == ChainKind::mean || (p.Ho == H && p.Wo == W), kOp, ": layer ", i, ": a pointwise layer keeps the size");
    }
    s.in_ld = i > 0 ? at(i - 1).step.out_ld : C, s.out_ld = i + 1 < size() ? chain_ld(p.J) : p.J;
    layer.in = C * H * W, layer.out = s.out_ld * p.Ho * p.Wo, layer.last_use = i + 1;
    layer.residual = row[15];
    require(layer.residual >= -1 && layer.residual < i, kOp, ": layer ", i, ": the residual must be an earlier layer; got ",
            layer.residual);
    if (layer.residual < 0) return;
    const SeparableConv& from = at(layer.residual).step.conv;
    require(s.kind != ChainKind::mean && from.J == p.J && from.Ho == p.Ho && from.Wo == p.Wo, kOp, ": layer ", i,
            ": the residual must have its shape; got layer ", layer.residual);
    s.residual_ld = at(layer.residual).step.out_ld;
    at(layer.residual).last_use = std::max(at(layer.residual).last_use, i);
  }

  // Pointwise layers whose y only the filter behind them sees, and which is more than a core's cache holds of it.
  void fuse(int64_t threads) {
    for (int64_t i = 0; i + 1 < size(); ++i) {
      Layer &layer = at(i), &next = at(i + 1);
      if (layer.step.kind != ChainKind::pointwise || next.step.kind != ChainKind::separable || layer.residual >= 0) continue;
      if (layer.last_use > i + 1 || layer.out < kFusedFloats * threads) continue;
      layer.fused = true, layer.out = 0;
      if (i > 0) at(i - 1).last_use = std::max(at(i - 1).last_use, i + 1);
    }
  }

  // The first layer from which on all images of a chunk go together: weights weigh more than activations from there on, and
  // nothing but the result of the layer before reaches over.
  int64_t cut() {
    int64_t found = 0;
    for (int64_t i = 0; i < size(); ++i)
      if (at(i).weights() < at(i).in + at(i).out && at(i).step.kind != ChainKind::mean) found = i + 1 + at(i).fused;
    for (int64_t i = found; i < size(); ++i)
      if (at(i).residual >= 0 && at(i).residual < found - 1) found = at(i).residual + 1, i = found - 1;
    return found;
  }

  // Places for the results of layers [first, last) of `images` images each: the lowest that are free. Returns the floats.
  int64_t place(int64_t first, int64_t last, int64_t images, std::vector<int64_t>& places) {
    int64_t total = 0;
    for (int64_t i = first; i < last; ++i) {
      const int64_t size = rounded(at(i).out * images);
      int64_t& to = places[static_cast<size_t>(i)];
      to = 0;
      for (bool moved = true; moved;) {
        moved = false;
        for (int64_t j = first; j < i; ++j) {
          const int64_t begin = places[static_cast<size_t>(j)], end = begin + rounded(at(j).out * images);
          if (at(j).last_use < i || to >= end || to + size <= begin) continue;
          to = end, moved = true;
        }
      }
      total = std::max(total, to + size);
    }
    return total;
  }
};

// Cuts a step into parts, of the least time by the rates of a core: a product of 32 multiplications a cycle for whole tiles,
// weights of 6 bytes a cycle that come meanwhile, and what is made of x for every part anew; at the end threads wait for half a
// part, more of it where other programs run. No sum is cut.
void cut_step(ChainStep& s, int64_t threads) {
  SeparableConv& p = s.conv;
  const int64_t taps = s.kind == ChainKind::pointwise ? 0 : s.kind == ChainKind::separable ? p.K[0] * p.K[1] + 3 : 4;
  const int64_t panels = (p.J + kBlock - 1) / kBlock, image = p.Ho * p.Wo;
  s.images = s.row_parts = s.column_parts = 1, s.rows = p.Ho, s.columns = p.J;
  if (s.kind == ChainKind::mean) return;
  double best = -1.0;
  const auto consider = [&](int64_t images, int64_t rows) {
    const int64_t lines = s.expand ? (rows - 1) * p.stride[0] + (p.K[0] - 1) * p.dilation[0] + 1 : 0;
    if (lines * p.W * p.C > kExpandedFloats && rows > 1) return;
    const double expanded = s.expand ? static_cast<double>(lines * p.W * p.C * s.expand->conv.C) / 32.0 : 0.0;
    const int64_t row_parts = (p.Ho + rows - 1) / rows, strips = (p.N + images - 1) / images * row_parts;
    const double pixels = static_cast<double>(images * rows * p.Wo), depth = static_cast<double>(p.C);
    for (int64_t cuts = 1; cuts <= (s.expand ? 1 : std::min(panels, threads)); cuts *= 2) {
      const int64_t columns = std::min((panels + cuts - 1) / cuts * kBlock, p.J),
                    parts = strips * ((p.J + columns - 1) / columns);
      const double weights = depth * static_cast<double>(columns);
      const double product = std::max(weights * (pixels + 6.0) / 30.0, weights * 4.0 / 6.0);
      const double part = expanded + product + pixels * depth * static_cast<double>(taps) / 8.0 + 2000.0;
      const double cost = (static_cast<double>((parts + threads - 1) / threads) + 0.5) * part;
      if (best >= 0.0 && cost >= best) continue;
      best = cost, s.images = images, s.rows = rows, s.columns = columns;
    }
  };
  const int64_t most = s.expand ? image : kMostPixels;
  for (int64_t parts = (image + most - 1) / most, tried = 0; tried < (s.expand ? 32 : 12) && parts <= p.Ho; ++parts, ++tried) {
    const int64_t rows = (p.Ho + parts - 1) / parts;
    if (parts > 1 && rows * p.Wo < kLeastPixels) break;
    consider(1, rows);
  }
  for (int64_t images = 2; !s.expand && images <= p.N && images * image <= kMostPixels; ++images) consider(images, p.Ho);
  if (best < 0.0) consider(1, 1);
  s.row_parts = (p.Ho + s.rows - 1) / s.rows, s.column_parts = (p.J + s.columns - 1) / s.columns;
}

class Run {
 public:
  Run(Chain& chain, const Tensor& x, const Tensor& y)
      : chain_(chain), N_(x.size(0)), last_(chain.size() - 1), places_(chain.layers.size()) {
    threads_ = num_threads();
    chain.fuse(threads_), cut_ = chain.cut();
    x_ = {x.raw(), x.stride(0), x.stride(2), x.stride(3), x.stride(1)}, y_ = y.data<float>();
    chunk_ = std::min(N_, std::max<int64_t>(kChunk, threads_));
    group_ = std::min<int64_t>(chunk_, std::max(threads_ / 2, 1));
    const int64_t early = chain.place(0, std::min(cut_ - 1, last_), group_, places_);
    const int64_t late = chain.place(std::max<int64_t>(cut_ - 1, 0), last_, chunk_, places_);
    const SeparableChainKernels& kernels = separable_chain_kernels_now();
    for (int64_t i = 0; i <= last_; ++i) {
      ChainStep& s = chain.at(i).step;
      s.conv.N = i < cut_ ? group_ : chunk_;
      widest_ = std::max(widest_, rounded(s.conv.Cx));
      if (chain.at(i).fused) continue;
      if (i > 0 && chain.at(i - 1).fused) s.expand = &chain.at(i - 1).step;
      if (s.kind == ChainKind::pointwise)
        s.conv.H = s.conv.Ho = s.conv.N * s.conv.H * s.conv.W, s.conv.W = s.conv.Wo = s.conv.N = 1;
      cut_step(s, threads_);
      scratch_ = std::max(scratch_, rounded(kernels.scratch(s)));
    }
    float* memory = arena.floats(static_cast<size_t>(early + late + widest_ + threads_ * scratch_));
    early_ = memory, late_ = memory + early, zeros_ = late_ + late, scratches_ = zeros_ + widest_;
    std::fill_n(zeros_, widest_, 0.0f);
  }

  void operator()() {
    for (int64_t first = 0; first < N_; first += chunk_) {
      const int64_t end = std::min(N_, first + chunk_);
      for (int64_t n = first; cut_ > 0 && n < end; n += group_)
        for (int64_t i = 0; i < cut_; ++i) layer(i, first, n, std::min(group_, end - n));
      for (int64_t i = cut_; i <= last_; ++i) layer(i, first, first, end - first);
    }
    arena.release_if_large();
  }

 private:
  // Where layer i's result for image n on is, in the chunk that begins with image `first`.
  float* result(int64_t i, int64_t first, int64_t n) {
    const int64_t size = chain_.at(i).out, place = places_[static_cast<size_t>(i)];
    if (i == last_) return y_ + n * size;
    return i < cut_ - 1 ? early_ + place : late_ + place + (n - first) * size;
  }

  const float* input(int64_t i, int64_t first, int64_t n) {
    return i == 0 ? static_cast<const float*>(x_.data) + n * x_.n : result(i - 1, first, n);
  }

  void layer(int64_t i, int64_t first, int64_t n, int64_t images) {
    const Layer& layer = chain_.at(i);
    if (layer.fused) return;
    ChainStep s = layer.step, expand{};
    if (s.expand) expand = *s.expand, expand.in = input(i - 1, first, n), s.expand = &expand;
    s.in = input(i, first, n);
    s.conv.x = x_, s.conv.x.data = const_cast<float*>(s.in);
    s.out = result(i, first, n), s.zeros = zeros_;
    s.residual = layer.residual < 0 ? nullptr : result(layer.residual, first, n);
    const int64_t planned = i < cut_ ? group_ : chunk_;
    if (s.kind == ChainKind::pointwise) {
      s.conv.Ho = s.conv.H = images * (s.conv.H / planned);
      s.row_parts = (s.conv.Ho + s.rows - 1) / s.rows;
    } else {
      s.conv.N = images;
    }
    const SeparableChainKernels& kernels = separable_chain_kernels_now();
    parallel_near(s.parts(), threads_, [&](int64_t part, int thread) { kernels.run(s, part, scratches_ + thread * scratch_); });
  }

  Chain& chain_;
  int64_t N_, cut_, last_, chunk_, group_, scratch_ = 0, widest_ = 0;
  std::vector<int64_t> places_;
  Pixels x_;
  float *y_, *early_, *late_, *zeros_, *scratches_;
  int threads_;
};

void chain(const DLTensor* x_, const DLTensor* weights_, const DLTensor* layers_, DLTensor* y_) {
  const Tensor x(x_, kOp, "x"), weights(weights_, kOp, "weights"), table(layers_, kOp, "layers"), y(y_, kOp, "y");
  x.on(kDLCPU).dtype_in({Dtype::f32}).rank_is(4, "(N, C, H, W)");
  Chain layers(x, weights, table);
  const SeparableConv& last = layers.at(layers.size() - 1).step.conv;
  const int64_t C = x.size(1), H = x.size(2), W = x.size(3);
  const auto dense = [](const Tensor& t, int d, int64_t stride) { return t.size(d) == 1 || t.stride(d) == stride; };
  const auto packed = [&](const Tensor& t) {
    const int64_t c = t.size(1), w = t.size(3);
    return t.numel() == 0 || (dense(t, 1, 1) && dense(t, 3, c) && dense(t, 2, w * c) && dense(t, 0, t.size(2) * w * c));
  };
  require(layers.at(0).step.kind == ChainKind::patches || packed(x), kOp, ": x must be dense in channels_last, (", x.size(0),
          ", ", C, ", ", H, ", ", W, ")");
  y.on(kDLCPU).dtype_in({Dtype::f32}).shape_is({x.size(0), last.J, last.Ho, last.Wo}, "(N, J, Ho, Wo)");
  require(packed(y), kOp, ": y must be dense in channels_last, ", y.shape_text());
  if (y.numel() > 0) Run(layers, x, y)();
}

}  // namespace
}  // namespace mlcore

int mlc_separable_conv_chain(const DLTensor* x, const DLTensor* weights, const DLTensor* layers, DLTensor* y) {
  return mlcore::guard([&] { mlcore::chain(x, weights, layers, y); });
}
int mlc_separable_conv_reserve(DLTensor* weights) {
  return mlcore::guard([&] {
    const mlcore::Tensor t(weights, mlcore::kOp, "weights");
    t.on(kDLCPU).dtype_in({mlcore::Dtype::f32}).contiguous();
    mlcore::prefer_huge_pages(t.raw(), static_cast<size_t>(t.numel()) * sizeof(float));
  });
}
