// The CUDA kernels of aft and their launchers; the equations are in aft.h, the parts of the kernels in aft_cuda.cuh. Everything
// outside of a band comes as sums over groups of sources (README.md: How). The same text runs on the CPU in tests.
#include <algorithm>

#include "aft/aft.h"
#include "aft/aft_cuda.cuh"
#include "cuda/dispatch.h"

namespace mlcore::cuda {
namespace {

constexpr const char* kOp = "aft";

// The sum over one group of sources for one feature a thread, into its place for aft_scan.
template <class T, bool Backward>
__global__ void __launch_bounds__(kThreads) aft_group_sums(const Aft p) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, group = index / p.D % p.groups;
  const int64_t item = index / p.D / p.groups;
  const int d = static_cast<int>(index % p.D), first = static_cast<int>(group) * kTile;
  if (item >= int64_t{p.B} * p.H) return;
  const int last = min(first + kTile, p.sources);
  RunningSum s;
  for (int i = first; i < last; ++i) s.peak = fmaxf(load_source<T, Backward>(p, item, i, d).z, s.peak);
  for (int begin = first; begin < last; begin += 8) {  // sums of sums lose less
    float n1 = 0.0f, n2 = 0.0f;
    for (int i = begin; i < min(begin + 8, last); ++i) {
      const Source x = load_source<T, Backward>(p, item, i, d);
      const float e = expf(x.z - s.peak);
      n1 += e * x.p1, n2 += e * x.p2;
    }
    s.n1 += n1, s.n2 += n2;
  }
  p.ahead != nullptr ? store_sum(p, p.ahead, item, group + 1, d, s) : store_sum(p, p.behind, item, group, d, s);
}

// Sums over groups become sums over all groups before (in ahead) and from a group on (in behind): one feature a thread.
__global__ void __launch_bounds__(kThreads) aft_scan(const Aft p) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x, item = index / p.D;
  const int d = static_cast<int>(index % p.D);
  if (item >= int64_t{p.B} * p.H) return;
  if (p.behind != nullptr) {
    RunningSum s;
    store_sum(p, p.behind, item, p.groups, d, s);
    for (int g = p.groups - 1; g >= 0; --g) {
      s.add(p.ahead != nullptr ? load_sum(p, p.ahead, item, g + 1, d) : load_sum(p, p.behind, item, g, d));
      store_sum(p, p.behind, item, g, d, s);
    }
  }
  if (p.ahead == nullptr) return;
  RunningSum s;
  store_sum(p, p.ahead, item, 0, d, s);
  for (int g = 1; g <= p.groups; ++g) {
    s.add(load_sum(p, p.ahead, item, g, d));
    store_sum(p, p.ahead, item, g, d, s);
  }
}

// A block owns kTile sinks of an item by kTile features: o, or with Backward dk and dv.
template <class T, bool Backward>
__global__ void __launch_bounds__(kThreads) aft_gather(const Aft p) {
  __shared__ Near near;
  const int lane = threadIdx.x % kTile, row = threadIdx.x / kTile * kEach, tiles = (p.sinks + kTile - 1) / kTile;
  const int d = static_cast<int>(blockIdx.x % p.chunks) * kTile + lane;
  const int x = static_cast<int>(blockIdx.x / p.chunks % tiles) * kTile;
  const int64_t item = blockIdx.x / p.chunks / tiles, b = item / p.H, h = item % p.H;
  int begin, end;
  near_range<Backward>(p, x, begin, end);
  RunningSum s[kEach];
  if (Backward)
#pragma unroll
    for (int i = 0; i < kEach; ++i) s[i].peak = x + row + i < p.sinks && d < p.D ? read<T>(p.k, b, h, x + row + i, d) : kFloor;
  for (int first = begin; first < end; first += kTile) {
    __syncthreads();
    const bool products = load_near<T, Backward>(p, item, x, first, d, near);
    products ? add_products<Backward>(near, s) : add_tile<Backward>(near, s);
  }
  const auto add_far = [&](const float* sums, int group) {
    if (sums == nullptr || d >= p.D) return;
    const RunningSum far = load_sum(p, sums, item, group, d);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (!Backward) {
        s[i].add(far);
      } else {
        const float f = expf(far.peak + s[i].peak);
        s[i].n1 += f * far.n1, s[i].n2 += f * far.n2;
      }
    }
  };
  add_far(p.ahead, begin / kTile);
  add_far(p.behind, (end + kTile - 1) / kTile);
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    if (x + row + i >= p.sinks || d >= p.D) continue;
    Backward ? finish_key<T>(p, item, x + row + i, d, s[i]) : finish_query<T>(p, item, x + row + i, d, s[i]);
  }
}

// dq = d_o sigmoid(q) (1 - sigmoid(q)) y: one element a thread.
template <class T>
__global__ void __launch_bounds__(kThreads) aft_query_gradients(const Aft p) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x, item = at / p.D / p.T, b = item / p.H, h = item % p.H;
  if (item >= int64_t{p.B} * p.H) return;
  const int d = static_cast<int>(at % p.D), t = static_cast<int>(at / p.D % p.T);
  const float gate = sigmoid(read<T>(p.q, b, h, t, d));
  write<T>(p.dq, b, h, t, d, read<T>(p.d_o, b, h, t, d) * gate * p.y[at] * (1.0f - gate));
}

// Queries and the keys that meet them in a tile of the bias, by features: with a band the tile's columns are diagonals.
struct Pairs {
  float z[kTile][kTile], p1[kTile][kTile], p2[kTile][kTile], k[2 * kTile][kTile + 1], v[2 * kTile][kTile + 1];
  float high[kWarps][kTile], low[kWarps][kTile];
  bool wrong[kWarps];
};

// True where the keys of a feature lie near each other: then k and v are multiplied with exp(k) relative to the largest, and
// queries with exp(z) relative to e^z of a row, so that a pair takes one exponential for all features.
template <class T>
MLC_DEVICE bool load_pairs(const Aft& p, int64_t item, int t0, int j0, int d, Pairs& pairs) {
  constexpr int kKeys = 2 * kTile / kWarps;
  const int lane = threadIdx.x % kTile, warp = threadIdx.x / kTile, count = p.banded ? 2 * kTile : kTile;
  Source key[kKeys], query[kEach];
  float high = -INFINITY, low = INFINITY, reach;
  bool wrong = false;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int m = warp + i * kWarps, j = j0 + m;
    if (d >= p.D || m >= count || j < 0 || j >= p.S) continue;
    key[i] = load_source<T, false>(p, item, j, d);
    high = fmaxf(high, key[i].z), low = fminf(low, key[i].z);
    wrong = wrong || !(key[i].z < INFINITY && fabsf(key[i].p1) < INFINITY);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int t = t0 + warp + i * kWarps;
    if (d >= p.D || t >= p.T) continue;
    query[i] = load_source<T, true>(p, item, t, d);
    wrong = wrong || !(query[i].z < INFINITY && fabsf(query[i].p1) < INFINITY && fabsf(query[i].p2) < INFINITY);
  }
  pairs.high[warp][lane] = high, pairs.low[warp][lane] = low;
  wrong = __any_sync(kFullWarp, wrong);
  if (lane == 0) pairs.wrong[warp] = wrong;
  __syncthreads();
  const float top = column_top(pairs.high, pairs.low, reach);
  for (int v = 0; v < kWarps; ++v) wrong = wrong || pairs.wrong[v];
  const bool products = !wrong && reach <= kReach;
#pragma unroll
  for (int i = 0; i < kKeys; ++i) {
    const int m = warp + i * kWarps;
    const float e = expf(key[i].z - top);
    pairs.k[m][lane] = products ? e : key[i].z, pairs.v[m][lane] = products ? e * key[i].p1 : key[i].p1;
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int m = warp + i * kWarps;
    const float z = query[i].z + top, row_top = fmaxf(warp_max(z), kFloor),
                e = products ? expf(add3(query[i].z, top, -row_top)) : 1.0f;
    pairs.z[m][lane] = products ? row_top : query[i].z;
    pairs.p1[m][lane] = e * query[i].p1, pairs.p2[m][lane] = e * query[i].p2;
  }
  __syncthreads();
  return products;
}

// The sum over a tile of features for the pair of query row m and key row n, at weight w.
MLC_DEVICE float pair_gradient(const Pairs& pairs, int m, int n, float w, int features, bool products) {
  const float *k = pairs.k[n], *v = pairs.v[n], *p1 = pairs.p1[m], *p2 = pairs.p2[m];
  float terms = 0.0f;
  if (products) {
#pragma unroll 8
    for (int e = 0; e < kTile; ++e) terms += p1[e] * v[e] - p2[e] * k[e];
    return expf(w + pairs.z[m][0]) * terms;
  }
#pragma unroll 4
  for (int e = 0; e < features; ++e) {
    const float weighed = expf(add3(k[e], w, pairs.z[m][e])), term = weighed * (p1[e] * v[e] - p2[e]);
    terms += weighed > 0.0f ? term : weighed * 0.0f;
  }
  return terms;
}

// The gradient of kTile queries by kTile columns of the bias's head blockIdx.y, over all items that share it, in order. A bias
// without queries: sums over the tiles of a part of the queries, in partial (parts, heads, columns).
template <class T>
__global__ void __launch_bounds__(kThreads) aft_bias_gradients(const Aft p) {
  __shared__ Pairs pairs;
  const int lane = threadIdx.x % kTile, row = threadIdx.x / kTile * kEach, columns = p.banded ? p.columns : p.S;
  const int across = (columns + kTile - 1) / kTile, c0 = static_cast<int>(blockIdx.x % across) * kTile;
  const int part = static_cast<int>(blockIdx.x / across), tiles = (p.T + kTile - 1) / kTile;
  const int head = blockIdx.y, items = p.bias_heads == 1 ? p.B * p.H : p.B;
  const int first = static_cast<int>(int64_t{tiles} * part / p.parts),
            last = static_cast<int>(int64_t{tiles} * (part + 1) / p.parts);
  float sum = 0.0f;  // of a column, where the queries share it
  for (int t0 = first * kTile; t0 < last * kTile; t0 += kTile) {
    const int j0 = p.banded ? t0 + c0 - p.window + 1 : c0;
    float total[kEach] = {}, w[kEach];
    const auto key_row = [&](int i) { return p.banded ? row + i + lane : lane; };
#pragma unroll
    for (int i = 0; i < kEach; ++i) w[i] = c0 + lane < columns ? weight(p, head, t0 + row + i, j0 + key_row(i)) : -INFINITY;
    for (int n = 0; n < items; ++n) {
      const int64_t item = p.bias_heads == 1 ? n : int64_t{n} * p.H + head;
      for (int d0 = 0; d0 < p.D; d0 += kTile) {
        __syncthreads();
        const bool products = load_pairs<T>(p, item, t0, j0, d0 + lane, pairs);
#pragma unroll
        for (int i = 0; i < kEach; ++i)
          if (w[i] != -INFINITY) total[i] += pair_gradient(pairs, row + i, key_row(i), w[i], min(kTile, p.D - d0), products);
      }
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      sum += total[i];
      const int t = t0 + row + i;
      if (p.partial == nullptr && t < p.T && c0 + lane < columns)
        p.dbias[head * p.bias_sh + t * p.bias_st + c0 + lane] = total[i];
    }
  }
  if (p.partial == nullptr) return;
  float* sums = &pairs.z[0][0];  // (kWarps, kTile)
  __syncthreads();
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= kTile || c0 + lane >= columns) return;
  float whole = 0.0f;
  for (int i = 0; i < kWarps; ++i) whole += sums[i * kTile + lane];
  p.partial[(int64_t{part} * p.bias_heads + head) * columns + c0 + lane] = whole;
}

__global__ void __launch_bounds__(kThreads) aft_sum_parts(const float* partial, int parts, int64_t size, float* dbias) {
  const int64_t at = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (at >= size) return;
  float total = 0.0f;
  for (int part = 0; part < parts; ++part) total += partial[part * size + at];
  dbias[at] = total;
}

struct Problem {
  Aft p{};
  Dtype dtype;

  Problem(const DLTensor* q_, const DLTensor* k_, const DLTensor* v_, const DLTensor* bias_, int64_t window, int64_t causal,
          bool backward) {
    const Tensor q(q_, kOp, "q"), k(k_, kOp, "k"), v(v_, kOp, "v"), bias(bias_, kOp, "bias");
    q.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B, H, T, D)");
    k.on(kDLCUDA).rank_is(4, "(B, H, S, D)");
    dtype = q.dtype();
    p.B = checked_int(kOp, "B", q.size(0)), p.H = checked_int(kOp, "H", q.size(1)), p.T = checked_int(kOp, "T", q.size(2));
    p.D = checked_int(kOp, "D", q.size(3)), p.S = checked_int(kOp, "S", k.size(2)), p.causal = causal != 0;
    require(p.D >= 1, kOp, ": D must be at least 1; got ", p.D);
    checked_int(kOp, "B * H", q.size(0) * q.size(1));
    p.q = rows(q, p.T), p.k = rows(k, p.S), p.v = rows(v, p.S);
    require(!p.causal || p.S == p.T, kOp, ": causal needs as many keys as queries; got ", p.S, " and ", p.T);
    require(window >= 0, kOp, ": window must not be negative; got ", window);
    require(window == 0 || bias.present(), kOp, ": window needs bias");
    p.window = checked_int(kOp, "window", window), p.banded = window > 0 || !bias.present();
    p.columns = window == 0 ? 0 : p.causal ? p.window : 2 * p.window - 1;
    p.sources = backward ? p.T : p.S, p.sinks = backward ? p.S : p.T;
    p.groups = (p.sources + kTile - 1) / kTile, p.chunks = (p.D + kTile - 1) / kTile;
    if (!bias.present()) return;
    bias.on(kDLCUDA).rank_at_least(2);
    p.bias_heads = checked_int(kOp, "the bias's heads", bias.size(0));
    require(p.bias_heads == 1 || p.bias_heads == p.H, kOp, ": bias must be for 1 or H = ", p.H, " heads; got ", p.bias_heads);
    p.bias = bias_data(bias), p.bias_sh = bias.stride(0), p.bias_st = bias.rank() == 3 ? bias.stride(1) : 0;
  }

  Tokens rows(const Tensor& x, int64_t count) const {
    x.on(kDLCUDA).dtype_in({dtype}).shape_is({p.B, p.H, count, p.D}, count == p.S ? "(B, H, S, D)" : "(B, H, T, D)");
    return tokens(x);
  }
  float* bias_data(const Tensor& x) const {
    const bool shared = p.banded && x.on(kDLCUDA).rank() == 2;
    const int64_t columns = p.banded ? p.columns : p.S;
    shared ? x.shape_is({p.bias_heads, columns}, "(1 or H, columns of the window)")
           : x.shape_is({p.bias_heads, p.T, columns}, p.banded ? "(1 or H, T, columns of the window)" : "(1 or H, T, S)");
    return x.on(kDLCUDA).dtype_in({Dtype::f32}).contiguous().data<float>();
  }
  float* statistic(const Tensor& x) const {
    if (!x.present()) return nullptr;
    return x.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({p.B, p.H, p.T, p.D}, "(B, H, T, D)").contiguous().data<float>();
  }
  int64_t items() const { return int64_t{p.B} * p.H; }
  bool shared_bias_gradient() const { return p.dbias != nullptr && p.window > 0 && p.bias_st == 0; }

  // Where the sums over groups stand in `work`, and then those of the bias's gradient.
  void place(const Tensor& work, bool backward) {
    const bool far = p.banded, ahead = far && !(p.causal && backward), behind = far && (p.causal ? backward : p.window > 0);
    const int64_t each = items() * (p.groups + 1) * 3 * p.D;
    p.parts = (p.T + kTile - 1) / kTile;
    if (shared_bias_gradient()) p.parts = std::clamp(p.parts, 1, kMaxParts);
    const int64_t partial = shared_bias_gradient() ? int64_t{p.parts} * p.bias_heads * p.columns : 0;
    const int64_t need = std::max((ahead + behind) * each, partial);
    float* data =
        need == 0 ? nullptr : work.on(kDLCUDA).dtype_in({Dtype::f32}).rank_is(1, "(floats)").contiguous().data<float>();
    require(need == 0 || work.numel() >= need, kOp, ": work must have ", need, " elements; got ", need ? work.numel() : 0);
    p.ahead = ahead ? data : nullptr, p.behind = behind ? data + (ahead ? each : 0) : nullptr;
    p.partial = partial > 0 ? data : nullptr;
  }

  template <bool Backward>
  void launch_gather(void* stream) const {
    const int64_t blocks = items() * p.chunks * ((p.sinks + kTile - 1) / kTile);
    with_type(dtype, [&](auto t) {
      using T = decltype(t);
      if (p.groups > 0 && (p.ahead || p.behind))
        MLC_LAUNCH((aft_group_sums<T, Backward>), grid_of(kOp, items() * p.groups * p.D, kThreads), dim3(kThreads), 0, stream,
                   p);
      if (p.ahead || p.behind) MLC_LAUNCH(aft_scan, grid_of(kOp, items() * p.D, kThreads), dim3(kThreads), 0, stream, p);
      if (blocks > 0) MLC_LAUNCH((aft_gather<T, Backward>), grid_of(kOp, blocks), dim3(kThreads), 0, stream, p);
    });
  }

  void launch_bias_gradients(void* stream) const {
    const int columns = p.banded ? p.columns : p.S, across = (columns + kTile - 1) / kTile;
    dim3 grid = grid_of(kOp, int64_t{across} * p.parts);
    grid.y = p.bias_heads;
    require(p.bias_heads <= 65535, kOp, ": bias must have at most 65535 heads; got ", p.bias_heads);
    if (grid.x == 0 || grid.y == 0) return;
    with_type(dtype, [&](auto t) { MLC_LAUNCH((aft_bias_gradients<decltype(t)>), grid, dim3(kThreads), 0, stream, p); });
    if (p.partial == nullptr) return;
    const int64_t size = int64_t{p.bias_heads} * columns;
    MLC_LAUNCH(aft_sum_parts, grid_of(kOp, size, kThreads), dim3(kThreads), 0, stream, p.partial, p.parts, size, p.dbias);
  }
};

void fwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias, int64_t window, int64_t causal,
         const DLTensor* o_, const DLTensor* y_, const DLTensor* den_, const DLTensor* peak_, const DLTensor* work,
         void* stream) {
  Problem problem(q, k, v, bias, window, causal, false);
  Aft& p = problem.p;
  const Tensor o(o_, kOp, "o"), y(y_, kOp, "y"), den(den_, kOp, "den"), peak(peak_, kOp, "peak");
  p.o = problem.rows(o, p.T);
  p.y = problem.statistic(y), p.den = problem.statistic(den), p.peak = problem.statistic(peak);
  require(y.present() == den.present() && y.present() == peak.present(), kOp, ": y, den and peak go together");
  if (problem.items() * p.T == 0) return;
  problem.place(Tensor(work, kOp, "work"), false);
  const DeviceGuard device(q->device.device_id);
  problem.launch_gather<false>(stream);
}

void bwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias, int64_t window, int64_t causal,
         const DLTensor* y_, const DLTensor* den_, const DLTensor* peak_, const DLTensor* d_o_, const DLTensor* dq_,
         const DLTensor* dk_, const DLTensor* dv_, const DLTensor* dbias_, const DLTensor* work, void* stream) {
  Problem problem(q, k, v, bias, window, causal, true);
  Aft& p = problem.p;
  const Tensor y(y_, kOp, "y"), den(den_, kOp, "den"), peak(peak_, kOp, "peak"), d_o(d_o_, kOp, "d_o"), dq(dq_, kOp, "dq"),
      dk(dk_, kOp, "dk"), dv(dv_, kOp, "dv"), dbias(dbias_, kOp, "dbias");
  p.d_o = problem.rows(d_o, p.T), p.dq = problem.rows(dq, p.T);
  p.dk = problem.rows(dk, p.S), p.dv = problem.rows(dv, p.S);
  require(y.present() && den.present() && peak.present(), kOp, ": y, den and peak must be given");
  p.y = problem.statistic(y), p.den = problem.statistic(den), p.peak = problem.statistic(peak);
  require(!dbias.present() || p.bias != nullptr, kOp, ": dbias needs bias");
  if (dbias.present()) p.dbias = problem.bias_data(dbias);
  if (problem.items() * (p.T + p.S) == 0 && p.dbias == nullptr) return;
  problem.place(Tensor(work, kOp, "work"), true);
  const DeviceGuard device(q->device.device_id);
  if (problem.items() * p.T > 0)
    with_type(problem.dtype, [&](auto t) {
      MLC_LAUNCH((aft_query_gradients<decltype(t)>), grid_of(kOp, problem.items() * p.T * p.D, kThreads), dim3(kThreads), 0,
                 stream, p);
    });
  if (problem.items() > 0) problem.launch_gather<true>(stream);
  if (p.dbias != nullptr) problem.launch_bias_gradients(stream);
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_aft_fwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias, int64_t window,
                             int64_t causal, DLTensor* o, DLTensor* y, DLTensor* den, DLTensor* peak, DLTensor* work,
                             void* stream) {
  return mlcore::guard([&] { mlcore::cuda::fwd(q, k, v, bias, window, causal, o, y, den, peak, work, stream); });
}

MLC_API int mlc_cuda_aft_bwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias, int64_t window,
                             int64_t causal, const DLTensor* y, const DLTensor* den, const DLTensor* peak, const DLTensor* d_o,
                             DLTensor* dq, DLTensor* dk, DLTensor* dv, DLTensor* dbias, DLTensor* work, void* stream) {
  return mlcore::guard(
      [&] { mlcore::cuda::bwd(q, k, v, bias, window, causal, y, den, peak, d_o, dq, dk, dv, dbias, work, stream); });
}
