// Row-wise kernels on (R, C) tensors: how a block is laid over rows, packs of a row in registers, sums over rows. Arguments are
// those of core/row_args.h. A block is (threads a row, rows side by side); a row's threads are whole warps.
#pragma once
#include <climits>
#include <initializer_list>
#include <type_traits>

#include "core/row_args.h"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/types.h"

namespace mlcore::cuda {

// Row kernels are __launch_bounds__(kMaxRowThreads, 1): 128 registers a thread. Without the 1 the compiler aims at 64 and
// spills.
constexpr int kMaxRowThreads = 512;

// (threads a row, rows) of a block of at least block_threads. A thread keeps `packs` packs of `width` elements in registers;
// where even kMaxRowThreads threads can't keep a row, the columns beyond are read twice.
inline dim3 row_block(int64_t cols, int width, int packs, int block_threads) {
  int threads = 32;
  while (threads < kMaxRowThreads && int64_t{threads} * packs * width < cols) threads *= 2;
  return dim3(threads, threads < block_threads ? block_threads / threads : 1);
}

template <class T>
constexpr int kWidth = 16 / sizeof(T);  // elements of a 16-byte access

// Whether rows of `cols` elements of T can be read kWidth<T> at a time. Arguments left out are fine.
template <class T>
bool can_be_packed(int64_t cols, std::initializer_list<Rows> rows, std::initializer_list<const void*> vectors) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  bool ok = cols % kWidth<T> == 0;
  for (const Rows& r : rows) ok = ok && aligned(r.data) && r.stride % kWidth<T> == 0;
  for (const void* v : vectors) ok = ok && aligned(v);
  return ok;
}

// Calls body(T{}, width) with the element type that dtype names and the elements of an access, as a compile-time constant:
// kWidth<T>, or 1 where packable(T{}) is false.
template <class Packable, class Body>
void with_type_and_width(Dtype dtype, Packable&& packable, Body&& body) {
  const auto with_width = [&](auto t) {
    using T = decltype(t);
    if (packable(t)) return body(t, std::integral_constant<int, kWidth<T>>{});
    body(t, std::integral_constant<int, 1>{});
  };
  switch (dtype) {
    case Dtype::bf16: return with_width(bf16{});
    case Dtype::f16: return with_width(f16{});
    default: return with_width(float{});
  }
}

// body(k, c) for every pack of V columns that this thread owns, c its first column. k < N is known at compile time and may
// index registers; the packs that aren't kept have k = N.
template <int N, int V, class F>
MLC_DEVICE void for_packs(int cols, F&& body) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    const int c = (k * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x)) * V;
    if (c < cols) body(k, c);
  }
  const int64_t step = int64_t{blockDim.x} * V;
  for (int64_t c = N * step + threadIdx.x * V; c < cols; c += step) body(N, static_cast<int>(c));
}

// The kept part of a row.
template <class T, int N, int V>
struct Kept {
  Pack<T, V> packs[N];

  MLC_DEVICE void put(int k, const Pack<T, V>& pack) {
    if (k < N) packs[k] = pack;
  }
  MLC_DEVICE Pack<T, V> get(int k, const T* otherwise) const {
    if (k >= N) return load_pack<V>(otherwise);
    Pack<T, V> pack = packs[k];
#ifdef __CUDACC__
    // Without this the compiler also keeps every element widened to float from the first pass on, in twice the registers.
    if constexpr (sizeof(T) == 2 && V > 1)
      for (int i = 0; i < V / 2; ++i) asm("" : "+r"(reinterpret_cast<uint32_t*>(pack.v)[i]));
#endif
    return pack;
  }
};

template <class T>
MLC_DEVICE T* row_of(const Rows& rows, int64_t r) {
  return rows.data ? static_cast<T*>(rows.data) + r * rows.stride : nullptr;
}

// Elements [c, c + V) of a weight or bias of type T or float32; `absent` where there is none.
template <class T, int V>
MLC_DEVICE void load_vector(const RowVector& vector, int c, float absent, float (&out)[V]) {
  if (vector.data == nullptr) {
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = absent;
  } else if (vector.dtype == Dtype::f32) {
    const Pack<float, V> pack = load_pack<V>(static_cast<const float*>(vector.data) + c);
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = pack.v[i];
  } else {
    const Pack<T, V> pack = load_pack<V>(static_cast<const T*>(vector.data) + c);
#pragma unroll
    for (int i = 0; i < V; ++i) out[i] = to_float(pack.v[i]);
  }
}

// s[r, c..c+V): x, or x + residual rounded to T, which is then written to `out`.
template <int V, class T>
MLC_DEVICE Pack<T, V> load_sum(const T* x, const T* residual, T* out, int c) {
  Pack<T, V> s = load_pack<V>(x + c);
  if (residual == nullptr) return s;
  const Pack<T, V> added = load_pack<V>(residual + c);
#pragma unroll
  for (int i = 0; i < V; ++i) s.v[i] = from_float<T>(to_float(s.v[i]) + to_float(added.v[i]));
  store_pack(out + c, s);
  return s;
}

// A sum over the rows of this block, by column: in registers for the kept packs, in `partial` (C, of this block alone) for the
// others. Without a partial it does nothing.
template <int N, int V>
struct ColumnSum {
  float* partial;
  float sum[N][V] = {};

  MLC_DEVICE explicit ColumnSum(float* partial) : partial(partial) {}

  // first: whether this is the block's first row.
  MLC_DEVICE void add(int k, int c, bool first, const float (&terms)[V]) {
    if (partial == nullptr) return;
    if (k < N) {
#pragma unroll
      for (int i = 0; i < V; ++i) sum[k][i] += terms[i];
      return;
    }
    Pack<float, V> total = {};
    if (!first) total = load_pack<V>(partial + c);
#pragma unroll
    for (int i = 0; i < V; ++i) total.v[i] += terms[i];
    store_pack(partial + c, total);
  }

  // Adds the kept sums of the rows side by side, one after another. All threads of the block must call.
  MLC_DEVICE void finish(int cols) {
    if (partial == nullptr) return;
    for (unsigned y = 0; y < blockDim.y; ++y) {
      if (threadIdx.y == y) {
        for_packs<N, V>(cols, [&](int k, int c) {
          if (k == N) return;
          Pack<float, V> total = {};
          if (y > 0) total = load_pack<V>(partial + c);
#pragma unroll
          for (int i = 0; i < V; ++i) total.v[i] += sum[k][i];
          store_pack(partial + c, total);
        });
      }
      __syncthreads();
    }
  }
};

// Rows [begin, end) of this block when the grid cuts all rows evenly.
struct RowRange {
  int64_t begin, end;
  MLC_DEVICE explicit RowRange(int64_t rows) : begin(rows * blockIdx.x / gridDim.x), end(rows * (blockIdx.x + 1) / gridDim.x) {}
};

constexpr int kSumColumns = 32, kSumRows = 8;  // of a block of sum_partials

// out[c] = sum_p partial[p, c]: each of kSumRows threads a column adds every kSumRows-th row in order, then they are added.
template <class T>
__global__ void __launch_bounds__(kSumColumns* kSumRows) sum_partials(const float* partial, int count, int cols, T* out) {
  __shared__ float sums[kSumRows][kSumColumns];
  const int c = blockIdx.x * kSumColumns + threadIdx.x;
  float total = 0.0f;
  if (c < cols)
    for (int p = threadIdx.y; p < count; p += kSumRows) total += partial[static_cast<int64_t>(p) * cols + c];
  sums[threadIdx.y][threadIdx.x] = total;
  __syncthreads();
  if (threadIdx.y > 0 || c >= cols) return;
  for (int y = 1; y < kSumRows; ++y) total += sums[y][threadIdx.x];
  out[c] = from_float<T>(total);
}

inline void launch_sum_partials(const float* partial, int64_t count, int64_t cols, const RowVector& out, void* stream) {
  if (out.data == nullptr || cols == 0) return;
  const dim3 grid(static_cast<unsigned>((cols + kSumColumns - 1) / kSumColumns)), block(kSumColumns, kSumRows);
  with_type_and_width(
      out.dtype, [](auto) { return false; },
      [&](auto t, auto) {
        using T = decltype(t);
        MLC_LAUNCH(sum_partials<T>, grid, block, 0, stream, partial, static_cast<int>(count), static_cast<int>(cols),
                   static_cast<T*>(out.data));
      });
}

// The launch shape of a pass over rows: columns fit an int, row blocks the grid.
inline void check_row_shape(const char* op, const RowArgs& args) {
  require(args.cols <= INT_MAX / 2, op, ": rows of ", args.cols, " elements; the CUDA kernels take at most ", INT_MAX / 2);
  require(args.rows <= INT_MAX, op, ": ", args.rows, " rows; the CUDA kernels take at most ", INT_MAX);
}

// The number of row blocks P that the scratch of a weight gradient has been given: (..., P, C) float32, 1 <= P <= R.
inline int64_t row_blocks_of(const char* op, const Tensor& partial, const RowArgs& args) {
  const int64_t count = partial.rank() < 2 ? 0 : partial.size(-2);
  require(count <= args.rows && (count >= 1 || args.rows == 0), op, ": partial must have between 1 and R = ", args.rows,
          " row blocks; got shape ", partial.shape_text());
  return count;
}

}  // namespace mlcore::cuda
