// The CUDA kernels of quant_linear and their launchers; the equations are in quant_linear.h, the parts of the product and the
// order of its codes in quant_linear_cuda.cuh. The same text runs on the CPU in tests/native.
#include <algorithm>
#include <climits>

#include "core/tensor.h"
#include "cuda/launch.h"
#include "quant_linear/quant_linear.h"
#include "quant_linear/quant_linear_cuda.cuh"

namespace mlcore::cuda {
namespace {

constexpr const char* kOp = "quant_linear";

// A block owns kRows rows of x by kColumns of y. Its slices of K meet in shared memory at the end.
template <class T, int BITS, int MT, bool INT8>
__global__ void __launch_bounds__(kThreads, 1) quant_linear_product(const Product p) {
  using S = Shape<MT>;
  MLC_DYNAMIC_SMEM(unsigned char, smem);
  __shared__ float factor[S::kRows], row_step[S::kRows];
  auto* stages = reinterpret_cast<Stage<T, BITS, MT>*>(smem);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slice = warp % S::kSlices;
  const int m0 = blockIdx.y * S::kRows, column = warp / S::kSlices * kPanels * kPanelRows, n0 = blockIdx.x * S::kColumns;
  const int panel0 = (n0 + column) / kPanelRows, steps = (p.tiles + S::kSlices - 1) / S::kSlices;
  float c[kPanels][MT][4] = {};
  for (int s = 0; s < p.stages - 1; ++s) {
    if (s < steps) load_stage<T, BITS, MT>(p, stages[s], s, m0, panel0);
    cp_async_commit();
  }
  if constexpr (INT8) measure_rows<T, S::kRows>(p, m0, factor, row_step);
  for (int step = 0; step < steps; ++step) {
    p.stages == kStages ? cp_async_wait<kStages - 2>() : cp_async_wait<0>();
    __syncthreads();  // this step's stage is whole, and the last one's is free
    const int next = step + p.stages - 1;
    if (next < steps) load_stage<T, BITS, MT>(p, stages[next % p.stages], next, m0, panel0);
    cp_async_commit();
    const Stage<T, BITS, MT>& stage = stages[step % p.stages];
#pragma unroll
    for (int chunk = 0; chunk < 2; ++chunk) {
      if constexpr (INT8)
        add_chunk8<T, BITS, MT>(p, stage.x[slice], stage.warp[warp], chunk, factor, c);
      else
        add_chunk<T, BITS, MT>(p, stage.x[slice], stage.warp[warp], chunk, c);
    }
  }
  cp_async_wait<0>();
  __syncthreads();
  float* sums = reinterpret_cast<float*>(smem);  // (kSlices, kRows, kPitch)
#pragma unroll
  for (int i = 0; i < kPanels; ++i)
#pragma unroll
    for (int mt = 0; mt < MT; ++mt)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = slice * S::kRows + 8 * mt + lane % 4 * 2 + e % 2;
        sums[row * S::kPitch + column + i * kPanelRows + lane / 4 + e / 2 * 8] = c[i][mt][e];
      }
  __syncthreads();
  for (int i = threadIdx.x; i < S::kRows * S::kColumns; i += kThreads) {
    const int row = i / S::kColumns, n = n0 + i % S::kColumns;
    const int64_t m = m0 + row;
    if (m >= p.M || n >= p.N) continue;
    float v = 0.0f;
    for (int s = 0; s < S::kSlices; ++s) v += sums[(s * S::kRows + row) * S::kPitch + i % S::kColumns];
    if constexpr (INT8) v *= row_step[row];
    if (p.bias != nullptr) v += p.bias[n];
    v = activate(p.activation, v);
    if (p.residual != nullptr) v += to_float(static_cast<const T*>(p.residual)[m * p.residual_stride + n]);
    if (p.wide)
      static_cast<float*>(p.y)[m * p.y_stride + n] = v;
    else
      static_cast<T*>(p.y)[m * p.y_stride + n] = from_float<T>(v);
  }
}

// Bytes of shared memory that a block may ask for.
size_t shared_limit() {
#ifdef __CUDACC__
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), kOp);
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), kOp);
  return static_cast<size_t>(bytes);
#else
  return 163 << 10;
#endif
}

template <class T, int BITS, int MT, bool INT8>
void launch_product(Product p, void* stream) {
  using S = Shape<MT>;
  const dim3 grid((p.N + S::kColumns - 1) / S::kColumns, (p.M + S::kRows - 1) / S::kRows);
  const size_t sums = sizeof(float) * S::kSlices * S::kRows * S::kPitch, stage = sizeof(Stage<T, BITS, MT>);
  const bool deep = p.tiles > 2 * S::kSlices && kStages * stage <= shared_limit();  // sm_86 and sm_89 have room for two
  p.stages = deep ? kStages : 2;
  const size_t smem = std::max(p.stages * stage, sums);
  MLC_LAUNCH((quant_linear_product<T, BITS, MT, INT8>), grid, dim3(kThreads), smem, stream, p);
}

template <class T>
void launch_variant(const Product& p, int64_t bits, bool int8, void* stream) {
  const bool few = p.M <= 32;
  const auto with_bits = [&](auto wide) {
    constexpr int kBits = decltype(wide)::value;
    if (int8)
      few ? launch_product<T, kBits, 2, true>(p, stream) : launch_product<T, kBits, 8, true>(p, stream);
    else
      few ? launch_product<T, kBits, 2, false>(p, stream) : launch_product<T, kBits, 8, false>(p, stream);
  };
  bits == 4 ? with_bits(std::integral_constant<int, 4>{}) : with_bits(std::integral_constant<int, 8>{});
}

bool divisible(const void* p, uintptr_t by) { return reinterpret_cast<uintptr_t>(p) % by == 0; }

// Scales and zero points of a weight (N, K), which all functions check alike.
struct Vectors {
  Tensor scales, zeros;
  int64_t groups, panels;
  Vectors(const DLTensor* scales_, const DLTensor* zeros_, int64_t N, int64_t K, int64_t bits, int64_t offset, int64_t& size)
      : scales(scales_, kOp, "scales"), zeros(zeros_, kOp, "zeros") {
    require(offset >= 0 && offset <= 255, kOp, ": offset must be 0 to 255; got ", offset);
    require(size >= 1, kOp, ": group_size must be at least 1; got ", size);
    require(N <= INT_MAX / 4 && K <= INT_MAX / 4, kOp, ": the CUDA kernels take at most ", INT_MAX / 4, " rows and columns");
    require(bits >= 1 && bits <= 8, kOp, ": bits must be 1 to 8; got ", bits);
    size = std::min(size, std::max<int64_t>(K, 1));
    groups = (K + size - 1) / size, panels = (N + kPanelRows - 1) / kPanelRows;
    scales.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({panels, groups, kPanelRows}, "(P, G, 16)").contiguous();
    if (zeros.present())
      zeros.on(kDLCUDA).dtype_in({Dtype::u8}).shape_is({panels, groups, kPanelRows}, "(P, G, 16)").contiguous();
  }
  const uint8_t* zeros_data() const { return zeros.present() ? zeros.data<uint8_t>() : nullptr; }
};

void fwd(const DLTensor* x_, const DLTensor* fragments_, const DLTensor* scales, const DLTensor* zeros,
         const DLTensor* codebook, const DLTensor* bias_, const DLTensor* residual_, int64_t bits, int64_t offset,
         int64_t group_size, int64_t activation, int64_t int8, DLTensor* y_, void* stream) {
  const Tensor x(x_, kOp, "x"), fragments(fragments_, kOp, "codes"), bias(bias_, kOp, "bias"),
      residual(residual_, kOp, "residual"), y(y_, kOp, "y");
  x.on(kDLCUDA).dtype_in({Dtype::bf16, Dtype::f16}).rank_is(2, "(M, K)").last_dim_contiguous();
  y.on(kDLCUDA).dtype_in({x.dtype(), Dtype::f32}).rank_is(2, "(M, N)").last_dim_contiguous();
  const int64_t M = x.size(0), K = x.size(1), N = y.size(1);
  y.shape_is({M, N}, "(M, N)");
  require(codebook == nullptr, kOp, ": the CUDA kernels take no codebook; the Triton kernels do");
  require(bits == 4 || bits == 8, kOp, ": fragments have 4 or 8 bits; got ", bits);
  require(activation >= 0 && activation <= 5, kOp, ": activation must be 0 to 5; got ", activation);
  require(M <= INT_MAX / 4 && M <= int64_t{65535} * 64, kOp, ": x must have at most ", 65535 * 64, " rows; got ", M);
  const Vectors w(scales, zeros, N, K, bits, offset, group_size);
  const int64_t padded = (group_size + kChunk - 1) / kChunk * kChunk, tiles = (w.groups * padded + kTile - 1) / kTile;
  require(tiles * kTile <= INT_MAX / 4, kOp, ": groups of ", group_size, " fill too many chunks of ", kChunk);
  fragments.on(kDLCUDA).dtype_in({Dtype::u8}).shape_is({w.panels, tiles * bits * 128}, "(P, bytes of its tiles)").contiguous();
  Product p{};
  if (bias.present()) p.bias = bias.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({N}, "(N)").contiguous().data<float>();
  if (residual.present()) {
    residual.on(kDLCUDA).dtype_in({x.dtype()}).shape_is({M, N}, "(M, N)").last_dim_contiguous();
    p.residual = residual.raw(), p.residual_stride = residual.stride(0);
  }
  if (M == 0 || N == 0) return;
  p.x = x.raw(), p.x_stride = x.stride(0), p.y = y.raw(), p.y_stride = y.stride(0);
  p.fragments = fragments.data<uint8_t>(), p.scales = w.scales.data<float>(), p.zeros = w.zeros_data();
  for (const void* vectors :
       {static_cast<const void*>(p.fragments), static_cast<const void*>(p.scales), static_cast<const void*>(p.zeros)})
    require(divisible(vectors, 16), kOp, ": codes, scales and zeros must be aligned to 16 bytes");
  p.M = static_cast<int>(M), p.N = static_cast<int>(N), p.K = static_cast<int>(K), p.groups = static_cast<int>(w.groups);
  p.group_size = static_cast<int>(group_size), p.group_padded = static_cast<int>(padded), p.tiles = static_cast<int>(tiles);
  p.panels = static_cast<int>(w.panels), p.offset = static_cast<int>(offset), p.activation = static_cast<int>(activation);
  p.wide = y.dtype() == Dtype::f32;
  p.aligned = divisible(p.x, 16) && (M == 1 || p.x_stride % 8 == 0) && (w.groups <= 1 || group_size % 8 == 0);
  const DeviceGuard device(x_->device.device_id);
  if (x.dtype() == Dtype::bf16)
    launch_variant<bf16>(p, bits, int8 != 0, stream);
  else
    launch_variant<f16>(p, bits, int8 != 0, stream);
}

struct Dequantized {
  const uint8_t *codes, *zeros;
  const float *scales, *codebook;
  int64_t N, K, K_padded, w_stride, table_rows;
  int bits, offset, groups, group_size, group_padded;
};

// w (N, K) from codes in the layout of quant_linear.h: one weight a thread.
template <class T>
__global__ void __launch_bounds__(kThreads) quant_linear_dequantize(const Dequantized p, T* w) {
  const int64_t index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (index >= p.N * p.K) return;
  const int64_t n = index / p.K, k = index % p.K;
  const int block = 32 / (p.bits & -p.bits), group = static_cast<int>(k / p.group_size);
  const int64_t at = int64_t{group} * p.group_padded + k % p.group_size, vectors = n / kPanelRows * p.groups + group;
  const int unit = static_cast<int>(at % block) / 4, lane = static_cast<int>(n % kPanelRows);
  const uint8_t* bytes = p.codes + (n / kPanelRows * p.K_padded + at / block * block) * 2 * p.bits + lane * 4 + at % 4;
  int code = 0;
  for (int power = 8, above = 0; power > 0; power /= 2) {
    if (!(p.bits & power)) continue;
    const int per = 8 / power, byte = bytes[(block * above / 32 + unit / per) * 64];
    code |= (byte >> unit % per * power & ((1 << power) - 1)) << above;
    above += power;
  }
  const int64_t vector = vectors * kPanelRows + lane;
  const float value = p.codebook ? p.codebook[(n / p.table_rows << p.bits) + code]
                                 : static_cast<float>(code - (p.zeros ? p.zeros[vector] : p.offset));
  w[n * p.w_stride + k] = from_float<T>(value * p.scales[vector]);
}

void dequantize(const DLTensor* codes_, const DLTensor* scales, const DLTensor* zeros, const DLTensor* codebook_, int64_t bits,
                int64_t offset, int64_t group_size, DLTensor* w_, void* stream) {
  const Tensor codes(codes_, kOp, "codes"), codebook(codebook_, kOp, "codebook"), w(w_, kOp, "w");
  w.on(kDLCUDA).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(2, "(N, K)").last_dim_contiguous();
  const int64_t N = w.size(0), K = w.size(1);
  const Vectors v(scales, zeros, N, K, bits, offset, group_size);
  const int64_t block = 32 / (bits & -bits), padded = (group_size + block - 1) / block * block;
  const int64_t last = K - (v.groups - 1) * group_size;
  Dequantized p{};
  p.K_padded = v.groups == 0 ? 0 : (v.groups - 1) * padded + (last + block - 1) / block * block;
  codes.on(kDLCUDA).dtype_in({Dtype::u8}).shape_is({v.panels, p.K_padded * 2 * bits}, "(P, panel bytes)").contiguous();
  if (codebook.present()) {
    codebook.on(kDLCUDA).dtype_in({Dtype::f32}).rank_is(2, "(T, 2^bits)");
    codebook.shape_is({codebook.size(0), int64_t{1} << bits}, "(T, 2^bits)").contiguous();
    const int64_t T = codebook.size(0), rows = std::max<int64_t>(N, 1);
    require(T >= 1 && T <= rows, kOp, ": codebook must have 1 to N tables; got ", T);
    require(!v.zeros.present(), kOp, ": zeros and codebook exclude each other");
    p.codebook = codebook.data<float>(), p.table_rows = (rows + T - 1) / T;
  }
  if (w.numel() == 0) return;
  p.codes = codes.data<uint8_t>(), p.scales = v.scales.data<float>(), p.zeros = v.zeros_data();
  p.N = N, p.K = K, p.w_stride = w.stride(0), p.bits = static_cast<int>(bits), p.offset = static_cast<int>(offset);
  p.groups = static_cast<int>(v.groups), p.group_size = static_cast<int>(group_size), p.group_padded = static_cast<int>(padded);
  const int64_t blocks = (N * K + kThreads - 1) / kThreads;
  require(blocks <= INT_MAX, kOp, ": w has too many elements for one launch");
  const DeviceGuard device(w_->device.device_id);
  const auto launch = [&](auto element) {
    using T = decltype(element);
    MLC_LAUNCH((quant_linear_dequantize<T>), dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, p, w.data<T>());
  };
  switch (w.dtype()) {
    case Dtype::bf16: return launch(bf16{});
    case Dtype::f16: return launch(f16{});
    default: return launch(float{});
  }
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_quant_linear_fwd(const DLTensor* x, const DLTensor* codes, const DLTensor* scales, const DLTensor* zeros,
                                      const DLTensor* codebook, const DLTensor* bias, const DLTensor* residual, int64_t bits,
                                      int64_t offset, int64_t group_size, int64_t activation, int64_t int8, DLTensor* y,
                                      void* stream) {
  return mlcore::guard([&] {
    mlcore::cuda::fwd(x, codes, scales, zeros, codebook, bias, residual, bits, offset, group_size, activation, int8, y, stream);
  });
}

MLC_API int mlc_cuda_quant_linear_dequantize(const DLTensor* codes, const DLTensor* scales, const DLTensor* zeros,
                                             const DLTensor* codebook, int64_t bits, int64_t offset, int64_t group_size,
                                             DLTensor* w, void* stream) {
  return mlcore::guard([&] { mlcore::cuda::dequantize(codes, scales, zeros, codebook, bits, offset, group_size, w, stream); });
}
