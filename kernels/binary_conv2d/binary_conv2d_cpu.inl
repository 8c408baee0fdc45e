// Packing pixels to signs; and the convolution, which copies the words under each pixel of y side by side and counts them as
// rows of a product. Taps in the padding are copied as zeros and taken out of the counts again. The counting is
// core/simd/xnor.h's; the equations are in binary_conv2d.h. Compiled once per ISA.
#include "binary_conv2d/binary_conv2d_kernels.h"
#include "core/simd/xnor.h"

namespace mlcore::MLC_ISA {
namespace {

constexpr int kPackVecs = 8;  // vectors of a plane that are packed together: several cache lines of it at a time

// kVecs * W pixels of planes x (C, HW) from x on, or the first n of one vector: a channel after the other.
template <int kVecs, class T>
void pack_planes(const BinaryConvPack& p, const T* x, int n, uint32_t* to, float* scale) {
  constexpr int W = Vec::W;
  Vec total[kVecs];
  for (int j = 0; j < kVecs; ++j) total[j] = Vec::zero();
  for (int64_t w = 0; w < p.words; ++w) {
    SignWords signs[kVecs];
    for (int64_t c = 32 * w; c < min(32 * w + 32, p.C); ++c) {
      const uint32_t bit = 1u << (8 * (c % 4) + c % 32 / 4);
#pragma GCC unroll 8
      for (int j = 0; j < kVecs; ++j) {
        const Vec v = load_some(x + c * p.HW + j * W, n);
        signs[j].mark(v, bit);
        if (scale) total[j] = total[j] + absolute(v);
      }
    }
    for (int j = 0; j < kVecs; ++j) signs[j].store(to + j * W * p.words + w, p.words, n);
  }
  const Vec channels = Vec::set1(static_cast<float>(max<int64_t>(p.C, 1)));
  for (int j = 0; scale && j < kVecs; ++j) store_some(scale + j * W, total[j] / channels, n);
}

void pack(const BinaryConvPack& p, int64_t image, int64_t begin, int64_t end) {
  uint32_t* to = p.to + image * p.HW * p.words;
  float* scale = p.scale ? p.scale + image * p.HW : nullptr;
  with_type(p.dtype, [&](auto type) {
    const auto* x = static_cast<const decltype(type)*>(p.x) + image * p.C * p.HW;
    if (p.channels_last) {
      for (int64_t at = begin; at < end; ++at) {
        sign_bits(x + at * p.C, p.C, to + at * p.words);
        if (scale) scale[at] = mean_magnitude(x + at * p.C, p.C);
      }
      return order_words(to + begin * p.words, (end - begin) * p.words);
    }
    int64_t at = begin;
    const auto sums = [&] { return scale ? scale + at : nullptr; };
    for (; at + kPackVecs * Vec::W <= end; at += kPackVecs * Vec::W)
      pack_planes<kPackVecs>(p, x + at, Vec::W, to + at * p.words, sums());
    for (; at < end; at += Vec::W)
      pack_planes<1>(p, x + at, static_cast<int>(min<int64_t>(Vec::W, end - at)), to + at * p.words, sums());
  });
}

void count_taps(const BinaryConv& p, int64_t panel) {
  const uint32_t zero = 0;
  const int64_t taps = p.kh * p.kw;
  const char* codes = reinterpret_cast<const char*>(p.w.codes) + panel * p.w.panel_bytes;
  for (int64_t t = 0; t < taps; ++t) {
    alignas(64) int32_t counts[kSignColumns] = {}, word[kSignColumns];
    for (int64_t i = 0; i < p.channel_words; ++i) {
      count_rows<NibbleSigns>(1, 1, &zero, 1, codes + (t * p.channel_words + i) * 64, p.w.panel_bytes, 1, word);
      for (int n = 0; n < 16; ++n) counts[n] += word[n];
    }
    memcpy(p.tap_counts + (panel * taps + t) * 16, counts, 64);
  }
}

// Taps of one dimension whose position is inside [0, size): [begin, end).
struct Inside {
  int64_t begin, end;
  Inside(int64_t first, int64_t step, int64_t taps, int64_t size) {
    begin = first >= 0 ? 0 : min(ceil_div(-first, step), taps);
    end = first >= size ? 0 : min(ceil_div(size - first, step), taps);
    end = max(begin, end);
  }
  int64_t count() const { return end - begin; }
};

// Where the taps of a pixel of y are.
struct Place {
  int64_t top, left;
  Inside rows, cols;
  Place(const BinaryConv& p, int64_t pixel)
      : top(pixel / p.Wo * p.sh - p.ph),
        left(pixel % p.Wo * p.sw - p.pw),
        rows(top, p.dh, p.kh, p.H),
        cols(left, p.dw, p.kw, p.W) {}
  int64_t taps() const { return rows.count() * cols.count(); }
  bool holds(int64_t u, int64_t v) const { return u >= rows.begin && u < rows.end && v >= cols.begin && v < cols.end; }
};

void copy_words(uint32_t* to, const uint32_t* from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
}

// The words under a pixel of y, (kh, kw, channel_words); how many taps are inside.
int64_t gather(const BinaryConv& p, const uint32_t* image, int64_t pixel, uint32_t* to) {
  const Place at(p, pixel);
  const int64_t cw = p.channel_words;
  if (at.taps() < p.kh * p.kw) memset(to, 0, sizeof(uint32_t) * static_cast<size_t>(p.w.words));
  for (int64_t u = at.rows.begin; u < at.rows.end; ++u) {
    const uint32_t* line = image + (at.top + u * p.dh) * p.W * cw;
    uint32_t* out = to + u * p.kw * cw;
    if (p.dw == 1) {
      copy_words(out + at.cols.begin * cw, line + (at.left + at.cols.begin) * cw, at.cols.count() * cw);
    } else {
      for (int64_t v = at.cols.begin; v < at.cols.end; ++v) copy_words(out + v * cw, line + (at.left + v * p.dw) * cw, cw);
    }
  }
  return at.taps();
}

// Bits that taps in the padding were counted with.
void uncount(const BinaryConv& p, const Place& at, int64_t panel, int64_t width, int32_t* counts) {
  for (int64_t first = 0; first < width; first += 16) {
    const int32_t* taps = p.tap_counts + (panel + first / 16) * p.kh * p.kw * 16;
    for (int64_t u = 0; u < p.kh; ++u)
      for (int64_t v = 0; v < p.kw; ++v)
        if (!at.holds(u, v))
          for (int n = 0; n < 16; ++n) counts[first + n] -= taps[(u * p.kw + v) * 16 + n];
  }
}

// y[n][i] = from[i][n] for n < width: columns of kSignColumns floats to planes.
template <class T>
void store_planes(const float* from, int64_t pixels, int64_t width, T* y, int64_t plane) {
  constexpr int W = Vec::W;
  for (int64_t n = 0; n < width; n += W)
    for (int64_t i = 0; i < pixels; i += W) {
      const int some = static_cast<int>(min<int64_t>(W, pixels - i));
      Vec block[W];
      for (int j = 0; j < W; ++j) block[j] = j < some ? Vec::load(from + (i + j) * kSignColumns + n) : Vec::zero();
      transpose(block);
      for (int64_t j = 0; j < min<int64_t>(W, width - n); ++j) store_some(y + (n + j) * plane + i, block[j], some);
    }
}

void store_pixels(const BinaryConv& p, const float* y, int64_t image, int64_t begin, int64_t pixels, int64_t n0,
                  int64_t width) {
  const int64_t plane = p.Ho * p.Wo, row = image * plane + begin;
  if (p.dtype == Dtype::i32) {
    const int64_t words = ceil_div<int64_t>(p.w.N, 32);
    for (int64_t i = 0; i < pixels; ++i)
      sign_words(y + i * kSignColumns, width, static_cast<uint32_t*>(p.y) + (row + i) * words + n0 / 32);
    return;
  }
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    T* to = static_cast<T*>(p.y);
    if (!p.channels_last) return store_planes(y, pixels, width, to + (image * p.w.N + n0) * plane + begin, plane);
    for (int64_t i = 0; i < pixels; ++i)
      for_row(width, [&](int64_t c, int n) {
        store_some(to + (row + i) * p.w.N + n0 + c, load_some(y + i * kSignColumns + c, n), n);
      });
  });
}

void run(const BinaryConv& p, int64_t image, int64_t begin, int64_t end, int64_t panel_begin, int64_t panel_end,
         uint32_t* scratch) {
  const uint32_t* x = p.x + image * p.H * p.W * p.channel_words;
  const float* pixel_scale = p.pixel_scale ? p.pixel_scale + image * p.Ho * p.Wo : nullptr;
  int64_t taps[kConvPixels];
  for (int64_t i = begin; i < end; ++i) taps[i - begin] = gather(p, x, i, scratch + (i - begin) * p.w.words);
  for (int64_t panel = panel_begin; panel < panel_end; panel += kSignColumns / 16) {
    const int64_t n0 = panel * 16, width = min<int64_t>(kSignColumns, p.w.N - n0);
    alignas(64) float y[kConvPixels * kSignColumns];
    for_counted_rows(p.w, scratch, p.w.words, end - begin, panel, [&](int64_t i, int32_t* counts) {
      if (taps[i] < p.kh * p.kw) uncount(p, Place(p, begin + i), panel, width, counts);
      scale_counts(p.w, n0, width, taps[i] * p.C, counts, pixel_scale ? pixel_scale + begin + i : nullptr,
                   y + i * kSignColumns);
    });
    store_pixels(p, y, image, begin, end - begin, n0, width);
  }
}

}  // namespace

extern const BinaryConvKernels binary_conv2d_kernels = {pack, count_taps, run};

}  // namespace mlcore::MLC_ISA
