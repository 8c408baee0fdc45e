// Products of rows of signs with panels of signs, counted on tensor cores; and packing of rows. What binary ops share: where
// the words of a row lie is their own (Source). The order of bits and panels is core/sign_panels.h's.
//
// Bits differ where one is set and the other isn't: count = popc(a & ~w) + popc(~a & w), two products of bits each, where ~a
// keeps to the bits that are valid. So a tap in the padding of an image or a bit behind the last sign of a word counts as
// neither, without a correction. The sibling that counts differing bits itself is no instruction from sm_90 on.
#pragma once
#include "core/sign_panels.h"
#include "cuda/dispatch.h"
#include "cuda/ptx.h"
#include "cuda/reduce.cuh"

namespace mlcore::cuda {
namespace {

constexpr int kSignThreads = 128, kSignStages = 3, kSignWords = 16;  // words of a stage and slice of K

struct SignProduct {
  const uint32_t* codes;
  const float *scales, *row_scale, *bias;
  int M, N, words, panels;
  bool codes_aligned, rows_aligned;  // to 16 bytes; rows_aligned: words come in fours of one tap
  void* y;                           // element (m, n) at m / pixels * image + m % pixels * pixel + n * column
  int64_t image, pixel, column;
  int pixels;
  Dtype dtype;  // i32: words of signs, (M, ceil(N / 32))
};

// A block owns kRows rows and kColumns columns; its four warps are kSlices slices of K by 32 columns each.
template <class Source, int MT>
struct SignTile {
  static constexpr int kRows = 16 * MT, kSlices = MT == 1 ? 4 : 1, kColumns = 128 / kSlices;
  static constexpr int kPitch = kColumns + 1;  // of sums
  struct Stage {
    // Pitches at which a warp's loads miss each other's banks.
    alignas(16) uint32_t a[kSlices][kRows][kSignWords + 4];
    alignas(16) uint32_t valid[Source::kPadded ? kSlices : 1][Source::kPadded ? kRows : 1][kSignWords + 4];
    alignas(16) uint32_t w[kSlices][kSignWords][kColumns + 8];
  };
};

// Four words to shared memory, of which `count` are there.
MLC_DEVICE void copy_words(uint32_t* to, const uint32_t* from, int count, bool aligned) {
  if (aligned) return cp_async<16>(to, from, 4 * count);
#pragma unroll
  for (int i = 0; i < 4; ++i) cp_async<4>(to + i, i < count ? from + i : from, i < count ? 4 : 0);
}

template <class Source, int MT>
MLC_DEVICE void load_stage(const SignProduct& p, const Source& source, const typename Source::Row* rows,
                           typename SignTile<Source, MT>::Stage& stage, int step, int n0) {
  using Tile = SignTile<Source, MT>;
  constexpr int kQuads = kSignWords / 4;
  for (int i = threadIdx.x; i < Tile::kSlices * Tile::kRows * kQuads; i += kSignThreads) {
    const int quad = i % kQuads, row = i / kQuads % Tile::kRows, slice = i / kQuads / Tile::kRows;
    const int k = (step * Tile::kSlices + slice) * kSignWords + 4 * quad;
    uint32_t* to = &stage.a[slice][row][4 * quad];
    if (p.rows_aligned) {
      const uint32_t* from = k < p.words ? source.word(rows[row], k) : nullptr;
      cp_async<16>(to, from ? from : source.x, from ? 16 : 0);
      if constexpr (Source::kPadded)
        for (int e = 0; e < 4; ++e) stage.valid[slice][row][4 * quad + e] = from ? source.valid(k + e) : 0u;
    } else {
      for (int e = 0; e < 4; ++e) {
        const uint32_t* from = k + e < p.words ? source.word(rows[row], k + e) : nullptr;
        cp_async<4>(to + e, from ? from : source.x, from ? 4 : 0);
        if constexpr (Source::kPadded) stage.valid[slice][row][4 * quad + e] = from ? source.valid(k + e) : 0u;
      }
    }
  }
  constexpr int kAcross = Tile::kColumns / 4;
  for (int i = threadIdx.x; i < Tile::kSlices * kSignWords * kAcross; i += kSignThreads) {
    const int column = i % kAcross * 4, word = i / kAcross % kSignWords, slice = i / kAcross / kSignWords;
    const int k = (step * Tile::kSlices + slice) * kSignWords + word, n = n0 + column;
    const bool there = k < p.words && n / 16 < p.panels;
    const uint32_t* from = p.codes + (there ? (int64_t{n / 16} * p.words + k) * 16 + n % 16 : 0);
    copy_words(&stage.w[slice][word][column], from, there ? 4 : 0, p.codes_aligned);
  }
}

// c += differing bits of the warp's rows and columns, for a stage.
template <class Source, int MT>
MLC_DEVICE void count_stage(const SignProduct& p, const Source& source, const typename SignTile<Source, MT>::Stage& stage,
                            int step, int (&c)[MT][4][4]) {
  using Tile = SignTile<Source, MT>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int slice = warp % Tile::kSlices, column = warp / Tile::kSlices * 32;
#pragma unroll
  for (int first = 0; first < kSignWords; first += 8) {
    uint32_t set[4][2], clear[4][2], valid[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        set[i][h] = stage.w[slice][first + t + 4 * h][column + 8 * i + g];
        clear[i][h] = ~set[i][h];
      }
    if constexpr (!Source::kPadded) {
      const int k = (step * Tile::kSlices + slice) * kSignWords + first + t;
      valid[0] = valid[1] = k < p.words ? source.valid(k) : 0u;
      valid[2] = valid[3] = k + 4 < p.words ? source.valid(k + 4) : 0u;
    }
#pragma unroll
    for (int mt = 0; mt < MT; ++mt) {
      uint32_t a[4], rest[4];
      const int row = 16 * mt + lane % 16, at = first + lane / 16 * 4;
      ldmatrix(a, &stage.a[slice][row][at]);
      if constexpr (Source::kPadded) ldmatrix(valid, &stage.valid[slice][row][at]);
#pragma unroll
      for (int r = 0; r < 4; ++r) a[r] &= valid[r], rest[r] = a[r] ^ valid[r];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        mma_m16n8k256_and(c[mt][i], a, clear[i], c[mt][i]);
        mma_m16n8k256_and(c[mt][i], rest, set[i], c[mt][i]);
      }
    }
  }
}

// ((terms - 2 count) scale[n] row_scale[m]) + bias[n]: rounded after each step, as the CPU does it.
MLC_DEVICE float scaled(const SignProduct& p, int terms, int count, int m, int n) {
  float v = __fmul_rn(static_cast<float>(terms - 2 * count), p.scales[n]);
  if (p.row_scale != nullptr) v = __fmul_rn(v, p.row_scale[m]);
  return p.bias != nullptr ? __fadd_rn(v, p.bias[n]) : v;
}

MLC_DEVICE void store_result(const SignProduct& p, int m, int n, float v) {
  const int64_t at = m / p.pixels * p.image + m % p.pixels * p.pixel + n * p.column;
  switch (p.dtype) {
    case Dtype::bf16: static_cast<bf16*>(p.y)[at] = from_float<bf16>(v); break;
    case Dtype::f16: static_cast<f16*>(p.y)[at] = from_float<f16>(v); break;
    default: static_cast<float*>(p.y)[at] = v;
  }
}

// Sign k of a word is its bit 8 (k % 4) + k / 4: where lane i looks for its sign, a ballot is the word.
MLC_DEVICE int sign_of_lane(int lane) { return lane % 8 * 4 + lane / 8; }

// The warps' counts meet in shared memory, sums (kSlices, kRows, kPitch), and become results.
template <class Source, int MT>
MLC_DEVICE void finish_tile(const SignProduct& p, const int (&c)[MT][4][4], const int* terms, int* sums, int m0, int n0) {
  using Tile = SignTile<Source, MT>;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int slice = warp % Tile::kSlices, column = warp / Tile::kSlices * 32;
#pragma unroll
  for (int mt = 0; mt < MT; ++mt)
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = slice * Tile::kRows + 16 * mt + lane / 4 + e / 2 * 8;
        sums[row * Tile::kPitch + column + 8 * i + lane % 4 * 2 + e % 2] = c[mt][i][e];
      }
  __syncthreads();
  const auto result = [&](int row, int n) {
    int count = 0;
    for (int s = 0; s < Tile::kSlices; ++s) count += sums[(s * Tile::kRows + row) * Tile::kPitch + n - n0];
    return scaled(p, terms[row], count, m0 + row, n);
  };
  if (p.dtype == Dtype::i32) {
    const int groups = Tile::kColumns / 32, words = (p.N + 31) / 32;
    for (int unit = warp; unit < Tile::kRows * groups; unit += kSignThreads / 32) {
      const int row = unit / groups, first = n0 + unit % groups * 32, n = first + sign_of_lane(lane);
      const bool there = m0 + row < p.M && n < p.N;
      const uint32_t word = __ballot_sync(~0u, there && !(result(row, n) < 0.0f));
      if (lane == 0 && m0 + row < p.M && first < p.N)
        static_cast<uint32_t*>(p.y)[int64_t{m0 + row} * words + first / 32] = word;
    }
    return;
  }
  const bool planes = p.column != 1;  // neighbouring threads write neighbouring elements
  for (int i = threadIdx.x; i < Tile::kRows * Tile::kColumns; i += kSignThreads) {
    const int row = planes ? i % Tile::kRows : i / Tile::kColumns, n = n0 + (planes ? i / Tile::kRows : i % Tile::kColumns);
    if (m0 + row < p.M && n < p.N) store_result(p, m0 + row, n, result(row, n));
  }
}

template <class Source, int MT>
__global__ void __launch_bounds__(kSignThreads) binary_product(const SignProduct p, const Source source) {
  using Tile = SignTile<Source, MT>;
  MLC_DYNAMIC_SMEM(unsigned char, smem);
  __shared__ typename Source::Row rows[Tile::kRows];
  __shared__ int terms[Tile::kRows];
  auto* stages = reinterpret_cast<typename Tile::Stage*>(smem);
  const int across = (p.N + Tile::kColumns - 1) / Tile::kColumns;
  const int m0 = blockIdx.x / across * Tile::kRows, n0 = blockIdx.x % across * Tile::kColumns;
  for (int i = threadIdx.x; i < Tile::kRows; i += kSignThreads)
    rows[i] = source.row(m0 + i, p.M), terms[i] = source.terms(rows[i]);
  __syncthreads();
  constexpr int kWords = Tile::kSlices * kSignWords;
  const int steps = (p.words + kWords - 1) / kWords;
  int c[MT][4][4] = {};
  for (int s = 0; s < kSignStages - 1; ++s) {
    if (s < steps) load_stage<Source, MT>(p, source, rows, stages[s], s, n0);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kSignStages - 2>();
    __syncthreads();  // this step's stage is whole, and the last one's is free
    const int next = step + kSignStages - 1;
    if (next < steps) load_stage<Source, MT>(p, source, rows, stages[next % kSignStages], next, n0);
    cp_async_commit();
    count_stage<Source, MT>(p, source, stages[step % kSignStages], step, c);
  }
  cp_async_wait<0>();
  __syncthreads();
  finish_tile<Source, MT>(p, c, terms, reinterpret_cast<int*>(smem), m0, n0);
}

template <class Source, int MT>
void launch_tile(const char* op, const SignProduct& p, const Source& source, void* stream) {
  using Tile = SignTile<Source, MT>;
  constexpr size_t kSums = sizeof(int) * Tile::kSlices * Tile::kRows * Tile::kPitch;
  constexpr size_t kStaged = kSignStages * sizeof(typename Tile::Stage);
  const int64_t blocks = int64_t{(p.M + Tile::kRows - 1) / Tile::kRows} * ((p.N + Tile::kColumns - 1) / Tile::kColumns);
  MLC_LAUNCH((binary_product<Source, MT>), grid_of(op, blocks), dim3(kSignThreads), kSums > kStaged ? kSums : kStaged, stream,
             p, source);
}

// Few rows, or few tiles of a long K: K is cut among the warps, so that narrow blocks fill the device.
template <class Source>
void launch_product(const char* op, const SignProduct& p, const Source& source, void* stream) {
  using Wide = SignTile<Source, 4>;
  const int64_t tiles = int64_t{(p.M - 1) / Wide::kRows + 1} * ((p.N - 1) / Wide::kColumns + 1);
  const bool narrow = p.M <= 32 || (tiles < 32 && p.words >= 64);
  narrow ? launch_tile<Source, 1>(op, p, source, stream) : launch_tile<Source, 4>(op, p, source, stream);
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// What a weight and a row scale give of a product; the rest is the op's.
inline SignProduct product_of(const char* op, const SignPanels& w, int64_t M, const float* row_scale, const void* x,
                              int64_t words_of_a_tap) {
  SignProduct p{};
  p.codes = reinterpret_cast<const uint32_t*>(w.codes), p.scales = w.scales, p.row_scale = row_scale, p.bias = w.bias;
  p.M = checked_int(op, "the number of rows", M), p.N = checked_int(op, "N", w.N), p.words = checked_int(op, "K", w.words);
  p.panels = static_cast<int>(w.panels), p.pixels = p.M > 0 ? p.M : 1;
  p.codes_aligned = aligned16(p.codes), p.rows_aligned = aligned16(x) && words_of_a_tap % 4 == 0;
  return p;
}

// kWarps warps of a block share a row of x (M, K): its words, and the mean of its magnitudes.
template <class T, int kWarps>
__global__ void __launch_bounds__(kSignThreads)
    binary_pack_rows(const T* x, int64_t stride, int64_t M, int K, uint32_t* words, float* scale) {
  constexpr int kRows = kSignThreads / 32 / kWarps, kAtOnce = 4;  // loads in flight
  __shared__ float sums[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % kWarps, count = (K + 31) / 32;
  const int64_t m = int64_t{blockIdx.x} * kRows + warp / kWarps;
  if (m >= M) return;  // never one warp of a row without the others
  float total = 0.0f;
  for (int first = part; first < count; first += kAtOnce * kWarps) {
    float v[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int k = 32 * (first + j * kWarps) + sign_of_lane(lane);
      v[j] = k < K ? to_float(x[m * stride + k]) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int w = first + j * kWarps;
      const uint32_t word = __ballot_sync(~0u, 32 * w + sign_of_lane(lane) < K && !(v[j] < 0.0f));
      if (lane == 0 && w < count) words[m * count + w] = word;
      total += fabsf(v[j]);
    }
  }
  if (scale == nullptr) return;
  total = warp_sum(total);
  if constexpr (kWarps > 1) {
    if (lane == 0) sums[part] = total;
    __syncthreads();
    total = 0.0f;
    for (int i = 0; i < kWarps; ++i) total += sums[i];
  }
  if (part == 0 && lane == 0) scale[m] = total / static_cast<float>(max(K, 1));
}

inline void launch_pack_rows(const char* op, const void* x, Dtype dtype, int64_t stride, int64_t M, int64_t K, uint32_t* words,
                             float* scale, void* stream) {
  if (M == 0) return;
  const int columns = checked_int(op, "the number of signs", K);
  with_type(dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(x);
    const dim3 threads(kSignThreads);
    if (K >= 1024)
      MLC_LAUNCH((binary_pack_rows<T, 4>), grid_of(op, M), threads, 0, stream, from, stride, M, columns, words, scale);
    else
      MLC_LAUNCH((binary_pack_rows<T, 1>), grid_of(op, M, 4), threads, 0, stream, from, stride, M, columns, words, scale);
  });
}

}  // namespace
}  // namespace mlcore::cuda
