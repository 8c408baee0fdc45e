// How depthwise_conv cuts planes: blocks that fit the L1 cache, copied with their padding around them and sorted by the
// remainders of their coordinates by the stride. Included by depthwise_conv_cpu.inl only.
#pragma once
#include "core/simd/rows.h"
#include "depthwise_conv/depthwise_conv_kernels.h"

namespace mlcore::MLC_ISA {
namespace {

constexpr int kW = Vec::W;

struct Index3 {
  int64_t v[3];
  int64_t& operator[](int i) { return v[i]; }
  int64_t operator[](int i) const { return v[i]; }
  int64_t volume() const { return v[0] * v[1] * v[2]; }
};

// Floats that a padded block of a plane may have: with its results it stays in the L1 cache.
constexpr int64_t kBlockFloats = 5120;
constexpr int64_t kLineOutputs = 1024;          // of a long line
constexpr int kUnroll = 8;                      // vectors of a long line at once
constexpr int kLines = 8;                       // lines of a tile
constexpr int64_t kSlack = (kUnroll + 1) * kW;  // floats behind a buffer that a full step may read or write

// How the planes of one side are cut: blocks of `block` results, each from `extent` inputs of every phase.
struct Cut {
  Index3 size;    // results of a plane
  Index3 block;   // of a block at most
  Index3 phases;  // the stride: inputs are sorted by their remainder, so that taps are contiguous
  Index3 halo;    // inputs of a phase that a block has beyond its results
  Index3 extent;  // block + halo
  Index3 count;   // blocks

  int64_t phase_volume() const { return extent.volume(); }
  int64_t buffer() const { return round_up<int64_t>(phases.volume() * extent.volume() + kSlack, 16); }
  int64_t results() const { return round_up<int64_t>(extent.volume() + kSlack, 16); }
};

Cut make_cut(Index3 size, Index3 phases, Index3 halo) {
  Cut c{size, size, phases, halo, {}, {}};
  const int64_t copies = phases.volume();
  c.block[2] = min<int64_t>(size[2], max<int64_t>(kLineOutputs / phases[2], 1));
  const auto extent = [&](int d) { return c.block[d] + halo[d]; };
  // As many lines as fit, but no fewer than the halo: else most of what is copied would be copied again.
  for (int d = 1; d >= 0; --d) {
    const int64_t below = extent(2) * (d == 0 ? extent(1) : 1) * copies;
    const int64_t fit = kBlockFloats / max<int64_t>(below, 1) - halo[d];
    c.block[d] = min(size[d], max(max<int64_t>(fit, 2 * halo[d]), int64_t{1}));
  }
  for (int d = 0; d < 3; ++d) c.extent[d] = extent(d), c.count[d] = c.block[d] ? ceil_div(size[d], c.block[d]) : 0;
  return c;
}

// Forward: results are y, inputs x.
Cut forward_cut(const DepthwiseConv& p) {
  Index3 size, phases, halo;
  for (int d = 0; d < 3; ++d) {
    size[d] = (p.y.data ? p.y : p.dy).size[d];
    phases[d] = p.stride[d];
    halo[d] = (p.K[d] - 1) * p.dilation[d] / p.stride[d];
  }
  return make_cut(size, phases, halo);
}

// Backward: the results are dx by quotients of the padded coordinate and the stride, one set a remainder; the inputs are dy.
Cut backward_cut(const DepthwiseConv& p) {
  Index3 size, phases{{1, 1, 1}}, halo;
  for (int d = 0; d < 3; ++d) {
    const int64_t first = p.pad[d] / p.stride[d], last = (p.pad[d] + p.x.size[d] - 1) / p.stride[d];
    size[d] = p.x.size[d] > 0 ? last - first + 1 : 0;
    halo[d] = (p.K[d] - 1) * p.dilation[d] / p.stride[d];
  }
  return make_cut(size, phases, halo);
}

template <class T>
void copy_line(const T* src, int64_t stride, int64_t n, float* out) {
  if (stride == 1) return for_row(n, [&](int64_t i, int m) { store_some(out + i, load_some(src + i, m), m); });
  if (stride == 2) {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(src[2 * i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) out[i] = to_float(src[i * stride]);
}

// buffer[phase][index] = plane[start + index * phases + phase], 0 outside of [0, limit).
template <class T>
void load_block(const T* plane, const int64_t* strides, Index3 limit, Index3 start, Index3 phases, Index3 extent, float* out) {
  for (int64_t pd = 0; pd < phases[0]; ++pd)
    for (int64_t ph = 0; ph < phases[1]; ++ph)
      for (int64_t pw = 0; pw < phases[2]; ++pw) {
        const int64_t s = phases[2], first = start[2] + pw;  // columns first + j * s
        const int64_t lo = first >= 0 ? 0 : min(extent[2], ceil_div(-first, s));
        const int64_t hi = first >= limit[2] ? lo : max(lo, min(extent[2], (limit[2] - first + s - 1) / s));
        for (int64_t d = 0; d < extent[0]; ++d)
          for (int64_t h = 0; h < extent[1]; ++h, out += extent[2]) {
            const int64_t z = start[0] + d * phases[0] + pd, y = start[1] + h * phases[1] + ph;
            if (z < 0 || z >= limit[0] || y < 0 || y >= limit[1]) {
              memset(out, 0, sizeof(float) * static_cast<size_t>(extent[2]));
              continue;
            }
            if (s == 1 && lo < kW) {  // whole vectors: what they write behind the line is 0, or is written next
              Vec::zero().store(out);
              for (int64_t j = lo; j < hi; j += kW)
                load_some(plane + z * strides[0] + y * strides[1] + first + j, static_cast<int>(min<int64_t>(kW, hi - j)))
                    .store(out + j);
              for (int64_t j = lo + round_up<int64_t>(hi - lo, kW); j < extent[2]; j += kW) Vec::zero().store(out + j);
              continue;
            }
            for (int64_t j = 0; j < lo; ++j) out[j] = 0.0f;
            copy_line(plane + z * strides[0] + y * strides[1] + (first + lo * s), s, hi - lo, out + lo);
            for (int64_t j = hi; j < extent[2]; ++j) out[j] = 0.0f;
          }
      }
}

// Calls body(begin, end) with the bounds of every block of a cut.
template <class F>
void for_blocks(const Cut& c, F&& body) {
  Index3 begin, end;
  for (int64_t a = 0; a < c.count[0]; ++a)
    for (int64_t b = 0; b < c.count[1]; ++b)
      for (int64_t e = 0; e < c.count[2]; ++e) {
        const int64_t at[3] = {a, b, e};
        for (int d = 0; d < 3; ++d) begin[d] = at[d] * c.block[d], end[d] = min(begin[d] + c.block[d], c.size[d]);
        body(begin, end);
      }
}

// Results of a block that are wanted lie in its flat results up to here.
int64_t flat_size(const Cut& c, Index3 begin, Index3 end) {
  return ((end[0] - begin[0] - 1) * c.extent[1] + end[1] - begin[1] - 1) * c.extent[2] + end[2] - begin[2];
}

}  // namespace
}  // namespace mlcore::MLC_ISA
