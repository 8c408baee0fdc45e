// The CUDA kernels of causal_conv1d; the launchers are causal_conv1d.cu. A thread holds NT tokens of NC channels and rolls a
// window over the taps, four at a time, so that one text serves every width. Sequences and runs are found on the device:
// cu_seqlens and seq_idx are never read by the host.
#pragma once
#include <climits>

#include "causal_conv1d/causal_conv1d_kernels.h"
#include "cuda/conv.cuh"

namespace mlcore::cuda {
namespace {

constexpr int kThreads = 256, kHalo = 16;  // kHalo: tokens after a tile whose dpre is computed with it
constexpr int kNoHistory = INT_MAX, kPadding = -2;

struct Conv {
  Signal x, y, initial, final, dy, dx, dfinal, dinitial;
  const float *weight, *bias;  // (C, w), (C)
  float* partial;
  const int32_t *ids, *cu;
  int64_t B, N, blocks, row_tiles, groups;  // blocks of tiles, tiles a row, channel groups
  int C, T, width;
  Activation activation;
  bool packed;  // every signal can be accessed by packs
};

// How a block lies over a tile: X threads side by side over channels, the rest over tokens.
// Backward holds more in registers, so it takes one channel.
template <class T_, bool InTime_, bool Backward = false>
struct Layout {
  using T = T_;
  static constexpr bool InTime = InTime_;
  static constexpr int NC = InTime || Backward ? 1 : 2, NT = InTime ? 16 / sizeof(T) : 8, X = InTime ? 1 : 32;
  static constexpr int kChannels = X * NC, kMaxTokens = kThreads / X * NT, kMaxChunk = kMaxTokens + kHalo;
  static MLC_DEVICE int rows() { return static_cast<int>(blockDim.x) / X; }
};

// Where token t's history begins, and the sequence whose initial state continues it to the left (else negative).
struct Cut {
  int start, state;
};
struct Sequence {
  int64_t n;
  int begin, end;
};

MLC_DEVICE Sequence sequence_at(const Conv& p, int64_t n) {
  if (p.cu == nullptr) return {n, 0, p.T};
  const int begin = min(max(p.cu[n], 0), p.T);
  return {n, begin, min(max(p.cu[n + 1], begin), p.T)};
}
MLC_DEVICE Sequence sequence_of(const Conv& p, int64_t b, int t) {
  if (p.cu == nullptr) return {b, 0, p.T};
  int64_t low = 0, high = p.N;  // cu[low] <= t < cu[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (p.cu[middle] <= t)
      low = middle;
    else
      high = middle;
  }
  return sequence_at(p, low);
}

MLC_DEVICE Cut find_cut(const Conv& p, int64_t b, int t) {
  if (t >= p.T) return {kNoHistory, kPadding};
  const Sequence sequence = sequence_of(p, b, t);
  const int least = max(sequence.begin, t - (p.width - 1));
  int start = least;
  if (p.ids != nullptr) {
    const int32_t* ids = p.ids + b * p.T;
    if (ids[t] < 0) return {kNoHistory, kPadding};
    for (start = t; start > least && ids[start - 1] == ids[start]; --start) {
    }
  }
  return {start, start == sequence.begin && t - (p.width - 1) < start ? static_cast<int>(sequence.n) : -1};
}

// Whether tokens [t, end) of row b are one run.
MLC_DEVICE bool one_run(const Conv& p, int64_t b, int t, int end) {
  if (p.ids != nullptr)
    for (const int32_t* ids = p.ids + b * p.T; t + 1 < end; ++t)
      if (ids[t] != ids[t + 1]) return false;
  return true;
}

template <class T>
MLC_DEVICE T* at(const Signal& s, int64_t b, int64_t c, int64_t t) {
  return static_cast<T*>(s.data) + b * s.b + c * s.c + t * s.t;
}
template <class T>
MLC_DEVICE float value(const Signal& s, int64_t b, int64_t c, int64_t t) {
  return s.data != nullptr ? to_float(*at<const T>(s, b, c, t)) : 0.0f;
}

// h at token s for an output with this cut, in any layout.
template <class T>
MLC_DEVICE float history(const Conv& p, const Cut& cut, int64_t b, int c, int s) {
  if (s >= cut.start) return value<T>(p.x, b, c, s);
  if (cut.state < 0 || s < cut.start - (p.width - 1)) return 0.0f;
  return value<T>(p.initial, cut.state, c, s - cut.start + p.width - 1);
}

MLC_DEVICE float activate(Activation a, float v) {
  if (a == Activation::silu) return v / (1.0f + expf(-v));
  if (a == Activation::gelu) return 0.5f * v * (1.0f + erff(v * 0.70710678f));
  return v;
}
MLC_DEVICE float slope(Activation a, float v) {
  if (a == Activation::silu) {
    const float s = 1.0f / (1.0f + expf(-v));
    return s * (1.0f + v * (1.0f - s));
  }
  if (a == Activation::gelu) return 0.5f * (1.0f + erff(v * 0.70710678f)) + v * 0.39894228f * expf(-0.5f * v * v);
  return 1.0f;
}

template <class L>
using Window = float[L::NC][L::NT + 4];
template <class L>
using Outputs = float[L::NC][L::NT];

// window[.][at .. at + 4) = tokens [s, s + 4) of channels from c on; 0 outside of the row. Left of it stands the initial state
// of a row without cuts.
template <class L>
MLC_DEVICE void load_quad(const Conv& p, const Signal& from, bool states, int64_t b, int c, int s, Window<L>& window,
                          int at_token) {
  using T = typename L::T;
  const bool inside = s >= 0 && s + 4 <= p.T && c + L::NC <= p.C && p.packed;
  if (L::InTime && inside && s % 4 == 0) {
    const Pack<T, 4> pack = load_pack<4>(at<const T>(from, b, c, s));
#pragma unroll
    for (int i = 0; i < 4; ++i) window[0][at_token + i] = to_float(pack.v[i]);
  } else if (!L::InTime && inside) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pack<T, L::NC> pack = load_pack<L::NC>(at<const T>(from, b, c, s + i));
#pragma unroll
      for (int n = 0; n < L::NC; ++n) window[n][at_token + i] = to_float(pack.v[n]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < L::NC; ++n) {
        float v = 0.0f;
        if (c + n < p.C && s + i < p.T) {
          if (s + i >= 0)
            v = value<T>(from, b, c + n, s + i);
          else if (states && s + i + p.width - 1 >= 0)
            v = value<T>(p.initial, b, c + n, s + i + p.width - 1);
        }
        window[n][at_token + i] = v;
      }
    }
  }
}

template <class L, bool Cuts>
MLC_DEVICE void first_window(const Conv& p, int64_t b, int c, int t, Window<L>& window) {
#pragma unroll
  for (int i = -4; i < L::NT; i += 4) load_quad<L>(p, p.x, !Cuts, b, c, t + i, window, 4 + i);
}
// To the next four taps: four tokens to the left.
template <class L, bool Cuts>
MLC_DEVICE void next_window(const Conv& p, int64_t b, int c, int t, int tap, Window<L>& window) {
#pragma unroll
  for (int n = 0; n < L::NC; ++n)
#pragma unroll
    for (int i = L::NT - 1; i >= 0; --i) window[n][i + 4] = window[n][i];
  load_quad<L>(p, p.x, !Cuts, b, c, t - tap - 4, window, 0);
}

// pre of tokens [t, t + NT), channels from c on. cuts: of these tokens.
template <class L, bool Cuts>
MLC_DEVICE void convolve(const Conv& p, int64_t b, int c, int t, const Cut* cuts, Outputs<L>& pre) {
  using T = typename L::T;
#pragma unroll
  for (int n = 0; n < L::NC; ++n)
#pragma unroll
    for (int i = 0; i < L::NT; ++i) pre[n][i] = p.bias != nullptr && c + n < p.C ? p.bias[c + n] : 0.0f;
  Window<L> window;  // tokens t - tap - 4 .. t - tap + NT - 1
  first_window<L, Cuts>(p, b, c, t, window);
  for (int tap = 0; tap < p.width; tap += 4) {
    if (tap > 0) next_window<L, Cuts>(p, b, c, t, tap, window);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (tap + k >= p.width) break;
#pragma unroll
      for (int n = 0; n < L::NC; ++n) {
        const float w = c + n < p.C ? p.weight[int64_t{c + n} * p.width + p.width - 1 - tap - k] : 0.0f;
#pragma unroll
        for (int i = 0; i < L::NT; ++i)
          if (!Cuts || t + i - tap - k >= cuts[i].start) pre[n][i] += w * window[n][4 + i - k];
      }
    }
  }
  if (!Cuts || p.initial.data == nullptr) return;
#pragma unroll
  for (int i = 0; i < L::NT; ++i) {
    const Cut cut = cuts[i];
    for (int j = t + i - cut.start + 1; cut.state >= 0 && j < p.width; ++j)
#pragma unroll
      for (int n = 0; n < L::NC; ++n)
        if (c + n < p.C)
          pre[n][i] += p.weight[int64_t{c + n} * p.width + p.width - 1 - j] * history<T>(p, cut, b, c + n, t + i - j);
  }
}

template <class L>
MLC_DEVICE void store(const Conv& p, const Signal& to, int64_t b, int c, int t, const Outputs<L>& out) {
  using T = typename L::T;
  constexpr int kPack = L::InTime ? 4 : L::NC;
  const bool inside = p.packed && t + L::NT <= p.T && c + L::NC <= p.C;
#pragma unroll
  for (int i = 0; i < L::NT; i += L::InTime ? 4 : 1) {
    Pack<T, kPack> pack;
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      pack.v[k] = from_float<T>(L::InTime ? out[0][i + (L::InTime ? k : 0)] : out[L::InTime ? 0 : k][i]);
    if (inside) {
      store_pack(at<T>(to, b, c, t + i), pack);
    } else {
#pragma unroll
      for (int k = 0; k < kPack; ++k) {
        const int token = L::InTime ? t + i + k : t + i, channel = L::InTime ? c : c + k;
        if (token < p.T && channel < p.C) *at<T>(to, b, channel, token) = pack.v[k];
      }
    }
  }
}

template <class L>
MLC_DEVICE void find_cuts(const Conv& p, int64_t b, int first, int count, Cut* cuts) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) cuts[i] = find_cut(p, b, first + i);
}

// One tile a block.
template <class T, bool InTime, bool Cuts>
__global__ void __launch_bounds__(kThreads) causal_conv1d_fwd(Conv p) {
  using L = Layout<T, InTime>;
  __shared__ Cut cuts[Cuts ? L::kMaxTokens : 1];
  const int row = threadIdx.x / L::X, tokens = L::rows() * L::NT;
  const int64_t tile = blockIdx.x / p.groups, b = tile / p.row_tiles;
  const int c = static_cast<int>(blockIdx.x % p.groups) * L::kChannels + threadIdx.x % L::X * L::NC;
  const int begin = static_cast<int>(tile % p.row_tiles) * tokens, t = begin + row * L::NT;
  if constexpr (Cuts) {
    find_cuts<L>(p, b, begin, tokens, cuts);
    __syncthreads();
  }
  if (c >= p.C || t >= p.T) return;
  const Cut* own = Cuts ? cuts + row * L::NT : nullptr;
  Outputs<L> y;
  convolve<L, Cuts>(p, b, c, t, own, y);
#pragma unroll
  for (int n = 0; n < L::NC; ++n)
#pragma unroll
    for (int i = 0; i < L::NT; ++i) y[n][i] = Cuts && own[i].state == kPadding ? 0.0f : activate(p.activation, y[n][i]);
  store<L>(p, p.y, b, c, t, y);
}

// dpre of tokens [t, t + NT).
template <class L, bool Cuts>
MLC_DEVICE void gradient_of_pre(const Conv& p, int64_t b, int c, int t, const Cut* cuts, Outputs<L>& dpre) {
  Window<L> dy;  // from its fifth token on
#pragma unroll
  for (int i = 0; i < L::NT; i += 4) load_quad<L>(p, p.dy, false, b, c, t + i, dy, 4 + i);
  if (p.activation != Activation::none) convolve<L, Cuts>(p, b, c, t, cuts, dpre);
#pragma unroll
  for (int n = 0; n < L::NC; ++n)
#pragma unroll
    for (int i = 0; i < L::NT; ++i) {
      const float d = p.activation == Activation::none ? dy[n][4 + i] : dy[n][4 + i] * slope(p.activation, dpre[n][i]);
      dpre[n][i] = t + i >= p.T || (Cuts && cuts[i].state == kPadding) ? 0.0f : d;
    }
}

// sums of dpre * h over this thread's tokens, for taps tap .. tap + 3 to the left of the token.
template <class L, bool Cuts>
MLC_DEVICE void add_dweight(const Conv& p, int64_t b, int c, int t, int tap, const Cut* cuts, const Window<L>& window,
                            const Outputs<L>& dpre, float (&sums)[L::NC][4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (tap + k >= p.width) break;
#pragma unroll
    for (int n = 0; n < L::NC; ++n)
#pragma unroll
      for (int i = 0; i < L::NT; ++i) {
        float h = window[n][4 + i - k];
        if (Cuts && t + i - tap - k < cuts[i].start)
          h = c + n < p.C ? history<typename L::T>(p, cuts[i], b, c + n, t + i - tap - k) : 0.0f;
        if (!Cuts || cuts[i].state != kPadding) sums[n][k] += dpre[n][i] * h;
      }
  }
}

// The sum over the block's rows of v, for the threads of row 0. All threads must call.
template <class L>
MLC_DEVICE float sum_of_rows(float v, float* scratch) {
  const int row = threadIdx.x / L::X;
  __syncthreads();
  scratch[threadIdx.x] = v;
  __syncthreads();
  for (int half = L::rows() / 2; half > 0; half /= 2) {
    if (row < half) scratch[threadIdx.x] += scratch[threadIdx.x + half * L::X];
    __syncthreads();
  }
  return scratch[threadIdx.x % L::X];
}

// partial[block, k, c] (+)= the block's sum of v.
template <class L>
MLC_DEVICE void add_partial(const Conv& p, int64_t block, int k, int c, bool first, float v, float* scratch) {
  const float total = sum_of_rows<L>(v, scratch);
  if (threadIdx.x / L::X > 0 || c >= p.C) return;
  float* out = p.partial + (block * (p.width + 1) + k) * p.C + c;
  *out = first ? total : *out + total;
}

// dx += dfinal, for the tokens of a thread.
template <class L>
MLC_DEVICE void add_dfinal(const Conv& p, int64_t b, int c, int t, Outputs<L>& dx) {
  const int back = p.width - 1;
#pragma unroll
  for (int i = 0; i < L::NT; ++i) {
    if (t + i >= p.T) break;
    const Sequence s = sequence_of(p, b, t + i);
    if (t + i < s.end - back || !one_run(p, b, t + i, s.end)) continue;
#pragma unroll
    for (int n = 0; n < L::NC; ++n)
      if (c + n < p.C) dx[n][i] += value<typename L::T>(p.dfinal, s.n, c + n, t + i - s.end + back);
  }
}

// dx and the partial sums of dweight and dbias: one channel group and one block of tiles a block.
template <class T, bool InTime, bool Cuts>
__global__ void __launch_bounds__(kThreads) causal_conv1d_bwd(Conv p) {
  using L = Layout<T, InTime, true>;
  __shared__ float dpre[L::kMaxChunk][L::kChannels];
  __shared__ Cut cuts[Cuts ? L::kMaxChunk : 1];
  __shared__ float scratch[kThreads];
  const int x = threadIdx.x % L::X * L::NC, row = threadIdx.x / L::X, tokens = L::rows() * L::NT, chunk = tokens + kHalo;
  const int64_t block = blockIdx.x / p.groups, tiles = p.B * p.row_tiles;
  const int c = static_cast<int>(blockIdx.x % p.groups) * L::kChannels + x;
  const int64_t first_tile = tiles * block / p.blocks, last_tile = tiles * (block + 1) / p.blocks;
  float dweight[L::NC][4] = {}, dbias[L::NC] = {};
  for (int64_t tile = first_tile; tile < last_tile; ++tile) {
    const int64_t b = tile / p.row_tiles;
    const int begin = static_cast<int>(tile % p.row_tiles) * tokens, t = begin + row * L::NT;
    const int last = min(begin + tokens + p.width - 1, p.T);  // of the dpre that dx needs
    Outputs<L> dx = {}, own = {};
    for (int base = begin; base < last; base += chunk) {
      const int count = (min(chunk, last - base) + L::NT - 1) / L::NT * L::NT;
      __syncthreads();  // the chunk before has been read
      if constexpr (Cuts) {
        find_cuts<L>(p, b, base, count, cuts);
        __syncthreads();
      }
      for (int i = row * L::NT; i < count; i += tokens) {
        Outputs<L> d;
        gradient_of_pre<L, Cuts>(p, b, c, base + i, Cuts ? cuts + i : nullptr, d);
#pragma unroll
        for (int n = 0; n < L::NC; ++n)
#pragma unroll
          for (int k = 0; k < L::NT; ++k) {
            dpre[i + k][x + n] = d[n][k];
            if (base == begin && i < tokens) own[n][k] = d[n][k], dbias[n] += d[n][k];
          }
        if (p.partial != nullptr && p.width <= 4 && base == begin && i < tokens) {
          Window<L> window;
          first_window<L, Cuts>(p, b, c, t, window);
          add_dweight<L, Cuts>(p, b, c, t, 0, Cuts ? cuts + i : nullptr, window, d, dweight);
        }
      }
      __syncthreads();
      for (int j = max(0, base - t - L::NT + 1); j < p.width && t + j < base + count; ++j) {
#pragma unroll
        for (int n = 0; n < L::NC; ++n) {
          const float w = c + n < p.C ? p.weight[int64_t{c + n} * p.width + p.width - 1 - j] : 0.0f;
#pragma unroll
          for (int i = 0; i < L::NT; ++i) {
            const int u = t + i + j - base;
            if (u >= 0 && u < count && (!Cuts || cuts[u].start <= t + i)) dx[n][i] += w * dpre[u][x + n];
          }
        }
      }
    }
    if (p.partial != nullptr && p.width > 4) {
      __syncthreads();
      if constexpr (Cuts) find_cuts<L>(p, b, begin, tokens, cuts);  // chunks after the first have overwritten them
      __syncthreads();
      const Cut* own_cuts = Cuts ? cuts + row * L::NT : nullptr;
      Window<L> window;
      first_window<L, Cuts>(p, b, c, t, window);
      for (int tap = 0; tap < p.width; tap += 4) {
        if (tap > 0) next_window<L, Cuts>(p, b, c, t, tap, window);
        float sums[L::NC][4] = {};
        add_dweight<L, Cuts>(p, b, c, t, tap, own_cuts, window, own, sums);
        for (int k = 0; k < min(4, p.width - tap); ++k)
#pragma unroll
          for (int n = 0; n < L::NC; ++n) {
            const float v = k == 0 ? sums[n][0] : k == 1 ? sums[n][1] : k == 2 ? sums[n][2] : sums[n][3];
            add_partial<L>(p, block, p.width - 1 - tap - k, c + n, tile == first_tile, v, scratch);
          }
      }
    }
    if (c < p.C && t < p.T) {
      if (p.dfinal.data != nullptr) add_dfinal<L>(p, b, c, t, dx);
      store<L>(p, p.dx, b, c, t, dx);
    }
  }
  if (p.partial == nullptr) return;
  const bool nothing = first_tile == last_tile;
#pragma unroll
  for (int n = 0; n < L::NC; ++n) {
    add_partial<L>(p, block, p.width, c + n, true, dbias[n], scratch);
    if (p.width <= 4) {
#pragma unroll
      for (int k = 0; k < 4; ++k)
        if (k < p.width) add_partial<L>(p, block, p.width - 1 - k, c + n, true, dweight[n][k], scratch);
    } else if (nothing) {
      for (int k = 0; k < p.width; ++k) add_partial<L>(p, block, k, c + n, true, 0.0f, scratch);
    }
  }
}

}  // namespace
}  // namespace mlcore::cuda
