// The CUDA backward of attention: scores again from lse, and each output with one owner, so that its bits depend on nothing:
// dq by blocks of queries, dk and dv by blocks of keys, what bias and relative need by a pass of its own. attention_cuda.cuh
// has what the passes share.
//   p = exp(s - lse) * factor    dp = do v^T    ds = p * (dp - delta)    dv = p^T do    dk = scale * ds^T q    dq = scale * ds
//   k
#include "attention/attention_cuda.cuh"

namespace mlcore::cuda {
namespace {

constexpr const char* kOp = "attention";

// What a launch computes: long head dims leave room for one sum in registers, so their dk and dv are launches of their own.
enum class Part { dq, dkv, dk, dv };

// What a row of scores needs: lse in log2 units, its factor, delta.
struct RowNumbers {
  float log, factor, delta;

  static MLC_DEVICE RowNumbers of(const AttentionArgs& p, const Head& head, int i) {
    if (i >= p.Tq) return {0.0f, 0.0f, 0.0f};
    const int64_t row = (head.b * p.H + head.h) * p.Tq + i;
    const float lse = p.lse[row];
    return {lse == -INFINITY ? 0.0f : __fmul_rn(lse, kLog2e), p.lse[p.rows() + row], p.delta[row]};
  }
};

// A pair's product becomes the weight that v met, its dp becomes the gradient of product / scale; returns that of the score.
MLC_DEVICE float pair_gradient(const AttentionArgs& p, const Head& head, const RowNumbers& row, int i, int j, bool masked,
                               int mask, float& product, float& dp) {
  float cap_gradient = 1.0f, s = -INFINITY;
  if (!masked || (i < p.Tq && j < p.Tk && sees(p, i, j, mask)))
    s = p.plain() ? product * p.score_scale : score(p, head, product, i, j, &cap_gradient);
  if (s == -INFINITY) {
    product = dp = 0.0f;
    return 0.0f;
  }
  const float weight = exp2f(s - row.log) * row.factor;
  product = weight;
  if (p.drop_below != 0) {
    const bool keep = kept(p, head, i, j);
    product = keep ? weight * p.keep_scale : 0.0f;
    dp = keep ? dp * p.keep_scale : 0.0f;
  }
  const float ds = weight * (dp - row.delta);
  dp = ds * cap_gradient;
  return ds;
}

// delta = <o, do> - d_lse, one warp a row.
template <class T>
__global__ void __launch_bounds__(128) attention_delta(AttentionArgs p) {
  const int64_t row = int64_t{blockIdx.x} * 4 + threadIdx.x / 32;
  const bool live = row < p.rows();
  const int64_t i = live ? row % p.Tq : 0, bh = live ? row / p.Tq : 0, b = bh / p.H, h = bh % p.H;
  const T* o = static_cast<const T*>(p.o.data) + b * p.o.sb + h * p.o.sh + i * p.o.st;
  const T* d_o = static_cast<const T*>(p.d_o.data) + b * p.d_o.sb + h * p.d_o.sh + i * p.d_o.st;
  float total = 0.0f;
  for (int d = threadIdx.x % 32; live && d < p.Dv; d += 32) total += to_float(o[d]) * to_float(d_o[d]);
  total = warp_sum(total);
  if (!live || threadIdx.x % 32 != 0) return;
  p.delta[row] = p.d_lse && p.lse[row] != -INFINITY ? total - p.d_lse[row] : total;
}

// Rows stay and columns come by: queries and keys for dq, keys and queries else. first_sum is dq or dk, second_sum dv.
template <class T, int kDim, Part kPart>
__global__ void __launch_bounds__(Shape<T, kDim>::kThreads, 2) attention_bwd(AttentionArgs p) {
  using S = Shape<T, kDim>;
  constexpr bool kOfQueries = kPart == Part::dq, kFirst = kPart != Part::dv, kSecond = kPart == Part::dkv || kPart == Part::dv;
  constexpr int kStep = S::kCols * S::kLd;
  MLC_DYNAMIC_SMEM(T, tiles);
  __shared__ int flags[S::kWarps];
  __shared__ RowNumbers column_numbers[2][S::kCols];
  T *const x = tiles, *const x2 = x + S::kRows * S::kLd;              // q and do, or k and v
  T *const ys = x2 + S::kRows * S::kLd, *const y2s = ys + 2 * kStep;  // k and v, or q and do
  const int rows = kOfQueries ? p.Tq : p.Tk, cols = kOfQueries ? p.Tk : p.Tq, blocks = (rows + S::kRows - 1) / S::kRows;
  const int row0 =
      (kOfQueries ? blocks - 1 - static_cast<int>(blockIdx.x % blocks) : static_cast<int>(blockIdx.x % blocks)) * S::kRows;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r0 = row0 + 16 * warp;
  const int heads = kOfQueries ? p.H : p.H / p.group, members = kOfQueries ? 1 : p.group;
  const int64_t own = blockIdx.x / blocks, b = own / heads, own_head = own % heads;  // of q, or of k
  load_tile<S, S::kRows>(x, kOfQueries ? p.q : p.k, b, own_head, row0, rows, p.D, p.aligned);
  load_tile<S, S::kRows>(x2, kOfQueries ? p.d_o : p.v, b, own_head, row0, rows, p.Dv, p.aligned);

  float first_sum[kFirst ? kDim / 8 : 1][4] = {}, second_sum[kSecond ? kDim / 8 : 1][4] = {};
  for (int member = 0; member < members; ++member) {
    const int64_t h = own_head * members + member, other = kOfQueries ? own_head / p.group : h;  // other: head of the columns
    const Head head(p, b, h);
    const Visits visits(p, b, h, row0 / kTile, kOfQueries);
    const int64_t pieces = visits.end > visits.begin ? (visits.end - visits.begin) * S::kPieces : 0;
    RowNumbers row_numbers[2];
    if constexpr (kOfQueries)
#pragma unroll
      for (int r = 0; r < 2; ++r) row_numbers[r] = RowNumbers::of(p, head, r0 + lane / 4 + 8 * r);
    const auto first_column = [&](int64_t n) {
      return visits.tile(visits.begin + n / S::kPieces) * kTile + static_cast<int>(n % S::kPieces) * S::kCols;
    };
    const auto load_piece = [&](int64_t n) {
      const int c0 = first_column(n);
      load_tile<S, S::kCols>(ys + n % 2 * kStep, kOfQueries ? p.k : p.q, b, other, c0, cols, p.D, p.aligned);
      load_tile<S, S::kCols>(y2s + n % 2 * kStep, kOfQueries ? p.v : p.d_o, b, other, c0, cols, p.Dv, p.aligned);
      if constexpr (!kOfQueries)
        if (threadIdx.x < S::kCols) column_numbers[n % 2][threadIdx.x] = RowNumbers::of(p, head, c0 + threadIdx.x);
    };
    if (pieces > 0) load_piece(0);
    cp_async_commit();
    for (int64_t n = 0; n < pieces; ++n) {
      if (n + 1 < pieces) load_piece(n + 1);
      cp_async_commit();
      cp_async_wait<1>();
      __syncthreads();
      const T *y = ys + n % 2 * kStep, *y2 = y2s + n % 2 * kStep;
      const int c0 = first_column(n), mask = visits.mask(visits.begin + n / S::kPieces);
      const bool masked =
          kOfQueries ? is_masked(p, row0, S::kRows, c0, S::kCols, mask) : is_masked(p, c0, S::kCols, row0, S::kRows, mask);
      const bool finite = !kOfQueries || !(masked || p.bias) || tile_is_finite<S>(y, p.D, flags);
      const bool hidden =
          masked && (kOfQueries ? is_hidden(p, r0, 16, c0, S::kCols, mask) : is_hidden(p, c0, S::kCols, r0, 16, mask));
      if (!hidden) {
        float s[S::kCols / 8][4] = {}, dp[S::kCols / 8][4] = {};  // (16, kCols)
        product_nt<S>(s, x + 16 * warp * S::kLd, y, p.D);
        if constexpr (kFirst) product_nt<S>(dp, x2 + 16 * warp * S::kLd, y2, p.Dv);
#pragma unroll
        for (int m = 0; m < S::kCols / 8; ++m)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int r = lane / 4 + e / 2 * 8, c = 8 * m + lane % 4 * 2 + e % 2;
            const RowNumbers& numbers = kOfQueries ? row_numbers[e / 2] : column_numbers[n % 2][c];
            const int i = kOfQueries ? r0 + r : c0 + c, j = kOfQueries ? c0 + c : r0 + r;
            pair_gradient(p, head, numbers, i, j, masked, mask, s[m][e], dp[m][e]);
          }
        if constexpr (kSecond) product_nn<S>(second_sum, s, y2, p.Dv);
        if constexpr (kFirst) {
          if (finite) {
            product_nn<S>(first_sum, dp, y, p.D);
          } else {  // an unseen key's infinities must not meet 0; where a key is seen dp already is NaN
            product_nn<S, Read::finite>(first_sum, dp, y, p.D);
          }
        }
      }
      __syncthreads();
    }
  }
  if constexpr (kFirst) store_rows<S, T>(kOfQueries ? p.dq : p.dk, b, own_head, r0, rows, p.D, first_sum, {p.scale, p.scale});
  if constexpr (kSecond) store_rows<S, T>(p.dv, b, own_head, r0, rows, p.Dv, second_sum, {1.0f, 1.0f});
}

// Where sums of ds go: dbias (b, h, rows, Tk), a place of which sums over sum_b sequences, sum_h heads and, if rows is 1, all
// queries; or, where diagonal, drelative (B, H, Tq + Tk - 1).
struct DsSum {
  float* out;
  bool diagonal;
  int heads, rows, sum_b, sum_h;
};

// The mask of tile (qt, kt), or false where it isn't visited.
MLC_DEVICE bool find_tile(const AttentionArgs& p, int64_t b, int64_t h, int qt, int kt, int& mask) {
  const Visits visits(p, b, h, qt, true);
  int64_t lo = visits.begin, hi = visits.end;
  if (visits.cols == nullptr) {
    mask = -1;
    return kt >= lo && kt < hi;
  }
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (visits.cols[mid] < kt) {
      lo = mid + 1;
    } else {
      hi = mid;
    }
  }
  mask = lo < visits.end ? visits.ids[lo] : -1;
  return lo < visits.end && visits.cols[lo] == kt;
}

// ds (16, kCols) of this warp for queries from i0 and keys from j0, which all threads of the block load and compute together.
template <class S, class T>
MLC_DEVICE void piece_ds(const AttentionArgs& p, const Head& head, T* tiles, int i0, int j0, int mask,
                         float (&ds)[S::kCols / 8][4]) {
  T *const q = tiles, *const d_o = q + S::kRows * S::kLd, *const k = d_o + S::kRows * S::kLd, *const v = k + S::kCols * S::kLd;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t hkv = head.h / p.group;
  __syncthreads();  // the last piece has been read
  load_tile<S, S::kRows>(q, p.q, head.b, head.h, i0, p.Tq, p.D, p.aligned);
  load_tile<S, S::kRows>(d_o, p.d_o, head.b, head.h, i0, p.Tq, p.Dv, p.aligned);
  load_tile<S, S::kCols>(k, p.k, head.b, hkv, j0, p.Tk, p.D, p.aligned);
  load_tile<S, S::kCols>(v, p.v, head.b, hkv, j0, p.Tk, p.Dv, p.aligned);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const bool masked = is_masked(p, i0, S::kRows, j0, S::kCols, mask);
  float s[S::kCols / 8][4] = {}, dp[S::kCols / 8][4] = {};
  product_nt<S>(s, q + 16 * warp * S::kLd, k, p.D);
  product_nt<S>(dp, d_o + 16 * warp * S::kLd, v, p.Dv);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = i0 + 16 * warp + lane / 4 + 8 * r;
    const RowNumbers numbers = RowNumbers::of(p, head, i);
#pragma unroll
    for (int m = 0; m < S::kCols / 8; ++m)
#pragma unroll
      for (int e = 2 * r; e < 2 * r + 2; ++e)
        ds[m][e] = pair_gradient(p, head, numbers, i, j0 + 8 * m + lane % 4 * 2 + e % 2, masked, mask, s[m][e], dp[m][e]);
  }
}

// dbias's part of a block: keys from j0, queries from i0 on, or all.
template <class S, class T>
MLC_DEVICE void bias_sum(const AttentionArgs& p, const DsSum& to, T* tiles, float* scratch) {
  const int key_blocks = (p.Tk + S::kCols - 1) / S::kCols, q_blocks = (p.Tq + S::kRows - 1) / S::kRows;
  const int out_blocks = (to.rows + S::kRows - 1) / S::kRows, along = to.rows == 1 ? q_blocks : 1;
  const int j0 = static_cast<int>(blockIdx.x % key_blocks) * S::kCols, rest = static_cast<int>(blockIdx.x / key_blocks);
  const int first = rest % out_blocks, place = rest / out_blocks, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float total[S::kCols / 8][4] = {};
  for (int n = 0; n < to.sum_b * to.sum_h * along; ++n) {
    const int64_t b = place / to.heads + n / along / to.sum_h, h = place % to.heads + n / along % to.sum_h;
    const int i0 = (first + n % along) * S::kRows;
    int mask;
    if (!find_tile(p, b, h, i0 / kTile, j0 / kTile, mask)) continue;
    float ds[S::kCols / 8][4];
    piece_ds<S>(p, Head(p, b, h), tiles, i0, j0, mask, ds);
#pragma unroll
    for (int m = 0; m < S::kCols / 8; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) total[m][e] += ds[m][e];
  }
  float* out = to.out + static_cast<int64_t>(place) * to.rows * p.Tk;
  if (to.rows != 1) {
#pragma unroll
    for (int m = 0; m < S::kCols / 8; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int64_t i = first * S::kRows + 16 * warp + lane / 4 + e / 2 * 8, j = j0 + 8 * m + lane % 4 * 2 + e % 2;
        if (i < to.rows && j < p.Tk) out[i * p.Tk + j] = total[m][e];
      }
    return;
  }
#pragma unroll
  for (int m = 0; m < S::kCols / 8; ++m)
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float sum = total[m][e] + total[m][e + 2];
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(kFullWarp, sum, offset);
      if (lane < 4) scratch[warp * S::kCols + 8 * m + lane * 2 + e] = sum;
    }
  __syncthreads();
  const int c = threadIdx.x;
  if (c >= S::kCols || j0 + c >= p.Tk) return;
  float sum = 0.0f;
  for (int w = 0; w < S::kWarps; ++w) sum += scratch[w * S::kCols + c];
  out[j0 + c] = sum;
}

// drelative's part of a block: kCols diagonals of one head, down all queries.
template <class S, class T>
MLC_DEVICE void diagonal_sum(const AttentionArgs& p, const DsSum& to, T* tiles, float* scratch) {
  const int length = p.Tq + p.Tk - 1, blocks = (length + S::kCols - 1) / S::kCols, own = static_cast<int>(blockIdx.x / blocks);
  const int x0 = static_cast<int>(blockIdx.x % blocks) * S::kCols, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const Head head(p, own / p.H, own % p.H);
  float total = 0.0f;  // of diagonal x0 + threadIdx.x
  for (int i0 = 0; i0 < p.Tq; i0 += S::kRows) {
    const int from = i0 + x0 - (p.Tq - 1), upto = min(from + S::kRows + S::kCols - 2, p.Tk - 1);  // the keys that it meets
    for (int j0 = max(from, 0) / S::kCols * S::kCols; j0 <= upto; j0 += S::kCols) {
      int mask;
      if (!find_tile(p, head.b, head.h, i0 / kTile, j0 / kTile, mask)) continue;
      float ds[S::kCols / 8][4];
      piece_ds<S>(p, head, tiles, i0, j0, mask, ds);
#pragma unroll
      for (int m = 0; m < S::kCols / 8; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          scratch[(16 * warp + lane / 4 + e / 2 * 8) * (S::kCols + 1) + 8 * m + lane % 4 * 2 + e % 2] = ds[m][e];
      __syncthreads();
      for (int r = 0; threadIdx.x < S::kCols && r < S::kRows; ++r) {
        const int c = from + static_cast<int>(threadIdx.x) + r - j0;
        if (c >= 0 && c < S::kCols) total += scratch[r * (S::kCols + 1) + c];
      }
    }
  }
  const int x = x0 + static_cast<int>(threadIdx.x);
  if (threadIdx.x < S::kCols && x < length) to.out[static_cast<int64_t>(own) * length + x] = total;
}

template <class T, int kDim>
__global__ void __launch_bounds__(Shape<T, kDim>::kThreads, 2) attention_ds_sum(AttentionArgs p, DsSum to) {
  using S = Shape<T, kDim>;
  MLC_DYNAMIC_SMEM(T, tiles);
  float* scratch = reinterpret_cast<float*>(tiles + 2 * (S::kRows + S::kCols) * S::kLd);
  if (to.diagonal) {
    diagonal_sum<S>(p, to, tiles, scratch);
  } else {
    bias_sum<S>(p, to, tiles, scratch);
  }
}

struct Gradients {
  const DLTensor *o, *lse, *d_o, *d_lse, *dq, *dk, *dv, *dbias, *drelative, *delta;
};

unsigned grid_of(int64_t blocks) {
  require(blocks < int64_t{1} << 31, kOp, ": the problem must be below 2^31 tiles; got ", blocks);
  return static_cast<unsigned>(blocks);
}

template <class T, int kDim, Part kPart>
void launch_part(const AttentionArgs& p, void* stream) {
  using S = Shape<T, kDim>;
  const bool of_queries = kPart == Part::dq;
  const int64_t heads = of_queries ? p.H : p.H / p.group, rows = of_queries ? p.Tq : p.Tk;
  const int64_t blocks = (rows + S::kRows - 1) / S::kRows * p.B * heads;
  const size_t smem = sizeof(T) * S::kLd * (2 * S::kRows + 4 * S::kCols);
  if (blocks > 0) MLC_LAUNCH((attention_bwd<T, kDim, kPart>), dim3(grid_of(blocks)), S::kThreads, smem, stream, p);
}

template <class T, int kDim>
void launch_sum(const AttentionArgs& p, const DsSum& to, int64_t places, void* stream) {
  using S = Shape<T, kDim>;
  const int64_t length = to.diagonal ? p.Tq + p.Tk - 1 : p.Tk;
  const int64_t blocks = (length + S::kCols - 1) / S::kCols * (to.diagonal ? 1 : (to.rows + S::kRows - 1) / S::kRows) * places;
  const size_t smem = sizeof(T) * S::kLd * 2 * (S::kRows + S::kCols) + sizeof(float) * S::kRows * (S::kCols + 1);
  MLC_LAUNCH((attention_ds_sum<T, kDim>), dim3(grid_of(blocks)), S::kThreads, smem, stream, p, to);
}

void set_gradients(AttentionArgs& p, const Gradients& g, Dtype dtype) {
  const Tensor o(g.o, kOp, "o"), lse(g.lse, kOp, "lse"), d_o(g.d_o, kOp, "d_o"), d_lse(g.d_lse, kOp, "d_lse"),
      dq(g.dq, kOp, "dq"), dk(g.dk, kOp, "dk"), dv(g.dv, kOp, "dv"), delta(g.delta, kOp, "delta");
  const auto rows = [&](const Tensor& t, int64_t H, int64_t length, int64_t D, const char* layout) {
    t.on(kDLCUDA).dtype_in({dtype}).shape_is({p.B, H, length, D}, layout).last_dim_contiguous();
    return Rows{t.raw(), t.stride(0), t.stride(1), t.stride(2)};
  };
  const int64_t Hkv = p.H / p.group;
  p.o = rows(o, p.H, p.Tq, p.Dv, "(B, H, Tq, Dv)"), p.dq = rows(dq, p.H, p.Tq, p.D, "(B, H, Tq, D)");
  p.dk = rows(dk, Hkv, p.Tk, p.D, "(B, Hkv, Tk, D)"), p.dv = rows(dv, Hkv, p.Tk, p.Dv, "(B, Hkv, Tk, Dv)");
  rows(d_o, p.H, p.Tq, p.Dv, "(B, H, Tq, Dv)");
  p.d_o = checked_rows(p, d_o);
  p.lse = lse.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({2, p.B, p.H, p.Tq}, "(2, B, H, Tq)").contiguous().data<float>();
  p.delta = delta.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({p.B, p.H, p.Tq}, "(B, H, Tq)").contiguous().data<float>();
  if (d_lse.present())
    p.d_lse = d_lse.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({p.B, p.H, p.Tq}, "(B, H, Tq)").contiguous().data<float>();
}

void bwd(const HostArgs& a, const Gradients& g, void* stream) {
  Dtype dtype;
  AttentionArgs p = checked_args(a, kOp, dtype);
  set_gradients(p, g, dtype);
  const Tensor dbias(g.dbias, kOp, "dbias"), drelative(g.drelative, kOp, "drelative"), bias(a.bias, kOp, "bias");
  DsSum to_bias{}, to_relative{};
  if (dbias.present()) {
    require(p.bias != nullptr, kOp, ": dbias needs bias");
    dbias.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({bias.size(0), bias.size(1), bias.size(2), p.Tk}, "(B|1, H|1, Tq|1, Tk)");
    dbias.contiguous();
    const int64_t shared_b = bias.size(0) == 1 ? p.B : 1, shared_h = bias.size(1) == 1 ? p.H : 1;
    to_bias = {dbias.data<float>(),
               false,
               static_cast<int>(bias.size(1)),
               static_cast<int>(bias.size(2)),
               static_cast<int>(shared_b),
               static_cast<int>(shared_h)};
  }
  if (drelative.present()) {
    require(p.relative != nullptr, kOp, ": drelative needs relative");
    drelative.on(kDLCUDA).dtype_in({Dtype::f32}).shape_is({p.B, p.H, p.Tq + p.Tk - 1}, "(B, H, Tq + Tk - 1)").contiguous();
    to_relative = {drelative.data<float>(), true, p.H, 1, 1, 1};
  }
  if (p.B == 0 || p.H == 0) return;
  const DeviceGuard device(a.q->device.device_id);
  with_instance(dtype, std::max(p.D, p.Dv), [&](auto t, auto width) {
    using T = decltype(t);
    if (p.Tq > 0) MLC_LAUNCH(attention_delta<T>, dim3(grid_of((int64_t{p.B} * p.H * p.Tq + 3) / 4)), 128, 0, stream, p);
    launch_part<T, width, Part::dq>(p, stream);
    if constexpr (width <= 128) {
      launch_part<T, width, Part::dkv>(p, stream);
    } else {
      launch_part<T, width, Part::dk>(p, stream);
      launch_part<T, width, Part::dv>(p, stream);
    }
    if (p.Tq == 0 || p.Tk == 0) return;
    if (to_bias.out) launch_sum<T, width>(p, to_bias, bias.size(0) * bias.size(1), stream);
    if (to_relative.out) launch_sum<T, width>(p, to_relative, int64_t{p.B} * p.H, stream);
  });
}

}  // namespace
}  // namespace mlcore::cuda

MLC_API int mlc_cuda_attention_bwd(const DLTensor* q, const DLTensor* k, const DLTensor* v, const DLTensor* bias,
                                   const DLTensor* relative, const DLTensor* sinks, int64_t left, int64_t right, int64_t offset,
                                   const DLTensor* row_ptr, const DLTensor* cols, const DLTensor* ids, const DLTensor* bits,
                                   int64_t set_b, int64_t set_h, double scale, double softcap, double dropout_p, int64_t seed,
                                   const DLTensor* o, const DLTensor* lse, const DLTensor* d_o, const DLTensor* d_lse,
                                   DLTensor* dq, DLTensor* dk, DLTensor* dv, DLTensor* dbias, DLTensor* drelative,
                                   DLTensor* delta, void* stream) {
  return mlcore::guard([&] {
    mlcore::cuda::bwd({q, k, v, bias, relative, sinks, left, right, offset, row_ptr, cols, ids, bits, set_b, set_h, scale,
                       softcap, dropout_p, seed},
                      {o, lse, d_o, d_lse, dq, dk, dv, dbias, drelative, delta}, stream);
  });
}
