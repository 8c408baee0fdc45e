// The checks of decoding's C functions that need no value of a tensor: the same on the CPU and on a GPU.
#pragma once
#include <cmath>

#include "attention/attention_decode_kernels.h"

namespace mlcore {

constexpr const char* kDecodeOp = "attention_with_kvcache";

struct CacheArgs {
  const DLTensor *k_cache, *v_cache, *k_scale, *v_scale, *page_table, *lengths;
};

struct DecodeArgs {
  const DLTensor* q;
  CacheArgs caches;
  const DLTensor *starts, *slopes, *sinks;
  int64_t left, right;
  double scale, softcap;
  const DLTensor *o, *lse;
};

// New keys and values (B, Hkv, Tq, D or Dv) and the caches that they are for.
struct AppendProblem {
  DecodeProblem caches;
  Operand k, v;
};

inline Operand operand_of(const Tensor& t) { return {t.raw(), t.stride(0), t.stride(1), t.stride(2)}; }

// The caches and where sequences lie in them; dtype, B, Hkv, D, Dv are set.
inline void set_caches(DecodeProblem& p, const CacheArgs& a, DLDeviceType device) {
  constexpr const char* kOp = kDecodeOp;
  const Tensor k(a.k_cache, kOp, "k_cache"), v(a.v_cache, kOp, "v_cache"), table(a.page_table, kOp, "page_table"),
      lengths(a.lengths, kOp, "lengths");
  k.on(device).dtype_in({p.dtype, Dtype::i8}).rank_is(4, "(pages, Hkv, P, D)").last_dim_contiguous();
  p.pages = k.size(0), p.page_size = k.size(2), p.cache_dtype = k.dtype();
  k.shape_is({p.pages, p.Hkv, p.page_size, p.D}, "(pages, Hkv, P, D)");
  v.on(device)
      .dtype_in({p.cache_dtype})
      .shape_is({p.pages, p.Hkv, p.page_size, p.Dv}, "(pages, Hkv, P, Dv)")
      .last_dim_contiguous();
  const auto cache = [&](const Tensor& rows, const DLTensor* scale_, const char* name) {
    Cache c{operand_of(rows), nullptr, 0, 0, 0};
    const Tensor scale(scale_, kOp, name);
    require(scale.present() == (p.cache_dtype == Dtype::i8), kOp, ": ", name, " must be given with int8 caches, and only then");
    if (!scale.present()) return c;
    scale.on(device).dtype_in({Dtype::f32}).shape_is({p.pages, p.Hkv, p.page_size}, "(pages, Hkv, P)");
    c.scale = scale.data<float>(), c.scale_sb = scale.stride(0), c.scale_sh = scale.stride(1), c.scale_st = scale.stride(2);
    return c;
  };
  p.k = cache(k, a.k_scale, "k_scale"), p.v = cache(v, a.v_scale, "v_scale");
  p.lengths = lengths.on(device).dtype_in({Dtype::i64}).shape_is({p.B}, "(B)").contiguous().data<int64_t>();
  p.room = p.page_size;
  if (table.present()) {
    table.on(device).dtype_in({Dtype::i64}).rank_is(2, "(B, n)").last_dim_contiguous();
    require(table.size(0) == p.B, kOp, ": page_table must be (B, n) with B = ", p.B, "; got ", table.shape_text());
    p.table = table.data<int64_t>(), p.table_sb = table.stride(0);
    p.room *= table.size(1);
  } else {
    require(p.pages == p.B, kOp, ": k_cache must be for B = ", p.B, " sequences; got ", p.pages);
  }
}

inline DecodeProblem checked_decode(const DecodeArgs& a, DLDeviceType device) {
  constexpr const char* kOp = kDecodeOp;
  const Tensor q(a.q, kOp, "q"), k(a.caches.k_cache, kOp, "k_cache"), v(a.caches.v_cache, kOp, "v_cache"),
      starts(a.starts, kOp, "starts"), slopes(a.slopes, kOp, "slopes"), sinks(a.sinks, kOp, "sinks"), o(a.o, kOp, "o"),
      lse(a.lse, kOp, "lse");
  q.on(device).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B, H, Tq, D)").last_dim_contiguous();
  DecodeProblem p{};
  p.dtype = q.dtype();
  p.B = q.size(0), p.H = q.size(1), p.Tq = q.size(2), p.D = q.size(3);
  p.Hkv = k.rank_is(4, "(pages, Hkv, P, D)").size(1), p.Dv = v.rank_is(4, "(pages, Hkv, P, Dv)").size(3);
  require(p.D >= 1 && p.D <= 256 && p.Dv >= 1 && p.Dv <= 256, kOp, ": head dims must be 1 to 256; got D ", p.D, ", Dv ", p.Dv);
  require(p.Hkv > 0 ? p.H % p.Hkv == 0 : p.H == 0, kOp, ": k_cache has ", p.Hkv, " heads, which must divide q's ", p.H);
  require(std::isfinite(a.scale), kOp, ": scale must be finite; got ", a.scale);
  require(std::isfinite(a.softcap) && a.softcap >= 0, kOp, ": softcap must be positive, or 0 for none; got ", a.softcap);
  set_caches(p, a.caches, device);
  if (starts.present()) p.starts = starts.on(device).dtype_in({Dtype::i64}).shape_is({p.B}, "(B)").contiguous().data<int64_t>();
  p.left = a.left < 0 ? Schedule::kUnlimited : a.left, p.right = a.right < 0 ? Schedule::kUnlimited : a.right;
  p.scale = static_cast<float>(a.scale), p.softcap = static_cast<float>(a.softcap);
  if (slopes.present()) {
    slopes.on(device).dtype_in({Dtype::f32}).rank_is(2, "(B|1, H)").contiguous();
    require(slopes.size(1) == p.H && (slopes.size(0) == 1 || slopes.size(0) == p.B), kOp, ": slopes must be (B|1, H) of (", p.B,
            ", ", p.H, "); got ", slopes.shape_text());
    p.slopes = slopes.data<float>(), p.slopes_sb = slopes.size(0) == 1 ? 0 : p.H;
  }
  if (sinks.present()) p.sinks = sinks.on(device).dtype_in({Dtype::f32}).shape_is({p.H}, "(H)").contiguous().data<float>();
  o.on(device).dtype_in({p.dtype}).shape_is({p.B, p.H, p.Tq, p.Dv}, "(B, H, Tq, Dv)").last_dim_contiguous();
  if (lse.present())
    p.lse = lse.on(device).dtype_in({Dtype::f32}).shape_is({p.B, p.H, p.Tq}, "(B, H, Tq)").contiguous().data<float>();
  p.q = operand_of(q), p.o = operand_of(o);
  return p;
}

inline AppendProblem checked_append(const DLTensor* k_, const DLTensor* v_, const CacheArgs& caches, DLDeviceType device) {
  constexpr const char* kOp = kDecodeOp;
  const Tensor k(k_, kOp, "k"), v(v_, kOp, "v");
  k.on(device).dtype_in({Dtype::f32, Dtype::bf16, Dtype::f16}).rank_is(4, "(B, Hkv, Tnew, D)").last_dim_contiguous();
  v.on(device).dtype_in({k.dtype()}).rank_is(4, "(B, Hkv, Tnew, Dv)").last_dim_contiguous();
  DecodeProblem p{};
  p.dtype = k.dtype();
  p.B = k.size(0), p.Hkv = k.size(1), p.Tq = k.size(2), p.D = k.size(3), p.Dv = v.size(3);
  v.shape_is({p.B, p.Hkv, p.Tq, p.Dv}, "(B, Hkv, Tnew, Dv)");
  set_caches(p, caches, device);  // lengths include the new keys
  return {p, operand_of(k), operand_of(v)};
}

}  // namespace mlcore
