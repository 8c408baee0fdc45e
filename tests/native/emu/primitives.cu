// One small kernel per primitive of csrc/cuda. tests/native/primitive_checks.py compares each with torch, in the emulator and,
// built by nvcc, on a GPU.
#include "core/tensor.h"
#include "cuda/launch.h"
#include "cuda/ptx.h"
#include "cuda/reduce.cuh"

using namespace mlcore;
using namespace mlcore::cuda;

namespace {

template <class T>
T* data(const DLTensor* t) {
  return static_cast<T*>(t->data);
}

template <class T>
__device__ uint32_t pair_at(const T* p) {
  return pack2<T>(to_float(p[0]), to_float(p[1]));
}
__device__ uint32_t bytes_at(const int8_t* p) { return *reinterpret_cast<const uint32_t*>(p); }

// a (16, K), b (8, K), c and d (16, 8); load(p) is the register of the kPer elements at p.
template <int kPer, class E, class T, class Load, class Mma>
__device__ void mma_tile(const T* a, const T* b, const E* c, E* d, Load load, Mma mma) {
  constexpr int K = 8 * kPer;
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fa[4], fb[2];
  E fc[4], fd[4];
  for (int r = 0; r < 4; ++r) fa[r] = load(a + (g + r % 2 * 8) * K + (t + r / 2 * 4) * kPer);
  for (int r = 0; r < 2; ++r) fb[r] = load(b + g * K + (t + r * 4) * kPer);
  for (int r = 0; r < 4; ++r) fc[r] = c[(g + r / 2 * 8) * 8 + 2 * t + r % 2];
  mma(fd, fa, fb, fc);
  for (int r = 0; r < 4; ++r) d[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = fd[r];
}

template <class T>
__global__ void mma16_kernel(const T* a, const T* b, const float* c, float* d) {
  mma_tile<2>(
      a, b, c, d, [](const T* p) { return pair_at(p); },
      [](float (&fd)[4], const uint32_t (&fa)[4], const uint32_t (&fb)[2], const float (&fc)[4]) {
        mma_m16n8k16<T>(fd, fa, fb, fc);
      });
}
__global__ void mma_tf32_kernel(const float* a, const float* b, const float* c, float* d) {
  mma_tile<1>(
      a, b, c, d, [](const float* p) { return to_tf32(*p); },
      [](float (&fd)[4], const uint32_t (&fa)[4], const uint32_t (&fb)[2], const float (&fc)[4]) {
        mma_m16n8k8_tf32(fd, fa, fb, fc);
      });
}
__global__ void mma_s8_kernel(const int8_t* a, const int8_t* b, const int* c, int* d) {
  mma_tile<4>(
      a, b, c, d, [](const int8_t* p) { return bytes_at(p); },
      [](int (&fd)[4], const uint32_t (&fa)[4], const uint32_t (&fb)[2], const int (&fc)[4]) {
        mma_m16n8k32_s8(fd, fa, fb, fc);
      });
}
__global__ void mma_and_kernel(const uint32_t* a, const uint32_t* b, const int* c, int* d) {
  mma_tile<1>(
      a, b, c, d, [](const uint32_t* p) { return *p; },
      [](int (&fd)[4], const uint32_t (&fa)[4], const uint32_t (&fb)[2], const int (&fc)[4]) {
        mma_m16n8k256_and(fd, fa, fb, fc);
      });
}

// x (8 N, 8) of 16-bit elements, r (N, 32)
template <int N, bool Trans>
__global__ void ldmatrix_kernel(const uint16_t* x, uint32_t* r) {
  __shared__ __align__(16) uint16_t tile[8 * N][8];
  for (int i = threadIdx.x; i < 64 * N; i += 32) tile[i / 8][i % 8] = x[i];
  __syncwarp();
  uint32_t out[N];
  ldmatrix<Trans>(out, tile[threadIdx.x % (8 * N)]);
  for (int i = 0; i < N; ++i) r[i * 32 + threadIdx.x] = out[i];
}

// Each thread copies `steps` chunks in groups of one and waits for all but the last kLeft; kLeft < 0 doesn't wait at all.
template <int Bytes, int kLeft>
__global__ void cp_async_kernel(const unsigned char* x, const int* sizes, unsigned char* y, int steps) {
  MLC_DYNAMIC_SMEM(unsigned char, tile);
  for (int s = 0; s < steps; ++s) {
    const int chunk = s * blockDim.x + threadIdx.x;
    cp_async<Bytes>(tile + chunk * Bytes, x + chunk * Bytes, sizes[chunk]);
    cp_async_commit();
  }
  if constexpr (kLeft >= 0) cp_async_wait<(kLeft > 0 ? kLeft : 0)>();
  __syncthreads();
  const int ready = steps - (kLeft > 0 ? kLeft : 0), n = ready * static_cast<int>(blockDim.x) * Bytes;
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = tile[n - 1 - i];  // written by another thread
  cp_async_wait<0>();
}

__global__ void warp_kernel(const int* x, int* y) {
  const int lane = threadIdx.x, v = x[lane];
  int row = 0;
  const auto put = [&](int value) { y[32 * row++ + lane] = value; };
  put(__shfl_sync(kFullWarp, v, 5));
  put(__shfl_sync(kFullWarp, v, 3, 8));
  put(__shfl_xor_sync(kFullWarp, v, 9));
  put(__shfl_up_sync(kFullWarp, v, 3));
  put(__shfl_up_sync(kFullWarp, v, 3, 8));
  put(__shfl_down_sync(kFullWarp, v, 5));
  put(__shfl_down_sync(kFullWarp, v, 5, 16));
  put(static_cast<int>(__ballot_sync(kFullWarp, v > 0)));
  put(__any_sync(kFullWarp, v > 1000) + 2 * __any_sync(kFullWarp, v > 0));
  put(__all_sync(kFullWarp, v > 0) + 2 * __all_sync(kFullWarp, v < 1000));
  put(__reduce_add_sync(kFullWarp, v));
  put(__reduce_max_sync(kFullWarp, v));
  put(__reduce_min_sync(kFullWarp, v));
  // The halves of the warp go separate ways.
  if (lane < 16)
    put(__shfl_xor_sync(0x0000ffffu, v, 1));
  else
    put(__reduce_add_sync(0xffff0000u, v));
}

__global__ void atomics_kernel(int* counters, float* total, int* tickets) {
  __shared__ int here;
  if (threadIdx.x == 0) here = 0;
  __syncthreads();
  atomicAdd(&here, 1);
  atomicMax(&counters[1], static_cast<int>(threadIdx.x));
  atomicMin(&counters[2], -static_cast<int>(threadIdx.x));
  atomicAdd(total, 0.5f);
  for (int seen = counters[3], old; (old = atomicCAS(&counters[3], seen, seen + 2)) != seen;) seen = old;
  tickets[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(&counters[4], 1);
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(&counters[0], here);
}

// x (threads) -> sum and max over the block and over groups of two warps, as every thread sees them: y (4, threads)
__global__ void reduce_kernel(const float* x, float* y) {
  __shared__ float scratch[32];
  const int i = threadIdx.x, n = blockDim.x;
  y[i] = block_sum(x[i], scratch);
  y[n + i] = block_max(x[i], scratch);
  y[2 * n + i] = group_reduce<Sum>(x[i], 2, scratch);
  y[3 * n + i] = warp_max<8>(x[i]);
}

template <class T>
__global__ void convert_kernel(const float* x, T* narrow, float* wide, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  narrow[i] = from_float<T>(x[i]);
  wide[i] = to_float(narrow[i]);
}

template <class F>
void with_type16(const DLTensor* t, F&& body) {
  if (dtype_of(t->dtype) == Dtype::bf16) return body(bf16{});
  body(f16{});
}

template <int Bytes>
void launch_cp_async(const DLTensor* x, const DLTensor* sizes, const DLTensor* y, int64_t left, void* stream) {
  const int threads = 32, steps = static_cast<int>(sizes->shape[0]) / threads;
  const auto run = [&](auto kernel) {
    MLC_LAUNCH(kernel, 1, threads, static_cast<size_t>(threads * steps * Bytes), stream, data<unsigned char>(x),
               data<int>(sizes), data<unsigned char>(y), steps);
  };
  if (left < 0) return run(cp_async_kernel<Bytes, -1>);
  left == 0 ? run(cp_async_kernel<Bytes, 0>) : run(cp_async_kernel<Bytes, 2>);
}

}  // namespace

MLC_API int test_mma(const DLTensor* a, const DLTensor* b, const DLTensor* c, DLTensor* d, void* stream) {
  return guard([&] {
    switch (dtype_of(a->dtype)) {
      case Dtype::f32:
        return MLC_LAUNCH(mma_tf32_kernel, 1, 32, 0, stream, data<float>(a), data<float>(b), data<float>(c), data<float>(d));
      case Dtype::i8:
        return MLC_LAUNCH(mma_s8_kernel, 1, 32, 0, stream, data<int8_t>(a), data<int8_t>(b), data<int>(c), data<int>(d));
      case Dtype::i32:
        return MLC_LAUNCH(mma_and_kernel, 1, 32, 0, stream, data<uint32_t>(a), data<uint32_t>(b), data<int>(c), data<int>(d));
      default:
        with_type16(a, [&](auto type) {
          using T = decltype(type);
          MLC_LAUNCH(mma16_kernel<T>, 1, 32, 0, stream, data<T>(a), data<T>(b), data<float>(c), data<float>(d));
        });
    }
  });
}

MLC_API int test_ldmatrix(const DLTensor* x, DLTensor* r, int64_t trans, void* stream) {
  return guard([&] {
    const auto run = [&](auto kernel) { MLC_LAUNCH(kernel, 1, 32, 0, stream, data<uint16_t>(x), data<uint32_t>(r)); };
    switch (r->shape[0]) {
      case 1: return trans ? run(ldmatrix_kernel<1, true>) : run(ldmatrix_kernel<1, false>);
      case 2: return trans ? run(ldmatrix_kernel<2, true>) : run(ldmatrix_kernel<2, false>);
      default: return trans ? run(ldmatrix_kernel<4, true>) : run(ldmatrix_kernel<4, false>);
    }
  });
}

MLC_API int test_cp_async(const DLTensor* x, const DLTensor* sizes, DLTensor* y, int64_t bytes, int64_t left, void* stream) {
  return guard([&] {
    if (bytes == 4) return launch_cp_async<4>(x, sizes, y, left, stream);
    bytes == 8 ? launch_cp_async<8>(x, sizes, y, left, stream) : launch_cp_async<16>(x, sizes, y, left, stream);
  });
}

MLC_API int test_warp(const DLTensor* x, DLTensor* y, void* stream) {
  return guard([&] { MLC_LAUNCH(warp_kernel, 1, 32, 0, stream, data<int>(x), data<int>(y)); });
}

MLC_API int test_atomics(DLTensor* counters, DLTensor* total, DLTensor* tickets, int64_t blocks, int64_t threads,
                         void* stream) {
  return guard([&] {
    MLC_LAUNCH(atomics_kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads), 0, stream, data<int>(counters),
               data<float>(total), data<int>(tickets));
  });
}

MLC_API int test_reduce(const DLTensor* x, DLTensor* y, void* stream) {
  return guard(
      [&] { MLC_LAUNCH(reduce_kernel, 1, static_cast<unsigned>(x->shape[0]), 0, stream, data<float>(x), data<float>(y)); });
}

MLC_API int test_convert(const DLTensor* x, DLTensor* narrow, DLTensor* wide, void* stream) {
  return guard([&] {
    const int n = static_cast<int>(x->shape[0]);
    with_type16(narrow, [&](auto type) {
      using T = decltype(type);
      MLC_LAUNCH(convert_kernel<T>, static_cast<unsigned>(n + 127) / 128, 128, 0, stream, data<float>(x), data<T>(narrow),
                 data<float>(wide), n);
    });
  });
}
