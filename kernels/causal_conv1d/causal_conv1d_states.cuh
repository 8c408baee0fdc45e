// The CUDA kernels of causal_conv1d that read and write states: the final one, the initial one's gradient, and the update of
// decoding. They are small: a thread or a warp works alone.
#pragma once
#include "causal_conv1d/causal_conv1d.cuh"

namespace mlcore::cuda {
namespace {

struct Update {
  Signal x, y, state;
  const float *weight, *bias;
  const int32_t *position, *slots;
  int64_t B, rows;
  int C, T, S, width;
  Activation activation;
};

// final[n, c, i]: one element a thread.
template <class T>
__global__ void __launch_bounds__(kThreads) causal_conv1d_final(Conv p) {
  const int back = p.width - 1;
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= p.N * p.C * back) return;
  const int64_t n = index / back / p.C;
  const int c = static_cast<int>(index / back % p.C), i = static_cast<int>(index % back);
  const Sequence s = sequence_at(p, n);
  const int64_t b = p.cu ? 0 : n;
  const int t = s.end - back + i;
  T v = from_float<T>(0.0f);
  if (one_run(p, b, max(t, s.begin), s.end)) {
    if (t >= s.begin)
      v = *at<const T>(p.x, b, c, t);
    else if (p.initial.data != nullptr)
      v = *at<const T>(p.initial, n, c, t - s.begin + back);
  }
  *at<T>(p.final, n, c, i) = v;
}

// dinitial[n, c, :]: one warp a sequence and channel. dpre of the first w-1 tokens goes through shared memory, 32 at a time.
template <class T>
__global__ void __launch_bounds__(32) causal_conv1d_dinitial(Conv p) {
  __shared__ float dpre[32];
  const int64_t n = blockIdx.x / p.C, b = p.cu ? 0 : n;
  const int c = static_cast<int>(blockIdx.x % p.C), back = p.width - 1;
  const float* weight = p.weight + int64_t{c} * p.width;
  const Sequence s = sequence_at(p, n);
  const int last = min(s.begin + back, s.end);
  for (int first = 0; first < back; first += 32) {
    const int i = first + static_cast<int>(threadIdx.x);
    float total = 0.0f;
    for (int base = s.begin; base < last; base += 32) {
      const int u = base + static_cast<int>(threadIdx.x);
      float d = 0.0f;
      const Cut cut = u < last ? find_cut(p, b, u) : Cut{kNoHistory, kPadding};
      if (cut.state == n) {
        d = value<T>(p.dy, b, c, u);
        if (p.activation != Activation::none) {
          float pre = p.bias != nullptr ? p.bias[c] : 0.0f;
          for (int j = 0; j < p.width; ++j) pre += weight[p.width - 1 - j] * history<T>(p, cut, b, c, u - j);
          d *= slope(p.activation, pre);
        }
      }
      __syncthreads();
      dpre[threadIdx.x] = d;
      __syncthreads();
      for (int k = 0; k < 32; ++k) {
        const int j = base + k - (s.begin - back + i);
        if (i < back && base + k < last && j < p.width) total += weight[p.width - 1 - j] * dpre[k];
      }
    }
    if (i >= back) continue;
    const int kept = s.begin + i - s.end;  // its place in the final state
    if (p.dfinal.data != nullptr && kept >= 0 && one_run(p, b, s.begin, s.end)) total += value<T>(p.dfinal, n, c, kept);
    *at<T>(p.dinitial, n, c, i) = from_float<T>(total);
  }
}

// One channel of one row a thread. A slot that state doesn't have gives NaN.
template <class T>
__global__ void __launch_bounds__(kThreads) causal_conv1d_update(Update p) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= p.B * p.C) return;
  const int64_t b = index / p.C, slot = p.slots != nullptr ? p.slots[b] : b;
  const int c = static_cast<int>(index % p.C);
  if (slot < 0 || slot >= p.rows) {
    for (int t = 0; t < p.T; ++t) *at<T>(p.y, b, c, t) = from_float<T>(slot < 0 ? 0.0f : NAN);
    return;
  }
  const bool ring = p.position != nullptr;
  const int first = ring ? (p.position[b] % p.S + p.S) % p.S : 0;
  const auto place = [&](int t) { return ring ? ((first + t) % p.S + p.S) % p.S : p.S + t; };  // of token t, t < 0
  for (int t = 0; t < p.T; ++t) {
    float pre = p.bias != nullptr ? p.bias[c] : 0.0f;
    for (int k = 0; k < p.width; ++k) {
      const int s = t - (p.width - 1) + k;
      pre += p.weight[int64_t{c} * p.width + k] * (s >= 0 ? value<T>(p.x, b, c, s) : value<T>(p.state, slot, c, place(s)));
    }
    *at<T>(p.y, b, c, t) = from_float<T>(activate(p.activation, pre));
  }
  if (ring) {
    for (int t = max(0, p.T - p.S); t < p.T; ++t) *at<T>(p.state, slot, c, place(t)) = *at<const T>(p.x, b, c, t);
  } else {
    for (int i = 0; i < p.S; ++i)
      *at<T>(p.state, slot, c, i) =
          i + p.T < p.S ? *at<const T>(p.state, slot, c, i + p.T) : *at<const T>(p.x, b, c, i + p.T - p.S);
  }
}

}  // namespace
}  // namespace mlcore::cuda
