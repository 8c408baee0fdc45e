// What separable_conv's CUDA kernels are made of; the equations are in separable_conv.h, the launchers in separable_conv.cu.
// A thread makes h for 16 bytes of channels of one pixel, its taps read through the caches. The product makes a slice of
// channels of h for its pixels in shared memory and multiplies it there; h is never written.
#pragma once
#include "cuda/reduce.cuh"
#include "cuda/tf32.cuh"

namespace mlcore::cuda {
namespace {

constexpr int kThreads = 256, kRows = 64, kColumns = 128;  // pixels and columns of a tile of y: a warp has 32 by 32
constexpr int kTaps = 64;                                  // that are staged in shared memory; 7x7 has 49
constexpr int kVecs = 8;                                   // threads side by side along the channels of a pixel
constexpr int kBlock = 64;                                 // of the pointwise weights, as separable_conv.h
constexpr int kSumPitch = kColumns + 4;

// What is done with h: a is written, or its moments are taken; e and its sums, then d through the norm; d and the sums at once.
enum class Pass { apply, moments, sums, norm, gradient };

// (N, C, H, W), strides in elements. data is null where the argument was left out.
struct Pixels {
  void* data;
  int64_t n, h, w, c;
  bool aligned;  // vectors of channels are
};

struct SeparableConv {
  Pixels x, y, residual, a, da;  // a: or d, the gradient of h
  const float *depthwise, *scale, *shift, *pointwise, *bias, *mean, *by_h, *constant;
  float* partial;  // (parts, 3, channels): sums of v - v0 and (v - v0)^2, and v0, the first value; or of e and e (h - mean)
  int C, Cx, J, H, W, Ho, Wo, pixels, parts, unit;  // pixels of y or h; a part has whole units of them
  int K[2], stride[2], dilation[2], pad[2], f, g;
  bool patches;
  Pass pass;
};

// The first pixel of part b.
MLC_DEVICE int part_begin(int pixels, int unit, int parts, int b) {
  const int64_t units = (int64_t{pixels} + unit - 1) / unit;
  return static_cast<int>(min(int64_t{pixels}, units * b / parts * unit));
}

template <class T>
struct Slice {
  static constexpr int kVec = 16 / static_cast<int>(sizeof(T)), kChannels = kVecs * kVec;
  static constexpr int kPitch = kChannels + kVec, kTapPitch = kChannels + 4;  // rows begin in different banks
};

template <class T>
struct Tile {
  using S = Slice<T>;
  alignas(16) T h[kRows][S::kPitch];
  alignas(16) T w[2][S::kChannels][kColumns + 8];
  alignas(16) float taps[kTaps * S::kTapPitch];
};

MLC_DEVICE float activate(int f, float x) {
  if (f == 3) return x / (1.0f + expf(-x));
  const float low = f != 0 && x < 0.0f ? 0.0f : x;
  return f == 2 && low > 6.0f ? 6.0f : low;
}

// d * f'(x); at the corners of relu and relu6 the derivative is 0, as torch has it.
MLC_DEVICE float through(int f, float d, float x) {
  if (f == 3) {
    const float s = 1.0f / (1.0f + expf(-x));
    return d * (s * (1.0f + x * (1.0f - s)));
  }
  return f == 0 || (x > 0.0f && (f == 1 || x < 6.0f)) ? d : 0.0f;
}

// A pixel's channels as they lie in memory: `count` of a vector are there.
template <class T, int kVec = Slice<T>::kVec>
MLC_DEVICE Pack<T, kVec> load_channels(const Pixels& t, int64_t offset, int count) {
  const T* from = static_cast<const T*>(t.data) + offset;
  if (t.aligned && count >= kVec) return load_pack<kVec>(from);
  Pack<T, kVec> v;
#pragma unroll
  for (int i = 0; i < kVec; ++i) v.v[i] = i < count ? from[i] : from_float<T>(0.0f);
  return v;
}

template <class T, int kVec>
MLC_DEVICE void store_channels(const Pixels& t, int64_t offset, int count, const float (&v)[kVec]) {
  T* to = static_cast<T*>(t.data) + offset;
  Pack<T, kVec> pack;
#pragma unroll
  for (int i = 0; i < kVec; ++i) pack.v[i] = from_float<T>(v[i]);
  if (t.aligned && count >= kVec) return store_pack(to, pack);
#pragma unroll
  for (int i = 0; i < kVec; ++i)
    if (i < count) to[i] = pack.v[i];
}

// Pixel m of y or h: its image, row and column.
struct Place {
  int n, h, w;
  MLC_DEVICE Place(const SeparableConv& p, int m) : n(m / p.Wo / p.Ho), h(m / p.Wo % p.Ho), w(m % p.Wo) {}
  MLC_DEVICE int64_t in(const Pixels& t) const { return n * t.n + h * t.h + w * t.w; }
};

// Depthwise weights of channels [c0, c0 + kChannels) by taps; without any one tap of 1. More than kTaps stay where they are.
template <class T>
MLC_DEVICE void load_taps(const SeparableConv& p, int c0, float* taps) {
  using S = Slice<T>;
  const int count = p.K[0] * p.K[1];
  if (count > kTaps || p.patches) return;
  for (int i = threadIdx.x; i < count * S::kChannels; i += kThreads) {
    const int c = i / count, k = i % count;
    float w = 0.0f;
    if (c0 + c < p.C) w = p.depthwise != nullptr ? p.depthwise[int64_t{c0 + c} * count + k] : 1.0f;
    taps[k * S::kTapPitch + c] = w;
  }
}

// h for kVec channels from `c` on, of which `count` are there, at `inner` of the slice. Elements outside of x have no product:
// an infinite weight times 0 would be NaN.
template <class T, int kVec>
MLC_DEVICE void make_hidden(const SeparableConv& p, const Place& at, const float* taps, int c, int count, int inner,
                            float (&v)[kVec]) {
  constexpr int kGroup = 3;  // taps along W whose loads are under way together
  const int top = at.h * p.stride[0] - p.pad[0], left = at.w * p.stride[1] - p.pad[1], all = p.K[0] * p.K[1];
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = 0.0f;
  for (int kh = 0; kh < p.K[0]; ++kh) {
    const int h = top + kh * p.dilation[0];
    if (h < 0 || h >= p.H) continue;
    const int64_t line = at.n * p.x.n + h * p.x.h + c;
    for (int first = 0; first < p.K[1]; first += kGroup) {
      Pack<T, kVec> x[kGroup];
      bool there[kGroup];
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const int w = left + (first + j) * p.dilation[1];
        there[j] = first + j < p.K[1] && w >= 0 && w < p.W;
        if (there[j]) x[j] = load_channels<T>(p.x, line + w * p.x.w, count);
      }
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        if (!there[j]) continue;
        const int k = kh * p.K[1] + first + j;
#pragma unroll
        for (int i = 0; i < kVec; ++i) {
          float weight = 0.0f;
          if (all <= kTaps)
            weight = taps[k * Slice<T>::kTapPitch + inner + i];
          else if (i < count)
            weight = p.depthwise[int64_t{c + i} * all + k];
          v[i] += weight * to_float(x[j].v[i]);
        }
      }
    }
  }
}

// The same where the first convolution is dense: channel (kh * KW + kw) * Cx + i is channel i of the pixel that the tap meets.
template <class T, int kVec>
MLC_DEVICE void gather_patch(const SeparableConv& p, const Place& at, int c, int count, float (&v)[kVec]) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    const int tap = (c + i) / p.Cx, h = at.h * p.stride[0] - p.pad[0] + tap / p.K[1] * p.dilation[0];
    const int w = at.w * p.stride[1] - p.pad[1] + tap % p.K[1] * p.dilation[1];
    const int64_t offset = at.n * p.x.n + h * p.x.h + w * p.x.w + (c + i) % p.Cx * p.x.c;
    const bool inside = i < count && h >= 0 && h < p.H && w >= 0 && w < p.W;
    v[i] = inside ? to_float(static_cast<const T*>(p.x.data)[offset]) : 0.0f;
  }
}

MLC_DEVICE float affine(const SeparableConv& p, int c, float h) {
  const float v = p.scale != nullptr ? p.scale[c] * h : h;
  return p.shift != nullptr ? v + p.shift[c] : v;
}

// tile.h = f(scale * h + shift) for kRows pixels from m0 on and a slice of channels; 0 beyond either.
template <class T>
MLC_DEVICE void make_slice(const SeparableConv& p, Tile<T>& tile, int m0, int c0) {
  constexpr int kVec = Slice<T>::kVec;
  const int inner = threadIdx.x % kVecs * kVec, c = c0 + inner, count = p.C - c;
#pragma unroll 1
  for (int row = threadIdx.x / kVecs; row < kRows; row += kThreads / kVecs) {
    float v[kVec];
    const bool there = m0 + row < p.pixels && count > 0;
    if (there) {
      const Place at(p, m0 + row);
      p.patches ? gather_patch<T>(p, at, c, count, v) : make_hidden<T>(p, at, tile.taps, c, count, inner, v);
    }
    Pack<T, kVec> pack;
#pragma unroll
    for (int i = 0; i < kVec; ++i) pack.v[i] = from_float<T>(there && i < count ? activate(p.f, affine(p, c + i, v[i])) : 0.0f);
    store_pack(&tile.h[row][inner], pack);
  }
}

// Starts the copies of the pointwise weights of a slice and the tile's columns; a block of columns beyond J is 0.
template <class T>
MLC_DEVICE void load_weights(const SeparableConv& p, T (*w)[kColumns + 8], int c0, int n0) {
  const int blocks = (p.C + kBlock - 1) / kBlock;
#pragma unroll 2
  for (int i = threadIdx.x; i < Slice<T>::kChannels * (kColumns / 4); i += kThreads) {
    const int k = i / (kColumns / 4), n = i % (kColumns / 4) * 4, c = c0 + k, j = n0 + n;
    const bool there = j / kBlock < (p.J + kBlock - 1) / kBlock;
    const int64_t block = int64_t{j / kBlock} * blocks + c / kBlock;
    const float* from = p.pointwise + (there ? (block * kBlock + c % kBlock) * kBlock + j % kBlock : 0);
    if constexpr (sizeof(T) == 4) {
      cp_async<16>(&w[k][n], from, there ? 16 : 0);
    } else {
      const auto four = load_pack<4>(from);
      Pack<T, 4> to;
#pragma unroll
      for (int e = 0; e < 4; ++e) to.v[e] = from_float<T>(there ? four.v[e] : 0.0f);
      store_pack(&w[k][n], to);
    }
  }
  cp_async_commit();
}

// acc (32, 32) += h of the warp's rows times its columns of w, for a slice.
template <class T>
MLC_DEVICE void add_slice(const T (*h)[Slice<T>::kPitch], const T (*w)[kColumns + 8], int m, int n, float (&acc)[2][4][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int k = 0; k < Slice<T>::kChannels; k += 16) {
      uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) ldmatrix(a[i], &h[m + 16 * i + lane % 16][k + lane / 16 * 8]);
#pragma unroll
      for (int j = 0; j < 4; j += 2) {
        uint32_t b[4];
        ldmatrix<true>(b, &w[k + lane % 16][n + 8 * j + lane / 16 * 8]);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          mma_m16n8k16<T>(acc[i][j], a[i], {b[0], b[1]}, acc[i][j]);
          mma_m16n8k16<T>(acc[i][j + 1], a[i], {b[2], b[3]}, acc[i][j + 1]);
        }
      }
    }
  } else {
#pragma unroll 1
    for (int k = 0; k < Slice<T>::kChannels; k += 8) {
      SplitFragment<4> a[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int r = 0; r < 4; ++r) a[i].set(r, h[m + 16 * i + g + r % 2 * 8][k + t + r / 2 * 4]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        SplitFragment<2> b;
        b.set(0, w[k + t][n + 8 * j + g]);
        b.set(1, w[k + t + 4][n + 8 * j + g]);
#pragma unroll
        for (int i = 0; i < 2; ++i) mma_3xtf32(acc[i][j], a[i], b);
      }
    }
  }
}

// The products of a tile: pixels from m0 and columns from n0 on. All slices of channels pass through shared memory.
template <class T>
MLC_DEVICE void multiply_tile(const SeparableConv& p, Tile<T>& tile, int m0, int n0, float (&acc)[2][4][4]) {
  // Warps with the same columns lie in different quarters of a multiprocessor: few columns still use all tensor cores.
  const int warp = threadIdx.x / 32, m = warp % 2 * 32, n = warp / 2 * 32;
  for (int c0 = 0, stage = 0; c0 < p.C; c0 += Slice<T>::kChannels, stage ^= 1) {
    load_weights<T>(p, tile.w[stage], c0, n0);
    load_taps<T>(p, c0, tile.taps);
    __syncthreads();  // the taps are there, and the last slice of h is multiplied
    make_slice<T>(p, tile, m0, c0);
    cp_async_wait<0>();
    __syncthreads();
    if (n0 + n < p.J) add_slice<T>(tile.h, tile.w[stage], m, n, acc);
  }
}

// Of a column of a part of y: the first value, and sums about it.
struct ColumnMoments {
  float origin = 0.0f, first = 0.0f, second = 0.0f;
  MLC_DEVICE void add(float v) { first += v - origin, second += (v - origin) * (v - origin); }
};

// y's tile from its products in shared memory, a column a thread and every second row, through the epilogue.
template <class T>
MLC_DEVICE void write_tile(const SeparableConv& p, const float* sums, int m0, int n0, ColumnMoments& moments) {
  const int column = threadIdx.x % kColumns, j = n0 + column;
  if (j >= p.J) return;
  const float bias = p.bias != nullptr ? p.bias[j] : 0.0f;
  const int rows = min(kRows, p.pixels - m0);
  for (int row = threadIdx.x / kColumns; row < rows; row += kThreads / kColumns) {
    const Place at(p, m0 + row);
    float v = sums[row * kSumPitch + column];
    moments.add(v);
    v = activate(p.g, v + bias);
    if (p.residual.data != nullptr) v += to_float(static_cast<const T*>(p.residual.data)[at.in(p.residual) + j]);
    static_cast<T*>(p.y.data)[at.in(p.y) + j] = from_float<T>(v);
  }
}

// kVec numbers of every thread, summed over the block's pixels in order: to[i] for the slice's channels below `count`.
template <int kVec>
MLC_DEVICE void sum_pixels(const float (&v)[kVec], float* scratch, int count, float* to) {
  constexpr int kChannels = kVecs * kVec, kLanes = kThreads / kVecs;
  const int row = threadIdx.x / kVecs, inner = threadIdx.x % kVecs * kVec;
  __syncthreads();  // scratch is free
#pragma unroll
  for (int i = 0; i < kVec; ++i) scratch[row * kChannels + inner + i] = v[i];
  __syncthreads();
  const int c = threadIdx.x;
  if (c >= kChannels || c >= count) return;
  float total = 0.0f;
  for (int r = 0; r < kLanes; ++r) total += scratch[r * kChannels + c];
  to[c] = total;
}

}  // namespace
}  // namespace mlcore::cuda
