// What quant_linear's CUDA product is made of: codes to fragments of mma.sync, the stages in shared memory, the epilogue.
// Weights are the 16 rows of an mma and x its 8 columns, so few rows of x waste little and a panel is a fragment.
//
// Codes lie as fragments (python/mlcore/ops/_quant_linear_launch.py makes them): a group is padded to whole chunks of 32 codes,
// a tile is 16 rows of 64. Lane (g, t) = (lane / 4, lane % 4) owns the octets t of rows g and g + 8 in both chunks of a tile,
// 16 bytes for 4-bit codes and twice 16 for 8-bit ones. Within an mma of 16 k the order of k is free as long as both sides
// agree: an octet is the pairs (0, 2), (4, 6) of one mma and (1, 3), (5, 7) of the next, what masks of a word of 4-bit codes
// give.
#pragma once
#include "cuda/ptx.h"
#include "cuda/reduce.cuh"

namespace mlcore::cuda {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps, kStages = 3;
constexpr int kTile = 64, kChunk = 32, kPanelRows = 16, kPanels = 2;  // codes of a tile and a chunk; panels of a warp
constexpr int kRow = kTile + 32;  // elements of a row of x in shared memory: two rows of 64 bytes miss each other's banks

struct Product {
  const void *x, *residual;
  const uint8_t *fragments, *zeros;
  const float *scales, *bias;
  void* y;
  int64_t x_stride, residual_stride, y_stride;
  int M, N, K, groups, group_size, group_padded, tiles, panels, offset, activation, stages;
  bool aligned, wide;  // octets of x are 16-byte aligned; y is float32
};

// MT tiles of 8 rows of x; the warps are kSlices slices of K by columns.
template <int MT>
struct Shape {
  static constexpr int kRows = 8 * MT, kSlices = MT == 2 ? 8 : 2;
  static constexpr int kColumns = kPanels * kPanelRows * (kWarps / kSlices), kPitch = kColumns + 4;
};

// A stage: x of every slice, and each warp's codes, scales and zero points of a tile.
template <int BITS>
struct WarpStage {
  alignas(16) uint32_t codes[kPanels][BITS / 4][32][4];
  float scales[kPanels][2][kPanelRows];
  uint8_t zeros[kPanels][2][kPanelRows];
};
template <class T, int BITS, int MT>
struct Stage {
  alignas(16) T x[Shape<MT>::kSlices][Shape<MT>::kRows][kRow];
  WarpStage<BITS> warp[kWarps];
};

// a & mask | bits in one instruction: of two constants the compiler makes two.
MLC_DEVICE uint32_t and_or(uint32_t a, uint32_t mask, uint32_t bits) {
#ifdef __CUDACC__
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(bits));
  return d;
#else
  return (a & mask) | bits;
#endif
}

template <class T>
MLC_DEVICE uint32_t sub2(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  using T2 = std::conditional_t<std::is_same_v<T, f16>, __half2, __nv_bfloat162>;
  const T2 d = __hsub2(reinterpret_cast<const T2&>(a), reinterpret_cast<const T2&>(b));
  return reinterpret_cast<const uint32_t&>(d);
#else
  const float2 u = unpack2<T>(a), v = unpack2<T>(b);
  return pack2<T>(u.x - v.x, u.y - v.y);
#endif
}

// The four pairs of an octet of codes minus z, exactly. 1024 (128) plus a code is one OR in float16 (bfloat16); bytes reach
// beyond bfloat16's 128 and go through float32.
template <class T, int BITS>
MLC_DEVICE void decode(const uint32_t* word, uint32_t z, uint32_t (&pair)[4]) {
  constexpr bool kHalf = std::is_same_v<T, f16>;
  constexpr uint32_t kMagic = kHalf ? 0x64006400u : 0x43004300u;
  const uint32_t zero = kMagic | z | z << 16;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if constexpr (BITS == 4) {
      pair[j] = sub2<T>(and_or(word[0] >> 4 * j, 0x000f000fu, kMagic), zero);
    } else if constexpr (kHalf) {
      pair[j] = sub2<T>(__byte_perm(word[j % 2], kMagic >> 8, j < 2 ? 0x4240 : 0x4341), zero);
    } else {
      const float shift = 8388608.0f + static_cast<float>(z);  // 2^23: the code stands in the low byte
      pair[j] = pack2<T>(__uint_as_float(__byte_perm(word[j % 2], 0x4b000000u, 0x7540 + j / 2)) - shift,
                         __uint_as_float(__byte_perm(word[j % 2], 0x4b000000u, 0x7542 + j / 2)) - shift);
    }
  }
}

// An octet of codes as signed bytes: minus z for 4 bits, minus 128 for 8.
template <int BITS>
MLC_DEVICE void decode8(const uint32_t* word, uint32_t z, uint32_t& low, uint32_t& high) {
  constexpr uint32_t kSigns = 0x80808080u;
  if constexpr (BITS == 4) {
    const uint32_t zero = z * 0x01010101u;
    low = (and_or(word[0], 0x0f0f0f0fu, kSigns) - zero) ^ kSigns;
    high = (and_or(word[0] >> 4, 0x0f0f0f0fu, kSigns) - zero) ^ kSigns;
  } else {
    low = word[0] ^ kSigns, high = word[1] ^ kSigns;
  }
}

// Four numbers to the nearest whole ones (half to even), as bytes; magnitudes up to 127.
MLC_DEVICE uint32_t round4(const float* v, float factor) {
  uint32_t byte[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) byte[i] = __float_as_uint(__fadd_rn(__fmul_rn(v[i], factor), 12582912.0f));  // 1.5 * 2^23
  return __byte_perm(__byte_perm(byte[0], byte[1], 0x0040), __byte_perm(byte[2], byte[3], 0x0040), 0x5410);
}

// Starts the copies of stage `step`: tile step * kSlices + slice of each slice.
template <class T, int BITS, int MT>
MLC_DEVICE void load_stage(const Product& p, Stage<T, BITS, MT>& stage, int step, int m0, int panel0) {
  using S = Shape<MT>;
  const T* x = static_cast<const T*>(p.x);
  for (int i = threadIdx.x; i < S::kSlices * S::kRows * (kTile / 8); i += kThreads) {
    const int octet = i % (kTile / 8), row = i / (kTile / 8) % S::kRows, slice = i / (kTile / 8) / S::kRows;
    const int at = (step * S::kSlices + slice) * kTile + 8 * octet, group = at / p.group_padded;
    const int r = at - group * p.group_padded, m = m0 + row;
    const int64_t k = int64_t{group} * p.group_size + r;
    int count = 0;
    if (m < p.M && group < p.groups)
      count = max(0, min(8, min(p.group_size - r, static_cast<int>(p.K - min(k, int64_t{p.K})))));
    T* to = &stage.x[slice][row][8 * octet];
    const T* from = count > 0 ? x + m * p.x_stride + k : x;
    if (p.aligned) {
      cp_async<16>(to, from, count * 2);
    } else {
      for (int e = 0; e < 8; ++e) to[e] = e < count ? from[e] : from_float<T>(0.0f);
    }
  }
  const int lane = threadIdx.x % 32, tile = step * S::kSlices + threadIdx.x / 32 % S::kSlices;
  WarpStage<BITS>& mine = stage.warp[threadIdx.x / 32];
#pragma unroll
  for (int i = 0; i < kPanels; ++i) {
    const bool there = tile < p.tiles && panel0 + i < p.panels;
    const uint8_t* from = p.fragments + (there ? (int64_t{panel0 + i} * p.tiles + tile) * (BITS * 128) : 0);
    for (int v = 0; v < BITS / 4; ++v)
      cp_async<16>(mine.codes[i][v][lane], from + (there ? v * 512 + lane * 16 : 0), there ? 16 : 0);
  }
  const bool zero_lane = lane >= 16;  // 16 lanes copy scales, 4 zero points
  const int i = zero_lane ? (lane - 16) / 2 : lane / 8, chunk = zero_lane ? lane % 2 : lane / 4 % 2;
  if (lane >= 20 || (zero_lane && p.zeros == nullptr)) return;
  const int group = (tile * kTile + chunk * kChunk) / p.group_padded;
  const bool there = group < p.groups && panel0 + i < p.panels;
  const int64_t at = there ? (int64_t{panel0 + i} * p.groups + group) * kPanelRows : 0;
  if (zero_lane)
    cp_async<16>(mine.zeros[i][chunk], p.zeros + at, there ? 16 : 0);
  else
    cp_async<16>(&mine.scales[i][chunk][lane % 4 * 4], p.scales + at + (there ? lane % 4 * 4 : 0), there ? 16 : 0);
}

// What a lane needs of a panel's chunk: the words of its octets in rows g and g + 8, their zero points and scales.
template <int BITS>
struct Octets {
  Pack<uint32_t, 4> words;  // of both chunks of the tile, with 8 bits of one
  uint32_t z[2];
  float scale[2];
  MLC_DEVICE Octets(const Product& p, const WarpStage<BITS>& w, int panel, int chunk)
      : words(load_pack<4>(w.codes[panel][BITS == 4 ? 0 : chunk][threadIdx.x % 32])) {
    const int g = threadIdx.x % 32 / 4;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      z[h] = p.zeros != nullptr ? w.zeros[panel][chunk][g + 8 * h] : p.offset;
      scale[h] = w.scales[panel][chunk][g + 8 * h];
    }
  }
  MLC_DEVICE const uint32_t* row(int chunk, int h) const { return words.v + (BITS == 4 ? 2 * chunk + h : 2 * h); }
};

// c += a chunk's products, scaled.
template <class T, int BITS, int MT>
MLC_DEVICE void add_chunk(const Product& p, const T (*x)[kRow], const WarpStage<BITS>& w, int chunk,
                          float (&c)[kPanels][MT][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  uint32_t a[kPanels][2][4];
  float scale[kPanels][2];
#pragma unroll
  for (int i = 0; i < kPanels; ++i) {
    const Octets<BITS> codes(p, w, i, chunk);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t pair[4];
      decode<T, BITS>(codes.row(chunk, h), codes.z[h], pair);
      a[i][0][h] = pair[0], a[i][0][2 + h] = pair[1], a[i][1][h] = pair[2], a[i][1][2 + h] = pair[3];
      scale[i][h] = codes.scale[h];
    }
  }
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) {
    const auto octet = load_pack<4>(reinterpret_cast<const uint32_t*>(&x[8 * mt + g][chunk * kChunk + 8 * t]));
    const uint32_t first[2] = {__byte_perm(octet.v[0], octet.v[1], 0x5410), __byte_perm(octet.v[2], octet.v[3], 0x5410)};
    const uint32_t second[2] = {__byte_perm(octet.v[0], octet.v[1], 0x7632), __byte_perm(octet.v[2], octet.v[3], 0x7632)};
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      float d[4] = {};
      mma_m16n8k16<T>(d, a[i][0], first, d);
      mma_m16n8k16<T>(d, a[i][1], second, d);
#pragma unroll
      for (int e = 0; e < 4; ++e) c[i][mt][e] += d[e] * scale[i][e / 2];
    }
  }
}

// The same with x rounded to bytes by factor[row]: sums of a chunk are exact.
template <class T, int BITS, int MT>
MLC_DEVICE void add_chunk8(const Product& p, const T (*x)[kRow], const WarpStage<BITS>& w, int chunk, const float* factor,
                           float (&c)[kPanels][MT][4]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bool centred = BITS == 4 || (p.zeros == nullptr && p.offset == 128);
  uint32_t a[kPanels][4];
  float scale[kPanels][2];
  int missing[kPanels][2];  // what decode8 took too much from each code
#pragma unroll
  for (int i = 0; i < kPanels; ++i) {
    const Octets<BITS> codes(p, w, i, chunk);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      decode8<BITS>(codes.row(chunk, h), codes.z[h], a[i][h], a[i][2 + h]);
      scale[i][h] = codes.scale[h], missing[i][h] = 128 - static_cast<int>(codes.z[h]);
    }
  }
#pragma unroll
  for (int mt = 0; mt < MT; ++mt) {
    const auto octet = load_pack<8>(&x[8 * mt + g][chunk * kChunk + 8 * t]);
    float v[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) v[e] = to_float(octet.v[e]);
    const uint32_t b[2] = {round4(v, factor[8 * mt + g]), round4(v + 4, factor[8 * mt + g])};
    int sum[4] = {};  // of x's rows, in the places of the products
    const uint32_t ones[4] = {0x01010101u, 0x01010101u, 0x01010101u, 0x01010101u};
    if (!centred) mma_m16n8k32_s8(sum, ones, b, sum);
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      int d[4] = {};
      mma_m16n8k32_s8(d, a[i], b, d);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int whole = centred ? d[e] : d[e] + missing[i][e / 2] * sum[e];
        c[i][mt][e] += static_cast<float>(whole) * scale[i][e / 2];
      }
    }
  }
}

// factor (rows) = 127 / max |x| and step = max |x| / 127 of the block's rows: NaN where a row isn't finite, 0 below 1e-35.
template <class T, int kRows>
MLC_DEVICE void measure_rows(const Product& p, int m0, float* factor, float* step) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < kRows; row += kWarps) {
    float peak = 0.0f, bad = 0.0f;
    if (m0 + row < p.M) {
      const T* x = static_cast<const T*>(p.x) + (m0 + row) * p.x_stride;
      const auto add = [&](T value) {
        const float v = fabsf(to_float(value));
        v < INFINITY ? peak = fmaxf(peak, v) : bad = 1.0f;
      };
      const int whole = p.aligned ? p.K / 8 * 8 : 0;
      for (int k = 8 * lane; k < whole; k += 256) {
        const auto octet = load_pack<8>(x + k);
        for (int e = 0; e < 8; ++e) add(octet.v[e]);
      }
      for (int k = whole + lane; k < p.K; k += 32) add(x[k]);
    }
    peak = warp_max(peak), bad = warp_max(bad);
    if (lane != 0) continue;
    const bool usable = bad == 0.0f && peak > 1e-35f;
    factor[row] = usable ? 127.0f / peak : 0.0f;
    step[row] = bad != 0.0f ? NAN : usable ? peak / 127.0f : 0.0f;
  }
}

MLC_DEVICE float activate(int activation, float z) {
  switch (activation) {
    case 1: return z < 0.0f ? 0.0f : z;
    case 2: return 0.5f * z * (1.0f + erff(z * 0.70710678f));
    case 3: return z / (1.0f + expf(-1.5957691216f * z * (1.0f + 0.044715f * z * z)));
    case 4: return z / (1.0f + expf(-z));
    case 5: return z < 0.0f ? 0.0f : z > 6.0f ? 6.0f : z;
    default: return z;
  }
}

}  // namespace
}  // namespace mlcore::cuda
